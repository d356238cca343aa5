"""The training loop: deterministic by seed, and the same after a kill as without one.

B: batch, L: leaf taxa.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from bioscan.errors import DataError, RequestError
from bioscan.learn import models, run_folder
from bioscan.learn.augmentation import Augmentation, to_network
from bioscan.learn.dataset import ImageSpec, SpecimenDataset
from bioscan.learn.loader import Batch, Loader, default_workers
from bioscan.learn.losses import LOSSES, Loss
from bioscan.learn.run_folder import Run
from bioscan.learn.settings import TrainSettings

Progress = Callable[..., None]

BETTER: Final[dict[str, int]] = {"macro_top_1": 1, "micro_top_1": 1, "loss": -1}
"""Criterion -> +1 where more is better, -1 where less is."""

_SYNC: Final = 16
"""Batches after which the losses are fetched from the device: each fetch waits for it."""


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
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loss_of: Loss
    device: torch.device
    precision: torch.dtype | None
    spec: ImageSpec
    settings: TrainSettings

    def forward(self, batch: Batch, augmentation: Augmentation | None = None) -> tuple[Tensor, Tensor]:
        """Float logits and targets of a batch, on the device."""
        images = to_network(
            batch.images_BCHW,
            self.spec,
            self.device,
            channels_last=self.settings.channels_last,
            augmentation=augmentation,
            draws_BD=batch.draws_BD,
        )
        with autocast(self.device, self.precision):
            logits_BL = self.network(images)
        return logits_BL.float(), batch.targets_B.to(self.device, non_blocking=True)


def fit(
    network: nn.Module,
    training: SpecimenDataset,
    validation: SpecimenDataset | None,
    *,
    num_leaves: int,
    spec: ImageSpec,
    settings: TrainSettings,
    folder: Path,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Train a network and keep the best epoch.

    After each epoch the folder holds a checkpoint from which `resume` goes on; with the same threads the
    result on a CPU is the same to the last bit, whatever the loader processes. Losses are means over
    specimens.

    Args:
        network: With one output per leaf.
        training: Targets are leaf numbers.
        validation: None: there is none, and the criterion must be `last`.
        num_leaves: Classes.
        spec: Normalisation.
        settings: The run's settings.
        folder: Run folder, made already.
        resume: Go on from the folder's checkpoint.
        progress: Called with specimens done and to do, over all epochs, and named values.

    Raises:
        DataError: no image can be read, or the loss is no number any more.
        RequestError: the device is not there, or its memory is too small.
    """
    parts = _parts(network, spec, settings)
    run = Run()
    if resume:
        run = run_folder.restore(folder, parts.network, parts.optimizer, parts.scaler, parts.device)
    augmentation = Augmentation.of(settings)
    board = run_folder.Board(folder, run.history)
    with contextlib.ExitStack() as stack:
        stack.callback(board.close)
        stack.enter_context(_memory_errors())

        def loader(dataset: SpecimenDataset, augmentation: Augmentation | None) -> Loader:
            return stack.enter_context(
                Loader(
                    dataset,
                    batch_size=settings.batch_size,
                    augmentation=augmentation,
                    seed=settings.seed,
                    shuffle=augmentation is not None,
                    workers=default_workers() if settings.workers is None else settings.workers,
                    pin_memory=parts.device.type == "cuda",
                )
            )

        batches = loader(training, augmentation)
        valid_batches = None if validation is None else loader(validation, None)
        while run.epoch < settings.epochs and not _out_of_patience(run, settings):
            started = time.monotonic()
            row = {
                "epoch": run.epoch + 1,
                **_train_epoch(parts, batches, run, augmentation, progress),
                **_validate(parts, valid_batches, run, num_leaves),
                "seconds": round(time.monotonic() - started, 2),
            }
            run.history.append(row)
            run.epoch += 1
            if _is_better(row, run, settings.criterion):
                run.best_epoch, run.best_value = run.epoch, _criterion_value(row, settings.criterion)
            run_folder.save_epoch(folder, run, parts.network, parts.optimizer, parts.scaler)
            board.add(row)
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
    settings, epoch, total = parts.settings, run.epoch, batches.batches.size
    torch.manual_seed(_epoch_seed(settings.seed, epoch))  # for dropout and the like
    parts.network.train()
    sums = np.zeros(3)  # specimens, loss, correct
    pending: list[Tensor] = []
    rate, seen = 0.0, 0
    for number, batch in enumerate(batches.epoch(epoch)):
        run.failures.update(batch.failures)
        seen += batch.size + len(batch.failures)
        if batch.size > 1:  # failures may leave one, which batch norm cannot train on
            rate = learning_rate(settings, epoch + number / len(batches))
            for group in parts.optimizer.param_groups:
                group["lr"] = rate
            logits_BL, targets_B = parts.forward(batch, augmentation)
            losses_B = parts.loss_of(logits_BL, targets_B)
            parts.optimizer.zero_grad(set_to_none=True)
            parts.scaler.scale(losses_B.mean()).backward()  # type: ignore[no-untyped-call]
            parts.scaler.step(parts.optimizer)
            parts.scaler.update()
            correct = (logits_BL.detach().argmax(1) == targets_B).sum()
            pending.append(
                torch.stack([torch.full_like(correct, batch.size), losses_B.detach().sum(), correct])
            )
        if len(pending) == _SYNC or (pending and number + 1 == len(batches)):
            sums += torch.stack(pending).cpu().double().sum(0).numpy()
            pending.clear()
            _check_finite(sums[1], epoch)
            if progress:
                done, loss = epoch * total + seen, sums[1] / sums[0]
                progress(done, settings.epochs * total, epoch=epoch + 1, loss=loss)
    if not sums[0]:
        raise DataError(
            f"{len(run.failures):,} of the {total:,} training images cannot be read; "
            f"first: {run.failures[min(run.failures)]}"
        )
    return {"lr": rate, "train_loss": float(sums[1] / sums[0]), "train_top_1": float(sums[2] / sums[0])}


