"""Sums up the tree, decodings and the leaf prior, against loops over leaves, paths and a cost matrix."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bioscan.analysis.hierarchy import (
    DECODINGS,
    ancestors,
    decode,
    leaf_prior,
    lineages,
    node_probabilities,
    rank_probabilities,
)
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import RequestError
from bioscan.vocabulary import RANKS

RANKS_USED = ("order", "family", "genus", "species")

name = st.sampled_from(["a", "b", "c", None])
rows_of_names = st.lists(st.tuples(name, name, name, name), min_size=1, max_size=14).filter(
    lambda rows: any(any(row) for row in rows)
)
seeds = st.integers(0, 2**32 - 1)


def tree_of(rows: list[tuple[str | None, ...]], *, filled: bool = True) -> Taxonomy:
    frame = pl.DataFrame(rows, schema=dict.fromkeys(RANKS_USED, pl.String), orient="row")
    tree = Taxonomy.build(frame, RANKS_USED)
    return tree.filled()[0] if filled else tree


def above(tree: Taxonomy, node: int) -> list[int]:
    """The nodes from the root's child down to a node, by walking up."""
    path: list[int] = []
    while node > 0:
        path.insert(0, node)
        node = int(tree.parent_N[node])
    return path


def random_probabilities(tree: Taxonomy, seed: int, rows: int = 5) -> NDArray[np.float64]:
    return np.random.default_rng(seed).dirichlet(np.full(tree.num_leaves, 0.5), rows)


FLIES: list[tuple[str | None, ...]] = [
    ("Diptera", "Aidae", "Aus", "Aus bus"),
    ("Diptera", "Aidae", "Aus", "Aus cus"),
    ("Diptera", "Bidae", None, "Bus bus"),  # no genus: a placeholder
    ("Coleoptera", "Cidae", None, None),  # a leaf at rank family
]


# -- ancestors


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_names, filled=st.booleans())
def test_the_ancestors_of_a_leaf_are_found_by_walking_up(
    rows: list[tuple[str | None, ...]], filled: bool
) -> None:
    tree = tree_of(rows, filled=filled)
    expected = np.full((len(tree.ranks), tree.num_leaves), -1)
    for leaf, node in enumerate(tree.leaves_L):
        for passed in above(tree, int(node)):
            expected[tree.ranks.index(RANKS[tree.rank_N[passed]]), leaf] = passed
    assert ancestors(tree).tolist() == expected.tolist()


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_names)
def test_a_lineage_names_every_taxon_on_the_path_and_no_placeholder(
    rows: list[tuple[str | None, ...]],
) -> None:
    tree = tree_of(rows)
    nodes = np.arange(-1, tree.num_nodes)
    found = lineages(tree, nodes)
    for node, lineage in zip(nodes.tolist(), found.T.tolist(), strict=True):
        expected = [-1] * len(tree.ranks)
        for passed in above(tree, node):
            if tree.predictable_N[passed]:
                expected[tree.ranks.index(RANKS[tree.rank_N[passed]])] = passed
        assert lineage == expected


# -- sums


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_names, seed=seeds, filled=st.booleans())
def test_the_probability_of_a_node_is_the_sum_over_its_leaves(
    rows: list[tuple[str | None, ...]], seed: int, filled: bool
) -> None:
    tree = tree_of(rows, filled=filled)
    probabilities = random_probabilities(tree, seed)
    found = node_probabilities(tree, probabilities)
    assert found.shape == (5, tree.num_nodes)
    for node in range(tree.num_nodes):
        leaves = [leaf for leaf, end in enumerate(tree.leaves_L) if node in (0, *above(tree, int(end)))]
        assert found[:, node] == pytest.approx(probabilities[:, leaves].sum(axis=1), abs=1e-14)
    for rank in tree.ranks:
        sums, nodes = rank_probabilities(tree, probabilities, rank)
        assert (tree.rank_N[nodes] == RANKS.index(rank)).all()
        assert sums.tolist() == found[:, nodes].tolist()


