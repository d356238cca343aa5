"""An invented tree of life for artificial data: taxa with a long tail, BINs, labels, traits and barcodes.

Orders, the families of Diptera and the shares of everything are those of BIOSCAN-1M; all names below are
made up. Arrays hold one entry a taxon, BIN or specimen, and point upwards by number.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bioscan.vocabulary import BARCODE_LENGTH, GENETIC_CODE_5

Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]

ORDERS: Final = {
    "Diptera": (896_324, 80),
    "Hymenoptera": (89_311, 65),
    "Coleoptera": (47_328, 95),
    "Hemiptera": (46_970, 60),
    "Lepidoptera": (32_538, 70),
    "Psocodea": (9_635, 28),
    "Thysanoptera": (2_088, 6),
    "Trichoptera": (1_296, 24),
    "Orthoptera": (1_057, 16),
    "Blattodea": (824, 8),
    "Neuroptera": (676, 12),
    "Ephemeroptera": (96, 8),
    "Dermaptera": (66, 5),
    "Archaeognatha": (63, 2),
    "Plecoptera": (30, 5),
    "Embioptera": (6, 2),
    "Odonata": (2, 2),
    "Strepsiptera": (2, 2),
    "Zoraptera": (1, 1),
}
"""Order -> specimens in BIOSCAN-1M (the paper's figure; the last three, too small for its experiments, stand
for its five dropped specimens) and families here; their sum is the 491 families of BIOSCAN-1M."""

DROPPED_ORDERS: Final = 3
"""The last so many of ORDERS never get more specimens than they have there."""

DIPTERA_FAMILIES: Final = {
    "Cecidomyiidae": 259_104,
    "Chironomidae": 150_456,
    "Phoridae": 135_991,
    "Sciaridae": 92_276,
    "Ceratopogonidae": 79_389,
    "Psychodidae": 46_189,
    "Dolichopodidae": 35_590,
    "Sphaeroceridae": 17_717,
    "Drosophilidae": 12_047,
    "Hybotidae": 9_595,
    "Mycetophilidae": 6_363,
    "Muscidae": 5_974,
    "Limoniidae": 5_307,
    "Chloropidae": 5_164,
    "Scatopsidae": 3_764,
    "Milichiidae": 3_496,
    "Ephydridae": 2_756,
    "Agromyzidae": 2_557,
    "Tachinidae": 2_286,
    "Empididae": 2_267,
    "Anthomyiidae": 2_144,
    "Heleomyzidae": 1_141,
    "Lauxaniidae": 1_138,
    "Sarcophagidae": 941,
    "Ulidiidae": 833,
    "Tephritidae": 805,
    "Stratiomyidae": 726,
    "Clusiidae": 665,
    "Pipunculidae": 634,
    "Sepsidae": 521,
    "Syrphidae": 518,
    "Bombyliidae": 465,
    "Fanniidae": 402,
    "Keroplatidae": 380,
    "Ditomyiidae": 369,
    "Bibionidae": 315,
    "Richardiidae": 276,
    "Culicidae": 270,
    "Simuliidae": 270,
    "Psilidae": 237,
}
"""The 40 families of the paper's Diptera experiments and their specimens."""

SPECIMENS: Final = sum(count for count, _ in ORDERS.values())
"""1,128,313: all of BIOSCAN-1M."""
BINS: Final = 90_918
SHARE_LABELLED: Final = {"subfamily": 0.235, "tribe": 0.054, "genus": 0.225, "species": 0.075}
"""Share of specimens with a label at the rank in BIOSCAN-1M; phylum, class and order are always there."""
FAMILY_HIDDEN: Final = (0.003, 0.057)
"""Share of specimens without a family in Diptera and elsewhere: 1.4 % of all, and few enough in Diptera that
the 40 families keep their counts (4,986 Diptera are outside them)."""
COARSE: Final = 0.1
"""Share of specimens of an identified BIN that are labelled to the family only."""
BINS_PER_GENUS: Final = 6
SHARED_SPECIES: Final = 0.04
"""Share of BINs that hold the species of the BIN before; half as many hold a second species."""
BIN_SKEW: Final = 1.8
"""Deviation of the log of a BIN's weight: a quarter of the BINs are singletons at 12.4 specimens a BIN."""

