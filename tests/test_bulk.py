"""Bulk work: the same bytes however often it is killed, and nothing lost or overwritten."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from bioscan.data.images import Images
from bioscan.errors import ImageError, RequestError
from bioscan.jobs.bulk import Bulk, Failed, Made, each, run_bulk

COUNT = 60
TARGETS = {
    "out": "folder",
    "out.zip": "zip",
    "out.hdf5": "hdf5",
    "out.tar": "webdataset",
    "shards": "webdataset",
    "out.parquet": "parquet",
    "tables": "parquet",
}


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(8000 + number)


def member(number: int) -> str:
    return f"part{number // 25 + 1}/{number:03d}.jpg"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = tmp_path_factory.mktemp("source")
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for number in range(COUNT):
            archive.writestr(member(number), content(number))
    return Images(folder / "photos.zip")


ROWS = pl.Schema({"size": pl.Int64(), "first": pl.UInt8()})


def copied(images: Images, row: int) -> Made:
    data = images.read(row)
    return Made(images.name(row), images.index.item(row, "part"), data, {"size": len(data), "first": data[0]})


def picky(images: Images, row: int) -> Made:
    """Every seventh picture cannot be read."""
    name = images.name(row)
    if int(name[:3]) % 7 == 0:
        raise ImageError(name, images.place(row), "truncated")
    return copied(images, row)


def run(
    source: Images, target: Path, *, function: Any = copied, form: str | None = None, **more: Any
) -> Bulk:
    form = TARGETS.get(target.name, form)
    usual: dict[str, Any] = {"record": {"settings": {"x": 1}}, "rows_schema": ROWS, "workers": 1}
    return run_bulk(source, each(function), target, form=form, **usual | {"shard_images": 7} | more)


def digest(target: Path) -> str:
    """Of every file below the target, or of the one file."""
    files = sorted(p for p in target.rglob("*") if p.is_file()) if target.is_dir() else [target]
    assert files
    made = hashlib.sha256()
    for file in files:
        made.update(f"{file.relative_to(target.parent)}\0{file.stat().st_size}\0".encode())
        made.update(file.read_bytes())
    return made.hexdigest()


@pytest.fixture(scope="module")
def undisturbed(source: Images, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digest of each target as one run makes it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for target in TARGETS:
        run(source, folder / target)
    return {target: digest(folder / target) for target in TARGETS}


# -- results


def test_images_rows_and_counts_come_in_storage_order(source: Images, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []

    def progress(done: int, total: int | None = None) -> None:
        seen.append((done, total))

    bulk = run(source, tmp_path / "out.zip", progress=progress)
    assert (bulk.form, bulk.images, bulk.resumed, bulk.failed.height) == ("zip", COUNT, 0, 0)
    assert bulk.bytes == sum(len(content(n)) for n in range(COUNT))
    assert bulk.rows["name"].to_list() == [f"{n:03d}.jpg" for n in range(COUNT)]
    assert bulk.rows["part"].to_list() == [n // 25 + 1 for n in range(COUNT)]
    assert bulk.rows["first"].to_list() == [content(n)[0] for n in range(COUNT)]
    assert seen == [(min(7 * n, COUNT), COUNT) for n in range(10)]
    made = Images(tmp_path / "out.zip", save_index=False)
    assert [made.read(row) for row in range(COUNT)] == [content(n) for n in range(COUNT)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.zip"]


@pytest.mark.parametrize("workers", [1, 2])
def test_failures_are_listed_and_not_written(source: Images, tmp_path: Path, workers: int) -> None:
    bulk = run(source, tmp_path / "out.tar", function=picky, workers=workers)
    failed = [n for n in range(COUNT) if n % 7 == 0]
    assert bulk.failed["name"].to_list() == [f"{n:03d}.jpg" for n in failed]
    assert set(bulk.failed["reason"]) == {"truncated"}
    assert bulk.failed["place"][0].startswith("photos.zip @ ")
    assert bulk.images == bulk.rows.height == COUNT - len(failed)
    assert len(Images(tmp_path / "out.tar", save_index=False)) == bulk.images


def several(images: Images) -> Iterator[Made | Failed]:
    """A copy under each of two names, a row alone, and clashing and hostile names."""
    for row in range(len(images)):
        made = copied(images, row)
        if row == 0:
            for name in ("../evil.jpg", "new.jpg", "always.jpg", "Zu\u0308.jpg"):
                yield made._replace(name=name, part=None if name[0] == "a" else made.part)
        yield made._replace(data=None)


@pytest.mark.parametrize("target", ["a/out", "a/out.zip", "a/out.tar", "a/out.parquet"])
def test_a_step_may_give_many_results_or_a_row_alone_and_no_name_twice(
    source: Images, tmp_path: Path, target: str
) -> None:
    """The clash is in the middle of the second shard's spool."""
    bulk = run_bulk(
        source, several, tmp_path / target, record={}, rows_schema=ROWS, shard_images=30, workers=1
    )
    assert bulk.images == 5  # always.jpg, and new.jpg and Zü.jpg of parts 1 and 2
    assert bulk.failed.select("name", "part", "reason").rows() == [
        ("../evil.jpg", 1, "a name that leads out of the package (..)"),
        ("../evil.jpg", 2, "a name that leads out of the package (..)"),
        ("always.jpg", None, "another image before it has this name"),
    ]
    assert bulk.rows.height == COUNT + 5
    assert bulk.rows["name"].to_list().count("Z\u00fc.jpg") == 2
    made = Images(tmp_path / target, save_index=False)
    read: dict[tuple[int | None, str], bytes] = {
        (part, name): made.read(row) for row, (part, name) in enumerate(made.index["part", "name"].rows())
    }
    assert read == {
        (None, "always.jpg"): content(0),
        (1, "new.jpg"): content(0),
        (1, "Z\u00fc.jpg"): content(0),
        (2, "new.jpg"): content(30),
        (2, "Z\u00fc.jpg"): content(30),
    }
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == [target.removeprefix("a/")]
    if made.form == "zip":
        with zipfile.ZipFile(tmp_path / target) as archive:
            assert archive.testzip() is None


