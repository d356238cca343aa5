"""Which specimens an epoch sees, in what order, and the random numbers of each.

All of it follows from the seed, the epoch and the specimen alone, so that neither processes, nor loader
workers, nor the parts of a batch change anything. No torch here.

N: specimens, K: classes, E: specimens of the epoch, B: batch, D: draws.
"""

from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

Sampler = Literal["uniform", "class_balanced", "square_root", "repeat_factor"]

_CLASS_POWER: Final[dict[str, float]] = {"class_balanced": 0.0, "square_root": 0.5}
"""A class of n specimens is drawn in proportion to n to this power (1: as often as it occurs)."""

_DRAWS: Final = 1
"""Keeps the draws apart from the order, which has the same seed and epoch."""


def epoch_order(
    sampler: Sampler,
    classes_N: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    repeat_threshold: float = 1e-3,
) -> NDArray[np.int64]:
    """Numbers of the specimens in the order in which the epoch sees them, numbers_E.

    `uniform`: each once. `class_balanced` and `square_root`: as many as there are, drawn with replacement,
    each class equally often or by the root of its size (Mahajan et al. 2018). `repeat_factor`: each specimen
    max(1, sqrt(threshold / share of its class)) times in the mean, rounded up or down at random in each epoch
    (Gupta et al. 2019, LVIS); the number of specimens then differs a little between epochs.

    Args:
        sampler: One of the four.
        classes_N: What is balanced: the target of each specimen, any numbers. A specimen known to a higher
            rank only counts as one of its own node: all Diptera without a family are one class.
        seed: Of the run.
        epoch: From 0.
        repeat_threshold: Share below which a class is repeated.
    """
    generator = np.random.default_rng((seed, epoch))
    if sampler == "uniform":
        return generator.permutation(classes_N.size)
    class_N: NDArray[np.int64]
    _, class_N, size_K = np.unique(classes_N, return_inverse=True, return_counts=True)
    if sampler == "repeat_factor":
        factor_K = np.maximum(1, np.sqrt(repeat_threshold * classes_N.size / size_K))
        times_N = np.floor(factor_K[class_N] + generator.random(classes_N.size)).astype(np.int64)
        return generator.permutation(np.repeat(np.arange(classes_N.size), times_N))
    share_K = np.cumsum(size_K ** _CLASS_POWER[sampler])
    drawn_E = np.searchsorted(share_K / share_K[-1], generator.random(classes_N.size), side="right")
    # the specimens of a class are neighbours once sorted by class
    place_E = (generator.random(classes_N.size) * size_K[drawn_E]).astype(np.int64)
    by_class_N = np.argsort(class_N, kind="stable")
    numbers_E: NDArray[np.int64] = by_class_N[(np.cumsum(size_K) - size_K)[drawn_E] + place_E]
    return numbers_E


def expected_counts(
    sampler: Sampler, counts_K: NDArray[np.integer[Any]], *, repeat_threshold: float = 1e-3
) -> NDArray[np.float64]:
    """How many specimens of each class an epoch of `epoch_order` sees in the mean; 0 stays 0."""
    size_K = counts_K.astype(np.float64)
    total = size_K.sum()
    if sampler == "uniform" or not total:
        return size_K
    if sampler == "repeat_factor":
        repeated_K: NDArray[np.float64] = np.maximum(size_K, np.sqrt(repeat_threshold * total * size_K))
        return repeated_K
    share_K = np.where(size_K > 0, size_K ** _CLASS_POWER[sampler], 0)
    drawn_K: NDArray[np.float64] = total * share_K / share_K.sum()
    return drawn_K


def occurrences(numbers_E: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each specimen of an epoch's order came before in it.

    >>> occurrences(np.array([7, 3, 7, 7, 3])).tolist()
    [0, 0, 1, 2, 1]
    """
    by_number_E = np.argsort(numbers_E, kind="stable")
    sorted_E = numbers_E[by_number_E]
    place_E = np.arange(numbers_E.size)
    starts_E = np.r_[True, sorted_E[1:] != sorted_E[:-1]][: numbers_E.size]
    found_E = np.empty(numbers_E.size, np.int64)
    found_E[by_number_E] = place_E - np.maximum.accumulate(np.where(starts_E, place_E, 0))
    return found_E


def draws(
    seed: int,
    epoch: int,
    numbers_B: NDArray[np.int64],
    occurrence_B: NDArray[np.int64],
    *,
    num_draws: int,
) -> NDArray[np.float32]:
    """Uniform random numbers in [0, 1) for each specimen, B x D: what its augmentation follows from.

    A pure function: draw d of a specimen depends on nothing but seed, epoch, its number, its occurrence in
    the epoch and d. Each specimen has a SplitMix64 stream (Steele et al. 2014) of its own, whose state is the
    hash of these.

    Args:
        seed: Of the run.
        epoch: From 0.
        numbers_B: Of the specimens in their dataset.
        occurrence_B: From `occurrences`; 0 where each specimen is seen once.
        num_draws: D.
    """
    (key,) = np.random.SeedSequence((seed, epoch, _DRAWS)).generate_state(1, np.uint64)
    state_B = _mixed(_mixed(key + _step(numbers_B)) + _step(occurrence_B))
    bits_BD = _mixed(state_B[:, None] + _step(np.arange(num_draws)))
    return (bits_BD >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _step(numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Distance from a stream's state to its so-manieth value."""
    return (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
