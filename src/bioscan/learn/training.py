"""The training loop: deterministic by seed, and the same after a kill as without one, whether one process
trains or several do.

B: batch, C: channel, H, W: pixels, L: leaf taxa, M: outputs of the network, N: nodes of the taxonomy.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import DataError, RequestError
from bioscan.learn import distributed, models, run_folder
from bioscan.learn.adapters import train_mode
from bioscan.learn.augmentation import DRAWS, Augmentation, to_network
from bioscan.learn.dataset import ImageSpec, SpecimenDataset
from bioscan.learn.device import autocast, choose_device, choose_precision
from bioscan.learn.distributed import ONE, Processes
from bioscan.learn.ema import EMA
from bioscan.learn.loader import Batch, Loader, default_workers
from bioscan.learn.losses import LeafLoss, leaf_logits
from bioscan.learn.mixing import mix
from bioscan.learn.optimisation import learning_rate, make_optimizer, set_rate
from bioscan.learn.run_folder import Run
from bioscan.learn.settings import TrainSettings
from bioscan.learn.validation import criterion_value, is_better, out_of_patience, score_names, validate

Progress = Callable[..., None]

_SYNC: Final = 16
"""Steps after which the losses are fetched from the device: each fetch waits for it."""


@dataclass(frozen=True)
class Result:
    """What a finished run gives."""

    state: dict[str, Tensor]
    """The kept epoch's network."""
    run: Run


@dataclass(frozen=True)
class _Parts:
    """What a step needs, made from the settings."""

    network: nn.Module
    wrapped: nn.Module
    """The network as it is called in training: itself, or behind DDP."""
    spread: bool
    """Over processes, by `sharding`."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: EMA | None
    loss: LeafLoss
    leaf_logits: nn.Module
    first_N: Tensor
    end_N: Tensor
    """The leaves below node n are first_N[n] to end_N[n] - 1; on the device."""
    device: torch.device
    precision: torch.dtype | None
    spec: ImageSpec
    settings: TrainSettings
    processes: Processes

    def images(self, batch: Batch, augmentation: Augmentation | None = None) -> Tensor:
        """A batch as the network takes it, on the device."""
        return to_network(
            batch.images_BCHW,
            self.spec,
            self.device,
            channels_last=self.settings.channels_last,
            augmentation=augmentation,
            draws_BD=batch.draws_BD,
            dtype=_dtype(self.network),
        )

    @contextlib.contextmanager
    def summing(self, *, now: bool) -> Iterator[None]:
        """Around a backward pass: whether it sums the gradients of all processes, or leaves that to a later
        one.
        """
        if self.spread:
            from bioscan.learn import sharding

            sharding.sum_gradients(self.network, now=now)
        with contextlib.ExitStack() as stack:
            if isinstance(self.wrapped, DistributedDataParallel) and not now:
                stack.enter_context(self.wrapped.no_sync())
            yield

    def save(self, folder: Path, run: Run) -> None:
        """Keep an epoch that is done; to be called by all processes."""
        if self.settings.distribute == "fsdp":
            from bioscan.learn import sharding

            sharding.save_shards(folder, run, self.network, self.optimizer, self.ema, self.processes)
        elif self.processes.first:
            run_folder.save_epoch(folder, run, self.network, self.optimizer, self.scaler, self.ema)

    def restore(self, folder: Path) -> Run:
        """The state of the run folder's checkpoint; to be called by all processes."""
        if self.settings.distribute == "fsdp":
            from bioscan.learn import sharding

            return sharding.restore_shards(folder, self.network, self.optimizer, self.ema, self.processes)
        return run_folder.restore(folder, self.network, self.optimizer, self.scaler, self.device, self.ema)


