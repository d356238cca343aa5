"""HDF5 packages: the bytes at the places that we read from the file are those that h5py gives."""

import random
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from bioscan.data import hdf5_layout
from bioscan.data.decode import read_rgb
from bioscan.data.images import Images
from bioscan.errors import DataError

FILES = {f"{n}.jpg": random.Random(n).randbytes(300 + 7 * n) for n in range(40)}
LIBRARIES = ["earliest", "v108", "v110", "latest"]


def as_array(data: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(data, np.uint8)


def read_all(path: Path) -> dict[str, bytes]:
    package = Images(path)
    assert package.form == "hdf5"
    return {package.name(row): package.read(row) for row in range(len(package))}


def encodings(path: Path) -> set[str]:
    return set(Images(path).index["encoding"])


@pytest.mark.parametrize("libver", LIBRARIES)
def test_the_published_form_is_read_at_its_places(tmp_path: Path, libver: str) -> None:
    path = tmp_path / "cropped_256.hdf5"
    with h5py.File(path, "w", libver=libver) as file:
        group = file.create_group("bioscan_dataset")
        group.attrs["Copyright Holder"] = "CBG Photography Group"
        for name, data in FILES.items():
            group.create_dataset(name, data=as_array(data))
        file.create_group("other")["x.jpg"] = as_array(b"not of the group")
    assert read_all(path) == FILES
    assert encodings(path) == {"file"}
    package = Images(path)
    with h5py.File(path) as file:
        for name in FILES:
            (row,) = package.find([name])
            dataset = file["bioscan_dataset"][name]
            assert package.index["offset"][int(row)] == dataset.id.get_offset()
            assert package.read(row) == dataset[()].tobytes()
    assert package.place(0).startswith("cropped_256.hdf5 @ ")


@pytest.mark.parametrize("libver", LIBRARIES)
@pytest.mark.parametrize("kind", ["string", "opaque"])
def test_scalar_bytes_at_the_root_keep_their_last_zeros(tmp_path: Path, libver: str, kind: str) -> None:
    path = tmp_path / "a.h5"
    files = FILES | {"zeros.jpg": b"\xff\xd8\0\0\0"}
    with h5py.File(path, "w", libver=libver) as file:
        for name, data in files.items():
            if kind == "string":
                file.create_dataset(name, data=np.array(data, f"S{len(data)}"))
            else:
                file.create_dataset(name, data=np.void(data))
    assert read_all(path) == files


@pytest.mark.parametrize("libver", LIBRARIES)
def test_pixels_at_the_root_are_arrays(tmp_path: Path, libver: str) -> None:
    path = tmp_path / "a.hdf5"
    rng = np.random.default_rng(0)
    arrays = {f"{n}.jpg": rng.integers(0, 256, (10 + n, 20, 3), np.uint8) for n in range(12)}
    with h5py.File(path, "w", libver=libver) as file:
        for name, pixels in arrays.items():
            file[name] = pixels
    package = Images(path)
    assert set(package.index["encoding"]) == {"raw"}
    for row in range(len(package)):
        assert package.is_array(row)
        assert np.array_equal(package.array(row), arrays[package.name(row)])
        assert np.array_equal(read_rgb(package, row), arrays[package.name(row)])
    with pytest.raises(DataError, match="an array of pixels, no image file"):
        package.read(0)
    package.array(0)[:] = 0  # a copy of its own


def test_files_and_pixels_may_stand_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    with h5py.File(path, "w") as file:
        for name, data in FILES.items():
            file[name] = as_array(data)
        file["pixels.png"] = pixels
    package = Images(path)
    (row,) = package.find(["pixels.png"])
    assert np.array_equal(package.array(row), pixels)
    found = package.find(list(FILES))
    assert [package.read(r) for r in found] == list(FILES.values())
    with pytest.raises(DataError, match="an image file, no array of pixels"):
        package.array(found[0])


def test_what_has_no_one_place_is_read_through_the_library(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)
    data = FILES["9.jpg"]
    with h5py.File(path, "w") as file:
        group = file.create_group("bioscan_dataset")
        group.create_dataset("chunked.jpg", data=as_array(data), chunks=(100,))
        group.create_dataset("gzip.jpg", data=as_array(data), chunks=(100,), compression="gzip")
        group.create_dataset("pixels.jpg", data=pixels, chunks=True, compression="gzip")
        group.create_dataset("plain.jpg", data=as_array(data))
        group.create_dataset("empty.jpg", data=np.zeros(0, np.uint8))
        group["soft.jpg"] = h5py.SoftLink("/bioscan_dataset/plain.jpg")
        group["nowhere.jpg"] = h5py.SoftLink("/no/such/thing")
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_layout(h5py.h5d.COMPACT)
        kind = h5py.h5t.C_S1.copy()
        kind.set_size(8)
        kind.set_strpad(h5py.h5t.STR_NULLPAD)
        space = h5py.h5s.create(h5py.h5s.SCALAR)
        compact = h5py.h5d.create(group.id, b"compact.jpg", kind, space, layout)
        compact.write(space, space, np.array(b"abc\0\0de\0", "S8"))
        outside = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        outside.set_external(str(tmp_path / "outside.bin").encode(), 0, 5)
        h5py.h5d.create(group.id, b"outside.jpg", h5py.h5t.STD_U8LE, h5py.h5s.create_simple((5,)), outside)
    (tmp_path / "outside.bin").write_bytes(b"12345")
    package = Images(path)
    found = {package.name(r): r for r in range(len(package))}
    expected = dict.fromkeys(["chunked.jpg", "gzip.jpg", "plain.jpg", "soft.jpg"], data)
    expected |= {"empty.jpg": b"", "compact.jpg": b"abc\0\0de\0", "outside.jpg": b"12345"}
    assert {n: package.read(r) for n, r in found.items() if n != "pixels.jpg"} == expected
    assert np.array_equal(package.array(found["pixels.jpg"]), pixels)
    assert package.place(found["gzip.jpg"]) == "a.hdf5/bioscan_dataset/gzip.jpg"


def test_what_is_no_image_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file["a.jpg"] = as_array(b"abc")
        file["floats.jpg"] = np.zeros(5)
        file["wide.jpg"] = np.zeros(5, np.uint16)
        file["signed.jpg"] = np.zeros(5, np.int8)
        file["grey.jpg"] = np.zeros((5, 5), np.uint8)
        file["text.jpg"] = "variable length"
        file["notes.txt"] = as_array(b"abc")
        file.create_group("group.jpg")
        file["four.jpg"] = np.zeros((5, 5, 4), np.uint8)
    assert read_all(path) == {"a.jpg": b"abc"}


def test_a_user_block_moves_all_places(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w", userblock_size=1024) as file:
        for name, data in FILES.items():
            file[name] = as_array(data)
    assert read_all(path) == FILES


def test_places_that_h5py_contradicts_are_asked_of_it_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        for name, data in FILES.items():
            file[name] = as_array(data)
    right = hdf5_layout._plain_datasets

    def wrong(headers: Any) -> Any:
        plain = right(headers)
        return plain._replace(offset=plain.offset + 8)

    monkeypatch.setattr(hdf5_layout, "_plain_datasets", wrong)
    assert read_all(path) == FILES


def test_the_headers_are_understood_without_asking_h5py(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []
    ask = hdf5_layout._ask

    def watch(h5: Any, group: Any, name: bytes, linked: bool) -> Any:
        asked.append(name)
        return ask(h5, group, name, linked)

    monkeypatch.setattr(hdf5_layout, "_ask", watch)
    for libver in LIBRARIES:
        path = tmp_path / f"{libver}.hdf5"
        with h5py.File(path, "w", libver=libver) as file:
            for name, data in FILES.items():
                file[f"bioscan_dataset/{name}"] = as_array(data)
        asked.clear()
        Images(path)
        assert len(asked) == hdf5_layout._COMPARED


def test_images_are_in_storage_order_across_batches(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    names = [f"{(n * 7919) % 1000:04d}.jpg" for n in range(1000)]
    with h5py.File(path, "w") as file:
        for name in names:
            file[name] = as_array(name.encode())
    (whole,) = [f for f in hdf5_layout.image_datasets(path, "bioscan_dataset", 1000) if f.height]
    batches = [f for f in hdf5_layout.image_datasets(path, "bioscan_dataset", 64) if f.height]
    assert len(batches) == 16
    assert sum(f.height for f in batches) == whole.height == 1000
    package = Images(path)
    assert [package.name(row) for row in range(1000)] == names
    assert [package.read(row).decode() for row in range(1000)] == names


def test_a_file_that_is_cut_short_or_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        for name, data in FILES.items():
            file[name] = as_array(data)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match="cannot be read as HDF5, damaged or cut short; is the download complete"
    ):
        Images(path)
    path.write_bytes(b"<html>quota exceeded</html>")
    with pytest.raises(DataError, match="not an HDF5 file, its signature is missing"):
        Images(path)
