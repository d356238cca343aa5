"""How well boxes lie: IoU, and precision and recall as COCO counts them.

The conventions of COCO (pycocotools), which the numbers here equal:

- Boxes are continuous: the width is x1 - x0, no pixel is added.
- Of each picture the best-scored boxes count, at most `max_boxes`, equal scores in their order. Here one
  unless told otherwise: a picture holds one specimen. COCO's AR@1 is the recall with one box; its usual AP
  takes up to 100.
- At each threshold of IoU a picture's boxes, best score first, each take the truth that they overlap most
  and that is still free (the last of equals), if the threshold is reached.
- Over all pictures the boxes are ordered by score, equal ones in the order of the pictures. Precision is
  made to fall with recall, and its mean over 101 recalls (0, 0.01 … 1) is the average precision.
- Thresholds are .5, .55 … .95; AP and AR are means over them. A picture without a truth adds its boxes as
  wrong ones.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bioscan.analysis.intervals import RESAMPLES, bootstrap, wilson

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

THRESHOLDS: Final = np.linspace(0.5, 0.95, 10)
RECALLS: Final = np.linspace(0.0, 1.0, 101)

_CELLS: Final = 2_000_000
"""Resamples times boxes that are held at a time."""

MEANINGS: Final = {
    "ap": "average precision, mean over IoU .5 to .95: right boxes, sure ones first",
    "ap_50": "average precision where IoU .5 is enough",
    "ap_75": "average precision where IoU .75 is needed",
    "ar": "share of the true boxes found, mean over IoU .5 to .95",
    "mean_iou": "overlap of the best-scored box with the truth; no box counts 0",
    "median_iou": "the same, median",
    "share_50": "pictures with a truth whose best-scored box reaches IoU .5",
    "share_75": "pictures with a truth whose best-scored box reaches IoU .75",
    "false_none": "pictures with a truth, but no box",
    "false_box": "empty pictures with a box",
}
"""Measure -> what it says."""


class Boxes(NamedTuple):
    """Boxes of many pictures; those of a picture in order, which decides between equal scores."""

    picture_B: Ints
    """Number of the picture of each."""
    xyxy_B4: Floats
    score_B: Floats


@dataclass(frozen=True)
class Measure:
    """A value and how far it may be off by chance."""

    value: float
    """NaN where there is nothing to count."""
    low: float
    """Lower end of the 95 % interval: Wilson for shares of pictures, else bootstrap of pictures, those with
    and without a truth apart."""
    high: float
    n: int
    """What it is of: true boxes for AP and AR, else pictures."""


@dataclass(frozen=True, eq=False)
class BoxEvaluation:
    """Predicted boxes against true ones."""

    pictures: int
    empty: int
    """Pictures without a true box."""
    true_boxes: int
    predicted_boxes: int
    """Those that count: at most `max_boxes` a picture."""
    max_boxes: int
    measures: dict[str, Measure]
    """In the order of `MEANINGS`."""
    iou_P: Floats
    """Overlap of each picture's best-scored box with the truth that it overlaps most; 0 without a box, NaN
    without a truth."""


def iou_matrix(first_N4: Floats, second_M4: Floats) -> Floats:
    """Intersection over union of each box with each other, N x M; 0 for two boxes without area.

    >>> iou_matrix(np.array([[0.0, 0, 2, 2]]), np.array([[1.0, 0, 3, 2], [5, 5, 6, 6]])).round(4).tolist()
    [[0.3333, 0.0]]
    """
    return _iou(first_N4[:, None], second_M4[None])


def _iou(first: Floats, second: Floats) -> Floats:
    """IoU of boxes along the last axis, the others broadcast."""
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    shared = np.clip(high - low, 0, None).prod(axis=-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(axis=-1) for box in (first, second)]
    union = areas[0] + areas[1] - shared
    made: Floats = np.divide(shared, union, out=np.zeros(union.shape), where=union > 0)
    return made


def evaluate_boxes(
    predicted: Boxes,
    truth: Boxes,
    num_pictures: int,
    generator: np.random.Generator,
    *,
    max_boxes: int = 1,
    resamples: int = RESAMPLES,
) -> BoxEvaluation:
    """Score predicted boxes against true ones; the conventions are told at the top of this module.

    Args:
        predicted: Boxes of pictures 0 to `num_pictures` - 1.
        truth: True boxes of the same pictures; their scores are not looked at.
        num_pictures: P, those without any box too.
        generator: Source of the bootstrap's draws.
        max_boxes: Boxes of a picture that count, best score first.
        resamples: Of the bootstrap; 0: its intervals are NaN.
    """
    predicted, rank_D = _best(predicted, max_boxes)
    truth = _take(truth, np.argsort(truth.picture_B, kind="stable"))
    truths_P = np.bincount(truth.picture_B, minlength=num_pictures)
    pairs = _Pairs.of(predicted, truth, truths_P)
    matched_TD = _match(pairs, rank_D, len(truth.picture_B))
    order_D = np.argsort(-predicted.score_B, kind="stable")
    curve = _Curve(matched_TD[:, order_D], predicted.picture_B[order_D], truths_P.astype(np.float64))
    iou_P = _first_iou(pairs, predicted, rank_D, truths_P)

    def statistic(drawn_RP: Ints) -> Floats:
        return np.hstack([curve.precision_recall(drawn_RP), _mean_and_median(iou_P, drawn_RP)])

    has_truth_P = truths_P > 0
    has_box_P = np.bincount(predicted.picture_B, minlength=num_pictures) > 0
    names = ("ap", "ap_50", "ap_75", "ar", "mean_iou", "median_iou")
    values = statistic(np.ones((1, num_pictures), np.int64))[0]
    low, high = np.full((2, len(names)), np.nan)
    if resamples and num_pictures:
        classes_P = has_truth_P.astype(np.int64)
        ones_P = np.ones(num_pictures, np.int64)
        low, high = bootstrap(statistic, classes_P, ones_P, generator, resamples=resamples)
    num_truths, num_with = len(truth.picture_B), int(has_truth_P.sum())
    support = (num_truths,) * 4 + (num_with,) * 2
    measures = {
        name: Measure(float(value), float(below), float(above), n)
        for name, value, below, above, n in zip(names, values, low, high, support, strict=True)
    }
    shares = {
        "share_50": iou_P[has_truth_P] >= 0.5,
        "share_75": iou_P[has_truth_P] >= 0.75,
        "false_none": ~has_box_P[has_truth_P],
        "false_box": has_box_P[~has_truth_P],
    }
    return BoxEvaluation(
        pictures=num_pictures,
        empty=num_pictures - num_with,
        true_boxes=num_truths,
        predicted_boxes=len(predicted.picture_B),
        max_boxes=max_boxes,
        measures=measures | {name: _share(hits) for name, hits in shares.items()},
        iou_P=iou_P,
    )


def _share(hits: Bools) -> Measure:
    n = hits.size
    low, high = wilson(int(hits.sum()), n)
    return Measure(float(hits.mean()) if n else np.nan, float(low), float(high), n)


def _take(boxes: Boxes, rows: Ints) -> Boxes:
    return Boxes(boxes.picture_B[rows], boxes.xyxy_B4[rows], boxes.score_B[rows])


def _best(boxes: Boxes, max_boxes: int) -> tuple[Boxes, Ints]:
    """The best-scored boxes of each picture, picture by picture, and the rank of each."""
    order = np.lexsort((-boxes.score_B, boxes.picture_B))  # stable: equal scores keep their order
    sorted_ = _take(boxes, order)
    first = np.searchsorted(sorted_.picture_B, sorted_.picture_B)
    rank = np.arange(order.size) - first
    kept = np.flatnonzero(rank < max_boxes)
    return _take(sorted_, kept), rank[kept]


class _Pairs(NamedTuple):
    """Each predicted box with each truth of its picture; sorted by box, then by truth."""

    box_Q: Ints
    truth_Q: Ints
    iou_Q: Floats

    @classmethod
    def of(cls, predicted: Boxes, truth: Boxes, truths_P: Ints) -> "_Pairs":
        count_D = truths_P[predicted.picture_B]
        box_Q = np.repeat(np.arange(count_D.size), count_D)
        start_P = np.cumsum(truths_P) - truths_P
        within_Q = np.arange(box_Q.size) - np.repeat(np.cumsum(count_D) - count_D, count_D)
        truth_Q = start_P[predicted.picture_B[box_Q]] + within_Q
        return cls(box_Q, truth_Q, _iou(predicted.xyxy_B4[box_Q], truth.xyxy_B4[truth_Q]))


def _match(pairs: _Pairs, rank_D: Ints, num_truths: int) -> Bools:
    """Which box takes a truth, T x D; all pictures at once, the best box of each before the second."""
    least_T1 = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    matched_TD = np.zeros((THRESHOLDS.size, rank_D.size), bool)
    is_free_TG = np.ones((THRESHOLDS.size, num_truths), bool)
    rank_Q = rank_D[pairs.box_Q]
    for rank in range(int(rank_Q.max()) + 1 if rank_Q.size else 0):
        box_Q, truth_Q, iou_Q = (values[rank_Q == rank] for values in pairs)
        if not box_Q.size:
            continue
        start = np.flatnonzero(np.diff(box_Q, prepend=-1))
        size = np.diff(start, append=box_Q.size)
        usable_TQ = np.where(is_free_TG[:, truth_Q] & (iou_Q >= least_T1), iou_Q, -1.0)
        best_TQ = np.repeat(np.maximum.reduceat(usable_TQ, start, axis=1), size, axis=1)
        place_TQ = np.where((usable_TQ == best_TQ) & (best_TQ >= 0), np.arange(box_Q.size), -1)
        last_TS = np.maximum.reduceat(place_TQ, start, axis=1)  # of equals the last
        threshold, segment = np.nonzero(last_TS >= 0)
        matched_TD[threshold, box_Q[start[segment]]] = True
        is_free_TG[threshold, truth_Q[last_TS[threshold, segment]]] = False
    return matched_TD


@dataclass(frozen=True, eq=False)
class _Curve:
    """The boxes of all pictures, best score first."""

    matched_TD: Bools
    picture_D: Ints
    truths_P: Floats

    def precision_recall(self, drawn_RP: Ints) -> Floats:
        """AP, AP at .5, AP at .75 and AR of resampled pictures, R x 4, from how often each was drawn."""
        step = max(1, _CELLS // max(1, self.picture_D.size))
        parts = range(0, len(drawn_RP), step)
        return np.concatenate([self._precision_recall(drawn_RP[start : start + step]) for start in parts])

    def _precision_recall(self, drawn_RP: Ints) -> Floats:
        times_RD = drawn_RP[:, self.picture_D].astype(np.float64)
        boxes_RD = np.cumsum(times_RD, axis=1)
        truths_R1 = (drawn_RP @ self.truths_P)[:, None]
        precision_TR = np.zeros((THRESHOLDS.size, len(drawn_RP)))
        recall_TR = np.zeros_like(precision_TR)
        with np.errstate(invalid="ignore", divide="ignore"):
            for matched_D, precision_R, recall_R in zip(
                self.matched_TD, precision_TR, recall_TR, strict=True
            ):
                right_RD = np.cumsum(times_RD * matched_D, axis=1)
                envelope_RD = np.maximum.accumulate((right_RD / (boxes_RD + np.spacing(1)))[:, ::-1], axis=1)
                envelope_RD = np.pad(envelope_RD[:, ::-1], ((0, 0), (0, 1)))  # beyond the last recall: 0
                reached_RD = right_RD / truths_R1
                for row, reached_D in enumerate(reached_RD):
                    precision_R[row] = envelope_RD[row, np.searchsorted(reached_D, RECALLS)].mean()
                if reached_RD.shape[1]:
                    recall_R[:] = reached_RD[:, -1]
        made = np.stack([precision_TR.mean(0), precision_TR[0], precision_TR[5], recall_TR.mean(0)], axis=1)
        return np.where(truths_R1 > 0, made, np.nan)


def _first_iou(pairs: _Pairs, predicted: Boxes, rank_D: Ints, truths_P: Ints) -> Floats:
    """Of each picture: the best-scored box's overlap with the truth that it overlaps most."""
    iou_P = np.where(truths_P > 0, 0.0, np.nan)
    is_first_Q = rank_D[pairs.box_Q] == 0
    np.maximum.at(iou_P, predicted.picture_B[pairs.box_Q[is_first_Q]], pairs.iou_Q[is_first_Q])
    return iou_P


def _mean_and_median(values_P: Floats, drawn_RP: Ints) -> Floats:
    """Mean and median of resampled values, R x 2; NaN values are left out."""
    order = np.argsort(values_P, kind="stable")[: np.count_nonzero(~np.isnan(values_P))]
    if not order.size:
        return np.full((len(drawn_RP), 2), np.nan)
    values, drawn_RV = values_P[order], drawn_RP[:, order]
    total_RV = np.cumsum(drawn_RV, axis=1)
    n_R = total_RV[:, -1]
    middle = [
        values[np.minimum((total_RV <= place_R[:, None]).sum(axis=1), values.size - 1)]
        for place_R in ((n_R - 1) // 2, n_R // 2)
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([drawn_RV @ values / n_R, (middle[0] + middle[1]) / 2], axis=1)
