"""From a package of images to uint8 squares: a torch Dataset of specimens.

C: channel, H, W: pixels. Images are C x H x W views of what decoders give, H x W x C in memory; crops are
views too, and a batch of them is in torch's channels-last format without one more copy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from bioscan.data.decode import read_rgb
from bioscan.data.images import Images
from bioscan.errors import ImageError
from bioscan.learn import specimens
from bioscan.learn.settings import TrainSettings

MAX_ASPECT = 16
"""Of an image that is longer, only the middle is used: enlarged to its working size, a sliver would not fit
in memory, and the network sees its middle only."""


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """How an image becomes the network's input; saved with the model."""

    image_size: int
    """Shorter side after resizing (bilinear, antialiased), pixels."""
    crop_size: int
    """Side of the square, cut from the middle in evaluation."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Per channel in 0-1; 0 and 1: no normalisation."""


class SpecimenDataset(Dataset[tuple[Any, int]]):
    """Specimens as torchvision's datasets have them: item i is `(image, target)`.

    The image is a uint8 tensor, 3 x crop_size x crop_size, cut from the middle of the resized image; the
    target a number: in a dataset made by `SpecimenDataset.from_catalogue`, that of a class. Can be pickled;
    files are opened in each process when first needed.

    >>> dataset = SpecimenDataset.from_catalogue("catalogue.parquet", "images.zip")  # doctest: +SKIP
    >>> loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)  # doctest: +SKIP

    Attributes:
        targets_N: Class of each specimen, or what else goes with its image; -1 where there is none.
        classes: Name of each class, most common in training first.
        specimens: Table with a row per specimen, `key` and `image_file` among its columns; None without
            catalogue.
        left_out: Reason -> specimens of the catalogue that are not here.
    """

    def __init__(
        self,
        images: Images,
        rows_N: NDArray[np.int64],
        targets_N: NDArray[np.int64] | None = None,
        *,
        image_size: int,
        crop_size: int,
        classes: Sequence[str] = (),
        transform: Callable[[Tensor], Any] | None = None,
        cache: bool = False,
    ) -> None:
        """Specimens by their rows in a package.

        Args:
            images: The package.
            rows_N: Row of each specimen's image, from `images.find`; -1: an image that cannot be read.
            targets_N: Class of each specimen, or any number that goes with its image.
            image_size: Shorter side that images are resized to, pixels.
            crop_size: Side of the central square, pixels.
            classes: Names of the classes.
            transform: Instead of the central square: what becomes of a resized image, a uint8 tensor
                C x H x W.
            cache: Keep resized images in this process's memory; that changes nothing but time.
        """
        self.images, self.rows_N = images, rows_N
        self.targets_N = np.full(rows_N.size, -1, np.int64) if targets_N is None else targets_N
        self.image_size, self.crop_size, self.transform = image_size, crop_size, transform
        self.classes = list(classes)
        self.specimens: pl.DataFrame | None = None
        self.left_out: dict[str, int] = {}
        self._cache: dict[int, Tensor | ImageError] | None = {} if cache else None

    @classmethod
    def from_catalogue(
        cls,
        catalogue: Path | str | pl.DataFrame,
        images: Path | str | Images,
        *,
        experiment: str = "large_insect_order",
        role: str = "train",
        rank: str | None = None,
        within: str | None = None,
        image_size: int = 256,
        crop_size: int = 224,
        transform: Callable[[Tensor], Any] | None = None,
        cache: bool = False,
    ) -> "SpecimenDataset":
        """The specimens of one role. Class numbers follow from the training part, whatever the role.

        Args:
            catalogue: Catalogue, TSV, or a table from `read_metadata`, with the experiment's split column.
            images: The package, or its path.
            experiment: Split column.
            role: `train`, `validation` or `test`.
            rank: Rank of the classes; None: family or order, as the experiment has it.
            within: Only specimens below this taxon, for example `Lepidoptera`.
            image_size: Shorter side that images are resized to, pixels.
            crop_size: Side of the central square, pixels.
            transform: Instead of the central square, as in the constructor.
            cache: Keep resized images in memory.

        Raises:
            RequestError: an unknown name, no training specimens, or none with an image in the package.
        """
        settings = TrainSettings(
            experiment=experiment, rank=rank, within=within, image_size=image_size, crop_size=crop_size
        )
        package = images if isinstance(images, Images) else Images(images)
        chosen = specimens.select(
            catalogue,
            package,
            experiment=experiment,
            ranks=settings.target_ranks,
            within=within,
            roles=[role],
        )
        made = cls(
            package,
            chosen.table["row"].to_numpy(),
            chosen.taxonomy.first_leaf_N[chosen.table["node"].to_numpy()].astype(np.int64),
            image_size=image_size,
            crop_size=crop_size,
            classes=[chosen.taxonomy.name(int(node)) for node in chosen.taxonomy.leaves_L],
            transform=transform,
            cache=cache,
        )
        made.specimens, made.left_out = chosen.table, chosen.left_out
        if chosen.not_in_package.height:
            made.left_out[specimens.NOT_IN_PACKAGE] = chosen.not_in_package.height
        return made

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Class name -> number."""
        return {name: number for number, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return int(self.rows_N.size)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Image and target.

        Raises:
            ImageError: the image cannot be read.
        """
        image = self.resized(index)
        made = self.transform(image) if self.transform else central_crop(image, self.crop_size)
        return made, int(self.targets_N[index])

    def __repr__(self) -> str:
        return f"SpecimenDataset({len(self):,} specimens, {len(self.classes):,} classes, {self.images.path})"

    def resized(self, index: int) -> Tensor:
        """The image at its working size, uint8, C x H x W; the shorter side has `image_size` pixels.

        Raises:
            ImageError: the image cannot be read.
        """
        if self._cache is None:
            return self._read(index)
        if index not in self._cache:
            try:
                self._cache[index] = self._read(index)
            except ImageError as error:
                self._cache[index] = error
        made = self._cache[index]
        if isinstance(made, ImageError):
            raise ImageError(made.name, made.place, made.reason)
        return made

    def _read(self, index: int) -> Tensor:
        row = int(self.rows_N[index])
        if row < 0:
            raise ImageError(f"specimen {index}", self.images.path.name, specimens.NOT_IN_PACKAGE)
        pixels = read_rgb(self.images, row, min_size=self.image_size)
        return resize_shorter(torch.from_numpy(pixels).permute(2, 0, 1), self.image_size)


