"""Planted faults: what goes wrong in a real collection, each listed, none twice on one specimen."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bioscan.data.synthesis_tree import Flags, Numbers, Specimens, Tree

FAULTS: Final = {
    "mislabelled_order": 0.005,
    "mislabelled_family": 0.005,
    "mislabelled_species": 0.004,
    "swapped_barcode": 0.006,
    "duplicate_record": 0.004,
    "duplicate_picture": 0.004,
    "leaked_specimen": 0.006,
    "species_without_genus": 0.003,
    "genus_in_two_families": 0.003,
    "family_hole": 0.003,
    "truncated_picture": 0.002,
    "empty_picture": 0.001,
    "not_a_picture": 0.001,
    "missing_picture": 0.002,
}
"""Kind -> share of specimens, one at least, where there are specimens that fit."""

BROKEN: Final = ("truncated_picture", "empty_picture", "not_a_picture", "missing_picture")
_TRIES: Final = 400


@dataclass
class Planted:
    """Whose labels, barcode and picture each specimen shows; its own where nothing was planted.

    Attributes:
        being: The specimen that it really is: another one where a record was entered twice.
        labels: Whose labels it has.
        barcode: Whose barcode and BIN.
        picture: Whose picture, byte for byte.
        pose: Whose body is in its picture.
        hidden: Rank -> whether its label was lost.
        family: A family that it was given, -1 where none.
        broken: Row -> kind of broken picture.
        table: Kind, row and detail of each; `{n}` in a detail stands for the sample id of row n.
    """

    being: Numbers
    labels: Numbers
    barcode: Numbers
    picture: Numbers
    pose: Numbers
    hidden: dict[str, Flags]
    family: Numbers
    broken: dict[int, str] = field(default_factory=dict)
    table: list[tuple[str, int, str]] = field(default_factory=list)

    @classmethod
    def none(cls, specimens: int) -> "Planted":
        """Everything as it is."""
        own = np.arange(specimens)
        hidden = {
            rank: np.zeros(specimens, dtype=np.bool_) for rank in ("family", "subfamily", "tribe", "genus")
        }
        being, labels, barcode, picture, pose = (own.copy() for _ in range(5))
        return cls(being, labels, barcode, picture, pose, hidden, np.full(specimens, -1))


class _Gardener:
    """Chooses specimens that nothing has touched, and their counterparts."""

    def __init__(self, specimens: Specimens, tree: Tree, plates: Numbers, rng: np.random.Generator) -> None:
        self.count = len(specimens.bin)
        self.labels = specimens.labels(tree, np.arange(self.count))
        self.bin, self.plates, self.rng = specimens.bin, plates, rng
        self.free = np.ones(self.count, dtype=np.bool_)

    def take(self, kind: str, fits: Flags) -> list[int]:
        """Random free specimens that fit, as many as the kind's share; they are free no longer."""
        among = np.flatnonzero(fits & self.free)
        wanted = max(1, round(FAULTS[kind] * self.count))
        chosen = self.rng.permutation(among)[:wanted]
        self.free[chosen] = False
        return sorted(chosen.tolist())

    def other(self, fits: Callable[[Numbers], Flags], among: NDArray[np.int64]) -> int | None:
        """A free specimen that fits, taken out as well; None if chance finds none."""
        if not len(among):
            return None
        tried = self.rng.choice(among, _TRIES)
        found = tried[self.free[tried] & fits(tried)]
        if not len(found):
            return None
        self.free[found[0]] = False
        return int(found[0])


def plant(
    specimens: Specimens, tree: Tree, plates: Numbers, rng: np.random.Generator, *, pictures: bool
) -> Planted:
    """Plant every kind of `FAULTS`; those of pictures only where there are pictures.

    Args:
        specimens: Who there is.
        tree: Their taxa.
        plates: Plate of each.
        rng: Where chance comes from.
        pictures: Whether there are pictures.
    """
    planted = Planted.none(len(specimens.bin))
    gardener = _Gardener(specimens, tree, plates, rng)
    everyone = np.ones(gardener.count, dtype=np.bool_)
    _mislabel(planted, gardener, tree)
    _pairs(planted, gardener, everyone, pictures)
    labels = gardener.labels
    for row in gardener.take("species_without_genus", labels["species"] >= 0):
        planted.hidden["genus"][row] = True
        planted.table.append(("species_without_genus", row, "genus lost"))
    _two_families(planted, gardener, tree)
    for row in gardener.take("family_hole", (labels["genus"] >= 0) & (labels["species"] < 0)):
        planted.hidden["family"][row] = True
        planted.table.append(("family_hole", row, "family lost, genus kept"))
    if pictures:
        for kind in BROKEN:
            for row in gardener.take(kind, everyone):
                planted.broken[row] = kind
                planted.table.append((kind, row, ""))
    planted.table.sort(key=lambda entry: entry[1])
    return planted


