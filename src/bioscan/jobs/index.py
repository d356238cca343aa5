"""What is in a package of images: counted, compared with records, read and hashed."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl

from bioscan.data.image_index import READABLE, index_path
from bioscan.data.images import Images
from bioscan.errors import RequestError
from bioscan.files import refuse_existing, refuse_unwritable, writing
from bioscan.jobs.bulk import Made, each, run_bulk
from bioscan.jobs.check import find_images, read_records, require_column
from bioscan.jobs.work_folder import refuse_overlap

TABLES: Final = (".parquet", ".csv")
_CONTENT: Final = pl.Schema({"bytes": pl.Int64, "sha256": pl.String})
_EXTENSION: Final = r"\.([^./]+)$"


@dataclass(frozen=True)
class Compared:
    """A package beside a catalogue."""

    records: int
    """That name an image."""
    missing: pl.DataFrame
    """Records whose image the package has not: the columns of records that there are."""
    surplus: pl.DataFrame
    """Images that no record names: name, part."""


@dataclass(frozen=True)
class Contents:
    """What is in a package."""

    images: Images
    saved: Path | None
    """The saved index; None where it could not be saved."""
    table: pl.DataFrame
    """The index, its `size` known for folders too (null: cannot be read); after hashing also `sha256` and
    `error`, null where an image was read."""
    parts: pl.DataFrame
    """part, images: by part, null where there are none."""
    duplicates: pl.DataFrame
    """Images left out because one of the same name and part came before: name, part, place, kept (the place
    of the one before)."""
    compared: Compared | None
    """None: no catalogue was given."""
    hashed: bool

    @property
    def failed(self) -> pl.DataFrame:
        """Images that could not be read, after hashing: name, part, error."""
        return self.table.filter(pl.col("error").is_not_null()).select("name", "part", "error")

    @property
    def identical(self) -> pl.DataFrame:
        """Groups of identical images, after hashing: sha256, images, bytes (of one), names; largest first."""
        path = pl.format("part{}/{}", "part", "name").fill_null(pl.col("name"))
        return (
            self.table.filter(pl.col("sha256").is_not_null() & pl.col("sha256").is_duplicated())
            .group_by("sha256", maintain_order=True)
            .agg(images=pl.len(), bytes=pl.col("size").first(), names=path)
            .sort("images", descending=True, maintain_order=True)
        )


def index(
    package: Path | str,
    *,
    metadata: Path | str | None = None,
    hash: bool = False,
    output: Path | None = None,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    overwrite: bool = False,
    progress: Callable[..., None] | None = None,
) -> Contents:
    """Save the index of a package beside it, and say what is in the package.

    Args:
        package: As for `Images`.
        metadata: Catalogue or TSV to compare with.
        hash: Read every image: what cannot be read, checksums that differ, identical images.
        output: Table of the images, .parquet or .csv: the index, and `sha256` and `error` after hashing.
        engine: As for `parallel.map_shards`.
        workers: As for `parallel.map_shards`.
        address: As for `parallel.map_shards`.
        overwrite: Replace the output.
        progress: Called with `done` and `total` images while they are read.

    Raises:
        RequestError: no package, or several in one; another kind of output; an output that exists,
            cannot be written or would take the place of what is read.
        DataError: a damaged package; metadata that cannot be read.
    """
    if output is not None:
        if output.suffix not in TABLES:
            raise RequestError(f"{output}: the table is a {' or '.join(TABLES)} file")
        refuse_existing(output, overwrite=overwrite)
        refuse_unwritable(output)
    records = None if metadata is None else read_records(Path(metadata), without="nucraw")
    if records is not None:
        require_column(records, "image_file", str(metadata))
    images = Images(package, engine=engine, workers=workers, address=address)
    if output is not None:
        refuse_overlap(images, [output], [] if metadata is None else [Path(metadata)])
    saved = index_path(Path(os.path.abspath(package)))  # noqa: PTH100 - as `load_index` makes it
    table = images.index.with_columns(size=_sizes(images))
    if hash:
        bulk = run_bulk(
            images,
            each(_hashed),
            None,
            record={},
            rows_schema=_CONTENT,
            engine=engine,
            workers=workers,
            address=address,
            progress=progress,
        )
        for found, column in ((bulk.rows, "sha256"), (bulk.failed.rename({"reason": "error"}), "error")):
            table = table.join(
                found.select("name", "part", column),
                on=["name", "part"],
                how="left",
                nulls_equal=True,
                maintain_order="left",
            )
    contents = Contents(
        images,
        saved if saved.is_file() else None,
        table,
        images.index.group_by("part").agg(images=pl.len()).sort("part"),
        _duplicates(images),
        None if records is None else _compared(images, records),
        hash,
    )
    if output is not None:
        with writing(output, overwrite=overwrite) as partial:
            (table.write_parquet if output.suffix == ".parquet" else table.write_csv)(partial)
    return contents


def summary(contents: Contents) -> dict[str, Any]:
    """The whole as plain values, for JSON: counts, and every name that a count is about."""
    images, table = contents.images, contents.table
    known = table.filter(pl.col("size").is_not_null())
    extremes = {}
    for what, place in (("smallest", known["size"].arg_min()), ("largest", known["size"].arg_max())):
        extremes[what] = (
            None if place is None else known.select("name", "part", "size").row(place, named=True)
        )
    left_out = images.left_out
    unreadable = table.filter(~pl.col("encoding").is_in(READABLE))
    found: dict[str, Any] = {
        "package": images.path,
        "form": images.form,
        "index": None if contents.saved is None else contents.saved.name,
        "archives": len(images.containers),
        "archive_bytes": sum(int(stamp.split("-")[0]) for stamp in images.containers.values()),
        "images": len(images),
        "bytes": int(known["size"].sum()),
        **extremes,
        "arrays": int(table["height"].is_not_null().sum()),
        "encodings": _counted(table["encoding"]),
        "extensions": _counted(table["name"].str.extract(_EXTENSION).str.to_lowercase().fill_null("none")),
        "parts": contents.parts.to_dicts(),
        "left_out": _counted(left_out["left_out"]),
        "no_images": left_out.filter(pl.col("left_out") != "duplicate")["name"].to_list(),
        "duplicates": contents.duplicates.to_dicts(),
        "unsafe": pl.concat([table.filter("unsafe")["name"], left_out.filter("unsafe")["name"]]).to_list(),
        "unreadable": unreadable.select("name", "part", "encoding").to_dicts(),
    }
    if contents.compared:
        found["records"] = contents.compared.records
        found["missing"] = contents.compared.missing.to_dicts()
        found["surplus"] = contents.compared.surplus.to_dicts()
    if contents.hashed:
        found["failed"] = contents.failed.to_dicts()
        found["identical"] = contents.identical.to_dicts()
    return found


def _hashed(images: Images, row: int) -> Made:
    """SHA-256 of an image's bytes; of an array, of its shape and pixels."""
    if images.is_array(row):
        pixels = images.array(row)
        content = f"{pixels.shape}".encode() + pixels.tobytes()
    else:
        content = images.read_checked(row)
    values = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return Made(images.name(row), images.index["part"][row], None, values)


