"""All metrics of a predictions table, against a loop over specimens as the paper's program has it; of a very
wide one, against a full sort of its rows; whole paths, against sets of ancestors.
"""

import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from benchmarks.measure import interleaved, peak_mb
from bioscan import evaluate
from bioscan.data.predictions import PredictionsWriter, read_scores
from bioscan.jobs.evaluate_hierarchy import evaluate_hierarchy

TASKS: Final = {
    "large_insect_order": (225_660, 112_835, 789_818, 16),
    "large_diptera_family": (178_266, 89_135, 623_937, 40),
}
"""Test, validation and training specimens, classes."""
WIDE: Final = (30_000, 10_000, 160_000, 8_355)
"""The same of the species of the dataset."""
LOOPED: Final = 20_000
"""Specimens that the loop takes; its time is scaled to all."""
BOUND_S: Final = 1.0
RANKS: Final = ("order", "family", "genus", "species")
_BLOCK = 4_000_000  # probabilities made at a time
Floats = NDArray[np.float32]


def tables(
    work: Path, name: str, sizes: tuple[int, int, int, int], divisor: int, rank: str
) -> tuple[Path, Path]:
    """Predictions with scores and a catalogue of long-tailed classes."""
    tests, validations, trainings, classes = sizes
    size, training = (tests + validations) // divisor, trainings // divisor
    rng = np.random.default_rng(1)
    names = np.array([f"Taxon{number:04d}" for number in range(classes)])
    shares = 1 / np.arange(1, classes + 1) ** 1.6
    truth = rng.choice(classes, size + training, p=shares / shares.sum())
    ids = [f"BIOUG{number // 95:05d}-{number % 95:02d}" for number in range(size + training)]
    roles = np.repeat(
        ["validation", "test", "train"], [validations // divisor, size - validations // divisor, training]
    )
    catalogue, predictions = (
        work / f"{name}.{divisor}.parquet",
        work / f"{name}.{divisor}.predictions.parquet",
    )
    pl.DataFrame({"sampleid": ids, rank: names[truth], "task": roles}).write_parquet(catalogue)
    leaves = [(*(None,) * ("phylum", "class", "order", "family").index(rank), str(n)) for n in names]
    record = {"experiment": "task", "rank": rank}
    with PredictionsWriter(predictions, ranks=[rank], leaves=leaves, record=record, overwrite=True) as writer:
        for start in range(0, size, max(1, _BLOCK // classes)):
            rows = np.arange(start, min(size, start + max(1, _BLOCK // classes)))
            scores = rng.standard_normal((rows.size, classes), np.float32)
            scores[np.arange(rows.size), truth[rows]] += 3 + np.log(classes)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=1, keepdims=True)
            best = scores.argmax(axis=1)
            named = pl.DataFrame(
                {
                    "sampleid": [ids[row] for row in rows],
                    rank: names[best],
                    f"{rank}_probability": scores.max(axis=1).astype(float),
                }
            )
            assigned = {"assigned_rank": pl.lit(rank), "assigned_taxon": pl.col(rank)}
            probability = {"assigned_probability": pl.col(f"{rank}_probability")}
            nothing = {column: pl.lit(None, pl.String) for column in ("image_file", "error")}
            writer.write(named.with_columns(**assigned, **probability, **nothing), scores)
    return predictions, catalogue


def looped(scores_NK: Floats, truth_N: NDArray[np.int64]) -> dict[int, float]:
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


def sort_all(predictions: Path) -> None:
    """Read the scores and sort each row: what top-k and prediction sets by a full sort begin with."""
    scores = read_scores(predictions)
    assert scores is not None, "they were written"
    for _, batch_BK in scores.batches():
        np.sort(batch_BK, axis=1)


def paths(size: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Predictions of four ranks, of which the labels know the upper ones, and the catalogue."""
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3_000, size)
    answer = np.where(rng.random(size) < 0.8, truth, rng.integers(0, 3_000, size))
    width = dict(zip(RANKS, (200, 30, 6, 1), strict=True))  # species in each taxon at the rank
    ids, known = [f"s{number}" for number in range(size)], rng.integers(1, 5, size)
    named = {rank: pl.Series(answer // w).cast(pl.String) for rank, w in width.items()}
    sure = {f"{rank}_probability": rng.random(size) for rank in RANKS}
    labels = {
        rank: pl.Series(truth // w).cast(pl.String).set(pl.Series(known <= place), None)
        for place, (rank, w) in enumerate(width.items())
    }
    assigned = {"assigned_rank": ["species"] * size, "assigned_taxon": named["species"]}
    return pl.DataFrame({"sampleid": ids, **named, **sure, **assigned}), pl.DataFrame(
        {"sampleid": ids, **labels}
    )


def ancestor_sets(predictions: pl.DataFrame, catalogue: pl.DataFrame) -> tuple[int, int, int]:
    """Sums of hierarchical precision and recall by the sets of ancestors of each specimen."""
    common = given = true = 0
    for named, truth in zip(
        predictions.select(RANKS).iter_rows(), catalogue.select(RANKS).iter_rows(), strict=True
    ):
        known = {truth[: i + 1] for i, name in enumerate(truth) if name is not None}
        said = {named[: i + 1] for i in range(len(known))}
        common, given, true = common + len(known & said), given + len(said), true + len(known)
    return common, given, true


def run(size: str, work: Path) -> list[dict[str, Any]]:
    """Seconds from the files to every metric with its interval."""
    divisor = {"full": 1, "small": 20}[size]
    rows = []
    for name, sizes in TASKS.items():
        made = tables(work, name, sizes, divisor, name.rpartition("_")[2])
        (taken,) = interleaved(lambda m=made: evaluate(*m), rounds=3)  # type: ignore[misc]
        rng = np.random.default_rng(1)
        scores = rng.random((LOOPED, sizes[-1]), np.float32)
        start = time.perf_counter()
        looped(scores, rng.integers(0, sizes[-1], LOOPED))
        loop = (time.perf_counter() - start) * (sizes[0] // divisor) / LOOPED
        work_done = "all metrics from files (floor column: top-k alone in a loop over specimens)"
        row = _row(work_done, f"{sizes[0] // divisor:,} x {sizes[-1]}", taken, loop)
        rows.append(row | {"bound": f"<= {BOUND_S:g} s", "peak_mb": peak_mb(evaluate, *made)})
    made = tables(work, "wide", WIDE, divisor, "family")
    taken, floor = interleaved(lambda: evaluate(*made), lambda: sort_all(made[0]), rounds=1)
    held = f"{(WIDE[0] + WIDE[1]) // divisor:,} x {WIDE[-1]:,}"
    work_done = "all metrics of a wide table (floor column: reading it and sorting each row)"
    rows.append(_row(work_done, held, taken, floor) | {"peak_mb": peak_mb(evaluate, *made)})
    answers, labels = paths(TASKS["large_insect_order"][0] // divisor)
    few = LOOPED // divisor
    taken, floor = interleaved(
        lambda: evaluate_hierarchy(answers, labels),
        lambda: ancestor_sets(answers.head(few), labels.head(few)),
        rounds=3,
    )
    work_done = "whole paths with intervals and operating curve (floor column: two sums by sets of ancestors)"
    rows.append(_row(work_done, f"{labels.height:,} x {len(RANKS)}", taken, floor * labels.height / few))
    return rows


def _row(work: str, size: str, value: float, floor: float) -> dict[str, Any]:
    return {"work": work, "size": size, "value": value, "unit": "s", "floor": floor, "ratio": value / floor}
