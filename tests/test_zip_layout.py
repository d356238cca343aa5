"""ZIP archives: what their directory says, and what it says falsely."""

import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bioscan.data.images import MAX_IMAGE_BYTES, Images
from bioscan.errors import DataError, ImageError

FILES = {f"part1/{n}.jpg": bytes([n]) * (300 + 10 * n) for n in range(6)}
CENTRAL = b"PK\1\2"
CRC, STORED_SIZE, SIZE, NAME_SIZE, ATTRIBUTES, HEADER, NAME = 16, 20, 24, 28, 38, 42, 46
"""Places of fields in an entry of the central directory."""


def make(path: Path, files: dict[str, bytes] = FILES, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def entries(data: bytes) -> list[int]:
    """Places of the central directory's entries."""
    found, at = [], data.index(CENTRAL)
    while data[at : at + 4] == CENTRAL:
        found.append(at)
        at += 46 + sum(struct.unpack_from("<3H", data, at + NAME_SIZE))
    return found


def falsify(path: Path, number: int, field: int, value: int) -> Images:
    """The archive with one 32-bit field of one entry changed."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<L", data, entries(bytes(data))[number] + field, value)
    path.write_bytes(data)
    return Images(path, save_index=False)


def readable(images: Images) -> dict[str, bytes | str]:
    """Bytes of each image, or the reason."""
    found: dict[str, bytes | str] = {}
    for row in range(len(images)):
        try:
            found[images.name(row)] = images.read(row)
        except ImageError as error:
            found[images.name(row)] = error.reason
    return found


def expected(**others: str) -> dict[str, bytes | str]:
    whole: dict[str, bytes | str] = {name.rsplit("/")[-1]: data for name, data in FILES.items()}
    return whole | {f"{name[1:]}.jpg": reason for name, reason in others.items()}


def test_each_method_is_that_of_zipfile_or_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, (name, data) in enumerate(FILES.items()):
            method = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)[number % 3]
            archive.writestr(name, data, compress_type=method)
    reason = "compressed by a method that is not supported (lzma)"
    assert readable(Images(path)) == expected(_2=reason, _5=reason)


def test_links_folders_and_devices_are_no_images(tmp_path: Path) -> None:
    path = make(tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as archive:
        for name, mode in (("link.jpg", 0o120777), ("pipe.jpg", 0o010644), ("plain.jpg", 0o100644)):
            member = zipfile.ZipInfo(name)
            member.create_system, member.external_attr = 3, mode << 16
            archive.writestr(member, b"/etc/passwd")
        archive.writestr("folder.jpg/", b"")
    images = Images(path)
    assert readable(images) == expected() | {"plain.jpg": b"/etc/passwd"}
    assert images.left_out.select("name", "left_out").rows() == [
        ("link.jpg", "link"),
        ("pipe.jpg", "special"),
    ]


def test_paths_that_lead_out_are_marked_and_read_like_any_other(tmp_path: Path) -> None:
    unsafe = ["/abs.jpg", "../up.jpg", "a/../../b.jpg", "C:/drive.jpg", "..\\back.jpg"]
    images = Images(make(tmp_path / "a.zip", {**FILES, **{name: name.encode() for name in unsafe}}))
    marked = images.index.filter("unsafe")
    assert marked["name"].to_list() == [name.replace("\\", "/") for name in unsafe]
    assert {name.replace("\\", "/"): name.encode() for name in unsafe}.items() <= readable(images).items()
    assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "a.zip.index.parquet"}


def test_a_leading_dot_and_slash_is_nothing(tmp_path: Path) -> None:
    files = {f"./{name}": data for name, data in FILES.items()}
    assert readable(Images(make(tmp_path / "a.zip", files))) == expected()


def test_a_size_past_the_end_is_a_failure_of_its_own(tmp_path: Path) -> None:
    images = falsify(make(tmp_path / "a.zip"), 5, STORED_SIZE, 1 << 29)
    assert readable(images) == expected(_5="its bytes in the archive are those of another member too")


def test_a_size_that_reaches_into_the_next_member_is_an_overlap(tmp_path: Path) -> None:
    # the trick of the bomb that has one kernel of data for many members (Fifield 2019)
    images = falsify(make(tmp_path / "a.zip"), 2, STORED_SIZE, 1000)
    assert readable(images) == expected(_2="its bytes in the archive are those of another member too")


def test_a_header_elsewhere_is_a_failure_of_its_own(tmp_path: Path) -> None:
    for place in (7, 0xFFFFFFFE):
        images = falsify(make(tmp_path / "a.zip"), 3, HEADER, place)
        assert readable(images) == expected(_3="its header in the archive is damaged")


def test_a_header_of_another_member_is_refused_as_zipfile_does(tmp_path: Path) -> None:
    path = make(tmp_path / "a.zip")
    images = falsify(path, 3, HEADER, 0)  # where 0.jpg lies
    assert readable(images)["3.jpg"] == "its header in the archive is damaged"
    with zipfile.ZipFile(path) as archive, pytest.raises(zipfile.BadZipFile):
        archive.read("part1/3.jpg")


@pytest.mark.parametrize("claim", [10, 100_000, 0xFFFFFFF0])
def test_a_false_full_size_neither_bursts_nor_asks_for_memory(tmp_path: Path, claim: int) -> None:
    images = falsify(make(tmp_path / "a.zip", method=zipfile.ZIP_DEFLATED), 4, SIZE, claim)
    large = f"claims {claim:,} bytes; no image over {MAX_IMAGE_BYTES:,} is read"
    assert readable(images) == expected(_4=large if claim > MAX_IMAGE_BYTES else "damaged compressed data")


def test_a_bomb_gives_no_more_than_it_claims(tmp_path: Path) -> None:
    bomb = make(tmp_path / "a.zip", {"bomb.jpg": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    images = falsify(bomb, 0, SIZE, 1000)
    assert readable(images) == {"bomb.jpg": "damaged compressed data"}


def test_inflated_bytes_are_held_against_their_checksum(tmp_path: Path) -> None:
    path = make(tmp_path / "a.zip", method=zipfile.ZIP_DEFLATED)
    images = falsify(path, 1, CRC, 1)
    assert readable(images) == expected(_1="damaged: its checksum is another one")


def test_stored_bytes_are_held_against_their_checksum_when_asked(tmp_path: Path) -> None:
    images = falsify(make(tmp_path / "a.zip"), 1, CRC, 1)
    assert readable(images) == expected()
    (row,) = images.find(["1.jpg"])
    with pytest.raises(ImageError, match="its checksum is another one"):
        images.read_checked(row)
    assert images.read_checked(0) == FILES["part1/0.jpg"]


def test_places_beyond_63_bits_are_failures(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in FILES.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                member.write(content)
    data = bytearray(path.read_bytes())
    at = entries(bytes(data))[2]
    wide = struct.pack("<HHQ", 1, 8, 0xFFFFFFFFFFFFFFF0)
    name_end = at + NAME + struct.unpack_from("<H", data, at + NAME_SIZE)[0]
    struct.pack_into("<L", data, at + HEADER, 0xFFFFFFFF)
    struct.pack_into("<H", data, at + NAME_SIZE + 2, len(wide))
    data[name_end:name_end] = wide
    end = data.rindex(b"PK\5\6")
    size = struct.unpack_from("<L", data, end + 12)[0]
    struct.pack_into("<L", data, end + 12, size + len(wide))
    path.write_bytes(data)
    assert readable(Images(path)) == expected(_2="its header in the archive is damaged")


def test_a_wrapped_count_of_members_is_none(tmp_path: Path) -> None:
    # writers without ZIP64 let the 16-bit count wrap; zipfile, too, goes by the directory's size
    path = make(tmp_path / "a.zip")
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\5\6")
    struct.pack_into("<2H", data, end + 8, 2, 2)
    path.write_bytes(data)
    assert readable(Images(path)) == expected()


@pytest.mark.parametrize("cut", [1, 20, 45])
def test_a_directory_that_ends_within_an_entry_is_named(tmp_path: Path, cut: int) -> None:
    path = make(tmp_path / "a.zip")
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\5\6")
    size = struct.unpack_from("<L", data, end + 12)[0]
    struct.pack_into("<2L", data, end + 12, size - cut, struct.unpack_from("<L", data, end + 16)[0] + cut)
    path.write_bytes(data)
    with pytest.raises(DataError, match="directory is damaged at member 1"):
        Images(path)


def test_members_written_as_a_stream_are_read(tmp_path: Path, oracle: Callable[[str], str]) -> None:
    (tmp_path / "part1").mkdir()
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    # to a pipe, Info-ZIP writes sizes behind each member
    with (tmp_path / "a.zip").open("wb") as target:
        subprocess.run(
            [oracle("zip"), "-q", "-r", "-0", "-", "part1"], cwd=tmp_path, check=True, stdout=target
        )
    assert readable(Images(tmp_path / "a.zip")) == expected()
