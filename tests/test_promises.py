"""What a calibration lets be said of answers: how deep names go, sets of taxa, how far a name was right."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bioscan.analysis import conformal
from bioscan.analysis.confidence import tempered_rank_probabilities
from bioscan.analysis.hierarchy import DECODINGS, lineages
from bioscan.analysis.reliability import UNKNOWN
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import RequestError
from bioscan.learn.calibration import Calibration
from bioscan.learn.prediction import Naming
from bioscan.learn.promises import BackOff, TaxonSets, by_error, by_precision, reliability_by_node
from bioscan.vocabulary import RANKS

COLUMNS = ("order", "family", "genus", "species")
Row = tuple[str | None, ...]


def tree_of(paths: Sequence[Row], ranks: Sequence[str] = COLUMNS) -> Taxonomy:
    table = pl.DataFrame(paths, dict.fromkeys(COLUMNS, pl.String), orient="row")
    return Taxonomy.build(table, ranks).filled()[0]


TREE = tree_of(
    [
        *[("A", "Aa", "Ax", "Ax x")] * 9,
        *[("A", "Aa", "Ax", "Ax y")] * 5,
        *[("B", "Bb", "Bx", "Bx x")] * 4,
        *[("B", "Bc", None, None)] * 3,  # a leaf at rank family
        *[("C", None, "Cx", "Cx x")] * 2,  # without a family: a placeholder stands there
    ]
)
NODE = {TREE.paths[node][-1]: node for node in range(1, TREE.num_nodes)}


def calibration(records: pl.DataFrame | None = None, **changes: Any) -> Calibration:
    settings: dict[str, Any] = {
        "temperature": 1.0,
        "rank_temperatures": None,
        "tau": 0.0,
        "decode": "leaf",
        "info": {},
    }
    return Calibration(**settings | changes, records=records)


def records(
    taxonomy: Taxonomy,
    probabilities_NL: NDArray[np.float64],
    truth_N: Sequence[int],
    temperatures: dict[str, float] | None = None,
) -> pl.DataFrame:
    """Calibration records of specimens with these deepest true nodes; -1: a taxon that the tree lacks."""
    leaf_N = taxonomy.leaves_L[probabilities_NL.argmax(axis=1)]
    named_RN, true_RN = lineages(taxonomy, leaf_N), lineages(taxonomy, np.array(truth_N))
    true_RN[:, np.array(truth_N) < 0] = UNKNOWN
    columns: dict[str, Any] = {"group": [f"plate {n // 4}" for n in range(len(truth_N))]}
    for rank, named_N, true_N in zip(taxonomy.ranks, named_RN, true_RN, strict=True):
        temperature = (temperatures or {}).get(rank, 1.0)
        sums_NK, nodes_K = tempered_rank_probabilities(taxonomy, probabilities_NL, rank, temperature)
        places = {int(node): place for place, node in enumerate(nodes_K)}
        truth = conformal.truth_of(sums_NK, np.array([places.get(int(node), -1) for node in true_N]))
        unlabelled = pl.Series((true_N < 0) & (np.array(truth_N) >= 0))
        named = [sums_NK[n, places[int(node)]] if node >= 0 else None for n, node in enumerate(named_N)]
        columns |= {
            f"{rank}_true": pl.Series(true_N).set(unlabelled, None),
            f"{rank}_named": pl.Series(named_N).set(pl.Series(named_N < 0), None),
            f"{rank}_probability": pl.Series(named, dtype=pl.Float64),
            f"{rank}_truth_probability": pl.Series(truth.probability_N).set(unlabelled, None),
            f"{rank}_before": pl.Series(truth.before_N).set(unlabelled, None),
            f"{rank}_place": pl.Series(truth.place_N).set(unlabelled, None),
        }
    return pl.DataFrame(columns)


def leaves(**given: float) -> NDArray[np.float32]:
    """One specimen's probabilities by leaf name, "_" for its space; the other leaves share the rest."""
    values = {name.replace("_", " "): value for name, value in given.items()}
    names = [path[-1] for path in TREE.leaf_paths]
    rest = (1 - sum(values.values())) / (len(names) - len(values))
    return np.array([[values.get(str(name), rest) for name in names]], np.float32)


