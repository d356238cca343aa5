"""A detector's folder, and the checkpoint of the paper's crop tool. Loading runs no code from either.

The folder holds model.safetensors (weights; of transformers' networks in the names that its own files have),
model.json and README.md.
"""

import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from bioscan.errors import DataError, RequestError
from bioscan.files import sha256, writing_folder
from bioscan.learn import detector_models as models
from bioscan.learn.detector_images import InputSpec
from bioscan.learn.detector_network import DetectorNetwork
from bioscan.learn.detector_settings import DetectorSettings
from bioscan.learn.model_folder import content_sha256, write_history, write_state

SCHEMA_VERSION: Final = 1
KIND: Final = "detector"

_LIGHTNING: Final = (
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)
"""Lightning's kinds of dict for settings: read as plain ones."""
_INERT: Final = ("argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath")
"""What else Lightning saves beside the weights: read as empty objects."""

_RESNETS: Final[dict[tuple[int, ...], str]] = {
    (2, 2, 2, 2): "resnet18",
    (3, 4, 6, 3): "resnet50",
    (3, 4, 23, 3): "resnet101",
}
"""Blocks of each stage -> timm's name."""


@dataclass(frozen=True)
class Loaded:
    """A network and what its folder says."""

    network: DetectorNetwork
    spec: InputSpec
    none_below: float
    many_from: float | None
    info: dict[str, Any]


# -- the folder


def save(
    folder: Path,
    state: Mapping[str, Tensor],
    *,
    architecture: str,
    config: Mapping[str, Any],
    spec: InputSpec,
    none_below: float,
    many_from: float | None,
    record: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    overwrite: bool = False,
) -> None:
    """Write a detector folder, whole or not at all.

    Args:
        folder: model.safetensors, model.json, history.csv and README.md go here.
        state: The network's state dict.
        architecture: Its name.
        config: What `detector_models.create` makes it from.
        spec: What it sees.
        none_below: Best score below which there is no specimen.
        many_from: Second-best score from which there are several; None: never.
        record: The run: settings, versions, data fingerprint, licences, validation.
        history: One row per epoch.
        overwrite: Replace a folder.
    """
    with writing_folder(folder, overwrite=overwrite, mark="model.json") as partial:
        weights = partial / "model.safetensors"
        if architecture == "dense":
            write_state(weights, state)
        else:
            _write_transformers(weights, architecture, config, state)
        info = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "architecture": architecture,
            "config": dict(config),
            "image": dataclasses.asdict(spec),
            "thresholds": {"none_below": none_below, "many_from": many_from},
            "weights_sha256": sha256(weights),
            **record,
        }
        info["content_sha256"] = content_sha256(info)
        (partial / "model.json").write_text(json.dumps(info, indent=1, ensure_ascii=False), encoding="utf-8")
        write_history(partial / "history.csv", history)
        (partial / "README.md").write_text(_card(info), encoding="utf-8")


