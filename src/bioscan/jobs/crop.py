"""From a package of photographs to a package of crops and a table of boxes."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.config import record as record_of
from bioscan.data.boxes import (
    KINDS,
    OUTSIDE_PX,
    SCHEMA,
    XYXY,
    Detector,
    Finding,
    box_form,
    find_pictures,
    finding_rows,
    pictures,
    read_boxes,
    read_of_pictures,
    row_finding,
    row_place,
    write_boxes,
)
from bioscan.data.decode import read_rgb
from bioscan.data.images import Images
from bioscan.data.preprocess import (
    CropSettings,
    ResizeSettings,
    crop_picture,
    encode_jpeg,
    encode_png,
    shrink,
)
from bioscan.errors import DataError, ImageError, RequestError, unknown
from bioscan.files import sha256
from bioscan.jobs.bulk import Bulk, Failed, Made, left_out, run_bulk

CLASSICAL: Final = "classical"
"""The detector that is no network (`data.localise`)."""
_CLASSICAL_FILES: Final = [
    Path(__file__).parents[1] / "data" / name for name in ("localise.py", "localise_curves.py")
]
"""What it finds depends on these alone."""
MANY: Final = ("best", "all", "skip")
NONE: Final = ("skip", "whole")

TINY: Final = 0.002
LARGE: Final = 0.6
"""Shares of the picture. Of the 451 boxes that people drew in the failed crops of BIOSCAN-1M 1.5 % are
smaller and one is larger; the boxes of 25 BIOSCAN-5M records have 1.4 to 59 %."""

_SAME_ASPECT: Final = 0.01
_BATCH: Final = 16
_BATCH_PIXELS: Final = 64_000_000
"""Pictures given to a detector at a time: so many, or so many pixels, whichever comes first."""


@dataclass(frozen=True)
class CropResult:
    """What a cropping made."""

    target: Path | None
    """None: boxes only, or no crop that could be put there."""
    pictures: int
    """In the package that was cropped, those that only look like it (`jobs.bulk.left_out`) too."""
    boxes: pl.DataFrame
    """The box table, columns of `bioscan.data.boxes.SCHEMA`."""
    crops: int
    failed: pl.DataFrame
    """`name, part, place, reason` of pictures that could not be read or cropped; the latter have boxes."""
    resumed: int
    """Shards that an interrupted run had made."""
    without_scale: int
    """Pictures that the table of scales does not name; 0 without such a table."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: counts, the pictures without a specimen or with a failure, and lengths by unit."""
        first = pictures(self.boxes)
        counts = dict(first["kind"].value_counts().rows())
        lengths = {}
        for unit in ("px", "mm"):
            told = first[f"length_{unit}"].drop_nulls()
            if told.len():
                ends = {"least": told.min(), "median": told.median(), "most": told.max()}
                lengths[unit] = {"specimens": told.len(), **ends}
        return {
            "pictures": self.pictures,
            "cropped": self.crops,
            "kinds": {kind: int(counts.get(kind, 0)) for kind in KINDS},
            "without_specimen": first.filter(pl.col("kind") == "none")["image_file"].to_list(),
            "lengths": lengths,
            "without_scale": self.without_scale,
            "failed": self.failed.height,
            "failures": self.failed.to_dicts(),
            "resumed_shards": self.resumed,
        }


