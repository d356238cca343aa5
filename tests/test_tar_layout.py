"""TAR archives and WebDataset shards: the bytes at our places are those that tarfile and webdataset give."""

import gc
import io
import random
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bioscan.data.images import Images
from bioscan.data.tar_layout import BLOCK, is_tar_header, list_tar
from bioscan.errors import DataError, ImageError, RequestError

FILES = {f"part{n % 3 + 1}/{n}.jpg": random.Random(n).randbytes(100 * n) for n in range(12)}
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}


def make(path: Path, files: dict[str, bytes] = FILES, form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files.items():
            add(archive, name, data)
    return path


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(data), kind, "elsewhere"
    archive.addfile(member, io.BytesIO(data))


def read_all(images: Images) -> dict[str, bytes]:
    return {images.name(row): images.read(row) for row in range(len(images))}


def by_name(files: dict[str, bytes] = FILES) -> dict[str, bytes]:
    return {name.rsplit("/", 1)[-1]: data for name, data in files.items()}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("prefix", ["", "./", "bioscan/images/cropped_256/", f"{'long/' * 40}"])
def test_places_are_those_of_tarfile(tmp_path: Path, form: str, prefix: str) -> None:
    files = {prefix + name: data for name, data in FILES.items()}
    path = make(tmp_path / "a.tar", files, FORMATS[form])
    images = Images(path)
    assert images.form == "tar"
    assert read_all(images) == by_name()
    with tarfile.open(path) as archive:
        for member in archive:
            (row,) = images.find([member.name.rsplit("/")[-1]])
            assert images.index["offset"][int(row)] == member.offset_data
            assert images.place(row) == f"a.tar @ {member.offset_data}"


@pytest.mark.parametrize("form", FORMATS)
def test_names_in_any_script_are_those_of_tarfile(tmp_path: Path, form: str) -> None:
    files = {"Käfer.jpg": b"1", "漢字.jpg": b"2", f"{'ü' * 90}.jpg": b"3"}
    if form == "ustar":
        files.pop(f"{'ü' * 90}.jpg")
    assert read_all(Images(make(tmp_path / "a.tar", files, FORMATS[form]))) == files


def test_archives_of_gnu_tar_are_read(tmp_path: Path, oracle: Callable[[str], str]) -> None:
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    for form in ("v7", "oldgnu", "gnu", "ustar", "posix"):
        path = tmp_path / f"{form}.tar"
        subprocess.run(
            [oracle("tar"), f"--format={form}", "-cf", path, "part1", "part2", "part3"],
            cwd=tmp_path,
            check=True,
        )
        assert read_all(Images(path)) == by_name(), form


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_webdataset_is_read_as_its_own_library_reads_it(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "x-%06d.tar"), maxcount=5, verbose=0) as writer:
        for name, data in FILES.items():
            writer.write({"__key__": name.removesuffix(".jpg"), "jpg": data, "cls": 3})
    pattern = tmp_path / "x-{000000..000002}.tar"
    images = Images(pattern)
    assert list(images.containers) == [f"x-{n:06d}.tar" for n in range(3)]
    samples = list(webdataset.WebDataset(str(pattern), shardshuffle=False, empty_check=False))
    assert [(s["__key__"].rsplit("/")[-1] + ".jpg", s["jpg"]) for s in samples] == [*read_all(images).items()]
    assert images.left_out["left_out"].to_list() == ["not an image"] * 12  # the labels
    gc.collect()  # the library leaves files open


