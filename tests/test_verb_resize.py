"""`bioscan resize`: a whole package at another size, its names kept, what is broken listed."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest
from PIL import Image

from bioscan.data.decode import read_rgb
from bioscan.data.images import Images
from bioscan.data.preprocess import ResizeSettings, shrink
from bioscan.jobs.resize import resize

Run = Callable[..., tuple[int, str, str]]


def saved(width: int, height: int, form: str = "JPEG", **options: Any) -> bytes:
    rough = np.random.default_rng(width).integers(0, 256, (6, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC).save(file, form, **options)
    return file.getvalue()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Part folders with pictures of many kinds and sizes, all sound."""
    exif = Image.Exif()
    exif[0x0112] = 6
    root = tmp_path / "photos"
    for name, data in {
        "part1/large.jpg": saved(640, 480),
        "part1/portrait.jpg": saved(300, 700),
        "part1/turned.jpg": saved(640, 480, exif=exif),
        "part1/small.jpg": saved(60, 50),
        "part2/picture.png": saved(200, 150, "PNG"),
        "part2/scan.tif": saved(200, 150, "TIFF"),
        "part2/large.jpg": saved(512, 384),
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def sizes(package: Path) -> dict[str, tuple[int, int]]:
    """Part and name -> width and height, as Pillow sees them."""
    images = Images(package, save_index=False)
    found = {}
    for row in range(len(images)):
        with Image.open(io.BytesIO(images.read(row))) as image:
            found[f"{images.index['part'][row]}/{images.name(row)}"] = image.size
    return found


def test_the_shorter_side_is_128_whichever_it_is(package: Path, run_bioscan: Run) -> None:
    target = package.with_name("small")
    status, out, _ = run_bioscan("resize", package, target, "--shorter-side", 128)
    assert status == 0
    assert out.startswith("7 of 7 images, ")
    assert sizes(target) == {
        "1/large.jpg": (171, 128),
        "1/portrait.jpg": (128, 299),
        "1/turned.jpg": (128, 171),
        "1/small.jpg": (60, 50),
        "2/picture.png": (171, 128),
        "2/scan.tif": (171, 128),
        "2/large.jpg": (171, 128),
    }


def test_the_height_may_be_fixed_as_in_the_papers_program(package: Path, run_bioscan: Run) -> None:
    target = package.with_name("small.zip")
    flags = ("--shorter-side", 128, "--fix", "height", "--enlarge", "--quality", 90, "--subsampling", "444")
    status, out, _ = run_bioscan("resize", package, target, *flags, "--json")
    assert status == 0
    made = json.loads(out)
    assert {key: made[key] for key in ("form", "images", "shrunk", "enlarged", "copied", "odd_names")} == {
        "form": "zip",
        "images": 7,
        "shrunk": 6,
        "enlarged": 1,
        "copied": 0,
        "odd_names": 1,
    }
    found = sizes(target)
    assert found["1/portrait.jpg"] == (55, 128)  # 300 * 128 / 700 = 54.9
    assert found["1/small.jpg"] == (154, 128)
    with zipfile.ZipFile(target) as archive:
        assert "bioscan/images/small/part1/portrait.jpg" in archive.namelist()
        with Image.open(archive.open("bioscan/images/small/part1/large.jpg")) as image:
            assert image.layer[0][1:3] == (1, 1)  # type: ignore[attr-defined]


def test_names_stay_so_that_a_catalogue_finds_the_images(package: Path, run_bioscan: Run) -> None:
    target = package.with_name("small")
    _, out, err = run_bioscan("resize", package, target, "--shorter-side", 64)
    before, after = Images(package, save_index=False), Images(target, save_index=False)
    rows = after.find(before.index["name"], before.index["part"])
    assert sorted(rows) == [*range(7)]
    assert read_rgb(after, rows[0]).shape[0] == 64
    with Image.open(target / "part2/scan.tif") as image, Image.open(target / "part2/picture.png") as png:
        assert (image.format, png.format) == ("JPEG", "PNG")
    assert err == "JPEGs now, under the names of other kinds of files: 1 (first: scan.tif)\n"
    assert out.splitlines()[1] == "6 shrunk, 1 copied"
    assert (target / "part1/small.jpg").read_bytes() == (package / "part1/small.jpg").read_bytes()


def test_what_is_broken_is_listed_and_the_rest_is_there(package: Path, run_bioscan: Run) -> None:
    (package / "part1/cut.jpg").write_bytes(saved(640, 480)[:3_000])
    (package / "part1/empty.jpg").write_bytes(b"")
    (package / "part2/page.jpg").write_bytes(b"<html>quota exceeded</html>")
    target, failures = package.with_name("small"), package.with_name("failed.csv")
    status, out, err = run_bioscan("resize", package, target, "--failures", failures)
    assert status == 1
    assert out.startswith("7 of 10 images, ")
    assert f"3 of 10 images failed; see {failures}" in err
    listed = pl.read_csv(failures).sort("name")
    assert listed.select("name", "part", "reason").rows() == [
        ("cut.jpg", 1, "truncated JPEG"),
        ("empty.jpg", 1, "empty file"),
        ("page.jpg", 2, "not an image (starts with b'<html>qu')"),
    ]
    assert listed["place"][0] == "photos/part1/cut.jpg"
    assert len(sizes(target)) == 7
    status, _, err = run_bioscan("resize", package, package.with_name("again"))
    assert status == 1
    assert "  part1/cut.jpg: truncated JPEG (photos/part1/cut.jpg)" in err.splitlines()


def test_processes_change_nothing(package: Path) -> None:
    settings = ResizeSettings(shorter_side=40)
    made = [
        resize(package, package.with_name(f"w{n}.zip"), settings, workers=n).bulk.rows.rows() for n in (1, 2)
    ]
    assert made[0] == made[1]
    one, two = (zipfile.ZipFile(package.with_name(f"w{n}.zip")) for n in (1, 2))
    with one, two:
        pairs = list(zip(one.infolist(), two.infolist(), strict=True))
        assert len(pairs) == 7
        for a, b in pairs:  # the package's name is in the path, all else is equal
            assert a.filename.replace("w1", "w2", 1) == b.filename
            assert one.read(a) == two.read(b)


def test_arrays_of_pixels_become_jpegs(tmp_path: Path) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(saved(400, 300))))
    with h5py.File(tmp_path / "raw.hdf5", "w") as file:
        file["a.jpg"] = pixels
        file["b.jpg"] = pixels[:40, :30]
    made = resize(
        tmp_path / "raw.hdf5", tmp_path / "small.hdf5", ResizeSettings(shorter_side=100, quality=98)
    )
    assert made.counts == {"shrunk": 1, "enlarged": 0, "encoded": 1, "copied": 0}
    assert made.bulk.rows.rows() == [
        ("a.jpg", None, "shrunk", 400, 300, 133, 100),
        ("b.jpg", None, "encoded", 30, 40, 30, 40),
    ]
    images = Images(tmp_path / "small.hdf5", save_index=False)
    new = read_rgb(images, int(images.find(["a.jpg"])[0]))
    assert np.abs(new.astype(int) - shrink(pixels, 100)).mean() < 2


