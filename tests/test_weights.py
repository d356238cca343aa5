"""Weights of timm, torchvision and transformers from disk: our networks give what theirs give."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bioscan.errors import BioscanError, DataError, RequestError
from bioscan.learn import models, weights
from bioscan.learn.compat import import_timm, import_torchvision, import_transformers
from bioscan.learn.heads import features_of


def vit(
    width: int, depth: int, heads: int, *, size: int = 64, patch: int = 16, **more: Any
) -> dict[str, Any]:
    """Configuration of a transformer, in the words of transformers."""
    sides = {"image_size": size, "patch_size": patch}
    return {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, **sides, **more}


TINY = vit(192, 12, 3, intermediate_size=768)
DINO = vit(384, 12, 6, size=56, patch=14)
CLIP = vit(256, 10, 4, intermediate_size=1024, hidden_act="gelu")
SIGLIP = vit(768, 12, 12, intermediate_size=3072, hidden_act="gelu")


def small(outputs: int = 3, **options: Any) -> nn.Module:
    return models.create("test_resnet", outputs=outputs, crop_size=32, **options)


def lively(network: nn.Module) -> nn.Module:
    """Weights and statistics that differ everywhere, so that no entry can stand for another."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter)).add_(0.02 * torch.randn_like(parameter))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.01, 2)  # small ones show another epsilon
    return network.eval()


def torchvision_vit() -> nn.Module:
    made: nn.Module = import_torchvision().models.VisionTransformer(64, 16, 12, 3, 192, 768, num_classes=3)
    return made


# -- torchvision


@pytest.mark.parametrize(
    ("name", "theirs", "crop_size"),
    [
        ("resnet18", "resnet18", 64),
        ("densenet121", "densenet121", 64),
        ("mobilenet_v2", "mobilenet_v2", 64),
        ("mobilenet_v3_large", "mobilenet_v3_large", 64),
        ("mobilenet_v3_small", "mobilenet_v3_small", 64),
        ("alexnet", "alexnet", 64),
        ("squeezenet", "squeezenet1_0", 64),
        ("shufflenet", "shufflenet_v2_x1_0", 64),
        pytest.param("vgg11", "vgg11", 64, marks=pytest.mark.slow),
        ("efficientnet_b0", "efficientnet_b0", 64),
        pytest.param("convnext_tiny", "convnext_tiny", 64, marks=pytest.mark.slow),
        ("vit_tiny_patch16_224", torchvision_vit, 64),
    ],
)
def test_a_network_filled_from_torchvisions_file_gives_torchvisions_logits(
    name: str, theirs: Any, crop_size: int, tmp_path: Path
) -> None:
    made = (
        import_torchvision().models.get_model(theirs, num_classes=3) if isinstance(theirs, str) else theirs()
    )
    made = lively(made)
    torch.save(made.state_dict(), tmp_path / "theirs.pth")
    network = models.create(name, outputs=3, crop_size=crop_size).eval()
    weights.load_state(network, weights.read_state(tmp_path / "theirs.pth"), name, head=True)
    images = torch.rand(2, 3, crop_size, crop_size)
    with torch.no_grad():
        ours, wanted = network(images), made(images)
    assert wanted.std() > 1e-3
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    assert features_of(network, images).shape == (
        2,
        getattr(network, "head_hidden_size", network.num_features),
    )


def test_the_auxiliary_classifier_of_inception_is_left_out(tmp_path: Path) -> None:
    made = import_torchvision().models.inception_v3(num_classes=3, aux_logits=True, init_weights=False)
    made = lively(made)
    network = models.create("inception_v3", outputs=3, crop_size=96).eval()
    fit = weights.load_state(network, made.state_dict(), "theirs", head=True)
    assert fit.unused
    assert all(name.startswith("AuxLogits.") for name in fit.unused)
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(network(images), made(images), rtol=1e-4, atol=1e-5)


# -- transformers


def _logits(network: Any, images: Tensor) -> Tensor:
    return network(images).logits  # type: ignore[no-any-return]


def _first_token(network: Any, images: Tensor) -> Tensor:
    return network(images).last_hidden_state[:, 0]  # type: ignore[no-any-return]


