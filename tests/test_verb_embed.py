"""`bioscan embed`: the command, its file, and going on after an interruption."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from bioscan.data.embeddings import read_embeddings
from bioscan.errors import RequestError
from bioscan.jobs import embed as job

Run = Callable[..., tuple[int, str, str]]
ORDERS = {"Diptera": (6, 2, 2), "Lepidoptera": (5, 1, 2)}


def test_a_catalogue_is_embedded_by_its_keys(
    tmp_path: Path, paint: Callable[..., tuple[Path, Path]], run_bioscan: Run, small: list[object]
) -> None:
    metadata, images = paint(ORDERS)
    target = tmp_path / "e.parquet"
    status, out, err = run_bioscan("embed", metadata, "--images", images, "-o", target, *small)
    assert (status, err) == (0, "")
    assert "18 of 18 photographs: 96 features by test_resnet" in out
    made = read_embeddings(target)
    known = pl.read_csv(metadata, separator="\t", infer_schema=False)
    pairs = made.keys.sort("sampleid").rows()
    assert pairs == known.select("sampleid", "image_file").sort("sampleid").rows()
    assert pl.read_parquet_schema(target)["embedding"] == pl.Array(pl.Float16, 96)
    assert made.record["image"] == {
        "image_size": 36,
        "crop_size": 32,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }
    assert len(made.record["weights_sha256"]) == 64
    assert str(tmp_path) not in json.dumps(made.record)


def test_bare_photographs_have_no_sampleid_and_full_precision_where_asked(
    tmp_path: Path, paint: Callable[..., tuple[Path, Path]], run_bioscan: Run, small: list[object]
) -> None:
    _, images = paint(ORDERS)
    half, full = tmp_path / "half.parquet", tmp_path / "full.parquet"
    assert run_bioscan("embed", images, "-o", half, *small)[0] == 0
    status, out, _ = run_bioscan("embed", images, "-o", full, *small, "--precision", "float32", "--json")
    assert status == 0
    assert json.loads(out)["embedded"] == 18
    one, other = read_embeddings(half), read_embeddings(full)
    assert one.keys["sampleid"].null_count() == 18
    every = np.arange(18)
    np.testing.assert_array_equal(one.rows(every), other.rows(every).astype(np.float16).astype(np.float32))


def test_photographs_that_cannot_be_read_or_are_absent_are_left_out_and_listed(
    tmp_path: Path, paint: Callable[..., tuple[Path, Path]], run_bioscan: Run, small: list[object]
) -> None:
    metadata, images = paint(ORDERS)
    (images / "Diptera-train-0.jpg").write_bytes(b"broken")
    (images / "Diptera-train-1.jpg").unlink()
    target, failures = tmp_path / "e.parquet", tmp_path / "failures.csv"
    status, out, err = run_bioscan(
        "embed", metadata, "--images", images, "-o", target, *small, "--failures", failures
    )
    assert status == 1
    assert "16 of 18 photographs" in out
    assert "2 of 18 images failed" in err
    told = pl.read_csv(failures)
    assert dict(told.select("name", "reason").rows())["Diptera-train-1.jpg"] == "not in the package"
    assert read_embeddings(target).keys.height == 16


def test_a_broken_job_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path,
    paint: Callable[..., tuple[Path, Path]],
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metadata, images = paint(ORDERS)
    monkeypatch.setattr(job, "_SHARD", 4)  # 18 photographs: 5 shards
    asked: dict[str, Any] = {
        "model": "test_resnet",
        "weights": str(weights),
        "images": images,
        "image_size": 36,
        "crop_size": 32,
    }

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    whole, target = tmp_path / "whole.parquet", tmp_path / "e.parquet"
    assert job.embed(metadata, whole, **asked)["resumed_shards"] == 0
    with pytest.raises(KeyboardInterrupt):
        job.embed(metadata, target, **asked, progress=stop)
    assert not target.exists()
    with pytest.raises(RequestError, match=r"unfinished job with other settings \(precision"):
        job.embed(metadata, target, **asked, precision="float32")
    sidecar = sorted((tmp_path / ".e.parquet.unfinished" / "shards").glob("*.parquet"))[0]
    sidecar.write_bytes(sidecar.read_bytes()[:50])  # the machine stopped while it was written
    seen: list[int] = []
    made = job.embed(metadata, target, **asked, progress=lambda done, total: seen.append(done))
    assert made["resumed_shards"] == 1
    assert seen == [4, 8, 12, 16, 18]
    assert target.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.parquet", "whole.parquet"]


def test_two_processes_make_the_same_as_one(
    tmp_path: Path,
    paint: Callable[..., tuple[Path, Path]],
    run_bioscan: Run,
    small: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, images = paint(ORDERS)
    monkeypatch.setattr(job, "_SHARD", 9)
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    assert run_bioscan("embed", images, "-o", one, *small, "--threads", 1)[0] == 0
    assert run_bioscan("embed", images, "-o", two, *small, "--workers", 2)[0] == 0
    every = np.arange(18)
    first, second = read_embeddings(one), read_embeddings(two)
    assert first.keys.equals(second.keys)
    np.testing.assert_allclose(first.rows(every), second.rows(every), atol=2e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-o", "e.csv"], "embeddings are a .parquet file"),
        (["-o", "e.parquet", "--batch-size", 0], "batch_size is 0"),
        (["-o", "there.parquet"], "there.parquet exists; choose another name or pass --overwrite"),
        (["-o", "e.parquet", "--images", "x"], "is a package of images itself"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_2(
    tmp_path: Path,
    paint: Callable[..., tuple[Path, Path]],
    run_bioscan: Run,
    small: list[object],
    more: list[object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, images = paint(ORDERS)
    monkeypatch.chdir(tmp_path)
    Path("there.parquet").touch()
    status, out, err = run_bioscan("embed", images, *small, *more)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.parquet"]


def test_a_catalogue_needs_its_images(
    tmp_path: Path, paint: Callable[..., tuple[Path, Path]], run_bioscan: Run, small: list[object]
) -> None:
    metadata, images = paint(ORDERS)
    catalogue, target = tmp_path / "c.parquet", tmp_path / "e.parquet"
    assert run_bioscan("import", metadata, catalogue)[0] == 0
    status, _, err = run_bioscan("embed", catalogue, "-o", target, *small)
    assert status == 2
    assert "a catalogue needs --images" in err
    assert run_bioscan("embed", catalogue, "--images", images, "-o", target, *small)[0] == 0


def test_random_weights_are_refused(
    tmp_path: Path, paint: Callable[..., tuple[Path, Path]], run_bioscan: Run
) -> None:
    _, images = paint(ORDERS)
    status, _, err = run_bioscan(
        "embed", images, "-o", tmp_path / "e.parquet", "--model", "test_resnet", "--weights", "none"
    )
    assert status == 2
    assert "random weights make features that say nothing" in err


@pytest.mark.slow
def test_a_ray_cluster_makes_the_same(
    tmp_path: Path,
    paint: Callable[..., tuple[Path, Path]],
    run_bioscan: Run,
    small: list[object],
) -> None:
    pytest.importorskip("ray")
    _, images = paint(ORDERS)
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    assert run_bioscan("embed", images, "-o", one, *small, "--threads", 1)[0] == 0
    assert run_bioscan("embed", images, "-o", two, *small, "--engine", "ray", "--workers", 1)[0] == 0
    every = np.arange(18)
    np.testing.assert_allclose(read_embeddings(one).rows(every), read_embeddings(two).rows(every), atol=2e-3)
