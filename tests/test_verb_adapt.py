"""`bioscan adapt`: from labels to a model folder that `bioscan predict` takes."""

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch

from bioscan.learn import model_folder
from bioscan.learn.compat import import_timm
from bioscan.learn.embeddings import backbone_sha256

Run = Callable[..., tuple[int, str, str]]
Paint = Callable[..., tuple[Path, Path]]
INSECTS = {
    "Diptera/Muscidae/Musca/Musca domestica": (6, 0, 4),
    "Diptera/Muscidae/Fannia/Fannia canicularis": (5, 0, 4),
    "Lepidoptera/Nymphalidae/Vanessa/Vanessa atalanta": (4, 0, 4),
}


def labelled(metadata: Path, *columns: str, role: str = "train") -> pl.DataFrame:
    """Rows of a role; `label` is the species."""
    frame = pl.read_csv(metadata, separator="\t", infer_schema=False)
    frame = frame.with_columns(label="species").filter(pl.col("large_insect_order") == role)
    return frame.select("image_file", *columns)


def named(predictions: Path, metadata: Path, rank: str = "species") -> float:
    """Share of the test photographs that were named right."""
    truth = pl.read_csv(metadata, separator="\t", infer_schema=False).select("image_file", truth=rank)
    both = pl.read_parquet(predictions).join(truth, on="image_file")
    assert both.height == 12
    return float((both[rank] == both["truth"]).mean())  # type: ignore[arg-type]


@pytest.mark.parametrize("head", ["linear", "prototype", "nearest"])
def test_labelled_photographs_make_a_model_that_names_new_ones(
    head: str, tmp_path: Path, paint: Paint, run_bioscan: Run, small: list[object], weights: Path
) -> None:
    metadata, images = paint(INSECTS)
    labels, model = tmp_path / "labels.csv", tmp_path / "model"
    labelled(metadata, "label").write_csv(labels)
    status, out, err = run_bioscan("adapt", images, "--labels", labels, "-o", model, "--head", head, *small)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[1].split() == ["Vanessa", "atalanta", "species", "4", "4", "of", "4"]
    assert "15 photographs, 3 taxa at species" in lines
    assert f"model: {model}" in lines
    test = tmp_path / "test.csv"
    labelled(metadata, role="test").write_csv(test)
    predictions = tmp_path / "p.parquet"
    assert run_bioscan("predict", model, test, "--images", images, "-o", predictions)[0] == 0
    assert named(predictions, metadata) == 1
    network = import_timm().create_model("test_resnet")
    network.load_state_dict(torch.load(weights, weights_only=True))
    loaded = model_folder.load(model)
    assert backbone_sha256(loaded.network) == backbone_sha256(network)
    assert loaded.target_counts_N.sum() == 15
    assert loaded.info["adapted"]["head"] == head


def test_several_ranks_and_partly_named_photographs_make_one_tree(
    tmp_path: Path, paint: Paint, run_bioscan: Run, small: list[object]
) -> None:
    metadata, images = paint(INSECTS)
    frame = labelled(metadata, "order", "family", "species")
    coarse = pl.col("image_file").str.ends_with("-0.jpg")  # one of each species known to its family only
    frame = frame.with_columns(pl.when(~coarse).then("species").alias("species"))
    labels = tmp_path / "labels.csv"
    frame.write_csv(labels)
    status, out, _ = run_bioscan("adapt", images, "--labels", labels, "-o", tmp_path / "m", *small, "--json")
    assert status == 0
    told = json.loads(out)
    assert (told["ranks"], told["classes"], told["specimens"]) == (["order", "family", "species"], 3, 15)
    assert {(row["taxon"], row["specimens"]) for row in told["counts"]} == {
        ("Muscidae", 2),
        ("Nymphalidae", 1),
        ("Musca domestica", 5),
        ("Fannia canicularis", 4),
        ("Vanessa atalanta", 3),
    }
    assert told["left_out"] == {}
    test, predictions = tmp_path / "test.csv", tmp_path / "p.parquet"
    labelled(metadata, role="test").write_csv(test)
    run_bioscan("predict", tmp_path / "m", test, "--images", images, "-o", predictions)
    assert named(predictions, metadata) == named(predictions, metadata, "order") == 1
    status, out, _ = run_bioscan(
        *(
            "adapt",
            images,
            "--labels",
            labels,
            "-o",
            tmp_path / "p",
            *small,
            "--json",
            "--head",
            "prototype",
        )
    )
    told = json.loads(out)
    assert told["specimens"] == 12
    assert told["left_out"] == {"no name at the lowest rank, which head prototype needs": 3}


