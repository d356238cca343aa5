"""Thresholds against brute force and scipy, and their promises by resampling."""

from collections.abc import Iterator

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bioscan.analysis import backoff, hierarchy
from bioscan.analysis.intervals import wilson
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import RequestError

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

RANKS = ("order", "family", "genus", "species")

probabilities = st.sampled_from([0.0, 0.1, 0.3, 0.30000000000000004, 0.7, 1.0, np.nan])
records = st.lists(st.tuples(probabilities, st.booleans()), max_size=60)


def columns(rows: list[tuple[float, bool]]) -> tuple[Array, Flags]:
    return np.array([p for p, _ in rows], float), np.array([flag for _, flag in rows], bool)


# -- one threshold per rank


@settings(max_examples=150, deadline=None)
@given(records, st.sampled_from([0.02, 0.05, 0.1, 0.3, 1.0]))
def test_the_threshold_is_the_least_that_keeps_the_corrected_error(
    rows: list[tuple[float, bool]], max_error: float
) -> None:
    probability, wrong = columns(rows)

    def kept(threshold: float) -> bool:
        mistakes = sum(p >= threshold and w for p, w in rows)
        return (mistakes + 1) / (len(rows) + 1) <= max_error + 1e-12

    found = backoff.rank_threshold(probability, wrong, max_error)
    if not kept(np.inf):
        assert found == np.inf
        assert len(rows) < 1 / max_error - 1
        return
    assert kept(found)
    assert found == 0 or not kept(float(np.nextafter(found, 0)))


def test_nineteen_records_are_the_fewest_for_an_error_of_five_percent() -> None:
    for n, expected in ((18, np.inf), (19, 0.0)):  # (0 + 1) / (19 + 1) = 0.05
        assert backoff.rank_threshold(np.full(n, 0.9), np.zeros(n, bool), 0.05) == expected
    one_wrong = np.arange(19) == 3
    found = backoff.rank_threshold(np.arange(19) / 20, one_wrong, 0.05)
    assert found == np.nextafter(0.15, 1)  # just above the wrong one's 3 / 20


def test_an_error_that_floating_point_cannot_hold_allows_what_it_says() -> None:
    # 0.29 · 100 is 28.999999999999996: still 28 wrong names and one more are 29 in 100
    found = backoff.rank_threshold(np.arange(99) / 100, np.ones(99, bool), 0.29)
    assert (np.arange(99) / 100 >= found).sum() == 28


def test_what_a_threshold_did_is_counted_on_the_records_that_can_be_checked() -> None:
    probability = np.array([0.9, 0.9, 0.8, 0.6, 0.5, np.nan, 0.99] + [0.7] * 13, np.float32)
    right = np.array([True, True, True, False, False, False, False] + [True] * 13)
    named = np.array([True] * 5 + [False] * 2 + [True] * 13)
    found = backoff.thresholds({"genus": (probability, right, named)}, 0.05)["genus"]
    # (k + 1) / 21 <= 0.05 for k = 0 alone: no wrong name, and 0.6 in float32 is the surest of these
    assert found.threshold == np.nextafter(np.float64(np.float32(0.6)), 1)
    assert (found.n, found.named, found.wrong, found.reason) == (20, 16, 0, "")
    assert (found.coverage, found.error_over_all, found.error_among_named) == (0.8, 0, 0)
    wide = backoff.thresholds({"genus": (probability, right, named)}, 0.1)["genus"]
    # k = 1: 0.6 may be wrong, 0.5 not; without a name nothing is wrong, however sure
    assert (wide.named, wide.wrong) == (17, 1)
    assert (wide.error_over_all, wide.error_among_named) == (1 / 20, 1 / 17)
    assert (wide.error_low, wide.error_high) == tuple(float(end) for end in wilson(1, 17))


