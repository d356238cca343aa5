"""Heads on frozen features, against scikit-learn and brute force."""

import tracemalloc
import warnings
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import RequestError
from bioscan.learn import adaptation
from bioscan.learn.adaptation import fit, folds_of, retrain, standardisation, tau_normalised
from bioscan.learn.heads import CosineHead, NearestHead

Features = NDArray[np.float32]


def clusters(
    counts: list[int], width: int = 8, apart: float = 1.0, seed: int = 0
) -> tuple[Features, pl.DataFrame]:
    """Features of species A, B … around random centres, and their names; two families."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(len(counts), width)) * apart
    number = np.repeat(np.arange(len(counts)), counts)
    features = (centres[number] + generator.normal(size=(number.size, width))) * 3 + 5
    names = pl.DataFrame(
        {
            "family": ["one" if n < len(counts) / 2 else "two" for n in number],
            "species": [chr(ord("A") + n) for n in number],
        }
    )
    return features.astype(np.float32), names


def targets(names: pl.DataFrame) -> tuple[Taxonomy, NDArray[np.int64]]:
    """The tree of the names, and the node of each."""
    taxonomy = Taxonomy.build(names, ["family", "species"]).filled()[0]
    return taxonomy, taxonomy.targets(names).astype(np.int64)


def logits_of(head: torch.nn.Module, features: Features) -> NDArray[np.float64]:
    """What a head gives."""
    with torch.no_grad():
        made: NDArray[np.float64] = head(torch.from_numpy(features)).double().numpy()
    return made


@pytest.mark.parametrize("width", [6, 60])  # more specimens than features, and fewer
@pytest.mark.parametrize("balance", ["none", "weights"])
def test_the_linear_head_is_scikit_learns_logistic_regression(width: int, balance: str) -> None:
    features, names = clusters([20, 10, 5], width)
    taxonomy, nodes = targets(names)
    leaves = taxonomy.first_leaf_N[nodes]
    made = fit("linear", features, nodes, taxonomy, balance=balance, l2=0.05)
    mean, deviation = (value.numpy() for value in standardisation(features))
    # ours: mean of the weighted losses + l2/2 |W|^2; theirs: C times their sum + 1/2 |W|^2
    oracle = LogisticRegression(
        C=1 / (0.05 * len(features)),
        class_weight="balanced" if balance == "weights" else None,
        tol=1e-10,
        max_iter=10_000,
    ).fit((features - mean) / deviation, leaves)
    other, _ = clusters([9, 9, 9], width, seed=5)
    expected = oracle.predict_proba((other - mean) / deviation)
    found = torch.softmax(torch.from_numpy(logits_of(made.module, other)), dim=1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_specimen_known_to_a_family_costs_the_marginal_probability_of_its_species() -> None:
    features, names = clusters([8, 8, 8, 8])
    coarse = np.arange(len(features)) % 3 == 0
    names = names.with_columns(species=pl.when(pl.Series(~coarse)).then("species"))
    taxonomy, nodes = targets(names)
    assert not np.isin(nodes[coarse], taxonomy.leaves_L).any()
    made = fit("linear", features, nodes, taxonomy, l2=0.1)
    _, deviation = (value.numpy() for value in standardisation(features))
    assert isinstance(made.module, torch.nn.Linear)
    weight, bias = (value.detach().double().numpy() for value in (made.module.weight, made.module.bias))

    def objective(weight: NDArray[np.float64], bias: NDArray[np.float64]) -> float:
        logits = features.astype(np.float64) @ weight.T + bias
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        below = [
            p[taxonomy.first_leaf_N[n] : taxonomy.end_leaf_N[n]].sum()
            for p, n in zip(probabilities, nodes, strict=True)
        ]
        return float(-np.log(below).mean() + 0.05 * np.square(weight * deviation).sum())

    least = objective(weight, bias)
    generator = np.random.default_rng(3)
    for _ in range(50):  # convex in the leaves, and at a minimum: every step away costs
        step = generator.normal(size=weight.shape) * 1e-2 / deviation
        assert objective(weight + step, bias) > least
        assert objective(weight, bias + generator.normal(size=bias.shape) * 1e-2) > least - 1e-7


def test_the_penalty_is_chosen_by_what_was_held_out() -> None:
    features, names = clusters([12] * 4, width=30, apart=0.4)
    taxonomy, nodes = targets(names)
    made = fit("linear", features, nodes, taxonomy)
    leaves = taxonomy.first_leaf_N[nodes]
    known = made.held_out_NL[np.arange(len(leaves)), leaves]
    assert made.chosen["loss"] == pytest.approx(-known.mean(), abs=1e-5)
    for l2 in (made.chosen["l2"] * 10, made.chosen["l2"] / 10):
        assert fit("linear", features, nodes, taxonomy, l2=l2).chosen["loss"] > made.chosen["loss"] + 0.01


def test_held_out_probabilities_come_from_heads_that_have_not_seen_the_specimen() -> None:
    features, names = clusters([4, 4], apart=0.0)  # nothing to learn: by heart or not at all
    taxonomy, nodes = targets(names)
    made = fit("nearest", features, nodes, taxonomy, folds=4)
    assert isinstance(made.module, NearestHead)
    leaves = taxonomy.first_leaf_N[nodes]
    seen = logits_of(made.module, features)
    assert np.exp(seen[np.arange(8), leaves]).min() > np.exp(made.held_out_NL[np.arange(8), leaves]).min()


def test_a_prototype_is_the_mean_of_the_unit_features_of_its_taxon() -> None:
    features, names = clusters([5, 9, 7])
    taxonomy, nodes = targets(names)
    made = fit("prototype", features, nodes, taxonomy)
    assert isinstance(made.module, CosineHead)
    mean, deviation = (value.numpy() for value in standardisation(features))
    unit = (features - mean) / deviation
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    leaves = taxonomy.first_leaf_N[nodes]
    centres = np.stack([unit[leaves == leaf].mean(axis=0) for leaf in range(3)])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    expected = made.chosen["scale"] * unit @ centres.T
    np.testing.assert_allclose(logits_of(made.module, features), expected, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(2, 6), st.integers(0, 99))
def test_every_taxon_is_spread_evenly_over_the_parts(taxa: list[int], folds: int, seed: int) -> None:
    nodes = np.array(taxa, np.int64)
    parts = folds_of(nodes, folds, seed)
    sizes = np.bincount(parts[parts >= 0], minlength=folds)
    assert sizes.max() - sizes.min() <= 1
    for node in np.unique(nodes):
        mine = parts[nodes == node]
        if mine.size == 1:
            assert mine[0] == -1
        else:
            each = np.bincount(mine, minlength=folds)
            assert each.max() - each.min() <= 1
    np.testing.assert_array_equal(parts, folds_of(nodes, folds, seed))


def test_a_feature_that_never_varies_changes_nothing() -> None:
    features, names = clusters([6, 6])
    taxonomy, nodes = targets(names)
    wider = np.hstack([features, np.full((12, 1), 7, np.float32)])
    one, other = (fit("linear", f, nodes, taxonomy, l2=0.1).module for f in (features, wider))
    np.testing.assert_allclose(logits_of(one, features), logits_of(other, wider), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("linaer", {}, "did you mean 'linear'"),
        ("nearest", {"balance": "weights"}, "balance and l2 go with head linear"),
        ("linear", {"balance": "all"}, "unknown balance"),
        ("linear", {"folds": 1}, "folds is 1"),
    ],
)
def test_a_wrong_request_is_told(kind: str, more: dict[str, object], message: str) -> None:
    features, names = clusters([3, 3])
    taxonomy, nodes = targets(names)
    with pytest.raises(RequestError, match=message):
        fit(kind, features, nodes, taxonomy, **more)  # type: ignore[arg-type]


def test_one_photograph_of_each_taxon_is_too_few() -> None:
    features, names = clusters([1, 1, 1])
    taxonomy, nodes = targets(names)
    with pytest.raises(RequestError, match="no taxon has two specimens"):
        fit("linear", features, nodes, taxonomy)


def test_retraining_with_balanced_sampling_lifts_the_rare_species() -> None:
    features, names = clusters([400, 40, 8, 8], apart=0.6)
    taxonomy, nodes = targets(names)
    leaves = taxonomy.first_leaf_N[nodes]
    test, test_names = clusters([100] * 4, apart=0.6, seed=7)
    truth = taxonomy.first_leaf_N[taxonomy.targets(test_names)]
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        plain = LogisticRegression(C=1.0).fit(features, leaves)
    made = retrain(features.astype(np.float16), nodes, taxonomy, seed=2, batch_size=64)
    right = logits_of(made, test).argmax(axis=1) == truth
    assert right.mean() > (plain.predict(test) == truth).mean() + 0.03


def test_retraining_is_repeatable() -> None:
    features, names = clusters([30, 5])
    taxonomy, nodes = targets(names)
    one, other = (retrain(features, nodes, taxonomy, epochs=2, seed=4) for _ in range(2))
    assert torch.equal(one.weight, other.weight)


def test_tau_normalisation_evens_out_the_lengths_of_the_weights() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 3)
    lengths = head.weight.norm(dim=1)
    assert torch.equal(tau_normalised(head, 0).weight, head.weight)
    torch.testing.assert_close(tau_normalised(head, 1).weight.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(tau_normalised(head, 0.5).weight.norm(dim=1), lengths**0.5)
    assert not tau_normalised(head, 1).bias.any()
    spread = [tau_normalised(head, tau).weight.norm(dim=1).std().item() for tau in (0, 0.25, 0.5, 0.75, 1)]
    assert all(later < earlier for earlier, later in pairwise(spread))


def test_standardisation_is_numpys_and_takes_no_copy_of_all_features() -> None:
    features = np.random.default_rng(0).normal(50, 3, (20_000, 64)).astype(np.float16)
    tracemalloc.start()
    mean, deviation = standardisation(features)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(deviation, features.astype(np.float64).std(axis=0), rtol=1e-9)
    assert peak < 2 * features.nbytes


def test_held_out_specimens_are_compared_with_the_gallery_a_block_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, names = clusters([40, 40], width=4)
    taxonomy, nodes = targets(names)
    whole = fit("nearest", features, nodes, taxonomy)
    seen: list[int] = []
    forward = NearestHead.forward
    monkeypatch.setattr(adaptation, "_BLOCK", 7)

    def counted(head: NearestHead, features_BF: torch.Tensor) -> torch.Tensor:
        seen.append(len(features_BF))
        return forward(head, features_BF)

    monkeypatch.setattr(NearestHead, "forward", counted)
    parted = fit("nearest", features, nodes, taxonomy)
    np.testing.assert_allclose(parted.held_out_NL, whole.held_out_NL, atol=1e-6)
    assert max(seen) == 7
