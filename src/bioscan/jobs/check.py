"""Checks and mending of metadata, with the pictures and lists that they may need."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.analysis import checks as analysis
from bioscan.data.images import Images
from bioscan.data.metadata import (
    key_of,
    read_footer,
    read_metadata,
    scan_metadata,
    write_catalogue,
)
from bioscan.errors import DataError, RequestError, unknown
from bioscan.files import refuse_existing
from bioscan.jobs.split import as_catalogue, refuse_the_input
from bioscan.vocabulary import KEYS, RANKS

IMAGES, LOW_QUALITY = "images", "low_quality"
CHECKS = (*analysis.CHECKS, IMAGES, LOW_QUALITY)
DROP_MISSING_IMAGES, DROP_LOW_QUALITY = "drop_missing_images", "drop_low_quality"
STEPS = (*analysis.STEPS, DROP_MISSING_IMAGES, DROP_LOW_QUALITY)

_CHECKED = (*KEYS, "processid", "uri", *RANKS, "nucraw", "chunk_number")


@dataclass(frozen=True)
class Checked:
    """What was looked for and what was found."""

    rows: int
    """Records looked at."""
    findings: pl.DataFrame
    """Columns `check`, `subject`, `rows`, `detail`; by check, most rows first."""
    looked: tuple[str, ...]
    """Checks done."""
    no_data: dict[str, str]
    """Check that says nothing -> the column that is absent or empty."""


def check(
    metadata: Path | str,
    *,
    images: Path | str | None = None,
    low_quality: Path | str | None = None,
    checks: Iterable[str] | None = None,
) -> Checked:
    """Findings as `analysis.checks` gives them, and those about pictures and the low-quality list.

    Args:
        metadata: Catalogue or TSV; duplicate keys are a finding, not an error.
        images: Package to compare with.
        low_quality: Published list of sample ids.
        checks: Names in CHECKS; None: all that the given files allow.

    Raises:
        RequestError: an unknown check, or a named one whose package or list is not given.
        DataError: the metadata or the list cannot be read.
    """
    given = {IMAGES: images, LOW_QUALITY: low_quality}
    looked = tuple(
        name
        for name in (CHECKS if checks is None else dict.fromkeys(checks))
        if checks is not None or given.get(name, name) is not None
    )
    for name in looked:
        if name not in CHECKS:
            raise unknown("check", name, CHECKS)
        _require_file(name, given)
    listed = read_list(low_quality) if low_quality is not None and LOW_QUALITY in looked else []
    frame = read_records(Path(metadata))
    if LOW_QUALITY in looked:
        require_column(frame, "sampleid", metadata)
    found = [analysis.check(frame, [name for name in looked if name in analysis.CHECKS])]
    if images is not None and IMAGES in looked:
        require_column(frame, "image_file", metadata)
        package, rows = find_images(frame, images)
        surplus = np.setdiff1d(np.arange(package.index.height), rows)
        differences = analysis.image_differences(
            frame, pl.Series(rows), package.index["name"].gather(surplus)
        )
        found.append(_named(IMAGES, differences))
    if LOW_QUALITY in looked:
        found.append(_named(LOW_QUALITY, analysis.listed(frame, listed)))
    empty = {c for c in _CHECKED if c not in frame.columns or frame[c].null_count() == frame.height}
    no_data = {name: column for name, column in analysis.NEEDS.items() if name in looked and column in empty}
    return Checked(frame.height, pl.concat(found), looked, no_data)


def mend(
    metadata: Path | str,
    output: Path | str,
    *,
    steps: Iterable[str],
    images: Path | str | None = None,
    low_quality: Path | str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a catalogue after the named steps; every cell that no step changes is as it was read.

    Args:
        metadata: Catalogue or TSV; never changed.
        output: New catalogue. Its footer lists the steps under `mended`, after those of earlier runs.
        steps: Names in STEPS, done in this order (see `analysis.checks.STEPS`).
        images: Package, for `drop_missing_images`.
        low_quality: List of sample ids, for `drop_low_quality`.
        overwrite: Replace the output.

    Returns:
        `changed`: step -> rows changed or dropped; `rows_before`, `rows`, `output`.

    Raises:
        RequestError: no step, an unknown one, or one whose package or list is not given.
        DataError: duplicate keys are left.
    """
    metadata, output = Path(metadata), Path(output)
    steps = list(dict.fromkeys(steps))
    given = {DROP_MISSING_IMAGES: images, DROP_LOW_QUALITY: low_quality}
    if not steps:
        raise RequestError(f"name at least one step of {', '.join(STEPS)}")
    for step in steps:
        if step not in STEPS:
            raise unknown("step", step, STEPS)
        _require_file(step, given)
    if output.suffix != ".parquet":
        raise RequestError(f"{output}: a catalogue is a .parquet file")
    refuse_the_input(output, metadata)
    refuse_existing(output, overwrite=overwrite)
    listed = read_list(low_quality) if low_quality is not None and DROP_LOW_QUALITY in steps else []
    frame = read_records(metadata, without="nucraw")
    duplicated = frame[key_of(frame.columns)].is_duplicated().any()
    if duplicated and "drop_duplicate_keys" not in steps:
        raise DataError(f"{metadata} has duplicate keys; add the step drop_duplicate_keys")
    row = "row of the metadata"
    before = frame.height
    changed: dict[str, int] = {}
    frame = frame.with_row_index(row)
    for step in steps:
        frame, changed[step] = _mended(frame, step, metadata, images, listed)
    if frame.is_empty():
        raise DataError(f"{metadata}: no row is left after {', '.join(steps)}")
    result = {"changed": changed, "rows_before": before, "rows": frame.height, "output": str(output)}
    ranks = [rank for rank in RANKS if rank in frame.columns]

    with as_catalogue(metadata, beside=output, allow_duplicates=True) as (catalogue, _):
        whole, footer = pl.scan_parquet(catalogue), read_footer(catalogue)
        columns = whole.collect_schema().names()
        kept_rows = whole.with_row_index(row).filter(pl.col(row).is_in(frame[row].implode()))
        table = pl.concat([kept_rows.drop(row, *ranks), frame.select(ranks).lazy()], how="horizontal")
        table = table.select(columns)
        done = [*footer.get("mended", []), *([step, count] for step, count in changed.items())]
        footer = {**footer, "rows": frame.height, "mended": done}
        if "missing" in footer:
            counts = table.select(pl.col([*footer["missing"]]).null_count()).collect(engine="streaming")
            footer["missing"] = counts.row(0, named=True)
        write_catalogue(table, output, footer=footer, overwrite=overwrite)
    return result


