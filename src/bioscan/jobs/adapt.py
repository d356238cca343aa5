"""From a few labelled photographs, or their embeddings, to a model folder for one's own taxa."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import nn

from bioscan.analysis.taxonomy import Taxonomy
from bioscan.config import record as record_of
from bioscan.data.embeddings import Embeddings, is_embeddings, read_embeddings
from bioscan.data.images import Images
from bioscan.data.metadata import read_metadata
from bioscan.errors import DataError, RequestError, near, unknown
from bioscan.files import refuse_existing
from bioscan.learn import model_folder, models
from bioscan.learn.adaptation import fit
from bioscan.learn.embeddings import Backbone, backbone_state, gather, open_backbone
from bioscan.learn.heads import features_of, head_of
from bioscan.vocabulary import KEYS, MISSING, RANKS

LABEL = "label"


def adapt(
    source: Path | str | Images,
    labels: Path | str,
    output: Path | str,
    *,
    model: Path | str | None = None,
    weights: str | None = None,
    head: str = "linear",
    ranks: Sequence[str] = (),
    label_rank: str = "species",
    balance: str = "none",
    l2: float | None = None,
    folds: int = 5,
    image_size: int | None = None,
    crop_size: int | None = None,
    batch_size: int = 64,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 1,
    overwrite: bool = False,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Fit a head to the frozen features of labelled photographs.

    Args:
        source: Package of photographs, or a file of embeddings.
        labels: Table with `sampleid` or `image_file` (photographs: `image_file`) and names: rank columns, or
            one column `label`.
        output: Model folder.
        model: Model folder or name of the backbone; with embeddings it may be left out where they are those
            of a named backbone.
        weights: Of a named backbone: `hub` (also None), or a local file or folder.
        head: One of `learn.adaptation.HEADS`.
        ranks: Ranks that are named; empty: those at which some specimen has a name.
        label_rank: Rank of the names in column `label`.
        balance: With head linear: `weights` makes each taxon count alike.
        l2: With head linear: the penalty; None: chosen by cross-validation.
        folds: Parts of the cross-validation.
        image_size: With photographs and a named backbone, as for `embed`.
        crop_size: Likewise.
        batch_size: Photographs at a time.
        device: auto, cpu, cuda or mps.
        threads: torch threads; None: as torch has it.
        seed: Of the parts of the cross-validation.
        overwrite: Replace the output.
        progress: Called as `progress(done, total)`, photographs.

    Returns:
        `model` (folder), `head`, `ranks`, `classes`, `specimens`, `counts` (`taxon`, `rank`, `specimens`,
        `held_out_right`: those named right by heads that have not seen them), `chosen` (by cross-validation),
        `cross_validated` (`specimens`, `micro_top_1`, `macro_top_1`), `left_out` (reason -> count), `failed`
        (count), `failures` (name, part, place, reason).

    Raises:
        RequestError: an unknown name; labels without photographs; one taxon, or too few specimens.
        DataError: an input that cannot be used; embeddings of another backbone.
    """
    labels, output = Path(labels), Path(output)
    refuse_existing(output, overwrite=overwrite or (output.is_dir() and not any(output.iterdir())))
    for name, value in (("batch_size", batch_size), ("threads", threads)):
        if value is not None and value < 1:
            raise RequestError(f"{name} is {value}; it must be at least 1")
    if threads:
        torch.set_num_threads(threads)
    table, ranks, left_out = _labelled(labels, ranks, label_rank)
    stored = None
    if isinstance(source, Path | str) and is_embeddings(source):
        stored = read_embeddings(source)
        if image_size or crop_size:
            raise RequestError(f"{source}: embeddings have their image size")
        table = _joined(table, stored)
        backbone = _backbone_of(stored, model, weights, device)
        images = str(stored.record.get("images"))
    else:
        if model is None:
            raise RequestError("name the backbone: --model NAME or FOLDER, and its --weights")
        package = source if isinstance(source, Images) else Images(source)
        images = package.path.name
        table = _found(table, package)
        backbone = open_backbone(
            model, weights=weights, image_size=image_size, crop_size=crop_size, device=device
        )
    if missing := int((table["row"] < 0).sum()):
        left_out["no photograph here"] = missing
    table = table.filter(pl.col("row") >= 0)
    if table.is_empty():
        raise RequestError(f"none of the labels in {labels} belongs to a photograph of {source}")
    _refuse_twice(table, labels)
    _refuse_one_taxon(table, ranks)
    failures: list[dict[str, Any]] = []
    if stored is not None:
        features_NF = stored.rows(table["row"].to_numpy())
    else:
        features_NF, failures = gather(
            backbone, package, table["row"].to_numpy(), batch_size=batch_size, progress=progress
        )
        good = ~np.isnan(features_NF).any(axis=1)
        table, features_NF = table.filter(pl.Series(good)), features_NF[good]
        if table.is_empty():
            raise RequestError(f"none of the {len(failures)} labelled photographs can be read")
    taxonomy, targets_N = _targets(table, ranks)
    if head != "linear":
        at_leaf = taxonomy.leaves_L[taxonomy.first_leaf_N[targets_N]] == targets_N
        if not at_leaf.all():
            left_out[f"no name at the lowest rank, which head {head} needs"] = int((~at_leaf).sum())
            table, features_NF = table.filter(pl.Series(at_leaf)), features_NF[at_leaf]
            taxonomy, targets_N = _targets(table, ranks)
    fitted = fit(head, features_NF, targets_N, taxonomy, balance=balance, l2=l2, folds=folds, seed=seed)
    counts, scores = _cross_validated(fitted.held_out_NL, targets_N, taxonomy)
    record = record_of(
        experiment=None,
        within=None,
        split_hash=None,
        data_fingerprint=hashlib.sha256(labels.read_bytes()).hexdigest(),
        images=images,
        backbone_weights_sha256=backbone.weights_sha256,
        adapted={
            "head": head,
            "balance": balance,
            "folds": folds,
            "seed": seed,
            "specimens": table.height,
            "held_out": scores["specimens"],
            **{key: value for key, value in fitted.chosen.items() if key != "loss"},
        },
        licences=_licences(table),
        left_out=left_out,
        validation={
            f"cross_validated_{name}": value for name, value in scores.items() if name != "specimens"
        },
    )
    save_with_head(
        output,
        backbone,
        fitted.head,
        fitted.module,
        taxonomy=taxonomy,
        record=record,
        target_counts=np.bincount(targets_N, minlength=taxonomy.num_nodes),
        overwrite=overwrite,
    )
    return {
        "model": str(output),
        "head": head,
        "backbone": backbone.name,
        "ranks": list(taxonomy.ranks),
        "classes": taxonomy.num_leaves,
        "specimens": table.height,
        "counts": counts.to_dicts(),
        "chosen": fitted.chosen,
        "cross_validated": scores,
        "left_out": left_out,
        "failed": len(failures),
        "failures": failures,
    }


