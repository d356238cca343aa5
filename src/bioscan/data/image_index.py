"""Where each image of a package lies: name, part, file, offset, length and encoding, as one table.

An opener per kind of package (`OPENERS`) lists its members; nothing is unpacked. The table is saved as
Parquet beside the package with a fingerprint of what it lists, and made again when that changed.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.data.hdf5_layout import image_datasets
from bioscan.errors import BioscanError, DataError, RequestError, near
from bioscan.files import writing
from bioscan.vocabulary import FOOTER, HDF5_GROUP, IMAGE_FOLDER

VERSION: Final = 1
EXTENSIONS: Final = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif")
"""Which members are images, whatever the case of the letters."""
_IMAGE: Final = r"(?i)\.(jpe?g|png|tiff?|bmp|webp|gif)$"
_HIDDEN: Final = r"(^|/)(\.|__MACOSX/)"
_IN_PART: Final = r"^(?:.*/)?part(\d{1,9})/(.+)$"

ZIP_METHODS: Final = {
    0: "file",
    8: "deflated",
    9: "deflate64",
    12: "bzip2",
    14: "lzma",
    93: "zstd",
    95: "xz",
    98: "ppmd",
}
ENCODINGS: Final = pl.Enum([*ZIP_METHODS.values(), "unknown method", "encrypted", "raw", "h5py"])
"""How a member is stored. `file`: its bytes as they are; `deflated`: inflate them; `raw`: H x W x 3 uint8
pixels; `h5py`: chunked or compressed HDF5, which has no byte range and is read through h5py. The others
cannot be read."""
PLAIN: Final = ENCODINGS.categories.to_list().index("file")
"""Physical value of the encoding `file`."""

SCHEMA: Final = {
    "name": pl.String(),
    "part": pl.Int32(),
    "container": pl.String(),
    "member": pl.String(),
    "offset": pl.Int64(),
    "length": pl.Int64(),
    "size": pl.Int64(),
    "encoding": ENCODINGS,
    "height": pl.Int32(),
    "width": pl.Int32(),
}
"""name: as looked up, NFC; part: number of its part folder or null; container: the file to open, relative to
the package; member: dataset within an HDF5 file where h5py must read it, else null; offset, length: bytes
stored; size: bytes as the reader gets them; height, width: pixels of a raw array, else null. In folders
length and size are null: a file is as long as it is when it is read."""

_BATCH: Final = 100_000
_CLOCK_S: Final = 2
"""Coarsest clock of a file system in use (FAT). A folder changed so shortly before its index was saved may
have changed again without a sign; such an index is not trusted."""


@dataclass(frozen=True)
class PackageIndex:
    """The members of a package."""

    frame: pl.DataFrame
    """Columns of `SCHEMA`, in storage order."""
    form: str
    """`folder`, `part folders`, `zip` or `hdf5`."""
    fingerprint: str
    duplicates: int
    """Members left out because one of the same name and part came before."""


class _Listing(NamedTuple):
    """What an opener finds: columns `path` (within the package) and those of SCHEMA that it knows."""

    frame: pl.DataFrame
    folders: dict[str, int]
    """Relative path -> mtime in ns of each folder listed; empty for an archive."""


def index_path(package: Path) -> Path:
    """Where the index of a package is saved: beside it."""
    return package.with_name(f"{package.name}.index.parquet")


def load_index(package: Path, *, save: bool = True) -> PackageIndex:
    """The index of a package: the saved one where it still holds, else made now and saved.

    A place that cannot be written to is no error: the index is then made each time.

    Raises:
        RequestError: nothing there, a kind of file that is no package, or several packages in one place.
        DataError: a damaged archive, or no image in it.
    """
    package = Path(os.path.abspath(package))  # noqa: PTH100 - `absolute` keeps "..", which is no name
    kind = _kind(package)
    saved = _saved_index(package)
    if saved is not None:
        return saved
    before = _stamp(package)
    listing = OPENERS[kind](package)
    fingerprint = _folders_fingerprint(listing.folders) if kind == "folder" else before
    index = replace(_finish(listing.frame, package, kind), fingerprint=fingerprint)
    if save:
        footer = {
            "version": VERSION,
            "form": index.form,
            "fingerprint": fingerprint,
            "duplicates": index.duplicates,
            "folders": listing.folders,
        }
        with (
            contextlib.suppress(OSError, BioscanError),
            writing(index_path(package), overwrite=True) as partial,
        ):
            index.frame.write_parquet(partial, metadata={FOOTER: json.dumps(footer)})
    return index


def _saved_index(package: Path) -> PackageIndex | None:
    """The index beside the package, if it is ours and the package is as it was."""
    file = index_path(package)
    try:
        saved_at = file.stat().st_mtime
        footer = json.loads(pl.read_parquet_metadata(file)[FOOTER])
        if footer["version"] != VERSION:
            return None
        folders = footer["folders"]
        if folders:
            now = {name: (package / name).stat().st_mtime_ns for name in folders}
            if now != folders or max(folders.values()) > (saved_at - _CLOCK_S) * 1e9:
                return None
        elif footer["fingerprint"] != _stamp(package):
            return None
        frame = pl.read_parquet(file, schema=SCHEMA)
    except (OSError, pl.exceptions.PolarsError, KeyError, TypeError, ValueError):
        return None
    return PackageIndex(frame, footer["form"], footer["fingerprint"], footer["duplicates"])


def _stamp(package: Path) -> str:
    status = package.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def _folders_fingerprint(folders: dict[str, int]) -> str:
    return hashlib.sha256(json.dumps(sorted(folders.items())).encode()).hexdigest()


def _kind(package: Path) -> str:
    """Which opener takes it, by content first."""
    if package.is_dir():
        return "folder"
    if not package.exists():
        where = package.parent
        known = [entry.name for entry in where.iterdir()] if where.is_dir() else []
        raise RequestError(f"{package}: no such image package{near(package.name, known)}")
    with package.open("rb") as file:
        head = file.read(8)
        if head[:4] in (b"PK\3\4", b"PK\5\6"):
            return "zip"
        place = 0  # of the HDF5 signature: 0, or after a user block of 512, 1024, 2048, ... bytes
        while len(head) == 8:
            if head == b"\x89HDF\r\n\x1a\n":
                return "hdf5"
            place = max(512, 2 * place)
            file.seek(place)
            head = file.read(8)
    suffix = package.suffix.lower()
    if package.stat().st_size == 0:
        raise DataError(f"{package}: the file is empty")
    if suffix == ".zip":
        return "zip"
    if suffix in (".h5", ".hdf5"):
        raise DataError(f"{package}: not an HDF5 file, its signature is missing; is the download complete?")
    raise RequestError(
        f"{package}: not a package of images; known are: a folder, part folders (part1, part2, ...), "
        "a ZIP archive, an HDF5 file"
    )


def _finish(frame: pl.DataFrame, package: Path, kind: str) -> PackageIndex:
    """Names, parts, order; one row per name and part."""
    _refuse_several(frame["path"], package, kind)
    path = pl.col("path")
    frame = frame.with_columns(
        path.str.extract(_IN_PART, 1).cast(pl.Int32).alias("part"),
        path.str.extract(_IN_PART, 2).alias("name"),
    )
    loose = frame.filter(pl.col("part").is_null())["path"]
    if not loose.is_empty():
        # the folders that all of them share, which are those that the first and the last in order share
        first, last = str(loose.min()).split("/")[:-1], str(loose.max()).split("/")[:-1]
        shared = [
            a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
        ]
        frame = frame.with_columns(pl.col("name").fill_null(path.str.slice(sum(len(a) + 1 for a in shared))))
    frame = frame.with_columns(pl.col("name").str.normalize("NFC"))
    frame = frame.sort(["part", "name"] if kind == "folder" else ["offset"], maintain_order=True)
    unique = frame.unique(["name", "part"], keep="first", maintain_order=True)
    if unique.is_empty():
        raise DataError(f"{package}: no images in it (names ending in {', '.join(EXTENSIONS)})")
    missing = [
        pl.lit(None, dtype).alias(name) for name, dtype in SCHEMA.items() if name not in unique.columns
    ]
    if kind != "folder":
        form = kind
    else:
        form = "part folders" if unique["part"].null_count() < unique.height else "folder"
    made = unique.with_columns(missing).select(pl.col(n).cast(d) for n, d in SCHEMA.items())
    return PackageIndex(made.rechunk(), form, "", frame.height - unique.height)


def _refuse_several(paths: pl.Series, package: Path, kind: str) -> None:
    """Raise where a part, or the place of a published package, is there twice: which one is meant?"""
    root = f"{package.as_posix()}/" if kind == "folder" else ""
    published: set[str] = set()
    parts: dict[int, set[str]] = {}
    for folder in paths.str.extract("^(.*/)").drop_nulls().unique():
        if found := re.search(f"(?:^|/)({IMAGE_FOLDER}/[^/]+)/", root + folder):
            published.add(found[1])
        if found := re.match(r"((?:.*/)?)part(\d{1,9})/", folder):
            parts.setdefault(int(found[2]), set()).add(found[1].strip("/") or ".")
    for places in (published, *parts.values()):
        if len(places) > 1:
            hint = "name one of them" if kind == "folder" else "extract it and name one of them"
            raise RequestError(f"{package}: several packages in one ({', '.join(sorted(places))}); {hint}")


def _images_only(frame: pl.DataFrame) -> pl.DataFrame:
    path = pl.col("path")
    return frame.filter(path.str.contains(_IMAGE) & ~path.str.contains(_HIDDEN))


# -- folders


def _list_folder(package: Path) -> _Listing:
    """All images at any depth; links are followed, each folder is visited once."""
    folders: dict[str, int] = {}
    visited: set[tuple[int, int]] = set()
    frames: list[pl.DataFrame] = []
    waiting = [""]
    while waiting:
        relative = waiting.pop()
        place = package / relative
        status = place.stat()  # before listing: a change in between is then noticed later
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[relative] = status.st_mtime_ns
        prefix = f"{relative}/" if relative else ""
        names: list[str] = []
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                try:
                    is_folder = entry.is_dir()
                except OSError:  # a link to itself
                    continue
                if is_folder:
                    waiting.append(prefix + entry.name)
                elif entry.name.lower().endswith(EXTENSIONS):
                    names.append(prefix + entry.name)
        waiting.sort(reverse=True)
        try:
            frames.append(pl.DataFrame({"path": names}, schema={"path": pl.String}))
        except UnicodeEncodeError as error:
            raise DataError(f"{place}: a file name is not UTF-8: {error.object!r}; rename it") from None
    frame = pl.concat(frames)
    return _Listing(frame.with_columns(container="path", offset=pl.lit(0), encoding=pl.lit("file")), folders)


# -- ZIP

_END: Final = struct.Struct("<4s4H2LH")
_END_64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64: Final = struct.Struct("<4sLQL")
_CENTRAL: Final = struct.Struct("<4s4x2H8x2L3H8xL")
"""Signature, flags, method, compressed and full size, lengths of name, extra and comment, local header's
place."""
_LOCAL_SIZE: Final = 30
_MOST_16, _MOST_32 = 0xFFFF, 0xFFFFFFFF


def _list_zip(package: Path) -> _Listing:
    """The central directory, member by member, and where the bytes of each begin."""
    with package.open("rb") as file:
        start, size, count, shift = _central_directory(file, package)
        batches = list(_central_entries(file, package, start, size, count))
        if not batches:
            return _Listing(pl.DataFrame(schema={"path": pl.String, "offset": pl.Int64}), {})
        frame = pl.concat(batches).sort("header", maintain_order=True)
        header = frame["header"].to_numpy() + shift
        # Members lie one after the other: bytes that neither name nor content explain are the local header's
        # extra field, or a gap. Where there are none, the content's place follows without reading the header.
        following = np.append(header[1:], start)
        offset = header + _LOCAL_SIZE + frame["name_length"].to_numpy()
        spare = following - offset - frame["length"].to_numpy()
        frame = frame.with_columns(header=header, offset=offset, spare=spare)
        frame = _images_only(frame.with_columns(pl.col("path").str.replace_all("\\", "/", literal=True)))
        unsure = frame["spare"].to_numpy() != 0
        offset = frame["offset"].to_numpy().copy()
        offset[unsure] = _content_offsets(file.fileno(), frame["header"].to_numpy()[unsure])
    method = pl.col("method").replace_strict(ZIP_METHODS, default="unknown method", return_dtype=pl.String)
    frame = frame.with_columns(
        offset=offset,
        container=pl.lit(package.name),
        encoding=pl.when(pl.col("flags").cast(pl.Int64) & 1 == 1).then(pl.lit("encrypted")).otherwise(method),
    )
    return _Listing(frame, {})


def _central_directory(file: Any, package: Path) -> tuple[int, int, int, int]:
    """Place, size and entries of the central directory, and by how much places in it are to be moved."""
    file.seek(0, os.SEEK_END)
    end_of_file = file.tell()
    tail_start = max(0, end_of_file - _END.size - _MOST_16)
    file.seek(tail_start)
    tail = file.read()
    places = [m.start() for m in re.finditer(b"PK\5\6", tail) if m.start() + _END.size <= len(tail)]
    # The last one whose comment reaches the end of the file (a comment may hold the signature too); where
    # there is none, something was put behind the archive.
    whole = [p for p in places if p + _END.size + _END.unpack_from(tail, p)[-1] == len(tail)]
    at = max(whole or places, default=-1)
    if at < 0:
        raise DataError(
            f"{package}: a ZIP archive without end record: cut short or no ZIP; is the download complete?"
        )
    _, disk, first_disk, _, count, size, start, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    locator = _read_at(file, end - _LOCATOR_64.size, _LOCATOR_64.size)
    if locator[:4] == b"PK\6\7":
        _, _, place, _ = _LOCATOR_64.unpack(locator)
        beside = (
            end - _LOCATOR_64.size - _END_64.size
        )  # the usual place, also when something was put in front
        for candidate in (beside, place):
            record = _read_at(file, candidate, _END_64.size)
            if record[:4] == b"PK\6\6":
                _, _, _, _, disk, first_disk, _, count, size, start = _END_64.unpack(record)
                end = candidate
                break
        else:
            raise DataError(f"{package}: a ZIP64 archive whose end record is damaged")
    if disk not in (0, _MOST_16) or first_disk not in (0, _MOST_16):
        raise DataError(f"{package}: a ZIP archive in several volumes; join them first (zip -s 0)")
    shift = end - size - start
    if shift < 0:
        raise DataError(f"{package}: the ZIP archive's directory is damaged; is the download complete?")
    return start + shift, size, count, shift


def _central_entries(file: Any, package: Path, start: int, size: int, count: int) -> Iterator[pl.DataFrame]:
    """Batches with path, header (place of the local header), length, size, flags, method, name_length."""
    rows: list[tuple[int, ...]] = []
    paths: list[str] = []
    unpack, fixed = _CENTRAL.unpack_from, _CENTRAL.size
    file.seek(start)
    block, at, left = b"", 0, size
    for number in range(1, count + 1):
        if len(block) - at < fixed + 3 * _MOST_16 and left:
            more = file.read(min(left, 1 << 24))
            left = left - len(more) if more else 0
            block, at = block[at:] + more, 0
        if len(block) - at < fixed or block[at : at + 4] != b"PK\1\2":
            raise DataError(
                f"{package}: the ZIP archive's directory is damaged at member {number:,} of {count:,}"
            )
        _, flags, method, length, full, name_length, extra_length, comment_length, header = unpack(block, at)
        name_end = at + fixed + name_length
        name = block[at + fixed : name_end]
        if header == _MOST_32 or length == _MOST_32 or full == _MOST_32:
            extra = block[name_end : name_end + extra_length]
            full, length, header = _zip64_fields(extra, [full, length, header])
        try:
            paths.append(name.decode())
        except UnicodeDecodeError:
            paths.append(name.decode("cp437"))
        rows.append((header, length, full, flags, method, name_length))
        at = name_end + extra_length + comment_length
        if len(rows) == _BATCH or number == count:
            columns = np.array(rows, np.int64)
            names = ("header", "length", "size", "flags", "method", "name_length")
            yield pl.DataFrame({"path": paths, **{n: columns[:, i] for i, n in enumerate(names)}})
            rows, paths = [], []


def _zip64_fields(extra: bytes, values: list[int]) -> list[int]:
    """The values, those that did not fit into 32 bits from the extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = [v for (v,) in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + length // 8 * 8])]
            return [wide.pop(0) if value == _MOST_32 and wide else value for value in values]
        at += 4 + length
    return values


def _content_offsets(handle: int, headers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the content of each member begins, by its local header; -1 where there is no such header."""
    offsets = np.full(headers.size, -1, np.int64)
    with open(handle, "rb", buffering=0, closefd=False) as file:
        for row, header in enumerate(headers.tolist()):
            file.seek(header)
            local = file.read(_LOCAL_SIZE)
            if len(local) == _LOCAL_SIZE and local[:4] == b"PK\3\4":
                offsets[row] = header + _LOCAL_SIZE + sum(struct.unpack_from("<HH", local, 26))
    return offsets


def _read_at(file: Any, place: int, length: int) -> bytes:
    if place < 0:
        return b""
    file.seek(place)
    return bytes(file.read(length))


# -- HDF5


def _list_hdf5(package: Path) -> _Listing:
    """The datasets of group `bioscan_dataset`, or of the root where that group is absent."""
    frame = pl.concat(image_datasets(package, HDF5_GROUP, _BATCH), how="vertical")
    return _Listing(_images_only(frame).with_columns(container=pl.lit(package.name)), {})


OPENERS: Final = {"folder": _list_folder, "zip": _list_zip, "hdf5": _list_hdf5}
