"""What an evaluation starts from: predictions, catalogue and scores, checked and joined by key. No torch."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.analysis.confidence import apply_temperature
from bioscan.analysis.splits import split_hash
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.analysis.taxonomy import within as rows_within
from bioscan.data.foreign import catalogue_files
from bioscan.data.metadata import key_of, read_footer, read_metadata, scan_metadata
from bioscan.data.predictions import Scores, check_predictions, read_predictions, read_record, read_scores
from bioscan.errors import DataError, RequestError, near, unknown
from bioscan.vocabulary import KEYS, RANKS, ROLES

NO_EXPERIMENT: Final = "none"
"""Instead of an experiment: every labelled specimen counts, whatever its role."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Inputs:
    """What an evaluation at any rank starts from."""

    table: pl.DataFrame
    """The predictions."""
    scores: Scores | None
    record: dict[str, Any]
    frame: pl.DataFrame
    """Of the catalogue: keys, ranks, roles and what tells groups of specimens apart."""
    inside: pl.DataFrame
    """Its rows below `within`."""
    chosen: pl.DataFrame
    """Of these the rows of the role."""
    key: str
    experiment: str | None
    role: str | None
    within: str | None
    same_split: bool | None

    @classmethod
    def read(
        cls,
        predictions: Path | str | pl.DataFrame,
        catalogue: Path | str | pl.DataFrame,
        *,
        experiment: str | None,
        role: str | None,
        within: str | None,
        rank: str | None = None,
    ) -> "Inputs":
        """The tables, checked; the arguments are those of `jobs.evaluate.evaluate`, the rank for tables whose
        labels say none.

        Raises:
            RequestError: a column, role or taxon that is not there; no specimen of the role.
            DataError: an input that cannot be used.
        """
        if role is not None and role not in ROLES:
            raise unknown("role", role, ROLES)
        if isinstance(predictions, pl.DataFrame):
            table, scores, record = check_predictions(predictions), None, {}
        else:
            table = read_predictions(predictions, rank)
            scores, record = read_scores(predictions), read_record(predictions)
        within = within or record.get("within")
        frame = _catalogue(catalogue, experiment, record)
        if "sampleid" not in table.columns and "image_file" in frame.columns:  # another tool's paths
            table = table.with_columns(catalogue_files(table["image_file"], frame["image_file"]))
        experiment = None if experiment == NO_EXPERIMENT else experiment or record.get("experiment")
        if role and not experiment:
            raise RequestError(f"role {role} of which split? Name its column: --experiment")
        role = (role or "test") if experiment else None
        inside = rows_within(frame, within) if within else frame
        chosen = inside.filter(pl.col(experiment) == role) if experiment else inside
        if chosen.is_empty():
            below = f" of {within}" if within else ""
            raise RequestError(
                f"no specimen{below} has role {role} in {experiment}; "
                f"--experiment {NO_EXPERIMENT} counts every labelled specimen"
            )
        key, same_split = _common_key(table, frame), _same_split(catalogue, frame, experiment, record)
        return cls(table, scores, record, frame, inside, chosen, key, experiment, role, within, same_split)

    @property
    def ranks(self) -> tuple[str, ...]:
        """Those of the model, root down; where it has one only, or is not known, all that are named, from the
        first at which there is more than one taxon: above it every answer is right.
        """
        ranks = self.record.get("ranks") or ()
        if len(ranks) > 1:
            return tuple(ranks)
        named = named_ranks(self.table)
        first = next((place for place, rank in enumerate(named) if self._taxa_at(rank) > 1), len(named) - 1)
        return tuple(named[max(0, first) :])

    def _taxa_at(self, rank: str) -> int:
        """Names at a rank, in the truth and among the answers."""
        truth = self.chosen[rank].drop_nulls() if rank in self.chosen.columns else pl.Series(dtype=pl.String)
        return pl.concat([truth.unique(), self.table[rank].drop_nulls().unique()]).n_unique()

    def predicted_at(self, rank: str) -> int:
        """Specimens that are chosen, labelled at a rank and predicted."""
        labelled = self.chosen.filter(pl.col(rank).is_not_null())
        return labelled.join(self.table, on=self.key, how="semi").height


def named_ranks(table: pl.DataFrame) -> list[str]:
    """Ranks at which some specimen is named, root down."""
    return [r for r in RANKS if r in table.columns and table[r].null_count() < table.height]


def rank_to_compare(wanted: str | None, table: pl.DataFrame) -> str:
    """The wanted rank, checked; None: the deepest that the predictions name.

    Raises:
        RequestError: no rank, or one that the predictions have no column of.
    """
    present = [r for r in RANKS if r in table.columns]
    if wanted is None:
        return (named_ranks(table) or present)[-1]
    if wanted not in RANKS:
        raise unknown("rank", wanted, RANKS)
    if wanted not in present:
        raise RequestError(f"the predictions have no column '{wanted}'; they name {', '.join(present)}")
    return wanted


