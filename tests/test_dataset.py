"""From packages of images to samples and batches: geometry, augmentation, the public dataset, the loader."""

import multiprocessing
import os
import pickle
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

import bioscan
from bioscan.data.images import Images
from bioscan.errors import DataError, ImageError, RequestError
from bioscan.learn.augmentation import DRAWS, Augmentation, random_crop, to_network
from bioscan.learn.compat import import_timm
from bioscan.learn.dataset import ImageSpec, SpecimenDataset, central_crop, resize_shorter
from bioscan.learn.loader import Batch, EpochBatches, Key, Loader

Paint = Callable[..., tuple[Path, Path]]

# with fewer cores than workers torch warns; the results are what is tested
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

THREE = {"Diptera": (6, 2, 1), "Coleoptera": (4, 1, 2), "Lepidoptera": (2, 1, 1)}
CPU = torch.device("cpu")
RAW = ImageSpec(image_size=32, crop_size=32, mean=(0.0,) * 3, std=(1.0,) * 3)


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth noise, as photographs are."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (max(1, height // 8), max(1, width // 8), 3), dtype=np.uint8)
    made = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(made)).permute(2, 0, 1)


def augmentation(**changes: Any) -> Augmentation:
    plain: dict[str, Any] = {
        "crop": "random",
        "min_area": 0.4,
        "flip": "none",
        "rotate": False,
        "colour": 0.0,
    }
    return Augmentation(**{**plain, **changes})


def draws(**values: float) -> torch.Tensor:
    """One specimen's draws; 0.5 changes no colour, and flips nothing."""
    return torch.tensor([[values.get(name, 0.5) for name in DRAWS]])


# -- geometry


@pytest.mark.parametrize("size", [(341, 256), (256, 341), (300, 281), (281, 375), (97, 100), (512, 800)])
def test_resize_and_crops_are_those_of_torchvision(size: tuple[int, int]) -> None:
    import_timm()  # makes torchvision importable
    from torchvision import transforms

    image = picture(*size)
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    wanted = transforms.Resize(256)(pil)
    made = resize_shorter(image, 256)
    assert made.shape[1:] == (wanted.height, wanted.width)
    difference = made.int() - torch.from_numpy(np.array(wanted)).permute(2, 0, 1).int()
    assert int(difference.abs().max()) <= 1
    assert torch.equal(central_crop(image, 90), transforms.CenterCrop(90)(image))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1, 1, (32, 32)),
        (9, 5, (57, 32)),  # 32 · 9 / 5 = 57.6, rounded down
        (10, 20_000, (32, 512)),  # cut to 16:1
        (20_000, 10, (512, 32)),
        (32, 40, (32, 40)),  # as it is
    ],
)
def test_images_of_any_shape_come_out_large_enough_and_bounded(
    height: int, width: int, expected: tuple[int, int]
) -> None:
    made = resize_shorter(torch.full((3, height, width), 7, dtype=torch.uint8), 32)
    assert made.shape[1:] == expected
    assert bool((made == 7).all())
    assert central_crop(made, 32).shape == (3, 32, 32)


def test_of_a_sliver_the_middle_is_used() -> None:
    sliver = torch.zeros((3, 2, 1000), dtype=torch.uint8)
    sliver[:, :, 480:520] = 200
    assert int(central_crop(resize_shorter(sliver, 8), 8).min()) == 200


@settings(max_examples=60, deadline=None)
@given(
    st.integers(8, 60),
    st.integers(8, 60),
    st.integers(1, 8),
    st.sampled_from(["random", "random_resized"]),
    st.integers(0, 2**32 - 1),
)
def test_a_random_crop_has_its_size_and_only_pixels_of_the_image(
    height: int, width: int, size: int, crop: str, seed: int
) -> None:
    image = torch.full((3, height, width), 90, dtype=torch.uint8)
    drawn = np.random.default_rng(seed).random(len(DRAWS), np.float32)
    made = random_crop(image, size, augmentation(crop=crop), drawn)
    assert made.shape == (3, size, size)
    assert bool((made == 90).all())


