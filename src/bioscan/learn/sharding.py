"""A network that is spread over processes (FSDP2), and its checkpoints, to which each process writes its
shards.

Apart from the rest, as torch takes seconds to load what this needs.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as write_shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from bioscan.errors import DataError
from bioscan.files import remove
from bioscan.learn.distributed import Processes
from bioscan.learn.ema import EMA
from bioscan.learn.run_folder import (
    CHECKPOINT,
    Run,
    averaged,
    fitting,
    loaded,
    write_best,
    write_checkpoint,
)


def spread(network: nn.Module, processes: Processes) -> None:
    """Spread a network's parts over the processes, in place: each block by itself, then the rest."""
    mesh = init_device_mesh(next(network.parameters()).device.type, (processes.size,))
    for child in network.children():
        for block in child.children() if isinstance(child, nn.ModuleList | nn.Sequential) else ():
            if any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def sum_gradients(network: nn.Module, *, now: bool) -> None:
    """Whether the next backward pass sums the gradients of all processes, or keeps them for a later one."""
    assert isinstance(network, FSDPModule)
    network.set_requires_gradient_sync(now)


def save_shards(
    folder: Path,
    run: Run,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    processes: Processes,
) -> None:
    """As `save_epoch`, for a network that is spread over processes: each writes its shards.

    To be called by all of them. The checkpoint names the folder of the shards, which is complete by then.
    """
    place = folder / f"shards-{run.epoch}"
    processes.by_first(lambda: remove(place))  # of a run that was killed here
    state = _spread_state(network, optimizer, ema)
    try:
        with _quiet():
            write_shards(state, checkpoint_id=place, no_dist=processes.size == 1)
    except CheckpointException as error:
        remove(place)
        raise DataError(  # of a full disk torch says only that an archive did not end where it should
            f"{place}: the checkpoint cannot be written; is there room on the disk? ({_reason(error)})"
        ) from None
    if run.best_epoch == run.epoch:
        with averaged(ema):
            whole: dict[str, Any] = get_model_state_dict(
                network, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
            )
            if processes.first:
                write_best(folder, run, whole)
    if processes.first:
        write_checkpoint(folder, run, {"run": asdict(run), "shards": place.name})
        for older in set(folder.glob("shards-*")) - {place}:
            remove(older)


def restore_shards(
    folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None, processes: Processes
) -> Run:
    """As `restore`, from the shards of any number of processes."""
    path = folder / CHECKPOINT
    content = loaded(path, torch.device("cpu"))
    with fitting(path):
        state = _spread_state(network, optimizer, ema)
        try:
            with _quiet():
                load_shards(state, checkpoint_id=folder / content["shards"], no_dist=processes.size == 1)
        except CheckpointException as error:
            raise DataError(f"{path}: its shards cannot be read ({_reason(error)})") from None
        set_state_dict(
            network,
            optimizer,
            model_state_dict=state["network"],
            optim_state_dict=state["optimizer"],
        )
        if ema is not None:
            ema.load_state_dict(state["ema"])
        return Run(**content["run"])


def _spread_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None
) -> dict[str, dict[str, Any]]:
    of_network, of_optimizer = get_state_dict(network, optimizer)
    return {
        "network": of_network,
        "optimizer": of_optimizer,
        "ema": {} if ema is None else ema.state_dict(),
    }


def _reason(error: CheckpointException) -> BaseException:
    """What the first of the processes that failed has met."""
    met: BaseException = next(iter(error.failures.values()))[0]
    return met


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that one process saves or loads alone, as it was told to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield
