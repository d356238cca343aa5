"""Packages written: part folders, ZIP, HDF5, WebDataset shards, Parquet.

Images come in shards. Each shard is put aside as a spool, one file with its images back to back (of a folder:
one file an image), and the finished spools are assembled into the package: copied by the kernel where the
form is one file of records (ZIP, TAR), renamed where it is a folder, read again where a library writes it
(HDF5, Parquet).

Disk need while a job runs, beside the source: for one file twice the images' bytes (spools and package); for
a folder of images once; for a folder of TAR or Parquet shards once and one shard more.

The bytes depend on the images and their order alone: no times (ZIP 1980, TAR 0), no owner, fixed permissions.
"""

import contextlib
import errno
import io
import itertools
import json
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
import polars as pl

from bioscan.data.image_index import EXTENSIONS
from bioscan.errors import RequestError, unknown
from bioscan.files import sync
from bioscan.vocabulary import FOOTER, HDF5_GROUP, IMAGE_FOLDER, part_path

FORMS: Final = ("folder", "zip", "hdf5", "webdataset", "parquet")
_SUFFIXES: Final = {
    ".zip": "zip",
    ".hdf5": "hdf5",
    ".h5": "hdf5",
    ".tar": "webdataset",
    ".parquet": "parquet",
}
_UNKNOWN_ARCHIVE: Final = re.compile(r"\.(7z|rar|iso|t?gz|t?bz2?|t?xz|t?zst|lzma|lz4|npz|npy)")
"""Endings of archives that are not written."""
_OF_SHARDS: Final = {"webdataset": ".tar", "parquet": ".parquet"}
"""Forms that are a folder of shards where the target has not this ending."""

MARK: Final = ".bioscan.json"
"""File of a folder package that says how it was made. Hidden, so that no reader takes it for data."""

SHARD_IMAGES: Final = 10_000
SHARD_BYTES: Final = 256 << 20
"""A TAR or Parquet shard of a folder is closed when it holds so much."""
_GROUP_ROWS: Final = 256
_GROUP_BYTES: Final = 16 << 20
"""Rows and bytes of a Parquet row group, the least that a reader of one image takes in."""
_COPIED: Final = 1 << 27
"""Bytes copied by one call, so that Ctrl-C is heard."""

_NO_KERNEL_COPY: Final = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
_MOST_32: Final = 0xFFFFFFFF


class Spooled(NamedTuple):
    """Where an image lies in its spool."""

    start: int
    """First byte of its record; in a folder the number of its file."""
    offset: int
    """First byte of the image."""
    length: int
    end: int
    """Behind the record."""
    crc: int
    """CRC-32 of the image; 0 where the form holds none."""


SPOOLED: Final = pl.Schema(
    {
        "spool": pl.String(),
        "name": pl.String(),
        "part": pl.Int32(),
        "start": pl.Int64(),
        "offset": pl.Int64(),
        "length": pl.Int64(),
        "end": pl.Int64(),
        "crc": pl.UInt32(),
    }
)
"""Columns of the table that `assemble` takes, in the order of the package. spool: name of the spool."""

Add = Callable[[str, int | None, bytes], Spooled]
"""Puts an image (name, part, bytes) behind the last one of a spool."""


def form_of(target: Path, form: str | None = None) -> str:
    """The form that a target takes: the given one, else by its ending, else a folder.

    Raises:
        RequestError: no such form, one that the ending contradicts, or an ending that is that of an image or
            of another kind of archive.
    """
    ending = target.suffix.lower()
    by_name = _SUFFIXES.get(ending)
    if form is None:
        if ending in EXTENSIONS or _UNKNOWN_ARCHIVE.fullmatch(ending):
            raise RequestError(
                f"{target}: no package is written as {ending}; known are {', '.join(_SUFFIXES)} and a folder "
                "(add --form folder if it is to have this name)"
            )
        return by_name or "folder"
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    if by_name not in (None, form):
        raise RequestError(f"{target}: the name is that of a package of form {by_name}, not {form}")
    return form


def is_folder(target: Path, form: str) -> bool:
    """Whether a package of the form is a folder at this target, not one file."""
    return form == "folder" or (form in _OF_SHARDS and target.suffix.lower() != _OF_SHARDS[form])


def package_name(target: Path) -> str:
    """What a package is called: the target's name without the ending of its form.

    >>> package_name(Path("x/cropped_256.zip"))
    'cropped_256'
    """
    return target.stem if target.suffix.lower() in _SUFFIXES else target.name