def test_every_place_of_the_random_crop_is_equally_likely() -> None:
    image = torch.arange(25, dtype=torch.uint8).view(1, 5, 5).expand(3, 5, 5)
    generator = np.random.default_rng(0)
    drawn = generator.random((1800, len(DRAWS)), np.float32)
    corners = [int(random_crop(image, 3, augmentation(), row)[0, 0, 0]) for row in drawn]
    counts = np.bincount(corners, minlength=25)[[0, 1, 2, 5, 6, 7, 10, 11, 12]]
    assert counts.sum() == 1800
    assert counts.min() > 150  # 200 expected each; 150 is 3.7 deviations away


def test_the_resized_crop_keeps_the_asked_share_of_the_image() -> None:
    ramp = torch.arange(200, dtype=torch.uint8).view(1, 1, 200).expand(3, 200, 200).contiguous()
    generator = np.random.default_rng(0)
    changes = augmentation(crop="random_resized", min_area=0.64)
    spans = []
    for row in generator.random((200, len(DRAWS)), np.float32):
        made = random_crop(ramp, 50, changes, row).float()
        spans.append(float(made[0, 0, -1] - made[0, 0, 0]) / 200)
    # width² = area · ratio, area from 0.64, ratio from 3/4 to 4/3: at least sqrt(0.48) = 0.69 of the width
    assert 0.66 < min(spans) < 0.78
    assert max(spans) > 0.95


# -- augmentation on the device


def test_flips_follow_the_draws() -> None:
    images = picture(16, 24)[None]
    for flip, drawn, axes in (
        ("both", {"horizontal": 0.4, "vertical": 0.4}, (2, 3)),
        ("both", {"horizontal": 0.4}, (3,)),
        ("horizontal", {"horizontal": 0.4, "vertical": 0.4}, (3,)),
        ("none", {"horizontal": 0.4, "vertical": 0.4}, ()),
    ):
        made = to_network(
            images,
            RAW,
            CPU,
            channels_last=False,
            augmentation=augmentation(flip=flip),
            draws_BD=draws(**drawn),
        )
        assert torch.equal(made, images.flip(axes).float() / 255)


@pytest.mark.parametrize("quarter", [0, 1, 2, 3])
def test_a_quarter_turn_is_a_quarter_turn(quarter: int) -> None:
    images = picture(16, 16)[None]
    made = to_network(
        images,
        RAW,
        CPU,
        channels_last=True,
        augmentation=augmentation(rotate=True),
        draws_BD=draws(angle=quarter / 4),
    )
    assert torch.allclose(made, torch.rot90(images, quarter, (2, 3)).float() / 255, atol=1e-4)


def test_colour_draws_of_one_half_change_nothing_and_others_stay_in_range() -> None:
    images = picture(16, 16)[None]
    same, brighter = (
        to_network(
            images, RAW, CPU, channels_last=False, augmentation=augmentation(colour=0.4), draws_BD=drawn
        )
        for drawn in (draws(), draws(brightness=0.99, contrast=0.99, saturation=0.0))
    )
    assert torch.allclose(same, images.float() / 255, atol=1e-6)
    assert float(brighter.min()) >= 0
    assert float(brighter.max()) <= 1
    assert float(brighter.mean()) > float(same.mean())


