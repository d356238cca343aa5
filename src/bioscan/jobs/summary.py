"""Statistics of a metadata file, and example pictures of its taxa."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.analysis import summary as statistics
from bioscan.analysis.summary import Summary, taxa_of_paths
from bioscan.data.decode import read_rgb
from bioscan.data.images import Images
from bioscan.data.metadata import scan_metadata
from bioscan.errors import ImageError, RequestError, unknown
from bioscan.vocabulary import RANKS

TRIES: Final = 5
"""Pictures of a taxon that are tried before it is left without an example."""
_SHRINK_PX: Final = 400


@dataclass(frozen=True, eq=False)
class Example:
    """A picture of a taxon."""

    path: str
    """The taxon, as in `Summary.taxa`."""
    image_file: str
    pixels: NDArray[np.uint8]
    """RGB, H x W x 3; perhaps shrunk, the shorter side at least 400 pixels where the picture has them."""


def summarise(metadata: Path | str | pl.DataFrame | pl.LazyFrame, *, skip: Collection[str] = ()) -> Summary:
    """Statistics of a metadata file or a table (see `bioscan.analysis.summary`).

    Args:
        metadata: Catalogue, TSV, CSV or JSON-LD; or a table as `read_metadata` gives it.
        skip: `barcodes`, `plates`: left out, which is faster.

    Raises:
        DataError, RequestError: the file cannot be read; an unknown part.
    """
    table = metadata if isinstance(metadata, pl.DataFrame | pl.LazyFrame) else scan_metadata(metadata)
    return statistics.summarise(table, skip=skip)


def examples(
    metadata: Path | str | pl.DataFrame | pl.LazyFrame, images: Images, rank: str
) -> tuple[dict[str, Example], list[ImageError]]:
    """One picture of each taxon at a rank, and what could not be read on the way.

    It is the picture whose name comes first in the alphabet of those that the package has; after one that
    cannot be read the next is tried, up to TRIES. The order of the rows does not matter.

    Returns:
        Path of the taxon (as in `Summary.taxa`) -> its example; taxa without one are not in it.

    Raises:
        RequestError: an unknown rank, or the table has no column `image_file` or none of the rank's name.
    """
    if rank not in RANKS:
        raise unknown("rank", rank, RANKS)
    lazy = (metadata if isinstance(metadata, pl.DataFrame | pl.LazyFrame) else scan_metadata(metadata)).lazy()
    present = lazy.collect_schema().names()
    for column in ("image_file", rank):
        if column not in present:
            raise RequestError(f"example pictures by {rank} need column '{column}', which the table has not")
    ranks = [r for r in RANKS if r in present]
    parts = ["chunk_number"] if "chunk_number" in present else []
    frame = lazy.select(*ranks, "image_file", *parts).collect(engine="streaming")
    taxa = taxa_of_paths(frame.select(ranks))[rank]
    rows = images.find(frame["image_file"], frame[parts[0]] if parts else None)
    table = pl.DataFrame({"taxon": taxa.codes_N, "row": rows, "image_file": frame["image_file"]})
    there = table.filter((pl.col("taxon") >= 0) & (pl.col("row") >= 0))
    first = there.sort("taxon", "image_file", "row").group_by("taxon", maintain_order=True).head(TRIES)
    found: dict[str, Example] = {}
    failures: list[ImageError] = []
    for taxon, row, name in first.select("taxon", "row", "image_file").iter_rows():
        path = taxa.paths_K[taxon]
        if path in found:
            continue
        try:
            found[path] = Example(path, name, read_rgb(images, row, _SHRINK_PX))
        except ImageError as error:
            failures.append(error)
    return found, failures
