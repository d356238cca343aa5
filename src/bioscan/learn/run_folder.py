"""The folder of a training run: its record, checkpoint, best weights, history and TensorBoard curves.

Every file is written whole. The checkpoint is written after the best weights and the shards that it speaks
of, so that a kill at any moment leaves a state to go on from.
"""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from bioscan.errors import DataError, RequestError
from bioscan.files import locked, remove, writing
from bioscan.learn.ema import EMA
from bioscan.learn.model_folder import write_history, write_state

CHECKPOINT: Final = "checkpoint.pt"
_ONLY_TIME: Final = ("workers", "cache_mb", "patience")
"""Settings that a resumed run may change: they change no weight."""
_LINGER_S: Final = 10.0
"""How long the loader processes of a run that was killed may hold its lock: they look for it now and then."""
SAME_BITS: Final = ("processes", "threads", "device", "precision")
"""Facts of the record that decide how numbers are rounded; some are settings too, as asked for."""


@dataclass
class Run:
    """How far a run is, as its checkpoint keeps it."""

    epoch: int = 0
    """Epochs done."""
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = -1
    best_value: float = math.nan
    failures: dict[int, str] = field(default_factory=dict)
    """Number of a training specimen whose image cannot be read -> why."""
    validation_failures: dict[int, str] = field(default_factory=dict)