def test_sums_are_taken_in_float64_and_rows_without_a_prediction_stay_nan() -> None:
    tree = Taxonomy.build(
        pl.DataFrame({"order": ["Diptera"] * 5_000, "species": [f"s{i}" for i in range(5_000)]}),
        ["order", "species"],
    )
    probabilities = np.full((2, 5_000), 1e-4, np.float32)
    probabilities[1] = np.nan
    sums, nodes = rank_probabilities(tree, probabilities, "order")
    assert nodes.tolist() == [1]
    assert sums[0, 0] == pytest.approx(5_000 * float(np.float32(1e-4)), abs=1e-13)
    assert np.isnan(sums[1, 0])
    with pytest.raises(RequestError, match=r"unknown rank of this taxonomy 'genus'.*order, species"):
        rank_probabilities(tree, probabilities, "genus")


# -- decodings


def test_the_three_decodings_of_one_worked_example() -> None:
    tree = tree_of(FLIES)
    names = [tree.name(int(n)) for n in tree.leaves_L]
    assert names == ["Aus bus", "Aus cus", "Bus bus", "Cidae"]
    # leaf: Cidae 0.37. greedy: Diptera 0.63 > Coleoptera 0.37, Aidae 0.33 > Bidae 0.30, Aus, Aus cus.
    # distance: right at so many ranks. Aus cus: .63 + .33 + .33 + .17 = 1.46, Bus bus: .63 + 3 x .30 = 1.53,
    # Cidae, which stands for itself at rank genus and species: 4 x .37 = 1.48
    probabilities = np.array([[0.16, 0.17, 0.30, 0.37]])
    answers = {rule: tree.name(int(decode(tree, probabilities, rule)[0])) for rule in DECODINGS}
    assert answers == {"leaf": "Cidae", "greedy": "Aus cus", "distance": "Bus bus"}
    # now Aus cus: .70 + .40 + .40 + .21 = 1.71, Bus bus 1.60, Cidae 1.20
    probabilities = np.array([[0.19, 0.21, 0.30, 0.30]])
    answers = {rule: tree.name(int(decode(tree, probabilities, rule)[0])) for rule in DECODINGS}
    assert answers == {"leaf": "Bus bus", "greedy": "Aus cus", "distance": "Aus cus"}


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_names, seed=seeds, filled=st.booleans())
def test_decoding_by_distance_is_the_least_row_of_the_whole_cost_matrix(
    rows: list[tuple[str | None, ...]], seed: int, filled: bool
) -> None:
    tree = tree_of(rows, filled=filled)
    paths = [{RANKS[tree.rank_N[n]]: n for n in above(tree, int(leaf))} for leaf in tree.leaves_L]
    names = [[path.get(rank, path[max(path, key=RANKS.index)]) for rank in tree.ranks] for path in paths]
    differing = np.array([[sum(a != b for a, b in zip(x, y, strict=True)) for y in names] for x in names])
    probabilities = random_probabilities(tree, seed)
    costs = probabilities @ differing.T  # expected ranks at which each answer is wrong
    found = tree.first_leaf_N[decode(tree, probabilities, "distance")]
    assert costs[np.arange(5), found] == pytest.approx(costs.min(axis=1), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_names, seed=seeds, filled=st.booleans())
def test_greedy_decoding_takes_the_best_child_at_every_step(
    rows: list[tuple[str | None, ...]], seed: int, filled: bool
) -> None:
    tree = tree_of(rows, filled=filled)
    probabilities = random_probabilities(tree, seed)
    for row, answer in zip(probabilities, decode(tree, probabilities, "greedy"), strict=True):
        node = 0
        while children := np.flatnonzero(tree.parent_N == node).tolist():
            sums = [row[tree.first_leaf_N[c] : tree.end_leaf_N[c]].sum() for c in children]
            node = children[int(np.argmax(sums))]
        assert answer == node


