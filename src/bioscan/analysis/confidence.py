"""What a probability is worth: temperature scaling, calibration errors, and answering only when sure.

Probabilities are those shown: after logit adjustment and temperature. `right_N` says per specimen whether the
answer was right; a specimen without an answer has the probability NaN.

Shapes: N specimens, B of them in a batch, L leaf taxa, K classes, R ranks, G taxa at one rank, M bins.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bioscan.analysis import hierarchy, metrics
from bioscan.analysis.intervals import wilson
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import DataError, unknown

Array = NDArray[np.floating[Any]]
Classes = NDArray[np.integer[Any]]
Right = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Batches = Callable[[], Iterable[tuple[Array, Classes]]]
"""Gives scores and targets batch by batch; called anew for each pass over them."""

TEMPERATURES: Final = (0.05, 20.0)
"""Least and greatest temperature that is fitted."""
BINS: Final = 15
"""Guo et al. 2017, and the default of torchmetrics."""
KINDS: Final = {
    "width": "bins of equal width; a probability of exactly 1 has one of its own, as in torchmetrics",
    "mass": "bins of equally many specimens; equal probabilities stay together",
}
"""How probabilities are binned."""

_CELLS = 1 << 18  # numbers worked on at a time, so that temporary arrays stay in the processor's cache
_LOG_ZERO = -104.0  # about the logarithm of the smallest positive float32: a probability of 0 is no less
_PASSES = 60
_TOLERANCE = 1e-6  # of log T
_FARTHEST = 2.0  # the longest first step of Newton's method, in log T


@dataclass(frozen=True)
class Temperature:
    """A fitted temperature, and the mean negative log-likelihood (natural logarithm) at 1 and at it."""

    value: float
    nll_before: float
    nll_after: float
    n: int
    """Records fitted on."""
    at_bound: bool
    """The likelihood still rises towards temperatures outside TEMPERATURES: something else is wrong."""


def fit_temperature(batches: Batches, taxonomy: Taxonomy | None = None) -> Temperature:
    """The temperature T at which softmax(z / T) makes the true taxa most likely (Guo et al. 2017).

    Newton's method on log T, kept between points where the likelihood is known to rise and fall: some six
    passes over the batches. A temperature moves no leaf past another. That of partly named records is the
    marginal likelihood, logsumexp(z / T) - logsumexp(z / T over the taxon's leaves).

    Args:
        batches: Leaf logits, or logarithms of leaf probabilities (the same up to a constant per record),
            shape B × L; and targets: leaf numbers, or node numbers where a taxonomy is given. Records without
            a finite score are left out, and those whose target is none of the model's: -1, and with a
            taxonomy the root. A logarithm of -inf counts as 104 below the record's best.
        taxonomy: The tree whose leaves the scores are of.

    Returns:
        The temperature, within TEMPERATURES. Its likelihood is never worse than without one.

    Raises:
        DataError: no record can be used.
    """
    low, high = ends = float(np.log(TEMPERATURES[0])), float(np.log(TEMPERATURES[1]))
    n, before, slope, curvature = _likelihood(batches, taxonomy, 0.0)
    if n == 0:
        raise DataError("no temperature can be fitted: no record has scores and a taxon that the model knows")
    best, tried = (before, 0.0), {0.0}
    place, longest = 0.0, _FARTHEST
    for _ in range(_PASSES):
        if slope == 0:
            break
        low, high = (low, place) if slope > 0 else (place, high)
        step = -slope / curvature if curvature > 0 else np.inf
        ahead = place + step
        if abs(step) > longest or not low < ahead < high:  # Newton's method does not converge here
            end = low if slope > 0 else high
            ahead = (low + high) / 2 if end in tried else end
        if abs(ahead - place) < _TOLERANCE:
            break
        place, longest = ahead, abs(ahead - place) / 2
        tried.add(place)
        _, value, slope, curvature = _likelihood(batches, taxonomy, place)
        best = min(best, (value, place))
    return Temperature(float(np.exp(best[1])), before / n, best[0] / n, n, best[1] in ends)


def softmax(logits_NL: Array, temperature: float = 1.0) -> Floats:
    """Probabilities from logits at a temperature, in float64."""
    shifted_NL: Floats = logits_NL.astype(np.float64)
    shifted_NL -= shifted_NL.max(axis=1, keepdims=True)
    shifted_NL /= temperature
    np.exp(shifted_NL, out=shifted_NL)
    shifted_NL /= shifted_NL.sum(axis=1, keepdims=True)
    return shifted_NL


def apply_temperature(probabilities_NL: Array, temperature: float) -> Floats:
    """Probabilities at another temperature: each to the power 1 / T, then summing to 1 again. NaN stays."""
    with np.errstate(divide="ignore"):
        return softmax(np.log(probabilities_NL.astype(np.float64)), temperature)


def tempered_rank_probabilities(
    taxonomy: Taxonomy, probabilities_NL: Array, rank: str, temperature: float
) -> tuple[Floats, Ints]:
    """`hierarchy.rank_probabilities` at a temperature of the rank's own.

    Sums to what is left beside the leaves that have no taxon at the rank: each of these counts as one for
    itself. Ranks then no longer agree; `running_minimum` mends what is shown.
    """
    parts_NG, nodes_G = _rank_parts(taxonomy, probabilities_NL, rank)
    return apply_temperature(parts_NG, temperature)[:, : nodes_G.size], nodes_G


def fit_rank_temperatures(
    batches: Batches, taxonomy: Taxonomy, *, temperature: float = 1.0
) -> dict[str, Temperature]:
    """A temperature for the probabilities at each rank, those of `tempered_rank_probabilities`.

    Args:
        batches: Leaf logits and nodes, as in `fit_temperature`; some six passes for each rank.
        taxonomy: The tree.
        temperature: Of the leaf logits; the ranks' are applied after it.

    Returns:
        By rank. A rank at which no record is labelled is left out.
    """
    labelled_R = np.zeros(len(taxonomy.ranks), bool)
    for _, nodes_B in batches():
        labelled_R |= (hierarchy.lineages(taxonomy, nodes_B) >= 0).any(axis=1)
    ranks = [rank for rank, labelled in zip(taxonomy.ranks, labelled_R, strict=True) if labelled]
    return {rank: fit_temperature(_at_rank(batches, taxonomy, rank, temperature)) for rank in ranks}


def running_minimum(probability_NR: Array) -> Floats:
    """From the root down, no rank more probable than the ranks above it; NaN (no name) is passed over."""
    least_NR = np.fmin.accumulate(probability_NR.astype(np.float64), axis=1)
    return np.where(np.isnan(probability_NR), np.nan, least_NR)


def calibration_error(
    probability_N: Array, right_N: Right, *, bins: int = BINS, kind: str = "width"
) -> float:
    """Expected calibration error: how far confidence is from the share of right answers, on average.

    The mean over bins, weighted by specimens, of |share right - mean probability|. NaN where there is no
    answer at all.

    Args:
        probability_N: Of the answer; specimens without one are left out.
        right_N: Whether the answer is right.
        bins: Bins over 0 to 1.
        kind: One of KINDS.

    Raises:
        RequestError: an unknown kind.
    """
    curve = reliability_curve(probability_N, right_N, bins=bins, kind=kind)
    n_M = curve["n"]
    if not n_M.size:
        return float("nan")
    return float(np.average(np.abs(curve["accuracy"] - curve["confidence"]), weights=n_M))


def reliability_curve(
    probability_N: Array, right_N: Right, *, bins: int = BINS, kind: str = "width"
) -> dict[str, NDArray[Any]]:
    """Share of right answers by probability; bins without specimens are left out.

    Arguments as in `calibration_error`.

    Returns:
        Columns, one value a bin: `low` and `high` (the bin's bounds; of equal mass: its least and greatest
        probability), `n`, `confidence` (mean probability), `accuracy` (share right), and `accuracy_low` and
        `accuracy_high` (Wilson's 95 % interval).

    Raises:
        RequestError: an unknown kind.
    """
    if kind not in KINDS:
        raise unknown("kind of bins", kind, KINDS)
    answered = ~np.isnan(probability_N)
    order = np.argsort(probability_N[answered], kind="stable")
    ordered, right = probability_N[answered][order], right_N[answered][order]
    edges = np.linspace(0, 1, bins + 1).astype(ordered.dtype)
    if kind == "width":
        bin_N = _bins_of(ordered, edges)
    else:
        bin_N = np.searchsorted(ordered, ordered) * bins // max(1, ordered.size)
    used, starts, n = np.unique(bin_N, return_index=True, return_counts=True)
    if not used.size:
        n, hits, total = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    else:
        hits = np.add.reduceat(right.astype(np.int64), starts)
        total = np.add.reduceat(ordered.astype(np.float64), starts)
    if kind == "width":
        low, high = edges[used], np.append(edges[1:], edges[-1])[used]
    else:
        low, high = ordered[starts], ordered[starts + n - 1]
    accuracy_low, accuracy_high = wilson(hits, n)
    return {
        "low": low.astype(np.float64),
        "high": high.astype(np.float64),
        "n": n.astype(np.int64),
        "confidence": total / n,
        "accuracy": hits / n,
        "accuracy_low": accuracy_low,
        "accuracy_high": accuracy_high,
    }


def classwise_bins(probabilities_BK: Array, targets_B: Classes, *, bins: int = BINS) -> Floats:
    """What `classwise_error` needs of a batch; sums over batches are those of all records.

    Args:
        probabilities_BK: Of the classes; rows of NaN are left out.
        targets_B: Class numbers; -1 is left out, K or more is a class that the model does not know.
        bins: Bins of equal width.

    Returns:
        Shape 3 × K × (bins + 1): records, their summed probability, and how many are of the class.
    """
    classes = probabilities_BK.shape[1]
    edges = np.linspace(0, 1, bins + 1).astype(probabilities_BK.dtype)
    used_B = targets_B >= 0
    total_K = np.zeros(classes)
    higher: list[tuple[Ints, Array]] = [(np.zeros(0, np.int64), np.zeros(0))]
    for rows in _blocks(probabilities_BK):
        values = probabilities_BK[rows]
        used_B[rows] &= ~np.isnan(values.sum(axis=1))
        values = values if used_B[rows].all() else values[used_B[rows]]
        total_K += values.sum(axis=0, dtype=np.float64)
        places, columns = np.nonzero(values >= edges[1])
        higher.append((columns, values[places, columns]))
    columns, values = (np.concatenate(part) for part in zip(*higher, strict=True))
    known = np.flatnonzero(used_B & (targets_B < classes))
    true = targets_B[known]
    sums_3KM = np.zeros((3, classes, bins + 1))
    for row, weights in ((0, None), (1, values)):
        cells = columns * (bins + 1) + _bins_of(values, edges)
        sums_3KM[row] = np.bincount(cells, weights, minlength=sums_3KM[row].size).reshape(classes, -1)
    # nearly all values are in the lowest bin: it has what the others have not
    sums_3KM[0, :, 0] += used_B.sum() - sums_3KM[0].sum(axis=1)
    sums_3KM[1, :, 0] += total_K - sums_3KM[1].sum(axis=1)
    np.add.at(sums_3KM[2], (true, _bins_of(probabilities_BK[known, true], edges)), 1)
    return sums_3KM


def classwise_error(bins_3KM: Floats) -> float:
    """Classwise calibration error: the expected one of each class' probability, averaged over classes.

    All classes of a record count, not only the answer (Kull et al. 2019). Takes the summed `classwise_bins`;
    NaN without records.
    """
    records = bins_3KM[0].sum(axis=1)
    if not records.any():
        return float("nan")
    return float((np.abs(bins_3KM[1] - bins_3KM[2]).sum(axis=1) / records).mean())


def brier(probabilities_NK: Array, targets_N: Classes) -> Floats:
    """Brier's score of each specimen: the sum over classes of (probability - truth)², from 0 to 2.

    A true class that the model does not know is one of probability 0, so its score is at least 1. NaN where
    the target is -1, or the row.
    """
    squares_N = np.empty(len(probabilities_NK))
    for rows in _blocks(probabilities_NK):
        values = probabilities_NK[rows].astype(np.float64)
        squares_N[rows] = np.einsum("ij,ij->i", values, values)
    true_N = np.where(
        targets_N < probabilities_NK.shape[1], metrics.score_of_truth(probabilities_NK, targets_N), 0.0
    )
    found_N: Floats = squares_N - 2 * true_N + 1
    return found_N


def nll(probabilities_NK: Array, targets_N: Classes) -> Floats:
    """Negative log-likelihood of each specimen: -ln of the true class' probability.

    NaN where the target is -1 or the row is, and where the model does not know the class: there it is not
    defined, and is to be counted apart. 0 counts as the smallest normal number of its type, so that one
    record does not make a mean infinite.
    """
    least = np.finfo(probabilities_NK.dtype).tiny
    found_N: Floats = -np.log(np.maximum(metrics.score_of_truth(probabilities_NK, targets_N), least))
    return found_N


def risk_coverage(confidence_N: Array, right_N: Right, *, points: int = 200) -> dict[str, NDArray[Any]]:
    """Share of wrong answers among the most confident specimens, by how many these are.

    Specimens of equal confidence enter together. One without an answer (NaN or -inf) comes last and is wrong,
    so the curve always ends at a coverage of 1 and the overall error.

    Args:
        confidence_N: Greater is surer.
        right_N: Whether the answer is right.
        points: At most this many, about evenly spread over coverage, the first and the last among them.

    Returns:
        Columns by rising coverage: `coverage` (share of all specimens), `threshold` (least confidence among
        them), `n`, `risk` (share of them that is wrong), and its Wilson 95 % interval `low` and `high`.
    """
    threshold, n, wrong = _by_confidence(confidence_N, right_N)
    if n.size > points:
        shown = np.unique(np.searchsorted(n, np.linspace(n[0], n[-1], points)))
        threshold, n, wrong = threshold[shown], n[shown], wrong[shown]
    low, high = wilson(wrong, n)
    return {
        "coverage": n / max(1, len(confidence_N)),
        "threshold": threshold,
        "n": n,
        "risk": wrong / n,
        "low": low,
        "high": high,
    }


def aurc(confidence_N: Array, right_N: Right) -> float:
    """Area under the risk-coverage curve: the mean risk over the coverages 1/N, 2/N, …, 1; less is better.

    Within equal confidence it is the expectation over their orders, so the order of rows does not matter. All
    points count, not only those that `risk_coverage` shows. NaN without specimens.
    """
    _, n, wrong = _by_confidence(confidence_N, right_N)
    if not n.size:
        return float("nan")
    # among equals the expected number of wrong ones rises evenly: (before + j · share) / (start + j)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, n[-1] + 1))])
    start, before = np.append(0, n[:-1]), np.append(0, wrong[:-1])
    share = (wrong - before) / (n - start)
    return float((wrong - before + (before - start * share) * (harmonic[n] - harmonic[start])).sum() / n[-1])


def best_aurc(right_N: Right) -> float:
    """`aurc` if all right answers were surer than all wrong ones: the least that this error allows."""
    return aurc(right_N.astype(np.float64), right_N)


def coverage_at_risk(confidence_N: Array, right_N: Right, risk: float) -> float:
    """Greatest share of specimens, taken from the most confident down, of whom at most `risk` are wrong.

    0 where there is none. Found on the same specimens, it is a description and no promise: see `backoff`.
    """
    _, n, wrong = _by_confidence(confidence_N, right_N)
    return float(n[wrong <= risk * n].max(initial=0) / max(1, len(confidence_N)))


def _likelihood(
    batches: Batches, taxonomy: Taxonomy | None, log_temperature: float
) -> tuple[int, float, float, float]:
    """Records, and the sum of their negative log-likelihoods, its first and second derivative in log T."""
    inverse = float(np.exp(-log_temperature))
    n, value, first, second = 0, 0.0, 0.0, 0.0  # derivatives in 1 / T
    for logits_BL, targets_B in batches():
        if taxonomy is None:
            known_B = (targets_B >= 0) & (targets_B < logits_BL.shape[1])
            start_B, end_B = targets_B, targets_B + 1
        else:
            known_B = targets_B > 0
            start_B, end_B = taxonomy.first_leaf_N[targets_B], taxonomy.end_leaf_N[targets_B]
        for rows in _blocks(logits_BL):
            scores = logits_BL[rows].astype(np.float64)
            top = scores.max(axis=1, keepdims=True)
            used = known_B[rows] & np.isfinite(top[:, 0])
            scores = np.where(np.isneginf(scores[used]), top[used] + _LOG_ZERO, scores[used])
            all_3X = _moments(scores, inverse)
            below_3X = _moments_below(scores, inverse, start_B[rows][used], end_B[rows][used])
            sums = (all_3X - below_3X).sum(axis=1)
            n, value, first, second = n + len(scores), value + sums[0], first + sums[1], second + sums[2]
    return n, float(value), float(-inverse * first), float(inverse * first + inverse**2 * second)


def _moments(scores_XL: Floats, inverse: float) -> Floats:
    """Logsumexp of scores / T, and mean and variance of the scores under its softmax; shape 3 × X."""
    top_X = scores_XL.max(axis=1)
    below_XL = scores_XL - top_X[:, None]
    weight_XL = np.exp(below_XL * inverse)
    total_X = weight_XL.sum(axis=1)
    weight_XL *= below_XL
    mean_X = weight_XL.sum(axis=1) / total_X
    square_X = np.einsum("ij,ij->i", weight_XL, below_XL) / total_X
    return np.stack([np.log(total_X) + inverse * top_X, mean_X + top_X, square_X - mean_X**2])


def _moments_below(scores_XL: Floats, inverse: float, start_X: Classes, end_X: Classes) -> Floats:
    """`_moments` over the leaves start to end - 1 of each row."""
    found_3X = np.zeros((3, len(scores_XL)))
    leaf = np.flatnonzero(end_X - start_X == 1)
    score = scores_XL[leaf, start_X[leaf]]
    found_3X[0, leaf], found_3X[1, leaf] = inverse * score, score
    higher = np.flatnonzero(end_X - start_X > 1)
    spans, span_of = np.unique(np.stack([start_X, end_X])[:, higher], axis=1, return_inverse=True)
    for number, (start, end) in enumerate(spans.T):
        rows = higher[span_of == number]
        found_3X[:, rows] = _moments(scores_XL[rows, start:end], inverse)
    return found_3X


def _at_rank(batches: Batches, taxonomy: Taxonomy, rank: str, temperature: float) -> Batches:
    """Logarithms of what `tempered_rank_probabilities` tempers, and targets among the taxa at the rank."""

    def passed() -> Iterator[tuple[Array, Classes]]:
        for logits_BL, nodes_B in batches():
            for rows in _blocks(logits_BL):
                parts_BG, nodes_G = _rank_parts(taxonomy, softmax(logits_BL[rows], temperature), rank)
                true_B = hierarchy.lineages(taxonomy, nodes_B[rows])[taxonomy.ranks.index(rank)]
                with np.errstate(divide="ignore"):
                    scores_BG = np.log(parts_BG)
                yield scores_BG, np.where(true_B >= 0, np.searchsorted(nodes_G, true_B), -1)

    return passed


def _rank_parts(taxonomy: Taxonomy, probabilities_NL: Array, rank: str) -> tuple[Floats, Ints]:
    """Probabilities of the taxa at a rank, then of the leaves that have none there; and the taxa's nodes."""
    sums_NG, nodes_G = hierarchy.rank_probabilities(taxonomy, probabilities_NL, rank)
    ending_L = hierarchy.ancestors(taxonomy)[taxonomy.ranks.index(rank)] < 0
    return np.hstack([sums_NG, probabilities_NL[:, ending_L]]), nodes_G


def _bins_of(values: Array, edges: Array) -> Ints:
    """Bin of each value: its lower edge belongs to it, and the last is for the upper end alone."""
    return np.clip(np.searchsorted(edges, values, side="right") - 1, 0, edges.size - 1)


def _by_confidence(confidence_N: Array, right_N: Right) -> tuple[Floats, Ints, Ints]:
    """Distinct confidences, falling; specimens of at least each; how many of these are wrong."""
    known_N = np.where(np.isnan(confidence_N), -np.inf, confidence_N.astype(np.float64))
    order = np.argsort(-known_N, kind="stable")
    falling = known_N[order]
    wrong = np.cumsum(~right_N[order] | np.isneginf(falling), dtype=np.int64)
    last = np.flatnonzero(np.append(falling[1:] != falling[:-1], True)[: falling.size])
    return falling[last], last + np.int64(1), wrong[last]


def _blocks(scores_BL: Array) -> Iterator[slice]:
    step = max(1, _CELLS // max(1, scores_BL.shape[1]))
    return (slice(start, start + step) for start in range(0, len(scores_BL), step))
