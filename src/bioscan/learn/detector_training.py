"""The training loop of a detector: deterministic by seed on a CPU, and the same after a kill as without one.

B: batch, P: pictures.
"""

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from bioscan.analysis.boxes import Boxes, evaluate_boxes
from bioscan.errors import DataError, ImageError, RequestError
from bioscan.learn import run_folder
from bioscan.learn.detection import Floats, raw_boxes
from bioscan.learn.detector_images import (
    Batch,
    InputSpec,
    Jitter,
    Picture,
    batches,
    epoch_order,
    read_picture,
    to_network,
)
from bioscan.learn.detector_models import is_backbone
from bioscan.learn.detector_network import DetectorNetwork
from bioscan.learn.detector_settings import DetectorSettings
from bioscan.learn.device import autocast, choose_device, choose_precision
from bioscan.learn.loader import default_workers
from bioscan.learn.run_folder import Run

Progress = Callable[..., None]

_SYNC: Final = 16
"""Steps after which the losses are fetched from the device: each fetch waits for it."""
_SHOWN: Final = ("ap", "ap_50", "ap_75", "ar", "mean_iou", "median_iou")


@dataclass(frozen=True)
class Result:
    """What a finished run gives."""

    state: dict[str, Tensor]
    """The kept epoch's network."""
    run: Run


