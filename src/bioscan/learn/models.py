"""Backbones from timm, and the weights that they start from."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bioscan.errors import DataError, RequestError, near
from bioscan.learn.compat import import_timm


def create(name: str, *, num_leaves: int, crop_size: int, weights: str = "none") -> nn.Module:
    """A timm backbone with a head over the leaf taxa.

    Args:
        name: A timm model name, such as `resnet50` or `vit_base_patch16_224`.
        num_leaves: Outputs of the head.
        crop_size: Side of the input, pixels; transformers are built for it.
        weights: `none`: random; `hub`: timm's pretrained weights; else a local file.

    Raises:
        RequestError: unknown model, one that cannot take such images, or weights that cannot be had.
    """
    timm = import_timm()
    if not timm.is_model(name):
        known = timm.list_models()
        raise RequestError(
            f"unknown model '{name}'{near(name, known)} (any of timm's {len(known):,} models will do)"
        )
    try:
        configuration = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the model is there, its tag is not
        tags = ", ".join(timm.list_pretrained(name.split(".")[0] + ".*"))
        raise RequestError(f"{_first_line(error)} (known: {tags})") from None
    options: dict[str, Any] = {"num_classes": num_leaves}
    if configuration is not None and configuration.fixed_input_size:
        options["img_size"] = crop_size
    if weights == "hub":
        try:
            network = timm.create_model(name, pretrained=True, **options)
        except Exception as error:  # noqa: BLE001 - the hub client raises many kinds
            raise RequestError(
                f"timm's pretrained weights of {name} cannot be fetched ({_first_line(error)}); "
                "pass --weights FILE for a local file, or --weights none to start from random weights"
            ) from None
    else:
        try:
            network = timm.create_model(name, pretrained=False, **options)
        except Exception as error:  # noqa: BLE001 - each architecture has checks of its own
            raise _unfit(name, crop_size, error) from None
    assert isinstance(network, nn.Module)
    _try_out(network, name, num_leaves, crop_size)
    if weights not in ("none", "hub"):
        load_weights(network, Path(weights))
    return network


def _try_out(network: nn.Module, name: str, num_leaves: int, crop_size: int) -> None:
    """Refuse a network that cannot take images of this size, before a run starts."""
    try:
        with torch.no_grad():  # what it may cache must still serve in training
            logits = network.eval()(torch.zeros(1, 3, crop_size, crop_size))
    except Exception as error:  # noqa: BLE001 - each architecture fails in its own way
        raise _unfit(name, crop_size, error) from None
    if not isinstance(logits, Tensor) or logits.shape != (1, num_leaves):
        raise RequestError(f"{name} is no classifier: it does not give one number per class")


def _unfit(name: str, crop_size: int, error: Exception) -> RequestError:
    return RequestError(
        f"{name} cannot take images of {crop_size} x {crop_size} pixels ({_first_line(error)}); "
        "choose another --crop-size or --model"
    )


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a state dict from a safetensors or torch file; the head stays as it is, everything else must fit.

    Raises:
        RequestError: the file is absent, or belongs to another backbone.
        DataError: the file cannot be read safely.
    """
    if not path.is_file():
        raise RequestError(
            f"{path}: no such weights file; --weights takes a file, 'hub' (timm's pretrained weights) "
            "or 'none' (random)"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - unpicklers and parsers raise many kinds
        raise DataError(f"{path}: cannot be read as weights ({_first_line(error)})") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise DataError(f"{path}: no state dict in it")
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    head = _head_names(network)
    wanted = {key: value for key, value in network.state_dict().items() if not key.startswith(head)}
    missing = [
        key
        for key, value in wanted.items()
        if not (isinstance(state.get(key), Tensor) and state[key].shape == value.shape)
        and not key.endswith("num_batches_tracked")  # a counter that old files lack
    ]
    if missing:
        raise RequestError(
            f"{path}: {len(missing):,} of {len(wanted):,} entries of the backbone are absent or of another "
            f"shape (first: {missing[0]}); is it another model, or of another --crop-size?"
        )
    network.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)


def _head_names(network: nn.Module) -> tuple[str, ...]:
    """Prefixes of the classifier's entries in the state dict."""
    names = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def normalisation(network: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, in 0-1, that the backbone's pretraining used."""
    configuration = getattr(network, "pretrained_cfg", None) or {}
    mean = configuration.get("mean", (0.485, 0.456, 0.406))
    std = configuration.get("std", (0.229, 0.224, 0.225))
    return tuple(map(float, mean)), tuple(map(float, std))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
