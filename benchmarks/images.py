"""Packages: building the index, random reads and decoding, each against the least that the work can be."""

import contextlib
import ctypes
import ctypes.util
import io
import itertools
import multiprocessing
import os
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import polars as pl
import simplejpeg
from PIL import Image

from benchmarks.measure import interleaved, peak_mb
from bioscan import Images
from bioscan.data.decode import decode_image
from bioscan.data.image_index import load_index
from bioscan.vocabulary import HDF5_GROUP, IMAGE_FOLDER

INDEXED: Final = {"small": 20_000, "full": 1_000_000}
READ: Final = {"small": 5_000, "full": 100_000}
IMAGE_BYTES: Final = 6_360
"""Mean of the published cropped_256 package."""
PART: Final = 10_000


def names(count: int) -> Iterator[str]:
    """Paths within a package."""
    return (f"part{n // PART + 1}/{5_000_000 + n}.jpg" for n in range(count))


def make_zip(path: Path, count: int, size: int) -> Path:
    """A stored ZIP of as many members of `size` bytes."""
    data = os.urandom(size)
    if not path.is_file():
        with zipfile.ZipFile(path, "w") as archive:
            for name in names(count):
                archive.writestr(f"{IMAGE_FOLDER}/cropped_256/{name}", data)
    return path


def make_zips(path: Path, count: int, size: int) -> Path:
    """A folder of stored ZIPs, one for each part, as the original full-size photographs are published."""
    data = os.urandom(size)
    if not path.is_dir():
        path.mkdir()
        for part, some in itertools.groupby(names(count), key=lambda name: name.split("/")[0]):
            with zipfile.ZipFile(path / f"original_full_{part}.zip", "w") as archive:
                for name in some:
                    archive.writestr(f"{IMAGE_FOLDER}/original_full/{name}", data)
    return path


def make_tar(path: Path, count: int, size: int) -> Path:
    """A TAR of as many members of `size` bytes."""
    data = os.urandom(size)
    if not path.is_file():
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name in names(count):
                member = tarfile.TarInfo(name)
                member.size = size
                archive.addfile(member, io.BytesIO(data))
    return path


def make_parquet(path: Path, count: int, size: int) -> Path:
    """The struct that Hugging Face writes, 1,000 rows a group."""
    data = os.urandom(size)
    if not path.is_file():
        cells = pl.struct(pl.lit(data).alias("bytes"), pl.Series("path", names(count), pl.String))
        pl.select(cells.alias("image")).write_parquet(path, row_group_size=1000, compression="snappy")
    return path


def make_hdf5(path: Path, count: int, size: int) -> Path:
    """The published HDF5 form: one group, one dataset an image."""
    data = np.frombuffer(os.urandom(size), np.uint8)
    if not path.is_file():
        with h5py.File(path, "w") as file:
            group = file.create_group(HDF5_GROUP)
            for name in names(count):
                group.create_dataset(name.rsplit("/")[-1], data=data)
    return path


def make_folder(path: Path, count: int, size: int) -> Path:
    """Part folders."""
    data = os.urandom(size)
    if not path.is_dir():
        for name in names(count):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def make_jpegs(count: int) -> list[bytes]:
    """JPEGs of 256 x 341 pixels, quality 75, of about the published size."""
    rng = np.random.default_rng(1)
    made = []
    for _ in range(count):
        rough = Image.fromarray(rng.integers(90, 200, (24, 32, 3), np.uint8))
        file = io.BytesIO()
        rough.resize((341, 256), Image.Resampling.BICUBIC).save(file, "JPEG", quality=75)
        made.append(file.getvalue())
    return made


def index(path: Path) -> None:
    """The index of a package, made anew."""
    load_index(path, save=False)


def zip_directory(path: Path) -> None:
    """The floor of a ZIP's index: zipfile reads the directory."""
    with zipfile.ZipFile(path) as archive:
        archive.infolist()


def hdf5_links(path: Path) -> None:
    """The floor of an HDF5's index: the library lists the links of the group."""
    found: list[bytes] = []
    with h5py.File(path) as file:
        group = file[HDF5_GROUP]
        group.id.links.iterate(lambda name, info: found.append(name), info=True)


def tar_headers(path: Path) -> None:
    """The floor of a TAR's index: tarfile reads the headers."""
    with tarfile.open(path) as archive:
        while archive.next():
            archive.getmembers().clear()


def parquet_sizes(path: Path) -> None:
    """The floor of a table's index: Polars reads the column once."""
    image = pl.col("image").struct
    columns = (image.field("path"), image.field("bytes").bin.size())
    pl.scan_parquet(path).select(*columns).collect(engine="streaming")


