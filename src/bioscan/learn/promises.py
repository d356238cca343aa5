"""What the calibration of a model allows to be said of its answers: how deep a name may go, which set of taxa
holds the true one, and how far a name was right among labelled specimens.

N: specimens, R: ranks of the tree, V: its nodes, L: leaf taxa, K: taxa at one rank.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.analysis import backoff, conformal
from bioscan.analysis.confidence import tempered_rank_probabilities
from bioscan.analysis.hierarchy import rank_probabilities
from bioscan.analysis.intervals import wilson
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import RequestError, unknown
from bioscan.learn.calibration import Calibration
from bioscan.vocabulary import RANKS

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

Promise = Literal["rank", "answer"]

SHOWN: Final = 100
"""Names of a set that are written; a set of more ends in «…»."""
_SORTED: Final = 20 * SHOWN
"""Of a larger set only the most probable names are sorted."""
_UNLABELLED: Final = -2
"""No name at a rank; other than `reliability.UNKNOWN`."""
RELIABILITY: Final = ("training", "checked", "precision", "recall", "confusions")
"""What of the reliability table stands beside each assigned taxon."""


# -- how deep a name may go


@dataclass(frozen=True)
class BackOff:
    """Which of a specimen's names are given: all down to the deepest that keeps what was asked."""

    asked: str
    """`max_error` or `min_precision`."""
    value: float
    promise: Promise | None
    """By `max_error`: whether the error of each rank is promised, or that of the answer as a whole."""
    threshold_R: Floats | None
    """Of each rank, by `max_error`."""
    threshold_V: Floats | None
    """Of each taxon, by `min_precision`."""
    allowed_V: Flags
    """False for taxa that cannot be told from sisters without a name (`backoff.indistinguishable`)."""
    measured: list[dict[str, Any]]
    """By rank from the root down, what it does on the calibration records: `rank`; `checked` (records whose
    name can be checked there), `named`, `wrong`; `error_over_all`, `error_among_named` and its 95 % interval
    `low`, `high` (by precision None: thresholds of so many taxa, chosen by these very records, make them look
    better than others will); `reason` why the rank is never named, or None; `held_back`, taxa that are not
    allowed; by precision also `taxa` that some record got as a name, and `taxa_given`.
    """
    answers: dict[str, Any]
    """The same of the answers as wholes, wrong where any of their names is: `checked`, `named`, `wrong`,
    `error_over_all`, `error_among_named`, `low`, `high`."""

    def given(self, nodes_NR: Ints, probability_NR: Floats) -> Flags:
        """Which names are given, N × R.

        Args:
            nodes_NR: The names; -1: none at the rank.
            probability_NR: Theirs; anything where there is none.
        """
        named_NR = nodes_NR >= 0
        allowed_NR = self.allowed_V[nodes_NR]
        if self.threshold_V is not None:
            return named_NR & allowed_NR & (probability_NR >= self.threshold_V[nodes_NR])
        assert self.threshold_R is not None
        level_N = backoff.assign(probability_NR, named_NR, self.threshold_R, allowed_NR)
        above_NR = np.arange(named_NR.shape[1]) <= level_N[:, None]
        return above_NR & named_NR & np.isfinite(self.threshold_R)

    @property
    def never(self) -> list[str]:
        """Ranks at which no name is given: too few records, or no taxon that is right often enough."""
        return [row["rank"] for row in self.measured if row["reason"]]

    def deepest(self, nodes_NR: Ints, probability_NR: Floats) -> Ints:
        """Index of the deepest rank whose name is given; -1: none. Arguments as in `given`."""
        return backoff.deepest(self.given(nodes_NR, probability_NR))


def by_error(
    taxonomy: Taxonomy,
    calibration: Calibration,
    target_counts_V: Ints,
    max_error: float,
    promise: Promise = "rank",
) -> BackOff:
    """Names are given as deep as the expected share of wrong ones, over all specimens, allows.

    See `backoff.thresholds` and `backoff.answer_threshold`.

    Args:
        taxonomy: Of the model.
        calibration: With records.
        target_counts_V: Training specimens whose deepest known taxon is the node.
        max_error: Of each rank or of the whole answer.
        promise: `rank`: at each rank at most that share of names is wrong; `answer`: of the answers at most
            that share has a wrong name at all.

    Raises:
        RequestError: the error is not a share; the calibration has no records.
    """
    records = _Records.of(taxonomy, calibration)
    found = backoff.thresholds(records.by_rank(), max_error)
    threshold_R = np.array([found[rank].threshold for rank in taxonomy.ranks])
    if promise == "answer":
        named_NR = records.named_NR >= 0
        columns = (records.probability_NR, records.right_NR, named_NR, records.checked_NR)
        one = backoff.answer_threshold(*columns, max_error)
        threshold_R = np.where(np.isfinite(threshold_R), one, np.inf)
    reasons = {rank: found[rank].reason or None for rank in taxonomy.ranks}
    allowed_V = ~backoff.indistinguishable(taxonomy, target_counts_V)
    return records.measured(
        BackOff("max_error", max_error, promise, threshold_R, None, allowed_V, [], {}), reasons
    )


