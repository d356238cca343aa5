"""The words of the field as tables: ranks, columns, aliases, experiments, sentinels, the genetic code.

Anyone may import this; it imports nothing. A new rank, column, alias, experiment or sentinel is one line
here.
"""

import re
from typing import Final, Literal, NamedTuple

RANKS: Final = ("phylum", "class", "order", "family", "subfamily", "tribe", "genus", "species", "subspecies")
"""Taxonomic ranks from the root down. A BIN (`uri`) is no rank: BINs do not nest in species."""

ROLES: Final = ("train", "validation", "test")
NO_SPLIT: Final = "no_split"


class Experiment(NamedTuple):
    """A named classification task of the paper; `name` is also its split column."""

    name: str
    size: Literal["large", "medium", "small"]
    rank: str
    within: str | None
    """Order that the task is restricted to, by name; None: all specimens."""


EXPERIMENTS: Final = {
    e.name: e
    for e in (
        Experiment("large_diptera_family", "large", "family", "Diptera"),
        Experiment("medium_diptera_family", "medium", "family", "Diptera"),
        Experiment("small_diptera_family", "small", "family", "Diptera"),
        Experiment("large_insect_order", "large", "order", None),
        Experiment("medium_insect_order", "medium", "order", None),
        Experiment("small_insect_order", "small", "order", None),
    )
}

COLUMNS: Final = (
    "sampleid",
    "processid",
    "uri",
    "name",
    *RANKS,
    "nucraw",
    "image_file",
    *EXPERIMENTS,
    "chunk_number",
    "copyright_license",
    "copyright_holder",
    "copyright_institution",
    "copyright_contact",
    "photographer",
    "author",
)
"""The 28 columns of the BIOSCAN-1M metadata, in the order that we write them."""

KEYS: Final = ("sampleid", "image_file")
"""Columns that tell specimens apart, the first that a table has."""

FOOTER: Final = "bioscan"
"""Key of a Parquet footer that holds our JSON."""

COLUMN_ALIASES: Final = {
    "dna_bin": "uri",
    "bin_uri": "uri",
    "dna_barcode": "nucraw",
    "nuc": "nucraw",
    "nucleotides": "nucraw",
    "taxon": "name",
}
"""What other schemas call a column -> our name."""

ROLE_ALIASES: Final = {"val": "validation"}

NOT_CLASSIFIED: Final = "not_classified"
MISSING: Final = ("", NOT_CLASSIFIED, "no_data")
"""What marks a missing value in files. In a catalogue missing is null."""

IMAGE_FOLDER: Final = "bioscan/images"
"""Where the published packages keep their images:
`bioscan/images/<package>/part<chunk_number>/<image_file>`."""
HDF5_GROUP: Final = "bioscan_dataset"


def part_path(name: str, part: int | None) -> str:
    """Path of an image below its package.

    >>> part_path("a.jpg", 3), part_path("a.jpg", None)
    ('part3/a.jpg', 'a.jpg')
    """
    return name if part is None else f"part{part}/{name}"


SAMPLE_ID: Final = re.compile(r"^(?P<plate>.+)-(?P<well>[A-H](?:0?[1-9]|1[0-2]))$")
"""Plate and well of a sample id such as BIOUG68001-C12; some published ids have neither."""

BIN_URI: Final = re.compile(r"^BOLD:[A-Z]{3}\d{4}$")

PLACEHOLDER_PATTERN: Final = r"\d|[A-Z][^(]*[A-Z]|[._?]|\b(sp|spp|aff|cf|nr|gen)\b|^[a-z]"
"""A genus or species name that no code of nomenclature would accept as it stands: digits, a second capital
(other than that of a subgenus in brackets), «sp.», «cf.», a small first letter."""

BARCODE_LENGTH: Final = 658
"""Bases of the COI-5P barcode region between the Folmer primers."""
BARCODE_CUT: Final = 660
"""Bases beyond this place are unreliable in the published `nucraw` (advice of package `bioscan-dataset`)."""

GENETIC_CODE_5: Final = dict(
    zip(
        (a + b + c for a in "TCAG" for b in "TCAG" for c in "TCAG"),
        "FFLLSSSSYY**CCWWLLLLPPPPHHQQRRRRIIMMTTTTNNKKSSSSVVVVAAAADDEEGGGG",
        strict=True,
    )
)
"""Codon -> amino acid, NCBI translation table 5 (invertebrate mitochondrial); * is stop."""
