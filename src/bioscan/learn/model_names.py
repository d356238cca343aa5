"""Names of backbones: timm's, and those of the paper's program. No torch here."""

from typing import Final

TORCHVISION: Final = "torchvision/"
"""Prefix of the networks that timm lacks."""

MODEL_NAMES: Final[dict[str, str]] = {
    # --model of the paper's program (zahrag/BIOSCAN-1M, utils.py · get_model); most are timm's names too
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnet152": "resnet152",
    "wide_resnet50_2": "wide_resnet50_2",
    "wide_resnet101_2": "wide_resnet101_2",
    "densenet121": "densenet121",
    "densenet161": "densenet161",
    "densenet169": "densenet169",
    "densenet201": "densenet201",
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "inception_v3": "inception_v3",
    "vgg11": "vgg11",
    "alexnet": TORCHVISION + "alexnet",
    "squeezenet": TORCHVISION + "squeezenet1_0",
    "shufflenet": TORCHVISION + "shufflenet_v2_x1_0",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v4": "inception_v4",
    "efficientnet_b0": "efficientnet_b0",
    "efficientnet_b1": "efficientnet_b1",
    "efficientnet_b2": "efficientnet_b2",
    "efficientnet_b3": "efficientnet_b3",
    "efficientnet_b4": "efficientnet_b4",
    "vit_base_patch16_224": "vit_base_patch16_224",
    "vit_small_patch16_224": "vit_small_patch16_224",
}
"""Name in the paper's program -> timm's name, or a torchvision network's behind `torchvision/`."""


def resolve(name: str) -> str:
    """The name that a network is made by: a timm name, or one that begins with `torchvision/`.

    >>> resolve("mobilenet_v2"), resolve("alexnet"), resolve("resnet50.tv_in1k")
    ('mobilenetv2_100', 'torchvision/alexnet', 'resnet50.tv_in1k')
    """
    return MODEL_NAMES.get(name, name)
