"""Words for an evaluation: what text and page both say."""

import math
from collections.abc import Collection
from typing import Any, Final

import polars as pl

from bioscan.analysis.backoff import LEVEL
from bioscan.jobs.evaluate import COUNTS, Confidence, Evaluation, Score
from bioscan.jobs.evaluate_hierarchy import Hierarchy

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


def confidence_lines(found: Confidence) -> list[str]:
    """What the probabilities are worth, a line each."""
    classwise = "" if found.ece_classwise is None else f", classwise {found.ece_classwise:.4f}"
    lines = [
        f"mean probability of {found.answered:,} answers {found.mean:.4f}; share of them that is right "
        f"{found.accuracy:.4f}",
        f"calibration error {found.ece:.4f} (bins of equal width), {found.ece_mass:.4f} (of equal "
        f"mass){classwise}",
    ]
    if found.brier and found.nll:
        told = (
            f"Brier score {_with_interval(found.brier)}, negative log-likelihood {_with_interval(found.nll)}"
        )
        of = "" if found.nll.n == found.brier.n else f" over the {found.nll.n:,} of taxa that the model knows"
        lines.append(told + of)
    shares = ", ".join(f"{share:.1%} with {risk:.0%}" for risk, share in found.coverage_at.items())
    lines.append(
        f"area under the risk-coverage curve {found.aurc:.4f} (at best {found.aurc_best:.4f}); answered, the "
        f"surest first, with at most so many wrong: {shares} (on these specimens; no promise)"
    )
    return lines


def bucket_rows(buckets: pl.DataFrame) -> tuple[list[list[Any]], list[str]]:
    """A row for taxa with many, some, few or no training specimens, and the header."""
    header = ["training specimens", "taxa", "n", "micro", "95 %", "macro", "95 %"]
    rows = [
        [
            f"{row['bucket']} ({_bounds(row['at_least'], row['at_most'])})",
            row["taxa"],
            row["specimens"],
            row["micro"],
            interval(row["low"], row["high"]),
            row["macro"],
            interval(row["macro_low"], row["macro_high"]),
        ]
        for row in buckets.to_dicts()
    ]
    return rows, header


def set_rows(sets: pl.DataFrame) -> tuple[list[list[Any]], list[str]]:
    """A row a method of prediction sets, and the header."""
    header = ["sets", "asked", "covered", "95 %", "macro", "mean size", "median", "empty", "calibrated on"]
    rows = [
        [
            row["method"],
            row["asked"],
            row["coverage"],
            interval(row["low"], row["high"]),
            row["macro_coverage"],
            f"{row['mean_size']:.2f}",
            f"{row['median_size']:g}",
            row["empty"],
            row["calibration"],
        ]
        for row in sets.to_dicts()
    ]
    return rows, header


def set_warnings(sets: pl.DataFrame) -> list[str]:
    """What the promise of the sets rests on and does not hold for; with the methods where not for all."""
    said: dict[str, list[str]] = {}
    for method, warnings in sets.select("method", "warnings").iter_rows():
        for warning in warnings:
            said.setdefault(warning, []).append(method)
    return [
        text if len(methods) == sets.height else f"{', '.join(methods)}: {text}"
        for text, methods in said.items()
    ]


def hierarchy_rows(found: Hierarchy) -> tuple[list[list[Any]], list[str]]:
    """A row a metric of whole paths, forced and assigned, and the header."""
    header = ["metric", "forced", "95 %", "n", "assigned", "95 %", "n"]
    rows = []
    for name in {**found.metrics, **found.assigned_metrics}:
        cells: list[Any] = []
        for score in (found.metrics.get(name), found.assigned_metrics.get(name)):
            cells += [score.value, interval(score.low, score.high), score.n] if score else [None] * 3
        rows.append([name, *cells])
    return rows, header


def assigned_rows(found: Hierarchy) -> tuple[list[list[Any]], list[str]]:
    """A row a rank of what is assigned, and the header."""
    header = ["rank", "labelled", "named", "wrong", "of all", "95 %", "of the named", "95 %", "unchecked"]
    rows = [
        [
            row["rank"],
            row["labelled"],
            row["named"],
            row["wrong"],
            row["error_over_all"],
            interval(row["over_all_low"], row["over_all_high"]),
            row["error_among_named"],
            interval(row["among_named_low"], row["among_named_high"]),
            row["unchecked"],
        ]
        for row in found.assigned.to_dicts()
    ]
    return rows, header


def assigned_note(found: Hierarchy) -> str:
    """What the assigned names were to keep."""
    if found.max_error is not None and found.promises_answers:
        return (
            f"promised of the answers as wholes: at most {found.max_error:g} have a wrong name (1 less "
            "correct_or_ancestor above), on average over specimens like those that the threshold comes from"
        )
    if found.max_error is not None:
        return (
            f"promised at each rank: at most {found.max_error:g} of all labelled specimens wrong, on average "
            "over specimens like those that the thresholds come from; of the named it may be more"
            + _missed(found.assigned, found.max_error)
        )
    if found.min_precision is not None:
        return (
            f"promised for each taxon, with {LEVEL:.0%} confidence: right for at least "
            f"{found.min_precision:g} of the specimens that get its name, those named deeper among them"
        )
    return "nothing was promised: predict --max-error or --min-precision stops at a safe rank"


def _missed(assigned: pl.DataFrame, max_error: float) -> str:
    """The ranks at which more names are wrong than chance explains."""
    missed = assigned.filter(pl.col("over_all_low") > max_error)["rank"].to_list()
    return f". These specimens do not keep it at rank {', '.join(missed)}" if missed else ""


def _with_interval(score: Score) -> str:
    return f"{score.value:.4f} ({interval(score.low, score.high)})"


def _bounds(least: int, most: int | None) -> str:
    if most is None:
        return f"{least:,} or more"
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


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
