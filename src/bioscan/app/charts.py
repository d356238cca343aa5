"""Where the lines, bars and letters of the report's charts go: pixels only, the page colours them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl

Point = tuple[float, float]

WIDTH: Final = 440
HEIGHT: Final = 250
LEFT, TOP, BOTTOM = 46, 14, 38
RIGHT: Final = 14
LABELS: Final = 118
"""Room to the right of a chart whose lines are labelled there."""
DRAWN: Final = 40
"""A confusion matrix of more taxa than this is not drawn."""
NO_ANSWER: Final = "no answer"

HISTORY: Final = {
    "Loss": {"train_loss": "training", "validation_loss": "validation"},
    "Top-1": {
        "train_top_1": "training",
        "validation_micro_top_1": "validation, micro",
        "validation_macro_top_1": "validation, macro",
    },
}
"""Title -> column of the history -> label of its line."""


@dataclass(frozen=True)
class Line:
    """A line."""

    style: str
    """`leaf`, `rust` or `soft` (dashed)."""
    points: list[Point]
    label: str = ""
    at: float = 0.0
    """Height of the label."""


@dataclass(frozen=True)
class Dot:
    """A measured value with its interval."""

    at: Point
    low: float
    high: float
    told: str


@dataclass(frozen=True)
class Panel:
    """A chart with two axes, in its own pixels."""

    key: str
    """Unique in the page."""
    title: str
    told: str
    """The chart in words."""
    x_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    right: float
    """Right end of the plot."""
    lines: list[Line] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    bars: list[tuple[float, float, float, float]] = field(default_factory=list)
    """x, y, width and height."""
    band: list[Point] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)
    """Upright lines and their words."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class _Plane:
    """From values to pixels."""

    first: float
    last: float
    highest: float
    margin: int = RIGHT

    def x(self, value: float) -> float:
        share = (value - self.first) / (self.last - self.first)
        return round(LEFT + share * (WIDTH - LEFT - self.margin), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - value / self.highest * (HEIGHT - TOP - BOTTOM), 1)

    def points(self, xs: Iterable[float], ys: Iterable[float]) -> list[Point]:
        return [(self.x(x), self.y(y)) for x, y in zip(xs, ys, strict=True)]


def history(
    rows: Sequence[Mapping[str, float | None]], best_epoch: int | None, kept: str = "kept"
) -> list[Panel]:
    """The curves of a training: a row an epoch; a chart for each of `HISTORY`."""
    epochs = [int(row["epoch"] or 0) for row in rows]
    first, last = epochs[0], max(epochs[-1], epochs[0] + 1)
    made = []
    for title, columns in HISTORY.items():
        known = {
            label: [(e, v) for e, row in zip(epochs, rows, strict=True) if (v := row.get(column)) is not None]
            for column, label in columns.items()
        }
        highest = max((v for pairs in known.values() for _, v in pairs), default=1.0)
        y_ticks = ticks(highest) if title == "Loss" else _QUARTERS
        plane = _Plane(first, last, y_ticks[-1], LABELS)
        lines = [
            Line(style, plane.points(*zip(*pairs, strict=True)), label)
            for style, (label, pairs) in zip(("soft", "rust", "leaf"), known.items(), strict=False)
            if pairs
        ]
        made.append(
            Panel(
                key=f"history-{title.lower()}",
                title=title,
                told=" ".join(
                    f"{label}: {p[-1][1]:.4g} at the last epoch." for label, p in known.items() if p
                ),
                x_title="epoch",
                x_ticks=[
                    (plane.x(e), str(e)) for e in range(first, last + 1, max(1, round((last - first) / 6)))
                ],
                y_ticks=[(plane.y(tick), f"{tick:g}") for tick in y_ticks],
                right=WIDTH - LABELS,
                lines=_labelled(lines),
                marks=[(plane.x(best_epoch), kept)] if best_epoch and len(epochs) > 1 else [],
            )
        )
    return made


_QUARTERS: Final = (0, 0.25, 0.5, 0.75, 1.0)
_BARS: Final = 0.22
"""Share of the height that the tallest bar takes."""


def reliability(bins: pl.DataFrame) -> Panel:
    """Share right against probability, a dot a bin, over bars for the specimens of each bin.

    Args:
        bins: Columns `low, high, n, confidence, accuracy, accuracy_low, accuracy_high`.
    """
    plane = _Plane(0.0, 1.0, 1.0)
    rows = bins.filter(pl.col("n") > 0).to_dicts()
    most = max((row["n"] for row in rows), default=1)
    ground = plane.y(0)
    bars = []
    for row in rows:
        left, right = plane.x(row["low"]), plane.x(min(1.0, row["high"]))
        height = max(0.8, row["n"] / most * _BARS * (ground - TOP))
        bars.append((left, round(ground - height, 1), round(max(1.5, right - left - 1), 1), round(height, 1)))
    dots = [
        Dot(
            (plane.x(row["confidence"]), plane.y(row["accuracy"])),
            plane.y(row["accuracy_low"]),
            plane.y(row["accuracy_high"]),
            f"probability {row['confidence']:.2f} on average, {row['n']:,} specimens: "
            f"{100 * row['accuracy']:.0f} % right ({100 * row['accuracy_low']:.0f}–"
            f"{100 * row['accuracy_high']:.0f} %)",
        )
        for row in rows
    ]
    return Panel(
        key="reliability",
        title="Share right, by probability",
        told="On the dashed line a probability is what it says; below it promises too much. "
        + " ".join(f"{dot.told}." for dot in dots),
        x_title="probability of the answer",
        x_ticks=[(plane.x(tick), f"{tick:g}") for tick in _QUARTERS],
        y_ticks=[(plane.y(tick), f"{100 * tick:g} %") for tick in _QUARTERS],
        right=WIDTH - RIGHT,
        lines=[Line("soft", plane.points((0, 1), (0, 1)))],
        dots=dots,
        bars=bars,
    )


