"""Metadata in and out: TSV, JSON-LD, CSV and the catalogue (one Parquet file).

Every reader gives the same table: our column names, missing = null, `chunk_number` a whole number, roles by
their full names. What a file wrote instead is kept in one integer column, so that an export equals the import
cell for cell.
"""

import contextlib
import csv
import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import polars as pl
from polars.io.plugins import register_io_source

from bioscan.errors import DataError, RequestError, near
from bioscan.files import refuse_existing, sha256, writing
from bioscan.vocabulary import (
    COLUMN_ALIASES,
    COLUMNS,
    EXPERIMENTS,
    FOOTER,
    KEYS,
    MISSING,
    NO_SPLIT,
    NOT_CLASSIFIED,
    RANKS,
    ROLE_ALIASES,
    ROLES,
)

MARKERS: Final = "missing_markers"
"""Column of a catalogue: two bits per known column, which of `_forms` stood in the file."""

_SEPARATORS = {".tsv": "\t", ".txt": "\t", ".csv": ","}
_JSON = (".jsonld", ".json")
FORMS: Final = (*_SEPARATORS, *_JSON, ".parquet")
_BATCH = 50_000
_OURS = "bioscan:"
"""Begins the names of columns that live only while a file is read."""


@dataclass(frozen=True)
class Layout:
    """What a metadata file looks like from its header."""

    source_columns: tuple[str, ...]
    """As the file names them."""
    columns: tuple[str, ...]
    """As the catalogue names them, in the same order."""
    key: str


def read_metadata(
    path: Path | str, columns: Sequence[str] | None = None, *, allow_duplicates: bool = False
) -> pl.DataFrame:
    """A table of specimens from a metadata file or a catalogue, checked.

    Args:
        path: TSV, CSV, JSON-LD or a catalogue.
        columns: Only these, in this order; None gives every column of the source.
        allow_duplicates: Let rows with the same key pass, to look into them.

    Returns:
        Our column names; missing null; `chunk_number` Int64, everything else String.

    Raises:
        DataError: what is wrong, with line and column.
        RequestError: a column that the file has not, or an unknown form of file.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        return _collect(scan_metadata(path, columns), path)
    problems = _Problems(path)
    layout = _layout(path)
    if columns is not None:
        _require_columns(path, layout.columns, columns)
    wanted = None if columns is None else {*columns, layout.key}
    frame = _collect(_normalised(path, layout, problems, wanted), path)
    problems.report()
    if not allow_duplicates:
        _refuse_duplicates(frame[layout.key], path)
    return frame.drop(MARKERS) if columns is None else frame.select(columns)


def scan_metadata(path: Path | str, columns: Sequence[str] | None = None) -> pl.LazyFrame:
    """The same table, lazily.

    A catalogue was checked when it was made; other files are read at once, and checked.

    Raises:
        As `read_metadata`.
    """
    path = Path(path)
    if path.suffix != ".parquet":
        return read_metadata(path, columns).lazy()
    lazy = _scan_parquet(path)
    known = lazy.collect_schema().names()
    if not any(key in known for key in KEYS):
        raise DataError(f"{path}: no catalogue: it has neither column {' nor '.join(KEYS)}")
    if columns is None:
        return lazy.drop(MARKERS, strict=False)
    _require_columns(path, known, columns)
    return lazy.select(columns)


def key_of(columns: Iterable[str]) -> str:
    """The column that tells rows apart: `sampleid`, else `image_file`."""
    present = set(columns)
    for key in KEYS:
        if key in present:
            return key
    raise DataError(f"the table has no key: neither column {' nor '.join(KEYS)}")


def read_footer(path: Path | str) -> dict[str, Any]:
    """What a catalogue's footer says: source, SHA-256, rows, columns, licences, splits; {} if nothing."""
    try:
        text = pl.read_parquet_metadata(Path(path)).get(FOOTER)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {_first_line(error)}") from None
    return json.loads(text) if text else {}


def fingerprint(path: Path | str) -> str:
    """SHA-256 of the metadata file; of a catalogue, that of the file it was made from.

    Of a mended catalogue, that of both the file's and the steps. Roles have a hash of their own.
    """
    path = Path(path)
    footer = read_footer(path) if path.suffix == ".parquet" else {}
    recorded = footer.get("sha256") or sha256(path)
    if footer.get("mended"):
        return hashlib.sha256(json.dumps([recorded, footer["mended"]]).encode()).hexdigest()
    return str(recorded)