def _mended(
    frame: pl.DataFrame, step: str, metadata: Path, images: Path | str | None, listed: list[str]
) -> tuple[pl.DataFrame, int]:
    if step == DROP_LOW_QUALITY:
        require_column(frame, "sampleid", metadata)
        kept = frame.filter(~pl.col("sampleid").is_in(listed))
    elif step == DROP_MISSING_IMAGES and images is not None:
        require_column(frame, "image_file", metadata)
        kept = frame.filter(find_images(frame, images)[1] >= 0)
    else:
        return analysis.STEPS[step](frame)
    return kept, frame.height - kept.height


def read_list(path: Path | str) -> list[str]:
    """Sample ids of a list: its column `sampleid`, else the first; .txt, .csv, .tsv or .xlsx.

    Raises:
        RequestError: no such file, or another kind of file.
        DataError: the file cannot be read as what its ending says, or is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path}: no such list")
    if path.suffix not in (".txt", ".csv", ".tsv", ".xlsx"):
        raise RequestError(f"{path}: a list is a .txt, .csv, .tsv or .xlsx file")
    try:
        table = _read_xlsx(path) if path.suffix == ".xlsx" else _read_text_table(path)
    except pl.exceptions.NoDataError:
        raise DataError(f"{path}: the list is empty") from None
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: the list cannot be read: {str(error).splitlines()[0]}") from None
    head = [str(cell or "").lower().replace(" ", "").replace("_", "") for cell in table.row(0)]
    column = table.to_series(head.index("sampleid") if "sampleid" in head else 0)
    cells = column.slice(1 if "sampleid" in head else 0).str.strip_chars().drop_nulls()
    return cells.filter(cells != "").to_list()


def _read_text_table(path: Path) -> pl.DataFrame:
    separator = "," if path.suffix == ".csv" else "\t"
    return pl.read_csv(path, separator=separator, has_header=False, infer_schema=False, encoding="utf8")


def _read_xlsx(path: Path) -> pl.DataFrame:
    import fastexcel

    try:
        sheet = fastexcel.read_excel(path).load_sheet(0, header_row=None, dtypes="string")
    except fastexcel.FastExcelError as error:
        raise DataError(f"{path}: not an Excel workbook ({str(error).splitlines()[0]})") from None
    return sheet.to_polars()


def read_records(metadata: Path, *, without: str = "") -> pl.DataFrame:
    """The columns that checks and steps look at, as far as the metadata have them."""
    known = scan_metadata(metadata).collect_schema().names() if metadata.suffix == ".parquet" else None
    if known is None:  # reading the file is the only way to its columns
        whole = read_metadata(metadata, allow_duplicates=True)
        return whole.select(c for c in _CHECKED if c in whole.columns and c != without)
    return read_metadata(metadata, [c for c in _CHECKED if c in known and c != without])


def find_images(frame: pl.DataFrame, images: Images | Path | str) -> tuple[Images, NDArray[np.int64]]:
    """The package, and the place of each record's image in it (-1: not there)."""
    package = images if isinstance(images, Images) else Images(images)
    parts = frame["chunk_number"] if "chunk_number" in frame.columns else None
    return package, package.find(frame["image_file"], parts)


def _require_file(name: str, given: dict[str, Path | str | None]) -> None:
    if given.get(name, name) is None:
        flag = "--images" if name in (IMAGES, DROP_MISSING_IMAGES) else "--low-quality"
        raise RequestError(f"{name} needs {flag}")


def require_column(frame: pl.DataFrame, column: str, metadata: Path | str) -> None:
    """Raise a RequestError where records have no such column."""
    if column not in frame.columns:
        raise RequestError(f"{metadata} has no column '{column}'")


def _named(name: str, found: pl.DataFrame) -> pl.DataFrame:
    return found.select(pl.lit(name).alias("check"), "subject", pl.col("rows").cast(pl.Int64), "detail")
