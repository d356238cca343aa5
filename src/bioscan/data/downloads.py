"""Fetching the released files: resumed, verified, from any mirror; a file with its name is a whole one.

What has arrived lies in `.NAME.part` beside the target, and where it came from (mirror, validators, length)
in `.NAME.part.json`. Only when length and published MD5 are right, or for a file without one when nothing
speaks against it, does the part take the target's name. Bytes of two mirrors are joined only where the MD5
decides.
"""

import hashlib
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Literal
from urllib.parse import quote, urlsplit, urlunsplit

import requests

from bioscan.data.released_files import MIRRORS, ReleasedFile, released
from bioscan.data.transfer import DownloadSettings, Meter, Notice, Wanted, open_part, transfer
from bioscan.errors import RequestError, unknown

State = Literal["verified", "not verifiable", "bad", "partial", "missing", "failed"]
Metered = Callable[[str], AbstractContextManager[Meter | None]]
"""For a file's name, the context in which it is worked on, and what is told how far it is."""


@dataclass(frozen=True, kw_only=True)
class Download:
    """What is there of one released file.

    Attributes:
        name: Its name.
        state: `verified`: length and MD5 are as published. `not verifiable`: no checksum is published, and
            nothing speaks against it. `bad`: not the released file. `partial`: begun. `missing`: nothing
            there. `failed`: could not be fetched.
        size: Bytes that are there.
        md5: Of the whole file, hexadecimal; None where it was not computed.
        sha256: The same, where no MD5 is published.
        mirror: Where it came from; None: it was there already, or is not there.
        detail: What the state rests on, or what is wrong.
    """

    name: str
    state: State
    size: int = 0
    md5: str | None = None
    sha256: str | None = None
    mirror: str | None = None
    detail: str = ""

    @property
    def complete(self) -> bool:
        """Whether the file is there and nothing speaks against it."""
        return self.state in ("verified", "not verifiable")


def download(
    names: Iterable[str],
    folder: Path,
    *,
    mirrors: Iterable[str] = (),
    base_url: str | None = None,
    settings: DownloadSettings | None = None,
    overwrite: bool = False,
    metered: Metered = lambda name: nullcontext(),
    notice: Notice = lambda text: None,
    done: Callable[[Download], None] = lambda result: None,
) -> list[Download]:
    """Fetch released files into a folder, one after the other; one that fails does not stop the others.

    Args:
        names: Files, groups, parts or patterns, as `released` takes them.
        folder: Where they go; it is made.
        mirrors: Ask these, in this order; empty: all that are known.
        base_url: Folder of your own copy: BASE_URL/NAME is asked first, and alone where no mirrors are named.
        settings: How patient to be.
        overwrite: Fetch also what is there already.
        metered: The context of each file.
        notice: Is told of each failed try.
        done: Is told each result as it comes.

    Raises:
        RequestError: unknown name or mirror; no room on the disk for what is known to come.
    """
    chosen, folder = tuple(mirrors), Path(folder)
    wanted = [(file, mirrors_of(file, chosen, base_url)) for file in released(names)]
    folder.mkdir(parents=True, exist_ok=True)
    _require_room(folder, [file for file, _ in wanted], overwrite=overwrite)
    results = []
    for file, addresses in wanted:
        with metered(file.name) as progress:
            result = fetch(
                file,
                folder,
                mirrors=addresses,
                settings=settings,
                overwrite=overwrite,
                progress=progress,
                notice=notice,
            )
        done(result)
        results.append(result)
    return results


