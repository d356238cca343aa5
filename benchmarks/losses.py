"""The losses of the taxonomy against plain cross-entropy: a head of many leaf taxa, forward and backward."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import interleaved
from bioscan.analysis.hierarchy import ancestors
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.learn.losses import Softmax, make_loss, outputs_of
from bioscan.learn.settings import TrainSettings

SPECIES: Final = 8_355
"""Species of BIOSCAN-1M; its BINs are ten times as many."""
BINS: Final = 90_918
FEATURES: Final = 768
BATCH: Final = 32
SHARES: Final = {"species": 0.09, "genus": 0.15, "family": 0.76}
"""How deep records are named, as in BIOSCAN-5M."""
BOUND: Final = 1.2


def tree(species: int) -> Taxonomy:
    """Sixteen orders of long-tailed families, genera of a few species."""
    rng = np.random.default_rng(1)
    family = np.minimum(rng.pareto(0.8, species) * species / 800, species / 20).astype(int)
    genus = rng.integers(0, 1 + np.bincount(family)[family] // 5)
    table = {
        "order": [f"order {number}" for number in family % 16],
        "family": [f"family {number}" for number in family],
        "genus": [f"genus {number}.{part}" for number, part in zip(family, genus, strict=True)],
        "species": [f"species {number}" for number in range(species)],
    }
    return Taxonomy.build(pl.DataFrame(table), list(table)).filled()[0]


def targets(taxonomy: Taxonomy, leaf_B: Tensor, shares: dict[str, float]) -> Tensor:
    """A record's node at a rank drawn by the shares."""
    rng = np.random.default_rng(2)
    rank_B = rng.choice([taxonomy.ranks.index(rank) for rank in shares], len(leaf_B), p=[*shares.values()])
    return torch.from_numpy(ancestors(taxonomy)[rank_B, leaf_B.numpy()]).long()


def step(loss_of: Callable[[Tensor], Tensor], make: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    """Forward and backward."""
    for tensor in leaves:
        tensor.grad = None
    loss_of(make()).mean().backward()  # type: ignore[no-untyped-call]


def run(size: str, work: Path) -> list[dict[str, Any]]:
    """Seconds on one thread of a step with each loss, and with torch's cross-entropy; `work` is not used."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = _rows(SPECIES, rounds={"full": 200, "small": 40}[size])
        return rows + (_rows(BINS, rounds=15) if size == "full" else [])
    finally:
        torch.set_num_threads(threads)


def _rows(species: int, *, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    taxonomy = tree(species)
    none = np.zeros(taxonomy.num_nodes, np.int64)
    leaf_B = torch.randint(taxonomy.num_leaves, (BATCH,))
    marginal = make_loss(TrainSettings(), taxonomy, none)
    adjusting = make_loss(TrainSettings(loss="logit_adjusted"), taxonomy, none)
    conditional = make_loss(TrainSettings(softmax="conditional"), taxonomy, none)
    mixed_B = targets(taxonomy, leaf_B, SHARES)
    species_B = targets(taxonomy, leaf_B, {"species": 1.0})
    works: dict[str, Callable[[Tensor], Tensor]] = {
        "cross-entropy": lambda z: functional.cross_entropy(z, leaf_B, reduction="none"),
        "marginalised, 9/15/76 % to species/genus/family": lambda z: marginal(z, mixed_B),
        "marginalised, all to species": lambda z: marginal(z, species_B),
        "the same as the first, logit-adjusted": lambda z: adjusting(z, mixed_B),
        "conditional softmax, the same targets": lambda z: conditional(z, mixed_B),
    }
    features = torch.randn(BATCH, FEATURES, requires_grad=True)
    outputs = {name: outputs_of(taxonomy, name) for name in get_args(Softmax)}
    heads = {name: torch.nn.Linear(FEATURES, count) for name, count in outputs.items()}
    logits = {name: torch.randn(BATCH, count, requires_grad=True) for name, count in outputs.items()}
    rows = []
    for part in ("head and loss", "loss alone"):
        steps = []
        for name, loss_of in works.items():
            softmax = "conditional" if name.startswith("conditional") else "flat"
            if part == "loss alone":
                steps.append(partial(step, loss_of, partial(logits.__getitem__, softmax), [logits[softmax]]))
            else:
                head = heads[softmax]
                steps.append(partial(step, loss_of, partial(head, features), [features, *head.parameters()]))
        floor, *taken = interleaved(*steps, rounds=rounds)
        rows += [
            {
                "work": f"{part}: {name}; floor: torch's cross-entropy",
                "size": f"{BATCH} x {FEATURES} → {taxonomy.num_leaves:,}",
                "value": 1000 * seconds,
                "unit": "ms",
                "floor": 1000 * floor,
                "ratio": seconds / floor,
                "bound": f"≤ {BOUND:g}" if part == "head and loss" and name.startswith("marginal") else None,
            }
            for name, seconds in zip(list(works)[1:], taken, strict=True)
        ]
    return rows