# Names: distinct combinations of syllables.
_ONSETS = tuple(
    a + b
    for a, b in itertools.product(
        (
            "b",
            "c",
            "d",
            "f",
            "g",
            "l",
            "m",
            "n",
            "p",
            "ph",
            "r",
            "s",
            "t",
            "th",
            "v",
            "x",
            "z",
            "pl",
            "tr",
            "gl",
        ),
        ("a", "e", "i", "o", "u", "ae"),
    )
)
_MIDDLES = tuple(
    a + b
    for a, b in itertools.product(
        ("b", "c", "d", "g", "l", "m", "n", "p", "r", "s", "t", "ct", "mb", "ndr", "st", "ll", "rr", "pt"),
        ("a", "e", "i", "o", "u", "y"),
    )
)
_GENUS_ENDS = ("sia", "mys", "ptera", "nia", "lus", "ria", "des", "cera", "thrips", "gaster", "stoma", "tis")
_GENUS_PARTS = (_ONSETS, _MIDDLES, _GENUS_ENDS)
_STEMS = (_ONSETS, _MIDDLES, ("l", "n", "r", "t", "d", "s", "m", "x"))
_EPITHET_ENDS = (
    *("alis", "anus", "ata", "ella", "ensis", "fera", "icola", "icornis", "idus", "ina", "ipes", "osa"),
    *("ula", "ventris", "nervis", "pennis", "formis", "oides"),
)


@dataclass(frozen=True)
class Tree:
    """Taxa, BINs and what is known of them.

    Attributes:
        names: Rank (order to species) -> names of its taxa, by number.
        above: Rank (family to species) -> number of the taxon above, by number.
        bin_species: Species of each BIN.
        bin_second: A second species of each BIN, -1 where none.
        bin_size: Specimens of each BIN.
        bin_uri: `BOLD:AAA0000` of each BIN.
        bin_known: Rank (family to species) -> whether the BIN's specimens are labelled there.
    """

    names: dict[str, NDArray[np.str_]]
    above: dict[str, Numbers]
    bin_species: Numbers
    bin_second: Numbers
    bin_size: Numbers
    bin_uri: NDArray[np.str_]
    bin_known: dict[str, Flags]

    def lineage(self, species: Numbers) -> dict[str, Numbers]:
        """Number of the taxon at each rank, order to species, for an array of species."""
        found = {"species": species}
        taxon = species
        for below, rank in itertools.pairwise(("species", "genus", "tribe", "subfamily", "family", "order")):
            found[rank] = taxon = self.above[below][taxon]
        return found


