"""Does a specimen belong to a taxon that the model has never seen? Scores, and how well they tell.

Every score here is higher for what looks more novel; papers mostly give the opposite sign. From a model's
outputs: the probability of its answer, largest logit, energy. From embeddings and the training specimens:
distance to neighbours (`knn_distance`), to the taxa (`Gaussians`), virtual logit (`Vim`). A row of NaN has
the score NaN.

Unseen specimens are the ones to find: they are the positives. The measures are those of OpenOOD (Yang et al.
2022) by scikit-learn's formulas, and ties are never broken by luck: what has one score is taken together.

N specimens, S seen ones, U unseen ones, K classes, P classes of a rank above, L leaf taxa, F features, D
principal dimensions.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bioscan.analysis.intervals import Z95

Floats = NDArray[np.floating[Any]]
Values = NDArray[np.float64]
Classes = NDArray[np.integer[Any]]

SHARE: Final = 0.95
"""Share of the unseen that are found where the false alarms are counted, and of the seen that are kept."""
CURVE_POINTS: Final = 200


# -- scores from a model's outputs


def msp(probabilities_NK: Floats) -> Values:
    """1 less the largest probability, shape N: the maximum softmax probability (Hendrycks & Gimpel 2017).

    >>> msp(np.array([[0.75, 0.25], [0.5, 0.5]])).tolist()
    [0.25, 0.5]
    """
    best_N: Values = probabilities_NK.max(axis=1, initial=0.0).astype(np.float64)
    return 1.0 - best_N


def msp_within(probabilities_NK: Floats, above_NP: Floats, parent_K: Classes) -> Values:
    """1 less the largest probability of a class within the most probable class of a rank above, shape N.

    High where the model is sure of the genus, say, and of none of its species: an unseen species of a known
    genus looks so. NaN where the class above has fewer than two classes below it: it says nothing there.

    Args:
        probabilities_NK: Of the classes at a rank.
        above_NP: Of the classes at a rank above.
        parent_K: The class above each class, a column of `above_NP`; -1 for none.

    >>> msp_within(np.array([[0.4, 0.4, 0.2]]), np.array([[0.8, 0.2]]), np.array([0, 0, 1])).tolist()
    [0.5]
    """
    found_N = np.full(len(probabilities_NK), np.nan)
    whole_N = ~np.isnan(above_NP.sum(axis=1))
    parent_N = np.where(whole_N, np.argmax(np.where(whole_N[:, None], above_NP, 0), axis=1), -1)
    for parent in np.unique(parent_N[whole_N]):
        below = np.flatnonzero(parent_K == parent)
        rows = np.flatnonzero(parent_N == parent)
        if below.size > 1:
            share_N = probabilities_NK[np.ix_(rows, below)].max(axis=1) / above_NP[rows, parent]
            found_N[rows] = 1.0 - np.minimum(share_N.astype(np.float64), 1.0)
    return found_N


def energy(logits_NK: Floats, temperature: float = 1.0) -> Values:
    """-T · logsumexp(z / T), shape N (Liu et al. 2020), which is higher for the novel as it stands.

    >>> energy(np.array([[0.0, 0.0]])).round(4).tolist()
    [-0.6931]
    """
    scaled_NK = np.asarray(logits_NK, np.float64) / temperature
    largest_N = scaled_NK.max(axis=1)
    sums_N = np.exp(scaled_NK - largest_N[:, None]).sum(axis=1)
    found_N: Values = -temperature * (largest_N + np.log(sums_N))
    return found_N


def max_logit(energy_N: Values, best_N: Values, temperature: float = 1.0) -> Values:
    """Minus the largest logit (Hendrycks et al. 2022), shape N, from the energy and the largest probability.

    As log p = z / T - logsumexp(z / T), the largest logit is T · log p - energy.

    Args:
        energy_N: As `energy` gives it.
        best_N: Largest probability at that temperature.
        temperature: T.
    """
    with np.errstate(divide="ignore"):
        return energy_N - temperature * np.log(best_N)


# -- scores from embeddings


def knn_distance(cosines_NK: Floats) -> Values:
    """1 less the cosine of the last of K nearest training specimens, shape N (Sun et al. 2022).

    Args:
        cosines_NK: As `neighbours.nearest` gives them, the nearest first.
    """
    return 1.0 - cosines_NK[:, -1].astype(np.float64)


@dataclass(frozen=True)
class Gaussians:
    """One normal distribution per class, all of one covariance, and one of all specimens together."""

    whitening_FD: Values
    """Turns features into ones of unit covariance within classes, by the pseudo-inverse."""
    means_KD: Values
    """Of the classes, whitened."""
    background_FD: Values
    """Likewise for the covariance of all specimens."""
    background_D: Values
    specimens: int

    @classmethod
    def fit(cls, features_NF: Floats, classes_N: Classes) -> "Gaussians":
        """From training specimens; classes without one are left out.

        Directions in which the specimens do not vary are left out of the distance (a pseudo-inverse), so with
        fewer specimens than features much of a novel specimen may go unseen.

        Args:
            features_NF: Finite.
            classes_N: Class numbers.

        Raises:
            ValueError: no specimen.
        """
        if not len(features_NF):
            raise ValueError("training specimens expected")
        _, class_N = np.unique(classes_N, return_inverse=True)
        counts_K = np.bincount(class_N)
        order = np.argsort(class_N, kind="stable")
        starts_K = np.cumsum(counts_K) - counts_K
        mean_F = features_NF.mean(axis=0, dtype=np.float64)
        sums_KF = np.add.reduceat(features_NF[order], starts_K, axis=0, dtype=np.float64)
        means_KF = sums_KF / counts_K[:, None]
        within_FF = np.zeros((mean_F.size, mean_F.size))
        for rows in _blocks(len(features_NF), mean_F.size):
            off_BF = features_NF[rows] - means_KF[class_N[rows]]
            within_FF += off_BF.T @ off_BF
        between_KF = (means_KF - mean_F) * np.sqrt(counts_K)[:, None]
        total_FF = within_FF + between_KF.T @ between_KF
        whitening_FD = _whitening(within_FF / len(features_NF))
        background_FD = _whitening(total_FF / len(features_NF))
        return cls(
            whitening_FD, means_KF @ whitening_FD, background_FD, mean_F @ background_FD, len(features_NF)
        )

    def mahalanobis(self, features_NF: Floats) -> Values:
        """Square of the Mahalanobis distance to the nearest class mean, shape N (Lee et al. 2018)."""
        found_N = np.empty(len(features_NF))
        for rows in _blocks(len(features_NF), max(self.means_KD.shape)):
            white_BD = features_NF[rows].astype(np.float64) @ self.whitening_FD
            # |x - m|² = |x|² - 2 x·m + |m|²; below 0 by rounding only
            squares_BK = np.square(self.means_KD).sum(axis=1) - 2 * white_BD @ self.means_KD.T
            found_N[rows] = np.maximum(np.square(white_BD).sum(axis=1) + squares_BK.min(axis=1), 0.0)
        return found_N

    def background(self, features_NF: Floats) -> Values:
        """Square of the distance to the distribution of all specimens, shape N.

        `mahalanobis` less this is the relative Mahalanobis distance (Ren et al. 2021): what is far from every
        class because it is far from everything, in a direction that does not tell classes apart, counts less.
        """
        found_N = np.empty(len(features_NF))
        for rows in _blocks(len(features_NF), self.background_D.size):
            white_BD = features_NF[rows].astype(np.float64) @ self.background_FD
            found_N[rows] = np.square(white_BD - self.background_D).sum(axis=1)
        return found_N


@dataclass(frozen=True)
class Vim:
    """Virtual-logit matching (Wang et al. 2022): the part of the features outside the space of the training
    specimens, as one more logit.
    """

    weight_LF: Values
    bias_L: Values
    origin_F: Values
    """Features at which the logits are as near to 0 as they can be."""
    residual_FR: Values
    """Basis of the directions outside the principal space."""
    scale: float
    """Mean largest logit of the training specimens over their mean residual."""

    @classmethod
    def fit(
        cls, features_NF: Floats, weight_LF: Floats, bias_L: Floats, *, dimensions: int | None = None
    ) -> "Vim":
        """From training specimens and the linear head of the model.

        Args:
            features_NF: Of the training specimens, finite.
            weight_LF: Of the head.
            bias_L: Of the head.
            dimensions: D, of the principal space; None: `principal_dimensions`.

        Raises:
            ValueError: no specimen, or a principal space that leaves nothing.
        """
        width = weight_LF.shape[1]
        dimensions = principal_dimensions(width) if dimensions is None else dimensions
        if not len(features_NF) or not 0 < dimensions < width:
            raise ValueError(f"{len(features_NF)} specimens, {dimensions} of {width} dimensions")
        weights_LF, biases_L = weight_LF.astype(np.float64), bias_L.astype(np.float64)
        origin_F = -np.linalg.pinv(weights_LF) @ biases_L
        moments_FF = np.zeros((width, width))
        for rows in _blocks(len(features_NF), width):
            off_BF = features_NF[rows] - origin_F
            moments_FF += off_BF.T @ off_BF
        _, vectors_FF = np.linalg.eigh(moments_FF)  # eigenvalues ascend
        made = cls(weights_LF, biases_L, origin_F, vectors_FF[:, : width - dimensions], 1.0)
        largest = residual = 0.0
        for rows in _blocks(len(features_NF), max(weights_LF.shape)):
            largest += float((features_NF[rows] @ weights_LF.T + biases_L).max(axis=1).sum())
            residual += float(made.residual(features_NF[rows]).sum())
        scale = largest / residual if residual > 0 else 0.0
        return cls(weights_LF, biases_L, origin_F, made.residual_FR, scale)

    def residual(self, features_NF: Floats) -> Values:
        """Length of the part outside the principal space, shape N."""
        outside_NR = (features_NF - self.origin_F) @ self.residual_FR
        length_N: Values = np.sqrt(np.square(outside_NR).sum(axis=1))
        return length_N

    def score(self, features_NF: Floats) -> Values:
        """The virtual logit less logsumexp of the logits, shape N."""
        found_N = np.empty(len(features_NF))
        for rows in _blocks(len(features_NF), max(self.weight_LF.shape)):
            logits_BL = features_NF[rows] @ self.weight_LF.T + self.bias_L
            found_N[rows] = self.scale * self.residual(features_NF[rows]) + energy(logits_BL)
        return found_N


def principal_dimensions(width: int) -> int:
    """D of virtual-logit matching for F features, as Wang et al. (2022) chose it: 1000 of 2048 and more, 512
    of 768 and more, else half.
    """
    return 1000 if width >= 2048 else 512 if width >= 768 else width // 2


# -- how well a score tells


@dataclass(frozen=True)
class Separation:
    """How well a score tells unseen specimens from seen ones; NaN where there is none of a kind."""

    auroc: float
    """Chance that an unseen specimen scores higher than a seen one, ties counting half."""
    aupr_unseen: float
    """Average precision in finding the unseen; by chance it is their share."""
    aupr_seen: float
    """Average precision in finding the seen, by the score turned round."""
    fpr95: float
    """OpenOOD's FPR@95: share of the seen flagged where the threshold finds 95 % of the unseen."""
    missed95: float
    """ODIN's FPR@95 (Liang et al. 2018): share of the unseen missed where 95 % of the seen are kept."""
    oscr: float
    """Area under the open-set classification rate (Dhamija et al. 2018): chance that a seen specimen is named
    right and scores lower than an unseen one, ties counting half. It is at most the closed-set accuracy.
    """


