"""Where the datasets of an HDF5 group lie in the file.

Opening a dataset through h5py costs tens of microseconds, a million of them the better part of a minute. The
object headers of plain datasets are therefore read as bytes, a batch at a time (HDF5 File Format
Specification 3.0, IV.A: versions 1 and 2); whatever they do not say simply (chunks, filters, continued
headers, links) is asked of h5py, and so are the first of each batch, to compare.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.errors import DataError

SCHEMA: Final[dict[str, Any]] = {
    "path": pl.String,
    "member": pl.String,
    "offset": pl.Int64,
    "length": pl.Int64,
    "size": pl.Int64,
    "encoding": pl.String,
    "height": pl.Int32,
    "width": pl.Int32,
    "kind": pl.String,
}

_MOST_63: Final = (1 << 63) - 1
_MOST_31: Final = (1 << 31) - 1

_HEADER: Final = 512
"""Bytes read of each object header; those of plain datasets have under 300."""
_COMPARED: Final = 8
_SPACE, _TYPE, _LAYOUT = 0x1, 0x3, 0x8
_NOT_PLAIN: Final = (0x7, 0xB, 0x10)
"""Messages after which h5py is asked: external files, filters, a continued header."""


class _Plain(NamedTuple):
    """What the headers say; `understood` False: h5py has to be asked."""

    understood: NDArray[np.bool_]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    height: NDArray[np.int64]
    width: NDArray[np.int64]
    """Height and width are 0 where the dataset holds a file's bytes."""


def image_datasets(file: Path, group: str, batch: int) -> Iterator[pl.DataFrame]:
    """Batches of the group's members, the images as bytes or as pixels; columns of `SCHEMA`.

    Images are 1-D uint8 and scalar fixed-length bytes (a file's bytes), and H x W x 3 uint8 (pixels);
    whatever else the group holds has the `kind` `not an image`. `offset` is the place in the file. A dataset
    without one place (chunked, compressed, compact, external) has the encoding `h5py`, its full name in
    `member`, and as offset that of its first chunk, for the storage order.

    Args:
        file: The HDF5 file.
        group: Its name below the root; where it is absent, the root is taken.
        batch: Datasets per batch; the file is reopened for each, which bounds h5py's memory.

    Raises:
        DataError: damaged or cut short.
    """
    import h5py

    try:
        with h5py.File(file, "r") as opened:
            if not isinstance(opened.get(group), h5py.Group):
                group = "/"
            names: list[bytes] = []
            places: list[int] = []

            def look(name: bytes, link: Any) -> None:
                names.append(name)
                hard = link.type == h5py.h5l.TYPE_HARD and link.u + base <= end
                places.append(link.u if hard else -1)

            base, end = opened.userblock_size, file.stat().st_size
            inner = opened[group]
            inner.id.links.iterate(look, info=True)
        yield pl.DataFrame(schema=SCHEMA)
        for start in range(0, len(names), batch):
            some = slice(start, start + batch)
            with h5py.File(file, "r") as opened, file.open("rb", buffering=0) as raw:
                yield _batch(h5py, opened[group], raw, names[some], np.array(places[some], np.int64), base)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"{file}: cannot be read as HDF5, damaged or cut short; is the download complete? ({reason})"
        ) from None


def _batch(
    h5py: Any, group: Any, raw: Any, names: list[bytes], places: NDArray[np.int64], base: int
) -> pl.DataFrame:
    headers = bytearray()
    for place in places.tolist():
        header = b""
        if place >= 0:
            raw.seek(place + base)
            header = raw.read(_HEADER)
        headers += header.ljust(_HEADER, b"\0")
    plain = _plain_datasets(np.frombuffer(headers, np.uint8).reshape(-1, _HEADER))
    text = [name.decode("utf-8", "replace") for name in names]
    pixels = plain.height > 0
    frame = pl.DataFrame(
        {
            "path": text,
            "member": pl.Series([None] * len(text), dtype=pl.String),
            "offset": plain.offset + base,
            "length": plain.length,
            "size": plain.length,
            "encoding": np.where(pixels, "raw", "file"),
            "height": plain.height,
            "width": plain.width,
            "kind": pl.Series([None] * len(text), dtype=pl.String),
        }
    ).with_columns(pl.when(pl.Series(pixels)).then(pl.col(c)).cast(pl.Int32) for c in ("height", "width"))
    frame = frame.select(pl.col(name).cast(kind) for name, kind in SCHEMA.items())
    known = np.flatnonzero(plain.understood)
    compared = known[:_COMPARED]
    if [_ask(h5py, group, names[i], places[i] < 0) for i in compared] != frame[compared].rows():
        known = known[:0]
    asked = np.setdiff1d(np.arange(len(names)), known).tolist()
    answers = [_ask(h5py, group, names[i], places[i] < 0) for i in asked]
    return frame[known].vstack(pl.DataFrame(answers, schema=SCHEMA, orient="row"))


