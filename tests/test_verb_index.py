"""`bioscan index`: what it shows of a package, and what it finds in it."""

import hashlib
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest

Run = Callable[..., tuple[int, str, str]]

FILES = {
    f"part{n}/{n}_{i}.jpg": random.Random(f"{n}{i}").randbytes(100 + n) for n in (1, 2, 3) for i in range(4)
}


def make_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_it_says_what_is_there_and_saves_the_index(tmp_path: Path, run_bioscan: Run) -> None:
    path = make_zip(tmp_path / "cropped_256.zip", {**FILES, "part7/7.JPG": b"123", "plate/x.png": b"12345"})
    status, text, _ = run_bioscan("index", path)
    assert status == 0
    assert text.splitlines() == [
        f"form       zip, one file, {path.stat().st_size / 1000:.3g} kB",
        "index      cropped_256.zip.index.parquet",
        "images     14",
        "parts      1–3: 4 each; 7: 1; 1 images in none",
        "bytes      1,232 in all, 88 on average",  # 4 x (101 + 102 + 103) + 3 + 5
        "smallest   3 part7/7.JPG",
        "largest    103 part3/3_0.jpg",
        "stored as  file 14",
        "endings    .jpg 13, .png 1",
    ]
    assert (tmp_path / "cropped_256.zip.index.parquet").is_file()


def test_the_table_does_not_take_the_place_of_what_is_read(tmp_path: Path, run_bioscan: Run) -> None:
    package = tmp_path / "a.parquet"
    assert run_bioscan("convert", make_zip(tmp_path / "a.zip", FILES), package)[0] == 0
    (tmp_path / "link.parquet").symlink_to(package)
    catalogue = tmp_path / "all.csv"
    catalogue.write_text("sampleid,image_file\n1,1_0.jpg\n")
    assert run_bioscan("index", package)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for output, why in (
        (package, "is the source package, which is read"),
        (tmp_path / "link.parquet", "is the source package, which is read"),
        (tmp_path / "a.parquet.index.parquet", "is the saved index of the source, which is read"),
        (catalogue, "all.csv, which is read"),
        (catalogue / "x.csv", "cannot be written"),
    ):
        arguments = ("index", package, "--metadata", catalogue, "-o", output, "--overwrite")
        status, text, err = run_bioscan(*arguments)
        assert (status, text) == (2, ""), output
        assert why in err
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_many_parts_of_many_sizes_are_one_line(tmp_path: Path, run_bioscan: Run) -> None:
    files = {f"part{n}/{i}.jpg": b"1" for n in range(1, 9) for i in range(n)}
    _, text, _ = run_bioscan("index", make_zip(tmp_path / "a.zip", files))
    assert "parts      8 of 1–8, 1 to 8 images each\n" in text


def test_json_has_every_name_that_the_text_counts(tmp_path: Path, run_bioscan: Run) -> None:
    odd = {"../up.jpg": b"u", "/abs.jpg": b"a", "notes.txt": b"n", "__MACOSX/x.jpg": b"m"}
    path = make_zip(tmp_path / "a.zip", {**FILES, **odd})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("part1/lz.jpg", b"z" * 99, compress_type=zipfile.ZIP_LZMA)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("part1/1_0.jpg", b"again")
    status, text, _ = run_bioscan("index", path, "--json")
    found = json.loads(text)
    assert status == 0
    assert found["schema_version"] == 1
    assert found["images"] == len(FILES) + 3
    assert found["left_out"] == {"duplicate": 1, "not an image": 1, "hidden": 1}
    assert found["no_images"] == ["notes.txt", "__MACOSX/x.jpg"]
    assert found["unsafe"] == ["../up.jpg", "/abs.jpg"]
    assert found["unreadable"] == [{"name": "lz.jpg", "part": 1, "encoding": "lzma"}]
    assert found["parts"][1] == {"part": 1, "images": 5}
    (twice,) = found["duplicates"]
    with zipfile.ZipFile(path) as archive:
        first, second = (i.header_offset + 43 for i in archive.infolist() if i.filename == "part1/1_0.jpg")
    places = {"place": f"a.zip @ {second}", "kept": f"a.zip @ {first}"}
    assert twice == {"name": "1_0.jpg", "part": 1, **places}
    _, text, _ = run_bioscan("index", path, "--limit", 1)
    assert (
        f"1 left out: another of the same name and part came before\n  part1/1_0.jpg (a.zip @ {second}"
        in text
    )
    assert "2 members that are no images (not an image 1, hidden 1)\n  notes.txt\n  … and 1 more" in text
    assert "2 with an unsafe path (absolute, «..», a drive); it is never used\n  ../up.jpg" in text
    assert "1 stored in a way that cannot be read\n  part1/lz.jpg: lzma" in text