def _write_transformers(
    path: Path, architecture: str, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """The weights in the names of transformers' files, which its versions share; those in memory differ."""
    network, _ = models.create(architecture, config)
    network.load_state_dict(dict(state))
    with tempfile.TemporaryDirectory() as place:
        network.model.save_pretrained(place)  # type: ignore[operator, union-attr]
        path.write_bytes((Path(place) / "model.safetensors").read_bytes())


def load(path: Path) -> Loaded:
    """A detector from its folder, or the run folder that it lies in, or from the paper's checkpoint.

    Raises:
        RequestError: nothing there, or no detector.
        DataError: a file that is broken, altered or of a newer schema, or a checkpoint that holds code.
    """
    if path.is_file():
        return _load_checkpoint(path)
    if (path / "model" / "model.json").is_file():  # a run folder: its detector
        path = path / "model"
    for name in ("model.json", "model.safetensors"):
        if not (path / name).is_file():
            raise RequestError(
                f"{path}: no detector folder, {name} is missing (bioscan train-detector writes it to "
                "RUN/model; the paper's .ckpt will do too)"
            )
    info = _read_info(path)
    weights = (path / "model.safetensors").read_bytes()
    if hashlib.sha256(weights).hexdigest() != info.get("weights_sha256"):
        raise DataError(
            f"{path / 'model.safetensors'}: not the weights that model.json names (SHA-256 differs)"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load as load_bytes

    try:
        image, limits = info["image"], info["thresholds"]
        spec = InputSpec(
            mode=image["mode"],
            size=int(image["size"]),
            longest=int(image["longest"]),
            mean=tuple(map(float, image["mean"])),
            std=tuple(map(float, image["std"])),
        )
        none_below, many_from = float(limits["none_below"]), limits["many_from"]
        state = load_bytes(weights)
        architecture, config = info["architecture"], info["config"]
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    network = models.with_weights(architecture, config, state, strict=True, where=str(path))
    return Loaded(network, spec, none_below, many_from, info)


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info: dict[str, Any] = json.loads((path / "model.json").read_text(encoding="utf-8"))
        if info.get("kind") != KIND:
            raise RequestError(f"{path}: a model folder, but of no detector (bioscan predict takes it)")
        if info["schema_version"] > SCHEMA_VERSION:
            raise DataError(
                f"{path}: written by a newer bioscan (schema {info['schema_version']}); update bioscan"
            )
        if info["content_sha256"] != content_sha256(info):
            raise DataError(f"{path / 'model.json'}: was altered after training (its SHA-256 differs)")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path / 'model.json'}: cannot be read ({error})") from None
    return info


# -- the paper's checkpoint


def _load_checkpoint(path: Path) -> Loaded:
    """A Lightning checkpoint around DetrForObjectDetection, with the paper's way of seeing.

    Layouts: names behind `model.` or none; of transformers 4 (`backbone.conv_encoder.model`, `out_proj`,
    `fc1`) and 5; a ResNet of timm or of transformers. Sizes follow from the weights.
    """
    state = lightning_state(path)
    config = _detr_config(state, path)
    classes = state["class_labels_classifier.weight"].shape[0] - 1
    if classes != 1:
        raise DataError(
            f"{path}: a DETR of {classes} classes, not of one; bioscan train-detector --architecture detr "
            f"--weights {path.name} fine-tunes it"
        )
    network = models.with_weights("detr", config, state, strict=True, where=str(path))
    info = {"kind": KIND, "architecture": "detr", "config": config, "checkpoint": path.name}
    return Loaded(network, models.input_of("detr"), 0.0, None, info)


def lightning_state(path: Path) -> dict[str, Tensor]:
    """The weights of a Lightning or plain torch checkpoint, without the names of wrappers around the network.

    Raises:
        DataError: it cannot be read, or reading it would run code.
    """
    stand_ins = [(dict, name) for name in _LIGHTNING]
    stand_ins += [(type(name.rsplit(".", 1)[1], (_Inert,), {}), name) for name in _INERT]  # type: ignore[misc]
    try:
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - unpicklers raise many kinds
        others = _others_in(path)
        if others:
            raise DataError(
                f"{path}: holds more than weights ({', '.join(others)}), and reading that could run code; "
                "if it comes from a source that you trust, save its state_dict alone and pass that file"
            ) from None
        raise DataError(f"{path}: cannot be read as a checkpoint ({models.first_line(error)})") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise DataError(f"{path}: no state dict in it")
    weights = {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    # Lightning's module holds DetrForObjectDetection as `model`, which holds DetrModel as `model`
    if any(key.startswith("model.class_labels_classifier.") for key in weights):
        weights = {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
    return weights


class _Inert:
    """Holds nothing, whatever it is made from."""

    def __new__(cls, *args: object, **kwargs: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _others_in(path: Path) -> list[str]:
    """Names of what a checkpoint holds beside weights and settings."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001 - damaged, or of an old form: nothing can be said of it
        return []
    return sorted(set(found) - {*_LIGHTNING, *_INERT})


def _detr_config(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The configuration that the weights of a DETR are of; its 8 attention heads cannot be seen in them."""

    def size(pattern: str, axis: int = 0) -> int:
        found = next((value for key, value in state.items() if re.search(pattern + "$", key)), None)
        if found is None:
            raise DataError(f"{path}: not the weights of a DETR (none is named {pattern})")
        return int(found.shape[axis])

    def count(pattern: str) -> int:
        return len({m[1] for key in state if (m := re.search(pattern, key))})

    backbone = dict(models.FAMILIES["detr"].defaults["backbone_config"])
    if count(r"(embedder\.embedder\.convolution)"):
        backbone = {"model_type": "resnet", "out_features": ["stage4"]}  # ResNet-50
    else:
        blocks = tuple(count(rf"\.layer{stage}\.(\d+)\.conv1\.") for stage in (1, 2, 3, 4))
        name = _RESNETS.get(blocks)
        if name is None:
            raise DataError(f"{path}: a DETR with a backbone that is no ResNet-18, 50 or 101")
        backbone["backbone"] = name
    return {
        "backbone_config": backbone,
        "d_model": size(r"class_labels_classifier\.weight", 1),
        "num_queries": size(r"query_position_embeddings\.weight"),
        "encoder_layers": count(r"encoder\.layers\.(\d+)\."),
        "decoder_layers": count(r"decoder\.layers\.(\d+)\."),
        "encoder_ffn_dim": size(r"encoder\.layers\.0\.(?:mlp\.)?fc1\.weight"),
        "decoder_ffn_dim": size(r"decoder\.layers\.0\.(?:mlp\.)?fc1\.weight"),
    }


# -- where a run starts


def start(settings: DetectorSettings) -> tuple[DetectorNetwork, dict[str, Any], InputSpec]:
    """The network that a run starts from, its configuration and what it sees.

    Raises:
        RequestError: weights that are absent, cannot be fetched or are of another architecture.
        DataError: weights that cannot be read.
    """
    architecture, weights = settings.architecture, settings.weights
    spec = models.input_of(architecture, settings.image_size)
    path = Path(weights)
    if (path / "model.json").is_file() or (path / "model" / "model.json").is_file():
        loaded = load(path)
        if loaded.info["architecture"] != architecture:
            raise RequestError(
                f"{path} is of architecture {loaded.info['architecture']}, not {architecture}; "
                f"pass --architecture {loaded.info['architecture']}"
            )
        has = loaded.info["config"].get("backbone")
        if settings.backbone not in (DetectorSettings.backbone, has):
            raise RequestError(
                f"{path} has the backbone {has}, not {settings.backbone}; leave out --backbone"
            )
        if settings.image_size is None:
            spec = loaded.spec
        return loaded.network, loaded.info["config"], spec
    if architecture == "dense":
        network, config = models.create_dense(settings.backbone, weights)
        return network, config, spec
    if weights == "none":
        return *models.create(architecture), spec
    if path.is_file():
        return *_from_file(architecture, path), spec
    name = models.FAMILIES[architecture].hub if weights == "hub" else weights
    return *models.from_hub(architecture, name), spec


def _from_file(architecture: str, path: Path) -> tuple[DetectorNetwork, dict[str, Any]]:
    """A network with the weights of a file; its class head is new where theirs is of other classes."""
    is_plain = path.suffix == ".safetensors"
    state = models.safetensors_state(path) if is_plain else lightning_state(path)
    config = models.FAMILIES[architecture].defaults if architecture != "detr" else _detr_config(state, path)
    network = models.with_weights(architecture, config, state, strict=False, where=str(path))
    return network, models.as_json(network.model.config)  # type: ignore[union-attr]


def _card(info: Mapping[str, Any]) -> str:
    validation = info.get("validation") or {}
    scores = "\n".join(f"- {name}: {value:.4f}" for name, value in validation.items() if value is not None)
    limits = info["thresholds"]
    many = (
        "never" if limits["many_from"] is None else f"a second box scores {limits['many_from']:.3f} or more"
    )
    sets = "\n".join(
        f"- {s['boxes']}: {s['pictures']:,} pictures, {s['empty']:,} of them empty"
        for s in info.get("sets", [])
    )
    licences = "; ".join(info.get("licences") or []) or "none stated in the annotations"
    return f"""# {info["architecture"]}: finds the insect of a photograph

Trained by bioscan {info.get("versions", {}).get("bioscan", "")}. `bioscan crop --detector` takes this folder.

## Intended use

Photographs of single specimens taken like the training pictures.
«none» where the best score is below {limits["none_below"]:.3f}; «many» where {many}.

## Validation scores of the chosen epoch, one box a picture

{scores or "none: there was no validation set"}

## Training pictures

{sets}

## Data and licence

Fingerprint of boxes and images `{info.get("data_fingerprint")}`.
Licences as the annotations state them: {licences}.
"""