def separation(seen_S: Floats, unseen_U: Floats, right_S: NDArray[np.bool_]) -> Separation:
    """All measures of a score.

    Args:
        seen_S: Scores of seen specimens, no NaN.
        unseen_U: Of unseen ones.
        right_S: Whether the seen ones are named right.
    """
    if not seen_S.size or not unseen_U.size:
        return Separation(*[math.nan] * 6)
    below_S = placements(unseen_U, seen_S)  # share of the unseen that score higher
    found_U, flagged_S = _flagged(seen_S, unseen_U)
    return Separation(
        auroc=float(below_S.mean()),
        aupr_unseen=average_precision(unseen_U, seen_S),
        aupr_seen=average_precision(-seen_S, -unseen_U),
        fpr95=float(flagged_S[np.argmax(found_U >= SHARE)]),
        missed95=missed(seen_S, unseen_U, SHARE)[1],
        oscr=float(np.where(right_S, below_S, 0.0).mean()),
    )


def placements(these: Floats, others: Floats) -> Values:
    """Per one of `others` the share of `these` that score higher, ties counting half; shape of `others`.

    Their mean is the area under the ROC curve (Mann & Whitney 1947).

    >>> placements(np.array([1.0, 2.0]), np.array([0.0, 1.0, 3.0])).tolist()
    [1.0, 0.75, 0.0]
    """
    ordered = np.sort(these)
    low, high = np.searchsorted(ordered, others, "left"), np.searchsorted(ordered, others, "right")
    share: Values = 1.0 - (low + high) / (2.0 * ordered.size)
    return share


