"""How far a value may be off by chance."""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

Z95: Final = 1.959963984540054
"""The 97.5 % point of the standard normal distribution."""
RESAMPLES: Final = 1000

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_CELLS = 4_000_000  # numbers drawn at a time, so that memory does not grow with classes or resamples


def wilson(hits: Ints | int, n: Ints | int, *, z: float = Z95) -> tuple[Floats, Floats]:
    """Wilson's score interval of a proportion (Wilson 1927): lower and upper end; NaN where n is 0."""
    hits_, n_ = np.asarray(hits, np.float64), np.asarray(n, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = hits_ / n_
        centre = (share + z * z / (2 * n_)) / (1 + z * z / n_)
        half = z / (1 + z * z / n_) * np.sqrt(share * (1 - share) / n_ + z * z / (4 * n_ * n_))
        # at 0 and n the formula gives 0 and 1 but for rounding
        low = np.where(hits_ == 0, np.where(n_ > 0, 0.0, np.nan), centre - half)
        high = np.where(hits_ == n_, np.where(n_ > 0, 1.0, np.nan), centre + half)
    return low, high


def bootstrap(
    statistic: Callable[[Ints], Floats],
    classes_M: Ints,
    counts_M: Ints,
    generator: np.random.Generator,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> tuple[Floats, Floats]:
    """Percentile intervals of statistics under resampling of specimens within each true class.

    Resampling a class of n with replacement draws how often each of its outcomes occurs from a multinomial,
    so specimens need not be touched. A class of one specimen never varies: with many such classes the
    interval is too narrow, and it says nothing of classes that the sample does not hold.

    Args:
        statistic: From drawn counts of shape R × M, a column for each cell, to values of shape R × S.
        classes_M: True class of each cell, a cell being a class and one of its outcomes.
        counts_M: Specimens of each cell.
        generator: Source of the draws.
        resamples: R in all; the statistic gets them in parts.
        level: Coverage.

    Returns:
        Lower and upper ends, of shape S.
    """
    totals_C = np.bincount(classes_M, counts_M).astype(np.int64)
    order = np.lexsort((-counts_M, classes_M))  # common outcomes first: few specimens are left for the others
    place_M = np.arange(order.size) - np.searchsorted(classes_M[order], classes_M[order])
    rounds = [order[place_M == place] for place in range(int(place_M.max()) + 1)]
    step = max(1, _CELLS // (order.size + totals_C.size))
    values = []
    for start in range(0, resamples, step):
        left_RC = np.tile(totals_C, (min(step, resamples - start), 1))  # specimens still without an outcome
        drawn_RM = np.empty((left_RC.shape[0], order.size), np.int64)
        weights_C = totals_C.copy()
        for cells in rounds:  # a multinomial as binomials, each of what the ones before it have left
            classes, counts = classes_M[cells], counts_M[cells]
            shares = counts / np.maximum(weights_C[classes], 1)
            drawn_RM[:, cells] = generator.binomial(left_RC[:, classes], shares)
            left_RC[:, classes] -= drawn_RM[:, cells]
            weights_C[classes] -= counts
        values.append(statistic(drawn_RM))
    low, high = np.quantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
