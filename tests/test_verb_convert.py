"""`bioscan convert`: from any form to any other, every image byte for byte."""

import io
import json
import string
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bioscan.data.images import Images
from bioscan.jobs.convert import convert

Files = dict[tuple[int | None, str], bytes]
Run = Callable[..., tuple[int, str, str]]

TARGETS = {
    "folder": "out",
    "zip": "out.zip",
    "hdf5": "out.hdf5",
    "tar": "out.tar",
    "webdataset": "shards",
    "parquet": "tables",
    "one table": "out.parquet",
}
FORM = {"shards": "webdataset", "tables": "parquet"}


def paths(files: Files) -> dict[str, bytes]:
    return {f"part{part}/{name}" if part is not None else name: data for (part, name), data in files.items()}


def make(where: Path, form: str, files: Files) -> Path:
    """A package that is not ours, by the owner of its form."""
    where.mkdir(parents=True)
    match form:
        case "folder":
            for name, data in paths(files).items():
                place = where / "photos" / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)
            return where / "photos"
        case "zip" | "deflated":
            method = zipfile.ZIP_STORED if form == "zip" else zipfile.ZIP_DEFLATED
            with zipfile.ZipFile(where / "photos.zip", "w", method) as archive:
                for name, data in paths(files).items():
                    archive.writestr(name, data)
            return where / "photos.zip"
        case "tar":
            with tarfile.open(where / "photos.tar", "w") as tar:
                for name, data in paths(files).items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
            return where / "photos.tar"
        case "hdf5":
            with h5py.File(where / "photos.hdf5", "w") as file:
                group = file.create_group("bioscan_dataset")
                for (_, name), data in files.items():
                    group.create_dataset(name, data=np.frombuffer(data, np.uint8))
            return where / "photos.hdf5"
    image = [{"bytes": data, "path": name} for (_, name), data in files.items()]
    table = pyarrow.table({"image": image, "part": pyarrow.array([p for p, _ in files], pyarrow.int32())})
    pyarrow.parquet.write_table(table, where / "photos.parquet")
    return where / "photos.parquet"


def content(package: Path) -> Files:
    images = Images(package, save_index=False)
    return {
        (part, name): images.read(row)
        for row, (name, part) in enumerate(images.index.select("name", "part").iter_rows())
    }


LETTERS = [*string.ascii_letters, *string.digits, *"._-+ ()'", "ü", "u\u0308", "é", "虫"]
STEM = st.lists(st.sampled_from(LETTERS), min_size=1, max_size=12).map("".join)


