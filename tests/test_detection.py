"""The learned detector: what it sees, what it says, its folder, and the checkpoint of the paper's tool."""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bioscan.data.images import Images
from bioscan.data.synthesis import SynthesisSettings, synthesize
from bioscan.errors import DataError, RequestError
from bioscan.learn import detection, detector_folder, detector_images, detector_models
from bioscan.learn.compat import import_transformers
from bioscan.learn.detector_dense import DenseDetector
from bioscan.learn.detector_images import DRAWS, InputSpec, Jitter
from bioscan.learn.detector_settings import RECIPES, DetectorSettings

Pixels = NDArray[np.uint8]

TINY_DETR: dict[str, Any] = {
    "backbone_config": {
        **detector_models.FAMILIES["detr"].defaults["backbone_config"],
        "backbone": "resnet18",
    },
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 48,
    "num_queries": 10,
}
_ENDS = {"d_model": 64, "encoder_hidden_dim": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
_SMALL: dict[str, Any] = {
    **_ENDS,
    "decoder_in_channels": [64, 64, 64],
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_queries": 30,
    "num_denoising": 20,
    "decoder_layers": 2,
}


def _tiny(architecture: str) -> dict[str, Any]:
    """A configuration of a family that a test can run."""
    defaults = detector_models.FAMILIES[architecture].defaults
    if architecture == "detr":
        return TINY_DETR
    if architecture == "rt-detr":
        backbone = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}
        channels = [24, 32, 48]
    else:
        out = [24, 48, 96, 192]
        backbone = {"stem_channels": [3, 8, 12], "stage_in_channels": [12, 24, 48, 96]}
        backbone |= {"stage_mid_channels": [8, 12, 24, 48], "stage_out_channels": out, "hidden_sizes": out}
        backbone |= {"stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2]}
        channels = out[1:]
    nested = {"backbone_config": {**defaults["backbone_config"], **backbone}, "encoder_in_channels": channels}
    return {**defaults, **_SMALL, **nested}


def _picture(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# -- what the network sees


def test_working_sizes_of_detr_are_those_of_transformers() -> None:
    import_transformers()
    from transformers.image_transforms import get_size_with_aspect_ratio

    spec = detector_models.input_of("detr")
    generator = np.random.default_rng(0)
    sizes = [(2160, 2880), (768, 1024), (256, 341), (341, 256), (800, 800), (100, 5000), (1, 1)]
    sizes += generator.integers(1, 4000, (500, 2)).tolist()
    wrong = [
        (height, width, spec.shape(height, width))
        for height, width in sizes
        if spec.shape(height, width) != get_size_with_aspect_ratio((height, width), 800, 1333)
        and max(height, width) < 30 * min(height, width)  # a sliver's other side would be 0 or too long there
    ]
    assert wrong == []


def test_pictures_are_seen_as_the_paper_saw_them_to_two_grey_levels() -> None:
    transformers = import_transformers()
    processor = transformers.DetrImageProcessorPil()
    smooth = np.linspace(0, 255, 300 * 400 * 3).reshape(300, 400, 3).astype(np.uint8)
    pixels = np.where(_picture(300, 400) > 200, _picture(300, 400, 1), smooth)
    theirs = processor(images=pixels, return_tensors="pt")["pixel_values"]
    spec = detector_models.input_of("detr")
    image = detector_images.prepare(pixels, spec)
    ours = detector_images.to_network(image[None], None, spec, torch.device("cpu"))
    assert ours.shape == theirs.shape == (1, 3, 800, 1066)
    assert (ours - theirs).abs().max() <= 2.01 / 255 / min(spec.std)


draws = st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=len(DRAWS), max_size=len(DRAWS))


@settings(max_examples=60, deadline=None)
@given(draws, st.sampled_from(["square", "shorter_side"]), st.integers(0, 50), st.integers(0, 70))
def test_a_painted_rectangle_stays_inside_its_box_whatever_the_jitter(
    draw: list[float], mode: str, top: int, left: int
) -> None:
    pixels = np.zeros((90, 120, 3), np.uint8)
    bottom, right = top + 36, left + 46
    pixels[top:bottom, left:right] = 255
    spec = InputSpec(mode=mode, size=160, longest=400)  # type: ignore[arg-type]
    jitter = Jitter(flip="both", turn=True, scale=1.6, shift=0.3, colour=0.0)
    boxes = np.array([[left, top, right, bottom]], np.float64)
    image, moved = detector_images.prepare_training(pixels, boxes, spec, jitter, np.array(draw, np.float32))
    seen = image[0].numpy() >= 128
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    height, width = seen.shape
    assert len(moved) == 1
    beyond = 1.0  # half a pixel of rounding on either side of the edge
    np.testing.assert_allclose(found, moved[0] * (width, height, width, height), atol=beyond)


def test_without_jitter_training_sees_what_prediction_sees() -> None:
    pixels, spec = _picture(40, 60), detector_models.input_of("dense", 64)
    still = Jitter(flip="none", turn=False, scale=1.0, shift=0.0, colour=0.0)
    middle = np.full(len(DRAWS), 0.5, np.float32)
    image, boxes = detector_images.prepare_training(pixels, np.array([[6.0, 4, 30, 20]]), spec, still, middle)
    assert torch.equal(image, detector_images.prepare(pixels, spec))
    assert boxes.tolist() == [[0.1, 0.1, 0.5, 0.5]]


def test_colour_jitter_is_brightness_contrast_saturation_and_tint_written_out() -> None:
    spec = detector_models.input_of("dense", 64)
    images = torch.from_numpy(_picture(8, 9)).permute(2, 0, 1)[None]
    draw = torch.full((1, len(DRAWS)), 0.5)
    for name, value in (("brightness", 0.9), ("contrast", 0.2), ("saturation", 0.8), ("red", 1.0)):
        draw[0, DRAWS.index(name)] = value
    made = detector_images.to_network(images, None, spec, torch.device("cpu"), colour=0.5, draws_BD=draw)
    pixels = images.numpy()[0].astype(np.float64) / 255
    mean = pixels.mean()
    pixels = mean * (1 + 0.5 * 0.8) + (pixels - mean) * (1 + 0.5 * -0.6)
    grey = pixels.mean(0, keepdims=True)
    pixels = grey + (pixels - grey) * (1 + 0.5 * 0.6)
    pixels[0] *= 1 + 0.5 / 4
    wanted = (pixels - np.array(spec.mean)[:, None, None]) / np.array(spec.std)[:, None, None]
    np.testing.assert_allclose(made[0].numpy(), wanted, atol=1e-5)


def test_padding_is_masked_and_zero_after_normalising() -> None:
    images, mask = detector_images.pad([torch.full((3, 4, 6), 9, dtype=torch.uint8), torch.ones((3, 5, 2))])
    assert mask is not None
    assert mask.sum(dim=(1, 2)).tolist() == [24, 10]
    made = detector_images.to_network(images, mask, detector_models.input_of("detr"), torch.device("cpu"))
    assert not made.permute(0, 2, 3, 1)[~mask].any()
    assert made.permute(0, 2, 3, 1)[mask].all()


def test_an_epoch_draws_each_set_by_its_size_to_the_power_balance() -> None:
    def drawn(balance: float) -> list[int]:
        order = detector_images.epoch_order([900, 100, 0], balance=balance, seed=1, epoch=0)
        assert order.size == 1000
        return [int((order < 900).sum()), int((order >= 900).sum())]

    assert drawn(1.0) == [900, 100]
    assert drawn(0.5) == [750, 250]  # 30 : 10
    assert drawn(0.0) == [500, 500]
    whole = detector_images.epoch_order([900, 100], balance=1.0, seed=1, epoch=0)
    assert sorted(whole.tolist()) == list(range(1000))
    assert not np.array_equal(whole, detector_images.epoch_order([900, 100], balance=1.0, seed=1, epoch=1))


# -- what it says


def test_boxes_of_one_specimen_become_one_and_a_part_of_it_is_none() -> None:
    boxes = np.array(
        [[0, 0, 10, 10], [1, 0, 11, 10], [2, 2, 5, 5], [20, 20, 30, 30], [9, 9, 19, 19], [5, 5, 5, 9.0]]
    )
    kept, scores = detection.distinct(boxes, np.array([0.9, 0.8, 0.7, 0.6, 0.95, 0.99]))
    assert scores.tolist() == [0.95, 0.9, 0.6]  # the second overlaps the first, the third lies in it
    assert kept.tolist() == [[9, 9, 19, 19], [0, 0, 10, 10], [20, 20, 30, 30]]


def test_kind_follows_from_the_two_thresholds() -> None:
    boxes, scores = np.arange(12.0).reshape(3, 4), np.array([0.8, 0.6, 0.1])

    def told(none_below: float, many_from: float | None) -> tuple[str, int]:
        made = detection.finding(boxes, scores, none_below, many_from)
        assert len(made.boxes) == len(made.scores)
        return made.kind, len(made.boxes)

    assert told(0.5, None) == ("one", 1)
    assert told(0.81, None) == ("none", 0)
    assert told(0.8, 0.6) == ("many", 2)
    assert told(0.5, 0.61) == ("one", 1)
    assert told(0.0, 0.05) == ("many", 3)
    assert detection.finding(boxes[:0], scores[:0], 0.0, None).kind == "none"


def test_thresholds_split_empty_from_one_and_one_from_many() -> None:
    def found(*scores: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return np.zeros((len(scores), 4)), np.array(scores)

    pictures = [found(0.2), found(0.1), found(0.8, 0.3), found(0.7, 0.1), found(0.9, 0.5)]
    none_below, many_from = detection.thresholds(pictures, np.array([0, 0, 1, 1, 2]))
    assert none_below == pytest.approx(0.45)  # in the middle between 0.2 and 0.7
    assert many_from == pytest.approx(0.45)  # between 0.3 and 0.5 is 0.4, but not below the other
    # without examples of the other kinds: 1 % of the hundred single ones on either side
    single = [found(0.5 + i / 1000, i / 1000) for i in range(100)]
    none_below, many_from = detection.thresholds(single, np.ones(100, np.int64))
    assert none_below == pytest.approx(0.5)
    assert many_from == pytest.approx(0.5)  # raised to the other
    assert detection.thresholds([], np.zeros(0, np.int64)) == (0.0, None)


@pytest.mark.parametrize("architecture", ["dense", "detr", "rt-detr"])
def test_a_batch_of_different_sizes_equals_one_by_one(architecture: str) -> None:
    torch.manual_seed(1)
    network, _ = detector_models.create(
        architecture, None if architecture == "dense" else _tiny(architecture)
    )
    spec = detector_models.input_of(architecture, 64)
    pictures = [_picture(60, 80, i) for i in range(3)] + [
        _picture(80, 60),
        _picture(60, 80, 9),
        _picture(9, 90),
    ]
    options: dict[str, Any] = {"device": torch.device("cpu"), "precision": None}
    network.eval()
    together = detection.raw_boxes(network, pictures, spec, batch_size=3, **options)
    for picture, (boxes, scores) in zip(pictures, together, strict=True):
        [(alone, score)] = detection.raw_boxes(network, [picture], spec, batch_size=1, **options)
        np.testing.assert_allclose(scores[:1], score[:1], atol=1e-4)
        if architecture != "detr":  # untrained queries are nearly equal, any may come first
            np.testing.assert_allclose(boxes[:1], alone[:1], atol=1e-2)


def test_boxes_come_back_in_pixels_of_the_picture() -> None:
    """A network whose best cell is made to say what box it saw: its input's left upper quarter."""
    network = DenseDetector()
    torch.nn.init.zeros_(network.score[1].weight)  # type: ignore[arg-type]
    torch.nn.init.zeros_(network.edges[1].weight)  # type: ignore[arg-type]
    with torch.no_grad():
        network.edges[1].bias.copy_(torch.tensor([4.0, 4, 12, 12]).div(8).log())  # type: ignore[operator]
    spec = detector_models.input_of("dense", 64)
    options: dict[str, Any] = {"device": torch.device("cpu"), "precision": None, "batch_size": 2}
    found = detection.raw_boxes(network.eval(), [_picture(96, 128), _picture(200, 100)], spec, **options)
    # equal scores: the first cell, centre (4, 4) of 64: from 0 to 16, a quarter of each side
    assert found[0][0][0].tolist() == pytest.approx([0, 0, 32, 24])
    assert found[1][0][0].tolist() == pytest.approx([0, 0, 25, 50])


# -- training


@pytest.fixture(scope="module")
def wells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 14 artificial wells, one of them empty, and truth/boxes.coco.json."""
    folder = tmp_path_factory.mktemp("detector") / "wells"
    synthesize(folder, SynthesisSettings(specimens=13, seed=4, imbalance=0.0))
    return folder


@pytest.mark.parametrize("architecture", ["dense", "detr", "rt-detr", "d-fine"])
def test_every_architecture_learns_from_pictures_with_and_without_boxes(architecture: str) -> None:
    torch.manual_seed(0)
    network, _ = detector_models.create(
        architecture, None if architecture == "dense" else _tiny(architecture)
    )
    network.train()
    images = torch.randn(3, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    boxes = [torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.6, 0.6, 0.9, 0.8]]), torch.zeros(0, 4), torch.zeros(0, 4)]
    for given_boxes in (boxes, boxes[1:] * 2):
        loss = network.loss(images[: len(given_boxes)], None, given_boxes[:3])
        loss.backward()  # type: ignore[no-untyped-call]
        assert torch.isfinite(loss)
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(gradients) > 10
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_dense_detector_overfits_a_dozen_wells(wells: Path, tmp_path: Path) -> None:
    from bioscan.jobs.train_detector import train_detector

    boxes = wells / "truth" / "boxes.coco.json"
    chosen = DetectorSettings(
        image_size=64, epochs=8, batch_size=7, validation_share=0.0, criterion="last", amp="off", threads=1
    )
    still = {
        "scale": 1.0,
        "shift": 0.0,
        "flip": "none",
        "turn": False,
        "colour": 0.0,
        "warmup": 10,
        "ema": 0.9,
    }
    made = train_detector(
        [(boxes, wells)] * 5, tmp_path / "run", DetectorSettings(**{**vars(chosen), **still})
    )
    assert made["sets"] == [{"boxes": "boxes.coco.json", "pictures": 14, "empty": 1}] * 5
    known = json.loads(boxes.read_text())
    images = Images(wells, save_index=False)
    from bioscan.data.decode import read_rgb
    from bioscan.learn.detector_training import scores

    boxed = {a["image_id"]: a["bbox"] for a in known["annotations"]}
    rows = images.find([Path(image["file_name"]).name for image in known["images"]])
    truths = [np.array([boxed[i["id"]]] if i["id"] in boxed else []).reshape(-1, 4) for i in known["images"]]
    truths = [np.hstack([box[:, :2], box[:, :2] + box[:, 2:]]) for box in truths]
    detector = detection.load_detector(tmp_path / "run", device="cpu", threshold=0.0)
    found = detector([read_rgb(images, int(row)) for row in rows])
    score = scores([(finding.boxes, finding.scores) for finding in found], truths)
    assert score["ap_50"] > 0.9, score
    best = [finding.scores[0] for finding in found]
    empty = [not len(truth) for truth in truths]
    assert max(s for s, e in zip(best, empty, strict=True) if e) < min(
        s for s, e in zip(best, empty, strict=True) if not e
    )


# -- the folder


def _saved(folder: Path, architecture: str = "dense") -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(3)
    network, config = detector_models.create(
        architecture, None if architecture == "dense" else _tiny(architecture)
    )
    detector_folder.save(
        folder,
        network.state_dict(),
        architecture=architecture,
        config=config,
        spec=detector_models.input_of(architecture, 96),
        none_below=0.0,
        many_from=0.9,
        record={"licences": ["CC0"], "validation": {"ap": 0.5}},
        history=[{"epoch": 1}],
    )
    return network.eval(), config


def test_a_folder_gives_equal_boxes_in_a_fresh_process_without_network(tmp_path: Path) -> None:
    pixels = _picture(60, 80)
    np.save(tmp_path / "pixels.npy", pixels)
    here = {}
    for architecture in ("dense", "d-fine"):
        _saved(tmp_path / architecture, architecture)
        assert {p.name for p in (tmp_path / architecture).iterdir()} == {
            *("model.safetensors", "model.json", "README.md", "history.csv")
        }
        [here[architecture]] = detection.load_detector(tmp_path / architecture, device="cpu")([pixels])
    code = """
import json, socket, sys
import numpy as np
def refuse(*_, **__): raise OSError("no network")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from bioscan.learn.detection import load_detector
made = {}
for name in ("dense", "d-fine"):
    [found] = load_detector(f"{sys.argv[1]}/{name}", device="cpu")([np.load(sys.argv[1] + "/pixels.npy")])
    made[name] = [found.kind, found.boxes.tolist(), found.scores.tolist()]
print(json.dumps(made))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    for architecture, (kind, boxes, scores) in json.loads(done.stdout).items():
        assert kind == here[architecture].kind
        np.testing.assert_allclose(boxes, here[architecture].boxes, atol=1e-3)
        np.testing.assert_allclose(scores, here[architecture].scores, atol=1e-6)


def test_a_folder_that_was_altered_is_refused(tmp_path: Path) -> None:
    _saved(tmp_path / "detector")
    text = (tmp_path / "detector" / "model.json").read_text()

    def refused(changed: str, message: str, kind: type[Exception] = DataError) -> None:
        (tmp_path / "detector" / "model.json").write_text(changed)
        with pytest.raises(kind, match=message):
            detection.load_detector(tmp_path / "detector")

    refused(text.replace('"many_from": 0.9', '"many_from": 0.1'), "altered after training")
    refused(text.replace('"schema_version": 1', '"schema_version": 99'), "newer bioscan")
    refused(text.replace('"kind": "detector"', '"kind": "x"'), "of no detector", RequestError)
    refused("[]", "cannot be read")
    refused("{", "cannot be read")
    (tmp_path / "detector" / "model.json").write_text(text)
    weights = bytearray((tmp_path / "detector" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "detector" / "model.safetensors").write_bytes(weights)
    with pytest.raises(DataError, match=r"not the weights that model\.json names"):
        detection.load_detector(tmp_path / "detector")


def test_what_is_no_detector_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no detector folder, model\.json is missing"):
        detection.load_detector(tmp_path)
    with pytest.raises(RequestError, match="from 0 to 1"):
        detection.load_detector(tmp_path, threshold=2)
    with pytest.raises(RequestError, match="at least 1"):
        detection.load_detector(tmp_path, batch_size=0)
    (tmp_path / "notes.ckpt").write_text("hello")
    with pytest.raises(DataError, match="cannot be read as a checkpoint"):
        detection.load_detector(tmp_path / "notes.ckpt")
    torch.save({"state_dict": {"model.fc.weight": torch.zeros(2, 2)}}, tmp_path / "other.ckpt")
    with pytest.raises(DataError, match="no ResNet"):
        detection.load_detector(tmp_path / "other.ckpt")


# -- the paper's checkpoint


class Detr(torch.nn.Module):
    """As the paper's LightningModule holds its network."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model


def _lightning(path: Path, weights: Mapping[str, Any], settings: object) -> None:
    """A checkpoint with the keys that Lightning's Trainer writes."""
    content = {
        "epoch": 3,
        "global_step": 6000,
        "pytorch-lightning_version": "1.9.5",
        "state_dict": dict(weights),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4, "completed": 3}}}},
        "callbacks": {"ModelCheckpoint": {"monitor": None, "best_model_score": torch.tensor(0.1)}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": settings,
    }
    torch.save(content, path)


