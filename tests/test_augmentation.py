"""Random changes on the device: what each does, and that a specimen's are the same in any batch."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor

from bioscan.learn.augmentation import DRAWS, RANDOM_OPS, Augmentation, to_network
from bioscan.learn.dataset import ImageSpec
from bioscan.learn.sampling import draws
from bioscan.learn.settings import TrainSettings

CPU = torch.device("cpu")
RAW = ImageSpec(image_size=32, crop_size=32, mean=(0.0,) * 3, std=(1.0,) * 3)
NORMAL = ImageSpec(image_size=32, crop_size=32, mean=(0.5, 0.25, 0.1), std=(0.5, 0.3, 2.0))

AUGMENTATIONS = st.builds(
    Augmentation,
    crop=st.just("random"),
    min_area=st.just(0.4),
    flip=st.sampled_from(["none", "horizontal", "both"]),
    rotate=st.booleans(),
    colour=st.sampled_from([0.0, 0.3, 1.0]),
    background=st.sampled_from([0.0, 0.5, 1.0]),
    random_ops=st.integers(0, len(RANDOM_OPS) + 1),
    random_strength=st.sampled_from([0.2, 1.0]),
)


def augmentation(**changes: Any) -> Augmentation:
    plain: dict[str, Any] = {
        "crop": "random",
        "min_area": 0.4,
        "flip": "none",
        "rotate": False,
        "colour": 0.0,
        "random_strength": 1.0,
    }
    return Augmentation(**{**plain, **changes})


def noise(size: int, side: int = 16, seed: int = 0) -> Tensor:
    """Smooth pictures, uint8."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (size, 3, side // 4, side // 4)).astype(np.float32)
    made = torch.nn.functional.interpolate(torch.from_numpy(coarse), (side, side), mode="bilinear")
    return made.to(torch.uint8)


def drawn(size: int, seed: int = 0) -> Tensor:
    numbers = np.arange(size)
    return torch.from_numpy(draws(seed, 0, numbers, np.zeros_like(numbers), num_draws=len(DRAWS)))


def fixed(*chosen: str, **values: float) -> Tensor:
    """One specimen's draws: the operations chosen come first; 0.5 changes nothing else."""
    given = {f"choose_{name}": 0.1 for name in chosen} | values
    return torch.tensor([[given.get(name, 0.5) for name in DRAWS]])


def changed(images: Tensor, how: Augmentation | None, draws_BD: Tensor, **options: Any) -> Tensor:
    made: dict[str, Any] = {"channels_last": False, "dtype": torch.float64, **options}
    return to_network(images, RAW, CPU, augmentation=how, draws_BD=draws_BD, **made)


def amount(draws_BD: Tensor, name: str, row: int = 0) -> float:
    """Of an operation, at strength 1."""
    return (2 * float(draws_BD[row, DRAWS.index(f"amount_{name}")]) - 1) * RANDOM_OPS[name]


# -- laws of all of them