@st.composite
def packages(draw: st.DrawFn) -> Files:
    """Few files of any bytes; names in any Unicode form, no two the same in any part."""
    parts = st.just(None) if draw(st.booleans()) else st.integers(0, 113)
    stems = draw(
        st.lists(
            STEM.filter(lambda s: not s.startswith(".")),
            min_size=1,
            max_size=5,
            unique_by=lambda s: unicodedata.normalize("NFC", s).lower(),
        )
    )
    endings = st.sampled_from([".jpg", ".JPG", ".jpeg", ".png", ".b.jpg"])
    return {(draw(parts), stem + draw(endings)): draw(st.binary(max_size=40)) for stem in stems}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=packages(),
    source=st.sampled_from(["folder", "zip", "deflated", "tar", "hdf5", "parquet"]),
    way=st.lists(st.sampled_from([*TARGETS]), min_size=1, max_size=3),
)
def test_names_parts_and_bytes_survive_any_way_from_form_to_form(
    tmp_path_factory: pytest.TempPathFactory, files: Files, source: str, way: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("way")
    package = make(folder / "source", source, files)
    parts = "hdf5" not in (source, *way)  # HDF5 packages have none
    wanted = {
        (part if parts else None, unicodedata.normalize("NFC", name)): data
        for (part, name), data in files.items()
    }
    for number, form in enumerate(way):
        target = folder / str(number) / TARGETS[form]
        made = convert(package, target, form=FORM.get(target.name), workers=1)
        assert made.bulk.failed.is_empty()
        assert (made.bulk.images, made.encoded, made.renamed) == (len(files), 0, 0)
        package = target
    assert content(package) == wanted


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", TARGETS)
def test_every_form_becomes_every_other(tmp_path: Path, source: str, target: str) -> None:
    files: Files = {(n % 2 + 1, f"{n}.v1.jpg"): bytes([n]) * (n * 100) for n in range(9)}
    first = convert(
        make(tmp_path / "source", "zip", files),
        tmp_path / "a" / TARGETS[source],
        form=FORM.get(TARGETS[source]),
        workers=1,
    )
    second = tmp_path / "b" / TARGETS[target]
    assert first.bulk.target is not None
    convert(first.bulk.target, second, form=FORM.get(second.name), workers=1)
    lost = "hdf5" in (source, target)
    assert content(second) == {(None if lost else part, name): data for (part, name), data in files.items()}


# -- arrays of pixels


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """Three arrays of pixels, one of them with a name of PNG, and a JPEG file."""
    with h5py.File(tmp_path / "raw.hdf5", "w") as file:
        group = file.create_group("bioscan_dataset")
        group.attrs.update({"Copyright Holder": "CBG", "Copyright Year": 2023})
        for number, name in enumerate(("a.jpg", "b.JPEG", "c.png")):
            group.create_dataset(name, data=pixels(number))
        group.create_dataset("d.jpg", data=np.frombuffer(b"\xff\xd8 no picture", np.uint8))
    return tmp_path / "raw.hdf5"


def pixels(number: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A smooth picture."""
    ramp = np.linspace(0, 200, 30 * 40).reshape(30, 40)
    return np.stack([ramp, ramp[::-1], np.full_like(ramp, 50 * number)], axis=2).astype(np.uint8)


def test_arrays_become_png_without_loss_and_their_names_agree(
    run_bioscan: Run, arrays: Path, tmp_path: Path
) -> None:
    status, out, err = run_bioscan("convert", arrays, tmp_path / "out.zip", "--workers", 1)
    assert (status, err) == (0, "")
    assert out.splitlines()[1:] == ["encoded: 3 arrays of pixels as PNG; 2 names got another ending"]
    made = content(tmp_path / "out.zip")
    assert made.pop((None, "d.jpg")) == b"\xff\xd8 no picture"
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        with Image.open(io.BytesIO(made[None, name]), formats=["PNG"]) as image:
            np.testing.assert_array_equal(np.asarray(image), pixels(number))


def test_arrays_become_jpeg_at_the_stated_quality(run_bioscan: Run, arrays: Path, tmp_path: Path) -> None:
    sizes = []
    for quality in (95, 30):
        target = tmp_path / f"{quality}.hdf5"
        arguments = ("--raw", "jpeg", "--quality", quality, "--workers", 1)
        status, out, _ = run_bioscan("convert", arrays, target, *arguments)
        assert status == 0
        assert "encoded: 3 arrays of pixels as JPEG; 1 names got another ending" in out
        made = content(target)
        assert {name for _, name in made} == {"a.jpg", "b.JPEG", "c.jpg", "d.jpg"}
        with Image.open(io.BytesIO(made[None, "b.JPEG"]), formats=["JPEG"]) as image:
            assert np.abs(np.asarray(image).astype(int) - pixels(1)).mean() < 6
        sizes.append(len(made[None, "b.JPEG"]))
        with h5py.File(target) as file:  # attributes of an HDF5 package are kept
            assert dict(file["bioscan_dataset"].attrs) == {"Copyright Holder": "CBG", "Copyright Year": 2023}
    assert sizes[1] < sizes[0]


def test_a_new_name_that_is_taken_is_a_failure(run_bioscan: Run, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "raw.hdf5", "w") as file:
        file.create_dataset("a.jpg", data=pixels(0))
        file.create_dataset("a.png", data=pixels(1))
    target, failures = tmp_path / "out", tmp_path / "failures.csv"
    status, out, err = run_bioscan("convert", tmp_path / "raw.hdf5", target, "--failures", failures)
    assert status == 1
    assert out.startswith("1 of 2 images, ")
    assert err == f"1 of 2 images failed; see {failures}\n"
    assert failures.read_text() == "name,part,place,reason\na.png,,,another image before it has this name\n"
    assert [path.name for path in target.glob("[!.]*")] == ["a.png"]


# -- the command line


def test_json_has_the_counts_and_every_failure(run_bioscan: Run, tmp_path: Path) -> None:
    files: Files = {(1, "a.jpg"): b"one", (2, "a.jpg"): b"two", (2, "b.jpg"): b"three"}
    source = make(tmp_path / "source", "tar", files)
    status, out, err = run_bioscan("convert", source, tmp_path / "out.h5", "--json")
    assert status == 1
    told = json.loads(out)
    assert told.pop("failures") == [
        {
            "name": "a.jpg",
            "part": 2,
            "place": None,
            "reason": "another image before it has this name (HDF5 packages have no parts)",
        }
    ]
    assert told == {
        "schema_version": 1,
        "source": str(source),
        "target": str(tmp_path / "out.h5"),
        "form": "hdf5",
        "images": 2,
        "bytes": 8,
        "encoded": 0,
        "renamed": 0,
        "parts_lost": True,
        "failed": 1,
        "resumed_shards": 0,
    }
    assert err.splitlines()[0] == "1 of 3 images failed; --failures FILE lists them"


def test_images_that_cannot_be_read_are_told_and_the_others_are_there(
    run_bioscan: Run, tmp_path: Path
) -> None:
    source = make(tmp_path / "source", "folder", {(1, f"{n}.jpg"): b"%d" % n for n in range(12)})
    for number in range(7):
        (source / f"part1/{number}.jpg").unlink()
        (source / f"part1/{number}.jpg").symlink_to("/nowhere")
    status, out, err = run_bioscan("convert", source, tmp_path / "out.tar")
    assert status == 1
    assert out == f"5 of 12 images, 7 bytes: {tmp_path / 'out.tar'} (webdataset)\n"
    lines = err.splitlines()
    assert lines[0] == "7 of 12 images failed; --failures FILE lists them"
    assert lines[1] == "  part1/0.jpg: no such file or directory (photos/part1/0.jpg)"
    assert len(lines) == 6
    assert {name for _, name in content(tmp_path / "out.tar")} == {f"{n}.jpg" for n in range(7, 12)}


def damaged(where: Path, files: Files, name: str) -> Path:
    """A ZIP archive with one bit of an image turned; its directory has the checksum of the sound one."""
    package = make(where, "zip", files)
    with zipfile.ZipFile(package) as archive:
        member = archive.getinfo(name)
    content = bytearray(package.read_bytes())
    content[member.header_offset + 30 + len(name) + member.file_size // 2] ^= 1
    package.write_bytes(content)
    return package


def photograph(number: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels(number)).save(data, "BMP")  # any bit may turn, and it still decodes
    return data.getvalue()


@pytest.mark.parametrize("verb", ["convert", "resize", "crop"])
def test_an_image_that_its_checksum_contradicts_is_a_failure_though_it_decodes(
    run_bioscan: Run, tmp_path: Path, verb: str
) -> None:
    files: Files = {(3, f"{n}.bmp"): photograph(n) for n in range(3)}
    source = damaged(tmp_path / "source", files, "part3/1.bmp")
    status, _, err = run_bioscan(verb, source, tmp_path / "out.zip", "--workers", 1)
    assert status == 1
    assert err.splitlines()[-2] == "1 of 3 images failed; --failures FILE lists them"
    assert err.splitlines()[-1].startswith(
        "  part3/1.bmp: damaged: its checksum is another one (photos.zip @ "
    )
    if verb != "crop":
        assert {name for _, name in content(tmp_path / "out.zip")} == {"0.bmp", "2.bmp"}


def hidden_images(where: Path, form: str) -> Path:
    """An image, and members named like images that are none; hidden ones are nobody's images."""
    where.mkdir()
    package = where / f"a.{form}"
    match form:
        case "tar":
            with tarfile.open(package, "w") as tar:
                for name, kind in {
                    "a.bmp": b"0",
                    "link.jpg": b"2",
                    "hard.jpg": b"1",
                    "fifo.jpg": b"6",
                }.items():
                    member = tarfile.TarInfo(name)
                    member.type, member.linkname = kind, "elsewhere.jpg"
                    member.size = len(photograph(0)) if kind == b"0" else 0
                    tar.addfile(member, io.BytesIO(photograph(0)))
                for name in (".hidden.jpg", "__MACOSX/a.jpg", "link"):
                    member = tarfile.TarInfo(name)
                    member.type, member.linkname = tarfile.SYMTYPE, "elsewhere.jpg"
                    tar.addfile(member)
        case "zip":
            with zipfile.ZipFile(package, "w") as archive:
                archive.writestr("a.bmp", photograph(0))
                link = zipfile.ZipInfo("link.jpg")
                link.create_system, link.external_attr = 3, 0o120777 << 16
                archive.writestr(link, "elsewhere.jpg")
                archive.writestr("__MACOSX/b.jpg", "fork")
                archive.writestr("notes.txt", "text")
        case _:
            with h5py.File(package, "w") as file:
                file["a.bmp"] = np.frombuffer(photograph(0), np.uint8)
                file["float.jpg"] = np.zeros((4, 4, 3))
                file["grey.jpg"] = np.zeros((4, 4), np.uint8)
                file["text.jpg"] = "variable length"
                file["link.jpg"] = h5py.SoftLink("/nowhere")
                file["notes"] = np.zeros(3)
    return package


@pytest.mark.parametrize("verb", ["convert", "resize", "crop", "boxes"])
@pytest.mark.parametrize(
    ("form", "lost"),
    [
        ("tar", {"link.jpg": "a link", "hard.jpg": "a link", "fifo.jpg": "a device or FIFO"}),
        ("zip", {"link.jpg": "a link"}),
        (
            "hdf5",
            dict.fromkeys(("float.jpg", "grey.jpg", "text.jpg", "link.jpg"), "a dataset that holds neither"),
        ),
    ],
)
def test_no_member_named_like_an_image_vanishes(
    run_bioscan: Run, tmp_path: Path, verb: str, form: str, lost: dict[str, str]
) -> None:
    source, failures = hidden_images(tmp_path / "in", form), tmp_path / "failures.csv"
    place = (
        ("--boxes-only", "--boxes-out", tmp_path / "b.csv") if verb == "boxes" else (tmp_path / "out.zip",)
    )
    arguments = ("crop" if verb == "boxes" else verb, source, *place, "--workers", 1, "--failures", failures)
    status, _, err = run_bioscan(*arguments)
    assert status == 1
    assert f"{len(lost)} of {len(lost) + 1} images failed; see {failures}" in err.splitlines()
    listed = dict(pl.read_csv(failures).select("name", "reason").rows())
    assert listed.keys() == lost.keys()
    assert all(listed[name].startswith(reason) for name, reason in lost.items())


def test_a_package_without_images_is_not_written(run_bioscan: Run, tmp_path: Path) -> None:
    source = make(tmp_path / "source", "folder", {(None, "a.jpg"): b"", (None, "b.jpg"): b"no image"})
    for verb, done in {"resize": "resized", "crop": ""}.items():
        for target in (tmp_path / f"{verb}.zip", tmp_path / f"{verb}_folder"):
            status, out, err = run_bioscan(verb, source, target, "--workers", 1)
            assert status == 1
            assert "2 of 2 images failed; --failures FILE lists them" in err.splitlines()
            said = out if verb == "crop" else err
            assert f"no image could be {done}: {target} is not written" in said or f"none; {target}" in said
            assert not target.exists()
            assert not [*tmp_path.glob("*.unfinished"), *tmp_path.glob(".*.unfinished")]
    target = tmp_path / "there.zip"
    target.write_bytes(b"the user's")
    status, out, _ = run_bioscan("resize", source, target, "--overwrite", "--json")
    assert (status, json.loads(out)["target"], json.loads(out)["failed"]) == (1, None, 2)
    assert target.read_bytes() == b"the user's"


def test_a_name_does_not_reach_the_terminal_as_it_is(run_bioscan: Run, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\n1 of 1 images\u202egpj.exe"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(f"{evil}.jpg", b"")
        archive.writestr("good.bmp", photograph(0))
    shown = r"  \x1b]0;owned\x07\x1b[2J\n1 of 1 images\u202egpj.exe.jpg: "
    for verb in ("convert", "resize", "crop"):
        status, out, err = run_bioscan(verb, tmp_path / "a.zip", tmp_path / f"{verb}.tar", "--workers", 1)
        assert status == 1
        assert any(line.startswith(shown) for line in err.splitlines())
        assert (out + err).replace("\n", "").isprintable()
        status, out, _ = run_bioscan(verb, tmp_path / "a.zip", tmp_path / f"{verb}2.tar", "--json")
        assert out.replace("\n", "").isprintable()
        assert json.loads(out)["failures"][0]["name"] == f"{evil}.jpg"


def test_wrong_requests_leave_nothing_behind(run_bioscan: Run, tmp_path: Path) -> None:
    source = make(tmp_path / "source", "zip", {(1, "a.jpg"): b"a"})
    out = tmp_path / "out.zip"
    for arguments, why in {
        (source, source): "is the source package, which is read",
        (source, out, "--form", "hdf5"): "the name is that of a package of form zip, not hdf5",
        (source, tmp_path / "out.rar"): "no package is written as .rar",
        (source, out, "--form", "rar"): 'Invalid value "rar" for --form',
        (source, out, "--raw", "gif"): "unknown encoding 'gif'",
        (source, out, "--quality", 90): "a quality is that of JPEGs: add --raw jpeg",
        (source, out, "--raw", "jpeg", "--quality", 0): "quality is 0; it must be from 1 to 100",
        (source, out, "--engine", "slurm"): 'Invalid value "slurm" for --engine',
        (source, out, "--address", "auto"): "add --engine ray",
        (source, out, "--workers", 0): "workers is 0",
        (source, out, "--failures", out): "two of the outputs have this name",
        (tmp_path / "none.zip", out): "no such image package",
    }.items():
        status, said, err = run_bioscan("convert", *arguments)
        assert (status, said) == (2, ""), why
        assert why in err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_real_photographs_go_to_hdf5_and_back(run_bioscan: Run, shared: Path, tmp_path: Path) -> None:
    source = shared / "data/bioscan1m_orders/original_256"
    assert run_bioscan("convert", source, tmp_path / "a.hdf5")[0] == 0
    assert run_bioscan("convert", tmp_path / "a.hdf5", tmp_path / "b")[0] == 0
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "b").glob("*.jpg")}