@pytest.fixture(scope="module")
def detr(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A small DETR of transformers, its weights in the names of transformers 4, and in those in memory."""
    transformers = import_transformers()
    torch.manual_seed(5)
    model = transformers.DetrForObjectDetection(detector_models.transformers_config("detr", TINY_DETR)).eval()
    for parameter in model.parameters():  # so that queries differ, and no weight is 0 or 1
        parameter.data += 0.05 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("detr")
    model.save_pretrained(folder)
    from safetensors.torch import load_file

    return model, load_file(folder / "model.safetensors"), dict(Detr(model).state_dict())


class AttributeDict(dict[str, Any]):
    """Stands where Lightning's own class does."""


def _paper_box(model: Any, pixels: Pixels) -> tuple[list[float], float]:
    """The paper's choice, written anew from its description: no mask, softmax, the best foreground query."""
    spec = detector_models.input_of("detr")
    tensor = detector_images.to_network(
        detector_images.prepare(pixels, spec)[None], None, spec, torch.device("cpu")
    )
    with torch.no_grad():
        made = model(pixel_values=tensor, pixel_mask=None)
    scores = torch.softmax(made.logits[0], dim=-1)[:, :-1]
    best = int(scores.max(dim=-1).values.argmax())
    x, y, w, h = made.pred_boxes[0, best].tolist()
    height, width = pixels.shape[:2]
    return [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height], float(
        scores[best, 0]
    )


def test_the_papers_checkpoint_gives_its_logits_and_its_box(
    detr: tuple[Any, dict[str, Any], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, of_version_4, of_version_5 = detr
    names = set(of_version_4)
    assert "model.backbone.conv_encoder.model.conv1.weight" in names
    assert "model.decoder.layers.0.fc1.weight" in names
    modules = types.ModuleType("pytorch_lightning.utilities.parsing")
    modules.AttributeDict = AttributeDict  # type: ignore[attr-defined]
    monkeypatch.setattr(AttributeDict, "__module__", modules.__name__)
    for name in ("pytorch_lightning", "pytorch_lightning.utilities"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, modules.__name__, modules)
    hyper = argparse.Namespace(lr=1e-4, out=pathlib.PosixPath("runs"))
    forms: dict[str, tuple[dict[str, Any], object]] = {
        "version 4, Lightning": ({f"model.{k}": v for k, v in of_version_4.items()}, AttributeDict(lr=1e-4)),
        "version 5, Lightning": (of_version_5, {"lr": 1e-4}),
        "version 4, bare, data parallel": ({f"module.{k}": v for k, v in of_version_4.items()}, hyper),
    }
    pixels = _picture(120, 160, 7)
    tensor = torch.randn(1, 3, 96, 128)
    box, score = _paper_box(model, pixels)
    for number, (weights, settings_) in enumerate(forms.values()):
        path = tmp_path / f"{number}.ckpt"
        _lightning(path, weights, settings_)
        loaded = detection.load_detector(path, device="cpu")
        with torch.no_grad():
            ours, theirs = loaded.network.model(tensor), model(tensor)  # type: ignore[operator]
        assert torch.equal(ours.logits, theirs.logits)
        assert torch.equal(ours.pred_boxes, theirs.pred_boxes)
        [found] = loaded([pixels])
        assert found.kind == "one"
        assert found.scores[0] == pytest.approx(score, abs=1e-6)
        np.testing.assert_allclose(found.boxes[0], np.clip(box, 0, [160, 120] * 2), atol=1e-3)
    [none] = detection.load_detector(path, device="cpu", threshold=1.0)([pixels])
    assert none.kind == "none"


def test_a_checkpoint_that_holds_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'owned'}",)

    _lightning(tmp_path / "evil.ckpt", {"model.a": torch.zeros(1)}, Evil())
    with pytest.raises(DataError, match=r"holds more than weights \(\w+\.system\)"):
        detection.load_detector(tmp_path / "evil.ckpt")
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_of_other_classes_or_cut_short_is_refused(
    detr: tuple[Any, dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    _, weights, _ = detr
    many = {**weights, "class_labels_classifier.weight": torch.zeros(92, 32)}
    torch.save(many, tmp_path / "coco.ckpt")
    with pytest.raises(DataError, match="a DETR of 91 classes"):
        detection.load_detector(tmp_path / "coco.ckpt")
    del weights["bbox_predictor.layers.0.weight"]
    torch.save(weights, tmp_path / "cut.ckpt")
    with pytest.raises(DataError, match=r"1 of \d+ weights of detr are absent"):
        detection.load_detector(tmp_path / "cut.ckpt")


# -- where a run starts


def test_a_run_starts_from_a_folder_of_transformers_with_a_new_class_head(tmp_path: Path) -> None:
    transformers = import_transformers()
    config = transformers.DetrConfig.from_dict({**TINY_DETR, "num_labels": 91})
    model = transformers.DetrForObjectDetection(config)
    model.save_pretrained(tmp_path / "coco")
    chosen = DetectorSettings(architecture="detr", weights=str(tmp_path / "coco"), image_size=64)
    network, made, spec = detector_folder.start(chosen)
    assert spec.size == 64
    assert network.model.class_labels_classifier.weight.shape == (2, 32)  # type: ignore[union-attr]
    assert torch.equal(
        network.model.bbox_predictor.layers[0].weight,  # type: ignore[union-attr, index]
        model.bbox_predictor.layers[0].weight,
    )
    again, _ = detector_models.create("detr", json.loads(json.dumps(made)))
    again.load_state_dict(network.state_dict())
    weights = tmp_path / "coco" / "model.safetensors"
    from_file, _, _ = detector_folder.start(DetectorSettings(architecture="detr", weights=str(weights)))
    assert torch.equal(
        from_file.model.bbox_predictor.layers[0].weight,  # type: ignore[union-attr, index]
        model.bbox_predictor.layers[0].weight,
    )


def test_weights_of_another_architecture_or_from_nowhere_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _saved(tmp_path / "detector")
    transformers = import_transformers()
    transformers.DetrForObjectDetection(transformers.DetrConfig.from_dict(TINY_DETR)).save_pretrained(
        tmp_path / "detr"
    )

    def refused(message: str, **options: Any) -> None:
        with pytest.raises((RequestError, DataError), match=message):
            detector_folder.start(DetectorSettings(**options))

    refused("is of architecture dense", architecture="detr", weights=str(tmp_path / "detector"))
    refused("pass --architecture detr", architecture="d-fine", weights=str(tmp_path / "detr"))
    refused("cannot be fetched from the Hugging Face hub", architecture="detr", weights="hub")
    refused("no such weights", architecture="detr", weights="nothing there")
    refused("'tiny' of dense has none", weights="hub")
    refused("no such weights file", weights=str(tmp_path / "none.pth"), backbone="resnet18")
    refused("unknown backbone 'resnt18'; did you mean 'resnet18'", backbone="resnt18")
    refused("no maps of stride 8, 16 and 32", backbone="vit_tiny_patch16_224")


def test_recipes_are_settings() -> None:
    for recipe in RECIPES.values():
        DetectorSettings(**recipe)
    paper = DetectorSettings(**RECIPES["paper"])
    assert paper.rates == (1e-5, 1e-4)
    assert DetectorSettings().rates == (2e-3, 2e-3)
    assert DetectorSettings(architecture="d-fine", weights="hub").rates == (1e-5, 1e-4)
    for wrong in ({"scale": 0.5}, {"batch_size": 1}, {"lr": 0.0}, {"architecture": "detr", "backbone": "x"}):
        with pytest.raises(RequestError):
            DetectorSettings(**wrong)
