"""The taxa of an evaluation as a sunburst, coloured by how often they are named right."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.analysis.hierarchy import lineages
from bioscan.analysis.intervals import wilson
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.app.sunburst import RADIUS, RINGS, arcs, pieces
from bioscan.jobs.evaluate import Evaluation
from bioscan.vocabulary import RANKS

MAX_NODES: Final = 400
"""Taxa drawn: more could not be told apart in the page."""
_MAIN: Final = ("order", "family", "genus", "species")
"""May be drawn below the deepest rank evaluated, and are drawn alone where there are too many."""


@dataclass(frozen=True)
class AccuracyTree:
    """The sunburst and the same as a table."""

    ranks: list[str]
    """A ring each, from the middle outward."""
    judged_at: dict[str, str]
    """Rank -> the rank at which names are compared: its own, or the deepest that is evaluated."""
    specimens: int
    taxa: int
    """Taxa at these ranks."""
    drawn: int
    arcs: list[dict[str, Any]]
    """`path, told, shade` (`up`, `down`, `rest`), `strength` (per cent), `label`, `baseline`."""
    rows: list[dict[str, Any]]
    """A taxon each, in the order of the tree: `rank, name, below, specimens, checked, right, low, high`."""
    radius: int = RADIUS


def accuracy_tree(
    by_rank: Mapping[str, Evaluation], frame: pl.DataFrame, *, max_nodes: int = MAX_NODES
) -> AccuracyTree | None:
    """The taxa of the evaluated specimens with the share of each that is named right.

    A taxon is judged at its own rank, below the deepest evaluated rank at that one: then it says for which
    kinds of specimens the name above them is wrong. Ranks at which all are of one taxon are left out.

    Args:
        by_rank: Evaluations of the same predictions.
        frame: The catalogue: the key and the ranks.
        max_nodes: Taxa drawn one by one.

    Returns:
        None where no rank tells specimens apart.
    """
    key = next(iter(by_rank.values())).key
    keys = pl.concat([found.specimens.select(key) for found in by_rank.values()]).unique(maintain_order=True)
    names = keys.join(frame, on=key, how="left", maintain_order="left")
    ranks = _rings(names, list(by_rank))
    if not ranks:
        return None
    tree = Taxonomy.build(names, ranks)
    nodes_RX = lineages(tree, tree.targets(names))
    judged_at = {rank: _judge(rank, by_rank) for rank in ranks}
    checked_N, right_N = (np.zeros(tree.num_nodes, np.int64) for _ in range(2))
    for nodes_X, rank in zip(nodes_RX, ranks, strict=True):
        right_X = _right(by_rank[judged_at[rank]], keys)
        for counts_N, used_X in ((checked_N, right_X >= 0), (right_N, right_X == 1)):
            counts_N += np.bincount(nodes_X[used_X & (nodes_X > 0)], minlength=tree.num_nodes)
    drawn = pieces(tree, max_nodes)
    low_N, high_N = wilson(right_N, checked_N)
    rows: dict[int, dict[str, Any]] = {
        node: {
            "rank": RANKS[tree.rank_N[node]],
            "name": tree.name(node),
            "below": tree.name(int(tree.parent_N[node])),
            "specimens": int(tree.counts_N[node]),
            "checked": int(checked_N[node]),
            "right": right_N[node] / checked_N[node] if checked_N[node] else None,
            "low": float(low_N[node]),
            "high": float(high_N[node]),
        }
        for node in (piece.node for piece in drawn)
        if node
    }
    made = []
    for arc in arcs(tree, drawn):
        node = arc.piece.node
        row = rows.get(node) if node else None
        share = row["right"] if row else None
        made.append(
            {
                "path": arc.path,
                "label": arc.label,
                "baseline": arc.baseline,
                "told": _told(row, judged_at) if row else _rest(arc.piece.taxa),
                "shade": "rest" if share is None else "up" if share >= 0.5 else "down",
                "strength": None if share is None else round(200 * abs(share - 0.5)),
            }
        )
    return AccuracyTree(
        list(ranks), judged_at, keys.height, tree.num_nodes - 1, len(rows), made, list(rows.values())
    )


def _rings(names: pl.DataFrame, evaluated: list[str]) -> list[str]:
    """The ranks that tell specimens apart: those evaluated and some below, no more than there are rings."""
    deepest = RANKS.index(evaluated[-1])
    below = [rank for rank in _MAIN if RANKS.index(rank) > deepest and rank in names.columns]
    told = [rank for rank in (*evaluated, *below) if names[rank].drop_nulls().n_unique() > 1]
    if len(told) > RINGS:
        told = [rank for rank in told if rank in _MAIN]
    return told


def _judge(rank: str, by_rank: Mapping[str, Evaluation]) -> str:
    return rank if rank in by_rank else list(by_rank)[-1]


def _right(found: Evaluation, keys: pl.DataFrame) -> NDArray[np.int8]:
    """Per specimen 1 if it is named right, 0 if not, -1 if it cannot be checked at the rank."""
    right = pl.col("named").eq_missing(pl.col("taxon")).cast(pl.Int8).alias("right")
    joined = keys.join(
        found.specimens.select(found.key, right), on=found.key, how="left", maintain_order="left"
    )
    return joined["right"].fill_null(-1).to_numpy()


def _told(row: Mapping[str, Any], judged_at: Mapping[str, str]) -> str:
    told = f"{row['name']} ({row['rank']}): "
    if not row["checked"]:
        return f"{told}{row['specimens']:,} specimens, none checked"
    at = "" if judged_at[row["rank"]] == row["rank"] else f" at rank {judged_at[row['rank']]}"
    return (
        f"{told}{100 * row['right']:.0f} % of {row['checked']:,} specimens named right{at} "
        f"({100 * row['low']:.0f}–{100 * row['high']:.0f} %)"
    )


def _rest(taxa: int) -> str:
    return f"{taxa:,} {'taxon' if taxa == 1 else 'taxa'} not drawn one by one"