def by_precision(
    taxonomy: Taxonomy, calibration: Calibration, target_counts_V: Ints, min_precision: float
) -> BackOff:
    """The deepest name of which at least so large a share is right, by thresholds of each taxon's own.

    See `backoff.precision_thresholds`. Taxa that too few records got as a name are not given.

    Args:
        taxonomy: Of the model.
        calibration: With records.
        target_counts_V: Training specimens whose deepest known taxon is the node.
        min_precision: Of each taxon.

    Raises:
        RequestError: the precision is not between 0 and 1; the calibration has no records.
    """
    records = _Records.of(taxonomy, calibration)
    got_NR = records.checked_NR & (records.named_NR >= 0)
    found = backoff.precision_thresholds(
        records.named_NR[got_NR], records.probability_NR[got_NR], records.right_NR[got_NR], min_precision
    )
    threshold_V = np.full(taxonomy.num_nodes, np.inf)
    threshold_V[list(found)] = [one.threshold for one in found.values()]
    reasons: dict[str, str | None] = {}
    taxa: dict[str, dict[str, int]] = {}
    for rank in taxonomy.ranks:
        of_rank = [one for node, one in found.items() if taxonomy.rank_N[node] == RANKS.index(rank)]
        given = sum(math.isfinite(one.threshold) for one in of_rank)
        taxa[rank] = {"taxa": len(of_rank), "taxa_given": given}
        told = f"of {len(of_rank):,} taxa none was right so often, among enough specimens to tell"
        reasons[rank] = None if given else told
    allowed_V = ~backoff.indistinguishable(taxonomy, target_counts_V)
    rule = records.measured(
        BackOff("min_precision", min_precision, None, None, threshold_V, allowed_V, [], {}), reasons
    )
    unknown_span = {"low": None, "high": None}
    measured = [row | unknown_span | taxa[row["rank"]] for row in rule.measured]
    return replace(rule, measured=measured, answers=rule.answers | unknown_span)


@dataclass(frozen=True)
class _Records:
    """Calibration records as arrays."""

    taxonomy: Taxonomy
    named_NR: NDArray[np.int64]
    """Node of the name at each rank; -1: none."""
    probability_NR: Floats
    """Of that name; NaN where there is none."""
    right_NR: Flags
    checked_NR: Flags
    """Labelled at the rank or deeper, so that the name there is right or wrong."""

    @classmethod
    def of(cls, taxonomy: Taxonomy, calibration: Calibration) -> "_Records":
        frame = records_of(calibration)

        def column(what: str, missing: float, kind: type) -> NDArray[Any]:
            kept = frame.select(pl.col(f"{rank}_{what}").fill_null(missing) for rank in taxonomy.ranks)
            return kept.to_numpy().astype(kind)

        named_NR = column("named", -1, np.int64)
        true_NR = column("true", _UNLABELLED, np.int64)
        right_NR = (named_NR == true_NR) & (named_NR >= 0)
        probability_NR = column("probability", np.nan, np.float64)
        return cls(taxonomy, named_NR, probability_NR, right_NR, true_NR != _UNLABELLED)

    def by_rank(self) -> dict[str, tuple[Floats, Flags, Flags]]:
        """What `backoff.thresholds` takes."""
        made = {}
        for place, rank in enumerate(self.taxonomy.ranks):
            rows = self.checked_NR[:, place]
            columns = (self.probability_NR, self.right_NR, self.named_NR >= 0)
            made[rank] = tuple(column[rows, place] for column in columns)
        return made

    def measured(self, rule: BackOff, reasons: Mapping[str, str | None]) -> BackOff:
        """The rule with `BackOff.measured` and `BackOff.answers`."""
        given_NR = rule.given(self.named_NR, self.probability_NR)
        held_V = self.taxonomy.predictable_N & ~rule.allowed_V
        made = []
        for place, rank in enumerate(self.taxonomy.ranks):
            rows = self.checked_NR[:, place]
            given_N = rows & given_NR[:, place]
            made.append(
                {
                    "rank": rank,
                    **_errors(rows, given_N, given_N & ~self.right_NR[:, place]),
                    "reason": reasons[rank],
                    "held_back": int((held_V & (self.taxonomy.rank_N == RANKS.index(rank))).sum()),
                }
            )
        given_NR &= self.checked_NR
        wrong_NR = given_NR & ~self.right_NR
        answers = _errors(*(np.any(flags, axis=1) for flags in (self.checked_NR, given_NR, wrong_NR)))
        return replace(rule, measured=made, answers=answers)


