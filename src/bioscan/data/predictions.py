"""Predictions: one row per specimen, written in batches that a kill does not lose, read from any tool's
table.

Columns: `sampleid`, `image_file`; per rank `<rank>` and `<rank>_probability`; `assigned_rank`,
`assigned_taxon`, `assigned_probability`; of OPTIONAL those that apply; `error` (why there is no prediction).
Beside it `<stem>.scores.parquet`: the same keys, the leaf probabilities, float32, and `energy`; the leaves'
lineages in its footer.
"""

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.data.foreign import from_table, read_json
from bioscan.errors import DataError, RequestError, near, unknown
from bioscan.files import refuse_existing, writing
from bioscan.vocabulary import FOOTER, KEYS, MISSING, RANKS

FORMS: Final = (".parquet", ".csv")
OPTIONAL: Final[dict[str, Any]] = {
    "assigned_training": pl.Int64,
    "assigned_checked": pl.Int64,
    "assigned_precision": pl.Float64,
    "assigned_recall": pl.Float64,
    "assigned_confusions": pl.String,
    "set": pl.String,
    "set_size": pl.Int64,
    "set_taxon": pl.String,
    "set_rank": pl.String,
}
"""Column -> type, in their order. What is known of the assigned taxon (see `learn.calibration`): specimens in
training; labelled specimens that got its name, the share of them that are right, and what the others are; of
the labelled specimens of it the share that got its name. And the conformal set: its names, the most probable
first, how many there are, and the smallest taxon that holds them all.
"""
_BATCH = 4_000_000
"""Probabilities read at a time."""
_HELD = 64_000_000
"""A scores file of no more probabilities is read once and held; a larger one is read anew each time."""