def _sizes(images: Images) -> pl.Series:
    """Bytes of each image: as the index says, in folders as the files are."""
    if images.containers:
        return images.index["size"]
    sizes: list[int | None] = []
    for row in range(len(images)):
        try:
            sizes.append(images.file(row).stat().st_size)
        except OSError:
            sizes.append(None)
    return pl.Series("size", sizes, pl.Int64)


def _duplicates(images: Images) -> pl.DataFrame:
    def place(container: str, offset: str) -> pl.Expr:
        if not images.containers:
            return pl.col(container)
        return pl.format("{} @ {}", container, offset)

    twice = images.left_out.filter(pl.col("left_out") == "duplicate").select(
        "name", "part", "container", "offset"
    )
    kept = images.index.select("name", "part", "container", "offset")
    return twice.join(
        kept, on=["name", "part"], how="left", nulls_equal=True, suffix="_kept", maintain_order="left"
    ).select("name", "part", place=place("container", "offset"), kept=place("container_kept", "offset_kept"))


def _compared(images: Images, records: pl.DataFrame) -> Compared:
    _, rows = find_images(records, images)
    named = records["image_file"].is_not_null()
    columns = [c for c in ("sampleid", "image_file", "chunk_number") if c in records.columns]
    surplus = np.setdiff1d(np.arange(len(images)), rows)
    return Compared(
        int(named.sum()),
        records.filter(named & (pl.Series(rows) < 0)).select(columns),
        images.index[surplus].select("name", "part"),
    )


def _counted(values: pl.Series) -> dict[str, int]:
    counts = values.cast(pl.String).value_counts(sort=True, name="n")
    return dict(counts.rows())
