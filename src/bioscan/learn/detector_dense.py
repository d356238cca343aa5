"""A small dense detector: one pass over the picture; each cell of a grid scores the specimen that it lies in
and gives the distances to the four edges of its box.

Trained as in VarifocalNet (arXiv 2008.13367): the score learns the overlap of the cell's own box, so that the
best-scored box is the best box. B: batch, C: channel, H, W: cells, N: cells of all, L, T, R, B: distances.
"""

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from bioscan.errors import RequestError, near
from bioscan.learn.compat import import_timm
from bioscan.learn.detector_network import DetectorNetwork

STRIDE: Final = 8
"""Pixels between cells."""
_WIDTHS: Final = (24, 48, 96, 192)
_BLOCKS: Final = (1, 2, 2, 2)
_CENTRAL: Final = 0.2
"""Deviation of the Gaussian, as a share of the box, by which cells of a box learn its edges."""
_LEARNS: Final = 0.1
"""Cells below this weight learn no edges and are background."""
_PRIOR: Final = 0.01
"""Score of an untrained cell."""
_EDGE: Final = 1.5
"""Natural logarithm of an untrained cell's distance to its edges, in strides: a box of some 70 pixels."""


class DenseDetector(DetectorNetwork):
    """Backbone, top-down path to a grid of stride 8, head."""

    def __init__(self, backbone: str = "tiny", channels: int = 64) -> None:
        super().__init__()
        if backbone == "tiny":
            self.backbone: nn.Module = TinyBackbone()
            widths = list(_WIDTHS[1:])
        else:
            self.backbone, widths = timm_backbone(backbone)
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)
        self.smooth = nn.ModuleList(_conv(channels, channels) for _ in widths[1:])
        self.score = nn.Sequential(_conv(channels, channels), nn.Conv2d(channels, 1, 1))
        self.edges = nn.Sequential(_conv(channels, channels), nn.Conv2d(channels, 4, 1))
        for head, bias in ((self.score, -math.log(1 / _PRIOR - 1)), (self.edges, _EDGE)):
            layer = head[-1]
            assert isinstance(layer, nn.Conv2d)
            assert layer.bias is not None
            nn.init.constant_(layer.bias, bias)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Score logits B x N, and boxes B x N x 4 as corners in pixels of the input."""
        maps = self.backbone(images_BCHW)
        path = self.lateral[-1](maps[-1])
        for level in range(len(maps) - 2, -1, -1):
            finer = self.lateral[level](maps[level])
            path = finer + functional.interpolate(path, size=finer.shape[-2:], mode="nearest")
            path = self.smooth[level](path)
        score_BHW, edges_BCHW = self.score(path)[:, 0].float(), self.edges(path).float()
        centre_N2 = _centres(*score_BHW.shape[-2:], device=score_BHW.device)
        distance_BN4 = edges_BCHW.flatten(2).transpose(1, 2).clamp(max=8).exp() * STRIDE
        boxes = torch.cat([centre_N2 - distance_BN4[..., :2], centre_N2 + distance_BN4[..., 2:]], dim=-1)
        return score_BHW.flatten(1), boxes

    def predict(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes B x N x 4 as corners, shares of the input, and scores B x N."""
        logits_BN, boxes_BN4 = self(images_BCHW)
        height, width = images_BCHW.shape[-2:]
        size = torch.tensor([width, height, width, height], device=boxes_BN4.device)
        return (boxes_BN4 / size).clamp(0, 1), logits_BN.sigmoid()

    def loss(self, images_BCHW: Tensor, mask_BHW: Tensor | None, boxes: Sequence[Tensor]) -> Tensor:
        """Varifocal loss of the scores, twice the GIoU loss of the boxes, and by what ratio edges are off.

        The last teaches boxes that are far off, to which GIoU says little.

        Args:
            images_BCHW: Normalised pictures of one size.
            mask_BHW: None.
            boxes: Per picture K x 4 corners as shares of the input; K may be 0.
        """
        assert mask_BHW is None, "squares are not padded"
        logits_BN, made_BN4 = self(images_BCHW)
        height, width = images_BCHW.shape[-2:]
        wanted_BN4, weight_BN = _assign(boxes, height, width, made_BN4)
        learns = weight_BN > _LEARNS
        made, wanted, weights = made_BN4[learns], wanted_BN4[learns], weight_BN[learns]
        overlap, giou = _overlap(made, wanted)
        target_BN = torch.zeros_like(logits_BN)
        target_BN[learns] = overlap.detach()
        score_BN = logits_BN.detach().sigmoid()
        focal_BN = torch.where(learns, target_BN.clamp(min=0.05), 0.75 * score_BN**2)
        entropy_BN = functional.binary_cross_entropy_with_logits(logits_BN, target_BN, reduction="none")
        centres = _centres(*_cells(height, width), device=made.device).expand(len(boxes), -1, -1)[learns]
        # a cell on the edge of a box, or beyond it, counts as one pixel inside
        ratio = _distances(centres, made).log() - _distances(centres, wanted).clamp(min=1).log()
        edges = 2 * (1 - giou) + ratio.abs().mean(1)
        scores = (focal_BN * entropy_BN).sum() / learns.sum().clamp(min=1)
        return scores + (weights * edges).sum() / weights.sum().clamp(min=1e-6)