def grow(specimens: int, imbalance: float, rng: np.random.Generator) -> Tree:
    """A tree for so many specimens.

    Args:
        specimens: How many there will be.
        imbalance: Power of the published shares: 1 as published, 0 all equal.
        rng: Where chance comes from.
    """
    order_count = _order_counts(specimens, imbalance)
    family_order, family_names, labelled, hidden = _families(order_count, imbalance, rng)
    size, family, is_hidden = _bins(labelled, hidden, specimens, rng)

    genus_family, bin_genus = _below(family, _genera, rng)
    by_genus = np.argsort(bin_genus, kind="stable")
    size, is_hidden, bin_genus = size[by_genus], is_hidden[by_genus], bin_genus[by_genus]
    tribe_family, genus_tribe = _below(genus_family, lambda genera: max(1, round(genera**0.55)), rng)
    subfamily_family, tribe_subfamily = _below(tribe_family, lambda tribes: max(1, round(tribes**0.7)), rng)

    bins = len(size)
    follows = np.r_[False, bin_genus[1:] == bin_genus[:-1]] & (rng.random(bins) < SHARED_SPECIES)
    bin_species = np.cumsum(~follows) - 1
    second = (rng.random(bins) < SHARED_SPECIES / 2) & (size > 1)
    species_genus = np.r_[bin_genus[~follows], bin_genus[second]]
    bin_second = np.full(bins, -1)
    bin_second[second] = np.arange(second.sum()) + (~follows).sum()

    known = _known(size, is_hidden, bin_genus, rng)
    uri = _uris(bins, rng)
    genus_names = _words(len(genus_family), _GENUS_PARTS, rng)
    above = {
        "family": family_order,
        "subfamily": subfamily_family,
        "tribe": tribe_subfamily,
        "genus": genus_tribe,
        "species": species_genus,
    }
    stems = _words(len(family_names) + len(subfamily_family) + len(tribe_subfamily), _STEMS, rng).tolist()
    names = {
        "order": np.array(list(ORDERS)),
        "family": np.array([n or f"{stems.pop()}idae" for n in family_names]),
        "subfamily": np.array([f"{stems.pop()}inae" for _ in subfamily_family]),
        "tribe": np.array([f"{stems.pop()}ini" for _ in tribe_subfamily]),
        "genus": genus_names,
        "species": _species_names(genus_names, species_genus, rng),
    }
    return Tree(names, above, bin_species, bin_second, size, uri, known)


def apportion(total: int, weights: NDArray[np.float64]) -> Numbers:
    """Whole numbers in proportion to the weights that sum to the total (largest remainders; ties: first).

    >>> apportion(10, np.array([2.0, 1.0, 1.0])).tolist()
    [5, 3, 2]
    """
    exact = total * weights / weights.sum()
    counts: Numbers = np.floor(exact + 1e-9).astype(np.int64)
    for_most = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[for_most] += 1
    return counts


def _order_counts(specimens: int, imbalance: float) -> Numbers:
    real = np.array([count for count, _ in ORDERS.values()], dtype=np.float64)
    counts = apportion(specimens, real**imbalance)
    rare = slice(-DROPPED_ORDERS, None)
    counts[rare] = np.minimum(counts[rare], real[rare].astype(np.int64))
    counts[:-DROPPED_ORDERS] = apportion(
        specimens - int(counts[rare].sum()), real[:-DROPPED_ORDERS] ** imbalance
    )
    return counts


def _families(
    order_count: Numbers, imbalance: float, rng: np.random.Generator
) -> tuple[Numbers, list[str | None], Numbers, Numbers]:
    """Order and name (None: to be made up) of each family, its labelled and its hidden specimens."""
    orders, names, labelled, hidden = [], [], [], []
    for order, ((name, (real, most)), count) in enumerate(
        zip(ORDERS.items(), order_count.tolist(), strict=True)
    ):
        if not count:
            continue
        # With few specimens few families: the root keeps about 30 specimens a family at 2,000.
        families = min(max(1, round(most * min(1, count / real) ** 0.33)), math.ceil(count / 12))
        diptera = name == "Diptera"
        share = FAMILY_HIDDEN[0 if diptera else 1]
        unlabelled = round(share * count) if count >= 20 else 0
        weights = np.arange(1, families + 1) ** -1.3
        known = list(DIPTERA_FAMILIES.values()) if diptera else []
        if known:
            outside = ORDERS[name][0] * (1 - share) - sum(known)
            tail = np.arange(1, max(families - len(known), 0) + 1) ** -0.5
            weights = np.r_[known, outside * tail / max(tail.sum(), 1)][:families]
        counts = apportion(count - unlabelled, weights**imbalance)
        made = [*DIPTERA_FAMILIES][:families] if diptera else []
        names += [*made, *[None] * (families - len(made))]
        orders += [order] * families
        labelled.append(counts)
        hidden.append(rng.multinomial(unlabelled, counts / counts.sum()))
    return np.array(orders), names, np.concatenate(labelled), np.concatenate(hidden)


