"""Backbones, the model folder, and torchvision beside a CPU torch."""

import importlib.metadata
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import BioscanError, RequestError
from bioscan.learn import compat, model_folder, models
from bioscan.learn.dataset import ImageSpec
from bioscan.learn.heads import CosineHead, features_of
from bioscan.learn.model_names import MODEL_NAMES

SPEC = ImageSpec(image_size=40, crop_size=32, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
TAXA = pl.DataFrame({"class": ["Insecta"] * 6, "order": ["Diptera"] * 3 + ["Coleoptera"] * 2 + ["Odonata"]})


def small(outputs: int = 3, **options: Any) -> torch.nn.Module:
    return models.create("test_resnet", outputs=outputs, crop_size=32, **options)


# -- torchvision


def test_where_torchvision_is_sound_nothing_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    compat.import_timm()
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setattr(compat, "_DECLARED", [])
    assert compat.import_timm.__wrapped__().__name__ == "timm"
    assert compat._DECLARED == []


def test_timm_and_torchvision_can_be_imported_here() -> None:
    timm = compat.import_timm()
    import torchvision

    assert timm.is_model("resnet50")
    assert torchvision.__version__.split("+")[0] == importlib.metadata.version("torchvision").split("+")[0]


def test_beside_a_cpu_build_of_torch_no_cuda_package_is_installed() -> None:
    """A lost pin of torch or torchvision brings gigabytes of them."""
    if torch.version.cuda is not None:
        pytest.skip("torch is a CUDA build here")
    names = {(d.metadata["Name"] or "").lower() for d in importlib.metadata.distributions()}
    assert {name for name in names if name.startswith("nvidia")} == set()


# -- backbones


@pytest.mark.parametrize(
    ("name", "crop_size", "message"),
    [
        ("resnt50", 32, "unknown model 'resnt50'; did you mean 'resnet50'\\? \\(any of timm's"),
        ("resnet50.tv_in2k", 32, r"tv_in2k.*resnet50 \(|Invalid pretrained tag.*resnet50.tv_in1k"),
        ("test_vit", 60, "test_vit cannot take images of 60 x 60 pixels"),
        ("inception_v3", 32, "inception_v3 cannot take images of 32 x 32 pixels"),
        ("alexnet", 32, "alexnet cannot take images of 32 x 32 pixels"),
        ("torchvision/vgg11", 64, r"unknown model 'torchvision/vgg11'; torchvision's here are alexnet, "),
        ("squeezenet1_O", 64, "unknown model 'squeezenet1_O'; did you mean 'squeezenet'"),
        ("vit_base_patch16_rope_mixed_224.none", 64, "unknown model|Invalid pretrained tag"),
    ],
)
def test_a_model_that_cannot_be_is_told_before_training(name: str, crop_size: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        models.create(name, outputs=3, crop_size=crop_size)


def test_a_transformer_is_built_for_the_crop_size() -> None:
    network = models.create("test_vit", outputs=3, crop_size=64)
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_name_of_the_papers_program_is_its_network_with_a_head_of_ours(name: str) -> None:
    """As many numbers as the network that the program takes from torchvision, or from timm."""
    theirs = {"squeezenet": "squeezenet1_0", "shufflenet": "shufflenet_v2_x1_0"}.get(name, name)
    options = {"aux_logits": False, "init_weights": False} if name == "inception_v3" else {}
    timm, torchvision = compat.import_timm(), compat.import_torchvision().models
    is_timms = name.startswith(("vit_", "efficientnet_", "inception_v4", "inception_resnet_v2"))
    with torch.device("meta"):  # shapes alone
        network = models.create(name, outputs=5, crop_size=224)
        assert network(torch.zeros(2, 3, 224, 224)).shape == (2, 5)
        make = timm.create_model if is_timms else torchvision.get_model
        wanted = make(theirs, num_classes=5, **options)
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in wanted.parameters())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_small_patch16_224", "squeezenet"])
def test_without_outputs_a_network_gives_the_features_that_a_head_would_be_given(name: str) -> None:
    with torch.device("meta"):
        images = torch.zeros(2, 3, 64, 64)
        features = features_of(models.create(name, outputs=5, crop_size=64), images)
        bare = models.create(name, outputs=0, crop_size=64)
        assert bare(images).shape == features.shape


def test_a_head_of_another_kind_stands_in_the_place_of_the_last_layer() -> None:
    for name in ("test_resnet", "shufflenet"):
        network = models.create(name, outputs=3, crop_size=32, head={"kind": "cosine", "scale": 20})
        images = torch.rand(2, 3, 32, 32)
        assert isinstance(network.get_classifier(), CosineHead)  # type: ignore[operator]
        assert network(images).shape == (2, 3)
        assert network(images).abs().max() <= 20


def test_a_network_with_torchvisions_interface_lets_its_head_be_reset() -> None:
    network = models.create("squeezenet", outputs=3, crop_size=64)
    images = torch.rand(2, 3, 64, 64)
    network.reset_classifier(7)  # type: ignore[operator]
    assert network(images).shape == (2, 7)
    network.reset_classifier(0)  # type: ignore[operator]
    assert network(images).shape == (2, 512)


def test_torchvisions_pretrained_weights_fill_the_backbone_and_leave_the_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = compat.import_torchvision().models.shufflenet_v2_x1_0()
    place = "torchvision.models._api.load_state_dict_from_url"
    monkeypatch.setattr(place, lambda *_, **__: made.state_dict())
    network = models.create("shufflenet", outputs=3, crop_size=32, weights="hub")
    assert torch.equal(network.state_dict()["features.5.0.weight"], made.conv5[0].weight)

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(place, unreachable)
    with pytest.raises(
        RequestError, match=r"torchvision's .*shufflenet cannot be fetched \(no route to host"
    ):
        models.create("shufflenet", outputs=3, crop_size=32, weights="hub")


def test_weights_that_cannot_be_fetched_are_told_with_both_ways_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        RequestError, match=r"weights of resnet18 cannot be fetched .*--weights FILE.*--weights none"
    ):
        models.create("resnet18", outputs=3, crop_size=32, weights="hub")


