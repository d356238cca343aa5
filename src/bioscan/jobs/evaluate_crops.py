"""Predicted boxes against a person's: joined by file name, scored as COCO does. No picture is read."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.analysis.boxes import Boxes, BoxEvaluation, evaluate_boxes
from bioscan.analysis.intervals import RESAMPLES
from bioscan.data.boxes import XYXY, check_boxes, find_pictures, pictures, read_boxes, read_of_pictures
from bioscan.errors import DataError, RequestError, near

COUNTS: Final = {
    "not_predicted": "pictures of the truth that the boxes do not mention: counted as without a box",
    "left_out": "pictures of the truth that the boxes do not mention: left out",
    "not_in_truth": "pictures with boxes that the truth does not mention: left out",
    "many": "pictures said to hold several specimens; the best-scored box counts",
    "unscored": "boxes without a score: as if of score 1, in their order",
    "ungrouped": "pictures without a group: in none of them",
}

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CropEvaluation:
    """Scores of one table of boxes."""

    overall: BoxEvaluation
    groups: dict[str, BoxEvaluation]
    """By name; empty without a table of groups."""
    by: str | None
    counts: dict[str, int]
    """What `COUNTS` says -> pictures or boxes."""
    pictures: pl.DataFrame
    """A row each: `image_file, part, kind` (of the truth), `iou` (null without a true box), `predicted` (the
    kind; null where not mentioned), `score`, `group`, and the corners of both specimens: `x0 … y1` true,
    `predicted_x0 … predicted_y1`."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: everything but the single pictures."""
        groups = {name: _as_dict(found) for name, found in self.groups.items()}
        return {**_as_dict(self.overall), "counts": self.counts, "by": self.by, "groups": groups}

    def worst(self, num: int) -> pl.DataFrame:
        """In turn the least overlap where something is there, and the surest false box where nothing is."""
        is_false = pl.col("kind") == "none"
        rows = self.pictures.filter(~is_false | pl.col("predicted").is_in(["one", "many"]))
        badness = pl.when(is_false).then(pl.col("score").fill_null(1.0)).otherwise(-pl.col("iou"))
        turn = badness.rank("ordinal", descending=True).over(is_false)
        return rows.sort(turn, is_false, maintain_order=True).head(num)


def evaluate_crops(
    boxes: Path | str | pl.DataFrame,
    truth: Path | str | pl.DataFrame,
    *,
    groups: Path | str | pl.DataFrame | None = None,
    by: str | None = None,
    common: bool = False,
    max_boxes: int = 1,
    resamples: int = RESAMPLES,
    seed: int = 1,
) -> CropEvaluation:
    """Score predicted boxes against true ones.

    Args:
        boxes: Predicted: any form that `read_boxes` takes, or the frame. The image ids of a COCO result list
            are those of the truth, if that is COCO.
        truth: True boxes, likewise; an image without an annotation is an empty picture.
        groups: Table (.tsv, .csv, .parquet) with `image_file` and the column `by`.
        by: Column of `groups` whose values are evaluated each on their own too.
        common: Leave out the pictures that the boxes do not mention, instead of counting them as without one.
        max_boxes: Boxes of a picture that count, best score first.
        resamples: Of the bootstrap; 0: no intervals but those of shares.
        seed: Of the bootstrap.

    Raises:
        RequestError: a number out of range, an absent column, no picture in common.
        DataError: a table that cannot be used.
    """
    if max_boxes < 1 or resamples < 0:
        name, value = ("max_boxes", max_boxes) if max_boxes < 1 else ("resamples", resamples)
        raise RequestError(f"{name} is {value}; it must be at least {int(max_boxes < 1)}")
    if (groups is None) != (by is None):
        raise RequestError("groups take two things: a table, and which column of it")
    true = check_boxes(truth) if isinstance(truth, pl.DataFrame) else read_boxes(truth)
    named_in = truth if not isinstance(truth, pl.DataFrame) and Path(truth).suffix == ".json" else None
    made = check_boxes(boxes) if isinstance(boxes, pl.DataFrame) else read_boxes(boxes, images=named_in)
    first_true, first_made = pictures(true), pictures(made)
    if first_true.is_empty():
        raise DataError("the truth holds no picture")
    place_M = find_pictures(first_made, first_true)
    if (place_M < 0).all():
        like = [frame["image_file"].first() for frame in (first_made, first_true)]
        raise RequestError(
            f"no picture of the boxes is in the truth: their image_file is like {like[0]!r}, "
            f"that of the truth like {like[1]!r}"
        )
    mentioned = np.zeros(first_true.height, bool)
    mentioned[place_M[place_M >= 0]] = True
    kept = np.flatnonzero(mentioned) if common else np.arange(first_true.height)
    number = np.full(first_true.height + 1, -1)  # the last for pictures that the truth does not have
    number[kept] = np.arange(kept.size)
    predicted = _numbered(made, first_made, number[place_M])
    true_boxes = _numbered(true, first_true, number[:-1])
    group = _groups(groups, by, first_true[kept]) if groups is not None and by is not None else None
    found = _evaluated(predicted, true_boxes, kept.size, max_boxes, resamples, seed)
    rows = _rows(first_true[kept], first_made, number[place_M], found, group)
    of_group = {}
    for name in sorted(set(group.drop_nulls())) if group is not None else ():
        members = np.flatnonzero((group == name).fill_null(False)) if group is not None else kept[:0]
        inner = np.full(kept.size, -1)
        inner[members] = np.arange(members.size)
        parts = [_renumbered(table, inner) for table in (predicted, true_boxes)]
        of_group[name] = _evaluated(parts[0], parts[1], members.size, max_boxes, resamples, seed)
    counts = {
        "left_out" if common else "not_predicted": int((~mentioned).sum()),
        "not_in_truth": int((place_M < 0).sum()),
        "many": rows.filter(pl.col("predicted") == "many").height,
        "unscored": predicted["score"].null_count(),
        "ungrouped": 0 if group is None else group.null_count(),
    }
    return CropEvaluation(found, of_group, by, counts, rows)