def open_run(
    folder: Path, record: Mapping[str, Any], *, resume: bool, overwrite: bool, inexact: bool = False
) -> bool:
    """Make a run folder or check the one that is there; True where there is a checkpoint to go on from.

    Args:
        folder: The run folder.
        record: What the run follows from; `settings`, `data_fingerprint`, `split_hash` and `taxonomy` must be
            those of the run to resume.
        resume: Go on with the run that is there.
        overwrite: Throw it away.
        inexact: Let it go on where SAME_BITS differ.

    Raises:
        RequestError: a run is there already, or the one to resume had other settings or data.
    """
    if resume and overwrite:
        raise RequestError("--resume goes on with a run, --overwrite throws it away: choose one")
    known = folder / "record.json"
    if known.is_file() and not overwrite:
        if (folder / "model" / "model.json").is_file():
            raise RequestError(f"{folder} holds a finished run; choose another --output or pass --overwrite")
        if not resume:
            raise RequestError(
                f"{folder} holds a run that stopped after {_epochs_done(folder)} epochs; "
                "pass --resume to go on or --overwrite"
            )
        _same_record(json.loads(known.read_text(encoding="utf-8")), record, folder, inexact=inexact)
        return (folder / CHECKPOINT).is_file()
    if resume:
        raise RequestError(f"{folder} holds no run to resume")
    if folder.exists() and not known.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"{folder} exists and is no run folder; choose another --output")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    with writing(known) as file:
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    return False


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A lock on a run folder, so that nobody else trains in it meanwhile: processes that torchrun started go
    on when it is killed. Nothing where there is no record yet.

    Raises:
        RequestError: another process trains in the folder.
    """
    with contextlib.ExitStack() as held:
        until = time.monotonic() + _LINGER_S
        while (folder / "record.json").is_file():
            try:
                held.enter_context(locked(folder / "record.json"))
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise RequestError(
                        f"another process trains in {folder}; let it end, or end it first"
                    ) from None
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        yield


def _same_record(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path, *, inexact: bool) -> None:
    plain = json.loads(json.dumps(new))
    was = old.get("settings", {})
    differing = [
        f"{name} was {was.get(name)!r}, is {value!r}"
        for name, value in plain["settings"].items()
        if was.get(name) != value and name not in (*_ONLY_TIME, *SAME_BITS)
    ]
    differing += [
        name for name in ("data_fingerprint", "split_hash", "taxonomy") if old.get(name) != plain.get(name)
    ]
    if differing:
        raise RequestError(f"{folder} cannot be resumed with other settings or data: {'; '.join(differing)}")
    changed = [
        f"{name} was {old[name]}, is {plain.get(name)}"
        for name in SAME_BITS
        if old.get(name) not in (None, plain.get(name))
    ]
    if changed and not inexact:
        way = ", or pass --inexact to end with a model that is as good, but rounded otherwise"
        raise RequestError(
            f"{folder} was begun otherwise: {', '.join(changed)}; go on as it was begun to end with the same "
            f"bits{way if 'processes' in plain else ''}"
        )


def _epochs_done(folder: Path) -> int:
    path = folder / CHECKPOINT
    return int(loaded(path, torch.device("cpu"))["run"]["epoch"]) if path.is_file() else 0


def loaded(path: Path, device: torch.device) -> dict[str, Any]:
    """The content of a checkpoint."""
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
    except Exception as error:  # noqa: BLE001 - a damaged archive makes the unpickler fail in any way
        raise DataError(f"{path}: cannot be read ({_first_line(error)})") from None
    return content


def save_epoch(
    folder: Path,
    run: Run,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: EMA | None = None,
) -> None:
    """Keep an epoch that is done: the weights if they are the best, the checkpoint, the history.

    With a running mean of the weights, that is what is best. For one process, or the first of several that
    each have the whole network.
    """
    if run.best_epoch == run.epoch:
        with averaged(ema):
            write_best(folder, run, network.state_dict())
    content = {
        "run": asdict(run),
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "ema": None if ema is None else ema.state_dict(),
    }
    write_checkpoint(folder, run, content)


def restore(
    folder: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    ema: EMA | None = None,
) -> Run:
    """Bring network, optimizer and running mean to the state of the checkpoint."""
    path = folder / CHECKPOINT
    content = loaded(path, device)
    with fitting(path):
        network.load_state_dict(content["network"])
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
        if ema is not None:
            ema.load_state_dict(content["ema"])
        return Run(**content["run"])


def averaged(ema: EMA | None) -> contextlib.AbstractContextManager[None]:
    """Within it, a network has its running mean, if there is one."""
    return contextlib.nullcontext() if ema is None else ema.applied()


def write_best(folder: Path, run: Run, state: Mapping[str, Tensor]) -> None:
    """Keep the weights of the best epoch so far."""
    with writing(_best_place(folder, run), overwrite=True) as file:
        write_state(file, state)


def write_checkpoint(folder: Path, run: Run, content: Mapping[str, Any]) -> None:
    """Write what a run goes on from, when everything that it speaks of is there, and the history."""
    with writing(folder / CHECKPOINT, overwrite=True) as partial, partial.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch then fails to end the archive, and says only that
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    for older in set(folder.glob("best-*.safetensors")) - {_best_place(folder, run)}:
        older.unlink()
    save_history(folder, run.history)


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Within it, a checkpoint of another network is told."""
    try:
        yield
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: cannot be resumed from ({_first_line(error)})") from None


def save_history(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write history.csv anew."""
    with writing(folder / "history.csv", overwrite=True) as file:
        write_history(file, history)


def best_state(folder: Path, run: Run) -> dict[str, Tensor]:
    """The weights of the epoch that is kept."""
    from safetensors.torch import load_file

    return load_file(_best_place(folder, run))


def tidy(folder: Path) -> None:
    """Remove what only a run that goes on needs."""
    for leftover in (
        folder / CHECKPOINT,
        *folder.glob("best-*.safetensors"),
        *folder.glob("shards-*"),
    ):
        remove(leftover)


class Board:
    """TensorBoard curves; a board of a resumed run is drawn anew, so that no kill leaves a gap."""

    def __init__(self, folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # tensorboard is left out of a slim installation; history.csv has all of it
            self._writer = None
            return
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self._writer = SummaryWriter(str(folder / "tensorboard"))
        for row in history:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """One epoch."""
        if self._writer is None:
            return
        for name, value in row.items():
            if name != "epoch" and value is not None:
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()


def _best_place(folder: Path, run: Run) -> Path:
    return folder / f"best-{run.best_epoch}.safetensors"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
