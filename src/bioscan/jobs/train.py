"""From a catalogue and a package of images to a model folder."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import nn

from bioscan.config import record as record_of
from bioscan.data.images import Images
from bioscan.data.metadata import fingerprint
from bioscan.errors import RequestError
from bioscan.files import writing
from bioscan.learn import adapters, calibrating, model_folder, models, run_folder, training
from bioscan.learn.calibration import Calibration
from bioscan.learn.dataset import SpecimenDataset
from bioscan.learn.device import choose_device, precision_name
from bioscan.learn.distributed import Processes, has_batch_statistics, joined
from bioscan.learn.loader import default_workers, fits_in_memory
from bioscan.learn.losses import COARSE_LOSSES, make_loss, outputs_of
from bioscan.learn.settings import TrainSettings
from bioscan.learn.specimens import NOT_IN_PACKAGE, Specimens, select


def train(
    catalogue: Path | str,
    images: Path | str | Images,
    output: Path | str,
    settings: TrainSettings | None = None,
    *,
    resume: bool = False,
    inexact: bool = False,
    overwrite: bool = False,
    progress: Callable[..., None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train a classifier on the training part of an experiment and keep the epoch that is best on its
    validation part, or, where there are enough groups of specimens to cut that in two, on the first part of
    it: the second is for thresholds and prediction sets (see `learn.calibration`).

    Under torchrun, or as tasks of SLURM's srun, the processes train one network together; each calls this
    with the same arguments, and the run folder must be one for all.

    Args:
        catalogue: Catalogue or TSV with the experiment's split column.
        images: Package of images, found by `image_file` (and `chunk_number`).
        output: Run folder; the model is in its folder `model`.
        settings: None: the default recipe.
        resume: Go on with an interrupted run in `output`, with the same settings and data.
        inexact: Resume also with other numbers of processes or threads, or on another device: the model is
            then as good, but numbers are rounded otherwise.
        overwrite: Throw away what is in `output`.
        progress: Called as `progress(done, total, **values)`, specimens over all epochs.
        tell: Called with a line of advice, before training starts.

    Returns:
        `model` (folder), `rank` (the deepest), `ranks`, `classes` (leaf taxa), `placeholders` (nodes that
        fill gaps), `training`, `validation` (specimens that the epoch was chosen by), `calibration`
        (validation specimens that were kept from that), `coarse` (training specimens not named down to a
        leaf), `lifted` (specimens with a taxon above their own as target), `left_out` (reason -> count),
        `failed` images (`key`, `image_file`, `error`; also in failed.csv), `best_epoch`, `epochs`,
        `validation_scores` of the best epoch, `history`, `temperature` (None without validation specimens),
        `warnings` (of the calibration).

    Raises:
        RequestError: an unknown name, an empty split, a run in the way.
        DataError: an input that cannot be used.
    """
    settings = settings or TrainSettings()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with joined(settings.device) as processes, contextlib.ExitStack() as held:
        return _train(
            catalogue,
            _opened(images, processes),
            Path(output),
            settings,
            processes,
            options={"resume": resume, "overwrite": overwrite, "inexact": inexact},
            progress=progress,
            tell=tell,
            held=held,
        )


def _opened(images: Path | str | Images, processes: Processes) -> Images:
    """The package; the first process opens it alone before all do, so that it is indexed once."""
    if isinstance(images, Images):
        return images
    if processes.size > 1:

        def index() -> None:
            Images(images)

        processes.by_first(index)
    return Images(images)


