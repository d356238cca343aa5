"""From specimens to uint8 batches, in this process or in workers.

Workers read, decode, resize and crop. Every random draw is made in this process, from (seed, epoch), and
travels to the workers with the specimen's number, so that neither workers nor their number change anything.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bioscan.errors import DataError, ImageError
from bioscan.learn.augmentation import DRAWS, Augmentation, random_crop
from bioscan.learn.dataset import SpecimenDataset, central_crop
from bioscan.parallel import cores


class Sample(NamedTuple):
    """One specimen, ready to be batched."""

    image_CHW: Tensor
    """uint8."""
    target: int
    number: int
    """Of the specimen in its dataset."""
    draws: NDArray[np.float32]
    """Uniform in [0, 1); see DRAWS."""


class Failure(NamedTuple):
    """A specimen whose image cannot be read."""

    number: int
    reason: str


class Batch(NamedTuple):
    """What a loader yields; failed images are left out and listed."""

    images_BCHW: Tensor
    targets_B: Tensor
    numbers_B: Tensor
    draws_BD: Tensor
    failures: list[Failure]

    @property
    def size(self) -> int:
        """Specimens with an image."""
        return int(self.numbers_B.numel())


Key = tuple[int, NDArray[np.float32]]
"""Number of a specimen in its dataset, and its draws."""


class Samples(Dataset[Sample | Failure]):
    """A dataset's specimens by number and draws, cropped."""

    def __init__(self, dataset: SpecimenDataset, augmentation: Augmentation | None = None) -> None:
        self.dataset, self.augmentation = dataset, augmentation

    def __getitem__(self, key: Key) -> Sample | Failure:
        number, draws = key
        dataset = self.dataset
        try:
            image = dataset.resized(number)
        except ImageError as error:
            return Failure(number, f"{error.reason} ({error.place})")
        if self.augmentation is None:
            image = central_crop(image, dataset.crop_size)
        else:
            image = random_crop(image, dataset.crop_size, self.augmentation, draws)
        return Sample(image, int(dataset.targets_N[number]), number, draws)


def collate(samples: Sequence[Sample | Failure]) -> Batch:
    """A batch of the samples that could be read; the others as failures. Without any, B is 0."""
    failures = [s for s in samples if isinstance(s, Failure)]
    good = [s for s in samples if isinstance(s, Sample)]
    images_BHWC = torch.empty((0, 0, 0, 3), dtype=torch.uint8)
    if good:
        images_BHWC = torch.stack([s.image_CHW.permute(1, 2, 0) for s in good])
    return Batch(
        images_BHWC.permute(0, 3, 1, 2),
        torch.tensor([s.target for s in good], dtype=torch.int64),
        torch.tensor([s.number for s in good], dtype=torch.int64),
        torch.from_numpy(np.stack([s.draws for s in good])) if good else torch.empty((0, len(DRAWS))),
        failures,
    )


class EpochBatches(Sampler[list[Key]]):
    """Batches of an epoch; their order and draws follow from the seed and the epoch.

    When shuffled, for training, a last batch of one joins the one before it: batch norm cannot train on a
    single specimen.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, shuffle: bool) -> None:
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.cuts = list(range(batch_size, size, batch_size))
        if shuffle and self.cuts and size - self.cuts[-1] == 1:
            self.cuts.pop()
        self.epoch = 0

    def __iter__(self) -> Iterator[list[Key]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(self.size) if self.shuffle else np.arange(self.size)
        for numbers in np.split(order, self.cuts):
            draws_BD = generator.random((numbers.size, len(DRAWS)), np.float32)
            yield list(zip(numbers.tolist(), draws_BD, strict=True))

    def __len__(self) -> int:
        return len(self.cuts) + 1


class Loader:
    """Batches of a dataset, epoch by epoch; a context that ends the workers, and tells when one died."""

    def __init__(
        self,
        dataset: SpecimenDataset,
        *,
        batch_size: int,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        shuffle: bool = False,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.batches = EpochBatches(len(dataset), batch_size, seed=seed, shuffle=shuffle)
        self._loader: DataLoader[Any] | None = DataLoader(
            Samples(dataset, augmentation),
            batch_sampler=self.batches,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else it would take numbers from the one that dropout draws from
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.batches)

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch.

        Raises:
            DataError: the package changed meanwhile.
        """
        assert self._loader is not None
        self.batches.epoch = epoch
        try:
            yield from self._loader
        except DataError as error:  # from a worker it comes with the worker's traceback as its text
            raise DataError(str(error).strip().rsplit("DataError: ", 1)[-1]) from None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # ended here and now: torch tells of a dead worker by a signal, anywhere, as long as it is known
        end_workers = getattr(getattr(self._loader, "_iterator", None), "_shutdown_workers", None)
        self._loader = None
        if end_workers is not None:
            with contextlib.suppress(RuntimeError):  # told once more
                end_workers()
        cut_off = isinstance(error, EOFError | ConnectionError)  # its batch was on the way
        if end_workers is not None and (cut_off or "DataLoader worker" in str(error)):
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise DataError(f"a loader process died ({reason}); fewer --workers need less memory") from None


def default_workers() -> int:
    """Loader processes where none are asked for: none on two cores, else one core is left to the network."""
    return 0 if cores() <= 2 else min(8, cores() - 1)


def fits_in_memory(images: int, image_size: int, cache_mb: int) -> bool:
    """Whether so many RGB images fit in so many MB at their working size, at an aspect of 4:3."""
    return images * 3 * math.ceil(image_size**2 * 4 / 3) <= cache_mb * 1_000_000
