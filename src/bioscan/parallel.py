"""The same function over many shards: in this process, in local processes, or on a Ray cluster."""

import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import socket
import threading
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final, TypeVar

from bioscan.errors import BioscanError, DataError, RequestError, require, unknown

ENGINES: Final = ("local", "ray")

Shard = TypeVar("Shard")
Result = TypeVar("Result")

_ONE_THREAD: Final = ("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "OPENCV_FOR_THREADS_NUM")
"""A worker has one core: libraries that would take all of them get in each other's way."""
_UNGUARDED: Final = (
    "a worker process ended before it began: memory, or a script that does this outside of "
    "`if __name__ == '__main__':`; workers=1 does it without other processes"
)
_KNOCK_S: Final = 10
_STARTS: Final = 5
"""Workers that may be killed one after the other before any work is done."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_shards(
    function: Callable[[Shard], Result],
    shards: Iterable[Shard],
    *,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    retries: int = 2,
) -> Iterator[tuple[int, Result]]:
    """Number and result of each shard, in the order in which they end.

    Shards are taken as they are needed, a few ahead of the work. A worker process or node that dies loses
    nothing: its shard is done again, by another. What the function raises ends the run.

    Args:
        function: Can be pickled (a function of a module, or `functools.partial` of one).
        shards: What it is called with; can be pickled.
        engine: `local` processes, or `ray`, where each node needs this package and the same files.
        workers: Shards at work at a time; None: one, or two per core of the Ray cluster. 1 (local) works in
            this process; more need a script with the usual `if __name__ == "__main__":`.
        address: Of the Ray cluster: `auto`, `HOST:PORT`; None: that of RAY_ADDRESS, or a cluster of this
            machine alone, for as long as the work lasts.
        retries: How often a shard is done again when its worker died.

    Raises:
        RequestError: unknown engine; no cluster at the address; a script without the usual
            `if __name__ == "__main__":`.
        DataError: a shard whose worker died each time.
        MissingExtraError: Ray is not installed.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    if workers is not None and workers < 1:
        raise RequestError(f"workers is {workers}; at least 1 is needed")
    if engine == "ray":
        return _on_ray(function, shards, workers, address, retries)
    if address is not None:
        raise RequestError("an address is that of a Ray cluster: add --engine ray")
    crew = workers or 1
    if isinstance(shards, Sized):
        crew = min(crew, len(shards))
    if crew <= 1:
        return ((number, function(shard)) for number, shard in enumerate(shards))
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RequestError(_UNGUARDED)  # in a worker, which has run the script that started it
    return _in_processes(function, shards, crew, retries)


# -- local processes


@dataclass
class _Worker:
    process: BaseProcess
    ready: bool = False
    shard: tuple[int, Any] | None = None
    """What it works on."""


def _in_processes(
    function: Callable[[Shard], Result], shards: Iterable[Shard], workers: int, retries: int
) -> Iterator[tuple[int, Result]]:
    """One pipe a worker, so that a death is known to be that of one shard and disturbs no other.

    `ProcessPoolExecutor` breaks as a whole, and cannot tell whose fault it was.
    """
    context = multiprocessing.get_context("spawn")
    payload = bytes(ForkingPickler.dumps(function))
    supply = enumerate(shards)
    queue: deque[tuple[int, Shard]] = deque()
    crew: dict[Connection, _Worker] = {}
    deaths: Counter[int] = Counter()
    stillborn = 0
    ended: list[tuple[int, tuple[bool, Any]]] = []
    try:
        while True:
            wanted = max(0, workers - len(queue))  # workers that died may have given back more shards
            queue.extend(itertools.islice(supply, wanted))
            for pipe, worker in crew.items():
                if queue and worker.ready and worker.shard is None:
                    worker.shard = queue.popleft()
                    with suppress(OSError):  # it died meanwhile: its pipe says so when it is read next
                        pipe.send(worker.shard[1])
            for number, (succeeded, result) in ended:  # now that there is work for all
                if not succeeded:
                    raise result
                yield number, result
            ended = []
            busy = sum(worker.shard is not None for worker in crew.values())
            if not queue and not busy:
                return
            while len(crew) < min(workers, len(queue) + busy):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, payload), daemon=True)
                with _deaf():
                    process.start()
                theirs.close()  # so that its end is the end of the pipe
                crew[ours] = _Worker(process)
            for readable in wait(list(crew)):
                assert isinstance(readable, Connection)
                pipe, worker = readable, crew[readable]
                try:
                    answer = pipe.recv()
                except (EOFError, OSError):
                    del crew[pipe]
                    reason = _farewell(pipe, worker.process)
                    if worker.shard is not None:
                        number = worker.shard[0]
                        deaths[number] += 1
                        if deaths[number] > retries:
                            raise _given_up(number, deaths[number], reason) from None
                        queue.appendleft(worker.shard)
                    elif not worker.ready:
                        stillborn += 1
                        if worker.process.exitcode != -signal.SIGKILL or stillborn > _STARTS:
                            raise RequestError(_UNGUARDED) from None
                    continue
                if worker.shard is not None:
                    ended.append((worker.shard[0], answer))
                    worker.shard = None
                worker.ready, stillborn = True, 0
    finally:
        for worker in crew.values():
            worker.process.terminate()
        for pipe, worker in crew.items():
            _farewell(pipe, worker.process)


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes started within never hear Ctrl-C, which reaches all of a terminal: the parent ends them.

    Ignoring it in the process itself would be too late, where it comes while Python starts.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # else it is started within, and undoes this
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _farewell(pipe: Connection, process: BaseProcess) -> str:
    """How a process that is ending ended."""
    pipe.close()
    process.join(10)
    if process.exitcode is None:
        process.kill()
        process.join()
    code = process.exitcode or 0
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _given_up(number: int, times: int, reason: str) -> DataError:
    return DataError(
        f"shard {number}: the worker that had it died, {times} times (last: {reason}). Out of memory? Fewer "
        "workers need less; with one (--workers 1) the work is done without other processes"
    )


