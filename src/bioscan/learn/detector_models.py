"""Detector networks: a dense one of our own, and DETR, RT-DETR v2 and D-FINE of transformers; and what they
start from.

B: batch, C: channel, H, W: pixels, Q: boxes that a network gives of each picture.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from bioscan.errors import DataError, RequestError, unknown
from bioscan.learn.compat import import_transformers
from bioscan.learn.detector_dense import DenseDetector, timm_backbone
from bioscan.learn.detector_images import InputSpec
from bioscan.learn.detector_network import DetectorNetwork


class _Family(NamedTuple):
    """An architecture of transformers."""

    config: str
    network: str
    defaults: dict[str, Any]
    """Of the configuration, where it starts from random weights."""
    hub: str
    """Its pretrained weights on the Hugging Face hub: COCO, Apache-2.0."""
    softmax: bool
    """Scores are a softmax with a class for «nothing» (DETR), else a sigmoid each."""
    input: InputSpec


_PLAIN: Final = InputSpec(mode="square", size=640, mean=(0.0,) * 3, std=(1.0,) * 3)
FAMILIES: Final[dict[str, _Family]] = {
    "detr": _Family(
        "DetrConfig",
        "DetrForObjectDetection",
        {
            "backbone_config": {
                "model_type": "timm_backbone",
                "backbone": "resnet50",
                "features_only": True,
                "use_pretrained_backbone": False,
                "out_indices": [1, 2, 3, 4],
            },
        },
        "facebook/detr-resnet-50",
        True,
        InputSpec(mode="shorter_side", size=800),
    ),
    "rt-detr": _Family(  # PekingU/rtdetr_v2_r18vd
        "RTDetrV2Config",
        "RTDetrV2ForObjectDetection",
        {
            "backbone_config": {
                "model_type": "rt_detr_resnet",
                "layer_type": "basic",
                "depths": [2, 2, 2, 2],
                "hidden_sizes": [64, 128, 256, 512],
                "out_features": ["stage2", "stage3", "stage4"],
            },
            "encoder_in_channels": [128, 256, 512],
            "hidden_expansion": 0.5,
            "decoder_layers": 3,
            "freeze_backbone_batch_norms": False,
        },
        "PekingU/rtdetr_v2_r18vd",
        False,
        _PLAIN,
    ),
    "d-fine": _Family(  # ustc-community/dfine-small-coco: HGNetV2-B0
        "DFineConfig",
        "DFineForObjectDetection",
        {
            "backbone_config": {
                "model_type": "hgnet_v2",
                "stem_channels": [3, 16, 16],
                "stage_in_channels": [16, 64, 256, 512],
                "stage_mid_channels": [16, 32, 64, 128],
                "stage_out_channels": [64, 256, 512, 1024],
                "hidden_sizes": [64, 256, 512, 1024],
                "stage_num_blocks": [1, 1, 2, 1],
                "stage_downsample": [False, True, True, True],
                "stage_light_block": [False, False, True, True],
                "stage_kernel_size": [3, 3, 5, 5],
                "stage_numb_of_layers": [3, 3, 3, 3],
                "use_learnable_affine_block": True,
                "out_indices": [2, 3, 4],
            },
            "encoder_in_channels": [256, 512, 1024],
            "hidden_expansion": 0.5,
            "depth_mult": 0.34,
            "decoder_layers": 3,
            "decoder_n_points": [3, 6, 3],
            "freeze_backbone_batch_norms": False,
        },
        "ustc-community/dfine-small-coco",
        False,
        _PLAIN,
    ),
}

DENSE_INPUT: Final = InputSpec(mode="square", size=256)


class TransformersDetector(DetectorNetwork):
    """A detector of transformers with one class."""

    def __init__(self, architecture: str, model: nn.Module) -> None:
        super().__init__()
        self.family = FAMILIES[architecture]
        self.model = model

    def loss(self, images_BCHW: Tensor, mask_BHW: Tensor | None, boxes: Sequence[Tensor]) -> Tensor:
        """As `DetectorNetwork` says: matched set loss, with the configuration's own weights."""
        device = images_BCHW.device
        labels = []
        for boxes_K4 in boxes:
            corners_K4 = boxes_K4.to(device)
            low_K2, high_K2 = corners_K4[:, :2], corners_K4[:, 2:]
            centres_K4 = torch.cat([(low_K2 + high_K2) / 2, high_K2 - low_K2], dim=1)
            classes_K = torch.zeros(len(boxes_K4), dtype=torch.int64, device=device)
            labels.append({"class_labels": classes_K, "boxes": centres_K4})
        loss: Tensor = self._run(images_BCHW, mask_BHW, labels=labels).loss
        return loss

    def predict(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """As `DetectorNetwork` says."""
        made = self._run(images_BCHW, None)
        logits_BQL, centres_BQ4 = made.logits.float(), made.pred_boxes.float()
        if self.family.softmax:
            scores_BQ = logits_BQL.softmax(-1)[..., :-1].amax(-1)
        else:
            scores_BQ = logits_BQL.sigmoid().amax(-1)
        centre_BQ2, half_BQ2 = centres_BQ4[..., :2], centres_BQ4[..., 2:] / 2
        return torch.cat([centre_BQ2 - half_BQ2, centre_BQ2 + half_BQ2], dim=-1), scores_BQ

    def _run(self, images_BCHW: Tensor, mask_BHW: Tensor | None, **options: Any) -> Any:
        if mask_BHW is not None:
            options["pixel_mask"] = mask_BHW.to(images_BCHW.device).long()
        return self.model(pixel_values=images_BCHW, **options)


def input_of(architecture: str, image_size: int | None = None) -> InputSpec:
    """What an architecture sees, at its usual size or another."""
    spec = DENSE_INPUT if architecture == "dense" else FAMILIES[architecture].input
    if image_size is None:
        return spec
    longest = round(spec.longest * image_size / spec.size)
    return InputSpec(mode=spec.mode, size=image_size, longest=longest, mean=spec.mean, std=spec.std)


def create(
    architecture: str, config: Mapping[str, Any] | None = None
) -> tuple[DetectorNetwork, dict[str, Any]]:
    """A network with random weights, and the configuration that it can be made from again (JSON).

    Args:
        architecture: `dense`, `detr`, `rt-detr` or `d-fine`.
        config: dense: `backbone` and `channels`; else a configuration of transformers. None: the usual.

    Raises:
        RequestError: an unknown architecture or backbone, or a configuration of another one.
    """
    if architecture == "dense":
        options = {"backbone": "tiny", "channels": 64, **(config or {})}
        return DenseDetector(**options), options
    if architecture not in FAMILIES:
        raise unknown("architecture", architecture, ["dense", *FAMILIES])
    made = transformers_config(architecture, FAMILIES[architecture].defaults if config is None else config)
    return TransformersDetector(architecture, _class(architecture)(made)), as_json(made)


def transformers_config(architecture: str, config: Mapping[str, Any]) -> Any:
    """A transformers configuration, with one class.

    Raises:
        RequestError: it is none, or one of another architecture.
    """
    kind = getattr(import_transformers(), FAMILIES[architecture].config)
    given = config.get("model_type")
    if given is not None and given != kind.model_type:
        names = {getattr(import_transformers(), f.config).model_type: name for name, f in FAMILIES.items()}
        way = f"; pass --architecture {names[given]}" if given in names else ""
        raise RequestError(f"the configuration is one of {given}, not of {kind.model_type}{way}")
    try:
        made = kind.from_dict({**config, "id2label": {0: "insect"}, "label2id": {"insect": 0}})
    except Exception as error:  # noqa: BLE001 - each configuration has checks of its own
        raise RequestError(f"no configuration of {architecture} ({first_line(error)})") from None
    backbone = made.backbone_config
    if hasattr(backbone, "use_pretrained_backbone"):
        backbone.use_pretrained_backbone = False  # weights come from one place: ours
    return made


def as_json(config: Any) -> dict[str, Any]:
    """A transformers configuration as plain values."""
    made: dict[str, Any] = config.to_diff_dict()
    made.pop("transformers_version", None)  # the record has it
    return made


def with_weights(
    architecture: str, config: Mapping[str, Any], state: Mapping[str, Tensor], *, strict: bool, where: str
) -> DetectorNetwork:
    """A network of a configuration with a state dict, in transformers' names of any of its versions.

    Args:
        architecture: Its name.
        config: Its configuration.
        state: Names to tensors.
        strict: Every weight must be there; else the class heads may be new (another number of classes).
        where: What the weights are, for messages.

    Raises:
        DataError: weights that are absent or of another shape.
    """
    if architecture == "dense":
        return _dense_with_weights(config, state, where)
    made = transformers_config(architecture, config)
    try:
        model, report = _class(architecture).from_pretrained(
            None,
            config=made,
            state_dict=dict(state),
            ignore_mismatched_sizes=not strict,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except Exception as error:  # noqa: BLE001 - it raises many kinds
        raise DataError(f"{where}: the weights do not fit {architecture} ({first_line(error)})") from None
    wrong = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if not strict:
        wrong = [key for key in wrong if not _is_class_head(key)]
    if wrong:
        raise _misfit(architecture, wrong, len(model.state_dict()), where)
    return TransformersDetector(architecture, model)


def _dense_with_weights(
    config: Mapping[str, Any], state: Mapping[str, Tensor], where: str
) -> DetectorNetwork:
    network, _ = create("dense", config)
    own = network.state_dict()
    wrong = [k for k, v in own.items() if k not in state or state[k].shape != v.shape]
    if wrong or set(state) - set(own):
        raise _misfit("dense", wrong or sorted(set(state) - set(own)), len(own), where)
    network.load_state_dict(dict(state))
    return network


def _misfit(architecture: str, wrong: Sequence[str], total: int, where: str) -> DataError:
    return DataError(
        f"{where}: {len(wrong):,} of {total:,} weights of {architecture} are absent or of another shape "
        f"(first: {sorted(wrong)[0]}); is it another architecture?"
    )


def _is_class_head(key: str) -> bool:
    """Whether a weight depends on the number of classes."""
    return any(
        part in key
        for part in ("class_labels_classifier", "class_embed", "enc_score_head", "denoising_class_embed")
    )


def _class(architecture: str) -> Any:
    return getattr(import_transformers(), FAMILIES[architecture].network)


def first_line(error: Exception) -> str:
    """What an exception of another library says, for a message of ours."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def is_backbone(name: str) -> bool:
    """Whether a parameter belongs to the backbone."""
    return "backbone." in name


def create_dense(backbone: str, weights: str) -> tuple[DetectorNetwork, dict[str, Any]]:
    """A dense detector whose backbone has weights, and its configuration.

    Args:
        backbone: `tiny`, or a timm name.
        weights: `none`, `hub` (timm's), or a file that timm can read.

    Raises:
        RequestError: the weights cannot be had.
    """
    if weights != "none" and backbone == "tiny":
        raise RequestError(
            f"--weights {weights}: the backbone 'tiny' of dense has none but those of our detector folders; "
            "pass --backbone with a timm model, such as resnet18, or another --architecture"
        )
    network, config = create("dense", {"backbone": backbone})
    if weights == "none":
        return network, config
    if weights != "hub" and not Path(weights).is_file():
        raise RequestError(f"{weights}: no such weights file; dense takes a file, 'hub' or 'none'")
    assert isinstance(network, DenseDetector)
    try:
        network.backbone = timm_backbone(
            backbone, pretrained=True, file=None if weights == "hub" else weights
        )[0]
    except Exception as error:  # noqa: BLE001 - the hub client and the parsers raise many kinds
        raise RequestError(
            f"the weights of {backbone} cannot be had from {weights} ({first_line(error)}); "
            "pass --weights FILE for a local file, or --weights none to start from random ones"
        ) from None
    return network, config


def from_hub(architecture: str, name: str) -> tuple[DetectorNetwork, dict[str, Any]]:
    """A network from a local folder of transformers or the Hugging Face hub, and its configuration.

    Raises:
        RequestError: it cannot be had, or is of another architecture.
    """
    is_local = Path(name).is_dir()
    if not is_local and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise RequestError(
            f"{name}: no such weights; --weights takes a folder, a file, an id on the Hugging Face hub "
            "(owner/name), 'hub' or 'none'"
        )
    transformers = import_transformers()
    try:
        given = transformers.AutoConfig.from_pretrained(name).to_dict()
    except Exception as error:  # noqa: BLE001 - the hub client raises many kinds
        raise _unreachable(name, error, is_local=is_local) from None
    config = transformers_config(architecture, given)
    try:
        model, report = _class(architecture).from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:  # noqa: BLE001 - as above
        raise _unreachable(name, error, is_local=is_local) from None
    wrong = [key for key in report["missing_keys"] if not _is_class_head(key)]
    if wrong:
        raise _misfit(architecture, wrong, len(model.state_dict()), name)
    return TransformersDetector(architecture, model), as_json(config)


def _unreachable(name: str, error: Exception, *, is_local: bool) -> RequestError:
    if is_local:
        return RequestError(f"{name}: no folder of a transformers model ({first_line(error)})")
    return RequestError(
        f"{name} cannot be fetched from the Hugging Face hub ({first_line(error)}); download its config.json "
        "and model.safetensors where there is a network and pass --weights FOLDER, or --weights none"
    )


def safetensors_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors file.

    Raises:
        DataError: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise DataError(f"{path}: cannot be read as weights ({first_line(error)})") from None