def _train(
    catalogue: Path | str,
    package: Images,
    output: Path,
    settings: TrainSettings,
    processes: Processes,
    *,
    options: dict[str, bool],
    progress: Callable[..., None] | None,
    tell: Callable[[str], None] | None,
    held: contextlib.ExitStack,
) -> dict[str, Any]:
    device = choose_device(settings.device, processes.local_rank)
    precision = precision_name(settings.amp, device)
    chosen = select(
        catalogue,
        package,
        experiment=settings.experiment,
        ranks=settings.target_ranks,
        coarse="use" if settings.loss in COARSE_LOSSES else settings.coarse,
        within=settings.within,
        group=settings.calibration_group,
    )
    second_X = calibrating.second_part(chosen.validation, settings.calibration_share)
    first = chosen.validation.table.filter(pl.Series(~second_X))  # by place: keys may be missing
    parts = {"train": chosen.of("train"), "validation": first.filter(pl.col("node") > 0)}
    _refuse_too_little(chosen, parts["validation"], settings)
    torch.manual_seed(settings.seed)
    head = {"kind": "cosine", "scale": settings.ldam_scale} if settings.loss == "ldam" else None
    network = models.create(
        settings.model,
        outputs=outputs_of(chosen.taxonomy, settings.softmax),
        crop_size=settings.crop_size,
        weights=settings.weights,
        head=head,
    )
    if settings.freeze:
        adapters.freeze_backbone(network)
    if settings.lora_rank:
        adapters.add_lora(network, rank=settings.lora_rank, alpha=settings.lora_alpha)
    if tell and processes.first and (advice := _advice(network, device, processes)):
        tell(advice)
    spec = training.image_spec_of(settings, network)
    workers = default_workers(processes.local_size) if settings.workers is None else settings.workers
    record = record_of(
        settings,
        experiment=settings.experiment,
        rank=settings.target_ranks[-1],
        within=settings.within,
        data_fingerprint=fingerprint(catalogue),
        images=package.path.name,
        split_hash=chosen.split_hash,
        device=device.type,
        precision=precision,
        processes=processes.size,
        threads=torch.get_num_threads(),
        workers=workers,
        licences=chosen.licences,
        left_out=chosen.left_out,
        taxonomy=chosen.taxonomy.to_dict(),  # the label numbers, fixed from here on
    )

    def begin() -> bool:
        with run_folder.alone(output):  # else --overwrite would take the folder from under another
            pass
        going_on = run_folder.open_run(output, record, **options)
        held.enter_context(run_folder.alone(output))
        return going_on

    going_on = processes.by_first(begin)
    cache = fits_in_memory(chosen.table.height * processes.local_size, settings.image_size, settings.cache_mb)
    datasets = {
        role: SpecimenDataset(
            package,
            table["row"].to_numpy(),
            table["node"].to_numpy(),
            image_size=settings.image_size,
            crop_size=settings.crop_size,
            cache=cache,
        )
        for role, table in parts.items()
    }
    result = training.fit(
        network,
        datasets["train"],
        datasets["validation"] if len(datasets["validation"]) else None,
        taxonomy=chosen.taxonomy,
        loss=make_loss(settings, chosen.taxonomy, chosen.target_counts()),
        spec=spec,
        settings=settings,
        folder=output,
        resume=going_on,
        processes=processes,
        progress=progress if processes.first else None,
    )

    def finish() -> dict[str, Any]:
        run = result.run
        best = run.history[run.best_epoch - 1]
        scores = {k.removeprefix("validation_"): v for k, v in best.items() if k.startswith("validation_")}
        state = adapters.merge_lora(result.state)
        told = {**record, "best_epoch": run.best_epoch, "validation": scores}
        calibration: Calibration | None = None
        unread: tuple[pl.DataFrame, dict[int, str]] = parts["validation"], {}
        if len(datasets["validation"]):
            model = model_folder.assembled(
                state,
                folder=output / "model",
                backbone=settings.model,
                taxonomy=chosen.taxonomy,
                spec=spec,
                info=told,
                softmax=settings.softmax,
                head=head,
                target_counts_N=chosen.target_counts(),
                device=device,
            )
            calibration, unread = _calibration(model, package, chosen, second_X, settings, record)
        failed = _failed(
            chosen, (parts["train"], run.failures), (parts["validation"], run.validation_failures), unread
        )
        with writing(output / "failed.csv", overwrite=True) as partial:
            failed.write_csv(partial)
        model_folder.save(
            output / "model",
            state,
            backbone=settings.model,
            taxonomy=chosen.taxonomy,
            spec=spec,
            record=told,
            history=run.history,
            softmax=settings.softmax,
            head=head,
            target_counts=chosen.target_counts(),
            calibration=calibration,
            overwrite=True,
        )
        run_folder.tidy(output)
        return {
            "model": str(output / "model"),
            "rank": settings.target_ranks[-1],
            "ranks": list(settings.target_ranks),
            "classes": chosen.taxonomy.num_leaves,
            "placeholders": chosen.placeholders,
            "training": len(datasets["train"]),
            "validation": len(datasets["validation"]),
            "calibration": int(second_X.sum()),
            "coarse": chosen.coarse("train"),
            "lifted": chosen.lifted,
            "left_out": chosen.left_out,
            "failed": failed.to_dicts(),
            "best_epoch": run.best_epoch,
            "epochs": len(run.history),
            "validation_scores": scores,
            "history": run.history,
            "temperature": None if calibration is None else calibration.temperature,
            "warnings": [] if calibration is None else calibration.info["warnings"],
        }

    return processes.by_first(finish)


