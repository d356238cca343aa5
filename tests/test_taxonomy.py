"""The tree of taxa: a taxon is its path; holes are filled where one taxon fits; targets and intervals."""

import json
import random
from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bioscan.analysis.taxonomy import Lineage, Taxonomy, resolve_paths, trimmed, within
from bioscan.errors import DataError, RequestError
from bioscan.vocabulary import RANKS

Row = tuple[str | None, ...]


def table(
    rows: Sequence[Row], ranks: Sequence[str] = ("order", "family", "genus", "species")
) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=dict.fromkeys(ranks, pl.String), orient="row")


def full(*names: str | None) -> Row:
    """order, family, subfamily, tribe, genus, species as a whole row of RANKS."""
    return ("Arthropoda", "Insecta", *names, *(None,) * (7 - len(names)))


def path(*names: str | None) -> Lineage:
    return trimmed(full(*names))


name = st.sampled_from(["a", "b", "c", None])
rows_of_names = st.lists(st.tuples(*([name] * 4)), min_size=1, max_size=12)


# -- one taxon, several ways to write it


def test_a_hole_is_filled_by_the_other_records_of_the_taxon() -> None:
    resolved = resolve_paths(
        [full("Diptera", "Aidae", None, None, "Aus"), full("Diptera", "Aidae", "Ainae", None, "Aus")]
    )
    assert resolved[path("Diptera", "Aidae", None, None, "Aus")] == path(
        "Diptera", "Aidae", "Ainae", None, "Aus"
    )


def test_a_hole_that_fits_two_taxa_stays_a_taxon_of_its_own() -> None:
    in_flies = full("Diptera", "Aidae", None, None, "Aus")
    in_beetles = full("Coleoptera", "Bidae", None, None, "Aus")
    open_one = full(None, None, None, None, "Aus")
    resolved = resolve_paths([in_flies, in_beetles, open_one])
    assert resolved[trimmed(open_one)] == trimmed(open_one)
    assert len({resolved[trimmed(r)] for r in (in_flies, in_beetles, open_one)}) == 3


def test_what_a_hole_fits_does_not_depend_on_which_record_comes_first() -> None:
    # the tribe alone fits both subfamilies, which exclude each other: it must not go to the first one
    rows = [
        full("Diptera", "Aidae", None, "Aini", "Aus"),
        full("Diptera", "Aidae", "Ainae", None, "Aus"),
        full("Diptera", "Aidae", "Binae", None, "Aus"),
    ]
    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
        resolved = resolve_paths([rows[i] for i in order])
        assert all(resolved[trimmed(row)] == trimmed(row) for row in rows)


def test_a_path_takes_over_what_is_known_of_the_taxon_above_it() -> None:
    rows = [
        full("Diptera", "Aidae", "Ainae", None, "Aus"),
        full("Diptera", "Aidae", None, None, "Aus", "Aus bus"),
    ]
    resolved = resolve_paths(rows)
    assert resolved[trimmed(rows[1])] == path("Diptera", "Aidae", "Ainae", None, "Aus", "Aus bus")


@settings(max_examples=150, deadline=None)
@given(rows=rows_of_names, shuffle=st.randoms(use_true_random=False))
def test_resolving_is_idempotent_and_independent_of_row_order(
    rows: list[Row], shuffle: random.Random
) -> None:
    rows = [full(*row) for row in rows]
    resolved = resolve_paths(rows)
    moved = resolve_paths(shuffle.sample(rows, len(rows)))
    assert resolved == moved
    again = resolve_paths([taxon + (None,) * (len(RANKS) - len(taxon)) for taxon in resolved.values()])
    assert all(again[taxon] == taxon for taxon in resolved.values())


@settings(max_examples=150, deadline=None)
@given(rows=rows_of_names)
def test_a_resolved_path_keeps_its_names_and_its_taxa_above_are_resolved_too(rows: list[Row]) -> None:
    resolved = resolve_paths([full(*row) for row in rows])
    for written, taxon in resolved.items():
        assert len(written) == len(taxon)
        assert all(a is None or a == b for a, b in zip(written, taxon, strict=True))
        above = trimmed(taxon[:-1])
        assert resolved.get(above, above) == above


# -- the tree