def test_rows_alone_need_no_target(source: Images) -> None:
    bulk = run_bulk(source, each(picky), None, record={}, rows_schema=ROWS, workers=1)
    assert (bulk.target, bulk.images, bulk.rows.height) == (None, 0, COUNT - 9)
    assert bulk.failed.height == 9


def test_hostile_members_and_second_ones_of_a_name_are_failures(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("in/a.jpg", "in/../../b.jpg", "in/Z\u00fc.jpg", "in/Zu\u0308.jpg"):
            archive.writestr(name, name)
    bulk = run(Images(tmp_path / "a.zip"), tmp_path / "x/y/out", record={})
    assert bulk.failed["reason"].to_list() == [
        "another image before it has this name",
        "its path leads out of the archive",
    ]
    assert bulk.failed["name"][0] == "Z\u00fc.jpg"
    assert bulk.failed["name"][1].endswith("../b.jpg")
    files = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.jpg")]
    assert sorted(files) == ["x/y/out/Z\u00fc.jpg", "x/y/out/a.jpg"]


def test_shards_are_bounded_by_stored_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bioscan.jobs.bulk.SHARD_BYTES", 1000)
    (tmp_path / "photos").mkdir()
    for number, size in enumerate((400, 400, 400, 5000, 10, 10)):
        (tmp_path / f"photos/{number}.jpg").write_bytes(bytes(size))
    sizes: list[int] = []

    def step(images: Images) -> Iterator[Made]:
        sizes.append(len(images))
        return iter(())

    run_bulk(Images(tmp_path / "photos"), step, None, record={}, workers=1)
    assert sizes == [2, 1, 1, 2]


# -- killed

KILLED = """
    import json, os, signal, sys
    import test_bulk
    from pathlib import Path
    from bioscan.data.images import Images

    def job(source, target, number):
        seen = 0

        def watch(event, arguments):
            nonlocal seen
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
                place = arguments[0]
                if isinstance(place, (str, Path)) and str(place).startswith(str(target.parent)):
                    seen += 1
                    if seen == number:
                        os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        test_bulk.run(Images(source), target)

    for target, number in json.load(sys.stdin):
        process = os.fork()  # Polars has not been used yet: it can be, then, in the new process
        if not process:
            job(sys.argv[1], Path(target), number)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
"""Does jobs, each in a process of its own that ends itself at the given number of what it does to files
beside its target; prints how each ended."""


def kill(source: Images, jobs: list[tuple[Path, int]]) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(source.path)],
        input=json.dumps([(str(target), number) for target, number in jobs]),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def check_resumed(source: Images, target: Path, wanted: str) -> None:
    if target.exists() and not target.with_name(f".{target.name}.unfinished").exists():
        assert digest(target) == wanted  # killed when all was done; at most, things to throw away are left
        return
    bulk = run(source, target)
    assert (bulk.images, bulk.rows.height) == (COUNT, COUNT)
    assert digest(target) == wanted
    assert [p.name for p in target.parent.iterdir()] == [target.name]


MOMENTS = {"out": (3, 90, 170, 235)} | dict.fromkeys([*TARGETS][1:], (2, 28, 51, 56))
"""Of jobs with 240 (a folder) or 59 to 76 doings: at the start, in a shard, in the assembly, at the end."""


def test_a_killed_job_goes_on_and_ends_byte_for_byte_the_same(
    source: Images, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    jobs = [(tmp_path / f"{t} {n}" / t, n) for t, numbers in MOMENTS.items() for n in numbers]
    for place, _ in jobs:
        place.parent.mkdir()
    assert set(kill(source, jobs)) == {-signal.SIGKILL}
    for place, _ in jobs:
        check_resumed(source, place, undisturbed[place.name])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", TARGETS)
def test_a_job_may_be_killed_at_each_moment_and_once_more(
    source: Images, undisturbed: dict[str, str], tmp_path: Path, target: str
) -> None:
    jobs = [(tmp_path / str(n) / target, n) for n in range(1, 260, 2)]
    for place, _ in jobs:
        place.parent.mkdir()
    first = kill(source, jobs)
    ended = first.index(0)
    assert ended > 25
    assert set(first[ended:]) == {0}
    again = [place for place, _ in jobs[:ended:2] if not place.exists()]
    assert set(kill(source, [(place, 12) for place in again])) <= {0, -signal.SIGKILL}
    for place, _ in jobs[:ended]:
        check_resumed(source, place, undisturbed[target])


def deadly(folder: str, victim: str, images: Images, row: int) -> Made:
    """Picture 40 kills its worker, or the process that started it, the first time."""
    mark = Path(folder) / "killed"
    if images.name(row) == "040.jpg" and not mark.exists():
        mark.touch()
        os.kill(os.getpid() if victim == "worker" else os.getppid(), signal.SIGKILL)
        time.sleep(60 if victim == "parent" else 0)
    return copied(images, row)


@pytest.mark.parametrize("target", ["out", "out.zip"])
def test_a_worker_that_is_killed_alone_changes_nothing(
    source: Images, undisturbed: dict[str, str], tmp_path: Path, target: str
) -> None:
    place = tmp_path / "new" / target
    bulk = run(source, place, function=partial(deadly, str(tmp_path), "worker"), workers=2)
    assert (tmp_path / "killed").exists()
    assert (bulk.resumed, bulk.images) == (0, COUNT)
    assert digest(place) == undisturbed[target]
    assert [p.name for p in place.parent.iterdir()] == [target]


def test_a_job_of_several_workers_goes_on_after_its_parent_was_killed(
    source: Images, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    place = tmp_path / "new" / "out.tar"
    code = f"""
        import test_bulk
        from functools import partial
        from pathlib import Path
        from bioscan.data.images import Images
        if __name__ == "__main__":
            step = partial(test_bulk.deadly, {str(tmp_path)!r}, "parent")
            test_bulk.run(Images({str(source.path)!r}), Path({str(place)!r}), function=step, workers=2)
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    bulk = run(source, place, workers=2)
    assert bulk.resumed >= 4  # shards of the images before the fortieth, but for those at work
    assert digest(place) == undisturbed["out.tar"]
    assert [p.name for p in place.parent.iterdir()] == ["out.tar"]


def test_a_spool_that_lost_its_end_is_made_again(
    source: Images, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    for target in ("out", "out.zip"):
        with pytest.raises(ZeroDivisionError):
            run(source, tmp_path / target, function=broken_at_50)
        spools = sorted((tmp_path / f".{target}.unfinished/shards").glob("*.spool"))
        assert len(spools) == 7
        short = spools[2] / "3" if target == "out" else spools[2]
        os.truncate(short, 100)
        with pytest.raises(ZeroDivisionError):
            run(source, tmp_path / target, function=broken_at_50)
        kept = sorted((tmp_path / f".{target}.unfinished/shards").glob("*.spool"))
        assert [a for a, b in zip(spools, kept, strict=True) if a == b] == spools[:2] + spools[3:]
        os.truncate(kept[2] / "3" if target == "out" else kept[2], 100)
        assert run(source, tmp_path / target).resumed == 6
        assert digest(tmp_path / target) == undisturbed[target]


def broken_at_50(images: Images, row: int) -> Made:
    if images.name(row) == "050.jpg":
        raise ZeroDivisionError
    return copied(images, row)


def break_off(source: Images, target: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(source, target, function=broken_at_50)


# -- refused


def test_an_unfinished_job_with_other_settings_is_named_and_kept(source: Images, tmp_path: Path) -> None:
    target = tmp_path / "out.zip"
    break_off(source, target)
    with pytest.raises(RequestError, match=r"unfinished job with other settings \(x: 1, now 2\); run that"):
        run(source, target, record={"settings": {"x": 2}})
    with pytest.raises(RequestError, match=r"\(another source\)"):
        run(source.take(range(30)), target)
    assert run(source, target).resumed == 7
    break_off(source, tmp_path / "new.zip")
    bulk = run(source, tmp_path / "new.zip", record={"settings": {"x": 2}}, overwrite=True)
    assert bulk.resumed == 0
    assert digest(tmp_path / "new.zip") != ""


def test_a_changed_source_is_another_job(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(COUNT):
        (photos / f"{number:03d}.jpg").write_bytes(content(number))
    break_off(Images(photos, save_index=False), tmp_path / "out.tar")
    (photos / "000.jpg").write_bytes(content(1))
    with pytest.raises(RequestError, match="another source"):
        run(Images(photos, save_index=False), tmp_path / "out.tar")


def test_a_work_folder_of_something_else_is_left_alone(source: Images, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(RequestError, match=r"mine holds letter\.txt, which is not ours"):
        run(source, tmp_path / "out.zip", work=tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine/letter.txt").read_text() == "dear"


def lingering(folder: str, images: Images, row: int) -> Made:
    (Path(folder) / "begun").touch()
    while not (Path(folder) / "go on").exists():
        time.sleep(0.005)
    return copied(images, row)


def test_two_processes_do_not_work_on_one_target(source: Images, tmp_path: Path) -> None:
    target = tmp_path / "out.zip"
    code = f"""
        import test_bulk
        from functools import partial
        from pathlib import Path
        from bioscan.data.images import Images
        step = partial(test_bulk.lingering, {str(tmp_path)!r})
        print(test_bulk.run(Images({str(source.path)!r}), Path({str(target)!r}), function=step).images)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        while not (tmp_path / "begun").exists():
            assert other.poll() is None
            time.sleep(0.005)
        for overwrite in (False, True):
            with pytest.raises(RequestError, match=r"out\.zip: another process is working on it"):
                run(source, target, overwrite=overwrite)
        (tmp_path / "go on").touch()
        said, _ = other.communicate(timeout=60)
    assert said.strip() == str(COUNT)
    assert len(Images(target, save_index=False)) == COUNT


@pytest.mark.parametrize("target", ["out", "out.zip", "out.parquet", "out.hdf5"])
def test_a_full_disk_is_one_message_and_what_is_done_stays(
    source: Images, undisturbed: dict[str, str], tmp_path: Path, target: str
) -> None:
    """The limit lets spools through and stops the package, where that is one file; else a spool."""
    limit = 8030 if target == "out" else 60_000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(RequestError) as caught:
            run(source, tmp_path / target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    work = tmp_path / f".{target}.unfinished"
    assert str(caught.value) == (
        f"{tmp_path / target}: File too large; what is done stays in {work}: make room and run the same again"
    )
    assert [p.name for p in tmp_path.iterdir()] == [work.name]
    assert run(source, tmp_path / target).resumed == (4 if target == "out" else 9)
    assert digest(tmp_path / target) == undisturbed[target]


def test_a_target_that_exists_is_replaced_when_told_and_if_it_is_ours(
    source: Images, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    for target in ("out.zip", "out"):
        run(source.take(range(8)), tmp_path / target)
        with pytest.raises(RequestError, match=f"{target} exists; choose another name or pass --overwrite"):
            run(source, tmp_path / target)
        run(source, tmp_path / target, overwrite=True)
        assert digest(tmp_path / target) == undisturbed[target]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.jpg").write_text("dear")
    with pytest.raises(RequestError, match="photos is no package that was made here; it is not replaced"):
        run(source, tmp_path / "photos", form="folder", overwrite=True)
    (tmp_path / "a.zip").mkdir()
    (tmp_path / "tables").touch()
    with pytest.raises(RequestError, match=r"is a folder; name a file"):
        run(source, tmp_path / "a.zip", form="zip", overwrite=True)
    with pytest.raises(RequestError, match="is a file; name a folder"):
        run(source, tmp_path / "tables", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "out", "out.zip", "photos", "tables"]
    (tmp_path / "shards").mkdir()  # an empty folder may be filled
    assert run(source, tmp_path / "shards").images == COUNT


def test_source_and_target_must_not_hold_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = tmp_path / "all/photos"
    photos.mkdir(parents=True)
    (photos / "1.jpg").write_bytes(content(1))
    (tmp_path / "link").symlink_to(photos)
    images = Images(photos, save_index=False)
    monkeypatch.chdir(photos)
    for target, why in (
        (photos, "is the source"),
        (tmp_path / "link", "is the source"),
        (Path(), "is the source"),
        (photos / "out.zip", "lies in the source"),
        (tmp_path / "all", "holds the source"),
    ):
        with pytest.raises(RequestError, match=why):
            run(images, target, form=None, overwrite=True)
    assert [p.name for p in photos.iterdir()] == ["1.jpg"]


def test_a_link_to_a_folder_stays_and_what_it_leads_to_is_filled(
    source: Images, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "there/out").mkdir(parents=True)
    (tmp_path / "new").mkdir()
    for place in ("there", "new"):  # a folder of that name, and none yet
        link = tmp_path / f"to {place}/out"
        link.parent.mkdir()
        link.symlink_to(tmp_path / place / "out")
        with pytest.raises(ZeroDivisionError):
            run(source, link, function=broken_at_50)
        assert (tmp_path / place / ".out.unfinished").is_dir()
        assert run(source, link).resumed == 7
        for _ in range(2):
            assert (link.is_symlink(), digest(tmp_path / place / "out")) == (True, undisturbed["out"])
            run(source, link, overwrite=True)
        assert [p.name for p in (*link.parent.iterdir(), *(tmp_path / place).iterdir())] == ["out", "out"]


def test_a_folder_in_use_is_refused_before_the_work(
    source: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target, why in (
        (Path(), "current folder"),
        (tmp_path, "current folder"),
        (Path("/"), "holds the source"),
        (Path("/dev"), "mount point"),
    ):
        with pytest.raises(RequestError, match=why):
            run(source, target, function=broken_at_50, form="folder")
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def test_finish_is_called_before_the_work_folder_goes_and_again_after_a_kill(
    source: Images, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    target, called = tmp_path / "out.zip", []

    def killed(bulk: Bulk) -> None:
        raise KeyboardInterrupt

    def finish(bulk: Bulk) -> None:
        called.append(bulk.images)
        assert (tmp_path / ".out.zip.unfinished").is_dir()

    with pytest.raises(KeyboardInterrupt):
        run(source, target, finish=killed)
    assert digest(target) == undisturbed["out.zip"]
    with pytest.raises(RequestError, match="exists"):
        run(source, target, record={})
    bulk = run(source, target, finish=finish)
    assert (called, bulk.resumed, bulk.rows.height) == ([COUNT], 9, COUNT)
    assert [p.name for p in tmp_path.iterdir()] == ["out.zip"]