@settings(max_examples=40, deadline=None)
@given(rows=rows_of_names, seed=seeds, rule=st.sampled_from(sorted(DECODINGS)))
def test_every_answer_is_one_path_of_the_tree(
    rows: list[tuple[str | None, ...]], seed: int, rule: str
) -> None:
    tree = tree_of(rows)
    answers = decode(tree, random_probabilities(tree, seed), rule)
    assert set(answers.tolist()) <= set(tree.leaves_L.tolist())
    assert tree.predictable_N[answers].all()
    for lineage in lineages(tree, answers).T:
        known = lineage[lineage >= 0].tolist()
        assert known == [node for node in above(tree, known[-1]) if tree.predictable_N[node]]


def test_with_one_rank_all_decodings_are_the_largest_probability() -> None:
    tree = Taxonomy.build(pl.DataFrame({"family": ["a", "b", "c", "c"]}), ["family"])
    probabilities = random_probabilities(tree, 3, rows=50)
    best = probabilities.argmax(axis=1) + 1
    assert all(decode(tree, probabilities, rule).tolist() == best.tolist() for rule in DECODINGS)


def test_ties_go_to_the_lower_number_and_an_unknown_rule_is_refused() -> None:
    tree = tree_of(FLIES)
    even = np.full((1, 4), 0.25)
    assert decode(tree, even, "leaf").tolist() == [tree.leaves_L[0]]
    assert decode(tree, even, "greedy").tolist() == [tree.leaves_L[0]]
    assert [decode(tree, even[:0], rule).tolist() for rule in DECODINGS] == [[], [], []]
    with pytest.raises(RequestError, match="unknown decoding 'greedi'; did you mean 'greedy'"):
        decode(tree, even, "greedi")


# -- the leaf prior


def test_the_prior_of_a_worked_example() -> None:
    tree = tree_of(FLIES)
    counts = np.zeros(tree.num_nodes, int)
    for taxon, count in {"Aus bus": 5, "Aus cus": 1, "Aus": 7, "Bus bus": 2, "Diptera": 10}.items():
        counts[[tree.name(n) for n in range(tree.num_nodes)].index(taxon)] = count
    counts[0] = 99  # says nothing
    # Aus: 5.5 + 1.5 + 7 = 14, of which Aus bus has 5.5 / 7; Bus bus 2.5; Diptera's 10 in proportion 14 : 2.5;
    # Cidae 0.5; all 27
    diptera, aus = 26.5 / 27, 14 / 16.5
    expected = [diptera * aus * 5.5 / 7, diptera * aus * 1.5 / 7, diptera * 2.5 / 16.5, 0.5 / 27]
    assert leaf_prior(tree, counts) == pytest.approx(expected, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_names, seed=seeds)
def test_the_prior_is_where_spreading_coarse_records_by_the_prior_gives_the_prior(
    rows: list[tuple[str | None, ...]], seed: int
) -> None:
    tree = tree_of(rows)
    counts = np.random.default_rng(seed).integers(0, 30, tree.num_nodes)
    prior = leaf_prior(tree, counts)
    assert prior.sum() == pytest.approx(1, abs=1e-14)
    assert (prior > 0).all()
    spread = np.zeros(tree.num_leaves)
    spread += counts[tree.leaves_L] + 0.5
    for node in range(1, tree.num_nodes):  # one step of expectation maximisation moves it nowhere
        leaves = slice(tree.first_leaf_N[node], tree.end_leaf_N[node])
        if node not in tree.leaves_L:
            spread[leaves] += counts[node] * prior[leaves] / prior[leaves].sum()
    assert spread / spread.sum() == pytest.approx(prior, abs=1e-12)


def test_without_coarse_records_the_prior_is_the_shares_of_the_leaves() -> None:
    tree = Taxonomy.build(pl.DataFrame({"family": ["a"] * 3 + ["b"]}), ["family"])
    counts = np.array([0, 3, 1])
    assert leaf_prior(tree, counts).tolist() == pytest.approx([3.5 / 5, 1.5 / 5])