def table(naming: Naming, probabilities_NL: NDArray[np.float32]) -> pl.DataFrame:
    keys = [f"S{n}" for n in range(len(probabilities_NL))]
    specimens = pl.DataFrame({"sampleid": keys, "image_file": [f"{key}.jpg" for key in keys]})
    return naming.table(specimens, probabilities_NL, [None] * len(keys))


def random_records(seed: int, n: int = 60, taxonomy: Taxonomy = TREE) -> pl.DataFrame:
    generator = np.random.default_rng(seed)
    probabilities_NL = generator.dirichlet(np.full(taxonomy.num_leaves, 0.3), n)
    truth = [
        int(taxonomy.leaves_L[generator.choice(row.size, p=row)])
        if generator.random() < 0.8
        else int(generator.integers(-1, taxonomy.num_nodes))
        for row in probabilities_NL
    ]
    return records(taxonomy, probabilities_NL, [node if node != 0 else -1 for node in truth])


# -- how deep a name may go


def at_one_rank(probability: Sequence[float], wrong: Sequence[int], *, unlabelled: int = 0) -> pl.DataFrame:
    """Records that are named B; those at `wrong` are A. Of the last `unlabelled` nothing is known."""
    true: list[int | None] = [NODE["A"] if n in wrong else NODE["B"] for n in range(len(probability))]
    true[len(true) - unlabelled :] = [None] * unlabelled
    columns: dict[str, Any] = {
        "order_true": true,
        "order_named": [NODE["B"]] * len(true),
        "order_probability": probability,
    }
    for rank in COLUMNS[1:]:
        columns |= {f"{rank}_{name}": [None] * len(true) for name in ("true", "named", "probability")}
    return pl.DataFrame(columns, schema_overrides={name: pl.Float64 for name in columns if "prob" in name})


def test_names_are_given_as_deep_as_the_error_allows() -> None:
    # 19 records can be checked: an error of 0.1 allows floor(0.1 * 20) - 1 = 1 wrong name.
    # Wrong are those at 0.9, 0.8 and 0.3: the threshold lies just above 0.8; 8 records are above it, 1 wrong.
    probability = [0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.93, 0.9, 0.8, *np.linspace(0.7, 0.3, 10), 1.0, 1.0]
    kept = at_one_rank(probability, [7, 8, 18], unlabelled=2)
    rule = by_error(TREE, calibration(kept), np.zeros(TREE.num_nodes, np.int64), 0.1)
    assert rule.measured[0] == {
        "rank": "order",
        "checked": 19,
        "named": 8,
        "wrong": 1,
        "error_over_all": 1 / 19,
        "error_among_named": 1 / 8,
        "low": pytest.approx(0.022, abs=0.001),  # Wilson's interval of 1 of 8
        "high": pytest.approx(0.471, abs=0.001),
        "reason": None,
        "held_back": 0,
    }
    assert rule.measured[1]["reason"] == "0 records can be checked; an error of 0.1 takes 9 or more"
    naming = replace(Naming.of(TREE), backoff=rule)
    for share, given_name in ((0.81, "B"), (0.79, None)):
        made = table(naming, leaves(Bx_x=share / 2, Bc=share / 2)).row(0, named=True)
        assert (made["assigned_rank"], made["assigned_taxon"]) == (
            "order" if given_name else None,
            given_name,
        )
        assert made["order_probability"] == pytest.approx(share)  # names and probabilities stay whole
        assert made["species"] == "Bx x"
        assert made["assigned_probability"] == (made["order_probability"] if given_name else None)


