"""From a catalogue and a package of images to a model folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch

from bioscan.config import record as record_of
from bioscan.data.images import Images
from bioscan.data.metadata import fingerprint
from bioscan.errors import RequestError
from bioscan.files import writing
from bioscan.learn import model_folder, models, run_folder, training
from bioscan.learn.dataset import SpecimenDataset
from bioscan.learn.loader import fits_in_memory
from bioscan.learn.settings import TrainSettings
from bioscan.learn.specimens import NOT_IN_PACKAGE, Specimens, select


def train(
    catalogue: Path | str,
    images: Path | str | Images,
    output: Path | str,
    settings: TrainSettings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Train a classifier on the training part of an experiment and keep the epoch that is best on its
    validation part.

    Args:
        catalogue: Catalogue or TSV with the experiment's split column.
        images: Package of images, found by `image_file` (and `chunk_number`).
        output: Run folder; the model is in its folder `model`.
        settings: None: the default recipe.
        resume: Go on with an interrupted run in `output`, with the same settings and data.
        overwrite: Throw away what is in `output`.
        progress: Called as `progress(done, total, **values)`, specimens over all epochs.

    Returns:
        `model` (folder), `rank`, `classes`, `training`, `validation` (specimens), `left_out` (reason ->
        count), `failed` images (`key`, `image_file`, `error`; also in failed.csv), `best_epoch`, `epochs`,
        `validation_scores` of the best epoch, `history`.

    Raises:
        RequestError: an unknown name, an empty split, a run in the way.
        DataError: an input that cannot be used.
    """
    settings = settings or TrainSettings()
    output = Path(output)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = training.choose_device(settings.device)
    precision = training.precision_name(settings.amp, device)
    package = images if isinstance(images, Images) else Images(images)
    chosen = select(
        catalogue,
        package,
        experiment=settings.experiment,
        rank=settings.target_rank,
        within=settings.within,
    )
    _refuse_too_little(chosen, settings)
    torch.manual_seed(settings.seed)
    network = models.create(
        settings.model,
        num_leaves=chosen.taxonomy.num_leaves,
        crop_size=settings.crop_size,
        weights=settings.weights,
    )
    spec = training.image_spec_of(settings, network)
    record = record_of(
        settings,
        experiment=settings.experiment,
        rank=settings.target_rank,
        within=settings.within,
        data_fingerprint=fingerprint(catalogue),
        images=package.path.name,
        split_hash=chosen.split_hash,
        device=device.type,
        precision=precision,
        threads=torch.get_num_threads(),
        licences=chosen.licences,
        left_out=chosen.left_out,
        taxonomy=chosen.taxonomy.to_dict(),  # the label numbers, fixed from here on
    )
    going_on = run_folder.open_run(output, record, resume=resume, overwrite=overwrite)
    cache = fits_in_memory(chosen.table.height, settings.image_size, settings.cache_mb)
    tables = {role: chosen.of(role) for role in ("train", "validation")}
    datasets = {
        role: SpecimenDataset(
            package,
            table["row"].to_numpy(),
            table["leaf"].to_numpy(),
            image_size=settings.image_size,
            crop_size=settings.crop_size,
            cache=cache,
        )
        for role, table in tables.items()
    }
    result = training.fit(
        network,
        datasets["train"],
        datasets["validation"] if len(datasets["validation"]) else None,
        num_leaves=chosen.taxonomy.num_leaves,
        spec=spec,
        settings=settings,
        folder=output,
        resume=going_on,
        progress=progress,
    )
    run = result.run
    failed = _failed(chosen, {"train": run.failures, "validation": run.validation_failures})
    with writing(output / "failed.csv", overwrite=True) as partial:
        failed.write_csv(partial)
    best = run.history[run.best_epoch - 1]
    validation = {k.removeprefix("validation_"): v for k, v in best.items() if k.startswith("validation_")}
    model_folder.save(
        output / "model",
        result.state,
        backbone=settings.model,
        taxonomy=chosen.taxonomy,
        spec=spec,
        record={**record, "best_epoch": run.best_epoch, "validation": validation},
        history=run.history,
        overwrite=True,
    )
    run_folder.tidy(output)
    return {
        "model": str(output / "model"),
        "rank": settings.target_rank,
        "classes": chosen.taxonomy.num_leaves,
        "training": len(datasets["train"]),
        "validation": len(datasets["validation"]),
        "left_out": chosen.left_out,
        "failed": failed.to_dicts(),
        "best_epoch": run.best_epoch,
        "epochs": len(run.history),
        "validation_scores": validation,
        "history": run.history,
    }


def _refuse_too_little(chosen: Specimens, settings: TrainSettings) -> None:
    """A classifier needs two classes, batch norm two specimens, the criterion a validation part."""
    if chosen.taxonomy.num_leaves < 2:
        raise RequestError(
            f"all training specimens are {chosen.taxonomy.name(int(chosen.taxonomy.leaves_L[0]))}: "
            f"there is nothing to tell apart at rank {settings.target_rank}; choose a lower --rank"
        )
    if chosen.of("validation").is_empty() and settings.criterion != "last":
        raise RequestError(
            f"{settings.experiment} has no validation specimens to choose an epoch by; "
            "pass --criterion last to keep the last epoch"
        )


def _failed(chosen: Specimens, failures: Mapping[str, Mapping[int, str]]) -> pl.DataFrame:
    """Images that are absent or cannot be read: columns `key`, `image_file`, `error`."""
    columns = ("key", "image_file", "error")
    tables = [chosen.not_in_package.with_columns(pl.lit(NOT_IN_PACKAGE).alias("error")).select(columns)]
    for role, reasons in failures.items():
        rows = sorted(reasons)
        errors = pl.Series("error", [reasons[row] for row in rows], pl.String)
        tables.append(chosen.of(role)[rows].with_columns(errors).select(columns))
    return pl.concat(tables)
