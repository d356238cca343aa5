"""The folder of an unfinished job: for one process and one job, with what is done until the target is there.

No output may take the place of what is read, and none that was there before is replaced unless told.
"""

import contextlib
import glob
import itertools
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import polars as pl

from bioscan.data.image_index import index_path
from bioscan.data.images import Images
from bioscan.data.packages import MARK, is_folder
from bioscan.errors import RequestError
from bioscan.files import locked, no_room, put_folder, refuse_existing, remove, sync, writing

WHOLE: Final = "package.done"
"""File of the work folder that says: the package is whole."""


@dataclass(frozen=True)
class WorkFolder:
    """Where a job's work lies."""

    work: Path
    target: Path | None
    shown: str
    """The target as it was named, for messages."""
    form: str
    schema: pl.Schema
    """Of the rows."""

    @property
    def spools(self) -> Path:
        """Folder of the shards that are done, and their sidecars."""
        return self.work / "shards"

    @property
    def staged(self) -> Path:
        """The package before it is moved to its place."""
        return self.work / "package"

    @property
    def job(self) -> Path:
        """What the job is, as JSON."""
        return self.work / "job.json"

    @property
    def written(self) -> Path:
        """Names of the outputs, from the moment on when `finish` writes them."""
        return self.work / "outputs.json"

    def sidecar(self, number: int) -> Path:
        """Table of a shard: its images, failures and rows."""
        return self.spools / f"{number:07d}.parquet"

    def has(self, mark: str) -> bool:
        """Whether a stage is done."""
        return (self.work / mark).exists()

    def mark(self, mark: str) -> None:
        """Say, to the disk, that a stage is done."""
        (self.work / mark).touch()
        sync(self.work)


def refuse_overlap(source: Images, outputs: Sequence[Path], inputs: Sequence[Path] = ()) -> None:
    """Raise a RequestError where an output would take the place of what is read, or of another output.

    Args:
        source: The package; its archives and its saved index count too.
        outputs: Files and folders to be written.
        inputs: Others that are read.
    """
    whole = Path(os.path.abspath(source.path))  # noqa: PTH100 - as `load_index` makes it
    package = [*([whole] if whole.exists() else []), *(source.base / name for name in source.containers)]
    read = [(path.resolve(), "the source package") for path in package]
    read.append((index_path(whole).resolve(), "the saved index of the source"))
    read += [(path.resolve(), str(path)) for path in inputs]
    places = [(output, output.resolve()) for output in outputs]
    for output, here in places:
        for path, what in read:
            if here == path:
                raise RequestError(f"{output} is {what}, which is read; choose another name")
            if path in here.parents:
                raise RequestError(f"{output} lies in {what}, which is read; choose another place")
            if here in path.parents:
                raise RequestError(f"{output} holds {what}, which is read; choose another place")
    for (one, here), (other, there) in itertools.combinations(places, 2):
        if here == there:
            raise RequestError(f"{other}: two of the outputs have this name")
        if here in there.parents or there in here.parents:
            raise RequestError(f"{one} and {other}: one of the outputs lies in the other")


def refuse_target(place: WorkFolder, job: Mapping[str, Any], *, overwrite: bool) -> None:
    """Raise where the target is there, and is not to be replaced or no package of ours."""
    target = place.target
    if target is None or not target.exists():
        return
    if place.has(WHOLE) and not place.staged.exists() and _read(place.job) == job:
        return  # put there by a run that was killed right after
    if not is_folder(target, place.form):
        refuse_existing(target, overwrite=overwrite)
        if target.is_dir():
            raise RequestError(f"{place.shown} is a folder; name a file")
        return
    if not target.is_dir():
        raise RequestError(f"{place.shown} is a file; name a folder")
    if any(target.iterdir()):
        refuse_existing(target, overwrite=overwrite)
        if not (target / MARK).is_file():
            raise RequestError(f"{place.shown} is no package that was made here; it is not replaced")