@settings(max_examples=40, deadline=None)
@given(AUGMENTATIONS, st.integers(0, 1000))
def test_a_specimen_is_changed_alike_in_any_batch(how: Augmentation, seed: int) -> None:
    images, draws_BD = noise(7, seed=seed), drawn(7, seed)
    whole = changed(images, how, draws_BD)
    assert whole.shape == images.shape
    assert whole.dtype == torch.float64
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 1
    parts = [changed(images[at : at + 2], how, draws_BD[at : at + 2]) for at in range(0, 7, 2)]
    assert torch.allclose(torch.cat(parts), whole, rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(AUGMENTATIONS, st.booleans())
def test_memory_formats_and_number_types_give_the_same(how: Augmentation, channels_last: bool) -> None:
    images, draws_BD = noise(4), drawn(4)
    before = images.clone()
    exact = changed(images, how, draws_BD)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for source in (images, images.contiguous(memory_format=torch.channels_last)):
        made = to_network(
            source, NORMAL, CPU, channels_last=channels_last, augmentation=how, draws_BD=draws_BD
        )
        assert made.dtype == torch.float32
        assert made.is_contiguous(memory_format=layout)
        mean, std = (torch.tensor(values)[:, None, None] for values in (NORMAL.mean, NORMAL.std))
        assert torch.allclose(made * std + mean, exact.float(), atol=2e-4)
    assert torch.equal(images, before)


@pytest.mark.parametrize("channels_last", [True, False])
def test_settings_that_change_nothing_change_nothing(channels_last: bool) -> None:
    images = noise(5)
    for spec in (RAW, NORMAL):
        plain, same = (
            to_network(images, spec, CPU, channels_last=channels_last, augmentation=how, draws_BD=drawn(5))
            for how in (None, augmentation())
        )
        assert torch.equal(plain, same)


def test_everything_that_the_settings_say_reaches_the_augmentation() -> None:
    made = Augmentation.of(
        TrainSettings(flip="none", rotate=False, background=0.3, random_ops=2, random_strength=0.7)
    )
    assert (made.background, made.random_ops, made.random_strength) == (0.3, 2, 0.7)
    assert (made.flip, made.rotate, made.colour) == ("none", False, 0.2)


# -- moves


def moved(image_CHW: NDArray[np.float64], how: dict[str, float]) -> NDArray[np.float64]:
    """Where each pixel comes from, step by step; bilinear by SciPy, with the border pixel outside."""
    side = image_CHW.shape[1]
    middle = (side - 1) / 2
    y, x = np.mgrid[:side, :side] - middle
    x, y = x + how["translate_x"] * side, y + how["translate_y"] * side
    y = y + how["shear_y"] * x
    x = x + how["shear_x"] * y
    cosine, sine = np.cos(how["angle"]), np.sin(how["angle"])
    x, y = cosine * x - sine * y, sine * x + cosine * y
    x, y = x * how["flip_x"], y * how["flip_y"]
    places = np.stack([y, x]) + middle
    return np.stack([ndimage.map_coordinates(c, places, order=1, mode="nearest") for c in image_CHW])


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("flip", ["none", "horizontal", "both"])
def test_moves_are_one_after_the_other_resampled_once(rotate: bool, flip: str) -> None:
    images, draws_BD = noise(12), drawn(12)
    # with no strength in them, operations of colour do not matter
    made = changed(images, augmentation(rotate=rotate, flip=flip, random_ops=11), neutral_colours(draws_BD))
    for row in range(12):
        of = dict(zip(DRAWS, draws_BD[row].tolist(), strict=True))
        how = {n: amount(draws_BD, n, row) for n in ("shear_x", "shear_y", "translate_x", "translate_y")}
        how["angle"] = 2 * np.pi * of["angle"] if rotate else amount(draws_BD, "turn", row)
        how["flip_x"] = -1 if flip != "none" and of["horizontal"] < 0.5 else 1
        how["flip_y"] = -1 if flip == "both" and of["vertical"] < 0.5 else 1
        by_hand = moved(images[row].double().numpy() / 255, how)
        assert np.abs(made[row].numpy() - by_hand).max() < 1e-9


def neutral_colours(draws_BD: Tensor) -> Tensor:
    made = draws_BD.clone()
    for name in ("brightness", "contrast", "saturation", "hue", "sharpness", "cutout"):
        made[:, DRAWS.index(f"amount_{name}")] = 0.5
    return made


@pytest.mark.parametrize(("name", "axis"), [("translate_x", 2), ("translate_y", 1)])
def test_a_shift_by_whole_pixels_copies_them(name: str, axis: int) -> None:
    images = noise(1, side=20)
    # 0.3 of 20 pixels: 6, of which 0.999 of the way is drawn; of 2/3 it is 4 pixels
    made = changed(images, augmentation(random_ops=1), fixed(name, **{f"amount_{name}": 5 / 6}))
    image, shifted = images[0].double() / 255, made[0]
    assert torch.allclose(shifted.narrow(axis, 0, 16), image.narrow(axis, 4, 16), atol=1e-5)
    assert torch.allclose(shifted.narrow(axis, 19, 1), image.narrow(axis, 19, 1), atol=1e-5)


# -- colours


def test_colours_are_one_after_the_other() -> None:
    images, draws_BD = noise(12) // 2 + 60, drawn(12)
    only = draws_BD.clone()
    for name in ("turn", "shear_x", "shear_y", "translate_x", "translate_y", "sharpness", "cutout"):
        only[:, DRAWS.index(f"amount_{name}")] = 0.5
    made = changed(images, augmentation(colour=0.2, random_ops=11), only)
    for row in range(12):
        of = dict(zip(DRAWS, draws_BD[row].tolist(), strict=True))
        brightness, contrast, saturation = (
            (1 + amount(draws_BD, name, row)) * (1 + 0.2 * (2 * of[name] - 1))
            for name in ("brightness", "contrast", "saturation")
        )
        x = images[row].double().numpy() / 255 * brightness
        x = x.mean() + (x - x.mean()) * contrast
        x = x.mean(0) + (x - x.mean(0)) * saturation
        turn = Rotation.from_rotvec(np.full(3, amount(draws_BD, "hue", row) / 3**0.5))
        x = turn.apply(x.reshape(3, -1).T).T.reshape(x.shape)
        assert np.abs(made[row].numpy() - x.clip(0, 1)).max() < 1e-9


def test_sharpness_is_towards_or_away_from_a_blurred_copy() -> None:
    images = noise(1)
    image = images[0].double().numpy() / 255
    binomial = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    blurred = np.stack([ndimage.convolve(c, binomial, mode="nearest") for c in image])
    for draw in (0.0, 0.25, 0.9):
        made = changed(images, augmentation(random_ops=1), fixed("sharpness", amount_sharpness=draw))
        by_hand = (image + (2 * np.float32(draw) - 1) * (image - blurred)).clip(0, 1)
        inner = (slice(None), slice(2, -2), slice(2, -2))
        assert np.abs(made[0].numpy() - by_hand)[inner].max() < 1e-6
    flat = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)
    made = changed(flat, augmentation(random_ops=1), fixed("sharpness", amount_sharpness=0.0))
    assert torch.allclose(made, flat.double() / 255)


