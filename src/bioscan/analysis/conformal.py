"""Conformal prediction sets: the taxa that a specimen may be, with a promise on how often the true one is in.

Split conformal prediction: a score says how badly a class fits a specimen. Of n calibration records, which
the model has not learned from, the ceil((n + 1)(1 - error))-th smallest score of the true classes is the
threshold; a specimen's set is every class that scores no higher. If the records and the specimen are
exchangeable, the set holds the true class with a probability from 1 - error to 1 - error + 1/(n + 1) (the
upper bound without ties), whatever the model. For one set of calibration records the coverage is a draw from
Beta(k, n + 1 - k), k being that place.

Specimens of one plate or one BIN resemble each other and are not exchangeable with those of others: the
caller keeps each such group whole, in the calibration records or among the specimens. Coverage is then one
over groups like those, over common and rare taxa together, and not promised for any one taxon.

The scores of a class y (p: its probability; U: one uniform number per specimen, not per class):

- `lac`: 1 - p. The smallest sets on average (Sadinle, Lei & Wasserman 2019); rare taxa are covered least.
- `aps`: the probability of the classes before y in descending order, and of y itself up to the share U of it
  (Romano, Sesia & Candès 2020): large sets where the model hesitates.
  Taxa that end above the rank, for which a row falls short of 1, stand in the order as one class.
- `raps`: aps and a penalty for each place behind the first few (Angelopoulos et al. 2021).
- `pas`: -p over the share of y among specimens, which aims at the mean of the coverages of the taxa
  (Ding, Fermanian & Salmon 2025): the conformal twin of logit adjustment.
- `mondrian`: lac with a threshold for each bin of classes (Vovk 2012), say of common and of rare taxa; the
  promise holds in each bin.

Shapes: N calibration records, B specimens of a block, K classes, G nodes of a tree at one rank. Everything
takes and gives a block of specimens, so the caller's block bounds the memory.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import RequestError, unknown

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]

METHODS: Final = ("lac", "aps", "raps", "pas", "mondrian")

RAPS_FREE: Final = 5
RAPS_PENALTY: Final = 0.01
"""Places without a penalty, and the penalty of each further one: short sets are those of aps."""

_SLACK: Final = 1e-9
"""Cumulated probabilities that differ by less are equal: sums of float32 are no more exact."""

_REST: Final = 1e-5
"""A row that falls short of 1 by less sums to 1: sums of float32 are no more exact."""

_LEAST_BOUND: Final = 1e-6
"""Classes below it are taken all at once: few sets need them."""


@dataclass(frozen=True)
class Truth:
    """What calibration needs to know of records: where the true class stands among the probabilities."""

    probability_N: NDArray[np.float64]
    """Of the true class; 0 where the model cannot name it."""
    before_N: NDArray[np.float64]
    """Probability of the classes before it in descending order, ties in the order of the classes; what a row
    falls short of 1 is a last class."""
    place_N: NDArray[np.int64]
    """How many those are; K where the model cannot name the true class."""
    class_N: NDArray[np.int64]
    """The true class; -1 where the model cannot name it: no set covers it."""

    @classmethod
    def concat(cls, parts: Iterable["Truth"]) -> "Truth":
        """The records of several blocks, in their order."""
        columns = zip(*((p.probability_N, p.before_N, p.place_N, p.class_N) for p in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))


@dataclass(frozen=True)
class Bin:
    """Classes that share a threshold."""

    number: int
    n: int
    """Calibration records of its classes."""
    threshold: float
    joined: tuple[int, ...]
    """Bins whose records the threshold is from: itself, and others where it has too few of its own."""


@dataclass(frozen=True)
class Calibrated:
    """A method and its threshold: what `sets` needs."""

    method: str
    error: float
    """1 less the coverage asked for."""
    n: int
    """Calibration records; for `mondrian` those whose class the model can name."""
    threshold: float
    """Highest score of a class in a set; inf: every class is. Of `mondrian`, that of all bins together."""
    threshold_K: NDArray[np.float64] | None = None
    """Of each class, for `mondrian`."""
    prior_K: NDArray[np.float64] | None = None
    """Share of each class, for `pas`."""
    bins: tuple[Bin, ...] = ()
    """For `mondrian`."""
    warnings: tuple[str, ...] = ()
    """What the promise does not hold for, or rests on too little; one sentence each."""


def truth_of(probabilities_BK: Floats, targets_B: Ints) -> Truth:
    """Where the true classes of a block of records stand. No row is sorted.

    Args:
        probabilities_BK: Of the classes; a row may sum to less than 1. A row of NaN (no prediction) counts as
            one whose true class the model cannot name.
        targets_B: True classes; any other than 0 to K - 1 is one that the model cannot name.
    """
    classes = probabilities_BK.shape[1]
    named_B = (targets_B >= 0) & (targets_B < classes)
    rows = np.flatnonzero(named_B)
    found_B = np.zeros(len(targets_B))
    found_B[rows] = probabilities_BK[rows, targets_B[rows]]
    named_B &= ~np.isnan(found_B)
    found_B[~named_B] = 0
    ahead_BK = probabilities_BK > found_B[:, None]
    ties_B = np.count_nonzero(probabilities_BK == found_B[:, None], axis=1)
    for row in np.flatnonzero((ties_B > 1) & named_B):
        before = probabilities_BK[row, : targets_B[row]]
        ahead_BK[row, : targets_B[row]] |= before == found_B[row]
    place_B = np.count_nonzero(ahead_BK, axis=1).astype(np.int64)
    before_B = np.multiply(probabilities_BK, ahead_BK).sum(axis=1, dtype=np.float64)
    rest_B = _rest(probabilities_BK)
    ahead_B = named_B & (rest_B > found_B)
    place_B += ahead_B
    before_B += np.where(ahead_B, rest_B, 0)
    before_B[~named_B], place_B[~named_B] = 1, classes
    return Truth(found_B, before_B, place_B, np.where(named_B, targets_B, -1).astype(np.int64))


def uniforms(keys: Iterable[object], seed: int = 0) -> NDArray[np.float64]:
    """One number from [0, 1) per key, by a hash of its text and the seed.

    So a specimen's set depends neither on the others nor on the size of the blocks. Keys are those of the
    specimens, or their row numbers.
    """
    prefix = f"{seed}\0"
    digests = (hashlib.blake2b(f"{prefix}{key}".encode(), digest_size=8).digest() for key in keys)
    drawn_B = np.frombuffer(b"".join(digests), "<u8")
    return (drawn_B >> np.uint64(11)).astype(np.float64) * 2.0**-53  # 53 bits, so that none rounds to 1


def prior(counts_K: Ints) -> NDArray[np.float64]:
    """Share of each class among records, for `pas`; each counts half a record more, so that none is 0."""
    more_K = np.asarray(counts_K, np.float64) + 0.5
    return more_K / float(more_K.sum())


def frequency_bins(counts_K: Ints, bounds: Sequence[int] = (20, 100)) -> NDArray[np.int64]:
    """Bin of each class by its training records, for `mondrian`: 0 for the rarest.

    The default bounds are those of long-tailed recognition (Liu et al. 2019): fewer than 20, 20 to 100, more.

    >>> frequency_bins(np.array([3, 19, 20, 100, 101])).tolist()
    [0, 0, 1, 1, 2]
    """
    edges = np.array([bounds[0], *(bound + 1 for bound in bounds[1:])])
    return np.searchsorted(edges, counts_K, side="right").astype(np.int64)


def least_records(error: float) -> int:
    """Calibration records without which a set is every class: 1/error - 1, rounded up.

    >>> least_records(0.1), least_records(0.05)
    (9, 19)
    """
    return math.ceil(1 / error - 1 - 1e-9)


def calibrate(
    method: str,
    truth: Truth,
    *,
    error: float,
    prior_K: Floats | None = None,
    bin_K: Ints | None = None,
    uniform_N: Floats | None = None,
) -> Calibrated:
    """The threshold of a method, so that the true class is in a specimen's set with probability 1 - error.

    Records whose true class the model cannot name count: no set covers it, so the others must be covered more
    often. `mondrian` promises nothing for them and leaves them out. Bins with too few records are joined with
    one another and, while that is too few, with the smallest other bin; the warnings say so.

    Args:
        method: One of METHODS.
        truth: The calibration records.
        error: Between 0 and 1.
        prior_K: Share of each class among specimens, above 0; for `pas`, see `prior`.
        bin_K: Number of each class's bin; for `mondrian`, see `frequency_bins`.
        uniform_N: One number from [0, 1) per record, for `aps` and `raps`; None: `uniforms` of the rows.

    Raises:
        RequestError: an unknown method, an error out of range, or a method without what it needs.
    """
    if method not in METHODS:
        raise unknown("method of prediction sets", method, METHODS)
    if not 0 < error < 1:
        raise RequestError(f"the coverage of prediction sets must lie between 0 and 1, not {1 - error:g}")
    if method == "pas" and (prior_K is None or not np.all(np.asarray(prior_K) > 0)):
        raise RequestError("pas needs the share of each taxon among specimens, above 0")
    if method == "mondrian" and bin_K is None:
        raise RequestError("mondrian needs the bin of each taxon")
    n = truth.class_N.size
    if uniform_N is None and method in ("aps", "raps"):
        uniform_N = uniforms(range(n))
    kept_K = None if method != "pas" or prior_K is None else np.asarray(prior_K, np.float64)
    scores_N = _truth_scores(method, truth, kept_K, uniform_N)
    warnings = _warnings(truth, error, every=method != "mondrian")
    if method != "mondrian" or bin_K is None:
        found = _threshold(scores_N, error)
        return Calibrated(method, error, n, found, prior_K=kept_K, warnings=tuple(warnings))
    n = int(np.count_nonzero(truth.class_N >= 0))
    bins = _bins(scores_N, truth.class_N, np.asarray(bin_K), error)
    by_number = {b.number: b.threshold for b in bins}
    return Calibrated(
        method,
        error,
        n,
        _threshold(scores_N[truth.class_N >= 0], error),
        threshold_K=np.array([by_number[number] for number in np.asarray(bin_K).tolist()]),
        bins=bins,
        warnings=tuple(warnings + _bin_warnings(bins, error)),
    )


def sets(
    calibrated: Calibrated,
    probabilities_BK: Floats,
    uniform_B: Floats | None = None,
    *,
    never_empty: bool = False,
) -> Bools:
    """The classes that each specimen may be, shape B × K. No row is sorted as a whole.

    Args:
        calibrated: From `calibrate`.
        probabilities_BK: Made as those of the calibration records. A row of NaN has an empty set.
        uniform_B: One number from [0, 1) per specimen, for `aps` and `raps`: `uniforms` of the keys.
        never_empty: Put the class with the lowest score into a set that would be empty. Coverage does not
            fall by this; without it an empty set says that no class fits as well as the asked coverage needs.

    Raises:
        ValueError: `aps` or `raps` without the numbers.
    """
    if calibrated.method in ("aps", "raps"):
        if uniform_B is None:
            raise ValueError(f"{calibrated.method} needs one uniform number per specimen")
        rest_B = _rest(probabilities_BK)
        whole_BK = np.column_stack([probabilities_BK, rest_B]) if rest_B.any() else probabilities_BK
        found_BK = _cumulated(calibrated, whole_BK, np.asarray(uniform_B, np.float64))
        found_BK = found_BK[:, : probabilities_BK.shape[1]]
        fit_BK = probabilities_BK
    else:
        fit_BK = np.asarray(probabilities_BK)
        if calibrated.prior_K is not None:
            fit_BK = np.divide(probabilities_BK, calibrated.prior_K, dtype=np.float64)
            found_BK = -fit_BK <= calibrated.threshold
        else:
            limit = calibrated.threshold if calibrated.threshold_K is None else calibrated.threshold_K
            found_BK = np.subtract(1, probabilities_BK, dtype=np.float64) <= limit
    if never_empty:
        rows = np.flatnonzero(~found_BK.any(axis=1) & ~_absent(probabilities_BK))
        found_BK[rows, fit_BK[rows].argmax(axis=1)] = True
    return found_BK


def contains(sets_BK: Bools, targets_B: Ints) -> Bools:
    """Whether the true class is in the set; never where it is none of 0 to K - 1."""
    rows = np.flatnonzero((targets_B >= 0) & (targets_B < sets_BK.shape[1]))
    found_B = np.zeros(len(targets_B), bool)
    found_B[rows] = sets_BK[rows, targets_B[rows]]
    return found_B


def macro_coverage(covered_N: Bools, targets_N: Ints) -> float:
    """Mean over the true classes of the share of their specimens that are covered; NaN without specimens.

    A target of -1 is unlabelled and left out. A class that the model cannot name counts 0 if it has a number
    of its own, K or more.
    """
    labelled_N = targets_N >= 0
    support_C = np.bincount(targets_N[labelled_N])
    covered_C = np.bincount(targets_N[labelled_N], covered_N[labelled_N])
    present_C = support_C > 0
    return float(np.mean(covered_C[present_C] / support_C[present_C])) if present_C.any() else math.nan


def covering_node(taxonomy: Taxonomy, sets_BG: Bools, nodes_G: Ints | None = None) -> NDArray[np.int32]:
    """The smallest taxon that holds a whole set: it is right whenever the set covers the true class.

    Args:
        taxonomy: The tree.
        sets_BG: Sets of leaf taxa, or of `nodes_G`.
        nodes_G: Nodes that the columns stand for, ascending and none above another (those of one rank, say);
            None: the leaves.

    Returns:
        Node numbers: 0, the root, where only the whole tree holds the set, -1 for an empty set. Never a
        placeholder.
    """
    nodes_G = taxonomy.leaves_L if nodes_G is None else np.asarray(nodes_G)
    full_B = sets_BG.any(axis=1)
    first_B = nodes_G[sets_BG.argmax(axis=1)] if nodes_G.size else np.zeros(len(sets_BG), np.int32)
    last_B = nodes_G[nodes_G.size - 1 - sets_BG[:, ::-1].argmax(axis=1)] if nodes_G.size else first_B
    end_B = taxonomy.end_leaf_N[last_B]
    found_B = first_B.astype(np.int32)
    while True:  # as often as the tree is deep
        short_B = (taxonomy.end_leaf_N[found_B] < end_B) | ~taxonomy.predictable_N[found_B]
        short_B &= found_B > 0
        if not short_B.any():
            break
        found_B[short_B] = taxonomy.parent_N[found_B[short_B]]
    found_B[~full_B] = -1
    return found_B


# -- thresholds


def _truth_scores(
    method: str, truth: Truth, prior_K: NDArray[np.float64] | None, uniform_N: Floats | None
) -> NDArray[np.float64]:
    """Scores of the true classes; inf where the model cannot name them."""
    known_N = truth.class_N >= 0
    if prior_K is not None:
        scores_N = -truth.probability_N / prior_K[np.maximum(truth.class_N, 0)]
    elif uniform_N is not None and method in ("aps", "raps"):
        scores_N = truth.before_N + (1 - uniform_N) * truth.probability_N + _penalty(method, truth.place_N)
    else:
        scores_N = 1 - truth.probability_N
    return np.where(known_N, scores_N, np.inf)


def _penalty(method: str, place: Ints) -> NDArray[np.float64]:
    return RAPS_PENALTY * np.maximum(0, place + 1 - RAPS_FREE) * (method == "raps")


def _threshold(scores_N: NDArray[np.float64], error: float) -> float:
    """The ceil((n + 1)(1 - error))-th smallest score; inf where there are too few."""
    place = math.ceil((scores_N.size + 1) * (1 - error) - 1e-9)  # 10 × 0.9 is 9, whatever the rounding
    return float(np.partition(scores_N, place - 1)[place - 1]) if place <= scores_N.size else math.inf


def _bins(scores_N: NDArray[np.float64], class_N: Ints, bin_K: Ints, error: float) -> tuple[Bin, ...]:
    """Thresholds of the bins, those with too few records joined."""
    of_N = np.where(class_N >= 0, bin_K[np.maximum(class_N, 0)], -1)
    counts = {int(number): int(np.count_nonzero(of_N == number)) for number in np.unique(bin_K)}
    least = least_records(error)
    by_size = sorted(counts, key=lambda number: (counts[number], number))
    joined = [number for number in by_size if counts[number] < least]
    others = by_size[len(joined) :]
    while joined and others and sum(counts[number] for number in joined) < least:
        joined.append(others.pop(0))
    parts = {number: (number,) for number in others} | dict.fromkeys(joined, tuple(sorted(joined)))
    thresholds = {part: _threshold(scores_N[np.isin(of_N, part)], error) for part in set(parts.values())}
    return tuple(Bin(number, counts[number], thresholds[parts[number]], parts[number]) for number in counts)


# -- warnings


def _warnings(truth: Truth, error: float, *, every: bool) -> list[str]:
    """What a promise over all specimens does not say, or rests on too little; `every`: unknown taxa count."""
    n, unnamed = truth.class_N.size, int(np.count_nonzero(truth.class_N < 0))
    used = n if every else n - unnamed
    least = least_records(error)
    made = []
    if used < least:
        made.append(
            f"{used:,} calibration records are too few for coverage {1 - error:g} (at least {least:,}): "
            "every taxon is in every set"
        )
    elif every and math.isinf(_threshold(np.where(truth.class_N < 0, np.inf, 0), error)):
        made.append(
            f"of {unnamed:,} of {n:,} calibration records the model cannot name the taxon: coverage "
            f"{1 - error:g} is out of reach, and every taxon is in every set"
        )
    elif unnamed:
        made.append(
            f"of {unnamed:,} of {n:,} calibration records the model cannot name the taxon: no set covers it"
            + ("" if every else ", and nothing is promised for specimens like them")
        )
    _, counts = np.unique(truth.class_N[truth.class_N >= 0], return_counts=True)
    if few := int(np.count_nonzero(counts < least)):
        made.append(
            f"{few:,} of {counts.size:,} taxa have fewer than {least:,} calibration records: what coverage "
            "they have by themselves cannot be promised"
        )
    return made


def _bin_warnings(bins: Sequence[Bin], error: float) -> list[str]:
    least = least_records(error)
    few = [b for b in bins if b.n < least]
    if not few:
        return []
    told = f"{len(few):,} of {len(bins):,} bins of taxa have fewer than {least:,} calibration records"
    if math.isinf(few[0].threshold):
        return [f"{told}, and so have all together: every taxon is in every set"]
    together = [b.n for b in bins if b.number in few[0].joined]
    return [
        f"{told}: the promise holds for {len(together):,} bins together ({sum(together):,} records), "
        "not in each"
    ]


# -- sets of cumulated probabilities


def _cumulated(calibrated: Calibrated, probabilities_BK: Floats, uniform_B: NDArray[np.float64]) -> Bools:
    """Sets of `aps` and `raps`: the most probable classes of a row, as many as do not score too high.

    The scores do not fall along the descending order. So the classes above a bound on the probability, at
    most 1/bound of a row, are enough where one of them scores too high; only the other rows need a lower
    bound. Of the classes that are looked at only the probabilities are sorted.
    """
    going_B = np.flatnonzero(~_absent(probabilities_BK))
    size_B = np.zeros(len(probabilities_BK), np.int64)
    least_B = np.full(len(probabilities_BK), np.inf)  # probability of the last class that is in
    if math.isinf(calibrated.threshold):
        least_B[going_B], size_B[going_B] = 0, probabilities_BK.shape[1]
        going_B = going_B[:0]
    classes, bound = probabilities_BK.shape[1], 1 / 16
    while going_B.size:
        last = bound < _LEAST_BOUND
        part_BK = probabilities_BK[going_B] if going_B.size < len(probabilities_BK) else probabilities_BK
        looked_BK = part_BK >= 0 if last else part_BK > bound
        places = np.flatnonzero(looked_BK)  # np.nonzero in two dimensions takes 15 times as long
        rows = places // classes
        seen_B = np.bincount(rows, minlength=going_B.size)
        place_M = np.arange(max(1, seen_B.max()))
        values_BM = np.zeros((going_B.size, place_M.size))
        values_BM[place_M < seen_B[:, None]] = part_BK.ravel()[places]
        values_BM = -np.sort(-values_BM, axis=1)
        scores_BM = np.cumsum(values_BM, axis=1) - uniform_B[going_B, None] * values_BM
        scores_BM += _penalty(calibrated.method, place_M)
        inside_BM = (scores_BM <= calibrated.threshold + _SLACK) & (place_M < seen_B[:, None])
        inside_B = np.count_nonzero(inside_BM, axis=1)
        done_B = (inside_B < seen_B) | last
        size_B[going_B[done_B]] = inside_B[done_B]
        some_B = done_B & (inside_B > 0)
        least_B[going_B[some_B]] = values_BM[some_B, inside_B[some_B] - 1]
        going_B, bound = going_B[~done_B], bound / 4
    found_BK = probabilities_BK >= least_B[:, None].astype(probabilities_BK.dtype)
    for row in np.flatnonzero(np.count_nonzero(found_BK, axis=1) > size_B):  # ties: the first classes are in
        tied = np.flatnonzero(probabilities_BK[row] == least_B[row])
        found_BK[row, tied[size_B[row] - np.count_nonzero(found_BK[row]) :]] = False
    return found_BK


def _rest(probabilities_BK: Floats) -> NDArray[np.float64]:
    """What each row falls short of 1; 0 for a row of NaN."""
    rest_B = 1 - probabilities_BK.sum(axis=1, dtype=np.float64)
    return np.where(rest_B > _REST, rest_B, 0.0)


def _absent(probabilities_BK: Floats) -> Bools:
    """Rows of NaN."""
    absent_B: Bools = np.isnan(probabilities_BK[:, 0])
    return absent_B
