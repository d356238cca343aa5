"""`bioscan crop` as a user meets it, and the paper's crops written out anew."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from polars.testing import assert_frame_equal

import bioscan.data
from bioscan.data.boxes import SCHEMA, XYXY, check_boxes, read_boxes, write_boxes
from bioscan.data.preprocess import CropSettings
from bioscan.data.synthesis import SynthesisSettings, synthesize
from bioscan.errors import RequestError
from bioscan.jobs.crop import crop, doubtful

RunBioscan = Callable[..., tuple[int, str, str]]
Box = Sequence[float]

WIDTH, HEIGHT = 64, 48


def pixels_of(number: int, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """A picture that no other has, smooth so that it survives JPEG."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [(x * (3 + number) % 211), (y * 4 + number * 7) % 199, (x + y) * 2 % 181]
    return np.stack(planes, axis=-1).astype(np.uint8)


def photographs(folder: Path, names: Sequence[str]) -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        Image.fromarray(pixels_of(number)).save(folder / name)
    return folder


def table(path: Path, rows: Mapping[str, Sequence[Box]], **more: Any) -> Path:
    """A table of boxes of each picture, scores falling."""
    made: list[dict[str, Any]] = []
    for name, boxes in rows.items():
        picture = dict.fromkeys(SCHEMA) | {"image_file": name, "width": WIDTH, "height": HEIGHT} | more
        made += [
            picture | dict(zip(XYXY, box, strict=True)) | {"score": 0.9 - 0.1 * number}
            for number, box in enumerate(boxes)
        ] or [picture]
    write_boxes(check_boxes(pl.DataFrame(made, SCHEMA)), path, overwrite=True)
    return path


def paper_crop(picture: Image.Image, box: Box, ratio: float = 1.4) -> Image.Image:
    """What the paper's program cuts out, from its description alone."""
    left, top, right, bottom = (round(side) for side in box)  # half to even
    grow = (ratio - 1) * max(right - left, bottom - top)
    left, right = int(left - grow / 2), int(right + grow / 2)  # toward zero
    top, bottom = int(top - grow / 2), int(bottom + grow / 2)
    grey = (240, 240, 240)
    if left < 0:
        picture = ImageOps.expand(picture, (-left, 0, 0, 0), grey)
        left, right = 0, right - left
    if top < 0:
        picture = ImageOps.expand(picture, (0, -top, 0, 0), grey)
        top, bottom = 0, bottom - top
    if right > picture.width:
        picture = ImageOps.expand(picture, (0, 0, right - picture.width + 1, 0), grey)
    if bottom > picture.height:
        picture = ImageOps.expand(picture, (0, 0, 0, bottom - picture.height + 1), grey)
    return picture.crop((left, top, right, bottom))


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, Path]:
    """Three photographs and their boxes: one specimen, two, none."""
    folder = photographs(tmp_path / "photos", ["a.png", "b.png", "c.jpg"])
    boxes: dict[str, list[Box]] = {
        "a.png": [(10, 8, 30, 20)],
        "b.png": [(2, 2, 12, 30), (40, 20, 60, 40)],
        "c.jpg": [],
    }
    return folder, table(tmp_path / "given.parquet", boxes)


# -- the paper's crops

sides = st.floats(0, 1, width=32)


@settings(max_examples=40, deadline=None)
@given(st.tuples(sides, sides, sides, sides))
def test_given_boxes_become_the_papers_crops_to_the_pixel(
    tmp_path_factory: pytest.TempPathFactory, shares: tuple[float, float, float, float]
) -> None:
    folder = tmp_path_factory.mktemp("paper")
    photos = photographs(folder / "photos", ["a.png"])
    x0, y0 = shares[0] * (WIDTH - 2), shares[1] * (HEIGHT - 2)
    box = (x0, y0, x0 + 2 + shares[2] * (WIDTH - 2 - x0), y0 + 2 + shares[3] * (HEIGHT - 2 - y0))
    made = crop(photos, folder / "crops", boxes=table(folder / "boxes.parquet", {"a.png": [box]}), workers=1)
    assert (made.crops, made.failed.height) == (1, 0)
    (path,) = (folder / "crops").rglob("a.png")
    with Image.open(path) as ours, Image.open(photos / "a.png") as photo:
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(paper_crop(photo, box)))


