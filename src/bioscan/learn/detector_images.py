"""From pictures of any size to what a detector sees, and back; random changes that move the boxes along.

Boxes are corners (x0, y0, x1, y1); in pixels of the picture, or as shares of what the network sees.
B: batch, C: channel, H, W: pixels, D: draws, K: boxes of a picture.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bioscan.data.decode import read_rgb
from bioscan.data.images import Images
from bioscan.errors import ImageError
from bioscan.learn.dataset import resize
from bioscan.learn.detector_settings import DetectorSettings

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]

DRAWS: Final = (
    *("scale", "x", "y", "horizontal", "vertical", "turn"),
    *("brightness", "contrast", "saturation", "red", "blue"),
)
"""What each of a picture's uniform draws in [0, 1) is for."""
_KEPT: Final = 0.7
"""A random window that would cut off more than the rest of a box is not used."""
_AHEAD: Final = 2
"""Batches that are read before they are asked for."""


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """How a picture becomes the network's input; saved with the detector."""

    mode: Literal["square", "shorter_side"]
    """square: both sides become `size`, whatever they were; shorter_side: the shape is kept."""
    size: int
    longest: int = 1333
    """Of shorter_side: no side becomes longer."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Per channel in 0-1: ImageNet's."""

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that a picture is resized to, with transformers' rounding of DETR."""
        if self.mode == "square":
            return self.size, self.size
        short, long = min(height, width), max(height, width)
        side = float(self.size)
        if long / short * self.size > self.longest:
            side = self.longest * short / long
        shorter = max(1, round(side))
        longer = int(side * long / short) if short != shorter else long
        longer = min(max(longer, shorter), self.longest)
        return (shorter, longer) if height <= width else (longer, shorter)


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Which random changes, and how strong."""

    flip: Literal["none", "horizontal", "both"]
    turn: bool
    scale: float
    shift: float
    colour: float

    @classmethod
    def of(cls, settings: DetectorSettings) -> "Jitter":
        """What the settings ask for."""
        return cls(
            flip=settings.flip,
            turn=settings.turn,
            scale=settings.scale,
            shift=settings.shift,
            colour=settings.colour,
        )


def prepare(pixels: Pixels, spec: InputSpec) -> Tensor:
    """The picture at its working size, uint8, C x H x W."""
    own = np.require(pixels, requirements=["C", "W"])  # torch takes no other; a copy only where it is needed
    return resize(torch.from_numpy(own).permute(2, 0, 1), *spec.shape(*pixels.shape[:2]))


def prepare_training(
    pixels: Pixels, boxes_K4: Floats, spec: InputSpec, jitter: Jitter, draws_D: NDArray[np.float32]
) -> tuple[Tensor, Floats]:
    """A random window of the picture at its working size, flipped and turned, and its boxes as shares of it.

    Args:
        pixels: H x W x 3.
        boxes_K4: In pixels of the picture.
        spec: Working size.
        jitter: What may change.
        draws_D: The draws that it follows from.
    """
    draw = dict(zip(DRAWS, draws_D.tolist(), strict=True))
    height, width = pixels.shape[:2]
    left, top, across, down = _window(width, height, boxes_K4, jitter, draw)
    image = resize(
        torch.from_numpy(_cut(pixels, left, top, across, down)).permute(2, 0, 1), *spec.shape(down, across)
    )
    boxes = (boxes_K4 - (left, top, left, top)) / (across, down, across, down)
    boxes = boxes.clip(0, 1)
    boxes = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
    if jitter.flip != "none" and draw["horizontal"] < 0.5:
        image, boxes = (
            image.flip(2),
            np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], 1),
        )
    if jitter.flip == "both" and draw["vertical"] < 0.5:
        image, boxes = (
            image.flip(1),
            np.stack([boxes[:, 0], 1 - boxes[:, 3], boxes[:, 2], 1 - boxes[:, 1]], 1),
        )
    if jitter.turn and draw["turn"] < 0.5:  # mirrored at the diagonal: with the flips, all quarter turns
        image, boxes = image.transpose(1, 2), boxes[:, [1, 0, 3, 2]]
    return image, boxes


def _window(
    width: int, height: int, boxes_K4: Floats, jitter: Jitter, draw: dict[str, float]
) -> tuple[int, int, int, int]:
    """Left, top, width and height of the part of the picture to see, pixels; it may reach beyond it."""
    factor = jitter.scale ** (1 - 2 * draw["scale"])
    across, down = max(1, round(width * factor)), max(1, round(height * factor))
    left = round((width - across) / 2 + (2 * draw["x"] - 1) * jitter.shift * width)
    top = round((height - down) / 2 + (2 * draw["y"] - 1) * jitter.shift * height)
    if len(boxes_K4):
        inner = boxes_K4.clip((left, top, left, top), (left + across, top + down) * 2)
        seen = ((inner[:, 2:] - inner[:, :2]) / (boxes_K4[:, 2:] - boxes_K4[:, :2])).prod(1)
        if seen.min() < _KEPT:
            return 0, 0, width, height
    return left, top, across, down


def _cut(pixels: Pixels, left: int, top: int, across: int, down: int) -> Pixels:
    """A window of the picture; beyond the border all is of the border's median colour.

    Drawing out the border itself would draw out a specimen that touches it, beyond its box.
    """
    inner = pixels[max(0, top) : max(0, top + down), max(0, left) : max(0, left + across)]
    if inner.shape[:2] == (down, across):
        return inner
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    made = np.empty((down, across, 3), np.uint8)
    made[:] = np.median(border, axis=0).astype(np.uint8)
    y, x = max(0, -top), max(0, -left)
    made[y : y + inner.shape[0], x : x + inner.shape[1]] = inner
    return made


class Picture(NamedTuple):
    """One picture of a training or validation set."""

    images: Images
    row: int
    boxes_K4: Floats
    """In pixels of the picture; K is 0 where there is none."""
    name: str
    width: int | None
    height: int | None
    """The size that the boxes are meant for, where told: the stored picture may be larger or smaller."""


class Batch(NamedTuple):
    """Pictures of one size, or padded to it."""

    images_BCHW: Tensor
    """uint8."""
    mask_BHW: Tensor | None
    """True where there is a picture; None where nothing is padded."""
    boxes: list[Tensor]
    """Per picture K x 4, shares of the picture."""
    draws_BD: Tensor
    failures: list[tuple[int, str]]
    """Number and reason of each picture that cannot be read; they are left out."""


def read_picture(picture: Picture, min_size: int) -> tuple[Pixels, Floats]:
    """Pixels and the boxes in them.

    Raises:
        ImageError: cannot be read.
    """
    full_width, full_height = picture.width, picture.height
    if full_width is None or full_height is None:  # the boxes are meant for the stored picture
        return read_rgb(picture.images, picture.row), picture.boxes_K4
    pixels = read_rgb(picture.images, picture.row, min_size=min_size)
    height, width = pixels.shape[:2]
    ratio = np.array([width / full_width, height / full_height] * 2)
    return pixels, picture.boxes_K4 * ratio


def epoch_order(sizes: Sequence[int], *, balance: float, seed: int, epoch: int) -> NDArray[np.int64]:
    """Numbers of the pictures of an epoch, over all sets one after the other, in random order.

    There are as many as the sets have together. Each set gives its share by size to the power `balance`; one
    that gives more than it has gives some twice.
    """
    generator = np.random.default_rng((seed, epoch))
    total = sum(sizes)
    shares = np.array(sizes, np.float64) ** balance * (np.array(sizes) > 0)
    quotas = np.floor(shares / shares.sum() * total + 0.5).astype(int)
    chosen, start = [], 0
    for size, quota in zip(sizes, quotas, strict=True):
        rounds = [generator.permutation(size) for _ in range(-(-quota // size) if size else 0)]
        chosen.append(start + np.concatenate([*rounds, np.empty(0, np.int64)])[:quota])
        start += size
    return generator.permutation(np.concatenate(chosen).astype(np.int64))


def batches(
    pictures: Sequence[Picture],
    spec: InputSpec,
    *,
    order: NDArray[np.int64],
    batch_size: int,
    jitter: Jitter,
    seed: int,
    epoch: int,
    workers: int,
) -> Iterator[Batch]:
    """Training batches of an epoch. Threads read ahead; what comes out does not depend on them.

    A last batch of one joins the one before it: batch norm cannot train on a single picture.
    """
    draws_ND = np.random.default_rng((seed, epoch, 1)).random((order.size, len(DRAWS)), np.float32)
    cuts = list(range(batch_size, order.size, batch_size))
    if cuts and order.size - cuts[-1] == 1:
        cuts.pop()

    def sample(place: int) -> tuple[Tensor, Floats, NDArray[np.float32]] | tuple[int, str]:
        number = int(order[place])
        try:
            pixels, boxes = read_picture(pictures[number], spec.size)
        except ImageError as error:
            return number, f"{error.reason} ({error.place})"
        return (*prepare_training(pixels, boxes, spec, jitter, draws_ND[place]), draws_ND[place])

    groups = np.split(np.arange(order.size), cuts)
    with ThreadPoolExecutor(workers) as pool:
        waiting = [[pool.submit(sample, int(place)) for place in group] for group in groups[:_AHEAD]]
        try:
            for number in range(len(groups)):
                made = [future.result() for future in waiting.pop(0)]
                if number + _AHEAD < len(groups):
                    waiting.append([pool.submit(sample, int(p)) for p in groups[number + _AHEAD]])
                yield _collate(made)
        finally:
            for future in (f for futures in waiting for f in futures):
                future.cancel()


def _collate(
    made: Sequence[tuple[Tensor, Floats, NDArray[np.float32]] | tuple[int, str]],
) -> Batch:
    good = [sample for sample in made if len(sample) == 3]
    failures = [sample for sample in made if len(sample) == 2]
    images, mask = pad([image for image, _, _ in good])
    return Batch(
        images,
        mask,
        [torch.from_numpy(boxes).float() for _, boxes, _ in good],
        torch.from_numpy(np.stack([draws for *_, draws in good])) if good else torch.empty((0, len(DRAWS))),
        failures,
    )


def pad(images: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Pictures C x H x W in one batch, channels last, the smaller ones padded on the right and below.

    Returns:
        The batch, and B x H x W, true where there is a picture; None where all are of one size.
    """
    if not images:
        return torch.empty((0, 3, 0, 0), dtype=torch.uint8), None
    height, width = max(i.shape[1] for i in images), max(i.shape[2] for i in images)
    batch = images[0].new_zeros((len(images), height, width, 3)).permute(0, 3, 1, 2)
    mask = torch.zeros((len(images), height, width), dtype=torch.bool)
    for number, image in enumerate(images):
        batch[number, :, : image.shape[1], : image.shape[2]] = image
        mask[number, : image.shape[1], : image.shape[2]] = True
    return batch, None if bool(mask.all()) else mask