def test_records_and_images_are_compared(tmp_path: Path, run_bioscan: Run) -> None:
    path = make_zip(tmp_path / "a.zip", FILES)
    rows = [f"{i},{name.split('/')[1]},{name[4]}" for i, name in enumerate(FILES)]
    (tmp_path / "all.csv").write_text("\n".join(["sampleid,image_file,chunk_number", *rows]) + "\n")
    _, text, _ = run_bioscan("index", path, "--metadata", tmp_path / "all.csv")
    assert "each of 12 records has its image, and each image its record" in text
    (tmp_path / "some.csv").write_text(
        "\n".join(["sampleid,image_file,chunk_number", *rows[2:], "x,gone.jpg,9"]) + "\n"
    )
    status, text, _ = run_bioscan("index", path, "--metadata", tmp_path / "some.csv")
    assert status == 0
    assert "1 of 11 records: image missing from the package\n  part9/gone.jpg" in text
    assert "2 of 12 images in no record\n  part1/1_0.jpg\n  part1/1_1.jpg" in text
    _, text, _ = run_bioscan("index", path, "--metadata", tmp_path / "some.csv", "--json")
    found = json.loads(text)
    assert found["records"] == 11
    assert found["missing"] == [{"sampleid": "x", "image_file": "gone.jpg", "chunk_number": 9}]
    assert found["surplus"] == [{"name": "1_0.jpg", "part": 1}, {"name": "1_1.jpg", "part": 1}]


@pytest.mark.parametrize("form", ["folder", "zip", "tar", "hdf5"])
def test_identical_images_are_found_by_reading_all(tmp_path: Path, run_bioscan: Run, form: str) -> None:
    files = {"a.jpg": b"same" * 9, "b.jpg": b"other", "c.jpg": b"same" * 9, "d.jpg": b"alone"}
    path = tmp_path / {"folder": "p", "zip": "p.zip", "tar": "p.tar", "hdf5": "p.hdf5"}[form]
    if form == "zip":
        make_zip(path, files)
    elif form == "hdf5":
        with h5py.File(path, "w") as file:
            for name, data in files.items():
                file[name] = np.frombuffer(data, np.uint8)
    else:
        folder = tmp_path / "p"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        if form == "tar":
            with tarfile.open(path, "w") as archive:
                archive.add(folder, arcname=".")
    table = tmp_path / "table.parquet"
    status, text, _ = run_bioscan("index", path, "--hash", "--workers", 1, "--output", table)
    assert status == 0
    assert "4 of 4 images read" in text
    assert "2 images of identical bytes, in 1 group\n  a.jpg, c.jpg (36 bytes)" in text
    rows = pl.read_parquet(table)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert dict(rows.select("name", "sha256").rows()) == hashes
    assert dict(rows.select("name", "size").rows()) == {name: len(data) for name, data in files.items()}
    assert rows["error"].is_null().all()


def test_what_cannot_be_read_is_listed_and_the_status_is_1(tmp_path: Path, run_bioscan: Run) -> None:
    path = make_zip(tmp_path / "a.zip", FILES)
    data = bytearray(path.read_bytes())
    data[data.index(FILES["part2/2_1.jpg"]) + 5] ^= 1  # a bit of a stored image: only the checksum tells
    path.write_bytes(data)
    status, text, said = run_bioscan("index", path, "--hash", "--workers", 1, "-o", tmp_path / "t.csv")
    assert status == 1
    assert "11 of 12 images read" in text
    assert "1 could not be read\n  part2/2_1.jpg: damaged: its checksum is another one" in text
    assert "1 of 12 images could not be read (first: part2/2_1.jpg: damaged" in said
    rows = pl.read_csv(tmp_path / "t.csv")
    assert rows.filter(pl.col("error").is_not_null())["name"].to_list() == ["2_1.jpg"]
    assert rows["sha256"].null_count() == 1


def test_workers_change_nothing(tmp_path: Path, run_bioscan: Run) -> None:
    for n in (1, 2, 3):
        make_zip(tmp_path / f"p/x{n}.zip", {k: v for k, v in FILES.items() if k.startswith(f"part{n}")})
    alone = run_bioscan("index", tmp_path / "p", "--hash", "--workers", 1, "--json")
    (tmp_path / "p.index.parquet").unlink()
    assert run_bioscan("index", tmp_path / "p", "--hash", "--workers", 2, "--json") == alone
    assert json.loads(alone[1])["archives"] == 3


def test_names_are_shown_on_one_line_whatever_they_hold(tmp_path: Path, run_bioscan: Run) -> None:
    names = ["../\x1b[31mred.jpg", "../two\nlines.jpg", f"../{'long' * 60}.jpg"]
    path = make_zip(tmp_path / "a.zip", {**FILES, **{name: b"1" for name in names}})
    _, text, _ = run_bioscan("index", path)
    assert "\x1b" not in text
    assert r"../\x1b[31mred.jpg" in text
    assert r"../two\nlines.jpg" in text
    assert max(map(len, text.splitlines())) <= 100


def test_wrong_requests_are_refused_before_any_work(tmp_path: Path, run_bioscan: Run) -> None:
    path = make_zip(tmp_path / "a.zip", FILES)
    for arguments, message in (
        (["--output", tmp_path / "t.txt"], "the table is a .parquet or .csv file"),
        (["--output", path.with_suffix(".csv")], "exists; choose another name or pass --overwrite"),
        (["--limit", "-1"], "--limit is -1; 0 or more is needed"),
        (["--metadata", tmp_path / "none.csv"], "none.csv"),
        (["--hash", "--engine", "slurm"], 'Invalid value "slurm" for --engine'),
    ):
        (tmp_path / "a.csv").write_text("mine")
        status, text, said = run_bioscan("index", path, *arguments)
        assert (status, text) == (2, "")
        assert message in said
    assert (tmp_path / "a.csv").read_text() == "mine"