def import_metadata(
    source: Path | str, target: Path | str, *, allow_duplicates: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Make a catalogue from a metadata file, streaming.

    Args:
        source: TSV, CSV or JSON-LD.
        target: The catalogue, a `.parquet` file.
        allow_duplicates: Let rows with the same key pass, to mend them.
        overwrite: Replace the target.

    Returns:
        The catalogue's footer: `source`, `sha256`, `rows`, `key`, `columns` (source name, our name),
        `missing` per column, `licences`, `roles_renamed`, `last_line_ends` (False: perhaps cut short within
        its last cell).

    Raises:
        DataError: a bad row (line and column named), duplicate keys, a file that is cut short. Nothing is
        written.
    """
    source, target = Path(source), Path(target)
    if source.suffix == ".parquet":
        raise RequestError(f"{source} is a catalogue already")
    if target.suffix != ".parquet":
        raise RequestError(f"{target}: a catalogue is a .parquet file")
    refuse_existing(target, overwrite=overwrite)
    layout = _layout(source)
    problems = _Problems(source)
    footer: dict[str, Any] = {}

    def at_the_end(_context: object) -> dict[str, str]:  # called when all rows have passed
        footer.update(
            source=source.name,
            sha256=digest.result(),
            rows=problems.rows,
            key=layout.key,
            columns=[list(pair) for pair in zip(layout.source_columns, layout.columns, strict=True)],
            missing=problems.missing,
            licences=sorted(problems.licences),
            roles_renamed=problems.renamed,
            last_line_ends=source.suffix in _JSON or _ends_in_line_break(source),
        )
        return {FOOTER: json.dumps(footer)}

    with writing(target, overwrite=overwrite) as partial, ThreadPoolExecutor(1) as hashing:
        digest = hashing.submit(sha256, source)
        lazy = _normalised(source, layout, problems, None)
        _sink(lambda: lazy.sink_parquet(partial, metadata=at_the_end), source)
        problems.report()
        if not allow_duplicates:
            _refuse_duplicates(pl.read_parquet(partial, columns=[layout.key])[layout.key], source)
    return footer


def write_catalogue(
    frame: pl.DataFrame | pl.LazyFrame,
    target: Path | str,
    *,
    footer: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a table as a catalogue, streaming, with the given footer (see `read_footer`).

    Raises:
        DataError: the key column is absent, empty somewhere or has duplicates.
    """
    target = Path(target)
    lazy = frame.lazy()
    key = key_of(lazy.collect_schema().names())
    text = json.dumps(dict(footer or {}))
    with writing(target, overwrite=overwrite) as partial:
        _sink(lambda: lazy.sink_parquet(partial, metadata={FOOTER: text}), target)
        keys = pl.read_parquet(partial, columns=[key])[key]
        if keys.null_count():
            raise DataError(f"{target}: {keys.null_count():,} rows have no {key}")
        _refuse_duplicates(keys, target)


def export_metadata(catalogue: Path | str, target: Path | str, *, overwrite: bool = False) -> dict[str, Any]:
    """Write a catalogue as TSV, CSV or JSON-LD (by the target's ending), streaming.

    Columns have the names and places of the file that the catalogue was made from; missing cells, and roles
    that were abbreviated, what stood there. Columns added since come last. Lines end in a line feed, the last
    one too; a CSV quotes only what has to be quoted.

    Returns:
        `rows` and `columns` written.

    Raises:
        DataError: a value that a TSV cannot hold (tab or line break).
    """
    catalogue, target = Path(catalogue), Path(target)
    if target.suffix not in (*_SEPARATORS, *_JSON):
        raise RequestError(f"{target}: write .tsv, .csv or .jsonld")
    if catalogue.suffix != ".parquet":
        with tempfile.TemporaryDirectory() as folder:
            between = Path(folder, "catalogue.parquet")
            import_metadata(catalogue, between)
            return export_metadata(between, target, overwrite=overwrite)
    lazy, footer = _scan_parquet(catalogue), read_footer(catalogue)
    known = lazy.collect_schema().names()
    present = [c for c in known if c != MARKERS and not (c == "key" and footer)]
    renamed = {ours: theirs for theirs, ours in footer.get("columns", []) if ours in present}
    order = [*renamed, *(c for c in present if c not in renamed)]
    made = footer.get("split", {}).get(
        "experiments", {}
    )  # columns that did not stand in the file as they are
    texts = lazy.select(
        _written(column, markers=MARKERS in known and column not in made).alias(renamed.get(column, column))
        for column in order
    )
    with writing(target, overwrite=overwrite) as partial:
        if target.suffix in _JSON:
            rows = _write_json(texts, partial)
        else:
            separator = _SEPARATORS[target.suffix]
            if separator == "\t":
                _refuse_breaks(texts, catalogue)
            style: Any = "never" if separator == "\t" else "necessary"
            cells = texts.with_columns(pl.all().replace("", None))  # an empty text would be quoted
            _sink(lambda: cells.sink_csv(partial, separator=separator, quote_style=style), target)
            rows = int(lazy.select(pl.len()).collect().item())
    return {"rows": rows, "columns": len(order)}


# -- reading


def _layout(path: Path) -> Layout:
    if not path.is_file():
        found = [p.name for p in path.parent.glob("*") if p.suffix in FORMS] if path.parent.is_dir() else []
        raise RequestError(f"{path}: no such file{near(path.name, found)}")
    if path.suffix not in FORMS:
        raise RequestError(f"{path}: unknown form of metadata file{near(path.suffix, FORMS)}")
    names = _json_columns(path) if path.suffix in _JSON else _header(path)
    ours = [COLUMN_ALIASES.get(name, name) for name in names]
    for name in names:
        same = [n for n, o in zip(names, ours, strict=True) if o == COLUMN_ALIASES.get(name, name)]
        if len(same) > 1:
            raise DataError(f"{path}: columns {' and '.join(same)} mean the same; keep one")
    if not any(key in ours for key in KEYS):
        raise DataError(
            f"{path}: no key column: expected sampleid (or image_file) in the first line"
            f"{near('sampleid', names)}"
        )
    for name in ours:
        if name in (MARKERS, "key") or name.startswith(_OURS):
            raise DataError(f"{path}: column name '{name}' is ours; rename it")
    return Layout(tuple(names), tuple(ours), key_of(ours))


def _header(path: Path) -> list[str]:
    separator = _SEPARATORS[path.suffix]
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            line = file.readline()
            if separator == ",":
                file.seek(0)
                names = next(csv.reader(file), [])
            else:
                names = line.rstrip("\r\n").split(separator)
    except UnicodeDecodeError:
        raise DataError(f"{path}, {_first_not_utf8(path)}") from None
    except csv.Error as error:
        raise DataError(f"{path}, line 1: {error}") from None
    if not line.strip():
        state = "line 1 has no column names" if line else "the file is empty"
        raise DataError(f"{path}: {state}")
    if "\r" in line.rstrip("\r\n"):
        raise DataError(f"{path}, line 1: lines end in a carriage return alone; convert the line ends")
    if len(names) == 1:
        other = max("\t,;|", key=line.count)
        if line.count(other):
            shown = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}[other]
            expected = "tabs" if separator == "\t" else "commas"
            raise DataError(
                f"{path}, line 1: columns are separated by {shown}, a {path.suffix} file needs {expected}; "
                "rename the file or convert it"
            )
    return names


