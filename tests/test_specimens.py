"""Which specimens are learned from, and as what: one rank or several, whole names or not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import bioscan
from bioscan.data.images import Images
from bioscan.errors import RequestError
from bioscan.learn.specimens import Specimens, labelled, select

Paint = Callable[..., tuple[Path, Path]]

TREE = {
    "Diptera/Syrphidae/Eristalis/Eristalis tenax": (3, 1, 0),
    "Diptera/Syrphidae": (4, 0, 0),
    "Diptera": (2, 1, 0),
    "Lepidoptera//Pieris": (2, 0, 0),
    "Lepidoptera/Nymphalidae": (2, 1, 0),
    "not_classified": (1, 1, 0),
}
RANKS = ("order", "family", "genus", "species")


def chosen_of(paint: Paint, tree: dict[str, tuple[int, int, int]], **options: Any) -> Specimens:
    metadata, images = paint({path.replace("//", "/not_classified/"): n for path, n in tree.items()})
    options = {"ranks": RANKS, "experiment": "large_insect_order", **options}
    return select(metadata, Images(images), **options)


def names(chosen: Specimens, role: str) -> dict[str, str]:
    """Name of each specimen's target."""
    rows = chosen.of(role)
    return {key: chosen.taxonomy.name(node) for key, node in zip(rows["key"], rows["node"], strict=True)}


def test_each_specimen_is_learned_as_the_deepest_taxon_that_it_is_named_to(paint: Paint) -> None:
    chosen = chosen_of(paint, TREE)
    found = names(chosen, "train")
    assert {key.rsplit("-", 2)[0]: name for key, name in found.items()} == {
        "Eristalis_tenax": "Eristalis tenax",
        "Syrphidae": "Syrphidae",
        "Diptera": "Diptera",
        "Pieris": "Pieris",
        "Nymphalidae": "Nymphalidae",  # a leaf: nobody named its genus
    }
    assert (chosen.placeholders, chosen.coarse("train"), chosen.lifted) == (1, 6, 0)  # Pieris has no family
    assert chosen.left_out == {"no name at any of the ranks order, family, genus, species": 2}
    leaves = {chosen.taxonomy.name(int(node)) for node in chosen.taxonomy.leaves_L}
    assert leaves == {"Eristalis tenax", "Pieris", "Nymphalidae"}
    counts = chosen.target_counts()
    assert counts.sum() == len(found) == 13
    assert counts[~chosen.taxonomy.predictable_N].sum() == 0


def test_a_loss_that_takes_leaves_only_refuses_or_drops_the_others_and_counts_them(paint: Paint) -> None:
    with pytest.raises(RequestError, match=r"6 of 13 training specimens \(first: Syrphidae-train-0\).*drop"):
        chosen_of(paint, TREE, coarse="refuse")
    dropped, used = chosen_of(paint, TREE, coarse="drop"), chosen_of(paint, TREE)
    assert set(names(dropped, "train").values()) == {"Eristalis tenax", "Pieris", "Nymphalidae"}
    assert dropped.left_out["a name above the leaves of the tree, which the loss cannot take"] == 6
    assert names(dropped, "validation") == names(used, "validation")  # measured all the same
    assert dropped.taxonomy.paths == used.taxonomy.paths


def test_a_validation_specimen_of_an_unknown_taxon_counts_for_the_nearest_taxon_above(paint: Paint) -> None:
    tree = {
        "Diptera/Syrphidae/Eristalis/Eristalis tenax": (3, 0, 0),
        "Diptera/Syrphidae/Eristalis/Eristalis arbustorum": (0, 1, 0),
        "Diptera/Syrphidae/Volucella/Volucella bombylans": (0, 1, 0),
        "Diptera/Asilidae": (0, 1, 0),
        "Lepidoptera/Pieridae": (2, 0, 0),
        "Odonata/Aeshnidae": (0, 2, 0),
    }
    chosen = chosen_of(paint, tree)
    assert names(chosen, "validation") == {
        "Eristalis_arbustorum-validation-0": "Eristalis",
        "Volucella_bombylans-validation-0": "Syrphidae",
        "Asilidae-validation-0": "Diptera",
    }
    assert chosen.lifted == 3
    assert chosen.left_out == {"a taxon without training specimens": 2}  # the order is unknown too


