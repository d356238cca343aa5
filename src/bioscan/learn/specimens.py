"""Which specimens of a catalogue a network learns from and is measured on, and as what."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.analysis.groups import groups_of
from bioscan.analysis.hierarchy import lineages
from bioscan.analysis.reliability import UNKNOWN
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
class Labelled:
    """Specimens with an image and a name at one of a model's ranks, be it of a taxon that the model does not
    know: what its confidence is measured on.
    """

    table: pl.DataFrame
    """Columns `key`, `image_file`, `role` (null: none), `row` and `node` as in `Specimens.table`, but that
    `node` is 0 or less where the tree has none of a specimen's taxa; `group`, and for each rank of the tree
    `<rank>_true` as in `Calibration.records`."""
    group: str
    """What the groups are; see `analysis.groups.groups_of`."""
    not_in_package: pl.DataFrame
    """As in `Specimens`."""
    left_out: dict[str, int]
    """Reason -> specimens, for the reasons that occur."""
    split_hash: str | None
    """Of the experiment's whole column, where there is one."""


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
    validation: Labelled
    """The validation specimens with their groups, also those none of whose taxa is in the tree; where they
    are wanted."""

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
    group: str = "none",
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
        group: What validation specimens are grouped by; see `groups.groups_of`.

    Raises:
        RequestError: an unknown name; no training specimen, or none with an image in the package; specimens
            that are to be refused.
    """
    for role in roles:
        if role not in ROLES:
            raise unknown("role", role, ROLES)
    frame = _read(catalogue, ranks, experiment=experiment, group=group)
    key = key_of(frame.columns)
    digest = split_hash(frame[key], frame[experiment])
    if within:
        frame = rows_within(frame, within)
    frame = frame.filter(pl.col(experiment).is_in({"train", *roles}))
    at_ranks = _at(ranks)
    frame, left_out = _named_with_image(frame, ranks)
    if frame.filter(pl.col(experiment) == "train").is_empty():
        place = f" within {within}" if within else ""
        raise RequestError(
            f"{experiment} has no training specimens with an image and a name at {at_ranks}{place}; "
            "bioscan split makes the roles"
        )
    licences: list[str] = []
    if "copyright_license" in frame.columns:
        licences = frame["copyright_license"].drop_nulls().unique().sort().to_list()
    frame = _found(frame.with_columns(pl.col(key).alias("key"), pl.col(experiment).alias("role")), images)
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
    table, group = _grouped(frame.filter(pl.col("role") == "validation"), taxonomy, group)
    validation = Labelled(table, group, absent.filter(pl.col("role") == "validation"), {}, digest)
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
        validation,
    )


def labelled(
    catalogue: Path | str | pl.DataFrame,
    images: Images,
    taxonomy: Taxonomy,
    *,
    experiment: str | None = None,
    roles: Collection[str] = (),
    within: str | None = None,
    group: str = "auto",
) -> Labelled:
    """The labelled specimens of a catalogue, numbered by the taxa of a model.

    Args:
        catalogue: Catalogue, TSV or table.
        images: The package; images are found by `image_file` and `chunk_number`.
        taxonomy: Of the model.
        experiment: Split column; None: specimens have no roles.
        roles: Whose specimens; empty: every row.
        within: Only those below this taxon.
        group: What they are grouped by; see `groups.groups_of`.

    Raises:
        RequestError: an unknown name; no specimen with a role, a name and an image in the package.
    """
    for role in roles:
        if role not in ROLES:
            raise unknown("role", role, ROLES)
    frame = _read(catalogue, taxonomy.ranks, experiment=experiment, group=group, any_rank=True)
    key = key_of(frame.columns)
    digest = None if experiment is None else split_hash(frame[key], frame[experiment])
    if within:
        frame = rows_within(frame, within)
    role_of = pl.lit(None, pl.String) if experiment is None else pl.col(experiment)
    frame = frame.with_columns(pl.col(key).alias("key"), role_of.alias("role"))
    if roles:
        frame = frame.filter(pl.col("role").is_in(list(roles)))
    frame, left_out = _named_with_image(frame, [rank for rank in taxonomy.ranks if rank in frame.columns])
    if frame.is_empty():
        having = f"role {' or '.join(roles)} in {experiment}, " if roles else ""
        place = f" within {within}" if within else ""
        raise RequestError(
            f"{_where(catalogue)} has no specimens with {having}an image and a name at "
            f"{_at(taxonomy.ranks)}{place}"
        )
    frame = _found(frame, images)
    absent = frame.filter(pl.col("row") < 0).select("key", "image_file", "role")
    frame = frame.filter(pl.col("row") >= 0)
    if frame.is_empty():
        raise RequestError(f"none of the specimens has its image in {images.path}; is it the right package?")
    nodes, _ = _targets(taxonomy, frame)
    table, group = _grouped(frame.with_columns(pl.Series("node", nodes, pl.Int64)), taxonomy, group)
    return Labelled(table, group, absent, left_out, digest)


def _named_with_image(frame: pl.DataFrame, ranks: Sequence[str]) -> tuple[pl.DataFrame, dict[str, int]]:
    """The rows that have a name at one of the ranks and an image file; and how many have not, by reason."""
    named = pl.any_horizontal(pl.col(rank).is_not_null() for rank in ranks)
    left_out = {f"no name at {_at(ranks)}": frame.filter(~named).height}
    frame = frame.filter(named)
    left_out["no image_file"] = frame["image_file"].null_count()
    return frame.filter(pl.col("image_file").is_not_null()), left_out


def _at(ranks: Sequence[str]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"any of the ranks {', '.join(ranks)}"


def _found(frame: pl.DataFrame, images: Images) -> pl.DataFrame:
    """With the row of each image in the package, -1 where it lacks it."""
    parts = frame["chunk_number"] if "chunk_number" in frame.columns else None
    return frame.with_columns(pl.Series("row", images.find(frame["image_file"], parts)))


def _grouped(frame: pl.DataFrame, taxonomy: Taxonomy, by: str) -> tuple[pl.DataFrame, str]:
    """The table of `Labelled`, and what its groups are."""
    groups, by = groups_of(frame, by)
    nodes_N = frame["node"].to_numpy()
    columns = []
    for rank, taxon_N in zip(taxonomy.ranks, lineages(taxonomy, nodes_N), strict=True):
        named_N = np.zeros(frame.height, bool)
        if rank in frame.columns:
            named_N = frame[rank].is_not_null().to_numpy()
        true_N = np.where(taxon_N >= 0, taxon_N, UNKNOWN)
        absent = pl.Series((taxon_N < 0) & ~named_N, dtype=pl.Boolean)
        columns.append(pl.Series(f"{rank}_true", true_N, pl.Int32).set(absent, None))
    return frame.select("key", "image_file", "role", "row", "node", groups.alias("group"), *columns), by


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


def _where(catalogue: Path | str | pl.DataFrame) -> str:
    return "the table" if isinstance(catalogue, pl.DataFrame) else str(catalogue)


def _read(
    catalogue: Path | str | pl.DataFrame,
    ranks: Sequence[str],
    *,
    experiment: str | None,
    group: str,
    any_rank: bool = False,
) -> pl.DataFrame:
    """The columns that are needed, of every row.

    Args:
        catalogue: Catalogue, TSV or table.
        ranks: That it must have.
        experiment: Split column.
        group: As `groups.groups_of` takes it.
        any_rank: One of the ranks is enough.
    """
    for rank in ranks:
        if rank not in RANKS:
            raise unknown("rank", rank, RANKS)
    if isinstance(catalogue, pl.DataFrame):
        known = catalogue.columns
    else:
        known = scan_metadata(catalogue).collect_schema().names()
    needed = [rank for rank in ranks if not any_rank or rank in known] or list(ranks[-1:])
    if experiment is not None:
        needed.insert(0, experiment)
    for column in (*needed, "image_file"):
        if column not in known:
            raise RequestError(f"{_where(catalogue)} has no column '{column}'{near(column, known)}")
    wanted = {"sampleid", "image_file", "chunk_number", "copyright_license", experiment, group, "uri", *RANKS}
    columns = [c for c in known if c in wanted]
    if isinstance(catalogue, pl.DataFrame):
        return catalogue.select(columns)
    return read_metadata(catalogue, columns)
