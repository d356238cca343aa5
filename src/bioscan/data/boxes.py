"""What a detector says of a picture, and boxes as tables: CSV, Parquet, COCO, the TSV of BIOSCAN-5M.

Boxes are (x0, y0, x1, y1) in pixels of the picture, continuous: the left edge of the first pixel is 0, so
that x1 - x0 is the width, as in COCO.

| form         | ending   | what it cannot hold                                                              |
| ------------ | -------- | -------------------------------------------------------------------------------- |
| parquet      | .parquet | nothing is lost                                                                  |
| csv          | .csv     | nothing is lost                                                                  |
| coco         | .json    | the last bit of x1 and y1 at times; an `area_px` within 0.1 % of the box's own   |
|              |          | area, which reads as no mask                                                     |
| coco-results |          | pictures without a box, their sizes and kinds, masks and lengths                 |
| bioscan-5m   | .tsv     | pictures without a box, further boxes, kinds, scores, masks, lengths, the part   |
|              |          | folder, and the ending of the file name                                          |
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.data.coco import coco_dataset, coco_images, coco_results, read_coco
from bioscan.errors import DataError, RequestError, near, unknown
from bioscan.files import writing
from bioscan.vocabulary import FOOTER

Kind = Literal["one", "none", "many"]
KINDS: Final = get_args(Kind)

SCHEMA: Final = {
    "image_file": pl.String(),
    "part": pl.Int32(),
    "width": pl.Int32(),
    "height": pl.Int32(),
    "kind": pl.String(),
    "number": pl.Int32(),
    "x0": pl.Float64(),
    "y0": pl.Float64(),
    "x1": pl.Float64(),
    "y1": pl.Float64(),
    "score": pl.Float64(),
    "area_px": pl.Float64(),
    "length_px": pl.Float64(),
    "length_mm": pl.Float64(),
}
"""One row a box, the rows of a picture together; a picture without a box has one row, whose box is null.

