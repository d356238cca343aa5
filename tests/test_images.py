"""Packages: every image is found by name and comes back byte for byte, as the owner of its form gives it."""

import contextlib
import gc
import multiprocessing
import os
import pickle
import random
import struct
import subprocess
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan.data import image_index
from bioscan.data.image_index import index_path, load_index
from bioscan.data.images import MAX_IMAGE_BYTES, Images, _no_pread
from bioscan.errors import BioscanError, DataError, ImageError, RequestError
from bioscan.vocabulary import FOOTER

LAYOUT = "bioscan/images/cropped_256"


def content(name: str, size: int = 400) -> bytes:
    """Bytes that differ from name to name and do not shrink much."""
    return random.Random(name).randbytes(size + len(name))


FILES = {f"part{n}/{n}_{i}.jpg": content(f"{n}_{i}.jpg") for n in (1, 2, 113) for i in range(5)}


def make_folder(where: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, data in files.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_bytes(data)
    return where


def make_zip(where: Path, files: dict[str, bytes] = FILES, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(where, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return where


def read_all(package: Images) -> dict[str, bytes]:
    return {package.name(row): package.read(row) for row in range(len(package))}


def by_name(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name.rsplit("/", 1)[-1]: data for name, data in files.items()}


# -- folders


@pytest.mark.parametrize("inside", ["", "bioscan", "bioscan/images", LAYOUT])
def test_a_dataset_folder_is_a_package_at_each_of_its_levels(tmp_path: Path, inside: str) -> None:
    make_folder(tmp_path / "data" / LAYOUT)
    (tmp_path / "data/metadata.tsv").write_text("sampleid\n")
    package = Images(tmp_path / "data" / inside)
    assert package.form == "part folders"
    assert sorted(package.index["part"].unique()) == [1, 2, 113]
    assert read_all(package) == by_name(FILES)
    assert package.place(0).endswith("part1/1_0.jpg")


def test_the_real_photographs_are_found_by_name_and_part(shared: Path) -> None:
    root = shared / "data/insects"
    rows = pl.read_csv(root / "metadata.tsv", separator="\t", quote_char=None, infer_schema=False)
    package = Images(root, save_index=False)
    found = package.find(rows["image_file"], rows["chunk_number"].cast(pl.Int64))
    assert len(package) == rows.height
    assert sorted(found) == list(range(len(package)))
    for row in range(0, rows.height, 97):
        file = root / LAYOUT / f"part{rows['chunk_number'][row]}" / rows["image_file"][row]
        assert package.read(found[row]) == file.read_bytes()


def test_a_flat_folder_has_the_names_of_its_files_and_hidden_things_are_left_out(tmp_path: Path) -> None:
    files = {
        "a.jpg": b"1",
        "b.PNG": b"2",
        ".c.jpg": b"3",
        "__MACOSX/d.jpg": b"4",
        "e.txt": b"5",
        ".f/g.jpg": b"6",
    }
    package = Images(make_folder(tmp_path / "photos", files))
    assert package.form == "folder"
    assert read_all(package) == {"a.jpg": b"1", "b.PNG": b"2"}
    assert "a.jpg" in package
    assert "e.txt" not in package
    assert 7 not in package


def test_links_are_followed_once(tmp_path: Path) -> None:
    make_folder(tmp_path / "p", {"x/a.jpg": b"1"})
    (tmp_path / "p/x/round").symlink_to(tmp_path / "p")
    (tmp_path / "p/self").symlink_to(tmp_path / "p/self")
    assert read_all(Images(tmp_path / "p")) == {"a.jpg": b"1"}


def test_two_packages_in_one_folder_are_refused_by_their_names(tmp_path: Path) -> None:
    both = make_folder(tmp_path / LAYOUT, FILES)
    make_folder(tmp_path / "bioscan/images/original_256", FILES)
    for place in (tmp_path, tmp_path / "bioscan", tmp_path / "bioscan/images"):
        with pytest.raises(
            RequestError, match=r"several packages in one \(.*cropped_256, .*original_256\); name"
        ):
            Images(place)
    assert len(Images(both)) == len(FILES)
    assert list(tmp_path.rglob("*.parquet")) == [index_path(both)]


def test_published_packages_are_told_apart_without_parts_and_with_other_parts(tmp_path: Path) -> None:
    for n, files in enumerate(
        ({"c/x.jpg": b"1", "o/y.jpg": b"2"}, {"c/part1/x.jpg": b"1", "o/part2/y.jpg": b"2"})
    ):
        place = make_folder(tmp_path / f"d{n}/bioscan/images", files)
        with pytest.raises(RequestError, match=r"\(bioscan/images/c, bioscan/images/o\)"):
            Images(place)


def test_two_packages_in_one_archive_are_refused(tmp_path: Path) -> None:
    files = {f"{p}/part1/x.jpg": b"1" for p in ("cropped_256", "original_256")}
    with pytest.raises(RequestError, match=r"\(cropped_256, original_256\); extract it and name one"):
        Images(make_zip(tmp_path / "a.zip", files))


def test_part_folders_extracted_into_several_places_are_one_package(tmp_path: Path) -> None:
    # as the archives parts 1-20 and 21-40 of one package, each extracted into a folder of its own
    files = {f"a/{LAYOUT}/part1/x.jpg": b"1", f"b/{LAYOUT}/part21/y.jpg": b"2"}
    package = Images(make_folder(tmp_path / "d", files))
    assert package.index.select("part", "name").rows() == [(1, "x.jpg"), (21, "y.jpg")]


def test_a_file_that_went_away_is_an_error_of_that_image(tmp_path: Path) -> None:
    package = Images(make_folder(tmp_path / "p"))
    (tmp_path / "p/part1/1_0.jpg").unlink()
    (row,) = package.find(["1_0.jpg"])
    with pytest.raises(ImageError, match=r"1_0\.jpg: no such file or directory \(p/part1/1_0\.jpg\)"):
        package.read(row)


# -- finding


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of open files")
def test_a_disk_that_fails_is_an_error_of_that_image(tmp_path: Path) -> None:
    images = Images(make_zip(tmp_path / "p.zip", {"a.jpg": b"bytes"}))
    assert images.read(0) == b"bytes"
    (handle,) = (
        int(link.name)
        for link in Path("/proc/self/fd").iterdir()
        if link.exists() and link.resolve() == tmp_path / "p.zip"
    )
    os.dup2(os.open(os.devnull, os.O_WRONLY), handle)  # reading from it now fails
    with pytest.raises(ImageError, match=r"a\.jpg: bad file descriptor \(p\.zip @"):
        images.read(0)


def test_a_part_chooses_between_images_of_one_name(tmp_path: Path) -> None:
    files = {"part1/x.jpg": b"1", "part2/x.jpg": b"2", "part2/y.jpg": b"3"}
    package = Images(make_folder(tmp_path / "p", files))
    rows = package.find(["x.jpg", "x.jpg", "x.jpg", "x.jpg", "y.jpg", "z.jpg"], [1, 2, None, 9, 9, 1])
    assert [package.read(r) if r >= 0 else None for r in rows] == [b"1", b"2", b"1", None, b"3", None]
    with pytest.raises(IndexError):
        package.read(-1)
    with pytest.raises(IndexError):
        package.array(-1)


def test_a_bare_file_name_finds_an_image_of_a_subfolder_if_it_is_the_only_one(tmp_path: Path) -> None:
    files = {"plate1/a.jpg": b"1", "plate2/a.jpg": b"2", "plate2/b.jpg": b"3"}
    package = Images(make_folder(tmp_path / "p", files))
    assert package.find(["a.jpg"])[0] == -1
    assert package.read(package.find(["b.jpg"])[0]) == b"3"
    assert package.read(package.find(["plate2/a.jpg"])[0]) == b"2"


def test_names_are_compared_in_one_normal_form(tmp_path: Path) -> None:
    package = Images(make_zip(tmp_path / "a.zip", {"cafe\u0301.jpg": b"1"}))
    assert package.read(package.find(["caf\u00e9.jpg"])[0]) == b"1"
    assert package.find(["cafe\u0301.jpg"])[0] == 0


# -- ZIP


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("prefix", ["", f"{LAYOUT}/", "images/"])
def test_a_zip_gives_what_zipfile_gives(tmp_path: Path, method: int, prefix: str) -> None:
    files = {prefix + name: data for name, data in FILES.items()} | {"readme.txt": b"x"}
    path = make_zip(tmp_path / "cropped_256.zip", files, method)
    package = Images(path)
    assert package.form == "zip"
    assert read_all(package) == by_name(FILES)
    with zipfile.ZipFile(path) as archive:
        for name in FILES:
            (row,) = package.find([name.rsplit("/")[-1]])
            assert package.read(row) == archive.read(prefix + name)
            assert package.place(row).startswith("cropped_256.zip @ ")


def test_a_zip_with_wide_fields_data_in_front_and_a_comment_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with path.open("wb") as file:
        file.write(b"#!/bin/sh\n" * 100)
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in FILES.items():
                with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                    member.write(data)
            archive.comment = b"PK\5\6 is what an end record begins with, " + bytes(40)
    assert read_all(Images(path)) == by_name(FILES)
    moved = tmp_path / "b.zip"
    moved.write_bytes(b"x" * 1000 + path.read_bytes())  # places in it are now off by 1,000
    assert read_all(Images(moved)) == by_name(FILES)
    longer = tmp_path / "c.zip"
    longer.write_bytes(make_zip(tmp_path / "d.zip").read_bytes() + b"behind the archive")
    assert read_all(Images(longer)) == by_name(FILES)


def test_more_members_than_16_bits_can_count(tmp_path: Path) -> None:
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for n in range(66_000):
            archive.writestr(f"part{n // 10_000 + 1}/{n}.jpg", str(n))
    package = Images(path)
    assert len(package) == 66_000
    rows = package.find([f"{n}.jpg" for n in (0, 65_535, 65_536, 65_999)])
    assert [package.read(row) for row in rows] == [b"0", b"65535", b"65536", b"65999"]


def test_names_in_old_and_new_encodings_are_those_of_zipfile(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("漢字.jpg", b"1")
        archive.writestr("Kaefer.jpg", b"2")
    # \x84 is «ä» in code page 437, which holds where no flag says UTF-8
    path.write_bytes(path.read_bytes().replace(b"Kaefer", b"K\x84fer "))
    with zipfile.ZipFile(path) as archive:
        expected = {name: archive.read(name) for name in archive.namelist()}
    assert read_all(Images(path)) == expected == {"漢字.jpg": b"1", "Käfer .jpg": b"2"}


def test_an_archive_of_info_zip_is_read(tmp_path: Path, oracle: Callable[[str], str]) -> None:
    make_folder(tmp_path / LAYOUT)
    for flags in (["-0"], ["-9"], ["-fz", "-0"]):
        path = tmp_path / f"{''.join(flags)}.zip"
        subprocess.run([oracle("zip"), "-q", "-r", *flags, path, "bioscan"], cwd=tmp_path, check=True)
        assert read_all(Images(path)) == by_name(FILES)


def test_a_member_that_cannot_be_read_is_an_error_of_its_own(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"a.jpg": b"a" * 500, "b.jpg": b"b" * 500}, zipfile.ZIP_BZIP2)
    with pytest.raises(ImageError, match=r"a\.jpg: compressed by a method that is not supported \(bzip2\)"):
        Images(path).read(0)
    words = {"a.jpg": b"a word and another word " * 40, "b.jpg": b"other words " * 40}
    path = make_zip(tmp_path / "b.zip", words, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    data[40:50] = b"\xff" * 10
    path.write_bytes(data)
    package = Images(path)
    with pytest.raises(ImageError, match=r"a\.jpg: damaged compressed data"):
        package.read(0)
    assert package.read(1) == words["b.jpg"]
    path = make_zip(tmp_path / "c.zip", {"a.jpg": b"secret"})
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\1\2")
    struct.pack_into("<H", data, directory + 8, 1)
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"a\.jpg: encrypted"):
        Images(path).read(0)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (0, "the file is empty"),
        (3, "cut short or no ZIP"),
        (700, "cut short or no ZIP"),
        (-30, "cut short or no ZIP"),
    ],
)
def test_a_zip_that_is_cut_short_is_refused(tmp_path: Path, cut: int, message: str) -> None:
    path = make_zip(tmp_path / "a.zip")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=message):
        Images(path)