def crop(
    source: Path | str | Images,
    target: Path | str | None,
    *,
    detector: str = CLASSICAL,
    boxes: Path | str | None = None,
    settings: CropSettings | None = None,
    resize: bool = False,
    output: ResizeSettings | None = None,
    many: str = "best",
    none: str = "skip",
    mm_per_px: float | Path | str | None = None,
    boxes_out: Path | str | None = None,
    form: str | None = None,
    threshold: float | None = None,
    device: str = "auto",
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    overwrite: bool = False,
    progress: Callable[..., None] | None = None,
    finish: Callable[[CropResult], None] | None = None,
    outputs: Sequence[Path] = (),
) -> CropResult:
    """Find the specimen of each picture and cut it out, at the picture's full size.

    A picture without a specimen is a finding, not a failure. An interrupted job goes on where it was.

    Args:
        source: Package of photographs.
        target: Package of crops, of the pictures' names; None: boxes only.
        detector: `classical`; else a detector's folder, or a Lightning checkpoint of the paper's program.
        boxes: Use the boxes of this table instead of a detector. Those told of a picture of another size and
            the same aspect are scaled to it.
        settings: Margin, filling and rotation of the crops.
        resize: Bring crops to the size of `output`.
        output: Their size, and how they are encoded: JPEG, or PNG where the picture's name ends so.
        many: Of pictures with several specimens: a crop of the `best`, of `all` (the further ones are named
            `NAME.2.jpg` …, or `NAME.2_.jpg` where another picture has that name), or none (`skip`).
        none: Of pictures without a specimen: nothing (`skip`), or the `whole` picture.
        mm_per_px: Millimetres a pixel of the photographs; or a table with `image_file` and `mm_per_px`.
        boxes_out: Where the box table is written, by its ending; None: it is only returned.
        form: Of the target; None: by its ending.
        threshold: Of a learned detector: score below which there is no specimen; None: its own.
        device: Of a learned detector.
        engine: `local` or `ray`.
        workers: As for `parallel.map_shards`; each has its own learned detector.
        address: Of the Ray cluster.
        overwrite: Replace the target and the box table.
        progress: Called as `progress(done, total)`.
        finish: Called with the result before what is held for a rerun goes; as for `jobs.bulk.run_bulk`.
        outputs: Files that it writes; as for `jobs.bulk.run_bulk`.

    Raises:
        RequestError: a value out of range, an output that exists, no such detector.
        DataError: a table or package that cannot be used.
    """
    for what, value, known in (("many", many, MANY), ("none", none, NONE)):
        if value not in known:
            raise unknown(f"value of {what}:", value, known)
    if boxes is not None and detector != CLASSICAL:
        raise RequestError("boxes take the place of a detector; name one of the two")
    if threshold is not None and (boxes is not None or detector == CLASSICAL):
        raise RequestError("threshold is that of a learned detector; name one")
    package = source if isinstance(source, Images) else Images(source)
    scale = _scale(mm_per_px)
    inputs = [Path(read) for read in (boxes, detector) if read not in (None, CLASSICAL)]
    without_scale = 0
    if isinstance(scale, pl.DataFrame):
        inputs.append(Path(str(mm_per_px)))
        without_scale = _without_scale(package, scale, inputs[-1])
    if boxes is not None:
        read_boxes(boxes)  # what is wrong with it is known before the work
        fingerprint = sha256(Path(boxes))
    elif detector == CLASSICAL:
        fingerprint = _joint(_CLASSICAL_FILES)
    else:
        fingerprint = _fingerprint(Path(detector))
    step = CropStep(
        detector=detector if detector == CLASSICAL else str(Path(detector).resolve()),
        fingerprint=fingerprint,
        device=device,
        threshold=threshold,
        boxes=None if boxes is None else str(Path(boxes).resolve()),
        settings=settings or CropSettings(),
        resize=resize,
        output=output or ResizeSettings(),
        many=many,
        none=none,
        crops=target is not None,
        taken=_like_further(package.index["name"]) if many == "all" else frozenset(),
    )
    if boxes is None and detector != CLASSICAL:
        _detector(step.detector, fingerprint, device, threshold)  # likewise
    record = record_of(
        step.settings,
        detector="given boxes" if boxes is not None else detector if detector == CLASSICAL else "learned",
        fingerprint=fingerprint,
        threshold=threshold,
        output=asdict(step.output),
        **{name: getattr(step, name) for name in ("resize", "many", "none", "crops")},
    )
    out = None if boxes_out is None else Path(boxes_out)
    if out is not None:
        box_form(out)

    left = left_out(package)

    def result(made: Bulk) -> CropResult:
        return CropResult(
            target=made.target,
            pictures=len(package) + left.height,
            boxes=_scaled(made.rows.select(list(SCHEMA)).drop_nulls("image_file"), scale),
            crops=made.images if made.target else 0,
            failed=made.failed if target else pl.concat([left, made.failed]),
            resumed=made.resumed,
            without_scale=without_scale,
        )

    def write(made: Bulk) -> None:
        cropped = result(made)
        if out is not None:
            write_boxes(cropped.boxes, out, record=record, overwrite=True)
        if finish:
            finish(cropped)

    made = run_bulk(
        package,
        step,
        None if target is None else Path(target),
        form=form,
        record=record,
        rows_schema=pl.Schema({name: kind for name, kind in SCHEMA.items() if name != "part"}),
        engine=engine,
        workers=workers,
        address=address,
        overwrite=overwrite,
        progress=progress,
        work=out.with_name(f".{out.name}.unfinished") if target is None and out is not None else None,
        finish=write,
        outputs=[*([out] if out else []), *outputs],
        inputs=inputs,
    )
    return result(made)


