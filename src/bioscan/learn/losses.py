"""Losses on the outputs of a network, by the node of the taxonomy that a record is known to.

B: batch, L: leaf taxa, N: nodes of the tree (root 0), M: outputs of the network. A target is a node number:
the deepest taxon that the record is known to. Leaves are numbered depth first, so the leaves below a node are
an interval, and the probability of a taxon is the sum over its interval.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from bioscan.analysis.hierarchy import leaf_prior
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.learn.sampling import expected_counts
from bioscan.learn.settings import TrainSettings

Softmax = Literal["flat", "conditional"]
Values = TypeVar("Values", Tensor, NDArray[Any])

COARSE_LOSSES: Final = ("cross_entropy", "logit_adjusted")
"""Losses that also learn from records known only to a higher taxon; the others need leaf targets."""

_NO_LEAF: Final = -100
"""What torch's cross-entropy passes over."""


def outputs_of(taxonomy: Taxonomy, softmax: Softmax) -> int:
    """Outputs that a network needs: one a leaf taxon, or (conditional) one a node below the root."""
    return taxonomy.num_leaves if softmax == "flat" else taxonomy.num_nodes - 1


def leaf_logits(taxonomy: Taxonomy, softmax: Softmax) -> nn.Module:
    """What turns a network's outputs into leaf logits, shape B × L; to be moved to the network's device.

    Flat: the outputs as they are. Conditional: the leaves' log-probabilities, whose softmax is themselves.
    """
    return nn.Identity() if softmax == "flat" else ConditionalSoftmax(taxonomy)


def adjusted(logits_BL: Values, log_prior_L: Values, tau: float) -> Values:
    """Logits less tau times the log of the leaf prior: the post-hoc logit adjustment of Menon et al. 2021.

    With tau 1 the rare taxa are as likely as the common ones before the picture is seen (least balanced
    error); tau 0 changes nothing.
    """
    return logits_BL - tau * log_prior_L


class LeafLoss(nn.Module, ABC):
    """A loss per record: `loss(outputs_BM, targets_B, done)`, shape B, float32 or wider.

    Targets are node numbers. A target that the loss does not take (see `takes`) costs 0 and has no gradient.
    `done` is the share of the run's epochs that are over, for losses that change on the way.
    """

    leaf_N: Tensor
    """Leaf number of each node that is a leaf, else what cross-entropy passes over."""
    takes_N: Tensor

    def __init__(self, taxonomy: Taxonomy, *, coarse: bool) -> None:
        super().__init__()
        leaf_N = np.full(taxonomy.num_nodes, _NO_LEAF, np.int64)
        leaf_N[taxonomy.leaves_L] = np.arange(taxonomy.num_leaves)
        takes_N = leaf_N >= 0
        if coarse:
            takes_N[1:] = True
        self.register_buffer("leaf_N", torch.from_numpy(leaf_N), persistent=False)
        self.register_buffer("takes_N", torch.from_numpy(takes_N), persistent=False)
        self._constants: dict[str, NDArray[np.float64]] = {}
        self._like: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def takes(self, targets_B: Tensor) -> Tensor:
        """Which targets the loss learns from: leaves, and other taxa if it takes coarse ones; never 0, -1."""
        return (targets_B >= 0) & self.takes_N[targets_B.clamp_min(0)]

    def forward(self, outputs_BM: Tensor, targets_B: Tensor, done: float = 0.0) -> Tensor:
        """The loss of each record."""
        if outputs_BM.dtype in (torch.float16, torch.bfloat16):
            outputs_BM = outputs_BM.float()
        return self._loss(outputs_BM, targets_B.clamp_min(0), done)

    @abstractmethod
    def _loss(self, outputs_BM: Tensor, targets_B: Tensor, done: float) -> Tensor:
        """The loss of each record, of targets that are nodes."""

    def _constant(self, name: str, like: Tensor) -> Tensor:
        """A float64 constant in the type and place of the logits (MPS has no float64 to keep it in)."""
        key = (name, like.device, like.dtype)
        if key not in self._like:
            self._like[key] = torch.from_numpy(self._constants[name]).to(like.dtype).to(like.device)
        return self._like[key]