ROWS: list[Row] = [
    ("Diptera", "Aidae", "Aus", "Aus bus"),
    ("Diptera", "Aidae", "Aus", None),
    ("Diptera", "Aidae", None, None),
    ("Coleoptera", "Bidae", "Bus", None),
    ("Diptera", "Cidae", None, None),
    ("Diptera", "Cidae", None, None),
    ("Coleoptera", "Bidae", "Aus", None),  # a homonym
    (None, None, None, None),
]


def test_one_rank_numbers_its_classes_by_descending_count_ties_by_appearance() -> None:
    tree = Taxonomy.build(table(ROWS), ["family"])
    names = [tree.name(int(n)) for n in tree.leaves_L]
    # Aidae 3, Bidae 2 (seen before) and Cidae 2
    assert names == ["Aidae", "Bidae", "Cidae"]
    assert tree.counts_N.tolist() == [8, 3, 2, 2]


def test_nodes_are_numbered_depth_first_and_own_an_interval_of_leaves() -> None:
    tree = Taxonomy.build(table(ROWS), ["order", "family", "genus"])
    below = {
        tree.paths[n][2:]: (int(tree.first_leaf_N[n]), int(tree.end_leaf_N[n])) for n in range(tree.num_nodes)
    }
    assert below == {
        (): (0, 4),
        ("Diptera",): (0, 2),
        ("Diptera", "Aidae"): (0, 1),
        ("Diptera", "Aidae", None, None, "Aus"): (0, 1),
        ("Diptera", "Cidae"): (1, 2),
        ("Coleoptera",): (2, 4),
        ("Coleoptera", "Bidae"): (2, 4),
        ("Coleoptera", "Bidae", None, None, "Bus"): (2, 3),
        ("Coleoptera", "Bidae", None, None, "Aus"): (3, 4),
    }
    assert tree.num_leaves == len(tree.leaf_paths) == 4


def test_homonyms_are_two_taxa() -> None:
    tree = Taxonomy.build(table(ROWS), ["order", "genus"])
    same = [n for n in range(tree.num_nodes) if tree.name(n) == "Aus"]
    assert len(same) == 2
    targets = tree.targets(table(ROWS))
    assert {targets[0], targets[6]} == set(same)
    only_genus = table([(None, None, "Aus", None), (None, None, "Bus", None)])
    assert tree.targets(only_genus).tolist() == [-1, tree.targets(table(ROWS))[3]]


def test_targets_are_the_deepest_known_taxa_of_the_tree() -> None:
    tree = Taxonomy.build(table(ROWS), ["order", "family", "genus"])
    partial = table(
        [
            ("Diptera", "Aidae", "Aus", "Aus novus"),  # the species is not a rank of the tree
            ("Diptera", None, None, None),
            ("Diptera", "Aidae", None, None),
            (None, None, None, None),
            ("Diptera", "Didae", None, None),
            (None, "Cidae", None, None),
        ]
    )
    targets = tree.targets(partial)
    shown = [tree.paths[t][2:] if t >= 0 else None for t in targets]
    assert shown == [
        ("Diptera", "Aidae", None, None, "Aus"),
        ("Diptera",),
        ("Diptera", "Aidae"),
        (),
        None,
        ("Diptera", "Cidae"),
    ]
    assert tree.targets(pl.DataFrame({"sampleid": ["x", "y"]})).tolist() == [0, 0]


@settings(max_examples=150, deadline=None)
@given(
    rows=rows_of_names.filter(lambda rows: any(any(row) for row in rows)),
    ranks=st.sampled_from([("order", "family", "genus", "species"), ("order", "genus"), ("species",)]),
)
def test_the_tree_counts_and_finds_every_record_that_it_was_built_from(
    rows: list[Row], ranks: tuple[str, ...]
) -> None:
    frame = table(rows)
    assume(frame.select(pl.any_horizontal(pl.col(r).is_not_null().any() for r in ranks)).item())
    tree = Taxonomy.build(frame, ranks)
    assert tree.counts_N[0] == len(rows)
    targets = tree.targets(frame)
    assert (targets >= 0).all()
    for row, target in zip(rows, targets, strict=True):
        deepest = next((r for r, n in zip(frame.columns[::-1], row[::-1], strict=True) if n), None)
        if deepest is None or deepest in ranks:  # else a hole may be filled at a rank of the tree
            assert tree.name(int(target)) == (row[frame.columns.index(deepest)] if deepest else "")
    # a node's count is that of the targets at or below it, parents come before children
    counts = np.bincount(targets, minlength=tree.num_nodes)
    for node in range(tree.num_nodes - 1, 0, -1):
        assert tree.parent_N[node] < node
        counts[tree.parent_N[node]] += counts[node]
    assert counts.tolist() == tree.counts_N.tolist()


