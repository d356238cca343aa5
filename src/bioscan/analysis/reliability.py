"""How far the name of each taxon was right: what it was trained on, precision, recall and usual confusions.

N: nodes of the taxonomy, X: labelled specimens.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.analysis.intervals import wilson
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.vocabulary import RANKS

Ints = NDArray[np.integer[Any]]

UNKNOWN: Final = -1
"""Instead of a node: a taxon that the tree lacks, or no name."""
STRANGERS: Final = "taxa the model does not know"
"""Instead of a name among the confusions."""
_CONFUSIONS: Final = 3


def reliability(
    taxonomy: Taxonomy, target_counts_N: Ints, rank: str, true_X: Ints, named_X: Ints
) -> pl.DataFrame:
    """How reliable the names at a rank were.

    Args:
        taxonomy: The tree.
        target_counts_N: Training specimens whose deepest known taxon is the node.
        rank: One of the tree's.
        true_X: True taxon, a node, of each specimen that has a name at the rank; UNKNOWN: not in the tree.
        named_X: Taxon that it was given; UNKNOWN: none.

    Returns:
        A row for each taxon of the tree at the rank: `rank`, `taxon` (node), `name`, `training` (specimens
        known to it or deeper), `checked` (specimens that got the name), `right` (of these), `precision`,
        `precision_low`, `precision_high`, `support` (specimens of the taxon), `recall`, `recall_low`,
        `recall_high` (Wilson's 95 % intervals), `confusions` (the up to three taxa that most of the wrong
        ones belong to, as shares of `checked`: «Aus 12 %, Bus 3 %»). Null where there are none.
    """
    nodes = np.flatnonzero((taxonomy.rank_N == RANKS.index(rank)) & taxonomy.predictable_N)
    training_N = target_counts_N.copy()
    for node in range(taxonomy.num_nodes - 1, 0, -1):
        training_N[taxonomy.parent_N[node]] += training_N[node]

    def count(nodes_X: Ints) -> NDArray[np.int64]:
        return np.bincount(nodes_X[nodes_X >= 0], minlength=taxonomy.num_nodes)[nodes]

    checked, support, right = count(named_X), count(true_X), count(named_X[named_X == true_X])
    wrong = named_X != true_X
    confusions = _confusions(taxonomy, named_X[wrong], true_X[wrong], dict(zip(nodes, checked, strict=True)))
    return pl.DataFrame(
        {
            "rank": pl.Series([rank] * nodes.size, dtype=pl.String),
            "taxon": pl.Series(nodes, dtype=pl.Int32),
            "name": pl.Series([taxonomy.name(int(node)) for node in nodes], dtype=pl.String),
            "training": training_N[nodes],
            "checked": checked,
            "right": right,
            **_shares("precision", right, checked),
            "support": support,
            **_shares("recall", right, support),
            "confusions": pl.Series([confusions.get(int(node)) for node in nodes], dtype=pl.String),
        }
    )


def _shares(name: str, right: NDArray[np.int64], of: NDArray[np.int64]) -> dict[str, pl.Series]:
    """A share and its interval, null of nothing."""
    none = pl.Series(of == 0, dtype=pl.Boolean)
    low, high = wilson(right, of)
    columns = {name: right / np.maximum(of, 1), f"{name}_low": low, f"{name}_high": high}
    return {column: pl.Series(values, dtype=pl.Float64).set(none, None) for column, values in columns.items()}


def _confusions(
    taxonomy: Taxonomy, named_X: Ints, true_X: Ints, checked: Mapping[int, int]
) -> dict[int, str]:
    """By taxon that was named wrongly: what those specimens truly are, the most frequent first."""
    counted = (
        pl.DataFrame({"named": named_X, "true": true_X})
        .filter(pl.col("named") >= 0)
        .group_by("named", "true")
        .len()
        .sort("named", "len", "true", descending=[False, True, False])
        .group_by("named", maintain_order=True)
        .head(_CONFUSIONS)
    )
    found: dict[int, list[str]] = {}
    for named, true, count in counted.iter_rows():
        name = STRANGERS if true < 0 else taxonomy.name(true)
        found.setdefault(named, []).append(f"{name} {_percent(count / checked[named])}")
    return {named: ", ".join(parts) for named, parts in found.items()}


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %") if share >= 0.01 else "under 1 %"