def _calibration(
    model: model_folder.Model,
    package: Images,
    chosen: Specimens,
    second_X: NDArray[np.bool_],
    settings: TrainSettings,
    record: Mapping[str, Any],
) -> tuple[Calibration, tuple[pl.DataFrame, dict[int, str]]]:
    """The calibration on the validation specimens; and of the second part those that cannot be read."""
    known_X = (chosen.validation.table["node"] > 0).to_numpy()
    used_X = second_X | known_X  # the temperature has no use for other taxa than the model's
    labelled = replace(chosen.validation, table=chosen.validation.table.filter(pl.Series(used_X)))
    second_X = second_X[used_X]
    with calibrating.outputs_of(
        model,
        package,
        labelled.table["row"].to_numpy(),
        batch_size=settings.batch_size,
        workers=settings.workers,
    ) as outputs:
        told = {
            "experiment": settings.experiment,
            "roles": ["validation"],
            "share": settings.calibration_share,
            "seed": calibrating.SEED,
            "data_fingerprint": record["data_fingerprint"],
        }
        made = calibrating.calibrate(outputs, labelled, second_X, info=told)
    unread = {number: reason for number, reason in outputs.failures.items() if second_X[number]}
    return made, (labelled.table, unread)


def _advice(network: nn.Module, device: torch.device, processes: Processes) -> str | None:
    """What to know about a network that several processes train on CPUs."""
    if processes.size == 1 or device.type == "cuda":
        return None
    adapters.train_mode(network)
    if not has_batch_statistics(network):
        return None
    return (
        f"each of the {processes.size} processes has batch norms of its own, over its share of the batch: on "
        "CPUs they cannot work together, so the model differs from that of one process"
    )


def _refuse_too_little(chosen: Specimens, validation: pl.DataFrame, settings: TrainSettings) -> None:
    """A classifier needs two classes, batch norm two specimens, the criterion a validation part."""
    if chosen.taxonomy.num_leaves < 2:
        raise RequestError(
            f"all training specimens are {chosen.taxonomy.name(int(chosen.taxonomy.leaves_L[0]))}: there is "
            f"nothing to tell apart at rank {settings.target_ranks[-1]}; choose a lower --rank"
        )
    if validation.is_empty() and settings.criterion != "last":
        raise RequestError(
            f"{settings.experiment} has no validation specimens to choose an epoch by; "
            "pass --criterion last to keep the last epoch"
        )


def _failed(chosen: Specimens, *parts: tuple[pl.DataFrame, Mapping[int, str]]) -> pl.DataFrame:
    """Images that are absent or cannot be read: columns `key`, `image_file`, `error`.

    Each part is a table of specimens, and why some of its rows cannot be read.
    """
    columns = ("key", "image_file", "error")
    tables = [chosen.not_in_package.with_columns(pl.lit(NOT_IN_PACKAGE).alias("error")).select(columns)]
    for specimens, reasons in parts:
        rows = sorted(reasons)
        errors = pl.Series("error", [reasons[row] for row in rows], pl.String)
        tables.append(specimens[rows].with_columns(errors).select(columns))
    return pl.concat(tables)