def auroc_interval(
    seen_S: Floats, unseen_U: Floats, seen_groups_S: Classes, unseen_groups_U: Classes
) -> tuple[float, float]:
    """95 % interval of the area under the ROC curve, over other taxa as well as other specimens.

    Specimens of one group (a taxon) score alike, so few taxa say little however many specimens they have. The
    variance is that of DeLong et al. (1988), summed up by groups (Obuchowski 1997); with groups of one it is
    DeLong's. NaN with fewer than two groups of either kind. Of a perfect separation the interval is a point:
    it says nothing then.

    Args:
        seen_S: Scores of seen specimens.
        unseen_U: Of unseen ones.
        seen_groups_S: Group of each.
        unseen_groups_U: Group of each; none is also a group of seen ones.
    """
    parts = [
        (placements(unseen_U, seen_S), seen_groups_S),
        (1.0 - placements(seen_S, unseen_U), unseen_groups_U),
    ]
    variance = 0.0
    for share_M, group_M in parts:
        _, group_M = np.unique(group_M, return_inverse=True)
        off_G = np.bincount(group_M, share_M - share_M.mean()) if share_M.size else np.zeros(0)
        if off_G.size < 2:
            return math.nan, math.nan
        variance += off_G.size / (off_G.size - 1) * float(np.square(off_G).sum()) / share_M.size**2
    centre, half = float(parts[0][0].mean()), Z95 * math.sqrt(variance)
    return max(0.0, centre - half), min(1.0, centre + half)


