"""A backbone's features of photographs.

B: batch, C: channel, H, W: pixels, F: features, N: photographs.
"""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bioscan.data.images import Images
from bioscan.errors import ImageError, RequestError
from bioscan.learn import model_folder, models
from bioscan.learn.augmentation import to_network
from bioscan.learn.compat import import_timm
from bioscan.learn.dataset import ImageSpec, SpecimenDataset, central_crop
from bioscan.learn.device import autocast, choose_device, choose_precision
from bioscan.learn.heads import features_of
from bioscan.learn.model_names import resolve
from bioscan.parallel import cores

_AHEAD: Final = 2
"""Batches that are read while the network is busy."""


@dataclass(frozen=True)
class Backbone:
    """A network whose features are wanted, with what identifies it."""

    network: nn.Module
    """In evaluation mode, on its device."""
    name: str
    spec: ImageSpec
    weights_sha256: str
    """Of the weights below the head (`backbone_sha256`)."""
    model_sha256: str | None
    """Fingerprint of the model folder that it comes from; None for a named backbone."""

    @property
    def record(self) -> dict[str, Any]:
        """What features follow from, for a footer or a model folder."""
        return {
            "backbone": self.name,
            "weights_sha256": self.weights_sha256,
            "model_sha256": self.model_sha256,
            "image": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self.spec).items()},
        }


def open_backbone(
    model: Path | str,
    *,
    weights: str | None = None,
    image_size: int | None = None,
    crop_size: int | None = None,
    device: str = "auto",
) -> Backbone:
    """A backbone from a model folder, or by name and weights.

    Args:
        model: Model folder or run folder, else the name of a backbone.
        weights: Of a named backbone: `hub` (also None) or a local file or folder.
        image_size: Shorter side that images are resized to; None: as the folder, or the weights, have it.
        crop_size: Side of the central square; None: likewise.
        device: auto, cpu, cuda or mps.

    Raises:
        RequestError: no such model or weights, random weights, or sizes that do not fit.
    """
    place = choose_device(device)
    if Path(model).is_dir():
        if weights is not None or image_size or crop_size:
            raise RequestError(f"{model} is a model folder: it has its own weights and image size")
        loaded = model_folder.load(model, device=place)
        return Backbone(
            loaded.network,
            str(loaded.info["backbone"]),
            loaded.spec,
            backbone_sha256(loaded.network),
            loaded.fingerprint,
        )
    name = str(model)
    weights = weights or "hub"
    if weights == "none":
        raise RequestError(
            "random weights make features that say nothing; pass --weights FILE, or hub for pretrained ones"
        )
    usual_image, usual_crop = _usual_sizes(name)
    crop_size = crop_size or min(usual_crop, image_size or usual_crop)
    image_size = image_size or round(crop_size * usual_image / usual_crop)
    if crop_size > image_size:
        raise RequestError(f"crop_size {crop_size} is larger than image_size {image_size}")
    network = models.create(name, outputs=0, crop_size=crop_size, weights=weights)
    mean, std = models.normalisation(network)
    spec = ImageSpec(image_size=image_size, crop_size=crop_size, mean=mean, std=std)
    return Backbone(network.to(place).eval(), name, spec, backbone_sha256(network), None)


def _usual_sizes(name: str) -> tuple[int, int]:
    """Shorter side of the image, and side of the crop, that a backbone's weights are evaluated with."""
    timm = import_timm()
    wanted = resolve(name)
    configuration = (
        timm.get_pretrained_cfg(wanted, allow_unregistered=True) if timm.is_model(wanted) else None
    )
    if configuration is None:
        return 256, 224
    crop = int(configuration.input_size[-1])
    return round(crop / (configuration.crop_pct or 1)), crop


