"""How deep a name may go: the deepest rank at which the error stays as low as asked.

One threshold per rank, by conformal risk control (Angelopoulos et al. 2022): a name at rank r is given where
its probability reaches the threshold. The expected share of specimens that get a wrong name at r, among all
specimens whose name at r can be checked, is then at most the asked error. That is promised for specimens
exchangeable with the calibration records: drawn in the same way, and named by experts in the same way.
Labelled records are no random sample of all, so nothing is promised for those that nobody could name.

Two other errors are not promised. That among the specimens that are named at r is no less; it is reported.
And each rank has its promise for itself: of the deepest names of all specimens, which are at different ranks,
more may be wrong, up to the sum over ranks.

Shapes: N specimens, R ranks from the root down.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bioscan.analysis.intervals import binomial_at_most, wilson
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import RequestError

Array = NDArray[np.floating[Any]]
Classes = NDArray[np.integer[Any]]
Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEVEL: Final = 0.9
"""Confidence at which `precision_thresholds` shows each taxon's precision."""

_ROUNDING = 1e-12  # what shares such as 0.05 · 20 may be off by in floating point
_FIRST = 4  # the first test of a taxon is on the most confident quarter of its records


@dataclass(frozen=True)
class RankThreshold:
    """From which probability a rank is named, and what that did on the calibration records.

    Counts are of this rank alone: `assign` also wants the ranks above to pass, so it names at most as many.
    """

    threshold: float
    """inf: the rank is not named at all, for the `reason`."""
    n: int
    """Records labelled at the rank or deeper, so that a name can be checked."""
    named: int
    """Of these, how many get a name at the rank."""
    wrong: int
    """Of the named, how many get a wrong one."""
    coverage: float
    """named / n; NaN without records."""
    error_over_all: float
    """wrong / n: what is promised to be at most the asked error, in expectation. NaN without records."""
    error_among_named: float
    """wrong / named: reported, not promised. NaN where none is named."""
    error_low: float
    error_high: float
    """Wilson's 95 % interval of `error_among_named`."""
    reason: str = ""
    """Why the rank is not named; "" where it is."""


@dataclass(frozen=True)
class ClassThreshold:
    """From which probability a taxon's name is given, and what that did on the calibration records."""

    threshold: float
    """inf: the name is not given at all, for the `reason`."""
    n: int
    """Records that got the name, and can be checked."""
    named: int
    """Of these, how many keep it."""
    coverage: float
    """named / n: what the precision costs."""
    precision: float
    """Share of the kept that are right; NaN where none is kept."""
    precision_low: float
    """Exact one-sided lower bound of it at the asked level (Clopper, Pearson 1934); NaN if none is kept."""
    reason: str = ""
    """Why the name is not given; "" where it is."""


def rank_threshold(probability_N: Array, wrong_N: Flags, max_error: float) -> float:
    """The least t at which (wrong records with a probability of t or more, + 1) / (N + 1) <= max_error.

    Args:
        probability_N: Of the name at the rank, of the records that can be checked; NaN: no name.
        wrong_N: Whether that name is wrong.
        max_error: Asked error, over all specimens.

    Returns:
        0 where all names may be given, inf where no threshold keeps the promise: with fewer than
        1 / max_error - 1 records there is none.
    """
    wrong = np.sort(probability_N[wrong_N & ~np.isnan(probability_N)].astype(np.float64))[::-1]
    allowed = int(np.floor(max_error * (len(probability_N) + 1) * (1 + _ROUNDING))) - 1
    if allowed < 0:
        return np.inf
    return float(np.nextafter(wrong[allowed], np.inf)) if allowed < wrong.size else 0.0


def thresholds(
    records: Mapping[str, tuple[Array, Flags, Flags]], max_error: float
) -> dict[str, RankThreshold]:
    """The threshold of each rank at one asked error, and what it does on the records it was found on.

    Args:
        records: By rank, of the records labelled at that rank or deeper: probability of the name there,
            whether it is right, and whether there is a name at all. A record whose true taxon the model does
            not know is one that is never right.
        max_error: Asked error of each rank over all specimens, above 0 and at most 1.

    Raises:
        RequestError: the asked error is not a share.
    """
    if not 0 < max_error <= 1:
        raise RequestError(f"an error of {max_error:g} cannot be promised: above 0 and at most 1 is wanted")
    return {rank: _rank_result(*columns, max_error) for rank, columns in records.items()}


