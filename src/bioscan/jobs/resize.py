"""A package of photographs at another size."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import polars as pl

from bioscan.config import record
from bioscan.data.images import Images
from bioscan.data.preprocess import ResizeSettings, resize_file, resize_pixels
from bioscan.jobs.bulk import Bulk, Made, each, run_bulk

HOW: Final = ("shrunk", "enlarged", "encoded", "copied")
"""What became of an image: `encoded` has new bytes at the same size, `copied` the very bytes that came."""
_SCHEMA: Final = pl.Schema(
    {
        "how": pl.String(),
        "width": pl.Int32(),
        "height": pl.Int32(),
        "new_width": pl.Int32(),
        "new_height": pl.Int32(),
    }
)
_OTHER_KINDS: Final = r"(?i)\.(tiff?|bmp|gif|webp)$"


@dataclass(frozen=True)
class ResizedPackage:
    """What came of a resizing."""

    bulk: Bulk
    """Its rows: name, part, how (one of HOW); width, height, new_width, new_height, all upright."""
    counts: dict[str, int]
    """How -> images."""
    odd_names: pl.Series
    """Names of JPEGs that promise another kind of file; kept, for the catalogue calls them so."""
    parts_lost: bool
    """The source has parts, of which HDF5 packages know nothing."""

    def to_dict(self) -> dict[str, Any]:
        """Counts and failures, for JSON."""
        own = {"odd_names": self.odd_names.len(), "parts_lost": self.parts_lost}
        return self.bulk.to_dict() | self.counts | own


def resize(
    source: Path | str | Images,
    target: Path | str,
    settings: ResizeSettings | None = None,
    *,
    form: str | None = None,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    overwrite: bool = False,
    progress: Callable[..., None] | None = None,
    finish: Callable[[Bulk], None] | None = None,
    outputs: Sequence[Path] = (),
) -> ResizedPackage:
    """Resize every image of a package into a new one; an interrupted job goes on where it was.

    Names are kept, so that a catalogue finds the images. What comes out is a JPEG, or a PNG under a name that
    ends so; a JPEG that has the size already is copied (`data.preprocess.resize_file`).

    Args:
        source: Package of any form.
        target: New package; its form follows from its ending, else it is a folder.
        settings: Size and encoding; None: those of the published packages.
        form: One of `data.packages.FORMS`, where the ending does not say it.
        engine: As for `parallel.map_shards`.
        workers: As for `parallel.map_shards`.
        address: As for `parallel.map_shards`.
        overwrite: As for `jobs.bulk.run_bulk`.
        progress: Called with `done` and `total` images.
        finish: As for `jobs.bulk.run_bulk`.
        outputs: As for `jobs.bulk.run_bulk`.

    Raises:
        RequestError: as `run_bulk`.
        DataError: the source cannot be read as a package.
    """
    chosen = settings or ResizeSettings()
    package = source if isinstance(source, Images) else Images(source)
    bulk = run_bulk(
        package,
        each(functools.partial(_resized, chosen)),
        Path(target),
        form=form,
        record=record(chosen),
        rows_schema=_SCHEMA,
        engine=engine,
        workers=workers,
        address=address,
        overwrite=overwrite,
        progress=progress,
        finish=finish,
        outputs=outputs,
    )
    counts = dict(bulk.rows["how"].value_counts().rows())
    names = bulk.rows["name"]
    lost = bulk.form == "hdf5" and package.index["part"].null_count() < len(package)
    return ResizedPackage(
        bulk, {how: counts.get(how, 0) for how in HOW}, names.filter(names.str.contains(_OTHER_KINDS)), lost
    )


def _resized(settings: ResizeSettings, images: Images, row: int) -> Made:
    where = {"name": images.name(row), "place": images.place(row)}
    if images.is_array(row):
        made = resize_pixels(images.array(row), settings, **where)
    else:
        made = resize_file(images.read_checked(row), settings, **where)
    facts = made._asdict()
    return Made(where["name"], images.index.item(row, "part"), facts.pop("data"), facts)