def _cells(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the grid over an input."""
    return -(-height // STRIDE), -(-width // STRIDE)


def _distances(centres_N2: Tensor, boxes_N4: Tensor) -> Tensor:
    """From each cell's centre to the four edges, pixels."""
    return torch.cat([centres_N2 - boxes_N4[:, :2], boxes_N4[:, 2:] - centres_N2], dim=1)


def _centres(height: int, width: int, *, device: torch.device) -> Tensor:
    """Centre of each cell, N x 2 as x, y in pixels."""
    y, x = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return (torch.stack([x, y], dim=-1).flatten(0, 1) + 0.5) * STRIDE


def _assign(boxes: Sequence[Tensor], height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """For each cell the box that it learns, in pixels, and how much: a Gaussian about the box's centre.

    Of several boxes a cell takes the one that weighs most; the cell nearest to a centre always weighs 1.
    """
    centre_N2 = _centres(*_cells(height, width), device=like.device)
    size = torch.tensor([width, height, width, height], device=like.device)
    wanted_BN4 = torch.zeros_like(like)
    weight_BN = torch.zeros(like.shape[:2], device=like.device)
    for number, boxes_K4 in enumerate(boxes):
        if not len(boxes_K4):
            continue
        pixels_K4 = boxes_K4.to(like) * size
        middle_K2 = (pixels_K4[:, :2] + pixels_K4[:, 2:]) / 2
        sides_K2 = pixels_K4[:, 2:] - pixels_K4[:, :2]
        off_KN2 = (centre_N2 - middle_K2[:, None]) / (_CENTRAL * sides_K2[:, None])
        weight_KN = torch.exp(-(off_KN2**2).sum(-1) / 2)
        nearest_K = ((centre_N2 - middle_K2[:, None]) ** 2).sum(-1).argmin(1)
        weight_KN[torch.arange(len(nearest_K)), nearest_K] = 1.0
        best_N, box_N = weight_KN.max(0)
        weight_BN[number], wanted_BN4[number] = best_N, pixels_K4[box_N]
    return wanted_BN4, weight_BN


def _overlap(first_N4: Tensor, second_N4: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (arXiv 1902.09630) of boxes, pair by pair."""

    def area(box_N4: Tensor) -> Tensor:
        return (box_N4[:, 2:] - box_N4[:, :2]).clamp(min=0).prod(1)

    inner = torch.cat(
        [torch.maximum(first_N4[:, :2], second_N4[:, :2]), torch.minimum(first_N4[:, 2:], second_N4[:, 2:])],
        dim=1,
    )
    outer = torch.cat(
        [torch.minimum(first_N4[:, :2], second_N4[:, :2]), torch.maximum(first_N4[:, 2:], second_N4[:, 2:])],
        dim=1,
    )
    union = area(first_N4) + area(second_N4) - area(inner)
    iou = area(inner) / union.clamp(min=1e-6)
    return iou, iou - (area(outer) - union) / area(outer).clamp(min=1e-6)


# -- backbones


class TinyBackbone(nn.Module):
    """Seven residual blocks, 1.6 M parameters; maps of stride 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 16, stride=2), _conv(16, _WIDTHS[0], stride=2))
        stages, before = [], _WIDTHS[0]
        for number, (width, blocks) in enumerate(zip(_WIDTHS, _BLOCKS, strict=True)):
            layers = [_Block(before, width, stride=2 if number else 1)]
            layers += [_Block(width, width) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*layers))
            before = width
        self.stages = nn.ModuleList(stages)

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Feature maps, finest first."""
        made, maps = self.stem(images_BCHW), []
        for stage in self.stages:
            made = stage(made)
            maps.append(made)
        return maps[1:]


class _Block(nn.Module):
    """Residual block of two 3 x 3 convolutions."""

    def __init__(self, before: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.first = _conv(before, width, stride=stride)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or before != width:
            self.skip = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity(),
                nn.Conv2d(before, width, 1, bias=False),
                nn.BatchNorm2d(width),
            )

    def forward(self, maps: Tensor) -> Tensor:
        return functional.relu(self.second(self.first(maps)) + self.skip(maps))


def _conv(before: int, width: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )


def timm_backbone(
    name: str, *, pretrained: bool = False, file: str | None = None
) -> tuple[nn.Module, list[int]]:
    """A timm model's maps of stride 8, 16 and 32, and their channels.

    Args:
        name: timm's name.
        pretrained: With weights: those of the hub, or
        file: of a local file.
    """
    timm = import_timm()
    if not timm.is_model(name):
        raise RequestError(f"unknown backbone '{name}'{near(name, [*timm.list_models(), 'tiny'])}")
    options = {"pretrained_cfg_overlay": {"file": file}} if file else {}
    try:
        plain = timm.create_model(name, features_only=True, pretrained=False)
        strides = list(plain.feature_info.reduction())
        chosen = [strides.index(stride) for stride in (STRIDE, 2 * STRIDE, 4 * STRIDE)]
    except Exception as error:  # noqa: BLE001 - each architecture fails in its own way
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RequestError(
            f"{name} cannot be a detector's backbone: it gives no maps of stride 8, 16 and 32 ({reason})"
        ) from None
    network: nn.Module = timm.create_model(
        name, features_only=True, pretrained=pretrained, out_indices=chosen, **options
    )
    return network, list(network.feature_info.channels())  # type: ignore[operator, union-attr]