def test_the_error_of_answers_as_wholes_can_be_promised_instead() -> None:
    probability = [0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.93, 0.9, 0.8, *np.linspace(0.7, 0.3, 10)]
    kept = at_one_rank(probability, [7, 8, 18])
    counts_V = np.zeros(TREE.num_nodes, np.int64)
    by_rank, whole = (
        by_error(TREE, calibration(kept), counts_V, 0.1, promise) for promise in ("rank", "answer")
    )
    assert by_rank.threshold_R is not None
    assert whole.threshold_R is not None
    # labels are at one rank only: both promise the same, and ranks without records stay empty
    assert whole.threshold_R.tolist() == by_rank.threshold_R.tolist() == [np.nextafter(0.8, 1), *[np.inf] * 3]
    assert whole.answers == by_rank.answers
    assert {name: whole.answers[name] for name in ("checked", "named", "wrong")} == {
        "checked": 19,
        "named": 8,
        "wrong": 1,
    }
    assert (by_rank.promise, whole.promise) == ("rank", "answer")


def brute_force(row: dict[str, Any], rule: BackOff, taxonomy: Taxonomy) -> tuple[str | None, str | None]:
    """The assigned rank and taxon, from a table's row of names and probabilities."""
    found: tuple[str | None, str | None] = (None, None)
    node = 0
    for place, rank in enumerate(taxonomy.ranks):
        if row.get(rank) is None:
            continue
        path = tuple(row.get(name) for name in RANKS[: RANKS.index(rank) + 1])
        node = taxonomy.paths.index(path)
        enough = row[f"{rank}_probability"]
        if rule.threshold_R is not None:
            if not rule.allowed_V[node]:
                break
            if not np.isfinite(rule.threshold_R[place]):
                continue
            if enough < rule.threshold_R[place]:
                break
            found = rank, row[rank]
        elif rule.allowed_V[node] and enough >= rule.threshold_V[node]:  # type: ignore[index]
            found = rank, row[rank]
    return found


NAMES = st.sampled_from(["a", "b", "c", None])
PATHS = st.lists(
    st.tuples(NAMES, NAMES, NAMES, st.sampled_from(["a", "b", "c", "d"])), min_size=1, max_size=8
)


@settings(max_examples=60, deadline=None)
@given(
    PATHS,
    st.sampled_from(sorted(DECODINGS)),
    st.sampled_from(["max_error", "min_precision"]),
    st.sampled_from([0.05, 0.2, 0.5]),
    st.integers(0, 999),
)
def test_the_assigned_taxon_is_the_deepest_of_the_names_that_keeps_what_was_asked(
    paths: Any, decoding: str, asked: str, value: float, seed: int
) -> None:
    taxonomy = tree_of(paths)
    generator = np.random.default_rng(seed)
    known = calibration(random_records(seed, 80, taxonomy))
    counts_V = generator.integers(0, 2, taxonomy.num_nodes)
    rule = (by_error if asked == "max_error" else by_precision)(taxonomy, known, counts_V, value)
    naming = replace(Naming.of(taxonomy, decoding), backoff=rule)
    probabilities_NL = generator.dirichlet(np.full(taxonomy.num_leaves, 0.3), 12).astype(np.float32)
    forced = table(Naming.of(taxonomy, decoding), probabilities_NL)
    made = table(naming, probabilities_NL)
    for row, whole in zip(made.to_dicts(), forced.to_dicts(), strict=True):
        assert (row["assigned_rank"], row["assigned_taxon"]) == brute_force(whole, rule, taxonomy)
        if row["assigned_rank"]:
            assert row["assigned_probability"] == row[f"{row['assigned_rank']}_probability"]
        assert {k: v for k, v in row.items() if "assigned" not in k} == {
            k: v for k, v in whole.items() if "assigned" not in k
        }