def resize_shorter(image_CHW: Tensor, size: int) -> Tensor:
    """The image with its shorter side at `size` pixels, bilinear with antialiasing.

    The longer side is rounded down, as torchvision's Resize does it.
    """
    _, height, width = image_CHW.shape
    short = min(height, width)
    longest = short * MAX_ASPECT
    if max(height, width) > longest:
        image_CHW = _middle(image_CHW, min(height, longest), min(width, longest))
        _, height, width = image_CHW.shape
    if short == size:
        return image_CHW
    return resize(image_CHW, int(size * height / short), int(size * width / short))


def central_crop(image_CHW: Tensor, size: int) -> Tensor:
    """The square of `size` pixels in the middle."""
    return _middle(image_CHW, size, size)


def _middle(image_CHW: Tensor, height: int, width: int) -> Tensor:
    _, whole_height, whole_width = image_CHW.shape
    # torchvision's CenterCrop rounds half to even here
    top, left = round((whole_height - height) / 2), round((whole_width - width) / 2)
    return image_CHW[:, top : top + height, left : left + width]


def resize(image_CHW: Tensor, height: int, width: int) -> Tensor:
    """The uint8 image at another size, bilinear with antialiasing."""
    # uint8 in channels-last layout is torch's fast antialiased path
    batch = image_CHW.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    made = functional.interpolate(
        batch, (height, width), mode="bilinear", antialias=True, align_corners=False
    )
    return made[0]