def fit(
    network: nn.Module,
    training: SpecimenDataset,
    validation: SpecimenDataset | None,
    *,
    taxonomy: Taxonomy,
    loss: LeafLoss,
    spec: ImageSpec,
    settings: TrainSettings,
    folder: Path,
    resume: bool = False,
    processes: Processes = ONE,
    progress: Progress | None = None,
) -> Result:
    """Train a network and keep the best epoch.

    After each epoch the folder holds a checkpoint from which `resume` goes on; with the same processes and
    threads the result on a CPU is the same to the last bit, whatever the loader processes. Losses are means
    over specimens.

    Several processes share each batch of `settings.batch_size`. But for rounding, they and
    `settings.accumulate` parts give what one process with one part does, unless the network looks at a part
    of a batch as a whole, as batch norm does, or draws random numbers, as dropout does.

    Args:
        network: With as many outputs as `losses.outputs_of` says; what is frozen stays so.
        training: Targets are nodes of the taxonomy.
        validation: Likewise; None: there is none, and the criterion must be `last`.
        taxonomy: The tree.
        loss: From `losses.make_loss`.
        spec: Normalisation.
        settings: The run's settings.
        folder: Run folder, made already; the same for all processes.
        resume: Go on from the folder's checkpoint.
        processes: That train together, all with the same arguments.
        progress: Called with specimens done and to do, over all epochs, and named values.

    Returns:
        The state is empty in all processes but the first.

    Raises:
        DataError: no image can be read, or the loss is no number any more.
        RequestError: the device is not there, or its memory is too small.
    """
    parts = _parts(network, taxonomy, loss, spec, settings, processes)
    run = parts.restore(folder) if resume else Run()
    augmentation = Augmentation.of(settings)
    workers = default_workers(processes.local_size) if settings.workers is None else settings.workers
    with contextlib.ExitStack() as stack:
        stack.enter_context(_memory_errors())
        board = None
        if processes.first:
            board = run_folder.Board(folder, run.history)
            stack.callback(board.close)

        def loader(dataset: SpecimenDataset, augmentation: Augmentation | None) -> Loader:
            return stack.enter_context(
                Loader(
                    dataset,
                    batch_size=settings.batch_size,
                    augmentation=augmentation,
                    seed=settings.seed,
                    shuffle=augmentation is not None,
                    sampler=settings.sampler,
                    repeat_threshold=settings.repeat_threshold,
                    rank=processes.rank,
                    processes=processes.size,
                    parts=settings.accumulate,
                    workers=workers,
                    pin_memory=parts.device.type == "cuda",
                )
            )

        batches = loader(training, augmentation)
        valid_batches = None if validation is None else loader(validation, None)
        while run.epoch < settings.epochs and not out_of_patience(run, settings.patience):
            started = time.monotonic()
            row = {
                "epoch": run.epoch + 1,
                **_train_epoch(parts, batches, run, augmentation, progress),
                **_validate(parts, valid_batches, run, taxonomy),
                "seconds": round(time.monotonic() - started, 2),
            }
            run.history.append(row)
            run.epoch += 1
            if is_better(row, run, settings.criterion):
                run.best_epoch, run.best_value = run.epoch, criterion_value(row, settings.criterion)
            parts.save(folder, run)
            if board is not None:
                board.add(row)
    if not processes.first:
        return Result({}, run)
    run_folder.save_history(folder, run.history)
    return Result(run_folder.best_state(folder, run), run)


def _train_epoch(
    parts: _Parts,
    batches: Loader,
    run: Run,
    augmentation: Augmentation,
    progress: Progress | None,
) -> dict[str, Any]:
    """One pass over the training specimens; its part of the history's row."""
    settings, epoch, processes = parts.settings, run.epoch, parts.processes
    torch.manual_seed(_epoch_seed(settings.seed, epoch, processes.rank))  # for dropout and the like
    train_mode(parts.network)
    sums = np.zeros(3)  # specimens, loss, correct
    pending: list[Tensor] = []
    failures: dict[int, str] = {}
    rate = 0.0
    for number, step in enumerate(batches.steps(epoch)):
        for batch in step:
            failures.update(batch.failures)
        specimens = int(processes.total(np.array([sum(batch.counted for batch in step)]))[0])
        if specimens > 1:  # failures may leave one, which batch norm cannot train on
            rate = learning_rate(settings, epoch + number / len(batches))
            set_rate(parts.optimizer, rate)
            pending += _step(parts, step, specimens, augmentation, epoch / settings.epochs)
        done = batches.batches.spans[number][1]
        total = batches.batches.spans[-1][1]
        if (number + 1) % _SYNC == 0 or number + 1 == len(batches):
            here = torch.stack(pending).cpu().double().sum(0).numpy() if pending else np.zeros(3)
            sums += processes.total(here)
            pending.clear()
            _check_finite(sums[1], epoch)
            if progress and sums[0]:
                values = {"epoch": epoch + 1, "loss": sums[1] / sums[0]}
                progress(epoch * total + done, settings.epochs * total, **values)
    run.failures.update(processes.merged(failures))
    if not sums[0]:
        raise DataError(
            f"{len(run.failures):,} of the {batches.batches.targets_N.size:,} training images cannot be "
            f"read; first: {run.failures[min(run.failures)]}"
        )
    return {"lr": rate, "train_loss": float(sums[1] / sums[0]), "train_top_1": float(sums[2] / sums[0])}