image_file: NFC, without its part folder; part: number of that folder or null; width, height: of the picture,
pixels, null where not told; kind: one of `KINDS`; number: of the box among the picture's, 0 the specimen;
area_px: of its mask, null without one; length_px: longest extent of the mask; length_mm: null without a
scale."""

XYXY: Final = ("x0", "y0", "x1", "y1")
FORMS: Final = {
    "parquet": ".parquet",
    "csv": ".csv",
    "coco": ".json",
    "coco-results": None,
    "bioscan-5m": ".tsv",
}
"""Form of a box table -> the ending that means it."""

FULL_SIDE_5M: Final = 256
"""`scale_factor` of BIOSCAN-5M is the shorter side of the box over this: what its crop is shrunk by."""

OUTSIDE_PX: Final = 1.0
"""A box may leave its picture by so much: rounding of whoever wrote it."""

_PICTURE: Final = ("image_file", "part")
_NUMBERS: Final = tuple(name for name, kind in SCHEMA.items() if kind.is_numeric())
_IN_PART: Final = r"^(?:.*/)?part(\d{1,9})/(.+)$"
_SHOWN: Final = 3

_Place = Callable[[int], str]
"""Number of a row -> where it stands in the file, for messages."""


@dataclass(frozen=True, eq=False)
class Finding:
    """What a detector says of one picture."""

    kind: Kind
    """`none`: no specimen is there; `many`: more than one, the first box is the best."""
    boxes: NDArray[np.float64]
    """N x 4, best first; the first is the specimen. Empty where kind is `none`."""
    scores: NDArray[np.float64]
    """N, from 0 to 1, falling."""
    mask: NDArray[np.bool_] | None = None
    """H x W: pixels of the specimen (the first box); None where there is none or the detector gives none."""
    length_px: float | None = None
    """Longest extent of the mask in pixels; None without a mask."""


Detector = Callable[[Sequence[NDArray[np.uint8]]], list[Finding]]
"""Pictures, RGB H x W x 3 of any sizes, to one finding each."""


def finding_rows(
    finding: Finding, *, image_file: str, part: int | None, width: int, height: int
) -> list[dict[str, Any]]:
    """The rows of a box table that say what a finding says, all but its mask; without a scale."""
    picture = {"image_file": image_file, "part": part, "width": width, "height": height, "kind": finding.kind}
    rows = []
    for number, (box, score) in enumerate(zip(finding.boxes.tolist(), finding.scores.tolist(), strict=True)):
        row = dict.fromkeys(SCHEMA) | picture | {"number": number, "score": score}
        row |= dict(zip(XYXY, box, strict=True))
        if number == 0:
            row["length_px"] = finding.length_px
            row["area_px"] = None if finding.mask is None else float(np.count_nonzero(finding.mask))
        rows.append(row)
    return rows or [dict.fromkeys(SCHEMA) | picture]


def row_finding(rows: Sequence[Mapping[str, Any]]) -> Finding:
    """The finding that the rows of one picture say; without a mask."""
    boxes = [[row[c] for c in XYXY] for row in rows if row["x0"] is not None]
    scores = [1.0 if row["score"] is None else row["score"] for row in rows if row["x0"] is not None]
    return Finding(
        rows[0]["kind"],
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(scores, np.float64),
        length_px=rows[0]["length_px"],
    )


def pictures(frame: pl.DataFrame) -> pl.DataFrame:
    """The first row of each picture, in order: the specimen, or the row that says that there is none."""
    return frame.unique(_PICTURE, keep="first", maintain_order=True)


def find_pictures(wanted: pl.DataFrame, known: pl.DataFrame) -> NDArray[np.int64]:
    """For each wanted picture the row of the known one, -1 where there is none; each a row a picture.

    By file name and part; else by the file name, if only one known picture has it; else by the last part of
    the name, if only one picture on either side has it (COCO may name folders).

    Raises:
        DataError: two of the wanted are one of the known.
    """
    columns = [pl.col("image_file").str.normalize("NFC"), pl.col("part").cast(pl.Int32)]
    known = known.select(*columns).with_row_index("row")
    wanted = wanted.select(*columns)
    alone = ~pl.col("image_file").is_duplicated()
    exact = wanted.join(known, on=list(_PICTURE), how="left", nulls_equal=True, maintain_order="left")
    named = wanted.join(known.filter(alone), on="image_file", how="left", maintain_order="left")
    last = pl.col("image_file").str.extract(r"([^/]*)$")
    bare_known, bare = known.with_columns(last).filter(alone), wanted.with_columns(last)
    bare_row = bare.with_columns(alone.alias("alone")).join(
        bare_known, on="image_file", how="left", maintain_order="left"
    )
    row = (
        exact["row"]
        .fill_null(named["row"])
        .fill_null(bare_row.select(pl.when("alone").then("row")).to_series())
    )
    twice = wanted.filter(row.is_not_null() & row.is_duplicated())
    if not twice.is_empty():
        names = ", ".join(twice["image_file"].head(_SHOWN))
        raise DataError(f"two pictures of one name where the other table has one: {names}; name their parts")
    return row.cast(pl.Int64).fill_null(-1).to_numpy().copy()


# -- reading


def read_boxes(path: Path | str, *, images: Path | str | None = None) -> pl.DataFrame:
    """A box table, ours or another tool's; its form is told by its ending and content.

    A CSV or Parquet file needs `image_file` and the four corners, the rest of `SCHEMA` may be absent: kind
    is then none, one or many by how many boxes there are, number counts them from the best score down. A COCO
    dataset gives a row for each image without an annotation too; categories are not told apart, the first
    annotation of an image is its specimen, a bbox of four zeros (TORAS) is no box, the area of a polygon or
    RLE is that of a mask. A COCO result list says nothing of several specimens: its pictures are of kind
    `one`.

    Args:
        path: .parquet, .csv, .tsv (a table, or that of BIOSCAN-5M) or .json (COCO).
        images: COCO dataset that tells the file names of a result list's image ids. Its images without a
            result are then pictures without a box.

    Returns:
        Columns of `SCHEMA`.

    Raises:
        RequestError: no such file, another form, a result list of numbers without `images`.
        DataError: a box that is none, with the line, row or annotation where it stands.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path}: no such file of boxes")
    if path.suffix == ".json":
        made = read_coco(path, Path(images) if images else None)
        return check_boxes(
            made.frame,
            str(path),
            place=lambda row: made.places[row],
            outside_px=math.inf if made.is_results else OUTSIDE_PX,  # a detector may guess beyond the frame
        )
    if path.suffix not in (".parquet", ".csv", ".tsv"):
        raise unknown("form of boxes", path.suffix or path.name, (".parquet", ".csv", ".tsv", ".json"))
    frame = _read_table(path, "boxes")
    if "processid" in frame.columns and "image_file" not in frame.columns:
        frame = frame.with_columns(image_file=pl.col("processid") + ".jpg").rename(
            {"width_original": "width", "height_original": "height"}, strict=False
        )
    return check_boxes(frame, str(path), place=lambda row: row_place(path, row))