def test_wrong_requests_are_refused_before_work(package: Path, run_bioscan: Run) -> None:
    target = package.with_name("small")
    for flags, message in (
        (("--quality", 0), "bioscan resize: quality is 0; it must be from 1 to 100\n"),
        (("--shorter-side", 0), "bioscan resize: shorter_side is 0; it must be at least 1\n"),
        (("--workers", 0), "bioscan resize: workers is 0; at least 1 is needed\n"),
        (("--failures", target), f"bioscan resize: {target}: two of the outputs have this name\n"),
        (("--form", "rar"), 'bioscan resize: Invalid value "rar" for --form'),
    ):
        status, _, err = run_bioscan("resize", package, target, *flags)
        assert status == 2
        assert err.startswith(message)
    assert not target.exists()
    assert run_bioscan("resize", package, target)[0] == 0
    status, _, err = run_bioscan("resize", package, target)
    assert (status, err) == (2, f"bioscan resize: {target} exists; choose another name or pass --overwrite\n")
    assert run_bioscan("resize", package, target, "--shorter-side", 32, "--overwrite")[0] == 0
    assert sizes(target)["1/small.jpg"] == (38, 32)


def test_the_originals_of_the_paper_become_341_by_256(shared: Path, tmp_path: Path, run_bioscan: Run) -> None:
    source = tmp_path / "originals"
    source.mkdir()
    for file in sorted((shared / "data/bioscan1m_orders/original_full").glob("[A-C]*.jpg")):
        (source / file.name).symlink_to(file)
    status, out, _ = run_bioscan("resize", source, tmp_path / "small.hdf5", "--workers", 1)
    assert status == 0
    assert "3 shrunk" in out
    assert set(sizes(tmp_path / "small.hdf5").values()) == {(341, 256)}