def _pooled(network: Any, images: Tensor) -> Tensor:
    return network(images).pooler_output  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "config", "name", "crop_size", "wanted"),
    [
        ("ViTForImageClassification", {**TINY, "num_labels": 3}, "vit_tiny_patch16_224", 64, _logits),
        ("ViTModel", TINY, "vit_tiny_patch16_224", 64, _first_token),
        ("Dinov2Model", DINO, "vit_small_patch14_dinov2", 56, _pooled),
        (
            "Dinov2WithRegistersModel",
            {**DINO, "num_register_tokens": 4},
            "vit_small_patch14_reg4_dinov2",
            56,
            _pooled,
        ),
        ("CLIPVisionModel", CLIP, "vit_xsmall_patch16_clip_224", 64, _pooled),
        pytest.param(
            "SiglipVisionModel", SIGLIP, "vit_base_patch16_siglip_224", 64, _pooled, marks=pytest.mark.slow
        ),
        (
            "DeiTForImageClassificationWithTeacher",
            {**TINY, "num_labels": 3},
            "deit_tiny_distilled_patch16_224",
            64,
            _logits,
        ),
        ("ResNetForImageClassification", {"num_labels": 3}, "resnet50", 64, _logits),
        (
            "ResNetForImageClassification",
            {
                "num_labels": 3,
                "layer_type": "basic",
                "depths": [2, 2, 2, 2],
                "hidden_sizes": [64, 128, 256, 512],
            },
            "resnet18",
            64,
            _logits,
        ),
        ("ConvNextForImageClassification", {"num_labels": 3}, "convnext_tiny", 64, _logits),
        (
            "TimmWrapperForImageClassification",
            {"architecture": "test_resnet", "num_labels": 3},
            "test_resnet",
            64,
            _logits,
        ),
    ],
)
def test_a_network_filled_from_a_folder_of_transformers_gives_the_same(
    kind: str,
    config: dict[str, Any],
    name: str,
    crop_size: int,
    wanted: Callable[[Any, Tensor], Tensor],
    tmp_path: Path,
) -> None:
    transformers = import_transformers()
    architecture = getattr(transformers, kind)
    made = lively(architecture(architecture.config_class(**config)))
    made.save_pretrained(tmp_path)  # type: ignore[operator]
    network = models.create(name, outputs=3, crop_size=crop_size).eval()
    images = torch.rand(2, 3, crop_size, crop_size)
    with torch.no_grad():
        theirs = wanted(made, images)
        if wanted is _logits:
            weights.load_state(network, weights.read_state(tmp_path), name, head=True)
            ours = network(images)
        else:
            weights.load_weights(network, tmp_path)
            ours = features_of(network, images)
    assert theirs.std() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # theirs have another epsilon


def test_a_tower_with_another_activation_is_refused(tmp_path: Path) -> None:
    transformers = import_transformers()
    config = transformers.CLIPVisionConfig(**{**CLIP, "hidden_act": "quick_gelu"})
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    network = models.create("vit_xsmall_patch16_clip_224", outputs=3, crop_size=64)
    with pytest.raises(RequestError, match=r"uses quick_gelu, which this model does not.*clip_quickgelu"):
        weights.load_weights(network, tmp_path)