def save_with_head(
    output: Path,
    backbone: Backbone,
    head: dict[str, Any],
    module: nn.Module,
    *,
    taxonomy: Taxonomy,
    record: dict[str, Any],
    target_counts: NDArray[np.int64],
    overwrite: bool,
) -> None:
    """Write a model folder of a backbone and a head fitted to its features.

    Raises:
        RequestError: the network does more between features and head than the head alone can follow.
    """
    linear = head["kind"] == "linear"
    network = models.create(
        backbone.name,
        outputs=taxonomy.num_leaves,
        crop_size=backbone.spec.crop_size,
        head=None if linear else head,
    ).eval()
    state = {name: value.cpu() for name, value in backbone_state(backbone.network).items()}
    absent, surplus = network.load_state_dict(state, strict=False)
    place = head_of(network)
    assert not surplus, "the same backbone"
    assert len(absent) == len(place.state_dict()), "but for its head"
    fitted = module.state_dict()
    place.load_state_dict({name: fitted[name].reshape(v.shape) for name, v in place.state_dict().items()})
    size = backbone.spec.crop_size
    with torch.inference_mode():
        grey = torch.full((1, 3, size, size), 0.5)
        expected = module.cpu()(features_of(network, grey))
        if not torch.allclose(network(grey), expected, rtol=1e-3, atol=1e-3):
            raise RequestError(f"{backbone.name} does not give its features to its head as they are")
    model_folder.save(
        output,
        network.state_dict(),
        backbone=backbone.name,
        taxonomy=taxonomy,
        spec=backbone.spec,
        record=record,
        history=[],
        head=None if linear else head,
        target_counts=target_counts,
        overwrite=overwrite,
    )


# -- labels


def _labelled(
    labels: Path, ranks: Sequence[str], label_rank: str
) -> tuple[pl.DataFrame, list[str], dict[str, int]]:
    """Rows with a name at one of the ranks, the ranks, and what is left out."""
    for rank in (*ranks, label_rank):
        if rank not in RANKS:
            raise unknown("rank", rank, RANKS)
    table = read_metadata(labels)
    if LABEL in table.columns:  # no column of ours: nobody has cleaned it
        name = pl.col(LABEL).str.strip_chars()
        table = table.with_columns(pl.when(~name.is_in(MISSING)).then(name).alias(LABEL))
        if label_rank in table.columns:
            raise RequestError(f"{labels} has columns {LABEL} and {label_rank}; keep one")
        table = table.rename({LABEL: label_rank})
    named: list[str] = [rank for rank in RANKS if rank in table.columns and table[rank].count()]
    if not named:
        raise RequestError(
            f"{labels}: no names; a column '{LABEL}', or one of {', '.join(RANKS)}, is expected"
            f"{near(LABEL, table.columns)}"
        )
    for rank in ranks:
        if rank not in named:
            raise RequestError(f"{labels}: no names at rank {rank} (known: {', '.join(named)})")
    asked = [rank for rank in named if not ranks or rank in ranks]
    known = table.filter(pl.any_horizontal(pl.col(rank).is_not_null() for rank in asked))
    left_out = {}
    if known.height < table.height:
        left_out["no name"] = table.height - known.height
    return known, asked, left_out


