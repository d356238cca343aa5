"""How reliable the name of each taxon was."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support

from bioscan.analysis.intervals import wilson
from bioscan.analysis.reliability import UNKNOWN, reliability
from bioscan.analysis.taxonomy import Taxonomy

RECORDS = pl.DataFrame(
    {
        "order": ["Diptera"] * 6 + ["Coleoptera"] * 2,
        "family": ["Aidae", "Aidae", "Bidae", "Bidae", None, "Bidae", "Cidae", "Cidae"],
        "genus": ["Aus", "Ana", "Bus", None, "Dus", "Bus", "Cus", None],
    }
)
TREE, _ = Taxonomy.build(RECORDS, ["order", "family", "genus"]).filled()
COUNTS = np.bincount(TREE.targets(RECORDS), minlength=TREE.num_nodes)
NODE = {TREE.name(node): node for node in range(TREE.num_nodes)}


def nodes(names: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array([UNKNOWN if name == "-" else NODE[name] for name in names.split()])


def row(table: pl.DataFrame, name: str) -> dict[str, object]:
    return table.row(by_predicate=pl.col("name") == name, named=True)


def test_counts_shares_and_confusions_are_those_counted_by_hand() -> None:
    true = nodes("Aus Aus Aus Aus Ana Bus Bus - - Cus")
    named = nodes("Aus Aus Ana Bus Aus Bus - Aus Bus Aus")
    table = reliability(TREE, COUNTS, "genus", true, named)
    assert table["name"].to_list() == ["Bus", "Aus", "Ana", "Dus", "Cus"]  # as the tree has them
    aus = row(table, "Aus")
    assert [aus[name] for name in ("rank", "taxon", "training", "checked", "right", "support")] == [
        "genus",
        NODE["Aus"],
        1,
        5,
        2,
        4,
    ]
    assert (aus["precision"], aus["recall"]) == (2 / 5, 2 / 4)
    low, high = wilson(2, 5)
    assert (aus["precision_low"], aus["precision_high"]) == pytest.approx((float(low), float(high)))
    # of five called Aus one each is Ana, Cus and a stranger: ties in the order of the tree, strangers first
    assert aus["confusions"] == "taxa the model does not know 20 %, Ana 20 %, Cus 20 %"
    bus = row(table, "Bus")
    assert (bus["checked"], bus["right"], bus["support"]) == (3, 1, 2)
    dus = row(table, "Dus")
    assert (dus["training"], dus["checked"], dus["support"]) == (1, 0, 0)
    assert [dus[n] for n in ("precision", "precision_low", "recall", "recall_high", "confusions")] == [
        None
    ] * 5


def test_training_specimens_of_a_taxon_are_those_known_to_it_or_deeper() -> None:
    nothing = np.zeros(0, np.int64)
    counts = {
        name: training
        for rank in TREE.ranks
        for name, training in reliability(TREE, COUNTS, rank, nothing, nothing)
        .select("name", "training")
        .iter_rows()
    }
    assert counts == {
        **{"Diptera": 6, "Coleoptera": 2, "Aidae": 2, "Bidae": 3, "Cidae": 2},
        **{"Aus": 1, "Ana": 1, "Bus": 2, "Dus": 1, "Cus": 1},
    }  # and no placeholder of Dus, which has no family


def test_the_most_frequent_three_confusions_are_told() -> None:
    true = nodes("Ana " * 40 + "Bus " * 4 + "Cus " * 2 + "Dus " + "Aus " * 353)
    table = reliability(TREE, COUNTS, "genus", true, np.full(true.size, NODE["Aus"]))
    assert row(table, "Aus")["confusions"] == "Ana 10 %, Bus 1 %, Cus under 1 %"
    true = nodes("Ana " + "Aus " * 399)
    table = reliability(TREE, COUNTS, "genus", true, np.full(true.size, NODE["Aus"]))
    assert row(table, "Aus")["confusions"] == "Ana under 1 %"


GENERA = [NODE[name] for name in ("Bus", "Aus", "Ana", "Dus", "Cus")]
PAIRS = st.lists(
    st.tuples(st.sampled_from([UNKNOWN, *GENERA]), st.sampled_from([UNKNOWN, *GENERA])), min_size=1
)


@settings(max_examples=50, deadline=None)
@given(pairs=PAIRS)
def test_precision_and_recall_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    # a missing answer is a class of its own for it, other than that of the strangers
    true, named = np.array(pairs).T
    precision, recall, _, support = precision_recall_fscore_support(
        true, np.where(named == UNKNOWN, -2, named), labels=GENERA, zero_division=np.nan
    )
    table = reliability(TREE, COUNTS, "genus", true, named)
    assert table["support"].to_list() == support.tolist()
    found = table.select(pl.col("precision", "recall").fill_null(float("nan")))
    np.testing.assert_allclose(found["precision"], precision)
    np.testing.assert_allclose(found["recall"], recall)