def test_a_rank_with_too_few_records_is_not_named_and_says_how_many_it_takes() -> None:
    few, none = np.full(18, 0.9), np.zeros(0)
    found = backoff.thresholds(
        {"genus": (few, few > 0, few > 0), "species": (none, none > 0, none > 0)}, 0.05
    )
    assert found["genus"].threshold == found["species"].threshold == np.inf
    assert found["genus"].reason == "18 records can be checked; an error of 0.05 takes 19 or more"
    assert found["species"].reason.startswith("0 records")
    assert (found["genus"].named, found["genus"].coverage) == (0, 0)
    assert np.isnan([found["species"].coverage, found["species"].error_over_all]).all()
    assert np.isnan(found["genus"].error_among_named)


@pytest.mark.parametrize("max_error", [0, -0.1, 1.5, float("nan")])
def test_an_error_that_is_no_share_is_refused(max_error: float) -> None:
    with pytest.raises(RequestError, match="above 0 and at most 1"):
        backoff.thresholds({}, max_error)


# -- the deepest name


@st.composite
def paths(draw: st.DrawFn) -> tuple[Array, Flags, Array, Flags]:
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 4)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    probability = random.random(shape).round(1)
    threshold = random.choice([0.0, 0.3, 0.6, np.inf], shape[1])
    return probability, random.random(shape) < 0.8, threshold, random.random(shape) < 0.9


@settings(max_examples=200, deadline=None)
@given(paths())
def test_a_name_needs_all_tested_ranks_above_to_pass(case: tuple[Array, Flags, Array, Flags]) -> None:
    probability, named, threshold, allowed = case
    for row, found in enumerate(backoff.assign(*case)):
        expected = -1
        for rank in range(threshold.size):
            if not named[row, rank]:
                continue
            if not allowed[row, rank]:
                break
            if threshold[rank] == np.inf:
                continue
            if probability[row, rank] < threshold[rank]:
                break
            expected = rank
        assert found == expected


def test_at_threshold_zero_all_names_are_given_and_above_one_none() -> None:
    probability = np.array([[1.0, 0.5, 0.0], [0.9, np.nan, 0.2], [0.4, 0.3, np.nan], [np.nan] * 3])
    named = ~np.isnan(probability)
    assert backoff.assign(probability, named, np.zeros(3)).tolist() == [2, 2, 1, -1]
    assert backoff.assign(probability, named, np.full(3, 1.1)).tolist() == [-1] * 4


def test_float32_probabilities_are_compared_exactly() -> None:
    wrong = np.float32(0.6)
    threshold = backoff.rank_threshold(np.full(19, wrong), np.arange(19) == 0, 0.05)
    assert backoff.assign(np.full((1, 1), wrong), np.ones((1, 1), bool), np.array([threshold])).tolist() == [
        -1
    ]


def tree_192() -> Taxonomy:
    """3 orders of 4 families of 4 genera of 4 species."""
    rows = [(f"O{i // 64}", f"F{i // 16}", f"G{i // 4}", f"S{i}") for i in range(192)]
    return Taxonomy.build(pl.DataFrame(rows, list(RANKS), orient="row"), RANKS)


def answers(tree: Taxonomy, n: int, seed: int) -> tuple[Array, Ints, Ints]:
    """Probability, name and truth at each rank of specimens, by an overconfident model.

    Of 100 specimens some 30 are labelled to the species, 30 to the genus, 40 to the family: -1 below.
    """
    random = np.random.default_rng(seed)
    above_RL = hierarchy.ancestors(tree)
    truth = random.integers(0, tree.num_leaves, n)
    logits = random.normal(0, 1, (n, tree.num_leaves))
    for ancestor_L, noise in zip(above_RL, (0.8, 0.9, 1.0, 1.0), strict=True):
        effects = random.normal(0, noise, (n, tree.num_nodes))
        logits += effects[:, ancestor_L]
        logits += 1.8 * (ancestor_L == ancestor_L[truth][:, None])
    weights = np.exp(2.0 * (logits - logits.max(axis=1, keepdims=True)))
    shares = weights / weights.sum(axis=1, keepdims=True)
    named_NR = hierarchy.lineages(tree, hierarchy.decode(tree, shares, "leaf")).T
    true_NR = above_RL[:, truth].T.copy()
    depth = random.choice([2, 3, 4], n, p=[0.4, 0.3, 0.3])
    true_NR[np.arange(4) >= depth[:, None]] = -1
    probability_NR = np.empty((n, 4))
    for r, rank in enumerate(RANKS):
        sums, nodes = hierarchy.rank_probabilities(tree, shares, rank)
        probability_NR[:, r] = sums[np.arange(n), np.searchsorted(nodes, named_NR[:, r])]
    return probability_NR, named_NR.astype(np.int64), true_NR.astype(np.int64)