# -- the choice of operations


def test_as_many_operations_as_asked_for_are_chosen_and_each_as_often() -> None:
    """Only the chosen ones have a strength: with all amounts but one at 0, that one shows or not."""
    n = 1200
    images = noise(1).expand(n, -1, -1, -1)
    plain = changed(images[:1], None, fixed())[0]
    shown = {}
    for name in RANDOM_OPS:
        only = drawn(n, seed=4)
        for other in RANDOM_OPS:
            only[:, DRAWS.index(f"amount_{other}")] = 0.9 if other == name else 0.5
        only[:, DRAWS.index("cutout_row")] = 0.5
        made = changed(images, augmentation(random_ops=3), only, dtype=torch.float32)
        shown[name] = (made - plain.float()).abs().flatten(1).max(1).values > 1e-3
    count = torch.stack(list(shown.values())).sum(0)
    assert bool((count == 3).all())
    for name, of in shown.items():
        assert 260 < int(of.sum()) < 395, name  # 3 / 11 of 1200 are 327, deviation 15


def test_strength_scales_and_zero_is_none() -> None:
    images, draws_BD = noise(6), drawn(6)
    none = changed(images, augmentation(random_ops=11, random_strength=0.0), draws_BD)
    assert torch.equal(none, changed(images, None, draws_BD))
    half, full = (
        changed(
            images[:1],
            augmentation(random_ops=1, random_strength=strength),
            fixed("brightness", amount_brightness=0.25),
        )
        for strength in (0.5, 1.0)
    )
    image = images[:1].double() / 255  # 1 - 0.25 · 0.5 and 1 - 0.25
    assert torch.allclose(half, image * 0.875)
    assert torch.allclose(full, image * 0.75)


def test_with_any_rotation_a_small_turn_is_not_among_the_operations() -> None:
    images = noise(1)
    draw = fixed("turn", amount_turn=0.9, choose_brightness=0.2, amount_brightness=0.25, angle=0.0)
    turned = changed(images, augmentation(random_ops=1), draw)
    assert not torch.allclose(turned, images.double() / 255, atol=0.01)
    made = changed(images, augmentation(random_ops=1, rotate=True), draw)
    assert torch.allclose(made, images.double() / 255 * 0.75)


# -- the background


def well(side: int = 32) -> tuple[Tensor, Tensor]:
    """A dark disc on a light floor, uint8, and where the disc is."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    disc = torch.from_numpy(x**2 + y**2 < (side / 4) ** 2)
    floor, insect = torch.tensor([200, 205, 210]), torch.tensor([60, 40, 20])
    image = torch.where(disc, insect[:, None, None], floor[:, None, None]).to(torch.uint8)
    return image[None], disc


def test_the_background_changes_its_colour_and_the_specimen_keeps_its_own() -> None:
    image, disc = well()
    draw = fixed(background=0.2, background_red=0.0, background_green=0.75, background_blue=0.5)
    made = changed(image, augmentation(background=0.3), draw)[0]
    # red -0.4, green +0.2 but at most 1, blue as it was
    expected = torch.tensor([200 / 255 - 0.4, 1.0, 210 / 255], dtype=torch.float64)
    assert torch.allclose(made[:, ~disc], expected[:, None].expand(-1, int((~disc).sum())))
    assert torch.allclose(made[:, disc], image[0].double()[:, disc] / 255, atol=1e-3)
    kept = changed(image, augmentation(background=0.2), fixed(background=0.2))
    assert torch.equal(kept, image.double() / 255)


def test_a_specimen_at_the_edge_does_not_become_the_background() -> None:
    image, disc = well()
    image, disc = image.roll(12, dims=2), disc.roll(12, dims=0)  # over the border
    made = changed(image, augmentation(background=1.0), fixed(background_red=0.0))[0]
    assert torch.allclose(made[0, ~disc], torch.tensor(200 / 255 - 0.4, dtype=torch.float64))
    assert torch.allclose(made[:, disc], image[0].double()[:, disc] / 255, atol=1e-3)


def test_as_many_backgrounds_as_asked_for_are_changed() -> None:
    image, _ = well(8)
    images = image.expand(1000, -1, -1, -1)
    made = changed(images, augmentation(background=0.3), drawn(1000))
    share = (made != images.double() / 255).flatten(1).any(1).double().mean()
    assert 0.25 < float(share) < 0.35  # deviation 0.0145


def test_cutout_hides_a_square_behind_the_background() -> None:
    image, disc = well()
    # at 0.75 half of the largest side, 0.5 of 32 pixels: 8 pixels, around the middle
    draw = fixed("cutout", amount_cutout=0.75, cutout_row=0.5, cutout_column=0.5)
    made = changed(image, augmentation(random_ops=1), draw)[0]
    expected = image[0].double() / 255
    expected[:, 12:20, 12:20] = torch.tensor([200, 205, 210])[:, None, None] / 255
    assert torch.allclose(made, expected, atol=1e-6)
    assert bool(disc[12:20, 12:20].all())