def refuse_outputs(
    place: WorkFolder, job: Mapping[str, Any], outputs: Sequence[Path], *, overwrite: bool
) -> None:
    """Raise where an output is there, and not because a run of the same job had begun to write it."""
    ours = (_read(place.written) or []) if _read(place.job) == job else []
    for output in outputs:
        if str(output.resolve()) not in ours:
            refuse_existing(output, overwrite=overwrite)


@contextlib.contextmanager
def held(place: WorkFolder, job: Mapping[str, Any], *, overwrite: bool) -> Iterator[None]:
    """The work folder, for this process alone, with this job in it."""
    with contextlib.ExitStack() as stack:
        while True:
            place.work.mkdir(parents=True, exist_ok=True)
            try:
                handle = stack.enter_context(locked(place.work))
            except BlockingIOError:
                raise RequestError(
                    f"{place.shown}: another process is working on it (in {place.work})"
                ) from None
            except OSError:  # a file system without locks
                break
            with contextlib.suppress(FileNotFoundError):  # the one before ended, and took it along
                if os.path.samestat(os.fstat(handle), place.work.stat()):
                    break
            stack.close()
        there = _read(place.job)
        if there != job:
            _refuse_other_job(place, there, job, overwrite=overwrite)
            for entry in place.work.iterdir():
                remove(entry)
            with writing(place.job) as partial:
                partial.write_text(json.dumps(job, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        place.spools.mkdir(exist_ok=True)
        left = place.work.parent.glob(f"{glob.escape(place.work.name)}.*.partial")
        for partial in [*place.spools.glob("*.partial"), *left]:
            remove(partial)
        try:
            yield
        except BaseException:
            if not any(place.spools.glob("*.parquet")):  # nothing to go on with
                remove(place.work)
            raise


def _refuse_other_job(place: WorkFolder, there: Any, job: Mapping[str, Any], *, overwrite: bool) -> None:
    if there is None:
        others = sorted(
            entry.name for entry in place.work.iterdir() if not entry.name.startswith(".job.json.")
        )
        if others and not place.job.exists():
            raise RequestError(f"{place.work} holds {others[0]}, which is not ours; choose another folder")
        if not place.job.exists():
            return
    if not overwrite:
        raise RequestError(
            f"{place.work} holds an unfinished job with other settings ({_difference(there, job)}); run that "
            "one to its end, or pass --overwrite to drop it"
        )


def _difference(there: Any, job: Mapping[str, Any]) -> str:
    """What differs, with both values where they are short."""
    before, now = _flat(there), _flat(job)
    for name in [*now, *before]:
        old, new = before.get(name), now.get(name)
        if old != new:
            named = name.removeprefix("record.").removeprefix("settings.")
            return "another source" if name == "source" else f"{named}: {old}, now {new}"
    return "unreadable"


def _flat(values: Any, within: str = "") -> dict[str, Any]:
    """Inner values by their path, `record.settings.quality`."""
    if not isinstance(values, Mapping):
        return {within.removesuffix("."): values}
    return {k: v for name, inner in values.items() for k, v in _flat(inner, f"{within}{name}.").items()}


def _read(file: Path) -> Any:
    """What a JSON file holds; None where there is none, or half of one."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def telling_of_a_full_disk(place: WorkFolder) -> Iterator[None]:
    """A full disk becomes a RequestError that says what to do."""
    try:
        yield
    except Exception as error:
        if reason := no_room(error):
            raise RequestError(
                f"{place.shown}: {reason}; what is done stays in {place.work}: make room and "
                "run the same again"
            ) from None
        raise


def put(place: WorkFolder, *, overwrite: bool) -> None:
    """Move the staged package to its target."""
    target = place.target
    assert target is not None
    if not target.is_dir() or any(target.iterdir()):
        refuse_existing(target, overwrite=overwrite)
    if is_folder(target, place.form):
        put_folder(place.staged, target, mark=MARK)
    else:
        place.staged.replace(target)
        sync(target.parent)


def remove_work_folder(work: Path) -> None:
    """In one step first: half a work folder would be no unfinished job."""
    left = work.with_name(f"{work.name}.{uuid.uuid4().hex[:8]}.partial")
    work.replace(left)
    remove(left)