def _mislabel(planted: Planted, gardener: _Gardener, tree: Tree) -> None:
    """Specimens with the labels of another order, of another family of theirs, of another species there."""
    labels = gardener.labels
    for rank, above in (("species", "family"), ("family", "order"), ("order", None)):
        mistakable = labels[rank] >= 0
        if above is not None:
            pairs = np.unique(np.stack([labels[above], labels[rank]])[:, mistakable], axis=1)
            several = np.bincount(pairs[0], minlength=len(tree.names[above])) > 1
            mistakable &= several[labels[above]]
        known = np.flatnonzero(mistakable)
        for row in gardener.take(f"mislabelled_{rank}", mistakable):

            def fits(others: Numbers, row: int = row, rank: str = rank, above: str | None = above) -> Flags:
                differs: Flags = labels[rank][others] != labels[rank][row]
                return differs if above is None else differs & (labels[above][others] == labels[above][row])

            among = known if above is None else known[labels[above][known] == labels[above][row]]
            source = gardener.other(fits, among)
            if source is None:
                gardener.free[row] = True
                continue
            planted.labels[row] = source
            true, false = (tree.names[rank][labels[rank][n]] for n in (row, source))
            detail = f"{rank} {true} given as {false}, labels of {{{source}}}"
            planted.table.append((f"mislabelled_{rank}", row, detail))


def _pairs(planted: Planted, gardener: _Gardener, everyone: Flags, pictures: bool) -> None:
    """Swapped barcodes, records entered twice, one picture under two names, specimens on two plates."""
    all_rows = np.arange(gardener.count)
    kinds = [
        "swapped_barcode",
        "duplicate_record",
        *(["duplicate_picture"] if pictures else []),
        "leaked_specimen",
    ]
    for kind in kinds:
        for row in gardener.take(kind, everyone):

            def fits(others: Numbers, row: int = row, kind: str = kind) -> Flags:
                differs: Flags = gardener.bin[others] != gardener.bin[row]
                apart: Flags = gardener.plates[others] != gardener.plates[row]
                return differs if kind == "swapped_barcode" else differs & apart

            source = gardener.other(fits, all_rows)
            if source is None:
                gardener.free[row] = True
                continue
            if kind == "swapped_barcode":
                planted.barcode[row], planted.barcode[source] = source, row
                planted.table.append((kind, row, f"barcode and BIN swapped with {{{source}}}"))
                planted.table.append((kind, source, f"barcode and BIN swapped with {{{row}}}"))
                continue
            planted.picture[row] = row if kind == "leaked_specimen" else source
            planted.pose[row] = source
            detail = f"the picture of {{{source}}}"
            if kind != "duplicate_picture":
                planted.being[row] = planted.labels[row] = planted.barcode[row] = source
                detail = f"{{{source}}} entered again"
                if kind == "leaked_specimen":
                    detail = f"{{{source}}} on a second plate, photographed again"
            planted.table.append((kind, row, detail))


def _two_families(planted: Planted, gardener: _Gardener, tree: Tree) -> None:
    """Specimens whose genus stands in another family of their order than elsewhere."""
    labels = gardener.labels
    genus = labels["genus"]
    shown = (genus >= 0) & (labels["family"] >= 0)
    common = np.bincount(genus[shown], minlength=len(tree.names["genus"])) > 1
    siblings = np.bincount(tree.above["family"])[labels["order"]] > 1
    kind = "genus_in_two_families"
    for row in gardener.take(kind, shown & common[genus] & siblings):
        order = labels["order"][row]
        others = np.flatnonzero(tree.above["family"] == order)
        others = others[others != labels["family"][row]]
        given = int(gardener.rng.choice(others))
        planted.family[row] = given
        planted.hidden["subfamily"][row] = planted.hidden["tribe"][row] = True
        name = tree.names["genus"][genus[row]]
        planted.table.append((kind, row, f"{name} given under {tree.names['family'][given]}"))
