"""The folder of a training run: its record, checkpoint, best weights, history and TensorBoard curves.

Every file is written whole. The checkpoint is written after the best weights that it speaks of, so that a
kill at any moment leaves a state to go on from.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from bioscan.errors import DataError, RequestError
from bioscan.files import writing
from bioscan.learn.model_folder import write_history, write_state

CHECKPOINT: Final = "checkpoint.pt"
_ONLY_TIME: Final = ("workers", "cache_mb", "patience")
"""Settings that a resumed run may change: they change no weight."""


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


def open_run(folder: Path, record: Mapping[str, Any], *, resume: bool, overwrite: bool) -> bool:
    """Make a run folder or check the one that is there; True where there is a checkpoint to go on from.

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
        _same_record(json.loads(known.read_text(encoding="utf-8")), record, folder)
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


def _same_record(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    plain = json.loads(json.dumps(new))
    was = old.get("settings", {})
    differing = [
        f"{name} was {was.get(name)!r}, is {value!r}"
        for name, value in plain["settings"].items()
        if was.get(name) != value and name not in _ONLY_TIME
    ]
    differing += [
        name for name in ("data_fingerprint", "split_hash", "taxonomy") if old.get(name) != plain.get(name)
    ]
    if differing:
        raise RequestError(f"{folder} cannot be resumed with other settings or data: {'; '.join(differing)}")


def _epochs_done(folder: Path) -> int:
    path = folder / CHECKPOINT
    return int(_loaded(path, torch.device("cpu"))["run"]["epoch"]) if path.is_file() else 0


def _loaded(path: Path, device: torch.device) -> dict[str, Any]:
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
) -> None:
    """Keep an epoch that is done: the weights if they are the best, the checkpoint, the history."""
    if run.best_epoch == run.epoch:
        with writing(_best_place(folder, run), overwrite=True) as file:
            write_state(file, network.state_dict())
    content = {
        "run": asdict(run),
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    with writing(folder / CHECKPOINT, overwrite=True) as file:
        torch.save(content, file)
    for older in set(folder.glob("best-*.safetensors")) - {_best_place(folder, run)}:
        older.unlink()
    save_history(folder, run.history)


def save_history(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write history.csv anew."""
    with writing(folder / "history.csv", overwrite=True) as file:
        write_history(file, history)


def restore(
    folder: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> Run:
    """Bring network and optimizer to the state of the checkpoint."""
    path = folder / CHECKPOINT
    content = _loaded(path, device)
    try:
        network.load_state_dict(content["network"])
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
        return Run(**content["run"])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: cannot be resumed from ({_first_line(error)})") from None


def best_state(folder: Path, run: Run) -> dict[str, Tensor]:
    """The weights of the epoch that is kept."""
    from safetensors.torch import load_file

    return load_file(_best_place(folder, run))


def tidy(folder: Path) -> None:
    """Remove what only a run that goes on needs."""
    for leftover in (folder / CHECKPOINT, *folder.glob("best-*.safetensors")):
        leftover.unlink(missing_ok=True)


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


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
