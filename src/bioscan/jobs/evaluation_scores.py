"""What an evaluation takes from the probabilities of all taxa: top-k, average-k, Brier's score, likelihood,
classwise calibration, conformal prediction sets.

N specimens that count, V validation specimens, K classes of the model at the rank, rows B of a batch. The
scores file is gone through in batches, a few times; nothing of the size N × K is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.analysis import confidence, conformal, intervals, metrics
from bioscan.errors import DataError
from bioscan.jobs.evaluation_inputs import AtRank, Ints, complete, places

_AVERAGE_RULES: Final = ("average", "reference_average")

SETS_SCHEMA: Final[dict[str, Any]] = {
    "method": pl.String,
    "asked": pl.Float64,
    "threshold": pl.Float64,
    "calibration": pl.Int64,
    "groups": pl.Int64,
    "n": pl.Int64,
    "coverage": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "macro_coverage": pl.Float64,
    "mean_size": pl.Float64,
    "median_size": pl.Float64,
    "empty": pl.Int64,
    "warnings": pl.List(pl.String),
}
"""Columns of `Evaluation.sets`."""
SIZES_SCHEMA: Final[dict[str, Any]] = {"method": pl.String, "size": pl.Int64, "specimens": pl.Int64}
"""Columns of `Evaluation.set_sizes`."""


@dataclass(frozen=True)
class Threshold:
    """What the probability of a class must reach for average-k."""

    value: float
    validation: int
    """Validation specimens that it comes from."""
    mean_set_size: float
    """Classes that reach it per evaluated specimen: near k if the validation specimens are like them."""


@dataclass(frozen=True)
class Validation:
    """The labelled validation specimens inside the taxon that is evaluated."""

    keys: pl.Series
    targets_V: Ints
    """Class number; -1 where the model does not know the taxon."""
    calibrates_V: NDArray[np.bool_]
    """Those that prediction sets are calibrated on."""
    groups: int
    """Groups of the specimens that calibrate, that may resemble each other."""
    told: str
    """Which of them calibrate, and what was kept together."""


@dataclass(frozen=True)
class SetsWanted:
    """Prediction sets to make."""

    methods: tuple[str, ...]
    coverage: float
    counts_K: Ints | None
    """Training specimens of each class; None: not known."""
    bounds: tuple[int, int]
    """Of the frequency bins."""


@dataclass(frozen=True)
class FromScores:
    """What the probabilities of all taxa give."""

    right: dict[str, NDArray[np.bool_]]
    """Metric -> who is right, shape N."""
    thresholds: dict[str, Threshold]
    brier_N: NDArray[np.float64]
    """NaN where there is no prediction."""
    nll_N: NDArray[np.float64]
    """NaN where there is no prediction, or the model does not know the taxon."""
    classwise: float | None
    """Classwise calibration error; None without a prediction."""
    sets: pl.DataFrame
    set_sizes: pl.DataFrame
    not_computable: dict[str, str]
    """Metric -> why not."""


def needing_scores(ks: Sequence[int]) -> list[str]:
    """The metrics that are not there without scores."""
    averages = [f"{rule}_{k}" for rule in _AVERAGE_RULES for k in ks]
    return [f"top_{k}" for k in ks if k > 1] + averages + ["brier", "nll", "ece_classwise", "sets"]


def from_scores(
    at_rank: AtRank,
    specimens: pl.DataFrame,
    targets_N: Ints,
    named_N: Ints,
    validation: Validation,
    ks: Sequence[int],
    wanted: SetsWanted,
) -> FromScores:
    """What needs probabilities of all taxa, and what of it cannot be computed.

    Args:
        at_rank: The probabilities.
        specimens: First column: their keys; `error`.
        targets_N: Classes of the specimens; K or more: of no class of the model.
        named_N: Classes of the answers.
        validation: Where thresholds come from.
        ks: k of top-k and average-k.
        wanted: Prediction sets to make.

    Raises:
        DataError: a specimen with a prediction that has no scores.
    """
    num_classes, keys = at_rank.num_classes, at_rank.scores.keys[specimens.columns[0]]
    at_S, validation_S = places(keys, specimens[:, 0]), places(keys, validation.keys)
    _refuse_absent(at_rank, specimens, at_S)
    place_N = np.full(specimens.height, num_classes)
    score_N, brier_N, nll_N = (np.full(specimens.height, np.nan) for _ in range(3))
    ends: list[NDArray[np.float32]] = []  # the first and the last validation row
    validations = 0
    inner = [k for k in ks if k < num_classes]
    expected = int(np.count_nonzero(validation_S >= 0))
    most = metrics.most_for_average_k(inner, rows=expected, classes=num_classes)
    largest = np.zeros(0, np.float32)
    classwise = np.zeros(())
    truths: list[conformal.Truth] = []
    for rows, batch_BK in at_rank.batches():
        part_BK, at_B = _taken(batch_BK, at_S[rows])
        targets_B, answers_B = targets_N[at_B], named_N[at_B]
        truth_B = metrics.rank_of_truth(part_BK, targets_B)
        behind_B = metrics.is_behind(part_BK, answers_B, targets_B)  # the named taxon moves to the front
        place_N[at_B] = np.where(answers_B == targets_B, 0, truth_B + behind_B)
        score_N[at_B] = metrics.score_of_truth(part_BK, targets_B)
        brier_N[at_B] = confidence.brier(part_BK, targets_B)
        nll_N[at_B] = confidence.nll(part_BK, targets_B)
        classwise = classwise + confidence.classwise_bins(part_BK, targets_B)
        part_BK, at_B = _taken(batch_BK, validation_S[rows])
        used_B = validation.calibrates_V[at_B]
        truths.append(conformal.truth_of(part_BK[used_B], validation.targets_V[at_B][used_B]))
        part_BK = complete(part_BK)
        if part_BK.shape[0]:
            ends = [ends[0] if ends else part_BK[0], part_BK[-1]]
        validations += part_BK.shape[0]
        largest = metrics.keep_largest(largest, part_BK, most)
    too_large = f"k is not below {num_classes}, the classes of the model: every answer would be right"
    why = {
        f"{rule}_{k}": too_large
        for rule in ("top", *_AVERAGE_RULES)
        for k in ks
        if k >= num_classes and (rule, k) != ("top", 1)
    }
    right = {f"top_{k}": place_N < k for k in inner if k > 1}
    values: dict[str, float] = {}
    if validations:
        found = metrics.average_k_thresholds(largest, inner, rows=validations, classes=num_classes)
        values = {f"average_{k}": value for k, value in zip(inner, found, strict=True)} | {
            f"reference_average_{k}": metrics.reference_average_k_threshold(np.stack(ends), k) for k in inner
        }
        right |= {name: score_N >= value for name, value in values.items()}
    else:
        names = [f"{rule}_{k}" for rule in _AVERAGE_RULES for k in inner]
        why |= dict.fromkeys(names, "thresholds come from validation specimens; there are none with scores")
    calibrated, without = _calibrated(conformal.Truth.concat(truths), keys, validation_S, validation, wanted)
    why |= without
    sizes, made = _sizes(at_rank, at_S, targets_N, values, calibrated, keys)
    thresholds = {name: Threshold(value, validations, sizes[name]) for name, value in values.items()}
    error = confidence.classwise_error(classwise) if classwise.ndim else float("nan")
    return FromScores(
        right=right,
        thresholds=thresholds,
        brier_N=brier_N,
        nll_N=nll_N,
        classwise=None if np.isnan(error) else error,
        sets=_sets_table(made, targets_N, wanted, validation),
        set_sizes=_set_sizes(made),
        not_computable=why,
    )


def _taken(batch_BK: NDArray[np.float32], at_B: Ints) -> tuple[NDArray[np.float32], Ints]:
    """The rows of a batch that have a place, and their places."""
    here_B = at_B >= 0
    return (batch_BK, at_B) if here_B.all() else (batch_BK[here_B], at_B[here_B])


def _refuse_absent(at_rank: AtRank, specimens: pl.DataFrame, at_S: Ints) -> None:
    expected_N = specimens["error"].is_null().to_numpy().copy()
    expected_N[at_S[at_S >= 0]] = False
    absent = np.flatnonzero(expected_N)
    if absent.size:
        raise DataError(
            f"{at_rank.scores.path}: {absent.size:,} of the {specimens.height:,} specimens are not in it "
            f"(first: {specimens[int(absent[0]), 0]}); it is not of these predictions"
        )


# -- prediction sets


@dataclass
class _Made:
    """The sets of one method, as far as they are counted."""

    calibrated: conformal.Calibrated
    covered_N: NDArray[np.bool_]
    sizes: Ints
    """Specimens by the size of their set, from 0."""


def _calibrated(
    truth: conformal.Truth, keys: pl.Series, validation_S: Ints, validation: Validation, wanted: SetsWanted
) -> tuple[list[conformal.Calibrated], dict[str, str]]:
    """A threshold for each method, and why there is none."""
    if not wanted.methods:
        return [], {}
    if not truth.class_N.size:
        told = validation.told or "prediction sets come from validation specimens; there are none with scores"
        return [], {"sets": told}
    made, why = [], {}
    drawn = None
    if _drawing(wanted.methods):
        at_V = validation_S[validation_S >= 0]
        drawn = conformal.uniforms(validation.keys.gather(at_V[validation.calibrates_V[at_V]]))
    for method in wanted.methods:
        if method in ("pas", "mondrian") and wanted.counts_K is None:
            why[f"sets by {method}"] = "the catalogue has no training specimens of the model's taxa"
            continue
        counts_K = wanted.counts_K
        made.append(
            conformal.calibrate(
                method,
                truth,
                error=1 - wanted.coverage,
                prior_K=None if counts_K is None else conformal.prior(counts_K),
                bin_K=None if counts_K is None else conformal.frequency_bins(counts_K, wanted.bounds),
                uniform_N=drawn,
            )
        )
    return made, why


def _drawing(methods: Sequence[str]) -> bool:
    """Whether a method needs a number drawn for each specimen."""
    return any(method in ("aps", "raps") for method in methods)


def _sizes(
    at_rank: AtRank,
    at_S: Ints,
    targets_N: Ints,
    values: dict[str, float],
    calibrated: list[conformal.Calibrated],
    keys: pl.Series,
) -> tuple[dict[str, float], list[_Made]]:
    """Mean size of the sets above each threshold, and the prediction sets counted, in one pass."""
    made = [
        _Made(one, np.zeros(targets_N.size, bool), np.zeros(at_rank.num_classes + 1, np.int64))
        for one in calibrated
    ]
    above = dict.fromkeys(values, 0)
    least = {name: _not_below(value) for name, value in values.items()}
    scored = 0
    drawing = _drawing([one.method for one in calibrated])
    for rows, batch_BK in at_rank.batches() if values or made else ():
        part_BK, at_B = _taken(batch_BK, at_S[rows])
        drawn_B = conformal.uniforms(keys[rows].filter(pl.Series(at_S[rows] >= 0))) if drawing else None
        for one in made:
            sets_BK = conformal.sets(one.calibrated, part_BK, drawn_B)
            one.covered_N[at_B] = conformal.contains(sets_BK, targets_N[at_B])
            one.sizes += np.bincount(sets_BK.sum(axis=1), minlength=one.sizes.size)
        part_BK = complete(part_BK)
        scored += part_BK.shape[0]
        for name, value in least.items():
            above[name] += int(np.count_nonzero(part_BK >= value))
    for one in made:  # without a row in the scores there is no set
        one.sizes[0] += targets_N.size - one.sizes.sum()
    return {name: count / max(1, scored) for name, count in above.items()}, made


def _not_below(value: float) -> np.float32:
    """The least number of single precision that is not below a value: as a bound on others it is the same."""
    rounded = np.float32(value)
    return rounded if float(rounded) >= value else np.nextafter(rounded, np.float32(np.inf))


def _sets_table(
    made: list[_Made], targets_N: Ints, wanted: SetsWanted, validation: Validation
) -> pl.DataFrame:
    rows = []
    for one in made:
        covered, n = int(one.covered_N.sum()), targets_N.size
        low, high = intervals.wilson(covered, n)
        reached = np.cumsum(one.sizes)
        middle = np.searchsorted(reached, [(n + 1) // 2, n // 2 + 1])  # the middle one, or the middle two
        rows.append(
            {
                "method": one.calibrated.method,
                "asked": wanted.coverage,
                "threshold": one.calibrated.threshold,
                "calibration": one.calibrated.n,
                "groups": validation.groups,
                "n": n,
                "coverage": covered / n,
                "low": float(low),
                "high": float(high),
                "macro_coverage": conformal.macro_coverage(one.covered_N, targets_N),
                "mean_size": float(one.sizes @ np.arange(one.sizes.size)) / n,
                "median_size": float(middle.mean()),
                "empty": int(one.sizes[0]),
                "warnings": [validation.told, *one.calibrated.warnings],
            }
        )
    return pl.DataFrame(rows, schema=SETS_SCHEMA)


def _set_sizes(made: list[_Made]) -> pl.DataFrame:
    parts = [
        pl.DataFrame(
            {
                "method": [one.calibrated.method] * there.size,
                "size": there,
                "specimens": one.sizes[there],
            },
            schema=SIZES_SCHEMA,
        )
        for one in made
        for there in (np.flatnonzero(one.sizes),)
    ]
    return pl.concat(parts) if parts else pl.DataFrame(schema=SIZES_SCHEMA)
