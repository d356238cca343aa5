"""Backbones from timm, and from torchvision where timm has none."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bioscan.errors import RequestError, near
from bioscan.learn import heads, torchvision_networks
from bioscan.learn import weights as weight_files
from bioscan.learn.compat import import_timm, import_torchvision
from bioscan.learn.model_names import MODEL_NAMES, TORCHVISION, resolve


def create(
    name: str,
    *,
    outputs: int,
    crop_size: int,
    weights: str = "none",
    head: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A backbone with a head, its interface timm's.

    Args:
        name: A timm model name, such as `resnet50` or `vit_base_patch16_224`, or a name of MODEL_NAMES.
        outputs: Of the head; 0: no head, the network gives pooled features.
        crop_size: Side of the input, pixels; transformers are built for it.
        weights: Of the backbone: `none`: random; `hub`: pretrained weights from the internet; else a local
            file or folder (`weights.load_weights`).
        head: `kind` and more, as `heads.replace_head` takes it; None: linear.

    Raises:
        RequestError: unknown model, one that cannot take such images, or weights that cannot be had.
    """
    wanted = resolve(name)
    if wanted.startswith(TORCHVISION):
        network = _from_torchvision(name, wanted.removeprefix(TORCHVISION), outputs, hub=weights == "hub")
    else:
        network = _from_timm(wanted, outputs, crop_size, hub=weights == "hub")
    if head is not None:
        heads.replace_head(network, outputs, head)
    _try_out(network, name, outputs, crop_size)
    if weights not in ("none", "hub"):
        weight_files.load_weights(network, Path(weights))
    return network


def _from_timm(name: str, outputs: int, crop_size: int, *, hub: bool) -> nn.Module:
    timm = import_timm()
    if not timm.is_model(name):
        known = timm.list_models()
        raise RequestError(
            f"unknown model '{name}'{near(name, [*known, *MODEL_NAMES])} "
            f"(any of timm's {len(known):,} models will do)"
        )
    try:
        configuration = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the model is there, its tag is not
        tags = ", ".join(timm.list_pretrained(name.split(".")[0] + ".*"))
        raise RequestError(f"{_first_line(error)} (known: {tags})") from None
    options: dict[str, Any] = {"num_classes": outputs}
    if configuration is not None and configuration.fixed_input_size:
        options["img_size"] = crop_size
    if hub:
        try:
            network = timm.create_model(name, pretrained=True, **options)
        except Exception as error:  # noqa: BLE001 - the hub client raises many kinds
            raise _unreachable(f"timm's pretrained weights of {name}", error) from None
    else:
        try:
            network = timm.create_model(name, pretrained=False, **options)
        except Exception as error:  # noqa: BLE001 - each architecture has checks of its own
            raise _unfit(name, crop_size, error) from None
    assert isinstance(network, nn.Module)
    return network


def _from_torchvision(asked: str, name: str, outputs: int, *, hub: bool) -> nn.Module:
    if name not in torchvision_networks.NAMES:
        names = [key for key, value in MODEL_NAMES.items() if value.startswith(TORCHVISION)]
        raise RequestError(f"unknown model '{asked}'; torchvision's here are {', '.join(names)}")
    network = torchvision_networks.create(name, outputs)
    if hub:
        try:
            state = import_torchvision().models.get_model_weights(name).DEFAULT.get_state_dict()
        except Exception as error:  # noqa: BLE001 - the hub client raises many kinds
            raise _unreachable(f"torchvision's pretrained weights of {asked}", error) from None
        weight_files.load_state(network, state, f"torchvision's weights of {asked}")
    return network


def _try_out(network: nn.Module, name: str, outputs: int, crop_size: int) -> None:
    """Refuse a network that cannot take images of this size, before a run starts."""
    try:
        with torch.no_grad():  # what it may cache must still serve in training
            given = network.eval()(torch.zeros(1, 3, crop_size, crop_size))
    except Exception as error:  # noqa: BLE001 - each architecture fails in its own way
        raise _unfit(name, crop_size, error) from None
    if not isinstance(given, Tensor) or given.ndim != 2 or (outputs and given.shape[1] != outputs):
        what = "one number per class" if outputs else "one row of features per image"
        raise RequestError(f"{name} is no classifier: it does not give {what}")


def _unfit(name: str, crop_size: int, error: Exception) -> RequestError:
    return RequestError(
        f"{name} cannot take images of {crop_size} x {crop_size} pixels ({_first_line(error)}); "
        "choose another --crop-size or --model"
    )


def _unreachable(what: str, error: Exception) -> RequestError:
    return RequestError(
        f"{what} cannot be fetched ({_first_line(error)}); pass --weights FILE for a local file; "
        "bioscan train --weights none starts from random weights"
    )


def normalisation(network: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, in 0-1, that the backbone's pretraining used."""
    configuration = getattr(network, "pretrained_cfg", None) or {}
    mean = configuration.get("mean", (0.485, 0.456, 0.406))
    std = configuration.get("std", (0.229, 0.224, 0.225))
    return tuple(map(float, mean)), tuple(map(float, std))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
