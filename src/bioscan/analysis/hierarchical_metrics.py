"""How right answers are as paths down the taxonomy, with labels that may end anywhere.

A truth and an answer are names at R ranks, root down. Only ranks at which the truth has a name can be
checked: what an answer names elsewhere, most often below the label, is unknown, neither right nor wrong, and
is cut off before anything is counted. A checked name is right if it equals the truth's and so does every
checked name above it.

In terms of ancestor sets (the taxa on the path from the root, itself included, root left out): `depth_true`
is the size of the truth's set, `depth_named` that of the answer's, `common` that of what they share.

N specimens, R ranks, M lineages, T thresholds. Names are numbers, the same for truth and answers; -1 is no
name. A name that stands for several taxa may have one number: the names above tell them apart.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

Codes = NDArray[np.integer[Any]]
Flags = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

METRICS: Final = {
    "hierarchical_precision": "share of the checked names that are right",
    "hierarchical_recall": "share of the true names that are given",
    "hierarchical_f": "harmonic mean of hierarchical precision and recall",
    "tree_distance": "ranks from the answer up to the last taxon shared with the truth, and down again",
    "lca_height": "ranks from the true taxon up to the last one that it shares with the answer",
    "mistake_severity": "the same over the wrong answers alone",
    "correct_or_ancestor": "share of the answers without a wrong name: the true taxon or one above it",
    "exact": "share of the answers that are right down to the true taxon",
    "checked_depth": "names of an answer that could be checked",
}
"""Metric -> what it says. The first three are of Kiritchenko et al. 2006, summed over specimens before the
division; the severity of mistakes is of Bertinetto et al. 2020, who take the mean over errors. Alone it
rewards easy mistakes, so `lca_height`, over all, stands beside it."""


@dataclass(frozen=True)
class Paths:
    """Answers beside the truth, per specimen. Depths count names, the root not among them."""

    known_NR: Flags
    """The truth has a name: the rank can be checked."""
    right_NR: Flags
    """Checked, right, and no checked name above is wrong."""
    wrong_NR: Flags
    """Checked, and wrong itself or below a wrong name."""
    depth_true_N: Ints
    """Names of the truth; 0: nothing can be checked, and the specimen counts in no metric."""
    depth_named_N: Ints
    """Names of the answer that can be checked."""
    depth_given_N: Ints
    """Names of the answer, checked or not."""
    common_N: Ints
    """Right names."""

    @property
    def is_wrong_N(self) -> Flags:
        """The answer has a wrong name."""
        return self.common_N < self.depth_named_N

    @property
    def parted_N(self) -> Ints:
        """Place of the rank at which the answer leaves the true path; -1 where it never does."""
        return np.where(self.is_wrong_N, self.wrong_NR.argmax(axis=1), -1)

    @property
    def distance_N(self) -> Ints:
        """Steps from the answer to the true taxon, along the tree."""
        return self.depth_true_N + self.depth_named_N - 2 * self.common_N

    @property
    def height_N(self) -> Ints:
        """Steps from the true taxon up to the last common one."""
        return self.depth_true_N - self.common_N


def compare_paths(true_NR: Codes, named_NR: Codes) -> Paths:
    """Answers beside the truth.

    An answer may leave out ranks, as a taxonomy without tribes does: what it says below them is compared all
    the same, but a name that the truth has and the answer has not is missing there.

    Args:
        true_NR: True names, root down.
        named_NR: Names of the answers; a row of -1: no answer.
    """
    known_NR, given_NR = true_NR >= 0, named_NR >= 0
    checked_NR = known_NR & given_NR
    wrong_NR = np.logical_or.accumulate(checked_NR & (true_NR != named_NR), axis=1) & checked_NR
    right_NR = checked_NR & ~wrong_NR
    return Paths(
        known_NR=known_NR,
        right_NR=right_NR,
        wrong_NR=wrong_NR,
        depth_true_N=known_NR.sum(axis=1),
        depth_named_N=checked_NR.sum(axis=1),
        depth_given_N=given_NR.sum(axis=1),
        common_N=right_NR.sum(axis=1),
    )


def terms(paths: Paths) -> dict[str, tuple[Floats, Floats]]:
    """Metric of `METRICS` -> part and whole of each specimen; the metric is sum of parts / sum of wholes.

    `intervals.bootstrap_ratio` gives intervals of them all at once. An empty answer is no wrong one: it is
    among `correct_or_ancestor`, and costs recall, distance and height.
    """
    true_N, named_N, common_N = paths.depth_true_N, paths.depth_named_N, paths.common_N
    checkable_N, is_wrong_N = true_N > 0, paths.is_wrong_N
    parts = {
        "hierarchical_precision": (common_N, named_N),
        "hierarchical_recall": (common_N, true_N),
        "hierarchical_f": (2 * common_N, named_N + true_N),
        "tree_distance": (paths.distance_N, checkable_N),
        "lca_height": (paths.height_N, checkable_N),
        "mistake_severity": (paths.height_N * is_wrong_N, is_wrong_N),
        "correct_or_ancestor": (checkable_N & ~is_wrong_N, checkable_N),
        "exact": (checkable_N & (common_N == true_N), checkable_N),
        "checked_depth": (named_N, checkable_N),
    }
    return {
        name: (part.astype(np.float64), whole.astype(np.float64)) for name, (part, whole) in parts.items()
    }


def values(paths: Paths) -> dict[str, float]:
    """Metric of `METRICS` -> its value; NaN where no specimen counts."""
    return {name: _ratio(part.sum(), whole.sum()) for name, (part, whole) in terms(paths).items()}


def is_one_path(named_NR: Codes, lineages_MR: Codes) -> Flags:
    """Whether the names of each answer stand together in a lineage: its consistency.

    Ranks without a name fit any lineage; names that no lineage has at their rank are passed over. The mean
    over specimens is the share of consistent answers; per-rank classifiers that do not know of each other
    fall short of 1.

    Args:
        named_NR: Names of the answers.
        lineages_MR: Paths of known taxa: of the model's leaves, or of the catalogue.
    """
    ranks = range(named_NR.shape[1])
    names = [f"{rank}" for rank in ranks]
    checked_NR = np.stack([np.isin(named_NR[:, r], lineages_MR[:, r]) for r in ranks], axis=1) & (
        named_NR >= 0
    )
    rows = pl.from_numpy(np.where(checked_NR, named_NR, -1), schema=names).with_row_index("row")
    lineages = pl.from_numpy(np.asarray(lineages_MR, np.int64), schema=names)
    found_N = np.ones(len(named_NR), bool)
    pattern_N = checked_NR @ (1 << np.arange(named_NR.shape[1]))
    for pattern in np.unique(pattern_N[pattern_N > 0]):  # answers that name the same ranks
        there = [name for rank, name in enumerate(names) if pattern >> rank & 1]
        own = rows.filter(pl.Series(pattern_N == pattern))
        alone = own.join(lineages.select(there).unique(), on=there, how="anti")["row"]
        found_N[alone.to_numpy()] = False
    return found_N


def information(named_NR: Codes, lineages_MR: Codes) -> Floats:
    """What each name says, in bits: log2 of M over how many of the lineages have it (Deng et al. 2012).

    0 for a name that all lineages have, log2 M for one that a single lineage has; NaN where there is no name,
    or no lineage has it.
    """
    bits_NR = np.full(named_NR.shape, np.nan)
    for named_N, lineages_M, bits_N in zip(named_NR.T, lineages_MR.T, bits_NR.T, strict=True):
        codes, counts = np.unique(lineages_M[lineages_M >= 0], return_counts=True)
        found_N = (named_N >= 0) & np.isin(named_N, codes)
        bits_N[found_N] = np.log2(len(lineages_MR) / counts[np.searchsorted(codes, named_N[found_N])])
    return bits_NR


def operating_curve(
    probability_NR: NDArray[np.floating[Any]],
    true_NR: Codes,
    named_NR: Codes,
    *,
    thresholds: NDArray[np.floating[Any]] | None = None,
    bits_NR: Floats | None = None,
    points: int = 200,
) -> dict[str, NDArray[Any]]:
    """What is right and what is said when each answer stops at its deepest name that reaches a threshold.

    A name is given if its probability and that of every name above it reach the threshold, so that no path
    has a hole; raising the threshold only shortens answers, and errors do not grow. The curve of Valmadre
    2022, over specimens that can be checked (`depth_true` above 0), for labels that end anywhere.

    Args:
        probability_NR: Of each name; NaN counts as 0, and is not looked at where there is no name.
        true_NR: True names, root down.
        named_NR: The whole answers.
        thresholds: Where to look; None: 0, and probabilities at which the curve changes, some `points` of
            them with about as many changes between one and the next.
        bits_NR: What each name says, from `information`; NaN as the name above.
        points: See `thresholds`.

    Returns:
        Columns of length T, thresholds ascending: `threshold`; `error` and `correct_or_ancestor` (share of
        specimens with and without a wrong name); `hierarchical_precision` (NaN where nothing is named),
        `hierarchical_recall`; `checked_depth` and `given_depth` (names a specimen, those that can be checked,
        and all); with bits, `information` (bits of right answers a specimen, 0 for a wrong one). And
        `deepest_TR`: share of specimens whose deepest name is at the rank; the rest have none.
    """
    paths = compare_paths(true_NR, named_NR)
    rows = np.flatnonzero(paths.depth_true_N > 0)
    given_NR = named_NR[rows] >= 0
    shown_NR = np.nan_to_num(np.asarray(probability_NR, np.float64)[rows], nan=0.0)
    reached_NR = np.minimum.accumulate(np.where(given_NR, shown_NR, np.inf), axis=1)
    wanted = _changes(reached_NR[given_NR], points) if thresholds is None else thresholds
    found_T = np.sort(np.asarray(wanted, np.float64))
    level_NR = np.searchsorted(found_T, reached_NR, side="right")  # of so many thresholds the name is given
    longer_NR = np.zeros_like(level_NR)  # of so many a deeper one is
    for rank in reversed(range(given_NR.shape[1] - 1)):
        below = rank + 1
        longer_NR[:, rank] = np.where(given_NR[:, below], level_NR[:, below], longer_NR[:, below])

    def sums(weights_X: NDArray[Any], levels_X: NDArray[np.intp]) -> Floats:
        """Of the weights that are there at each threshold."""
        at_level = np.bincount(levels_X.ravel(), weights_X.ravel(), minlength=found_T.size + 1)
        return np.cumsum(at_level[::-1], dtype=np.float64)[::-1][1:]

    right_NR, wrong_NR = paths.right_NR[rows], paths.wrong_NR[rows]
    first_NR = wrong_NR & (np.cumsum(wrong_NR, axis=1) == 1)
    right_T, checked_T = sums(right_NR, level_NR), sums(right_NR | wrong_NR, level_NR)
    true, specimens = max(1, int(paths.depth_true_N.sum())), max(1, rows.size)
    error_T = sums(first_NR, level_NR) / specimens
    deepest = [
        sums(given_N, level_N) - sums(given_N, longer_N)
        for given_N, level_N, longer_N in zip(given_NR.T, level_NR.T, longer_NR.T, strict=True)
    ]
    undefined_T = np.full(found_T.size, np.nan)
    curve: dict[str, NDArray[Any]] = {
        "threshold": found_T,
        "error": error_T,
        "correct_or_ancestor": 1 - error_T,
        "hierarchical_precision": np.divide(right_T, checked_T, out=undefined_T, where=checked_T > 0),
        "hierarchical_recall": right_T / true,
        "checked_depth": checked_T / specimens,
        "given_depth": sums(given_NR, level_NR) / specimens,
        "deepest_TR": np.stack(deepest, axis=1) / specimens,
    }
    if bits_NR is not None:
        curve["information"] = sums(_steps(bits_NR[rows], given_NR, first_NR), level_NR) / specimens
    return curve


def _steps(bits_NR: Floats, given_NR: Flags, first_NR: Flags) -> Floats:
    """By how much each name changes what the answer is worth: with the first wrong one all is lost."""
    worth_NR = np.where(given_NR & ~np.isnan(bits_NR), bits_NR, -np.inf)
    worth_NR = np.maximum(np.maximum.accumulate(worth_NR, axis=1), 0.0)
    lost_NR = np.logical_or.accumulate(first_NR, axis=1)
    return np.diff(np.where(lost_NR, 0.0, worth_NR), axis=1, prepend=0.0)


def _changes(reached_X: Floats, points: int) -> Floats:
    """0, and thresholds at which names fall away."""
    falling = np.sort(reached_X)
    if falling.size > points:
        falling = falling[np.linspace(0, falling.size - 1, points).round().astype(np.int64)]
    return np.unique(np.concatenate([[0.0], falling]))


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")