def _bins(
    labelled: Numbers, hidden: Numbers, specimens: int, rng: np.random.Generator
) -> tuple[Numbers, Numbers, Flags]:
    """Size and family of each BIN, and whether its family is hidden; BINs of a family are neighbours."""
    sizes = np.stack([labelled, hidden], axis=1).ravel()
    room = np.maximum(sizes - 1, 0)
    # 12.4 specimens a BIN as published, 8 to 9 among a few thousand: small trees branch too.
    wanted = round(specimens * BINS / SPECIMENS * max(1, SPECIMENS / specimens) ** 0.06)
    extra = max(wanted - np.count_nonzero(sizes), 0)
    bins: Numbers = np.minimum(apportion(extra, np.maximum(room, 1e-9)), room) + (sizes > 0)
    weights = np.exp(BIN_SKEW * rng.standard_normal(bins.sum()))
    ends = np.cumsum(bins)
    size = np.ones(bins.sum(), dtype=np.int64)
    for number, end in enumerate(ends.tolist()):
        mine = slice(end - int(bins[number]), end)
        if bins[number]:
            weight = weights[mine]
            size[mine] += rng.multinomial(sizes[number] - bins[number], weight / weight.sum())
    group = np.repeat(np.arange(len(sizes)), bins)
    return size, group // 2, group % 2 == 1


