"""Training throughput: an epoch of ours against a plain PyTorch loop of the shape of the paper's program.

The same network, the same pictures of 341 x 256 pixels in the published HDF5 form, batches of 32 random crops
of 224 with flips, SGD, cross-entropy; all cores. The plain loop has PIL and float transforms in two loader
processes and float32 throughout; ours is `fit` as `bioscan train` calls it, its checkpoint included.
"""

import io
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks.loader import make_package
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.data.images import Images
from bioscan.learn import models, training
from bioscan.learn.compat import import_timm
from bioscan.learn.dataset import SpecimenDataset
from bioscan.learn.device import precision_name
from bioscan.learn.losses import make_loss
from bioscan.learn.settings import TrainSettings
from bioscan.vocabulary import HDF5_GROUP

PICTURES = {"small": 96, "full": 192}
BATCH, CROP, CLASSES, ROUNDS = 32, 224, 16, 3
SETTINGS: dict[str, Any] = {
    "crop": "random",
    "flip": "horizontal",
    "rotate": False,
    "colour": 0.0,
    "normalise": False,
    "optimizer": "sgd",
    "weight_decay": 1e-4,
    "epochs": 1,
    "batch_size": BATCH,
    "image_size": 256,
    "crop_size": CROP,
    "criterion": "last",
}
CASES = (
    ("test_resnet", {"amp": "off"}),
    ("resnet18", {"amp": "off"}),
    ("resnet18", {"amp": "auto"}),
    ("resnet50", {"amp": "auto"}),
)


def run(size: str, work: Path) -> list[dict[str, Any]]:
    """Images a second of both, by turns; each round is an epoch of a fresh network."""
    count = PICTURES[size]
    package = work / f"training_{count}.hdf5"
    if not package.exists():
        make_package(package, count)
    import_timm()  # makes torchvision importable
    targets_N = np.random.default_rng(1).integers(CLASSES, size=count)
    rows = []
    for model, changed in CASES:
        settings = TrainSettings(model=model, **{**SETTINGS, **changed})
        taken: dict[str, list[float]] = {"ours": [], "plain": []}
        for _ in range(ROUNDS):
            taken["ours"].append(_ours(package, targets_N, settings))
            taken["plain"].append(_plain(package, targets_N, model))
        ours, plain = (float(np.median(taken[name])) for name in ("ours", "plain"))
        rows.append(
            {
                "work": f"training {model}, {precision_name(settings.amp, torch.device('cpu'))}",
                "size": count,
                "value": count / ours,
                "unit": "images/s",
                "floor": count / plain,
                "ratio": plain / ours,
                "bound": "≥ 1.3 × the plain loop",
                "peak_mb": None,
            }
        )
    return rows


def _ours(package: Path, targets_N: np.ndarray, settings: TrainSettings) -> float:
    taxonomy = Taxonomy.build(pl.DataFrame({"order": [f"order {n}" for n in range(CLASSES)]}), ["order"])
    images = Images(package)
    dataset = SpecimenDataset(
        images,
        np.arange(len(images)),
        taxonomy.leaves_L[targets_N].astype(np.int64),
        image_size=256,
        crop_size=CROP,
    )
    network = models.create(settings.model, outputs=CLASSES, crop_size=CROP)
    counts_N = np.bincount(dataset.targets_N, minlength=taxonomy.num_nodes)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        training.fit(
            network,
            dataset,
            None,
            taxonomy=taxonomy,
            loss=make_loss(settings, taxonomy, counts_N),
            spec=training.image_spec_of(settings, network),
            settings=settings,
            folder=Path(folder),
        )
        return time.perf_counter() - start


class _Pictures(Dataset[Any]):
    """As the paper's program reads them: the file opened for each picture, PIL, float transforms."""

    def __init__(self, package: Path, targets_N: np.ndarray) -> None:
        from torchvision import transforms

        self.package, self.targets_N = package, targets_N
        with h5py.File(package) as file:
            self.names = list(file[HDF5_GROUP])
        self.transform = transforms.Compose(
            [
                transforms.Resize(256),
                transforms.RandomCrop(CROP),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        with h5py.File(self.package) as file:
            data = np.asarray(file[HDF5_GROUP][self.names[number]]).tobytes()
        return self.transform(Image.open(io.BytesIO(data))), int(self.targets_N[number])


def _plain(package: Path, targets_N: np.ndarray, model: str) -> float:
    network = models.create(model, outputs=CLASSES, crop_size=CROP).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, nesterov=True)
    start = time.perf_counter()
    for images, targets in DataLoader(
        _Pictures(package, targets_N), batch_size=BATCH, shuffle=True, num_workers=2
    ):
        optimizer.zero_grad()
        functional.cross_entropy(network(images), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return time.perf_counter() - start