def test_embeddings_make_the_same_model_as_their_photographs(
    tmp_path: Path, paint: Paint, run_bioscan: Run, small: list[object], weights: Path
) -> None:
    metadata, images = paint(INSECTS)
    labels = tmp_path / "labels.csv"
    labelled(metadata, "species").write_csv(labels)
    stored = tmp_path / "e.parquet"
    run_bioscan("embed", images, "-o", stored, "--precision", "float32", *small)
    status, _, err = run_bioscan(
        "adapt", stored, "--labels", labels, "-o", tmp_path / "one", "--weights", weights
    )
    assert (status, err) == (0, "")
    assert run_bioscan("adapt", images, "--labels", labels, "-o", tmp_path / "other", *small)[0] == 0
    one, other = (model_folder.load(tmp_path / name).network.state_dict() for name in ("one", "other"))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=1e-3, rtol=1e-3)


def test_embeddings_of_a_catalogue_are_found_by_sampleid(
    tmp_path: Path, paint: Paint, run_bioscan: Run, small: list[object], weights: Path
) -> None:
    metadata, images = paint(INSECTS)
    stored, labels = tmp_path / "e.parquet", tmp_path / "labels.csv"
    run_bioscan("embed", metadata, "--images", images, "-o", stored, *small)
    frame = pl.read_csv(metadata, separator="\t", infer_schema=False)
    frame = frame.filter(pl.col("large_insect_order") == "train").reverse()
    pl.concat([frame, frame[:1].with_columns(sampleid=pl.lit("S0"))]).select("sampleid", "species").write_csv(
        labels
    )
    status, out, _ = run_bioscan(
        "adapt", stored, "--labels", labels, "-o", tmp_path / "m", "--weights", weights, "--head", "prototype"
    )
    assert status == 0
    assert "left out: 1 with no photograph here" in out
    test, predictions = tmp_path / "test.csv", tmp_path / "p.parquet"
    labelled(metadata, role="test").write_csv(test)
    run_bioscan("predict", tmp_path / "m", test, "--images", images, "-o", predictions)
    assert named(predictions, metadata) == 1


def test_a_trained_model_is_a_backbone_too(
    tmp_path: Path, paint: Paint, run_bioscan: Run, small: list[object]
) -> None:
    metadata, images = paint(INSECTS)
    orders, species = tmp_path / "orders.csv", tmp_path / "species.csv"
    labelled(metadata, "order").write_csv(orders)
    labelled(metadata, "species").write_csv(species)
    first, second, stored = tmp_path / "first", tmp_path / "second", tmp_path / "e.parquet"
    assert run_bioscan("adapt", images, "--labels", orders, "-o", first, *small)[0] == 0
    assert run_bioscan("embed", images, "-o", stored, "--model", first)[0] == 0
    status, _, err = run_bioscan("adapt", stored, "--labels", species, "-o", second)
    assert status == 2
    assert "was made by a model folder; name it: --model FOLDER" in err
    assert run_bioscan("adapt", stored, "--labels", species, "-o", second, "--model", first)[0] == 0
    assert model_folder.load(second).taxonomy.num_leaves == 3


