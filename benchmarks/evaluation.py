"""All metrics of a predictions table, against a loop over specimens as the paper's program has it."""

import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from benchmarks.measure import interleaved, peak_mb
from bioscan import evaluate
from bioscan.data.predictions import PredictionsWriter

TASKS: Final = {"large_insect_order": (225_660, 112_835, 16), "large_diptera_family": (178_266, 89_135, 40)}
"""Test specimens, validation specimens, classes."""
LOOPED: Final = 20_000
"""Specimens that the loop takes; its time is scaled to all."""
BOUND_S: Final = 1.0


def tables(work: Path, experiment: str, divisor: int) -> tuple[Path, Path]:
    """Predictions with scores and a catalogue of long-tailed classes."""
    tests, validations, classes = TASKS[experiment]
    size = (tests + validations) // divisor
    rng = np.random.default_rng(1)
    names = np.array([f"Taxon{number:02d}" for number in range(classes)])
    shares = 1 / np.arange(1, classes + 1) ** 1.6
    truth = rng.choice(classes, size, p=shares / shares.sum())
    logits = rng.normal(0, 1, (size, classes)).astype(np.float32)
    logits[np.arange(size), truth] += 5.5
    scores = np.exp(logits)
    scores /= scores.sum(axis=1, keepdims=True)
    rank = experiment.rpartition("_")[2]
    best, ids = names[scores.argmax(axis=1)], [f"BIOUG{number:06d}-A01" for number in range(size)]
    roles = np.where(np.arange(size) < validations // divisor, "validation", "test")
    catalogue = work / f"{experiment}.{divisor}.parquet"
    pl.DataFrame({"sampleid": ids, rank: names[truth], experiment: roles}).write_parquet(catalogue)
    frame = pl.DataFrame(
        {
            "sampleid": ids,
            "image_file": pl.Series([None] * size, dtype=pl.String),
            rank: best,
            f"{rank}_probability": scores.max(axis=1).astype(float),
            "assigned_rank": rank,
            "assigned_taxon": best,
            "assigned_probability": scores.max(axis=1).astype(float),
            "error": pl.Series([None] * size, dtype=pl.String),
        }
    )
    above = (None, None) if rank == "order" else (None, None, "Diptera")
    predictions = work / f"{experiment}.{divisor}.predictions.parquet"
    with PredictionsWriter(
        predictions,
        ranks=[rank],
        leaves=[(*above, str(name)) for name in names],
        record={"experiment": experiment, "rank": rank},
        overwrite=True,
    ) as writer:
        for start in range(0, size, 8_192):
            writer.write(frame.slice(start, 8_192), scores[start : start + 8_192])
    return predictions, catalogue


def looped(scores_NK: NDArray[np.float32], truth_N: NDArray[np.int64]) -> dict[int, float]:
    """Top-k per specimen in Python, class by class: the shape of the paper's program, without a GPU."""
    classes = scores_NK.shape[1]
    micro: Counter[int] = Counter()
    per_class = {k: np.zeros(classes) for k in (1, 3, 5, 10)}
    support = np.zeros(classes)
    for scores, target in zip(scores_NK, truth_N, strict=True):
        order = np.argsort(-scores)
        support[target] += 1
        for k, hits in per_class.items():
            right = int(target in order[:k])
            micro[k] += right
            hits[target] += right
    return {k: count / len(truth_N) for k, count in micro.items()}


def run(size: str, work: Path) -> list[dict[str, Any]]:
    """Seconds from the files to every metric with its interval."""
    divisor = {"full": 1, "small": 20}[size]
    rows = []
    for experiment, (tests, _, classes) in TASKS.items():
        predictions, catalogue = tables(work, experiment, divisor)
        (taken,) = interleaved(lambda p=predictions, c=catalogue: evaluate(p, c), rounds=3)  # type: ignore[misc]
        rng = np.random.default_rng(1)
        scores = rng.random((LOOPED, classes), np.float32)
        start = time.perf_counter()
        looped(scores, rng.integers(0, classes, LOOPED))
        loop = (time.perf_counter() - start) * (tests // divisor) / LOOPED
        rows.append(
            {
                "work": "all metrics from files (floor column: top-k alone in a loop over specimens)",
                "size": f"{tests // divisor:,} x {classes}",
                "value": taken,
                "unit": "s",
                "floor": loop,
                "ratio": taken / loop,
                "bound": f"<= {BOUND_S:g} s",
                "peak_mb": peak_mb(evaluate, predictions, catalogue),
            }
        )
    return rows