def test_links_and_devices_are_no_images(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "folder.jpg", kind=tarfile.DIRTYPE)
        add(archive, "soft.jpg", kind=tarfile.SYMTYPE)
        add(archive, "a.jpg", b"bytes")
        add(archive, "hard.jpg", kind=tarfile.LNKTYPE)
        add(archive, "device.jpg", kind=tarfile.CHRTYPE)
        add(archive, "fifo.jpg", kind=tarfile.FIFOTYPE)
        add(archive, "/etc/b.jpg", b"other")
    images = Images(path)
    assert read_all(images) == {"a.jpg": b"bytes", "/etc/b.jpg": b"other"}
    assert images.index["unsafe"].to_list() == [False, True]
    kinds = {"soft.jpg": "link", "hard.jpg": "link", "device.jpg": "special", "fifo.jpg": "special"}
    assert dict(images.left_out.select("name", "left_out").rows()) == kinds


@pytest.mark.parametrize("form", ["v7", "gnu", "ustar", "posix"])
def test_hard_links_as_tar_packs_them_are_images(
    tmp_path: Path, form: str, oracle: Callable[[str], str]
) -> None:
    """GNU tar stores the first name of a file, whichever it comes across first, and links for the others."""
    folder = tmp_path / "part1"
    folder.mkdir()
    names = ["a.jpg", "b.jpg", "c.jpg"] + ([] if form in ("v7", "ustar") else [f"{'long' * 40}.jpg"])
    (folder / names[0]).write_bytes(b"one file")
    (folder / "z.jpg").write_bytes(b"another")
    for name in names[1:]:
        (folder / name).hardlink_to(folder / names[0])
    subprocess.run([oracle("tar"), f"--format={form}", "-cf", "a.tar", "./part1"], cwd=tmp_path, check=True)
    images = Images(tmp_path / "a.tar")
    assert read_all(images) == {"z.jpg": b"another"} | dict.fromkeys(names, b"one file")
    assert images.left_out.is_empty()


def test_a_hard_link_leads_to_the_last_file_of_that_name_before_it(tmp_path: Path) -> None:
    def link(name: str, target: str) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.LNKTYPE, target
        archive.addfile(member)

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link("early.jpg", "a.txt")
        add(archive, "a.txt", b"old")
        link("one.jpg", "a.txt")
        add(archive, "a.txt", b"new")
        link("two.jpg", "a.txt")
        link("chain.jpg", "two.jpg")
        link("self.jpg", "self.jpg")
        add(archive, "soft.jpg", kind=tarfile.SYMTYPE)
        link("to_soft.jpg", "soft.jpg")
    images = Images(tmp_path / "a.tar")
    assert read_all(images) == {"one.jpg": b"old", "two.jpg": b"new", "chain.jpg": b"new"}
    links = images.left_out.filter(left_out="link")["name"].to_list()
    assert sorted(links) == ["early.jpg", "self.jpg", "soft.jpg", "to_soft.jpg"]


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_a_sparse_file_is_a_failure_of_its_own(
    tmp_path: Path, form: str, oracle: Callable[[str], str]
) -> None:
    with (tmp_path / "sparse.jpg").open("wb") as file:
        for place in range(0, 40_000_000, 1_000_000):  # more holes than one header holds
            file.seek(place)
            file.write(b"x" * 4096)
    (tmp_path / "z.jpg").write_bytes(b"after it")
    subprocess.run(
        [oracle("tar"), f"--format={form}", "-S", "-cf", "a.tar", "sparse.jpg", "z.jpg"],
        cwd=tmp_path,
        check=True,
    )
    images = Images(tmp_path / "a.tar")
    assert images.index["encoding"].to_list() == ["sparse", "file"]
    with pytest.raises(ImageError, match=r"sparse\.jpg: stored with holes"):
        images.read(0)
    assert images.read(1) == b"after it"


