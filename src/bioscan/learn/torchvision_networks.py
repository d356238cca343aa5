"""The networks of torchvision that timm lacks, with timm's interface: AlexNet, SqueezeNet, ShuffleNet.

B: batch, C: channels, H, W: pixels or places, F: features.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from bioscan.learn.compat import import_torchvision


class TorchvisionNetwork(nn.Module):
    """A torchvision classifier in three parts: `features`, `neck` (up to the last layer) and `head`.

    Its interface is timm's: `forward_features`, `forward_head`, `get_classifier`, `reset_classifier`,
    `num_features`, `group_matcher`, `pretrained_cfg`.
    """

    def __init__(
        self,
        name: str,
        features: nn.Module,
        neck: nn.Module,
        make_head: Callable[[int], nn.Module],
        size: int,
    ) -> None:
        """A network without a head yet.

        Args:
            name: torchvision's.
            features: Images to maps.
            neck: Maps to features, B × F.
            make_head: Number of outputs to the last layer.
            size: F.
        """
        super().__init__()
        self.features, self.neck, self.head = features, neck, make_head(0)
        self._make_head = make_head
        self.num_features = self.head_hidden_size = size
        self.num_classes = 0
        self.pretrained_cfg = {
            "architecture": name,
            "classifier": "head",
            "input_size": (3, 224, 224),
            "fixed_input_size": False,
            "mean": (0.485, 0.456, 0.406),  # of all of torchvision's ImageNet weights
            "std": (0.229, 0.224, 0.225),
        }

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        """Maps, B × C × H × W."""
        maps_BCHW: Tensor = self.features(images_BCHW)
        return maps_BCHW

    def forward_head(self, maps_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, or what the last layer is given, B × F."""
        if isinstance(self.head, SqueezeHead) and not pre_logits:
            logits: Tensor = self.head(maps_BCHW)
            return logits
        features_BF: Tensor = self.neck(maps_BCHW)
        return features_BF if pre_logits else self.head(features_BF)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits; pooled features where the head was taken away."""
        return self.forward_head(self.forward_features(images_BCHW))

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh last layer; none for 0. The pooling is the network's own."""
        self.num_classes = num_classes
        self.head = self._make_head(num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for a learning rate each, as timm's: `coarse` or not, each stage of `features` is one."""
        return {"stem": r"^features\.0\.", "blocks": r"^features\.(\d+)\.", "neck": r"^neck\."}


class SqueezeHead(nn.Module):
    """SqueezeNet's last layer: a number per class and place, cut off below 0, then the mean over places."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.convolution = nn.Conv2d(channels, outputs, kernel_size=1)
        nn.init.normal_(self.convolution.weight, std=0.01)  # as torchvision's squeezenet.py
        nn.init.zeros_(self.convolution.bias)  # type: ignore[arg-type]

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Logits, none below 0."""
        return torch.relu(self.convolution(self.dropout(maps_BCHW))).mean((2, 3))


def _alexnet(name: str, made: Any) -> TorchvisionNetwork:
    before, last = made.classifier[:-1], made.classifier[-1]
    neck = nn.Sequential(made.avgpool, nn.Flatten(1), *before)
    return TorchvisionNetwork(name, made.features, neck, _linear(last.in_features), last.in_features)


def _squeezenet(name: str, made: Any) -> TorchvisionNetwork:
    channels = made.classifier[1].in_channels

    def head(outputs: int) -> nn.Module:
        return SqueezeHead(channels, outputs) if outputs else nn.Identity()

    return TorchvisionNetwork(name, made.features, _pooling(), head, channels)


def _shufflenet(name: str, made: Any) -> TorchvisionNetwork:
    stages = nn.Sequential(made.conv1, made.maxpool, made.stage2, made.stage3, made.stage4, made.conv5)
    return TorchvisionNetwork(name, stages, _pooling(), _linear(made.fc.in_features), made.fc.in_features)


def _pooling() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


def _linear(size: int) -> Callable[[int], nn.Module]:
    return lambda outputs: nn.Linear(size, outputs) if outputs else nn.Identity()


_MAKERS: Final[dict[str, tuple[Callable[[str, Any], TorchvisionNetwork], dict[str, str]]]] = {
    "alexnet": (
        _alexnet,
        {"classifier.1.": "neck.3.", "classifier.4.": "neck.6.", "classifier.6.": "head."},
    ),
    "squeezenet1_0": (_squeezenet, {"classifier.1.": "head.convolution."}),
    "shufflenet_v2_x1_0": (
        _shufflenet,
        {
            **{f"{part}.": f"features.{i}." for i, part in enumerate(("conv1", "maxpool", "stage2"))},
            **{f"{part}.": f"features.{i}." for i, part in enumerate(("stage3", "stage4", "conv5"), start=3)},
            "fc.": "head.",
        },
    ),
}
"""torchvision's name -> what cuts it up, and the prefixes of its state dict -> ours."""


def create(name: str, outputs: int) -> TorchvisionNetwork:
    """A torchvision network with timm's interface and random weights.

    Args:
        name: One of `NAMES`.
        outputs: Of the last layer; 0: none, the network gives features.
    """
    cut, _ = _MAKERS[name]
    network = cut(name, import_torchvision().models.get_model(name))
    network.reset_classifier(outputs)
    return network


def renamed(name: str, key: str) -> str:
    """A name of torchvision's state dict in ours."""
    for prefix, ours in _MAKERS[name][1].items():
        if key.startswith(prefix):
            return ours + key.removeprefix(prefix)
    return key


NAMES: Final = tuple(_MAKERS)