def test_damaged_packages_end_in_our_errors_only(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {n: FILES[n] for n in list(FILES)[:4]}).read_bytes()
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name in list(FILES)[:4]:
            file[f"bioscan_dataset/{name[6:]}"] = np.frombuffer(FILES[name], np.uint8)
    hdf5 = (tmp_path / "a.hdf5").read_bytes()
    random_places = random.Random(0)
    for number in range(300):
        data = bytearray((archive, hdf5)[number % 2])
        for _ in range(random_places.randint(1, 5)):
            data[random_places.randrange(len(data))] = random_places.choice(
                [0, 255, random_places.randrange(256)]
            )
        path = tmp_path / f"{number}.bin"
        path.write_bytes(data[: random_places.choice([None, None, random_places.randrange(len(data))])])
        try:
            package = Images(path, save_index=False)
        except BioscanError:
            continue
        for row in range(len(package)):
            with contextlib.suppress(ImageError):
                package.read(row)


# -- many archives


def make_zips(where: Path, files: dict[str, bytes] = FILES) -> Path:
    """One archive a part, as the original full-size photographs are published."""
    where.mkdir()
    for part in sorted({name.split("/")[0] for name in files}):
        some = {f"{LAYOUT}/{name}": data for name, data in files.items() if name.startswith(f"{part}/")}
        make_zip(where / f"bioscan_images_original_full_{part}.zip", some)
    return where


