"""Embeddings: what a backbone makes of each photograph, as a Parquet file.

Columns: `sampleid` (null where there is no catalogue), `image_file`, `embedding`, an array of float16 or
float32. The footer says what they follow from: the backbone and the SHA-256 of its weights, the image
specification, the data.

N: rows, F: features.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.errors import DataError, RequestError
from bioscan.files import writing
from bioscan.vocabulary import FOOTER, KEYS

PRECISIONS: Final = {"float16": pl.Float16, "float32": pl.Float32}
SCHEMA_VERSION: Final = 1

_BATCH: Final = 16_000_000
"""Numbers read or written at a time."""


@dataclass(frozen=True)
class Embeddings:
    """A file of embeddings; the numbers are read when they are asked for."""

    path: Path
    keys: pl.DataFrame
    """Columns `sampleid`, `image_file`; rows as in the file."""
    width: int
    """F."""
    record: dict[str, Any]
    """What they follow from: `backbone`, `weights_sha256`, `model_sha256`, `image` and more."""

    def rows(self, rows_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """The embeddings of some rows, in the order asked for, N × F."""
        made = np.empty((rows_N.size, self.width), np.float32)
        order = np.argsort(rows_N, kind="stable")
        wanted = rows_N[order]
        for start, values in self.batches():
            here = slice(*np.searchsorted(wanted, (start, start + len(values))))
            made[order[here]] = values[wanted[here] - start]
        return made

    def batches(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """First row and embeddings of a block, in order.

        Raises:
            DataError: the file is damaged.
        """
        step = rows_of(self.width)
        column = pl.scan_parquet(self.path).select("embedding")
        for start in range(0, self.keys.height, step):
            try:
                block = column.slice(start, step).collect()["embedding"]
            except (pl.exceptions.PolarsError, OSError) as error:
                raise _damaged(self.path, error) from None
            yield start, block.to_numpy().astype(np.float32)


def schema(width: int, precision: str) -> pl.Schema:
    """Columns of a file of embeddings."""
    return pl.Schema(
        {**dict.fromkeys(KEYS, pl.String()), "embedding": pl.Array(PRECISIONS[precision](), width)}
    )


def write_embeddings(
    parts: Sequence[Path],
    target: Path,
    *,
    width: int,
    precision: str,
    record: Mapping[str, Any],
    overwrite: bool = False,
) -> int:
    """Put parts together, in order, a block at a time; the file appears whole or not at all.

    Args:
        parts: Parquet files that have the columns, among others; rows without an embedding are left out.
        target: `.parquet`.
        width: F.
        precision: One of PRECISIONS.
        record: What the embeddings follow from (JSON).
        overwrite: Replace the target.

    Returns:
        The number of rows.
    """
    columns = schema(width, precision)
    table = pl.scan_parquet(list(parts)) if parts else pl.LazyFrame(schema=columns)
    table = table.filter(pl.col("embedding").is_not_null()).select(columns.names())
    footer = {FOOTER: json.dumps({"schema_version": SCHEMA_VERSION, **record})}
    with writing(target, overwrite=overwrite) as partial:
        table.sink_parquet(partial, metadata=footer, row_group_size=rows_of(width))
        return int(pl.scan_parquet(partial).select(pl.len()).collect().item())


def read_embeddings(path: Path | str) -> Embeddings:
    """A file of embeddings.

    Raises:
        RequestError: no such file.
        DataError: not one of ours, of a newer schema, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path}: no such file of embeddings; bioscan embed makes one")
    try:
        record = json.loads(pl.read_parquet_metadata(path).get(FOOTER) or "{}")
        kind = pl.read_parquet_schema(path).get("embedding")
        if not isinstance(kind, pl.Array) or "backbone" not in record:
            raise DataError(f"{path}: no embeddings that bioscan embed made")
        if record["schema_version"] > SCHEMA_VERSION:
            raise DataError(f"{path}: written by a newer bioscan; update bioscan")
        keys = pl.read_parquet(path, columns=list(KEYS))
    except (pl.exceptions.PolarsError, OSError, KeyError, ValueError) as error:
        raise _damaged(path, error) from None
    return Embeddings(path, keys, int(kind.size), record)


def is_embeddings(path: Path | str) -> bool:
    """Whether a file is one of embeddings; images may be Parquet too."""
    path = Path(path)
    if path.suffix != ".parquet" or not path.is_file():
        return False
    try:
        return "embedding" in pl.read_parquet_schema(path)
    except (pl.exceptions.PolarsError, OSError):
        return False


def rows_of(width: int) -> int:
    """Rows that are held at a time."""
    return max(1, _BATCH // max(1, width))


def _damaged(path: Path, error: Exception) -> DataError:
    reason = next(iter(str(error).splitlines()), "")
    return DataError(f"{path}: cannot be read as embeddings ({reason})")