def refusal(name: str, part: int | None, form: str) -> str | None:
    """Why an image of this name cannot be put into a package; None where it can.

    A package is unpacked by other programs too: no name may lead out of it, on any system.
    """
    steps = name.split("/")
    if not name:
        return "no name"
    if re.search(r"[\x00-\x1f\x7f]", name):
        return "a control character in the name"
    if "\\" in name:
        return "a backslash in the name"
    if name.startswith("/"):
        return "an absolute name"
    if re.match(r"[A-Za-z]:", name):
        return "a drive in the name"
    if ".." in steps:
        return "a name that leads out of the package (..)"
    if "" in steps or "." in steps:
        return "a name with an empty step"
    try:
        size = [len(step.encode()) for step in steps]
    except UnicodeEncodeError:
        return "a name that is no Unicode text"
    if max(size) > 255 or sum(size) + len(size) > 2000:
        return "too long a name"
    if part is not None and part < 0:
        return "a negative part"
    if form == "hdf5" and len(steps) > 1:
        return "a name with folders, which HDF5 packages have not"
    return None


def clashes(images: pl.DataFrame, form: str, *, fold_case: bool = False) -> pl.Series:
    """Why images cannot be in one package with those before them: texts, null where they can.

    Args:
        images: Columns name, part; in the order of the package.
        form: HDF5 packages have no parts; in folders a file cannot have the name of a folder.
        fold_case: Names that differ in the case of letters alone clash too.
    """
    path = _paths(images) if form != "hdf5" else images["name"]
    key = path.str.normalize("NFC")
    if fold_case:
        key = key.str.to_lowercase()
    frame = images.select("part").with_columns(key=key).with_row_index("row")
    first = frame.group_by("key").agg(first=pl.col("row").min(), part=pl.col("part").first())
    frame = frame.select("row", "key").join(first, on="key", how="left", maintain_order="left")
    same = pl.lit("another image before it has this name")
    if form == "hdf5":
        same = same + pl.lit(" (HDF5 packages have no parts)")
    holders = pl.Series(sorted(_parents(key)) if form == "folder" else [], dtype=pl.String)
    why = (
        pl.when(pl.col("row") > pl.col("first"))
        .then(same)
        .when(pl.col("key").is_in(holders.implode()))
        .then(pl.lit("other images have it as their folder"))
    )
    return frame.select(reason=why).to_series()


def _parents(paths: pl.Series) -> set[str]:
    folders = {folder for folder in paths.str.extract("^(.*)/").drop_nulls().unique() if folder}
    steps = (folder.split("/") for folder in folders)
    return {"/".join(some[:n]) for some in steps for n in range(1, len(some) + 1)}


def _paths(images: pl.DataFrame) -> pl.Series:
    part = pl.when(pl.col("part").is_not_null()).then("part" + pl.col("part").cast(pl.String) + "/")
    return images.select(part.otherwise(pl.lit("")) + pl.col("name")).to_series()


# -- spools


@contextlib.contextmanager
def spooling(place: Path, form: str, package: str) -> Iterator[Add]:
    """A new spool at `place`; give it images that `refusal` has nothing against."""
    if form == "folder":
        place.mkdir()
        yield _add_file(place)
    else:
        with place.open("xb", buffering=1 << 20) as file:
            yield _ADD.get(form, _add_plain)(file, package)


def _add_file(place: Path) -> Add:
    numbers = itertools.count()

    def add(name: str, part: int | None, data: bytes) -> Spooled:
        number = next(numbers)
        with (place / str(number)).open("xb", buffering=0) as file:
            _write(file, data)
        return Spooled(number, 0, len(data), number + 1, 0)

    return add


