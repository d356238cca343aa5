"""Boxes as COCO has them: datasets with annotations, and result lists.

A box is x, y, width, height in pixels, continuous, without a pixel added.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl

from bioscan.errors import DataError, RequestError
from bioscan.vocabulary import part_path

CATEGORY: Final = {"id": 0, "name": "insect", "supercategory": "none"}
"""As in the published annotations of BIOSCAN-1M's failed crops."""

_CORNERS: Final = ("x0", "y0", "x1", "y1")
_EXTRA: Final = ("score", "length_px", "length_mm")
"""Keys of an annotation that other readers pass over."""
_MERE_BOX: Final = 1e-3
"""An area without a segmentation is that of the box, not of a mask, if it differs relatively by no more."""


class CocoImage(NamedTuple):
    """An image of a dataset; all but the name as the file has it, None where it has not."""

    name: str
    width: Any
    height: Any
    kind: Any


class CocoBoxes(NamedTuple):
    """What a file says, not yet checked."""

    frame: pl.DataFrame
    """Columns of a box table, those that are there; a row for each image without a box too."""
    places: list[str]
    """Where each row stands, for messages."""
    is_results: bool


def read_coco(path: Path, images: Path | None) -> CocoBoxes:
    """A dataset, or a result list with the dataset that tells its file names.

    Raises:
        RequestError: a result list whose image ids are numbers, and no dataset.
        DataError: no JSON, no COCO, an unknown image, an id twice, a crowd region, corners in place of sizes.
    """
    content = _json(path)
    is_results = isinstance(content, list)
    entries = content if is_results else content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise DataError(f"{path}: neither a COCO dataset (images, annotations) nor a list of results")
    of_results = coco_images(images) if images else {}
    known = of_results if is_results else _images(path, content)
    of_image: dict[Any, list[dict[str, Any]]] = {image_id: [] for image_id in known}
    seen: set[Any] = set()
    for number, entry in enumerate(entries, 1):
        place = f"{'result' if is_results else 'annotation'} {number}"
        if not isinstance(entry, dict):
            raise DataError(f"{path}, {place}: {json.dumps(entry)[:40]} is no object")
        if not is_results and "id" in entry:
            place += f" (id {entry['id']})"
            if _key(entry["id"]) in seen:
                raise DataError(f"{path}, {place}: an earlier annotation has this id")
            seen.add(_key(entry["id"]))
        image_id = _key(entry.get("image_id"))
        if is_results and images is None:
            if not isinstance(entry.get("image_id"), str):
                raise RequestError(
                    f"{path}, {place}: image_id {image_id} is no file name; "
                    "name the COCO dataset that tells the file names of this result list"
                )
            of_image.setdefault(image_id, [])
        elif image_id not in of_image:
            raise DataError(f"{path}, {place}: image_id is {image_id!r}, and no image has this id")
        if entry.get("iscrowd"):
            raise DataError(f"{path}, {place}: a crowd region; boxes of single specimens are expected")
        of_image[image_id].append({"place": place, **_box(path, place, entry)})
    rows: list[dict[str, Any]] = []
    for image_id, boxes in of_image.items():
        image = known.get(image_id) or CocoImage(image_id, None, None, None)
        if is_results:
            boxes.sort(key=lambda row: -row["score"] if _is_number(row["score"]) else math.inf)
        boxes = [row for row in boxes if any(row[c] != 0 for c in _CORNERS)]  # TORAS: no box
        kind = image.kind if not is_results else "one" if boxes else "none"
        picture = {"image_file": image.name, "width": image.width, "height": image.height, "kind": kind}
        if boxes:
            rows += [picture | row | {"number": number} for number, row in enumerate(boxes)]
        else:
            rows.append({"place": f"image {image_id}"} | picture | dict.fromkeys(_CORNERS))
    _refuse_corners(path, rows, is_results)
    return CocoBoxes(_frame(rows), [row["place"] for row in rows], is_results)


def coco_images(path: Path) -> dict[Any, CocoImage]:
    """The images of a dataset by id, in the order of the file.

    Raises:
        RequestError: no such file.
        DataError: no COCO dataset, an image without a name, an id or a name twice.
    """
    return _images(path, _json(path))


def coco_dataset(frame: pl.DataFrame, ids: Sequence[Any], record: Mapping[str, Any] | None) -> dict[str, Any]:
    """A box table as a dataset, with the image id of each row."""
    images: dict[Any, dict[str, Any]] = {}
    annotations: list[dict[str, Any]] = []
    for row, image_id, bbox in zip(frame.to_dicts(), ids, _bbox(frame), strict=True):
        image = {"id": image_id, "file_name": part_path(row["image_file"], row["part"])}
        image |= {name: row[name] for name in ("width", "height", "kind") if row[name] is not None}
        images.setdefault(image_id, image)
        if row["x0"] is not None:
            area = bbox[2] * bbox[3] if row["area_px"] is None else row["area_px"]
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": CATEGORY["id"]}
            annotation |= {"bbox": bbox, "area": area, "iscrowd": 0}
            annotations.append(annotation | {name: row[name] for name in _EXTRA if row[name] is not None})
    return {
        "info": dict(record or {}),
        "images": list(images.values()),
        "annotations": annotations,
        "categories": [CATEGORY],
    }


def coco_results(frame: pl.DataFrame, ids: Sequence[Any]) -> list[dict[str, Any]]:
    """The boxes of a table as a result list, with the image id of each row; a score that is null is 1."""
    rows = zip(ids, _bbox(frame), frame["score"].fill_null(1.0), frame["x0"].is_not_null(), strict=True)
    return [
        {"image_id": image_id, "category_id": CATEGORY["id"], "bbox": bbox, "score": score}
        for image_id, bbox, score, is_box in rows
        if is_box
    ]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None