def features(
    backbone: Backbone,
    images: Images,
    rows_N: NDArray[np.int64],
    *,
    batch_size: int = 64,
    amp: str = "off",
) -> Iterator[tuple[int, NDArray[np.float32], dict[int, ImageError]]]:
    """Features of photographs in order, a batch at a time; the next ones are read meanwhile.

    Args:
        backbone: The network.
        images: The package.
        rows_N: Rows in the package.
        batch_size: Photographs at a time.
        amp: Mixed precision, as in the training settings.

    Yields:
        The number of the first photograph; features, B × F, NaN where there is no photograph; number ->
        error, of photographs that cannot be read and of features that are not finite.
    """
    device = next(backbone.network.parameters()).device
    precision = choose_precision(amp, device)
    dataset = SpecimenDataset(
        images, rows_N, image_size=backbone.spec.image_size, crop_size=backbone.spec.crop_size
    )
    starts = iter(range(0, len(dataset), batch_size))
    waiting: deque[tuple[int, list[Future[Tensor | ImageError]]]] = deque()
    with ThreadPoolExecutor(cores()) as readers:
        while True:
            for start in itertools.islice(starts, _AHEAD - len(waiting)):
                numbers = range(start, min(start + batch_size, len(dataset)))
                waiting.append((start, [readers.submit(_square, dataset, number) for number in numbers]))
            if not waiting:
                return
            start, batch = waiting.popleft()
            read = [future.result() for future in batch]
            squares = [square for square in read if isinstance(square, Tensor)]
            errors = {start + n: error for n, error in enumerate(read) if isinstance(error, ImageError)}
            good = [number for number in range(start, start + len(read)) if number not in errors]
            made_BF = np.empty((0, 0), np.float32)
            if squares:
                with torch.inference_mode(), autocast(device, precision):
                    pixels = to_network(torch.stack(squares), backbone.spec, device, channels_last=False)
                    made_BF = features_of(backbone.network, pixels).float().cpu().numpy()
            values = np.full((len(read), made_BF.shape[1]), np.nan, np.float32)
            values[np.array(good, np.int64) - start] = made_BF
            for number in good:
                if not np.isfinite(values[number - start]).all():
                    row = int(rows_N[number])
                    errors[number] = ImageError(images.name(row), images.place(row), "features not finite")
            yield start, values, errors


def gather(
    backbone: Backbone,
    images: Images,
    rows_N: NDArray[np.int64],
    *,
    batch_size: int = 64,
    half: bool = False,
    progress: Callable[..., None] | None = None,
) -> tuple[NDArray[np.floating[Any]], list[dict[str, Any]]]:
    """Features of photographs at once, for heads that are fitted to them.

    Args:
        backbone: The network.
        images: The package.
        rows_N: Rows in the package.
        batch_size: Photographs at a time.
        half: Keep them as float16, to save memory, where that holds them; else float32.
        progress: Called as `progress(done, total)`.

    Returns:
        N × F, a row of NaN where there is no photograph or a feature is not finite; and what failed, each
        with `name`, `part`, `place`, `reason`.
    """
    made_NF: NDArray[np.floating[Any]] | None = None
    failures = []
    for start, values_BF, errors in features(backbone, images, rows_N, batch_size=batch_size):
        for number, error in sorted(errors.items()):
            part = images.index.item(int(rows_N[number]), "part")
            failures.append({"name": error.name, "part": part, "place": error.place, "reason": error.reason})
            values_BF[number - start] = np.nan
        if values_BF.shape[1]:
            if made_NF is None:
                kind = np.float16 if half else np.float32
                made_NF = np.full((rows_N.size, values_BF.shape[1]), np.nan, kind)
            if half and np.nanmax(np.abs(values_BF), initial=0) > np.finfo(np.float16).max:
                made_NF = made_NF.astype(np.float32, copy=False)
            made_NF[start : start + len(values_BF)] = values_BF
        if progress:
            progress(start + len(values_BF), rows_N.size)
    return np.full((rows_N.size, 1), np.nan, np.float32) if made_NF is None else made_NF, failures


def _square(dataset: SpecimenDataset, number: int) -> Tensor | ImageError:
    try:
        return central_crop(dataset.resized(number), dataset.crop_size)
    except ImageError as error:
        return error


def num_features(backbone: Backbone) -> int:
    """F, found by a try."""
    parameter = next(backbone.network.parameters())
    size = backbone.spec.crop_size
    with torch.inference_mode():
        blank = torch.zeros((1, 3, size, size), device=parameter.device, dtype=parameter.dtype)
        return int(features_of(backbone.network, blank).shape[1])


def backbone_sha256(network: nn.Module) -> str:
    """SHA-256 of the state dict without the head, by name, type, shape and value.

    The same weights have the same hash, whatever file they came in.
    """
    digest = hashlib.sha256()
    for name, value in sorted(backbone_state(network).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def backbone_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict without the head."""
    found: Any = network.get_classifier()  # type: ignore[operator]
    heads = found if isinstance(found, tuple | list) else (found,)
    prefixes = tuple(
        f"{name}." for name, module in network.named_modules() if any(module is head for head in heads)
    )
    return {name: value for name, value in network.state_dict().items() if not name.startswith(prefixes)}
