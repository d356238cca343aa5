"""Mixup and CutMix in pairs of neighbours."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional

from bioscan.learn.augmentation import DRAWS
from bioscan.learn.mixing import Mixed, mix
from bioscan.learn.sampling import draws
from bioscan.learn.settings import TrainSettings

MIXUP, CUTMIX = TrainSettings(mixup=0.4), TrainSettings(cutmix=1.0)
BOTH = TrainSettings(mixup=0.4, cutmix=1.0)


def batch(size: int, side: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float64 noise, and draws."""
    images = np.random.default_rng(seed).normal(size=(size, 3, side, side))
    numbers = np.arange(size)
    drawn = draws(seed, 0, numbers, np.zeros_like(numbers), num_draws=len(DRAWS))
    return torch.from_numpy(images), torch.from_numpy(drawn)


def fixed(**values: float) -> Tensor:
    """Draws of a pair; the odd one's are not used."""
    pair = [[values.get(name, 0.5) for name in DRAWS], [0.123] * len(DRAWS)]
    return torch.tensor(pair)


def test_mixup_blends_neighbours_by_one_weight() -> None:
    images, drawn = batch(6)
    made = mix(images, drawn, MIXUP)
    assert made.partner_B.tolist() == [1, 0, 3, 2, 5, 4]
    weight = made.weight_B.tolist()
    assert weight[0::2] == weight[1::2]
    assert len(set(weight)) == 3
    for own in range(6):
        by_hand = weight[own] * images[own] + (1 - weight[own]) * images[own ^ 1]
        assert torch.allclose(made.images_BCHW[own], by_hand, rtol=0, atol=1e-12)


def test_cutmix_puts_a_box_of_the_partner_into_each_and_weighs_by_area() -> None:
    images, drawn = batch(40)
    made = mix(images, drawn, CUTMIX)
    shares = set()
    for own in range(40):
        is_own = (made.images_BCHW[own] == images[own]).all(0)
        is_partner = (made.images_BCHW[own] == images[own ^ 1]).all(0)
        assert bool((is_own ^ is_partner).all())
        rows, columns = is_partner.any(1), is_partner.any(0)
        assert torch.equal(is_partner, rows[:, None] & columns[None])  # a box
        assert int(rows.diff().sum()) + int(columns.diff().sum()) <= 4  # in one piece
        assert float(made.weight_B[own]) == pytest.approx(float(is_own.double().mean()), abs=1e-12)
        shares.add(float(made.weight_B[own]))
    assert len(shares) > 10


def test_a_box_lies_where_it_was_drawn() -> None:
    # Beta(1, 1) is uniform: weight 0.75, box of half the side, around (3, 6) of 12: rows 0-5, columns 3-8
    images = torch.stack([torch.zeros(3, 12, 12), torch.ones(3, 12, 12)])
    made = mix(images, fixed(mix_weight=0.75, mix_row=0.25, mix_column=0.5), CUTMIX)
    expected = torch.zeros(12, 12)
    expected[0:6, 3:9] = 1
    assert torch.equal(made.images_BCHW[0, 0], expected)
    assert torch.equal(made.images_BCHW[1, 0], 1 - expected)
    assert made.weight_B.tolist() == [0.75, 0.75]
    # around the corner a quarter of it is left: 9 of 144 pixels
    made = mix(images, fixed(mix_weight=0.75, mix_row=0.0, mix_column=0.0), CUTMIX)
    assert float(made.images_BCHW[0, 0].sum()) == 9
    assert float(made.weight_B[0]) == pytest.approx(1 - 9 / 144)