class MarginalLoss(LeafLoss):
    """−log P(target), P being the softmax over leaves summed over those below the target.

    logsumexp(all logits) − logsumexp(logits below the target): for a leaf this is cross-entropy, and in a
    tree of one rank it is torch's own. A shift is added to the logits first; with tau · log prior it is the
    logit-adjusted loss. Label smoothing takes (1 − s) of it and adds s times the mean of −log p over all
    leaves, the same for leaf and coarse targets; for leaves this is torch's label smoothing.
    """

    first_N: Tensor
    end_N: Tensor

    def __init__(
        self, taxonomy: Taxonomy, *, shift_L: NDArray[np.float64] | None = None, smoothing: float = 0.0
    ) -> None:
        super().__init__(taxonomy, coarse=True)
        self.flat = taxonomy.num_nodes == taxonomy.num_leaves + 1
        self.shifted = shift_L is not None
        if shift_L is not None:
            self._constants["shift"] = shift_L
        self.smoothing = smoothing
        self.register_buffer("first_N", torch.from_numpy(taxonomy.first_leaf_N).long(), persistent=False)
        self.register_buffer("end_N", torch.from_numpy(taxonomy.end_leaf_N).long(), persistent=False)

    def _loss(self, outputs_BM: Tensor, targets_B: Tensor, done: float) -> Tensor:
        logits_BL = outputs_BM + self._constant("shift", outputs_BM) if self.shifted else outputs_BM
        if self.flat:
            return functional.cross_entropy(
                logits_BL, self.leaf_N[targets_B], reduction="none", label_smoothing=self.smoothing
            )
        loss_B: Tensor = _Marginal.apply(  # type: ignore[no-untyped-call]
            logits_BL, self.first_N[targets_B], self.end_N[targets_B], targets_B > 0, self.smoothing
        )
        return loss_B


class _Marginal(torch.autograd.Function):
    """(1 − s) · −log P(interval) + s · mean of −log p, per row; rows not counted are 0.

    With its own backward it is one log-softmax forward and one exp backward, as cross-entropy is, and what
    the intervals cost. P is never formed from probabilities, which would underflow.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_BL: Tensor, first_B: Tensor, end_B: Tensor, counts_B: Tensor, smoothing: float
    ) -> Tensor:
        log_BL = logits_BL.log_softmax(1)
        intervals = _Intervals(first_B, end_B)
        below_B = intervals.logsumexp(log_BL)
        loss_B = (smoothing - 1) * below_B
        if smoothing:
            loss_B = loss_B - smoothing * log_BL.mean(1)
        ctx.save_for_backward(log_BL, below_B, counts_B)
        ctx.intervals, ctx.smoothing = intervals, smoothing
        return torch.where(counts_B, loss_B, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, None, None, None, None]:
        log_BL, below_B, counts_B = ctx.saved_tensors
        gradient_BL = log_BL.exp()
        ctx.intervals.subtract_shares(gradient_BL, log_BL, below_B, times=1 - ctx.smoothing)
        if ctx.smoothing:
            gradient_BL.sub_(ctx.smoothing / log_BL.shape[1])
        return gradient_BL.mul_(torch.where(counts_B, grad_B, 0)[:, None]), None, None, None, None


class _Intervals:
    """An interval of columns per row: NumPy's slices on a CPU; masks elsewhere, where slices would wait."""

    def __init__(self, first_B: Tensor, end_B: Tensor) -> None:
        self.first_B, self.end_B = first_B, end_B
        self.wide: list[tuple[int, slice]] | None = None
        if first_B.device.type == "cpu":
            bounds = zip(first_B.tolist(), end_B.tolist(), strict=True)
            self.wide = [(row, slice(*ends)) for row, ends in enumerate(bounds) if ends[1] - ends[0] > 1]

    def logsumexp(self, log_BL: Tensor) -> Tensor:
        """Over each row's interval."""
        if self.wide is None:
            return log_BL.masked_fill(self._outside(log_BL), -torch.inf).logsumexp(1)
        found_B = log_BL.gather(1, self.first_B[:, None])[:, 0]
        logs, found = log_BL.numpy(), found_B.numpy()
        for row, columns in self.wide:
            highest = logs[row, columns].max()
            found[row] = highest + np.log(np.exp(logs[row, columns] - highest).sum())
        return found_B

    def subtract_shares(self, from_BL: Tensor, log_BL: Tensor, below_B: Tensor, *, times: float) -> None:
        """Take from each interval, in place, so many times its softmax exp(log − below)."""
        if self.wide is None:
            share_BL = (log_BL - below_B[:, None]).masked_fill_(self._outside(log_BL), -torch.inf).exp_()
            from_BL.sub_(share_BL, alpha=times)
            return
        single_B = (self.end_B - self.first_B == 1).to(from_BL.dtype)
        from_BL.scatter_add_(1, self.first_B[:, None], -times * single_B[:, None])
        taken, logs, below = from_BL.numpy(), log_BL.numpy(), below_B.numpy()
        for row, columns in self.wide:
            taken[row, columns] -= times * np.exp(logs[row, columns] - below[row])

    def _outside(self, values_BL: Tensor) -> Tensor:
        places_L = torch.arange(values_BL.shape[1], device=values_BL.device)
        return (places_L < self.first_B[:, None]) | (places_L >= self.end_B[:, None])


