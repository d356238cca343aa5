"""From specimens to uint8 batches, in this process or in workers.

Workers read, decode, resize and crop. Every random draw is made in this process, from (seed, epoch,
specimen), and travels to the workers with the specimen's number, so that neither workers nor their number,
nor the number of processes that train together, change anything.

B: batch, D: draws, E: specimens of an epoch, N: specimens.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import Sampler as TorchSampler

from bioscan.errors import DataError, ImageError
from bioscan.learn.augmentation import DRAWS, Augmentation, random_crop
from bioscan.learn.dataset import SpecimenDataset, central_crop
from bioscan.learn.sampling import Sampler, draws, epoch_order, occurrences
from bioscan.parallel import cores


class Key(NamedTuple):
    """A specimen of an epoch's plan."""

    number: int
    """In its dataset."""
    place: int
    """In its batch as planned; -1: it only fills a share that would be empty, and counts for nothing."""
    draws: NDArray[np.float32]
    """Uniform in [0, 1); see DRAWS."""


class Sample(NamedTuple):
    """One specimen, ready to be batched."""

    image_CHW: Tensor
    """uint8."""
    target: int
    key: Key


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
    places_B: Tensor
    """Of the specimens in the batch as planned, in rising order; -1: they count for nothing."""
    failures: list[Failure]

    @property
    def size(self) -> int:
        """Specimens with an image."""
        return int(self.numbers_B.numel())

    @property
    def counted(self) -> int:
        """Specimens with an image that count."""
        return int((self.places_B >= 0).sum())


class Samples(Dataset[Sample | Failure]):
    """A dataset's specimens by their keys, cropped."""

    def __init__(self, dataset: SpecimenDataset, augmentation: Augmentation | None = None) -> None:
        self.dataset, self.augmentation = dataset, augmentation

    def __getitem__(self, key: Key) -> Sample | Failure:
        dataset = self.dataset
        try:
            image = dataset.resized(key.number)
        except ImageError as error:
            return Failure(key.number, f"{error.reason} ({error.place})")
        if self.augmentation is None:
            image = central_crop(image, dataset.crop_size)
        else:
            image = random_crop(image, dataset.crop_size, self.augmentation, key.draws)
        return Sample(image, int(dataset.targets_N[key.number]), key)


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
        torch.tensor([s.key.number for s in good], dtype=torch.int64),
        torch.from_numpy(np.stack([s.key.draws for s in good])) if good else torch.empty((0, len(DRAWS))),
        torch.tensor([s.key.place for s in good], dtype=torch.int64),
        failures,
    )


class EpochBatches(TorchSampler[list[Key]]):
    """Batches of an epoch; their order and draws follow from the seed and the epoch.

    When shuffled, for training, a last batch of one joins the one before it: batch norm cannot train on a
    single specimen.

    Of each batch, `processes` that train together take a share each, and each share comes in `parts`. Shares
    are runs of whole pairs of neighbours (0 and 1, 2 and 3, ...), the pairs that are mixed, so that mixing
    does not depend on how the batch is shared. Where there are fewer pairs than shares, pairs are given a
    second time, and count for nothing then: every process has something to do in every step.
    """

    def __init__(
        self,
        targets_N: NDArray[np.int64],
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        sampler: Sampler = "uniform",
        repeat_threshold: float = 1e-3,
        rank: int = 0,
        processes: int = 1,
        parts: int = 1,
    ) -> None:
        self.targets_N, self.batch_size, self.seed, self.shuffle = targets_N, batch_size, seed, shuffle
        self.sampler, self.repeat_threshold = sampler, repeat_threshold
        self.rank, self.processes, self.parts = rank, processes, parts
        self.epoch = 0

    @property
    def epoch(self) -> int:
        """The epoch whose batches are given."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self.numbers_E = np.arange(self.targets_N.size)
        if self.shuffle:
            self.numbers_E = epoch_order(
                self.sampler,
                self.targets_N,
                seed=self.seed,
                epoch=epoch,
                repeat_threshold=self.repeat_threshold,
            )
        size = self.numbers_E.size
        starts = list(range(0, size, self.batch_size))
        if self.shuffle and len(starts) > 1 and size - starts[-1] == 1:
            starts.pop()
        self.spans = list(itertools.pairwise([*starts, size]))

    @property
    def steps(self) -> int:
        """Batches of the epoch, all processes' shares together."""
        return len(self.spans)

    def __iter__(self) -> Iterator[list[Key]]:
        occurrence_E = occurrences(self.numbers_E)
        shares = self.processes * self.parts
        for start, end in self.spans:
            pairs = -(-(end - start) // 2)
            for share in range(self.rank * self.parts, (self.rank + 1) * self.parts):
                first, last = pairs * share // shares, pairs * (share + 1) // shares
                fills = first == last
                if fills:
                    first = share % pairs
                    last = first + 1
                span = slice(start + 2 * first, min(start + 2 * last, end))
                numbers_B = self.numbers_E[span]
                draws_BD = draws(self.seed, self.epoch, numbers_B, occurrence_E[span], num_draws=len(DRAWS))
                places = itertools.repeat(-1) if fills else itertools.count()
                yield [Key(*of) for of in zip(numbers_B.tolist(), places, draws_BD, strict=False)]

    def __len__(self) -> int:
        return self.steps * self.parts


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
        sampler: Sampler = "uniform",
        repeat_threshold: float = 1e-3,
        rank: int = 0,
        processes: int = 1,
        parts: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Batches as `EpochBatches` plans them.

        Args:
            dataset: The specimens; what a sampler balances is their `targets_N`.
            batch_size: Specimens of all processes' shares together.
            augmentation: Of the crop; None: the middle.
            seed: Of order and draws.
            shuffle: In a new order each epoch, by the sampler.
            sampler: See `sampling.epoch_order`.
            repeat_threshold: Of the sampler `repeat_factor`.
            rank: Which process's share.
            processes: How many share a batch.
            parts: How many batches a share comes in.
            workers: Loader processes.
            pin_memory: For a CUDA device.
        """
        self.parts = parts
        self.batches = EpochBatches(
            dataset.targets_N,
            batch_size,
            seed=seed,
            shuffle=shuffle,
            sampler=sampler,
            repeat_threshold=repeat_threshold,
            rank=rank,
            processes=processes,
            parts=parts,
        )
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
        """Steps in the epoch that was begun last, each of `parts` batches."""
        return self.batches.steps

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

    def steps(self, epoch: int = 0) -> Iterator[list[Batch]]:
        """The batches of an epoch, the parts of a step together; as `epoch`."""
        batches = self.epoch(epoch)
        while step := list(itertools.islice(batches, self.parts)):
            yield step

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


def default_workers(processes: int = 1) -> int:
    """Loader processes where none are asked for: none on two cores, else one core is left to the network.

    Args:
        processes: That train together on this machine and share its cores.
    """
    each = cores() // processes
    return 0 if each <= 2 else min(8, each - 1)


def fits_in_memory(images: int, image_size: int, cache_mb: int) -> bool:
    """Whether so many RGB images fit in so many MB at their working size, at an aspect of 4:3."""
    return images * 3 * math.ceil(image_size**2 * 4 / 3) <= cache_mb * 1_000_000