@dataclass(frozen=True)
class Scores:
    """Leaf probabilities of a model, in a file that is read in batches."""

    path: Path
    keys: pl.DataFrame
    """Columns `sampleid`, `image_file`; rows as in the file."""
    leaves: list[tuple[str | None, ...]]
    """Lineage of each leaf, aligned with RANKS."""
    energy: pl.Series | None = None
    """−T · logsumexp(logits / T) by row, T the temperature of the record, else 1; null where a specimen has
    no prediction; None in files of before it was kept. The largest logit is T · log(largest probability) less
    this.
    """

    def batches(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Rows, and their probabilities of shape (rows, L): NaN where a specimen has no prediction.

        Raises:
            DataError: the file is damaged.
        """
        small = self.keys.height * len(self.leaves) <= _HELD
        return iter(self._held) if small else self._read()

    @cached_property
    def _held(self) -> list[tuple[slice, NDArray[np.float32]]]:
        return list(self._read())

    def _read(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        step = _rows_of(len(self.leaves))
        column = pl.scan_parquet(self.path).select("probabilities")
        for start in range(0, self.keys.height, step):
            with _reading(self.path, "scores"):
                values = column.slice(start, step).collect()["probabilities"].to_numpy()
            yield slice(start, start + step), values


class PredictionsWriter:
    """Writes predictions batch by batch in bounded memory; the target appears, whole, when the block ends
    well.

    Batches lie in a hidden folder beside the target until then. After a kill, a writer with the same record
    finds them: `done` says how many rows need not be predicted again.
    """

    def __init__(
        self,
        path: Path,
        *,
        ranks: Sequence[str],
        leaves: Sequence[Sequence[str | None]] | None,
        record: Mapping[str, Any],
        optional: Collection[str] = (),
        overwrite: bool = False,
    ) -> None:
        """Prepare to write.

        Args:
            path: `.parquet` or `.csv`.
            ranks: Ranks that have columns.
            leaves: Lineage of each leaf; None: no scores are kept.
            record: What the predictions follow from (JSON); goes to the footer.
            optional: Columns of OPTIONAL that are written.
            overwrite: Replace the target.

        Raises:
            RequestError: another ending, or the target exists.
        """
        self.path = Path(path)
        if self.path.suffix not in FORMS:
            raise unknown("form of predictions", self.path.suffix or self.path.name, FORMS)
        refuse_existing(self.path, overwrite=overwrite)
        self._leaves = None if leaves is None else [list(leaf) for leaf in leaves]
        self._record = json.loads(json.dumps(dict(record)))
        self._schema = _schema(ranks, optional)
        self._folder = self.path.with_name(f".{self.path.name}.parts")
        self.done = self._resumable()

    def _resumable(self) -> int:
        """Rows in the parts of an interrupted run of the same record; other parts are removed."""
        told = {"record": self._record, "leaves": self._leaves, "columns": list(self._schema)}
        place = self._folder / "record.json"
        if place.is_file() and json.loads(place.read_text(encoding="utf-8")) == told:
            parts = self._parts("rows")
            if self._leaves is None or len(parts) == len(self._parts("scores")):
                self._next = len(parts)
                return int(pl.scan_parquet(parts).select(pl.len()).collect().item()) if parts else 0
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        with writing(place) as partial:
            partial.write_text(json.dumps(told), encoding="utf-8")
        self._next = 0
        return 0

    def _parts(self, kind: str) -> list[Path]:
        return sorted(self._folder.glob(f"{kind}-*.parquet"))

    def write(
        self,
        frame: pl.DataFrame,
        scores_NL: NDArray[np.float32] | None = None,
        energy_N: NDArray[np.float64] | None = None,
    ) -> None:
        """Add a batch. A row without a picture has null names, a text in `error`, NaN scores and energy.

        Args:
            frame: Every column of the schema.
            scores_NL: Where scores are kept.
            energy_N: See `Scores.energy`; None where it is not known.
        """
        name = f"{self._next:07d}.parquet"
        if self._leaves is not None:
            if scores_NL is None or scores_NL.shape != (frame.height, len(self._leaves)):
                raise ValueError(f"scores of shape ({frame.height}, {len(self._leaves)}) expected")
            kind = pl.Array(pl.Float32, len(self._leaves))
            energy = pl.Series("energy", [None] * frame.height if energy_N is None else energy_N, pl.Float64)
            table = frame.select(KEYS).with_columns(
                pl.Series("probabilities", scores_NL.astype(np.float32), dtype=kind), energy.fill_nan(None)
            )
            with writing(self._folder / f"scores-{name}", overwrite=True) as partial:
                table.write_parquet(partial)
        with writing(self._folder / f"rows-{name}") as partial:
            frame.select(pl.col(c).cast(t) for c, t in self._schema.items()).write_parquet(partial)
        self._next += 1

    def __enter__(self) -> "PredictionsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # the parts stay, for the next try
            return
        if self._leaves is not None:
            footer = {FOOTER: json.dumps(self._record), "leaves": json.dumps(self._leaves)}
            with writing(scores_place(self.path), overwrite=True) as partial:
                rows = _rows_of(len(self._leaves))
                self._gather("scores").sink_parquet(partial, metadata=footer, row_group_size=rows)
        else:
            scores_place(self.path).unlink(missing_ok=True)  # not of these predictions
        with writing(self.path, overwrite=True) as partial:
            if self.path.suffix == ".csv":
                self._gather("rows").sink_csv(partial)
            else:
                self._gather("rows").sink_parquet(partial, metadata={FOOTER: json.dumps(self._record)})
        shutil.rmtree(self._folder)

    def _gather(self, kind: str) -> pl.LazyFrame:
        parts = self._parts(kind)
        if parts:
            return pl.scan_parquet(parts)
        schema: dict[str, Any] = dict(self._schema)
        if kind == "scores":
            width = len(self._leaves or ())
            schema = dict.fromkeys(KEYS, pl.String)
            schema |= {"probabilities": pl.Array(pl.Float32, width), "energy": pl.Float64}
        return pl.LazyFrame(schema=schema)


def scores_place(path: Path) -> Path:
    """Where the scores of a predictions table lie."""
    return path.with_name(f"{path.stem}.scores.parquet")


def read_predictions(path: Path | str, rank: str | None = None) -> pl.DataFrame:
    """A predictions table, ours or another tool's: at least a key column and one rank.

    Args:
        path: A table of ours, or what `data.foreign` reads: CSV and Parquet, and JSON (`.json`).
        rank: Of bare labels, in a table that does not say of which rank its names are.

    Raises:
        RequestError: no such file, another form, or labels of an unknown rank.
        DataError: no key or rank column, duplicate or empty keys, a probability that is none.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path}: no such predictions file")
    if path.suffix not in (*FORMS, ".json"):
        raise unknown("form of predictions", path.suffix or path.name, (*FORMS, ".json"))
    with _reading(path, "predictions"):
        if path.suffix == ".json":
            frame = read_json(path, rank)
        else:
            parquet = path.suffix == ".parquet"
            frame = pl.read_parquet(path) if parquet else _typed(pl.read_csv(path, infer_schema=False))
            frame = from_table(frame, str(path), rank)
    return check_predictions(frame, str(path))


