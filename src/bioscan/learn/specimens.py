"""Which specimens of a catalogue a network learns from and is measured on, and as what."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from bioscan.analysis.splits import split_hash
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.analysis.taxonomy import within as rows_within
from bioscan.data.images import Images
from bioscan.data.metadata import key_of, read_metadata, scan_metadata
from bioscan.errors import RequestError, near, unknown
from bioscan.vocabulary import RANKS, ROLES

NOT_IN_PACKAGE = "not in the package"


@dataclass(frozen=True)
class Specimens:
    """Specimens with a role, a name and an image; the taxonomy numbers the names."""

    table: pl.DataFrame
    """Columns `key`, `image_file`, `role`, `row` (of the image in the package), `leaf` (of the taxonomy)."""
    taxonomy: Taxonomy
    """Of the training specimens, at one rank."""
    not_in_package: pl.DataFrame
    """Columns `key`, `image_file`, `role`: those whose image the package lacks."""
    left_out: dict[str, int]
    """Reason -> specimens, for the reasons that occur."""
    split_hash: str
    """Of the experiment's whole column."""
    licences: list[str]

    def of(self, role: str) -> pl.DataFrame:
        """The rows of a role."""
        return self.table.filter(pl.col("role") == role)


def select(
    catalogue: Path | str | pl.DataFrame,
    images: Images,
    *,
    experiment: str,
    rank: str,
    within: str | None = None,
    roles: Sequence[str] = ("train", "validation"),
) -> Specimens:
    """The specimens of an experiment, numbered by the taxa of its training part.

    Args:
        catalogue: Catalogue, TSV or table with the experiment's split column.
        images: The package; images are found by `image_file` and `chunk_number`.
        experiment: Split column.
        rank: Rank that the specimens must have a name at.
        within: Only those below this taxon.
        roles: Whose specimens are wanted; those of `train` always give the taxonomy.

    Raises:
        RequestError: an unknown name; no training specimen, or none with an image in the package.
    """
    for role in roles:
        if role not in ROLES:
            raise unknown("role", role, ROLES)
    frame = _read(catalogue, experiment, rank)
    key = key_of(frame.columns)
    digest = split_hash(frame[key], frame[experiment])
    if within:
        frame = rows_within(frame, within)
    frame = frame.filter(pl.col(experiment).is_in({"train", *roles}))
    left_out = {f"no name at rank {rank}": frame[rank].null_count()}
    frame = frame.filter(pl.col(rank).is_not_null())
    left_out["no image_file"] = frame["image_file"].null_count()
    frame = frame.filter(pl.col("image_file").is_not_null())
    if frame.filter(pl.col(experiment) == "train").is_empty():
        place = f" within {within}" if within else ""
        raise RequestError(
            f"{experiment} has no training specimens with an image and a name at rank {rank}{place}; "
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
    taxonomy = Taxonomy.build(training, [rank])
    nodes = taxonomy.targets(frame)
    frame = frame.with_columns(
        pl.Series("leaf", np.where(nodes > 0, taxonomy.first_leaf_N[nodes], -1), pl.Int64)
    )
    unnamed = pl.col("leaf") < 0
    trained = pl.col("role") == "train"
    left_out["a taxon without training specimens"] = frame.filter(unnamed & ~trained).height
    left_out["a name that fits several taxa"] = frame.filter(unnamed & trained).height
    wanted = ~unnamed & pl.col("role").is_in(list(roles))
    return Specimens(
        frame.filter(wanted).select("key", "image_file", "role", "row", "leaf"),
        taxonomy,
        absent.filter(pl.col("role").is_in(list(roles))),
        {reason: count for reason, count in left_out.items() if count},
        digest,
        licences,
    )


def _read(catalogue: Path | str | pl.DataFrame, experiment: str, rank: str) -> pl.DataFrame:
    """The columns that are needed, of every row."""
    if rank not in RANKS:
        raise unknown("rank", rank, RANKS)
    if isinstance(catalogue, pl.DataFrame):
        where, known = "the table", catalogue.columns
    else:
        where, known = str(catalogue), scan_metadata(catalogue).collect_schema().names()
    for column in (experiment, rank, "image_file"):
        if column not in known:
            raise RequestError(f"{where} has no column '{column}'{near(column, known)}")
    wanted = {"sampleid", "image_file", "chunk_number", "copyright_license", experiment, *RANKS}
    columns = [c for c in known if c in wanted]
    if isinstance(catalogue, pl.DataFrame):
        return catalogue.select(columns)
    return read_metadata(catalogue, columns)