def _found(table: pl.DataFrame, package: Images) -> pl.DataFrame:
    """The labels with `row`, in the package."""
    if "image_file" not in table.columns:
        raise RequestError("the labels have no column 'image_file', which photographs are found by")
    parts = table["chunk_number"] if "chunk_number" in table.columns else None
    return table.with_columns(pl.Series("row", package.find(table["image_file"].fill_null(""), parts)))


def _joined(table: pl.DataFrame, stored: Embeddings) -> pl.DataFrame:
    """The labels with `row`, among the embeddings, by the first key that finds any."""
    for key in (key for key in KEYS if key in table.columns):
        known = stored.keys.select(key).with_row_index("row").drop_nulls(key)
        known = known.filter(pl.col(key).is_in(table[key].drop_nulls().implode()))
        if known.is_empty():
            continue
        if known[key].is_duplicated().any():
            twice = str(known[key].filter(known[key].is_duplicated())[0])
            raise DataError(f"{stored.path}: {key} {twice} occurs more than once; embed with a catalogue")
        rows = pl.col("row").cast(pl.Int64).fill_null(-1)
        return table.join(known, on=key, how="left", maintain_order="left").with_columns(rows)
    return table.with_columns(row=pl.lit(-1, pl.Int64))


def _backbone_of(stored: Embeddings, model: Path | str | None, weights: str | None, device: str) -> Backbone:
    """The backbone that the embeddings are of, found again."""
    record = stored.record
    if model is None:
        if record["model_sha256"]:
            raise RequestError(f"{stored.path} was made by a model folder; name it: --model FOLDER")
        model = record["backbone"]
    size = record["image"]
    if Path(model).is_dir():
        backbone = open_backbone(model, weights=weights, device=device)
    else:
        backbone = open_backbone(
            model,
            weights=weights,
            image_size=size["image_size"],
            crop_size=size["crop_size"],
            device=device,
        )
    ours = backbone.record
    if any(ours[name] != record[name] for name in ("backbone", "weights_sha256", "image")):
        raise DataError(
            f"{stored.path}: embeddings of {record['backbone']} with other weights or another image size "
            f"than {model}; pass the model and weights that they were made with"
        )
    return backbone


def _refuse_twice(table: pl.DataFrame, labels: Path) -> None:
    """Under two sample ids: it would be held out and learned from at once."""
    twice = table.filter(pl.col("row").is_duplicated())
    if not twice.is_empty():
        name = twice.select(pl.coalesce(key for key in reversed(KEYS) if key in twice.columns)).item(0, 0)
        raise DataError(f"{labels}: the photograph {name} is labelled more than once; keep one row of it")


def _refuse_one_taxon(table: pl.DataFrame, ranks: Sequence[str]) -> None:
    distinct = table.select(ranks).unique()
    if all(distinct[rank].drop_nulls().n_unique() < 2 for rank in ranks):
        only = next(name for row in distinct.reverse().rows() for name in reversed(row) if name)
        raise RequestError(f"all labelled photographs are {only}: there is nothing to tell apart")


def _targets(table: pl.DataFrame, ranks: Sequence[str]) -> tuple[Taxonomy, NDArray[np.int64]]:
    taxonomy, _ = Taxonomy.build(table, ranks).filled()
    targets_N = taxonomy.targets(table).astype(np.int64)
    if (targets_N <= 0).any():
        row = int(np.flatnonzero(targets_N <= 0)[0])
        named = " / ".join(str(table[rank][row]) for rank in ranks if table[rank][row])
        raise DataError(f"the labels give {named} in several places of the tree; fill the ranks above it")
    return taxonomy, targets_N


def _licences(table: pl.DataFrame) -> list[str]:
    if "copyright_license" not in table.columns:
        return []
    return table["copyright_license"].drop_nulls().unique().sort().to_list()


# -- scores


def _cross_validated(
    held_out_NL: NDArray[np.float32], targets_N: NDArray[np.int64], taxonomy: Taxonomy
) -> tuple[pl.DataFrame, dict[str, float | None]]:
    """Specimens of each taxon, and how many of them were named right when held out; micro and macro top-1.

    Of specimens that are known to a leaf and were held out; None without any.
    """
    nodes, counts = np.unique(targets_N, return_counts=True)
    leaf = np.isin(targets_N, taxonomy.leaves_L) & ~np.isnan(held_out_NL[:, 0])
    right = np.zeros(targets_N.size, bool)
    right[leaf] = taxonomy.leaves_L[held_out_NL[leaf].argmax(axis=1)] == targets_N[leaf]
    tried = np.array([int((leaf & (targets_N == node)).sum()) for node in nodes])
    good = np.array([int((right & (targets_N == node)).sum()) for node in nodes])
    table = pl.DataFrame(
        {
            "taxon": [taxonomy.name(int(node)) for node in nodes],
            "rank": [RANKS[taxonomy.rank_N[node]] for node in nodes],
            "specimens": counts,
            "held_out": tried,
            "held_out_right": good,
        }
    )
    some = tried > 0
    return table, {
        "specimens": int(tried.sum()),
        "micro_top_1": float(good.sum() / tried.sum()) if some.any() else None,
        "macro_top_1": float((good[some] / tried[some]).mean()) if some.any() else None,
    }
