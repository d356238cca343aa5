"""Charts of the report: what is drawn is where the numbers say, and inside the frame."""

import itertools

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan.analysis import confidence
from bioscan.app import charts


@given(st.floats(1e-4, 1e4))
def test_the_ticks_are_few_and_reach_the_highest_value(highest: float) -> None:
    made = charts.ticks(highest)
    assert made[0] == 0
    assert made[-1] >= highest * (1 - 1e-9)
    assert made[-2] < highest
    assert 2 <= len(made) <= 6


def test_a_dot_lies_where_its_bin_is_right() -> None:
    bins = pl.DataFrame(
        {
            "low": [0.4, 0.8],
            "high": [0.6, 1.0],
            "n": [10, 40],
            "confidence": [0.5, 1.0],
            "accuracy": [0.5, 0.0],
            "accuracy_low": [0.25, 0.0],
            "accuracy_high": [0.75, 0.1],
        }
    )
    panel = charts.reliability(bins)
    top, bottom = panel.top, panel.bottom
    middle_x, middle_y = (panel.left + panel.right) / 2, (top + bottom) / 2
    assert panel.dots[0].at == (middle_x, middle_y)
    assert panel.dots[1].at == (panel.right, bottom)
    assert (panel.dots[0].high, panel.dots[0].low) == (top + (bottom - top) / 4, bottom - (bottom - top) / 4)
    assert "probability 0.50 on average, 10 specimens: 50 % right (25–75 %)" in panel.told
    heights = [height for *_, height in panel.bars]
    assert abs(heights[1] - 4 * heights[0]) < 0.5
    assert all(abs(y + height - bottom) < 0.1 for _, y, _, height in panel.bars)


@given(st.integers(1, 300), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=50, deadline=None)
def test_nothing_is_drawn_outside_the_frame(n: int, seed: int, tied: bool) -> None:
    generator = np.random.default_rng(seed)
    probability = generator.random(n).round(1 if tied else 9)
    right = generator.random(n) < generator.random()
    bins = pl.DataFrame(confidence.reliability_curve(probability, right))
    curve = pl.DataFrame(confidence.risk_coverage(probability, right))
    marks = {risk: confidence.coverage_at_risk(probability, right, risk) for risk in (0.01, 0.05)}
    for panel in (charts.reliability(bins), charts.risk_coverage(curve, marks)):
        points = [*(point for line in panel.lines for point in line.points), *panel.band]
        points += [dot.at for dot in panel.dots] + [
            (panel.left, y) for d in panel.dots for y in (d.low, d.high)
        ]
        points += [(x, panel.top) for x, _ in panel.marks]
        points += [corner for x, y, w, h in panel.bars for corner in ((x, y), (x + min(w, 0), y + h - 0.1))]
        for x, y in points:
            assert panel.left - 0.1 <= x <= panel.right + 0.1
            assert panel.top - 0.1 <= y <= panel.bottom + 0.1
        assert "nan" not in panel.told


def test_the_last_point_of_risk_and_coverage_is_the_error_of_all() -> None:
    probability, right = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, True, False, True])
    curve = pl.DataFrame(confidence.risk_coverage(probability, right))
    panel = charts.risk_coverage(curve, {0.05: 0.5, 0.01: 0.0, 0.5: 1.0})
    highest = float(panel.y_ticks[-1][1].removesuffix(" %")) / 100
    y = panel.bottom - 0.25 / highest * (panel.bottom - panel.top)
    assert abs(panel.lines[0].points[-1][1] - y) < 0.06
    assert panel.marks == [((panel.left + panel.right) / 2, "5 % wrong")]
    assert panel.told == (
        "Of all answers 25.0 % are wrong. Of the surest 50 %: at most 5 %. Of the surest 100 %: at most 50 %."
    )


def test_labels_at_the_ends_of_lines_do_not_touch() -> None:
    rows: list[dict[str, float | None]] = [
        {"epoch": 1.0, "train_top_1": 0.5, "validation_micro_top_1": 0.5, "validation_macro_top_1": None},
        {"epoch": 2.0, "train_top_1": 0.6, "validation_micro_top_1": 0.6, "validation_macro_top_1": 0.61},
    ]
    loss, top_1 = charts.history(rows, best_epoch=2)
    assert loss.lines == []
    assert sorted(line.label for line in top_1.lines) == [
        "training",
        "validation, macro",
        "validation, micro",
    ]
    heights = sorted(line.at for line in top_1.lines)
    assert all(after - before >= 15 for before, after in itertools.pairwise(heights))
    assert top_1.marks == [(top_1.right, "kept")]