# -- settings into parts


def _parts(network: nn.Module, spec: ImageSpec, settings: TrainSettings) -> _Parts:
    device = choose_device(settings.device)
    network = network.to(device)
    if settings.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    precision = choose_precision(settings.amp, device)
    return _Parts(
        network,
        make_optimizer(network, settings),
        torch.amp.GradScaler(device.type, enabled=precision is torch.float16),
        _loss(settings),
        device,
        precision,
        spec,
        settings,
    )


def image_spec_of(settings: TrainSettings, network: nn.Module) -> ImageSpec:
    """Sizes and normalisation of the network's input."""
    mean, std = models.normalisation(network) if settings.normalise else ((0.0,) * 3, (1.0,) * 3)
    return ImageSpec(image_size=settings.image_size, crop_size=settings.crop_size, mean=mean, std=std)


def choose_device(name: str) -> torch.device:
    """The device asked for, or the best there is."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError("no CUDA device here; pass --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise RequestError("no MPS device here; pass --device cpu")
    return torch.device(name)


def choose_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The 16-bit type to compute in, None for float32."""
    if amp == "bf16":
        return torch.bfloat16
    if amp == "fp16":
        if device.type != "cuda":
            raise RequestError(f"fp16 needs a CUDA device, this is {device.type}; use --amp auto")
        return torch.float16
    if amp == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if amp == "auto" and device.type == "cpu" and _cpu_has_bf16():
        return torch.bfloat16  # elsewhere bf16 is emulated and slower
    return None


def precision_name(amp: str, device: torch.device) -> str:
    """`float32`, `bfloat16` or `float16`, for the record."""
    return str(choose_precision(amp, device) or torch.float32).removeprefix("torch.")


def _cpu_has_bf16() -> bool:
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not in the oldest torch that we take
    return asked is not None and bool(asked())


def autocast(
    device: torch.device, precision: torch.dtype | None
) -> contextlib.AbstractContextManager[object]:
    """Mixed precision, or nothing at all for None."""
    return contextlib.nullcontext() if precision is None else torch.autocast(device.type, precision)


def make_optimizer(network: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW without decay on biases and norms, or SGD with Nesterov momentum and decay on all, as the paper
    has it.
    """
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.momentum > 0,
        )
    spared = [p for p in network.parameters() if p.ndim <= 1]
    decayed = [p for p in network.parameters() if p.ndim > 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": spared, "weight_decay": 0.0}],
        lr=settings.lr,
    )


def learning_rate(settings: TrainSettings, at: float) -> float:
    """The rate after so many epochs, a fraction within the running one included."""
    if settings.schedule == "steps":
        return settings.lr * 0.1 ** sum(at >= step for step in settings.steps)
    warmup = min(settings.warmup, settings.epochs - 1)
    if at < warmup:
        return settings.lr * (at + 0.01) / warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (at - warmup) / (settings.epochs - warmup)))


def _loss(settings: TrainSettings) -> Loss:
    options: dict[str, float] = (
        {"gamma": settings.focal_gamma}
        if settings.loss == "focal"
        else {"label_smoothing": settings.label_smoothing}
    )
    return partial(LOSSES[settings.loss], **options)


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise RequestError(
            "the device has too little memory; a smaller --batch-size or --crop-size needs less"
        ) from None


def _check_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise DataError(f"the loss became {loss} in epoch {epoch + 1}; a lower --lr usually helps")


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


# -- validation, and which epoch is kept


def _validate(parts: _Parts, batches: Loader | None, run: Run, num_leaves: int) -> dict[str, float | None]:
    if batches is None:
        return dict.fromkeys(("validation_loss", "validation_micro_top_1", "validation_macro_top_1"))
    support = np.zeros(num_leaves, np.int64)
    correct = np.zeros(num_leaves, np.int64)
    loss = 0.0
    parts.network.eval()
    with torch.inference_mode():
        for batch in batches.epoch():
            run.validation_failures.update(batch.failures)
            if not batch.size:
                continue
            logits_BL, targets_B = parts.forward(batch)
            loss += float(parts.loss_of(logits_BL, targets_B).sum())
            right = targets_B[logits_BL.argmax(1) == targets_B]
            support += np.bincount(batch.targets_B.numpy(), minlength=num_leaves)
            correct += np.bincount(right.cpu().numpy(), minlength=num_leaves)
    n = int(support.sum())
    if not n:
        failures = run.validation_failures
        raise DataError(
            f"none of the {len(failures):,} validation images can be read; first: {failures[min(failures)]}"
        )
    _check_finite(loss, run.epoch)
    present = support > 0  # macro over classes with support
    return {
        "validation_loss": loss / n,
        "validation_micro_top_1": float(correct.sum() / n),
        "validation_macro_top_1": float((correct[present] / support[present]).mean()),
    }


def _criterion_value(row: Mapping[str, Any], criterion: str) -> float:
    return float(row["epoch"]) if criterion == "last" else float(row[f"validation_{criterion}"])


def _is_better(row: Mapping[str, Any], run: Run, criterion: str) -> bool:
    value = _criterion_value(row, criterion)
    return math.isnan(run.best_value) or (value - run.best_value) * BETTER.get(criterion, 1) > 0


def _out_of_patience(run: Run, settings: TrainSettings) -> bool:
    return bool(settings.patience) and run.epoch - max(run.best_epoch, 0) >= (settings.patience or 0)
