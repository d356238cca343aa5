"""Training in several processes that torchrun or srun started; without these, in one.

Each process has a share of every batch. DDP gives each a copy of the network; `sharding` spreads its parts
over them. The first process alone writes and speaks.
"""

import contextlib
import itertools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from bioscan.errors import BioscanError, DataError, RequestError
from bioscan.learn.compat import import_timm
from bioscan.learn.device import choose_device

Value = TypeVar("Value")

_PATIENCE: Final = timedelta(hours=1)
"""How long a process waits for the others: the first may index a package of a million images meanwhile."""
_LETTING_GO: Final = 0.3
"""Seconds that the threads of a process group have to let go of tensors: they need microseconds."""
_TELLING: Final = timedelta(seconds=5)
"""How long a process that failed waits to see whether the first fails alike."""


_MEETINGS: Final = itertools.count()
"""Of this program, in the order that all processes have them in; each needs a place of its own."""


class ToldElsewhere(BioscanError):
    """An error that another process tells."""


@dataclass(frozen=True)
class Processes:
    """The processes that train together, and which of them this is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those of this machine."""
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def total(self, values: NDArray[Any]) -> NDArray[Any]:
        """The sum of the arrays of all processes."""
        if self.size == 1:
            return values
        sums = torch.from_numpy(values.copy())
        dist.all_reduce(sums)
        return sums.numpy()

    def merged(self, values: Mapping[int, str]) -> dict[int, str]:
        """The entries of all processes' dicts, by number."""
        if self.size == 1:
            return dict(values)
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, dict(values))
        return dict(sorted(item for part in gathered for item in part.items()))

    def by_first(self, function: Callable[[], Value]) -> Value:
        """What a function gives that the first process alone calls; its error is raised in all."""
        if self.size == 1:
            return function()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = function()
            except BioscanError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        made: Value = box[0]
        return made

    def as_first(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values; those that are spread over the processes stay."""
        if self.size > 1:
            for tensor in tensors:
                if not hasattr(tensor, "full_tensor"):
                    dist.broadcast(tensor.detach(), src=0)


ONE: Final = Processes()
"""No other processes."""


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process writes and speaks, known before any process has met another."""
    return _found(environment)[0].first


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """The processes that were started together, connected meanwhile.

    An error that the first process has too is raised as `ToldElsewhere` in the others, so that it is told
    once. Where a process ends meanwhile, for whatever reason of its own, the first of the others tells so.

    Args:
        device: As in the settings; CUDA devices talk by NCCL, CPUs by gloo.

    Raises:
        RequestError: the processes cannot find each other, or the device cannot be shared.
        DataError: another process has ended.
    """
    if dist.is_initialized():  # by the program that calls us
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        yield Processes(dist.get_rank(), dist.get_world_size(), local_rank, local_size)
        return
    processes, address = _found(os.environ)
    if processes.size == 1:
        yield ONE
        return
    place = choose_device(device, processes.local_rank)
    if place.type == "mps":
        raise RequestError("several processes train on CPUs or CUDA devices; pass --device cpu")
    if place.type == "cuda":
        if processes.local_size > torch.cuda.device_count() > 1:
            raise RequestError(
                f"{processes.local_size} processes on a machine with {torch.cuda.device_count()} GPUs; "
                "start one process for each"
            )
        torch.cuda.set_device(place)
    try:
        shared, _, _ = next(iter(rendezvous(address, processes.rank, processes.size, timeout=_PATIENCE)))
        store = PrefixStore(f"bioscan/{next(_MEETINGS)}", shared)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
            store=store,
            rank=processes.rank,
            world_size=processes.size,
            timeout=_PATIENCE,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RequestError(f"the {processes.size} processes cannot find each other ({reason})") from None
    try:
        yield processes
    except BioscanError as error:
        if _told_by_first(processes, store, str(error)):
            raise ToldElsewhere(str(error)) from None
        raise
    except (dist.DistError, RuntimeError) as error:
        if not _is_lost(error):
            raise
        if not processes.first:
            raise ToldElsewhere(str(error)) from None
        raise DataError(
            "another of the processes has ended, and said why if it could; pass --resume to go on from here"
        ) from None
    finally:
        dist.destroy_process_group()
        # DDP leaves gloo's threads behind; one that lets go of its last tensor while Python ends takes the
        # process down with it (pytorch/pytorch#179291)
        time.sleep(_LETTING_GO)


def _is_lost(error: BaseException) -> bool:
    """Whether an error is that another process cannot be reached any more: gloo has no type for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _told_by_first(processes: Processes, store: Any, message: str) -> bool:
    """Whether the first process ended with the same message; it leaves its own for the others."""
    if processes.first:
        store.set("error", message)
        return False
    with contextlib.suppress(dist.DistError, RuntimeError):
        store.wait(["error"], _TELLING)
        return bool(store.get("error").decode() == message)
    return False


def _found(environment: Mapping[str, str]) -> tuple[Processes, str]:
    """The processes and their meeting place, from what torchrun, else srun, tells each process."""
    try:
        if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
            size = int(environment["WORLD_SIZE"])
            local = int(environment.get("LOCAL_RANK", 0)), int(environment.get("LOCAL_WORLD_SIZE", 1))
            return Processes(int(environment["RANK"]), size, *local), "env://"
        # these three are set in the tasks of srun, not in the script of sbatch around them
        if {"SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= environment.keys():
            size = int(environment["SLURM_STEP_NUM_TASKS"])
            tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
            local = int(environment.get("SLURM_LOCALID", 0)), int(tasks[0]) if tasks else 1
            host = environment.get("MASTER_ADDR") or _first_host(environment["SLURM_STEP_NODELIST"])
            # jobs on one machine must not meet each other
            port = environment.get("MASTER_PORT") or 15_000 + int(environment.get("SLURM_JOB_ID", 0)) % 20_000
            return Processes(int(environment["SLURM_PROCID"]), size, *local), f"tcp://{host}:{port}"
    except ValueError as error:
        raise RequestError(f"the environment of torchrun or srun cannot be understood ({error})") from None
    return ONE, ""


def _first_host(nodes: str) -> str:
    """The first machine of SLURM's short form of a list.

    >>> [_first_host(nodes) for nodes in ("gpu[003-007,12],cpu1", "node7", "a-[1,5]-x,b")]
    ['gpu003', 'node7', 'a-1-x']
    """
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


# -- networks


def has_batch_statistics(network: nn.Module) -> bool:
    """Whether the network, as it is set to train, has layers that look at a batch as a whole."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in network.modules())


def with_common_statistics(network: nn.Module) -> nn.Module:
    """The network with batch norms that work over the batch of all processes; for CUDA devices."""
    converted: nn.Module = import_timm().layers.convert_sync_batchnorm(network)
    return converted


def copied(network: nn.Module, image_size: int) -> nn.Module:
    """The network behind DDP: each process has a copy, gradients are the mean over processes.

    Gradients are summed in groups that DDP forms anew after the first step. That first step is made here, on
    nothing, so that a run that is resumed sums in the same order as one that was never interrupted.
    """
    parameters = list(network.parameters())
    device = parameters[0].device
    images = torch.zeros((2, 3, image_size, image_size), dtype=parameters[0].dtype, device=device)
    network.eval()  # nothing is drawn, and no statistics change
    network(images).sum().backward()
    idle = any(p.requires_grad and p.grad is None for p in parameters)
    wrapped = DistributedDataParallel(
        network, [device] if device.type == "cuda" else None, find_unused_parameters=idle
    )
    wrapped(images).sum().backward()
    network.zero_grad(set_to_none=True)
    return wrapped