def index_together(path: Path) -> None:
    """The index of many archives by two processes, with their start."""
    load_index(path, save=False, workers=2)


Work = Callable[[Path], None]


def _index_rows(size: str, work: Path) -> Iterator[dict[str, Any]]:
    count = INDEXED[size]
    several = f"{-(-count // PART)} ZIPs"
    made: list[tuple[str, Path, Work, Work, str]] = [
        (
            "a ZIP (floor: zipfile's directory)",
            make_zip(work / f"{count}.zip", count, 64),
            index,
            zip_directory,
            ">= 100,000 images/s",
        ),
        (
            "an HDF5 file (floor: links alone)",
            make_hdf5(work / f"{count}.hdf5", count, 64),
            index,
            hdf5_links,
            ">= 50,000 images/s",
        ),
        (
            "a TAR (floor: tarfile's headers)",
            make_tar(work / f"{count}.tar", count, 64),
            index,
            tar_headers,
            "",
        ),
        (
            "a Parquet table (floor: Polars reading it)",
            make_parquet(work / f"{count}.parquet", count, 64),
            index,
            parquet_sizes,
            "",
        ),
        (
            f"{several}, 2 processes (floor: 1 process)",
            make_zips(work / f"{count}_zips", count, 64),
            index_together,
            index,
            ">= 100,000 images/s",
        ),
    ]
    for what, path, ours, floor, bound in made:
        taken, least = interleaved(partial(ours, path), partial(floor, path), rounds=3)
        yield {
            "work": f"index of {what}",
            "size": f"{count:,} images",
            "value": count / taken,
            "unit": "images/s",
            "floor": count / least,
            "ratio": least / taken,
            "bound": bound or None,
            "peak_mb": peak_mb(index, path),
        }


Reader = Callable[[], None]


def ranges_of(package: Images, rows: list[int]) -> Reader:
    """The floor of random reads: open and pread of the same ranges."""
    if package.form in ("folder", "part folders"):
        files = [str(package.file(row)) for row in rows]

        def read_files() -> None:
            for file in files:
                handle = os.open(file, os.O_RDONLY)
                os.pread(handle, os.fstat(handle).st_size, 0)
                os.close(handle)

        return read_files
    handles = {package.file(row): -1 for row in rows}
    for path in handles:
        handles[path] = os.open(path, os.O_RDONLY)  # until the process ends
    places = package.index.select("length", "offset")[rows].rows()
    ranges = [(handles[package.file(row)], *place) for row, place in zip(rows, places, strict=True)]

    def read_ranges() -> None:
        for handle, length, offset in ranges:
            os.pread(handle, length, offset)

    return read_ranges


def reads_of(package: Images, rows: list[int]) -> Reader:
    """Our random reads."""

    def read() -> None:
        for row in rows:
            package.read(row)

    return read


def rows_of_table(package: Images, rows: list[int]) -> Reader:
    """The floor of reading a table in its order: pyarrow, group by group."""
    import pyarrow.parquet

    path = package.file(0)

    def read() -> None:
        table = pyarrow.parquet.ParquetFile(path)
        for batch in table.iter_batches(1000, columns=["image"]):
            for cell in batch.column(0).field(0):
                cell.as_py()

    return read


def _half(path: Path, make: Callable[[Images, list[int]], Reader], rows: list[int], pipe: Any) -> None:
    """In a process of its own: get ready, wait, read, tell the seconds; for each time it is told to."""
    read = make(Images(path), rows)
    pipe.send(0.0)
    while pipe.recv():
        start = time.perf_counter()
        read()
        pipe.send(time.perf_counter() - start)


@contextlib.contextmanager
def _together(path: Path, make: Callable[[Images, list[int]], Reader], rows: list[int]) -> Iterator[Reader]:
    """Two processes that read half of the rows each, at the same time."""
    context = multiprocessing.get_context("spawn")
    pipes = []
    for half in (rows[::2], rows[1::2]):
        ours, theirs = context.Pipe()
        context.Process(target=_half, args=(path, make, half, theirs), daemon=True).start()
        pipes.append(ours)
        ours.recv()

    def read() -> None:
        for pipe in pipes:
            pipe.send(True)
        for pipe in pipes:
            pipe.recv()

    yield read
    for pipe in pipes:
        pipe.send(False)


