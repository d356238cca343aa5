"""Where the members of a TAR archive lie in the file: V7, ustar, pax and GNU headers (POSIX.1-2001 pax;
GNU tar manual, «Basic Tar Format»).
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import polars as pl

from bioscan.errors import DataError

BLOCK: Final = 512
_BATCH: Final = 100_000
_MOST_NAME: Final = 1 << 20
"""Bytes of a long name or of a pax header; longer ones are taken for damage."""
_HARD_LINK: Final = 0x31
_LINKS: Final = b"12"
_SPECIAL: Final = b"346"
_FOLDER: Final = b"5D"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_ALL, _SPARSE = b"LKxgS"
_NO_CONTENT: Final = b"123456"
"""Types that have no content, whatever size they claim."""
_KINDS: Final = {
    **dict.fromkeys(_LINKS, "link"),
    **dict.fromkeys(_SPECIAL, "special"),
    **dict.fromkeys(_FOLDER, "folder"),
}


class _Member(NamedTuple):
    path: str
    offset: int
    length: int
    encoding: str
    kind: str | None
    target: str | None
    """Of a hard link: the path of the member whose content it shares."""


_SCHEMA: Final = {
    "path": pl.String,
    "offset": pl.Int64,
    "length": pl.Int64,
    "encoding": pl.String,
    "kind": pl.String,
    "target": pl.String,
}


def is_tar_header(block: bytes) -> bool:
    """Whether a block of 512 bytes is a TAR header, by its checksum."""
    if len(block) < BLOCK:
        return False
    try:
        written = _number(block[148:156])
    except ValueError:
        return False
    total = sum(block) - sum(block[148:156]) + 8 * 32  # the field itself counts as spaces
    if written == total:
        return True
    # some old writers added signed bytes
    return written == total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def list_tar(package: Path) -> pl.DataFrame:
    """A row per member, in storage order: path, offset, length, size, encoding, kind.

    `encoding` is `file` or `sparse`; `kind` is `folder`, `link` or `special` (device, FIFO) for members that
    are no files, else null. A hard link is the file that it names, if that lies before it; else, like any
    symbolic link, it is a `link`. Names that are not UTF-8 are read as Latin-1.

    Raises:
        DataError: a header is damaged, or the archive ends within a member.
    """
    with package.open("rb", buffering=0) as file:
        members = _members(file, package)
        frames = [pl.DataFrame(schema=_SCHEMA)]
        while batch := list(itertools.islice(members, _BATCH)):
            frames.append(pl.DataFrame(batch, schema=_SCHEMA, orient="row"))
    return _followed(pl.concat(frames)).drop("target").with_columns(size="length")


def _followed(frame: pl.DataFrame) -> pl.DataFrame:
    """Hard links with the content of the member before them that they name; `link` where there is none.

    A program that packs a folder writes each further name of a file so.
    """
    targets = frame["target"].drop_nulls()
    if targets.is_empty():
        return frame
    seen: dict[str, tuple[int, int, str]] = {}
    numbers: list[int] = []
    found: list[tuple[int, int, str]] = []
    named = pl.col("target").is_not_null() | pl.col("path").is_in(targets.unique().implode())
    for number, path, offset, length, encoding, kind, target in (
        frame.with_row_index().filter(named).iter_rows()
    ):
        content = (offset, length, encoding) if kind is None else seen.get(target)
        if content is None:
            continue
        seen[path] = content
        if target is not None:
            numbers.append(number)
            found.append(content)
    columns = ("offset", "length", "encoding")
    shared = pl.DataFrame(found, schema={name: _SCHEMA[name] for name in columns}, orient="row")
    shared = shared.with_columns(index=pl.Series(numbers, dtype=pl.UInt32), kind=pl.lit(None, pl.String))
    return frame.with_row_index().update(shared, on="index", include_nulls=True).drop("index")


def _members(file: Any, package: Path) -> Iterator[_Member]:
    end = os.fstat(file.fileno()).st_size
    place = 0
    last = "its beginning"
    everywhere: dict[str, str] = {}  # from global pax headers
    here: dict[str, str] = {}  # for the next member
    while place < end:
        file.seek(place)
        block = file.read(BLOCK)
        if not block.strip(b"\0"):
            break
        if not is_tar_header(block):
            cut = " (cut short)" if len(block) < BLOCK else ""
            raise DataError(
                f"{package}: the TAR archive is damaged at byte {place:,}, after {last}{cut}; "
                "is the download complete?"
            )
        try:
            length = _number(block[124:136])
            kind = block[156]
            place += BLOCK
            if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_ALL):
                if not 0 <= length <= _MOST_NAME:
                    raise ValueError
                file.seek(place)
                content = file.read(length)
                if len(content) < length:
                    raise ValueError
                place += -(-length // BLOCK) * BLOCK
                if kind == _LONG_NAME:
                    here["path"] = _text(content.partition(b"\0")[0])
                elif kind == _LONG_LINK:
                    here["linkpath"] = _text(content.partition(b"\0")[0])
                elif kind == _PAX:
                    here.update(_pax_records(content))
                elif kind == _PAX_ALL:
                    everywhere.update(_pax_records(content))
                continue
            said = {**everywhere, **here}
            here = {}
            if "size" in said:
                length = int(said["size"])
            if kind == _SPARSE:
                more = block[482]
                while more and place < end:
                    file.seek(place)
                    extension = file.read(BLOCK)
                    more = extension[504] if len(extension) == BLOCK else 0
                    place += BLOCK
            path = said.get("GNU.sparse.name") or said.get("path") or _name(block)
            target = None
            if kind == _HARD_LINK:
                target = said.get("linkpath") or _text(block[157:257].partition(b"\0")[0])
            if kind in _NO_CONTENT:
                length = 0
            if length < 0:
                raise ValueError
        except ValueError:
            raise DataError(
                f"{package}: the TAR archive is damaged at byte {place:,}, after {last}"
            ) from None
        last = path
        if place + length > end:
            raise DataError(
                f"{package}: the TAR archive is cut short within {path}; is the download complete?"
            )
        sparse = kind == _SPARSE or any(name.startswith("GNU.sparse.") for name in said)
        folder = path.endswith("/")
        yield _Member(
            path,
            place,
            length,
            "sparse" if sparse else "file",
            "folder" if folder else _KINDS.get(kind),
            target,
        )
        place += -(-length // BLOCK) * BLOCK


def _name(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:  # GNU headers have other things there
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _number(field: bytes) -> int:
    """Octal text, or binary where the first bit is set (GNU); ValueError where it is neither."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    text = field.partition(b"\0")[0].strip()
    return int(text, 8) if text else 0


def _pax_records(content: bytes) -> dict[str, str]:
    """Records of length, space, key, `=`, value and line feed; ValueError where they are none."""
    records: dict[str, str] = {}
    at = 0
    while at < len(content) and content[at]:
        space = content.index(b" ", at)
        length = int(content[at:space])
        if length < 5 or at + length > len(content):
            raise ValueError
        key, equals, value = content[space + 1 : at + length - 1].partition(b"=")
        if not equals:
            raise ValueError
        records[_text(key)] = _text(value)
        at += length
    return records


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("latin-1")
