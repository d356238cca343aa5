"""Images of a package by name, wherever they lie: folder, part folders, ZIP, TAR, HDF5 or Parquet.

A package is an index of byte ranges (`data.image_index`); reading one image is one `pread`.
"""

import errno
import math
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.data.image_index import PLAIN, load_index
from bioscan.data.parquet_layout import read_rows
from bioscan.errors import DataError, ImageError

MAX_IMAGE_BYTES: Final = 1 << 30
"""What claims to be larger is taken for damage or malice: it is not read, and no memory is asked for."""
_OPEN_FILES: Final = 128
"""Archives held open at a time; the one opened first is closed for the next."""
_WINDOW_BYTES, _WINDOW_ROWS = 64 << 20, 4096
"""Of a Parquet table, read at a time and kept: its pages are decoded as a whole."""
_PROCESS: Final = os.getpid()
"""Another one than now in a forked process, where Polars' threads are gone and it would wait for ever."""


def _no_pread(handle: int, length: int, place: int) -> bytes:
    """Where the system has none: `read` then goes on as for a file that is not open yet."""
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


_pread: Callable[[int, int, int], bytes] = getattr(os, "pread", _no_pread)
_FLAGS: Final = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
"""Windows alone has text files at this level; a FIFO is not waited for."""
_REASONS: Final = {
    "encrypted": "encrypted",
    "damaged": "its header in the archive is damaged",
    "overlapping": "its bytes in the archive are those of another member too",
    "sparse": "stored with holes (a sparse file)",
    "path only": "the table holds its path, not its bytes",
}
"""Encoding that cannot be read -> why."""


class _File:
    """An open file, closed with the last reference: another thread may be reading from it."""

    __slots__ = ("handle",)

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.handle >= 0:
            close(self.handle)


_CLOSED: Final = _File(-1)


class _Window(NamedTuple):
    """Consecutive rows of a Parquet table."""

    number: int
    """Of the container."""
    start: int
    content: pl.Series


