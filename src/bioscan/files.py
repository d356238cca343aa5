"""Writing that is whole or not there at all."""

import contextlib
import errno
import glob
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from bioscan.errors import RequestError

_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_MANY = 100
_FRESH_S = 60
"""A temporary file younger than this may belong to a process that is about to lock it."""


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raise a RequestError where something is there and was not to be replaced."""
    if target.exists() and not overwrite:
        raise RequestError(f"{target} exists; choose another name or pass --overwrite")


def refuse_input(target: Path, *inputs: object) -> None:
    """Raise a RequestError where a target is one of the files that are read; what is no path is none."""
    for source in inputs:
        known = isinstance(source, str | Path) and target.exists() and Path(source).exists()
        if known and target.samefile(str(source)):
            raise RequestError(f"{target} is an input, and would be overwritten; choose another name")


def refuse_unwritable(target: Path) -> None:
    """Raise a RequestError, before any work, where no file can be put; nothing is made."""
    if target.is_dir():
        raise RequestError(f"{target} is a folder; name a file")
    folder = next(folder for folder in Path(os.path.abspath(target)).parents if folder.exists())  # noqa: PTH100
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RequestError(f"{target} cannot be written: {folder}: {error.strerror}") from None


def refuse_in_use(folder: Path) -> None:
    """Raise a RequestError where a folder cannot be replaced: a mount point, the current one, its parents."""
    whole, here = folder.resolve(), Path.cwd()
    if whole == here or whole in here.parents:
        raise RequestError(f"{folder} is the current folder, or holds it; name a folder in it")
    if whole.is_mount():
        raise RequestError(f"{folder} is a mount point, which cannot be replaced; name a folder in it")


def behind_link(folder: Path) -> Path:
    """The folder that a link leads to, there or not yet: it is replaced then, not the link."""
    return folder.resolve() if folder.is_symlink() else folder


@contextlib.contextmanager
def writing(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place when the block ends well, and vanishes when not.

    The file is synced to disk before the rename, so that a reader sees the old file or the whole new one.
    Missing parent folders are made; what a killed writer of the same target left behind is removed.

    Raises:
        RequestError: the target exists or is a folder; the disk is full.
    """
    target = Path(target)
    refuse_existing(target, overwrite=overwrite)
    if target.is_dir():
        raise RequestError(f"{target} is a folder; name a file")
    with _partial(target) as partial:
        yield partial
        sync(partial)
        partial.replace(target)
        sync(target.parent)


@contextlib.contextmanager
def writing_folder(target: Path, *, overwrite: bool = False, mark: str | None = None) -> Iterator[Path]:
    """Like `writing`, for a folder: it appears whole, in place of an older one when told.

    Where the target is a link, what it leads to is the target.

    A wrong name must not cost a folder of something else: only a folder that holds the file `mark`, or
    nothing but names that the new one has too, is replaced.

    Raises:
        RequestError: as `writing`; the older folder holds something else, or is in use (`refuse_in_use`).
    """
    refuse_in_use(Path(target))
    target = behind_link(Path(target))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        refuse_existing(target, overwrite=overwrite)
        if not target.is_dir():
            raise RequestError(f"{target} is a file; name a folder")
    with _partial(target, folder=True) as partial:
        yield partial
        put_folder(partial, target, mark=mark)


def put_folder(made: Path, target: Path, *, mark: str | None = None) -> None:
    """Put a finished folder of the same file system in the place of an older one, or where none was.

    Raises:
        RequestError: the older folder holds something else; see `writing_folder`.
    """
    if target.is_dir() and not (mark and (target / mark).is_file()):
        others = sorted({e.name for e in target.iterdir()} - {e.name for e in made.iterdir()})
        if others:
            raise RequestError(f"{target} holds {others[0]}, which is not ours; choose another folder")
    inside = [*made.rglob("*"), made]
    if len(inside) > _MANY and hasattr(os, "sync"):
        os.sync()  # one call is faster than thousands
    else:
        for path in inside:
            sync(path)
    older = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.older.partial")
    if target.exists():
        target.replace(older)
    made.replace(target)
    remove(older)
    sync(target.parent)


def no_room(error: BaseException) -> str | None:
    """What the system says where a disk, a quota or a file is full; None for any other error."""
    said = re.search(r"(?:os error |errno = )(\d+)", str(error))  # Polars and HDF5 give it in words only
    number = int(said[1]) if said else getattr(error, "errno", None)
    return os.strerror(number) if number in _NO_ROOM else None


@contextlib.contextmanager
def _partial(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """An empty file or folder beside the target, held while the block lasts and gone after it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _FRESH_S:
                with locked(left):
                    remove(left)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir() if folder else partial.touch(exist_ok=False)
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # a file system without locks: nobody will remove it then
                held.enter_context(locked(partial))
            yield partial
    except Exception as error:
        if reason := no_room(error):
            raise RequestError(f"{target}: {reason}; nothing was written") from None
        raise
    finally:
        remove(partial)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """A lock on a file or folder that ends with this process, however it ends; the open handle.

    Raises:
        BlockingIOError: another process has it.
        OSError: there can be none here.
    """
    if sys.platform == "win32":
        raise OSError(errno.EOPNOTSUPP, "no locks on open files")
    import fcntl

    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with what is in it; nothing there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk hold a file's or folder's content."""
    folder = path.is_dir()
    if folder and os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows syncs only what it may write
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