def _work(pipe: Connection, payload: bytes) -> None:
    """What a worker process does until its parent closes the pipe, or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it is not blocked
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _one_thread()
    function = pickle.loads(payload)  # noqa: S301 - from our parent
    try:
        pipe.send(None)
        while True:
            answer = _answer(function, pipe.recv())
            pipe.send_bytes(answer)
    except (EOFError, OSError):
        return


def _answer(function: Callable[[Any], Any], shard: Any) -> bytes:
    """Pickled: whether the function came to its end, and its result or what it raised."""
    try:
        return bytes(ForkingPickler.dumps((True, function(shard))))
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        if not isinstance(error, BioscanError):
            error.add_note("In a worker process:\n" + traceback.format_exc())
        try:
            answer = bytes(ForkingPickler.dumps((False, error)))
            pickle.loads(answer)  # noqa: S301 - ours; some exceptions cannot be loaded again
        except Exception:  # noqa: BLE001 - whatever pickling raises
            answer = bytes(ForkingPickler.dumps((False, RuntimeError(traceback.format_exc()))))
        return answer


def _end_with_parent() -> None:
    """A killed parent must not leave workers behind that go on writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _one_thread() -> None:
    for name in _ONE_THREAD:
        os.environ[name] = "1"


# -- Ray


def _on_ray(
    function: Callable[[Shard], Result],
    shards: Iterable[Shard],
    workers: int | None,
    address: str | None,
    retries: int,
) -> Iterator[tuple[int, Result]]:
    with _cluster(address) as ray:
        task = ray.remote(max_retries=retries, num_cpus=1)(_apply)
        payload = ray.put(ray.cloudpickle.dumps(function))
        limit = workers or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        supply = enumerate(shards)
        waiting: dict[Any, int] = {}
        try:
            while True:
                for number, shard in itertools.islice(supply, limit - len(waiting)):
                    waiting[task.remote(payload, shard)] = number
                if not waiting:
                    return
                ended, _ = ray.wait(list(waiting), num_returns=1)
                number = waiting.pop(ended[0])
                try:
                    result = ray.get(ended[0])
                except ray.exceptions.RayTaskError as error:
                    raise error.cause or error from None
                except ray.exceptions.RayError as error:
                    reason = next(iter(str(error).splitlines()), type(error).__name__)
                    raise _given_up(number, retries + 1, reason) from None
                yield number, result
        finally:
            for reference in waiting:
                with suppress(Exception):  # the cluster may be gone; the work is given up anyway
                    ray.cancel(reference, force=True)


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected; without a word, and closed again if it was opened here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning about the future
    with warnings.catch_warnings(action="ignore"):
        ray: Any = require("ray", "cluster")
        opened = not ray.is_initialized()
        if opened:
            try:
                _knock(address)
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
                # What nodes say of their dead goes to stdout, among results; there is no public switch.
                ray._private.worker._worker_logs_enabled = False
            except (OSError, ValueError, RuntimeError) as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise RequestError(f"no Ray cluster at {address or 'this machine'}: {reason}") from None
    try:
        yield ray
    finally:
        if opened:
            ray.shutdown()
            ray._private.worker._worker_logs_enabled = True


def _knock(address: str | None) -> None:
    """Raise an OSError where nobody is at HOST:PORT; Ray would wait for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()


def _apply(payload: bytes, shard: Any) -> Any:
    """What a Ray task does."""
    return _loaded(payload)(shard)


@functools.lru_cache(maxsize=1)
def _loaded(payload: bytes) -> Callable[[Any], Any]:
    _one_thread()
    function: Callable[[Any], Any] = pickle.loads(payload)  # noqa: S301 - from the driver
    return function
