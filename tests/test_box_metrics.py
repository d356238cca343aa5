"""Measures of boxes against pycocotools, against brute force, and the laws they keep."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bioscan.analysis.boxes import MEANINGS, RECALLS, THRESHOLDS, Boxes, evaluate_boxes, iou_matrix

Floats = NDArray[np.float64]
CLOSE = 1e-9


def boxes_of(rows: list[tuple[int, tuple[float, float, float, float], float]]) -> Boxes:
    """Rows of picture, corners, score as arrays."""
    return Boxes(
        np.array([row[0] for row in rows], np.int64),
        np.array([row[1] for row in rows], np.float64).reshape(-1, 4),
        np.array([row[2] for row in rows], np.float64),
    )


def evaluated(predicted: Boxes, truth: Boxes, pictures: int, **given: Any) -> dict[str, float]:
    made = evaluate_boxes(
        predicted, truth, pictures, np.random.default_rng(0), **({"resamples": 0} | given)
    ).measures
    return {name: measure.value for name, measure in made.items()}


def coco(predicted: Boxes, truth: Boxes, pictures: int, max_boxes: int) -> dict[str, float]:
    """What pycocotools says; -1 (nothing to count) as NaN. Image ids are given in the order of pictures."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def entries(boxes: Boxes) -> list[dict[str, Any]]:
        return [
            {"image_id": int(picture) + 1, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "id": n + 1}
            | {"area": (x1 - x0) * (y1 - y0), "iscrowd": 0, "score": float(score)}
            for n, (picture, (x0, y0, x1, y1), score) in enumerate(
                zip(boxes.picture_B, boxes.xyxy_B4.tolist(), boxes.score_B, strict=True)
            )
        ]

    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = {
            "info": {},
            "images": [{"id": n + 1} for n in range(pictures)],
            "annotations": entries(truth),
            "categories": [{"id": 1}],
        }
        dataset.createIndex()
        results = COCO()
        results.dataset = dataset.dataset | {"annotations": entries(predicted)}
        results.createIndex()
        judge = COCOeval(dataset, results, "bbox")
        judge.params.maxDets = [max_boxes]
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.evaluate()
        judge.accumulate()
    precision, recall = judge.eval["precision"][:, :, 0, 0, 0], judge.eval["recall"][:, 0, 0, 0]
    np.testing.assert_array_equal(judge.params.iouThrs, THRESHOLDS)
    np.testing.assert_array_equal(judge.params.recThrs, RECALLS)

    def mean(values: Floats) -> float:
        return float(values.mean()) if (values > -1).all() else np.nan

    return {
        "ap": mean(precision),
        "ap_50": mean(precision[0]),
        "ap_75": mean(precision[5]),
        "ar": mean(recall),
    }


coarse = st.integers(0, 12).map(lambda n: n / 2)
fine = st.floats(0, 40, width=32)
side = st.one_of(st.integers(1, 12).map(lambda n: n / 2), st.floats(0.125, 40, width=32))
corners = st.tuples(st.one_of(coarse, fine), st.one_of(coarse, fine), side, side).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
scores = st.one_of(st.sampled_from([0.1, 0.5, 0.5, 0.9]), st.floats(0, 1))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Boxes, Boxes, int]:
    """Predicted and true boxes: pictures without either, several in one, near copies, equal scores."""
    pictures = draw(st.integers(1, 6))
    picture = st.integers(0, pictures - 1)
    truth = draw(st.lists(st.tuples(picture, corners, st.just(1.0)), max_size=8))
    predicted = draw(st.lists(st.tuples(picture, corners, scores), max_size=8))
    for n, (place, box, _) in enumerate(truth):
        if draw(st.booleans()):
            moved = tuple(v + draw(st.sampled_from([-0.5, 0.0, 0.0, 0.25])) for v in box)
            if moved[2] > moved[0] and moved[3] > moved[1]:
                predicted.insert(n % (len(predicted) + 1), (place, moved, draw(scores)))  # type: ignore[arg-type]
    return boxes_of(predicted), boxes_of(truth), pictures


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([1, 1, 2, 100]))
def test_average_precision_and_recall_equal_pycocotools(
    case: tuple[Boxes, Boxes, int], max_boxes: int
) -> None:
    ours, theirs = evaluated(*case, max_boxes=max_boxes), coco(*case, max_boxes)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=CLOSE, err_msg=name)