def risk_coverage(curve: pl.DataFrame, marks: Mapping[float, float]) -> Panel:
    """Share wrong among the answers kept, the most confident first.

    Args:
        curve: Columns `coverage, risk, low, high` by rising coverage.
        marks: Asked risk -> the greatest coverage at which it is kept; 0 is left out.
    """
    overall = curve["risk"][-1]
    # the first few answers say little: the wide end of their interval must not flatten the rest
    highest = max(float(curve["risk"].max() or 0), 1.25 * overall, 0.04)  # type: ignore[arg-type]
    y_ticks = ticks(min(1.0, highest))
    plane = _Plane(0.0, 1.0, y_ticks[-1])
    coverage = curve["coverage"].to_list()
    low, high = (curve[end].clip(0, y_ticks[-1]).to_list() for end in ("low", "high"))
    return Panel(
        key="risk-coverage",
        title="Share wrong, when only the surest answers are kept",
        told=f"Of all answers {100 * overall:.1f} % are wrong. "
        + " ".join(f"Of the surest {100 * c:.0f} %: at most {100 * r:g} %." for r, c in marks.items() if c),
        x_title="share of specimens kept",
        x_ticks=[(plane.x(tick), f"{100 * tick:g} %") for tick in _QUARTERS],
        y_ticks=[(plane.y(tick), f"{100 * tick:.3g} %") for tick in y_ticks],
        right=WIDTH - RIGHT,
        lines=[Line("rust", plane.points(coverage, curve["risk"].to_list()))],
        band=plane.points(coverage, high) + plane.points(coverage, low)[::-1],
        marks=[(plane.x(c), f"{100 * r:g} % wrong") for r, c in marks.items() if 0 < c < 1],
    )


def operating(curve: pl.DataFrame) -> Panel:
    """How many answers are free of wrong names, and how many names are left, by the probability asked for.

    Args:
        curve: Columns `threshold, correct_or_ancestor, given_depth` by rising threshold.
    """
    plane = _Plane(0.0, 1.0, 1.0, LABELS)
    at = curve["threshold"].clip(0, 1).to_list()
    whole = float(curve["given_depth"][0]) or 1.0
    shares = {"no wrong name": curve["correct_or_ancestor"], "names left": curve["given_depth"] / whole}
    lines = [
        Line(style, plane.points(at, values.to_list()), label)
        for style, (label, values) in zip(("leaf", "soft"), shares.items(), strict=True)
    ]
    return Panel(
        key="operating",
        title="What stopping at a probability gains and costs",
        told=" ".join(
            f"{label}: {100 * values[0]:.0f} % at a threshold of {at[0]:.2g}, "
            f"{100 * values[-1]:.0f} % at {at[-1]:.2g}."
            for label, values in shares.items()
        ),
        x_title="least probability of a name",
        x_ticks=[(plane.x(tick), f"{tick:g}") for tick in _QUARTERS],
        y_ticks=[(plane.y(tick), f"{100 * tick:g} %") for tick in _QUARTERS],
        right=WIDTH - LABELS,
        lines=_labelled(lines),
    )


def matrix(per_class: pl.DataFrame, confusion: pl.DataFrame) -> dict[str, Any] | None:
    """Shares of each taxon's specimens by answer; None where there are too many taxa to draw.

    Args:
        per_class: Columns `taxon, support, predicted`.
        confusion: Columns `taxon, named, specimens`.
    """
    there = per_class.filter((pl.col("support") > 0) | (pl.col("predicted") > 0))
    rows = there.filter(pl.col("support") > 0)["taxon"].to_list()
    columns = there["taxon"].to_list()
    if len(columns) > DRAWN:
        return None
    if confusion["named"].has_nulls():
        columns.append(NO_ANSWER)
    support = dict(per_class.select("taxon", "support").iter_rows())
    cells = [
        {
            "row": rows.index(taxon),
            "column": columns.index(named),
            "taxon": taxon,
            "named": named,
            "count": count,
            "share": count / support[taxon],
        }
        for taxon, named, count in confusion.with_columns(pl.col("named").fill_null(NO_ANSWER)).iter_rows()
    ]
    size = max(16, min(56, 640 // len(columns)))
    longest = max(map(len, (*rows, *columns)))
    return {
        "rows": [(taxon, support[taxon]) for taxon in rows],
        "columns": columns,
        "cells": cells,
        "size": size,
        "labels": size >= 30,
        "left": 7.2 * min(longest, 28) + 62,
        "top": 6.4 * min(longest, 28) + 24,
        "beyond": 3.4 * min(longest, 28),  # where slanted names end, to the right of their column
    }


def ticks(highest: float) -> list[float]:
    """Round numbers from 0 to at least the highest value."""
    for step in (base * 10.0**power for power in range(-6, 7) for base in (1, 2, 2.5, 5)):
        if 5 * step >= highest:
            return [
                round(step * i, 9) for i in range(next(n for n in range(1, 6) if n * step >= highest) + 1)
            ]
    return [0.0, highest]


def _labelled(lines: Sequence[Line], gap: float = 15) -> list[Line]:
    """The lines with their labels at their ends, moved down so far that labels do not touch."""
    placed: list[Line] = []
    for line in sorted(lines, key=lambda line: line.points[-1][1]):
        at = max(line.points[-1][1], placed[-1].at + gap) if placed else line.points[-1][1]
        placed.append(Line(line.style, line.points, line.label, at))
    return placed
