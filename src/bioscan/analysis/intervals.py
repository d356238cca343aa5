"""How far a value may be off by chance."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

Z95: Final = 1.959963984540054
"""The 97.5 % point of the standard normal distribution."""
RESAMPLES: Final = 1000

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Numbers = NDArray[np.floating[Any] | np.integer[Any] | np.bool_]

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


def bootstrap_ratio(
    parts_NS: Numbers,
    wholes_NS: Numbers,
    generator: np.random.Generator,
    *,
    groups_N: Numbers | None = None,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> tuple[Floats, Floats]:
    """Percentile intervals of ratios of sums, sum of parts / sum of wholes, under resampling of specimens.

    All specimens are one sample, unlike in `bootstrap`. With groups whole groups are drawn (the cluster
    bootstrap), for specimens that resemble each other: of few groups (below some twenty) the intervals are
    too narrow. Specimens with equal values are drawn together, so the time grows with the values that differ.

    Args:
        parts_NS: A column for each of S ratios.
        wholes_NS: Of the same shape; 0 beside a part of 0: the specimen does not count there.
        generator: Source of the draws.
        groups_N: Number of each specimen's group, from 0.
        resamples: How many.
        level: Coverage.

    Returns:
        Lower and upper ends, of shape S. NaN where the wholes are 0, and resamples in which they are 0 are
        left out.
    """
    num = parts_NS.shape[1]
    values_N2S = np.concatenate([parts_NS, wholes_NS], axis=1).astype(np.float64)
    if groups_N is not None:
        values_N2S = np.stack([np.bincount(groups_N, column) for column in values_N2S.T], axis=1)
    names = [f"{place}" for place in range(2 * num)]
    cells = (
        pl.from_numpy(values_N2S, schema=names).group_by(names, maintain_order=True).agg(pl.len().alias("n"))
    )
    values_M2S, counts_M = cells.select(names).to_numpy(), cells["n"].to_numpy()
    sums = [drawn_RM @ values_M2S for drawn_RM in draws(counts_M, generator, resamples)]
    sums_R2S = np.concatenate(sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios_RS = sums_R2S[:, :num] / sums_R2S[:, num:]
    low_S, high_S = np.full((2, num), np.nan)
    for place, ratios_R in enumerate(ratios_RS.T):
        counted = ratios_R[sums_R2S[:, num + place] != 0]
        if counted.size:
            low_S[place], high_S[place] = np.quantile(counted, [(1 - level) / 2, (1 + level) / 2])
    return low_S, high_S


def draws(counts_M: Ints, generator: np.random.Generator, resamples: int) -> Iterator[Floats]:
    """How often each of M kinds occurs in resamples, with replacement, of all specimens: shape R × M.

    The resamples come in parts, so that memory is bounded.

    Args:
        counts_M: Specimens of each kind.
        generator: Source of the draws.
        resamples: R in all parts together.
    """
    n, kinds = int(counts_M.sum()), counts_M.size
    step = max(1, _CELLS // max(1, kinds))
    kind_N = np.repeat(np.arange(kinds), counts_M)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        if 30 * kinds < n:  # a binomial a kind costs about as much as thirty specimens drawn one by one
            yield generator.multinomial(n, counts_M / n, size=rows).astype(np.float64)
        else:
            drawn_RM = np.empty((rows, kinds))
            for drawn_M in drawn_RM:
                drawn_M[:] = np.bincount(kind_N[generator.integers(0, n, n)], minlength=kinds)
            yield drawn_RM


def binomial_at_most(k: int, n: int, p: float) -> float:
    """Probability of k or fewer successes in n trials of probability p: the exact lower tail.

    The terms are summed by their logarithms, so that none vanishes: the relative error is below 1e-9 for ten
    thousand trials and 1e-6 for a million, however small the tail. 0 for k below 0, 1 for k of n or more.

    >>> round(binomial_at_most(1, 3, 0.5), 12)
    0.5
    """
    if k < 0:
        return 0.0
    if k >= n or p <= 0:
        return 1.0
    if p >= 1:
        return 0.0
    places = np.arange(1, k + 1)
    steps = np.log((n + 1 - places) / places) + (np.log(p) - np.log1p(-p))
    logs = n * np.log1p(-p) + np.concatenate([[0.0], np.cumsum(steps)])
    top = logs.max()
    return min(1.0, float(np.exp(top + np.log(np.exp(logs - top).sum()))))