def average_precision(positives: Floats, negatives: Floats) -> float:
    """Mean over the positives of the precision at their score (scikit-learn's `average_precision_score`).

    >>> average_precision(np.array([3.0, 1.0]), np.array([2.0]))
    0.8333333333333333
    """
    levels, at = np.unique(np.concatenate([positives, negatives]), return_inverse=True)
    hits = np.bincount(at[: positives.size], minlength=levels.size)[::-1]
    all_ = np.bincount(at, minlength=levels.size)[::-1]
    return float((hits * np.cumsum(hits) / np.cumsum(all_)).sum() / positives.size)


def missed(seen_S: Floats, unseen_U: Floats, kept: float) -> tuple[float, float]:
    """The lowest threshold above which no more than 1 - `kept` of the seen lie, and the share of the unseen
    that do not lie above it either.

    Args:
        seen_S: Scores of seen specimens.
        unseen_U: Of unseen ones.
        kept: Share of the seen.
    """
    ordered = np.sort(seen_S)
    place = max(1, math.ceil(kept * ordered.size - 1e-9))  # 0.95 · 20 is a little more than 19
    threshold = float(ordered[place - 1])
    return threshold, float((unseen_U <= threshold).mean()) if unseen_U.size else math.nan


def curve(seen_S: Floats, unseen_U: Floats, right_S: NDArray[np.bool_]) -> dict[str, Values]:
    """What each threshold does: `threshold`, `seen_flagged`, `unseen_flagged` (the ROC curve) and
    `right_kept`, the share of the seen that are named right and not flagged (the OSCR curve).

    Specimens that score above the threshold are flagged; the first row flags none. At most CURVE_POINTS rows,
    evenly over the specimens.
    """
    levels = np.unique(np.concatenate([seen_S, unseen_U]))[::-1]
    if levels.size > CURVE_POINTS:
        ordered = np.sort(np.concatenate([seen_S, unseen_U]))[::-1]
        levels = np.unique(ordered[np.linspace(0, ordered.size - 1, CURVE_POINTS).astype(int)])[::-1]
    seen, unseen, right = np.sort(seen_S), np.sort(unseen_U), np.sort(seen_S[right_S])
    with np.errstate(invalid="ignore"):
        return {
            "threshold": levels.astype(np.float64),
            "seen_flagged": 1.0 - np.searchsorted(seen, levels, "right") / seen.size,
            "unseen_flagged": 1.0 - np.searchsorted(unseen, levels, "right") / unseen.size,
            "right_kept": np.searchsorted(right, levels, "right") / seen.size,
        }


def harmonic_mean(seen: Floats | float, unseen: Floats | float) -> Values:
    """2ab / (a + b), of the accuracy for seen and for unseen taxa; 0 where one is 0. Any shape.

    >>> float(harmonic_mean(0.75, 0.25))
    0.375
    """
    a, b = np.broadcast_arrays(np.asarray(seen, np.float64), np.asarray(unseen, np.float64))
    whole = a + b
    made: Values = np.divide(2 * a * b, whole, out=np.where(np.isnan(whole), np.nan, 0.0), where=whole > 0)
    return made


# -- inside


def _flagged(seen_S: Floats, unseen_U: Floats) -> tuple[Values, Values]:
    """Share of the unseen and of the seen that score at or above each distinct score, from the highest."""
    levels = np.unique(np.concatenate([seen_S, unseen_U]))[::-1]
    found_U = unseen_U.size - np.searchsorted(np.sort(unseen_U), levels, "left")
    flagged_S = seen_S.size - np.searchsorted(np.sort(seen_S), levels, "left")
    return found_U / unseen_U.size, flagged_S / seen_S.size


def _whitening(covariance_FF: Values) -> Values:
    """W such that W Wᵀ is the pseudo-inverse of a covariance, F × D; D is its rank."""
    values_F, vectors_FF = np.linalg.eigh(covariance_FF)
    kept = values_F > _NO_VARIANCE * values_F.max(initial=0.0)
    whitening: Values = vectors_FF[:, kept] / np.sqrt(values_F[kept])
    return whitening


_NO_VARIANCE: Final = 1e-10
"""Share of the largest variance below which a direction has none but rounding."""
_CELLS: Final = 1 << 22
"""Numbers worked on at a time."""


def _blocks(rows: int, width: int) -> Iterable[slice]:
    step = max(1, _CELLS // max(1, width))
    return (slice(start, start + step) for start in range(0, rows, step))
