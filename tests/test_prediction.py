"""From a model to a predictions table: names that agree, failures as rows, the same table after a kill."""

import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import bioscan
from bioscan.analysis.hierarchy import DECODINGS, decode
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.data.predictions import read_predictions, read_record, read_scores
from bioscan.errors import DataError, RequestError
from bioscan.jobs.evaluate import evaluate_ranks
from bioscan.learn import model_folder, models
from bioscan.learn.calibration import Calibration
from bioscan.learn.dataset import ImageSpec, central_crop, resize_shorter
from bioscan.learn.losses import Softmax, outputs_of
from bioscan.learn.model_folder import Model
from bioscan.learn.prediction import Naming, energy, predict_batches, probabilities, shown_logits
from bioscan.vocabulary import RANKS

Paint = Callable[..., tuple[Path, Path]]

# with fewer cores than workers torch warns; the results are what is tested
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SPECIES = {
    "Lepidoptera/Nymphalidae/Vanessa/Vanessa atalanta": (3, 2, 3),
    "Lepidoptera/Nymphalidae/Aglais/Aglais io": (2, 1, 2),
    "Lepidoptera/Pieridae/Pieris/Pieris rapae": (2, 1, 2),
    "Diptera/Syrphidae/Eristalis/Eristalis tenax": (2, 1, 2),
}
SPEC = ImageSpec(image_size=36, crop_size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def make_model(
    folder: Path,
    metadata: Path,
    ranks: Sequence[str] = ("species",),
    within: str | None = None,
    softmax: Softmax = "flat",
    loss: str = "cross_entropy",
    counts: NDArray[np.int64] | None = None,
    spec: ImageSpec = SPEC,
) -> Path:
    """A model of random weights over the training taxa."""
    frame = bioscan.read_metadata(metadata).filter(pl.col("large_insect_order") == "train")
    if within:
        frame = frame.filter(pl.col("order") == within)
    taxonomy, _ = Taxonomy.build(frame, ranks).filled()
    torch.manual_seed(0)
    network = models.create("test_resnet", outputs=outputs_of(taxonomy, softmax), crop_size=32)
    experiment = {"experiment": "large_insect_order", "within": within, "split_hash": "abc"}
    model_folder.save(
        folder,
        network.state_dict(),
        backbone="test_resnet",
        taxonomy=taxonomy,
        spec=spec,
        record={**experiment, "settings": {"loss": loss, "tau": 1.0}},
        history=[],
        softmax=softmax,
        target_counts=None if counts is None else np.resize(counts, taxonomy.num_nodes),
    )
    return folder


@pytest.fixture(scope="module")
def insects(paint: Paint) -> tuple[Path, Path]:
    return paint(SPECIES)


@pytest.fixture(scope="module")
def model(insects: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "species", insects[0])


# -- names

NAMES = st.sampled_from(["a", "b", "c", None])
PATHS = st.lists(
    st.tuples(NAMES, NAMES, NAMES, st.sampled_from(["a", "b", "c", "d"])), min_size=1, max_size=8
)


COLUMNS = ("order", "family", "genus", "species")
RULES = st.sampled_from(sorted(DECODINGS))


def tree_of(paths: Any, ranks: Sequence[str]) -> Taxonomy:
    table = pl.DataFrame(paths, dict.fromkeys(COLUMNS, pl.String), orient="row")
    return Taxonomy.build(table, ranks).filled()[0]


@settings(max_examples=120, deadline=None)
@given(
    PATHS, st.sampled_from([("species",), COLUMNS, ("order", "genus", "species")]), RULES, st.integers(0, 99)
)
def test_names_are_one_lineage_and_probabilities_the_sums_over_its_leaves(
    paths: Any, ranks: Sequence[str], rule: str, seed: int
) -> None:
    taxonomy = tree_of(paths, ranks)
    generator = np.random.default_rng(seed)
    probabilities_NL = generator.dirichlet(np.ones(taxonomy.num_leaves) / 2, 5).astype(np.float32)
    specimens = pl.DataFrame({"sampleid": list("vwxyz"), "image_file": [None] * 5})
    made = Naming.of(taxonomy, rule).table(specimens, probabilities_NL, [None] * 5)
    leaves = [[*path, *[None] * (len(RANKS) - len(path))] for path in taxonomy.leaf_paths]
    chosen = decode(taxonomy, probabilities_NL.astype(np.float64), rule)
    for row, values, node in zip(made.to_dicts(), probabilities_NL, chosen, strict=True):
        best = leaves[taxonomy.leaves_L.tolist().index(node)]
        above = 1.0
        for level, rank in enumerate(RANKS):
            if rank not in made.columns:
                assert all(leaf[level] is None for leaf in leaves)
                continue
            assert row[rank] == best[level]
            if best[level] is None:
                assert row[f"{rank}_probability"] is None
                continue
            total = sum(
                float(p)
                for leaf, p in zip(leaves, values, strict=True)
                if leaf[: level + 1] == best[: level + 1]
            )
            assert row[f"{rank}_probability"] == pytest.approx(min(total, 1), abs=1e-9)
            assert row[f"{rank}_probability"] <= above + 1e-9  # no surer of the genus than of the order
            above = row[f"{rank}_probability"]
        deepest = max(level for level, name in enumerate(best) if name is not None)
        assert (row["assigned_rank"], row["assigned_taxon"]) == (RANKS[deepest], best[deepest])
        assert row["assigned_probability"] == pytest.approx(above)
        assert not any("unassigned" in str(value) for value in row.values())


@settings(max_examples=40, deadline=None)
@given(PATHS, st.integers(0, 99))
def test_with_one_rank_all_decodings_answer_alike(paths: Any, seed: int) -> None:
    taxonomy = tree_of(paths, ["species"])
    probabilities_NL = np.random.default_rng(seed).dirichlet(np.ones(taxonomy.num_leaves), 5)
    specimens = pl.DataFrame({"sampleid": list("vwxyz"), "image_file": [None] * 5})
    tables = [
        Naming.of(taxonomy, rule).table(specimens, probabilities_NL.astype(np.float32), [None] * 5)
        for rule in DECODINGS
    ]
    assert all(table.equals(tables[0]) for table in tables)


def test_decodings_differ_where_the_tree_matters() -> None:
    # Order A has one species (0.4), order B two (0.35 and 0.25): the best leaf is A's, the better order B
    taxonomy = tree_of(
        [("A", "Aa", "Aa", "Aa a"), ("B", "Bb", "Bb", "Bb b"), ("B", "Bb", "Bb", "Bb c")], COLUMNS
    )
    names = [path[-1] for path in taxonomy.leaf_paths]
    row = dict(zip(("Aa a", "Bb b", "Bb c"), (0.4, 0.35, 0.25), strict=True))
    probabilities_NL = np.array([[row[str(name)] for name in names]], np.float32)
    specimens = pl.DataFrame({"sampleid": ["x"], "image_file": [None]})
    made = {
        rule: Naming.of(taxonomy, rule).table(specimens, probabilities_NL, [None]).row(0, named=True)
        for rule in DECODINGS
    }
    assert {rule: (one["order"], one["species"]) for rule, one in made.items()} == {
        "leaf": ("A", "Aa a"),
        "greedy": ("B", "Bb b"),
        "distance": ("B", "Bb b"),
    }
    assert made["leaf"]["order_probability"] == pytest.approx(0.4)
    assert made["greedy"]["order_probability"] == pytest.approx(0.6)
    assert made["greedy"]["assigned_probability"] == pytest.approx(0.35)


# -- probabilities

TREE = tree_of(
    [
        *[("A", "Aa", "Aa", "Aa a")] * 6,
        *[("B", "Bb", "Bb", "Bb b")] * 3,
        ("B", "Bb", "Bb", "Bb c"),
        ("B", None, "Bx", "Bx x"),
    ],
    COLUMNS,
)


def model_of(taxonomy: Taxonomy, softmax: Softmax = "flat") -> Model:
    """A model without a network, for what comes after it."""
    counts_N = np.zeros(taxonomy.num_nodes, np.int64)
    counts_N[taxonomy.leaves_L] = taxonomy.counts_N[taxonomy.leaves_L]
    return Model(torch.nn.Identity(), taxonomy, SPEC, {}, "", softmax, counts_N)


def shown(model: Model, outputs_BM: torch.Tensor, tau: float = 0.0) -> NDArray[np.float32]:
    return probabilities(shown_logits(model, outputs_BM, tau=tau))


def test_tau_divides_by_the_prior_to_its_power() -> None:
    model = model_of(TREE)
    logits_BL = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (5, TREE.num_leaves)))
    plain_BL = shown(model, logits_BL).astype(np.float64)
    prior = {"Aa a": 6.5, "Bb b": 3.5, "Bb c": 1.5, "Bx x": 1.5}
    prior_L = np.array([prior[str(path[-1])] for path in TREE.leaf_paths]) / 13
    for tau in (-1.0, 0.5, 1.0, 3.0):
        wanted_BL = plain_BL / prior_L**tau
        wanted_BL /= wanted_BL.sum(axis=1, keepdims=True)
        assert shown(model, logits_BL, tau) == pytest.approx(wanted_BL, abs=1e-6)
    assert np.array_equal(shown(model, logits_BL, 0.0), plain_BL.astype(np.float32))


