"""Probabilities over the taxonomy: sums up the tree, decodings, and the prior of the leaf taxa.

X: specimens, L: leaf taxa, N: nodes of the tree, R: ranks of the tree, G: nodes at one rank. Everything takes
and gives a block of specimens at a time, so the caller's block bounds the memory.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import unknown
from bioscan.vocabulary import RANKS

Floats = NDArray[np.floating[Any]]


def ancestors(taxonomy: Taxonomy) -> NDArray[np.int32]:
    """Node of each leaf at each rank of the tree, shape R × L, itself included; -1 where there is none."""
    found_RL = np.full((len(taxonomy.ranks), taxonomy.num_leaves), -1, np.int32)
    for row_L, rank in zip(found_RL, taxonomy.ranks, strict=True):
        nodes_G = _nodes_at(taxonomy, rank)
        first_G = taxonomy.first_leaf_N[nodes_G]
        width_G = taxonomy.end_leaf_N[nodes_G] - first_G
        before_G = np.cumsum(width_G) - width_G
        row_L[np.repeat(first_G - before_G, width_G) + np.arange(width_G.sum())] = np.repeat(nodes_G, width_G)
    return found_RL


def lineages(taxonomy: Taxonomy, nodes_X: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
    """Taxon at each rank of the tree on the way from the root to a node, shape R × X, itself included.

    -1 where there is none, or only a placeholder: what a prediction leaves empty. The root and -1 have none.
    """
    nodes_X = np.maximum(nodes_X, 0)
    found_RX = ancestors(taxonomy)[:, taxonomy.first_leaf_N[nodes_X]]
    levels_R = np.array([RANKS.index(rank) for rank in taxonomy.ranks])
    above_RX = levels_R[:, None] <= taxonomy.rank_N[nodes_X]
    found_RX[~(above_RX & taxonomy.predictable_N[found_RX])] = -1
    return found_RX


def rank_probabilities(
    taxonomy: Taxonomy, probabilities_XL: Floats, rank: str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Probability of each node at a rank: the sum over its leaves.

    Args:
        taxonomy: The tree.
        probabilities_XL: Of the leaves; rows of NaN stay NaN.
        rank: One of the tree's ranks.

    Returns:
        Shape X × G in float64, and the nodes, ascending. Placeholders are among them. A row's sum falls short
        of the leaves' where leaves have no node at the rank: taxa that end above it.

    Raises:
        RequestError: the tree has no such rank.
    """
    if rank not in taxonomy.ranks:
        raise unknown("rank of this taxonomy", rank, taxonomy.ranks)
    nodes_G = _nodes_at(taxonomy, rank)
    return _sums(probabilities_XL, taxonomy.first_leaf_N[nodes_G], taxonomy.end_leaf_N[nodes_G]), nodes_G


def node_probabilities(taxonomy: Taxonomy, probabilities_XL: Floats) -> NDArray[np.float64]:
    """Probability of every node, shape X × N in float64: the sum over its leaves."""
    found_XN = np.empty((len(probabilities_XL), taxonomy.num_nodes))
    found_XN[:, 0] = np.sum(probabilities_XL, axis=1, dtype=np.float64)
    for rank in taxonomy.ranks:
        sums_XG, nodes_G = rank_probabilities(taxonomy, probabilities_XL, rank)
        found_XN[:, nodes_G] = sums_XG
    return found_XN


def best_leaf(taxonomy: Taxonomy, probabilities_XL: Floats) -> NDArray[np.int32]:
    """The most probable leaf: most often right at the deepest rank. Ties go to the lower number."""
    found_X: NDArray[np.int32] = taxonomy.leaves_L[np.argmax(probabilities_XL, axis=1)]
    return found_X


def greedy(taxonomy: Taxonomy, probabilities_XL: Floats) -> NDArray[np.int32]:
    """The most probable child, from the root down to a leaf: most often right at the highest rank.

    Ties go to the lower number.
    """
    node_XN = node_probabilities(taxonomy, probabilities_XL)
    children = _children(taxonomy)
    found_X = np.zeros(len(node_XN), np.int32)
    going_X = np.arange(len(node_XN))
    while going_X.size:
        order_X = np.argsort(found_X[going_X], kind="stable")
        nodes, starts = np.unique(found_X[going_X[order_X]], return_index=True)
        for node, rows in zip(nodes, np.split(going_X[order_X], starts[1:]), strict=True):
            below = children[node]
            found_X[rows] = below[np.argmax(node_XN[np.ix_(rows, below)], axis=1)]
        going_X = going_X[np.array([node in children for node in found_X[going_X]], bool)]
    return found_X