def test_embeddings_of_other_weights_are_refused(
    tmp_path: Path, paint: Paint, run_bioscan: Run, small: list[object]
) -> None:
    metadata, images = paint(INSECTS)
    labels, stored, others = tmp_path / "labels.csv", tmp_path / "e.parquet", tmp_path / "others.pt"
    labelled(metadata, "species").write_csv(labels)
    run_bioscan("embed", images, "-o", stored, *small)
    torch.manual_seed(4)
    torch.save(import_timm().create_model("test_resnet").state_dict(), others)
    status, _, err = run_bioscan(
        "adapt", stored, "--labels", labels, "-o", tmp_path / "m", "--weights", others
    )
    assert status == 2
    assert "embeddings of test_resnet with other weights" in err
    assert not (tmp_path / "m").exists()


def test_photographs_that_are_absent_or_broken_are_counted_and_listed(
    tmp_path: Path, paint: Paint, run_bioscan: Run, small: list[object]
) -> None:
    metadata, images = paint(INSECTS)
    labels = tmp_path / "labels.csv"
    frame = labelled(metadata, "label")
    more = pl.DataFrame({"image_file": ["absent.jpg", "Musca_domestica-test-0.jpg"], "label": ["Apis", None]})
    pl.concat([frame, more]).write_csv(labels)
    (images / "Musca_domestica-train-2.jpg").write_bytes(b"broken")
    status, out, err = run_bioscan("adapt", images, "--labels", labels, "-o", tmp_path / "m", *small)
    assert status == 1
    assert "left out: 1 with no name" in out
    assert "left out: 1 with no photograph here" in out
    assert "14 photographs, 3 taxa at species" in out
    assert "1 of 15 images failed" in err
    assert "Musca_domestica-train-2.jpg" in err


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ("image_file,label\nabsent.jpg,A\n", [], "none of the labels in labels.csv belongs to a photograph"),
        ("image_file,size\nFannia_canicularis-train-0.jpg,3\n", [], "labels.csv: no names; a column 'label'"),
        ("image_file,label\n{0},A\n{1},A\n", [], "all labelled photographs are A"),
        ("image_file,label\n{0},A\n{1},B\n", [], "no taxon has two specimens"),
        ("image_file,label,species\n{0},A,B\n", [], "has columns label and species; keep one"),
        ("image_file,label\n{0},A\n{1},B\n", ["--ranks", "genus"], "no names at rank genus (known: species)"),
        ("image_file,label\n{0},A\n{1},B\n", ["--label-rank", "specie"], "did you mean 'species'"),
        ("image_file,label\n{0},A\n{0},B\n", [], "{0}"),
        ("image_file,label\n{0},A\n{1},B\n", ["--l2", "0"], "l2 is 0.0; it must be above 0"),
        ("sampleid,label\nS1,A\nS2,B\n", [], "no column 'image_file'"),
        (
            "sampleid,image_file,label\nS1,{0},A\nS2,{1},B\nS3,{0},B\n",
            [],
            "labels.csv: the photograph {0} is labelled more than once; keep one row of it",
        ),
    ],
)
def test_labels_that_cannot_be_used_are_one_message_and_exit_2(
    tmp_path: Path,
    paint: Paint,
    run_bioscan: Run,
    small: list[object],
    rows: str,
    more: list[object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, images = paint(INSECTS)
    monkeypatch.chdir(tmp_path)
    names = sorted(path.name for path in images.iterdir())
    Path("labels.csv").write_text(rows.format(*names), encoding="utf-8")
    status, out, err = run_bioscan("adapt", images, "--labels", "labels.csv", "-o", "m", *small, *more)
    assert (status, out) == (2, "")
    assert message.format(*names) in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["labels.csv"]


def test_photographs_need_a_backbone(tmp_path: Path, paint: Paint, run_bioscan: Run) -> None:
    metadata, images = paint(INSECTS)
    labels = tmp_path / "labels.csv"
    labelled(metadata, "label").write_csv(labels)
    status, _, err = run_bioscan("adapt", images, "--labels", labels, "-o", tmp_path / "m")
    assert status == 2
    assert "name the backbone: --model NAME or FOLDER" in err