def test_the_normalisation_is_the_backbones_own() -> None:
    resnet = models.create("resnet10t", outputs=2, crop_size=32)
    assert models.normalisation(resnet) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    vit = models.create("vit_tiny_patch16_224", outputs=2, crop_size=32)
    assert models.normalisation(vit) == ((0.5,) * 3, (0.5,) * 3)


# -- the model folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model_folder.save(
        tmp_path / "model",
        small().state_dict(),
        backbone="test_resnet",
        taxonomy=Taxonomy.build(TAXA, ["order"]),
        spec=SPEC,
        record={"experiment": "large_insect_order", "rank": "order", "within": None, "licences": ["CC0"]},
        history=[{"epoch": 1, "train_loss": 0.5}, {"epoch": 2, "train_loss": None}],
    )
    return tmp_path / "model"


def test_a_model_comes_back_as_it_was_saved(folder: Path) -> None:
    torch.manual_seed(0)
    network = small().eval()
    loaded = model_folder.load(folder)
    assert not loaded.network.training
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.network(images), network(images))
    assert loaded.spec == SPEC
    assert [path[2] for path in loaded.taxonomy.leaf_paths] == ["Diptera", "Coleoptera", "Odonata"]
    assert loaded.taxonomy.counts_N[loaded.taxonomy.leaves_L].tolist() == [3, 2, 1]
    assert (folder / "history.csv").read_text() == "epoch,train_loss\n1,0.5\n2,\n"
    card = (folder / "README.md").read_text()
    assert "| Diptera | 3 |" in card
    assert "CC0" in card


def test_a_model_needs_no_other_file_and_no_place(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    for name in ("model.json", "model.safetensors"):
        shutil.copy(folder / name, alone)
    shutil.rmtree(folder)
    assert np.isfinite(model_folder.load(alone).network(torch.zeros(1, 3, 32, 32)).detach().numpy()).all()


def test_the_run_folder_stands_for_its_model(folder: Path) -> None:
    assert model_folder.load(folder.parent).fingerprint == model_folder.load(folder).fingerprint


def test_files_have_the_usual_permissions(folder: Path) -> None:
    modes = {(folder / name).stat().st_mode for name in ("model.json", "model.safetensors", "README.md")}
    assert len(modes) == 1


def test_a_model_folder_is_not_replaced_unless_told(folder: Path) -> None:
    def again(*, overwrite: bool) -> None:
        model_folder.save(
            folder,
            small().state_dict(),
            backbone="test_resnet",
            taxonomy=Taxonomy.build(TAXA, ["order"]),
            spec=SPEC,
            record={},
            history=[],
            overwrite=overwrite,
        )

    with pytest.raises(RequestError, match="exists; choose another name or pass --overwrite"):
        again(overwrite=False)
    again(overwrite=True)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def rename_a_taxon(folder: Path) -> None:
    path = folder / "model.json"
    path.write_text(path.read_text().replace("Odonata", "Mantodea"))


def other_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    state["fc.bias"] += 1
    save_file(state, path)


def newer(folder: Path) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (rename_a_taxon, r"model\.json: was altered after training"),
        (other_weights, r"model\.safetensors: not the weights that model\.json names"),
        (newer, r"written by a newer bioscan \(schema 99\); update bioscan"),
        (lambda f: (f / "model.json").write_text("{"), r"model\.json: cannot be read"),
        (lambda f: (f / "model.json").write_text("[]"), r"model\.json: cannot be read"),
        (lambda f: (f / "model.json").write_bytes(b"\xff\xfe"), r"model\.json: cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), r"not the weights that model\.json names"),
        (lambda f: (f / "model.safetensors").unlink(), r"no model folder, model\.safetensors is missing"),
        (lambda f: shutil.rmtree(f), r"no model folder, model\.json is missing \(bioscan train writes it"),
    ],
)
def test_a_model_folder_that_was_altered_or_broken_is_refused(
    folder: Path, harm: Callable[[Path], object], message: str
) -> None:
    harm(folder)
    with pytest.raises(BioscanError, match=message):
        model_folder.load(folder)
