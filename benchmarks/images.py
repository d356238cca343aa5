"""Packages: building the index, random reads and decoding, each against the least that the work can be."""

import contextlib
import ctypes
import ctypes.util
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
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


def _index_rows(size: str, work: Path) -> Iterator[dict[str, Any]]:
    count = INDEXED[size]
    made: list[tuple[str, Path, Callable[[Path], None], int]] = [
        (
            "ZIP (floor: zipfile's directory)",
            make_zip(work / f"{count}.zip", count, 64),
            zip_directory,
            100_000,
        ),
        ("HDF5 (floor: links alone)", make_hdf5(work / f"{count}.hdf5", count, 64), hdf5_links, 50_000),
    ]
    for what, path, floor, bound in made:
        taken, least = interleaved(partial(index, path), partial(floor, path), rounds=3)
        yield {
            "work": f"index of a {what}",
            "size": f"{count:,} images",
            "value": count / taken,
            "unit": "images/s",
            "floor": count / least,
            "ratio": least / taken,
            "bound": f">= {bound:,} images/s",
            "peak_mb": peak_mb(index, path),
        }


def _read_rows(size: str, work: Path) -> Iterator[dict[str, Any]]:
    count = READ[size]
    for form, make in (("folder", make_folder), ("stored ZIP", make_zip), ("HDF5", make_hdf5)):
        suffix = {"folder": "", "stored ZIP": ".zip", "HDF5": ".hdf5"}[form]
        path = make(work / f"read_{count}{suffix}", count, IMAGE_BYTES)
        package = Images(path)
        rows = np.random.default_rng(1).permutation(count).tolist()
        with contextlib.ExitStack() as opened:
            if form == "folder":
                files = [str(path / package.index.item(row, "container")) for row in rows]

                def floor(files: list[str] = files) -> None:
                    for file in files:
                        handle = os.open(file, os.O_RDONLY)
                        os.pread(handle, os.fstat(handle).st_size, 0)
                        os.close(handle)
            else:
                handle = opened.enter_context(path.open("rb")).fileno()
                ranges = package.index.select("length", "offset")[rows].rows()

                def floor(handle: int = handle, ranges: list[Any] = ranges) -> None:  # type: ignore[misc]
                    for length, offset in ranges:
                        os.pread(handle, length, offset)

            def ours(package: Images = package, rows: list[int] = rows) -> None:
                for row in rows:
                    package.read(row)

            taken, least = interleaved(ours, floor, rounds=7)
        yield {
            "work": f"random read, {form} (floor: open and pread of the same ranges)",
            "size": f"{count:,} images of {IMAGE_BYTES:,} bytes",
            "value": count / taken,
            "unit": "images/s",
            "floor": count / least,
            "ratio": least / taken,
            "bound": ">= 0.8 x",
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


def _decode_rows() -> Iterator[dict[str, Any]]:
    jpegs = make_jpegs(200)
    what, floor = _libjpeg_turbo()
    taken, least = interleaved(
        lambda: [decode_image(data, name="", place="") for data in jpegs],
        lambda: [floor(data) for data in jpegs],
        rounds=9,
    )
    yield {
        "work": f"decode (floor: {what})",
        "size": f"256 x 341 pixels, {sum(map(len, jpegs)) // len(jpegs):,} bytes",
        "value": len(jpegs) / taken,
        "unit": "images/s a core",
        "floor": len(jpegs) / least,
        "ratio": least / taken,
        "bound": ">= 0.9 x",
    }


def run(size: str, work: Path) -> list[dict[str, Any]]:
    """Images per second of the index, of random reads and of decoding."""
    return [*_index_rows(size, work), *_read_rows(size, work), *_decode_rows()]