def _as_dict(found: BoxEvaluation) -> dict[str, Any]:
    names = ("pictures", "empty", "true_boxes", "predicted_boxes", "max_boxes")
    measures = {name: asdict(measure) for name, measure in found.measures.items()}
    return {**{name: getattr(found, name) for name in names}, "measures": measures}


def _numbered(frame: pl.DataFrame, first: pl.DataFrame, number: Ints) -> pl.DataFrame:
    """The boxes of pictures that have a number, with it, in the order of the numbers."""
    keys = first.select("image_file", "part").with_columns(picture=pl.Series(number, dtype=pl.Int64))
    joined = frame.join(keys, on=["image_file", "part"], nulls_equal=True, maintain_order="left")
    return joined.filter(pl.col("picture") >= 0, pl.col("x0").is_not_null())


def _renumbered(frame: pl.DataFrame, inner: Ints) -> pl.DataFrame:
    return frame.with_columns(picture=pl.Series(inner[frame["picture"]])).filter(pl.col("picture") >= 0)


def _evaluated(
    predicted: pl.DataFrame, truth: pl.DataFrame, num: int, max_boxes: int, resamples: int, seed: int
) -> BoxEvaluation:
    tables = [
        Boxes(
            frame["picture"].to_numpy(),
            frame.select(XYXY).to_numpy(),
            frame["score"].fill_null(1.0).to_numpy(),
        )
        for frame in (predicted, truth)
    ]
    generator = np.random.default_rng(seed)
    return evaluate_boxes(tables[0], tables[1], num, generator, max_boxes=max_boxes, resamples=resamples)


def _groups(groups: Path | str | pl.DataFrame, by: str, first: pl.DataFrame) -> pl.Series:
    """The group of each picture."""
    if isinstance(groups, pl.DataFrame):
        if missing := [c for c in ("image_file", by) if c not in groups.columns]:
            raise RequestError(
                f"the table of groups has no column '{missing[0]}'{near(missing[0], groups.columns)}"
            )
        table = groups.select("image_file", pl.lit(None, pl.Int32).alias("part"), by)
    else:
        table = read_of_pictures(groups, by)
    found = find_pictures(first, table)
    name = table[by].cast(pl.String)
    made = [name[int(row)] if row >= 0 else None for row in found]
    return pl.Series("group", made, pl.String)


def _rows(
    truth: pl.DataFrame, made: pl.DataFrame, number: Ints, found: BoxEvaluation, group: pl.Series | None
) -> pl.DataFrame:
    """The table of single pictures."""
    answers = made.select(
        pl.Series("row", number, pl.Int64),
        pl.col("kind").alias("predicted"),
        "score",
        pl.col(XYXY).name.prefix("predicted_"),
    ).filter(pl.col("row") >= 0)
    rows = truth.select("image_file", "part", "kind", *XYXY).with_columns(
        iou=pl.Series(found.iou_P).fill_nan(None),
        group=pl.lit(None, pl.String) if group is None else group,
        row=pl.int_range(pl.len(), dtype=pl.Int64),
    )
    return rows.join(answers, on="row", how="left", maintain_order="left").drop("row")
