"""`bioscan train-detector`: from boxes and photographs to a detector, and what it refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bioscan.learn.detector_settings import DetectorSettings

Run = Callable[..., tuple[int, str, str]]
QUICK = ("--image-size", 32, "--epochs", 2, "--batch-size", 4, "--threads", 1, "--device", "cpu")


def _set(
    folder: Path, *, count: int = 12, size: tuple[int, int] = (64, 48), empty: int = 3, seed: int = 0
) -> Path:
    """A folder of grey pictures with a dark rectangle each, the last ones without, and boxes.json (COCO)."""
    generator = np.random.default_rng(seed)
    (folder / "photos").mkdir(parents=True)
    images, annotations = [], []
    for number in range(count):
        name = f"well{seed}-{number}.png"
        pixels = generator.normal(200, 5, (size[1], size[0], 3)).clip(0, 255).astype(np.uint8)
        images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        if number < count - empty:
            x, y = int(generator.integers(4, 30)), int(generator.integers(4, 20))
            pixels[y : y + 20, x : x + 24] = 30
            box = {"bbox": [x, y, 24, 20], "area": 480, "iscrowd": 0, "category_id": 1}
            annotations.append({"id": number + 1, "image_id": number, **box})
        Image.fromarray(pixels).save(folder / "photos" / name)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "insect"}],
        "licenses": [{"id": 1, "name": "CC BY 4.0"}],
    }
    boxes = folder / "boxes.json"
    boxes.write_text(json.dumps(content))
    return boxes


def test_a_detector_is_trained_from_several_sets_and_told_about(run_bioscan: Run, tmp_path: Path) -> None:
    first, second = _set(tmp_path / "a"), _set(tmp_path / "b", count=6, empty=1, size=(56, 60), seed=1)
    arguments = (first, first.parent / "photos", second, second.parent / "photos")
    status, out, err = run_bioscan("train-detector", *arguments, "-o", tmp_path / "run", *QUICK, "--json")
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert told["sets"] == [  # a tenth of 9 and 3, and of 5 and 1, is kept out: 1, 0 and 0, 0
        {"boxes": "boxes.json", "pictures": 11, "empty": 3},
        {"boxes": "boxes.json", "pictures": 6, "empty": 1},
    ]
    assert (told["validation"], told["empty_validation"], told["failed"]) == (1, 0, [])
    assert {"model", "history.csv", "failed.csv", "record.json"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    info = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert (info["architecture"], info["image"]["size"], info["licences"]) == ("dense", 32, ["CC BY 4.0"])
    assert info["settings"]["epochs"] == 2
    assert "CC BY 4.0" in (tmp_path / "run" / "model" / "README.md").read_text()
    status, out, err = run_bioscan("train-detector", *arguments, "-o", tmp_path / "run", *QUICK)
    assert status == 2
    assert "holds a finished run" in err


def test_validation_pictures_are_taken_out_of_the_training_ones(run_bioscan: Run, tmp_path: Path) -> None:
    boxes = _set(tmp_path)
    known = json.loads(boxes.read_text())
    held = {**known, "images": known["images"][::3]}
    ids = {image["id"] for image in held["images"]}
    held["annotations"] = [a for a in known["annotations"] if a["image_id"] in ids]
    (tmp_path / "held.json").write_text(json.dumps(held))
    chosen = ("--validation", tmp_path / "held.json")
    status, out, _ = run_bioscan(
        "train-detector", boxes, tmp_path / "photos", "-o", tmp_path / "run", *QUICK, *chosen
    )
    assert status == 0
    assert "boxes.json: 8 training pictures, 2 empty" in out  # 12 - 4, of which 1 of the 3 empty ones
    assert "validation: 4 pictures, 1 empty" in out


def test_a_killed_run_resumes_to_the_same_detector_to_the_last_bit(
    run_bioscan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bioscan.learn import run_folder

    boxes = _set(tmp_path)
    arguments = ("train-detector", boxes, tmp_path / "photos", *QUICK)
    assert run_bioscan(*arguments, "-o", tmp_path / "whole", "--workers", 3)[0] == 0
    save = run_folder.save_epoch

    def killed(*given: Any) -> None:
        save(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save_epoch", killed)
        assert run_bioscan(*arguments, "-o", tmp_path / "cut")[0] == 130
    status, _, err = run_bioscan(*arguments, "-o", tmp_path / "cut")
    assert status == 2
    assert "stopped after 1 epochs; pass --resume" in err
    status, _, err = run_bioscan(*arguments, "-o", tmp_path / "cut", "--resume", "--lr", "0.1")
    assert status == 2
    assert "lr was None, is 0.1" in err
    assert run_bioscan(*arguments, "-o", tmp_path / "cut", "--resume", "--workers", 1)[0] == 0
    made = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert made[0] == made[1]


def test_training_goes_on_from_a_detector_and_only_of_its_kind(run_bioscan: Run, tmp_path: Path) -> None:
    boxes = _set(tmp_path)
    arguments = ("train-detector", boxes, tmp_path / "photos", *QUICK)
    assert run_bioscan(*arguments, "-o", tmp_path / "first")[0] == 0
    assert run_bioscan(*arguments, "-o", tmp_path / "second", "--weights", tmp_path / "first")[0] == 0
    other = ("--weights", tmp_path / "first", "--architecture", "detr")
    status, _, err = run_bioscan(*arguments, "-o", tmp_path / "third", *other)
    assert status == 2
    assert "is of architecture dense, not detr; pass --architecture dense" in err
    assert not (tmp_path / "third").exists()


def test_a_detr_of_transformers_is_fine_tuned_on_pictures_of_several_shapes(
    run_bioscan: Run, tmp_path: Path
) -> None:
    from bioscan.learn.compat import import_transformers
    from bioscan.learn.detection import load_detector

    transformers = import_transformers()
    backbone = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16]}
    config = transformers.DetrConfig.from_dict(
        {
            "backbone_config": {**backbone, "depths": [1, 1, 1, 1], "out_features": ["stage4"]},
            **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5},
            **{"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_labels": 91},
        }
    )
    transformers.DetrForObjectDetection(config).save_pretrained(tmp_path / "coco")
    first, second = _set(tmp_path / "a"), _set(tmp_path / "b", size=(56, 60), seed=1)
    status, out, err = run_bioscan(
        *("train-detector", first, tmp_path / "a" / "photos", second, tmp_path / "b" / "photos", *QUICK),
        *("-o", tmp_path / "run", "--architecture", "detr", "--weights", tmp_path / "coco"),
    )
    assert (status, err) == (0, "")
    assert "validation: 2 pictures, 0 empty" in out
    detector = load_detector(tmp_path / "run", device="cpu", threshold=0.0)
    pixels = np.asarray(Image.open(tmp_path / "a" / "photos" / "well0-0.png"))
    pixels.flags.writeable = False
    [found] = detector([pixels])
    assert found.kind in ("one", "many")
    assert found.boxes.shape[1] == 4


def test_missing_and_broken_pictures_are_listed_and_the_rest_is_used(
    run_bioscan: Run, tmp_path: Path
) -> None:
    boxes = _set(tmp_path)
    (tmp_path / "photos" / "well0-2.png").unlink()
    broken = tmp_path / "photos" / "well0-5.png"
    broken.write_bytes(broken.read_bytes()[:200])
    status, out, err = run_bioscan(
        "train-detector", boxes, tmp_path / "photos", "-o", tmp_path / "run", *QUICK
    )
    assert status == 1
    assert "2 pictures could not be used (first: well0-2.png: not in the package)" in err
    listed = (tmp_path / "run" / "failed.csv").read_text().splitlines()
    assert listed[:2] == ["image_file,error", "well0-2.png,not in the package"]
    assert listed[2].startswith("well0-5.png,")
    assert "detector:" in out


def _change(boxes: Path, **content: Any) -> None:
    boxes.write_text(json.dumps({**json.loads(boxes.read_text()), **content}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: _change(b, annotations=[]), "11 training pictures with 0 boxes: nothing to learn from"),
        (lambda b: b.write_text("{"), "boxes.json"),
        (lambda b: b.write_text('{"a": 1}'), "boxes.json"),
        (lambda b: b.unlink(), "no such file of boxes"),
        (
            lambda b: _change(
                b, annotations=[{"id": 1, "image_id": 0, "category_id": 1, "bbox": [50, 10, 20, 20]}]
            ),
            "leaves its picture of 64 x 48",
        ),
        (
            lambda b: _change(b, images=[{"id": i, "file_name": f"x{i}.png"} for i in range(12)]),
            "nothing to learn from (12 are not in the package, first: x0.png)",
        ),
    ],
)
def test_boxes_that_cannot_be_used_are_refused_with_the_reason(
    change: Callable[[Path], Any], message: str, run_bioscan: Run, tmp_path: Path
) -> None:
    boxes = _set(tmp_path)
    change(boxes)
    status, _, err = run_bioscan("train-detector", boxes, tmp_path / "photos", "-o", tmp_path / "run", *QUICK)
    assert status == 2
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("more.json",), "boxes and images come in pairs; more.json has no partner"),
        (("--validation-images", "photos"), "--validation-images goes with --validation"),
        (("--recipe", "papr"), "unknown recipe 'papr'; did you mean 'paper'"),
        (("--architecture", "yolo"), "yolo"),
        (("--validation-share", "0"), "no validation picture with a box"),
        (("--weights", "nowhere.ckpt", "--architecture", "detr"), "nowhere.ckpt: no such weights"),
        (("--image-size", "100"), "image_size is 100; for dense it must be a multiple of 32"),
        (("--batch-size", "1"), "batch_size is 1; it must be at least 2"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_written(
    arguments: tuple[str, ...], message: str, run_bioscan: Run, tmp_path: Path
) -> None:
    boxes = _set(tmp_path)
    status, _, err = run_bioscan(
        "train-detector", boxes, tmp_path / "photos", "-o", tmp_path / "run", *arguments
    )
    assert status == 2
    assert message in err.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_help_names_every_setting_and_imports_no_torch() -> None:
    code = (
        "import sys; from bioscan.app import cli; cli.run(['train-detector', '--help']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'timm', 'transformers', 'safetensors')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in DetectorSettings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in done.stdout, name