def _ask(h5py: Any, group: Any, name: bytes, linked: bool) -> tuple[Any, ...]:
    """A row of `SCHEMA` from h5py."""
    text = name.decode("utf-8", "replace")
    no_image = (text, None, None, None, None, None, None, None, "not an image")
    try:
        dataset = h5py.h5d.open(group.id, name)
    except (TypeError, KeyError, ValueError):  # a group, a named type, a dangling link
        return no_image
    kind, shape = dataset.get_type(), dataset.shape
    height = width = None
    if kind.get_class() == h5py.h5t.INTEGER and kind.equal(h5py.h5t.STD_U8LE):
        if len(shape) == 3 and shape[2] == 3:
            height, width = shape[0], shape[1]
        elif len(shape) != 1:
            return no_image
        size = math.prod(shape)
    elif shape == () and (
        (kind.get_class() == h5py.h5t.STRING and not kind.is_variable_str())
        or kind.get_class() == h5py.h5t.OPAQUE
    ):
        size = kind.get_size()
    else:
        return no_image
    if max(shape, default=0) > _MOST_31 or size > _MOST_63:  # damaged: no image is that large
        return no_image
    settings = dataset.get_create_plist()
    offset, length = dataset.get_offset(), dataset.get_storage_size()
    if offset is not None and length == size and not linked and settings.get_external_count() == 0:
        place = min(offset, _MOST_63)
        return text, None, place, length, size, "file" if height is None else "raw", height, width, None
    chunked = settings.get_layout() == h5py.h5d.CHUNKED
    first = dataset.get_chunk_info(0).byte_offset if chunked and dataset.get_num_chunks() else 0
    place, length = min(first, _MOST_63), min(length, _MOST_63)
    return text, f"{group.name.rstrip('/')}/{text}", place, length, size, "h5py", height, width, None


def _plain_datasets(headers: NDArray[np.uint8]) -> _Plain:
    """What the object headers (N x 512 bytes) say of contiguous datasets that can hold an image."""
    count, width = headers.shape
    flat, row = np.append(headers.ravel(), np.zeros(8, np.uint8)), np.arange(count) * width

    def number(at: Any, size: int) -> NDArray[np.int64]:
        """Little-endian number of `size` bytes at a place of each header."""
        place = row + np.minimum(at, width)
        value = np.zeros(count, np.int64)
        for i in range(size):
            value |= flat[place + i].astype(np.int64) << (8 * i)
        return value

    # Version 1: 16 bytes, then messages with 8 bytes before each. Version 2: as its flags say.
    old = headers[:, 0] == 1
    new = (headers[:, :5] == np.frombuffer(b"OHDR\2", np.uint8)).all(axis=1)
    flags = np.where(new, headers[:, 5], 0).astype(np.int64)
    size_at = 6 + 16 * (flags >> 5 & 1) + 4 * (flags >> 4 & 1)
    size_width = 1 << (flags & 3)
    size = np.where(old, number(8, 4), number(size_at, 8) & ((1 << np.minimum(8 * size_width, 62)) - 1))
    at = np.where(old, 16, size_at + size_width)
    end = at + size
    understood = (old | new) & (size < width) & (end <= width)
    before = np.where(old, 8, 4 + 2 * (flags >> 2 & 1))
    body = {kind: np.zeros(count, np.int64) for kind in (_SPACE, _TYPE, _LAYOUT)}
    while (here := understood & (at + before <= end)).any():
        kind = np.where(old, number(at, 2), number(at, 1))
        length = np.where(old, number(at + 2, 2), number(at + 1, 2))
        shared = np.where(old, number(at + 4, 1), number(at + 3, 1)) & 2 > 0
        for known, places in body.items():
            places[here & (kind == known)] = (at + before)[here & (kind == known)]
        understood &= ~(here & (np.isin(kind, _NOT_PLAIN) | (shared & np.isin(kind, list(body)))))
        at = np.where(here, at + before + length, at)
    for places in body.values():
        understood &= places > 0

    space, version = body[_SPACE], number(body[_SPACE], 1)
    rank = number(space + 1, 1)
    understood &= (version == 1) | ((version == 2) & (number(space + 3, 1) < 2))
    dimension = [number(space + np.where(version == 1, 8, 4) + 8 * i, 8) for i in range(3)]
    kind, element = number(body[_TYPE], 1) & 15, number(body[_TYPE] + 4, 4)
    signed = number(body[_TYPE] + 1, 1) & 8 > 0
    is_byte = (kind == 0) & (element == 1) & ~signed
    is_text = (kind == 3) | (kind == 5)  # fixed-length string, opaque
    layout = body[_LAYOUT]
    understood &= np.isin(number(layout, 1), (3, 4)) & (number(layout + 1, 1) == 1)  # contiguous
    offset, length = number(layout + 2, 8), number(layout + 10, 8)
    pixels = is_byte & (rank == 3) & (dimension[2] == 3)
    expected = np.where(is_text & (rank == 0), element, -1)
    expected = np.where(is_byte & (rank == 1), dimension[0], expected)
    expected = np.where(pixels, dimension[0] * dimension[1] * 3, expected)
    for side in dimension:  # one that is not possible could overflow to the right product
        understood &= ~pixels | ((side >= 0) & (side <= _MOST_31))
    understood &= (expected == length) & (length >= 0)
    understood &= offset >= 0  # an address that is not given is all ones: negative
    pixels &= understood
    return _Plain(understood, offset, length, dimension[0] * pixels, dimension[1] * pixels)