def _first_rows(wanted: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    """For each wanted name the first row that has it, and how many have it (`images`); null where none."""
    first = (
        known.join(wanted, on="name", how="semi").group_by("name").agg(pl.col("row").min(), images=pl.len())
    )
    return wanted.select("name").join(first, on="name", how="left", maintain_order="left")


class Images:
    """A package of images: what is in it, and the bytes of each.

    Can be pickled and read from after fork or spawn and from several threads: files are opened when first
    needed. Only `find`, and images in Parquet, need a process that was not forked, for Polars cannot work
    there. Images in Parquet and in chunked or compressed HDF5 are fast in storage order only.

    Args:
        path: Folder, folder of part folders, ZIP, TAR (WebDataset), HDF5 or Parquet file; a folder of such
            archives of one kind, or a pattern of them (`shards/{000..012}.tar`, `parts/*.zip`).
        save_index: Save the index beside the package, for the next time.
        engine: Where many archives are listed, as for `parallel.map_shards`.
        workers: Processes that list many archives, as for `parallel.map_shards`.
        address: Of the cluster.

    Attributes:
        path: As given.
        index: A row per image, in storage order; columns of `bioscan.data.image_index.SCHEMA`.
        form: `folder`, `part folders`, `zip`, `tar`, `hdf5` or `parquet`.
        base: Absolute folder that archives and files are named from.
        containers: Archive, relative to `base` -> its stamp; empty for a folder of images.
        fingerprint: Of what the index lists; another one means that the package changed.
        left_out: Members that are not in the index: its columns (`name` is the whole path), and `left_out`,
            the reason.
        duplicates: Members left out because one of the same name and part came before.

    Raises:
        RequestError: nothing there, a kind of file that is no package, or several packages in one place.
        DataError: a damaged archive, or no image in it.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        save_index: bool = True,
        engine: str = "local",
        workers: int | None = None,
        address: str | None = None,
    ) -> None:
        made = load_index(Path(path), save=save_index, engine=engine, workers=workers, address=address)
        self.path = Path(path)
        self.index: pl.DataFrame = made.frame
        self.form: str = made.form
        self.containers: dict[str, str] = made.containers
        self.fingerprint: str = made.fingerprint
        self.left_out: pl.DataFrame = made.left_out
        self.duplicates: int = made.duplicates
        self.base: Path = made.base
        self._numbers: NDArray[np.int32] = np.zeros(len(self), np.int32)  # of each image's container
        if made.containers:
            held = self.index["container"].cast(pl.Enum([*made.containers]))
            self._numbers = held.to_physical().to_numpy().astype(np.int32)
        self._prepare()

    def _prepare(self) -> None:
        self._is_folder = self.form in ("folder", "part folders")
        self._names = [*self.containers]
        self._ends = np.array(
            [int(stamp.split("-")[0]) for stamp in self.containers.values()] or [0], np.int64
        )
        offset = self.index["offset"].to_numpy()
        # By numpy: Polars' threads are gone in a forked process, and a package is unpickled there.
        length = np.nan_to_num(self.index["length"].to_numpy(), nan=-1).astype(np.int64)  # null in folders
        plain = self.index["encoding"].to_physical().to_numpy() == PLAIN
        plain &= (offset >= 0) & (length <= self._ends[self._numbers] - offset) & (length <= MAX_IMAGE_BYTES)
        # Views: their single numbers are read faster than those of an array.
        self._offset = offset.data
        self._number = self._numbers.data
        self._plain_length = np.where(plain, length, -1).data
        self._container = self.index["container"]
        self._is_array: NDArray[np.bool_] = self.index["height"].is_not_null().to_numpy()
        self._lock = threading.Lock()
        self._files = [_CLOSED] * max(1, len(self._names))
        self._opened: deque[int] = deque()
        self._hdf5: tuple[int, int, Any] | None = None  # process, container, file
        self._window: _Window | None = None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("path", "index", "form", "containers", "fingerprint", "left_out", "duplicates")
        return {name: getattr(self, name) for name in (*kept, "base", "_numbers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "Images":
        """The package with only these images, in this order: small to pickle, for work in shards."""
        part = object.__new__(Images)
        used, numbers = np.unique(self._numbers[rows], return_inverse=True)
        names = [self._names[number] for number in used] if self._names else []
        changed = {
            "path": Path(os.path.abspath(self.path)),  # noqa: PTH100 - of a pattern too
            "index": self.index[rows],
            "containers": {name: self.containers[name] for name in names},
            "left_out": self.left_out.clear(),
            "_numbers": numbers.astype(np.int32),
        }
        part.__setstate__({**self.__getstate__(), **changed})
        return part

    def __len__(self) -> int:
        return self.index.height

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self.find([name])[0] >= 0)

    def find(
        self,
        names: Sequence[str] | pl.Series,
        parts: Sequence[int | None] | pl.Series | None = None,
    ) -> NDArray[np.int64]:
        """Row of each image in the index, -1 where the package has none of that name.

        A name is matched as a whole; where that fails, and the package has subfolders, by the file name
        alone if only one image has it.

        Args:
            names: File names, any Unicode normal form.
            parts: Number of the part folder of each (`chunk_number`), null where unknown. It chooses between
                images of the same name; the first is taken where it is null. A name that occurs once is found
                whatever its part.
        """
        wanted = pl.DataFrame({"name": pl.Series(names, dtype=pl.String).str.normalize("NFC")})
        known = self.index.select("name", "part").with_row_index("row")
        found = _first_rows(wanted, known)
        row = pl.col("row")
        if parts is not None:
            wanted = wanted.with_columns(part=pl.Series(parts, dtype=pl.Int32))
            same = known.join(wanted, on=["name", "part"], how="semi")
            exact = wanted.join(same, on=["name", "part"], how="left", maintain_order="left")
            found = found.with_columns(
                row=pl.when((pl.col("images") > 1) & wanted["part"].is_not_null())
                .then(exact["row"])
                .otherwise(row)
            )
        inner = known.filter(pl.col("name").str.contains("/", literal=True))
        if found["images"].has_nulls() and not inner.is_empty():
            inner = inner.with_columns(pl.col("name").str.extract(r"([^/]*)$"))
            alone = pl.col("images") == 1
            other = _first_rows(wanted, inner).select(pl.when(alone).then(row)).to_series()
            found = found.with_columns(row=row.fill_null(pl.when(pl.col("images").is_null()).then(other)))
        return found["row"].cast(pl.Int64).fill_null(-1).to_numpy().copy()

    def name(self, row: int) -> str:
        """The image's name, NFC."""
        return str(self._cell(row, "name"))

    def file(self, row: int) -> Path:
        """The file that holds the image: itself, or its archive."""
        return self.base / str(self._cell(row, "container"))

    def place(self, row: int) -> str:
        """Where the image lies, for messages: `cropped_256.zip @ 1048576`, `photos/part18/5351601.jpg`."""
        container = self._cell(row, "container")
        if self._is_folder:
            return f"{self.base.name}/{container}"
        member = self._cell(row, "member")
        mark = "row" if self.form == "parquet" else "@"
        return f"{container}{member}" if member else f"{container} {mark} {self._offset[row]}"

    def read(self, row: int) -> bytes:
        """The image file's bytes, exactly as they were put into the package.

        Raises:
            ImageError: cut short, encrypted, compressed by an unknown method, too large, gone.
            DataError: the package holds pixels for it, no file (see `array`); or the package has changed; or
                it is Parquet and this process was forked.
        """
        if row < 0:
            raise IndexError(f"row {row}: not an image of {self.path}")
        length: int = self._plain_length[row]
        if length < 0:
            return self._read_file(row) if self._is_folder else self._read_other(row)
        try:
            # held while it is read: closed by another thread, its handle may be another file's
            file = self._files[self._number[row]]
            data = _pread(file.handle, length, self._offset[row])
        except OSError:  # not open yet, or no pread
            data = self._range(row, length)
        if len(data) != length:
            raise self._short(row, len(data), length)
        return data

    def read_checked(self, row: int) -> bytes:
        """Like `read`, and the bytes are compared with the checksum that a ZIP archive holds.

        Raises:
            ImageError: as `read`, or the checksum is another one.
            DataError: as `read`.
        """
        data = self.read(row)
        if self._plain_length[row] >= 0:  # of others, `read` did
            self._compare(row, data)
        return data

    def array(self, row: int) -> NDArray[np.uint8]:
        """The pixels of an image that is stored as such, H x W x 3.

        Raises:
            ImageError: cut short, too large.
            DataError: the package holds a file for it, no pixels (see `read`); or the package has changed.
        """
        if row < 0:
            raise IndexError(f"row {row}: not an image of {self.path}")
        if not self.is_array(row):
            raise DataError(f"{self.place(row)}: an image file, no array of pixels; read its bytes")
        shape = (int(self._cell(row, "height")), int(self._cell(row, "width")), 3)
        of_library = self._cell(row, "encoding") == "h5py"
        pixels = self._dataset(row) if of_library else np.frombuffer(self._stored(row), np.uint8).copy()
        if pixels.size != math.prod(shape):
            raise self._short(row, pixels.size, math.prod(shape))
        return pixels.reshape(shape)

    def is_array(self, row: int) -> bool:
        """Whether the image is stored as pixels, for `array`, not as a file's bytes, for `read`."""
        return bool(self._is_array.item(row))

    def _cell(self, row: int, column: str) -> Any:
        return self.index.item(int(row), column)

    def _read_file(self, row: int) -> bytes:
        """A file of a folder, without the layers of Python's `open`, which cost as much as the reading."""
        try:
            handle = os.open(f"{self.base}/{self._container[int(row)]}", _FLAGS)
            try:
                length = os.fstat(handle).st_size
                if length > MAX_IMAGE_BYTES:
                    raise self._too_large(row, length)
                data = os.read(handle, length)
            finally:
                os.close(handle)
        except OSError as error:
            raise self._error(row, (error.strerror or "cannot be read").lower()) from None
        if len(data) != length:
            raise self._short(row, len(data), length)
        return data

    def _read_other(self, row: int) -> bytes:
        """Whatever is not a plain range of an archive."""
        encoding = self._cell(row, "encoding")
        if self.is_array(row):
            raise DataError(f"{self.place(row)}: an array of pixels, no image file; take its array")
        if encoding == "h5py":
            return bytes(self._dataset(row).tobytes())
        if encoding == "parquet":
            return self._row_of_table(row)
        if encoding == "file":
            return self._stored(row)
        if encoding != "deflated":
            unknown = f"compressed by a method that is not supported ({encoding})"
            raise self._error(row, _REASONS.get(encoding, unknown))
        size = int(self._cell(row, "size"))
        if size > MAX_IMAGE_BYTES:
            raise self._too_large(row, size)
        stored = self._stored(row)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = inflater.decompress(stored, size + 1)  # grows with what comes out, not with the claim
        except zlib.error:
            raise self._error(row, "damaged compressed data") from None
        if len(data) != size or not inflater.eof:
            raise self._error(row, "damaged compressed data")
        self._compare(row, data)
        return data

    def _stored(self, row: int) -> bytes:
        """The range of any encoding, held against the file's end before memory is asked for."""
        length, offset = int(self._cell(row, "length")), self._offset[row]
        if length > MAX_IMAGE_BYTES:
            raise self._too_large(row, length)
        there = max(0, int(self._ends[self._number[row]]) - offset)
        if there < length:
            raise self._short(row, there, length)
        data = self._range(row, length)
        if len(data) != length:
            raise self._short(row, len(data), length)
        return data

    def _range(self, row: int, length: int) -> bytes:
        """Bytes of the archive from an image's place, fewer where the archive ends."""
        try:
            number = self._number[row]
            file = self._files[number]
            if file.handle < 0:
                file = self._open(number)
            if _pread is not _no_pread:
                return _pread(file.handle, length, self._offset[row])
            with self._lock:
                os.lseek(file.handle, self._offset[row], os.SEEK_SET)
                return os.read(file.handle, length)
        except OSError as error:
            raise self._error(row, (error.strerror or "cannot be read").lower()) from None

    def _open(self, number: int) -> _File:
        with self._lock:
            if self._files[number].handle < 0:
                path = self.base / self._names[number]
                try:
                    file = _File(os.open(path, _FLAGS))
                except OSError as error:
                    raise DataError(f"{path}: {error.strerror}") from None
                self._refuse_changed(number, os.fstat(file.handle))
                if len(self._opened) == _OPEN_FILES:
                    self._files[self._opened.popleft()] = _CLOSED
                self._opened.append(number)
                self._files[number] = file
            return self._files[number]

    def _refuse_changed(self, number: int, status: os.stat_result) -> None:
        name = self._names[number]
        if f"{status.st_size}-{status.st_mtime_ns}" != self.containers[name]:
            raise DataError(f"{self.base / name} changed after it was opened; open it again")

    def _dataset(self, row: int) -> NDArray[Any]:
        """The content of a dataset that only h5py can read; one open file per process."""
        import h5py

        number = self._number[row]
        with self._lock:
            try:
                if self._hdf5 is None or self._hdf5[:2] != (os.getpid(), number):
                    path = self.base / self._names[number]
                    self._refuse_changed(number, path.stat())
                    self._hdf5 = (os.getpid(), number, h5py.File(path, "r"))
                dataset = self._hdf5[2][self._cell(row, "member")]
                if dataset.nbytes > MAX_IMAGE_BYTES:
                    raise self._too_large(row, dataset.nbytes)
                content = np.empty(dataset.shape, dataset.dtype)
                # as stored: h5py's own reading of a text stops at zero bytes
                dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, content, dataset.id.get_type())
            except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
                raise self._error(row, str(error).splitlines()[0]) from None
        return content

    def _row_of_table(self, row: int) -> bytes:
        """An image in Parquet: from the window of rows read last, else from a new one."""
        if os.getpid() != _PROCESS:
            raise DataError(
                f"{self.path}: images in Parquet cannot be read in a forked process; let workers be spawned, "
                "work without them, or convert the package first (bioscan convert)"
            )
        number, place = self._number[row], self._offset[row]
        with self._lock:
            window = self._window
            if not (window and window.number == number and 0 <= place - window.start < window.content.len()):
                self._window = None  # its memory is for the next one
                window = self._window = self._next_window(row)
            data = window.content[place - window.start]
        if data is None:
            raise self._error(row, "no bytes in its row")
        return bytes(data)

    def _next_window(self, row: int) -> _Window:
        """From an image on, as far as rows follow one another and their bytes stay within bounds."""
        number, start = self._number[row], self._offset[row]
        path = self.base / self._names[number]
        try:
            self._refuse_changed(number, path.stat())
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        some = slice(row, row + _WINDOW_ROWS)
        place = np.asarray(self._offset[some])
        follows = (place - start == np.arange(place.size)) & (np.asarray(self._number[some]) == number)
        size = np.cumsum(self.index["size"][some].to_numpy())
        follows[1:] &= size[1:] <= _WINDOW_BYTES
        count = place.size if follows.all() else int(follows.argmin())
        if size[0] > MAX_IMAGE_BYTES:
            raise self._too_large(row, int(size[0]))
        return _Window(number, start, read_rows(path, start, count))

    def _compare(self, row: int, data: bytes) -> None:
        checksum = self._cell(row, "crc")
        if checksum is not None and zlib.crc32(data) != checksum:
            raise self._error(row, "damaged: its checksum is another one")

    def _short(self, row: int, got: int, length: int) -> ImageError:
        return self._error(row, f"cut short: {got:,} of {length:,} bytes are there")

    def _too_large(self, row: int, size: int) -> ImageError:
        return self._error(row, f"claims {size:,} bytes; no image over {MAX_IMAGE_BYTES:,} is read")

    def _error(self, row: int, reason: str) -> ImageError:
        return ImageError(self.name(row), self.place(row), reason)