@pytest.fixture(scope="module")
def pool() -> tuple[Array, Ints, Ints]:
    return answers(tree_192(), 12_000, 1)


@pytest.mark.parametrize("max_error", [0.02, 0.05, 0.1])
def test_the_mean_error_at_each_rank_keeps_the_promise_over_200_resamples(
    pool: tuple[Array, Ints, Ints], max_error: float
) -> None:
    probability_NR, named_NR, true_NR = pool
    labelled, right = true_NR >= 0, named_NR == true_NR
    forced = [(~right[labelled[:, r], r]).mean() for r in range(4)]
    assert forced[3] > 0.25
    random = np.random.default_rng(int(max_error * 100))
    errors, named_shares = [], []
    for _ in range(200):
        order = random.permutation(len(right))
        seen, new = order[:500], order[500:]
        results = backoff.thresholds(
            {
                rank: (
                    probability_NR[rows, r],
                    right[rows, r],
                    np.ones(rows.size, bool),
                )
                for r, rank in enumerate(RANKS)
                for rows in [seen[labelled[seen, r]]]
            },
            max_error,
        )
        assert all(result.error_over_all <= max_error for result in results.values())
        threshold_R = np.array([results[rank].threshold for rank in RANKS])
        given = backoff.assign(probability_NR[new], np.ones((new.size, 4), bool), threshold_R)
        wrong = (given[:, None] >= np.arange(4)) & labelled[new] & ~right[new]
        errors.append(wrong.sum(axis=0) / labelled[new].sum(axis=0))
        named_shares.append((given[:, None] >= np.arange(4)).mean(axis=0))
    mean, spread = np.mean(errors, axis=0), np.std(errors, axis=0, ddof=1) / np.sqrt(200)
    assert (mean <= max_error + 3 * spread).all(), mean
    shares = np.mean(named_shares, axis=0)
    assert (np.diff(shares) <= 0).all()
    assert 0.03 < shares[3] < 1
    # not needlessly strict where nothing above holds back: the order keeps nearly all of what it may
    assert mean[0] >= min(forced[0], max_error) * 0.8


def test_the_mean_error_of_whole_answers_keeps_its_promise_where_that_of_ranks_promises_none(
    pool: tuple[Array, Ints, Ints],
) -> None:
    probability_NR, named_NR, true_NR = pool
    labelled, right, named = true_NR >= 0, named_NR == true_NR, np.ones(true_NR.shape, bool)
    random = np.random.default_rng(3)
    errors = []
    for _ in range(200):
        order = random.permutation(len(right))
        seen, new = order[:500], order[500:]
        columns = (probability_NR[seen], right[seen], named[seen], labelled[seen])
        threshold = backoff.answer_threshold(*columns, 0.05)
        given = backoff.assign(probability_NR[new], named[new], np.full(4, threshold))
        wrong = (given[:, None] >= np.arange(4)) & labelled[new] & ~right[new]
        errors.append(wrong.any(axis=1).mean())
    spread = np.std(errors, ddof=1) / np.sqrt(200)
    assert 0.04 < np.mean(errors) <= 0.05 + 3 * spread


