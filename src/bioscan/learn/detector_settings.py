"""Settings of a detector's training and the recipes that ship. No torch here: the command line reads this for
its help.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

from bioscan.config import setting
from bioscan.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class DetectorSettings:
    """Everything that a detector's training follows from, beside its data."""

    architecture: Literal["dense", "detr", "rt-detr", "d-fine"] = setting(
        "dense",
        "dense: small, trains from scratch on a CPU; detr: DETR-R50, as the paper; rt-detr: RT-DETR v2 "
        "R18; d-fine: D-FINE S. Those three want pretrained weights.",
    )
    backbone: str = setting("tiny", "Of dense: tiny, or any timm model that gives feature maps.")
    weights: str = setting(
        "none",
        "Where it starts: 'none' (random), 'hub' (the architecture's own COCO weights), an id on the Hugging "
        "Face hub, or a local folder, .safetensors, .pth or .ckpt file.",
    )
    image_size: int | None = setting(
        None,
        "Pixels that the network sees: side of the square, for detr the shorter side; none: 256 for dense, "
        "800 for detr, 640 for the others.",
    )
    flip: Literal["none", "horizontal", "both"] = setting("both", "Random flips.")
    turn: bool = setting(True, "Random quarter turns.")
    scale: float = setting(1.5, "Random enlargement, from 1/SCALE to SCALE; 1: none.")
    shift: float = setting(0.15, "Random shift, as a share of the picture.")
    colour: float = setting(0.25, "Strength of random brightness, contrast, tint and saturation.")
    boxes: Literal["all", "first"] = setting("all", "Boxes of a picture to learn: all, or its first alone.")
    balance: float = setting(
        1.0,
        "Several sets: each is drawn from by its size to this power. 1: as large as they are, 0: all equal.",
    )
    validation_share: float = setting(
        0.1, "Share of each set's pictures kept for validation, where no validation set is given."
    )
    epochs: int = setting(40, "Passes over the training pictures.")
    max_steps: int | None = setting(None, "Stop after so many steps at the latest; none: after EPOCHS.")
    batch_size: int = setting(8, "Pictures per step.")
    lr: float | None = setting(None, "Highest learning rate; none: 2e-3 for dense, 1e-4 else.")
    backbone_lr: float | None = setting(None, "The backbone's; none: a tenth of LR with weights, else LR.")
    weight_decay: float = setting(1e-4, "Weight decay of AdamW, which spares biases and norms.")
    schedule: Literal["cosine", "constant"] = setting("cosine", "Cosine to zero, or constant.")
    warmup: int = setting(100, "Steps of linear warm-up.")
    clip: float = setting(0.1, "Largest norm of the gradient; 0: any.")
    ema: float = setting(
        0.998, "Decay of the running mean of the weights, which is what is kept; 0: the weights as they are."
    )
    criterion: Literal["ap", "last"] = setting(
        "ap", "Which epoch is kept: best AP[.5:.95] on validation, or the last."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "Where to compute.")
    amp: Literal["auto", "off", "bf16", "fp16"] = setting(
        "auto", "Mixed precision; auto: where the device has fast 16-bit arithmetic."
    )
    workers: int | None = setting(None, "Threads that read pictures; none: by the number of cores.")
    threads: int | None = setting(None, "torch threads; none: as torch has it, all cores.")
    seed: int = setting(1, "Seed of weights, order and augmentation.")

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                span = f"at least {low}" if high == _ANY else f"from {low} to {high}"
                raise RequestError(f"{name} is {value}; it must be {span}")
        for name in ("lr", "backbone_lr"):
            if getattr(self, name) == 0:
                raise RequestError(f"{name} is 0; it must be above 0")
        if self.architecture == "dense" and (self.image_size or 0) % 32:
            raise RequestError(f"image_size is {self.image_size}; for dense it must be a multiple of 32")
        if self.architecture != "dense" and self.backbone != "tiny":
            raise RequestError(f"backbone goes with architecture dense only, this is {self.architecture}")

    @property
    def rates(self) -> tuple[float, float]:
        """Highest learning rates of the backbone and of the rest."""
        lr = self.lr if self.lr is not None else 2e-3 if self.architecture == "dense" else 1e-4
        if self.backbone_lr is not None:
            return self.backbone_lr, lr
        return (lr if self.weights == "none" else lr / 10), lr


_ANY: Final = float("inf")
_BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "image_size": (32, 4096),
    "scale": (1, 10),
    "shift": (0, 1),
    "colour": (0, 1),
    "balance": (0, 1),
    "validation_share": (0, 0.9),
    "epochs": (1, _ANY),
    "max_steps": (1, _ANY),
    "batch_size": (2, _ANY),  # batch norm cannot train on one
    "lr": (0, _ANY),
    "backbone_lr": (0, _ANY),
    "weight_decay": (0, _ANY),
    "warmup": (0, _ANY),
    "clip": (0, _ANY),
    "ema": (0, 0.99999),
    "workers": (1, _ANY),
    "threads": (1, _ANY),
    "seed": (0, _ANY),
}

RECIPES: Final[dict[str, dict[str, Any]]] = {
    "default": {},
    "paper": {  # bioscan-croptool: DETR-R50 of COCO, a new head of one class
        "architecture": "detr",
        "weights": "hub",
        "image_size": 800,
        "flip": "none",
        "turn": False,
        "scale": 1.0,
        "shift": 0.0,
        "colour": 0.0,
        "boxes": "first",
        "validation_share": 0.1,
        "epochs": 1_000_000,  # it counts steps
        "max_steps": 6000,
        "batch_size": 8,
        "lr": 1e-4,
        "backbone_lr": 1e-5,
        "weight_decay": 1e-4,
        "schedule": "constant",
        "warmup": 0,
        "clip": 0.1,
        "ema": 0.0,
        "criterion": "last",
        "amp": "off",
    },
}
