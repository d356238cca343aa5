"""Contact sheets of boxes: the doubtful ones of a cropping, the worst of an evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.app.gallery import contact_sheet
from bioscan.data.boxes import XYXY, find_pictures
from bioscan.data.decode import read_rgb
from bioscan.data.images import Images
from bioscan.errors import ImageError
from bioscan.files import writing

_TILE_PX: Final = 260
_FOUND: Final = (230, 60, 20)
_TRUE: Final = (0, 120, 210)
_LINE_PX: Final = 2
_UNREADABLE: Final = np.full((_TILE_PX, _TILE_PX, 3), 225, np.uint8)

_Box = Sequence[float | None]


def write_doubtful_sheet(
    path: Path, images: Images, doubtful: pl.DataFrame, boxes: pl.DataFrame, *, overwrite: bool = False
) -> None:
    """A PNG of pictures with their boxes, the specimen's thick, and why they are doubtful.

    Args:
        path: File to write.
        images: Package of the pictures.
        doubtful: A row a picture: `image_file, part, score, why`.
        boxes: The box table that they are from.
        overwrite: Replace the file.
    """
    keys = ["image_file", "part"]
    of_picture = boxes.join(doubtful.select(keys), on=keys, how="semi", nulls_equal=True)
    found = of_picture.filter(pl.col("x0").is_not_null()).partition_by(keys, as_dict=True)
    tiles = []
    for row in doubtful.to_dicts():
        table = found.get((row["image_file"], row["part"]))
        drawn = [(box, _FOUND) for box in table.select(XYXY).rows()] if table is not None else []
        score = "" if row["score"] is None else f"score {row['score']:.2f}"
        tiles.append(("\n".join(filter(None, (row["image_file"], score, row["why"]))), row, drawn))
    _write(path, images, tiles, "doubtful crops", overwrite=overwrite)


def write_worst_sheet(path: Path, images: Path, worst: pl.DataFrame, *, overwrite: bool = False) -> None:
    """A PNG of the pictures of `CropEvaluation.worst`: the box found in red, the true one in blue."""
    tiles = []
    for row in worst.to_dicts():
        corners = ([row[c] for c in XYXY], [row[f"predicted_{c}"] for c in XYXY])
        drawn = [
            (box, colour) for box, colour in zip(corners, (_TRUE, _FOUND), strict=True) if box[0] is not None
        ]
        overlap = "no true box" if row["iou"] is None else f"IoU {row['iou']:.2f}"
        score = None if row["score"] is None else f"score {row['score']:.2f}"
        found = {None: "not mentioned", "none": "none found"}.get(row["predicted"])
        lines = [row["image_file"], ", ".join(filter(None, (overlap, score, found)))]
        tiles.append(("\n".join([*lines, *filter(None, [row["group"]])]), row, drawn))
    title = "least overlap, and false boxes: found in red, true in blue"
    _write(path, Images(images), tiles, title, overwrite=overwrite)


def _write(
    path: Path,
    images: Images,
    tiles: Sequence[tuple[str, Mapping[str, Any], Sequence[tuple[_Box, tuple[int, int, int]]]]],
    title: str,
    *,
    overwrite: bool,
) -> None:
    known = images.index.select(pl.col("name").alias("image_file"), "part")
    names = [{key: row[key] for key in ("image_file", "part")} for _, row, _ in tiles]
    rows = find_pictures(pl.DataFrame(names, known.schema), known)
    pictures = []
    for (caption, _, drawn), row in zip(tiles, rows, strict=True):
        try:
            picture = _boxed(read_rgb(images, int(row)), drawn) if row >= 0 else _UNREADABLE
        except ImageError:
            picture = _UNREADABLE
        pictures.append((caption, picture))
    sheet = contact_sheet(pictures, size=_TILE_PX, title=title)
    with writing(path, overwrite=overwrite) as partial:
        sheet.save(partial, "PNG")


def _boxed(
    pixels: NDArray[np.uint8], drawn: Sequence[tuple[_Box, tuple[int, int, int]]]
) -> NDArray[np.uint8]:
    """The picture at the size of a tile with boxes drawn, the first of a colour thicker than the others."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(pixels)
    scale = _TILE_PX / max(picture.size)
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size], reducing_gap=2.0)
    draw = ImageDraw.Draw(picture)
    seen = set()
    for box, colour in drawn:
        corners = [scale * (value or 0.0) for value in box]
        draw.rectangle(corners, outline=colour, width=1 if colour in seen else _LINE_PX)
        seen.add(colour)
    return np.array(picture)