def _genera(bins: int) -> int:
    """Genera of a family with so many BINs: two at least where it can be, so that small trees branch too."""
    return max(round(bins / BINS_PER_GENUS), min(2, bins // 2), 1)


def _below(
    parents: Numbers, wanted: Callable[[int], int], rng: np.random.Generator
) -> tuple[Numbers, Numbers]:
    """A rank between: new taxa below each parent, each of which gets an item at least, some many.

    Args:
        parents: Parent of each item, sorted.
        wanted: Items below a parent -> new taxa below it.
        rng: Where chance comes from.

    Returns:
        The parent of each new taxon, sorted, and the new taxon of each item.
    """
    made, inside = [], []
    first = 0
    for parent, items in zip(*(a.tolist() for a in np.unique(parents, return_counts=True)), strict=True):
        taxa = min(wanted(items), items)
        weight = np.arange(1, taxa + 1) ** -0.5
        more = rng.choice(taxa, items - taxa, p=weight / weight.sum())
        inside.append(first + rng.permutation(np.r_[np.arange(taxa), more]))
        made += [parent] * taxa
        first += taxa
    return np.array(made), np.concatenate(inside)


def _known(size: Numbers, is_hidden: Flags, bin_genus: Numbers, rng: np.random.Generator) -> dict[str, Flags]:
    """Which BINs are labelled at which rank, so that specimens are labelled in the published shares.

    A genus is known as a whole or not at all, with or without subfamily and tribe, as in life: somebody
    worked on it or nobody did. Further BINs are known to the subfamily, a few to the tribe.
    """
    total = int(size.sum())
    seen = np.where(is_hidden, 0, size)
    target = {rank: share * total / (1 - COARSE) for rank, share in SHARE_LABELLED.items()}
    genus_size = np.bincount(bin_genus, weights=seen).astype(np.int64)
    genera = _up_to(genus_size, target["genus"], rng)
    with_subfamily = _up_to(np.where(genera, genus_size, 0), 0.75 * target["genus"], rng)
    with_tribe = _up_to(np.where(with_subfamily, genus_size, 0), 0.9 * target["tribe"], rng)
    genus, subfamily, tribe = (
        flags[bin_genus] & ~is_hidden for flags in (genera, with_subfamily, with_tribe)
    )
    species = _up_to(np.where(genus, size, 0), target["species"], rng)
    rest = np.where(genus | is_hidden, 0, size)
    more = _up_to(rest, target["subfamily"] - size[subfamily].sum(), rng)
    more_tribe = _up_to(np.where(more, size, 0), target["tribe"] - size[tribe].sum(), rng)
    return {
        "family": ~is_hidden,
        "subfamily": subfamily | more,
        "tribe": tribe | more_tribe,
        "genus": genus,
        "species": species,
    }


def _up_to(sizes: Numbers, target: float, rng: np.random.Generator) -> Flags:
    """A random choice of groups (of those above 0) that holds the target at most, and nearly."""
    chosen = np.zeros(len(sizes), dtype=np.bool_)
    left = int(target)
    for group in rng.permutation(np.flatnonzero(sizes)).tolist():
        if sizes[group] <= left:
            chosen[group] = True
            left -= int(sizes[group])
    return chosen


def _uris(count: int, rng: np.random.Generator) -> NDArray[np.str_]:
    letters = np.array(
        ["".join(three) for three in itertools.product("ABCDEFGHIJKLMNOPQRSTUVWXYZ", repeat=3)]
    )
    number = rng.choice(len(letters) * 10_000, count, replace=False)
    return np.array(
        [
            f"BOLD:{a}{n:04d}"
            for a, n in zip(letters[number // 10_000], (number % 10_000).tolist(), strict=True)
        ]
    )


def _words(count: int, parts: Sequence[Sequence[str]], rng: np.random.Generator) -> NDArray[np.str_]:
    """Distinct capitalised words, one syllable of each part."""
    number = rng.choice(math.prod(map(len, parts)), count, replace=False)
    words = np.full(count, "")
    for part in parts:
        words = np.char.add(words, np.array(part)[number % len(part)])
        number = number // len(part)
    return np.char.capitalize(words)


def _species_names(
    genus_names: NDArray[np.str_], species_genus: Numbers, rng: np.random.Generator
) -> NDArray[np.str_]:
    """Binomials, half of them interim names as BOLD has them; distinct within a genus."""
    count = len(species_genus)
    by_genus = np.argsort(species_genus, kind="stable")
    starts = np.searchsorted(species_genus[by_genus], species_genus)
    place = np.empty(count, dtype=np.int64)
    place[by_genus] = np.arange(count)
    place -= starts  # number of the species within its genus
    pool = len(_ONSETS) * len(_MIDDLES) * len(_EPITHET_ENDS)
    number = (rng.integers(0, pool, len(genus_names))[species_genus] + 7_919 * place) % pool
    kind = rng.integers(0, 8, count)  # 0-3: a name; 4-7: interim
    letters = rng.integers(0, 26, (count, 2))
    names = []
    for genus, n, k, p, (a, b) in zip(
        genus_names[species_genus].tolist(),
        number.tolist(),
        kind.tolist(),
        place.tolist(),
        letters,
        strict=True,
    ):
        n, onset = divmod(n, len(_ONSETS))
        n, middle = divmod(n, len(_MIDDLES))
        epithet = _ONSETS[onset] + _MIDDLES[middle] + _EPITHET_ENDS[n]
        names.append(
            (
                *[f"{genus} {epithet}"] * 4,
                f"{genus} sp. {p + 1}{chr(65 + a)}{chr(65 + b)}",
                f"{genus} malaise{p + 1:04d}",
                f"{genus} {epithet}DHJ{p + 1:02d}",
                f"{genus} cf. {epithet}",
            )[k]
        )
    return np.array(names)


@dataclass(frozen=True)
class Specimens:
    """BIN and species of each specimen in the order of the metadata, and whether it is labelled coarsely."""

    bin: Numbers
    species: Numbers
    coarse: Flags

    def labels(self, tree: Tree, rows: Numbers) -> dict[str, Numbers]:
        """Number of the labelled taxon at each rank, order to species, -1 where unlabelled."""
        found = tree.lineage(self.species[rows])
        for rank, known in tree.bin_known.items():
            shown = known[self.bin[rows]]
            if rank != "family":
                shown = shown & ~self.coarse[rows]
            found[rank] = np.where(shown, found[rank], -1)
        return found


def populate(tree: Tree, rng: np.random.Generator) -> Specimens:
    """The specimens of every BIN, in the order in which they came into plates.

    Half of a BIN's specimens were caught together: neighbours in the metadata, often on one plate.
    """
    of_bin = np.repeat(np.arange(len(tree.bin_size)), tree.bin_size)
    count = len(of_bin)
    home = rng.random(len(tree.bin_size))[of_bin] + 0.01 * rng.standard_normal(count)
    place = np.where(rng.random(count) < 0.5, home, rng.random(count))
    of_bin = of_bin[np.argsort(place, kind="stable")]
    second = tree.bin_second[of_bin]
    species = np.where((second >= 0) & (rng.random(count) < 0.4), second, tree.bin_species[of_bin])
    return Specimens(of_bin, species, rng.random(count) < COARSE)


SPREAD: Final = {"family": 0.85, "subfamily": 0.2, "tribe": 0.15, "genus": 0.25, "species": 0.18}
"""Deviation that each rank adds to a trait, in units of the trait's own: siblings look alike."""


def inherit(tree: Tree, traits: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Traits of each species (species x traits) as deviations from the plan of its order or family."""
    species = np.arange(len(tree.names["species"]))
    lineage = tree.lineage(species)
    found = np.zeros((len(species), traits), dtype=np.float32)
    for rank, deviation in SPREAD.items():
        drawn = rng.standard_normal((len(tree.names[rank]), traits), dtype=np.float32)
        found += np.float32(deviation) * drawn[lineage[rank]]
    return found


CODONS: Final = (BARCODE_LENGTH - 1) // 3
"""219: the reading frame starts at base 2, as in the published barcodes; base 1 ends another codon."""
_BASES = "TCAG"
_CODONS = list(GENETIC_CODE_5)
_THIRD = np.array([0.44, 0.1, 0.4, 0.06])
"""How often T, C, A and G stand at third positions: mitochondria of insects are rich in A and T."""
_USAGE = np.array([0.5, 0.1, 0.3, 0.1])
"""The same of first positions, where an amino acid leaves a choice."""
_COMPOSITION = {
    **{"L": 16, "I": 11, "F": 10, "S": 10, "G": 9, "A": 8, "M": 7, "T": 7, "V": 7, "P": 7, "N": 6},
    **{"D": 3, "H": 3, "W": 3, "Y": 3, "E": 2, "Q": 2, "R": 2, "K": 1},
}
"""Amino acids of the invented protein, per cent: about as in cytochrome oxidase I."""
_SIMILAR = ("ILVMF", "ASTG", "NDEQKHR", "FYW", "PA")
"""Amino acids that replace each other."""
_SUBSTITUTIONS = {"order": (0.3, 0.08), "family": (0.2, 0.02), "genus": (0.13, 0.004), "bin": (0.07, 0.0005)}
"""Level -> share of codons that change silently below the level above, and share of replacements."""
MAX_HAPLOTYPES: Final = 24
MAX_PRIVATE: Final = 4
"""Substitutions of a haplotype from its BIN's: two differ in 8 at most, 1.2 % of 658 bases."""


def _codon_tables() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Codon and a random byte -> a codon that differs silently at the third base; -> one of another amino
    acid that is alike.
    """
    silent = np.zeros((64, 256), dtype=np.uint8)
    replaced = np.zeros((64, 256), dtype=np.uint8)
    for number, codon in enumerate(_CODONS):
        amino = GENETIC_CODE_5[codon]
        thirds = [
            b for b in range(4) if GENETIC_CODE_5[codon[:2] + _BASES[b]] == amino and _BASES[b] != codon[2]
        ]
        counts = apportion(256, _THIRD[thirds])
        silent[number] = np.repeat([number // 4 * 4 + b for b in thirds], counts)
        others = {o for group in _SIMILAR if amino in group for o in group} - {amino}
        targets = [n for n, c in enumerate(_CODONS) if GENETIC_CODE_5[c] in (others or {amino})]
        replaced[number] = np.repeat(targets, apportion(256, _THIRD[np.array(targets) % 4]))
    return silent, replaced


@dataclass(frozen=True)
class Barcodes:
    """Barcodes of the BINs' haplotypes.

    Attributes:
        codons: Haplotypes x 219, codon numbers in the order of the genetic code.
        start: First haplotype of each BIN (the one that most of its specimens have), and one past the last.
        first_base: Byte of base 1.
    """

    codons: NDArray[np.uint8]
    start: Numbers
    first_base: int

    def bases(self, haplotypes: Numbers) -> NDArray[np.uint8]:
        """ASCII bases of haplotypes, n x 658."""
        letters = np.array([list(codon.encode()) for codon in _CODONS], dtype=np.uint8)
        found = np.empty((len(haplotypes), BARCODE_LENGTH), dtype=np.uint8)
        found[:, 0] = self.first_base
        found[:, 1:] = letters[self.codons[haplotypes]].reshape(len(haplotypes), -1)
        return found

    def choose(self, bins: Numbers, rng: np.random.Generator) -> Numbers:
        """A haplotype for each of an array of BINs: half have the BIN's own."""
        others = self.start[bins + 1] - self.start[bins] - 1
        other = 1 + np.floor(rng.random(len(bins)) * others).astype(np.int64)
        return self.start[bins] + np.where((rng.random(len(bins)) < 0.5) | (others == 0), 0, other)


def evolve(tree: Tree, rng: np.random.Generator) -> Barcodes:
    """COI-like barcodes down the tree from an invented protein.

    Most substitutions are silent, at third positions; none makes a stop codon of translation table 5, and
    none inserts or deletes. Distances grow with the rank: under 2 % within a BIN, mostly above 2.2 % between
    BINs of a genus.
    """
    silent, replaced = _codon_tables()
    aminos = rng.choice(
        list(_COMPOSITION), CODONS, p=np.array([*_COMPOSITION.values()]) / sum(_COMPOSITION.values())
    )
    numbers = np.arange(len(_CODONS))
    usage = _USAGE[numbers // 16] * _THIRD[numbers % 4]
    of_amino = {a: usage * [GENETIC_CODE_5[c] == a for c in _CODONS] for a in _COMPOSITION}
    ancestor = np.array([rng.choice(64, p=of_amino[a] / of_amino[a].sum()) for a in aminos.tolist()])
    ancestor = ancestor.astype(np.uint8)

    lineage = tree.lineage(tree.bin_species)
    genus_family = tree.lineage(np.arange(len(tree.names["species"])))
    family_of_genus = np.zeros(len(tree.names["genus"]), dtype=np.int64)
    family_of_genus[genus_family["genus"]] = genus_family["family"]
    parents = {
        "order": np.zeros(len(tree.names["order"]), dtype=np.int64),
        "family": tree.above["family"],
        "genus": family_of_genus,
        "bin": lineage["genus"],
    }
    codons = ancestor[None]
    for level, parent in parents.items():
        codons = codons[parent]
        silently, other = _SUBSTITUTIONS[level]
        # Lines differ in their rate: half to one and a half of the mean.
        rate = rng.uniform(0.5, 1.5, (len(codons), 1)).astype(np.float32)
        chance = rng.random(codons.shape, dtype=np.float32)
        byte = rng.integers(0, 256, codons.shape, dtype=np.uint8)
        codons = np.where(chance < other * rate, replaced[codons, byte], codons)
        codons = np.where(chance > 1 - silently * rate, silent[codons, byte], codons)

    haplotypes = 1 + np.minimum(tree.bin_size // 3, MAX_HAPLOTYPES)
    start = np.r_[0, np.cumsum(haplotypes)]
    codons = np.repeat(codons, haplotypes, axis=0)
    private = rng.integers(1, MAX_PRIVATE + 1, len(codons))
    private[start[:-1]] = 0
    for step in range(MAX_PRIVATE):
        rows = np.flatnonzero(private > step)
        place, byte = rng.integers(0, CODONS, len(rows)), rng.integers(0, 256, len(rows))
        codons[rows, place] = silent[codons[rows, place], byte]
    return Barcodes(codons, start, int(rng.choice(list(b"TA"))))
