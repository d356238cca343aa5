"""How the benchmarks measure: interleaved rounds and medians, peak memory in a process of its own."""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def interleaved(*works: Callable[[], Any], rounds: int = 5) -> list[float]:
    """Median seconds of each work, the works taking turns, so that a busy machine slows all alike."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, taken in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def peak_mb(work: Callable[..., Any], *arguments: Any) -> float:
    """Highest resident memory in MB of a new process that does the work; it must be importable by name."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        return float(receiver.recv())
    finally:
        process.join()


def _measured(sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    work(*arguments)
    sender.send(_peak_kb() / 1024)


def _peak_kb() -> int:
    """Highest resident memory of this process; `getrusage` counts what its parent had, too."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
