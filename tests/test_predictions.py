"""Predictions tables: written, resumed, read back, and other tools' tables."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from bioscan.data import predictions
from bioscan.data.predictions import (
    PredictionsWriter,
    check_predictions,
    read_predictions,
    read_record,
    read_scores,
    scores_place,
)
from bioscan.errors import DataError, RequestError

LEAVES = [(None, None, "Diptera"), (None, None, "Coleoptera")]
RECORD = {"rank": "order", "model": "tiny"}


def rows(start: int, count: int) -> tuple[pl.DataFrame, Any]:
    """Specimens, every third without a picture."""
    number = np.arange(start, start + count)
    scores = np.stack([number / 100, 1 - number / 100], axis=1).astype(np.float32)
    scores[number % 3 == 2] = np.nan
    failed = pl.Series(number % 3 == 2)
    frame = pl.DataFrame({"sampleid": [f"S{n}" for n in number], "image_file": [f"{n}.jpg" for n in number]})
    frame = frame.with_columns(
        pl.when(~failed).then(pl.lit("Diptera")).alias("order"),
        pl.when(~failed).then(pl.lit(0.5)).alias("order_probability"),
        pl.when(~failed).then(pl.lit("order")).alias("assigned_rank"),
        pl.when(~failed).then(pl.lit("Diptera")).alias("assigned_taxon"),
        pl.when(~failed).then(pl.lit(0.5)).alias("assigned_probability"),
        pl.when(failed).then(pl.lit("truncated JPEG")).alias("error"),
    )
    return frame, scores


def writer(path: Path, **changes: Any) -> PredictionsWriter:
    settings: dict[str, Any] = {"ranks": ["order"], "leaves": LEAVES, "record": RECORD} | changes
    return PredictionsWriter(path, **settings)


def interrupted(path: Path) -> None:
    with writer(path) as target:
        target.write(*rows(0, 5))
        raise KeyboardInterrupt


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_what_is_written_in_batches_is_read_back_whole(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"p{ending}"
    with writer(path) as target:
        for start in (0, 4):
            target.write(*rows(start, 4))
    frame, scores = rows(0, 8)
    assert read_predictions(path).equals(frame)
    assert read_record(path) == RECORD
    found = read_scores(path)
    assert found is not None
    assert found.leaves == LEAVES
    assert found.keys.equals(frame.select("sampleid", "image_file"))
    np.testing.assert_array_equal(np.concatenate([batch for _, batch in found.batches()]), scores)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, "p.scores.parquet"])


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_energies_and_further_columns_are_kept_where_they_are_given(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"p{ending}"
    optional: dict[str, list[Any]] = {
        "assigned_training": [120, None, None],
        "assigned_precision": [0.25, None, None],
        "assigned_confusions": ["Coleoptera 75 %", None, None],
        "set": ["Coleoptera; Diptera", "Diptera", None],
        "set_size": [2, 1, None],
    }
    frame, scores = rows(0, 3)
    frame = frame.with_columns(**{name: pl.Series(values) for name, values in optional.items()})
    with writer(path, optional=optional) as target:
        target.write(frame, scores, np.array([-3.5, 2.0, np.nan]))
    made, found = read_predictions(path), read_scores(path)
    assert made.columns == [*rows(0, 1)[0].columns[:-1], *optional, "error"]
    assert made.select(*optional).to_dict(as_series=False) == optional
    assert found is not None
    assert found.energy is not None
    assert found.energy.to_list() == [-3.5, 2.0, None]
    assert found.keys.columns == ["sampleid", "image_file"]


def test_scores_without_energies_have_none(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    with writer(path) as target:
        target.write(*rows(0, 4))
    found = read_scores(path)
    assert found is not None
    assert found.energy is None
    place = scores_place(path)  # as an older version wrote it
    kept = {name: pl.read_parquet_metadata(place)[name] for name in ("bioscan", "leaves")}
    pl.read_parquet(place).drop("energy").write_parquet(place, metadata=kept)
    found = read_scores(path)
    assert found is not None
    assert found.energy is None
    np.testing.assert_array_equal(next(found.batches())[1], rows(0, 4)[1])


def test_scores_too_large_to_hold_are_read_in_the_same_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.parquet"
    with writer(path) as target:
        target.write(*rows(0, 7))
    monkeypatch.setattr(predictions, "_BATCH", 6)  # three rows of two leaves
    monkeypatch.setattr(predictions, "_HELD", 0)
    found = read_scores(path)
    assert found is not None
    parts = list(found.batches())
    assert [(r.start, r.stop, batch.shape) for r, batch in parts] == [
        (0, 3, (3, 2)),
        (3, 6, (3, 2)),
        (6, 9, (1, 2)),
    ]
    np.testing.assert_array_equal(np.concatenate([batch for _, batch in parts]), rows(0, 7)[1])


def test_after_an_interruption_a_writer_with_the_same_record_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    with pytest.raises(KeyboardInterrupt):
        interrupted(path)
    assert not path.exists()
    with writer(path) as target:
        assert target.done == 5
        target.write(*rows(5, 3))
    assert read_predictions(path).equals(rows(0, 8)[0])


def test_after_an_interruption_another_record_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    with pytest.raises(KeyboardInterrupt):
        interrupted(path)
    with writer(path, record={"model": "other"}) as target:
        assert target.done == 0
        target.write(*rows(0, 2))
    assert read_predictions(path).height == 2


def test_nothing_is_overwritten_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    with writer(path) as target:
        target.write(*rows(0, 2))
    with pytest.raises(RequestError, match="exists"):
        writer(path)
    with writer(path, leaves=None, overwrite=True) as target:
        target.write(rows(0, 3)[0])
    assert read_predictions(path).height == 3
    assert not scores_place(path).exists()  # they were of the replaced predictions
    assert read_scores(path) is None


def test_scores_of_other_predictions_are_refused(tmp_path: Path) -> None:
    for name, record in (("a", RECORD), ("b", {"model": "other"})):
        with writer(tmp_path / f"{name}.parquet", record=record) as target:
            target.write(*rows(0, 2))
    (tmp_path / "b.scores.parquet").replace(tmp_path / "a.scores.parquet")
    with pytest.raises(DataError, match=r"not the scores of a\.parquet"):
        read_scores(tmp_path / "a.parquet")


def test_another_tools_table_needs_a_key_and_a_rank_only(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text(
        "image_file,confidence,family\na.jpg,high,Sciaridae\nb.jpg,low,\nc.jpg,low,not_classified\n"
    )
    found = read_predictions(path)
    assert found["family"].to_list() == ["Sciaridae", None, None]
    assert read_record(path) == {}
    assert read_scores(path) is None


def test_numbers_as_keys_and_categories_as_names_become_text() -> None:
    frame = pl.DataFrame({"sampleid": [17, 4], "order": pl.Series(["Diptera", None], dtype=pl.Categorical)})
    found = check_predictions(frame)
    assert found["sampleid"].to_list() == ["17", "4"]
    assert found.schema["order"] == pl.String


def altered(**columns: Any) -> pl.DataFrame:
    return pl.DataFrame({"sampleid": ["a", "b"], "order": ["Diptera", "Coleoptera"]} | columns)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (altered().drop("sampleid"), "no key column, sampleid or image_file"),
        (altered().rename({"sampleid": "sample_id"}), "did you mean 'sample_id'"),
        (altered().drop("order"), "no column of names, one of phylum"),
        (altered(sampleid=["a", "a"]), "sampleid occurs more than once: a"),
        (altered(sampleid=["a", None]), "1 rows have no sampleid"),
        (
            altered(order_probability=[0.5, 1.5]),
            "order_probability of b is 1.5, expected a number from 0 to 1",
        ),
        (altered(order_probability=["0.5", "high"]), "order_probability of b is high"),
        (altered(order_probability=[float("nan"), 0.1]), "order_probability of a is nan"),
        (altered().clear(), "no rows"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(frame: pl.DataFrame, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_predictions(frame)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def without_leaves(path: Path) -> None:
    pl.read_parquet(path).write_parquet(path)


def of_fewer_leaves(path: Path) -> None:
    footer = pl.read_parquet_metadata(path)
    kept = {"bioscan": footer["bioscan"], "leaves": json.dumps(LEAVES[:1])}
    pl.read_parquet(path).write_parquet(path, metadata=kept)


@pytest.mark.parametrize("damage", [cut_short, emptied])
def test_a_damaged_table_is_one_message(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "p.parquet"
    with writer(path) as target:
        target.write(*rows(0, 20))
    damage(path)
    for read in (read_predictions, read_record):
        with pytest.raises(DataError, match=r"p\.parquet: cannot be read as predictions"):
            read(path)


@pytest.mark.parametrize("damage", [cut_short, emptied, without_leaves, of_fewer_leaves])
def test_a_damaged_scores_file_is_one_message(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "p.parquet"
    with writer(path) as target:
        target.write(*rows(0, 20))
    damage(scores_place(path))
    with pytest.raises(DataError, match=r"p\.scores\.parquet: "):
        read_scores(path)


def test_a_missing_file_and_another_form_are_wrong_requests(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such predictions file"):
        read_predictions(tmp_path / "none.parquet")
    (tmp_path / "p.xlsx").write_bytes(b"x")
    with pytest.raises(RequestError, match="unknown form of predictions"):
        read_predictions(tmp_path / "p.xlsx")
