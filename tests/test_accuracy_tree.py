"""The sunburst of accuracies, against counting by hand and its own geometry."""

import math
import re
from collections.abc import Mapping

import numpy as np
import polars as pl
import pytest

from bioscan.analysis.taxonomy import Taxonomy
from bioscan.app.accuracy_tree import AccuracyTree, accuracy_tree
from bioscan.app.sunburst import RADIUS, Arc, arcs, pieces
from bioscan.jobs.evaluate import evaluate_ranks

CATALOGUE = pl.DataFrame(
    [
        ("a", "Diptera", "Aidae", "Aus"),
        ("b", "Diptera", "Aidae", "Aus"),
        ("c", "Diptera", "Aidae", None),
        ("d", "Diptera", "Bidae", "Bus"),
        ("e", "Diptera", None, None),
        ("f", "Coleoptera", None, "Cus"),
        ("g", "Coleoptera", "Didae", None),
    ],
    schema=["sampleid", "order", "family", "genus"],
    orient="row",
)


def tree_of(
    ranks: list[str], named: Mapping[str, tuple[str | None, ...]], max_nodes: int = 99
) -> AccuracyTree:
    """Of predictions that name each specimen at the ranks."""
    rows = [(key, *names) for key, names in named.items()]
    predictions = pl.DataFrame(rows, schema=dict.fromkeys(["sampleid", *ranks], pl.String), orient="row")
    made = accuracy_tree(evaluate_ranks(predictions, CATALOGUE), CATALOGUE, max_nodes=max_nodes)
    assert made is not None
    return made


def test_every_taxon_is_judged_at_its_own_rank_on_the_specimens_that_can_be_checked() -> None:
    named = {
        "a": ("Diptera", "Aidae"),
        "b": ("Diptera", "Bidae"),
        "c": ("Coleoptera", "Didae"),
        "d": ("Diptera", "Bidae"),
        "e": ("Diptera", "Aidae"),  # no family in the catalogue: the family is neither right nor wrong
        "f": (None, None),
        "g": ("Coleoptera", "Aidae"),
    }
    made = tree_of(["order", "family"], named)
    rows = {row["name"]: (row["rank"], row["specimens"], row["checked"], row["right"]) for row in made.rows}
    assert rows == {
        "Diptera": ("order", 5, 5, 4 / 5),
        "Aidae": ("family", 3, 3, 1 / 3),
        "Bidae": ("family", 1, 1, 1.0),
        "Coleoptera": ("order", 2, 2, 1 / 2),
        "Didae": ("family", 1, 1, 0.0),
        # genera are judged by the family: of Aus a is right and b wrong; f has no family to check
        "Aus": ("genus", 2, 2, 1 / 2),
        "Bus": ("genus", 1, 1, 1.0),
        "Cus": ("genus", 1, 0, None),
    }
    assert made.judged_at == {"order": "order", "family": "family", "genus": "family"}
    told = {arc["told"]: (arc["shade"], arc["strength"]) for arc in made.arcs}
    # Wilson at 4 of 5: 38 to 96 %
    assert told["Diptera (order): 80 % of 5 specimens named right (38–96 %)"] == ("up", 60)
    assert told["Aus (genus): 50 % of 2 specimens named right at rank family (9–91 %)"] == ("up", 0)
    assert told["Didae (family): 0 % of 1 specimens named right (0–79 %)"] == ("down", 100)
    assert told["Cus (genus): 1 specimens, none checked"] == ("rest", None)


def test_taxa_beyond_the_number_drawn_are_one_grey_piece_that_counts_them() -> None:
    named = {key: (order,) for key, order in CATALOGUE.select("sampleid", "order").iter_rows()}
    made = tree_of(["order"], named, max_nodes=4)
    assert [row["name"] for row in made.rows] == ["Diptera", "Aidae", "Aus", "Coleoptera"]
    assert (made.taxa, made.drawn) == (8, 4)
    rest = [arc["told"] for arc in made.arcs if arc["shade"] == "rest"]
    # below Diptera: Bidae; below Coleoptera: Cus and Didae
    assert rest == ["1 taxon not drawn one by one", "2 taxa not drawn one by one"]


def test_one_taxon_makes_no_tree() -> None:
    predictions = pl.DataFrame({"sampleid": ["a", "b"], "class": ["Insecta", "Insecta"]})
    catalogue = pl.DataFrame({"sampleid": ["a", "b"], "class": ["Insecta", "Insecta"]})
    assert accuracy_tree(evaluate_ranks(predictions, catalogue), catalogue) is None


# -- geometry


def corners(arc: Arc) -> tuple[float, float, float, float]:
    """Angles of begin and end, clockwise from the top, and inner and outer radius, read from the path."""
    x1, y1, outer, x2, y2, x3, y3, inner = (
        float(part)
        for part in re.match(
            r"M(\S+) (\S+)A(\S+) \S+ 0 \d 1 (\S+) (\S+)L(\S+) (\S+)A(\S+) ", arc.path
        ).groups()  # type: ignore[union-attr]
    )
    begin, end = (math.atan2(x, -y) % (2 * math.pi) for x, y in ((x1, y1), (x2, y2)))
    assert math.hypot(x3, y3) == pytest.approx(inner, abs=0.1)
    return begin, end, inner, outer


def test_an_arc_is_as_wide_as_its_share_inside_its_parent_and_on_the_ring_of_its_rank() -> None:
    tree = Taxonomy.build(CATALOGUE, ["order", "family", "genus"])
    width = (RADIUS - 46) / 3
    made = {tree.name(arc.piece.node or 0): (arc, *corners(arc)) for arc in arcs(tree, pieces(tree, 99))}
    assert set(made) == {"Diptera", "Aidae", "Aus", "Bidae", "Bus", "Coleoptera", "Cus", "Didae"}
    for name, (arc, begin, end, inner, outer) in made.items():
        span = (end - begin) % (2 * math.pi)
        assert span == pytest.approx(2 * math.pi * arc.piece.count / 7, abs=0.01)
        ring = ("order", "family", "genus").index(
            {3: "order", 4: "family", 7: "genus"}[len(tree.paths[arc.piece.node or 0])]
        )
        assert (inner, outer) == pytest.approx((46 + ring * width, 46 + (ring + 1) * width), abs=0.01), name
    for below, above in (("Aidae", "Diptera"), ("Aus", "Aidae"), ("Bidae", "Diptera"), ("Cus", "Coleoptera")):
        assert made[above][1] - 0.01 <= made[below][1] <= made[above][1] + 2 * math.pi
    # the genus without a family stands in the ring of genera, below its order
    assert made["Cus"][3] == pytest.approx(46 + 2 * width, abs=0.01)


def test_a_taxon_that_has_every_specimen_is_a_whole_ring_and_labels_stay_in_the_drawing() -> None:
    frame = pl.DataFrame({"class": ["Insecta"] * 60, "order": [f"Order {'x' * (i % 30)}" for i in range(60)]})
    tree = Taxonomy.build(frame, ["class", "order"])
    made = arcs(tree, pieces(tree, 99))
    assert made[0].path.count("A") == 4
    assert made[0].label == "Insecta"
    numbers = [float(n) for arc in made for n in re.findall(r"-?\d+\.\d", arc.path + arc.baseline)]
    assert max(map(abs, numbers)) <= RADIUS + 0.1
    assert all(len(arc.label) <= 21 for arc in made)
    assert np.isfinite(numbers).all()