def _step(
    parts: _Parts, step: list[Batch], specimens: int, augmentation: Augmentation, done: float
) -> list[Tensor]:
    """One step of the optimizer.

    Args:
        parts: The network and what goes with it.
        step: This process's share of the batch, in parts.
        specimens: How many all processes have in the batch, at least 2.
        augmentation: Of the images.
        done: Share of the run's epochs that are over.

    Returns:
        Of each part: specimens, sum of their losses, how many are right; on the device.
    """
    parts.optimizer.zero_grad(set_to_none=True)
    tallies = []
    for number, batch in enumerate(step):
        if batch.counted or parts.processes.size > 1:  # all processes must go through the network alike
            with parts.summing(now=number + 1 == len(step)):
                tallies.append(_learn(parts, batch, specimens, augmentation, done))
    if parts.settings.clip_norm is not None:
        parts.scaler.unscale_(parts.optimizer)
        nn.utils.clip_grad_norm_(parts.network.parameters(), parts.settings.clip_norm)
    parts.scaler.step(parts.optimizer)
    parts.scaler.update()
    if parts.ema is not None:
        parts.ema.update()
    return tallies


def _learn(parts: _Parts, batch: Batch, specimens: int, augmentation: Augmentation, done: float) -> Tensor:
    """Forward and backward of one part of a step."""
    settings = parts.settings
    counted = batch.counted
    batch = _enough(batch, settings.crop_size, two=distributed.has_batch_statistics(parts.network))
    targets_B = batch.targets_B.to(parts.device, non_blocking=True)
    images = parts.images(batch, augmentation)
    mixed = None
    if settings.mixup or settings.cutmix:
        mixed = mix(images, batch.draws_BD, settings, batch.places_B)
        images = mixed.images_BCHW
    with autocast(parts.device, parts.precision):
        outputs_BM = parts.wrapped(images)

    def loss_of(targets_B: Tensor) -> Tensor:
        losses_B: Tensor = parts.loss(outputs_BM, targets_B, done)
        return losses_B

    losses_B = loss_of(targets_B) if mixed is None else mixed.losses(loss_of, targets_B)
    weight = counted / batch.size  # 1, or 0 where nothing counts, or 1/2 where one specimen is there twice
    # DDP and FSDP take the mean over processes, which undoes the factor
    loss = losses_B.sum() * (weight * parts.processes.size / specimens)
    parts.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        leaf_B = parts.leaf_logits(outputs_BM).argmax(1)
        correct_B = (leaf_B >= parts.first_N[targets_B]) & (leaf_B < parts.end_N[targets_B])
        correct = correct_B.sum() * weight
        return torch.stack([torch.full_like(correct, counted), losses_B.sum() * weight, correct])


def _enough(batch: Batch, crop_size: int, *, two: bool) -> Batch:
    """The batch with an image at least, or with two: a black one that counts for nothing where none could be
    read, and the only one twice.
    """
    if batch.size == 0:
        nothing = torch.zeros(1, dtype=torch.int64)
        black = torch.zeros((1, 3, crop_size, crop_size), dtype=torch.uint8)
        batch = Batch(black, nothing, nothing, torch.full((1, len(DRAWS)), 0.5), nothing - 1, batch.failures)
    if two and batch.size == 1:
        fields = batch._asdict()
        twice = {name: torch.cat([fields[name]] * 2) for name in fields if name != "failures"}
        batch = Batch(**twice, failures=batch.failures)
    return batch