def fetch(
    file: ReleasedFile,
    folder: Path,
    *,
    mirrors: Mapping[str, str] | None = None,
    settings: DownloadSettings | None = None,
    overwrite: bool = False,
    progress: Meter | None = None,
    notice: Notice = lambda text: None,
) -> Download:
    """Fetch one file into a folder: go on with what is there of it, try again, fall over to the next mirror.

    A file that is there is checked and left alone. Proxies and `.netrc` are taken from the environment.

    Args:
        file: What is known of it.
        folder: Where it goes; it is made.
        mirrors: Mirror -> address, in the order to ask them; None: the file's own.
        settings: How patient to be.
        overwrite: Fetch it also where it is there; the old file stays until the new one is complete.
        progress: Is told how far it is.
        notice: Is told of each failed try.
    """
    settings = settings or DownloadSettings()
    mirrors = file.mirrors if mirrors is None else mirrors
    target = folder / file.name
    if target.exists() and not overwrite:
        return inspect(file, folder, progress)
    if not mirrors:
        place = f"; see {file.page}" if file.page else ""
        return Download(name=file.name, state="failed", detail=f"no address of it is known{place}")

    def tell(text: str) -> None:
        notice(f"{file.name}: {text}")

    folder.mkdir(parents=True, exist_ok=True)
    reasons = []
    try:
        with open_part(_part_path(file, folder), _algorithms(file)) as part, requests.Session() as session:
            if target.exists() and not overwrite:  # another process has ended in the meantime
                return inspect(file, folder, progress)
            for mirror, address in mirrors.items():
                wanted = Wanted(
                    mirror=mirror,
                    address=address,
                    size=file.size,
                    joinable=file.md5 is not None,
                    end_shows=Path(file.name).suffix in _END_FAULTS,
                )
                while True:
                    reason = transfer(session, part, wanted, settings, progress=progress, notice=tell)
                    if reason:
                        break
                    stated = part.source.sha256 if part.source else None
                    found = _judge(file, part.path, lambda: part.checksums(progress), mirror, stated)
                    if found.complete:
                        part.place(target)
                        return found
                    tell(f"{mirror}: {found.detail}; deleted")
                    of_one = part.of_one
                    part.begin(None)
                    if of_one:  # else it may be good when all of it comes from here
                        reason = found.detail
                        break
                tell(f"{mirror}: {reason}; given up")
                reasons.append(f"{mirror}: {reason}")
    except RequestError as error:
        reasons.append(str(error))
    size = _size(_part_path(file, folder))
    return Download(name=file.name, state="failed", size=size, detail="; ".join(reasons))


