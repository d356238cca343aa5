"""How right predictions are: micro and macro top-k, F1, confusion, average-k.

A metric says per specimen whether the answer was right. The mean over specimens is the micro value; the mean
over classes of their shares of right answers is the macro value, by one of three conventions (`CONVENTIONS`)
that differ in what a class without specimens counts.

Shapes: N specimens, V validation specimens, K classes known to the model, C classes in all (the K, then those
only seen in the truth). Targets are class numbers, -1 where unlabelled; a target of K or more is a class that
the model does not know, and never right. A predicted class of -1 is no answer, and never right.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bioscan.errors import unknown

Scores = NDArray[np.floating]
Classes = NDArray[np.integer]
Right = NDArray[np.bool_]
Counts = NDArray[np.integer]
Values = NDArray[np.float64]

_CHUNK = 1 << 20  # numbers worked on at a time, so that temporary arrays stay in the processor's cache


def rank_of_truth(scores_NK: Scores, targets_N: Classes) -> NDArray[np.int64]:
    """Per specimen how many classes come before the true one: 0 when it is the best.

    Ties count in favour of the lower class number. K where the model does not know the class, where the
    target is -1, and where the true class has no score (NaN).

    >>> rank_of_truth(np.array([[.1, .9], [.5, .5]]), np.array([0, 1]))
    array([1, 1])
    """
    classes = scores_NK.shape[1]
    ranks_N = np.full(targets_N.shape, classes, np.int64)
    known = np.flatnonzero((targets_N >= 0) & (targets_N < classes))
    numbers = np.arange(classes)
    for rows in _chunks(known, classes):
        scores, target = scores_NK[rows], targets_N[rows][:, None]
        truth = np.take_along_axis(scores, target, axis=1)
        ahead = (scores > truth) | ((scores == truth) & (numbers < target))
        ranks_N[rows] = np.where(np.isnan(truth[:, 0]), classes, ahead.sum(axis=1))
    return ranks_N


def score_of_truth(scores_NK: Scores, targets_N: Classes) -> Values:
    """Per specimen the score of its true class; NaN where the model does not know it or nothing is known.

    A specimen is right by average-k where this reaches the threshold.
    """
    known = np.flatnonzero((targets_N >= 0) & (targets_N < scores_NK.shape[1]))
    found_N = np.full(targets_N.shape, np.nan)
    found_N[known] = scores_NK[known, targets_N[known]]
    return found_N


def is_behind(scores_NK: Scores, classes_N: Classes, targets_N: Classes) -> Right:
    """Per specimen whether a class comes after the true one; the orders are those of `rank_of_truth`.

    A class that the model does not know, or that has no score, comes after all that it knows.
    """
    first, second = (
        np.nan_to_num(score_of_truth(scores_NK, of), nan=-np.inf) for of in (classes_N, targets_N)
    )
    behind_N: Right = (first < second) | ((first == second) & (classes_N > targets_N) & ~np.isneginf(second))
    return behind_N


def set_sizes(scores_NK: Scores, threshold: float) -> Counts:
    """Per specimen how many classes reach a threshold."""
    passing_NK: Right = scores_NK >= np.float64(threshold)  # float64, not rounded to float32
    sizes_N: Counts = passing_NK.sum(axis=1)
    return sizes_N


def average_k_threshold(validation_VK: Scores, k: int) -> float:
    """The score that k classes a specimen reach on average: average-k by its definition.

    The mean of the V·k-th and the (V·k + 1)-th largest of all V × K probabilities (Lorieul, Joly and Shasha
    2021), so that without ties exactly V·k of them reach it. 0 where k is K or more. NaN without rows.

    Args:
        validation_VK: Probabilities of validation specimens, no NaN among them.
        k: Classes a specimen, on average.
    """
    rows, classes = validation_VK.shape
    return average_k_thresholds(validation_VK.ravel(), [k], rows=rows, classes=classes)[0]


def average_k_thresholds(largest_M: Scores, ks: Sequence[int], *, rows: int, classes: int) -> list[float]:
    """`average_k_threshold` for several k, of scores that need not be in memory together.

    Args:
        largest_M: The largest of all validation scores, as `keep_largest` gathers them: at least
            `most_for_average_k` of them, or all.
        ks: As in `average_k_threshold`.
        rows: Validation specimens.
        classes: K.
    """
    if rows == 0:
        return [float("nan")] * len(ks)
    falling_M = np.sort(largest_M)[::-1].astype(np.float64)
    return [float(falling_M[rows * k - 1 : rows * k + 1].mean()) if k < classes else 0.0 for k in ks]


def most_for_average_k(ks: Sequence[int], *, rows: int, classes: int) -> int:
    """How many of the largest scores the thresholds of average-k follow from."""
    return rows * max((k for k in ks if k < classes), default=0) + 1


def keep_largest(held_M: Scores, scores: Scores, most: int) -> Scores:
    """The largest of the values held so far and of further scores of any shape, `most` of them, unordered."""
    more = scores[scores >= held_M.min()] if held_M.size >= most else scores.ravel()
    joined = np.concatenate([held_M, more])
    return np.partition(joined, joined.size - most)[joined.size - most :] if joined.size > most else joined


def reference_average_k_threshold(validation_VK: Scores, k: int) -> float:
    """The threshold of the paper's program: the mean of the k-th largest probability of two specimens.

    They are the first and the last of the validation rows, in whatever order these come. Results under this
    rule are therefore mostly chance, and cannot be compared between runs; it is here to name what was
    published. k above K counts as K. NaN without rows.
    """
    rows, classes = validation_VK.shape
    if rows == 0:
        return float("nan")
    ends = np.sort(validation_VK[[0, -1]].astype(np.float64), axis=1)
    return float(ends[:, -min(k, classes)].mean())


def top_k_accuracy(scores_NK: Scores, targets_N: Classes, *, k: int) -> float:
    """Share of specimens whose true class is among the k best scores.

    Ties count in favour of the lower class number. Rows with target -1 (unlabelled) are left out; NaN if none
    is left. k above K counts as K.

    >>> top_k_accuracy(np.array([[.1, .9], [.8, .2]]), np.array([1, 1]), k=1)
    0.5
    """
    return micro(_top_k_right(scores_NK, targets_N, k), targets_N)


def macro_top_k_accuracy(
    scores_NK: Scores, targets_N: Classes, *, k: int, convention: str = "support"
) -> float:
    """Mean over classes of the share of their specimens whose true class is among the k best scores.

    Ties, unlabelled rows and k as in `top_k_accuracy`; the conventions are those of `CONVENTIONS`. A class
    counts as predicted where it is the best score of a labelled row.
    """
    classes = max(scores_NK.shape[1], int(targets_N.max(initial=-1)) + 1)
    labelled = targets_N >= 0
    support_C = class_counts(targets_N, classes)
    right_C = class_counts(targets_N[_top_k_right(scores_NK, targets_N, k)], classes)
    predicted_C = class_counts(scores_NK[labelled].argmax(axis=1), classes)
    return float(macro(recall(right_C, support_C), support_C, predicted_C, convention))


def micro(right_N: Right, targets_N: Classes) -> float:
    """Share of the labelled specimens that are right; NaN if there is none."""
    labelled = targets_N >= 0
    return float(right_N[labelled].mean()) if labelled.any() else float("nan")


def class_counts(classes_N: Classes, num_classes: int) -> NDArray[np.int64]:
    """How often each class number occurs; -1 is left out."""
    return np.bincount(classes_N[classes_N >= 0], minlength=num_classes)


def confusion_counts(
    targets_N: Classes, predicted_N: Classes
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The confusion matrix without its empty cells: true class, predicted class, specimens of each cell.

    Ordered by true class, then predicted class; -1 is no answer. Rows with target -1 are left out.

    >>> confusion_counts(np.array([0, 0, 0, 1, -1]), np.array([0, 1, 1, -1, 0]))
    (array([0, 0, 1]), array([ 0,  1, -1]), array([1, 2, 1]))
    """
    labelled = targets_N >= 0
    width = int(predicted_N.max(initial=-1)) + 2
    cells, specimens = np.unique(
        targets_N[labelled].astype(np.int64) * width + predicted_N[labelled] + 1, return_counts=True
    )
    return cells // width, cells % width - 1, specimens


