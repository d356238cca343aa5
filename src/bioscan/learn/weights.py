"""Weights of others: what timm, torchvision and transformers save, in the names that our networks have.

A file's state dict is tried as it is, behind any prefix (`module.`, `timm_model.`, `visual.trunk.`), through
timm's own conversion of the architecture's checkpoints, and through the layouts below. The first that fills
the backbone wholly is taken.
"""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bioscan.errors import DataError, RequestError
from bioscan.learn import torchvision_networks
from bioscan.learn.torchvision_networks import TorchvisionNetwork

State = Mapping[str, Tensor]

_FILES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model/model.safetensors",
)
"""What holds the weights in a folder: of the Hugging Face hub, of OpenCLIP, a model folder or run folder."""

_WRAPPERS: Final = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
"""Keys of checkpoints that hold a state dict, the better one first; `teacher` is DINO's."""

_COUNTER: Final = "num_batches_tracked"
"""A number beside batch norm's statistics that old files lack; nothing follows from it here."""


@dataclass(frozen=True)
class Fit:
    """What a file gave to a network."""

    filled: int
    """Entries of the network that were filled: all of the backbone, with its head where that was wanted."""
    unused: tuple[str, ...]
    """Names in the file that the network has no place for: another head, a text tower."""


# -- files


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file or folder; reading it runs no code from it.

    Args:
        path: A safetensors or torch file, of a bare state dict or of a checkpoint with one in it; or a folder
            with one: of the Hugging Face hub (also in shards), a model folder, a run folder.

    Raises:
        RequestError: there is no such file.
        DataError: it cannot be read safely, or holds no state dict.
    """
    if path.is_dir():
        found = next((path / name for name in _FILES if (path / name).is_file()), None)
        if found is None:
            raise RequestError(f"{path}: no weights in this folder; looked for {', '.join(_FILES)}")
        path = found
    if not path.is_file():
        raise RequestError(
            f"{path}: no such weights file; --weights takes a file or folder, 'hub' (pretrained weights from "
            "the internet) or 'none' (random)"
        )
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    content = _read_file(path)
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict) and content[wrapper]:
            content = content[wrapper]
    state = {}
    if isinstance(content, dict):
        state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise DataError(f"{path}: no state dict in it")
    return state


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index}: cannot be read as an index of weights ({error})") from None
    state: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise DataError(f"{index}: names {name}, which is not in its folder")
        state |= read_state(index.parent / name)
    return state


def _read_file(path: Path) -> Any:
    """What a file holds, by types that are plain data only."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if path.suffix == ".safetensors" or head[8:] == b"{":  # its header is a length, then JSON
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_plain_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - unpicklers and parsers raise many kinds
        blocked = re.search(r"GLOBAL ([\w.]+) was not an allowed", str(error))
        if blocked:
            raise DataError(
                f"{path}: cannot be read as weights: it holds an object {blocked[1]}, which could run code; "
                "where you trust the file, load it with its own program and save the state dict alone"
            ) from None
        said = _first_line(error)  # of a file of another kind an unpickler says "101" or the like
        reason = said if " " in said else "neither a torch nor a safetensors file"
        raise DataError(f"{path}: cannot be read as weights ({reason})") from None


def _plain_types() -> list[Any]:
    """Types beside torch's own that checkpoints keep settings and scores in, and that hold plain data."""
    scalar: Any = np.float64(0).__reduce__()[0]
    numbers = [np.dtype(code) for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")]
    return [
        argparse.Namespace,
        np.dtype,
        *(type(dtype) for dtype in numbers),
        (scalar, "numpy.core.multiarray.scalar"),  # its name up to numpy 1
        (scalar, "numpy._core.multiarray.scalar"),
    ]


# -- into a network


def load_weights(network: nn.Module, path: Path) -> Fit:
    """Load a backbone's weights from a file or folder; the head stays as it is, everything else must fit.

    Position embeddings of another image size are resampled, as timm does it.

    Raises:
        RequestError: the file is absent, or belongs to another backbone.
        DataError: it cannot be read safely.
    """
    if path.is_dir():
        _check_activation(network, path)
    return load_state(network, read_state(path), str(path))


def load_state(network: nn.Module, state: State, source: str, *, head: bool = False) -> Fit:
    """Fill a network from a state dict in any layout that is known here.

    Args:
        network: Of timm, or with its interface.
        state: Names as its program has them.
        source: Where it is from, for messages.
        head: Fill the head too; it must fit then.

    Raises:
        RequestError: it belongs to another network.
        DataError: a weight is infinite or no number.
    """
    own = network.state_dict()
    backbone = {key: value for key, value in own.items() if head or not key.startswith(_head_names(network))}
    wanted = {key: value for key, value in backbone.items() if not key.endswith(_COUNTER)}
    best: dict[str, Tensor] = {}
    best_missing = list(wanted)
    for candidate in _candidates(network, state):
        missing = [key for key, value in wanted.items() if _lacks(candidate, key, value)]
        if len(missing) < len(best_missing):
            best, best_missing = candidate, missing
        if not missing:
            break
    if best_missing:
        of = "network" if head else "backbone"
        raise RequestError(
            f"{source}: {len(best_missing):,} of {len(wanted):,} entries of the {of} are absent or of "
            f"another shape (first: {best_missing[0]}); is it another model, or of another --crop-size?"
        )
    unused = tuple(key for key in best if key not in own)
    shapes = {re.sub(r"\d+", "#", key) for key in wanted}
    deeper = [key for key in unused if re.sub(r"\d+", "#", key) in shapes]
    if deeper:
        raise RequestError(
            f"{source}: {len(deeper):,} entries belong to layers that the network does not have (first: "
            f"{deeper[0]}); is it a deeper model of the same family?"
        )
    wild = next(
        (key for key in wanted if best[key].is_floating_point() and not best[key].isfinite().all()), None
    )
    if wild is not None:
        raise DataError(f"{source}: a number in {wild} is not finite")
    network.load_state_dict({key: best[key] for key in backbone if key in best}, strict=False)
    return Fit(len(wanted), unused)


def _lacks(state: State, key: str, value: Tensor) -> bool:
    return key not in state or state[key].shape != value.shape


def _head_names(network: nn.Module) -> tuple[str, ...]:
    """Prefixes of the classifier's entries in the state dict."""
    names = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _candidates(network: nn.Module, state: State) -> Iterator[dict[str, Tensor]]:
    """The state dict in the network's names, by every way that may fit, the likeliest first."""
    keys = [key for key in network.state_dict() if not key.endswith(_COUNTER)]
    bare = [*_without_prefix(state, keys)]
    yield from bare
    if isinstance(network, TorchvisionNetwork):
        name = str(network.pretrained_cfg["architecture"])
        for known in _without_prefix(state, ["features.0.weight", "conv1.0.weight"]):
            yield {torchvision_networks.renamed(name, key): value for key, value in known.items()}
    for convert in _LAYOUTS.values():
        converted = convert(network, state)
        if converted is not None:
            yield converted
            yield from _by_timm(network, converted)
    for known in (dict(state), *bare):
        yield from _by_timm(network, known)


def _without_prefix(state: State, keys: list[str]) -> Iterator[dict[str, Tensor]]:
    """The part of a state dict behind each prefix that some of the keys stand behind, the commonest first."""
    wanted = keys[:1] + keys[len(keys) // 2 : len(keys) // 2 + 1]
    prefixes = {name[: -len(key)] for key in wanted for name in state if name.endswith(key)}
    for prefix in sorted((p for p in prefixes if not p or p.endswith(".")), key=len):
        yield {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _by_timm(network: nn.Module, state: State) -> Iterator[dict[str, Tensor]]:
    """What timm's conversion of the architecture's checkpoints makes of it, where there is one."""
    module = sys.modules[type(network).__module__]
    for name in ("checkpoint_filter_fn", "_filter_fn"):
        convert = getattr(module, name, None)
        if convert is None:
            continue
        arguments = (dict(state), network) if name == "checkpoint_filter_fn" else (dict(state),)
        converted: Any = {}
        with contextlib.suppress(Exception):  # a state dict of another architecture fails in many ways
            converted = convert(*arguments)
        yield {key: value for key, value in converted.items() if isinstance(value, Tensor)}


# -- layouts that timm does not read


class _Renaming(NamedTuple):
    """A layout that differs by names, and by keeping query, key and value apart."""

    mark: str
    """A pattern that one of its names has."""
    rules: tuple[tuple[str, str], ...]
    """Pattern and replacement, the first that matches a whole name; other names are left out."""

    def __call__(self, network: nn.Module, state: State) -> dict[str, Tensor] | None:
        """The state dict in timm's names; None where it is of another layout."""
        if not any(re.fullmatch(self.mark, key) for key in state):
            return None
        renamed: dict[str, Tensor] = {}
        for key, value in state.items():
            for pattern, replacement in self.rules:
                match = re.fullmatch(pattern, key)
                if match:
                    renamed[match.expand(replacement)] = value
                    break
        for key in [key for key in renamed if ".attn.q." in key]:
            names = [key.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
            if all(name in renamed for name in names):
                fused = torch.cat([renamed.pop(name) for name in names])
                renamed[key.replace(".attn.q.", ".attn.qkv.")] = fused
        return renamed


_KINDS: Final = r"(weight|bias)"
_TOP: Final = r"(?:\w+\.)?"  # of a network with a head: `vit.`, `dinov2.`
_LAYER: Final = _TOP + r"encoder\.layer\.(\d+)\."
_VISION: Final = r"(?:vision_model\.)?"
_VISION_LAYER: Final = _VISION + r"encoder\.layers\.(\d+)\."
_HF_VIT: Final = _Renaming(
    rf"{_TOP}embeddings\.patch_embeddings\.projection\.weight",  # ViT, DeiT, ViTMAE, DINOv2
    (
        (rf"{_TOP}embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
        (rf"{_TOP}embeddings\.distillation_token", "dist_token"),
        (rf"{_TOP}embeddings\.position_embeddings", "pos_embed"),
        (rf"{_TOP}embeddings\.patch_embeddings\.projection\.{_KINDS}", r"patch_embed.proj.\1"),
        (rf"{_LAYER}attention\.attention\.(q|k|v)\w+\.{_KINDS}", r"blocks.\1.attn.\2.\3"),
        (rf"{_LAYER}attention\.output\.dense\.{_KINDS}", r"blocks.\1.attn.proj.\2"),
        (rf"{_LAYER}layernorm_before\.{_KINDS}", r"blocks.\1.norm1.\2"),
        (rf"{_LAYER}layernorm_after\.{_KINDS}", r"blocks.\1.norm2.\2"),
        (rf"{_LAYER}intermediate\.dense\.{_KINDS}", r"blocks.\1.mlp.fc1.\2"),
        (rf"{_LAYER}output\.dense\.{_KINDS}", r"blocks.\1.mlp.fc2.\2"),
        (rf"{_LAYER}(norm[12]|mlp\.fc[12])\.{_KINDS}", r"blocks.\1.\2.\3"),
        (rf"{_LAYER}mlp\.weights_in\.{_KINDS}", r"blocks.\1.mlp.w12.\2"),
        (rf"{_LAYER}mlp\.weights_out\.{_KINDS}", r"blocks.\1.mlp.w3.\2"),
        (rf"{_LAYER}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        (rf"{_TOP}layernorm\.{_KINDS}", r"norm.\1"),
        (rf"(?:classifier|cls_classifier)\.{_KINDS}", r"head.\1"),
        (rf"distillation_classifier\.{_KINDS}", r"head_dist.\1"),
    ),
)
_HF_CLIP: Final = _Renaming(
    rf"{_TOP}embeddings\.patch_embedding\.weight",  # CLIP, SigLIP: whole, or the vision tower
    (
        (rf"{_VISION}embeddings\.class_embedding", "cls_token"),
        (rf"{_VISION}embeddings\.patch_embedding\.{_KINDS}", r"patch_embed.proj.\1"),
        (rf"{_VISION}embeddings\.position_embedding\.weight", "pos_embed"),
        (rf"{_VISION}pre_layrnorm\.{_KINDS}", r"norm_pre.\1"),
        (rf"{_VISION_LAYER}self_attn\.(q|k|v)_proj\.{_KINDS}", r"blocks.\1.attn.\2.\3"),
        (rf"{_VISION_LAYER}self_attn\.out_proj\.{_KINDS}", r"blocks.\1.attn.proj.\2"),
        (rf"{_VISION_LAYER}layer_norm([12])\.{_KINDS}", r"blocks.\1.norm\2.\3"),
        (rf"{_VISION_LAYER}mlp\.(fc[12])\.{_KINDS}", r"blocks.\1.mlp.\2.\3"),
        (rf"{_VISION}post_layernorm\.{_KINDS}", r"norm.\1"),
        (rf"{_VISION}head\.probe", "attn_pool.latent"),
        (rf"{_VISION}head\.attention\.in_proj_(\w+)", r"attn_pool.qkv.\1"),
        (rf"{_VISION}head\.attention\.out_proj\.{_KINDS}", r"attn_pool.proj.\1"),
        (rf"{_VISION}head\.layernorm\.{_KINDS}", r"attn_pool.norm.\1"),
        (rf"{_VISION}head\.mlp\.(fc[12])\.{_KINDS}", r"attn_pool.mlp.\1.\2"),
    ),
)
_HF_RESNET: Final = _Renaming(
    rf"{_TOP}embedder\.embedder\.convolution\.weight",
    (
        (rf"{_TOP}embedder\.embedder\.convolution\.weight", "conv1.weight"),
        (rf"{_TOP}embedder\.embedder\.normalization\.(\w+)", r"bn1.\1"),
        *(
            (
                rf"{_TOP}encoder\.stages\.{s}\.layers\.(\d+)\.{theirs}\.(\w+)",
                rf"layer{s + 1}.\1.{ours}.\2",
            )
            for s in range(4)
            for theirs, ours in (
                (r"shortcut\.convolution", "downsample.0"),
                (r"shortcut\.normalization", "downsample.1"),
                *((rf"layer\.{k}\.convolution", f"conv{k + 1}") for k in range(3)),
                *((rf"layer\.{k}\.normalization", f"bn{k + 1}") for k in range(3)),
            )
        ),
        (rf"classifier\.1\.{_KINDS}", r"fc.\1"),
    ),
)
_HF_CONVNEXT: Final = _Renaming(
    rf"{_TOP}encoder\.stages\.0\.layers\.0\.dwconv\.weight",
    (
        (rf"{_TOP}embeddings\.patch_embeddings\.{_KINDS}", r"stem.0.\1"),
        (rf"{_TOP}embeddings\.layernorm\.{_KINDS}", r"stem.1.\1"),
        (
            rf"{_TOP}encoder\.stages\.(\d)\.downsampling_layer\.([01])\.{_KINDS}",
            r"stages.\1.downsample.\2.\3",
        ),
        *(
            (
                rf"{_TOP}encoder\.stages\.(\d)\.layers\.(\d+)\.{theirs}\.{_KINDS}",
                rf"stages.\1.blocks.\2.{ours}.\3",
            )
            for theirs, ours in (
                ("dwconv", "conv_dw"),
                ("layernorm", "norm"),
                ("pwconv1", "mlp.fc1"),
                ("pwconv2", "mlp.fc2"),
            )
        ),
        (
            rf"{_TOP}encoder\.stages\.(\d)\.layers\.(\d+)\.layer_scale_parameter",
            r"stages.\1.blocks.\2.gamma",
        ),
        (rf"{_TOP}layernorm\.{_KINDS}", r"head.norm.\1"),
        (rf"classifier\.{_KINDS}", r"head.fc.\1"),
    ),
)
_TORCHVISION_VIT: Final = _Renaming(
    r"encoder\.layers\.encoder_layer_0\.ln_1\.weight",
    (
        (r"class_token", "cls_token"),
        (r"encoder\.pos_embedding", "pos_embed"),
        (rf"conv_proj\.{_KINDS}", r"patch_embed.proj.\1"),
        (rf"encoder\.ln\.{_KINDS}", r"norm.\1"),
        (rf"heads\.head\.{_KINDS}", r"head.\1"),
        *(
            (rf"encoder\.layers\.encoder_layer_(\d+)\.{theirs}{_KINDS}", rf"blocks.\1.{ours}.\2")
            for theirs, ours in (
                (r"ln_1\.", "norm1"),
                (r"ln_2\.", "norm2"),
                (r"self_attention\.in_proj_", "attn.qkv"),
                (r"self_attention\.out_proj\.", "attn.proj"),
                (r"mlp\.(?:0|linear_1)\.", "mlp.fc1"),
                (r"mlp\.(?:3|linear_2)\.", "mlp.fc2"),
            )
        ),
    ),
)


def _clip(network: nn.Module, state: State) -> dict[str, Tensor] | None:
    """CLIP's and SigLIP's towers as transformers saves them; shapes as timm has them."""
    renamed = _HF_CLIP(network, state)
    if renamed is None:
        return None
    if "pos_embed" in renamed:
        renamed["pos_embed"] = renamed["pos_embed"].unsqueeze(0)
    if "cls_token" in renamed:
        renamed["cls_token"] = renamed["cls_token"].reshape(1, 1, -1)
    for kind in ("weight", "bias"):  # the pooling of SigLIP: one query of its own, so keys and values apart
        pooled = renamed.pop(f"attn_pool.qkv.{kind}", None)
        if pooled is not None:
            third = len(pooled) // 3
            renamed[f"attn_pool.q.{kind}"], renamed[f"attn_pool.kv.{kind}"] = pooled[:third], pooled[third:]
    return renamed


_TORCHVISION_ORDERED: Final = {"EfficientNet": None, "MobileNetV3": 1e-3, "ConvNeXt": None}
"""timm classes that compute what torchvision's network of that design does, layer by layer in the same
order, under other names -> epsilon of torchvision's batch norm where timm's is another.
"""


def _torchvision_ordered(network: nn.Module, state: State) -> dict[str, Tensor] | None:
    """The MobileNet, EfficientNet or ConvNeXt of torchvision: entry by entry in order, if the numbers agree.

    Batch norm divides by √(variance + epsilon): what the epsilons differ by is put into the variance, so that
    the network gives the same in evaluation.
    """
    kind = type(network).__name__
    theirs = [(key, value) for key, value in state.items() if not key.endswith(_COUNTER)]
    ours = [(key, value) for key, value in network.state_dict().items() if not key.endswith(_COUNTER)]
    if kind not in _TORCHVISION_ORDERED or "features.0.0.weight" not in state or len(theirs) != len(ours):
        return None
    made = {
        key: value.reshape(own.shape) if _alike(own, value) else value
        for (key, own), (_, value) in zip(ours, theirs, strict=True)
    }
    epsilon = _TORCHVISION_ORDERED[kind]
    for name, module in network.named_modules():
        if epsilon is not None and isinstance(module, nn.BatchNorm2d):
            variance = made[f"{name}.running_var"]
            made[f"{name}.running_var"] = variance + (epsilon - module.eps)
    return made


def _alike(one: Tensor, other: Tensor) -> bool:
    """The same but for sides of one: a 1 x 1 convolution is a matrix."""
    return [n for n in one.shape if n > 1] == [n for n in other.shape if n > 1]


Layout = Callable[[nn.Module, State], dict[str, Tensor] | None]
"""A network and a state dict -> the same in the network's names; None where it is not of this layout."""

_LAYOUTS: Final[dict[str, Layout]] = {
    "transformers' ViT, DeiT, MAE and DINOv2": _HF_VIT.__call__,
    "transformers' CLIP and SigLIP": _clip,
    "transformers' ResNet": _HF_RESNET.__call__,
    "transformers' ConvNeXt": _HF_CONVNEXT.__call__,
    "torchvision's ViT": _TORCHVISION_VIT.__call__,
    "torchvision's MobileNet, EfficientNet and ConvNeXt": _torchvision_ordered,
}


def _check_activation(network: nn.Module, folder: Path) -> None:
    """CLIP of OpenAI and its like use another GELU, which the weights' names do not tell."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("vision_config", config)
        quick = config.get("hidden_act") == "quick_gelu"
    except (OSError, ValueError, AttributeError):
        return
    own = any(type(module).__name__ == "QuickGELU" for module in network.modules())
    if quick != own and "hidden_act" in config:
        raise RequestError(
            f"{folder}: its network uses {config['hidden_act']}, which this model does not; for quick_gelu "
            "take the timm model with clip_quickgelu in its name, as vit_base_patch16_clip_quickgelu_224"
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
