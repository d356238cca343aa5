"""Parquet tables with images: what pyarrow wrote comes back, row by row."""

import multiprocessing
import random
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan.data import images as images_module
from bioscan.data.images import Images
from bioscan.data.parquet_layout import read_rows
from bioscan.errors import DataError, ImageError, RequestError

FILES = {f"{n}.jpg": random.Random(n).randbytes(50 + 30 * n) for n in range(40)}
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(
    path: Path, files: dict[str, bytes] = FILES, *, more: dict[str, Any] | None = None, **options: Any
) -> Path:
    """As the `datasets` library of Hugging Face writes images."""
    image = pa.array([{"bytes": data, "path": name} for name, data in files.items()], STRUCT)
    pq.write_table(pa.table({"image": image, **(more or {})}), path, **options)
    return path


def read_all(images: Images) -> dict[str, bytes]:
    return {images.name(row): images.read(row) for row in range(len(images))}


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("group", [7, 1000])
def test_the_struct_of_hugging_face_is_read(tmp_path: Path, compression: str, group: int) -> None:
    path = write(tmp_path / "a.parquet", compression=compression, row_group_size=group)
    images = Images(path)
    assert images.form == "parquet"
    assert read_all(images) == FILES
    assert images.index["size"].to_list() == [len(data) for data in FILES.values()]
    assert images.place(3) == "a.parquet row 3"
    column = pq.read_table(path)["image"].to_pylist()
    assert [images.read(row) for row in range(len(images))] == [cell["bytes"] for cell in column]


@pytest.mark.parametrize("name", ["image_file", "file_name", "path"])
def test_a_column_of_bytes_takes_its_names_from_another_column(tmp_path: Path, name: str) -> None:
    table = {"image": pa.array(list(FILES.values()), pa.binary()), name: list(FILES)}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert read_all(Images(tmp_path / "a.parquet")) == FILES


def test_parts_come_from_their_column(tmp_path: Path) -> None:
    images = Images(
        write(
            tmp_path / "a.parquet", {f"{n}.jpg": bytes([n]) for n in range(4)}, more={"part": [1, 1, 2, None]}
        )
    )
    assert images.index.select("name", "part").rows() == [
        ("0.jpg", 1),
        ("1.jpg", 1),
        ("2.jpg", 2),
        ("3.jpg", None),
    ]


def test_images_without_a_name_take_the_files_name_and_their_row(tmp_path: Path) -> None:
    image = pa.array(
        [{"bytes": b"1", "path": None}, {"bytes": b"2", "path": "b"}, None, {"bytes": b"3"}], STRUCT
    )
    pq.write_table(pa.table({"photo": image}), tmp_path / "train.parquet")
    assert read_all(Images(tmp_path / "train.parquet")) == {
        "train_000000": b"1",
        "b": b"2",
        "train_000003": b"3",
    }


def test_a_path_without_bytes_is_a_failure_of_its_own(tmp_path: Path) -> None:
    image = pa.array([{"bytes": None, "path": "/data/a.jpg"}, {"bytes": b"2", "path": "/data/b.jpg"}], STRUCT)
    pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet")
    images = Images(tmp_path / "a.parquet")
    with pytest.raises(ImageError, match=r"a\.jpg: the table holds its path, not its bytes"):
        images.read(0)
    assert images.read(1) == b"2"
    assert not images.index["unsafe"].any()  # the path is only where the name comes from


def test_shards_are_one_package_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = list(FILES)
    (tmp_path / "data").mkdir()
    for n in range(3):
        some = {name: FILES[name] for name in names[n * 10 : n * 10 + 10]}
        write(tmp_path / "data" / f"train-{n:05d}-of-00003.parquet", some)
    pl.DataFrame({"sampleid": ["a"], "image_file": ["0.jpg"]}).write_parquet(tmp_path / "catalogue.parquet")
    images = Images(tmp_path)  # a table without images beside them is no part of it
    assert read_all(images) == {name: FILES[name] for name in names[:30]}
    assert [images.name(row) for row in range(30)] == names[:30]


def test_rows_are_read_a_window_at_a_time_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "_WINDOW_BYTES", 3000)
    asked: list[tuple[int, int]] = []
    right = read_rows

    def watch(file: Path, start: int, count: int) -> pl.Series:
        asked.append((start, count))
        return right(file, start, count)

    monkeypatch.setattr(images_module, "read_rows", watch)
    images = Images(write(tmp_path / "a.parquet"))
    assert read_all(images) == FILES
    sizes = [len(data) for data in FILES.values()]
    assert all(sum(sizes[start : start + count]) <= 3000 for start, count in asked)
    assert [start for start, _ in asked] == [0, *(start + count for start, count in asked[:-1])]
    asked.clear()
    part = images.take([9, 2, 3, 4, 30])
    assert [part.read(row) for row in range(5)] == [FILES[f"{n}.jpg"] for n in (9, 2, 3, 4, 30)]
    assert asked == [(9, 1), (2, 3), (30, 1)]


def first(images: Images) -> bytes | str:
    try:
        return images.read(0)
    except DataError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_refused_and_a_spawned_one_reads(tmp_path: Path) -> None:
    images = Images(write(tmp_path / "a.parquet"))
    images.read(0)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert "cannot be read in a forked process; let workers be spawned" in str(
            pool.apply(first, (images,))
        )
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(first, (images,)) == FILES["0.jpg"]


def test_tables_without_images_and_damaged_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pl.DataFrame({"sampleid": ["a"]}).write_parquet(path)
    with pytest.raises(RequestError, match=r"a table without images.*columns: sampleid"):
        Images(path)
    whole = write(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read as Parquet, damaged or cut short"):
        Images(path)
    path.write_bytes(b"<html>quota exceeded</html>")
    with pytest.raises(DataError, match="not a Parquet file, its signature is missing"):
        Images(path)


def test_a_table_that_changed_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    images = Images(write(tmp_path / "a.parquet"))
    write(tmp_path / "a.parquet", {"other.jpg": b"other"})
    with pytest.raises(DataError, match="changed after it was opened"):
        images.read(0)
