"""What of a network is trained: frozen backbones, low-rank adapters, learning rates by layer."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bioscan.errors import RequestError
from bioscan.learn import adapters, models
from bioscan.learn.compat import import_timm
from bioscan.learn.settings import TrainSettings


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return models.create("test_vit", outputs=3, crop_size=32).eval()


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return models.create("test_resnet", outputs=3, crop_size=32).eval()


def stepped(network: nn.Module, images: Tensor) -> None:
    """Two steps of gradient descent on what requires a gradient, by the training mode that runs use."""
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    adapters.train_mode(network)
    for _ in range(2):  # the first moves the zero half of an adapter, the second both
        optimizer.zero_grad()
        network(images).square().sum().backward()
        optimizer.step()
    network.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


# -- low-rank adapters


def test_an_adapted_layer_adds_its_two_thin_matrices() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 4).double()
    layer = adapters.LoraLinear(linear, rank=2, alpha=6)
    with torch.no_grad():
        layer.lora_up.normal_()
    x = torch.randn(3, 5, dtype=torch.float64)
    wanted = x @ (linear.weight + 6 / 2 * layer.lora_up @ layer.lora_down).T + linear.bias
    torch.testing.assert_close(layer(x), wanted)


def test_fresh_adapters_change_nothing(images: Tensor) -> None:
    network = transformer()
    before = network(images)
    assert adapters.add_lora(network, rank=4, alpha=16) == 12  # qkv and proj of six blocks
    assert torch.equal(network(images), before)


def test_adapters_and_head_are_trained_and_all_else_stays(images: Tensor) -> None:
    network = transformer()
    adapters.add_lora(network, rank=2, alpha=4)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    stepped(network, images)
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {n for n in before if n.endswith(("lora_down", "lora_up"))} | {"head.weight", "head.bias"}


def test_merged_adapters_are_the_ordinary_backbone(images: Tensor) -> None:
    network = transformer().double()
    adapters.add_lora(network, rank=3, alpha=8)
    stepped(network, images.double())
    ordinary = transformer().double()
    names = list(ordinary.state_dict())
    merged = adapters.merge_lora(network.state_dict())
    assert list(merged) == names
    ordinary.load_state_dict(merged)
    torch.testing.assert_close(ordinary(images.double()), network(images.double()), rtol=1e-10, atol=1e-10)


def test_a_state_without_adapters_is_merged_into_itself() -> None:
    state = convolutional().state_dict()
    merged = adapters.merge_lora(state)
    assert list(merged) == list(state)
    assert all(merged[name] is state[name] for name in state)


def test_adapted_weights_load_into_an_adapted_network_again(images: Tensor) -> None:
    network, again = transformer(), transformer()
    for made in (network, again):
        adapters.add_lora(made, rank=2, alpha=4)
    stepped(network, images)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(images), network(images))


@pytest.mark.parametrize("name", ["resnet18", "alexnet"])
def test_a_network_without_attention_takes_no_adapters(name: str) -> None:
    with torch.device("meta"):
        network = models.create(name, outputs=3, crop_size=64)
    with pytest.raises(RequestError, match="no attention layers that low-rank adapters go into"):
        adapters.add_lora(network, rank=4, alpha=16)
    assert all(p.requires_grad for p in network.parameters())


def test_attention_that_takes_its_weights_by_itself_is_not_adapted_in_vain() -> None:
    """BEiT's attention adds biases of its own to the weights of `qkv`, whose forward is never called."""
    with torch.device("meta"):
        network = models.create("beit_base_patch16_224", outputs=3, crop_size=224)
    with pytest.raises(RequestError, match="Beit has no attention layers"):
        adapters.add_lora(network, rank=4, alpha=16)


# -- frozen backbones


@pytest.mark.parametrize("make", [transformer, convolutional])
def test_a_frozen_backbone_stays_to_the_last_bit_while_the_head_is_trained(make: Any, images: Tensor) -> None:
    network = make()
    adapters.freeze_backbone(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    stepped(network, images)
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} == {network.pretrained_cfg["classifier"].split(".")[0]}
    assert len(moved) == 2


def test_where_nothing_is_frozen_batch_norm_learns_as_ever(images: Tensor) -> None:
    network = convolutional()
    before = {name: value.clone() for name, value in network.named_buffers()}
    adapters.train_mode(network)
    assert all(module.training for module in network.modules())
    network(images)
    assert not any(torch.equal(value, before[name]) for name, value in network.named_buffers())


def test_both_heads_of_a_distilled_transformer_are_heads() -> None:
    with torch.device("meta"):
        network = models.create("deit_tiny_distilled_patch16_224", outputs=3, crop_size=32)
    adapters.freeze_backbone(network)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


# -- parameter groups


def members(groups: list[dict[str, Any]], network: nn.Module) -> dict[str, tuple[float, float]]:
    """Parameter name -> its weight decay and share of the rate."""
    names = {id(p): name for name, p in network.named_parameters()}
    found = [
        (names[id(p)], (group["weight_decay"], group["lr_scale"]))
        for group in groups
        for p in group["params"]
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_adamw_spares_biases_and_norms_and_sgd_spares_nothing() -> None:
    network = convolutional()
    groups = adapters.parameter_groups(network, TrainSettings(weight_decay=0.3))
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    decays = {name: decay for name, (decay, _) in members(groups, network).items()}
    assert decays == {name: 0.3 if p.ndim > 1 else 0.0 for name, p in network.named_parameters()}
    (group,) = adapters.parameter_groups(network, TrainSettings(optimizer="sgd", weight_decay=0.3))
    assert group["lr_scale"] == 1
    assert group["params"] == list(network.parameters())


@pytest.mark.parametrize(
    "name", ["test_vit", "resnet18", "mobilenet_v2", "convnext_atto", "deit_tiny_patch16_224"]
)
def test_layer_decay_is_that_of_timm(name: str) -> None:
    import_timm()
    param_groups_layer_decay = importlib.import_module("timm.optim").param_groups_layer_decay
    with torch.device("meta"):
        network = models.create(name, outputs=3, crop_size=64)
    settings = TrainSettings(weight_decay=0.1, layer_decay=0.7)
    ours = members(adapters.parameter_groups(network, settings), network)
    theirs = members(param_groups_layer_decay(network, weight_decay=0.1, layer_decay=0.7), network)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == pytest.approx(theirs[name]) for name in ours)
    assert ours[f"{network.pretrained_cfg['classifier']}.weight"][1] == 1  # type: ignore[index]


@pytest.mark.parametrize("name", ["alexnet", "squeezenet", "shufflenet"])
def test_layers_of_torchvisions_networks_are_in_order_too(name: str) -> None:
    with torch.device("meta"):
        network = models.create(name, outputs=3, crop_size=64)
    groups = members(adapters.parameter_groups(network, TrainSettings(layer_decay=0.5)), network)
    scales = [groups[parameter][1] for parameter, _ in network.named_parameters()]
    assert scales == sorted(scales)
    assert scales[-1] == 1
    assert scales[0] < scales[-3] < 1


def test_what_is_frozen_is_in_no_group() -> None:
    network = transformer()
    adapters.add_lora(network, rank=2, alpha=4)
    groups = members(adapters.parameter_groups(network, TrainSettings(layer_decay=0.5)), network)
    assert groups.keys() == {name for name, p in network.named_parameters() if p.requires_grad}
    assert groups["blocks.0.attn.qkv.lora_up"][1] < groups["blocks.5.attn.qkv.lora_up"][1] < 1
