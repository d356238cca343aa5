"""A learned detector behind the same interface as the finder: pictures in, one finding each.

B: batch, C: channel, H, W: pixels, Q: boxes that a network gives of a picture, K: those that are left, P:
pictures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from bioscan.analysis.boxes import iou_matrix
from bioscan.data.boxes import Finding
from bioscan.errors import RequestError
from bioscan.learn import detector_folder
from bioscan.learn.detector_images import InputSpec, pad, prepare, to_network
from bioscan.learn.detector_network import DetectorNetwork
from bioscan.learn.device import autocast, choose_device, choose_precision

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]

BATCH_SIZE: Final = 16
_OVERLAP: Final = 0.5
"""IoU above which two boxes are of one specimen."""
_INSIDE: Final = 0.7
"""Share of the smaller box inside the larger one above which it is a part of it: a wing, a leg."""
_MOST: Final = 10
"""Boxes of a picture."""
_SURE: Final = 0.99
"""Where there are no pictures of the other kind to set a threshold by: the share of one's own that it keeps
right."""


@dataclass(frozen=True, eq=False)
class LearnedDetector:
    """A network with what is needed to use it; call it with pictures (`bioscan.data.boxes.Detector`)."""

    network: DetectorNetwork
    spec: InputSpec
    none_below: float
    """Best score below which there is no specimen; 0: the best box always, as the paper's tool does it."""
    many_from: float | None
    """Second-best score from which there are several; None: never."""
    device: torch.device
    precision: torch.dtype | None
    batch_size: int
    info: dict[str, Any]
    """What the folder or checkpoint says of itself."""

    def __call__(self, pictures: Sequence[Pixels]) -> list[Finding]:
        """A finding for each picture, boxes in its pixels, inside it.

        Args:
            pictures: RGB, H x W x 3, of any sizes.

        Raises:
            RequestError: the device's memory is too small for a batch.
        """
        found = raw_boxes(
            self.network,
            pictures,
            self.spec,
            device=self.device,
            precision=self.precision,
            batch_size=self.batch_size,
        )
        return [finding(boxes, scores, self.none_below, self.many_from) for boxes, scores in found]


def load_detector(
    path: Path | str,
    *,
    device: str = "auto",
    batch_size: int = BATCH_SIZE,
    threshold: float | None = None,
    amp: str | None = None,
) -> LearnedDetector:
    """A detector from its folder, or from the checkpoint of the paper's crop tool.

    Args:
        path: Folder of `bioscan train-detector`, or a Lightning .ckpt around transformers'
            DetrForObjectDetection. The latter gives its best box always unless a threshold is passed.
        device: `auto`, `cpu`, `cuda` or `mps`.
        batch_size: Pictures at a time; only pictures of one working size share a batch, so that nothing is
            padded and none changes another's result.
        threshold: Score from 0 to 1 below which there is no specimen, in place of the stored one; 0: the
            best box always.
        amp: `auto`, `off`, `bf16` or `fp16`; None: 16 bits on a GPU, 32 elsewhere.

    Raises:
        RequestError: nothing there, no detector, a threshold or device that cannot be.
        DataError: broken, altered, or a checkpoint that holds code.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise RequestError(f"threshold is {threshold}; it must be from 0 to 1")
    if batch_size < 1:
        raise RequestError(f"batch_size is {batch_size}; it must be at least 1")
    place = choose_device(device)
    loaded = detector_folder.load(Path(path))
    precision = choose_precision(amp or ("auto" if place.type == "cuda" else "off"), place)
    return LearnedDetector(
        network=loaded.network.to(place).eval(),
        spec=loaded.spec,
        none_below=loaded.none_below if threshold is None else threshold,
        many_from=loaded.many_from,
        device=place,
        precision=precision,
        batch_size=batch_size,
        info=loaded.info,
    )


def raw_boxes(
    network: DetectorNetwork,
    pictures: Sequence[Pixels],
    spec: InputSpec,
    *,
    device: torch.device,
    precision: torch.dtype | None,
    batch_size: int,
) -> list[tuple[Floats, Floats]]:
    """Per picture the boxes K x 4 of different things in its pixels, and their scores, best first."""
    found: list[tuple[Floats, Floats]] = [(np.empty((0, 4)), np.empty(0))] * len(pictures)
    for numbers in _equal_sizes([spec.shape(*pixels.shape[:2]) for pixels in pictures], batch_size):
        images, _ = pad([prepare(pictures[number], spec) for number in numbers])
        with torch.inference_mode(), autocast(device, precision):
            try:
                made = network.predict(to_network(images, None, spec, device))
            except torch.cuda.OutOfMemoryError:
                raise RequestError(
                    "the device has too little memory; a smaller --batch-size needs less"
                ) from None
        boxes_BQ4, scores_BQ = (values.double().cpu().numpy() for values in made)
        for number, boxes, scores in zip(numbers, boxes_BQ4, scores_BQ, strict=True):
            height, width = pictures[number].shape[:2]
            found[number] = distinct(boxes.clip(0, 1) * (width, height, width, height), scores)
    return found


def _equal_sizes(shapes: Sequence[tuple[int, int]], batch_size: int) -> Iterator[list[int]]:
    """Numbers of pictures of one shape, `batch_size` at most."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, shape in enumerate(shapes):
        group = groups.setdefault(shape, [])
        group.append(number)
        if len(group) == batch_size:
            yield groups.pop(shape)
    yield from groups.values()


