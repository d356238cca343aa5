"""Images of a package by name, wherever they lie: folder, part folders, ZIP or HDF5.

A package is an index of byte ranges (`data.image_index`); reading one image is one `pread`.
"""

import os
import threading
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.data.image_index import PLAIN, load_index
from bioscan.errors import DataError, ImageError

_PREAD = hasattr(os, "pread")
_BINARY: int = getattr(os, "O_BINARY", 0)
"""Windows alone has text files at this level."""


def _first_rows(wanted: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    """For each wanted name the first row that has it, and how many have it (`images`); null where none."""
    first = (
        known.join(wanted, on="name", how="semi").group_by("name").agg(pl.col("row").min(), images=pl.len())
    )
    return wanted.select("name").join(first, on="name", how="left", maintain_order="left")


class Images:
    """A package of images: what is in it, and the bytes of each.

    Can be pickled and read from after fork or spawn and from several threads: files are opened when first
    needed. Only `find` has to be called before a fork, after which Polars cannot work.

    Args:
        path: Folder, folder of part folders, ZIP archive or HDF5 file.
        save_index: Save the index beside the package, for the next time.

    Attributes:
        path: As given.
        index: A row per image, in storage order; columns of `bioscan.data.image_index.SCHEMA`.
        form: `folder`, `part folders`, `zip` or `hdf5`.
        fingerprint: Of what the index lists; another one means that the package changed.
        duplicates: Members left out because one of the same name and part came before.

    Raises:
        RequestError: nothing there, a kind of file that is no package, or several packages in one place.
        DataError: a damaged archive, or no image in it.
    """

    def __init__(self, path: Path | str, *, save_index: bool = True) -> None:
        self.path = Path(path)
        made = load_index(self.path, save=save_index)
        self.index: pl.DataFrame = made.frame
        self.form: str = made.form
        self.fingerprint: str = made.fingerprint
        self.duplicates: int = made.duplicates
        self._prepare()

    def _prepare(self) -> None:
        self._root = Path(os.path.abspath(self.path))  # noqa: PTH100 - as the index was made
        self._is_folder = self.form in ("folder", "part folders")
        offset = self.index["offset"].to_numpy()
        # By numpy: Polars' threads are gone in a forked process, and a package is unpickled there.
        plain = (self.index["encoding"].to_physical().to_numpy() == PLAIN) & (offset >= 0)
        length = np.where(plain, self.index["length"].to_numpy(), np.nan)  # float where there are nulls
        # Views: their single numbers are read faster than those of an array.
        self._offset = offset.data
        self._plain_length = np.nan_to_num(length, nan=-1).astype(np.int64).data
        self._container = self.index["container"]
        self._is_array: NDArray[np.bool_] = self.index["height"].is_not_null().to_numpy()
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._handle = -1
        self._own = threading.local()
        self._hdf5: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("path", "index", "form", "fingerprint", "duplicates")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

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

    def place(self, row: int) -> str:
        """Where the image lies, for messages: `cropped_256.zip @ 1048576`, `photos/part18/5351601.jpg`."""
        container = self._cell(row, "container")
        if self._is_folder:
            return f"{self._root.name}/{container}"
        member = self._cell(row, "member")
        return f"{container}{member}" if member else f"{container} @ {self._offset[row]}"

    def read(self, row: int) -> bytes:
        """The image file's bytes, exactly as they were put into the package.

        Raises:
            ImageError: cut short, encrypted, compressed by an unknown method, gone.
            DataError: the package holds pixels for it, no file (see `array`); or the package has changed.
        """
        if row < 0:
            raise IndexError(f"row {row}: not an image of {self.path}")
        length: int = self._plain_length[row]
        if length < 0:
            return self._read_file(row) if self._is_folder else self._read_other(row)
        data = self._bytes(row, length)
        if len(data) != length:
            raise self._short(row, len(data), length)
        return data

    def array(self, row: int) -> NDArray[np.uint8]:
        """The pixels of an image that is stored as such, H x W x 3.

        Raises:
            ImageError: cut short.
            DataError: the package holds a file for it, no pixels (see `read`); or the package has changed.
        """
        if row < 0:
            raise IndexError(f"row {row}: not an image of {self.path}")
        if not self.is_array(row):
            raise DataError(f"{self.place(row)}: an image file, no array of pixels; read its bytes")
        shape = (int(self._cell(row, "height")), int(self._cell(row, "width")), 3)
        if self._cell(row, "encoding") == "h5py":
            return self._dataset(row).reshape(shape)
        length = int(self._cell(row, "length"))
        data = self._bytes(row, length)
        if len(data) != length:
            raise self._short(row, len(data), length)
        return np.frombuffer(data, np.uint8).reshape(shape).copy()

    def is_array(self, row: int) -> bool:
        """Whether the image is stored as pixels, for `array`, not as a file's bytes, for `read`."""
        return bool(self._is_array.item(row))

    def _cell(self, row: int, column: str) -> Any:
        return self.index.item(int(row), column)

    def _read_file(self, row: int) -> bytes:
        """A file of a folder, without the layers of Python's `open`, which cost as much as the reading."""
        try:
            handle = os.open(f"{self._root}/{self._container[int(row)]}", os.O_RDONLY | _BINARY)
            try:
                length = os.fstat(handle).st_size
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
        if encoding == "encrypted":
            raise self._error(row, "encrypted")
        if encoding == "file":
            raise self._error(row, "its header in the archive is damaged")
        if encoding != "deflated":
            raise self._error(row, f"compressed by a method that is not supported ({encoding})")
        length, size = int(self._cell(row, "length")), int(self._cell(row, "size"))
        stored = self._bytes(row, length)
        if len(stored) != length:
            raise self._short(row, len(stored), length)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = inflater.decompress(stored, size + 1)
        except zlib.error:
            raise self._error(row, "damaged compressed data") from None
        if len(data) != size or not inflater.eof:
            raise self._error(row, "damaged compressed data")
        return data

    def _bytes(self, row: int, length: int) -> bytes:
        """A range of the archive from an image's place, shorter where the archive ends."""
        offset = self._offset[row]
        if offset < 0:
            return b""
        try:
            if _PREAD:
                data: bytes = os.pread(self._handle if self._handle >= 0 else self._open(), length, offset)
                return data
            file = getattr(self._own, "file", None)
            if file is None:
                file = self._own.file = self._opened()
            file.seek(offset)
            return bytes(file.read(length))
        except OSError as error:
            raise self._error(row, (error.strerror or "cannot be read").lower()) from None

    def _open(self) -> int:
        with self._lock:
            if self._file is None:
                self._file = self._opened()
                self._handle = self._file.fileno()
        return self._handle

    def _opened(self) -> BinaryIO:
        try:
            file = self._root.open("rb", buffering=0)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}") from None
        status = os.fstat(file.fileno())
        if f"{status.st_size}-{status.st_mtime_ns}" != self.fingerprint:
            file.close()
            raise DataError(f"{self.path} changed after it was opened; open it again")
        weakref.finalize(self, file.close)
        return file

    def _dataset(self, row: int) -> NDArray[Any]:
        """The content of a dataset that only h5py can read; one open file per process."""
        import h5py

        with self._lock:
            try:
                if self._hdf5 is None or self._hdf5[0] != os.getpid():
                    self._hdf5 = (os.getpid(), h5py.File(self._root, "r"))
                dataset = self._hdf5[1][self._cell(row, "member")]
                content = np.empty(dataset.shape, dataset.dtype)
                # as stored: h5py's own reading of a text stops at zero bytes
                dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, content, dataset.id.get_type())
            except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
                raise self._error(row, str(error).splitlines()[0]) from None
        return content

    def _short(self, row: int, got: int, length: int) -> ImageError:
        return self._error(row, f"cut short: {got:,} of {length:,} bytes are there")

    def _error(self, row: int, reason: str) -> ImageError:
        return ImageError(self.name(row), self.place(row), reason)