def _write(file: Any, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _add_plain(file: BinaryIO, package: str) -> Add:
    """Bytes alone, for a library to write."""

    def add(name: str, part: int | None, data: bytes) -> Spooled:
        start = file.tell()
        file.write(data)
        return Spooled(start, start, len(data), start + len(data), 0)

    return add


_LOCAL: Final = struct.Struct("<4s5H3L2H")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_WIDE: Final = struct.Struct("<2HQ")
_END: Final = struct.Struct("<4s4H2LH")
_END_64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64: Final = struct.Struct("<4sLQL")
_MADE_BY: Final = 3 << 8 | 20
"""Unix, version 2.0 of the ZIP specification; 4.5 is the first with ZIP64."""
_NEEDED, _NEEDED_64 = 20, 45
_DAY: Final = 1 << 5 | 1
"""1 January 1980, the first day that ZIP knows."""
_PERMISSIONS: Final = 0o100644


def _zip_name(name: str, part: int | None, package: str) -> tuple[bytes, int]:
    """A member's path, and the flag that says whether it is UTF-8 beyond ASCII."""
    path = f"{IMAGE_FOLDER}/{package}/{part_path(name, part)}"
    return path.encode(), 0 if path.isascii() else 0x800


def _add_zip(file: BinaryIO, package: str) -> Add:
    """Stored members with their local headers (APPNOTE.TXT 4.3.7)."""

    def add(name: str, part: int | None, data: bytes) -> Spooled:
        start, crc, size = file.tell(), zlib.crc32(data), len(data)
        path, flags = _zip_name(name, part, package)
        header = _LOCAL.pack(b"PK\3\4", _NEEDED, flags, 0, 0, _DAY, crc, size, size, len(path), 0)
        file.write(header + path)
        file.write(data)
        offset = start + len(header) + len(path)
        return Spooled(start, offset, size, offset + size, crc)

    return add


def _add_tar(file: BinaryIO, package: str) -> Add:
    """Members in ustar form; in pax form where a name does not fit."""

    def add(name: str, part: int | None, data: bytes) -> Spooled:
        member = tarfile.TarInfo(part_path(name, part))
        member.size = len(data)
        try:
            header = member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
        except ValueError:
            header = member.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
        start = file.tell()
        file.write(header)
        file.write(data)
        file.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return Spooled(start, start + len(header), len(data), file.tell(), 0)

    return add


_ADD: Final[dict[str, Callable[[BinaryIO, str], Add]]] = {"zip": _add_zip, "webdataset": _add_tar}


# -- assembly


def assemble(
    images: pl.DataFrame,
    spools: Path,
    out: Path,
    target: Path,
    form: str,
    *,
    attributes: Mapping[str, Any],
    record: Mapping[str, Any],
) -> None:
    """Make the package of finished spools at `out`; what was there of it before is finished or made anew.

    Spools that are not needed any more are removed on the way, so call it again with the same table only.

    Args:
        images: Columns of `SPOOLED`.
        spools: Folder of the spools.
        out: On their file system.
        target: Where `out` will be moved: names and endings follow from it.
        form: One of FORMS.
        attributes: Of the HDF5 group.
        record: How it was made, for the folder's `MARK`.
    """
    name = package_name(target)
    if not is_folder(target, form):
        _WRITERS[form](images, spools, out, name, attributes)
        sync(out)
        return
    out.mkdir(exist_ok=True)
    if form == "folder":
        _move(images, spools, out)
    else:
        for number, shard in enumerate(_shards(images)):
            place = out / f"{name}-{number:06d}{_OF_SHARDS[form]}"
            if not place.exists():
                partial = place.with_suffix(".partial")
                _WRITERS[form](shard, spools, partial, name, attributes)
                sync(partial)
                partial.replace(place)
            for spool in shard["spool"].unique():
                (spools / spool).unlink(missing_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (out / MARK).write_text(text + "\n", encoding="utf-8")


def _shards(images: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Consecutive spools together, until a shard is full."""
    sizes = images.group_by("spool", maintain_order=True).agg(pl.len(), pl.col("length").sum())
    start = stop = size = 0
    for count, length in sizes.select("len", "length").iter_rows():
        stop, size = stop + count, size + length
        if stop - start >= SHARD_IMAGES or size >= SHARD_BYTES:
            yield images[start:stop]
            start, size = stop, 0
    if stop > start:
        yield images[start:stop]


def _move(images: pl.DataFrame, spools: Path, out: Path) -> None:
    made: set[str] = set()
    root, source = str(out), str(spools)
    for spool, path, number in zip(images["spool"], _paths(images), images["start"], strict=True):
        folder = path.rpartition("/")[0]
        if folder not in made:
            (out / folder).mkdir(parents=True, exist_ok=True)
            made.add(folder)
        try:
            os.rename(f"{source}/{spool}/{number}", f"{root}/{path}")  # noqa: PTH104 - a million of them
        except FileNotFoundError:
            if not (out / path).exists():  # else moved by a run before this one
                raise


def _copy(images: pl.DataFrame, spools: Path, file: BinaryIO) -> None:
    """The records, one after the other, by the kernel where it can."""
    file.flush()
    for spool, records in _by_spool(images):
        start, end = records["start"].to_numpy(), records["end"].to_numpy()
        gaps = np.flatnonzero(start[1:] != end[:-1]) + 1  # where an image is left out
        with (spools / spool).open("rb", buffering=0) as source:
            for first, last in zip(start[np.r_[0, gaps]], end[np.r_[gaps - 1, -1]], strict=True):
                _copy_range(source, int(first), int(last), file)


def _copy_range(source: BinaryIO, start: int, end: int, file: BinaryIO) -> None:
    while start < end:
        try:
            copied = os.copy_file_range(
                source.fileno(), file.fileno(), min(end - start, _COPIED), offset_src=start
            )
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_KERNEL_COPY:
                raise
            copied = 0
        if not copied:
            source.seek(start)
            data = source.read(min(end - start, 1 << 23))
            if not data:
                raise _cut_short(source)
            _write(file, data)
            copied = len(data)
        start += copied


def _by_spool(images: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    for (spool,), records in images.group_by(["spool"], maintain_order=True):
        yield str(spool), records


def _write_zip(
    images: pl.DataFrame, spools: Path, out: Path, package: str, attributes: Mapping[str, Any]
) -> None:
    """The local records, and a central directory (APPNOTE.TXT 4.3.12 to 4.3.16)."""
    size = (images["end"] - images["start"]).to_numpy()
    places = np.cumsum(size) - size
    with out.open("wb", buffering=0) as raw:
        _copy(images, spools, raw)
        start = int(size.sum())
        raw.seek(start)
        rows = images.select("name", "part", "crc", "length").iter_rows()
        with open(raw.fileno(), "wb", buffering=1 << 20, closefd=False) as file:
            for (name, part, crc, length), place in zip(rows, places.tolist(), strict=True):
                path, flags = _zip_name(name, part, package)
                extra = _WIDE.pack(1, 8, place) if place >= _MOST_32 else b""
                needed = _NEEDED_64 if extra else _NEEDED
                fixed = (_MADE_BY, needed, flags, 0, 0, _DAY, crc, length, length, len(path), len(extra))
                rest = (0, 0, 0, _PERMISSIONS << 16, min(place, _MOST_32))
                file.write(_CENTRAL.pack(b"PK\1\2", *fixed, *rest) + path + extra)
            end = file.tell()
            count, length = images.height, end - start
            if count >= 0xFFFF or start >= _MOST_32 or length >= _MOST_32:
                versions = (_MADE_BY, _NEEDED_64)
                file.write(
                    _END_64.pack(b"PK\6\6", _END_64.size - 12, *versions, 0, 0, count, count, length, start)
                )
                file.write(_LOCATOR_64.pack(b"PK\6\7", 0, end, 1))
            counts = (min(count, 0xFFFF),) * 2
            file.write(_END.pack(b"PK\5\6", 0, 0, *counts, min(length, _MOST_32), min(start, _MOST_32), 0))


def _write_tar(
    images: pl.DataFrame, spools: Path, out: Path, package: str, attributes: Mapping[str, Any]
) -> None:
    with out.open("wb", buffering=0) as file:
        _copy(images, spools, file)
        end = int((images["end"] - images["start"]).sum())
        file.seek(end)
        file.write(bytes(2 * tarfile.BLOCKSIZE + -(end + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE))


class _Sink(io.RawIOBase):
    """A file for HDF5 that keeps a failure of the disk to itself.

    A file that HDF5 cannot close, for the disk is full, ends the process with a segmentation fault.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failure: OSError | None = None

    def seek(self, place: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, target: Any, /) -> int:
        return int(self._file.readinto(target))  # type: ignore[attr-defined]

    def write(self, data: Any, /) -> int:
        if self.failure is None:
            try:
                _write(self._file, data)
            except OSError as error:
                self.failure = error
        return len(data)

    def truncate(self, size: int | None = None, /) -> int:
        if self.failure is None:
            try:
                return self._file.truncate(size)
            except OSError as error:
                self.failure = error
        return size or 0


def _write_hdf5(
    images: pl.DataFrame, spools: Path, out: Path, package: str, attributes: Mapping[str, Any]
) -> None:
    """The published layout: in one group a dataset an image, 1-D uint8, by name without part.

    By h5py's lower functions, which take half the time of `create_dataset`.
    """
    import h5py

    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_obj_track_times(False)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_char_encoding(h5py.h5t.CSET_UTF8)
    create, space, whole = h5py.h5d.create, h5py.h5s.create_simple, h5py.h5s.ALL
    with out.open("w+b", buffering=0) as raw:
        sink = _Sink(raw)
        with h5py.File(sink, "w") as file:
            group = file.create_group(HDF5_GROUP)
            group.attrs.update(attributes)
            rows = images.select("spool", "name", "offset", "length").iter_rows()
            for name, data in _contents(rows, spools):
                if sink.failure:
                    break
                pixels = np.frombuffer(data, np.uint8)
                kind = h5py.h5t.STD_U8LE
                dataset = create(group.id, name.encode(), kind, space((len(data),)), settings, links)
                dataset.write(whole, whole, pixels)
        if sink.failure:
            raise sink.failure


def _contents(rows: Iterable[tuple[str, str, int, int]], spools: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each image (spool, name, offset, length)."""
    with contextlib.ExitStack() as stack:
        opened = ""
        for spool, name, offset, length in rows:
            if spool != opened:
                stack.close()
                source = stack.enter_context((spools / spool).open("rb", buffering=0))
                opened = spool
            source.seek(offset)
            data = source.read(length)
            if len(data) != length:
                raise _cut_short(source)
            yield name, data


def _cut_short(spool: BinaryIO) -> OSError:
    return OSError(errno.EIO, "a file of the unfinished job is shorter than it was", str(spool.name))


_PARQUET: Final = pl.Schema(
    {"image": pl.Struct({"bytes": pl.Binary(), "path": pl.String()}), "part": pl.Int32()}
)
_FEATURES: Final = {
    "info": {
        "features": {"image": {"_type": "Image"}, "part": {"dtype": "int32", "_type": "Value"}},
    }
}
"""Of the library `datasets`, which then shows the column as pictures."""
_ARROW, _NO_ARROW = b"ARROW:schema", b"polars:types"
"""Where a file has the first key, pyarrow, and with it `datasets`, sees none of the others. Polars always
writes it, but the types of this table do not need it."""


def _write_parquet(
    images: pl.DataFrame, spools: Path, out: Path, package: str, attributes: Mapping[str, Any]
) -> None:
    """Uncompressed: pictures are compressed already. Batches are row groups, one in memory at a time."""
    from polars.io.plugins import register_io_source

    size = int(images["length"].mean() or 1)  # type: ignore[arg-type]
    rows = max(1, min(_GROUP_ROWS, _GROUP_BYTES // max(1, size)))

    def batches(*pushed: object) -> Iterator[pl.DataFrame]:
        contents = _contents(images.select("spool", "name", "offset", "length").iter_rows(), spools)
        for start in range(0, images.height, rows):
            some = images[start : start + rows]
            data = [content for _, content in itertools.islice(contents, some.height)]
            image = pl.struct(bytes=pl.Series(data, dtype=pl.Binary), path=some["name"])
            yield some.select(image=image, part="part")

    footer = {"huggingface": json.dumps(_FEATURES), FOOTER: json.dumps({"package": package})}
    register_io_source(batches, schema=_PARQUET).sink_parquet(
        out, compression="uncompressed", statistics=False, row_group_size=rows, metadata=footer
    )
    with out.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        (size,) = struct.unpack("<L4x", file.read())
        file.seek(-8 - size, os.SEEK_END)
        text = file.read(size)
        assert text.count(_ARROW) == 1
        file.seek(-8 - size + text.index(_ARROW), os.SEEK_END)
        file.write(_NO_ARROW)


_Writer = Callable[[pl.DataFrame, Path, Path, str, Mapping[str, Any]], None]
_WRITERS: Final[dict[str, _Writer]] = {
    "zip": _write_zip,
    "hdf5": _write_hdf5,
    "webdataset": _write_tar,
    "parquet": _write_parquet,
}


def hdf5_attributes(file: Path) -> dict[str, Any]:
    """Texts and numbers that an HDF5 package says of itself: attributes of its group, else of the root."""
    import h5py

    with h5py.File(file, "r") as opened:
        group = opened.get(HDF5_GROUP)
        attributes = (group if isinstance(group, h5py.Group) else opened).attrs
        found = {}
        for name in attributes:
            with contextlib.suppress(OSError, TypeError, ValueError):  # one of a type that h5py does not know
                value = attributes[name]
                if isinstance(value, str | bytes | np.generic):
                    found[name] = value
        return found
