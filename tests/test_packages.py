"""Packages written: what others' programs make of them, and names that must not get in."""

import io
import json
import subprocess
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pyarrow.parquet
import pytest
from PIL import Image

from bioscan.data.images import Images
from bioscan.data.packages import (
    FORMS,
    MARK,
    SPOOLED,
    assemble,
    clashes,
    form_of,
    hdf5_attributes,
    is_folder,
    package_name,
    refusal,
    spooling,
)
from bioscan.errors import RequestError

Files = dict[tuple[int | None, str], bytes]

LONG = "x" * 180 + ".jpg"
"""Too long for a field of the ustar header."""


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (number * 37 % 256, number % 256, 90)).save(out, "JPEG")
    return out.getvalue()


FILES: Files = {
    (part, name): picture(number)
    for number, (part, name) in enumerate(
        [
            (1, "a.jpg"),
            (1, "Zürich.b.jpg"),
            (2, "a.jpg"),
            (113, LONG),
            (None, "loose.jpg"),
            (None, "in/it.png"),
        ]
    )
} | {(2, "empty.jpg"): b""}


def build(folder: Path, target: str, files: Files = FILES, form: str | None = None, spools: int = 2) -> Path:
    """A package of these files, put aside in some spools and assembled."""
    out = folder / target
    form = form_of(out, form)
    work = folder / f"work {target}"
    work.mkdir()
    rows: list[dict[str, Any]] = []
    share = -(-len(files) // spools)
    for number in range(spools):
        with spooling(work / f"{number}", form, package_name(out)) as add:
            for (part, name), data in list(files.items())[number * share : (number + 1) * share]:
                if refusal(name, part, form) is None:
                    row = add(name, part, data)._asdict()
                    rows.append({"spool": f"{number}", "name": name, "part": part, **row})
    images = pl.DataFrame(rows, schema=SPOOLED, orient="row")
    images = images.filter(clashes(images, form).is_null())
    assemble(images, work, out, out, form, attributes={"Description": "a test"}, record={"images": 6})
    return out


PATHS = {f"part{part}/{name}" if part else name: data for (part, name), data in FILES.items()}


def test_the_form_follows_from_the_ending_or_is_named() -> None:
    endings = {
        "a.zip": "zip",
        "a.h5": "hdf5",
        "a.HDF5": "hdf5",
        "a.tar": "webdataset",
        "a.parquet": "parquet",
    }
    assert {name: form_of(Path(name)) for name in endings} == endings
    assert form_of(Path("photos.v2")) == "folder"
    assert form_of(Path("shards"), "webdataset") == "webdataset"
    for name in ("x.rar", "x.7z", "a.JPG", "x.tar.gz", "x.tgz", "x.tar.zst"):
        with pytest.raises(RequestError, match=r"no package is written as \.\w+; known are \.zip, "):
            form_of(Path(name))
        assert form_of(Path(name), "folder") == "folder"
    with pytest.raises(RequestError, match="unknown form 'zp'; did you mean 'zip'"):
        form_of(Path("a"), "zp")
    with pytest.raises(RequestError, match=r"a\.zip: the name is that of a package of form zip, not hdf5"):
        form_of(Path("a.zip"), "hdf5")
    assert [form for form in FORMS if is_folder(Path("a"), form)] == ["folder", "webdataset", "parquet"]
    assert not is_folder(Path("a.TAR"), "webdataset")
    assert [package_name(Path(name)) for name in ("x/a.b.zip", "a.b", "a.JPG")] == ["a.b", "a.b", "a.JPG"]


def test_zipfile_and_info_zip_read_our_zip_and_find_the_published_paths(
    tmp_path: Path, oracle: Callable[[str], str]
) -> None:
    package = build(tmp_path, "cropped_256.zip")
    with zipfile.ZipFile(package) as archive:
        assert archive.testzip() is None
        read = {name: archive.read(name) for name in archive.namelist()}
        times = {
            (info.date_time, info.external_attr >> 16, info.compress_type) for info in archive.infolist()
        }
    assert read == {f"bioscan/images/cropped_256/{path}": data for path, data in PATHS.items()}
    assert times == {((1980, 1, 1, 0, 0, 0), 0o100644, zipfile.ZIP_STORED)}
    for command in ([oracle("unzip"), "-tq"], [oracle("zip"), "-T"]):
        subprocess.run([*command, package], check=True, capture_output=True)


def test_a_zip_of_more_members_than_16_bits_count_is_read_by_others(
    tmp_path: Path, oracle: Callable[[str], str]
) -> None:
    files: Files = {(n // 1000, f"{n}.jpg"): b"%d" % n for n in range(65_536)}
    package = build(tmp_path, "many.zip", files)
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
        assert archive.read("bioscan/images/many/part65/65535.jpg") == b"65535"
    assert len(names) == 65_536
    subprocess.run([oracle("unzip"), "-tq", package], check=True, capture_output=True)
    assert len(Images(package, save_index=False)) == 65_536


@pytest.mark.slow
def test_a_zip_beyond_4_gib_is_read_by_others(tmp_path: Path, oracle: Callable[[str], str]) -> None:
    data = bytes(1 << 30)
    files: Files = {**{(1, f"{n}.jpg"): data for n in range(5)}, (2, "last.jpg"): b"last"}
    package = build(tmp_path, "large.zip", files)
    with zipfile.ZipFile(package) as archive:
        assert archive.read("bioscan/images/large/part2/last.jpg") == b"last"
        assert archive.getinfo("bioscan/images/large/part1/4.jpg").header_offset >= 1 << 32
    subprocess.run([oracle("unzip"), "-tq", package], check=True, capture_output=True)
    found = Images(package, save_index=False)
    assert found.read(int(found.find(["last.jpg"])[0])) == b"last"


def test_tarfile_and_tar_read_our_tar(tmp_path: Path, oracle: Callable[[str], str]) -> None:
    package = build(tmp_path, "all.tar")
    with tarfile.open(package) as archive:
        members = archive.getmembers()
        read = {member.name: archive.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    assert read == PATHS
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
    done = subprocess.run([oracle("tar"), "-tf", package], check=True, capture_output=True)
    assert len(done.stdout.splitlines()) == len(PATHS)
    assert done.stderr == b""
    assert package.stat().st_size % tarfile.RECORDSIZE == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_webdataset_library_reads_our_shards(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    package = build(tmp_path, "shards", form="webdataset")
    shards = sorted(str(path) for path in package.glob("*.tar"))
    assert shards == [str(package / "shards-000000.tar")]
    read: dict[str, bytes] = {}
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        key = sample.pop("__key__")
        read |= {f"{key}.{name}": data for name, data in sample.items() if not name.startswith("__")}
    assert read == PATHS


def test_h5py_reads_our_hdf5_in_the_published_layout(tmp_path: Path) -> None:
    package = build(tmp_path, "cropped_256.hdf5")
    with h5py.File(package) as file:
        assert [*file] == ["bioscan_dataset"]
        group = file["bioscan_dataset"]
        assert dict(group.attrs) == {"Description": "a test"}
        assert {d.shape for d in group.values()} == {(len(group[name]),) for name in group}
        assert {d.dtype for d in group.values()} == {np.dtype(np.uint8)}
        read = {name: data[()].tobytes() for name, data in group.items()}
    # the second a.jpg clashes, in/it.png has a folder
    wanted = {name: data for (part, name), data in FILES.items() if (part, name) != (2, "a.jpg")}
    assert read == {name: data for name, data in wanted.items() if "/" not in name}
    # the reader takes the byte ranges of plain datasets without asking h5py
    assert set(Images(package, save_index=False).index.filter(pl.col("size") > 0)["encoding"]) == {"file"}


@pytest.mark.parametrize("target", ["all.parquet", "all"])
def test_pyarrow_reads_our_parquet_as_the_images_of_hugging_face(tmp_path: Path, target: str) -> None:
    package = build(tmp_path, target, form="parquet")
    if target == "all":
        package /= "all-000000.parquet"
    table = pyarrow.parquet.read_table(package)
    assert str(table.schema.field("image").type) == "struct<bytes: binary, path: string>"
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    rows = table.to_pylist()
    assert {(row["part"], row["image"]["path"]): row["image"]["bytes"] for row in rows} == FILES


def test_a_folder_has_its_parts_and_says_how_it_was_made(tmp_path: Path) -> None:
    package = build(tmp_path, "photos")
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*") if path.is_file()}
    assert json.loads(files.pop(MARK).read_text()) == {"images": 6}
    assert {name: path.read_bytes() for name, path in files.items()} == PATHS


@pytest.mark.parametrize(
    ("target", "form"),
    [("a.zip", None), ("a.hdf5", None), ("a.tar", None), ("a.parquet", None), ("a", "folder")],
)
def test_the_bytes_do_not_tell_when_or_in_how_many_spools_they_were_made(
    tmp_path: Path, target: str, form: str | None
) -> None:
    made = []
    for number in (1, 3):
        (tmp_path / str(number)).mkdir()
        package = build(tmp_path / str(number), target, form=form, spools=number)
        files = sorted(package.rglob("*")) if package.is_dir() else [package]
        made.append([(f.relative_to(package.parent), f.read_bytes()) for f in files if f.is_file()])
    assert made[0] == made[1]


def test_large_shards_are_closed_and_the_next_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bioscan.data.packages.SHARD_IMAGES", 4)
    files: Files = {(1, f"{n}.jpg"): picture(n) for n in range(10)}
    package = build(tmp_path, "shards", files, "webdataset", spools=5)
    counts = []
    for shard in sorted(package.glob("*.tar")):
        with tarfile.open(shard) as archive:
            counts.append(len(archive.getnames()))
    assert counts == [4, 4, 2]
    assert len(Images(package, save_index=False)) == 10


# -- names

HOSTILE = {
    "": "no name",
    "/etc/passwd.jpg": "absolute",
    "../up.jpg": "leads out",
    "a/../../b.jpg": "leads out",
    "a/..": "leads out",
    "C:evil.jpg": "drive",
    "c:/evil.jpg": "drive",
    "a\0.jpg": "control",
    "a\n.jpg": "control",
    "a\\b.jpg": "backslash",
    "..\\up.jpg": "backslash",
    "a//b.jpg": "empty step",
    "./a.jpg": "empty step",
    "a/": "empty step",
    ".": "empty step",
    "\ud800.jpg": "Unicode",
    "x" * 256: "too long",
    "ü" * 128: "too long",
}


@pytest.mark.parametrize("form", FORMS)
def test_names_that_lead_out_of_a_package_on_any_system_are_refused(form: str) -> None:
    assert {name: refusal(name, 1, form) for name in HOSTILE} == {
        name: next(r for r in [refusal(name, 1, form)] if r and why in r) for name, why in HOSTILE.items()
    }


def test_odd_names_that_harm_nobody_are_taken() -> None:
    for name in ("..jpg", "a..b.jpg", "...", 'it\'s "good" *?.jpg', "xy:z.jpg", "Zürich.jpg", "x" * 255):
        assert refusal(name, None, "folder") is None, name
    assert refusal("in/it.jpg", 3, "zip") is None
    assert refusal("in/it.jpg", 3, "hdf5") == "a name with folders, which HDF5 packages have not"
    assert refusal("a.jpg", -1, "zip") == "a negative part"


def reasons(names: list[tuple[int | None, str]], form: str, **more: bool) -> list[str | None]:
    schema = {"part": pl.Int32(), "name": pl.String()}
    return clashes(pl.DataFrame(names, schema=schema, orient="row"), form, **more).to_list()


def test_of_images_of_one_name_the_first_is_taken() -> None:
    same = "another image before it has this name"
    names: list[tuple[int | None, str]] = [(1, "a.jpg"), (2, "a.jpg"), (None, "a.jpg"), (1, "a.jpg")]
    for form in ("folder", "zip", "webdataset", "parquet"):
        assert reasons(names, form) == [None, None, None, same]
    assert reasons(names, "hdf5") == [None, *[f"{same} (HDF5 packages have no parts)"] * 3]
    forms = [unicodedata.normalize(form, "Zürich.jpg") for form in ("NFD", "NFC")]
    assert reasons([(None, name) for name in forms], "zip") == [None, same]
    assert reasons([(None, "A.jpg"), (None, "a.jpg")], "folder") == [None, None]
    assert reasons([(None, "A.jpg"), (None, "a.jpg")], "folder", fold_case=True) == [None, same]


def test_a_file_and_a_folder_of_one_name_cannot_be_in_one_folder() -> None:
    names: list[tuple[int | None, str]] = [(1, "a.jpg"), (1, "a.jpg/b/c.jpg"), (1, "a.jpg/b"), (2, "a.jpg")]
    holds = "other images have it as their folder"
    assert reasons(names, "folder") == [holds, None, holds, None]
    assert reasons(names, "zip") == [None] * 4


def test_attributes_of_an_hdf5_package_are_read_from_the_group_or_the_root(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.attrs["Author"] = "someone else"
        group = file.create_group("bioscan_dataset")
        group.attrs.update({"Author": "Zoë", "Copyright Year": 2023})
        group.attrs["reference"] = group.ref
    assert hdf5_attributes(tmp_path / "a.hdf5") == {"Author": "Zoë", "Copyright Year": 2023}
    with h5py.File(tmp_path / "b.hdf5", "w") as file:
        file.attrs["Author"] = "Zoë"
    assert hdf5_attributes(tmp_path / "b.hdf5") == {"Author": "Zoë"}
