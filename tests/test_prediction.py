"""From a model to a predictions table: names that agree, failures as rows, the same table after a kill."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import bioscan
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.data.predictions import read_predictions, read_record, read_scores
from bioscan.errors import DataError, RequestError
from bioscan.learn import model_folder, models
from bioscan.learn.dataset import ImageSpec, central_crop, resize_shorter
from bioscan.learn.prediction import Naming, predict_batches
from bioscan.vocabulary import RANKS

Paint = Callable[..., tuple[Path, Path]]

# with fewer cores than workers torch warns; the results are what is tested
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SPECIES = {
    "Lepidoptera/Nymphalidae/Vanessa/Vanessa atalanta": (3, 2, 3),
    "Lepidoptera/Nymphalidae/Aglais/Aglais io": (2, 1, 2),
    "Lepidoptera/Pieridae/Pieris/Pieris rapae": (2, 1, 2),
    "Diptera/Syrphidae/Eristalis/Eristalis tenax": (2, 1, 2),
}
SPEC = ImageSpec(image_size=36, crop_size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def make_model(folder: Path, metadata: Path, rank: str = "species", within: str | None = None) -> Path:
    """A model of random weights over the training taxa."""
    frame = bioscan.read_metadata(metadata).filter(pl.col("large_insect_order") == "train")
    if within:
        frame = frame.filter(pl.col("order") == within)
    taxonomy = Taxonomy.build(frame, [rank])
    torch.manual_seed(0)
    network = models.create("test_resnet", num_leaves=taxonomy.num_leaves, crop_size=32)
    model_folder.save(
        folder,
        network.state_dict(),
        backbone="test_resnet",
        taxonomy=taxonomy,
        spec=SPEC,
        record={"experiment": "large_insect_order", "rank": rank, "within": within, "split_hash": "abc"},
        history=[],
    )
    return folder


@pytest.fixture(scope="module")
def insects(paint: Paint) -> tuple[Path, Path]:
    return paint(SPECIES)


@pytest.fixture(scope="module")
def model(insects: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "species", insects[0])


# -- names

NAMES = st.sampled_from(["a", "b", "c", None])
PATHS = st.lists(
    st.tuples(NAMES, NAMES, NAMES, st.sampled_from(["a", "b", "c", "d"])), min_size=1, max_size=8
)


@settings(max_examples=80, deadline=None)
@given(PATHS, st.integers(0, 2**32 - 1))
def test_names_are_one_lineage_and_probabilities_the_sums_over_its_leaves(paths: Any, seed: int) -> None:
    columns = ("order", "family", "genus", "species")
    taxonomy = Taxonomy.build(
        pl.DataFrame(paths, dict.fromkeys(columns, pl.String), orient="row"), ["species"]
    )
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.ones(taxonomy.num_leaves) / 2, 5).astype(np.float32)
    specimens = pl.DataFrame({"sampleid": list("vwxyz"), "image_file": [None] * 5})
    made = Naming.of(taxonomy).table(specimens, probabilities, [None] * 5)
    leaves = [[*path, *[None] * (len(RANKS) - len(path))] for path in taxonomy.leaf_paths]
    for row, values in zip(made.to_dicts(), probabilities, strict=True):
        best = leaves[int(values.argmax())]
        above = 1.0
        for level, rank in enumerate(RANKS):
            if rank not in made.columns:
                continue
            assert row[rank] == best[level]
            if best[level] is None:
                assert row[f"{rank}_probability"] is None
                continue
            total = sum(
                float(p)
                for leaf, p in zip(leaves, values, strict=True)
                if leaf[: level + 1] == best[: level + 1]
            )
            assert row[f"{rank}_probability"] == pytest.approx(min(total, 1), abs=1e-9)
            assert row[f"{rank}_probability"] <= above + 1e-9  # no surer of the genus than of the order
            above = row[f"{rank}_probability"]
        assert (row["assigned_rank"], row["assigned_taxon"]) == ("species", best[7])
        assert row["assigned_probability"] == pytest.approx(float(values.max()))


def test_probabilities_are_the_networks_own(insects: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    metadata, images = insects
    output = tmp_path / "p.parquet"
    bioscan.predict(model, metadata, output, images=images, roles=["test"], batch_size=4)
    table, scores = read_predictions(output), read_scores(output)
    assert scores is not None
    ((_, probabilities_NL),) = scores.batches()
    loaded = model_folder.load(model)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (SPEC.mean, SPEC.std))
    for row, given_L in zip(table.to_dicts(), probabilities_NL, strict=True):
        pixels = torch.from_numpy(np.array(Image.open(images / row["image_file"]))).permute(2, 0, 1)
        image = central_crop(resize_shorter(pixels, 36), 32).float() / 255
        with torch.no_grad():
            wanted = torch.softmax(loaded.network(((image - mean) / std)[None])[0], 0).numpy()
        assert given_L == pytest.approx(wanted, abs=0.02)  # 16-bit arithmetic where the CPU has it
        best = loaded.taxonomy.leaf_paths[int(given_L.argmax())]
        assert (row["order"], row["family"], row["genus"], row["species"]) == (
            best[2],
            best[3],
            best[6],
            best[7],
        )
    assert scores.leaves == loaded.taxonomy.leaf_paths
    assert table["sampleid"].to_list() == [
        key
        for key, role in bioscan.read_metadata(metadata).select("sampleid", "large_insect_order").iter_rows()
        if role == "test"
    ]


def test_batches_and_workers_change_no_name_and_no_order(
    insects: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    metadata, images = insects
    made = []
    for number, options in enumerate(
        ({"batch_size": 64}, {"batch_size": 3}, {"batch_size": 3, "workers": 2})
    ):
        output = tmp_path / f"{number}.parquet"
        bioscan.predict(model, metadata, output, images=images, **options)
        made.append(read_predictions(output))
    names = ["sampleid", "species", "error"]
    assert made[0].select(names).equals(made[1].select(names))
    assert made[1].equals(made[2])


# -- which specimens


def test_by_default_the_validation_and_test_specimens_of_the_split(
    insects: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    metadata, images = insects
    whose: dict[str, Any] = {"default": {}, "test": {"roles": ["test"]}, "all": {"roles": []}}
    counts = {}
    for name, options in whose.items():
        output = tmp_path / f"{name}.parquet"
        counts[name] = bioscan.predict(model, metadata, output, images=images, **options)["specimens"]
        assert (read_scores(output) is not None) is (name != "all")
    assert counts == {"default": 5 + 9, "test": 9, "all": 9 + 5 + 9}
    assert read_record(tmp_path / "test.parquet")["roles"] == ["test"]


def test_a_model_of_one_order_names_its_specimens_unless_asked_for_all(
    insects: tuple[Path, Path], tmp_path: Path
) -> None:
    metadata, images = insects
    folder = make_model(tmp_path / "leps", metadata, within="Lepidoptera")
    made = bioscan.predict(folder, metadata, tmp_path / "p.parquet", images=bioscan.Images(images))
    assert made["specimens"] == 4 + 7
    assert (
        bioscan.predict(folder, metadata, tmp_path / "q.parquet", images=images, roles=[])["specimens"] == 23
    )


def test_a_catalogue_without_the_models_split_column_is_predicted_whole(
    insects: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    table = pl.read_csv(insects[0], separator="\t").drop("large_insect_order", "sampleid")
    table.write_csv(tmp_path / "field.tsv", separator="\t")
    bioscan.predict(model, tmp_path / "field.tsv", tmp_path / "p.csv", images=insects[1])
    made = read_predictions(tmp_path / "p.csv")
    assert made.height == 23
    assert made["sampleid"].null_count() == 23
    assert made["image_file"].to_list() == table["image_file"].to_list()


def test_bare_photographs_are_named_by_their_file(
    insects: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number, name in enumerate(("b.jpg", "a.png", "c.jpg")):
        Image.new("RGB", (30 + number, 50), (90, 40, 200)).save(folder / name)
    (folder / "c.jpg").write_bytes((folder / "c.jpg").read_bytes()[:-200])
    made = bioscan.predict(model, folder, tmp_path / "p.csv")
    assert (made["specimens"], made["failed"]) == (3, 1)
    assert made["first_failed"][0]["image_file"] == "c.jpg"
    rows = {row["image_file"]: row for row in read_predictions(tmp_path / "p.csv").to_dicts()}
    assert rows.keys() == {"a.png", "b.jpg", "c.jpg"}
    assert rows["a.png"]["species"] in {taxon.split("/")[-1] for taxon in SPECIES}
    assert rows["c.jpg"]["species"] is None
    assert not (tmp_path / "p.scores.parquet").exists()


# -- failures


def test_a_failure_is_a_row_in_its_place(paint: Paint, model: Path, tmp_path: Path) -> None:
    metadata, images = paint(SPECIES)
    keys = bioscan.read_metadata(metadata)["image_file"].to_list()
    (images / keys[1]).write_bytes(b"")
    (images / keys[4]).unlink()
    (images / keys[22]).write_text("a letter")
    made = bioscan.predict(
        model, metadata, tmp_path / "p.parquet", images=images, roles=[], batch_size=4, scores=True
    )
    table, scores = read_predictions(tmp_path / "p.parquet"), read_scores(tmp_path / "p.parquet")
    assert scores is not None
    ((_, probabilities_NL),) = scores.batches()
    assert table["image_file"].to_list() == keys
    errors = dict(table.filter(pl.col("error").is_not_null()).select("image_file", "error").iter_rows())
    assert errors.keys() == {keys[1], keys[4], keys[22]}
    assert errors[keys[1]].startswith("empty file")
    assert errors[keys[4]].startswith("not in the package")
    assert errors[keys[22]].startswith("not an image")
    bad = table["error"].is_not_null().to_numpy()
    named = table.filter(bad).select("species", "species_probability", "assigned_taxon")
    assert named.null_count().row(0) == (3, 3, 3)
    assert table.filter(~bad)["assigned_probability"].null_count() == 0
    assert np.isnan(probabilities_NL).all(axis=1).tolist() == bad.tolist()
    assert made["failed"] == 3


def test_a_table_of_absent_images_is_all_failures_in_bounded_batches(
    paint: Paint, model: Path, tmp_path: Path
) -> None:
    metadata, _ = paint(SPECIES)
    (tmp_path / "other").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "other/x.jpg")
    frame = bioscan.read_metadata(metadata).select("sampleid", "image_file").with_columns(row=pl.lit(-1))
    package = bioscan.Images(tmp_path / "other")
    heights = [
        table.height for table, _ in predict_batches(model_folder.load(model), package, frame, batch_size=10)
    ]
    assert heights == [10, 10, 3]
    made = bioscan.predict(model, metadata, tmp_path / "p.parquet", images=package)
    assert (made["specimens"], made["failed"], len(made["first_failed"])) == (14, 14, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a catalogue needs --images, the package of its photographs"),
        ({"roles": ["tset"], "images": 1}, "unknown role 'tset'; did you mean 'test'"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"workers": -1}, "workers is -1; it must be at least 0"),
    ],
)
def test_a_wrong_request_is_told(
    insects: tuple[Path, Path], model: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    if "images" in options:
        options = {**options, "images": insects[1]}
    with pytest.raises(RequestError, match=message):
        bioscan.predict(model, insects[0], tmp_path / "p.parquet", **options)
    assert list(tmp_path.iterdir()) == []


def test_images_go_with_a_catalogue_only(insects: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is a package of images itself; --images goes with a catalogue"):
        bioscan.predict(model, insects[1], tmp_path / "p.csv", images=insects[1])


def test_an_altered_model_names_nothing(insects: tuple[Path, Path], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", insects[0])
    path = folder / "model.json"
    path.write_text(path.read_text().replace("Aglais io", "Inachis io"))
    with pytest.raises(DataError, match="was altered after training"):
        bioscan.predict(folder, insects[1], tmp_path / "p.csv")


def test_nothing_is_overwritten_unless_told(insects: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    output = tmp_path / "p.csv"
    output.write_text("mine")
    with pytest.raises(RequestError, match="exists"):
        bioscan.predict(model, insects[1], output)
    assert output.read_text() == "mine"
    assert bioscan.predict(model, insects[1], output, overwrite=True)["failed"] == 0


# -- kills

CHILD = """
import os, signal, sys
import bioscan
from bioscan.jobs import predict

