"""The linear head of a model folder, read without torch."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bioscan.errors import DataError, RequestError, require
from bioscan.files import sha256


@dataclass(frozen=True)
class LinearHead:
    """Leaf logits are weight · features + bias; L leaf taxa, F features."""

    weight_LF: NDArray[np.float64]
    bias_L: NDArray[np.float64]
    backbone_sha256: str
    """As `learn.embeddings.backbone_sha256`: the same for embeddings of this model, calibrated or not."""


def read_linear_head(folder: Path | str) -> LinearHead:
    """The head of a model that has one softmax over its leaf taxa and a linear head.

    Args:
        folder: Model folder, or the run folder that holds it.

    Raises:
        RequestError: no model folder, or a model with another kind of head.
        DataError: a file that is broken or altered.
        MissingExtraError: safetensors is not installed.
    """
    folder = Path(folder)
    if (folder / "model" / "model.json").is_file():
        folder = folder / "model"
    place, weights = folder / "model.json", folder / "model.safetensors"
    if not (place.is_file() and weights.is_file()):
        raise RequestError(f"{folder}: no model folder, model.json or model.safetensors is missing")
    try:
        info = json.loads(place.read_text(encoding="utf-8"))
        kind, softmax = (info.get("head") or {}).get("kind", "linear"), info.get("softmax", "flat")
        leaves, expected = int(info["num_leaves"]), info["weights_sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{place}: cannot be read ({error})") from None
    if kind != "linear" or softmax != "flat":
        raise RequestError(f"{folder}: its head is {kind} and its softmax {softmax}, not linear and flat")
    if sha256(weights) != expected:
        raise DataError(f"{weights}: not the weights that model.json names (SHA-256 differs)")
    return _found(_state(weights), leaves, folder)


def _state(path: Path) -> dict[str, NDArray[Any]]:
    safetensors: Any = require("safetensors.numpy", "learn")
    try:
        state: dict[str, NDArray[Any]] = safetensors.load_file(path)
    except Exception as error:  # noqa: BLE001 - its own kinds differ between versions
        raise DataError(f"{path}: cannot be read as weights ({error})") from None
    return state


def _found(state: dict[str, NDArray[Any]], leaves: int, folder: Path) -> LinearHead:
    """The one layer whose outputs are the leaves; a 1 x 1 convolution is one too."""
    heads = [
        name.removesuffix(".bias")
        for name, bias in state.items()
        if name.endswith(".bias") and bias.shape == (leaves,) and _is_head(state, name, leaves)
    ]
    usual = [name for name in heads if name.split(".")[0] in ("head", "fc", "classifier", "last_linear")]
    heads = usual or heads
    if len(heads) != 1:
        raise RequestError(
            f"{folder}: {len(heads)} layers could be its linear head ({', '.join(heads) or 'none fits'})"
        )
    weight, bias = state[f"{heads[0]}.weight"], state[f"{heads[0]}.bias"]
    below = {name: value for name, value in state.items() if not name.startswith(f"{heads[0]}.")}
    return LinearHead(
        weight.reshape(leaves, -1).astype(np.float64), bias.astype(np.float64), _state_sha256(below)
    )


def _is_head(state: dict[str, NDArray[Any]], bias: str, leaves: int) -> bool:
    weight = state.get(f"{bias.removesuffix('.bias')}.weight")
    if weight is None or weight.ndim not in (2, 4):
        return False
    return weight.shape[0] == leaves and weight.shape[2:] in ((), (1, 1))


def _state_sha256(state: dict[str, NDArray[Any]]) -> str:
    """SHA-256 of tensors by name, type, shape and value."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} torch.{value.dtype.name} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()