def _validate(parts: _Parts, batches: Loader | None, run: Run, taxonomy: Taxonomy) -> dict[str, float | None]:
    if batches is None:
        return dict.fromkeys(score_names(taxonomy))

    def measure(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        batch = _enough(batch, parts.settings.crop_size, two=False)
        targets_B = batch.targets_B.to(parts.device, non_blocking=True)
        with autocast(parts.device, parts.precision):
            outputs_BM = parts.network(parts.images(batch))
        leaf_B = parts.leaf_logits(outputs_BM).argmax(1)
        loss_B = parts.loss(outputs_BM, targets_B, 1.0)  # as it ends, so that epochs can be compared
        return leaf_B, loss_B, parts.loss.takes(targets_B)

    # batch norms of processes that each have their own have drifted apart
    parts.processes.as_first(parts.network.buffers())
    if parts.ema is not None:
        parts.processes.as_first(parts.ema.state_dict()["means"].values())
    parts.network.eval()
    with contextlib.nullcontext() if parts.ema is None else parts.ema.applied(), torch.no_grad():
        scores, failures = validate(batches.epoch(), measure, taxonomy, parts.processes)
    run.validation_failures.update(failures)
    if scores["validation_micro_top_1"] is None:
        raise DataError(
            f"none of the {len(failures):,} validation images can be read; first: {failures[min(failures)]}"
        )
    if scores["validation_loss"] is not None:
        _check_finite(scores["validation_loss"], run.epoch)
    return scores


# -- settings into parts


def _parts(
    network: nn.Module,
    taxonomy: Taxonomy,
    loss: LeafLoss,
    spec: ImageSpec,
    settings: TrainSettings,
    processes: Processes,
) -> _Parts:
    device = choose_device(settings.device, processes.local_rank)
    precision = choose_precision(settings.amp, device)
    spread = settings.distribute == "fsdp" and processes.size > 1
    if settings.distribute == "fsdp" and precision is torch.float16:  # shards do not hold its loss scale
        raise RequestError("fsdp does not go with fp16; pass --amp bf16, or --amp off")
    network = network.to(device)
    if processes.size > 1 and device.type == "cuda":
        network = distributed.with_common_statistics(network)
    if settings.channels_last and not spread:  # what is spread must be contiguous
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if settings.compile:
        network.compile()
    wrapped = network
    if spread:
        from bioscan.learn import sharding

        sharding.spread(network, processes)
    elif processes.size > 1:
        wrapped = distributed.copied(network, settings.crop_size)
    return _Parts(
        network=network,
        wrapped=wrapped,
        spread=spread,
        optimizer=make_optimizer(network, settings),
        scaler=torch.amp.GradScaler(device.type, enabled=precision is torch.float16),
        ema=EMA(network, settings.ema) if settings.ema else None,
        loss=loss.to(device),
        leaf_logits=leaf_logits(taxonomy, settings.softmax).to(device),
        first_N=torch.from_numpy(taxonomy.first_leaf_N).to(device),
        end_N=torch.from_numpy(taxonomy.end_leaf_N).to(device),
        device=device,
        precision=precision,
        spec=spec,
        settings=settings,
        processes=processes,
    )


def image_spec_of(settings: TrainSettings, network: nn.Module) -> ImageSpec:
    """Sizes and normalisation of the network's input."""
    mean, std = models.normalisation(network) if settings.normalise else ((0.0,) * 3, (1.0,) * 3)
    return ImageSpec(image_size=settings.image_size, crop_size=settings.crop_size, mean=mean, std=std)


def _dtype(network: nn.Module) -> torch.dtype:
    return next(p.dtype for p in network.parameters() if p.is_floating_point())


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise RequestError(
            "the device has too little memory; more parts (--accumulate), a smaller --batch-size or "
            "--crop-size need less"
        ) from None


def _check_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise DataError(f"the loss became {loss} in epoch {epoch + 1}; a lower --lr usually helps")


def _epoch_seed(seed: int, epoch: int, rank: int) -> int:
    key = (seed, epoch, rank) if rank else (seed, epoch)
    return int(np.random.SeedSequence(key).generate_state(1)[0])