def answer_threshold(
    probability_NR: Array, right_NR: Flags, named_NR: Flags, checked_NR: Flags, max_error: float
) -> float:
    """One threshold for all ranks, so that the expected share of answers with any wrong name is as asked.

    A threshold for each rank promises something of each rank; of the answers as wholes more are wrong, up to
    the sum over ranks. Probabilities fall from the root down, so an answer holds a wrong name where the most
    probable of its wrong names reaches the threshold.

    Args:
        probability_NR: Of the name at each rank.
        right_NR: Whether it is right.
        named_NR: Whether there is one.
        checked_NR: Whether the record is labelled at the rank; a record that is at none does not count.
        max_error: Asked error, over all specimens.
    """
    wrong_NR = checked_NR & named_NR & ~right_NR
    surest_N = np.where(wrong_NR, probability_NR.astype(np.float64), -np.inf).max(axis=1, initial=-np.inf)
    counted_N, wrong_N = np.any(checked_NR, axis=1), np.any(wrong_NR, axis=1)
    return rank_threshold(surest_N[counted_N], wrong_N[counted_N], max_error)


def assign(
    probability_NR: Array, named_NR: Flags, threshold_R: Array, allowed_NR: Flags | None = None
) -> Ints:
    """Index of the deepest rank that is named, -1 where none is.

    A name is given where its probability reaches the threshold and those above it reach theirs, so that the
    specimens named at a rank are among those that the rank's promise counts. Passed over, and left empty: a
    rank without a name, and a rank whose threshold is inf.

    Args:
        probability_NR: Of the name at each rank, from the root down.
        named_NR: Whether there is a name.
        threshold_R: Of each rank.
        allowed_NR: False for names that are not given, nor what is below them (see `indistinguishable`).
    """
    tested_NR = named_NR & np.isfinite(threshold_R)
    reached_NR = tested_NR & (probability_NR >= threshold_R.astype(np.float64))
    held_NR = tested_NR & ~reached_NR
    if allowed_NR is not None:
        held_NR |= named_NR & ~allowed_NR
    return deepest(reached_NR & ~np.logical_or.accumulate(held_NR, axis=1))


def deepest(given_NR: Flags) -> Ints:
    """Index of the last rank that is True in each row; -1 where none is."""
    last_N = given_NR.shape[1] - 1 - np.argmax(given_NR[:, ::-1], axis=1)
    return np.where(given_NR.any(axis=1), last_N, -1)


def indistinguishable(taxonomy: Taxonomy, target_counts_N: Classes) -> Flags:
    """Taxa that the model cannot tell from sisters without a name, and all below them; shape of the nodes.

    Where a taxon above has the very same leaves, and training records that are named no deeper than it, the
    taxon's probability equals that taxon's by construction: the records without a deeper name teach it too.
    A genus with one named species, say, whose other records may be of any species.

    Args:
        taxonomy: The tree.
        target_counts_N: Records that the model was trained on whose deepest known taxon is the node.
    """
    parent_N, first_N, end_N = taxonomy.parent_N[1:], taxonomy.first_leaf_N, taxonomy.end_leaf_N
    only_N = (first_N[1:] == first_N[parent_N]) & (end_N[1:] == end_N[parent_N])
    unsure_N = np.append(False, only_N & (target_counts_N[parent_N] > 0))
    for node, parent in enumerate(parent_N.tolist(), start=1):  # parents have the lower numbers
        unsure_N[node] |= unsure_N[parent]
    return unsure_N


