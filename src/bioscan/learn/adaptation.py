"""Heads fitted to frozen features: for few photographs (`fit`), or anew for rare taxa (`retrain`,
`tau_normalised`).

N: specimens, F: features, L: leaf taxa.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import RequestError, unknown
from bioscan.learn.heads import CosineHead, NearestHead
from bioscan.learn.losses import make_loss
from bioscan.learn.sampling import epoch_order
from bioscan.learn.settings import TrainSettings

HEADS: Final = ("linear", "prototype", "nearest")
BALANCES: Final = ("none", "weights")
FLAT_FEATURE: Final = 1e-6
"""A feature that varies less than this share of the largest deviation tells nothing, and is left as it is."""

L2: Final = tuple(float(10**power) for power in np.arange(1, -5.1, -0.5))
"""Weights of the penalty that are tried, strongest first: half the sum of squares of the standardised weights
is added so many times to the mean loss."""
SCALES: Final = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Of the cosine to a prototype."""
NEIGHBOURS: Final = tuple((k, t) for k in (1, 3, 5, 10, 20) for t in (0.02, 0.05, 0.1, 0.2, 0.5))
"""Votes and temperature."""
_BLOCK: Final = 1024
"""Specimens that are gone through at a time, where memory must not grow with them."""
_PATIENCE: Final = 2
_GAIN: Final = 1e-3
"""So many weaker penalties are tried after the best; what a weaker one gains less than this is no gain."""


@dataclass(frozen=True)
class Fitted:
    """A head for raw features."""

    head: dict[str, Any]
    """As `heads.replace_head` takes it."""
    module: nn.Module
    chosen: dict[str, float]
    """What cross-validation chose, and the mean loss that it had there."""
    held_out_NL: NDArray[np.float32]
    """Log-probabilities of each specimen by heads that have not seen it; NaN where there are none."""


def fit(
    kind: str,
    features_NF: NDArray[np.float32],
    targets_N: NDArray[np.int64],
    taxonomy: Taxonomy,
    *,
    balance: str = "none",
    l2: float | None = None,
    folds: int = 5,
    seed: int = 1,
) -> Fitted:
    """A head on standardised features, its strength chosen by cross-validation on these specimens alone.

    `linear`: logistic regression with an L2 penalty; specimens known only above the leaves count by the
    marginal probability of their taxon. `prototype`: the mean of each leaf's unit features, compared by the
    cosine (Snell et al. 2017; centred and scaled to length 1 as in Wang et al. 2019, SimpleShot).
    `nearest`: the specimens themselves, see `heads.NearestHead`.

    Args:
        kind: One of HEADS.
        features_NF: Of the backbone.
        targets_N: Node of each specimen; with `prototype` and `nearest` a leaf's.
        taxonomy: Its leaves are the outputs.
        balance: With `linear`: `weights` makes each taxon count alike, whatever its number of specimens.
        l2: With `linear`: the penalty; None: the best of L2.
        folds: Parts of the cross-validation. A taxon with a single specimen is never held out.
        seed: Of the parts.

    Raises:
        RequestError: an unknown name, or too few specimens to cross-validate.
    """
    for what, name, known in (("head", kind, HEADS), ("balance", balance, BALANCES)):
        if name not in known:
            raise unknown(what, name, known)
    if kind != "linear" and (balance != "none" or l2 is not None):
        raise RequestError(f"balance and l2 go with head linear; {kind} has neither")
    mean_F, deviation_F = standardisation(features_NF)
    fold_N = folds_of(targets_N, folds, seed)
    if (fold_N < 0).all():
        raise RequestError(
            "no taxon has two specimens: nothing can be held out to choose by; two of each are the least"
        )
    if kind == "linear":
        return _linear(features_NF, targets_N, taxonomy, mean_F, deviation_F, fold_N, balance, l2)
    features = torch.from_numpy(features_NF)
    leaves = torch.from_numpy(taxonomy.first_leaf_N[targets_N].astype(np.int64))
    size = (features_NF.shape[1], taxonomy.num_leaves)
    standard = {"mean": mean_F, "deviation": deviation_F}

    def prototypes(scale: float, rows: Tensor) -> nn.Module:
        return _filled(CosineHead(*size, scale=scale), standard, _prototypes, features[rows], leaves[rows])

    def gallery(votes: tuple[int, float], rows: Tensor) -> nn.Module:
        head = NearestHead(*size, size=len(rows), k=votes[0], temperature=votes[1])
        return _filled(head, standard, _gallery, features[rows], leaves[rows])

    everything = torch.arange(len(features))
    if kind == "prototype":
        scale, loss, held_out = _cross_validated(SCALES, prototypes, features, leaves, fold_N)
        made = prototypes(scale, everything)
        return Fitted({"kind": "cosine", "scale": scale}, made, {"scale": scale, "loss": loss}, held_out)
    (k, temperature), loss, held_out = _cross_validated(NEIGHBOURS, gallery, features, leaves, fold_N)
    head = {"kind": "nearest", "size": len(features), "k": k, "temperature": temperature}
    chosen = {"k": k, "temperature": temperature, "loss": loss}
    return Fitted(head, gallery((k, temperature), everything), chosen, held_out)