def test_a_whole_answer_is_as_wrong_as_its_most_probable_wrong_name() -> None:
    # 19 records, an error of 0.1 allows one wrong answer. Wrong ones: 0.9 (its order is wrong too, at 0.95),
    # and 0.6, whose wrong species cannot be checked at 0.8: so 0.6 is the second and the threshold above it.
    probability = np.tile([0.99, 0.97], (19, 1))
    right, checked = np.ones((19, 2), bool), np.ones((19, 2), bool)
    probability[0], right[0] = [0.95, 0.9], False
    probability[1], right[1], checked[1] = [0.6, 0.8], False, [True, False]
    named = np.ones((19, 2), bool)
    assert backoff.answer_threshold(probability, right, named, checked, 0.1) == np.nextafter(0.6, 1)
    assert backoff.answer_threshold(probability, right, named, checked, 0.05) == np.nextafter(0.95, 1)
    assert backoff.answer_threshold(probability[:18], right[:18], named[:18], checked[:18], 0.05) == np.inf
    checked[2:] = False  # records at no rank do not count
    assert backoff.answer_threshold(probability, right, named, checked, 0.1) == np.inf


def test_no_name_at_all_has_no_thresholds() -> None:
    none = np.zeros(0)
    assert backoff.precision_thresholds(none.astype(int), none, none.astype(bool), 0.9) == {}


def test_asking_for_less_error_never_names_more(pool: tuple[Array, Ints, Ints]) -> None:
    probability_NR, named_NR, true_NR = pool
    rows = {
        rank: (probability_NR[:900, r][known], (named_NR == true_NR)[:900, r][known], known[known])
        for r, rank in enumerate(RANKS)
        for known in [true_NR[:900, r] >= 0]
    }
    found = [backoff.thresholds(rows, error) for error in (0.01, 0.02, 0.05, 0.1, 0.3, 1.0)]
    for rank in RANKS:
        thresholds = [results[rank].threshold for results in found]
        assert thresholds == sorted(thresholds, reverse=True)
        assert thresholds[-1] == 0


# -- taxa that cannot be told from unnamed sisters


def small_tree() -> Taxonomy:
    rows = [
        ("Diptera", "Aidae", "Aus", "Aus bus"),
        ("Diptera", "Bidae", "Bus", "Bus bus"),
        ("Diptera", "Bidae", "Bus", "Bus cus"),
        ("Coleoptera", "Cidae", "Cus", None),
        ("Coleoptera", "Didae", None, "Dus dus"),
    ]
    return Taxonomy.build(pl.DataFrame(rows, list(RANKS), orient="row"), RANKS).filled()[0]


def node(tree: Taxonomy, name: str) -> int:
    return next(n for n in range(tree.num_nodes) if tree.name(n) == name)


def test_an_only_child_is_unsure_once_records_end_at_its_parent() -> None:
    tree = small_tree()
    for ending, expected in {
        "Diptera": [],  # two families
        "Aidae": ["Aus", "Aus bus"],
        "Aus": ["Aus bus"],
        "Aus bus": [],
        "Bidae": ["Bus", "Bus bus", "Bus cus"],  # what is below the only genus as well
        "Bus": [],
        "Cidae": ["Cus"],
        "Didae": ["unassigned Didae", "Dus dus"],  # through a placeholder
    }.items():
        counts = np.zeros(tree.num_nodes, np.int64)
        counts[node(tree, ending)] = 1
        found = np.flatnonzero(backoff.indistinguishable(tree, counts))
        assert sorted(tree.name(int(n)) for n in found) == sorted(expected)


def lineage(tree: Taxonomy, number: int) -> Iterator[int]:
    while number > 0:
        yield number
        number = int(tree.parent_N[number])
    yield 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_unsure_taxa_are_those_with_the_probability_of_one_above_where_records_end(seed: int) -> None:
    random = np.random.default_rng(seed)
    tree = small_tree()
    counts = random.integers(0, 2, tree.num_nodes)
    shares = hierarchy.node_probabilities(tree, random.dirichlet(np.ones(tree.num_leaves), 1))[0]
    unsure = [
        any(counts[u] and np.isclose(shares[u], shares[v], atol=1e-15) for u in list(lineage(tree, v))[1:])
        for v in range(tree.num_nodes)
    ]
    expected = [any(unsure[v] for v in lineage(tree, n)) for n in range(tree.num_nodes)]
    assert backoff.indistinguishable(tree, counts).tolist() == expected


# -- one threshold per taxon