ARCHIVES = [f"bioscan_images_original_full_part{n}.zip" for n in (1, 2, 113)]


@pytest.mark.parametrize("pattern", ["", "*.zip", "bioscan_*_part{1..2}*.zip", "bioscan_*_part[12]*.zip"])
def test_many_archives_are_one_package_in_the_order_of_their_numbers(tmp_path: Path, pattern: str) -> None:
    files = FILES | {f"part10/10_{i}.jpg": content(str(i)) for i in range(3)}
    place = make_zips(tmp_path / "zips", files)
    package = Images(place / pattern if pattern else place)
    assert package.form == "zip"
    expected = [ARCHIVES[0], ARCHIVES[1], ARCHIVES[1].replace("part2", "part10"), ARCHIVES[2]]
    assert list(package.containers) == expected
    assert package.index["container"].unique(maintain_order=True).to_list() == expected
    assert read_all(package) == by_name(files)
    assert package.place(0).startswith(f"{ARCHIVES[0]} @ ")
    (row,) = package.find(["113_4.jpg"], [113])
    assert package.file(row) == place / ARCHIVES[2]


def test_a_pattern_may_name_each_archive_and_then_each_must_be_there(tmp_path: Path) -> None:
    place = make_zips(tmp_path / "zips")
    package = Images(place / "bioscan_images_original_full_part{1,113}.zip")
    assert read_all(package) == by_name({n: d for n, d in FILES.items() if not n.startswith("part2/")})
    with pytest.raises(RequestError, match=r"no such file: bioscan_images_original_full_part3\.zip; is the"):
        Images(place / "bioscan_images_original_full_part{1..3}.zip")
    with pytest.raises(RequestError, match="no file of this pattern"):
        Images(place / "other*.zip")
    with pytest.raises(RequestError, match="stands for more than 100,000 archives"):
        Images(place / "x{0..999}{0..999}.zip")


