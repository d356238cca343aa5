"""Random changes of training images: the crop in the loader, the rest on the device for a whole batch.

Whatever a specimen goes through follows from its own draws, so that it is the same in any batch. Moves are
composed into one matrix, and so are colours: a picture is resampled once, however many changes are asked for.

B: batch, C: channel, H, W: pixels, D: draws.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from bioscan.learn.dataset import ImageSpec, resize
from bioscan.learn.settings import TrainSettings

RANDOM_OPS: Final[dict[str, float]] = {
    "turn": math.pi / 6,  # radians
    "shear_x": 0.3,
    "shear_y": 0.3,
    "translate_x": 0.3,  # of the side
    "translate_y": 0.3,
    "brightness": 0.5,
    "contrast": 0.5,
    "saturation": 0.9,
    "hue": math.pi / 15,  # radians; little, as colour tells taxa apart
    "sharpness": 1.0,  # from blurred to twice as sharp
    "cutout": 0.5,  # side of a square that takes the background's colour
}
"""Random operation -> its largest amount, either way, at strength 1.

RandAugment's (Cubuk et al. 2020) without those that no photograph shows, as inverted or posterised colours.
Flips and turns by any angle are settings of their own; with the latter `turn` is not among the operations.
"""

DRAWS: Final = (
    *("top", "left", "area", "ratio"),
    *("angle", "horizontal", "vertical", "brightness", "contrast", "saturation"),
    *("background", "background_red", "background_green", "background_blue"),
    *(f"choose_{name}" for name in RANDOM_OPS),
    *(f"amount_{name}" for name in RANDOM_OPS),
    *("cutout_row", "cutout_column"),
    *("mix_kind", "mix_weight", "mix_row", "mix_column"),
)
"""What each of a specimen's uniform draws in [0, 1) is for; the first line is the crop's, the last mixing's.
"""

_BORDER: Final = 2
"""Pixels along each side that the background's colour is taken from."""
_NEAR: Final = 0.15
"""Distance from that colour, in RGB of 0-1, at which a pixel is part of the background to exp(-1/2)."""
_SHIFT: Final = 0.4
"""Largest change of the background's red, green and blue, of 0-1: more shows seams around legs and wings."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Which random changes, and how strong; as in TrainSettings."""

    crop: Literal["random_resized", "random"]
    min_area: float
    flip: Literal["none", "horizontal", "both"]
    rotate: bool
    colour: float
    background: float = 0.0
    random_ops: int = 0
    random_strength: float = 0.5

    @classmethod
    def of(cls, settings: TrainSettings) -> "Augmentation":
        """What the settings ask for."""
        return cls(
            crop=settings.crop,
            min_area=settings.min_area,
            flip=settings.flip,
            rotate=settings.rotate,
            colour=settings.colour,
            background=settings.background,
            random_ops=settings.random_ops,
            random_strength=settings.random_strength,
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
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Float images on the device, normalised; with an augmentation changed at random first.

    Args:
        images_BCHW: uint8.
        spec: Its mean and deviation.
        device: Where the network is.
        channels_last: Memory format of what is returned.
        augmentation: None: the images as they are.
        draws_BD: The draws that the augmentation follows from, on the CPU.
        dtype: Of what is returned, and what is computed in.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = images_BCHW.to(device, non_blocking=True)
    if augmentation is None:
        images = images.contiguous(memory_format=layout).to(dtype).div_(255)
    else:
        assert draws_BD is not None
        images = _augmented(images, augmentation, draws_BD, dtype).contiguous(memory_format=layout)
    return _normalised(images, spec, channels_last=channels_last)


def _augmented(
    images_BCHW: Tensor, augmentation: Augmentation, draws_BD: Tensor, dtype: torch.dtype
) -> Tensor:
    """Float images with another background, flipped, moved, coloured, sharpened and cut, in this order."""
    drawn = {name: draws_BD[:, i].double() for i, name in enumerate(DRAWS)}
    amounts = _amounts(augmentation, drawn)
    images = images_BCHW.contiguous().to(dtype).div_(255)  # planes are faster for what follows
    images = _changed(
        images,
        drawn["background"] < augmentation.background,
        _with_background,
        torch.stack([drawn[f"background_{name}"] for name in ("red", "green", "blue")], dim=1),
    )
    images = _moved(images, augmentation, drawn, amounts)
    images = _coloured(images, augmentation, drawn, amounts)
    sharpness = amounts["sharpness"]
    images = _changed(images, sharpness != 0, _sharpened, sharpness)
    side = amounts["cutout"].abs()
    return _changed(images, side != 0, _cut_out, side, drawn["cutout_row"], drawn["cutout_column"])


def _amounts(augmentation: Augmentation, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    """How much of each random operation each image gets; 0 where it was not chosen."""
    amounts = {name: torch.zeros_like(drawn["angle"]) for name in RANDOM_OPS}
    if augmentation.random_ops:
        names = [name for name in RANDOM_OPS if not (name == "turn" and augmentation.rotate)]
        places = torch.stack([drawn[f"choose_{name}"] for name in names]).argsort(0).argsort(0)
        for name, place in zip(names, places, strict=True):
            largest = RANDOM_OPS[name] * augmentation.random_strength
            chosen = place < augmentation.random_ops
            amounts[name] = (2 * drawn[f"amount_{name}"] - 1) * largest * chosen
    return amounts


def _changed(
    images_BCHW: Tensor, marked_B: Tensor, change: Callable[..., Tensor], *parameters: Tensor
) -> Tensor:
    """The images with the marked ones changed, in place; where none is marked nothing is computed.

    Args:
        images_BCHW: On the device.
        marked_B: On the CPU, so that there is nothing to wait for.
        change: From images and their parameters.
        parameters: With a row per image, on the CPU.
    """
    if not bool(marked_B.any()):
        return images_BCHW
    device, dtype = images_BCHW.device, images_BCHW.dtype
    if bool(marked_B.all()):
        return change(images_BCHW, *(p.to(device, dtype, non_blocking=True) for p in parameters))
    rows = marked_B.nonzero().flatten()
    here = rows.to(device, non_blocking=True)
    images_BCHW[here] = change(
        images_BCHW[here], *(p[rows].to(device, dtype, non_blocking=True) for p in parameters)
    )
    return images_BCHW


# -- moves


def _moved(
    images_BCHW: Tensor,
    augmentation: Augmentation,
    drawn: dict[str, Tensor],
    amounts: dict[str, Tensor],
) -> Tensor:
    """Flipped, turned, sheared and translated: by one matrix, or where flips are all without resampling."""
    never = torch.zeros_like(drawn["angle"], dtype=torch.bool)
    across = drawn["horizontal"] < 0.5 if augmentation.flip != "none" else never
    down = drawn["vertical"] < 0.5 if augmentation.flip == "both" else never
    angle = amounts["turn"] + (2 * math.pi * drawn["angle"] if augmentation.rotate else 0)
    shear_x, shear_y = amounts["shear_x"], amounts["shear_y"]
    shifts = torch.stack([amounts["translate_x"], amounts["translate_y"]], dim=1)
    resampled = shifts.ne(0).any(1)
    for amount in (angle, shear_x, shear_y):
        resampled |= amount != 0

    # from a place in what is made to the place in the image: sheared, turned, flipped
    one = torch.ones_like(angle)
    sheared = _matrix([[one + shear_x * shear_y, shear_x], [shear_y, one]])
    turned = _matrix([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    flipped = torch.diag_embed(1 - 2 * torch.stack([across, down], dim=1).double())
    linear = flipped @ turned @ sheared
    matrix_B23 = torch.cat([linear, linear @ (2 * shifts[:, :, None])], dim=2)  # the side is 2 long

    images = _changed(images_BCHW, across & ~resampled, lambda images: images.flip(3))
    images = _changed(images, down & ~resampled, lambda images: images.flip(2))
    return _changed(images, resampled, _resampled, matrix_B23)


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def _resampled(images_BCHW: Tensor, matrix_B23: Tensor) -> Tensor:
    """Bilinear about the centre; what lies outside is the nearest border pixel (the well's floor)."""
    height, width = images_BCHW.shape[2:]
    x_W, y_H = (_centres(length, images_BCHW) for length in (width, height))
    grid = torch.empty((len(images_BCHW), height, width, 2), dtype=images_BCHW.dtype, device=x_W.device)
    for axis, length in enumerate((width, height)):
        of_x, of_y, shift = matrix_B23[:, axis, :, None, None].unbind(1)
        torch.add(of_x * x_W, of_y * y_H[:, None] + shift, out=grid[..., axis])
        # what padding_mode="border" does, which not every device has
        grid[..., axis].clamp_(1 / length - 1, 1 - 1 / length)
    return functional.grid_sample(images_BCHW, grid, padding_mode="zeros", align_corners=False)


def _centres(length: int, like: Tensor) -> Tensor:
    """Middles of so many pixels that lie between -1 and 1."""
    places = torch.arange(length, dtype=like.dtype, device=like.device)
    return (2 * places + 1) / length - 1


# -- colours


def _coloured(
    images_BCHW: Tensor,
    augmentation: Augmentation,
    drawn: dict[str, Tensor],
    amounts: dict[str, Tensor],
) -> Tensor:
    """Brightness, contrast about the image's mean, saturation about its grey, hue: one matrix."""
    brightness, contrast, saturation = (
        (1 + amounts[name]) * (1 + augmentation.colour * (2 * drawn[name] - 1))
        for name in ("brightness", "contrast", "saturation")
    )
    hue = amounts["hue"]
    cosine, sine = (f[:, None, None] for f in (hue.cos(), hue.sin()))
    one, grey = torch.eye(3, dtype=hue.dtype), torch.full((3, 3), 1 / 3, dtype=hue.dtype)
    # a turn about the grey axis of RGB by Rodrigues' formula
    across = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=hue.dtype) / 3**0.5
    turned = cosine * one + (1 - cosine) * grey + sine * across
    saturated = saturation[:, None, None] * one + (1 - saturation)[:, None, None] * grey
    matrix_B33 = (brightness * contrast)[:, None, None] * (turned @ saturated)
    # what contrast leaves of the mean is grey, which saturation and hue leave alone
    share_of_mean_B = brightness * (1 - contrast)
    changed = (matrix_B33 != one).any((1, 2)) | (share_of_mean_B != 0)
    return _changed(images_BCHW, changed, _recoloured, matrix_B33, share_of_mean_B)


def _recoloured(images_BCHW: Tensor, matrix_B33: Tensor, share_of_mean_B: Tensor) -> Tensor:
    mean_B = images_BCHW.mean(dim=(1, 2, 3)) * share_of_mean_B
    made = torch.baddbmm(mean_B[:, None, None], matrix_B33, images_BCHW.flatten(2))
    return made.clamp_(0, 1).view_as(images_BCHW)


def _sharpened(images_BCHW: Tensor, amount_B: Tensor) -> Tensor:
    """Away from a blurred copy, or towards it where the amount is negative; at -1 it is the copy."""
    blurred = images_BCHW
    for axis in (2, 2, 3, 3):  # 1 2 1 twice is 1 4 6 4 1
        ahead, behind = blurred.narrow(axis, 0, 1), blurred.narrow(axis, blurred.shape[axis] - 1, 1)
        padded = torch.cat([ahead, blurred, behind], dim=axis)
        length = blurred.shape[axis]
        outer = padded.narrow(axis, 0, length) + padded.narrow(axis, 2, length)
        blurred = outer.add_(blurred, alpha=2).div_(4)
    return torch.lerp(blurred, images_BCHW, 1 + amount_B[:, None, None, None]).clamp_(0, 1)


# -- the background


def _background_of(images_BCHW: Tensor) -> Tensor:
    """Colour of each image's background, B x C: the median along its border."""
    n = _BORDER
    bands = [images_BCHW[:, :, :n], images_BCHW[:, :, -n:], images_BCHW[..., :n], images_BCHW[..., -n:]]
    return torch.cat([band.flatten(2) for band in bands], dim=2).median(dim=2).values


def _with_background(images_BCHW: Tensor, draws_BC: Tensor) -> Tensor:
    """With the background in another colour: pixels follow as far as they have its colour now."""
    colour_BC = _background_of(images_BCHW)
    shift_BC = (2 * draws_BC - 1).mul_(_SHIFT).add_(colour_BC).clamp_(0, 1).sub_(colour_BC)
    distance = (images_BCHW - colour_BC[:, :, None, None]).square_().sum(dim=1, keepdim=True)
    share_B1HW = distance.div_(-2 * _NEAR**2).exp_()
    return torch.addcmul(images_BCHW, share_B1HW, shift_BC[:, :, None, None]).clamp_(0, 1)


def _cut_out(images_BCHW: Tensor, side_B: Tensor, row_B: Tensor, column_B: Tensor) -> Tensor:
    """With a square of so large a share of the side in the background's colour, around any point."""
    inside = []
    for length, centre_B in ((images_BCHW.shape[2], row_B), (images_BCHW.shape[3], column_B)):
        distance = _centres(length, images_BCHW) - (2 * centre_B[:, None] - 1)
        inside.append(distance.abs() < side_B[:, None])
    box_B1HW = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(box_B1HW, _background_of(images_BCHW)[:, :, None, None], images_BCHW)


def _normalised(images_BCHW: Tensor, spec: ImageSpec, *, channels_last: bool) -> Tensor:
    """In place."""
    if not any(spec.mean) and all(s == 1 for s in spec.std):
        return images_BCHW
    width = images_BCHW.shape[3]
    for values, change in ((spec.mean, Tensor.sub_), (spec.std, Tensor.div_)):
        value_C = torch.tensor(values, dtype=images_BCHW.dtype, device=images_BCHW.device)
        if channels_last:  # whole lines at a time, as three numbers are too few to be fast
            change(images_BCHW.permute(0, 2, 3, 1).flatten(2), value_C.repeat(width))
        else:
            change(images_BCHW, value_C[:, None, None])
    return images_BCHW