def doubtful(boxes: pl.DataFrame, num: int) -> pl.DataFrame:
    """Pictures that a person should look at, the worst of each kind of doubt in turn.

    Doubts are: several specimens, a box that touches the frame, a tiny or large box, none; at last, and where
    there is no other doubt, the low score.

    Args:
        boxes: A box table.
        num: Pictures at most.

    Returns:
        `image_file, part, score, why`; `why` is empty where only the score is low.
    """
    first = pictures(boxes)
    width, height = pl.col("x1") - pl.col("x0"), pl.col("y1") - pl.col("y0")
    share = width * height / (pl.col("width") * pl.col("height"))
    doubts = {
        "several specimens": pl.col("kind") == "many",
        "at the frame": (pl.min_horizontal("x0", "y0") <= OUTSIDE_PX)
        | (pl.col("x1") >= pl.col("width") - OUTSIDE_PX)
        | (pl.col("y1") >= pl.col("height") - OUTSIDE_PX),
        "tiny": share < TINY,
        "large": share > LARGE,
        "none found": pl.col("kind") == "none",
    }
    said = [pl.when(bad).then(pl.lit(name)) for name, bad in doubts.items()]
    first = first.with_columns(why=pl.concat_str(said, separator=", ", ignore_nulls=True))
    kind = pl.coalesce(
        *(pl.when(bad).then(pl.lit(number)) for number, bad in enumerate(doubts.values())),
        pl.lit(len(doubts)),
    )
    turn = pl.col("score").fill_null(0.0).rank("ordinal").over(kind)
    return first.sort(turn, kind, maintain_order=True).head(num).select("image_file", "part", "score", "why")


@dataclass(frozen=True)
class CropStep:
    """The pictures of a shard to crops and the rows of the box table, in order."""

    detector: str
    fingerprint: str
    """Of the detector's files or of the given boxes: what is held of others is dropped."""
    device: str
    threshold: float | None
    boxes: str | None
    settings: CropSettings
    resize: bool
    output: ResizeSettings
    many: str
    none: str
    crops: bool
    """Whether crops are made, or boxes alone."""
    taken: frozenset[str] = frozenset()
    """Names, in lower case, that crops of further specimens cannot have."""

    def __call__(self, images: Images) -> Iterator[Made | Failed]:
        """Crops and rows of all pictures of the package; a picture that cannot be read is a failure."""
        given = None if self.boxes is None else _given(self.boxes, self.fingerprint, images)
        for batch in _batches(images):
            readable = [read for _, read in batch if not isinstance(read, ImageError)]
            findings: Iterator[Finding] = iter(())
            if given is None and readable:
                detector = _detector(self.detector, self.fingerprint, self.device, self.threshold)
                findings = iter(detector(readable))
            for row, read in batch:
                name, part = images.name(row), images.index.item(row, "part")
                if isinstance(read, ImageError):
                    yield Failed(name, part, read.place, read.reason)
                    continue
                told = {"image_file": name, "part": part, "width": read.shape[1], "height": read.shape[0]}
                if given is None:
                    finding = next(findings)
                    rows = finding_rows(finding, **told)
                else:
                    try:
                        rows = _fitted(given.get(row), told)
                    except DataError as error:
                        yield Failed(name, part, images.place(row), str(error))
                        continue
                    finding = row_finding(rows)
                for number, box in enumerate(rows):
                    yield Made(name, part, None, {key: box[key] for key in SCHEMA if key != "part"})
                    if self.crops and self._is_wanted(finding.kind, number):
                        crop_name = _crop_name(name, number, self.taken)
                        try:
                            data = self._crop(read, finding, number, name)
                        except DataError as error:
                            yield Failed(crop_name, part, images.place(row), str(error))
                        else:  # apart from its row, which stays where the package cannot have the crop
                            yield Made(crop_name, part, data, {})

    def _crop(self, pixels: NDArray[np.uint8], finding: Finding, number: int, name: str) -> bytes:
        if finding.kind != "none":
            pixels = crop_picture(pixels, _numbered(finding, number), self.settings)
        return self._encoded(pixels, name)

    def _encoded(self, pixels: NDArray[np.uint8], name: str) -> bytes:
        size = self.output
        if self.resize:
            pixels = shrink(pixels, size.shorter_side, size.fix, enlarge=size.enlarge)
        if name.lower().endswith(".png"):
            return encode_png(pixels)
        return encode_jpeg(pixels, size.quality, size.subsampling)

    def _is_wanted(self, kind: str, number: int) -> bool:
        if kind == "none":
            return self.none == "whole"
        if kind == "many":
            return self.many == "all" or (self.many == "best" and number == 0)
        return number == 0