_NUMBERS = st.integers(0, 12).map(str) | st.integers(0, 12).map("{:03d}".format)
_RANGES = st.tuples(_NUMBERS, _NUMBERS).map(lambda ends: f"{{{ends[0]}..{ends[1]}}}")
_CHOICES = st.lists(st.sampled_from(["a", "b-1", ""]), min_size=2, max_size=3).map(
    lambda c: f"{{{','.join(c)}}}"
)


@given(st.lists(st.sampled_from(["x-", ".tar", "/"]) | _RANGES | _CHOICES, max_size=4).map("".join))
@settings(max_examples=60, deadline=None)
def test_braces_mean_what_they_mean_to_webdataset(pattern: str) -> None:
    braceexpand = pytest.importorskip("braceexpand")
    assert list(image_index._expanded(pattern)) == list(braceexpand.braceexpand(pattern))


def test_names_that_only_look_like_a_pattern_are_names(tmp_path: Path) -> None:
    place = make_folder(tmp_path / "photos [2023] {a,b}")
    assert read_all(Images(place)) == by_name(FILES)
    zips = make_zips(tmp_path / "zips [2023]")
    assert read_all(Images(zips / "*.zip")) == by_name(FILES)
    assert (zips / "_.zip.index.parquet").is_file()


@pytest.mark.parametrize("pattern", ["", "*.zip"])
def test_the_index_of_many_is_made_again_when_one_changed_came_or_went(
    tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_zips(tmp_path / "zips")
    package = place / pattern if pattern else place
    age(place)
    listed = counting(monkeypatch)
    first = Images(package)
    listed.clear()
    assert Images(package).index.equals(first.index)
    assert listed == []
    make_zip(place / ARCHIVES[1], {f"{LAYOUT}/part2/new.jpg": b"new"})
    changed = Images(package)
    assert "new.jpg" in changed
    assert "2_0.jpg" not in changed
    make_zip(place / "extra_part114.zip", {f"{LAYOUT}/part114/more.jpg": b"more"})
    assert "more.jpg" in Images(package)
    (place / ARCHIVES[0]).unlink()
    assert "1_0.jpg" not in Images(package)
    assert len({first.fingerprint, changed.fingerprint, Images(package).fingerprint}) == 3


def test_several_kinds_of_archives_or_copies_of_one_are_refused(tmp_path: Path) -> None:
    place = make_zips(tmp_path / "zips")
    (place / "copy.zip").write_bytes((place / ARCHIVES[0]).read_bytes())
    with pytest.raises(RequestError, match=r"every image of copy\.zip is in another archive too"):
        Images(place)
    (place / "copy.zip").unlink()
    with h5py.File(place / "cropped_256.hdf5", "w") as file:
        file["1.jpg"] = np.zeros(3, np.uint8)
    with pytest.raises(
        RequestError, match=r"several kinds \(bios\S*part1\.zip, cropped_256\.hdf5\); name one"
    ):
        Images(place)
    (place / "photo.jpg").write_bytes(b"1")  # a folder with images is a folder of images
    assert read_all(Images(place)) == {"photo.jpg": b"1"}


def test_archives_of_two_published_packages_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in ("cropped_256", "original_256"):
        make_zip(tmp_path / f"d/{name}.zip", {f"bioscan/images/{name}/part1/x.jpg": b"1"})
    with pytest.raises(
        RequestError, match=r"several packages in one \(.*cropped_256, .*original_256\); name"
    ):
        Images(tmp_path / "d")


def test_many_archives_are_listed_by_processes_as_by_one(tmp_path: Path) -> None:
    place = make_zips(tmp_path / "zips")
    alone, together = Images(place, save_index=False), Images(place, save_index=False, workers=2)
    assert together.index.equals(alone.index)
    assert together.fingerprint == alone.fingerprint


def open_files(inside: Path) -> int:
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(os.path.exists(link) and link.resolve().is_relative_to(inside) for link in links)  # noqa: PTH110


def test_links_that_lead_nowhere_are_told_by_the_reader(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p/good.jpg").write_bytes(b"1")
    (tmp_path / "p/itself.jpg").symlink_to("itself.jpg")
    (tmp_path / "p/nowhere.jpg").symlink_to("/nowhere")
    package = Images(tmp_path / "p")
    for name, reason in {"itself": "too many levels", "nowhere": "no such file"}.items():
        with pytest.raises(ImageError, match=reason):
            package.read(package.find([f"{name}.jpg"])[0])


@pytest.mark.skipif(not hasattr(os, "pread"), reason="no read at a place")
def test_an_archive_is_not_closed_while_it_is_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number would be that of the archive opened next, and another image's bytes would come."""
    monkeypatch.setattr("bioscan.data.images._OPEN_FILES", 1)
    files = {f"part{n}/{n}.jpg": content(f"{n}") for n in range(3)}
    package = Images(make_zips(tmp_path / "zips", files))
    package.read(0)
    read = os.pread

    def late(handle: int, length: int, place: int) -> bytes:
        """What other threads may do between a look at the number and the reading."""
        monkeypatch.setattr(os, "pread", read)
        for row in (1, 2):
            package.read(row)
        return read(handle, length, place)

    monkeypatch.setattr(os, "pread", late)
    assert package.read(0) == by_name(files)[package.name(0)]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of open files")
@pytest.mark.parametrize("threads", [1, 4])
def test_few_archives_are_open_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr("bioscan.data.images._OPEN_FILES", 3)
    files = {f"part{n}/{n}_{i}.jpg": content(f"{n}_{i}") for n in range(12) for i in range(4)}
    package = Images(make_zips(tmp_path / "zips", files))
    expected = by_name(files)
    wrong: list[str] = []

    def work(package: Images, seed: int) -> None:
        for row in random.Random(seed).choices(range(len(package)), k=300):
            if package.read(row) != expected[package.name(row)]:
                wrong.append(package.name(row))

    workers = [threading.Thread(target=work, args=(package, seed)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    assert open_files(tmp_path) == 3
    del package, workers, worker
    gc.collect()
    assert open_files(tmp_path) == 0


def test_a_shard_carries_its_own_archives_alone_and_no_place_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_zips(tmp_path / "zips")
    monkeypatch.chdir(tmp_path)
    package = Images("zips/*.zip")
    shard = package.take([12, 13, 1])
    assert list(shard.containers) == [ARCHIVES[0], ARCHIVES[2]]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = pickle.loads(pickle.dumps(shard))
    assert [again.read(row) for row in range(3)] == [
        FILES[f"part{n}"] for n in ("113/113_2.jpg", "113/113_3.jpg", "1/1_1.jpg")
    ]
    assert [again.place(row) for row in range(3)] == [package.place(row) for row in (12, 13, 1)]


def test_an_archive_that_was_replaced_is_noticed_among_many(tmp_path: Path) -> None:
    place = make_zips(tmp_path / "zips")
    package = Images(place)
    make_zip(place / ARCHIVES[1], {"part2/2_0.jpg": b"other"})
    assert package.read(0) == FILES["part1/1_0.jpg"]
    with pytest.raises(DataError, match=r"part2\.zip changed after it was opened; open it again"):
        package.read(5)


# -- what lies in wait


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_nobody_waits_for_a_fifo(tmp_path: Path) -> None:
    make_folder(tmp_path / "p", {"a.jpg": b"1"})
    os.mkfifo(tmp_path / "p/fifo.jpg")
    (tmp_path / "p/link.jpg").symlink_to(tmp_path / "p/fifo.jpg")
    package = Images(tmp_path / "p")
    assert package.left_out.select("name", "left_out").rows() == [("fifo.jpg", "special")]
    assert read_all(package) == {"a.jpg": b"1", "link.jpg": b""}


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    make_folder(tmp_path / "p", {"a.jpg": b"1"})
    with (tmp_path / "p/huge.jpg").open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    package = Images(tmp_path / "p")
    (row,) = package.find(["huge.jpg"])
    with pytest.raises(
        ImageError, match=r"huge\.jpg: claims 1,073,741,825 bytes; no image over 1,073,741,824"
    ):
        package.read(row)


def test_a_huge_array_of_nothing_is_not_made(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.create_dataset("huge.jpg", (60_000, 60_000, 3), np.uint8, chunks=(100, 100, 3))
    package = Images(tmp_path / "a.hdf5")
    with pytest.raises(ImageError, match="claims 10,800,000,000 bytes"):
        package.array(0)


def test_what_was_left_out_is_told_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"part1/a.jpg": b"1", "part1/deep/../a.jpg": b"2", "b.txt": b"3", "__MACOSX/c.jpg": b"4"}
    package = Images(make_zip(tmp_path / "a.zip", files | {".d.jpg": b"5", "x/part1/e.jpg/": b""}))
    reasons = {"b.txt": "not an image", "__MACOSX/c.jpg": "hidden", ".d.jpg": "hidden"}
    again = Images(tmp_path / "a.zip")
    for images in (package, again):
        assert dict(images.left_out.select("name", "left_out").rows()) == reasons
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("part1/a.jpg", b"6")
    twice = Images(tmp_path / "a.zip")
    assert twice.duplicates == 1
    assert twice.left_out.filter(left_out="duplicate").select("name", "part").rows() == [("a.jpg", 1)]
    assert twice.read(twice.find(["a.jpg"], [1])[0]) == b"1"


# -- what is no package


def test_what_is_no_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "cropped_256").mkdir()
    with pytest.raises(RequestError, match="no such image package; did you mean 'cropped_256'"):
        Images(tmp_path / "croped_256")
    with pytest.raises(DataError, match=r"no images in it \(names ending in \.jpg"):
        Images(tmp_path / "cropped_256")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(RequestError, match="not a package of images; known are: a folder, part folders"):
        Images(tmp_path / "a.txt")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(DataError, match="no images in it"):
        Images(tmp_path / "empty.zip")


# -- the saved index


def age(path: Path) -> None:
    """Make a tree look a minute old: a change within the clock's step of an index is not trusted."""
    for place in (path, *path.rglob("*")):
        status = place.stat()
        os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns - 60 * 10**9))


def counting(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The packages that are listed anew."""
    listed: list[Path] = []

    def watch(form: str, opener: Callable[[Path], object]) -> None:
        def open_it(package: Path) -> object:
            listed.append(package)
            return opener(package)

        monkeypatch.setitem(image_index.OPENERS, form, open_it)

    for form, opener in list(image_index.OPENERS.items()):
        watch(form, opener)
    return listed


def test_an_index_is_saved_beside_the_package_and_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, archive = make_folder(tmp_path / "p"), make_zip(tmp_path / "a.zip")
    age(folder)
    listed = counting(monkeypatch)
    for package in (folder, archive):
        first = load_index(package)
        again = load_index(package)
        assert index_path(package).is_file()
        assert again.frame.equals(first.frame)
        assert (again.form, again.fingerprint, again.duplicates) == (first.form, first.fingerprint, 0)
    assert listed == [folder, archive]


def test_an_index_is_made_again_when_the_package_changed(tmp_path: Path) -> None:
    folder, archive = make_folder(tmp_path / "p"), make_zip(tmp_path / "a.zip")
    age(folder)
    before = [Images(folder).fingerprint, Images(archive).fingerprint]
    (folder / "part2/new.jpg").write_bytes(b"new")
    make_zip(archive, FILES | {"part2/new.jpg": b"new"})
    for package, old in zip((folder, archive), before, strict=True):
        now = Images(package)
        assert now.fingerprint != old
        assert now.read(now.find(["new.jpg"])[0]) == b"new"


def test_a_change_right_after_the_index_was_made_is_noticed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "p")
    Images(folder)
    stamp = (folder / "part2").stat()
    (folder / "part2/new.jpg").write_bytes(b"new")
    os.utime(folder / "part2", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # a clock too coarse to show it
    assert "new.jpg" in Images(folder)


@pytest.mark.parametrize("broken", [b"", b"PAR1", b"no index at all"])
def test_a_broken_index_is_made_again(tmp_path: Path, broken: bytes) -> None:
    archive = make_zip(tmp_path / "a.zip")
    index_path(archive).write_bytes(broken)
    assert read_all(Images(archive)) == by_name(FILES)
    pl.DataFrame({"x": [1]}).write_parquet(index_path(archive))
    assert read_all(Images(archive)) == by_name(FILES)


@pytest.mark.parametrize("place", ["../secret.jpg", "/etc/secret.jpg", "part1/../../secret.jpg", None])
def test_a_saved_index_leads_to_no_file_outside_of_the_package(tmp_path: Path, place: str | None) -> None:
    folder, archive = make_folder(tmp_path / "p"), make_zip(tmp_path / "a.zip")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    age(folder)
    for package in (folder, archive):
        Images(package)
        saved = index_path(package)
        footer = {FOOTER: pl.read_parquet_metadata(saved)[FOOTER]}
        false = pl.read_parquet(saved).with_columns(container=pl.lit(place))
        false.write_parquet(saved, metadata=footer)
        assert read_all(Images(package)) == by_name(FILES)


def test_a_place_that_cannot_be_written_to_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_zip(tmp_path / "a.zip")

    def refuse(*_: object, **__: object) -> object:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(image_index, "writing", refuse)
    assert read_all(Images(archive)) == by_name(FILES)
    assert not index_path(archive).exists()
    Images(archive, save_index=False)


def test_an_open_package_notices_that_its_archive_was_replaced(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip")
    package = Images(archive)
    make_zip(archive, {"other.jpg": b"other"})
    with pytest.raises(DataError, match="changed after it was opened; open it again"):
        package.read(0)


def test_the_index_of_a_path_with_dots_lies_beside_what_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "d/p")
    monkeypatch.chdir(tmp_path / "d/p/part1")
    assert read_all(Images("..")) == by_name(FILES)
    assert (tmp_path / "d/p.index.parquet").is_file()


# -- processes and threads


def total(package: Images) -> int:
    return sum(len(data) for data in read_all(package).values())


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_package_works_in_other_processes_after_it_was_used_here(tmp_path: Path, start: str) -> None:
    package = Images(make_zip(tmp_path / "a.zip"))
    expected = total(package)
    with multiprocessing.get_context(start).Pool(2) as pool:
        assert pool.map(total, [package] * 3) == [expected] * 3
    again = pickle.loads(pickle.dumps(package))
    assert again.index.equals(package.index)
    assert total(again) == expected


@pytest.mark.parametrize("pread", [True, False])
def test_threads_read_the_same_package_at_once(
    tmp_path: Path, pread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pread:
        monkeypatch.setattr("bioscan.data.images._pread", _no_pread)  # as on Windows
    files = {f"{n}.jpg": content(str(n), 5_000) for n in range(50)}
    package = Images(make_zip(tmp_path / "a.zip", files))
    failures: list[str] = []

    def work() -> None:
        for row in range(len(package)):
            if package.read(row) != files[package.name(row)]:
                failures.append(package.name(row))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
