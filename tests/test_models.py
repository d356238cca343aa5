"""Backbones, the weights they start from, the model folder, and torchvision beside a CPU torch."""

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
from bioscan.errors import BioscanError, DataError, RequestError
from bioscan.learn import compat, model_folder, models
from bioscan.learn.dataset import ImageSpec

SPEC = ImageSpec(image_size=40, crop_size=32, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
TAXA = pl.DataFrame({"class": ["Insecta"] * 6, "order": ["Diptera"] * 3 + ["Coleoptera"] * 2 + ["Odonata"]})


def small(num_leaves: int = 3, **options: Any) -> torch.nn.Module:
    return models.create("test_resnet", num_leaves=num_leaves, crop_size=32, **options)


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
    ],
)
def test_a_model_that_cannot_be_is_told_before_training(name: str, crop_size: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        models.create(name, num_leaves=3, crop_size=crop_size)


def test_a_transformer_is_built_for_the_crop_size() -> None:
    network = models.create("test_vit", num_leaves=3, crop_size=64)
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_weights_that_cannot_be_fetched_are_told_with_both_ways_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        RequestError, match=r"weights of resnet18 cannot be fetched .*--weights FILE.*--weights none"
    ):
        models.create("resnet18", num_leaves=3, crop_size=32, weights="hub")


def test_the_normalisation_is_the_backbones_own() -> None:
    resnet = models.create("resnet10t", num_leaves=2, crop_size=32)
    assert models.normalisation(resnet) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    vit = models.create("vit_tiny_patch16_224", num_leaves=2, crop_size=32)
    assert models.normalisation(vit) == ((0.5,) * 3, (0.5,) * 3)


# -- weights from a file


@pytest.mark.parametrize("form", ["safetensors", "pth", "wrapped", "parallel"])
def test_weights_fill_everything_but_the_head(form: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = small(7).state_dict()
    path = tmp_path / f"weights.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        save_file(source, path)
    elif form == "parallel":
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.items()}, "epoch": 3}, path)
    else:
        torch.save({"model": source} if form == "wrapped" else source, path)
    torch.manual_seed(2)
    untouched = small(7).state_dict()
    torch.manual_seed(2)
    made = small(7, weights=str(path)).state_dict()
    assert all(torch.equal(made[k], source[k]) for k in made if not k.startswith("fc."))
    assert torch.equal(made["fc.weight"], untouched["fc.weight"])


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(models.create("test_byobnet", num_leaves=3, crop_size=32).state_dict(), path)
    with pytest.raises(RequestError, match=r"entries of the backbone are absent .*is it another model"):
        small(weights=str(path))
    partial = {k: v for k, v in small().state_dict().items() if not k.startswith("layer4")}
    torch.save(partial, path)
    with pytest.raises(RequestError, match=r"first: layer4"):
        small(weights=str(path))


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (Path.touch, (Path("harm"),))  # type: ignore[return-value]


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Harmful()}, "bad.pth")
    with pytest.raises(DataError, match=r"bad\.pth: cannot be read as weights"):
        small(weights="bad.pth")
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, RequestError, "no such weights file; --weights takes a file, 'hub'"),
        (b"nonsense", DataError, "cannot be read as weights"),
        ([1, 2], DataError, "no state dict in it"),
    ],
)
def test_a_useless_weights_file_is_told(
    content: Any, kind: type[BioscanError], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(kind, match=message):
        small(weights=str(path))


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
