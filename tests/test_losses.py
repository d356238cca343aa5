"""Losses by target node: against brute force, torch's own, finite differences and published formulas."""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from bioscan.analysis.hierarchy import leaf_prior
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.learn.losses import (
    COARSE_LOSSES,
    LOSSES,
    ConditionalSoftmax,
    LeafLoss,
    _Intervals,
    adjusted,
    balanced_weights,
    ldam_margins,
    leaf_logits,
    make_loss,
    outputs_of,
)
from bioscan.learn.settings import TrainSettings

ROWS: list[tuple[str | None, ...]] = [
    ("Diptera", "Aidae", "Aus", "Aus bus"),
    ("Diptera", "Aidae", "Aus", "Aus cus"),
    ("Diptera", "Aidae", "Bus", "Bus bus"),
    ("Diptera", "Bidae", None, "Cus bus"),  # a placeholder at rank genus
    ("Diptera", "Bidae", None, "Dus bus"),
    ("Coleoptera", "Cidae", "Eus", "Eus bus"),
    ("Coleoptera", "Cidae", "Eus", "Eus cus"),
    ("Coleoptera", "Didae", None, None),  # a leaf at rank family
]


@pytest.fixture(scope="module")
def tree() -> Taxonomy:
    """Four ranks with a placeholder and a leaf above the deepest rank."""
    ranks = ["order", "family", "genus", "species"]
    frame = pl.DataFrame(ROWS, schema=dict.fromkeys(ranks, pl.String), orient="row")
    return Taxonomy.build(frame, ranks).filled()[0]


@pytest.fixture(scope="module")
def flat() -> Taxonomy:
    """One rank of six taxa."""
    return Taxonomy.build(pl.DataFrame({"family": [*"aaaaaabbbbcccdde", "f"]}), ["family"])


def counts_of(taxonomy: Taxonomy, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 60, taxonomy.num_nodes)


def loss_of(taxonomy: Taxonomy, **values: Any) -> LeafLoss:
    return make_loss(TrainSettings(**values), taxonomy, counts_of(taxonomy))


def logits_for(columns: int, rows: int, seed: int, *, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(rows, columns, generator=generator, dtype=torch.float64)).requires_grad_()


