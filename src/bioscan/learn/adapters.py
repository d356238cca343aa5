"""What of a network is trained, and how fast: frozen backbones, low-rank adapters, learning rates by layer.

Low-rank adapters: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from bioscan.errors import RequestError
from bioscan.learn.compat import import_timm
from bioscan.learn.settings import TrainSettings

_ADAPTED: Final = ("qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj", "proj", "out_proj")
"""Linear layers of an attention block, as timm names them."""
_PARTS: Final = ("lora_down", "lora_up", "lora_scale")


class LoraLinear(nn.Linear):
    """A linear layer whose own weight stays, plus a product of two thin matrices that is trained.

    y = x Wᵀ + b + alpha / rank · (x Aᵀ) Bᵀ, with A drawn and B zero: at first it gives what the layer gave.
    """

    lora_scale: Tensor

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias=bias, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        own = linear.weight.detach()
        self.lora_down = nn.Parameter(own.new_empty(rank, linear.in_features))
        self.lora_up = nn.Parameter(own.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))  # as nn.Linear draws its weight
        self.register_buffer("lora_scale", own.new_tensor(alpha / rank))

    def forward(self, input: Tensor) -> Tensor:
        """The layer's value and the adapter's."""
        down = functional.linear(input, self.lora_down)
        adapted = functional.linear(down, self.lora_up) * self.lora_scale
        return functional.linear(input, self.weight, self.bias) + adapted


def add_lora(network: nn.Module, *, rank: int, alpha: float) -> int:
    """Put adapters into a transformer's attention, in place; they and the head are trained, all else stays.

    The state dict keeps every name that it had and gains `lora_down`, `lora_up` and `lora_scale` beside each
    adapted weight; `merge_lora` takes them out again.

    Args:
        network: A timm transformer.
        rank: Rows of the thin matrices.
        alpha: The adapters count alpha / rank times.

    Returns:
        How many layers were adapted.

    Raises:
        RequestError: the network has no attention layers that can be adapted.
    """
    head = id(network.get_classifier())  # type: ignore[operator]
    adapted = [
        (parent, name, layer)
        for parent in network.modules()
        if "attention" in type(parent).__name__.lower() and getattr(parent, "q_bias", None) is None
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and name in _ADAPTED and id(layer) != head
    ]
    if not adapted:
        raise RequestError(
            f"{type(network).__name__} has no attention layers that low-rank adapters go into: --lora-rank "
            "is for transformers such as vit_base_patch16_224"
        )
    freeze_backbone(network)
    for parent, name, layer in adapted:
        parent.set_submodule(name, LoraLinear(layer, rank, alpha))
    return len(adapted)


def merge_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with its adapters added into the weights: that of the ordinary backbone.

    A state dict without adapters comes back as it is.
    """
    merged = {name: value for name, value in state.items() if name.rpartition(".")[2] not in _PARTS}
    for name, down in state.items():
        layer, _, part = name.rpartition(".")
        if part == "lora_down":
            weight = merged[f"{layer}.weight"]
            exact = torch.promote_types(weight.dtype, torch.float32)
            up, scale = (state[f"{layer}.{part}"].to(exact) for part in ("lora_up", "lora_scale"))
            merged[f"{layer}.weight"] = (weight.to(exact) + up @ down.to(exact) * scale).to(weight.dtype)
    return merged


def freeze_backbone(network: nn.Module) -> None:
    """Leave everything but the head untrained, in place. `train_mode` keeps its statistics too."""
    network.requires_grad_(False)
    for classifier in classifiers(network):
        classifier.requires_grad_(True)


def train_mode(network: nn.Module) -> None:
    """`network.train()`, but parts in which nothing is trained stay in evaluation mode.

    So a frozen batch norm keeps its statistics, and a frozen backbone gives the same features each time.
    """
    network.train()
    for module in network.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def parameter_groups(network: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """What an optimizer is made of: groups with `params`, `weight_decay` and `lr_scale`.

    AdamW spares vectors (biases and norms) from weight decay, SGD decays all, as the paper's program does.
    A parameter's rate is `lr_scale` times the run's: 1, or with layer decay d < 1 d to the power of the
    layers above it, the head having none above.
    """
    scales = _layer_scales(network, settings.layer_decay)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decayed = settings.optimizer == "sgd" or parameter.ndim > 1
            groups.setdefault((decayed, scales.get(name, 1.0)), []).append(parameter)
    return [
        {"params": members, "weight_decay": settings.weight_decay if decayed else 0.0, "lr_scale": scale}
        for (decayed, scale), members in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def classifiers(network: nn.Module) -> list[nn.Module]:
    """The modules that are the head: one, or two in distilled transformers."""
    head = network.get_classifier()  # type: ignore[operator]
    return list(head) if isinstance(head, tuple | list) else [head]


def _layer_scales(network: nn.Module, decay: float) -> dict[str, float]:
    """Parameter name -> share of the learning rate; empty where all have the same."""
    if decay == 1:
        return {}
    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        raise RequestError(f"{type(network).__name__} has no order of layers: leave --layer-decay at 1")
    named = import_timm().models.group_parameters(network, matcher(coarse=False), reverse=True)
    last = max(named.values())  # the head: it matches no pattern
    return {name: decay ** (last - layer) for name, layer in named.items()}