def test_tau_favours_rare_taxa_the_more_the_larger_it_is() -> None:
    logits_BL = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (400, TREE.num_leaves)))
    rare = next(leaf for leaf, path in enumerate(TREE.leaf_paths) if path[-1] == "Bx x")
    shares = [shown(model_of(TREE), logits_BL, tau)[:, rare].mean() for tau in (0, 0.5, 1, 2)]
    assert shares == sorted(shares)
    assert shares[-1] > 1.5 * shares[0]


def test_conditional_probabilities_are_products_down_the_path() -> None:
    outputs_BM = torch.from_numpy(np.random.default_rng(2).normal(0, 2, (3, TREE.num_nodes - 1)))
    made_BL = shown(model_of(TREE, "conditional"), outputs_BM)
    by_parent = sorted(range(1, TREE.num_nodes), key=lambda node: TREE.parent_N[node])  # order of the outputs
    for row, outputs_M in zip(made_BL, outputs_BM.numpy(), strict=True):
        weight = dict(zip(by_parent, np.exp(outputs_M), strict=True))
        for leaf, node in enumerate(TREE.leaves_L.tolist()):
            product = 1.0
            while node:
                siblings = [n for n in weight if TREE.parent_N[n] == TREE.parent_N[node]]
                product *= weight[node] / sum(weight[n] for n in siblings)
                node = int(TREE.parent_N[node])
            assert row[leaf] == pytest.approx(product, rel=1e-5)
    assert made_BL.sum(axis=1) == pytest.approx(1)