def _catalogue(
    catalogue: Path | str | pl.DataFrame, experiment: str | None, record: dict[str, Any]
) -> pl.DataFrame:
    """Its keys, ranks, roles and what tells groups of specimens apart."""
    if isinstance(catalogue, pl.DataFrame):
        known = catalogue.columns
    else:
        known = scan_metadata(catalogue).collect_schema().names()
    column = None if experiment == NO_EXPERIMENT else experiment or record.get("experiment")
    more = ("uri", (record.get("calibration_cut") or {}).get("group"))
    if column and column not in known:
        if experiment:
            raise RequestError(f"the catalogue has no column '{column}'{near(column, known)}")
        raise RequestError(
            f"the catalogue has no column '{column}', the experiment that the predictions were made for; "
            f"name another, or --experiment {NO_EXPERIMENT} to count every labelled specimen"
        )
    columns = [c for c in known if c in (*KEYS, *RANKS, column, *more)]
    return (
        catalogue.select(columns)
        if isinstance(catalogue, pl.DataFrame)
        else read_metadata(catalogue, columns)
    )


def _same_split(
    catalogue: Path | str | pl.DataFrame, frame: pl.DataFrame, experiment: str | None, record: dict[str, Any]
) -> bool | None:
    """The split's hash against that of the training; a catalogue has it in its footer."""
    trained = record.get("split_hash") if record.get("experiment") == experiment else None
    if not trained or experiment is None:
        return None
    footer = {}
    if not isinstance(catalogue, pl.DataFrame) and Path(catalogue).suffix == ".parquet":
        footer = read_footer(catalogue)
    made = footer.get("split", {}).get("experiments", {}).get(experiment, {}).get("hash")
    if made is None or "mended" in footer:  # rows may have been dropped since
        made = split_hash(frame[key_of(frame.columns)], frame[experiment])
    return bool(made == trained)


def _common_key(table: pl.DataFrame, frame: pl.DataFrame) -> str:
    """The key column of both, checked."""
    usable = [k for k in KEYS if k in table.columns and not table[k].has_nulls()]
    common = [k for k in usable if k in frame.columns]
    if not common:
        raise DataError(f"the predictions have key {' and '.join(usable)}, which the catalogue has not")
    key = common[0]
    for where, keys in (("the predictions", table[key]), ("the catalogue", frame[key].drop_nulls())):
        if keys.hash().n_unique() == keys.len():
            continue  # hashes that differ are of keys that do; to count them takes a sixth of the time
        if keys.n_unique() < keys.len():
            twice = keys.filter(keys.is_duplicated()).unique(maintain_order=True).head(3)
            raise DataError(f"{where}: {key} occurs more than once: {', '.join(twice)}")
    return key


def joined_at(chosen: pl.DataFrame, table: pl.DataFrame, key: str, rank: str) -> pl.DataFrame:
    """The chosen specimens that have a prediction: key, ranks, the ranks as `named …`, `probability`,
    `error`.
    """
    answered = pl.col("error").is_null() if "error" in table.columns else pl.lit(True)
    named = [
        pl.when(answered).then(pl.col(r)).alias(f"named {r}") for r in down_to(rank) if r in table.columns
    ]
    probability = f"{rank}_probability"
    answers = table.select(
        key,
        *named,
        (pl.col(probability) if probability in table.columns else pl.lit(None, pl.Float64)).alias(
            "probability"
        ),
        (pl.col("error") if "error" in table.columns else pl.lit(None, pl.String)).alias("error"),
    )
    truth = chosen.select(key, *(r for r in down_to(rank) if r in chosen.columns))
    joined = truth.join(answers, on=key, how="inner", maintain_order="left")
    if joined.is_empty():
        raise DataError(
            f"none of the {chosen.height:,} specimens is in the predictions; their {key} is like "
            f"{chosen[key].drop_nulls().first()!r}, that of the predictions like {table[key].first()!r}"
        )
    return joined


def down_to(rank: str) -> tuple[str, ...]:
    """All ranks from the root down to one."""
    return RANKS[: RANKS.index(rank) + 1]


# -- names and classes


@dataclass(frozen=True)
class Taxa:
    """Labels of taxa: their names, and where a name stands for several taxa also the names above."""

    rank: str
    homonyms: frozenset[str]
    tree: Taxonomy | None
    """Of the homonyms."""

    @classmethod
    def of(cls, rank: str, truth: pl.DataFrame, model: pl.DataFrame) -> "Taxa":
        """Truth and model may disagree about the names above: that alone makes no homonym."""
        homonyms = _homonyms(truth, rank) | _homonyms(model, rank)
        both = pl.concat([truth, model]).filter(pl.col(rank).is_in(list(homonyms)))
        return cls(rank, frozenset(homonyms), Taxonomy.build(both, [rank]) if homonyms else None)

    def labels(self, paths: pl.DataFrame) -> pl.Series:
        """Label of the taxon of each path; null where the path has no name at the rank."""
        names = paths[self.rank]
        if self.tree is None:
            return names
        known = {int(node): _long_label(self.tree.paths[node]) for node in self.tree.leaves_L}
        nodes = pl.Series(self.tree.targets(paths))
        longer = nodes.replace_strict(known, default=None, return_dtype=pl.String)
        return longer.zip_with(names.is_in(list(self.homonyms)) & longer.is_not_null(), names)