def least_distance(taxonomy: Taxonomy, probabilities_XL: Floats) -> NDArray[np.int32]:
    """The leaf whose expected distance from the true leaf, in ranks of the tree, is least.

    The distance between two leaves is the number of ranks at which their taxa differ; a leaf that has no node
    at a rank, as its name ends above it, stands there for itself. So a family without named species is as far
    from a species of another family as that family's other species are. The expected distance is the number
    of ranks less the sum, over ranks, of the probability of the leaf's taxon there: R sums instead of a cost
    matrix of L × L. Cost-sensitive decoding, Karthik et al., ICLR 2021. Ties go to the lower number.
    """
    near_XL = np.zeros((len(probabilities_XL), taxonomy.num_leaves))
    for rank, ancestor_L in zip(taxonomy.ranks, ancestors(taxonomy), strict=True):
        sums_XG, nodes_G = rank_probabilities(taxonomy, probabilities_XL, rank)
        having, ending = np.flatnonzero(ancestor_L >= 0), np.flatnonzero(ancestor_L < 0)
        near_XL[:, having] += sums_XG[:, np.searchsorted(nodes_G, ancestor_L[having])]
        near_XL[:, ending] += probabilities_XL[:, ending]
    found_X: NDArray[np.int32] = taxonomy.leaves_L[np.argmax(near_XL, axis=1)]
    return found_X


Decoding = Callable[[Taxonomy, Floats], NDArray[np.int32]]

DECODINGS: Final[dict[str, Decoding]] = {"leaf": best_leaf, "greedy": greedy, "distance": least_distance}
"""Ways from leaf probabilities to one answer, by name."""


def decode(taxonomy: Taxonomy, probabilities_XL: Floats, rule: str) -> NDArray[np.int32]:
    """One leaf node for each specimen, by a rule of DECODINGS; its lineage is the answer at every rank.

    So answers never contradict each other. Placeholders are passed through, not answered: `lineages` leaves
    their ranks empty.

    Raises:
        RequestError: an unknown rule.
    """
    if rule not in DECODINGS:
        raise unknown("decoding", rule, DECODINGS)
    return DECODINGS[rule](taxonomy, probabilities_XL)


def leaf_prior(
    taxonomy: Taxonomy, counts_N: NDArray[np.integer[Any]] | NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    """Share of each leaf taxon among the records, those known only to a higher taxon included; sums to 1.

    Each leaf counts half a record more than it has, so that no share is 0. Records known only to a higher
    taxon are spread over its leaves in proportion to what these have already, the deepest first. That is the
    most likely prior when it does not depend on the taxon how deep a record is named: a taxon's share of its
    parent is its share of the records that are known below the parent.

    Args:
        taxonomy: The tree.
        counts_N: Records whose target, the deepest known taxon, is the node; the root's do not matter.
    """
    weight_N = counts_N.astype(np.float64)
    weight_N[taxonomy.leaves_L] += 0.5
    below_N = weight_N.copy()  # at or below the node
    for node in range(taxonomy.num_nodes - 1, 0, -1):
        below_N[taxonomy.parent_N[node]] += below_N[node]
    share_N = np.ones(taxonomy.num_nodes)
    for node in range(1, taxonomy.num_nodes):
        parent = taxonomy.parent_N[node]
        share_N[node] = share_N[parent] * below_N[node] / (below_N[parent] - weight_N[parent])
    prior_L: NDArray[np.float64] = share_N[taxonomy.leaves_L]
    return prior_L / float(prior_L.sum())


def _nodes_at(taxonomy: Taxonomy, rank: str) -> NDArray[np.int64]:
    return np.flatnonzero(taxonomy.rank_N == RANKS.index(rank))


def _children(taxonomy: Taxonomy) -> dict[int, NDArray[np.int64]]:
    """Children of each node that has some, ascending."""
    order = np.argsort(taxonomy.parent_N[1:], kind="stable") + 1
    parents, starts = np.unique(taxonomy.parent_N[order], return_index=True)
    return dict(zip(parents.tolist(), np.split(order, starts[1:]), strict=True))


def _sums(values_XL: Floats, first_G: NDArray[np.int32], end_G: NDArray[np.int32]) -> NDArray[np.float64]:
    """Sums of ascending intervals of columns that do not overlap, in float64."""
    if not first_G.size:
        return np.empty((len(values_XL), 0))
    bounds = np.column_stack([first_G, end_G]).ravel()
    if bounds[-1] == values_XL.shape[1]:
        bounds = bounds[:-1]  # the last interval ends with the columns
    sums: NDArray[np.float64] = np.add.reduceat(values_XL, bounds, axis=1, dtype=np.float64)
    return sums[:, ::2]