def test_normalisation_is_by_channel() -> None:
    spec = ImageSpec(image_size=4, crop_size=4, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    white = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    made = to_network(white, spec, CPU, channels_last=False)
    assert made[0, :, 0, 0].tolist() == [1.0, 3.0, 0.5]


# -- the dataset for a user's own loop


def test_a_plain_data_loader_batches_the_dataset(paint: Paint) -> None:
    dataset = bioscan.SpecimenDataset.from_catalogue(*paint(THREE), image_size=32, crop_size=28)
    assert len(dataset) == 12
    images, targets = next(iter(DataLoader(dataset, batch_size=5)))
    assert images.shape == (5, 3, 28, 28)
    assert images.dtype == torch.uint8
    assert [dataset.classes[t] for t in targets] == ["Diptera"] * 5
    assert dataset.class_to_idx == {"Diptera": 0, "Coleoptera": 1, "Lepidoptera": 2}  # most common first
    assert dataset.specimens is not None
    assert dataset.specimens["key"][0] == "Diptera-train-0"
    assert "12 specimens, 3 classes" in repr(dataset)


def test_classes_follow_the_training_part_whatever_the_role(paint: Paint) -> None:
    metadata, images = paint({"Diptera": (1, 5, 0), "Coleoptera": (3, 0, 1), "Lepidoptera": (0, 2, 0)})
    table = bioscan.read_metadata(metadata)
    made = {
        role: bioscan.SpecimenDataset.from_catalogue(table, images, role=role, image_size=32, crop_size=32)
        for role in ("train", "validation", "test")
    }
    assert {tuple(d.classes) for d in made.values()} == {("Coleoptera", "Diptera")}
    assert made["validation"].targets_N.tolist() == [1] * 5
    assert made["validation"].left_out == {"a taxon without training specimens": 2}
    assert made["test"].targets_N.tolist() == [0]


def test_a_transform_gets_the_resized_image_and_may_return_anything(paint: Paint) -> None:
    metadata, images = paint({"Diptera": (1, 0, 0), "Coleoptera": (1, 0, 0)}, size=(60, 40))
    dataset = SpecimenDataset.from_catalogue(
        metadata, images, image_size=20, crop_size=20, transform=lambda image: (image.shape, image.dtype)
    )
    assert dataset[0][0] == ((3, 20, 30), torch.uint8)


def test_the_dataset_is_the_same_after_pickling_in_workers_and_from_its_cache(paint: Paint) -> None:
    metadata, images = paint(THREE)
    options: dict[str, Any] = {"image_size": 32, "crop_size": 32}
    dataset = SpecimenDataset.from_catalogue(metadata, images, **options)
    cached = SpecimenDataset.from_catalogue(metadata, images, **options, cache=True)
    wanted = torch.stack([dataset[i][0] for i in range(len(dataset))])
    for other in (pickle.loads(pickle.dumps(dataset)), cached, cached):
        assert torch.equal(torch.stack([other[i][0] for i in range(len(other))]), wanted)
    loader = DataLoader(dataset, batch_size=4, num_workers=2)
    assert torch.equal(torch.cat([images for images, _ in loader]), wanted)


@pytest.mark.parametrize("cache", [False, True])
def test_a_broken_image_is_an_error_that_names_it_each_time(paint: Paint, cache: bool) -> None:
    metadata, images = paint(THREE)
    (images / "Diptera-train-0.jpg").write_bytes(b"no picture")
    dataset = SpecimenDataset.from_catalogue(metadata, images, image_size=32, crop_size=32, cache=cache)
    for _ in range(2):
        with pytest.raises(ImageError, match=r"Diptera-train-0\.jpg: not an image"):
            dataset[0]
    assert dataset[1][0].shape == (3, 32, 32)


def test_specimens_without_an_image_or_a_name_are_counted(paint: Paint) -> None:
    metadata, images = paint({**THREE, "not_classified": (2, 0, 0)})
    (images / "Diptera-train-3.jpg").unlink()
    dataset = SpecimenDataset.from_catalogue(metadata, images, image_size=32, crop_size=32)
    assert dataset.left_out == {"no name at rank order": 2, "not in the package": 1}
    assert len(dataset) == 11


def test_diptera_experiments_classify_families(paint: Paint) -> None:
    metadata, images = paint({"Diptera/Phoridae": (3, 0, 0), "Diptera/Sciaridae": (2, 0, 0)})
    table = bioscan.read_metadata(metadata).rename({"large_insect_order": "small_diptera_family"})
    dataset = SpecimenDataset.from_catalogue(
        table, images, experiment="small_diptera_family", image_size=32, crop_size=32
    )
    assert dataset.classes == ["Phoridae", "Sciaridae"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"role": "validaton"}, "unknown role 'validaton'; did you mean 'validation'"),
        ({"rank": "ordr"}, "unknown rank 'ordr'; did you mean 'order'"),
        ({"rank": "tribe"}, "no training specimens with an image and a name at rank tribe"),
        ({"experiment": "large_insect_ordr"}, "has no column 'large_insect_ordr'; did you mean"),
        ({"within": "Lepidopter"}, "no record belongs to 'Lepidopter'; did you mean 'Lepidoptera'"),
        ({"crop_size": 300}, "crop_size 300 is larger than image_size 256"),
    ],
)
def test_a_wrong_request_is_told_with_the_way_out(
    paint: Paint, options: dict[str, Any], message: str
) -> None:
    metadata, images = paint(THREE)
    with pytest.raises(RequestError, match=message):
        SpecimenDataset.from_catalogue(metadata, images, **options)


def test_a_package_without_any_of_the_images_is_refused(paint: Paint, tmp_path: Path) -> None:
    metadata, _ = paint(THREE)
    (tmp_path / "other").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "other" / "x.jpg")
    with pytest.raises(RequestError, match="none of the training specimens has its image"):
        SpecimenDataset.from_catalogue(metadata, tmp_path / "other")