def recall(right: Counts, support: Counts) -> Values:
    """Share of a class's specimens that are right; NaN without specimens. Any shape."""
    return _ratio(right, support)


def precision(right: Counts, predicted: Counts) -> Values:
    """Share of the answers naming a class that are right; NaN where no answer names it. Any shape."""
    return _ratio(right, predicted)


def f1(right: Counts, support: Counts, predicted: Counts) -> Values:
    """Harmonic mean of recall and precision, 2·right / (support + predicted); NaN where both are 0.

    A class that has specimens and no right answer has 0, also when it was never predicted.
    """
    return _ratio(2 * np.asarray(right), np.asarray(support) + predicted)


def f1_micro(right_C: Counts, support_C: Counts, predicted_C: Counts) -> Values:
    """F1 of all answers taken together; the micro top-1 accuracy where every specimen has an answer.

    The last axis is that of the classes; NaN without specimens and answers.
    """
    right, support, predicted = (np.sum(c, axis=-1) for c in (right_C, support_C, predicted_C))
    return f1(right, support, predicted)


def f1_macro(right_C: Counts, support_C: Counts, predicted_C: Counts, convention: str = "support") -> Values:
    """Mean over classes of their F1, by a convention of `CONVENTIONS`; the last axis is that of the classes.

    `seen` is scikit-learn's `f1_score(average="macro")`.
    """
    return macro(f1(right_C, support_C, predicted_C), support_C, predicted_C, convention)