def test_position_embeddings_of_another_image_size_are_resampled(tmp_path: Path) -> None:
    timm = import_timm()
    source = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=3)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    network = models.create("vit_tiny_patch16_224", outputs=3, crop_size=64, weights=str(tmp_path / "w.pth"))
    wanted = timm.layers.resample_abs_pos_embed(source.pos_embed, [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(network.state_dict()["pos_embed"], wanted)


# -- forms of files


def timm_forms(state: dict[str, Tensor], folder: Path) -> dict[str, Path]:
    """The same weights as programs keep them."""
    paths = {}

    def add(name: str, content: Any) -> None:
        paths[name] = folder / f"{name}.pth"
        torch.save(content, paths[name])

    add("bare", state)
    add("wrapped", {"model": state, "epoch": 3})
    add("parallel", {"state_dict": {f"module.{k}": v for k, v in state.items()}})
    add("averaged", {"state_dict": {k: v * 0 for k, v in state.items()}, "state_dict_ema": state})
    add("dino", {"teacher": {f"backbone.{k}": v for k, v in state.items()}, "student": {"x": torch.zeros(1)}})
    add("tower", {**{f"visual.trunk.{k}": v for k, v in state.items()}, "text.weight": torch.zeros(3)})
    arguments = argparse.Namespace(lr=0.1, name="x")
    add("settings", {"model": state, "args": arguments, "best": np.float64(0.5), "of": np.int64(3)})
    paths["safetensors"] = folder / "w.safetensors"
    save_file(state, paths["safetensors"])
    for name, form in (("hub", "model.safetensors"), ("old_hub", "pytorch_model.bin"), ("run", "model")):
        paths[name] = folder / name
        paths[name].mkdir()
        if form == "pytorch_model.bin":
            torch.save(state, paths[name] / form)
        else:
            (paths[name] / form).mkdir() if name == "run" else None
            save_file(state, paths[name] / (form if name == "hub" else "model/model.safetensors"))
    paths["shards"] = folder / "shards"
    paths["shards"].mkdir()
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in halves.items():
        save_file({k: state[k] for k in members}, paths["shards"] / file)
    index = {"weight_map": {name: file for file, members in halves.items() for name in members}}
    (paths["shards"] / "model.safetensors.index.json").write_text(json.dumps(index))
    return paths


@pytest.mark.parametrize(
    "form",
    [
        "bare",
        "wrapped",
        "parallel",
        "averaged",
        "dino",
        "tower",
        "settings",
        "safetensors",
        "hub",
        "old_hub",
        "run",
        "shards",
    ],
)
def test_weights_in_every_form_fill_everything_but_the_head(form: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = small(7).state_dict()
    path = timm_forms(source, tmp_path)[form]
    torch.manual_seed(2)
    untouched = small(7).state_dict()
    torch.manual_seed(2)
    made = small(7, weights=str(path)).state_dict()
    assert all(torch.equal(made[k], source[k]) for k in made if not k.startswith("fc."))
    assert torch.equal(made["fc.weight"], untouched["fc.weight"])


def test_numbers_of_an_old_numpy_in_a_checkpoint_are_plain_data(tmp_path: Path) -> None:
    """Up to numpy 1 the module that makes them had another name; the paper's checkpoints are that old."""
    torch.save({"model": small().state_dict(), "best": np.float64(0.5)}, tmp_path / "new.pth")
    with ZipFile(tmp_path / "new.pth") as new, ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert (tmp_path / "old.pth").read_bytes().count(b"numpy.core.multiarray") == 1
    small(weights=str(tmp_path / "old.pth"))


def test_a_head_of_another_size_is_no_hindrance(tmp_path: Path) -> None:
    torch.save(small(1000).state_dict(), tmp_path / "w.pth")
    network = small(3)
    fit = weights.load_weights(network, tmp_path / "w.pth")
    counters = sum(k.endswith("num_batches_tracked") for k in network.state_dict())
    assert fit == weights.Fit(len(network.state_dict()) - counters - 2, ())


def test_old_files_without_batch_counters_are_taken(tmp_path: Path) -> None:
    state = {k: v for k, v in small().state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pth")
    small(weights=str(tmp_path / "w.pth"))


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(models.create("test_byobnet", outputs=3, crop_size=32).state_dict(), path)
    with pytest.raises(RequestError, match=r"entries of the backbone are absent .*is it another model"):
        small(weights=str(path))
    partial = {k: v for k, v in small().state_dict().items() if not k.startswith("layer4")}
    torch.save(partial, path)
    with pytest.raises(RequestError, match=r"first: layer4"):
        small(weights=str(path))


def test_a_deeper_network_of_the_family_is_refused_though_all_entries_are_there(tmp_path: Path) -> None:
    state = models.create("resnet34", outputs=3, crop_size=32).state_dict()
    shallow = models.create("resnet18", outputs=3, crop_size=32)
    assert {k: v.shape for k, v in shallow.state_dict().items()}.items() <= {
        k: v.shape for k, v in state.items()
    }.items()
    with pytest.raises(RequestError, match=r"layers that the network does not have \(first: layer1\.2"):
        weights.load_state(shallow, state, "w.pth")


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (Path.touch, (Path("harm"),))  # type: ignore[return-value]


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Harmful()}, "bad.pth")
    message = r"bad\.pth: cannot be read as weights: it holds an object \S+, which could run code"
    with pytest.raises(DataError, match=message):
        small(weights="bad.pth")
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, RequestError, "no such weights file; --weights takes a file or folder, 'hub'"),
        (b"hello", DataError, "read as weights .neither a torch nor a safetensors file"),
        ([1, 2], DataError, "no state dict in it"),
        ({"model": {"a": 1}}, DataError, "no state dict in it"),
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


def test_a_folder_without_weights_and_broken_shards_are_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no weights in this folder; looked for model\.safetensors"):
        small(weights=str(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../elsewhere.safetensors"}}')
    with pytest.raises(DataError, match=r"names \.\./\.\./elsewhere.safetensors, which is not in its folder"):
        small(weights=str(tmp_path))
    index.write_text("[]")
    with pytest.raises(DataError, match="cannot be read as an index of weights"):
        small(weights=str(tmp_path))


def test_weights_that_are_no_numbers_are_refused() -> None:
    state = small().state_dict()
    state["conv1.0.weight" if "conv1.0.weight" in state else "conv1.weight"].fill_(float("nan"))
    with pytest.raises(DataError, match="is not finite"):
        weights.load_state(small(), state, "w.pth")