def distinct(boxes_Q4: Floats, scores_Q: Floats) -> tuple[Floats, Floats]:
    """The boxes of different things, best first: none overlaps a better one much or lies in it."""
    order = np.argsort(-scores_Q, kind="stable")
    boxes, scores = boxes_Q4[order], scores_Q[order]
    sides = boxes[:, 2:] - boxes[:, :2]
    free = (sides > 0).all(1)
    kept: list[int] = []
    while free.any() and len(kept) < _MOST:
        best = int(free.argmax())
        kept.append(best)
        low, high = np.maximum(boxes[:, :2], boxes[best, :2]), np.minimum(boxes[:, 2:], boxes[best, 2:])
        shared = (high - low).clip(0).prod(1)
        smaller = np.minimum(sides.prod(1), sides[best].prod())
        overlap = iou_matrix(boxes[[best]], boxes)[0]
        free &= (overlap <= _OVERLAP) & (shared <= _INSIDE * smaller)
        free[best] = False
    return boxes[kept], scores[kept]


def finding(boxes_K4: Floats, scores_K: Floats, none_below: float, many_from: float | None) -> Finding:
    """What boxes say of a picture; of one specimen the best box is given, of many all that count."""
    if not len(scores_K) or scores_K[0] < none_below:
        return Finding("none", np.empty((0, 4)), np.empty(0))
    count = 1 if many_from is None else max(1, int((scores_K >= many_from).sum()))
    return Finding("many" if count > 1 else "one", boxes_K4[:count], scores_K[:count])


def thresholds(
    found: Sequence[tuple[Floats, Floats]], truths_P: NDArray[np.int64]
) -> tuple[float, float | None]:
    """Scores that tell none from one and one from many, by pictures whose boxes are known.

    Each is where the mean of the two shares told right is highest (Youden's index), in the middle of the
    widest such place. Without an empty picture, none is told where 1 % of the others would be lost; without a
    picture of several, many where 1 % of the others would be called so.

    Args:
        found: Boxes and scores of each picture, best first.
        truths_P: True boxes of each picture.
    """
    first = np.array([scores[0] if len(scores) else 0.0 for _, scores in found])
    second = np.array([scores[1] if len(scores) > 1 else 0.0 for _, scores in found])
    none_below = _between(first[truths_P == 0], first[truths_P > 0])
    if none_below is None:
        none_below = float(np.quantile(first, 1 - _SURE, method="lower")) if (truths_P > 0).any() else 0.0
    single = second[truths_P == 1]
    many_from = _between(single, second[truths_P > 1])
    if many_from is None and single.size:
        many_from = float(np.nextafter(np.quantile(single, _SURE, method="higher"), 2.0))
    return none_below, None if many_from is None else max(many_from, none_below)


def _between(low: Floats, high: Floats) -> float | None:
    """The score that best tells the low ones from the high ones; None where there are none of a kind."""
    if not low.size or not high.size:
        return None
    scores = np.unique(np.concatenate([low, high, [0.0, 1.0]]))
    cuts = (scores[1:] + scores[:-1]) / 2
    right = (low[:, None] < cuts).mean(0) + (high[:, None] >= cuts).mean(0)
    best = np.flatnonzero(right == right.max())
    return float(cuts[best[np.argmax(np.diff(scores)[best])]])
