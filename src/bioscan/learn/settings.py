"""Settings of a training run and the recipes that ship. No torch here: the command line reads this for its
help.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

from bioscan.config import setting
from bioscan.errors import RequestError, unknown
from bioscan.vocabulary import EXPERIMENTS, RANKS


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that a training run follows from, beside its data."""

    experiment: str = setting("large_insect_order", "Split column that gives each specimen its role.")
    rank: str | None = setting(None, "Rank to classify at; none: family or order, as the experiment has it.")
    ranks: tuple[str, ...] = setting(
        (), "Several ranks at once, as order,family,genus,species: one model that names all of them."
    )
    softmax: Literal["flat", "conditional"] = setting(
        "flat", "One softmax over all leaf taxa, or one among the children of each taxon."
    )
    within: str | None = setting(
        None, "Only specimens below this taxon, e.g. Lepidoptera or order:Lepidoptera."
    )
    model: str = setting("resnet18", "Backbone: any timm model name, or a name of the paper's program.")
    weights: str = setting(
        "none", "Where the backbone starts: 'none' (random), 'hub' (pretrained weights), a file or a folder."
    )
    freeze: bool = setting(False, "Train the head alone; the backbone stays as it starts.")
    lora_rank: int = setting(
        0, "Rank of low-rank adapters in the attention of a transformer, trained in place of it; 0: none."
    )
    lora_alpha: float = setting(16.0, "Adapters count alpha / rank times.")
    layer_decay: float = setting(1.0, "Learning rate of each layer as a share of that of the layer above.")
    image_size: int = setting(256, "Shorter side that images are resized to, pixels.")
    crop_size: int = setting(224, "Side of the square that the network sees, pixels.")
    crop: Literal["random_resized", "random"] = setting(
        "random_resized", "Training crop: a square of random area and place, or of random place only."
    )
    min_area: float = setting(0.4, "Smallest area of a random_resized crop, as a share of the image.")
    flip: Literal["none", "horizontal", "both"] = setting("both", "Random flips.")
    rotate: bool = setting(True, "Rotate by any angle, at random.")
    colour: float = setting(0.2, "Strength of random brightness, contrast and saturation.")
    background: float = setting(
        0.0, "Share of images whose background, the colour of the border, is changed at random."
    )
    random_ops: int = setting(0, "Random operations a picture (as RandAugment, suited to specimens).")
    random_strength: float = setting(0.5, "How strong these are, 0 to 1.")
    mixup: float = setting(0.0, "Alpha of mixup: pictures blended in pairs; 0: not.")
    cutmix: float = setting(0.0, "Alpha of CutMix: a patch of another picture; 0: not. With mixup: by turns.")
    normalise: bool = setting(True, "Subtract the backbone's mean and divide by its deviation.")
    epochs: int = setting(60, "Passes over the training specimens.")
    batch_size: int = setting(64, "Specimens per step, over all processes.")
    accumulate: int = setting(1, "Parts that a step is computed in: less memory, the same step.")
    clip_norm: float | None = setting(None, "Largest norm of a step's gradient; none: not clipped.")
    sampler: Literal["uniform", "class_balanced", "square_root", "repeat_factor"] = setting(
        "uniform", "How often specimens are seen: alike, or more often those of rare taxa."
    )
    repeat_threshold: float = setting(
        1e-3, "Taxa with a smaller share are seen more often (repeat_factor): by the root of what is missing."
    )
    ema: float = setting(0.0, "Keep the running mean of the weights, with this decay; 0: the weights.")
    optimizer: Literal["adamw", "sgd"] = setting("adamw", "AdamW, or SGD with Nesterov momentum.")
    lr: float = setting(1e-3, "Highest learning rate.")
    momentum: float = setting(0.9, "Momentum of SGD.")
    weight_decay: float = setting(0.05, "Weight decay; AdamW spares biases and norms.")
    schedule: Literal["cosine", "steps"] = setting("cosine", "Cosine to zero, or x0.1 at each of `steps`.")
    warmup: int = setting(3, "Epochs of linear warm-up (cosine).")
    steps: tuple[int, ...] = setting((20, 25), "Epochs done when the rate drops tenfold (steps).")
    loss: Literal["cross_entropy", "focal", "class_balanced", "logit_adjusted", "ldam"] = setting(
        "cross_entropy", "Loss; cross_entropy and logit_adjusted also learn from partly named specimens."
    )
    coarse: Literal["refuse", "drop"] = setting(
        "refuse", "Partly named specimens, where the loss cannot take them: refuse them, or drop and count."
    )
    focal_gamma: float = setting(2.0, "Gamma of the focal loss.")
    balance_beta: float = setting(0.999, "Beta of the class-balanced weights.")
    tau: float = setting(1.0, "Strength of the logit adjustment.")
    ldam_margin: float = setting(0.5, "Margin of the rarest taxon (ldam).")
    ldam_scale: float = setting(30.0, "Scale of the cosine logits (ldam).")
    ldam_deferred: float = setting(0.8, "Share of the epochs before taxa are weighted (ldam).")
    label_smoothing: float = setting(0.0, "Label smoothing of the cross-entropy.")
    criterion: Literal["macro_top_1", "micro_top_1", "loss", "last"] = setting(
        "macro_top_1",
        "Which epoch's model is kept: the first that is best on validation by this (with several ranks, in "
        "their mean), or the last.",
    )
    calibration_share: float = setting(
        0.5,
        "Share of the validation specimens, in whole groups, kept from the choice of the epoch: thresholds "
        "and prediction sets come from them; 0: none.",
    )
    calibration_group: str = setting(
        "auto", "What is kept together in that: plate, bin, a column, none; auto: plate, else bin."
    )
    patience: int | None = setting(
        None, "Stop after so many epochs without a better criterion; none or 0: never."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "Where to compute.")
    amp: Literal["auto", "off", "bf16", "fp16"] = setting(
        "auto", "Mixed precision; auto: where the device has fast 16-bit arithmetic."
    )
    channels_last: bool = setting(True, "Memory format that convolutions like.")
    compile: bool = setting(False, "Compile the network: slower to start, faster on long runs.")
    distribute: Literal["ddp", "fsdp"] = setting(
        "ddp", "Under torchrun: a copy of the network in each process, or its parts spread over them."
    )
    workers: int | None = setting(None, "Loader processes; none: by the number of cores.")
    threads: int | None = setting(None, "torch threads; none: as torch has it, all cores.")
    cache_mb: int = setting(
        1024, "Without loader processes, keep resized images if all fit in so many MB (0: never)."
    )
    seed: int = setting(1, "Seed of weights, order and augmentation.")

    def __post_init__(self) -> None:
        asked = [rank for part in self.ranks for rank in part.split(",") if rank]
        for rank in asked:
            if rank not in RANKS:
                raise unknown("rank", rank, RANKS)
        object.__setattr__(self, "ranks", tuple(rank for rank in RANKS if rank in asked))
        if self.ranks and self.rank is not None:
            raise RequestError("rank is for one rank, ranks for several: choose one")
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                span = f"at least {low}" if high == _ANY else f"from {low} to {high}"
                raise RequestError(f"{name} is {value}; it must be {span}")
        for name in ("lr", "min_area", "layer_decay", "clip_norm"):
            if getattr(self, name) == 0:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.crop_size > self.image_size:
            raise RequestError(f"crop_size {self.crop_size} is larger than image_size {self.image_size}")
        if self.label_smoothing and self.loss != "cross_entropy":
            raise RequestError("label_smoothing goes with loss cross_entropy only")
        if self.softmax == "conditional" and self.loss != "cross_entropy":
            raise RequestError(f"loss {self.loss} adjusts leaf taxa: it goes with softmax flat only")
        if self.freeze and self.lora_rank:
            raise RequestError("freeze trains the head alone, lora_rank adapters too: choose one")

    @property
    def target_ranks(self) -> tuple[str, ...]:
        """The ranks that are named, root down: those asked for, else the experiment's own, else order."""
        if self.ranks:
            return self.ranks
        if self.rank is not None:
            return (self.rank,)
        return (EXPERIMENTS[self.experiment].rank if self.experiment in EXPERIMENTS else "order",)