predict._BLOCK_ROWS = 4

def progress(done, total):
    if done >= 14:
        os.kill(os.getpid(), signal.SIGKILL)

options = {"roles": [], "scores": True, "batch_size": 4, "threads": 1}
bioscan.predict(*sys.argv[1:4], images=sys.argv[4], **options, progress=progress)
"""


def test_a_killed_job_goes_on_where_it_was_and_ends_with_the_same_table(
    insects: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    metadata, images = insects
    options: dict[str, Any] = {"images": images, "roles": [], "scores": True, "batch_size": 4, "threads": 1}
    child = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            CHILD,
            *map(str, (model, metadata, tmp_path / "p.parquet", images)),
        ],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert not (tmp_path / "p.parquet").exists()
    told: list[int] = []
    bioscan.predict(
        model, metadata, tmp_path / "p.parquet", **options, progress=lambda done, total: told.append(done)
    )
    assert told == [20, 23]  # sixteen were kept
    bioscan.predict(model, metadata, tmp_path / "q.parquet", **options)
    for ending in ("parquet", "scores.parquet"):
        one, other = (pl.read_parquet(tmp_path / f"{name}.{ending}") for name in ("p", "q"))
        assert one.equals(other)
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{name}.{ending}" for name in ("p", "q") for ending in ("parquet", "scores.parquet")
    }
