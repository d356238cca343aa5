"""The same work on a real Ray cluster of two nodes, one of which is killed on the way."""

import importlib
import os
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from bioscan.data.images import Images
from bioscan.errors import DataError, ImageError, RequestError
from bioscan.jobs.bulk import Bulk, Made, each, run_bulk
from bioscan.parallel import map_shards

pytest.importorskip("ray", reason="Ray is not installed")

COUNT = 60


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster: a head without cores, for this process, and two nodes of one core."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with warnings.catch_warnings(action="ignore"):
        ray: Any = importlib.import_module("ray")
        from ray.cluster_utils import Cluster

        cloudpickle: Any = ray.cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the nodes do not have the tests
        # a death is noticed in seconds, not in a quarter of a minute
        health = {"health_check_period_ms": 300, "health_check_timeout_ms": 3000}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": health}
        cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(num_cpus=1)
        cluster.add_node(num_cpus=1)
    yield cluster
    with warnings.catch_warnings(action="ignore"):
        cluster.shutdown()
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = tmp_path_factory.mktemp("source")
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for number in range(COUNT):
            data = np.random.default_rng(number).bytes(5000)
            archive.writestr(f"part{number // 25 + 1}/{number:03d}.jpg", data)
    return Images(folder / "photos.zip")


def fail(kind: type[Exception], number: int) -> int:
    if number == 2:
        raise ImageError("a.jpg", "x.zip @ 3", "truncated") if kind is ImageError else kind("no")
    return number * number


def die(number: int) -> int:
    if number == 1:
        os._exit(3)
    return number


def slow_copy(nodes_seen: str, images: Images, row: int) -> Made:
    """A copy; tells which node made it."""
    import ray

    if ray.is_initialized():
        (Path(nodes_seen) / ray.get_runtime_context().get_node_id()).touch()
        time.sleep(0.05)
    data = images.read(row)
    return Made(images.name(row), images.index.item(row, "part"), data, {"size": len(data)})


def run(source: Images, target: Path, seen: Path, **more: Any) -> Bulk:
    schema = pl.Schema({"size": pl.Int64()})
    step = each(partial(slow_copy, str(seen)))
    return run_bulk(source, step, target, record={}, rows_schema=schema, shard_images=5, **more)


def test_a_node_that_is_killed_on_the_way_loses_nothing(nodes: Any, source: Images, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    local = run(source, tmp_path / "local/out.zip", seen, workers=1)
    killed: list[str] = []

    def progress(done: int, total: int | None = None) -> None:
        if done >= 20 and not killed and len(list(seen.iterdir())) == 2:
            node = nodes.list_all_nodes()[-1]
            killed.append(node.node_id)
            nodes.remove_node(node, allow_graceful=False)

    bulk = run(source, tmp_path / "ray/out.zip", seen, engine="ray", address=nodes.address, progress=progress)
    assert {node.name for node in seen.iterdir()} > {*killed}  # both were at work
    assert len(killed) == 1
    assert (tmp_path / "ray/out.zip").read_bytes() == (tmp_path / "local/out.zip").read_bytes()
    assert bulk.rows.equals(local.rows)
    assert [p.name for p in (tmp_path / "ray").iterdir()] == ["out.zip"]


def test_errors_and_results_are_those_of_the_local_engine(
    nodes: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    ray_engine = partial(map_shards, engine="ray", address=nodes.address)
    taken: list[int] = []
    shards = (taken.append(n) or n for n in range(2, 90))  # type: ignore[func-returns-value]
    results = ray_engine(partial(fail, KeyError), shards, workers=1)
    with pytest.raises(KeyError, match="no"):
        next(results)
    assert taken == [2]
    assert sorted(ray_engine(partial(fail, ImageError), range(2))) == [(0, 0), (1, 1)]
    with pytest.raises(ImageError) as caught:
        list(ray_engine(partial(fail, ImageError), range(4)))
    assert (caught.value.name, caught.value.place, caught.value.reason) == ("a.jpg", "x.zip @ 3", "truncated")
    with pytest.raises(DataError, match="shard 1: the worker that had it died, 1 times"):
        list(ray_engine(die, range(2), retries=0))
    assert capfd.readouterr() == ("", "")


def test_a_cluster_that_is_not_there_is_a_wrong_address() -> None:
    with pytest.raises(RequestError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        list(map_shards(abs, range(2), engine="ray", address="127.0.0.1:1"))
