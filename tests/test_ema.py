"""The running mean of a network's weights."""

import copy
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from bioscan.learn.ema import EMA


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).double()


def step(module: nn.Module, seed: int) -> None:
    """One step of plain gradient descent on noise; batch norm takes its statistics along."""
    images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    module.zero_grad()
    module(images).square().sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-0.05)


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_mean_is_the_recursion_by_hand_with_its_warm_up() -> None:
    module = network()
    ema = EMA(module, 0.3)
    expected = copied(module)
    for t, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.3, 0.3)):  # (1 + t) / (10 + t), at most 0.3
        assert ema.decay_now == pytest.approx(decay)
        step(module, t)
        ema.update()
        for name, value in copied(module).items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    with ema.applied():
        made = copied(module)
    for name in expected:
        if not name.endswith("num_batches_tracked"):
            assert torch.allclose(made[name], expected[name], rtol=0, atol=1e-12), name
    assert not torch.equal(made["1.running_var"], module.state_dict()["1.running_var"])


def test_counters_are_the_networks_own() -> None:
    module = network()
    ema = EMA(module, 0.9)
    for t in range(3):
        step(module, t)
        ema.update()
    with ema.applied():
        assert int(cast(Tensor, module[1].num_batches_tracked)) == 3


def test_weights_are_back_to_the_last_bit_even_after_an_error() -> None:
    module = network()
    ema = EMA(module, 0.9)
    step(module, 0)
    ema.update()
    step(module, 1)
    before, mean = copied(module), copy.deepcopy(ema.state_dict())
    with ema.applied():
        assert not torch.equal(module.state_dict()["0.weight"], before["0.weight"])
    assert same(copied(module), before)
    with pytest.raises(ValueError, match="broken"), ema.applied():
        raise ValueError("broken")
    assert same(copied(module), before)
    assert same(ema.state_dict()["means"], mean["means"])


def test_what_does_not_change_stays_as_it_is() -> None:
    module = network().float()
    ema = EMA(module, 0.999)
    before = copied(module)
    for _ in range(50):
        ema.update()
    with ema.applied():
        assert same(copied(module), before)


def test_it_goes_on_from_a_checkpoint_to_the_last_bit() -> None:
    module = network()
    ema = EMA(module, 0.9)
    for t in range(4):
        step(module, t)
        ema.update()
    state, kept = copied(module), copy.deepcopy(ema.state_dict())
    step(module, 9)
    ema.update()

    other = network()
    other.load_state_dict(state)
    again = EMA(other, 0.9)
    again.load_state_dict(kept)
    step(other, 9)
    again.update()
    assert same(again.state_dict()["means"], ema.state_dict()["means"])
    assert again.updates == ema.updates == 5


def test_frozen_weights_cost_nothing_and_stay_the_networks_own() -> None:
    module = network()
    module[0].requires_grad_(False)
    ema = EMA(module, 0.9)
    assert set(ema.state_dict()["means"]) == {
        *("1.weight", "1.bias", "1.running_mean", "1.running_var", "3.weight", "3.bias")
    }
    before = copied(module)
    step(module, 0)
    ema.update()
    with ema.applied():
        assert torch.equal(module.state_dict()["0.weight"], before["0.weight"])


def test_weights_that_two_layers_share_are_averaged_once() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    ema = EMA(module, 0.9)
    first = copied(module)
    with torch.no_grad():
        cast(Tensor, module[0].weight).add_(1)
    ema.update()
    with ema.applied():
        # after one update a tenth of the start: 0.1 x + 0.9 (x + 1)
        assert torch.allclose(cast(Tensor, module[1].weight), first["1.weight"] + 0.9)
    assert torch.equal(cast(Tensor, module[0].weight), first["0.weight"] + 1)


def test_a_checkpoint_of_another_network_is_no_checkpoint() -> None:
    kept = EMA(nn.Linear(2, 2), 0.9).state_dict()
    with pytest.raises(KeyError):
        EMA(network(), 0.9).load_state_dict(kept)
