"""Shards over processes: every result once, whatever dies on the way."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from bioscan.errors import DataError, ImageError, MissingExtraError, RequestError
from bioscan.parallel import cores, map_shards


def square(number: int) -> int:
    return number * number


def wait_for(file: Path) -> None:
    """Until another process has made a file."""
    end = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < end, f"{file.name} does not come"
        time.sleep(0.005)


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(process: int) -> None:
    end = time.monotonic() + 30
    while alive(process):
        assert time.monotonic() < end, f"process {process} does not end"
        time.sleep(0.005)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_shard_gives_its_result_once(workers: int, count: int) -> None:
    results = dict(map_shards(square, range(count), workers=workers))
    assert results == {number: number * number for number in range(count)}


def test_shards_may_come_from_a_generator_and_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def shards() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    for workers in (1, 2):
        taken.clear()
        results = map_shards(square, shards(), workers=workers)
        first = next(results)
        assert first[1] == first[0] ** 2
        assert len(taken) <= 3 * workers
        results.close()  # type: ignore[attr-defined]


def meet(folder: Path, number: int) -> int:
    """Shard 0 ends after shard 1 does."""
    if number == 0:
        wait_for(folder / "1")
    (folder / str(number)).touch()
    return os.getpid()


def test_results_come_as_they_end_from_as_many_processes_as_were_asked_for(tmp_path: Path) -> None:
    results = list(map_shards(partial(meet, tmp_path), range(2), workers=2))
    assert [number for number, _ in results] == [1, 0]
    assert len({process for _, process in results} - {os.getpid()}) == 2


def test_one_worker_is_this_process() -> None:
    assert dict(map_shards(partial(meet, Path("/nowhere")), [], workers=1)) == {}
    for workers in (1, None):
        assert {process for _, process in map_shards(whoami, range(3), workers=workers)} == {os.getpid()}
    assert cores() >= 1


def whoami(number: int) -> int:
    return os.getpid()


def die_once(folder: Path, number: int) -> int:
    """Shards 1 and 4 kill their process the first time."""
    mark = folder / f"died {number}"
    if number in (1, 4) and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    with (folder / f"done {number}").open("a") as file:
        file.write("x")
    return square(number)


def test_a_worker_that_is_killed_loses_nothing_and_disturbs_no_other(tmp_path: Path) -> None:
    results = list(map_shards(partial(die_once, tmp_path), range(6), workers=2))
    assert sorted(results) == [(n, n * n) for n in range(6)]
    assert {file.read_text() for file in tmp_path.glob("done *")} == {"x"}  # no shard was done twice


def die_together(folder: Path, number: int) -> int:
    """The first workers, one with shard 0 and one with shard 1, die at the same time."""
    mark = folder / f"first {number}"
    if number < 2 and not mark.exists():
        mark.touch()
        while not all((folder / f"first {other}").exists() for other in (0, 1)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return square(number)


def test_workers_that_are_killed_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    results = list(map_shards(partial(die_together, tmp_path), range(6), workers=2))
    assert sorted(results) == [(n, n * n) for n in range(6)]


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_shard_that_kills_each_of_its_workers_is_named() -> None:
    with pytest.raises(DataError, match=r"shard 3: the worker .* died, 2 times \(last: killed by SIGKILL\)"):
        list(map_shards(die, range(8), workers=2, retries=1))


def leave(number: int) -> NoReturn:
    os._exit(7)


def test_a_worker_that_leaves_without_a_word_is_told_of_with_its_status() -> None:
    with pytest.raises(DataError, match="exit status 7"):
        list(map_shards(leave, range(2), workers=2, retries=0))


class Odd(Exception):
    """One that pickle cannot make again: it wants two arguments and keeps none."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__()


def fail(kind: str, number: int) -> object:
    match kind:
        case "image":
            raise ImageError("a.jpg", "x.zip @ 3", "truncated")
        case "value":
            raise ValueError(f"no {number}")
        case "odd":
            raise Odd(1, 2)
    return lambda: None  # which pickle does not take


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_ours_comes_through_as_it_is(workers: int) -> None:
    with pytest.raises(ImageError) as caught:
        list(map_shards(partial(fail, "image"), range(4), workers=workers))
    assert (caught.value.name, caught.value.place, caught.value.reason) == ("a.jpg", "x.zip @ 3", "truncated")


def test_another_error_keeps_the_lines_of_the_worker() -> None:
    with pytest.raises(ValueError, match="no 0") as caught:
        list(map_shards(partial(fail, "value"), [0, 0], workers=2))
    assert "in fail" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="raise Odd"):
        list(map_shards(partial(fail, "odd"), range(2), workers=2))
    with pytest.raises(Exception, match=r"lambda|pickle"):
        list(map_shards(partial(fail, "result"), range(2), workers=2))


def test_wrong_requests_are_told_before_anything_starts() -> None:
    with pytest.raises(RequestError, match="unknown engine 'rya'; did you mean 'ray'"):
        map_shards(square, [1], engine="rya")
    with pytest.raises(RequestError, match="workers is 0"):
        map_shards(square, [1], workers=0)
    with pytest.raises(RequestError, match="add --engine ray"):
        map_shards(square, [1], address="auto")


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match="bioscan\\[cluster\\]"):
        list(map_shards(square, [1], engine="ray"))


# -- as a program

PROGRAM = """
    import os, sys, time
    from pathlib import Path
    from bioscan.parallel import map_shards

    def work(folder):
        (Path(folder) / str(os.getpid())).touch()
        time.sleep(60)

    if {guard}:
        list(map_shards(work, [sys.argv[1]] * 4, workers=2))
"""


def program(folder: Path, guard: str = "__name__ == '__main__'") -> "subprocess.Popen[str]":
    script = folder / "script.py"
    script.write_text(textwrap.dedent(PROGRAM.format(guard=guard)))
    (folder / "marks").mkdir()
    return subprocess.Popen(
        [sys.executable, str(script), str(folder / "marks")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def workers_of(folder: Path) -> list[int]:
    end = time.monotonic() + 30
    while len(marks := list((folder / "marks").iterdir())) < 2:
        assert time.monotonic() < end
        time.sleep(0.005)
    return [int(mark.name) for mark in marks]


def test_a_script_without_the_usual_guard_is_told_so(tmp_path: Path) -> None:
    with program(tmp_path, guard="True") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "outside of `if __name__ == '__main__':`; workers=1 does it" in said.splitlines()[-1]


def test_ctrl_c_while_workers_start_is_heard_by_the_parent_alone(tmp_path: Path) -> None:
    with program(tmp_path) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        end = time.monotonic() + 30
        while len(children.read_text().split()) < 2:  # one that cleans up, and the first worker
            assert time.monotonic() < end
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert said.count("Traceback") == said.count("KeyboardInterrupt") == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path: Path, number: int) -> None:
    """Ctrl-C reaches all processes of a terminal, SIGKILL the parent alone."""
    with program(tmp_path) as process:
        workers = workers_of(tmp_path)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
        _, said = process.communicate(timeout=30)
    assert process.returncode == -number
    for worker in workers:
        wait_for_end(worker)
    assert said.count("Traceback") == (number == signal.SIGINT)  # the parent's alone
