"""Metrics against scikit-learn, against brute force, and the laws they keep."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from bioscan.analysis import metrics
from bioscan.errors import RequestError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

CASES = 1000
CLOSE = 1e-12


def random_case(seed: int) -> tuple[Floats, Ints, int]:
    """Scores without ties, targets of some of the classes (others absent), and how many classes there are."""
    random = np.random.default_rng(seed)
    num, classes = int(random.integers(1, 40)), int(random.integers(3, 9))
    present = random.choice(classes, size=int(random.integers(1, classes + 1)), replace=False)
    targets = random.choice(present, size=num)
    scores = random.dirichlet(np.full(classes, 0.5), size=num) + random.uniform(0, 1e-9, (num, classes))
    return scores, targets, classes


def counts_of(targets: Ints, predicted: Ints, classes: int) -> tuple[Ints, Ints, Ints]:
    right = metrics.class_counts(targets[targets == predicted], classes)
    return right, metrics.class_counts(targets, classes), metrics.class_counts(predicted, classes)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_a_thousand_random_cases_equal_scikit_learn() -> None:
    for seed in range(CASES):
        scores, targets, classes = random_case(seed)
        predicted = scores.argmax(axis=1)
        right, support, answers = counts_of(targets, predicted, classes)
        recall = metrics.recall(right, support)
        precision, f1 = metrics.precision(right, answers), metrics.f1(right, support, answers)
        seen: dict[str, Any] = {"average": "macro", "zero_division": 0}
        per_class = oracle.precision_recall_fscore_support(
            targets, predicted, labels=np.arange(classes), average=None, zero_division=0
        )
        for ours_C, theirs_C in zip((precision, recall, f1), per_class, strict=False):
            np.testing.assert_allclose(np.nan_to_num(ours_C), theirs_C, atol=CLOSE)
        k = 1 + seed % (classes - 1)
        pairs: list[tuple[Any, Any]] = [
            (metrics.micro(predicted == targets, targets), oracle.accuracy_score(targets, predicted)),
            (metrics.macro(recall, support, answers), oracle.balanced_accuracy_score(targets, predicted)),
            (
                metrics.macro(recall, support, answers, "seen"),
                oracle.recall_score(targets, predicted, **seen),
            ),
            (metrics.macro(recall, support, answers, "all"), per_class[1].mean()),
            (
                metrics.macro(precision, support, answers, "seen"),
                oracle.precision_score(targets, predicted, **seen),
            ),
            (metrics.f1_macro(right, support, answers, "seen"), oracle.f1_score(targets, predicted, **seen)),
            (metrics.f1_macro(right, support, answers, "all"), per_class[2].mean()),
            (metrics.f1_micro(right, support, answers), oracle.f1_score(targets, predicted, average="micro")),
            (metrics.macro_top_k_accuracy(scores, targets, k=1), recall[support > 0].mean()),
            (
                metrics.top_k_accuracy(scores, targets, k=k),
                oracle.top_k_accuracy_score(targets, scores, k=k, labels=np.arange(classes)),
            ),
        ]
        for ours, theirs in pairs:
            assert float(ours) == pytest.approx(float(theirs), abs=CLOSE), seed
        matrix = np.zeros((classes, classes), np.int64)
        true, named, cells = metrics.confusion_counts(targets, predicted)
        matrix[true, named] = cells
        assert (matrix == oracle.confusion_matrix(targets, predicted, labels=np.arange(classes))).all()


def test_the_three_macro_conventions_differ_by_what_an_absent_class_counts() -> None:
    # truth a a a b b c c c, one a taken for d: recalls 2/3, 1/2, 1; d is seen, e is not
    targets = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    predicted = np.array([0, 0, 3, 1, 0, 2, 2, 2])
    right, support, answers = counts_of(targets, predicted, 5)
    recall = metrics.recall(right, support)
    total = 2 / 3 + 1 / 2 + 1
    assert metrics.macro(recall, support, answers, "support") == pytest.approx(total / 3)
    assert metrics.macro(recall, support, answers, "seen") == pytest.approx(total / 4)
    assert metrics.macro(recall, support, answers, "all") == pytest.approx(total / 5)


def test_an_unknown_macro_convention_names_the_known_ones() -> None:
    with pytest.raises(RequestError, match="did you mean 'support'"):
        metrics.macro(np.ones(2), np.ones(2, int), np.ones(2, int), "suport")


def test_ties_count_in_favour_of_the_lower_class_number() -> None:
    scores = np.array([[0.4, 0.4, 0.2]] * 3)
    assert metrics.rank_of_truth(scores, np.array([0, 1, 2])).tolist() == [0, 1, 2]


def test_unlabelled_rows_are_left_out_and_unknown_classes_are_errors() -> None:
    scores = np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [np.nan, np.nan]])
    targets = np.array([0, -1, 2, 0])  # right, unlabelled, a class that the model does not know, no scores
    assert metrics.rank_of_truth(scores, targets).tolist() == [0, 2, 2, 2]
    assert metrics.top_k_accuracy(scores, targets, k=2) == pytest.approx(1 / 3)
    assert np.isnan(metrics.top_k_accuracy(scores, np.full(4, -1), k=1))
    np.testing.assert_array_equal(metrics.score_of_truth(scores, targets), [0.9, np.nan, np.nan, np.nan])
    # recalls: class 0 one of two, class 2 none of one
    assert metrics.macro_top_k_accuracy(scores, targets, k=1) == pytest.approx(0.25)


def test_no_specimens_give_nan_not_an_error() -> None:
    none = np.zeros(3, np.int64)
    assert np.isnan(metrics.f1_macro(none, none, none))
    assert np.isnan(metrics.f1_micro(none, none, none))
    assert np.isnan(metrics.average_k_threshold(np.empty((0, 4)), 1))
    assert np.isnan(metrics.reference_average_k_threshold(np.empty((0, 4)), 1))


def test_an_answer_that_is_missing_is_a_cell_of_the_confusion() -> None:
    true, named, cells = metrics.confusion_counts(np.array([1, 1, 1, -1]), np.array([-1, -1, 1, 1]))
    assert (true.tolist(), named.tolist(), cells.tolist()) == ([1, 1], [-1, 1], [2, 1])


# -- laws


@st.composite
def scored(draw: st.DrawFn) -> tuple[Floats, Ints]:
    """Scores with ties, and targets that may be unlabelled or unknown."""
    num, classes = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    scores = draw(arrays(np.float64, (num, classes), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])))
    return scores, draw(arrays(np.int64, num, elements=st.integers(-1, classes)))


@given(scored())
@settings(max_examples=60, deadline=None)
def test_accuracy_does_not_fall_as_k_grows(case: tuple[Floats, Ints]) -> None:
    scores, targets = case
    values = [metrics.top_k_accuracy(scores, targets, k=k) for k in range(1, scores.shape[1] + 2)]
    assert np.isnan(values).all() or (np.diff(values) >= 0).all()


@given(scored(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_specimens_changes_nothing(case: tuple[Floats, Ints], random: Any) -> None:
    scores, targets = case
    order = np.array(random.sample(range(targets.size), targets.size))
    for k in (1, 2):
        for value in (metrics.top_k_accuracy, metrics.macro_top_k_accuracy):
            before, after = value(scores, targets, k=k), value(scores[order], targets[order], k=k)
            assert before == pytest.approx(after, nan_ok=True)


@given(scored())
@settings(max_examples=60, deadline=None)
def test_the_rank_of_the_truth_is_its_place_in_a_stable_sort(case: tuple[Floats, Ints]) -> None:
    scores, targets = case
    known = (targets >= 0) & (targets < scores.shape[1])
    places = [
        int(np.flatnonzero(np.argsort(-row, kind="stable") == target)[0])
        for row, target in zip(scores[known], targets[known], strict=True)
    ]
    assert metrics.rank_of_truth(scores, targets)[known].tolist() == places


@given(scored(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_class_is_behind_the_truth_where_its_place_is(case: tuple[Floats, Ints], seed: int) -> None:
    scores, targets = case
    others = np.random.default_rng(seed).integers(-1, scores.shape[1] + 1, targets.size)
    places = metrics.rank_of_truth(scores, others), metrics.rank_of_truth(scores, targets)
    assert metrics.is_behind(scores, others, targets).tolist() == (places[0] > places[1]).tolist()


# -- average-k


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_the_largest_values_are_those_of_a_sort(kind: type[np.floating[Any]]) -> None:
    random = np.random.default_rng(3)
    for values in (
        random.dirichlet(np.full(7, 0.1), 501).astype(kind),
        np.round(random.random((40, 5)), 1).astype(kind),  # ties
        np.zeros((3, 4), kind),
        np.full((9, 4), 0.25, kind),
    ):
        for most in (1, 2, values.size // 3 + 1, values.size, 2 * values.size):
            held = np.zeros(0, kind)
            for part in np.array_split(values, 4):
                held = metrics.keep_largest(held, part, most)
            assert np.sort(held)[::-1].tolist() == np.sort(values.ravel())[::-1][:most].tolist()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 3, 5, 10])
def test_without_ties_exactly_k_classes_a_specimen_reach_the_average_k_threshold(
    kind: type[np.floating[Any]], k: int
) -> None:
    scores = np.random.default_rng(k).dirichlet(np.full(12, 0.4), 700).astype(kind)
    assert np.unique(scores).size > 0.99 * scores.size
    threshold = metrics.average_k_threshold(scores, k)
    assert abs(metrics.set_sizes(scores, threshold).mean() - k) <= 1 / 700


def test_the_average_k_threshold_is_the_mean_of_two_neighbours() -> None:
    scores = np.array([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]])
    # two specimens, k = 1: the second and third largest of the six
    assert metrics.average_k_threshold(scores, 1) == pytest.approx((0.5 + 0.3) / 2)
    assert metrics.average_k_threshold(scores, 3) == 0.0


def test_several_thresholds_at_once_are_each_of_them() -> None:
    scores = np.random.default_rng(0).dirichlet(np.ones(6), 50).astype(np.float32)
    ks: Sequence[int] = (5, 1, 9, 3)
    most = metrics.most_for_average_k(ks, rows=50, classes=6)
    assert most == 251
    held = np.zeros(0, np.float32)
    for part in np.array_split(scores, 3):
        held = metrics.keep_largest(held, part, most)
    assert metrics.average_k_thresholds(held, ks, rows=50, classes=6) == [
        metrics.average_k_threshold(scores, k) for k in ks
    ]


def test_the_reference_rule_is_the_mean_over_the_first_and_last_row_only() -> None:
    scores = np.random.default_rng(5).dirichlet(np.ones(6), 30)
    for k in (1, 3, 6, 9):
        place = min(k, 6)
        ends = [sorted(scores[row], reverse=True)[place - 1] for row in (0, -1)]
        assert metrics.reference_average_k_threshold(scores, k) == pytest.approx(sum(ends) / 2, abs=CLOSE)
        middle = np.random.default_rng(6).permutation(np.arange(1, 29))
        shuffled = scores[[0, *middle, 29]]
        assert metrics.reference_average_k_threshold(shuffled, k) == pytest.approx(sum(ends) / 2, abs=CLOSE)