@pytest.mark.parametrize("scale", [300.0, 1e5])
def test_enormous_logits_give_finite_probabilities(scale: float) -> None:
    outputs_BM = torch.randn(4, TREE.num_nodes - 1, generator=torch.Generator().manual_seed(0)) * scale
    for softmax, width in (("flat", TREE.num_leaves), ("conditional", TREE.num_nodes - 1)):
        made_BL = shown(model_of(TREE, softmax), outputs_BM[:, :width], 1.0)  # type: ignore[arg-type]
        assert np.isfinite(made_BL).all()
        assert made_BL.sum(axis=1) == pytest.approx(1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_a_temperature_divides_the_logits_and_the_energy_is_theirs(temperature: float) -> None:
    logits_NL = np.random.default_rng(3).normal(0, 3, (6, TREE.num_leaves))
    weights_NL = np.exp(logits_NL / temperature)
    logits_BL = torch.from_numpy(logits_NL)
    made_BL = probabilities(logits_BL, temperature=temperature)
    assert made_BL == pytest.approx(weights_NL / weights_NL.sum(axis=1, keepdims=True), rel=1e-5)
    assert (made_BL.argmax(axis=1) == logits_NL.argmax(axis=1)).all()
    energy_B = energy(logits_BL, temperature=temperature)
    assert energy_B == pytest.approx(-temperature * np.log(weights_NL.sum(axis=1)))
    largest_B = temperature * np.log(made_BL.max(axis=1)) - energy_B
    assert largest_B == pytest.approx(logits_NL.max(axis=1), rel=1e-5)


def test_probabilities_are_the_networks_own(insects: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    metadata, images = insects
    output = tmp_path / "p.parquet"
    bioscan.predict(model, metadata, output, images=images, roles=["test"], batch_size=4)
    table, scores = read_predictions(output), read_scores(output)
    assert scores is not None
    ((_, probabilities_NL),) = scores.batches()
    loaded = model_folder.load(model)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (SPEC.mean, SPEC.std))
    for row, given_L in zip(table.to_dicts(), probabilities_NL, strict=True):
        pixels = torch.from_numpy(np.array(Image.open(images / row["image_file"]))).permute(2, 0, 1)
        image = central_crop(resize_shorter(pixels, 36), 32).float() / 255
        with torch.no_grad():
            wanted = torch.softmax(loaded.network(((image - mean) / std)[None])[0], 0).numpy()
        assert given_L == pytest.approx(wanted, abs=0.02)  # 16-bit arithmetic where the CPU has it
        best = loaded.taxonomy.leaf_paths[int(given_L.argmax())]
        assert (row["order"], row["family"], row["genus"], row["species"]) == (
            best[2],
            best[3],
            best[6],
            best[7],
        )
    assert scores.leaves == loaded.taxonomy.leaf_paths
    assert table["sampleid"].to_list() == [
        key
        for key, role in bioscan.read_metadata(metadata).select("sampleid", "large_insect_order").iter_rows()
        if role == "test"
    ]


def test_batches_and_workers_change_no_name_and_no_order(
    insects: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    metadata, images = insects
    made = []
    for number, options in enumerate(
        ({"batch_size": 64}, {"batch_size": 3}, {"batch_size": 3, "workers": 2})
    ):
        output = tmp_path / f"{number}.parquet"
        bioscan.predict(model, metadata, output, images=images, **options)
        made.append(read_predictions(output))
    names = ["sampleid", "species", "error"]
    assert made[0].select(names).equals(made[1].select(names))
    assert made[1].equals(made[2])


# -- which specimens


def test_by_default_the_validation_and_test_specimens_of_the_split(
    insects: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    metadata, images = insects
    whose: dict[str, Any] = {"default": {}, "test": {"roles": ["test"]}, "all": {"roles": []}}
    counts = {}
    for name, options in whose.items():
        output = tmp_path / f"{name}.parquet"
        counts[name] = bioscan.predict(model, metadata, output, images=images, **options)["specimens"]
        assert (read_scores(output) is not None) is (name != "all")
    assert counts == {"default": 5 + 9, "test": 9, "all": 9 + 5 + 9}
    assert read_record(tmp_path / "test.parquet")["roles"] == ["test"]


def test_a_model_of_one_order_names_its_specimens_unless_asked_for_all(
    insects: tuple[Path, Path], tmp_path: Path
) -> None:
    metadata, images = insects
    folder = make_model(tmp_path / "leps", metadata, within="Lepidoptera")
    made = bioscan.predict(folder, metadata, tmp_path / "p.parquet", images=bioscan.Images(images))
    assert made["specimens"] == 4 + 7
    assert (
        bioscan.predict(folder, metadata, tmp_path / "q.parquet", images=images, roles=[])["specimens"] == 23
    )


def test_a_catalogue_without_the_models_split_column_is_predicted_whole(
    insects: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    table = pl.read_csv(insects[0], separator="\t").drop("large_insect_order", "sampleid")
    table.write_csv(tmp_path / "field.tsv", separator="\t")
    bioscan.predict(model, tmp_path / "field.tsv", tmp_path / "p.csv", images=insects[1])
    made = read_predictions(tmp_path / "p.csv")
    assert made.height == 23
    assert made["sampleid"].null_count() == 23
    assert made["image_file"].to_list() == table["image_file"].to_list()


def test_bare_photographs_are_named_by_their_file(
    insects: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number, name in enumerate(("b.jpg", "a.png", "c.jpg")):
        Image.new("RGB", (30 + number, 50), (90, 40, 200)).save(folder / name)
    (folder / "c.jpg").write_bytes((folder / "c.jpg").read_bytes()[:-200])
    made = bioscan.predict(model, folder, tmp_path / "p.csv")
    assert (made["specimens"], made["failed"]) == (3, 1)
    assert made["first_failed"][0]["image_file"] == "c.jpg"
    rows = {row["image_file"]: row for row in read_predictions(tmp_path / "p.csv").to_dicts()}
    assert rows.keys() == {"a.png", "b.jpg", "c.jpg"}
    assert rows["a.png"]["species"] in {taxon.split("/")[-1] for taxon in SPECIES}
    assert rows["c.jpg"]["species"] is None
    assert not (tmp_path / "p.scores.parquet").exists()


# -- several ranks

COARSE = {
    **SPECIES,
    "Lepidoptera/Nymphalidae": (3, 0, 1),  # no deeper in these records, yet the family has species
    "Diptera": (2, 1, 1),
    "Diptera/Sciaridae": (3, 1, 2),  # no deeper in any record: a leaf
    "Diptera/not_classified/Incertae/Incertae sp": (2, 1, 1),  # a genus without a family
}
FOUR = ("order", "family", "genus", "species")


@pytest.fixture(scope="module")
def coarse(paint: Paint) -> tuple[Path, Path]:
    return paint(COARSE)


@pytest.mark.parametrize("softmax", ["flat", "conditional"])
@pytest.mark.parametrize("rule", sorted(DECODINGS))
def test_a_model_of_several_ranks_answers_with_lineages_of_its_tree(
    coarse: tuple[Path, Path], tmp_path: Path, softmax: Softmax, rule: str
) -> None:
    metadata, images = coarse
    folder = make_model(tmp_path / "m", metadata, FOUR, softmax=softmax)
    output = tmp_path / "p.parquet"
    made = bioscan.predict(folder, metadata, output, images=images, roles=[], decode=rule, scores=True, tau=1)
    table, scores, record = read_predictions(output), read_scores(output), read_record(output)
    assert (made["specimens"], made["failed"]) == (table.height, 0)
    told = {name: record[name] for name in ("rank", "ranks", "tau", "decode")}
    assert told == {"rank": "species", "ranks": list(FOUR), "tau": 1, "decode": rule}
    taxonomy = model_folder.load(folder).taxonomy
    assert scores is not None
    assert scores.leaves == taxonomy.leaf_paths
    known = {tuple((*path, *[None] * 8)[:8]) for path in taxonomy.leaf_paths}
    named = table.with_columns(
        pl.lit(None, pl.String).alias(r) for r in RANKS[:8] if r not in table.columns
    ).select(RANKS[:8])
    assert set(named.rows()) <= known
    for higher, deeper in itertools.pairwise(FOUR):
        both = table.filter(pl.col(f"{higher}_probability").is_not_null())
        assert (both[f"{deeper}_probability"].fill_null(0) <= both[f"{higher}_probability"] + 1e-6).all()
    assert "unassigned" not in table.write_csv()
    found = evaluate_ranks(output, metadata)
    assert {rank: found[rank].n for rank in FOUR} == {"order": 14, "family": 12, "genus": 10, "species": 10}


def test_a_strength_of_adjustment_and_a_decoding_make_other_predictions(
    coarse: tuple[Path, Path], tmp_path: Path
) -> None:
    metadata, images = coarse
    folder = make_model(tmp_path / "m", metadata, FOUR)
    scores = {}
    for tau in (0.0, 2.0):
        output = tmp_path / f"{tau}.parquet"
        bioscan.predict(folder, metadata, output, images=images, tau=tau)
        found = read_scores(output)
        assert found is not None
        ((_, scores[tau]),) = found.batches()
    log_prior_L = model_folder.load(folder).log_prior_L
    wanted_NL = scores[0.0] * np.exp(-2 * log_prior_L)
    wanted_NL /= wanted_NL.sum(axis=1, keepdims=True)
    assert scores[2.0] == pytest.approx(wanted_NL, abs=1e-5)


@pytest.mark.parametrize(
    ("loss", "balanced"),
    [("cross_entropy", {}), ("focal", {}), ("logit_adjusted", {"loss": "logit_adjusted"})],
)
def test_it_is_told_what_favoured_rare_taxa_in_training(
    insects: tuple[Path, Path], tmp_path: Path, loss: str, balanced: dict[str, str]
) -> None:
    folder = make_model(tmp_path / "m", insects[0], loss=loss)
    made = bioscan.predict(folder, insects[0], tmp_path / "p.csv", images=insects[1], tau=0.5)
    assert made["balanced"] == balanced


def test_without_training_counts_there_is_no_adjustment(insects: tuple[Path, Path], tmp_path: Path) -> None:
    metadata, images = insects
    folder = make_model(tmp_path / "m", metadata, counts=np.zeros(1, np.int64))
    with pytest.raises(RequestError, match="how common its taxa were in training is not known; --tau needs"):
        bioscan.predict(folder, metadata, tmp_path / "p.parquet", images=images, tau=1)
    assert bioscan.predict(folder, metadata, tmp_path / "p.parquet", images=images)["failed"] == 0


# -- what the model's calibration says


def rows_at(taxonomy: Taxonomy, rank: str, n: int, wrong: int) -> dict[str, Any]:
    """Calibration records of the first taxon at a rank, at a probability of 1; some of them wrong."""
    node = int(np.flatnonzero(taxonomy.rank_N == RANKS.index(rank))[0])
    return {
        f"{rank}_true": [-1] * wrong + [node] * (n - wrong),
        f"{rank}_named": [node] * n,
        f"{rank}_probability": [1.0] * n,
        f"{rank}_truth_probability": [0.0] * wrong + [1.0] * (n - wrong),
        f"{rank}_before": [0.0] * n,
        f"{rank}_place": [99] * wrong + [0] * (n - wrong),
    }


def calibrated(folder: Path, target: Path, wrong: dict[str, int] | None = None, **changes: Any) -> Path:
    """The model with a calibration of 40 records, of which so many are wrong at a rank."""
    taxonomy = model_folder.load(folder).taxonomy
    wrong = wrong or {}
    columns = [rows_at(taxonomy, rank, 40, wrong.get(rank, 0)) for rank in taxonomy.ranks]
    nodes = range(1, taxonomy.num_nodes)
    reliability = pl.DataFrame(
        {
            "taxon": nodes,
            "training": [10 * node for node in nodes],
            "checked": nodes,
            "precision": [1 / node for node in nodes],
            "recall": 0.5,
            "confusions": "Aus 12 %",
        }
    )
    given: dict[str, Any] = {
        "temperature": 2.0,
        "rank_temperatures": None,
        "tau": 0.0,
        "decode": "leaf",
        "info": {"fit": {"n": 40}, "second": {"n": 40}, "ranks": {}, "warnings": []},
        "records": pl.DataFrame({name: values for made in columns for name, values in made.items()}),
        "reliability": reliability,
    }
    model_folder.recalibrated(folder, target, Calibration(**given | changes))
    return target


@pytest.fixture(scope="module")
def deep(coarse: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of four ranks, and the same with a calibration whose names at rank species are all wrong."""
    folder = tmp_path_factory.mktemp("deep")
    plain = make_model(folder / "plain", coarse[0], FOUR, counts=np.ones(1, np.int64))
    return plain, calibrated(plain, folder / "calibrated", {"species": 40})


def test_a_calibrated_model_shows_tempered_probabilities_and_the_same_names(
    coarse: tuple[Path, Path], deep: tuple[Path, Path], tmp_path: Path
) -> None:
    metadata, images = coarse
    tables, scores, records = [], [], []
    for number, folder in enumerate((*deep, deep[1])):
        output = tmp_path / f"{number}.parquet"
        made = bioscan.predict(folder, metadata, output, images=images, calibration=number < 2)
        assert (made["temperature"], made["notes"]) == (2.0 if number == 1 else 1.0, [])
        tables.append(read_predictions(output))
        found = read_scores(output)
        assert found is not None
        assert found.energy is not None
        scores.append((np.concatenate([part for _, part in found.batches()]), found.energy.to_numpy()))
        records.append(read_record(output))
    (plain_NL, plain_N), (tempered_NL, tempered_N), (without_NL, without_N) = scores
    assert np.array_equal(without_NL, plain_NL)
    assert np.array_equal(without_N, plain_N)
    roots_NL = np.sqrt(plain_NL)
    assert tempered_NL == pytest.approx(roots_NL / roots_NL.sum(axis=1, keepdims=True), rel=1e-4)
    logits_NL = np.log(plain_NL) - plain_N[:, None]
    assert tempered_N == pytest.approx(-2 * np.log(np.exp(logits_NL / 2).sum(axis=1)), rel=1e-4)
    names = [*FOUR, "assigned_rank", "assigned_taxon", "error"]
    assert tables[0].select(names).equals(tables[1].select(names))
    assert tables[0].columns == tables[2].columns
    assert [record["temperature"] for record in records] == [1.0, 2.0, 1.0]
    assert [record["calibration"] is not None for record in records] == [False, True, False]
    assert len({record["weights_sha256"] for record in records}) == 1
    assert len({record["model_sha256"] for record in records}) == 2


def test_the_assigned_taxon_backs_off_and_its_reliability_stands_beside_it(
    coarse: tuple[Path, Path], deep: tuple[Path, Path], tmp_path: Path
) -> None:
    metadata, images = coarse
    output = tmp_path / "p.csv"
    made = bioscan.predict(
        deep[1], metadata, output, images=images, roles=[], max_error=0.1, sets="lac", set_rank="order"
    )
    table = read_predictions(output)
    # 40 records: 3 may be wrong. At the rank species all are, at a probability of 1; elsewhere none.
    assert set(table["assigned_rank"]) <= {"order", "family", "genus"}
    assert table.filter(pl.col("species").is_not_null() & (pl.col("assigned_rank") != "genus")).is_empty()
    assert made["assigned"] == dict(table["assigned_rank"].value_counts().iter_rows())
    assert made["unassigned"] == 0
    told = made["back_off"]
    assert (told["asked"], told["value"]) == ("max_error", 0.1)
    assert [(row["rank"], row["checked"], row["named"], row["wrong"]) for row in told["ranks"]] == [
        *((rank, 40, 40, 0) for rank in ("order", "family", "genus")),
        ("species", 40, 0, 0),
    ]
    taxonomy = model_folder.load(deep[1]).taxonomy
    numbers = {taxonomy.name(node): node for node in range(1, taxonomy.num_nodes)}
    for row in table.to_dicts():
        node = numbers[row["assigned_taxon"]]
        assert row["assigned_probability"] == row[f"{row['assigned_rank']}_probability"]
        assert (row["assigned_training"], row["assigned_checked"]) == (10 * node, node)
        assert (row["assigned_precision"], row["assigned_recall"]) == (pytest.approx(1 / node), 0.5)
        assert row["assigned_confusions"] == "Aus 12 %"
    # all ten records had a probability of 1: an order that is less than sure is in no set
    assert made["sets"] == {
        "method": "lac",
        "rank": "order",
        "coverage": pytest.approx(0.9),
        "calibrated": 40,
        "warnings": [],
        "mean_size": 0,
        "empty": table.height,
    }
    assert table["set_size"].to_list() == [0] * table.height
    output = tmp_path / "p.parquet"
    bioscan.predict(deep[1], metadata, output, images=images, max_error=0.1, sets="pas", coverage=0.8)
    record = read_record(output)
    assert (record["max_error"], record["min_precision"]) == (0.1, None)
    assert record["sets"] == {"method": "pas", "coverage": 0.8, "rank": "species"}


def test_of_precise_taxa_the_deepest_is_assigned(
    coarse: tuple[Path, Path], deep: tuple[Path, Path], tmp_path: Path
) -> None:
    metadata, images = coarse
    output = tmp_path / "p.parquet"
    made = bioscan.predict(deep[1], metadata, output, images=images, min_precision=0.9)
    table = read_predictions(output)
    # of each rank one taxon has records; 40 right names show a precision of 0.9 (it takes 22)
    assert [row["taxa_given"] for row in made["back_off"]["ranks"]] == [1, 1, 1, 0]
    taxonomy = model_folder.load(deep[1]).taxonomy
    first = {
        rank: taxonomy.name(int(np.flatnonzero(taxonomy.rank_N == RANKS.index(rank))[0]))
        for rank in ("order", "family", "genus")
    }
    for row in table.to_dicts():
        held = [rank for rank, name in first.items() if row[rank] == name]
        deepest = (held[-1], first[held[-1]]) if held else (None, None)
        assert (row["assigned_rank"], row["assigned_taxon"]) == deepest
    assert made["unassigned"] == table["assigned_taxon"].null_count()


def test_a_calibration_for_another_adjustment_or_decoding_is_said_to_be_left_out(
    insects: tuple[Path, Path], deep: tuple[Path, Path], tmp_path: Path
) -> None:
    made = bioscan.predict(deep[1], insects[1], tmp_path / "tau.parquet", tau=1)
    assert made["temperature"] == 1.0
    assert made["notes"] == [
        "the model's calibration is for tau 0, not 1: probabilities are not calibrated (bioscan calibrate "
        "--tau 1 makes it anew)"
    ]
    assert read_record(tmp_path / "tau.parquet")["calibration"] is None
    made = bioscan.predict(deep[1], insects[1], tmp_path / "p.parquet", decode="greedy", sets="aps")
    assert made["temperature"] == 2.0
    assert made["notes"] == [
        "how reliable names are was measured for decode leaf, not greedy, and is left out (bioscan calibrate "
        "--decode greedy measures it anew)"
    ]
    for name in ("tau", "p"):
        assert "assigned_training" not in read_predictions(tmp_path / f"{name}.parquet").columns
    assert bioscan.predict(deep[1], insects[1], tmp_path / "q.csv", tau=1, calibration=False)["notes"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_error": 0.05, "tau": 1},
            r"is for tau 0 and decode leaf, and --max-error needs one for tau 1 ",
        ),
        ({"min_precision": 0.9, "decode": "greedy"}, r"--images PACKAGE --tau 0 --decode greedy -o NEW"),
        ({"sets": "lac", "tau": 0.5}, r"--sets needs one for tau 0\.5 and decode leaf; make it: bioscan cal"),
        (
            {"max_error": 0.05, "calibration": False},
            "--max-error needs the model's calibration; leave out --no",
        ),
        ({"max_error": 0.05, "min_precision": 0.9}, "two ways to choose the assigned taxon; give one"),
        ({"set_rank": "order"}, "set_rank goes with sets"),
        ({"promise": "answer"}, "promise goes with max_error"),
        ({"max_error": 0.0}, "an error of 0 cannot be promised"),
        ({"min_precision": 1.0}, "a precision of 1 cannot be tested"),
        ({"sets": "lac", "coverage": 1.5}, "must lie between 0 and 1, not 1.5"),
        ({"sets": "lca"}, "did you mean 'lac'"),
        (
            {"sets": "lac", "set_rank": "specis"},
            "unknown rank of this model 'specis'; did you mean 'species'",
        ),
    ],
)
def test_a_promise_that_cannot_be_made_is_told(
    insects: tuple[Path, Path],
    deep: tuple[Path, Path],
    tmp_path: Path,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(RequestError, match=message):
        bioscan.predict(deep[1], insects[1], tmp_path / "p.parquet", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_calibration_says_how_to_make_one(
    insects: tuple[Path, Path], deep: tuple[Path, Path], tmp_path: Path
) -> None:
    wanted = f"{deep[0]} has no calibration, which --max-error needs; make one: bioscan calibrate {deep[0]} "
    with pytest.raises(RequestError, match=re.escape(wanted)):
        bioscan.predict(deep[0], insects[1], tmp_path / "p.parquet", max_error=0.05)
    made = bioscan.predict(deep[0], insects[1], tmp_path / "p.parquet")
    assert (made["temperature"], made["notes"], made["back_off"], made["sets"]) == (1.0, [], None, None)


# -- failures


def test_a_failure_is_a_row_in_its_place(paint: Paint, model: Path, tmp_path: Path) -> None:
    metadata, images = paint(SPECIES)
    keys = bioscan.read_metadata(metadata)["image_file"].to_list()
    (images / keys[1]).write_bytes(b"")
    (images / keys[4]).unlink()
    (images / keys[22]).write_text("a letter")
    made = bioscan.predict(
        model, metadata, tmp_path / "p.parquet", images=images, roles=[], batch_size=4, scores=True
    )
    table, scores = read_predictions(tmp_path / "p.parquet"), read_scores(tmp_path / "p.parquet")
    assert scores is not None
    ((_, probabilities_NL),) = scores.batches()
    assert table["image_file"].to_list() == keys
    errors = dict(table.filter(pl.col("error").is_not_null()).select("image_file", "error").iter_rows())
    assert errors.keys() == {keys[1], keys[4], keys[22]}
    assert errors[keys[1]].startswith("empty file")
    assert errors[keys[4]].startswith("not in the package")
    assert errors[keys[22]].startswith("not an image")
    bad = table["error"].is_not_null().to_numpy()
    named = table.filter(bad).select("species", "species_probability", "assigned_taxon")
    assert named.null_count().row(0) == (3, 3, 3)
    assert table.filter(~bad)["assigned_probability"].null_count() == 0
    assert np.isnan(probabilities_NL).all(axis=1).tolist() == bad.tolist()
    assert scores.energy is not None
    assert scores.energy.is_null().to_list() == bad.tolist()
    assert made["failed"] == 3


def test_a_table_of_absent_images_is_all_failures_in_bounded_batches(
    paint: Paint, model: Path, tmp_path: Path
) -> None:
    metadata, _ = paint(SPECIES)
    (tmp_path / "other").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "other/x.jpg")
    frame = bioscan.read_metadata(metadata).select("sampleid", "image_file").with_columns(row=pl.lit(-1))
    package = bioscan.Images(tmp_path / "other")
    loaded = model_folder.load(model)
    batches = list(predict_batches(loaded, package, frame, Naming.of(loaded.taxonomy), batch_size=10))
    assert [batch.table.height for batch in batches] == [10, 10, 3]
    assert all(np.isnan(batch.energy_N).all() for batch in batches)
    made = bioscan.predict(model, metadata, tmp_path / "p.parquet", images=package)
    assert (made["specimens"], made["failed"], len(made["first_failed"])) == (14, 14, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a catalogue needs --images, the package of its photographs"),
        ({"roles": ["tset"], "images": 1}, "unknown role 'tset'; did you mean 'test'"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"tau": float("nan")}, "tau is nan; it must be a number, such as 0 or 1"),
        ({"tau": float("-inf")}, "tau is -inf; it must be a number, such as 0 or 1"),
        ({"decode": "gredy"}, r"unknown decoding 'gredy'; did you mean 'greedy'"),
        ({"workers": -1}, "workers is -1; it must be at least 0"),
    ],
)
def test_a_wrong_request_is_told(
    insects: tuple[Path, Path], model: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    if "images" in options:
        options = {**options, "images": insects[1]}
    with pytest.raises(RequestError, match=message):
        bioscan.predict(model, insects[0], tmp_path / "p.parquet", **options)
    assert list(tmp_path.iterdir()) == []


def test_images_go_with_a_catalogue_only(insects: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is a package of images itself; --images goes with a catalogue"):
        bioscan.predict(model, insects[1], tmp_path / "p.csv", images=insects[1])


def test_an_altered_model_names_nothing(insects: tuple[Path, Path], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", insects[0])
    path = folder / "model.json"
    path.write_text(path.read_text().replace("Aglais io", "Inachis io"))
    with pytest.raises(DataError, match="was altered after training"):
        bioscan.predict(folder, insects[1], tmp_path / "p.csv")


def test_nothing_is_overwritten_unless_told(insects: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    output = tmp_path / "p.csv"
    output.write_text("mine")
    with pytest.raises(RequestError, match="exists"):
        bioscan.predict(model, insects[1], output)
    assert output.read_text() == "mine"
    assert bioscan.predict(model, insects[1], output, overwrite=True)["failed"] == 0


@pytest.mark.parametrize("tau", [0.0, 1.7e308])
def test_outputs_that_make_no_probabilities_are_failures(
    insects: tuple[Path, Path], tmp_path: Path, tau: float
) -> None:
    folder = make_model(tmp_path / "m", insects[0], spec=replace(SPEC, std=(1e-39,) * 3) if not tau else SPEC)
    made = bioscan.predict(folder, insects[1], tmp_path / "p.parquet", tau=tau, scores=True)
    assert made["failed"] == made["specimens"] > 0
    table = read_predictions(tmp_path / "p.parquet")
    assert table["error"].str.contains("too large to make probabilities").all()
    scores = read_scores(tmp_path / "p.parquet")
    assert scores is not None
    assert scores.energy is None  # of none of them
    assert table["species"].null_count() == table.height


# -- kills

CHILD = """
import os, signal, sys
import bioscan
from bioscan.jobs import predict

predict._BLOCK_ROWS = 4

def progress(done, total):
    if done >= 14:
        os.kill(os.getpid(), signal.SIGKILL)

options = {"roles": [], "scores": True, "batch_size": 4, "threads": 1}
bioscan.predict(*sys.argv[1:4], images=sys.argv[4], **options, progress=progress)
"""


def test_a_killed_job_goes_on_where_it_was_and_ends_with_the_same_table(
    insects: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    metadata, images = insects
    options: dict[str, Any] = {"images": images, "roles": [], "scores": True, "batch_size": 4, "threads": 1}
    child = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            CHILD,
            *map(str, (model, metadata, tmp_path / "p.parquet", images)),
        ],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert not (tmp_path / "p.parquet").exists()
    told: list[int] = []
    bioscan.predict(
        model, metadata, tmp_path / "p.parquet", **options, progress=lambda done, total: told.append(done)
    )
    assert told == [20, 23]  # sixteen were kept
    bioscan.predict(model, metadata, tmp_path / "q.parquet", **options)
    for ending in ("parquet", "scores.parquet"):
        one, other = (pl.read_parquet(tmp_path / f"{name}.{ending}") for name in ("p", "q"))
        assert one.equals(other)
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{name}.{ending}" for name in ("p", "q") for ending in ("parquet", "scores.parquet")
    }


def test_an_interrupted_job_with_promises_ends_with_the_same_table(
    coarse: tuple[Path, Path], deep: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata, images = coarse
    monkeypatch.setattr("bioscan.jobs.predict._BLOCK_ROWS", 4)
    options: dict[str, Any] = {"images": images, "roles": [], "scores": True, "batch_size": 4, "workers": 0}
    options |= {"max_error": 0.1, "sets": "aps", "coverage": 0.7}

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bioscan.predict(deep[1], metadata, tmp_path / "p.parquet", **options, progress=interrupt)
    one = bioscan.predict(deep[1], metadata, tmp_path / "p.parquet", **options)
    other = bioscan.predict(deep[1], metadata, tmp_path / "q.parquet", **options)
    assert one | {"predictions": ""} == other | {"predictions": ""}
    for ending in ("parquet", "scores.parquet"):
        first, second = (pl.read_parquet(tmp_path / f"{name}.{ending}") for name in ("p", "q"))
        assert first.equals(second)


def test_an_interrupted_job_does_not_go_on_with_other_images_of_the_same_name(
    insects: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    metadata, images = insects
    other = tmp_path / images.name
    other.mkdir()
    for path in images.glob("*.jpg"):
        Image.new("RGB", (40, 40), "green").save(other / path.name)
    options: dict[str, Any] = {"roles": [], "batch_size": 4, "workers": 0}

    def interrupt(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    output = tmp_path / "p.parquet"
    with pytest.raises(KeyboardInterrupt):
        bioscan.predict(model, metadata, output, images=images, progress=interrupt, **options)
    bioscan.predict(model, metadata, output, images=other, **options)
    assert read_predictions(output)["species_probability"].n_unique() == 1  # all pictures are alike