def _batches(images: Images) -> Iterator[list[tuple[int, NDArray[np.uint8] | ImageError]]]:
    """Rows with their pixels, or why there are none, bounded in number and in memory."""
    batch: list[tuple[int, NDArray[np.uint8] | ImageError]] = []
    num_pixels = 0
    for row in range(len(images)):
        try:
            read: NDArray[np.uint8] | ImageError = read_rgb(images, row, checked=True)
        except ImageError as error:
            read = error
        batch.append((row, read))
        num_pixels += 0 if isinstance(read, ImageError) else read.shape[0] * read.shape[1]
        if len(batch) == _BATCH or num_pixels >= _BATCH_PIXELS:
            yield batch
            batch, num_pixels = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=1)
def _detector(name: str, fingerprint: str, device: str, threshold: float | None) -> Detector:
    """Loaded once a process, and again when it has changed."""
    if name == CLASSICAL:
        from bioscan.data.localise import find_insects

        return find_insects
    from bioscan.learn.detection import load_detector

    return load_detector(name, device=device, threshold=threshold)


@lru_cache(maxsize=1)
def _box_table(path: str, fingerprint: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The given boxes with the number of their picture, and the pictures; read once a process."""
    frame = read_boxes(path)
    first = pictures(frame).select("image_file", "part")
    numbers = first.with_row_index("picture")
    keys = ["image_file", "part"]
    return frame.join(numbers, on=keys, nulls_equal=True, maintain_order="left"), first


def _given(path: str, fingerprint: str, images: Images) -> dict[int, list[dict[str, Any]]]:
    """Row of an image -> its rows in the table of given boxes; images that it does not have are left out."""
    frame, first = _box_table(path, fingerprint)
    places = find_pictures(images.index.select(pl.col("name").alias("image_file"), "part"), first)
    wanted = pl.DataFrame({"picture": places, "row": np.arange(places.size)}).filter(pl.col("picture") >= 0)
    rows = frame.join(wanted.cast({"picture": pl.UInt32}), on="picture", maintain_order="left")
    parts = rows.partition_by("row", as_dict=True)
    return {row: table.select(SCHEMA.keys()).to_dicts() for (row,), table in parts.items()}


def _fitted(rows: list[dict[str, Any]] | None, picture: dict[str, Any]) -> list[dict[str, Any]]:
    """Given rows as of this picture, scaled where they are told of another size of it.

    Raises:
        DataError: none are given, or of another aspect.
    """
    if rows is None:
        raise DataError("not among the given boxes")
    width, height = picture["width"], picture["height"]
    across, down = width / (rows[0]["width"] or width), height / (rows[0]["height"] or height)
    if not math.isclose(across, down, rel_tol=_SAME_ASPECT):
        told = f"{rows[0]['width']} x {rows[0]['height']}"
        raise DataError(f"{width} x {height} pixels, but its boxes are of a picture of {told}")
    factors = dict(zip(XYXY, (across, down, across, down), strict=True))
    factors |= {"area_px": across * down, "length_px": math.sqrt(across * down)}
    return [
        row | picture | {n: None if row[n] is None else row[n] * f for n, f in factors.items()}
        for row in rows
    ]


def _numbered(finding: Finding, number: int) -> Finding:
    """The finding with another of its boxes as the specimen."""
    if number == 0:
        return finding
    return Finding(finding.kind, finding.boxes[number:], finding.scores[number:])


def _crop_name(name: str, number: int, taken: frozenset[str]) -> str:
    """The picture's name, a number before its ending for a further specimen.

    >>> [_crop_name(name, 1, frozenset({"a.2.jpg"})) for name in ("b.jpg", "a.jpg", "c.d/e")]
    ['b.2.jpg', 'a.2_.jpg', 'c.d/e.2']
    """
    if number == 0:
        return name
    path, mark = PurePosixPath(name), f".{number + 1}"
    while (made := str(path.with_name(f"{path.stem}{mark}{path.suffix}"))).lower() in taken:
        mark += "_"
    return made


def _like_further(names: pl.Series) -> frozenset[str]:
    """Names, in lower case, that look like a further specimen of another one: `a.2.jpg` beside `a.jpg`."""
    names = names.str.to_lowercase()
    first = names.str.replace(r"\.\d+_*((?:\.[^./]*)?)$", "${1}")
    return frozenset(names.filter((first != names) & first.is_in(names.implode())))


def _scale(mm_per_px: float | Path | str | None) -> float | pl.DataFrame | None:
    """Millimetres a pixel: one number, or a table of `image_file, part, mm_per_px`."""
    if mm_per_px is None:
        return None
    if isinstance(mm_per_px, int | float):
        if not 0 < mm_per_px < math.inf:
            raise RequestError(f"mm_per_px is {mm_per_px}; it must be more than 0")
        return float(mm_per_px)
    path = Path(mm_per_px)
    table = read_of_pictures(path, "mm_per_px")
    values = table["mm_per_px"].cast(pl.Float64, strict=False)
    odd = ~(values.is_finite() & (values > 0)).fill_null(False)
    if odd.any():
        row = int(odd.arg_max() or 0)
        value = table["mm_per_px"][row]
        raise DataError(f"{path}, {row_place(path, row)}: mm_per_px is {value!r}, expected more than 0")
    return table.with_columns(values)


def _without_scale(package: Images, scale: pl.DataFrame, path: Path) -> int:
    """How many pictures of the package a table of scales does not name; not all of them, or a DataError."""
    rows = find_pictures(package.index.select(pl.col("name").alias("image_file"), "part"), scale)
    if (rows < 0).all():
        named = ", ".join(scale["image_file"].head(1)) or "nothing"
        here = f"{len(package):,} pictures, the first {package.name(0)}"
        raise DataError(f"{path}: a scale for none of the pictures (it has {named}; the package has {here})")
    return int((rows < 0).sum())


def _scaled(boxes: pl.DataFrame, scale: float | pl.DataFrame | None) -> pl.DataFrame:
    """The box table with lengths in millimetres; without a scale it stays as it is."""
    if scale is None:
        return boxes
    if isinstance(scale, float):
        return boxes.with_columns(length_mm=pl.col("length_px") * scale)
    first = pictures(boxes).select("image_file", "part")
    places = find_pictures(first, scale)
    values = [scale["mm_per_px"][int(place)] if place >= 0 else None for place in places]
    of_picture = first.with_columns(mm_per_px=pl.Series(values, dtype=pl.Float64))
    return (
        boxes.join(of_picture, on=["image_file", "part"], nulls_equal=True, maintain_order="left")
        .with_columns(length_mm=pl.col("length_px") * pl.col("mm_per_px"))
        .drop("mm_per_px")
    )


def _fingerprint(detector: Path) -> str:
    """SHA-256 of a checkpoint, or of the detector in its folder or run folder."""
    if not detector.exists():
        raise RequestError(f"{detector}: no such detector; '{CLASSICAL}' needs no file")
    if detector.is_file():
        return sha256(detector)
    return _joint(sorted(detector.rglob("model.*")))  # in a run folder, one deeper


def _joint(files: Iterable[Path]) -> str:
    """SHA-256 of several files and their names."""
    return hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in files).encode()).hexdigest()
