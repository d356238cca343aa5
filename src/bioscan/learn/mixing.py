"""Mixup and CutMix: pictures of a batch are mixed in pairs, on the device, and so are their losses.

Pairs are neighbours, so that a batch in parts of even size gives the same as in one piece.

B: batch, C: channel, H, W: pixels, D: draws.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bioscan.learn.augmentation import DRAWS
from bioscan.learn.settings import TrainSettings

_POINTS: Final = 1 << 14
"""Of the table of a Beta distribution."""


class Mixed(NamedTuple):
    """A mixed batch."""

    images_BCHW: Tensor
    partner_B: Tensor
    """Place in the batch of the picture that is mixed in; a specimen's own where there is none."""
    weight_B: Tensor
    """Share of the specimen itself; the rest is the partner's. In the images' number type."""

    def losses(self, loss_of: Callable[[Tensor], Tensor], targets_B: Tensor) -> Tensor:
        """Each specimen's loss against its own target and its partner's, mixed by weight.

        Losses are mixed and not targets, as a target may be any node of the tree.

        Args:
            loss_of: Losses of the batch's outputs against the targets it is given.
            targets_B: Of the specimens.
        """
        own_B, other_B = loss_of(targets_B), loss_of(targets_B[self.partner_B])
        return torch.lerp(other_B, own_B, self.weight_B.to(own_B.dtype))


def mix(
    images_BCHW: Tensor, draws_BD: Tensor, settings: TrainSettings, places_B: Tensor | None = None
) -> Mixed:
    """The batch mixed as `settings.mixup` and `settings.cutmix` ask; with both set, each pair by one of them.

    Mixup (Zhang et al. 2018) blends two pictures with a weight from Beta(alpha, alpha). CutMix (Yun et al.
    2019) puts a box of one into the other, around any point; its weight is the share of the picture that the
    box, cut at the edges, leaves. The pictures of a pair have weight and box in common, from the draws of the
    even one.

    Args:
        images_BCHW: Float, on the device, augmented and normalised; they are left as they are.
        draws_BD: On the CPU.
        settings: Alphas, not both 0.
        places_B: On the CPU: place of each specimen in the batch as planned, in rising order, where some are
            missing because their images cannot be read; whose partner is missing stays unmixed, and so does
            who has place -1. None: all are here.
    """
    size, _, height, width = images_BCHW.shape
    here_B = torch.arange(size)
    partner_B = _partners(here_B if places_B is None else places_B)
    drawn_BD = draws_BD[torch.minimum(here_B, partner_B)].double()
    drawn = {name: drawn_BD[:, at] for at, name in enumerate(DRAWS)}
    blended_B = drawn["mix_kind"] < (0.5 if settings.mixup and settings.cutmix else float(settings.mixup > 0))
    weight_B = torch.where(
        blended_B, _beta(drawn["mix_weight"], settings.mixup), _beta(drawn["mix_weight"], settings.cutmix)
    )
    side_B = (1 - weight_B).sqrt()
    top_B, bottom_B = _span(drawn["mix_row"], side_B, height)
    left_B, right_B = _span(drawn["mix_column"], side_B, width)
    left_over_B = 1 - (bottom_B - top_B) * (right_B - left_B) / (height * width)
    weight_B = torch.where(blended_B, weight_B, left_over_B)
    weight_B[partner_B == here_B] = 1

    # the share of the own picture: that of the blend in all of it, or 1 outside the box and 0 inside
    table = torch.stack([weight_B, blended_B, top_B, bottom_B, left_B, right_B])
    device = images_BCHW.device
    partner_B = partner_B.to(device, non_blocking=True)
    weight_B, blended_B, *edges = table.to(device, images_BCHW.dtype, non_blocking=True)
    share = weight_B[:, None, None, None]
    if settings.cutmix:
        top_B1, bottom_B1, left_B1, right_B1 = (edge_B[:, None] for edge_B in edges)
        row_H, column_W = (torch.arange(length, device=device) for length in (height, width))
        in_rows_BH = (row_H >= top_B1) & (row_H < bottom_B1)
        in_columns_BW = (column_W >= left_B1) & (column_W < right_B1)
        outside_B1HW = ~(in_rows_BH[:, None, :, None] & in_columns_BW[:, None, None, :])
        share = torch.where(blended_B[:, None, None, None] > 0, share, outside_B1HW.to(share.dtype))
    return Mixed(torch.lerp(images_BCHW[partner_B], images_BCHW, share), partner_B, weight_B)


def _partners(places_B: Tensor) -> Tensor:
    """Place in the batch of each specimen's neighbour in the plan (0 and 1, 2 and 3, ...); else its own."""
    wanted_B = places_B ^ 1
    found_B = torch.searchsorted(places_B, wanted_B).clamp_(max=max(0, places_B.numel() - 1))
    return torch.where(places_B[found_B] == wanted_B, found_B, torch.arange(places_B.numel()))


def _span(centre_B: Tensor, side_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """First pixel and end of a box along one side of the picture, in whole pixels, cut at the edges."""
    middle_B, half_B = centre_B * length, side_B * length / 2
    return (middle_B - half_B).round_().clamp_(0, length), (middle_B + half_B).round_().clamp_(0, length)


def _beta(uniform_B: Tensor, alpha: float) -> Tensor:
    """Quantiles of Beta(alpha, alpha); zeros for alpha 0."""
    if not alpha:
        return torch.zeros_like(uniform_B)
    cumulative, log_odds = _beta_table(alpha)
    return torch.from_numpy(np.interp(uniform_B.numpy(), cumulative, log_odds)).sigmoid_()


@lru_cache
def _beta_table(alpha: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distribution function of Beta(alpha, alpha) at the logarithm of the odds x / (1 - x).

    There its density, (x (1 - x))^alpha but for a constant, is smooth with tails exp(-alpha |s|), whatever
    alpha.
    """
    furthest = 1.4 + 40 / alpha  # beyond lies 1e-17 of it
    log_odds = np.linspace(-furthest, furthest, _POINTS)
    density = np.exp(-2 * alpha * np.logaddexp(log_odds / 2, -log_odds / 2))
    cumulative = np.cumsum(density) - density / 2
    return cumulative / cumulative[-1], log_odds