def _normalised(path: Path, layout: Layout, problems: "_Problems", wanted: set[str] | None) -> pl.LazyFrame:
    """The file's rows with our names, missing = null, markers and checks; `wanted` None: every column."""
    if path.suffix in _JSON:
        raw = _scan_json(path, layout.source_columns)
    else:
        raw = pl.scan_csv(
            path,
            separator=_SEPARATORS[path.suffix],
            quote_char='"' if path.suffix == ".csv" else None,
            has_header=False,
            skip_rows=1,
            schema=dict.fromkeys(layout.source_columns, pl.String),
            raise_if_empty=False,
            empty_string_is_null=False,
        )
    raw = raw.rename(dict(zip(layout.source_columns, layout.columns, strict=True)))
    kept = [c for c in layout.columns if wanted is None or c in wanted]
    problems.expect(layout, kept, check_width=path.suffix not in _JSON)
    marks = pl.sum_horizontal(
        pl.when(pl.col(column) == form)
        .then(pl.lit(code << (2 * COLUMNS.index(column)), pl.UInt64))
        .otherwise(pl.lit(0, pl.UInt64))
        for column in kept
        if column in COLUMNS
        for code, form in enumerate(_forms(column))
        if code
    )
    extra = [pl.lit("image_file").alias("key")] if layout.key == "image_file" and wanted is None else []
    return (
        raw.with_row_index(_OURS)
        .select(
            pl.col(_OURS),
            (pl.col(layout.columns[-1]) == "").alias(f"{_OURS}last is empty"),
            *(pl.col(c).alias(f"{_OURS}{c}") for c in kept if c in ("chunk_number", *EXPERIMENTS)),
            *(_value(c).alias(c) for c in kept),
            *([marks.alias(MARKERS)] if wanted is None else []),
        )
        .with_columns(problems.signs())
        .map_batches(problems.look, streamable=True)
        .select(
            *kept,
            *extra,
            *([MARKERS] if wanted is None else []),
        )
    )


