"""A package in another form, its images byte for byte."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import polars as pl

from bioscan.config import record
from bioscan.data.images import Images
from bioscan.errors import DataError, ImageError, RequestError, unknown
from bioscan.jobs.bulk import Bulk, Made, each, run_bulk

RAW: Final = {"png": (".png",), "jpeg": (".jpg", ".jpeg")}
"""How arrays of pixels are encoded -> the endings of such files, the usual one first."""
QUALITY: Final = 95
"""Of JPEGs, as libjpeg counts, where none is given."""

_SCHEMA: Final = pl.Schema({"encoded": pl.Boolean(), "renamed": pl.Boolean()})


@dataclass(frozen=True)
class Converted:
    """What came of a conversion."""

    source: Images
    bulk: Bulk
    encoded: int
    """Images that were arrays of pixels."""
    renamed: int
    """Of these, those whose name got another ending."""
    parts_lost: bool
    """The source has parts, of which HDF5 packages know nothing."""

    def to_dict(self) -> dict[str, Any]:
        """Counts and failures, for JSON."""
        own = {"encoded": self.encoded, "renamed": self.renamed, "parts_lost": self.parts_lost}
        return self.bulk.to_dict() | own


def convert(
    source: Path | str | Images,
    target: Path | str,
    *,
    form: str | None = None,
    raw: str = "png",
    quality: int | None = None,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    overwrite: bool = False,
    progress: Callable[..., None] | None = None,
    finish: Callable[[Bulk], None] | None = None,
    outputs: Sequence[Path] = (),
) -> Converted:
    """Put every image of a package, byte for byte, into a new package of another form (or of the same).

    Only images that are stored as arrays of pixels (a kind of HDF5 package) are encoded; the name of such an
    image keeps its ending where that agrees with the encoding. An interrupted job goes on where it was.

    Args:
        source: Package of any form.
        target: New package; its form follows from its ending, else it is a folder.
        form: One of `data.packages.FORMS`, where the ending does not say it.
        raw: How arrays are encoded: `png` (without loss) or `jpeg`.
        quality: Of JPEGs, 1 to 100; None: QUALITY.
        engine: As for `parallel.map_shards`.
        workers: As for `parallel.map_shards`.
        address: As for `parallel.map_shards`.
        overwrite: As for `jobs.bulk.run_bulk`.
        progress: Called with `done` and `total` images.
        finish: As for `jobs.bulk.run_bulk`.
        outputs: As for `jobs.bulk.run_bulk`.

    Raises:
        RequestError: source and target are the same; a value out of range; as `run_bulk`.
        DataError: the source cannot be read as a package.
    """
    if raw not in RAW:
        raise unknown("encoding", raw, RAW)
    if quality is not None and raw == "png":
        raise RequestError("a quality is that of JPEGs: add --raw jpeg")
    quality = QUALITY if quality is None else quality
    if not 1 <= quality <= 100:
        raise RequestError(f"quality is {quality}; it must be from 1 to 100")
    package = source if isinstance(source, Images) else Images(source)
    bulk = run_bulk(
        package,
        each(functools.partial(_converted, raw, quality)),
        Path(target),
        form=form,
        record=record(raw=raw, quality=quality if raw == "jpeg" else None),
        rows_schema=_SCHEMA,
        engine=engine,
        workers=workers,
        address=address,
        overwrite=overwrite,
        progress=progress,
        finish=finish,
        outputs=outputs,
    )
    encoded, renamed = (int(bulk.rows[name].sum()) for name in _SCHEMA)
    lost = bulk.form == "hdf5" and package.index["part"].null_count() < len(package)
    return Converted(package, bulk, encoded, renamed, lost)


def _converted(raw: str, quality: int, images: Images, row: int) -> Made:
    name, part = images.name(row), images.index.item(row, "part")
    if not images.is_array(row):
        return Made(name, part, images.read_checked(row), {"encoded": False, "renamed": False})
    from bioscan.data.preprocess import encode_jpeg, encode_png

    pixels = images.array(row)
    try:
        data = encode_png(pixels) if raw == "png" else encode_jpeg(pixels, quality=quality)
    except DataError as error:  # no pixels, or too many for a JPEG
        raise ImageError(name, images.place(row), str(error)) from None
    agrees = PurePosixPath(name).suffix.lower() in RAW[raw]
    new = name if agrees else str(PurePosixPath(name).with_suffix(RAW[raw][0]))
    return Made(new, part, data, {"encoded": True, "renamed": not agrees})