def brute_force(taxonomy: Taxonomy, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """-log of the summed probabilities, by autograd through the naive formula."""
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    below = [
        row[taxonomy.first_leaf_N[t] : taxonomy.end_leaf_N[t]].sum()
        for row, t in zip(p, targets, strict=True)
    ]
    return -(1 - smoothing) * torch.stack(below).log() - smoothing * p.log().mean(1)


def value_and_gradient(
    function: Callable[..., Tensor], logits: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    value = function(logits, targets)
    weights = torch.linspace(0.5, 2, len(value), dtype=value.dtype)  # records that count differently
    (gradient,) = torch.autograd.grad((value * weights).sum(), logits)
    return value.detach(), gradient


def smoothed(smoothing: float, logits: Tensor, classes: Tensor) -> Tensor:
    return functional.cross_entropy(logits, classes, reduction="none", label_smoothing=smoothing)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-10) -> bool:
    return bool((one - other).abs().max() <= tolerance)


def leave_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Go the way of devices other than a CPU."""

    def masked(self: _Intervals, first_B: Tensor, end_B: Tensor) -> None:
        self.first_B, self.end_B, self.wide = first_B, end_B, None

    monkeypatch.setattr(_Intervals, "__init__", masked)


# -- the marginalised loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradient_are_brute_force_at_every_depth(
    tree: Taxonomy, monkeypatch: pytest.MonkeyPatch, smoothing: float, masked: bool
) -> None:
    if masked:
        leave_slices(monkeypatch)
    loss = loss_of(tree, label_smoothing=smoothing)
    targets = torch.arange(1, tree.num_nodes).repeat(3)
    logits = logits_for(tree.num_leaves, len(targets), 1)
    found = value_and_gradient(loss, logits, targets)
    expected = value_and_gradient(partial(brute_force, tree, smoothing=smoothing), logits, targets)
    assert close(found[0], expected[0])
    assert close(found[1], expected[1])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), depth=st.integers(1, 4), breadth=st.integers(1, 4))
def test_any_tree_gives_the_brute_force(seed: int, depth: int, breadth: int) -> None:
    rng = np.random.default_rng(seed)
    ranks = ["order", "family", "genus", "species"][:depth]
    names = rng.integers(0, breadth, (20, depth)).astype(str)
    frame = pl.DataFrame(["/".join(row[: n + 1]) for n in range(depth)] for row in names)
    taxonomy = Taxonomy.build(pl.DataFrame(frame.rows(), schema=ranks, orient="row"), ranks)
    targets = torch.from_numpy(rng.integers(1, taxonomy.num_nodes, 16))
    logits = logits_for(taxonomy.num_leaves, 16, seed)
    loss = loss_of(taxonomy)
    found = value_and_gradient(loss, logits, targets)
    expected = value_and_gradient(partial(brute_force, taxonomy), logits, targets)
    assert close(found[0], expected[0])
    assert close(found[1], expected[1])


def test_the_gradient_is_that_of_finite_differences(tree: Taxonomy) -> None:
    targets = torch.arange(1, tree.num_nodes)
    for values in ({}, {"label_smoothing": 0.2}, {"loss": "logit_adjusted"}, {"softmax": "conditional"}):
        loss = loss_of(tree, **values)
        columns = outputs_of(tree, "conditional" if "softmax" in values else "flat")
        logits = logits_for(columns, len(targets), 2)
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, targets), logits, fast_mode=True)


@pytest.mark.parametrize("softmax", ["flat", "conditional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_300_neither_overflow_nor_underflow(
    tree: Taxonomy, dtype: torch.dtype, softmax: str
) -> None:
    targets = torch.arange(1, tree.num_nodes)
    columns = outputs_of(tree, softmax)  # type: ignore[arg-type]
    for place in range(columns):
        logits = torch.zeros(len(targets), columns, dtype=dtype)
        logits[:, place] = 300.0
        logits.requires_grad_()
        value = loss_of(tree, softmax=softmax)(logits, targets)
        assert value.dtype == torch.float32
        assert bool(value.isfinite().all())
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert bool(gradient.isfinite().all())
        if softmax == "flat":
            below = (torch.from_numpy(tree.first_leaf_N)[targets] <= place) & (
                torch.from_numpy(tree.end_leaf_N)[targets] > place
            )
            width = torch.from_numpy(tree.end_leaf_N - tree.first_leaf_N)[targets]
            expected = torch.where(below, 0.0, 300 - width.log())
            assert value.detach().tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_with_one_rank_it_is_torch_cross_entropy_to_the_bit(flat: Taxonomy) -> None:
    classes = torch.arange(64) % flat.num_leaves
    for dtype in (torch.float32, torch.float64):
        logits = logits_for(flat.num_leaves, 64, 3).detach().to(dtype).requires_grad_()
        for smoothing in (0.0, 0.1):
            loss = loss_of(flat, label_smoothing=smoothing)
            found = value_and_gradient(loss, logits, classes + 1)
            expected = value_and_gradient(partial(smoothed, smoothing), logits, classes)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])


def test_leaf_targets_of_a_deep_tree_cost_their_cross_entropy(tree: Taxonomy) -> None:
    leaves = torch.arange(tree.num_leaves)
    targets = torch.from_numpy(tree.leaves_L).long()
    logits = logits_for(tree.num_leaves, len(targets), 4)
    for smoothing in (0.0, 0.3):
        loss = loss_of(tree, label_smoothing=smoothing)
        found = value_and_gradient(loss, logits, targets)
        expected = value_and_gradient(partial(smoothed, smoothing), logits, leaves)
        assert close(found[0], expected[0], 1e-13)
        assert close(found[1], expected[1], 1e-13)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("fixture", ["tree", "flat"])
def test_targets_that_a_loss_does_not_take_cost_nothing_and_teach_nothing(
    request: pytest.FixtureRequest, fixture: str, name: str
) -> None:
    taxonomy: Taxonomy = request.getfixturevalue(fixture)
    loss = loss_of(taxonomy, loss=name)
    targets = torch.arange(-1, taxonomy.num_nodes)
    leaves = set(taxonomy.leaves_L.tolist())
    expected = [t > 0 and (name in COARSE_LOSSES or t in leaves) for t in targets.tolist()]
    assert loss.takes(targets).tolist() == expected
    logits = logits_for(taxonomy.num_leaves, len(targets), 5)
    value, gradient = value_and_gradient(loss, logits, targets)
    assert (value != 0).tolist() == expected
    assert (gradient != 0).any(1).tolist() == expected


def test_under_autocast_the_loss_is_computed_in_float32(tree: Taxonomy) -> None:
    targets = torch.arange(1, tree.num_nodes)
    logits = logits_for(tree.num_leaves, len(targets), 6).detach().bfloat16()
    loss = loss_of(tree, loss="logit_adjusted")
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(logits, targets)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(logits.float(), targets))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_that_first_validates_then_trains(flat: Taxonomy, name: str) -> None:
    loss = loss_of(flat, loss=name)
    targets = torch.arange(1, 7)
    logits = logits_for(6, 6, 16)
    with torch.inference_mode():
        validated = loss(logits, targets, 1.0)
    value, gradient = value_and_gradient(partial(loss, done=1.0), logits, targets)
    assert torch.equal(value, validated)
    assert bool((gradient != 0).all())


# -- logit adjustment


@pytest.mark.parametrize("fixture", ["tree", "flat"])
def test_the_logit_adjusted_loss_is_cross_entropy_of_shifted_logits(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    taxonomy: Taxonomy = request.getfixturevalue(fixture)
    targets = torch.arange(1, taxonomy.num_nodes)
    logits = logits_for(taxonomy.num_leaves, len(targets), 7)
    counts = counts_of(taxonomy)
    shift = torch.from_numpy(1.5 * np.log(leaf_prior(taxonomy, counts)))
    loss = make_loss(TrainSettings(loss="logit_adjusted", tau=1.5), taxonomy, counts)
    assert close(loss(logits, targets), brute_force(taxonomy, logits + shift, targets), 1e-12)
    plain = make_loss(TrainSettings(loss="cross_entropy"), taxonomy, counts)
    assert close(loss(logits, targets), plain(logits + shift, targets), 1e-12)
    none = make_loss(TrainSettings(loss="logit_adjusted", tau=0.0), taxonomy, counts)
    assert close(none(logits, targets), plain(logits, targets), 1e-12)


def test_a_sampler_that_balances_leaves_the_logit_adjustment_nothing_to_do(flat: Taxonomy) -> None:
    counts = 10_000 * np.arange(flat.num_nodes)
    logits, targets = torch.randn(5, flat.num_leaves), torch.from_numpy(flat.leaves_L[[0, 2, 1, 4, 3]]).long()
    plain, balanced, uniform = (
        make_loss(chosen, flat, counts)(logits, targets)
        for chosen in (
            TrainSettings(),
            TrainSettings(loss="logit_adjusted", sampler="class_balanced"),
            TrainSettings(loss="logit_adjusted"),
        )
    )
    assert balanced.tolist() == pytest.approx(plain.tolist(), rel=1e-4)
    assert uniform.tolist() != pytest.approx(plain.tolist(), rel=0.1)


def test_a_uniform_prior_adjusts_nothing(flat: Taxonomy) -> None:
    logits = logits_for(flat.num_leaves, 6, 8)
    targets = torch.arange(1, 7)
    even = make_loss(TrainSettings(loss="logit_adjusted"), flat, np.full(7, 20))
    assert close(
        even(logits, targets), functional.cross_entropy(logits, targets - 1, reduction="none"), 1e-12
    )


def test_post_hoc_adjustment_is_alike_in_numpy_and_torch_and_undoes_the_shift_of_training() -> None:
    rng = np.random.default_rng(0)
    logits, prior = rng.normal(size=(5, 4)), rng.dirichlet(np.ones(4))
    found = adjusted(logits, np.log(prior), 0.7)
    assert found == pytest.approx(logits - 0.7 * np.log(prior))
    assert adjusted(torch.from_numpy(logits), torch.from_numpy(np.log(prior)), 0.7).numpy() == pytest.approx(
        found
    )
    assert adjusted(logits + np.log(prior), np.log(prior), 1.0) == pytest.approx(logits)
    assert adjusted(logits, np.log(prior), 0.0) == pytest.approx(logits, abs=0)


# -- losses of leaf taxa


def test_the_focal_loss_is_its_formula_and_is_cross_entropy_at_gamma_zero(flat: Taxonomy) -> None:
    logits = logits_for(flat.num_leaves, 6, 9)
    targets = torch.arange(1, 7)
    p = logits.softmax(1)[torch.arange(6), targets - 1]
    for gamma in (0.0, 0.5, 2.0):
        found = loss_of(flat, loss="focal", focal_gamma=gamma)(logits, targets)
        assert close(found, -((1 - p) ** gamma) * p.log(), 1e-12)


def test_the_focal_gradient_is_finite_where_a_record_is_certain(flat: Taxonomy) -> None:
    logits = torch.zeros(1, flat.num_leaves)
    logits[0, 0] = 200.0
    logits.requires_grad_()
    for gamma in (0.0, 0.5, 1.0, 2.0):
        value = loss_of(flat, loss="focal", focal_gamma=gamma)(logits, torch.tensor([1]))
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.item() == 0
        assert bool(gradient.isfinite().all())


def test_class_balanced_weights_of_a_worked_example() -> None:
    # beta .9: (1 - .9) / (1 - .9^n) = 1, .1 / .19 and .1 / .271 for n = 1, 2, 3; their mean is .631758
    weights = np.array([1, 0.1 / 0.19, 0.1 / 0.271])
    assert balanced_weights(np.array([1, 2, 3]), beta=0.9) == pytest.approx(weights / weights.mean())
    assert balanced_weights(np.array([1, 2, 3]), beta=0.0).tolist() == [1, 1, 1]
    inverse = np.array([1, 1 / 2, 1 / 4])
    for beta in (1.0, 1 - 1e-9):
        assert balanced_weights(np.array([1, 2, 4]), beta=beta) == pytest.approx(
            inverse / inverse.mean(), rel=1e-6
        )
    assert balanced_weights(np.array([0, 1]), beta=0.99).tolist() == [1, 1]


def test_the_class_balanced_loss_weighs_each_record_by_its_taxon(flat: Taxonomy) -> None:
    logits = logits_for(flat.num_leaves, 6, 10)
    targets = torch.arange(1, 7)
    weights = balanced_weights(counts_of(flat)[1:], beta=0.99)
    found = loss_of(flat, loss="class_balanced", balance_beta=0.99)(logits, targets)
    plain = functional.cross_entropy(logits, targets - 1, reduction="none")
    assert close(found, torch.from_numpy(weights) * plain, 1e-12)


def test_ldam_takes_a_margin_from_the_true_logit_and_weighs_late(flat: Taxonomy) -> None:
    counts = np.array([0, 256, 81, 16, 16, 1, 1])
    # n^(-1/4) = 1/4, 1/3, 1/2, 1/2, 1, 1 of the largest
    assert ldam_margins(counts[1:], largest=0.6) == pytest.approx([0.15, 0.2, 0.3, 0.3, 0.6, 0.6])
    cosines = logits_for(flat.num_leaves, 6, 11, spread=0.3)
    targets = torch.arange(1, 7)
    loss = make_loss(
        TrainSettings(loss="ldam", ldam_margin=0.6, ldam_scale=20.0, ldam_deferred=0.8), flat, counts
    )
    shifted = cosines - torch.diag(torch.tensor([0.15, 0.2, 0.3, 0.3, 0.6, 0.6], dtype=torch.float64))
    expected = functional.cross_entropy(20 * shifted, targets - 1, reduction="none")
    assert close(loss(20 * cosines, targets), expected, 1e-12)
    assert close(loss(20 * cosines, targets, 0.79), expected, 1e-12)
    weights = torch.from_numpy(balanced_weights(counts[1:], beta=0.999))
    assert close(loss(20 * cosines, targets, 0.8), weights * expected, 1e-12)


# -- the conditional softmax


def test_conditional_probabilities_multiply_down_the_path_and_those_of_siblings_sum_to_one(
    tree: Taxonomy,
) -> None:
    outputs = logits_for(outputs_of(tree, "conditional"), 4, 12)
    softmax = ConditionalSoftmax(tree)
    conditional: dict[int, Tensor] = {}
    start = 0
    for parent in range(tree.num_nodes):  # outputs: the children of node 0, of node 1, ...
        children = np.flatnonzero(tree.parent_N == parent).tolist()
        if children:
            shares = outputs[:, start : start + len(children)].softmax(1)
            assert close(
                softmax.log_conditionals(outputs)[:, start : start + len(children)].exp(), shares, 1e-12
            )
            conditional |= dict(zip(children, shares.unbind(1), strict=True))
            start += len(children)
    leaves = softmax(outputs).exp()
    for leaf, node in enumerate(tree.leaves_L.tolist()):
        product = torch.ones(4, dtype=torch.float64)
        while node > 0:
            product = product * conditional[node]
            node = int(tree.parent_N[node])
        assert close(leaves[:, leaf], product, 1e-12)
    assert close(leaves.sum(1), torch.ones(4), 1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_the_conditional_loss_is_minus_the_log_of_the_leaves_below_the_target(
    tree: Taxonomy, monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    targets = torch.arange(1, tree.num_nodes)
    outputs = logits_for(outputs_of(tree, "conditional"), len(targets), 13)
    leaves = leaf_logits(tree, "conditional")
    if masked:
        leave_slices(monkeypatch)
    found = value_and_gradient(loss_of(tree, softmax="conditional"), outputs, targets)
    expected = value_and_gradient(lambda z, t: brute_force(tree, leaves(z), t), outputs, targets)
    assert close(found[0], expected[0])
    assert close(found[1], expected[1])


def test_with_one_rank_the_conditional_loss_is_cross_entropy_smoothed_or_not(flat: Taxonomy) -> None:
    assert outputs_of(flat, "conditional") == outputs_of(flat, "flat") == 6
    logits = logits_for(6, 6, 14)
    targets = torch.arange(1, 7)
    for smoothing in (0.0, 0.2):
        loss = loss_of(flat, softmax="conditional", label_smoothing=smoothing)
        assert close(loss(logits, targets), smoothed(smoothing, logits, targets - 1), 1e-12)
    assert close(leaf_logits(flat, "conditional")(logits), logits.log_softmax(1), 1e-12)


def test_flat_outputs_are_the_leaf_logits(tree: Taxonomy) -> None:
    outputs = logits_for(outputs_of(tree, "flat"), 3, 15)
    assert leaf_logits(tree, "flat")(outputs) is outputs


# -- the table


def test_every_loss_of_the_settings_is_made_and_has_nothing_to_save(tree: Taxonomy) -> None:
    assert set(LOSSES) == set(get_args(TrainSettings.__dataclass_fields__["loss"].type))
    assert set(COARSE_LOSSES) <= set(LOSSES)
    for name in LOSSES:
        loss = loss_of(tree, loss=name)
        assert not loss.state_dict()
        assert not list(loss.parameters())
        assert loss.double()(logits_for(tree.num_leaves, 1, 0), torch.tensor([1])).dtype == torch.float64
