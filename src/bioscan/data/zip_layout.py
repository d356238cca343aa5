"""Where the members of a ZIP archive lie in the file (APPNOTE.TXT 6.3.10, with ZIP64).

The central directory is read, and the local headers of those members only whose place it leaves open. What it
claims is held against the file: no range reaches past the end or into another member.
"""

import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.errors import DataError

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

_BATCH: Final = 100_000
_END: Final = struct.Struct("<4s4H2LH")
_END_64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64: Final = struct.Struct("<4sLQL")
_CENTRAL: Final = struct.Struct("<4sH2x2H4x3L3H4x2L")
"""Signature, maker, flags, method, checksum, compressed and full size, lengths of name, extra and comment,
the maker's attributes, local header's place."""
_LOCAL_SIZE: Final = 30
_MOST_16, _MOST_32 = 0xFFFF, 0xFFFFFFFF
_MOST_63: Final = (1 << 63) - 1
_NUMBERS: Final = ("maker", "flags", "method", "crc", "length", "size", "name_length", "attributes", "header")
_UNIX: Final = (3, 19)
"""Makers (upper byte) whose attributes hold a Unix mode: Unix, OS X."""


def list_zip(package: Path) -> pl.DataFrame:
    """A row per member, in storage order: path, offset, length, size, encoding, crc, kind.

    `encoding` is the method's name, `encrypted`, `damaged` (no local header of that name where the directory
    says) or `overlapping` (the range reaches into another member or past the end). `kind` is `folder`, `link`
    or `special` for members that are no files, else null.

    Raises:
        DataError: no directory, a damaged one, or an archive in several volumes.
    """
    with package.open("rb") as file:
        start, size, shift = _central_directory(file, package)
        batches = list(_central_entries(file, package, start, size))
        if not batches:
            return pl.DataFrame(schema={"path": pl.String, "offset": pl.Int64, "kind": pl.String})
        frame = pl.concat(batches).sort("header", maintain_order=True)
        # at the latest where the directory begins: there, no header will be found
        header = np.minimum(frame["header"].to_numpy(), start - shift) + shift
        length = frame["length"].to_numpy()
        # Members lie one after the other: bytes that neither name nor content explain are the local header's
        # extra field, or a gap. Where there are none, the content's place follows without reading the header.
        offset = header + _LOCAL_SIZE + frame["name_length"].to_numpy()
        unsure = np.append(header[1:], start) - offset != length
        names = frame["path"].filter(pl.Series(unsure)).to_list()
        offset[unsure] = _content_offsets(file.fileno(), header[unsure], names)
    there = offset >= 0
    overlapping = np.zeros(len(frame), np.bool_)
    overlapping[there] = np.append(header[there][1:], start) - offset[there] < length[there]
    by_unix = np.isin(frame["maker"].to_numpy() >> 8, _UNIX)
    mode = pl.Series(np.where(by_unix, frame["attributes"].to_numpy() >> 16 & 0o170000, 0))
    path = pl.col("path").str.replace_all("\\", "/", literal=True)
    method = pl.col("method").replace_strict(ZIP_METHODS, default="unknown method", return_dtype=pl.String)
    return frame.with_columns(offset=offset).select(
        path,
        "offset",
        "length",
        "size",
        pl.when(~pl.Series(there))
        .then(pl.lit("damaged"))
        .when(pl.Series(overlapping))
        .then(pl.lit("overlapping"))
        .when(pl.col("flags") & 1 == 1)
        .then(pl.lit("encrypted"))
        .otherwise(method)
        .alias("encoding"),
        pl.col("crc").cast(pl.UInt32),
        pl.when(path.str.ends_with("/"))
        .then(pl.lit("folder"))
        .when(mode == stat.S_IFLNK)
        .then(pl.lit("link"))
        .when(~mode.is_in([0, stat.S_IFREG, stat.S_IFDIR]))
        .then(pl.lit("special"))
        .alias("kind"),
    )