def check_downloads(
    names: Iterable[str], folder: Path, *, metered: Metered = lambda name: nullcontext()
) -> list[Download]:
    """What is there of released files in a folder, read and compared; nothing is fetched.

    Args:
        names: Which ones, as `released` takes them; empty: those of which anything is there.
        folder: Where they are.
        metered: The context of each file.

    Raises:
        RequestError: unknown name; no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder")
    names = tuple(names)
    found = []
    for file in released(names):
        if names or (folder / file.name).exists() or _size(_part_path(file, folder)):
            with metered(file.name) as progress:
                found.append(inspect(file, folder, progress))
    return found


def inspect(file: ReleasedFile, folder: Path, progress: Meter | None = None) -> Download:
    """What is there of one file in a folder; a whole file is read and its checksum compared."""
    target = folder / file.name
    if target.is_file():
        return _judge(file, target, lambda: _checksums(target, _algorithms(file), progress), None, None)
    if target.exists():
        return Download(name=file.name, state="bad", detail="not a file")
    size = _size(_part_path(file, folder))
    if size:
        of = f" of {file.size:,}" if file.size else ""
        return Download(name=file.name, state="partial", size=size, detail=f"{size:,}{of} bytes have arrived")
    return Download(name=file.name, state="missing")


def mirrors_of(
    file: ReleasedFile, mirrors: Iterable[str] = (), base_url: str | None = None
) -> Mapping[str, str]:
    """Mirror -> address of a file, in the order to ask them; see `download`.

    >>> from bioscan.data.released_files import released
    >>> mirrors_of(released(["clibd"])[0], base_url="http://localhost:8000/bioscan/")
    {'localhost:8000/bioscan': 'http://localhost:8000/bioscan/CLIBD_partitioning.zip'}
    """
    chosen = tuple(mirrors)
    for name in chosen:
        if name not in MIRRORS:
            raise unknown("mirror", name, MIRRORS)
    own = {}
    if base_url is not None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise RequestError(f"base URL '{base_url}' is not the http(s) address of a folder")
        shown = f"{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")  # without name and password
        folder = urlunsplit(parts).rstrip("/")
        own[shown] = f"{folder}/{quote(file.name)}"
    if chosen or not own:
        own |= {name: file.mirrors[name] for name in chosen or file.mirrors if name in file.mirrors}
    return own


def _require_room(folder: Path, files: Iterable[ReleasedFile], *, overwrite: bool) -> None:
    """Raise a RequestError where files of known size have no room."""
    needed = sum(
        file.size - _size(_part_path(file, folder))
        for file in files
        if file.size is not None and (overwrite or not (folder / file.name).exists())
    )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RequestError(f"{needed:,} bytes are to come, {free:,} are free at {folder}")


def _part_path(file: ReleasedFile, folder: Path) -> Path:
    return folder / f".{file.name}.part"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _algorithms(file: ReleasedFile) -> tuple[str, ...]:
    """Checksums worth computing: where none is published, those that people compare."""
    return ("md5",) if file.md5 else ("md5", "sha256")


def _checksums(path: Path, algorithms: Iterable[str], progress: Meter | None) -> dict[str, str]:
    sums = [hashlib.new(name, usedforsecurity=False) for name in algorithms]
    total, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            for one in sums:
                one.update(chunk)
            done += len(chunk)
            if progress:
                progress(done, total)
    return {one.name: one.hexdigest() for one in sums}


def _judge(
    file: ReleasedFile,
    path: Path,
    checksums: Callable[[], Mapping[str, str]],
    mirror: str | None,
    stated: str | None,
) -> Download:
    """Whether the whole content at `path` is the released file; the cheap tests come first.

    Args:
        file: What is known of it.
        path: Where the content lies.
        checksums: Computes its checksums.
        mirror: Where it came from.
        stated: SHA-256 as that mirror states it.
    """
    size = _size(path)
    sums: Mapping[str, str] = {}
    fault = None
    if file.size not in (None, size):
        fault = f"{size:,} bytes; published are {file.size:,}"
    elif not size:
        fault = "empty"
    elif file.md5 is None and (end_fault := _END_FAULTS.get(path.with_name(file.name).suffix)):
        with path.open("rb") as content:
            fault = end_fault(content, size)
    if not fault:
        sums = checksums()
        if file.md5 is not None and sums["md5"] != file.md5:
            fault = f"its MD5 is {sums['md5']}; published is {file.md5}"
        elif file.md5 is None and stated is not None and sums["sha256"] != stated:
            fault = f"its SHA-256 is {sums['sha256']}; {mirror} states {stated}"
    if file.md5 is not None:
        detail = "size and MD5 are as published" if file.size else "MD5 is as published"
    else:
        detail = "no checksum is published"
        if stated is not None:
            detail = f"{detail}; SHA-256 is as {mirror} states it"
    return Download(
        name=file.name,
        state="bad" if fault else "verified" if file.md5 else "not verifiable",
        size=size,
        md5=sums.get("md5"),
        sha256=sums.get("sha256"),
        mirror=mirror,
        detail=fault or detail,
    )


def _zip_fault(file: IO[bytes], size: int) -> str | None:
    """What is wrong with the end of a ZIP file; its central directory is found, not read."""
    length = min(size, 22 + 65535)  # the end record and the longest comment
    file.seek(size - length)
    tail = file.read(length)
    at = tail.rfind(b"PK\5\6", 0, max(0, length - 18))
    while at >= 0 and at + 22 + int.from_bytes(tail[at + 20 : at + 22], "little") > length:
        at = tail.rfind(b"PK\5\6", 0, at)  # part of a comment
    if at < 0:
        return "a ZIP file without its end"
    count, width, start = struct.unpack("<HLL", tail[at + 10 : at + 20])
    end = size - length + at
    if count == 0xFFFF or 0xFFFFFFFF in (width, start):
        file.seek(max(0, end - 20))
        locator = file.read(20)
        if not locator.startswith(b"PK\6\7"):
            return "a ZIP file without its end"
        (end,) = struct.unpack("<Q", locator[8:16])
        file.seek(min(end, size))
        record = file.read(56)
        if len(record) < 56 or not record.startswith(b"PK\6\6"):
            return "a ZIP file without its end"
        count, width, start = struct.unpack("<QQQ", record[32:56])
    file.seek(0)
    first = file.read(4)
    file.seek(min(start, size))
    if start + width > end or (count and (first != b"PK\3\4" or file.read(4) != b"PK\1\2")):
        return "a ZIP file whose central directory is not where it says"
    return None


def _hdf5_fault(file: IO[bytes], size: int) -> str | None:
    """What the superblock of an HDF5 file says against it: signature, and the end-of-file address."""
    file.seek(0)
    block = file.read(64)
    if not block.startswith(b"\x89HDF\r\n\x1a\n") or len(block) < 64:
        return "not an HDF5 file"
    version = block[8]
    place = {0: 40, 1: 44, 2: 28, 3: 28}.get(version)  # HDF5 file format, II.A
    offset_size = block[13] if version < 2 else block[9]
    if place is None or offset_size != 8:
        return None
    (end,) = struct.unpack("<Q", block[place : place + 8])
    return f"an HDF5 file cut short: {size:,} of {end:,} bytes" if end > size else None


def _json_fault(file: IO[bytes], size: int) -> str | None:
    """Whether a JSON array begins and ends."""
    file.seek(0)
    first = file.read(1024).lstrip()
    file.seek(max(0, size - 1024))
    last = file.read(1024).rstrip()
    return None if first.startswith(b"[") and last.endswith(b"]") else "a JSON array without its end"


_END_FAULTS: Final[Mapping[str, Callable[[IO[bytes], int], str | None]]] = {
    ".zip": _zip_fault,
    ".xlsx": _zip_fault,
    ".hdf5": _hdf5_fault,
    ".jsonld": _json_fault,
}
"""Suffix -> what shows, without a checksum and without reading it all, that a file is cut short."""
