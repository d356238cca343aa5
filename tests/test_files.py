"""Writing: whole or not there at all, whatever happens on the way."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import polars as pl
import pytest

from bioscan.errors import RequestError, near, require, unknown
from bioscan.files import refuse_existing, refuse_unwritable, sha256, writing, writing_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def break_off(path: Path) -> None:
    path.write_text("half")
    raise ZeroDivisionError


def test_a_file_appears_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    target = tmp_path / "new/folder/a.txt"
    with writing(target) as partial:
        partial.write_text("one")
        assert not target.exists()
    assert target.read_text() == "one"
    assert names(target.parent) == ["a.txt"]


def test_a_failure_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), writing(target, overwrite=True) as partial:
        break_off(partial)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_nothing_is_replaced_unless_told(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with (
        pytest.raises(RequestError, match="exists; choose another name or pass --overwrite"),
        writing(target),
    ):
        pytest.fail("the block runs")
    with pytest.raises(RequestError, match="is a folder; name a file"), writing(tmp_path, overwrite=True):
        pytest.fail("the block runs")
    with writing(target, overwrite=True) as partial:
        partial.write_text("new")
    assert target.read_text() == "new"
    refuse_existing(target, overwrite=True)
    with pytest.raises(RequestError):
        refuse_existing(target, overwrite=False)


def test_a_folder_takes_the_place_of_an_older_one_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with writing_folder(target) as partial:
        (partial / "old.txt").write_text("old")
    with pytest.raises(RequestError, match="exists"), writing_folder(target):
        pytest.fail("the block runs")
    with pytest.raises(ZeroDivisionError), writing_folder(target, overwrite=True) as partial:
        break_off(partial / "half.txt")
    assert names(target) == ["old.txt"]
    with writing_folder(target, overwrite=True, mark="old.txt") as partial:
        (partial / "inner").mkdir()
        (partial / "inner/new.txt").write_text("new")
    assert names(target) == ["inner"]
    assert names(tmp_path) == ["model"]


def test_a_folder_of_something_else_is_not_replaced_even_when_told(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "holiday.jpg").write_text("dear")
    (photos / "bins.png").write_text("old")
    for mark in (None, "model.json"):
        with (
            pytest.raises(RequestError, match=r"photos holds holiday\.jpg, which is not ours"),
            writing_folder(photos, overwrite=True, mark=mark) as partial,
        ):
            (partial / "bins.png").write_text("new")
    assert (photos / "holiday.jpg").read_text() == "dear"
    (photos / "holiday.jpg").unlink()
    with writing_folder(photos, overwrite=True) as partial:
        (partial / "bins.png").write_text("new")
        (partial / "ranks.png").write_text("new")
    assert names(photos) == ["bins.png", "ranks.png"]
    assert names(tmp_path) == ["photos"]


def test_an_empty_folder_may_be_filled_and_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with writing_folder(tmp_path / "empty") as partial:
        (partial / "a").write_text("a")
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(RequestError, match="is a file; name a folder"),
        writing_folder(tmp_path / "file", overwrite=True),
    ):
        pytest.fail("the block runs")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with writing_folder(tmp_path / "link", overwrite=True, mark="a") as partial:
        (partial / "b").write_text("b")
    assert names(tmp_path / "empty") == ["b"]
    assert (tmp_path / "link").is_symlink()


def test_the_current_folder_those_around_it_and_mount_points_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here/inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for folder in (Path(), Path(".."), tmp_path / "here", tmp_path, Path("/")):
        with pytest.raises(RequestError, match="is the current folder, or holds it"), writing_folder(folder):
            pytest.fail("the block runs")
    with writing_folder(Path("inner")) as partial:
        (partial / "a").write_text("a")
    assert names(Path("inner")) == ["a"]
    with (
        pytest.raises(RequestError, match="/dev is a mount point, which cannot be replaced"),
        writing_folder(Path("/dev"), overwrite=True),
    ):
        pytest.fail("the block runs")


def test_a_place_that_cannot_be_written_to_is_known_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refuse_unwritable(tmp_path / "file")
    refuse_unwritable(tmp_path / "new/folder/a.txt")
    for target, why in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "file/a.txt", f"cannot be written: {tmp_path / 'file'}: Not a directory"),
        (Path("/proc/none/a.txt"), "cannot be written: /"),
    ):
        with pytest.raises(RequestError, match=why):
            refuse_unwritable(target)
    assert names(tmp_path) == ["file"]


FULL = "nothing was written"


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(lambda path: path.write_bytes(bytes(1_000_000)), id="Python"),
        pytest.param(lambda path: pl.DataFrame({"x": os.urandom(400_000).hex()}).write_csv(path), id="CSV"),
        pytest.param(
            lambda path: pl.DataFrame({"x": [os.urandom(9).hex() for _ in range(90_000)]}).write_parquet(
                path
            ),
            id="Parquet",
        ),
        pytest.param(
            lambda path: pl.LazyFrame({"x": [os.urandom(9).hex() for _ in range(90_000)]}).sink_parquet(path),
            id="streamed Parquet",
        ),
    ],
)
def test_a_full_disk_is_one_message_and_no_file(tmp_path: Path, work: object) -> None:
    assert callable(work)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(RequestError) as caught, writing(tmp_path / "a.bin") as partial:
            work(partial)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert str(caught.value) == f"{tmp_path / 'a.bin'}: File too large; {FULL}"
    assert names(tmp_path) == []


def hold(target: Path) -> "subprocess.Popen[str]":
    """A process in the middle of writing the target."""
    code = f"""
        import sys
        from pathlib import Path
        from bioscan.files import writing
        with writing(Path({str(target)!r}), overwrite=True) as partial:
            partial.write_text("half")
            print("ready", flush=True)
            sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_living_one_is_not(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with hold(target) as killed, hold(target) as living:
        killed.kill()
        killed.wait()
        assert target.read_text() == "old"
        left = list(tmp_path.glob(".*.partial"))
        assert len(left) == 2
        long_ago = time.time() - 3600
        for path in left:
            os.utime(path, (long_ago, long_ago))
        with writing(target, overwrite=True) as partial:
            partial.write_text("new")
        assert len(list(tmp_path.glob(".*.partial"))) == 1  # of the living one
        living.communicate("", timeout=20)
    assert living.returncode == 0
    assert target.read_text() == "half"  # it ended last
    assert names(tmp_path) == ["a.txt"]


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # FIPS 180-2, B.1
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# -- what errors say


def test_an_unknown_name_is_answered_with_the_nearest_and_all_when_they_are_few() -> None:
    assert near("famly", ["order", "family"]) == "; did you mean 'family'? (known: family, order)"
    assert near("xyz", ["order", "family"]) == " (known: family, order)"
    assert near("DIPTERA", ["Diptera", *map(str, range(30))]) == "; did you mean 'Diptera'?"
    assert near("xyz", map(str, range(30))) == ""
    assert near("xyz", []) == ""
    assert str(unknown("rank", "famly", ["family"])) == (
        "unknown rank 'famly'; did you mean 'family'? (known: family)"
    )


def test_a_missing_extra_names_the_command_that_installs_it() -> None:
    with pytest.raises(Exception, match=r"pip install 'bioscan\[search\]'"):
        require("no_such_module_anywhere", "search")
    assert require("json", "search").dumps([]) == "[]"