class LeafOnlyLoss(LeafLoss):
    """Losses for records known to a leaf taxon: focal, class-balanced, LDAM.

    Args:
        taxonomy: The tree.
        gamma: The cross-entropy counts (1 − p)^gamma times (focal, Lin et al. 2017).
        margin_L: Taken from the true taxon's logit first.
        weight_L: Each record counts so many times, by its taxon.
        deferred: Share of the epochs before the weights count.
    """

    def __init__(
        self,
        taxonomy: Taxonomy,
        *,
        gamma: float = 0.0,
        margin_L: NDArray[np.float64] | None = None,
        weight_L: NDArray[np.float64] | None = None,
        deferred: float = 0.0,
    ) -> None:
        super().__init__(taxonomy, coarse=False)
        self.gamma, self.deferred = gamma, deferred
        self._constants = {
            name: values_L
            for name, values_L in (("margin", margin_L), ("weight", weight_L))
            if values_L is not None
        }

    def _loss(self, outputs_BM: Tensor, targets_B: Tensor, done: float) -> Tensor:
        leaf_B = self.leaf_N[targets_B]
        known_B = leaf_B.clamp_min(0)
        logits_BL = outputs_BM
        if "margin" in self._constants:
            margin_B = self._constant("margin", outputs_BM)[known_B]
            logits_BL = outputs_BM.scatter_add(1, known_B[:, None], -margin_B[:, None])
        loss_B = functional.cross_entropy(logits_BL, leaf_B, reduction="none", ignore_index=_NO_LEAF)
        if self.gamma:
            missed_B = (1 - torch.exp(-loss_B)).clamp_min(torch.finfo(loss_B.dtype).eps)  # 0^(gamma - 1): inf
            loss_B = missed_B**self.gamma * loss_B
        if "weight" in self._constants and done >= self.deferred:
            loss_B = loss_B * self._constant("weight", outputs_BM)[known_B]
        return loss_B