def to_network(
    images_BCHW: Tensor,
    mask_BHW: Tensor | None,
    spec: InputSpec,
    device: torch.device,
    *,
    colour: float = 0.0,
    draws_BD: Tensor | None = None,
) -> Tensor:
    """Float pictures on the device, channels last, normalised; with a colour strength, coloured first.

    Padding becomes 0 after normalising, as the paper's tool has it.
    """
    images = images_BCHW.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    images = images.float()
    mean = torch.tensor(spec.mean, device=device).view(1, 3, 1)
    std = torch.tensor(spec.std, device=device).view(1, 3, 1)
    if colour and draws_BD is not None:
        turn_B33, shift_B31 = _colours(images, mask_BHW, colour, draws_BD.to(device))
        turn_B33, shift_B31 = turn_B33 / (255 * std), (shift_B31 / 255 - mean) / std
        flat_BNC = images.permute(0, 2, 3, 1).flatten(1, 2)  # a view: channels last
        flat_BNC = torch.baddbmm(shift_B31.transpose(1, 2), flat_BNC, turn_B33.transpose(1, 2))
        images = flat_BNC.view(-1, *images.shape[2:], 3).permute(0, 3, 1, 2)
    else:
        images = images.sub_(255 * mean[..., None]).div_(255 * std[..., None])
    return images if mask_BHW is None else images * mask_BHW.to(device)[:, None]