@settings(max_examples=40, deadline=None)
@given(st.floats(0.02, 0.6), st.integers(0, 999))
def test_no_rank_has_more_wrong_names_on_the_records_than_was_asked(error: float, seed: int) -> None:
    kept = random_records(seed)
    rule = by_error(TREE, calibration(kept), np.zeros(TREE.num_nodes, np.int64), error)
    for row in rule.measured:
        true, named = (kept[f"{row['rank']}_{what}"] for what in ("true", "named"))
        assert row["checked"] == true.len() - true.null_count()
        assert row["named"] <= (true.is_not_null() & named.is_not_null()).sum()
        if row["checked"]:
            assert row["wrong"] <= max(0, error * (row["checked"] + 1) - 1)
            assert (row["reason"] is not None) == (row["checked"] < round(1 / error - 1, 9))


def test_an_error_of_one_forces_the_deepest_name_and_too_small_a_one_gives_none() -> None:
    probabilities_NL = np.random.default_rng(1).dirichlet(np.ones(TREE.num_leaves), 20).astype(np.float32)
    forced = table(Naming.of(TREE), probabilities_NL)
    no_counts = np.zeros(TREE.num_nodes, np.int64)
    known = calibration(random_records(0))
    every = table(replace(Naming.of(TREE), backoff=by_error(TREE, known, no_counts, 1.0)), probabilities_NL)
    assert every.equals(forced)
    assert set(forced["assigned_rank"]) == {"species", "family"}
    none = table(replace(Naming.of(TREE), backoff=by_error(TREE, known, no_counts, 0.01)), probabilities_NL)
    assert none.select("assigned_rank", "assigned_taxon", "assigned_probability").null_count().row(0) == (
        (20,) * 3
    )


def test_a_taxon_is_named_from_its_own_threshold_on() -> None:
    # ln 0.1 / ln 0.8 = 10.3: eleven right names in a row show a precision of 0.8; with the twelfth, at 0.5,
    # wrong, they do not. So B is named above 0.5; A, of which ten records are known, never.
    kept = at_one_rank([*np.linspace(0.9, 0.6, 11), 0.5], [11])
    named_a = at_one_rank(np.linspace(0.9, 0.6, 10).tolist(), list(range(10)))
    kept = pl.concat([kept, named_a.with_columns(order_named=pl.lit(NODE["A"], pl.Int64))])
    rule = by_precision(TREE, calibration(kept), np.zeros(TREE.num_nodes, np.int64), 0.8)
    row = rule.measured[0]
    assert (row["taxa"], row["taxa_given"], row["checked"], row["named"], row["wrong"]) == (2, 1, 22, 11, 0)
    assert (row["low"], row["high"], rule.answers["low"]) == (None, None, None)  # these chose the threshold
    assert rule.measured[3]["reason"].startswith("of 0 taxa none was right so often")
    assert rule.never == ["family", "genus", "species"]
    naming = replace(Naming.of(TREE), backoff=rule)
    probabilities_NL = np.concatenate(
        [leaves(Bx_x=0.3, Bc=0.21), leaves(Bx_x=0.2, Bc=0.29), leaves(Ax_x=0.99)]
    )
    assert table(naming, probabilities_NL)["assigned_taxon"].to_list() == ["B", None, None]


def test_a_taxon_that_cannot_be_told_from_unnamed_sisters_is_left_to_its_parent() -> None:
    counts_V = np.zeros(TREE.num_nodes, np.int64)
    counts_V[NODE["Bx"]] = 3  # specimens of the genus Bx without a species: any of its species
    rule = by_error(TREE, calibration(random_records(0)), counts_V, 1.0)
    naming = replace(Naming.of(TREE), backoff=rule)
    made = table(naming, np.concatenate([leaves(Bx_x=0.9), leaves(Ax_x=0.9)]))
    assert made["species"].to_list() == ["Bx x", "Ax x"]
    assert made["assigned_taxon"].to_list() == ["Bx", "Ax x"]
    assert [row["held_back"] for row in rule.measured] == [0, 0, 0, 1]