def test_a_training_name_that_fits_two_taxa_is_left_out(paint: Paint) -> None:
    # three genera named Vanessa at different orders would be three taxa; one row leaves the order open
    metadata, images = paint(
        {"Diptera/Aidae/Vanessa/V. a": (2, 0, 0), "Coleoptera/Beidae/Vanessa/V. b": (2, 0, 0)}
    )
    table = bioscan.read_metadata(metadata)
    open_order = pl.col("sampleid") == "V._a-train-1"
    table = table.with_columns(
        *(
            pl.when(open_order).then(None).otherwise(pl.col(r)).alias(r)
            for r in ("order", "family", "species")
        )
    )
    dataset = SpecimenDataset.from_catalogue(table, images, rank="genus", image_size=32, crop_size=32)
    kept = dict(zip(dataset.specimens["key"], dataset.targets_N.tolist(), strict=True))  # type: ignore[index]
    assert kept["V._a-train-0"] != kept["V._b-train-0"]
    assert all(0 <= target < len(dataset.classes) for target in kept.values())


# -- batches


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 90), st.integers(2, 20), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_has_every_specimen_once_and_no_batch_of_one(
    size: int, batch_size: int, seed: int, epoch: int
) -> None:
    sampler = EpochBatches(np.zeros(size, np.int64), batch_size, seed=seed, shuffle=True)
    sampler.epoch = epoch
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(key.number for batch in batches for key in batch) == list(range(size))
    assert all([key.place for key in batch] == list(range(len(batch))) for batch in batches)
    assert all(2 <= len(batch) <= batch_size + 1 for batch in batches) or size == 1


def planned(size: int, batch_size: int, *, epoch: int = 0, **options: Any) -> list[list[Key]]:
    """The batches of an epoch of specimens of one class, seed 1 and shuffled unless told."""
    sampler = EpochBatches(np.zeros(size, np.int64), batch_size, **{"seed": 1, "shuffle": True, **options})
    sampler.epoch = epoch
    return list(sampler)


def test_order_and_draws_change_with_the_epoch_and_the_seed() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, float]]:
        keys = [key for batch in planned(50, 10, seed=seed, epoch=epoch) for key in batch]
        return [(key.number, float(key.draws[0])) for key in keys]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert len({dict(order(seed, epoch))[7] for seed in (1, 2) for epoch in (0, 1)}) == 4
    plain = planned(50, 10, shuffle=False)
    assert [key.number for batch in plain for key in batch] == list(range(50))


def test_the_draws_of_a_specimen_do_not_depend_on_its_batch_or_process() -> None:
    def drawn(keys: list[Key]) -> dict[int, bytes]:
        return {key.number: key.draws.tobytes() for key in keys}

    whole = drawn([key for batch in planned(40, 40) for key in batch])
    for batch_size, processes, parts in ((7, 1, 1), (16, 2, 1), (16, 3, 2), (40, 1, 4)):
        shared = [
            key
            for rank in range(processes)
            for batch in planned(40, batch_size, rank=rank, processes=processes, parts=parts)
            for key in batch
        ]
        assert drawn(shared) == whole


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 70), st.integers(2, 20), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_processes_and_parts_share_each_batch_by_whole_pairs_and_none_is_idle(
    size: int, batch_size: int, processes: int, parts: int, shuffle: bool
) -> None:
    whole = planned(size, batch_size, shuffle=shuffle)
    shares = [
        planned(size, batch_size, shuffle=shuffle, rank=rank, processes=processes, parts=parts)
        for rank in range(processes)
    ]
    assert {len(share) for share in shares} == {len(whole) * parts}
    for step, batch in enumerate(whole):
        dealt = [part for share in shares for part in share[step * parts : (step + 1) * parts]]
        assert all(part for part in dealt)
        counted = [part for part in dealt if part[0].place == 0]
        assert [key.number for part in counted for key in part] == [key.number for key in batch]
        assert [len(part) % 2 for part in counted[:-1]] == [0] * (len(counted) - 1)
        lengths = [len(part) for part in counted]
        assert max(lengths) - min(lengths) <= 3  # a pair, and the one that is left over
        fills = [part for part in dealt if part[0].place != 0]
        assert {key.place for part in fills for key in part} <= {-1}
        assert {key.number for part in fills for key in part} <= {key.number for key in batch}


