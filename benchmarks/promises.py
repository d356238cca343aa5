"""What is promised of confidence, counted: coverage of prediction sets, error of the back-off; and the speed.

A classifier that knows its data stands for a network: clouds of specimens around the centres of long-tailed
classes, and the exact probabilities of the classes. So nothing is trained, and each split is a new draw.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import interleaved, peak_mb
from bioscan.analysis.backoff import assign, thresholds
from bioscan.analysis.conformal import (
    METHODS,
    calibrate,
    contains,
    macro_coverage,
    prior,
    sets,
    truth_of,
    uniforms,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SPLITS: Final = {"full": 500, "small": 120}
ERROR: Final = 0.1

CLASSES: Final = 60
CALIBRATION: Final = 3_000
TESTED: Final = 20_000
TRAINED: Final = 30_000
"""Records whose counts are the shares that `pas` and the bins know."""

RANKS: Final = {"family": 10, "genus": 3, "species": 1}
"""Classes in each taxon at these ranks."""
ERRORS: Final = (0.02, 0.05, 0.1)
RESAMPLES: Final = 200
UNNAMED: Final = 0.3
"""Share of the records of a rank that are not named at the next."""
OVERCONFIDENT: Final = 1.5
"""Factor of the logits: the promise must hold for a model that is too sure."""

SHAPE: Final = {"full": (40_000, 8_355), "small": (4_000, 8_355)}
BLOCK: Final = 480


def run(size: str, work: Path) -> list[dict[str, Any]]:
    """Rows of all four; `work` is not used."""
    splits = SPLITS[size]
    return [*coverage(splits), *long_tail(max(40, splits // 5)), *back_off(), *speed(*SHAPE[size])]


def coverage(splits: int, calibration: int = 500, tested: int = 1_000) -> Iterator[dict[str, Any]]:
    """Covered specimens over random splits, against the law of them: Beta(k, n + 1 - k)."""
    place = math.ceil((calibration + 1) * (1 - ERROR))
    mean = place / (calibration + 1)
    # variance of a Beta-binomial share: that of the Beta, and that of counting
    beta = mean * (1 - mean) / (calibration + 2)
    spread = math.sqrt(beta + (mean * (1 - mean) - beta) / tested)
    for method in METHODS:
        found = []
        for split in range(splits):
            rng = np.random.default_rng(split)
            logits, truth, shares = draw(rng, calibration + tested)
            probabilities = softmax(logits)
            known = truth_of(probabilities[:calibration], truth[:calibration])
            calibrated = calibrate(
                method,
                known,
                error=ERROR,
                prior_K=shares,
                bin_K=np.zeros(CLASSES, np.int64),
                uniform_N=rng.random(calibration),
            )
            made = sets(calibrated, probabilities[calibration:], rng.random(tested))
            found.append(contains(made, truth[calibration:]).mean())
        off = np.abs(np.array(found) - mean)
        allowed = 3 * spread / math.sqrt(splits)
        yield {
            "work": f"coverage of {method}, mean over splits; floor: its expectation",
            "size": f"{splits} splits, {calibration} for calibration",
            "value": float(np.mean(found)),
            "unit": f"({np.mean(off > 1.96 * spread):.1%} of splits outside the 95 % interval)",
            "floor": mean,
            "bound": f"{mean - allowed:.4f} to {mean + allowed:.4f}",
        }


def long_tail(splits: int) -> Iterator[dict[str, Any]]:
    """Coverage of all specimens, mean of the coverages of the classes, and size, on a long tail."""
    kinds = [*METHODS, "mondrian, a bin for each class"]
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
    for split in range(splits):
        rng = np.random.default_rng(split)
        logits, truth, shares = draw(rng, CALIBRATION + TESTED)
        probabilities, counts = softmax(logits), rng.multinomial(TRAINED, shares)
        known = truth_of(probabilities[:CALIBRATION], truth[:CALIBRATION])
        thirds = np.argsort(np.argsort(counts)) * 3 // CLASSES
        for kind in kinds:
            calibrated = calibrate(
                kind.partition(",")[0],
                known,
                error=ERROR,
                prior_K=prior(counts),
                bin_K=thirds if kind == "mondrian" else np.arange(CLASSES),
                uniform_N=rng.random(CALIBRATION),
            )
            made = sets(calibrated, probabilities[CALIBRATION:], rng.random(TESTED))
            covered = contains(made, truth[CALIBRATION:])
            macro = macro_coverage(covered, truth[CALIBRATION:])
            found[kind].append((float(covered.mean()), macro, float(made.sum(axis=1).mean())))
    means = {kind: np.mean(values, axis=0) for kind, values in found.items()}
    for kind, (marginal, macro, size) in means.items():
        yield {
            "work": f"macro-coverage of {kind}; floor: lac",
            "size": f"{CLASSES} long-tailed classes, {CALIBRATION:,} for calibration, {splits} splits",
            "value": float(macro),
            "unit": f"(of all specimens {marginal:.3f}; mean size {size:.2f})",
            "floor": float(means["lac"][1]),
            "ratio": float(size / means["lac"][2]),  # of sizes
            "bound": ">= lac + 0.10 at < 2 × its size" if kind == "pas" else None,
        }


def back_off() -> Iterator[dict[str, Any]]:
    """Wrong names among all specimens that can be checked, mean over resamples, at each rank."""
    cases = [(error, rank) for error in ERRORS for rank in RANKS]
    wrong: dict[tuple[float, str], list[float]] = {case: [] for case in cases}
    named: dict[tuple[float, str], list[float]] = {case: [] for case in cases}
    for resample in range(RESAMPLES):
        rng = np.random.default_rng(resample)
        probability_NR, right_NR, checked_NR = named_path(rng, 3_000)
        records = {}
        for level, rank in enumerate(RANKS):
            rows = np.flatnonzero(checked_NR[:1_000, level])
            records[rank] = probability_NR[rows, level], right_NR[rows, level], np.ones(rows.size, bool)
        tested = slice(1_000, None)
        probability_NR, right_NR, checked_NR = probability_NR[tested], right_NR[tested], checked_NR[tested]
        for error in ERRORS:
            limits = np.array([found.threshold for found in thresholds(records, error).values()])
            deepest_N = assign(probability_NR, np.ones(probability_NR.shape, bool), limits)
            for level, rank in enumerate(RANKS):
                checked_N = checked_NR[:, level]
                given_N = (deepest_N >= level) & math.isfinite(limits[level])
                named[error, rank].append(float(given_N[checked_N].mean()))
                wrong[error, rank].append(float((given_N & ~right_NR[:, level])[checked_N].mean()))
    for (error, rank), values in wrong.items():
        allowed = error + 3 * float(np.std(values, ddof=1)) / math.sqrt(RESAMPLES)
        yield {
            "work": f"back-off at {error:g}: wrong at rank {rank} among all; floor: the asked error",
            "size": f"{RESAMPLES} resamples, 1,000 for calibration",
            "value": float(np.mean(values)),
            "unit": f"(named {np.mean(named[error, rank]):.1%})",
            "floor": error,
            "bound": f"<= {allowed:.4f}",
        }


def speed(specimens: int, classes: int) -> Iterator[dict[str, Any]]:
    """Seconds of each method's sets, block by block, against a sort of the rows of the same blocks."""
    blocks = specimens // BLOCK
    works = [partial(sets_of_blocks, method, blocks, classes) for method in METHODS]
    *taken, floor = interleaved(*works, partial(sorted_blocks, blocks, classes), rounds=3)
    for work, method, seconds in zip(works, METHODS, taken, strict=True):
        yield {
            "work": f"sets of {method}; floor: every row sorted",
            "size": f"{blocks * BLOCK:,} x {classes:,}",
            "value": seconds,
            "unit": "s",
            "floor": floor,
            "ratio": seconds / floor,
            "peak_mb": peak_mb(work),
        }