def test_without_records_there_is_no_promise() -> None:
    for known in (calibration(), calibration(random_records(0).clear())):
        for ask in (by_error, by_precision):
            with pytest.raises(RequestError, match=r"kept no records apart.*--share above 0"):
                ask(TREE, known, np.zeros(TREE.num_nodes, np.int64), 0.5)
        with pytest.raises(RequestError, match="kept no records apart"):
            TaxonSets.of(TREE, known, "lac", 0.9)


# -- temperatures of the ranks


def tempered(sums: list[float], temperature: float) -> list[float]:
    powers = [value ** (1 / temperature) for value in sums]
    return [value / sum(powers) for value in powers]


def test_temperatures_of_ranks_are_of_their_marginals_and_no_name_passes_the_one_above() -> None:
    # orders A 0.6, B 0.3, C 0.1; Bc is a family without species
    values = {"Ax x": 0.35, "Ax y": 0.25, "Bx x": 0.2, "Bc": 0.1, "Cx x": 0.1}
    probabilities_NL = np.array([[values[str(path[-1])] for path in TREE.leaf_paths]], np.float32)
    naming = Naming.of(TREE, rank_temperatures={"order": 2.0, "species": 0.5})
    made = table(naming, probabilities_NL).row(0, named=True)
    order = tempered([0.6, 0.3, 0.1], 2)[0]  # 0.4732
    assert made["order_probability"] == pytest.approx(order)
    assert made["family_probability"] == pytest.approx(order)  # 0.6 of its own is more than the order has
    assert made["genus_probability"] == pytest.approx(order)
    species = tempered([0.35, 0.25, 0.2, 0.1, 0.1], 0.5)[0]  # 0.5506
    assert species > order
    assert made["species_probability"] == pytest.approx(order)
    assert made["assigned_probability"] == made["species_probability"]


@settings(max_examples=60, deadline=None)
@given(
    PATHS,
    st.sampled_from([COLUMNS, ("order", "species"), ("family", "species")]),
    st.lists(st.floats(0.2, 5), min_size=4, max_size=4),
    st.integers(0, 99),
)
def test_whatever_the_temperatures_no_rank_is_surer_than_the_rank_above(
    paths: Any, ranks: Sequence[str], temperatures: list[float], seed: int
) -> None:
    taxonomy = tree_of(paths, ranks)
    probabilities_NL = np.random.default_rng(seed).dirichlet(np.full(taxonomy.num_leaves, 0.4), 8)
    probabilities_NL[3] = np.nan
    naming = Naming.of(taxonomy, rank_temperatures=dict(zip(ranks, temperatures, strict=False)))
    made = table(naming, probabilities_NL.astype(np.float32))
    shown = [name for name in made.columns if name.endswith("_probability") and "assigned" not in name]
    for row in made.to_dicts():
        values = [row[name] for name in shown if row[name] is not None]
        assert all(deeper <= above for above, deeper in itertools.pairwise(values))
    assert made[3, "assigned_probability"] is None
    assert made.select(shown).row(3) == (None,) * len(shown)


# -- sets


def test_the_sets_are_those_of_the_thresholds_by_hand() -> None:
    # lac, ten records of Ax x whose probability is 0.95, 0.9, … 0.5: coverage 0.9 takes the
    # ceil(11 * 0.9) = 10th smallest of 1 - p: 0.5. A set holds every species of at least 0.5.
    shares = np.arange(0.95, 0.49, -0.05)
    kept = np.concatenate([leaves(Ax_x=share) for share in shares]).astype(np.float64)
    known = calibration(records(TREE, kept, [NODE["Ax x"]] * len(shares)))
    sets = TaxonSets.of(TREE, known, "lac", 0.9)
    assert sets.rank == "species"
    assert sets.calibrated.threshold == pytest.approx(0.5)
    asked = [
        leaves(Ax_x=0.6),
        leaves(Ax_x=0.46, Ax_y=0.5),
        leaves(Ax_x=0.45, Ax_y=0.45),
        leaves(Ax_x=0.45) * np.nan,
    ]
    made = sets.columns(np.concatenate(asked), list("abcd"))
    assert made.rows() == [
        ("Ax x", 1, "Ax x", "species"),
        ("Ax y", 1, "Ax y", "species"),
        ("", 0, None, None),
        (None, None, None, None),
    ]