def test_the_papers_small_package_has_256_pixels_of_height(run_bioscan: RunBioscan, tmp_path: Path) -> None:
    """Portrait or landscape, smaller or larger: ImageMagick's `-resize x256` fixes the height."""
    folder = tmp_path / "photos"
    folder.mkdir()
    boxes = {"tall.png": (200.0, 20.0, 260.0, 560.0), "wide.png": (50.0, 100.0, 700.0, 180.0)}
    boxes["small.png"] = (300.0, 300.0, 340.0, 330.0)
    rows = []
    for number, (name, box) in enumerate(boxes.items()):
        Image.fromarray(pixels_of(number, 800, 600)).save(folder / name)
        rows.append({"image_file": name, **dict(zip(XYXY, box, strict=True))})
    pl.DataFrame(rows).write_csv(tmp_path / "boxes.csv")
    status, _, err = run_bioscan(
        *("crop", folder, tmp_path / "crops.zip", "--boxes", tmp_path / "boxes.csv", "--workers", 1),
        *("--resize", 256, "--fix", "height", "--enlarge"),
    )
    assert (status, err) == (0, "")
    with zipfile.ZipFile(tmp_path / "crops.zip") as archive:
        members = {Path(name).name: name for name in archive.namelist()}
        for name, box in boxes.items():
            with Image.open(folder / name) as photo:
                cut = paper_crop(photo, box)
            size = (int(cut.width * 256 / cut.height + 0.5), 256)
            with Image.open(io.BytesIO(archive.read(members[name]))) as ours:
                assert ours.size == size
                wanted = np.asarray(cut.resize(size, Image.Resampling.LANCZOS), np.int16)
                assert np.abs(np.asarray(ours, np.int16) - wanted).max() <= 1


# -- what is made of each kind


def members(package: Path) -> list[str]:
    return sorted(p.relative_to(package).as_posix() for p in package.rglob("*.[jp][pn]g"))


def test_crops_and_table_by_kind(three: tuple[Path, Path], run_bioscan: RunBioscan, tmp_path: Path) -> None:
    folder, boxes = three
    status, out, err = run_bioscan("crop", folder, tmp_path / "crops", "--boxes", boxes, "--workers", 1)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "3 pictures: 1 with one insect, 1 none, 1 many",
        "none: c.jpg (kind none in the table)",
        f"crops: {tmp_path / 'crops'}, 2 pictures",
        f"boxes: {tmp_path / 'crops.boxes.parquet'}",
    ]
    assert members(tmp_path / "crops") == ["a.png", "b.png"]
    assert_frame_equal(read_boxes(tmp_path / "crops.boxes.parquet"), read_boxes(boxes))


@pytest.mark.parametrize(
    ("flags", "made"),
    [
        (["--many", "all"], ["a.png", "b.2.png", "b.png"]),
        (["--many", "skip"], ["a.png"]),
        (["--none", "whole"], ["a.png", "b.png", "c.jpg"]),
    ],
)
def test_of_many_and_of_none_as_asked(
    three: tuple[Path, Path], run_bioscan: RunBioscan, tmp_path: Path, flags: list[str], made: list[str]
) -> None:
    folder, boxes = three
    arguments = ("crop", folder, tmp_path / "crops", "--boxes", boxes, "--workers", 1, *flags)
    assert run_bioscan(*arguments)[0] == 0
    assert members(tmp_path / "crops") == made
    assert_frame_equal(read_boxes(tmp_path / "crops.boxes.parquet"), read_boxes(boxes))
    with Image.open(folder / "b.png") as photo:
        for name, box in (("b.png", (2, 2, 12, 30)), ("b.2.png", (40, 20, 60, 40))):
            if name in made:
                with Image.open(tmp_path / "crops" / name) as ours:
                    np.testing.assert_array_equal(np.asarray(ours), np.asarray(paper_crop(photo, box)))
    if "c.jpg" in made:
        with Image.open(tmp_path / "crops" / "c.jpg") as ours:
            assert ours.size == (WIDTH, HEIGHT)


def test_boxes_alone_in_any_form(three: tuple[Path, Path], run_bioscan: RunBioscan, tmp_path: Path) -> None:
    folder, boxes = three
    for name in ("boxes.csv", "boxes.json"):
        arguments = ("crop", folder, "--boxes-only", "--boxes", boxes, "--boxes-out", tmp_path / name)
        status, out, _ = run_bioscan(*arguments, "--workers", 1)
        assert status == 0
        assert "crops" not in out
        assert_frame_equal(read_boxes(tmp_path / name), read_boxes(boxes))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "boxes.csv",
        "boxes.json",
        "given.parquet",
        "photos",
        *(["photos.index.parquet"] if (tmp_path / "photos.index.parquet").exists() else []),
    ]