def _forms(column: str) -> tuple[str, ...]:
    """What a file may write that the catalogue does not hold, the usual mark of a missing value first.

    Four at most: the place in the tuple is kept in two bits.
    """
    usual = NOT_CLASSIFIED if column in RANKS else ""
    roles = ROLE_ALIASES if column in EXPERIMENTS else ()
    return (usual, *(m for m in MISSING if m != usual), *roles)


def _value(column: str) -> pl.Expr:
    text = pl.col(column)
    if column not in COLUMNS:
        return text
    missing = text == MISSING[0]
    for marker in MISSING[1:]:
        missing |= text == marker
    value = pl.when(missing).then(None).otherwise(text)
    if column == "chunk_number":
        return value.cast(pl.Int64, strict=False)
    if column in EXPERIMENTS:
        for short, full in ROLE_ALIASES.items():
            value = pl.when(value == short).then(pl.lit(full)).otherwise(value)
    return value


@dataclass
class _Problems:
    """What passing batches show: bad cells with their line, and counts for the footer."""

    path: Path
    rows: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    licences: set[str] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)
    bad: list[tuple[int, str]] = field(default_factory=list)
    bad_total: int = 0
    _short: bool = False
    _layout: Layout | None = None
    _kept: tuple[str, ...] = ()
    _width: bool = False
    _checks: dict[str, tuple[pl.Expr, str]] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    def expect(self, layout: Layout, kept: Sequence[str], *, check_width: bool) -> None:
        self._layout, self._kept, self._width = layout, tuple(kept), check_width
        self._checks = {layout.key: (pl.col(layout.key).is_null(), "is empty")}
        if "chunk_number" in kept:
            raw, value = pl.col(f"{_OURS}chunk_number"), pl.col("chunk_number")
            wrong = (value.is_null() & ~raw.is_in(MISSING)) | (value.cast(pl.String) != raw) | (value < 0)
            self._checks["chunk_number"] = wrong, "is {}, expected a whole number"
        allowed = (*ROLES, NO_SPLIT)
        for column in (c for c in kept if c in EXPERIMENTS):
            text = f"is {{}}, expected one of {', '.join(allowed)}"
            self._checks[column] = ~pl.col(column).is_in(allowed), text

    def signs(self) -> list[pl.Expr]:
        """Columns that spare a batch of a few thousand rows its look at each cell."""
        roles = [pl.col(f"{_OURS}{c}") for c in self._kept if c in EXPERIMENTS]
        nothing = pl.lit(False)
        return [
            pl.any_horizontal(wrong for wrong, _ in self._checks.values()).alias(f"{_OURS}wrong"),
            *(
                pl.any_horizontal(nothing, *(role == short for role in roles)).alias(f"{_OURS}role {short}")
                for short in ROLE_ALIASES
            ),
        ]

    def look(self, batch: pl.DataFrame) -> pl.DataFrame:
        with self._lock:
            self.rows += batch.height
            for column in self._kept:
                self.missing[column] = self.missing.get(column, 0) + batch[column].null_count()
            if "copyright_license" in self._kept:
                self.licences.update(batch["copyright_license"].drop_nulls().unique())
            self._short |= self._width and bool(batch[f"{_OURS}last is empty"].any())
            for short, full in ROLE_ALIASES.items():
                if batch[f"{_OURS}role {short}"].any():
                    self.renamed[short] = full
            if batch[f"{_OURS}wrong"].any():
                for column, (wrong, text) in self._checks.items():
                    self._note(batch.filter(wrong), column, text)
        return batch

    def _note(self, found: pl.DataFrame, column: str, text: str) -> None:
        raw = found[f"{_OURS}{column}"] if f"{_OURS}{column}" in found.columns else found[column]
        self.bad_total += found.height
        self.bad += [
            (row, f"{column} {text.format(repr(value))}")
            for row, value in zip(found[_OURS].head(5), raw.head(5), strict=True)
        ]

    def report(self) -> None:
        """Raise a DataError if something was wrong."""
        path = self.path
        if self._short:  # an empty last cell, or a line that is cut short: Polars gives both as empty
            line = _first_odd_line(path, len(self._layout.columns) if self._layout else 0)
            if line:
                raise DataError(f"{path}, {line}")
        if self.rows == 0:
            raise DataError(f"{path}: no rows below the first line")
        if self.bad:
            row, text = min(self.bad)
            unit = "record" if path.suffix in _JSON else "line"
            more = f"; {self.bad_total:,} such cells in all" if self.bad_total > 1 else ""
            raise DataError(f"{path}, {unit} {_places(path, [row])[row]:,}: {text}{more}")


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line on which each record of a CSV begins, and its cells."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader, line = csv.reader(file), 1
        with contextlib.suppress(csv.Error):
            for cells in reader:
                yield line, cells
                line = reader.line_num + 1