def check_predictions(frame: pl.DataFrame, where: str = "the predictions") -> pl.DataFrame:
    """The table with names as text, missing null, and probabilities as numbers.

    Raises:
        DataError: what is wrong with it.
    """
    keys = [k for k in KEYS if k in frame.columns and frame[k].null_count() < max(1, frame.height)]
    if not keys:
        raise DataError(f"{where}: no key column, sampleid or image_file{near('sampleid', frame.columns)}")
    ranks = [r for r in RANKS if r in frame.columns]
    if not ranks:
        raise DataError(f"{where}: no column of names, one of {', '.join(RANKS)}")
    if frame.is_empty():
        raise DataError(f"{where}: no rows")
    text = pl.col(*keys, *ranks, *(["error"] if "error" in frame.columns else [])).cast(pl.String)
    frame = frame.with_columns(text).with_columns(
        pl.when(~pl.col(ranks).is_in(MISSING)).then(pl.col(ranks)).name.keep()
    )
    key = frame[keys[0]]
    if key.null_count():
        raise DataError(f"{where}: {key.null_count():,} rows have no {key.name}")
    if key.n_unique() < key.len():
        twice = key.filter(key.is_duplicated()).unique(maintain_order=True).head(3)
        raise DataError(f"{where}: {key.name} occurs more than once: {', '.join(twice)}")
    for column in (c for c in frame.columns if c.endswith("_probability")):
        values = frame[column].cast(pl.Float64, strict=False)
        odd = frame[column].is_not_null() & ~values.is_between(0, 1).fill_null(False)
        if odd.any():
            row = int(odd.arg_max() or 0)
            value = frame[column][row]
            raise DataError(f"{where}: {column} of {key[row]} is {value}, expected a number from 0 to 1")
        frame = frame.with_columns(values)
    return frame


def read_scores(path: Path | str) -> Scores | None:
    """The leaf probabilities beside a predictions table; None where there are none.

    Raises:
        DataError: a scores file that cannot be read, or that is of other predictions.
    """
    path = Path(path)
    place = scores_place(path)
    if not place.is_file():
        return None
    with _reading(place, "scores"):
        footer = pl.read_parquet_metadata(place)
        leaves = [tuple(leaf) for leaf in json.loads(footer["leaves"])]
        schema = pl.read_parquet_schema(place)
        width = schema["probabilities"]
        keys = pl.read_parquet(place, columns=[*KEYS, *(["energy"] if "energy" in schema else [])])
    if not isinstance(width, pl.Array) or width.size != len(leaves):
        raise DataError(f"{place}: {len(leaves)} leaves in the footer, but the scores are {width}")
    if path.suffix == ".parquet" and json.loads(footer.get(FOOTER, "{}")) != read_record(path):
        raise DataError(f"{place}: not the scores of {path.name} (their records differ); predict again")
    energy = keys["energy"] if "energy" in schema and keys["energy"].null_count() < keys.height else None
    return Scores(place, keys.select(KEYS), leaves, energy)


def read_record(path: Path | str) -> dict[str, Any]:
    """What the predictions follow from, by their footer, for a CSV by that of its scores; {} without one.

    Raises:
        DataError: the file cannot be read.
    """
    path = Path(path)
    place = path if path.suffix == ".parquet" else scores_place(path)
    if not place.is_file():
        return {}
    with _reading(place, "predictions"):
        text = pl.read_parquet_metadata(place).get(FOOTER)
        record: dict[str, Any] = json.loads(text) if text else {}
    return record


def _typed(frame: pl.DataFrame) -> pl.DataFrame:
    """Our own further columns in their types; null where another tool's column of the name holds no such."""
    return frame.with_columns(
        pl.col(column).cast(kind, strict=False)
        for column, kind in OPTIONAL.items()
        if column in frame.columns
    )


@contextlib.contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a damaged file makes Polars raise into a DataError."""
    try:
        yield
    except (pl.exceptions.PolarsError, OSError, KeyError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise DataError(f"{path}: cannot be read as {what} ({reason})") from None


def _rows_of(num_leaves: int) -> int:
    """Rows of scores that are read at a time."""
    return max(1, _BATCH // max(1, num_leaves))


def _schema(ranks: Sequence[str], optional: Collection[str]) -> dict[str, Any]:
    columns: dict[str, Any] = dict.fromkeys(KEYS, pl.String)
    for rank in ranks:
        columns |= {rank: pl.String, f"{rank}_probability": pl.Float64}
    assigned = {"assigned_rank": pl.String, "assigned_taxon": pl.String, "assigned_probability": pl.Float64}
    kept = {column: kind for column, kind in OPTIONAL.items() if column in optional}
    return columns | assigned | kept | {"error": pl.String}