CONVENTIONS: Final[dict[str, str]] = {
    "support": "classes with specimens in the truth (scikit-learn's balanced_accuracy_score)",
    "all": "all classes, those without specimens as 0 (the paper's program)",
    "seen": "classes in the truth or among the answers, those without specimens as 0 "
    "(scikit-learn's recall_score)",
}
"""What a macro value is the mean over."""


def macro(values_C: Values, support_C: Counts, predicted_C: Counts, convention: str = "support") -> Values:
    """Mean over classes of a value per class, by a convention of `CONVENTIONS`.

    The last axis is that of the classes. NaN where there is no class to count; within the counted classes NaN
    counts as 0.

    Raises:
        RequestError: unknown convention.
    """
    if convention not in CONVENTIONS:
        raise unknown("macro convention", convention, CONVENTIONS)
    counted = {
        "support": np.asarray(support_C) > 0,
        "all": np.ones(np.shape(support_C), bool),
        "seen": (np.asarray(support_C) > 0) | (np.asarray(predicted_C) > 0),
    }[convention]
    counted = np.broadcast_to(counted, np.shape(values_C))
    total = np.where(counted & ~np.isnan(values_C), values_C, 0.0).sum(axis=-1)
    return _ratio(total, counted.sum(axis=-1))


def _top_k_right(scores_NK: Scores, targets_N: Classes, k: int) -> Right:
    right_N: Right = rank_of_truth(scores_NK, targets_N) < min(k, scores_NK.shape[1])
    return right_N


def _ratio(part: NDArray[np.generic], whole: NDArray[np.generic]) -> Values:
    part_, whole_ = np.broadcast_arrays(np.asarray(part, np.float64), np.asarray(whole, np.float64))
    ratio: Values = np.divide(part_, whole_, out=np.full(part_.shape, np.nan), where=whole_ != 0)
    return ratio


def _chunks(rows: NDArray[np.intp], width: int) -> Iterator[NDArray[np.intp]]:
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, rows.size, step):
        yield rows[start : start + step]
