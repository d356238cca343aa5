"""Which specimens of a catalogue a network learns from and is measured on, and as what."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.analysis.splits import split_hash
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.analysis.taxonomy import within as rows_within
from bioscan.data.images import Images
from bioscan.data.metadata import key_of, read_metadata, scan_metadata
from bioscan.errors import RequestError, near, unknown
from bioscan.vocabulary import RANKS, ROLES

NOT_IN_PACKAGE = "not in the package"

Coarse = Literal["use", "refuse", "drop"]
"""What becomes of training specimens that are named to a higher taxon only, not down to a leaf of the tree.
"""


@dataclass(frozen=True)
class Specimens:
    """Specimens with a role, a name and an image; the taxonomy numbers the names."""

    table: pl.DataFrame
    """Columns `key`, `image_file`, `role`, `row` (of the image in the package), `node` (of the taxonomy: the
    deepest taxon of the tree that the specimen is known to belong to)."""
    taxonomy: Taxonomy
    """Of the training specimens, without gaps; with one rank its leaves are the classes."""
    placeholders: int
    """Nodes of the taxonomy that fill gaps."""
    not_in_package: pl.DataFrame
    """Columns `key`, `image_file`, `role`: those whose image the package lacks."""
    left_out: dict[str, int]
    """Reason -> specimens, for the reasons that occur."""
    lifted: int
    """Specimens whose deepest name is not in the tree; the nearest taxon above it that is stands for it."""
    split_hash: str
    """Of the experiment's whole column."""
    licences: list[str]

    def of(self, role: str) -> pl.DataFrame:
        """The rows of a role."""
        return self.table.filter(pl.col("role") == role)

    def target_counts(self) -> NDArray[np.int64]:
        """Training specimens whose target is the node, for each node of the taxonomy."""
        return np.bincount(self.of("train")["node"].to_numpy(), minlength=self.taxonomy.num_nodes)

    def coarse(self, role: str) -> int:
        """Specimens of a role that are named to a higher taxon only, not down to a leaf of the tree."""
        return int((~_is_leaf(self.taxonomy)[self.of(role)["node"].to_numpy()]).sum())


def select(
    catalogue: Path | str | pl.DataFrame,
    images: Images,
    *,
    experiment: str,
    ranks: Sequence[str],
    coarse: Coarse = "use",
    within: str | None = None,
    roles: Sequence[str] = ("train", "validation"),
) -> Specimens:
    """The specimens of an experiment, numbered by the taxa of its training part.

    Args:
        catalogue: Catalogue, TSV or table with the experiment's split column.
        images: The package; images are found by `image_file` and `chunk_number`.
        experiment: Split column.
        ranks: Ranks of the taxonomy; specimens must have a name at one of them.
        coarse: With several ranks, training specimens that are not named down to a leaf: use them, refuse
            them, or drop and count. The taxonomy is the same whichever it is.
        within: Only those below this taxon.
        roles: Whose specimens are wanted; those of `train` always give the taxonomy.

    Raises:
        RequestError: an unknown name; no training specimen, or none with an image in the package; specimens
            that are to be refused.
    """
    for role in roles:
        if role not in ROLES:
            raise unknown("role", role, ROLES)
    frame = _read(catalogue, experiment, ranks)
    key = key_of(frame.columns)
    digest = split_hash(frame[key], frame[experiment])
    if within:
        frame = rows_within(frame, within)
    frame = frame.filter(pl.col(experiment).is_in({"train", *roles}))
    at_ranks = f"rank {ranks[0]}" if len(ranks) == 1 else f"any of the ranks {', '.join(ranks)}"
    named = pl.any_horizontal(pl.col(rank).is_not_null() for rank in ranks)
    left_out = {f"no name at {at_ranks}": frame.filter(~named).height}
    frame = frame.filter(named)
    left_out["no image_file"] = frame["image_file"].null_count()
    frame = frame.filter(pl.col("image_file").is_not_null())
    if frame.filter(pl.col(experiment) == "train").is_empty():
        place = f" within {within}" if within else ""
        raise RequestError(
            f"{experiment} has no training specimens with an image and a name at {at_ranks}{place}; "
            "bioscan split makes the roles"
        )
    licences: list[str] = []
    if "copyright_license" in frame.columns:
        licences = frame["copyright_license"].drop_nulls().unique().sort().to_list()
    parts = frame["chunk_number"] if "chunk_number" in frame.columns else None
    frame = frame.with_columns(
        pl.col(key).alias("key"),
        pl.col(experiment).alias("role"),
        pl.Series("row", images.find(frame["image_file"], parts)),
    )
    absent = frame.filter(pl.col("row") < 0).select("key", "image_file", "role")
    frame = frame.filter(pl.col("row") >= 0)
    training = frame.filter(pl.col("role") == "train")
    if training.is_empty():
        raise RequestError(
            f"none of the training specimens has its image in {images.path}; is it the right package?"
        )
    taxonomy, placeholders = Taxonomy.build(training, ranks).filled()
    levels = taxonomy.rank_N[taxonomy.predictable_N]
    bare = [rank for rank in taxonomy.ranks if RANKS.index(rank) not in levels]
    if bare:
        raise RequestError(
            f"no training specimen has a name at rank {', '.join(bare)}: leave it out of the ranks"
        )
    nodes, lifted = _targets(taxonomy, frame)
    frame = frame.with_columns(
        pl.Series("node", nodes, pl.Int64),
        pl.Series("lifted", lifted),
        pl.Series("leaf", _is_leaf(taxonomy)[nodes]),
    )
    unnamed = pl.col("node") <= 0
    trained = pl.col("role") == "train"
    left_out["a taxon without training specimens"] = frame.filter(unnamed & ~trained).height
    left_out["a name that fits several taxa"] = frame.filter(unnamed & trained).height
    wanted = ~unnamed & pl.col("role").is_in(list(roles))
    if coarse != "use":
        above = ~unnamed & trained & ~pl.col("leaf")
        _refuse_coarse(frame.filter(above), training.height, coarse)
        left_out["a name above the leaves of the tree, which the loss cannot take"] = frame.filter(
            above
        ).height
        wanted &= ~above
    frame = frame.filter(wanted)
    return Specimens(
        frame.select("key", "image_file", "role", "row", "node"),
        taxonomy,
        placeholders,
        absent.filter(pl.col("role").is_in(list(roles))),
        {reason: count for reason, count in left_out.items() if count},
        int(frame["lifted"].sum()),
        digest,
        licences,
    )