def test_forty_five_right_names_are_the_fewest_for_a_precision_of_95_percent() -> None:
    # 0.95^45 = 0.0994 <= 1 - 0.9 < 0.1047 = 0.95^44
    for n, expected in ((44, np.inf), (45, 0.0)):
        found = backoff.precision_thresholds(np.full(n, 7), np.full(n, 0.8), np.ones(n, bool), 0.95)
        assert list(found) == [7]
        assert found[7].threshold == expected
        assert found[7].named == (0 if n == 44 else 45)
    assert found[7].precision_low == pytest.approx(0.1 ** (1 / 45))  # all right: the share p with p^45 = 0.1
    assert found[7].precision_low >= 0.95
    few = backoff.precision_thresholds(np.zeros(44, int), np.full(44, 0.8), np.ones(44, bool), 0.95)[0]
    assert few.reason == "44 records got the name; a precision of 0.95 takes 45 or more"
    assert np.isnan([few.precision, few.precision_low]).all()


def test_wrong_names_among_the_surest_leave_a_taxon_without_a_threshold() -> None:
    probability = np.linspace(1, 0.5, 100)
    found = backoff.precision_thresholds(np.zeros(100, int), probability, np.arange(100) >= 30, 0.9)[0]
    assert (found.threshold, found.named, found.coverage) == (np.inf, 0, 0)
    assert found.reason == "the most confident of 100 records are not right often enough for 0.9"


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.6, 0.8, 0.9]),
    st.sampled_from([0.8, 0.9, 0.95]),
    st.sampled_from([2, 8]),
)
def test_the_kept_names_are_the_last_before_the_first_number_that_could_be_chance(
    seed: int, precision: float, level: float, digits: int
) -> None:
    from scipy.stats import beta, binom

    random = np.random.default_rng(seed)
    taxon = random.integers(-1, 3, 300)
    probability = random.random(300).round(digits)  # few digits: many ties
    probability[random.random(300) < 0.05] = np.nan
    right = random.random(300) < 0.5 + 0.5 * np.nan_to_num(probability)
    found = backoff.precision_thresholds(taxon, probability, right, precision, level=level)
    assert list(found) == [0, 1, 2]
    for number, result in found.items():
        rows = np.flatnonzero((taxon == number) & ~np.isnan(probability))
        values, hits = probability[rows], right[rows]
        least = max(np.ceil(np.log(1 - level) / np.log(precision) - 1e-9), rows.size // 4)
        kept, threshold = 0, np.inf
        cuts = [0.0, *np.nextafter(np.unique(values), np.inf)[:-1]]
        for cut in sorted(cuts, reverse=True):
            above = values >= cut
            if above.sum() < least:
                continue
            if binom.cdf((~hits[above]).sum(), above.sum(), 1 - precision) > 1 - level:
                break
            kept, threshold = int(above.sum()), cut
        assert (result.n, result.named) == (rows.size, kept)
        assert result.threshold == threshold
        if kept:
            sure = int(hits[values >= threshold].sum())
            assert result.precision == sure / kept
            assert result.precision_low == pytest.approx(beta.ppf(1 - level, sure, kept - sure + 1), abs=1e-6)
            assert result.precision_low >= precision - 1e-6
            assert result.coverage == kept / rows.size


def test_a_taxon_keeps_the_asked_precision_about_as_often_as_the_level_says() -> None:
    random = np.random.default_rng(12)
    # a name of probability p is right with probability p, p uniform: from t up it is (1 + t) / 2
    missed = 0
    for _ in range(300):
        probability = random.random(250)
        right = random.random(250) < probability
        found = backoff.precision_thresholds(np.zeros(250, int), probability, right, 0.8, level=0.9)[0]
        missed += (1 + min(found.threshold, 1)) / 2 < 0.8
    assert missed / 300 <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 300)


@pytest.mark.parametrize(("precision", "level"), [(0, 0.9), (1, 0.9), (0.9, 1), (0.9, float("nan"))])
def test_a_precision_or_level_that_cannot_be_tested_is_refused(precision: float, level: float) -> None:
    with pytest.raises(RequestError, match="between 0 and 1"):
        backoff.precision_thresholds(np.zeros(1, int), np.ones(1), np.ones(1, bool), precision, level=level)