class _Trainee(nn.Module):
    """The network that learns, and the running mean of its weights, in one state dict."""

    def __init__(self, network: DetectorNetwork, decay: float) -> None:
        super().__init__()
        self.network, self.decay = network, decay
        self.average = copy.deepcopy(network).requires_grad_(False) if decay else None

    @property
    def kept(self) -> DetectorNetwork:
        """The network that is evaluated and kept."""
        return self.network if self.average is None else self.average

    @property
    def prefix(self) -> str:
        """Of the kept network's entries in the state dict."""
        return "network." if self.average is None else "average."

    def follow(self, step: int) -> None:
        """Move the running mean after a step; early on it forgets faster, so that it is no mean of noise."""
        if self.average is None:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(_values(self.average), _values(self.network), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(value.to(mean.dtype), 1 - decay)
                else:
                    mean.copy_(value)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As usual, but no two entries share memory, which safetensors does not take (tied weights)."""
        seen: set[int] = set()
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = value.clone() if value.data_ptr() in seen else value
                seen.add(value.data_ptr())
        return state


def _values(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def fit(
    network: DetectorNetwork,
    training: Sequence[Sequence[Picture]],
    validation: Sequence[Picture],
    *,
    spec: InputSpec,
    settings: DetectorSettings,
    folder: Path,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Train a detector and keep the best epoch.

    After each epoch the folder holds a checkpoint from which `resume` goes on; with the same threads the
    result on a CPU is the same to the last bit.

    Args:
        network: A `DetectorNetwork`.
        training: Sets of pictures; see `DetectorSettings.balance`.
        validation: May be empty where the criterion is `last`.
        spec: What the network sees.
        settings: The run's settings.
        folder: Run folder, made already.
        resume: Go on from the folder's checkpoint.
        progress: Called with pictures done and to do, over all epochs, and named values.

    Raises:
        DataError: no picture can be read, or the loss is no number any more.
        RequestError: the device is not there, or its memory is too small.
    """
    device = choose_device(settings.device)
    trainee = _Trainee(network.to(device).to(memory_format=torch.channels_last), settings.ema)  # type: ignore[call-overload]
    optimizer = _optimizer(trainee.network, settings)
    precision = choose_precision(settings.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
    run = Run()
    if resume:
        run = run_folder.restore(folder, trainee, optimizer, scaler, device)
    loop = _Loop(trainee, optimizer, scaler, device, precision, spec, settings, training)
    board = run_folder.Board(folder, run.history)
    with contextlib.closing(board):
        while run.epoch < loop.epochs:
            started = time.monotonic()
            row: dict[str, Any] = {"epoch": run.epoch + 1, **loop.epoch(run, progress)}
            row |= _validate(loop, run, validation)
            row["seconds"] = round(time.monotonic() - started, 2)
            run.history.append(row)
            run.epoch += 1
            value = row["validation_ap"] if settings.criterion == "ap" else float(run.epoch)
            if math.isnan(run.best_value) or value > run.best_value:
                run.best_epoch, run.best_value = run.epoch, value
            run_folder.save_epoch(folder, run, trainee, optimizer, scaler)
            board.add(row)
    run_folder.save_history(folder, run.history)
    state = run_folder.best_state(folder, run)
    prefix = trainee.prefix
    return Result({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, run)


@dataclass(frozen=True)
class _Loop:
    """What a step needs."""

    trainee: _Trainee
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    precision: torch.dtype | None
    spec: InputSpec
    settings: DetectorSettings
    training: Sequence[Sequence[Picture]]

    @property
    def sizes(self) -> list[int]:
        """Pictures of each set."""
        return [len(pictures) for pictures in self.training]

    @property
    def steps_an_epoch(self) -> int:
        """Batches of an epoch; see `batches`."""
        size, batch = sum(self.sizes), self.settings.batch_size
        return max(1, -(-size // batch) - (size % batch == 1))

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        steps = self.settings.epochs * self.steps_an_epoch
        return min(steps, self.settings.max_steps or steps)

    @property
    def epochs(self) -> int:
        """Epochs until the steps are done."""
        return -(-self.steps // self.steps_an_epoch)

    def rate(self, step: int) -> float:
        """Learning rate at a step, as a share of the highest."""
        warmup = min(self.settings.warmup, self.steps - 1)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.settings.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup)))

    def epoch(self, run: Run, progress: Progress | None) -> dict[str, Any]:
        """One pass over the training pictures; its part of the history's row."""
        settings, epoch = self.settings, run.epoch
        first, total = epoch * self.steps_an_epoch, sum(self.sizes)
        torch.manual_seed(int(np.random.SeedSequence((settings.seed, epoch)).generate_state(1)[0]))
        self.trainee.train()
        pictures = [picture for pictures in self.training for picture in pictures]
        order = epoch_order(self.sizes, balance=settings.balance, seed=settings.seed, epoch=epoch)
        made = batches(
            pictures,
            self.spec,
            order=order,
            batch_size=settings.batch_size,
            jitter=Jitter.of(settings),
            seed=settings.seed,
            epoch=epoch,
            workers=settings.workers or max(1, default_workers()),
        )
        losses, pending, rate, seen = [], [], 0.0, 0
        for step, batch in enumerate(itertools.islice(made, self.steps - first), start=first):
            run.failures.update(batch.failures)
            seen += len(batch.boxes) + len(batch.failures)
            if len(batch.boxes) > 1:  # failures may leave one, which batch norm cannot train on
                rate = self.rate(step)
                pending.append(self.step(batch, rate, step))
            if len(pending) == _SYNC or (pending and seen >= total):
                losses += torch.stack(pending).tolist()
                pending.clear()
                _check_finite(losses[-1], epoch)
                if progress:
                    progress(epoch * total + seen, self.epochs * total, epoch=epoch + 1, loss=losses[-1])
        losses += torch.stack(pending).tolist() if pending else []
        if not losses:
            raise DataError(
                f"{len(run.failures):,} of the {total:,} training pictures cannot be read; "
                f"first: {run.failures[min(run.failures)]}"
            )
        _check_finite(losses[-1], epoch)
        return {"lr": rate * settings.rates[1], "train_loss": float(np.mean(losses))}

    def step(self, batch: Batch, rate: float, step: int) -> Tensor:
        """One step; the loss, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["highest"]
        try:
            images = to_network(
                batch.images_BCHW,
                batch.mask_BHW,
                self.spec,
                self.device,
                colour=self.settings.colour,
                draws_BD=batch.draws_BD,
            )
            with autocast(self.device, self.precision):
                loss: Tensor = self.trainee.network.loss(images, batch.mask_BHW, batch.boxes)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        except torch.cuda.OutOfMemoryError:
            raise RequestError(
                "the device has too little memory; a smaller --batch-size or --image-size needs less"
            ) from None
        if self.settings.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trainee.network.parameters(), self.settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.trainee.follow(step)
        return loss.detach().float()


def _optimizer(network: nn.Module, settings: DetectorSettings) -> torch.optim.Optimizer:
    """AdamW with rates of their own for the backbone and the rest, without decay on biases and norms."""
    groups = []
    for backbone, highest in zip((True, False), settings.rates, strict=True):
        own = [p for n, p in network.named_parameters() if is_backbone(n) is backbone and p.requires_grad]
        for flat, decay in ((False, settings.weight_decay), (True, 0.0)):
            chosen = [p for p in own if (p.ndim <= 1) is flat]
            if chosen:
                groups.append({"params": chosen, "lr": highest, "highest": highest, "weight_decay": decay})
    return torch.optim.AdamW(groups)


def _check_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise DataError(f"the loss became {loss} in epoch {epoch + 1}; a lower --lr usually helps")


# -- validation


def _validate(loop: _Loop, run: Run, validation: Sequence[Picture]) -> dict[str, Any]:
    if not validation:
        return {f"validation_{name}": None for name in _SHOWN}
    network = loop.trainee.kept.eval()
    found, truths, failures = find_all(
        network,
        validation,
        loop.spec,
        device=loop.device,
        precision=loop.precision,
        batch_size=loop.settings.batch_size,
    )
    run.validation_failures.update(failures)
    return {f"validation_{name}": value for name, value in scores(found, truths).items()}


def find_all(
    network: DetectorNetwork,
    pictures: Sequence[Picture],
    spec: InputSpec,
    *,
    device: torch.device,
    precision: torch.dtype | None,
    batch_size: int,
) -> tuple[list[tuple[Floats, Floats]], list[Floats], dict[int, str]]:
    """Found and true boxes of the pictures that can be read, and why the others cannot.

    Raises:
        DataError: none can be read.
    """
    found: list[tuple[Floats, Floats]] = []
    truths: list[Floats] = []
    failures: dict[int, str] = {}
    for start in range(0, len(pictures), batch_size):
        pixels = []
        for number, picture in enumerate(pictures[start : start + batch_size], start):
            try:
                image, boxes = read_picture(picture, spec.size)
            except ImageError as error:
                failures[number] = f"{error.reason} ({error.place})"
                continue
            pixels.append(image)
            truths.append(boxes)
        found += raw_boxes(network, pixels, spec, device=device, precision=precision, batch_size=batch_size)
    if not found:
        raise DataError(
            f"none of the {len(failures):,} validation pictures can be read; first: {failures[min(failures)]}"
        )
    return found, truths, failures


def scores(found: Sequence[tuple[Floats, Floats]], truths: Sequence[Floats]) -> dict[str, float]:
    """AP and its kin with the best box of each picture, as COCO counts them."""
    best = Boxes(
        np.flatnonzero([len(boxes) > 0 for boxes, _ in found]),
        np.concatenate([boxes[:1] for boxes, _ in found]),
        np.concatenate([values[:1] for _, values in found]),
    )
    counts = [len(boxes) for boxes in truths]
    true = Boxes(np.repeat(np.arange(len(truths)), counts), np.concatenate(truths), np.ones(sum(counts)))
    evaluation = evaluate_boxes(best, true, len(truths), np.random.default_rng(0), resamples=0)
    return {name: evaluation.measures[name].value for name in _SHOWN}
