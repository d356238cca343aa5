"""Random changes of training images: the crop in the loader, the rest on the device for a whole batch.

B: batch, C: channel, H, W: pixels, D: draws.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from bioscan.learn.dataset import ImageSpec, resize
from bioscan.learn.settings import TrainSettings

DRAWS: Final = (
    *("top", "left", "area", "ratio"),
    *("angle", "horizontal", "vertical", "brightness", "contrast", "saturation"),
)
"""What each of a specimen's uniform draws in [0, 1) is for; the first line is the crop's."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Which random changes, and how strong."""

    crop: Literal["random_resized", "random"]
    min_area: float
    flip: Literal["none", "horizontal", "both"]
    rotate: bool
    colour: float

    @classmethod
    def of(cls, settings: TrainSettings) -> "Augmentation":
        """What the settings ask for."""
        return cls(
            crop=settings.crop,
            min_area=settings.min_area,
            flip=settings.flip,
            rotate=settings.rotate,
            colour=settings.colour,
        )


def random_crop(
    image_CHW: Tensor, size: int, augmentation: Augmentation, draws_D: NDArray[np.float32]
) -> Tensor:
    """A square crop of random place, and with `random_resized` of random area, at `size` pixels."""
    _, height, width = image_CHW.shape
    at_top, at_left, at_area, at_ratio = draws_D[:4].tolist()
    crop_height = crop_width = size
    if augmentation.crop == "random_resized":
        area = height * width * (augmentation.min_area + (1 - augmentation.min_area) * at_area)
        ratio = (3 / 4) ** (1 - 2 * at_ratio)  # from 3:4 to 4:3, evenly in its logarithm
        crop_height = min(height, max(1, round((area / ratio) ** 0.5)))
        crop_width = min(width, max(1, round((area * ratio) ** 0.5)))
    top = int(at_top * (height - crop_height + 1))
    left = int(at_left * (width - crop_width + 1))
    crop_CHW = image_CHW[:, top : top + crop_height, left : left + crop_width]
    return crop_CHW if crop_CHW.shape[1:] == (size, size) else resize(crop_CHW, size, size)


def to_network(
    images_BCHW: Tensor,
    spec: ImageSpec,
    device: torch.device,
    *,
    channels_last: bool,
    augmentation: Augmentation | None = None,
    draws_BD: Tensor | None = None,
) -> Tensor:
    """Float images on the device, normalised; with an augmentation flipped, rotated and coloured first.

    Args:
        images_BCHW: uint8.
        spec: Its mean and deviation.
        device: Where the network is.
        channels_last: Memory format of what is returned.
        augmentation: None: the images as they are.
        draws_BD: The draws that the augmentation follows from.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = images_BCHW.to(device, non_blocking=True).contiguous(memory_format=layout)
    if augmentation is None:
        images = images.float().div_(255)
    else:
        assert draws_BD is not None
        draws_BD = draws_BD.to(device, non_blocking=True)
        draws = {name: draws_BD[:, i, None, None, None] for i, name in enumerate(DRAWS)}
        images = _flipped(images, augmentation, draws).float().div_(255)
        images = _changed(images, augmentation, draws)
    return _normalised(images, spec).contiguous(memory_format=layout)


def _flipped(images_BCHW: Tensor, augmentation: Augmentation, draws: dict[str, Tensor]) -> Tensor:
    images = images_BCHW
    if augmentation.flip != "none":
        images = torch.where(draws["horizontal"] < 0.5, images.flip(3), images)
    if augmentation.flip == "both":
        images = torch.where(draws["vertical"] < 0.5, images.flip(2), images)
    return images


def _changed(images_BCHW: Tensor, augmentation: Augmentation, draws: dict[str, Tensor]) -> Tensor:
    images = images_BCHW
    if augmentation.rotate:
        images = _rotated(images, draws["angle"].flatten() * (2 * np.pi))
    if augmentation.colour:
        strength = augmentation.colour
        factors = {n: 1 + strength * (2 * draws[n] - 1) for n in ("brightness", "contrast", "saturation")}
        images = images * factors["brightness"]
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        images = mean + (images - mean) * factors["contrast"]
        grey = images.mean(dim=1, keepdim=True)
        images = (grey + (images - grey) * factors["saturation"]).clamp_(0, 1)
    return images


def _rotated(images_BCHW: Tensor, angle_B: Tensor) -> Tensor:
    """Rotated about the centre; what lies outside is the nearest border pixel (the well's floor)."""
    cosine, sine, zero = torch.cos(angle_B), torch.sin(angle_B), torch.zeros_like(angle_B)
    matrix = torch.stack(
        [torch.stack([cosine, -sine, zero], dim=1), torch.stack([sine, cosine, zero], dim=1)], dim=1
    )
    grid = functional.affine_grid(matrix, list(images_BCHW.shape), align_corners=False)
    return functional.grid_sample(images_BCHW, grid, padding_mode="border", align_corners=False)


def _normalised(images_BCHW: Tensor, spec: ImageSpec) -> Tensor:
    if not any(spec.mean) and all(s == 1 for s in spec.std):
        return images_BCHW
    shape: Any = (1, -1, 1, 1)
    mean = torch.tensor(spec.mean, device=images_BCHW.device).view(shape)
    std = torch.tensor(spec.std, device=images_BCHW.device).view(shape)
    return images_BCHW.sub_(mean).div_(std)
