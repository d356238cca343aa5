"""The running mean of a network's weights."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """The exponential moving average of what changes in a network.

    Averaged are the trainable weights and the floating-point buffers, as batch norm's mean and variance: so
    the mean network has the statistics that go with its weights. Frozen weights and counters stay the
    network's own, and cost nothing.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Starts at the network's state.

        Args:
            network: Itself, not wrapped by DDP or torch.compile: names are those of its state.
            decay: Share of the mean that stays at each update; at the start less, see `decay_now`.
        """
        self.network, self.decay, self.updates = network, decay, 0
        self._means = {name: tensor.detach().clone() for name, tensor in self._averaged().items()}

    @property
    def decay_now(self) -> float:
        """Decay of the next update: min(decay, (1 + t) / (10 + t)) after t updates, so that the random start
        is soon forgotten.
        """
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the network's present state: after each step of the optimizer."""
        current = self._averaged()
        average = get_ema_multi_avg_fn(self.decay_now)  # type: ignore[no-untyped-call]
        average(list(self._means.values()), [current[name].detach() for name in self._means], None)
        self.updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the mean weights meanwhile: for validation, and to save them."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; the tensors are not copied."""
        return {"updates": self.updates, "means": dict(self._means)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of the same network.

        Raises:
            KeyError: it is another network's.
        """
        for name, mean in self._means.items():
            mean.copy_(state["means"][name])
        self.updates = int(state["updates"])

    @torch.no_grad()
    def _exchange(self) -> None:
        current = self._averaged()
        for name, mean in self._means.items():
            kept = mean.clone()
            mean.copy_(current[name])
            current[name].copy_(kept)

    def _averaged(self) -> dict[str, Tensor]:
        seen: set[int] = set()
        found = {}
        for name, value in self.network.state_dict(keep_vars=True).items():
            trained = value.requires_grad or not isinstance(value, nn.Parameter)
            if trained and value.is_floating_point() and id(value) not in seen:  # tied weights count once
                seen.add(id(value))
                found[name] = value
        return found