_ANY: Final = float("inf")
_BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "image_size": (1, _ANY),
    "crop_size": (1, _ANY),
    "min_area": (0, 1),
    "colour": (0, 1),
    "background": (0, 1),
    "random_ops": (0, _ANY),
    "random_strength": (0, 1),
    "mixup": (0, _ANY),
    "cutmix": (0, _ANY),
    "lora_rank": (0, _ANY),
    "lora_alpha": (0, _ANY),
    "layer_decay": (0, 1),
    "accumulate": (1, _ANY),
    "clip_norm": (0, _ANY),
    "repeat_threshold": (0, 1),
    "ema": (0, 1),
    "balance_beta": (0, 1),
    "tau": (0, _ANY),
    "ldam_margin": (0, _ANY),
    "ldam_scale": (0, _ANY),
    "ldam_deferred": (0, 1),
    "epochs": (1, _ANY),
    "batch_size": (2, _ANY),  # batch norm cannot train on one
    "lr": (0, _ANY),
    "momentum": (0, 1),
    "weight_decay": (0, _ANY),
    "warmup": (0, _ANY),
    "focal_gamma": (0, _ANY),
    "label_smoothing": (0, 1),
    "calibration_share": (0, 0.9),
    "patience": (0, _ANY),
    "workers": (0, _ANY),
    "threads": (1, _ANY),
    "cache_mb": (0, _ANY),
    "seed": (0, _ANY),
}

RECIPES: Final[dict[str, dict[str, Any]]] = {
    "default": {},
    "paper": {  # every default of the paper's program: `main.py` of zahrag/BIOSCAN-1M at 6683867
        "model": "resnet50.tv_in1k",  # timm's name for torchvision's ImageNet weights, version 1
        "weights": "hub",
        "image_size": 256,
        "crop_size": 224,
        "crop": "random",
        "flip": "horizontal",
        "rotate": False,
        "colour": 0.0,
        "normalise": False,
        "epochs": 100,
        "batch_size": 32,
        "optimizer": "sgd",
        "lr": 1e-3,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": "steps",
        "steps": (20, 25),
        "loss": "cross_entropy",
        "criterion": "micro_top_1",
        "calibration_share": 0.0,
        "amp": "off",
        "channels_last": False,
    },
}
