"""Heads against formulas written out in numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bioscan.errors import RequestError
from bioscan.learn.compat import import_timm
from bioscan.learn.heads import CosineHead, NearestHead, features_of, head_of, num_features, replace_head


def network(name: str = "test_resnet", outputs: int = 0) -> nn.Module:
    """A small timm network with random weights."""
    torch.manual_seed(1)
    made: nn.Module = import_timm().create_model(name, num_classes=outputs).eval()
    return made


def test_cosine_logits_are_scaled_cosines_of_standardised_features() -> None:
    torch.manual_seed(0)
    head = CosineHead(4, 3, scale=12.0).double()
    head.mean.copy_(torch.tensor([1.0, 0, -2, 0.5]))
    head.deviation.copy_(torch.tensor([2.0, 1, 0.5, 3]))
    features = torch.randn(5, 4, dtype=torch.float64)
    x = (features.numpy() - head.mean.numpy()) / head.deviation.numpy()
    w = head.weight.detach().numpy()
    expected = 12 * (x @ w.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(w, axis=1)
    np.testing.assert_allclose(head(features).detach().numpy(), expected, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 15), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_nearest_neighbours_vote_as_in_a_loop(size: int, k: int, outputs: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    head = NearestHead(5, outputs, size=size, k=k, temperature=0.3).double()
    gallery = generator.normal(size=(size, 5))
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    labels = generator.integers(outputs, size=size)
    head.gallery.copy_(torch.from_numpy(gallery))
    head.outputs.copy_(torch.from_numpy(labels))
    features = generator.normal(size=(3, 5))
    made = head(torch.from_numpy(features)).numpy()
    for feature, log_probabilities in zip(features, made, strict=True):
        cosine = gallery @ feature / np.linalg.norm(feature)
        nearest = np.argsort(-cosine)[:k]
        votes = np.exp(cosine[nearest] / 0.3)
        share = np.array([votes[labels[nearest] == output].sum() for output in range(outputs)]) / votes.sum()
        np.testing.assert_allclose(np.exp(log_probabilities), 0.999 * share + 0.001 / outputs, atol=1e-12)
    np.testing.assert_allclose(np.exp(made).sum(axis=1), 1)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
@pytest.mark.parametrize("head", [{"kind": "cosine", "scale": 9.0}, {"kind": "nearest", "size": 6, "k": 2}])
def test_a_network_with_another_head_is_rebuilt_from_its_description(name: str, head: dict[str, Any]) -> None:
    first, second = network(name), network(name, outputs=11)
    for made in (first, second):
        replace_head(made, 4, head)
    if isinstance(found := head_of(first), NearestHead):
        found.gallery.copy_(torch.randn_like(found.gallery))
        found.outputs.copy_(torch.tensor([0, 1, 2, 3, 0, 1]))
    second.load_state_dict(first.state_dict())
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        logits = first(images)
        assert logits.shape == (2, 4)
        torch.testing.assert_close(second(images), logits, rtol=0, atol=0)
        torch.testing.assert_close(head_of(first)(features_of(first, images)), logits, rtol=0, atol=1e-6)


def test_a_head_of_one_convolution_is_replaced_too() -> None:
    made = network("resnetv2_18", outputs=3)
    assert isinstance(head_of(made), nn.Conv2d)
    assert num_features(head_of(made)) == 512
    replace_head(made, 5, {"kind": "cosine"})
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(made(images), head_of(made)(features_of(made, images)))


def test_a_linear_head_gets_new_outputs_and_the_backbone_stays() -> None:
    made = network(outputs=7)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    replace_head(made, 3, {"kind": "linear"})
    after = made.state_dict()
    assert after["fc.weight"].shape == (3, 96)
    assert all(torch.equal(after[name], value) for name, value in before.items() if name[:3] != "fc.")


def test_cosines_are_as_exact_under_autocast() -> None:
    head = CosineHead(64, 5)
    features = torch.randn(3, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        made = head(features)
    torch.testing.assert_close(made, head(features).detach(), rtol=0, atol=0)


def test_a_head_of_two_layers_is_refused() -> None:
    with pytest.raises(RequestError, match="not one linear layer"):
        replace_head(network("deit_tiny_distilled_patch16_224"), 3, {"kind": "cosine"})


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"kind": "cosin"}, "did you mean 'cosine'"),
        ({}, "unknown kind of head 'None'"),
        ({"kind": "cosine", "size": 3}, "head cosine: .*'size'"),
    ],
)
def test_a_description_that_makes_no_head_is_refused(head: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        replace_head(network(), 3, head)