def standardisation(features_NF: NDArray[np.floating[Any]]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature; 1 for one that does not vary."""
    mean_F = features_NF.mean(axis=0, dtype=np.float64)
    squares_F = np.zeros_like(mean_F)
    for start in range(0, len(features_NF), _BLOCK):
        squares_F += np.square(features_NF[start : start + _BLOCK] - mean_F).sum(axis=0)
    deviation_F = np.sqrt(squares_F / len(features_NF))
    flat = deviation_F <= FLAT_FEATURE * max(deviation_F.max(initial=0), np.finfo(np.float32).tiny)
    deviation_F = np.where(flat, 1.0, deviation_F)
    return torch.from_numpy(mean_F), torch.from_numpy(deviation_F)


def folds_of(targets_N: NDArray[np.int64], folds: int, seed: int) -> NDArray[np.int64]:
    """Part of each specimen, every taxon spread evenly over the parts; -1 for a taxon's only specimen.

    >>> sorted(folds_of(np.array([4, 4, 4, 4, 9]), 2, seed=1).tolist())
    [-1, 0, 0, 1, 1]
    """
    if folds < 2:
        raise RequestError(f"folds is {folds}; at least 2 are needed")
    order = np.random.default_rng(seed).permutation(targets_N.size)
    order = order[np.argsort(targets_N[order], kind="stable")]
    _, inverse, counts = np.unique(targets_N[order], return_inverse=True, return_counts=True)
    several = counts[inverse] > 1
    part_N = np.full(targets_N.size, -1, np.int64)
    part_N[order[several]] = np.arange(int(several.sum())) % folds
    return part_N


def _cross_validated(
    options: Sequence[Any],
    make: Callable[[Any, Tensor], nn.Module],
    features_NF: Tensor,
    leaves_N: Tensor,
    fold_N: NDArray[np.int64],
) -> tuple[Any, float, NDArray[np.float32]]:
    """The option with the least mean loss on specimens held out, that loss, and their log-probabilities."""
    best: tuple[Any, float, NDArray[np.float32]] | None = None
    for option in options:
        made_NL: NDArray[np.float32] | None = None
        for train, held in _parts(fold_N):
            head = make(option, train)
            for rows in torch.split(held, _BLOCK):
                with torch.no_grad():
                    values = torch.log_softmax(head(features_NF[rows]).double(), dim=1)
                if made_NL is None:
                    made_NL = np.full((len(features_NF), values.shape[1]), np.nan, np.float32)
                made_NL[rows.numpy()] = values.float().numpy()
        assert made_NL is not None
        known = np.flatnonzero(fold_N >= 0)
        loss = float(-made_NL[known, leaves_N.numpy()[known]].mean(dtype=np.float64))
        if best is None or loss < best[1]:
            best = option, loss, made_NL
    assert best is not None
    return best


def _parts(fold_N: NDArray[np.int64]) -> list[tuple[Tensor, Tensor]]:
    """Rows to fit on, and rows held out, of each part that is not empty."""
    numbers = [number for number in range(int(fold_N.max()) + 1) if (fold_N == number).any()]
    return [
        (torch.from_numpy(np.flatnonzero(fold_N != n)), torch.from_numpy(np.flatnonzero(fold_N == n)))
        for n in numbers
    ]


# -- linear


def _linear(
    features_NF: NDArray[np.float32],
    targets_N: NDArray[np.int64],
    taxonomy: Taxonomy,
    mean_F: Tensor,
    deviation_F: Tensor,
    fold_N: NDArray[np.int64],
    balance: str,
    l2: float | None,
) -> Fitted:
    standard_NF = (torch.from_numpy(features_NF).double() - mean_F) / deviation_F
    # The weights lie in the span of the specimens: with fewer specimens than features it is smaller.
    basis_FM = torch.linalg.qr(standard_NF.T)[0] if len(standard_NF) < standard_NF.shape[1] else None
    inputs_NM = standard_NF if basis_FM is None else standard_NF @ basis_FM
    counts_C = np.bincount(targets_N, minlength=taxonomy.num_nodes)
    weights_N = torch.ones(len(targets_N), dtype=torch.float64)
    if balance == "weights":
        weights_N = torch.from_numpy(1.0 / counts_C[targets_N])
    targets = torch.from_numpy(targets_N)
    loss = make_loss(TrainSettings(), taxonomy, counts_C).double()
    parts = _parts(fold_N)
    starts = [torch.zeros(taxonomy.num_leaves, inputs_NM.shape[1] + 1, dtype=torch.float64) for _ in parts]
    best: tuple[float, float, NDArray[np.float32]] | None = None
    worse = 0
    for penalty in L2 if l2 is None else (l2,):
        held_out_NL = np.full((len(targets_N), taxonomy.num_leaves), np.nan, np.float32)
        total = share = 0.0
        for number, (train, held) in enumerate(parts):
            made = _minimum(inputs_NM[train], targets[train], weights_N[train], loss, penalty, starts[number])
            starts[number] = made
            with torch.no_grad():
                logits = inputs_NM[held] @ made[:, :-1].T + made[:, -1]
                total += float((weights_N[held] * loss(logits, targets[held])).sum())
                share += float(weights_N[held].sum())
                held_out_NL[held.numpy()] = torch.log_softmax(logits, dim=1).float().numpy()
        if best is None or total / share < best[1] - _GAIN:
            best, worse = (penalty, total / share, held_out_NL), 0
        else:
            worse += 1
            if worse == _PATIENCE:
                break
    assert best is not None
    penalty, lowest, held_out_NL = best
    made = _minimum(inputs_NM, targets, weights_N, loss, penalty, torch.zeros_like(starts[0]))
    weight_LF = made[:, :-1] if basis_FM is None else made[:, :-1] @ basis_FM.T
    head = nn.Linear(features_NF.shape[1], taxonomy.num_leaves)
    with torch.no_grad():  # for features as they come
        head.weight.copy_(weight_LF / deviation_F)
        head.bias.copy_(made[:, -1] - (weight_LF / deviation_F) @ mean_F)
    return Fitted({"kind": "linear"}, head, {"l2": penalty, "loss": lowest}, held_out_NL)


def _minimum(
    inputs_NM: Tensor, targets_N: Tensor, weights_N: Tensor, loss: nn.Module, l2: float, start: Tensor
) -> Tensor:
    """Weights and, as last column, biases at the least mean loss plus penalty; a convex problem."""
    solution = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [solution],
        max_iter=300,
        history_size=10,
        tolerance_grad=1e-7,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )
    share_N = weights_N / weights_N.sum()

    def objective() -> Tensor:
        optimizer.zero_grad()
        logits = inputs_NM @ solution[:, :-1].T + solution[:, -1]
        value: Tensor = (share_N * loss(logits, targets_N)).sum() + l2 / 2 * solution[:, :-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return solution.detach()


# -- prototypes and neighbours


def _filled(
    head: CosineHead | NearestHead,
    standard: dict[str, Tensor],
    fill: Callable[[Any, Tensor, Tensor], None],
    features_NF: Tensor,
    leaves_N: Tensor,
) -> nn.Module:
    with torch.no_grad():
        head.mean.copy_(standard["mean"])
        head.deviation.copy_(standard["deviation"])
        unit_NF = functional.normalize((features_NF - head.mean) / head.deviation, dim=1)
        fill(head, unit_NF, leaves_N)
    return head


def _prototypes(head: CosineHead, unit_NF: Tensor, leaves_N: Tensor) -> None:
    sums_LF = torch.zeros_like(head.weight).index_add(0, leaves_N, unit_NF)
    head.weight.copy_(functional.normalize(sums_LF, dim=1))


def _gallery(head: NearestHead, unit_NF: Tensor, leaves_N: Tensor) -> None:
    head.gallery.copy_(unit_NF)
    head.outputs.copy_(leaves_N)


# -- a trained head, made fair to rare taxa


def retrain(
    features_NF: NDArray[np.floating[Any]],
    targets_N: NDArray[np.int64],
    taxonomy: Taxonomy,
    *,
    epochs: int = 10,
    batch_size: int = 512,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    seed: int = 1,
    progress: Callable[..., None] | None = None,
) -> nn.Linear:
    """A linear head trained anew on frozen features with class-balanced sampling (cRT, Kang et al. 2020).

    SGD with Nesterov momentum 0.9 and a cosine to zero, on standardised features.

    Args:
        features_NF: Of the backbone; float16 to save memory.
        targets_N: Node of each specimen.
        taxonomy: Its leaves are the outputs.
        epochs: Of as many draws as there are specimens.
        batch_size: Specimens in a step.
        lr: Highest learning rate.
        weight_decay: Of weights and biases, in units of the standardised features.
        seed: Of the draws.
        progress: Called as `progress(done, total)`, specimens over all epochs.
    """
    mean_F, deviation_F = (value.float() for value in standardisation(features_NF))
    counts_C = np.bincount(targets_N, minlength=taxonomy.num_nodes)
    loss = make_loss(TrainSettings(), taxonomy, counts_C)
    head = nn.Linear(features_NF.shape[1], taxonomy.num_leaves)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(
        head.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )
    steps = epochs * -(-len(targets_N) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        order = epoch_order("class_balanced", targets_N, seed=seed, epoch=epoch, repeat_threshold=0)
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            inputs_BF = (torch.from_numpy(features_NF[numbers]).float() - mean_F) / deviation_F
            optimizer.zero_grad()
            loss(head(inputs_BF), torch.from_numpy(targets_N[numbers])).mean().backward()
            optimizer.step()
            schedule.step()
            if progress:
                progress(epoch * len(order) + start + len(numbers), epochs * len(order))
    with torch.no_grad():
        head.weight.div_(deviation_F)
        head.bias.sub_(head.weight @ mean_F)
    return head


def tau_normalised(head: nn.Linear, tau: float) -> nn.Linear:
    """The head with each leaf's weights divided by their norm to the power of tau, and without bias.

    Kang et al. 2020: a network gives frequent classes long weight vectors; tau 0 leaves them, 1 makes all
    alike.
    """
    made = nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        norm_L1 = head.weight.norm(dim=1, keepdim=True).clamp_min(torch.finfo(head.weight.dtype).tiny)
        made.weight.copy_(head.weight / norm_L1**tau)
        made.bias.zero_()
    return made
