"""From a catalogue or a package of photographs to a file of embeddings."""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from bioscan.config import record as record_of
from bioscan.data.embeddings import PRECISIONS, schema, write_embeddings
from bioscan.data.images import Images
from bioscan.data.metadata import FORMS, fingerprint, key_of, read_footer, read_metadata, scan_metadata
from bioscan.errors import RequestError, unknown
from bioscan.files import refuse_existing, refuse_unwritable, writing
from bioscan.jobs.bulk import FAILED
from bioscan.jobs.work_folder import (
    WorkFolder,
    held,
    refuse_overlap,
    remove_work_folder,
    telling_of_a_full_disk,
)
from bioscan.learn.embeddings import Backbone, features, num_features, open_backbone
from bioscan.learn.specimens import NOT_IN_PACKAGE
from bioscan.parallel import map_shards

_SHARD: Final = 1024
"""Photographs in a shard: what a kill can cost."""


def embed(
    source: Path | str,
    output: Path | str,
    *,
    model: Path | str,
    weights: str | None = None,
    images: Path | str | Images | None = None,
    image_size: int | None = None,
    crop_size: int | None = None,
    precision: str = "float16",
    amp: str = "off",
    batch_size: int = 64,
    device: str = "auto",
    threads: int | None = None,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    overwrite: bool = False,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Write what a backbone makes of each photograph, in storage order of the package.

    An interrupted job goes on where it was. Photographs that cannot be read are left out and listed.

    Args:
        source: A catalogue or TSV (then `images` is needed), or a package of bare photographs.
        output: `.parquet`, see `bioscan.data.embeddings`.
        model: Model folder, run folder, or the name of a backbone.
        weights: Of a named backbone: `hub` (also None), or a local file or folder.
        images: Package of the catalogue's images.
        image_size: Shorter side that images are resized to, pixels; None: as the weights have it.
        crop_size: Side of the central square, pixels; None: likewise.
        precision: float16 or float32.
        amp: Mixed precision of the computation, as in the training settings.
        batch_size: Photographs at a time.
        device: auto, cpu, cuda or mps.
        threads: torch threads of this process; None: as torch has it.
        engine: As for `parallel.map_shards`; on Ray every node needs the same files.
        workers: As for `parallel.map_shards`; each has a backbone of its own.
        address: Of the Ray cluster.
        overwrite: Replace the output, and drop an unfinished job of other settings.
        progress: Called as `progress(done, total)`.

    Returns:
        `embeddings` (path), `specimens`, `embedded`, `width`, `backbone`, `weights_sha256`, `failed` (count),
        `failures` (name, part, place, reason), `resumed_shards`.

    Raises:
        RequestError: no such model or weights, a value out of range, an output that exists.
        DataError: an input that cannot be used.
    """
    source, output = Path(source), Path(output)
    if output.suffix != ".parquet":
        raise RequestError(f"{output}: embeddings are a .parquet file")
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    for name, value in (("batch_size", batch_size), ("threads", threads)):
        if value is not None and value < 1:
            raise RequestError(f"{name} is {value}; it must be at least 1")
    if threads:
        torch.set_num_threads(threads)
    refuse_existing(output, overwrite=overwrite)
    refuse_unwritable(output)
    is_catalogue = source.suffix in FORMS and not (images is None and _holds_images(source))
    package, specimens, absent = _specimens(source, images, is_catalogue=is_catalogue)
    where = Path(model)
    inputs = [*([source] if is_catalogue else []), *([where.resolve()] if where.exists() else [])]
    refuse_overlap(package, [output], inputs)
    asked = _Asked(
        str(where.resolve() if where.is_dir() else model), _whole(weights), image_size, crop_size, device
    )
    backbone = _opened(asked)
    width = num_features(backbone)
    record = record_of(
        **backbone.record,
        precision=precision,
        amp=amp,
        source=source.name,
        images=package.path.name,
        data_fingerprint=fingerprint(source) if is_catalogue else package.fingerprint,
        images_fingerprint=package.fingerprint,
        specimens=specimens.height,
    )
    job = json.loads(json.dumps({"record": record, "batch_size": batch_size, "shard": _SHARD}))
    work = output.resolve().with_name(f".{output.name}.unfinished")
    place = WorkFolder(work, None, str(output), "", pl.Schema())
    shards = _Shards(package, specimens, _SHARD)
    with held(place, job, overwrite=overwrite), telling_of_a_full_disk(place):
        done = [number for number in range(shards.count) if _is_whole(place.sidecar(number))]
        shards.wanted = [number for number in range(shards.count) if number not in set(done)]
        ready = sum(shards.size(number) for number in done)
        tell = progress or (lambda done, total: None)
        tell(ready, specimens.height)
        step = functools.partial(_embed_shard, place, asked, width, precision, amp, batch_size)
        for number, _ in map_shards(step, shards, engine=engine, workers=workers, address=address):
            ready += shards.size(shards.wanted[number])
            tell(ready, specimens.height)
        parts = [place.sidecar(number) for number in range(shards.count)]
        embedded = write_embeddings(
            parts, output, width=width, precision=precision, record=record, overwrite=overwrite
        )
        failed = pl.concat([absent, *map(_failures, parts)])
        remove_work_folder(place.work)
    return {
        "embeddings": str(output),
        "specimens": specimens.height + absent.height,
        "embedded": embedded,
        "width": width,
        "backbone": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        "failed": failed.height,
        "failures": failed.to_dicts(),
        "resumed_shards": len(done),
    }


def _holds_images(source: Path) -> bool:
    """Whether a Parquet file may be a package of images: catalogues have a footer of ours."""
    return source.suffix == ".parquet" and source.is_file() and "sha256" not in read_footer(source)


def _whole(weights: str | None) -> str | None:
    """Weights from anywhere: a worker may have another working folder."""
    return str(Path(weights).resolve()) if weights and Path(weights).exists() else weights


def _specimens(
    source: Path, images: Path | str | Images | None, *, is_catalogue: bool
) -> tuple[Images, pl.DataFrame, pl.DataFrame]:
    """The package; `sampleid`, `image_file`, `row` of what is in it, in storage order; and what is not."""
    if not is_catalogue:
        if images is not None:
            raise RequestError(f"{source} is a package of images itself; --images goes with a catalogue")
        package = Images(source)
        names = package.index.select(
            pl.lit(None, pl.String).alias("sampleid"),
            pl.col("name").alias("image_file"),
            pl.int_range(pl.len(), dtype=pl.Int64).alias("row"),
        )
        return package, names, pl.DataFrame(schema=FAILED)
    if images is None:
        raise RequestError("a catalogue needs --images, the package of its photographs")
    package = images if isinstance(images, Images) else Images(images)
    known = scan_metadata(source).collect_schema().names()
    if "image_file" not in known:
        raise RequestError(f"{source} has no column 'image_file'; the package is searched by it")
    columns = [c for c in ("sampleid", "image_file", "chunk_number") if c in known]
    frame = read_metadata(source, columns)
    key = key_of(columns)
    parts = frame["chunk_number"] if "chunk_number" in columns else pl.Series([None] * frame.height)
    parts = parts.cast(pl.Int32).alias("part")
    rows = pl.Series("row", package.find(frame["image_file"].fill_null(""), parts))
    frame = frame.with_columns(rows, parts)
    if "sampleid" not in columns:
        frame = frame.with_columns(pl.lit(None, pl.String).alias("sampleid"))
    absent = frame.filter(pl.col("row") < 0).select(
        pl.coalesce("image_file", key).alias("name"),
        "part",
        pl.lit(package.path.name).alias("place"),
        pl.when(pl.col("image_file").is_null())
        .then(pl.lit("no image_file"))
        .otherwise(pl.lit(NOT_IN_PACKAGE))
        .alias("reason"),
    )
    found = frame.filter(pl.col("row") >= 0)
    if found.is_empty():
        raise RequestError(f"none of {source}'s images is in {package.path}; is it the right package?")
    return package, found.select("sampleid", "image_file", "row").sort("row", maintain_order=True), absent


@dataclass(frozen=True)
class _Asked:
    """A backbone as it was asked for; each worker opens it once."""

    model: str
    weights: str | None
    image_size: int | None
    crop_size: int | None
    device: str


@functools.lru_cache(maxsize=1)
def _opened(asked: _Asked) -> Backbone:
    return open_backbone(
        asked.model,
        weights=asked.weights,
        image_size=asked.image_size,
        crop_size=asked.crop_size,
        device=asked.device,
    )


class _Shards:
    """Number, images and names of each wanted shard, made when it is its turn."""

    def __init__(self, package: Images, specimens: pl.DataFrame, size: int) -> None:
        self._package, self._specimens, self._size = package, specimens, size
        self.count = -(-specimens.height // size)
        self.wanted = list(range(self.count))

    def size(self, number: int) -> int:
        return min(self._size, self._specimens.height - number * self._size)

    def __len__(self) -> int:
        return len(self.wanted)

    def __iter__(self) -> Iterator[tuple[int, Images, pl.DataFrame]]:
        for number in self.wanted:
            part = self._specimens.slice(number * self._size, self._size)
            yield number, self._package.take(part["row"].to_numpy()), part.drop("row")


def _embed_shard(
    place: WorkFolder,
    asked: _Asked,
    width: int,
    precision: str,
    amp: str,
    batch_size: int,
    shard: tuple[int, Images, pl.DataFrame],
) -> None:
    """Write the shard's table: the columns of a file of embeddings, and what failed."""
    number, images, names = shard
    values: list[NDArray[np.float32]] = []
    failed: dict[int, tuple[str, str]] = {}
    rows = np.arange(len(images))
    for _, made, errors in features(_opened(asked), images, rows, batch_size=batch_size, amp=amp):
        values.append(made if made.shape[1] else np.full((len(made), width), np.nan, np.float32))
        failed |= {row: (error.place, error.reason) for row, error in errors.items()}
    kind = schema(width, precision)["embedding"]
    stored = np.concatenate(values)
    with np.errstate(over="ignore"):
        stored = stored.astype(np.float16 if precision == "float16" else np.float32)
    for row in np.flatnonzero(~np.isfinite(stored).all(axis=1)).tolist():
        failed.setdefault(row, (images.place(row), f"features too large for {precision}"))
    good = pl.Series([row not in failed for row in rows.tolist()], dtype=pl.Boolean)
    table = names.with_columns(
        pl.Series("embedding", stored, dtype=kind),
        pl.Series("part", images.index["part"], dtype=pl.Int32),
        pl.Series("place", [failed.get(row, (None,))[0] for row in rows.tolist()], dtype=pl.String),
        pl.Series("reason", [failed.get(row, (None, None))[1] for row in rows.tolist()], dtype=pl.String),
    ).with_columns(pl.when(good).then("embedding").alias("embedding"))
    with writing(place.sidecar(number), overwrite=True) as partial:
        table.write_parquet(partial)


def _is_whole(sidecar: Path) -> bool:
    try:
        pl.read_parquet(sidecar, columns=["reason"])
    except (OSError, pl.exceptions.PolarsError):
        return False
    return True


def _failures(sidecar: Path) -> pl.DataFrame:
    failed = pl.scan_parquet(sidecar).filter(pl.col("reason").is_not_null())
    return failed.select(pl.col("image_file").alias("name"), "part", "place", "reason").collect()
