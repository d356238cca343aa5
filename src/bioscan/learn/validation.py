"""How good a network is on the validation specimens, and which epoch is kept.

B: batch, L: leaf taxa, N: nodes of the taxonomy, R: its ranks.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bioscan.analysis.hierarchy import lineages
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.learn.distributed import Processes
from bioscan.learn.loader import Batch
from bioscan.learn.run_folder import Run
from bioscan.vocabulary import RANKS

BETTER: Final[dict[str, int]] = {"macro_top_1": 1, "micro_top_1": 1, "loss": -1}
"""Criterion -> +1 where more is better, -1 where less is."""

Measure = Callable[[Batch], tuple[Tensor, Tensor, Tensor]]
"""From a batch: the best leaf of each specimen, its loss, and whether the loss takes its target."""


def score_names(taxonomy: Taxonomy) -> list[str]:
    """Names of the scores in the history: the loss, the means over ranks, then those of each rank."""
    of_ranks = [f"{rank}_" for rank in taxonomy.ranks] if len(taxonomy.ranks) > 1 else []
    accuracies = [f"validation_{of}{kind}_top_1" for of in ("", *of_ranks) for kind in ("micro", "macro")]
    return ["validation_loss", *accuracies]


def validate(
    batches: Iterable[Batch], measure: Measure, taxonomy: Taxonomy, processes: Processes
) -> tuple[dict[str, float | None], dict[int, str]]:
    """Scores of a network, by the names of `score_names`.

    The predicted taxon at a rank is the one that the best leaf belongs to. Accuracy at a rank is over the
    specimens with a name there: micro their share that is right, macro the mean over the taxa that occur.
    With several ranks, `micro_top_1` and `macro_top_1` are means over the ranks that occur.

    A name that the tree lacks is as no name: whatever the network, it would be wrong. There alone `bioscan
    evaluate` differs, which counts such names as errors.

    Args:
        batches: This process's share of the specimens.
        measure: Of the network; called once for each batch.
        taxonomy: The targets are its nodes.
        processes: That share the specimens.

    Returns:
        The scores, None where there is nothing to measure: no image, no specimen with a name at the rank, or
        none that the loss takes; and the images that cannot be read, with the reasons, of all processes.
    """
    taxa_RN = lineages(taxonomy, np.arange(taxonomy.num_nodes))
    support_N = np.zeros(taxonomy.num_nodes, np.int64)
    correct_N = np.zeros(taxonomy.num_nodes, np.int64)
    losses = np.zeros(2)  # specimens, sum
    failures: dict[int, str] = {}
    for batch in batches:
        failures.update(batch.failures)
        leaf_B, loss_B, taken_B = measure(batch)
        counted = batch.counted
        if not counted:
            continue
        true_RB = taxa_RN[:, batch.targets_B.numpy()]
        found_RB = taxa_RN[:, taxonomy.leaves_L[leaf_B.cpu().numpy()]]
        support_N += _counts(true_RB[true_RB >= 0], taxonomy)
        correct_N += _counts(true_RB[(true_RB >= 0) & (true_RB == found_RB)], taxonomy)
        losses += int(taken_B.sum()), float(loss_B.sum())
    support_N, correct_N = processes.total(np.stack([support_N, correct_N]))
    specimens, loss = processes.total(losses)
    scores: dict[str, float | None] = dict.fromkeys(score_names(taxonomy))
    if specimens:
        scores["validation_loss"] = float(loss / specimens)
    for kind in ("micro", "macro"):
        values = {rank: _accuracy(kind, support_N, correct_N, taxonomy, rank) for rank in taxonomy.ranks}
        known = [value for value in values.values() if value is not None]
        scores[f"validation_{kind}_top_1"] = sum(known) / len(known) if known else None
        if len(values) > 1:
            scores |= {f"validation_{rank}_{kind}_top_1": value for rank, value in values.items()}
    return scores, processes.merged(failures)


def _counts(nodes: NDArray[np.integer[Any]], taxonomy: Taxonomy) -> NDArray[np.int64]:
    return np.bincount(nodes, minlength=taxonomy.num_nodes)


def _accuracy(
    kind: str, support_N: NDArray[np.int64], correct_N: NDArray[np.int64], taxonomy: Taxonomy, rank: str
) -> float | None:
    present = (taxonomy.rank_N == RANKS.index(rank)) & (support_N > 0)
    if not present.any():
        return None
    support, correct = support_N[present], correct_N[present]
    return float(correct.sum() / support.sum() if kind == "micro" else (correct / support).mean())


# -- which epoch is kept


def criterion_value(row: Mapping[str, Any], criterion: str) -> float:
    """What an epoch is judged by; NaN where that could not be measured."""
    value = row["epoch"] if criterion == "last" else row[f"validation_{criterion}"]
    return math.nan if value is None else float(value)


def is_better(row: Mapping[str, Any], run: Run, criterion: str) -> bool:
    """Whether an epoch is better than all before it."""
    value = criterion_value(row, criterion)
    return math.isnan(run.best_value) or (value - run.best_value) * BETTER.get(criterion, 1) > 0


def out_of_patience(run: Run, patience: int | None) -> bool:
    """Whether a run ends, having gone on for so many epochs after its best."""
    return bool(patience) and run.epoch - max(run.best_epoch, 0) >= (patience or 0)
