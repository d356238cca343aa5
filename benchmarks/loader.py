"""Training batches: package to uint8 batch against the bare loop and the loader of the paper's program.

Pictures of 341 x 256 pixels in the published HDF5 form, random crops of 224, batches of 32, in one process on
one thread.
"""

import io
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import simplejpeg
import torch
from PIL import Image

from benchmarks.measure import interleaved
from bioscan.data.images import Images
from bioscan.learn.augmentation import Augmentation, to_network
from bioscan.learn.compat import import_timm
from bioscan.learn.dataset import ImageSpec, SpecimenDataset
from bioscan.learn.loader import Loader
from bioscan.vocabulary import HDF5_GROUP

PICTURES = {"small": 512, "full": 8_192}
BATCH = 32
CROP = 224
FLIPPED = Augmentation(crop="random", min_area=1.0, flip="horizontal", rotate=False, colour=0.0)
RAW = ImageSpec(image_size=256, crop_size=CROP, mean=(0.0,) * 3, std=(1.0,) * 3)


def run(size: str, work: Path) -> list[dict[str, Any]]:
    """Against the bare loop of read, decode and crop; against the reference's loader, which also flips and
    makes floats: we do that on the device, so its cost on the CPU is a row of its own.
    """
    count = PICTURES[size]
    package = work / f"loader_{count}.hdf5"
    if not package.exists():
        make_package(package, count)
    images = Images(package)
    dataset = SpecimenDataset(images, np.arange(len(images)), image_size=256, crop_size=CROP)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    import_timm()  # makes torchvision importable
    try:
        ours, bare, floats, reference = interleaved(
            lambda: _ours(dataset, floats=False),
            lambda: _bare(images),
            lambda: _ours(dataset, floats=True),
            lambda: _reference(package, images.index["name"].to_list()),
            rounds=3,
        )
    finally:
        torch.set_num_threads(threads)
    rows = [
        ("package to uint8 batch, 1 core", ours, bare, "≥ 0.8 × read, decode, crop"),
        ("package to uint8 batch, 1 core", ours, reference, "≥ 6 × the paper's loader"),
        ("package to flipped float batch, 1 core", floats, reference, "–"),
    ]
    return [
        {
            "work": name,
            "size": count,
            "value": count / seconds,
            "unit": "images/s",
            "floor": count / floor,
            "ratio": floor / seconds,
            "bound": bound,
            "peak_mb": None,
        }
        for name, seconds, floor, bound in rows
    ]


def make_package(package: Path, count: int) -> None:
    """The published form: one group, a dataset of JPEG bytes per picture."""
    generator = np.random.default_rng(1)
    with h5py.File(package, "w") as file:
        group = file.create_group(HDF5_GROUP)
        for number in range(count):
            coarse = Image.fromarray(generator.integers(90, 250, (16, 20, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((341, 256), Image.Resampling.BICUBIC), np.float32)
            pixels = np.clip(smooth + generator.normal(0, 2.5, smooth.shape), 0, 255).astype(np.uint8)
            data = simplejpeg.encode_jpeg(pixels, quality=75, colorsubsampling="420")
            group.create_dataset(f"{number}.jpg", data=np.frombuffer(data, np.uint8))


def _ours(dataset: SpecimenDataset, *, floats: bool) -> None:
    """One epoch of the training loader; with `floats`, up to what the network sees."""
    with Loader(dataset, batch_size=BATCH, augmentation=FLIPPED, shuffle=True) as loader:
        for batch in loader.epoch():
            if floats:
                to_network(
                    batch.images_BCHW,
                    RAW,
                    torch.device("cpu"),
                    channels_last=False,
                    augmentation=FLIPPED,
                    draws_BD=batch.draws_BD,
                )


def _bare(images: Images) -> None:
    """Read, decode, crop, stack: nothing else."""
    generator = np.random.default_rng(0)
    order = generator.permutation(len(images))
    for start in range(0, order.size, BATCH):
        squares = []
        for row in order[start : start + BATCH].tolist():
            pixels = simplejpeg.decode_jpeg(images.read(row))
            top = generator.integers(pixels.shape[0] - CROP + 1)
            left = generator.integers(pixels.shape[1] - CROP + 1)
            squares.append(pixels[top : top + CROP, left : left + CROP])
        torch.from_numpy(np.stack(squares))


def _reference(package: Path, names: list[str]) -> None:
    """As the paper's program does it: the file opened for each picture, PIL, float transforms."""
    from torchvision import transforms

    change = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.RandomCrop(CROP),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    order = np.random.default_rng(0).permutation(len(names))
    for start in range(0, order.size, BATCH):
        squares = []
        for row in order[start : start + BATCH]:
            with h5py.File(package, "r") as file:
                data = np.asarray(file[HDF5_GROUP][names[row]])
            squares.append(change(Image.open(io.BytesIO(data.tobytes())).convert("RGB")))
        torch.stack(squares)