class ConditionalSoftmax(nn.Module):
    """A softmax among the children of each node; the probability of a taxon is the product down its path.

    The network's outputs are the nodes below the root, by parent, siblings in order: so siblings are an
    interval. Called on outputs it gives the leaves' log-probabilities, shape B × L.
    """

    segment_M: Tensor
    """Number of the siblings' interval that an output belongs to."""
    size_S: Tensor
    """Outputs in each interval."""
    path_ND: Tensor
    """Outputs on the path of each node, the root's child first; M where it has ended."""
    leaves_L: Tensor
    """Node number of each leaf."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        super().__init__()
        parent_M = taxonomy.parent_N[1:]
        outputs = len(parent_M)
        _, segment_M, size_S = np.unique(np.sort(parent_M), return_inverse=True, return_counts=True)
        output_M = np.empty(outputs, np.int64)
        output_M[np.argsort(parent_M, kind="stable")] = np.arange(outputs)
        path_ND = np.full((taxonomy.num_nodes, len(taxonomy.ranks)), outputs)
        depth_N = np.zeros(taxonomy.num_nodes, np.int64)
        for node, parent in enumerate(parent_M.tolist(), start=1):
            depth_N[node] = depth_N[parent] + 1
            path_ND[node] = path_ND[parent]
            path_ND[node, depth_N[parent]] = output_M[node - 1]
        for name, values in {
            "segment_M": segment_M,
            "size_S": size_S,
            "path_ND": path_ND,
            "leaves_L": taxonomy.leaves_L,
        }.items():
            self.register_buffer(name, torch.from_numpy(values).long(), persistent=False)

    def forward(self, outputs_BM: Tensor) -> Tensor:
        """Log-probability of each leaf: the sum down its path, shape B × L, float32 or wider."""
        log_BM = functional.pad(self.log_conditionals(outputs_BM), (0, 1))  # an ended path adds nothing
        columns = self.path_ND[self.leaves_L].unbind(1)
        found_BL = log_BM[:, columns[0]]
        for column_L in columns[1:]:
            found_BL = found_BL + log_BM[:, column_L]
        return found_BL

    def log_conditionals(self, outputs_BM: Tensor) -> Tensor:
        """Log-probability of each node given its parent, shape B × M, float32 or wider."""
        if outputs_BM.dtype in (torch.float16, torch.bfloat16):
            outputs_BM = outputs_BM.float()
        segment_BM = self.segment_M.expand_as(outputs_BM)
        empty_BS = outputs_BM.new_zeros(len(outputs_BM), len(self.size_S))
        highest_BS = empty_BS.scatter_reduce(1, segment_BM, outputs_BM.detach(), "amax", include_self=False)
        shifted_BM = outputs_BM - highest_BS.gather(1, segment_BM)
        sum_BS = empty_BS.scatter_add(1, segment_BM, shifted_BM.exp())
        return shifted_BM - sum_BS.log().gather(1, segment_BM)

    def sibling_means(self, values_BM: Tensor) -> Tensor:
        """Mean over each output's siblings, itself included, shape B × M."""
        segment_BM = self.segment_M.expand_as(values_BM)
        sums_BS = values_BM.new_zeros(len(values_BM), len(self.size_S)).scatter_add(1, segment_BM, values_BM)
        return (sums_BS / self.size_S).gather(1, segment_BM)


class ConditionalLoss(LeafLoss):
    """−log P(target) under the conditional softmax: cross-entropy among siblings, summed down the path.

    The path of a coarse target ends at it. Label smoothing smooths among the siblings of each step.
    """

    first_M: Tensor
    """Where the siblings of an output begin; 0 where a path has ended."""
    end_M: Tensor

    def __init__(self, taxonomy: Taxonomy, *, smoothing: float = 0.0) -> None:
        super().__init__(taxonomy, coarse=True)
        self.softmax = ConditionalSoftmax(taxonomy)
        self.smoothing = smoothing
        end_S = self.softmax.size_S.cumsum(0)
        for name, bound_S in {"first_M": end_S - self.softmax.size_S, "end_M": end_S}.items():
            bound_M = functional.pad(bound_S[self.softmax.segment_M], (0, 1))
            self.register_buffer(name, bound_M, persistent=False)

    def _loss(self, outputs_BM: Tensor, targets_B: Tensor, done: float) -> Tensor:
        path_BD = self.softmax.path_ND[targets_B]
        if self.smoothing:
            log_BM = self.softmax.log_conditionals(outputs_BM)
            log_BM = torch.lerp(log_BM, self.softmax.sibling_means(log_BM), self.smoothing)
            return -functional.pad(log_BM, (0, 1)).gather(1, path_BD).sum(1)
        loss_B: Tensor = _Conditional.apply(  # type: ignore[no-untyped-call]
            outputs_BM, path_BD, self.first_M[path_BD], self.end_M[path_BD]
        )
        return loss_B


class _Conditional(torch.autograd.Function):
    """Sum over the steps of a path of logsumexp(siblings) − output, per row: only its own siblings count."""

    @staticmethod
    def forward(ctx: Any, outputs_BM: Tensor, path_BD: Tensor, first_BD: Tensor, end_BD: Tensor) -> Tensor:
        values_BM = outputs_BM.detach()
        steps = [_Intervals(*bounds) for bounds in zip(first_BD.unbind(1), end_BD.unbind(1), strict=True)]
        all_BD = torch.stack([step.logsumexp(values_BM) for step in steps], dim=1)
        own_BD = functional.pad(values_BM, (0, 1)).gather(1, path_BD)
        ctx.save_for_backward(values_BM, path_BD, all_BD)
        ctx.steps = steps
        return torch.where(end_BD > 0, all_BD - own_BD, 0).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, None, None, None]:
        values_BM, path_BD, all_BD = ctx.saved_tensors
        gradient_BM = values_BM.new_zeros(len(values_BM), values_BM.shape[1] + 1)
        gradient_BM.scatter_(1, path_BD, -1.0)
        gradient_BM = gradient_BM[:, :-1]
        for step, all_B in zip(ctx.steps, all_BD.unbind(1), strict=True):
            step.subtract_shares(gradient_BM, values_BM, all_B, times=-1.0)
        return gradient_BM.mul_(grad_B[:, None]), None, None, None