@settings(max_examples=80, deadline=None)
@given(rows=rows_of_names.filter(lambda rows: any(any(row) for row in rows)))
def test_leaf_intervals_nest_and_siblings_share_nothing(rows: list[Row]) -> None:
    tree = Taxonomy.build(table(rows), ["order", "family", "genus", "species"])
    width = tree.end_leaf_N - tree.first_leaf_N
    for node in range(tree.num_nodes):
        children = np.flatnonzero(tree.parent_N == node)
        assert width[node] == (width[children].sum() if children.size else 1)
        assert (np.diff(tree.counts_N[children]) <= 0).all()
        if children.size:
            assert tree.first_leaf_N[children[0]] == tree.first_leaf_N[node]
            assert (tree.end_leaf_N[children[:-1]] == tree.first_leaf_N[children[1:]]).all()


@settings(max_examples=80, deadline=None)
@given(rows=rows_of_names.filter(lambda rows: any(any(row) for row in rows)))
def test_a_tree_survives_json(rows: list[Row]) -> None:
    tree = Taxonomy.build(table(rows), ["order", "family", "genus", "species"])
    back = Taxonomy.from_dict(json.loads(json.dumps(tree.to_dict())))
    assert (back.ranks, back.paths) == (tree.ranks, tree.paths)
    for field in ("rank_N", "parent_N", "first_leaf_N", "end_leaf_N", "counts_N", "predictable_N"):
        ours, theirs = getattr(tree, field), getattr(back, field)
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"ranks": ["order"], "nodes": []},
        {"ranks": ["order"], "nodes": [{"path": []}]},
        {
            "ranks": ["order"],
            "nodes": [{"path": [], "parent": -1, "count": 1}, {"path": ["x"], "parent": 7, "count": 1}],
        },
        {
            "ranks": ["order"],
            "nodes": [{"path": [], "parent": -1, "count": 1}, {"path": ["x"], "parent": 1, "count": 1}],
        },
    ],
)
def test_what_is_no_tree_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(DataError, match="taxonomy"):
        Taxonomy.from_dict(content)


def test_a_tree_needs_a_known_rank_and_a_name() -> None:
    with pytest.raises(RequestError, match="unknown rank 'famly'; did you mean 'family'"):
        Taxonomy.build(table(ROWS), ["famly"])
    with pytest.raises(RequestError, match="at least one rank"):
        Taxonomy.build(table(ROWS), [])
    with pytest.raises(DataError, match="no record has a name at rank tribe"):
        Taxonomy.build(table(ROWS), ["tribe"])


# -- gaps

GAPS: list[Row] = [
    ("Diptera", "Aidae", "Aus", "Aus bus"),
    ("Diptera", "Aidae", None, "Bus bus"),  # no genus
    ("Diptera", "Aidae", None, "Cus cus"),
    ("Diptera", None, "Dus", None),  # no family
    ("Diptera", None, None, "Eus eus"),  # neither
    (None, "Fidae", None, None),  # no order; a leaf at rank family
]
FOUR = ("order", "family", "genus", "species")


def test_gaps_are_filled_by_one_placeholder_for_a_parent_and_rank() -> None:
    tree, made = Taxonomy.build(table(GAPS), FOUR).filled()
    shown = [
        (tree.name(n), tree.name(int(tree.parent_N[n])), int(tree.counts_N[n]), bool(tree.predictable_N[n]))
        for n in range(1, tree.num_nodes)
    ]
    assert shown == [
        ("Diptera", "", 5, True),
        ("Aidae", "Diptera", 3, True),
        ("unassigned Aidae", "Aidae", 2, False),
        ("Bus bus", "unassigned Aidae", 1, True),
        ("Cus cus", "unassigned Aidae", 1, True),
        ("Aus", "Aidae", 1, True),
        ("Aus bus", "Aus", 1, True),
        ("unassigned Diptera", "Diptera", 2, False),  # rank family
        ("Dus", "unassigned Diptera", 1, True),
        ("unassigned Diptera", "unassigned Diptera", 1, False),  # rank genus
        ("Eus eus", "unassigned Diptera", 1, True),
        ("unassigned", "", 1, False),
        ("Fidae", "unassigned", 1, True),
    ]
    assert made == 4
    assert tree.paths[[s[0] for s in shown].index("Eus eus") + 1][2:] == ("Diptera", *(None,) * 4, "Eus eus")