def _errors(checked_N: Flags, named_N: Flags, wrong_N: Flags) -> dict[str, Any]:
    """How many records are checked, named and wrong, and the two errors that follow."""
    checked, named, wrong = (int(flags.sum()) for flags in (checked_N, named_N, wrong_N))
    low, high = wilson(wrong, named)
    return {
        "checked": checked,
        "named": named,
        "wrong": wrong,
        "error_over_all": wrong / checked if checked else None,
        "error_among_named": wrong / named if named else None,
        "low": float(low) if named else None,
        "high": float(high) if named else None,
    }


# -- which taxa a specimen may be


@dataclass(frozen=True)
class TaxonSets:
    """Conformal sets of the taxa at one rank."""

    COLUMNS: ClassVar = ("set", "set_size", "set_taxon", "set_rank")

    taxonomy: Taxonomy
    rank: str
    temperature: float
    """Of the rank's own; 1 unless the calibration is by rank."""
    nodes_K: NDArray[np.int64]
    """Placeholders among them: they share the probability, but are no names."""
    calibrated: conformal.Calibrated
    names_V: pl.Series
    ranks_V: pl.Series

    @classmethod
    def of(
        cls,
        taxonomy: Taxonomy,
        calibration: Calibration,
        method: str,
        coverage: float,
        rank: str | None = None,
    ) -> "TaxonSets":
        """Sets that hold the true taxon of a share `coverage` of specimens (see `analysis.conformal`).

        Args:
            taxonomy: Of the model.
            calibration: With records.
            method: One of `conformal.METHODS`.
            coverage: Between 0 and 1.
            rank: Of the taxa; None: the deepest of the tree.

        Raises:
            RequestError: an unknown method or rank, a coverage out of range, or no calibration records.
        """
        rank = rank or taxonomy.ranks[-1]
        if rank not in taxonomy.ranks:
            raise unknown("rank of this model", rank, taxonomy.ranks)
        nodes_K = np.flatnonzero(taxonomy.rank_N == RANKS.index(rank))
        frame = records_of(calibration).drop_nulls(f"{rank}_true")
        true_N = frame[f"{rank}_true"].to_numpy()
        truth = conformal.Truth(
            frame[f"{rank}_truth_probability"].to_numpy(),
            frame[f"{rank}_before"].to_numpy(),
            frame[f"{rank}_place"].to_numpy().astype(np.int64),
            np.where(true_N >= 0, np.searchsorted(nodes_K, true_N), -1),
        )
        counts_K = taxonomy.counts_N[nodes_K]
        calibrated = conformal.calibrate(
            method,
            truth,
            error=1 - coverage,
            prior_K=conformal.prior(counts_K),
            bin_K=conformal.frequency_bins(counts_K),
        )
        temperature = (calibration.rank_temperatures or {}).get(rank, 1.0)
        return cls(taxonomy, rank, temperature, nodes_K, calibrated, names_of(taxonomy), ranks_of(taxonomy))

    def columns(self, probabilities_NL: NDArray[np.floating[Any]], keys_N: Sequence[str]) -> pl.DataFrame:
        """`set`, `set_size`, `set_taxon`, `set_rank` of specimens; all null where there is no prediction.

        Args:
            probabilities_NL: Of the leaves.
            keys_N: Of the specimens: what is drawn at random for one depends on its key alone.
        """
        taxonomy = self.taxonomy
        probabilities_NK, _ = at_rank(taxonomy, probabilities_NL, self.rank, self.temperature)
        sets_NK = conformal.sets(self.calibrated, probabilities_NK, conformal.uniforms(keys_N))
        sets_NK &= taxonomy.predictable_N[self.nodes_K]
        covering_N = conformal.covering_node(taxonomy, sets_NK, self.nodes_K)
        covering_N = np.maximum(covering_N, 0)  # an empty set has no taxon, nor has the root a name
        columns = {
            "set": self._names(sets_NK, probabilities_NK),
            "set_size": pl.Series(sets_NK.sum(axis=1), dtype=pl.Int64),
            "set_taxon": self.names_V.gather(covering_N),
            "set_rank": self.ranks_V.gather(covering_N),
        }
        absent_N = pl.Series(np.isnan(probabilities_NL[:, 0]))
        return pl.DataFrame({name: column.set(absent_N, None) for name, column in columns.items()})

    def told(self) -> dict[str, Any]:
        """What was asked for, and what it rests on."""
        return {
            "method": self.calibrated.method,
            "rank": self.rank,
            "coverage": 1 - self.calibrated.error,
            "calibrated": self.calibrated.n,
            "warnings": list(self.calibrated.warnings),
        }

    def _names(self, sets_NK: Flags, probabilities_NK: Floats) -> pl.Series:
        """The names in each set, the most probable first."""
        size_N = sets_NK.sum(axis=1)
        shown_NK, huge = sets_NK.copy(), np.flatnonzero(size_N > _SORTED)
        if huge.size:
            fit_NK = np.where(sets_NK[huge], probabilities_NK[huge], -1)
            shown_NK[huge] = fit_NK >= np.partition(fit_NK, -SHOWN, axis=1)[:, -SHOWN, None]
        rows, places = np.nonzero(shown_NK)
        order = np.lexsort((places, -probabilities_NK[rows, places], rows))
        rows, places = rows[order], places[order]
        number = np.arange(rows.size) - np.searchsorted(rows, rows)
        rows, places = rows[number < SHOWN], places[number < SHOWN]
        listed = pl.DataFrame(
            {"row": rows.astype(np.int64), "name": self.names_V.gather(self.nodes_K[places])}
        )
        joined = listed.group_by("row").agg(pl.col("name").str.join("; "))
        every = pl.DataFrame({"row": np.arange(len(sets_NK), dtype=np.int64), "large": size_N > SHOWN})
        told = every.join(joined, on="row", how="left", maintain_order="left")
        more = pl.when("large").then(pl.lit("; …")).otherwise(pl.lit(""))
        return told.select(pl.col("name").fill_null("") + more).to_series()