def _places(path: Path, rows: Sequence[int]) -> dict[int, int]:
    """The line on which each row begins, of JSON and Parquet the record; counted from 1."""
    if _SEPARATORS.get(path.suffix) == ",":
        wanted = {*rows}
        return {row: line for row, (line, _) in enumerate(_csv_records(path), -1) if row in wanted}
    first = 2 if path.suffix in _SEPARATORS else 1
    return {row: row + first for row in rows}


def _first_odd_line(path: Path, columns: int) -> str | None:
    """`line N: …` for the first line that has not as many cells as the header, else None."""
    with path.open("rb") as file:
        counted: Iterable[tuple[int, int]] = (
            ((line, len(cells)) for line, cells in _csv_records(path))
            if _SEPARATORS[path.suffix] == ","
            else ((n, line.count(b"\t") + 1) for n, line in enumerate(file, 1))
        )
        for number, cells in counted:
            if cells != columns:
                hint = "; is the file cut short?" if cells < columns else ""
                return f"line {number:,}: {cells} cells where the first line has {columns}{hint}"
    return None


def _ends_in_line_break(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def _first_not_utf8(path: Path) -> str:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"byte {line[error.start]:#x} at place {error.start + 1}"
                return f"line {number:,}: not UTF-8 text ({where}); save it as UTF-8"
    return "not UTF-8 text"


def _collect(lazy: pl.LazyFrame, path: Path) -> pl.DataFrame:
    frames: list[pl.DataFrame] = []
    _sink(lambda: frames.append(lazy.collect(engine="streaming")), path)
    return frames[0]


def _sink(work: Callable[[], object], path: Path) -> None:
    """Run a Polars query; what it says of the file becomes our message with line and column."""
    try:
        work()
    except pl.exceptions.PolarsError as error:
        text = str(error)
        if "invalid utf-8" in text and path.suffix in _SEPARATORS:
            raise DataError(f"{path}, {_first_not_utf8(path)}") from None
        if re.search("more fields|could not parse|specified in schema", text) and path.suffix in _SEPARATORS:
            odd = _first_odd_line(path, len(_header(path)))
            raise DataError(f"{path}, {odd or _first_line(error)}") from None
        if "(os error" in text:  # of the target, not of what was read: see `files.writing`
            raise OSError(_first_line(error)) from None
        cause = error.__cause__ or error.__context__
        if isinstance(cause, DataError):
            raise cause from None
        raise DataError(f"{path}: {_first_line(error)}") from None


def _scan_parquet(path: Path) -> pl.LazyFrame:
    if not path.is_file():
        raise RequestError(f"{path}: no such file")
    try:
        lazy = pl.scan_parquet(path)
        lazy.collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(
            f"{path}: cannot be read as Parquet, is it cut short? ({_first_line(error)})"
        ) from None
    return lazy


def _first_line(error: Exception) -> str:
    text = error.args[0] if error.args else ""
    text = text.decode(errors="replace") if isinstance(text, bytes) else str(error)
    return next(iter(text.splitlines()), type(error).__name__)


def _require_columns(path: Path, known: Iterable[str], wanted: Iterable[str]) -> None:
    names = list(known)
    for column in wanted:
        if column not in names:
            raise RequestError(f"{path} has no column '{column}'{near(column, names)}")


def _refuse_duplicates(keys: pl.Series, path: Path) -> None:
    if keys.n_unique() == keys.len():
        return
    rows = keys.to_frame("key").with_row_index("row").filter(pl.col("key").is_duplicated())
    shown = rows.group_by("key", maintain_order=True).agg("row").head(3)
    unit = "lines" if path.suffix in _SEPARATORS else "records"
    lines = _places(path, [row for at in shown["row"] for row in at[:3]])
    places = "; ".join(
        f"{key} ({unit} {', '.join(f'{lines[r]:,}' for r in at[:3])}{', …' if len(at) > 3 else ''})"
        for key, at in shown.iter_rows()
    )
    count = rows["key"].n_unique()
    what = f"one {keys.name} occurs" if count == 1 else f"{count:,} values of {keys.name} occur"
    raise DataError(f"{path}: {what} more than once: {places}")


# -- JSON


def _json_columns(path: Path) -> list[str]:
    first = next(_json_records(path), None)
    if first is None:
        raise DataError(f"{path}: expected a list of records, and found none")
    return list(first)


def _json_records(path: Path) -> Iterator[dict[str, Any]]:
    import ijson

    number = 0
    with path.open("rb") as file:
        try:
            for number, record in enumerate(ijson.items(file, "item"), 1):
                if not isinstance(record, dict):
                    raise DataError(f"{path}, record {number:,}: expected an object of cells")
                yield record
        except (ijson.JSONError, UnicodeDecodeError) as error:
            reason = _first_line(error)
            raise DataError(
                f"{path}, after record {number:,}: not valid JSON ({reason}); is it cut short?"
            ) from None


def _scan_json(path: Path, columns: Sequence[str]) -> pl.LazyFrame:
    schema = dict.fromkeys(columns, pl.String)
    known = set(columns)

    def batches(
        with_columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        rows: list[tuple[str | None, ...]] = []
        for number, record in enumerate(_json_records(path), 1):
            if not record.keys() <= known:
                odd = next(k for k in record if k not in known)
                raise DataError(f"{path}, record {number:,}: column '{odd}' is not in the first record")
            rows.append(tuple(_json_text(record.get(c), path, number, c) for c in columns))
            if len(rows) == _BATCH:
                yield pl.DataFrame(rows, schema=schema, orient="row").select(with_columns or columns)
                rows = []
        if rows:
            yield pl.DataFrame(rows, schema=schema, orient="row").select(with_columns or columns)

    return register_io_source(batches, schema=schema)


def _json_text(value: Any, path: Path, number: int, column: str) -> str:
    """The cell's text; null and an absent key are the empty text."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{path}, record {number:,}: {column} is {value}, expected text")


def _write_json(texts: pl.LazyFrame, target: Path) -> int:
    """One array of flat objects, four spaces deep, as the published file is; streamed."""
    rows = 0
    with target.open("w", encoding="utf-8") as file:
        file.write("[")
        for batch in texts.collect_batches(maintain_order=True):
            for record in batch.iter_rows(named=True):
                body = json.dumps(record, indent=8, ensure_ascii=False)
                file.write(f"{',' if rows else ''}\n    {body[:-1]}    }}")
                rows += 1
        file.write("\n]\n")
    return rows


# -- writing


def _written(column: str, *, markers: bool) -> pl.Expr:
    """The column as text; cells that were missing or abbreviated as they stood in the source."""
    text = pl.col(column).cast(pl.String)
    if column not in COLUMNS:
        return text.fill_null("")
    forms = _forms(column)
    missing: pl.Expr = pl.lit(forms[0])
    if markers:
        code = (pl.col(MARKERS).cast(pl.UInt64) // (1 << (2 * COLUMNS.index(column)))) & 3
        for number, form in enumerate(forms[1:], 1):
            if form in ROLE_ALIASES:
                text = (
                    pl.when((code == number) & (text == ROLE_ALIASES[form]))
                    .then(pl.lit(form))
                    .otherwise(text)
                )
            else:
                missing = pl.when(code == number).then(pl.lit(form)).otherwise(missing)
    return pl.coalesce(text, missing)


def _refuse_breaks(texts: pl.LazyFrame, path: Path) -> None:
    names = texts.collect_schema().names()
    broken = texts.select(pl.col(n).str.contains(r"[\t\r\n]").any() for n in names).collect(
        engine="streaming"
    )
    for name in names:
        if broken[name].item() or re.search(r"[\t\r\n]", name):
            raise DataError(
                f"{path}: column {name!r} holds a tab or line break, which a TSV cannot hold; "
                "write .csv or .jsonld"
            )
