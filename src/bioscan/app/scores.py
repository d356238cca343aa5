"""Words for an evaluation: what text and page both say."""

import math
from collections.abc import Collection
from typing import Any, Final

from bioscan.jobs.evaluate import COUNTS, Evaluation

NOTES: Final = {
    "average": "average-k: the probability of the true taxon reaches a threshold that, among validation "
    "specimens, k taxa a specimen reach on average",
    "reference_average": "reference_average-k: the rule of the paper's program; its threshold comes from two "
    "validation specimens: mostly chance, and not to be compared between runs",
}
"""Metric without its k -> what has to be known about it."""


def caption(found: Evaluation) -> str:
    """What was evaluated, in a line."""
    classes = found.metrics["top_1"]["macro"].classes
    return f"{place(found)}: {found.n:,} specimens of {classes:,} taxa at rank {found.rank}"


def place(found: Evaluation) -> str:
    """Which specimens were evaluated."""
    which = f"{found.experiment}, {found.role}" if found.experiment else "all specimens in both"
    return f"{which}, within {found.within}" if found.within else which


def counted(found: Evaluation, names: Collection[str] = tuple(COUNTS)) -> list[str]:
    """A line for each kind of specimen that had no right name to give, or was left out; then warnings."""
    lines = [f"{found.counts[name]:,} {COUNTS[name]}" for name in names if found.counts.get(name)]
    if found.same_split is False:
        lines.append(
            "the roles are not those that the model was trained with (the split's hash differs): "
            "specimens that count here may have been trained on"
        )
    if found.homonyms:
        lines.append(f"told apart by the ranks above: {', '.join(found.homonyms)}")
    return lines


def metric_rows(found: Evaluation) -> tuple[list[list[Any]], list[str]]:
    """A row a metric, and the header."""
    header = ["metric", "micro", "95 %", "macro", "95 %", "macro_all", "macro_seen", "n", "classes"]
    rows = []
    for name, averages in found.metrics.items():
        micro, macro = averages["micro"], averages["macro"]
        others = [averages["macro_all"].value, averages["macro_seen"].value]
        ends = [interval(score.low, score.high) for score in (micro, macro)]
        rows.append([name, micro.value, ends[0], macro.value, ends[1], *others, micro.n, macro.classes])
    return rows, header


def notes(found: Evaluation) -> list[str]:
    """What has to be known about the metrics that are there."""
    there = {name.rpartition("_")[0] for name in found.metrics}
    return [note for kind, note in NOTES.items() if kind in there]


def interval(low: float | None, high: float | None) -> str:
    """Both ends of an interval; a dash where there is none."""
    if low is None or high is None or math.isnan(low):
        return "–"
    return f"{low:.4f}–{high:.4f}"


def without(found: Evaluation) -> dict[str, list[str]]:
    """Reason -> the metrics that could not be computed for it."""
    reasons: dict[str, list[str]] = {}
    for name, reason in found.not_computable.items():
        reasons.setdefault(reason, []).append(name)
    return reasons