def test_a_taxon_that_is_called_like_a_placeholder_stays_a_taxon() -> None:
    rows = [*GAPS, ("Diptera", "Aidae", "unassigned Aidae", None)]
    tree, _ = Taxonomy.build(table(rows), FOUR).filled()
    (target,) = tree.targets(table(rows[-1:]))
    assert tree.name(int(target)) == "unassigned Aidae"
    assert tree.predictable_N[target]
    assert int(tree.counts_N[target]) == 1
    assert {"unassigned Aidae", "unassigned unassigned Aidae"} <= {
        tree.name(n) for n in range(tree.num_nodes)
    }


def test_no_record_belongs_to_a_placeholder() -> None:
    tree, _ = Taxonomy.build(table(GAPS), FOUR).filled()
    named = table([("Diptera", "Aidae", "unassigned Aidae", None), ("Diptera", "Aidae", None, None)])
    assert [tree.name(int(t)) if t > 0 else t for t in tree.targets(named)] == [-1, "Aidae"]


def test_with_one_rank_nothing_is_filled() -> None:
    tree = Taxonomy.build(table(GAPS), ["genus"])
    filled, made = tree.filled()
    assert (made, filled.to_dict()) == (0, tree.to_dict())


@settings(max_examples=100, deadline=None)
@given(
    rows=rows_of_names.filter(lambda rows: any(any(row) for row in rows)),
    ranks=st.sampled_from([FOUR, ("order", "genus", "species"), ("family", "species")]),
)
def test_filling_leaves_every_taxon_as_it_was_and_no_gap(rows: list[Row], ranks: tuple[str, ...]) -> None:
    frame = table(rows)
    assume(frame.select(pl.any_horizontal(pl.col(r).is_not_null().any() for r in ranks)).item())
    tree = Taxonomy.build(frame, ranks)
    filled, made = tree.filled()
    assert made == int((~filled.predictable_N).sum()) == filled.num_nodes - tree.num_nodes
    real = np.flatnonzero(filled.predictable_N)
    assert sorted(
        zip([filled.paths[n] for n in real], filled.counts_N[real].tolist(), strict=True), key=str
    ) == (sorted(zip(tree.paths, tree.counts_N.tolist(), strict=True), key=str))
    assert sorted(filled.leaf_paths, key=str) == sorted(tree.leaf_paths, key=str)
    # records find the same taxa
    before = [tree.paths[t] if t >= 0 else None for t in tree.targets(frame)]
    assert [filled.paths[t] if t >= 0 else None for t in filled.targets(frame)] == before
    # each node is one rank of the tree below its parent
    level = np.array([-1, *(ranks.index(RANKS[r]) for r in filled.rank_N[1:])])
    assert (level[1:] - level[filled.parent_N[1:]] == 1).all()
    for node in np.flatnonzero(~filled.predictable_N):
        assert filled.counts_N[node] == filled.counts_N[filled.parent_N == node].sum() > 0
    # once is enough, and a round trip keeps it
    assert filled.filled()[1] == 0
    for again in (filled.filled()[0], Taxonomy.from_dict(json.loads(json.dumps(filled.to_dict())))):
        assert again.paths == filled.paths
        for field in ("rank_N", "parent_N", "first_leaf_N", "end_leaf_N", "counts_N", "predictable_N"):
            ours, theirs = getattr(filled, field), getattr(again, field)
            assert (ours.dtype, ours.tolist()) == (theirs.dtype, theirs.tolist())


# -- within


def test_within_keeps_the_rows_below_a_taxon() -> None:
    assert within(table(ROWS), "Diptera").height == 5
    assert within(table(ROWS), "family:Bidae").height == 2
    assert within(table(ROWS), "Aus bus").height == 1


def test_within_names_near_taxa_and_asks_for_a_rank_where_ranks_share_a_name() -> None:
    with pytest.raises(RequestError, match="no record belongs to 'Dipetra'; did you mean 'Diptera'"):
        within(table(ROWS), "Dipetra")
    with pytest.raises(RequestError, match="unknown rank 'ordre'"):
        within(table(ROWS), "ordre:Diptera")
    both = table([("Aus", None, "Aus", None)])
    with pytest.raises(RequestError, match="'Aus' is a name at ranks order, genus; say order:Aus"):
        within(both, "Aus")
    assert within(both, "genus:Aus").height == 1
