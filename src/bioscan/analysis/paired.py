"""Two models on the same specimens: which is right where the other is wrong, and how sure a difference is.

Specimens are the sample, not seeds: three seeds say almost nothing about a deviation, and a test on them is a
test in name only. What is said here holds for the trained models at hand, on specimens like these; how much
another training would differ is what the deviation over seeds shows.

N specimens, C classes, G groups, R resamples.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bioscan.analysis.intervals import RESAMPLES, binomial_at_most, bootstrap, draws

Numbers = NDArray[np.floating[Any] | np.integer[Any] | np.bool_]
Classes = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]

_CELLS = 4_000_000
"""Numbers worked on at a time."""


class McNemar(NamedTuple):
    """Specimens on which two models differ, and the probability of a split at least as uneven by chance."""

    only_a: int
    """Right by the first alone."""
    only_b: int
    p: float


class Difference(NamedTuple):
    """A value of the first model less that of the second, and its interval."""

    value: float
    low: float
    high: float


def mcnemar(right_a_N: NDArray[np.bool_], right_b_N: NDArray[np.bool_]) -> McNemar:
    """McNemar's test whether two models are right equally often, exact and two-sided.

    Where only one of them is right, it is either with even chances if they are equally good: p is twice the
    lower tail of the binomial distribution, at most 1. The exact test is cautious: it rejects an equality
    that holds less often than asked. 1 where they never differ.

    >>> mcnemar(np.array([True] * 5 + [False]), np.array([False] * 5 + [False]))
    McNemar(only_a=5, only_b=0, p=0.0625)
    """
    only_a, only_b = int((right_a_N & ~right_b_N).sum()), int((right_b_N & ~right_a_N).sum())
    tail = binomial_at_most(min(only_a, only_b), only_a + only_b, 0.5)
    return McNemar(only_a, only_b, min(1.0, 2 * tail))


def paired_bootstrap(
    right_a_N: Numbers,
    right_b_N: Numbers,
    classes_N: Classes,
    generator: np.random.Generator,
    *,
    groups_N: Classes | None = None,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> dict[str, Difference]:
    """How much more often the first model is right: `micro`, over specimens, `macro`, the mean over classes.

    Both models' answers to a specimen are drawn together, so what makes a specimen hard for both cancels out.
    Without groups specimens are drawn within each true class, as in `intervals.bootstrap`: of classes with
    few specimens the macro interval is too narrow. With groups whole groups are drawn, and the macro value is
    the mean over the classes that are drawn.

    Args:
        right_a_N: Whether the first is right, or how often, 0 to 1: the mean over its seeds.
        right_b_N: The same for the second.
        classes_N: True classes, from 0.
        generator: Source of the draws.
        groups_N: Number of each specimen's group, from 0; for specimens that resemble each other.
        resamples: How many.
        level: Coverage.

    Raises:
        ValueError: no specimens.
    """
    if not classes_N.size:
        raise ValueError("no specimens to compare")
    difference_N = np.asarray(right_a_N, np.float64) - np.asarray(right_b_N, np.float64)
    size_C = np.bincount(classes_N)
    there = np.flatnonzero(size_C)
    by_class = np.bincount(classes_N, difference_N)[there] / size_C[there]
    found = {"micro": float(difference_N.mean()), "macro": float(by_class.mean())}
    if groups_N is None:
        low, high = _within_classes(difference_N, classes_N, generator, resamples, level)
    else:
        low, high = _whole_groups(difference_N, classes_N, groups_N, generator, resamples, level)
    return {
        name: Difference(value, float(low[place]), float(high[place]))
        for place, (name, value) in enumerate(found.items())
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979): the probability of any false rejection among all stays below the level.

    The smallest of m is multiplied by m, the next by m − 1, …; none falls below one before it, none above 1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values, np.float64)[order] * factors))
    found = np.empty(len(p_values))
    found[order] = corrected
    return [float(value) for value in found]


def _within_classes(
    difference_N: Floats, classes_N: Classes, generator: np.random.Generator, resamples: int, level: float
) -> tuple[Floats, Floats]:
    """Ends for the micro and the macro value. A class and a difference are a cell: few, as both are few."""
    values, of_N = np.unique(difference_N, return_inverse=True)
    cells, counts_M = np.unique(classes_N.astype(np.int64) * values.size + of_N, return_counts=True)
    classes_M, value_M = cells // values.size, values[cells % values.size]
    size_C = np.bincount(classes_M, counts_M)
    weights_M2 = np.stack(
        [value_M / classes_N.size, value_M / size_C[classes_M] / np.count_nonzero(size_C)], axis=1
    )
    return bootstrap(
        lambda drawn_RM: drawn_RM @ weights_M2,
        classes_M,
        counts_M,
        generator,
        resamples=resamples,
        level=level,
    )


def _whole_groups(
    difference_N: Floats,
    classes_N: Classes,
    groups_N: Classes,
    generator: np.random.Generator,
    resamples: int,
    level: float,
) -> tuple[Floats, Floats]:
    """Ends for the micro and the macro value. The specimens of a class and a group are a cell."""
    num_groups = int(groups_N.max()) + 1
    cells, of_N = np.unique(classes_N.astype(np.int64) * num_groups + groups_N, return_inverse=True)
    sum_M, size_M = np.bincount(of_N, difference_N), np.bincount(of_N).astype(np.float64)
    group_M, starts_C = cells % num_groups, np.unique(cells // num_groups, return_index=True)[1]
    found = []
    for drawn_RG in draws(np.bincount(groups_N).clip(max=1), generator, resamples):
        for rows in np.array_split(drawn_RG, -(-drawn_RG.shape[0] * cells.size // _CELLS)):
            drawn_RM = rows[:, group_M]
            sum_RC = np.add.reduceat(drawn_RM * sum_M, starts_C, axis=1)
            size_RC = np.add.reduceat(drawn_RM * size_M, starts_C, axis=1)
            drawn_RC = size_RC > 0
            mean_RC = np.divide(sum_RC, size_RC, out=np.zeros_like(sum_RC), where=drawn_RC)
            micro_R = sum_RC.sum(axis=1) / size_RC.sum(axis=1)
            found.append(np.stack([micro_R, mean_RC.sum(axis=1) / drawn_RC.sum(axis=1)], axis=1))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