@pytest.mark.parametrize("alpha", [0.2, 0.4, 1.0, 3.0, 50.0])
def test_weights_of_mixup_are_beta_distributed(alpha: float) -> None:
    _, drawn = batch(8_000, side=1)
    weights = mix(
        torch.zeros(8_000, 1, 1, 1, dtype=torch.float64), drawn, TrainSettings(mixup=alpha)
    ).weight_B
    assert stats.kstest(weights[::2].numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    for quantile in (0.001, 0.05, 0.3, 0.5, 0.9):
        one = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
        made = mix(one, fixed(mix_weight=quantile), TrainSettings(mixup=alpha)).weight_B[0]
        assert float(made) == pytest.approx(stats.beta(alpha, alpha).ppf(np.float32(quantile)), rel=2e-3)


def test_with_both_each_pair_gets_one_of_them() -> None:
    images, drawn = batch(400)
    made = mix(images, drawn, BOTH)
    cut = (made.images_BCHW == images).flatten(1).any(1) | (
        made.images_BCHW == images[made.partner_B]
    ).flatten(1).any(1)
    assert torch.equal(cut[::2], cut[1::2])
    assert 70 < int(cut[::2].sum()) < 130  # of 200 pairs; deviation 7
    for settings, chosen in ((MIXUP, ~cut), (CUTMIX, cut)):
        alone = mix(images, drawn, settings)
        assert torch.equal(alone.images_BCHW[chosen], made.images_BCHW[chosen])
        assert torch.equal(alone.weight_B[chosen], made.weight_B[chosen])


@pytest.mark.parametrize("settings", [MIXUP, CUTMIX, BOTH])
@pytest.mark.parametrize("part", [2, 4, 6])
def test_a_batch_in_even_parts_is_the_batch(settings: TrainSettings, part: int) -> None:
    images, drawn = batch(11)
    whole = mix(images, drawn, settings)
    parts = [
        mix(images[at : at + part], drawn[at : at + part], settings) for at in range(0, len(images), part)
    ]
    assert torch.equal(torch.cat([p.images_BCHW for p in parts]), whole.images_BCHW)
    assert torch.equal(torch.cat([p.weight_B for p in parts]), whole.weight_B)


@pytest.mark.parametrize("settings", [MIXUP, CUTMIX, BOTH])
def test_who_has_no_partner_stays_as_it_is(settings: TrainSettings) -> None:
    images, drawn = batch(7)
    before = images.clone()
    made = mix(images, drawn, settings)
    assert (int(made.partner_B[6]), float(made.weight_B[6])) == (6, 1.0)
    assert torch.equal(made.images_BCHW[6], images[6])
    assert torch.equal(images, before)


@pytest.mark.parametrize("settings", [MIXUP, CUTMIX])
def test_specimens_that_cannot_be_read_leave_other_pairs_alone(settings: TrainSettings) -> None:
    images, drawn = batch(8)
    whole = mix(images, drawn, settings)
    here = torch.tensor([0, 1, 3, 4, 5, 7])  # 2 and 6 are missing, 3 and 7 alone
    made = mix(images[here], drawn[here], settings, places_B=here)
    assert made.partner_B.tolist() == [1, 0, 2, 4, 3, 5]
    for at in (0, 1, 3, 4):
        assert torch.equal(made.images_BCHW[at], whole.images_BCHW[here[at]])
    for at in (2, 5):
        assert torch.equal(made.images_BCHW[at], images[here[at]])
        assert float(made.weight_B[at]) == 1
    for places in ([-1, -1], [0, 0]):  # given again to fill a batch, or one specimen twice
        assert torch.equal(mix(images[:2], drawn[:2], settings, torch.tensor(places)).images_BCHW, images[:2])
    empty = mix(images[:0], drawn[:0], settings, places_B=here[:0])
    assert empty.images_BCHW.shape == (0, 3, 12, 12)


def test_mixed_losses_are_the_loss_against_mixed_labels() -> None:
    images, drawn = batch(6)
    mixed = mix(images, drawn, BOTH)
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 3, 2, 2, 4, 1])
    made = mixed.losses(lambda of: functional.cross_entropy(logits, of, reduction="none"), targets)
    labels = functional.one_hot(targets, 5).double()
    weight = mixed.weight_B[:, None]
    soft = weight * labels + (1 - weight) * labels[mixed.partner_B]
    assert torch.allclose(made, functional.cross_entropy(logits, soft, reduction="none"), atol=1e-12)


def test_the_number_type_is_that_of_the_images() -> None:
    images, drawn = batch(4)
    for dtype in (torch.float32, torch.float64):
        made: Mixed = mix(images.to(dtype), drawn, BOTH)
        assert made.images_BCHW.dtype == made.weight_B.dtype == dtype