def _long_label(path: Sequence[str | None]) -> str:
    return f"{path[-1]} ({' > '.join(name for name in path[:-1] if name) or 'no ranks above'})"


def _homonyms(paths: pl.DataFrame, rank: str) -> set[str]:
    """Names at the rank that stand for several taxa."""
    distinct = paths.filter(pl.col(rank).is_not_null()).unique(maintain_order=True)
    several = distinct.filter(pl.col(rank).is_duplicated())
    if several.is_empty():
        return set()
    tree = Taxonomy.build(several, [rank])
    taxa = Counter(tree.name(int(node)) for node in tree.leaves_L)
    return {name for name, count in taxa.items() if count > 1}


def paths_of(frame: pl.DataFrame, rank: str, prefix: str = "") -> pl.DataFrame:
    """The rank columns down to a rank, absent ones null."""
    return frame.select(
        (pl.col(f"{prefix}{r}") if f"{prefix}{r}" in frame.columns else pl.lit(None, pl.String)).alias(r)
        for r in down_to(rank)
    )


def leaf_paths(scores: Scores | None, rank: str) -> pl.DataFrame:
    """Lineages of the model's leaves down to a rank."""
    ranks = down_to(rank)
    rows = [(*leaf, *(None,) * len(ranks))[: len(ranks)] for leaf in scores.leaves] if scores else []
    return pl.DataFrame(rows, schema=dict.fromkeys(ranks, pl.String), orient="row")


def numbers_of(names: pl.Series, labels: Sequence[str]) -> Ints:
    """Place of each name among the labels; -1 for none."""
    table = {label: number for number, label in enumerate(labels)}
    return names.replace_strict(table, default=-1, return_dtype=pl.Int64).fill_null(-1).to_numpy()


# -- scores of the leaves


@dataclass(frozen=True)
class AtRank:
    """Probabilities of the K classes at a rank: sums over the leaves below each."""

    scores: Scores
    class_L: Ints
    num_classes: int
    temperature: float = 1.0
    """Of the rank's own, where probabilities are shown at it: `confidence.tempered_rank_probabilities`."""
    part_L: Ints | None = None
    """For that: `class_L`, and further numbers for what has no name at the rank."""

    @classmethod
    def of(
        cls, scores: Scores, class_L: Ints, num_classes: int, rank: str, record: dict[str, Any]
    ) -> "AtRank":
        """In the probabilities that the predictions show, by their record."""
        temperature = (record.get("rank_temperatures") or {}).get(rank, 1.0)
        levels = [RANKS.index(name) for name in record.get("ranks") or ()]
        numbers: dict[Any, int] = {}
        part_L = class_L.copy()
        for leaf in np.flatnonzero(class_L < 0) if temperature != 1 else ():
            path = (*scores.leaves[leaf], *(None,) * len(RANKS))
            # what skips the rank below one parent is one class, a leaf that ends above it one for itself
            above = tuple(path[level] for level in levels if level < RANKS.index(rank))
            own = above if any(path[RANKS.index(rank) :]) else int(leaf)
            part_L[leaf] = num_classes + numbers.setdefault(own, len(numbers))
        return cls(scores, class_L, num_classes, temperature, part_L)

    def batches(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Rows of the scores file, and their probabilities of shape (rows, K)."""
        if self.temperature != 1 and self.part_L is not None:
            order = np.argsort(self.part_L, kind="stable")
            starts = np.searchsorted(self.part_L[order], np.arange(self.part_L.max() + 1))
            for rows, batch_NL in self.scores.batches():
                parts_NP = np.add.reduceat(batch_NL[:, order], starts, axis=1, dtype=np.float64)
                tempered_NP = apply_temperature(parts_NP, self.temperature)
                yield rows, tempered_NP[:, : self.num_classes].astype(np.float32)
            return
        order = np.argsort(self.class_L, kind="stable")
        order = order[self.class_L[order] >= 0]
        starts = np.searchsorted(self.class_L[order], np.arange(self.num_classes))
        same = np.array_equal(order, np.arange(self.num_classes)) and order.size == self.class_L.size
        for rows, batch_NL in self.scores.batches():
            yield rows, batch_NL if same else np.add.reduceat(batch_NL[:, order], starts, axis=1)


def places(keys: pl.Series, wanted: pl.Series) -> Ints:
    """Per key its place among the wanted ones, -1 where it is none of them."""
    places = pl.DataFrame({"key": wanted}).with_row_index("place")
    found = pl.DataFrame({"key": keys}).join(places, on="key", how="left", maintain_order="left")["place"]
    return found.cast(pl.Int64).fill_null(-1).to_numpy()


def complete(batch_BK: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rows that have scores."""
    rows: NDArray[np.float32] = batch_BK[~np.isnan(batch_BK[:, 0])]
    return rows