def read_of_pictures(path: Path | str, column: str) -> pl.DataFrame:
    """Another table of pictures: `image_file`, `part` (null where absent) and a column as the file has it.

    Args:
        path: .parquet, .csv or .tsv.
        column: What it says of each picture.

    Raises:
        RequestError: no such file.
        DataError: not a table, or without `image_file` or the column.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path}: no such table")
    frame = _read_table(path, "pictures")
    for name in ("image_file", column):
        if name not in frame.columns:
            raise DataError(f"{path}: no column '{name}'{near(name, frame.columns)}")
    part = pl.col("part") if "part" in frame.columns else pl.lit(None)
    return _named(frame.select("image_file", part.cast(pl.Int32, strict=False).alias("part"), column))


def row_place(path: Path, row: int) -> str:
    """Where a row stands in a table's file, for messages."""
    return f"row {row + 1}" if path.suffix == ".parquet" else f"line {row + 2}"  # a header is line 1


def _read_table(path: Path, what: str) -> pl.DataFrame:
    """A table as it is, CSV as text."""
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path)
        return pl.read_csv(path, separator="\t" if path.suffix == ".tsv" else ",", infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise DataError(f"{path}: cannot be read as a table of {what} ({reason})") from None


def check_boxes(
    frame: pl.DataFrame,
    where: str = "the boxes",
    *,
    place: _Place | None = None,
    outside_px: float = OUTSIDE_PX,
) -> pl.DataFrame:
    """The table with all columns of `SCHEMA`, the boxes of a picture together and in order of number.

    Args:
        frame: At least `image_file` and the four corners.
        where: What the table is, for messages.
        place: Number of a row -> where it stands, for messages; None: `row 1` and so on.
        outside_px: By how much a box may leave its picture.

    Raises:
        DataError: what is wrong with it, and in which row.
    """
    place = place or (lambda row: f"row {row + 1}")
    absent = [c for c in ("image_file", *XYXY) if c not in frame.columns]
    if absent:
        corners = " (COCO's x, y, width, height belong in a .json file)" if "x0" in absent else ""
        raise DataError(f"{where}: no column '{absent[0]}'{near(absent[0], frame.columns)}{corners}")
    frame = _typed(frame.select(c for c in SCHEMA if c in frame.columns), where, place)
    frame = _named(frame)

    def refuse(bad: pl.Expr, said: Callable[[Mapping[str, Any]], str]) -> None:
        rows = frame.select(bad.fill_null(False)).to_series()
        if rows.any():
            row = int(rows.arg_max() or 0)
            values = frame.row(row, named=True)
            name = f" ({values['image_file']})" if values["image_file"] else ""
            raise DataError(f"{where}, {place(row)}{name}: {said(values)}")

    frame = frame.with_columns(  # TORAS writes "nothing there" so
        pl.when(pl.all_horizontal(pl.col(XYXY) == 0)).then(None).otherwise(pl.col(XYXY)).name.keep()
    )
    known = pl.sum_horizontal(pl.col(XYXY).is_not_null())
    refuse(pl.col("image_file").fill_null("") == "", lambda _: "no image_file")
    for column in _NUMBERS:
        refuse(~pl.col(column).is_finite(), _is(column, "expected a number"))
    refuse(known.is_between(1, 3), lambda row: f"{_corners(row)}: a corner is missing")
    refuse(pl.col("x1") < pl.col("x0"), lambda row: f"{_corners(row)}: negative width")
    refuse(pl.col("y1") < pl.col("y0"), lambda row: f"{_corners(row)}: negative height")
    flat = (pl.col("x1") == pl.col("x0")) | (pl.col("y1") == pl.col("y0"))
    refuse(flat, lambda row: f"{_corners(row)} has no area")
    for column in ("width", "height"):
        refuse(pl.col(column) <= 0, _is(column, "expected more than 0"))
    refuse(_outside(outside_px), lambda row: f"{_corners(row)} leaves its picture{_size(row)}")
    for column in ("area_px", "length_px", "length_mm", "number"):
        refuse(pl.col(column) < 0, _is(column, "expected 0 or more"))
    refuse(~pl.col("kind").is_in(KINDS), lambda row: f"kind is '{row['kind']}'{near(row['kind'], KINDS)}")
    boxed = pl.col("x0").is_not_null()
    refuse((pl.col("kind") == "none") & boxed, lambda row: f"{_corners(row)}, but kind is none")
    refuse((pl.col("kind") != "none") & ~boxed, lambda row: f"kind is {row['kind']}, but there is no box")
    refuse(~boxed & (pl.len().over(_PICTURE) > 1), lambda _: "a row without a box, and another row")
    for column in ("kind", "width", "height"):
        differ = pl.col(column).n_unique().over(_PICTURE) > 1
        refuse(differ, _is(column, "in another row of this picture it is not"))
    count = boxed.sum().over(_PICTURE)
    by_count = pl.when(count == 0).then(pl.lit("none")).when(count == 1).then(pl.lit("one"))
    by_score = pl.col("score").fill_null(-math.inf).rank("ordinal", descending=True).over(_PICTURE) - 1
    frame = frame.with_columns(
        pl.col("kind").fill_null(by_count.otherwise(pl.lit("many"))),
        pl.when(boxed).then(pl.col("number").fill_null(by_score.cast(pl.Int32))).alias("number"),
    )
    twice = boxed & pl.struct(*_PICTURE, "number").is_duplicated()
    refuse(twice, lambda row: f"number {row['number']} twice in this picture")
    first = pl.col("row").min().over(_PICTURE)
    return frame.with_row_index("row").sort(first, "number", maintain_order=True).drop("row")


def _typed(frame: pl.DataFrame, where: str, place: _Place) -> pl.DataFrame:
    """All columns of SCHEMA in their types."""
    columns = []
    for name, kind in SCHEMA.items():
        if name not in frame.columns:
            columns.append(pl.repeat(None, frame.height, dtype=kind, eager=True).alias(name))
            continue
        given = frame[name]
        if given.dtype == pl.String and kind.is_numeric():
            given = given.str.strip_chars()
        made = given.cast(kind, strict=False)
        if kind.is_integer() and not given.dtype.is_integer():  # 18.0 is whole, 18.5 is not
            number = given.cast(pl.Float64, strict=False)
            made = number.cast(kind, strict=False).zip_with(number % 1 == 0, pl.Series([None], dtype=kind))
        odd = given.is_not_null() & made.is_null()
        if odd.any():
            row = int(odd.arg_max() or 0)
            wanted = "a whole number" if kind.is_integer() else "a number" if kind.is_numeric() else "text"
            raise DataError(f"{where}, {place(row)}: {name} is {given[row]!r}, expected {wanted}")
        columns.append(made)
    return pl.DataFrame(columns)


def _named(frame: pl.DataFrame) -> pl.DataFrame:
    """File names NFC, a part folder before them as number."""
    name = pl.col("image_file").str.normalize("NFC")
    part, inner = (name.str.extract(_IN_PART, group) for group in (1, 2))
    split = pl.col("part").is_null() & part.is_not_null()
    return frame.with_columns(
        pl.when(split).then(inner).otherwise(name).alias("image_file"),
        pl.when(split).then(part.cast(pl.Int32, strict=False)).otherwise("part").alias("part"),
    )


def _is(column: str, tail: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{column} is {row[column]}, {tail}"


def _outside(by: float) -> pl.Expr:
    """Whether a box leaves its picture by more than so many pixels."""
    low = pl.min_horizontal("x0", "y0") < -by
    beyond = (pl.col("x1") > pl.col("width") + by) | (pl.col("y1") > pl.col("height") + by)
    return low.fill_null(False) | beyond.fill_null(False)


def _corners(row: Mapping[str, Any]) -> str:
    return f"box {', '.join('?' if row[c] is None else f'{row[c]:g}' for c in XYXY)}"


def _size(row: Mapping[str, Any]) -> str:
    known = row["width"] is not None and row["height"] is not None
    return f" of {row['width']} x {row['height']}" if known else ""


# -- writing


def write_boxes(
    frame: pl.DataFrame,
    path: Path | str,
    *,
    form: str | None = None,
    images: Path | str | None = None,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a box table; what a form cannot hold is told at the top of this module.

    COCO gets keys that its readers pass over: `kind` of an image, `score`, `length_px` and `length_mm` of an
    annotation.

    Args:
        frame: Columns of `SCHEMA`, as `read_boxes` or `check_boxes` give it.
        path: File to write.
        form: One of `FORMS`; None: by the ending.
        images: For COCO: dataset whose image ids are used; None: 1, 2, 3 … by order of the pictures.
        record: What the boxes follow from (JSON): Parquet has it in its footer, a COCO dataset as `info`.
        overwrite: Replace the file.

    Raises:
        RequestError: an unknown form or ending, the file exists.
        DataError: a picture that is not in `images`.
    """
    path = Path(path)
    form = box_form(path, form)
    frame = frame.select(pl.col(name).cast(kind) for name, kind in SCHEMA.items())
    with writing(path, overwrite=overwrite) as partial:
        if form == "parquet":
            frame.write_parquet(partial, metadata={FOOTER: json.dumps(dict(record or {}))})
        elif form == "csv":
            frame.write_csv(partial)
        elif form == "bioscan-5m":
            _as_5m(frame).write_csv(partial, separator="\t")
        else:
            ids = _image_ids(frame, Path(images) if images else None)
            made = coco_results(frame, ids) if form == "coco-results" else coco_dataset(frame, ids, record)
            partial.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")


def box_form(path: Path, form: str | None = None) -> str:
    """The form that a table is written in: the named one, else that of the ending.

    Raises:
        RequestError: an unknown form or ending.
    """
    if form is not None and form not in FORMS:
        raise unknown("form of boxes", form, FORMS)
    made = form or next((name for name, ending in FORMS.items() if ending == path.suffix), None)
    if made is None:
        raise unknown("form of boxes", path.suffix or path.name, filter(None, FORMS.values()))
    return made


def _image_ids(frame: pl.DataFrame, images: Path | None) -> list[Any]:
    """COCO image id of each row."""
    names = pictures(frame).select(_PICTURE)
    if images:
        known = coco_images(images)
        listed = pl.DataFrame({"image_file": [image.name for image in known.values()]}, {"image_file": str})
        listed = _named(listed.with_columns(pl.lit(None, pl.Int32).alias("part")))
        found = find_pictures(names, listed)
        if (found < 0).any():
            absent = names["image_file"][int((found < 0).argmax())]
            raise DataError(f"{images} has no image {absent}, so its boxes have no image id")
        ids = [list(known)[row] for row in found]
    else:
        ids = list(range(1, names.height + 1))
    places = frame.join(names.with_row_index("picture"), on=_PICTURE, nulls_equal=True, maintain_order="left")
    return [ids[place] for place in places["picture"]]


def _as_5m(frame: pl.DataFrame) -> pl.DataFrame:
    """The box of each picture's specimen, as the box table of BIOSCAN-5M.

    `scale_factor` is the shorter side over 256, `area_fraction` the box's share of the picture.
    """
    width, height = pl.col("x1") - pl.col("x0"), pl.col("y1") - pl.col("y0")
    shorter, area = pl.min_horizontal(width, height), width * height
    return (
        pictures(frame)
        .filter(pl.col("x0").is_not_null())
        .select(
            pl.col("image_file").str.replace(r"\.[^./]*$", "").alias("processid"),
            pl.col("width").alias("width_original"),
            pl.col("height").alias("height_original"),
            *XYXY,
            (shorter / FULL_SIDE_5M).alias("scale_factor"),
            (area / (pl.col("width") * pl.col("height"))).alias("area_fraction"),
        )
    )