def _is_leaf(taxonomy: Taxonomy) -> NDArray[np.bool_]:
    """Whether each node is a leaf."""
    is_leaf_N = np.zeros(taxonomy.num_nodes, bool)
    is_leaf_N[taxonomy.leaves_L] = True
    return is_leaf_N


def _targets(taxonomy: Taxonomy, frame: pl.DataFrame) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Node of each record, and whether it is one above the record's own taxon, which the tree lacks.

    0 or -1 where the tree has none of its taxa.
    """
    nodes = taxonomy.targets(frame)
    unknown_taxon = nodes < 0
    for rank in reversed(taxonomy.ranks[1:]):
        unplaced = nodes < 0
        if not unplaced.any():
            break
        frame = frame.with_columns(
            pl.when(pl.Series(unplaced)).then(None).otherwise(pl.col(below)).alias(below)
            for below in RANKS[RANKS.index(rank) :]
            if below in frame.columns
        )
        nodes = np.where(unplaced, taxonomy.targets(frame), nodes)
    return nodes, unknown_taxon & (nodes > 0)


def _refuse_coarse(rows: pl.DataFrame, training: int, coarse: Coarse) -> None:
    if coarse == "refuse" and rows.height:
        raise RequestError(
            f"{rows.height:,} of {training:,} training specimens (first: {rows['key'][0]}) are not named "
            "down to a leaf of the tree, and this loss learns from leaves only; pass --loss cross_entropy or "
            "logit_adjusted, which learn from them too, or --coarse drop"
        )


def _read(catalogue: Path | str | pl.DataFrame, experiment: str, ranks: Sequence[str]) -> pl.DataFrame:
    """The columns that are needed, of every row."""
    for rank in ranks:
        if rank not in RANKS:
            raise unknown("rank", rank, RANKS)
    if isinstance(catalogue, pl.DataFrame):
        where, known = "the table", catalogue.columns
    else:
        where, known = str(catalogue), scan_metadata(catalogue).collect_schema().names()
    for column in (experiment, *ranks, "image_file"):
        if column not in known:
            raise RequestError(f"{where} has no column '{column}'{near(column, known)}")
    wanted = {"sampleid", "image_file", "chunk_number", "copyright_license", experiment, *RANKS}
    columns = [c for c in known if c in wanted]
    if isinstance(catalogue, pl.DataFrame):
        return catalogue.select(columns)
    return read_metadata(catalogue, columns)