def test_what_is_cut_short_or_damaged_is_named(tmp_path: Path) -> None:
    whole = make(tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        members = archive.getmembers()
    path = tmp_path / "b.tar"
    path.write_bytes(whole[: members[5].offset_data + 10])
    with pytest.raises(DataError, match=r"cut short within part3/5\.jpg; is the download complete"):
        Images(path)
    path.write_bytes(whole[: members[5].offset + 100])
    with pytest.raises(DataError, match=r"damaged at byte \d[\d,]*, after part2/4\.jpg \(cut short\)"):
        Images(path)
    changed = bytearray(whole)
    changed[members[7].offset] ^= 1
    path.write_bytes(changed)
    with pytest.raises(DataError, match=r"damaged at byte [\d,]+, after part1/6\.jpg"):
        Images(path)
    path.write_bytes(whole[: members[5].offset])  # no end mark: tar itself does not mind
    assert len(Images(path)) == 5


def sealed(block: bytearray) -> bytes:
    """A header with the right checksum."""
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def test_false_sizes_end_in_an_error_and_ask_for_no_memory(tmp_path: Path) -> None:
    whole = make(tmp_path / "a.tar").read_bytes()
    huge = b"\x80" + (1 << 60).to_bytes(11, "big")
    negative = (-5).to_bytes(12, "big", signed=True)
    for size in (huge, negative, b"77777777777\0", b"not a size!\0"):
        header = bytearray(whole[:BLOCK])
        header[124:136] = size
        path = tmp_path / "b.tar"
        path.write_bytes(sealed(header) + whole[BLOCK:])
        with pytest.raises(DataError, match=r"TAR archive is (cut short|damaged)"):
            Images(path)
        header[156:157] = b"x"  # as the size of a pax header
        path.write_bytes(sealed(header) + whole[BLOCK:])
        with pytest.raises(DataError, match=r"TAR archive is (cut short|damaged)"):
            Images(path)


def test_a_size_in_binary_is_read(tmp_path: Path) -> None:
    whole = bytearray(make(tmp_path / "a.tar", {"a.jpg": b"12345"}).read_bytes())
    whole[124:136] = b"\x80" + (5).to_bytes(11, "big")  # as GNU tar writes sizes of 8 GiB and more
    (tmp_path / "a.tar").write_bytes(sealed(whole[:BLOCK]) + whole[BLOCK:])
    assert read_all(Images(tmp_path / "a.tar")) == {"a.jpg": b"12345"}


def test_checksums_of_signed_bytes_are_accepted(tmp_path: Path) -> None:
    block = bytearray(make(tmp_path / "a.tar", {"Käfer.jpg": b"1"}).read_bytes()[:BLOCK])
    block[148:156] = b" " * 8
    signed = sum(byte - 256 if byte > 127 else byte for byte in block)
    block[148:156] = f"{signed:06o}\0 ".encode()
    assert is_tar_header(bytes(block))
    assert not is_tar_header(bytes(block[:-1]))
    block[0] ^= 1
    assert not is_tar_header(bytes(block))


def test_a_compressed_archive_names_the_way_out(tmp_path: Path) -> None:
    for suffix, mode, program in (
        ("gz", "w:gz", "gunzip"),
        ("xz", "w:xz", "unxz"),
        ("bz2", "w:bz2", "bunzip2"),
    ):
        path = tmp_path / f"a.tar.{suffix}"
        with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
            add(archive, "a.jpg", b"1")
        with pytest.raises(RequestError, match=f"compressed as a whole.*{program} --keep a.tar.{suffix}"):
            Images(path)


def test_an_empty_archive_has_no_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    assert list_tar(tmp_path / "a.tar").height == 0
    with pytest.raises(DataError, match="no images in it"):
        Images(tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes(b"<html>quota exceeded</html>")
    with pytest.raises(DataError, match="not a TAR file, its signature is missing"):
        Images(tmp_path / "b.tar")


def test_a_tar_whose_image_begins_like_an_hdf5_file_is_a_tar(tmp_path: Path) -> None:
    data = b"\x89HDF\r\n\x1a\n and more"  # at byte 512, where an HDF5 file may have its signature too
    with tarfile.open(tmp_path / "odd.tar", "w") as archive:
        member = tarfile.TarInfo("a.jpg")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    images = Images(tmp_path / "odd.tar")
    assert (images.form, images.read(0)) == ("tar", data)
