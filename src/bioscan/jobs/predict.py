"""From a model and images to a predictions table."""

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
import torch

from bioscan.analysis.hierarchy import DECODINGS
from bioscan.analysis.taxonomy import within as rows_within
from bioscan.config import record as record_of
from bioscan.data.images import Images
from bioscan.data.metadata import FORMS, fingerprint, read_metadata, scan_metadata
from bioscan.data.predictions import PredictionsWriter
from bioscan.errors import RequestError, unknown
from bioscan.learn import model_folder
from bioscan.learn.device import choose_device, precision_name
from bioscan.learn.prediction import Naming, predict_batches
from bioscan.vocabulary import RANKS, ROLES

_BLOCK_ROWS = 8_192
_BLOCK_VALUES = 8_000_000
"""Rows, and leaf probabilities, that are gathered before they are written."""
_BALANCING: Final[dict[str, tuple[str, ...]]] = {
    "loss": ("class_balanced", "logit_adjusted", "ldam"),
    "sampler": ("class_balanced", "square_root", "repeat_factor"),
    "method": ("crt", "tau_norm"),
    "balance": ("weights",),
}
"""Setting of a training -> its values that favour rare taxa."""


def predict(
    model: Path | str,
    source: Path | str,
    output: Path | str,
    *,
    images: Path | str | Images | None = None,
    roles: Collection[str] = ("validation", "test"),
    scores: bool | None = None,
    tau: float = 0.0,
    decode: str = "leaf",
    batch_size: int = 64,
    device: str = "auto",
    workers: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Name specimens. An interrupted job goes on where it was; images and probabilities are held a block at a
    time.

    Args:
        model: Model folder, or the run folder that holds it.
        source: A catalogue or TSV (then `images` is needed), or a package of bare photographs.
        output: Predictions, `.parquet` or `.csv`.
        images: Package of the catalogue's images.
        roles: With a catalogue that has the model's split column: whose specimens, of the taxon that the
            model was trained within; empty: every row.
        scores: Write leaf probabilities beside the table; None: where specimens have roles.
        tau: Strength of the logit adjustment: 0 as the network says, 1 as if all taxa were equally common. It
            is on top of what the training did: with loss `logit_adjusted`, minus its tau undoes that.
        decode: From leaf probabilities to one answer: `leaf` (the most probable leaf taxon), `greedy` (the
            most probable child, from the root down) or `distance` (least expected distance in the tree).
        batch_size: Images at a time.
        device: auto, cpu, cuda or mps.
        workers: Loader processes; None: by the number of cores.
        threads: torch threads; None: as torch has it.
        overwrite: Replace the output.
        progress: Called as `progress(done, total)`.

    Returns:
        `predictions` (path), `specimens`, `failed` (rows with an error), `first_failed` (up to ten of them),
        `balanced`: what in the model's training favoured rare taxa already (`loss`, `sampler` … -> name), on
        top of which tau comes.

    Raises:
        RequestError, DataError: as the model folder, the metadata or the package tell.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        ("threads", threads, 1),
    ):
        if value is not None and value < least:
            raise RequestError(f"{name} is {value}; it must be at least {least}")
    if not math.isfinite(tau):
        raise RequestError(f"tau is {tau}; it must be a number, such as 0 or 1")
    if decode not in DECODINGS:
        raise unknown("decoding", decode, DECODINGS)
    if threads:
        torch.set_num_threads(threads)
    place = choose_device(device)
    loaded = model_folder.load(model, device=place)
    if tau and not loaded.target_counts_N.any():
        raise RequestError(f"{model}: how common its taxa were in training is not known; --tau needs that")
    source, output = Path(source), Path(output)
    is_catalogue = source.suffix in FORMS
    if is_catalogue:
        if images is None:
            raise RequestError("a catalogue needs --images, the package of its photographs")
        package = images if isinstance(images, Images) else Images(images)
        specimens, has_roles = _of_catalogue(source, package, loaded.info, roles)
    else:
        if images is not None:
            raise RequestError(f"{source} is a package of images itself; --images goes with a catalogue")
        package, has_roles = Images(source), False
        specimens = package.index.select(
            pl.lit(None, pl.String).alias("sampleid"),
            pl.col("name").alias("image_file"),
            pl.int_range(pl.len()).alias("row"),
        )
    record = record_of(
        **{name: loaded.info.get(name) for name in ("experiment", "within", "split_hash")},
        rank=loaded.taxonomy.ranks[-1],
        ranks=list(loaded.taxonomy.ranks),
        tau=tau,
        decode=decode,
        model=loaded.info["backbone"],
        model_sha256=loaded.fingerprint,
        training=loaded.info.get("settings", {}),
        precision=precision_name("auto", place),
        source=source.name,
        images=package.path.name,
        roles=list(roles) if has_roles else [],
        specimens=specimens.height,
        data_fingerprint=fingerprint(source) if is_catalogue else package.fingerprint,
        images_fingerprint=package.fingerprint,
    )
    keep_scores = has_roles if scores is None else scores
    taxonomy = loaded.taxonomy
    block = max(batch_size, min(_BLOCK_ROWS, _BLOCK_VALUES // taxonomy.num_leaves))
    with PredictionsWriter(
        output,
        ranks=Naming.of(taxonomy).lineages.columns,
        leaves=taxonomy.leaf_paths if keep_scores else None,
        record=record,
        overwrite=overwrite,
    ) as writer:
        done = writer.done
        held: list[tuple[pl.DataFrame, Any]] = []
        for made in predict_batches(
            loaded,
            package,
            specimens.slice(done),
            tau=tau,
            rule=decode,
            batch_size=batch_size,
            workers=workers,
        ):
            held.append(made)
            done += made[0].height
            if sum(table.height for table, _ in held) >= block or done == specimens.height:
                tables, probabilities = zip(*held, strict=True)
                writer.write(pl.concat(tables), np.concatenate(probabilities) if keep_scores else None)
                held = []
            if progress:
                progress(done, specimens.height)
    return {
        "predictions": str(output),
        "specimens": specimens.height,
        **_failures(output),
        "balanced": _balanced(loaded),
    }


def _balanced(model: model_folder.Model) -> dict[str, str]:
    """What in a model's training gave rare taxa more weight than they have in the data."""
    made_by = {
        "loss": model.trained_with("loss"),
        "sampler": model.trained_with("sampler"),
        "method": (model.info.get("rebalanced") or {}).get("method"),
        "balance": (model.info.get("adapted") or {}).get("balance"),
    }
    return {what: name for what, name in made_by.items() if name in _BALANCING[what]}


def _of_catalogue(
    catalogue: Path, package: Images, info: dict[str, Any], roles: Collection[str]
) -> tuple[pl.DataFrame, bool]:
    """The catalogue's specimens with their row in the package, and whether they were chosen by role."""
    for role in roles:
        if role not in ROLES:
            raise unknown("role", role, ROLES)
    known = scan_metadata(catalogue).collect_schema().names()
    if "image_file" not in known:
        raise RequestError(f"{catalogue} has no column 'image_file'; the package is searched by it")
    experiment, taxon = info.get("experiment"), info.get("within")
    has_roles = experiment in known and bool(roles)
    wanted = ["sampleid", "image_file", "chunk_number"]
    if has_roles:
        wanted += [str(experiment), *(RANKS if taxon else ())]
    frame = read_metadata(catalogue, [c for c in known if c in wanted])
    if has_roles:
        if taxon:
            frame = rows_within(frame, taxon)
        frame = frame.filter(pl.col(str(experiment)).is_in(list(roles)))
        if frame.is_empty():
            below = f" within {taxon}" if taxon else ""
            raise RequestError(
                f"no specimen of {catalogue}{below} has role {' or '.join(roles)} in {experiment}; "
                "pass --all-rows to predict every row"
            )
    if "sampleid" not in frame.columns:
        frame = frame.with_columns(pl.lit(None, pl.String).alias("sampleid"))
    parts = frame["chunk_number"] if "chunk_number" in frame.columns else None
    rows = pl.Series("row", package.find(frame["image_file"], parts))
    return frame.select("sampleid", "image_file").with_columns(rows), has_roles


def _failures(output: Path) -> dict[str, Any]:
    """How many rows have an error, and the first of them."""
    table = (
        pl.scan_parquet(output) if output.suffix == ".parquet" else pl.scan_csv(output, infer_schema=False)
    )
    bad = table.filter(pl.col("error").is_not_null()).select("sampleid", "image_file", "error")
    return {
        "failed": int(bad.select(pl.len()).collect().item()),
        "first_failed": bad.head(10).collect().to_dicts(),
    }