def _central_directory(file: Any, package: Path) -> tuple[int, int, int]:
    """Place and size of the central directory, and by how much the places in it are to be moved."""
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
    _, disk, first_disk, _, _, size, start, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    locator = _read_at(file, end - _LOCATOR_64.size, _LOCATOR_64.size)
    if locator[:4] == b"PK\6\7":
        _, _, place, _ = _LOCATOR_64.unpack(locator)
        # the usual place, also when something was put in front
        beside = end - _LOCATOR_64.size - _END_64.size
        for candidate in (beside, place):
            record = _read_at(file, candidate, _END_64.size)
            if record[:4] == b"PK\6\6":
                _, _, _, _, disk, first_disk, _, _, size, start = _END_64.unpack(record)
                end = candidate
                break
        else:
            raise DataError(f"{package}: a ZIP64 archive whose end record is damaged")
    if disk not in (0, _MOST_16) or first_disk not in (0, _MOST_16):
        raise DataError(f"{package}: a ZIP archive in several volumes; join them first (zip -s 0)")
    shift = end - size - start
    if shift < 0:
        raise DataError(f"{package}: the ZIP archive's directory is damaged; is the download complete?")
    return start + shift, size, shift


def _central_entries(file: Any, package: Path, start: int, size: int) -> Iterator[pl.DataFrame]:
    """Batches of the directory's entries, until its size is used up: path and `_NUMBERS`.

    The number of entries in the end record is not used: writers without ZIP64 let it wrap at 65,536.
    """
    rows: list[tuple[int, ...]] = []
    paths: list[str] = []
    unpack, fixed = _CENTRAL.unpack_from, _CENTRAL.size
    file.seek(start)
    block, at, left, number = b"", 0, size, 0
    while left or at < len(block):
        number += 1
        if len(block) - at < fixed + 3 * _MOST_16 and left:
            more = file.read(min(left, 1 << 24))
            left = left - len(more) if more else 0
            block, at = block[at:] + more, 0
        if len(block) - at < fixed or block[at : at + 4] != b"PK\1\2":
            raise _damaged(package, number)
        _, maker, flags, method, crc, length, full, name_size, extra_size, comment_size, mode, header = (
            unpack(block, at)
        )
        name_end = at + fixed + name_size
        name = block[at + fixed : name_end]
        if header == _MOST_32 or length == _MOST_32 or full == _MOST_32:
            extra = block[name_end : name_end + extra_size]
            full, length, header = _zip64_fields(extra, [full, length, header])
        try:
            paths.append(name.decode())
        except UnicodeDecodeError:
            paths.append(name.decode("cp437"))
        rows.append((maker, flags, method, crc, length, full, name_size, mode, header))
        at = name_end + extra_size + comment_size
        if at > len(block):
            raise _damaged(package, number)
        if len(rows) == _BATCH:
            yield _batch(paths, rows)
            rows, paths = [], []
    if rows:
        yield _batch(paths, rows)


def _batch(paths: list[str], rows: list[tuple[int, ...]]) -> pl.DataFrame:
    columns = np.array(rows, np.int64)
    return pl.DataFrame({"path": paths, **{name: columns[:, i] for i, name in enumerate(_NUMBERS)}})


def _damaged(package: Path, number: int) -> DataError:
    return DataError(f"{package}: the ZIP archive's directory is damaged at member {number:,}")


def _zip64_fields(extra: bytes, values: list[int]) -> list[int]:
    """The values, those that did not fit into 32 bits from the extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = [v for (v,) in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + length // 8 * 8])]
            return [min(wide.pop(0), _MOST_63) if value == _MOST_32 and wide else value for value in values]
        at += 4 + length
    return values


def _content_offsets(handle: int, headers: NDArray[np.int64], names: list[str]) -> NDArray[np.int64]:
    """Where the content of each member begins, by its local header; -1 where there is none of that name."""
    offsets = np.full(headers.size, -1, np.int64)
    with open(handle, "rb", buffering=0, closefd=False) as file:
        for row, (header, name) in enumerate(zip(headers.tolist(), names, strict=True)):
            file.seek(header)
            local = file.read(_LOCAL_SIZE + 4 * len(name))
            if len(local) < _LOCAL_SIZE or local[:4] != b"PK\3\4":
                continue
            name_size, extra_size = struct.unpack_from("<HH", local, 26)
            written = local[_LOCAL_SIZE : _LOCAL_SIZE + name_size]
            if written in (name.encode(), name.encode("cp437", "replace")):
                offsets[row] = header + _LOCAL_SIZE + name_size + extra_size
    return offsets


def _read_at(file: Any, place: int, length: int) -> bytes:
    if not 0 <= place < os.fstat(file.fileno()).st_size:
        return b""
    file.seek(place)
    return bytes(file.read(length))