def _key(value: Any) -> Any:
    """An id that can be looked up: a number or text as it is, whatever else JSON holds as text."""
    return value if isinstance(value, int | str) and not isinstance(value, bool) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _images(path: Path, content: Any) -> dict[Any, CocoImage]:
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise DataError(f"{path}: no COCO dataset, it has no list of images")
    known: dict[Any, CocoImage] = {}
    names: set[str] = set()
    for number, image in enumerate(images, 1):
        name = (image.get("file_name") or image.get("toras_path")) if isinstance(image, dict) else None
        if not isinstance(name, str) or "id" not in image:
            raise DataError(f"{path}, image {number}: no id, or no file_name")
        name, image_id = name.replace("\\", "/").removeprefix("/"), _key(image["id"])
        if image_id in known:
            raise DataError(f"{path}, image {number}: an earlier image has id {image_id}")
        if name in names:
            raise DataError(f"{path}, image {number}: an earlier image has file_name {name}")
        known[image_id] = CocoImage(name, *(image.get(key) for key in CocoImage._fields[1:]))
        names.add(name)
    return known


def _box(path: Path, place: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Corners, area of the mask, and what else an annotation tells."""
    bbox = entry.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise DataError(f"{path}, {place}: bbox is {json.dumps(bbox)}, expected [x, y, width, height]")
    x, y, width, height = map(float, bbox)
    try:
        area = _mask_area(entry, width * height)
    except (TypeError, ValueError, IndexError, KeyError, OverflowError):
        raise DataError(f"{path}, {place}: segmentation holds neither polygons nor RLE") from None
    corners = {"x0": x, "y0": y, "x1": x + width, "y1": y + height}
    return {**corners, **{name: entry.get(name) for name in _EXTRA}, "area_px": area, "bbox": bbox}


def _mask_area(entry: Mapping[str, Any], of_box: float) -> Any:
    """Area of the mask: as told, else from polygons or RLE; None for a mere box."""
    told, mask = entry.get("area"), entry.get("segmentation")
    if told is not None:
        mere = not mask and _is_number(told) and math.isclose(told, of_box, rel_tol=_MERE_BOX)
        return None if mere else told
    if not mask:
        return None
    if isinstance(mask, list):
        return sum(_polygon_area(polygon) for polygon in mask)
    counts = mask["counts"]
    return float(sum((_rle_counts(counts) if isinstance(counts, str) else counts)[1::2]))


def _polygon_area(polygon: Sequence[float]) -> float:
    """By the shoelace formula, as the published areas are; the count of pixels is up to 1 % off for most."""
    x, y = np.array(polygon, np.float64).reshape(-1, 2).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _rle_counts(text: str) -> list[int]:
    """Run lengths from COCO's compressed text: 5 bits a letter from `0` on, with sign, each but the first
    three runs told as the difference from the run two before (rleFrString of maskApi.c).
    """
    counts: list[int] = []
    at = 0
    while at < len(text):
        value = shift = 0
        more = True
        while more:
            bits = ord(text[at]) - 48
            value |= (bits & 0x1F) << shift
            more = bool(bits & 0x20)
            at, shift = at + 1, shift + 5
            if not more and bits & 0x10:
                value |= -1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts


def _frame(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """The rows as columns, values of another type than expected left as they are, for a message."""
    names = ("image_file", "width", "height", "kind", "number", *_CORNERS, "area_px", *_EXTRA)
    columns = [pl.Series(name, [row.get(name) for row in rows], strict=False) for name in names]
    return pl.DataFrame(columns)


def _refuse_corners(path: Path, rows: Sequence[Mapping[str, Any]], is_results: bool) -> None:
    """Raise where bbox holds corners: read so all boxes fit their pictures, read as sizes they do not."""
    sized = [r for r in rows if "bbox" in r and _is_number(r["width"]) and _is_number(r["height"])]
    if not sized:
        return
    numbers = np.array([r["bbox"] for r in sized], np.float64)
    sides = np.array([[r["width"], r["height"]] for r in sized], np.float64)
    slack = 0.1 * sides if is_results else 1.0  # a detector may guess a little beyond the frame
    leaves = (numbers[:, :2] + numbers[:, 2:] > sides + slack).any(axis=1)
    fits = (numbers[:, 2:] > numbers[:, :2]).all() and (numbers[:, 2:] <= sides + 1).all()
    if leaves.any() and fits:
        place = sized[int(leaves.argmax())]["place"]
        raise DataError(
            f"{path}, {place}: bbox looks like the corners x0, y0, x1, y1, by which all boxes fit their "
            "pictures; COCO's bbox is x, y, width, height"
        )


def _bbox(frame: pl.DataFrame) -> list[list[float]]:
    """x, y, width, height: sizes that give back the corner when added, in as few decimals as do so.

    For about 2 % of arbitrary corners no number does: the sum then differs in its last bit.
    """
    start, end = (frame.select(c).to_numpy() for c in (_CORNERS[:2], _CORNERS[2:]))
    exact = end - start
    size = exact.copy()
    is_open = np.ones(size.shape, bool)
    for decimals in range(15):
        rounded = np.round(exact, decimals)
        hit = is_open & (start + rounded == end)
        size[hit] = rounded[hit]
        is_open &= ~hit
    made: list[list[float]] = np.hstack([start, size]).tolist()
    return made