# -- how far a name was right


def reliability_by_node(taxonomy: Taxonomy, calibration: Calibration) -> pl.DataFrame | None:
    """A row for each node of the tree: `assigned_training` and the like, as `data.predictions` has them.

    None where nothing was measured.
    """
    table = calibration.reliability
    if table is None:
        return None
    nodes = pl.DataFrame({"taxon": pl.Series(range(taxonomy.num_nodes), dtype=pl.Int64)})
    columns = [pl.col(name).alias(f"assigned_{name}") for name in RELIABILITY]
    found = table.select(pl.col("taxon").cast(pl.Int64), *columns)
    return nodes.join(found, on="taxon", how="left", maintain_order="left").drop("taxon")


# -- what all of them need


def at_rank(
    taxonomy: Taxonomy, probabilities_NL: NDArray[np.floating[Any]], rank: str, temperature: float = 1.0
) -> tuple[Floats, NDArray[np.int64]]:
    """Probabilities of the nodes at a rank, at a temperature of the rank's own, and the nodes, ascending."""
    if temperature == 1:
        return rank_probabilities(taxonomy, probabilities_NL, rank)
    return tempered_rank_probabilities(taxonomy, probabilities_NL, rank, temperature)


def records_of(calibration: Calibration) -> pl.DataFrame:
    """The calibration records.

    Raises:
        RequestError: there are none.
    """
    if calibration.records is None or calibration.records.is_empty():
        raise RequestError(
            "the model's calibration kept no records apart: thresholds and prediction sets need them; "
            "run bioscan calibrate with a --share above 0"
        )
    return calibration.records


def names_of(taxonomy: Taxonomy) -> pl.Series:
    """Name of each node; null for the root."""
    return pl.Series([None, *map(taxonomy.name, range(1, taxonomy.num_nodes))], dtype=pl.String)


def ranks_of(taxonomy: Taxonomy) -> pl.Series:
    """Rank of each node; null for the root."""
    return pl.Series([None, *(RANKS[rank] for rank in taxonomy.rank_N[1:])], dtype=pl.String)
