"""Losses on leaf logits. B: batch, L: leaf taxa.

Targets are intervals of leaves, as the taxonomy numbers them: a record known to a leaf has an interval of
one.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits_BL: Tensor, leaf_B: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """−log p of the true leaf, per record, shape B."""
    return functional.cross_entropy(logits_BL, leaf_B, reduction="none", label_smoothing=label_smoothing)


def focal(logits_BL: Tensor, leaf_B: Tensor, *, gamma: float = 2.0) -> Tensor:
    """(1 − p)^gamma times cross-entropy, without class weights (Lin et al. 2017), per record, shape B."""
    negative_log = functional.cross_entropy(logits_BL, leaf_B, reduction="none")
    return (1 - torch.exp(-negative_log)) ** gamma * negative_log


LOSSES: Final[dict[str, Callable[..., Tensor]]] = {"cross_entropy": cross_entropy, "focal": focal}