def balanced_weights(counts_L: NDArray[np.integer[Any]], *, beta: float) -> NDArray[np.float64]:
    """Class-balanced weights (1 − beta) / (1 − beta^n), scaled to a mean of 1 (Cui et al. 2019).

    beta 0 gives 1 for all, beta 1 is the limit 1 / n. A taxon without records counts as one with one.
    """
    seen_L = np.maximum(counts_L, 1).astype(np.float64)
    weight_L: NDArray[np.float64] = 1 / seen_L if beta == 1 else (1 - beta) / (1 - beta**seen_L)
    return weight_L / float(weight_L.mean())


def ldam_margins(counts_L: NDArray[np.integer[Any]], *, largest: float) -> NDArray[np.float64]:
    """Margins proportional to n^(−1/4), the rarest taxon's being `largest` (Cao et al. 2019)."""
    margin_L: NDArray[np.float64] = np.maximum(counts_L, 1).astype(np.float64) ** -0.25
    return margin_L * (largest / float(margin_L.max()))


def _cross_entropy(
    settings: TrainSettings, taxonomy: Taxonomy, counts_N: NDArray[np.integer[Any]]
) -> LeafLoss:
    if settings.softmax == "conditional":
        return ConditionalLoss(taxonomy, smoothing=settings.label_smoothing)
    return MarginalLoss(taxonomy, smoothing=settings.label_smoothing)


def _logit_adjusted(
    settings: TrainSettings, taxonomy: Taxonomy, counts_N: NDArray[np.integer[Any]]
) -> LeafLoss:
    """With the prior of what an epoch sees: a sampler that balances already leaves less to adjust."""
    seen_N = expected_counts(settings.sampler, counts_N, repeat_threshold=settings.repeat_threshold)
    return MarginalLoss(taxonomy, shift_L=settings.tau * np.log(leaf_prior(taxonomy, seen_N)))


def _focal(settings: TrainSettings, taxonomy: Taxonomy, counts_N: NDArray[np.integer[Any]]) -> LeafLoss:
    return LeafOnlyLoss(taxonomy, gamma=settings.focal_gamma)


def _class_balanced(
    settings: TrainSettings, taxonomy: Taxonomy, counts_N: NDArray[np.integer[Any]]
) -> LeafLoss:
    weight_L = balanced_weights(counts_N[taxonomy.leaves_L], beta=settings.balance_beta)
    return LeafOnlyLoss(taxonomy, weight_L=weight_L)


def _ldam(settings: TrainSettings, taxonomy: Taxonomy, counts_N: NDArray[np.integer[Any]]) -> LeafLoss:
    """LDAM with deferred weights on logits that are `ldam_scale` times cosines: so are the margins."""
    counts_L = counts_N[taxonomy.leaves_L]
    return LeafOnlyLoss(
        taxonomy,
        margin_L=settings.ldam_scale * ldam_margins(counts_L, largest=settings.ldam_margin),
        weight_L=balanced_weights(counts_L, beta=settings.balance_beta),
        deferred=settings.ldam_deferred,
    )


LOSSES: Final[dict[str, Callable[[TrainSettings, Taxonomy, NDArray[np.integer[Any]]], LeafLoss]]] = {
    "cross_entropy": _cross_entropy,
    "logit_adjusted": _logit_adjusted,
    "focal": _focal,
    "class_balanced": _class_balanced,
    "ldam": _ldam,
}


def make_loss(settings: TrainSettings, taxonomy: Taxonomy, counts_N: NDArray[np.integer[Any]]) -> LeafLoss:
    """The loss of a run.

    Args:
        settings: `loss` and what goes with it.
        taxonomy: The tree that the targets are nodes of.
        counts_N: Training records whose target is the node. The prior of the logit adjustment is that of the
            sampled records; weights and margins follow from how many there are, however often they are seen.
    """
    return LOSSES[settings.loss](settings, taxonomy, counts_N)