def sets_of_blocks(method: str, blocks: int, classes: int) -> None:
    """The sets of as many blocks."""
    probabilities, truth = block(classes)
    counts = np.arange(classes) % 150
    calibrated = calibrate(
        method, truth_of(probabilities, truth), error=ERROR, prior_K=prior(counts), bin_K=counts // 50
    )
    uniform = uniforms(range(BLOCK), seed=1)
    for _ in range(blocks):
        sets(calibrated, probabilities, uniform)


def sorted_blocks(blocks: int, classes: int) -> None:
    """The order of the classes in each row of as many blocks."""
    probabilities, _ = block(classes)
    for _ in range(blocks):
        np.argsort(-probabilities, axis=1)


def block(classes: int) -> tuple[NDArray[np.float32], Ints]:
    """Probabilities of a model of many classes that hesitates, right in nine of ten, and the truth."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (BLOCK, classes))
    truth = rng.integers(0, classes, BLOCK)
    logits[np.arange(BLOCK), truth] += rng.normal(9, 2.5, BLOCK)
    return softmax(logits).astype(np.float32), truth


def draw(rng: np.random.Generator, n: int) -> tuple[Floats, Ints, Floats]:
    """Exact logits, true classes, and shares of the classes."""
    shares = 1 / np.arange(1, CLASSES + 1) ** 1.2
    shares /= shares.sum()
    centres = rng.normal(0, 1, (CLASSES, 16))
    truth = rng.choice(CLASSES, n, p=shares)
    features = centres[truth] + rng.normal(0, 1, (n, 16))
    return features @ centres.T - (centres**2).sum(axis=1) / 2 + np.log(shares), truth, shares


def named_path(rng: np.random.Generator, n: int) -> tuple[Floats, NDArray[np.bool_], NDArray[np.bool_]]:
    """Probability of the name at each rank, whether it is right, and whether that can be checked.

    The names are the path of the most probable class, the model is too sure, and records are not named all
    the way down.
    """
    logits, truth, _ = draw(rng, n)
    probabilities = softmax(OVERCONFIDENT * logits)
    best = probabilities.argmax(axis=1)
    probability_NR, right_NR = np.empty((n, len(RANKS))), np.empty((n, len(RANKS)), bool)
    for level, width in enumerate(RANKS.values()):
        sums = np.add.reduceat(probabilities, np.arange(0, CLASSES, width), axis=1)
        probability_NR[:, level] = sums[np.arange(n), best // width]
        right_NR[:, level] = best // width == truth // width
    checked_NR = np.logical_and.accumulate(
        rng.random((n, len(RANKS))) >= UNNAMED * (np.arange(3) > 0), axis=1
    )
    return probability_NR, right_NR, checked_NR


def softmax(logits: Floats) -> Floats:
    """Probabilities of each row."""
    values = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Floats = values / values.sum(axis=1, keepdims=True)
    return shares