def _read_rows(size: str, work: Path) -> Iterator[dict[str, Any]]:
    count = READ[size]
    forms: dict[str, tuple[str, Callable[[Path, int, int], Path]]] = {
        "folder": ("", make_folder),
        "stored ZIP": (".zip", make_zip),
        f"{-(-count // PART)} stored ZIPs": ("_zips", make_zips),
        "TAR": (".tar", make_tar),
        "HDF5": (".hdf5", make_hdf5),
    }
    for form, (suffix, make) in forms.items():
        path = make(work / f"read_{count}{suffix}", count, IMAGE_BYTES)
        package = Images(path)
        rows = np.random.default_rng(1).permutation(count).tolist()
        alone = interleaved(reads_of(package, rows), ranges_of(package, rows), rounds=7)
        with _together(path, reads_of, rows) as ours, _together(path, ranges_of, rows) as floor:
            together = interleaved(ours, floor, rounds=7)
        for processes, (taken, least) in ((1, alone), (2, together)):
            yield {
                "work": f"random read, {form}, {processes} process{'es' * (processes > 1)} "
                "(floor: open and pread of the same ranges)",
                "size": f"{count:,} images of {IMAGE_BYTES:,} bytes",
                "value": count / taken,
                "unit": "images/s",
                "floor": count / least,
                "ratio": least / taken,
                "bound": ">= 0.8 x",
            }
    package = Images(make_parquet(work / f"read_{count}.parquet", count, IMAGE_BYTES))
    rows = list(range(count))
    taken, least = interleaved(reads_of(package, rows), rows_of_table(package, rows), rounds=3)
    yield {
        "work": "read in storage order, Parquet (floor: pyarrow)",
        "size": f"{count:,} images of {IMAGE_BYTES:,} bytes",
        "value": count / taken,
        "unit": "images/s",
        "floor": count / least,
        "ratio": least / taken,
    }


def _libjpeg_turbo() -> tuple[str, Callable[[bytes], object]]:
    """The system's libjpeg-turbo called directly, else the one that simplejpeg brings."""
    name = ctypes.util.find_library("turbojpeg")
    if name is None:
        return "simplejpeg alone", simplejpeg.decode_jpeg
    library = ctypes.CDLL(name)
    library.tjInitDecompress.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(library.tjInitDecompress())

    def decode(data: bytes) -> object:
        width, height, subsampling, colours = (ctypes.c_int() for _ in range(4))
        sizes = (ctypes.byref(value) for value in (width, height, subsampling, colours))
        library.tjDecompressHeader3(handle, data, ctypes.c_ulong(len(data)), *sizes)
        pixels = np.empty((height.value, width.value, 3), np.uint8)
        target = pixels.ctypes.data_as(ctypes.c_void_p)
        library.tjDecompress2(handle, data, ctypes.c_ulong(len(data)), target, width, 0, height, 0, 0)
        return pixels

    return "tjDecompress2 of the system's libjpeg-turbo", decode


def decodes_of(package: Images, rows: list[int]) -> Reader:
    """Our decoding, of bytes that are in memory."""
    jpegs = [package.read(row) for row in rows]

    def read() -> None:
        for data in jpegs:
            decode_image(data, name="", place="")

    return read


def bare_decodes_of(package: Images, rows: list[int]) -> Reader:
    """The floor: the same by libjpeg-turbo."""
    jpegs = [package.read(row) for row in rows]
    decode = _libjpeg_turbo()[1]

    def read() -> None:
        for data in jpegs:
            decode(data)

    return read


def decoded(path: Path) -> None:
    """All of them, one after the other."""
    package = Images(path)
    decodes_of(package, list(range(len(package))))()


def _decode_rows(work: Path) -> Iterator[dict[str, Any]]:
    path = work / "jpegs.zip"
    jpegs = make_jpegs(200)
    with zipfile.ZipFile(path, "w") as archive:
        for number, data in enumerate(jpegs):
            archive.writestr(f"{number}.jpg", data)
    package, rows = Images(path), list(range(len(jpegs)))
    alone = interleaved(decodes_of(package, rows), bare_decodes_of(package, rows), rounds=9)
    with _together(path, decodes_of, rows) as ours, _together(path, bare_decodes_of, rows) as floor:
        together = interleaved(ours, floor, rounds=9)
    for processes, (taken, least) in ((1, alone), (2, together)):
        yield {
            "work": f"decode, {processes} process{'es' * (processes > 1)} (floor: {_libjpeg_turbo()[0]})",
            "size": f"256 x 341 pixels, {sum(map(len, jpegs)) // len(jpegs):,} bytes",
            "value": len(jpegs) / taken,
            "unit": "images/s",
            "floor": len(jpegs) / least,
            "ratio": least / taken,
            "bound": ">= 0.9 x",
            "peak_mb": peak_mb(decoded, path) if processes == 1 else None,
        }


def run(size: str, work: Path) -> list[dict[str, Any]]:
    """Images per second of the index, of random reads and of decoding."""
    return [*_index_rows(size, work), *_read_rows(size, work), *_decode_rows(work)]