def test_a_sampler_that_repeats_rare_classes_gives_each_time_other_draws() -> None:
    targets = np.array([5] * 96 + [9] * 4)
    sampler = EpochBatches(targets, 10, seed=1, shuffle=True, sampler="repeat_factor", repeat_threshold=0.36)
    sampler.epoch = 3
    keys = [key for batch in sampler for key in batch]
    numbers = [key.number for key in keys]
    assert {n: numbers.count(n) for n in range(96, 100)} == dict.fromkeys(
        range(96, 100), 3
    )  # sqrt(.36 / .04)
    assert all(numbers.count(n) == 1 for n in range(96))
    assert len({key.draws.tobytes() for key in keys}) == len(keys) == 108
    assert len(sampler) == 11


def loaded(dataset: SpecimenDataset, workers: int, epochs: int = 2) -> list[Batch]:
    with Loader(
        dataset, batch_size=4, augmentation=augmentation(), seed=3, shuffle=True, workers=workers
    ) as loader:
        return [batch for epoch in range(epochs) for batch in loader.epoch(epoch)]


def test_batches_do_not_depend_on_the_number_of_workers(paint: Paint) -> None:
    metadata, images = paint(THREE)
    (images / "Coleoptera-train-1.jpg").write_bytes(b"\xff\xd8 broken")
    dataset = SpecimenDataset.from_catalogue(metadata, images, image_size=32, crop_size=24)
    alone, *others = (loaded(dataset, workers) for workers in (0, 1, 2))
    assert [f.number for batch in alone for f in batch.failures] == [7, 7]  # once an epoch
    for other in others:
        for one, two in zip(alone, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[:5], two[:5], strict=True))
            assert one.failures == two.failures
    first, second = alone[:3], alone[3:]
    assert not torch.equal(torch.cat([b.numbers_B for b in first]), torch.cat([b.numbers_B for b in second]))


def test_a_batch_whose_images_are_all_broken_is_empty_and_lists_them(paint: Paint) -> None:
    metadata, images = paint({"Diptera": (3, 0, 0), "Coleoptera": (2, 0, 0)})
    for path in images.glob("*.jpg"):
        path.write_bytes(path.read_bytes()[:300])
    dataset = SpecimenDataset.from_catalogue(metadata, images, image_size=32, crop_size=24)
    with Loader(dataset, batch_size=5) as loader:
        (batch,) = loader.epoch()
    assert batch.size == 0
    assert [f.number for f in batch.failures] == [0, 1, 2, 3, 4]
    assert batch.failures[0].reason.startswith("truncated JPEG")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_package_that_changes_meanwhile_ends_in_one_clear_line(
    paint: Paint, tmp_path: Path, workers: int
) -> None:
    metadata, images = paint(THREE)
    package = tmp_path / "images.zip"
    with zipfile.ZipFile(package, "w") as archive:
        for path in sorted(images.iterdir()):
            archive.write(path, path.name)
    dataset = SpecimenDataset.from_catalogue(metadata, Images(package), image_size=32, crop_size=24)
    with package.open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError) as caught, Loader(dataset, batch_size=4, workers=workers) as loader:
        list(loader.epoch())
    assert str(caught.value) == f"{package} changed after it was opened; open it again"


def kill_a_worker(dataset: SpecimenDataset) -> None:
    with Loader(dataset, batch_size=1, workers=1) as loader:
        batches = loader.epoch()
        next(batches)
        (worker,) = multiprocessing.active_children()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        list(batches)


def test_a_loader_process_that_dies_is_told(paint: Paint) -> None:
    dataset = SpecimenDataset.from_catalogue(*paint(THREE), image_size=32, crop_size=24)
    with pytest.raises(DataError, match=r"a loader process died .* fewer --workers need less memory"):
        kill_a_worker(dataset)
    loaded(dataset, workers=2)  # children that end make torch look for dead workers again


def test_loading_leaves_the_random_numbers_of_torch_alone(paint: Paint) -> None:
    dataset = SpecimenDataset.from_catalogue(*paint(THREE), image_size=32, crop_size=24)
    for workers in (0, 2):
        torch.manual_seed(5)
        loaded(dataset, workers)
        assert float(torch.rand(())) == float(torch.rand((), generator=torch.Generator().manual_seed(5)))