def test_a_set_is_told_from_the_most_probable_name_on_and_by_the_smallest_taxon_over_it() -> None:
    kept = np.concatenate([leaves(Ax_x=share) for share in np.linspace(0.5, 0.2, 10)]).astype(np.float64)
    known = calibration(records(TREE, kept, [NODE["Ax x"]] * 10))
    sets = TaxonSets.of(TREE, known, "lac", 0.9)  # at least 0.2
    probabilities_NL = np.concatenate([leaves(Ax_y=0.5, Ax_x=0.3), leaves(Bx_x=0.5, Ax_y=0.3)])
    assert sets.columns(probabilities_NL, ["a", "b"]).rows() == [
        ("Ax y; Ax x", 2, "Ax", "genus"),
        ("Bx x; Ax y", 2, None, None),  # only the whole tree holds both
    ]
    assert sets.told() == {
        "method": "lac",
        "rank": "species",
        "coverage": pytest.approx(0.9),
        "calibrated": 10,
        "warnings": [],
    }


def test_records_of_taxa_that_the_model_lacks_count_as_never_covered() -> None:
    # ten records, two of unknown taxa: coverage 0.9 takes the 10th smallest score of ten, which is infinite,
    # and coverage 0.7 the 8th, that of the least probable known one
    kept = np.concatenate([leaves(Ax_x=share) for share in np.linspace(0.9, 0.45, 10)]).astype(np.float64)
    known = calibration(records(TREE, kept, [NODE["Ax x"]] * 8 + [-1] * 2))
    assert TaxonSets.of(TREE, known, "lac", 0.9).calibrated.threshold == np.inf
    assert TaxonSets.of(TREE, known, "lac", 0.7).calibrated.threshold == pytest.approx(1 - 0.55)


def test_placeholders_are_in_no_set() -> None:
    known = calibration(random_records(3, 5))  # too few: every taxon is in every set
    sets = TaxonSets.of(TREE, known, "lac", 0.9, "family")
    made = sets.columns(leaves(Cx_x=0.9), ["a"])
    assert set(made["set"][0].split("; ")) == {"Aa", "Bb", "Bc"}
    assert made["set_size"].to_list() == [3]
    assert len(sets.calibrated.warnings) > 0


@pytest.mark.parametrize("method", conformal.METHODS)
@pytest.mark.parametrize("temperatures", [None, {"genus": 1.7}])
def test_sets_hold_the_truth_of_the_records_they_were_made_from_as_often_as_asked(
    method: str, temperatures: dict[str, float] | None
) -> None:
    generator = np.random.default_rng(5)
    probabilities_NL = generator.dirichlet(np.full(TREE.num_leaves, 0.5), 400)
    truth = [int(TREE.leaves_L[generator.choice(row.size, p=row)]) for row in probabilities_NL]
    kept = records(TREE, probabilities_NL, truth, temperatures)
    genus_N = lineages(TREE, np.array(truth))[2]
    labelled = genus_N >= 0
    sets = TaxonSets.of(TREE, calibration(kept, rank_temperatures=temperatures), method, 0.8, "genus")
    keys = [str(n) for n in range(labelled.sum())]  # of aps and raps: the numbers that calibration drew
    made = sets.columns(probabilities_NL[labelled], keys)
    found = made["set"].str.split("; ").to_list()
    hits = [TREE.name(int(node)) in names for node, names in zip(genus_N[labelled], found, strict=True)]
    assert np.mean(hits) == pytest.approx(0.8, abs=0.01)
    assert [len([name for name in names if name]) for names in found] == made["set_size"].to_list()


