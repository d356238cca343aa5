"""Images in a Parquet table: a column of bytes, or the struct of bytes and path that Hugging Face writes.

Such images have no byte range of their own (pages are compressed): they are read through Polars, some tens of
megabytes of consecutive rows at a time.
"""

from pathlib import Path
from typing import Final

import polars as pl

from bioscan.errors import DataError, RequestError

_IMAGE: Final = "image"
_NAMES: Final = ("image_file", "file_name", "filename", "path")
"""Columns that may name a row's image where the struct of Hugging Face gives no path."""
_PARTS: Final = ("part", "chunk_number")


def has_images(file: Path) -> bool:
    """Whether a Parquet table has a column of images; an unreadable one is said to have one."""
    try:
        return _image_column(_schema(file)) is not None
    except DataError:
        return True


def list_parquet(file: Path) -> pl.DataFrame:
    """A row per image of the table, in its order: path, part, offset, size, encoding, kind (null).

    The images are the column `image`, else the only one that is bytes or a struct with bytes. `offset` is the
    row in the table. `encoding` is `parquet`, or `path only` where the table holds the path of an image and
    not its bytes. An image without a name takes the file's and its row.

    Raises:
        RequestError: no column of images.
        DataError: damaged or cut short.
    """
    schema = _schema(file)
    column = _image_column(schema)
    if column is None:
        raise RequestError(
            f"{file}: a table without images: no column of bytes, alone or in a struct with a path "
            f"(columns: {', '.join([*schema][:20])})"
        )
    names = [pl.col(name) for name in _NAMES if schema.get(name) == pl.String]
    kind = schema[column]
    if isinstance(kind, pl.Struct) and any(f.name == "path" and f.dtype == pl.String for f in kind.fields):
        names.insert(0, pl.col(column).struct.field("path"))
    parts = [pl.col(name).cast(pl.Int32, strict=False) for name in _PARTS if name in schema]
    nothing = pl.lit(None)
    frame = _collected(
        pl.scan_parquet(file, glob=False).select(
            path=pl.coalesce(*names, nothing.cast(pl.String)),
            part=pl.coalesce(*parts, nothing.cast(pl.Int32)),
            size=_bytes(schema).bin.size().cast(pl.Int64),
        ),
        file,
    )
    return (
        frame.with_row_index("offset")
        .filter(pl.col("path").is_not_null() | pl.col("size").is_not_null())
        .with_columns(
            pl.col("path").fill_null(f"{file.stem}_" + pl.col("offset").cast(pl.String).str.zfill(6)),
            encoding=pl.when(pl.col("size").is_null()).then(pl.lit("path only")).otherwise(pl.lit("parquet")),
            kind=pl.lit(None, pl.String),
        )
    )


def read_rows(file: Path, start: int, count: int) -> pl.Series:
    """The bytes of the images of consecutive rows, null where there are none.

    Raises:
        DataError: damaged, cut short or changed.
    """
    schema = _schema(file)
    if _image_column(schema) is None:
        raise DataError(f"{file} changed after it was opened; open it again")
    return _collected(
        pl.scan_parquet(file, glob=False).select(_bytes(schema)).slice(start, count), file
    ).to_series()


def _schema(file: Path) -> pl.Schema:
    try:
        return pl.Schema(pl.read_parquet_schema(file))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise _damaged(file, error) from None


def _collected(table: pl.LazyFrame, file: Path) -> pl.DataFrame:
    try:
        return table.collect(engine="streaming")
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: BaseException) -> DataError:
    reason = next(iter(str(error).splitlines()), type(error).__name__).removeprefix("parquet: ")
    return DataError(
        f"{file}: cannot be read as Parquet, damaged or cut short; is the download complete? ({reason[:120]})"
    )


def _image_column(schema: pl.Schema) -> str | None:
    held = [name for name, kind in schema.items() if _holds_bytes(kind)]
    return _IMAGE if _IMAGE in held else held[0] if len(held) == 1 else None


def _holds_bytes(kind: pl.DataType) -> bool:
    if isinstance(kind, pl.Struct):
        return any(field.name == "bytes" and field.dtype == pl.Binary for field in kind.fields)
    return kind == pl.Binary


def _bytes(schema: pl.Schema) -> pl.Expr:
    column = _image_column(schema) or _IMAGE
    image = pl.col(column)
    return image.struct.field("bytes") if isinstance(schema[column], pl.Struct) else image