def test_many_pictures_of_random_boxes_equal_pycocotools() -> None:
    random = np.random.default_rng(3)
    pictures, num = 200, 400
    corner = random.uniform(0, 60, (num, 2))
    truth = Boxes(
        random.integers(0, pictures, num),
        np.hstack([corner, corner + random.uniform(5, 40, (num, 2))]),
        np.ones(num),
    )
    predicted = Boxes(
        np.append(truth.picture_B, random.integers(0, pictures, 100)),
        np.vstack([truth.xyxy_B4, truth.xyxy_B4[:100]])
        + np.vstack([random.uniform(-2, 2, (num, 4)), np.tile(random.normal(0, 20, (100, 2)), 2)]),
        random.uniform(0, 1, num + 100).round(2),  # with ties
    )
    for max_boxes in (1, 3, 100):
        ours, theirs = (
            evaluated(predicted, truth, pictures, max_boxes=max_boxes),
            coco(predicted, truth, pictures, max_boxes),
        )
        np.testing.assert_allclose([ours[n] for n in theirs], list(theirs.values()), rtol=0, atol=CLOSE)


@settings(max_examples=60, deadline=None)
@given(st.lists(corners, min_size=1, max_size=5), st.lists(corners, min_size=1, max_size=5))
def test_iou_equals_that_of_pycocotools(first: list[Any], second: list[Any]) -> None:
    from pycocotools import mask

    def sized(boxes: list[Any]) -> Floats:
        return np.array([(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes])

    theirs = mask.iou(sized(first), sized(second), [0] * len(second))
    np.testing.assert_allclose(iou_matrix(np.array(first), np.array(second)), theirs, rtol=0, atol=1e-12)


def test_measures_of_four_pictures_worked_out_by_hand() -> None:
    # picture 0: right to the pixel; 1: half of it (IoU 50 / 100); 2: a truth and no box; 3: empty, with a box
    truth = boxes_of([(p, (0, 0, 10, 10), 1.0) for p in range(3)])
    predicted = boxes_of([(0, (0, 0, 10, 10), 0.9), (1, (0, 0, 5, 10), 0.8), (3, (0, 0, 5, 5), 0.95)])
    made = evaluate_boxes(predicted, truth, 4, np.random.default_rng(1))
    assert (made.pictures, made.empty, made.true_boxes, made.predicted_boxes) == (4, 1, 3, 3)
    np.testing.assert_array_equal(made.iou_P, [1.0, 0.5, 0.0, np.nan])
    # by score: wrong, right, right at .5: precision 1/2 to recall 1/3 and 2/3 to recall 2/3, so that after
    # the envelope 67 recalls (0 to .66) have 2/3; at .55 and above 34 recalls (0 to .33) have 1/2
    at_50, above = 67 / 101 * 2 / 3, 34 / 101 / 2
    expected = {
        "ap": (at_50 + 9 * above) / 10,
        "ap_50": at_50,
        "ap_75": above,
        "ar": (2 / 3 + 9 / 3) / 10,
        "mean_iou": 0.5,
        "median_iou": 0.5,
        "share_50": 2 / 3,
        "share_75": 1 / 3,
        "false_none": 1 / 3,
        "false_box": 1.0,
    }
    assert list(made.measures) == list(MEANINGS) == list(expected)
    for name, value in expected.items():
        measure = made.measures[name]
        assert measure.value == pytest.approx(value, abs=1e-12), name
        assert measure.low <= measure.value <= measure.high, name
    assert [made.measures[n].n for n in expected] == [3, 3, 3, 3, 3, 3, 3, 3, 3, 1]


def test_only_the_best_scored_box_of_a_picture_counts_unless_told_otherwise() -> None:
    truth = boxes_of([(0, (0, 0, 10, 10), 1.0)])
    predicted = boxes_of([(0, (0, 0, 10, 10), 0.4), (0, (20, 20, 30, 30), 0.6)])
    assert evaluated(predicted, truth, 1)["ap"] == 0
    assert evaluated(predicted, truth, 1)["mean_iou"] == 0
    assert evaluated(predicted, truth, 1, max_boxes=2)["ap"] == pytest.approx(0.5)
    assert evaluated(predicted, truth, 1, max_boxes=2)["mean_iou"] == 0  # still that of the best-scored


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    truth = boxes_of([(p, (0, 0, 10, 10), 1.0) for p in range(4)])
    widths = (10.0, 4.0, 2.0, 8.0)  # of 10: IoU 1, .4, .2, .8
    predicted = boxes_of([(p, (0.0, 0.0, width, 10.0), 0.5) for p, width in enumerate(widths)])
    made = evaluated(predicted, truth, 5)
    assert (made["mean_iou"], made["median_iou"]) == pytest.approx((0.6, 0.6))
    assert evaluated(predicted, boxes_of([(p, (0, 0, 10, 10), 1.0) for p in (0, 1)]), 4)[
        "median_iou"
    ] == pytest.approx(0.7)


def test_of_boxes_with_one_score_the_first_counts() -> None:
    truth = boxes_of([(0, (0, 0, 10, 10), 1.0)])
    right, wrong = (0, (0.0, 0.0, 10.0, 10.0), 0.5), (0, (20.0, 20.0, 30.0, 30.0), 0.5)
    assert evaluated(boxes_of([right, wrong]), truth, 1)["ap"] == pytest.approx(1)
    assert evaluated(boxes_of([wrong, right]), truth, 1)["ap"] == 0


def test_without_truths_or_without_boxes_what_cannot_be_counted_is_nan() -> None:
    none, one = boxes_of([]), boxes_of([(0, (0, 0, 10, 10), 0.5)])
    empty = evaluated(one, none, 2, resamples=20)
    assert empty["false_box"] == 0.5
    assert [name for name, value in empty.items() if np.isnan(value)] == [
        name for name in MEANINGS if name != "false_box"
    ]
    missed = evaluated(none, one, 1, resamples=20)
    assert np.isnan(missed.pop("false_box"))
    assert missed.pop("false_none") == 1
    assert set(missed.values()) == {0}
    assert all(np.isnan(value) for value in evaluated(none, none, 3, resamples=20).values() if value != 0)


def test_the_bootstrap_counts_a_picture_drawn_twice_as_two_pictures() -> None:
    """A resample's measures, by pycocotools on its copies, are among the values that the interval is of."""
    random = np.random.default_rng(5)
    truth = boxes_of([(p, (0.0, 0.0, 10.0, 10.0), 1.0) for p in range(5)])
    shifts = random.uniform(0, 4, 7)
    predicted = boxes_of(
        [(p, (s, 0.0, 10.0 + s, 10.0), float(random.uniform())) for p, s in enumerate(shifts)]
    )
    spread = []
    for seed in range(40):
        drawn = np.random.default_rng(seed)
        rows = np.concatenate([drawn.choice(5, 5), 5 + drawn.choice(2, 2)])  # with and without truth apart
        copies = [
            boxes_of(
                [
                    (new, tuple(boxes.xyxy_B4[at].tolist()), float(boxes.score_B[at]))
                    for new, old in enumerate(rows)
                    for at in np.flatnonzero(boxes.picture_B == old)
                ]
            )
            for boxes in (predicted, truth)
        ]
        spread.append(coco(copies[0], copies[1], 7, 1)["ap"])
    measure = evaluate_boxes(predicted, truth, 7, np.random.default_rng(0), resamples=2000).measures["ap"]
    inside = np.mean([measure.low - 1e-9 <= value <= measure.high + 1e-9 for value in spread])
    assert inside >= 0.85  # 95 % in the long run
    assert measure.low == pytest.approx(np.quantile(spread, 0.025), abs=0.1)
    assert measure.high == pytest.approx(np.quantile(spread, 0.975), abs=0.1)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_laws_of_the_measures(case: tuple[Boxes, Boxes, int]) -> None:
    predicted, truth, pictures = case
    made = evaluated(predicted, truth, pictures)
    values = np.array([v for v in made.values() if not np.isnan(v)])
    assert ((values >= 0) & (values <= 1 + 1e-12)).all()
    if len(truth.picture_B):
        assert made["ap_75"] <= made["ap_50"] + 1e-12
        assert made["share_75"] <= made["share_50"]
        perfect = evaluated(truth, truth, pictures, max_boxes=100)
        assert [perfect[n] for n in ("ap", "ar", "mean_iou", "false_none")] == pytest.approx([1, 1, 1, 0])
    grown = Boxes(predicted.picture_B, predicted.xyxy_B4, predicted.score_B * 0.5)  # scores: order alone
    np.testing.assert_array_equal(list(made.values()), list(evaluated(grown, truth, pictures).values()))