@pytest.mark.parametrize("method", ["aps", "raps"])
def test_a_specimens_set_does_not_depend_on_its_batch(method: str) -> None:
    sets = TaxonSets.of(TREE, calibration(random_records(2)), method, 0.8)
    naming = replace(Naming.of(TREE), sets=sets)
    probabilities_NL = np.random.default_rng(4).dirichlet(np.ones(TREE.num_leaves), 40).astype(np.float32)
    whole = table(naming, probabilities_NL)
    specimens = whole.select("sampleid", "image_file")
    for start in range(0, 40, 7):
        part = slice(start, start + 7)
        errors = [None] * len(probabilities_NL[part])
        made = naming.table(specimens[part], probabilities_NL[part], errors)
        assert made.equals(whole[part])


@pytest.mark.parametrize("bound", [100, 2000])
def test_of_a_large_set_the_first_hundred_names_are_written(
    bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bioscan.learn.promises._SORTED", bound)
    taxonomy = tree_of([("A", "Aa", "Ax", f"Ax {n:03d}") for n in range(130)], ["order", "species"])
    known = calibration(random_records(0, 3, taxonomy))
    sets = TaxonSets.of(taxonomy, known, "lac", 0.9)
    probabilities_NL = (np.arange(130, 0, -1)[None] / np.arange(131).sum()).astype(np.float32)
    made = sets.columns(probabilities_NL, ["a"]).row(0, named=True)
    names = made["set"].split("; ")
    assert names == [*(taxonomy.name(int(node)) for node in taxonomy.leaves_L[:100]), "…"]
    assert (made["set_size"], made["set_taxon"], made["set_rank"]) == (130, "A", "order")


@pytest.mark.parametrize(
    ("method", "coverage", "rank", "message"),
    [
        ("lacc", 0.9, None, "unknown method of prediction sets 'lacc'; did you mean 'lac'"),
        ("lac", 1.0, None, "must lie between 0 and 1, not 1"),
        ("lac", 0.9, "tribe", "unknown rank of this model 'tribe'"),
    ],
)
def test_sets_that_cannot_be_made_say_why(
    method: str, coverage: float, rank: str | None, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        TaxonSets.of(TREE, calibration(random_records(0)), method, coverage, rank)


# -- how far a name was right

RELIABILITY = pl.DataFrame(
    {
        "taxon": [NODE["B"], NODE["Ax x"]],
        "training": [7, 9],
        "checked": [20, 4],
        "precision": [0.85, 1.0],
        "recall": [0.9, 0.5],
        "confusions": ["A 10 %, C 5 %", None],
    }
)


def test_beside_an_assigned_taxon_stands_how_reliable_its_name_was() -> None:
    known = calibration(at_one_rank([0.9] * 30, []), reliability=RELIABILITY)
    rule = by_error(TREE, known, np.zeros(TREE.num_nodes, np.int64), 0.1)
    naming = replace(Naming.of(TREE), reliability=reliability_by_node(TREE, known))
    probabilities_NL = np.concatenate([leaves(Bx_x=0.9), leaves(Ax_x=0.9), leaves(Bc=0.9) * np.nan])
    columns = naming.optional
    assert columns == [
        f"assigned_{name}" for name in ("training", "checked", "precision", "recall", "confusions")
    ]
    nothing = (None,) * 5
    by_leaf = table(naming, probabilities_NL).select(columns).rows()
    assert by_leaf == [nothing, (9, 4, 1.0, 0.5, None), nothing]  # nothing is known of Bx x
    backed_off = table(replace(naming, backoff=rule), probabilities_NL).select(columns).rows()
    assert backed_off == [(7, 20, 0.85, 0.9, "A 10 %, C 5 %"), nothing, nothing]
    assert reliability_by_node(TREE, calibration()) is None