def precision_thresholds(
    taxon_N: Classes, probability_N: Array, right_N: Flags, precision: float, *, level: float = LEVEL
) -> dict[int, ClassThreshold]:
    """For each taxon the least threshold at which its name is right as often as asked, at a confidence level.

    The numbers of most confident records are tested in a fixed order, from few to all: could so many of m be
    right by chance (exact binomial test) if the precision were lower than asked? The last number before the
    first failure is kept, so no correction for many tests is due (fixed-sequence testing, as in Angelopoulos
    et al. 2021, «Learn then test»; the bound is that of Geifman and El-Yaniv 2017). The first number is a
    quarter of the records, and at least what the test can pass on: ln(1 - level) / ln(precision).

    Of the taxa that are less precise than asked each passes with a probability of up to 1 - level, so that of
    many tested taxa some are named that should not be. How often the kept records are right says little: they
    are those that the thresholds were chosen by.

    Args:
        taxon_N: Taxon that each record got as a name, of the records that can be checked; -1: none.
        probability_N: Of that name.
        right_N: Whether it is right.
        precision: Asked share of right names among those given, between 0 and 1.
        level: Confidence that it is reached, for each taxon.

    Returns:
        By taxon, ascending, those that some record got.

    Raises:
        RequestError: the asked precision or level is not between 0 and 1.
    """
    for what, share in (("precision", precision), ("level", level)):
        if not 0 < share < 1:
            raise RequestError(f"a {what} of {share:g} cannot be tested: between 0 and 1 is wanted")
    named = np.flatnonzero((taxon_N >= 0) & ~np.isnan(probability_N))
    if not named.size:
        return {}
    order = named[np.lexsort((-probability_N[named], taxon_N[named]))]
    taxa, starts = np.unique(taxon_N[order], return_index=True)
    return {
        int(taxon): _class_result(probability_N[rows], right_N[rows], precision, level)
        for taxon, rows in zip(taxa, np.split(order, starts[1:]), strict=True)
    }


def _rank_result(probability_N: Array, right_N: Flags, named_N: Flags, max_error: float) -> RankThreshold:
    n = len(probability_N)
    probability_N = np.where(named_N, probability_N.astype(np.float64), np.nan)
    threshold = rank_threshold(probability_N, ~right_N, max_error)
    given_N = probability_N >= threshold
    named, wrong = int(given_N.sum()), int((given_N & ~right_N).sum())
    low, high = wilson(wrong, named)
    nan = float("nan")
    reason = ""
    if threshold == np.inf:
        needed = int(np.ceil((1 / max_error - 1) * (1 - _ROUNDING)))
        reason = f"{n:,} records can be checked; an error of {max_error:g} takes {needed:,} or more"
    return RankThreshold(
        threshold=threshold,
        n=n,
        named=named,
        wrong=wrong,
        coverage=named / n if n else nan,
        error_over_all=wrong / n if n else nan,
        error_among_named=wrong / named if named else nan,
        error_low=float(low),
        error_high=float(high),
        reason=reason,
    )


def _class_result(falling_N: Array, right_N: Flags, precision: float, level: float) -> ClassThreshold:
    """The result of one taxon, its records by falling probability."""
    n, risk = falling_N.size, 1 - level
    needed = int(np.ceil(np.log(risk) / np.log(precision) * (1 - _ROUNDING)))
    last_N = np.append(falling_N[1:] != falling_N[:-1], True)  # equal probabilities go together
    kept, passed, threshold = 0, -1, np.inf
    wrong_N = np.cumsum(~right_N)
    for m in (np.flatnonzero(last_N) + 1).tolist():
        if m < max(needed, n // _FIRST):
            continue
        wrong = int(wrong_N[m - 1])  # more right ones never fail a test that was passed
        if wrong > passed and binomial_at_most(wrong, m, 1 - precision) > risk * (1 + _ROUNDING):
            break
        kept, passed = m, wrong
        threshold = float(np.nextafter(np.float64(falling_N[m]), np.inf)) if m < n else 0.0
    reason = ""
    if not kept and n < needed:
        reason = f"{n:,} records got the name; a precision of {precision:g} takes {needed:,} or more"
    elif not kept:
        reason = f"the most confident of {n:,} records are not right often enough for {precision:g}"
    right = kept - int(wrong_N[kept - 1]) if kept else 0
    return ClassThreshold(
        threshold=threshold,
        n=n,
        named=kept,
        coverage=kept / n,
        precision=right / kept if kept else float("nan"),
        precision_low=_lower_bound(right, kept, level) if kept else float("nan"),
        reason=reason,
    )


def _lower_bound(right: int, n: int, level: float) -> float:
    """The share for which `right` or more of n have the probability 1 - level (Clopper and Pearson 1934)."""
    low, high = 0.0, right / n
    for _ in range(50):
        middle = (low + high) / 2
        if binomial_at_most(n - right, n, 1 - middle) > 1 - level:
            high = middle
        else:
            low = middle
    return low