def test_lifting_touches_nobody_else(paint: Paint) -> None:
    """A genus that is known by another's records stays so, though those are lifted."""
    metadata, images = paint(
        {
            "Diptera/Syrphidae/Eristalis/Eristalis tenax": (3, 1, 0),
            "Diptera/Asilidae/Asilus/Asilus x": (2, 1, 0),
            "Diptera/Syrphidae/Eristalis/Eristalis new": (0, 1, 0),
        }
    )
    table = bioscan.read_metadata(metadata)
    hole = pl.col("sampleid") == "Eristalis_tenax-validation-0"
    table = table.with_columns(pl.when(hole).then(None).otherwise(pl.col("family")).alias("family"))
    chosen = select(table, Images(images), experiment="large_insect_order", ranks=RANKS)
    assert names(chosen, "validation") == {
        "Eristalis_tenax-validation-0": "Eristalis tenax",
        "Asilus_x-validation-0": "Asilus x",
        "Eristalis_new-validation-0": "Eristalis",
    }


def test_with_one_rank_the_leaves_are_classes_and_unknown_ones_are_left_out(paint: Paint) -> None:
    chosen = chosen_of(paint, TREE | {"Odonata": (0, 2, 0)}, ranks=["order"])
    assert (chosen.placeholders, chosen.coarse("train"), chosen.lifted) == (0, 0, 0)
    assert [chosen.taxonomy.name(int(n)) for n in chosen.taxonomy.leaves_L] == ["Diptera", "Lepidoptera"]
    assert np.unique(chosen.of("train")["node"].to_numpy()).tolist() == [1, 2]
    assert chosen.left_out == {"no name at rank order": 2, "a taxon without training specimens": 2}


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (("order", "genuss"), "unknown rank 'genuss'; did you mean 'genus'"),
        (("order", "bin"), "unknown rank 'bin'"),
    ],
)
def test_an_unknown_rank_is_told(paint: Paint, ranks: tuple[str, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        chosen_of(paint, TREE, ranks=ranks)


def test_real_records_of_several_ranks(shared: Path) -> None:
    insects = shared / "data/insects"
    chosen = select(insects / "metadata.tsv", Images(insects), experiment="large_insect_order", ranks=RANKS)
    frame = bioscan.read_metadata(insects / "metadata.tsv")
    training = frame.filter(pl.col("large_insect_order") == "train")
    assert chosen.of("train").height == training.height == 2273
    deepest = pl.coalesce("species", "genus", "family", "order").alias("deepest")
    wanted = dict(training.select("sampleid", deepest).iter_rows())
    assert names(chosen, "train") == wanted


def test_labels_are_known_unknown_to_the_model_or_absent_at_each_rank(paint: Paint) -> None:
    tree = {
        "Diptera/Syrphidae/Eristalis/Eristalis tenax": (3, 1, 0),
        "Diptera/Syrphidae/Volucella": (0, 1, 0),  # a genus that the model does not know
        "Diptera/not_classified/not_classified/Eristalis bella": (0, 1, 0),  # a species, with a hole above it
        "Odonata": (0, 1, 0),
        "Diptera": (1, 1, 0),
        "Lepidoptera/not_classified/Pieris": (2, 1, 0),
        "not_classified": (0, 1, 0),
    }
    metadata, images = paint(tree)
    chosen = select(metadata, Images(images), ranks=RANKS, experiment="large_insect_order")
    table = chosen.validation.table

    def name(node: int | None) -> str | None:
        return "?" if node == -1 else None if node is None else chosen.taxonomy.name(node)

    found = {
        row["key"].rsplit("-", 2)[0]: [name(row[f"{rank}_true"]) for rank in RANKS]
        for row in table.iter_rows(named=True)
    }
    assert found == {
        "Eristalis_tenax": ["Diptera", "Syrphidae", "Eristalis", "Eristalis tenax"],
        "Volucella": ["Diptera", "Syrphidae", "?", None],
        "Eristalis_bella": ["Diptera", None, None, "?"],
        "Odonata": ["?", None, None, None],
        "Diptera": ["Diptera", None, None, None],
        "Pieris": ["Lepidoptera", None, "Pieris", None],  # its family is a placeholder
    }
    own = labelled(
        metadata,
        Images(images),
        chosen.taxonomy,
        experiment="large_insect_order",
        roles=["validation"],
        group="none",
    )
    assert own.table.equals(table)
    assert (own.split_hash, own.group) == (chosen.split_hash, "none")
    assert {reason: count for reason, count in own.left_out.items() if count} == {
        "no name at any of the ranks order, family, genus, species": 1
    }
