"""Controlled experiments with the losses: a long tail, and records that are mostly named to family.

Nothing is timed; the rows give macro accuracies in percent, means over seeds, and beside them what the same
network learns without the method. The networks are small, the losses, priors and decodings the package's own.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bioscan.analysis.hierarchy import DECODINGS, decode, leaf_prior, lineages, rank_probabilities
from bioscan.analysis.metrics import class_counts, macro, recall
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.learn.heads import CosineHead
from bioscan.learn.losses import COARSE_LOSSES, LOSSES, LeafLoss, adjusted, make_loss
from bioscan.learn.settings import TrainSettings

Numbers = NDArray[np.int64]

SEEDS: Final = {"full": 10, "small": 5}
POST_HOC: Final = "cross_entropy, logits adjusted after training"

LARGEST: Final = 100
IMBALANCE: Final = 50
"""Training digits of the commonest class, and how many times those of the rarest."""

RANKS: Final = ("order", "family", "genus", "species")
SIZES: Final = (18, 6, 3, 1)
"""Species in each taxon at these ranks."""
SPREADS: Final = (1.0, 1.0, 0.7, 0.5)
"""How far taxa at these ranks lie apart, per feature, where specimens of a species do by NOISE."""
NOISE: Final = 1.6
SPECIES: Final = 72
FEATURES: Final = 32
RECORDS: Final = 3_000
DEPTHS: Final = {"species": 0.09, "genus": 0.15, "family": 0.76}
"""How deep records are named, as in BIOSCAN-5M."""

HIDDEN, BATCH, LR, STEPS = 64, 32, 0.05, 1_500
"""The same number of steps for all, however many records they see."""


def run(size: str, work: Path) -> list[dict[str, Any]]:
    """Macro accuracies of both experiments; `work` is not used."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seeds = range(SEEDS[size])
        return digits(seeds) + partly_named(seeds)
    finally:
        torch.set_num_threads(threads)


def digits(seeds: range) -> list[dict[str, Any]]:
    """Scikit-learn's digits, the rarest of ten classes with a fiftieth of the commonest; a balanced test."""
    made: dict[str, list[float]] = {}
    for seed in seeds:
        train_X, classes, test_X, test_classes = _long_tailed_digits(seed)
        train, test = (pl.DataFrame({"family": [f"digit {n}" for n in of]}) for of in (classes, test_classes))
        taxonomy = Taxonomy.build(train, ["family"])
        nodes, truth = taxonomy.targets(train).astype(np.int64), taxonomy.targets(test)
        counts = np.bincount(nodes, minlength=taxonomy.num_nodes)
        for name in LOSSES:
            settings = TrainSettings(loss=name)  # type: ignore[arg-type]
            loss = make_loss(settings, taxonomy, counts)
            scale = settings.ldam_scale if name == "ldam" else None
            logits = _learn(loss, (train_X, nodes), test_X, taxonomy, seed=seed, scale=scale)
            made.setdefault(name, []).append(_macro(decode(taxonomy, logits, "leaf"), truth))
            if name == "cross_entropy":
                after = adjusted(logits, np.log(leaf_prior(taxonomy, counts)), 1.0)
                made.setdefault(POST_HOC, []).append(_macro(decode(taxonomy, after, "leaf"), truth))
    floor = made.pop("cross_entropy")
    size = f"digits, imbalance {IMBALANCE}, {len(seeds)} seeds"
    return [
        _row(
            f"macro: {name}; floor: cross_entropy",
            size,
            found,
            floor,
            3 if name in (POST_HOC, "logit_adjusted") else None,
        )
        for name, found in made.items()
    ]


def partly_named(seeds: range) -> list[dict[str, Any]]:
    """A tree of 72 species of which 9 % of the records are named to species; a balanced test.

    Leaf-only training sees these alone, marginalised training all.
    """
    made: dict[str, list[float]] = {}
    contradictions = dict.fromkeys((*DECODINGS, "each rank's best, for comparison"), 0)
    answers = 0
    for seed in seeds:
        train_X, train, test_X, test = _tree_records(seed)
        taxonomy = Taxonomy.build(train, train.columns).filled()[0]
        nodes = taxonomy.targets(train).astype(np.int64)
        truth_RX = lineages(taxonomy, taxonomy.targets(test))
        named = np.isin(nodes, taxonomy.leaves_L)
        for method, kept in {"leaf-only": named, "marginalised": nodes > 0}.items():
            counts = np.bincount(nodes[kept], minlength=taxonomy.num_nodes)
            for name in COARSE_LOSSES:
                loss = make_loss(TrainSettings(loss=name), taxonomy, counts)
                seen = train_X[kept], nodes[kept]
                logits = _learn(loss, seen, test_X, taxonomy, seed=seed)
                probabilities = torch.from_numpy(logits).double().softmax(1).numpy()
                found = {
                    rule: lineages(taxonomy, decode(taxonomy, probabilities, rule)) for rule in DECODINGS
                }
                for rank in ("family", "species"):
                    level = taxonomy.ranks.index(rank)
                    made.setdefault(f"{rank} macro: {method}, {name}", []).append(
                        _macro(found["leaf"][level], truth_RX[level])
                    )
                sums = [rank_probabilities(taxonomy, probabilities, rank) for rank in taxonomy.ranks]
                best = np.stack([nodes_G[sums_XG.argmax(axis=1)] for sums_XG, nodes_G in sums])
                for rule, answer_RX in zip(contradictions, (*found.values(), best), strict=True):
                    contradictions[rule] += _contradictions(taxonomy, answer_RX)
                answers += len(test_X)
    size = f"72 species, {RECORDS:,} records, {len(seeds)} seeds"
    floors = {rank: made.pop(f"{rank} macro: leaf-only, cross_entropy") for rank in ("family", "species")}
    rows = []
    for work, values in made.items():
        rank = work.split()[0]
        bound = {"family": 5.0, "species": 0.0}[rank] if "marginalised" in work else None
        rows.append(_row(f"{work}; floor: leaf-only, cross_entropy", size, values, floors[rank], bound))
    rows += [
        {
            "work": f"answers whose ranks contradict each other: {rule}",
            "size": f"{answers:,} answers",
            "value": count,
            "unit": "answers",
            "bound": "0" if rule in DECODINGS else None,
        }
        for rule, count in contradictions.items()
    ]
    return rows