def _colours(
    images_BCHW: Tensor, mask_BHW: Tensor | None, strength: float, draws_BD: Tensor
) -> tuple[Tensor, Tensor]:
    """Random brightness, contrast about the mean, saturation, red and blue against green: one linear map.

    Returns:
        B x 3 x 3 and B x 3 x 1: a pixel becomes the one times it plus the other.
    """
    factor = {
        name: 1 + strength * (2 * draws_BD[:, at, None, None] - 1)
        for at, name in enumerate(DRAWS)
        if name in ("brightness", "contrast", "saturation", "red", "blue")
    }
    total_B = images_BCHW.sum(dim=(1, 2, 3))
    seen = images_BCHW[0, 0].numel() if mask_BHW is None else mask_BHW.to(total_B.device).sum((1, 2))
    mean_B11 = (total_B / (3 * seen))[:, None, None]
    one_33 = torch.eye(3, device=images_BCHW.device)
    # grey + (pixel - grey) * saturation, the grey being the mean of the channels
    saturated_B33 = factor["saturation"] * one_33 + (1 - factor["saturation"]) / 3
    red, blue = (1 + (factor[name] - 1) / 4 for name in ("red", "blue"))
    tint_B31 = torch.cat([red, torch.ones_like(red), blue], dim=1)
    turn_B33 = tint_B31 * saturated_B33 * factor["contrast"]
    shift_B31 = tint_B31 * mean_B11 * (factor["brightness"] - factor["contrast"])
    return turn_B33, shift_B31
