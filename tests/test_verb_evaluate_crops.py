"""`bioscan evaluate-crops` as a user meets it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from bioscan.data.boxes import read_boxes, write_boxes
from bioscan.jobs.evaluate_crops import evaluate_crops

RunBioscan = Callable[..., tuple[int, str, str]]

TRUTH = {
    "images": [
        {"id": n, "file_name": f"folder/{name}.jpg", "width": 100, "height": 80}
        for n, name in enumerate("abcd", 1)
    ],
    "annotations": [
        {"id": n, "image_id": n, "category_id": 0, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
        for n in (1, 2, 3)
    ],
    "categories": [{"id": 0, "name": "insect"}],
}
BOXES = """image_file,kind,x0,y0,x1,y1,score
a.jpg,one,10,10,30,30,0.9
b.jpg,many,10,10,20,30,0.8
b.jpg,many,60,60,70,70,0.3
d.jpg,one,1,1,9,9,0.4
z.jpg,none,,,,,
"""
GROUPS = "image_file\tquality\na.jpg\tvalid\nb.jpg\tblurry\nd.jpg\tblurry\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    boxes, truth = tmp_path / "boxes.csv", tmp_path / "truth.json"
    boxes.write_text(BOXES, encoding="utf-8")
    truth.write_text(json.dumps(TRUTH), encoding="utf-8")
    return boxes, truth


def test_every_measure_is_shown_with_its_meaning_and_what_was_left_out(
    files: tuple[Path, Path], run_bioscan: RunBioscan
) -> None:
    status, out, err = run_bioscan("evaluate-crops", *files)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[:4] == [
        "4 pictures, 1 of them empty; 3 true and 3 predicted boxes, one box a picture",
        "1 pictures of the truth that the boxes do not mention: counted as without a box",
        "1 pictures with boxes that the truth does not mention: left out",
        "1 pictures said to hold several specimens; the best-scored box counts",
    ]
    rows = {line.split()[0]: line for line in lines[6:]}
    # by score: right, right at .5, wrong; of three truths. At .5 precision is 1 up to recall 2/3 (67 recalls
    # of 101), at .55 and above up to 1/3 (34)
    assert rows["ap"].startswith(f"ap          {(67 + 9 * 34) / 1010:.4f} ")
    assert rows["ap_50"].startswith(f"ap_50       {67 / 101:.4f} ")
    assert rows["mean_iou"].startswith("mean_iou    0.5000 ")
    assert rows["false_none"].split()[1] == "0.3333"
    assert rows["false_box"].split()[1] == "1.0000"
    assert rows["false_box"].endswith("empty pictures with a box")


def test_pictures_not_mentioned_can_be_left_out(files: tuple[Path, Path], run_bioscan: RunBioscan) -> None:
    status, out, _ = run_bioscan("evaluate-crops", *files, "--common", "--json")
    made = json.loads(out)
    assert status == 0
    assert made["schema_version"] == 1
    assert (made["pictures"], made["empty"], made["true_boxes"]) == (3, 1, 2)
    assert made["counts"] == {
        "left_out": 1,
        "not_in_truth": 1,
        "many": 1,
        "unscored": 0,
        "ungrouped": 0,
    }
    assert made["measures"]["mean_iou"]["value"] == 0.75
    assert made["measures"]["false_none"] == {
        "value": 0.0,
        "low": 0.0,
        "high": pytest.approx(0.6576, abs=1e-4),  # Wilson, 0 of 2: z² / (2 + z²)
        "n": 2,
    }


def test_groups_are_scored_each_on_its_own(
    files: tuple[Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    groups = tmp_path / "quality.tsv"
    groups.write_text(GROUPS, encoding="utf-8")
    status, out, _ = run_bioscan("evaluate-crops", *files, "--groups", groups, "--by", "quality")
    lines = out.splitlines()
    assert status == 0
    assert "1 pictures without a group: in none of them" in lines
    header, *rows = [line.split() for line in lines[-3:]]
    assert header[:4] == ["quality", "pictures", "empty", "ap"]
    assert [row[:3] for row in rows] == [["blurry", "2", "1"], ["valid", "1", "0"]]
    shown = dict(zip(header, rows[1], strict=True))
    assert (shown["ap"], shown["mean_iou"], shown["false_box"]) == ("1.0000", "1.0000", "–")


def test_a_group_is_scored_as_if_there_were_no_other_pictures(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    groups = tmp_path / "quality.tsv"
    groups.write_text(GROUPS, encoding="utf-8")
    found = evaluate_crops(*files, groups=groups, by="quality").groups["blurry"]
    content = json.loads(files[1].read_text(encoding="utf-8"))
    content["images"] = [i for i in content["images"] if i["id"] in (2, 4)]
    content["annotations"] = [a for a in content["annotations"] if a["id"] == 2]
    files[1].write_text(json.dumps(content), encoding="utf-8")
    assert found.measures == evaluate_crops(*files).overall.measures


def test_a_result_list_takes_its_names_from_the_truth(
    files: tuple[Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    results = tmp_path / "results.json"
    entries = [{"image_id": 2, "category_id": 0, "bbox": [10, 10, 20, 20], "score": 0.5}]
    results.write_text(json.dumps(entries), encoding="utf-8")
    status, out, err = run_bioscan("evaluate-crops", results, files[1], "--json")
    assert (status, err) == (0, "")
    measures = json.loads(out)["measures"]
    assert measures["ar"]["value"] == pytest.approx(1 / 3)
    assert measures["false_none"]["value"] == pytest.approx(2 / 3)
    assert measures["false_box"]["value"] == 0


def test_boxes_without_a_score_count_as_the_surest_and_are_told(
    files: tuple[Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    boxes = tmp_path / "unscored.csv"
    boxes.write_text(BOXES.replace("30,0.9", "30,").replace("9,0.4", "9,0.95"), encoding="utf-8")
    status, out, _ = run_bioscan("evaluate-crops", boxes, files[1])
    assert status == 0
    assert "1 boxes without a score: as if of score 1, in their order" in out.splitlines()
    # right (1), wrong (.95), right at .5 (.8): precision at .5 is 1 to recall 1/3, then 2/3 to recall 2/3
    ap_50 = next(line for line in out.splitlines() if line.startswith("ap_50 "))
    assert ap_50.split()[1] == f"{(34 + 33 * 2 / 3) / 101:.4f}"


def test_output_files_hold_the_evaluation_and_each_picture(
    files: tuple[Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    wanted = ("-o", tmp_path / "e.json", "--csv", tmp_path / "e.csv")
    status, out, _ = run_bioscan("evaluate-crops", *files, *wanted, "--json")
    assert status == 0
    assert (tmp_path / "e.json").read_text(encoding="utf-8") == out
    rows = pl.read_csv(tmp_path / "e.csv")
    assert rows.select("image_file", "kind", "predicted", "iou").rows() == [
        ("folder/a.jpg", "one", "one", 1.0),
        ("folder/b.jpg", "one", "many", 0.5),
        ("folder/c.jpg", "one", None, 0.0),
        ("folder/d.jpg", "none", "one", None),
    ]
    status, _, err = run_bioscan("evaluate-crops", *files, *wanted)
    assert status == 2
    assert "exists" in err


def test_the_sheet_shows_the_worst_with_both_boxes(
    files: tuple[Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for name in "abcd":
        Image.new("RGB", (100, 80), "white").save(tmp_path / "photos" / f"{name}.jpg")
    sheet = tmp_path / "worst.png"
    wanted = ("--sheet", sheet, "--images", tmp_path / "photos", "--worst", 1)
    assert run_bioscan("evaluate-crops", *files, *wanted)[0] == 0
    blue = (0, 120, 210)  # the worst is c, which has only a true box
    with Image.open(sheet) as image:
        colours = {colour for _, colour in image.getcolors(1 << 20) or []}
        assert blue in colours
        assert (230, 60, 20) not in colours
    assert run_bioscan("evaluate-crops", *files, *wanted[:-1], 4, "--overwrite")[0] == 0
    with Image.open(sheet) as image:
        colours = {colour for _, colour in image.getcolors(1 << 20) or []}
        assert {blue, (230, 60, 20)} <= colours


def test_what_cannot_be_done_is_told_in_a_line(
    files: tuple[Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    other = tmp_path / "other.csv"
    other.write_text("image_file,x0,y0,x1,y1\nq.jpg,1,1,2,2\n", encoding="utf-8")
    groups = tmp_path / "quality.tsv"
    groups.write_text(GROUPS, encoding="utf-8")
    for arguments, said in (
        ([other, files[1]], "no picture of the boxes is in the truth: their image_file is like 'q.jpg', "),
        ([*files, "--max-boxes", 0], "max_boxes is 0; it must be at least 1"),
        ([*files, "--by", "quality"], "groups take two things: a table, and which column of it"),
        ([*files, "--groups", groups, "--by", "qualty"], "no column 'qualty'; did you mean 'quality'?"),
        ([*files, "--sheet", tmp_path / "s.png"], "--sheet and --images go together"),
        ([*files, "--worst", 0], "--worst is 0; 1 or more is needed"),
        ([tmp_path / "none.csv", files[1]], "no such file of boxes"),
    ):
        status, out, err = run_bioscan("evaluate-crops", *arguments)
        assert (status, out) == (2, "")
        assert err.startswith("bioscan evaluate-crops: ")
        assert said in err
        assert err.count("\n") == 1


def test_real_annotations_against_themselves_are_perfect(
    shared: Path, run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    folder = shared / "data" / "bioscan_crop"
    truth = folder / "annotations_coco.json"
    write_boxes(read_boxes(truth), tmp_path / "boxes.parquet")
    wanted = ("--groups", folder / "quality.tsv", "--by", "quality", "--json")
    status, out, _ = run_bioscan("evaluate-crops", tmp_path / "boxes.parquet", truth, *wanted)
    made = json.loads(out)
    assert status == 0
    assert (made["pictures"], made["empty"], made["true_boxes"]) == (649, 198, 451)
    assert [made["measures"][n]["value"] for n in ("ap", "ar", "mean_iou", "false_none", "false_box")] == [
        1,
        1,
        1,
        0,
        0,
    ]
    sizes = {name: (group["pictures"], group["empty"]) for name, group in made["groups"].items()}
    assert sizes == {
        "blurry": (49, 0),
        "empty": (188, 186),
        "fragmented": (40, 12),
        "unassigned": (42, 0),
        "valid": (330, 0),
    }


def test_neither_torch_nor_pictures_are_loaded_for_numbers(files: tuple[Path, Path]) -> None:
    script = (
        "import sys; from bioscan.app.cli import run; "
        f"run(['evaluate-crops', {str(files[0])!r}, {str(files[1])!r}]); "
        "print([m for m in ('torch', 'PIL', 'cv2', 'matplotlib') if m in sys.modules])"
    )
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert made.stdout.splitlines()[-1] == "[]"