def _learn(
    loss: LeafLoss,
    train: tuple[Tensor, Numbers],
    test_X: Tensor,
    taxonomy: Taxonomy,
    *,
    seed: int,
    scale: float | None = None,
) -> NDArray[np.float32]:
    """Logits of the test records, from a network with one hidden layer; with a scale, they are cosines."""
    torch.manual_seed(seed)
    train_X, targets_X = train[0], torch.from_numpy(train[1])
    leaves, epochs = taxonomy.num_leaves, round(STEPS * BATCH / len(targets_X))
    head = nn.Linear(HIDDEN, leaves) if scale is None else CosineHead(HIDDEN, leaves, scale=scale)
    network = nn.Sequential(nn.Linear(train_X.shape[1], HIDDEN), nn.ReLU(), head)
    optimizer = torch.optim.SGD(network.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        order_X = torch.randperm(len(targets_X))
        for start in range(0, len(order_X), BATCH):
            rows = order_X[start : start + BATCH]
            optimizer.zero_grad()
            loss(network(train_X[rows]), targets_X[rows], epoch / epochs).mean().backward()
            optimizer.step()
        schedule.step()
    with torch.inference_mode():
        logits: NDArray[np.float32] = network(test_X).numpy()
    return logits


def _long_tailed_digits(seed: int) -> tuple[Tensor, Numbers, Tensor, Numbers]:
    """Training pixels and classes, their counts falling exponentially; 70 test digits of each class."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(classes))
    pixels, classes = pixels[order].astype(np.float32) / 16, classes[order]
    places = [np.flatnonzero(classes == number) for number in rng.permutation(10)]
    wanted = np.round(LARGEST * IMBALANCE ** (-np.arange(10) / 9)).astype(int)
    train = np.concatenate([at[:count] for at, count in zip(places, wanted, strict=True)])
    test = np.concatenate([at[LARGEST : LARGEST + 70] for at in places])
    return torch.from_numpy(pixels[train]), classes[train], torch.from_numpy(pixels[test]), classes[test]


def _tree_records(seed: int) -> tuple[Tensor, pl.DataFrame, Tensor, pl.DataFrame]:
    """Features and names of training and test records; training names end at a rank drawn by DEPTHS."""
    rng = np.random.default_rng(seed)
    species = np.arange(SPECIES)
    centres = np.zeros((SPECIES, FEATURES))
    for size, spread in zip(SIZES, SPREADS, strict=True):
        centres += rng.normal(0, spread, (SPECIES // size, FEATURES))[species // size]
    shares = 1 / np.arange(1, SPECIES + 1)
    more = rng.choice(rng.permutation(SPECIES), RECORDS - SPECIES, p=shares / shares.sum())
    train = np.concatenate([species, more])
    test = np.repeat(species, 20)
    # one record of each species keeps its whole name, so that every species is in the tree
    deepest = rng.choice([RANKS.index(rank) for rank in DEPTHS], RECORDS, p=[*DEPTHS.values()])
    deepest[:SPECIES] = len(RANKS) - 1
    features = [
        torch.from_numpy((centres[of] + rng.normal(0, NOISE, (len(of), FEATURES))).astype(np.float32))
        for of in (train, test)
    ]
    return features[0], _names(train, deepest), features[1], _names(test, np.full(len(test), len(RANKS) - 1))


def _names(species: Numbers, deepest: Numbers) -> pl.DataFrame:
    """Rank columns of records, null below their deepest."""
    return pl.DataFrame(
        {
            rank: pl.Series([f"{rank} {number}" for number in species // size]).set(
                pl.Series(deepest < level), None
            )
            for level, (rank, size) in enumerate(zip(RANKS, SIZES, strict=True))
        }
    )


def _macro(answers_X: NDArray[np.integer[Any]], truth_X: NDArray[np.integer[Any]]) -> float:
    """Mean over taxa of the share of right answers, in percent."""
    size = int(max(answers_X.max(), truth_X.max())) + 1
    support = class_counts(truth_X, size)
    right = class_counts(truth_X[answers_X == truth_X], size)
    return 100 * float(macro(recall(right, support), support, class_counts(answers_X, size)))


def _contradictions(taxonomy: Taxonomy, answer_RX: NDArray[np.integer[Any]]) -> int:
    """Answers in which a taxon is not below the one named at a rank above."""
    first, end = taxonomy.first_leaf_N[answer_RX], taxonomy.end_leaf_N[answer_RX]
    return int(((first[1:] < first[:-1]) | (end[1:] > end[:-1])).any(axis=0).sum())


def _row(work: str, size: str, found: list[float], floor: list[float], bound: float | None) -> dict[str, Any]:
    gains = np.subtract(found, floor)
    return {
        "work": work,
        "size": size,
        "value": float(np.mean(found)),
        "unit": f"% ({gains.mean():+.1f} points; of the seeds {gains.min():+.1f} to {gains.max():+.1f})",
        "floor": float(np.mean(floor)),
        "bound": None if bound is None else f">= {bound:+g} points",
    }