def test_margin_fill_and_rotation_reach_the_crop(
    three: tuple[Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    folder, boxes = three
    flags = ("--margin", "square", "--ratio", "2", "--fill", "10,20,30", "--rotate")
    arguments = ("crop", folder, tmp_path / "crops", "--boxes", boxes, "--workers", 1, *flags)
    assert run_bioscan(*arguments)[0] == 0
    with Image.open(tmp_path / "crops" / "b.png") as ours:  # the box is 10 x 28: a quarter turned, 28 wide
        assert ours.size == (56, 56)
        assert (10, 20, 30) in {colour for _, colour in ours.getcolors(1 << 16) or []}


def test_boxes_of_another_size_of_the_picture_are_scaled(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos", ["a.png"])
    half = {"width": WIDTH // 2, "height": HEIGHT // 2, "length_px": 11.0, "area_px": 50.0}
    boxes = table(tmp_path / "half.parquet", {"a.png": [(5, 4, 15, 10)]}, **half)
    made = crop(folder, tmp_path / "crops", boxes=boxes, workers=1)
    columns = ("width", "height", *XYXY, "length_px", "area_px")
    assert made.boxes.select(columns).row(0) == (WIDTH, HEIGHT, 10, 8, 30, 20, 22, 200)
    with Image.open(folder / "a.png") as photo, Image.open(tmp_path / "crops" / "a.png") as ours:
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(paper_crop(photo, (10, 8, 30, 20))))


# -- lengths


def test_lengths_in_millimetres_by_one_scale_or_by_a_table(run_bioscan: RunBioscan, tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos", ["a.png", "b.png"])
    boxes = table(tmp_path / "b.parquet", {n: [(10, 8, 30, 20)] for n in ("a.png", "b.png")}, length_px=20.0)
    arguments = ["crop", folder, "--boxes-only", "--boxes", boxes, "--workers", 1]
    status, out, _ = run_bioscan(*arguments, "--boxes-out", tmp_path / "one.csv", "--mm-per-px", 0.25)
    assert status == 0
    assert "length: median 5 mm, 5 to 5, 2 insects" in out.splitlines()
    scale = tmp_path / "scale.csv"
    scale.write_text("image_file,mm_per_px\nb.png,0.1\n", encoding="utf-8")
    status, out, _ = run_bioscan(*arguments, "--boxes-out", tmp_path / "two.csv", "--scale", scale, "--json")
    assert status == 0
    assert json.loads(out)["lengths"] == {
        "px": {"specimens": 2, "least": 20.0, "median": 20.0, "most": 20.0},
        "mm": {"specimens": 1, "least": 2.0, "median": 2.0, "most": 2.0},
    }
    assert read_boxes(tmp_path / "two.csv")["length_mm"].to_list() == [None, 2.0]
    scale.write_text("image_file,mm_per_px\na.png,0.1\nb.png,-1\n", encoding="utf-8")
    status, _, err = run_bioscan(*arguments, "--boxes-out", tmp_path / "three.csv", "--scale", scale)
    assert status == 2
    assert f"{scale}, line 3: mm_per_px is '-1', expected more than 0" in err


# -- failures


def test_pictures_that_cannot_be_read_or_have_no_boxes_are_listed(
    run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    folder = photographs(tmp_path / "photos", ["a.png", "b.png", "c.png", "d.png"])
    (folder / "b.png").write_bytes(b"")
    Image.new("RGB", (WIDTH, WIDTH)).save(folder / "d.png")
    boxes = table(tmp_path / "b.parquet", {n: [(10, 8, 30, 20)] for n in ("a.png", "b.png", "d.png")})
    failures = tmp_path / "failures.csv"
    arguments = ("crop", folder, tmp_path / "crops", "--boxes", boxes, "--workers", 1, "--failures", failures)
    status, out, err = run_bioscan(*arguments)
    assert status == 1
    assert out.splitlines()[0] == "4 pictures: 1 with one insect, 0 none, 0 many"
    assert err == f"3 of 4 images failed; see {failures}\n"
    assert pl.read_csv(failures).select("name", "reason").rows() == [
        ("b.png", "empty file"),
        ("c.png", "not among the given boxes"),
        ("d.png", "64 x 64 pixels, but its boxes are of a picture of 64 x 48"),
    ]
    assert members(tmp_path / "crops") == ["a.png"]
    assert read_boxes(tmp_path / "crops.boxes.parquet")["image_file"].to_list() == ["a.png"]
    status, _, err = run_bioscan("crop", folder, tmp_path / "again.v2", "--boxes", boxes, "--workers", 1)
    assert status == 1
    assert err.splitlines()[:2] == [
        "3 of 4 images failed; --failures FILE lists them",
        "  b.png: empty file (photos/b.png)",
    ]
    assert (tmp_path / "again.v2.boxes.parquet").is_file()


def test_what_cannot_be_done_is_told_in_a_line_and_leaves_nothing(
    three: tuple[Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    folder, boxes = three
    out_there = tmp_path / "there.boxes.parquet"
    out_there.write_bytes(b"mine")
    before = sorted(p.name for p in tmp_path.iterdir())
    new = tmp_path / "crops"
    for arguments, said in (
        ([folder], "where do the crops go? Name a package, or pass --boxes-only"),
        ([folder, "--boxes-only"], "--boxes-only needs --boxes-out"),
        ([folder, new, "--boxes-only", "--boxes-out", tmp_path / "b.csv"], "--boxes-only makes no crops"),
        ([folder, new, "--boxes", tmp_path / "none.csv"], "no such file of boxes"),
        ([folder, new, "--boxes", boxes, "--detector", "x"], "boxes take the place of a detector"),
        ([folder, new, "--detector", tmp_path / "none"], "no such detector; 'classical' needs no file"),
        ([folder, new, "--ratio", 0.5], "ratio is 0.5; it must be at least 1"),
        ([folder, new, "--resize", 0], "shorter_side is 0; it must be at least 1"),
        ([folder, new, "--many", "some"], "--many"),
        ([folder, new, "--mm-per-px", -1], "mm_per_px is -1.0; it must be more than 0"),
        ([folder, new, "--threshold", 0.5], "threshold is that of a learned detector"),
        ([folder, new, "--mm-per-px", 1, "--scale", boxes], "say the same thing"),
        ([folder, new, "--boxes-out", tmp_path / "b.xml"], "unknown form of boxes '.xml'"),
        ([folder, tmp_path / "there", "--boxes", boxes], "there.boxes.parquet exists"),
        ([folder, folder, "--boxes", boxes], "photos"),
        ([folder, new, "--boxes", boxes, "--sheet", tmp_path / "q.txt"], "its name must end in .png"),
        ([folder, new, "--boxes", boxes, "--failures", new], "two of the outputs have this name"),
        ([folder, new, "--boxes", boxes, "--sheet", new / "q.png"], "one of the outputs lies in the other"),
        ([folder, new, "--boxes", boxes, "--failures", out_there / "f.csv"], "cannot be written"),
        ([folder, new, "--boxes", boxes, "--boxes-out", out_there / "b.csv"], "cannot be written"),
        ([folder, new, "--boxes", boxes, "--sheet", out_there / "q.png"], "cannot be written"),
        (
            [folder, new, "--boxes", boxes, "--fix", "height"],
            "--fix is about the size of crops; add --resize",
        ),
        ([folder, new, "--boxes", boxes, "--enlarge"], "--enlarge is about the size of crops; add --resize"),
        ([folder, ".", "--boxes", boxes], "is the current folder"),
        ([folder, "./", "--boxes", boxes], "is the current folder"),
        ([folder, "", "--boxes", boxes], "is the current folder"),
        ([folder, "..", "--boxes", boxes], "is the current folder"),
        ([folder, "/", "--boxes", boxes], "is the current folder"),
        ([tmp_path / "nothing", new], "nothing"),
    ):
        status, out, err = run_bioscan("crop", *arguments, "--workers", 1)
        assert (status, out) == (2, ""), arguments
        assert err.startswith("bioscan crop: ")
        assert said in err
        assert err.count("\n") == 1
        (tmp_path / "photos.index.parquet").unlink(missing_ok=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == before, arguments
    assert out_there.read_bytes() == b"mine"


def test_no_output_takes_the_place_of_what_is_read(
    three: tuple[Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    folder, boxes = three
    parquet, scale = tmp_path / "photos.parquet", tmp_path / "scale.csv"
    assert run_bioscan("convert", folder, parquet, "--workers", 1)[0] == 0
    (tmp_path / "link.parquet").symlink_to(parquet)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/1.parquet").symlink_to(parquet)
    (tmp_path / "runs").mkdir()
    shutil.copy(boxes, tmp_path / "runs/b.parquet")
    scale.write_text("image_file,mm_per_px\na.png,0.1\n", encoding="utf-8")
    new = tmp_path / "new"
    usual = ["--boxes", boxes]
    for arguments in (
        [parquet, new, *usual, "--boxes-out", parquet],
        [parquet, "--boxes-only", *usual, "--boxes-out", parquet],
        [parquet, new, *usual, "--boxes-out", tmp_path / "link.parquet"],
        [parquet, new, *usual, "--failures", parquet],
        [parquet, new, *usual, "--boxes-out", tmp_path / "photos.parquet.index.parquet"],
        [parquet, parquet, *usual],
        [tmp_path / "shards/*.parquet", new, *usual, "--boxes-out", parquet],
        [tmp_path / "shards", new, *usual, "--boxes-out", parquet],
        [folder, new, *usual, "--boxes-out", folder / "b.parquet"],
        [folder, new, *usual, "--sheet", folder / "a.png"],
        [folder, new, *usual, "--failures", folder / "new/f.csv"],
        [folder, tmp_path / "shards/../photos", *usual],
        [folder, new, *usual, "--boxes-out", boxes],
        [folder, new, *usual, "--failures", boxes],
        [folder, new, *usual, "--scale", scale, "--failures", scale],
        [folder, tmp_path / "runs", "--boxes", tmp_path / "runs/b.parquet"],
    ):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if "index" not in path.name}
        status, out, err = run_bioscan("crop", *arguments, "--workers", 1, "--overwrite")
        assert (status, out) == (2, ""), arguments
        assert "which is read; choose another" in err
        after = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if "index" not in path.name}
        assert after == before, arguments


def test_a_list_of_failures_of_an_earlier_run_does_not_stay(
    three: tuple[Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    folder, boxes = three
    failures = tmp_path / "failures.csv"
    (folder / "d.png").write_bytes(b"")
    arguments = ("crop", folder, tmp_path / "crops", "--boxes", boxes, "--workers", 1, "--failures", failures)
    assert run_bioscan(*arguments)[0] == 1
    assert pl.read_csv(failures).height == 1
    (folder / "d.png").unlink()
    assert run_bioscan(*arguments)[0] == 2
    assert run_bioscan(*arguments, "--overwrite")[0] == 0
    assert failures.read_text() == "name,part,place,reason\n"


def test_a_job_that_ended_before_all_its_files_were_written_goes_on(
    three: tuple[Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    folder, boxes = three
    target, extra = tmp_path / "crops.zip", tmp_path / "extra.csv"
    table_file = tmp_path / "crops.boxes.parquet"
    usual: dict[str, Any] = {"boxes": boxes, "boxes_out": table_file, "outputs": [extra]}

    def killed(made: Any) -> None:
        extra.write_text("half")
        raise KeyboardInterrupt

    for place in (target, None):
        with pytest.raises(KeyboardInterrupt):
            crop(folder, place, **usual, finish=killed)
        written = digests(table_file)
        for others in ({"many": "all"}, {"outputs": [extra, boxes.with_suffix(".csv")]}):
            boxes.with_suffix(".csv").write_text("mine")
            with pytest.raises(RequestError, match=r"exists|other settings"):
                crop(folder, place, **usual | others)
        boxes.with_suffix(".csv").unlink()
        assert crop(folder, place, **usual, finish=lambda made: None).resumed == 1
        assert digests(table_file) == written
        with pytest.raises(RequestError, match="exists; choose another name"):
            crop(folder, place, **usual)
        table_file.unlink()
        extra.unlink()
    assert not list(tmp_path.glob(".*"))


KILLED = """
    import os, signal, sys
    from bioscan.app.cli import run

    def watch(event, arguments):
        if event == "os.rename" and str(arguments[0]).endswith(".unfinished"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    run(sys.argv[1:])
"""
"""Ends itself when all is written, and what is held for a rerun is to go."""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills a process")
@pytest.mark.parametrize("verb", ["crop", "convert", "resize"])
def test_a_command_that_was_killed_at_its_very_end_can_be_given_again(
    three: tuple[Path, Path], run_bioscan: RunBioscan, tmp_path: Path, verb: str
) -> None:
    folder, boxes = three
    (folder / "d.png").write_bytes(b"")
    arguments = [verb, folder, tmp_path / "new.zip", "--failures", tmp_path / "f.csv", "--workers", "1"]
    arguments += ["--boxes", boxes, "--sheet", tmp_path / "s.png"] if verb == "crop" else []
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), *map(str, arguments)], check=False)
    assert done.returncode == -signal.SIGKILL
    written = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {path.name for path in written} >= {"new.zip", "f.csv"}
    assert run_bioscan(*arguments)[0] == (0 if verb == "convert" else 1)  # an empty file can be copied
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == written
    assert not list(tmp_path.glob(".*"))
    status, _, err = run_bioscan(*arguments)
    assert (status, "exists; choose another name" in err) == (2, True)


def test_a_file_that_came_while_the_job_ran_is_not_replaced(three: tuple[Path, Path], tmp_path: Path) -> None:
    made = tmp_path / "boxes.csv"

    def come(done: int, total: int | None = None) -> None:
        made.write_text("mine")

    with pytest.raises(RequestError, match=r"boxes\.csv exists"):
        crop(three[0], tmp_path / "crops", boxes=three[1], boxes_out=made, progress=come)
    assert made.read_text() == "mine"
    made.unlink()
    assert crop(three[0], tmp_path / "crops", boxes=three[1], boxes_out=made).resumed == 1
    assert_frame_equal(read_boxes(made), read_boxes(three[1]))


def test_a_table_of_scales_that_names_no_picture_is_refused_and_some_are_counted(
    three: tuple[Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    folder, boxes = three
    scale = tmp_path / "scale.csv"
    scale.write_text("image_file,mm_per_px\nz.png,0.1\n", encoding="utf-8")
    arguments = ("crop", folder, tmp_path / "crops", "--boxes", boxes, "--scale", scale, "--workers", 1)
    status, out, err = run_bioscan(*arguments)
    assert (status, out) == (2, "")
    said = "a scale for none of the pictures (it has z.png; the package has 3 pictures, the first a.png)"
    assert err == f"bioscan crop: {scale}: {said}\n"
    scale.write_text("image_file,mm_per_px\nz.png,0.1\na.png,0.1\n", encoding="utf-8")
    status, out, _ = run_bioscan(*arguments)
    assert status == 0
    assert "scale: none for 2 of 3 pictures" in out.splitlines()


def test_rows_stay_and_names_are_free_where_pictures_look_like_further_specimens(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos", ["A.png", "a.2.png", "c.png"])
    two: list[Box] = [(2, 2, 12, 30), (40, 20, 60, 40)]
    boxes = table(tmp_path / "b.parquet", dict.fromkeys(["A.png", "a.2.png", "c.png"], two))
    made = crop(folder, tmp_path / "crops", boxes=boxes, many="all")
    wanted = ["A.2_.png", "A.png", "a.2.2.png", "a.2.png", "c.2.png", "c.png"]
    assert (members(tmp_path / "crops"), made.failed.height) == (wanted, 0)
    assert_frame_equal(made.boxes, read_boxes(boxes))
    huge = CropSettings(ratio=4000.0)  # more pixels than a picture may have
    made = crop(folder, tmp_path / "none", boxes=boxes, many="all", settings=huge)
    assert (made.crops, made.failed.height) == (0, 6)
    assert_frame_equal(made.boxes, read_boxes(boxes))


def test_a_job_of_another_classical_detector_is_not_taken_up(
    three: tuple[Path, Path], tmp_path: Path
) -> None:
    def interrupt(made: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crop(three[0], tmp_path / "crops", finish=interrupt)
    folder = Path(bioscan.data.__file__).parent
    of_program = "".join(
        f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n"
        for name in ("localise.py", "localise_curves.py")
    )
    record = tmp_path / ".crops.unfinished/job.json"
    job = json.loads(record.read_text())
    assert job["record"]["fingerprint"] == hashlib.sha256(of_program.encode()).hexdigest()
    job["record"]["fingerprint"] = "0" * 64
    record.write_text(json.dumps(job))
    with pytest.raises(RequestError, match="fingerprint"):
        crop(three[0], tmp_path / "crops")


# -- the doubtful ones


def test_the_worst_of_each_kind_of_doubt_come_in_turn() -> None:
    def picture(name: str, *box: float, score: float | None = 0.9, kind: str = "one") -> dict[str, Any]:
        return (
            dict.fromkeys(SCHEMA)
            | {"image_file": name, "width": 100, "height": 100, "kind": kind, "score": score}
            | dict(zip(XYXY, box, strict=False))
        )

    boxes = check_boxes(
        pl.DataFrame(
            [
                picture("fine", 20, 20, 60, 60, score=0.95),
                picture("unsure", 20, 20, 60, 60, score=0.4),
                picture("none", score=None, kind="none"),
                picture("speck", 20, 20, 23, 23),
                picture("whole", 0, 0, 100, 100, score=0.7),
                picture("edge", 60, 20, 99.5, 60, score=0.8),
                picture("two", 20, 20, 60, 60, kind="many"),
                picture("two", 70, 70, 80, 80, kind="many", score=0.5),
            ],
            SCHEMA,
        )
    )
    assert doubtful(boxes, 99).select("image_file", "why").rows() == [
        ("two", "several specimens"),
        ("whole", "at the frame, large"),
        ("speck", "tiny"),
        ("none", "none found"),
        ("unsure", ""),
        ("edge", "at the frame"),
        ("fine", ""),
    ]
    assert doubtful(boxes, 2)["image_file"].to_list() == ["two", "whole"]


def test_the_sheet_shows_boxes_on_their_pictures(
    three: tuple[Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    folder, boxes = three
    arguments = ("crop", folder, tmp_path / "crops", "--boxes", boxes, "--workers", 1)
    status, out, _ = run_bioscan(*arguments, "--sheet", tmp_path / "doubtful.png")
    assert status == 0
    assert out.splitlines()[-1] == f"doubtful: {tmp_path / 'doubtful.png'}"
    with Image.open(tmp_path / "doubtful.png") as sheet:
        red = np.all(np.asarray(sheet) == (230, 60, 20), axis=-1)
        # tiles of 260 pixels with gaps of 14; b first (several), then c (none), then a
        assert sheet.width > 2 * 260
        first, second = red[:, 14 : 14 + 260], red[:, 14 + 274 : 14 + 274 + 260]
        assert first.any()
        assert not second[: 14 + 60 + 260].any()
        rows, columns = np.nonzero(first[: 60 + 14 + 260])
        scale = 260 / WIDTH
        assert columns.min() == pytest.approx(2 * scale, abs=2)
        assert columns.max() == pytest.approx(60 * scale, abs=2)
        assert rows.max() - rows.min() == pytest.approx((40 - 2) * scale, abs=3)


# -- at scale


def digests(*paths: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_one_or_two_workers_make_the_same_bytes(run_bioscan: RunBioscan, tmp_path: Path) -> None:
    names = [f"{number:02d}.jpg" for number in range(40)]
    folder = photographs(tmp_path / "photos", names)
    boxes = table(tmp_path / "b.parquet", {n: [(10, 8, 20 + i, 20)] for i, n in enumerate(names)})
    made = []
    for workers in (1, 2):
        target = tmp_path / f"with{workers}" / "crops.zip"
        arguments = ("crop", folder, target, "--boxes", boxes, "--workers", workers)
        assert run_bioscan(*arguments)[0] == 0
        made.append(digests(target, target.with_name("crops.boxes.parquet")))
    assert made[0] == made[1]


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="kills a group of processes")
def test_a_killed_job_ends_as_if_it_had_not_been(run_bioscan: RunBioscan, tmp_path: Path) -> None:
    names = [f"{number:02d}.jpg" for number in range(64)]
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(1).integers(0, 255, (900, 1200, 3), np.uint8)
    Image.fromarray(noise).save(folder / names[0], quality=90)
    for name in names[1:]:
        os.link(folder / names[0], folder / name)
    boxes = table(
        tmp_path / "b.csv",
        {n: [(100 + i, 80, 900, 700)] for i, n in enumerate(names)},
        width=1200,
        height=900,
    )
    whole, target = (tmp_path / run / "crops.zip" for run in ("whole", "killed"))
    arguments = ["--boxes", str(boxes), "--workers", "1"]
    assert run_bioscan("crop", folder, whole, *arguments)[0] == 0
    command = [sys.executable, "-m", "bioscan", "crop", str(folder), str(target), *arguments]
    with subprocess.Popen(command, start_new_session=True) as process:
        work = target.with_name(".crops.zip.unfinished")
        deadline = time.monotonic() + 40
        while not list(work.glob("shards/*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    status, out, err = run_bioscan("crop", folder, target, *arguments, "--json")
    assert (status, err) == (0, "")
    assert 1 <= json.loads(out)["resumed_shards"] <= 3  # of 4
    table_name = "crops.boxes.parquet"
    assert digests(target, target.with_name(table_name)) == digests(whole, whole.with_name(table_name))
    assert not work.exists()


def test_boxes_alone_are_resumed_too(tmp_path: Path) -> None:
    names = [f"{number:02d}.jpg" for number in range(40)]
    folder = photographs(tmp_path / "photos", names)
    boxes = table(tmp_path / "b.parquet", {n: [(10, 8, 20 + i, 20)] for i, n in enumerate(names)})
    made = tmp_path / "made" / "boxes.csv"

    def interrupt(done: int, total: int | None = None) -> None:
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crop(folder, None, boxes=boxes, boxes_out=made, workers=1, progress=interrupt)
    assert not made.exists()
    assert crop(folder, None, boxes=boxes, boxes_out=made, workers=1).resumed == 1
    assert_frame_equal(read_boxes(made), read_boxes(boxes))
    assert [p.name for p in made.parent.iterdir()] == ["boxes.csv"]


# -- detectors


def test_given_boxes_need_neither_torch_nor_opencv(three: tuple[Path, Path], tmp_path: Path) -> None:
    script = (
        "import sys; from bioscan.app.cli import run; "
        f"run(['crop', {str(three[0])!r}, {str(tmp_path / 'crops')!r}, '--boxes', {str(three[1])!r}, "
        "'--workers', '1']); "
        "print([m for m in ('torch', 'cv2', 'ray', 'matplotlib') if m in sys.modules])"
    )
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert made.stdout.splitlines()[-1] == "[]"


def test_artificial_wells_are_cropped_and_judged_in_three_commands(
    run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    synthesize(tmp_path / "made", SynthesisSettings(specimens=24, seed=3, imbalance=0.0))
    package = tmp_path / "made" / "bioscan" / "images" / "original_256"
    arguments = ("crop", package, tmp_path / "crops.hdf5", "--workers", 1, "--sheet", tmp_path / "d.png")
    status, out, err = run_bioscan(*arguments)
    assert (status, err) == (0, "")
    truth = tmp_path / "made" / "truth" / "boxes.coco.json"
    status, out, _ = run_bioscan("evaluate-crops", tmp_path / "crops.boxes.parquet", truth, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["counts"]["not_in_truth"] == 0
    assert found["counts"]["not_predicted"] == found["empty"]  # the control wells are another folder
    assert found["measures"]["mean_iou"]["value"] > 0.7
    boxes = read_boxes(tmp_path / "crops.boxes.parquet").filter(pl.col("kind") != "none")
    assert boxes["length_px"].null_count() == boxes.filter(pl.col("number") > 0).height
    assert boxes.filter(pl.col("number") == 0).select((pl.col("area_px") > 0).all()).item()


def test_real_photographs_are_cropped_around_the_insect(
    shared: Path, run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    source = shared / "data" / "bioscan1m_orders" / "original_full"
    folder = tmp_path / "photos"
    folder.mkdir()
    names = ("Coleoptera.jpg", "Diptera.jpg", "Lepidoptera.jpg")
    for name in names:
        (folder / name).symlink_to(source / name)
    arguments = ("crop", folder, tmp_path / "crops", "--workers", 1, "--margin", "square")
    status, _, err = run_bioscan(*arguments)
    assert (status, err) == (0, "")
    boxes = read_boxes(tmp_path / "crops.boxes.parquet").filter(pl.col("number") == 0)
    assert boxes.select("image_file", "width", "height").rows() == [(name, 2880, 2160) for name in names]
    for row in boxes.to_dicts():
        longer = max(row["x1"] - row["x0"], row["y1"] - row["y0"])
        assert longer / 1.6 < row["length_px"] < 1.6 * longer
        with Image.open(tmp_path / "crops" / row["image_file"]) as made:
            assert made.width == made.height == pytest.approx(1.4 * longer, abs=2)


def save_detector(folder: Path, *, seed: int) -> None:
    """A detector of random weights, which says one insect of every picture."""
    torch = pytest.importorskip("torch")
    from bioscan.learn import detector_folder, detector_models

    torch.manual_seed(seed)
    network, config = detector_models.create("dense", None)
    detector_folder.save(
        folder,
        network.state_dict(),
        architecture="dense",
        config=config,
        spec=detector_models.input_of("dense", 96),
        none_below=0.0,
        many_from=None,
        record={},
        history=[],
        overwrite=True,
    )


def test_a_job_is_not_taken_up_with_another_detector_in_the_same_run_folder(
    three: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def stop(made: object) -> None:
        raise KeyboardInterrupt

    save_detector(run / "model", seed=3)
    with pytest.raises(KeyboardInterrupt):
        crop(three[0], tmp_path / "crops", detector=str(run), device="cpu", finish=stop)
    save_detector(run / "model", seed=4)
    with pytest.raises(RequestError, match="crops exists"):  # put there by the other one
        crop(three[0], tmp_path / "crops", detector=str(run), device="cpu")
    save_detector(run / "model", seed=3)
    made = crop(three[0], tmp_path / "crops", detector=str(run), device="cpu")
    assert (made.crops, made.resumed) == (3, 1)


def test_a_learned_detector_is_used_by_its_folder(three: tuple[Path, Path], tmp_path: Path) -> None:
    from bioscan.learn.detection import load_detector

    save_detector(tmp_path / "detector", seed=3)
    made = crop(three[0], tmp_path / "crops", detector=str(tmp_path / "detector"), device="cpu")
    detector = load_detector(tmp_path / "detector", device="cpu")
    for name in ("a.png", "b.png"):
        with Image.open(three[0] / name) as photo:
            (finding,) = detector([np.array(photo.convert("RGB"))])
        rows = made.boxes.filter(pl.col("image_file") == name)
        assert rows["kind"].unique().to_list() == [finding.kind]
        np.testing.assert_allclose(rows.select(XYXY).to_numpy(), finding.boxes, rtol=0, atol=1e-3)
    sure = crop(three[0], None, detector=str(tmp_path / "detector"), device="cpu", threshold=1.0)
    assert sure.to_dict()["kinds"] == {"one": 0, "none": 3, "many": 0}


def test_settings_are_those_of_the_papers_program_by_default() -> None:
    made = CropSettings()
    assert (made.margin, made.ratio, made.equal_extend, made.fill) == ("paper", 1.4, True, "240")
