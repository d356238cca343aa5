"""The split rule against the paper's program (golden files), its published counts, and a second, slow
implementation that follows the rule word by word.
"""

import hashlib
import random
from collections.abc import Iterable
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan.analysis.splits import class_sizes, make_splits, role_counts, split_hash
from bioscan.data.metadata import read_metadata
from bioscan.errors import RequestError
from bioscan.vocabulary import EXPERIMENTS, NO_SPLIT, ROLES

COUNTS = Path(__file__).parent / "data/published_counts.tsv"

# -- the rule in plain Python lists


def classes_by_rank(rows: Iterable[int], labels: list[str | None]) -> list[list[int]]:
    """Row numbers by label in file order, the most populous class first, ties as they appear."""
    groups: dict[str, list[int]] = {}
    for row in rows:
        label = labels[row]
        if label is not None:
            groups.setdefault(label, []).append(row)
    return sorted(groups.values(), key=len, reverse=True)  # sorted() is stable, also in reverse


def dealt(classes: list[list[int]], seed: int) -> dict[int, str]:
    random.seed(seed)
    roles = {}
    for members in classes:
        samples = list(members)
        random.shuffle(samples)
        n = len(samples)
        if n <= 2:
            continue
        if n <= 5:
            test, validation, train = samples[:1], samples[1:2], samples[2:]
        else:
            n_train, n_validation, n_test = round(n * 0.7), round(n * 0.1), round(n * 0.2)
            n_train += n - (n_train + n_validation + n_test)
            train = samples[:n_train]
            validation = samples[n_train : n_train + n_validation]
            test = samples[-n_test:]
        for role, part in (("train", train), ("validation", validation), ("test", test)):
            roles.update(dict.fromkeys(part, role))
    return roles


def water_filled(large: dict[int, str], labels: list[str | None], budget: int) -> dict[int, str] | None:
    chosen: dict[int, str] = {}
    for role, ratio in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        target = int(ratio * budget)
        rows = sorted(row for row, its in large.items() if its == role)
        if target > len(rows):
            return None
        classes = classes_by_rank(rows, labels)
        taken: list[list[int]] = [[] for _ in classes]
        while sum(map(len, taken)) < target:
            for members, bucket in zip(reversed(classes), reversed(taken), strict=True):
                if len(bucket) < len(members):
                    bucket.append(members[len(bucket)])
        overshoot = sum(map(len, taken)) - target
        if overshoot:
            taken[0] = taken[0][:-overshoot]
        chosen.update((row, role) for bucket in taken for row in bucket)
    return chosen


def slow_splits(
    orders: list[str | None], families: list[str | None], seed: int, number: int, medium: int, small: int
) -> dict[str, list[str]]:
    rows = range(len(orders))
    diptera = classes_by_rank((row for row in rows if orders[row] == "Diptera"), families)[:number]
    family = dealt(diptera, seed)
    order = family | dealt(classes_by_rank((row for row in rows if row not in family), orders), seed)
    made: dict[str, dict[int, str] | None] = {}
    for name, large, labels in (("diptera_family", family, families), ("insect_order", order, orders)):
        if large:
            made[f"large_{name}"] = large
            made[f"medium_{name}"] = water_filled(large, labels, medium)
            made[f"small_{name}"] = water_filled(large, labels, small)
    return {
        name: [roles.get(row, NO_SPLIT) for row in rows] for name, roles in made.items() if roles is not None
    }


@st.composite
def labelled(draw: st.DrawFn) -> pl.DataFrame:
    """Orders and families of a few to some hundred specimens, with a long tail, ties and holes."""
    counts = draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 10, 25, 26, 60]), min_size=1, max_size=9))
    names = [
        "Diptera",
        "Diptera",
        "Coleoptera",
        "Hemiptera",
        "Diptera",
        None,
        "Diptera",
        "Psocodea",
        "Diptera",
    ]
    families = ["Aidae", "Bidae", "Cidae", None, "Didae", "Eidae", None, "Aidae", "Fidae"]
    rows = [
        (order, family)
        for count, order, family in zip(counts, names, families, strict=False)
        for _ in range(count)
    ]
    draw(st.randoms(use_true_random=False)).shuffle(rows)
    return pl.DataFrame(rows, schema={"order": pl.String, "family": pl.String}, orient="row")


# -- against the paper's program


@pytest.mark.parametrize(("seed", "medium", "small"), [(1, 1000, 500), (7, 900, 200)])
def test_the_papers_program_gives_the_same_roles_in_every_cell(
    shared: Path, seed: int, medium: int, small: int
) -> None:
    frame = read_metadata(shared / "data/bioscan_records/bioscan1m_draft_metadata.tsv")
    golden = read_golden(shared, seed)
    splits = make_splits(frame, seed=seed, medium=medium, small=small)
    made = pl.concat([frame.select("sampleid"), splits.roles], how="horizontal")
    assert splits.skipped == {}
    assert made.select(golden.columns).equals(golden)


def test_an_overshoot_larger_than_the_most_populous_class_empties_that_class_only(shared: Path) -> None:
    golden = read_golden(shared, 7)  # the edge case that the golden file holds on purpose
    assert golden.filter(pl.col("small_diptera_family") == "validation").height == 23  # not 20
    # by hand: ten classes of one; budget 8 asks for 5 in train, one cycle takes 10, the class pays 1 of 5
    rows = [("Coleoptera", 100)] + [(f"Order{i}", 3) for i in range(9)]
    labels = pl.DataFrame(
        {"order": [name for name, n in rows for _ in range(n)], "family": None},
        schema={"order": pl.String, "family": pl.String},
    )
    splits = make_splits(labels, medium=8, small=8, experiments=["small_insect_order"])
    counted = role_counts(labels["order"], splits.roles["small_insect_order"])
    assert counted["train"].sum() == 9
    assert counted.filter(pl.col("taxon") == "Coleoptera").height == 0


def test_an_overshoot_between_once_and_twice_that_class_empties_it_too() -> None:
    # ten classes of 4 / 1 / 1; budget 25 asks for 17 in train: two cycles take 20; the class holds 2
    names = [f"Order{i}" for i in range(10) for _ in range(6)]
    frame = pl.DataFrame({"order": names, "family": pl.Series([None] * 60, dtype=pl.String)})
    splits = make_splits(frame, medium=25, small=10, experiments=["medium_insect_order"])
    counted = role_counts(frame["order"], splits.roles["medium_insect_order"])
    assert sorted(counted["train"].to_list()) == [2] * 9
    assert "Order0" not in counted.filter(pl.col("train") > 0)["taxon"]


def read_golden(shared: Path, seed: int) -> pl.DataFrame:
    path = shared / f"golden/paper_split_seed{seed}.tsv"
    return pl.read_csv(path, separator="\t", infer_schema=False)


def published_labels() -> pl.DataFrame:
    """Labels of 1,128,313 specimens with the published counts; classes of one count in the table's order."""
    counts = pl.read_csv(COUNTS, separator="\t")
    families = counts.filter(pl.col("rank") == "family").select(
        pl.lit("Diptera").alias("order"), pl.col("taxon").alias("family"), "images"
    )
    others = counts.filter((pl.col("rank") == "order") & (pl.col("taxon") != "Diptera")).select(
        pl.col("taxon").alias("order"), pl.lit(None, pl.String).alias("family"), "images"
    )
    schema = {"order": pl.String, "family": pl.String, "images": pl.Int64}
    rest = pl.DataFrame(  # 4,986 flies outside the 40 families; five specimens of orders too small to split
        [("Diptera", None, 4986), ("Odonata", None, 2), ("Strepsiptera", None, 2), ("Zoraptera", None, 1)],
        schema=schema,
        orient="row",
    )
    table = pl.concat([families, others, rest])
    return table.select(pl.exclude("images").repeat_by("images")).explode("order", "family")


def test_the_published_sizes_of_all_six_experiments_follow_from_the_class_counts() -> None:
    labels = published_labels()
    assert labels.height == 1_128_313
    splits = make_splits(labels)
    assert splits.skipped == {}
    expected = pl.read_csv(COUNTS, separator="\t")
    for experiment in EXPERIMENTS.values():
        counted = role_counts(labels[experiment.rank], splits.roles[experiment.name])
        of_rank = expected.filter(pl.col("rank") == experiment.rank)
        table = of_rank.select("taxon", *(pl.col(f"{experiment.size}_{r}").alias(r) for r in ROLES))
        assert dict_of(counted) == dict_of(table), experiment.name
    totals = {
        name: [int((roles == r).sum()) for r in ROLES] for name, roles in splits.roles.to_dict().items()
    }
    assert totals == {
        "large_diptera_family": [623_937, 89_135, 178_266],
        "medium_diptera_family": [140_000, 20_000, 40_000],
        "small_diptera_family": [35_000, 5_000, 10_000],
        "large_insect_order": [789_813, 112_835, 225_660],
        "medium_insect_order": [140_000, 20_000, 40_000],
        "small_insect_order": [35_000, 5_000, 10_000],
    }


def dict_of(table: pl.DataFrame) -> dict[str, tuple[int, ...]]:
    return {taxon: tuple(counts) for taxon, *counts in table.select("taxon", *ROLES).iter_rows()}


# -- against the slow second way


@settings(max_examples=60, deadline=None)
@given(
    frame=labelled(),
    seed=st.integers(0, 50),
    families=st.integers(1, 5),
    budgets=st.lists(st.integers(10, 150), min_size=2, max_size=2).map(sorted),
)
def test_a_slow_second_implementation_gives_the_same_roles(
    frame: pl.DataFrame, seed: int, families: int, budgets: list[int]
) -> None:
    small, medium = budgets
    splits = make_splits(frame, seed=seed, families=families, medium=medium, small=small)
    slow = slow_splits(frame["order"].to_list(), frame["family"].to_list(), seed, families, medium, small)
    assert {name: splits.roles[name].to_list() for name in splits.roles.columns} == slow
    assert {*splits.skipped} == {*EXPERIMENTS} - {*slow}


# -- laws


@settings(max_examples=40, deadline=None)
@given(
    frame=labelled(), seed=st.integers(0, 50), budgets=st.lists(st.integers(10, 90), min_size=2, max_size=2)
)
def test_roles_nest_never_change_between_sizes_and_repeat_by_seed(
    frame: pl.DataFrame, seed: int, budgets: list[int]
) -> None:
    small, medium = sorted(budgets)
    splits = make_splits(frame, seed=seed, families=3, medium=medium, small=small)
    assert make_splits(frame, seed=seed, families=3, medium=medium, small=small).roles.equals(splits.roles)
    for rank, suffix in (("family", "diptera_family"), ("order", "insect_order")):
        made = {
            s: splits.roles.get_column(f"{s}_{suffix}", default=None) for s in ("large", "medium", "small")
        }
        if made["large"] is None:
            continue
        table = pl.DataFrame({"taxon": frame[rank], **{k: v for k, v in made.items() if v is not None}})
        for size in {"medium", "small"} & {*table.columns}:
            inside = table.filter(pl.col(size) != NO_SPLIT)
            assert (inside[size] == inside["large"]).all()
        if "medium" in table.columns and "small" in table.columns:
            # the most populous class of a role pays for each size's overshoot, so it alone may not nest
            for role in ROLES:
                of_role = table.filter(pl.col("large") == role)
                first = (
                    of_role.group_by("taxon", maintain_order=True)
                    .len()
                    .sort("len", descending=True, maintain_order=True)["taxon"][0]
                )
                others = of_role.filter(pl.col("taxon") != first)
                assert (others.filter(pl.col("small") == role)["medium"] == role).all()


@settings(max_examples=40, deadline=None)
@given(frame=labelled(), seed=st.integers(0, 50))
def test_every_class_of_three_or_more_is_dealt_out_whole(frame: pl.DataFrame, seed: int) -> None:
    splits = make_splits(frame, seed=seed, families=40)
    if "large_diptera_family" not in splits.roles.columns:
        return
    flies = frame.with_columns(role=splits.roles["large_diptera_family"]).filter(
        (pl.col("order") == "Diptera") & pl.col("family").is_not_null()
    )
    for _, members in flies.group_by("family"):
        counts = tuple(int((members["role"] == role).sum()) for role in ROLES)
        assert counts == class_sizes(members.height)
        assert sum(counts) == (members.height if members.height >= 3 else 0)


@settings(max_examples=40, deadline=None)
@given(frame=labelled(), seed=st.integers(0, 50), shuffle=st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_who_is_in_a_large_split_but_not_how_many_of_each_class(
    frame: pl.DataFrame, seed: int, shuffle: random.Random
) -> None:
    moved = frame[shuffle.sample(range(frame.height), frame.height)]
    for name in ("large_diptera_family", "large_insect_order"):
        counts = []
        for table in (frame, moved):
            roles = make_splits(table, seed=seed, families=40).roles
            if name in roles.columns:
                counts.append(dict_of(role_counts(table[EXPERIMENTS[name].rank], roles[name])))
        assert len(counts) in (0, 2)
        assert counts[:1] == counts[1:]


def test_a_rare_class_that_is_added_at_the_end_moves_nobody() -> None:
    frame = pl.DataFrame({"order": ["Coleoptera"] * 30 + ["Psocodea"] * 8, "family": [None] * 38})
    more = pl.concat([frame, pl.DataFrame({"order": ["Zoraptera"] * 4, "family": [None] * 4})])
    before = make_splits(frame, seed=3).roles["large_insect_order"]
    after = make_splits(more, seed=3).roles["large_insect_order"]
    assert after[:38].equals(before)
    assert sorted(after[38:].to_list()) == ["test", "train", "train", "validation"]


@pytest.mark.parametrize(
    ("n", "sizes"),
    [
        (1, (0, 0, 0)),
        (2, (0, 0, 0)),
        (3, (1, 1, 1)),
        (5, (3, 1, 1)),
        (6, (4, 1, 1)),  # Embioptera
        (15, (10, 2, 3)),  # 10.5 -> 10 and 1.5 -> 2: half to even; nothing is over
        (25, (18, 2, 5)),  # 17.5 -> 18, 2.5 -> 2, 5
        (45, (32, 4, 9)),  # 31.5 -> 32, 4.5 -> 4, 9
        (96, (67, 10, 19)),  # Ephemeroptera
    ],
)
def test_class_sizes_round_half_to_even_and_train_takes_the_rest(n: int, sizes: tuple[int, ...]) -> None:
    assert class_sizes(n) == sizes


def test_a_class_with_three_specimens_reaches_every_split() -> None:
    frame = pl.DataFrame({"order": ["Embioptera"] * 3 + ["Zoraptera"] * 2, "family": [None] * 5})
    roles = make_splits(frame).roles["large_insect_order"]
    assert sorted(roles.to_list()) == ["no_split", "no_split", "test", "train", "validation"]


def test_flies_outside_the_chosen_families_are_split_as_one_class_of_the_order_task() -> None:
    frame = pl.DataFrame({"order": ["Diptera"] * 30, "family": ["Aidae"] * 20 + ["Bidae"] * 6 + [None] * 4})
    roles = make_splits(frame, families=1).roles
    assert (roles["large_diptera_family"][20:] == NO_SPLIT).all()
    assert roles["large_insect_order"][:20].equals(roles["large_diptera_family"][:20])
    rest = roles["large_insect_order"][20:]
    assert [int((rest == role).sum()) for role in ROLES] == list(class_sizes(10))


# -- the hash


def test_the_hash_is_that_of_the_sorted_lines_and_does_not_see_the_order_of_rows() -> None:
    keys = pl.Series(["b", "a", "c", "d"])
    roles = pl.Series(["test", "train", "no_split", None])
    expected = hashlib.sha256(b"a\ttrain\nb\ttest\n").hexdigest()
    assert split_hash(keys, roles) == expected
    assert split_hash(keys.reverse(), roles.reverse()) == expected
    assert split_hash(keys, pl.Series(["train", "test", None, None])) != expected
    assert split_hash(keys, pl.Series([NO_SPLIT] * 4)) == hashlib.sha256(b"").hexdigest()


# -- what cannot be made

FRAME = pl.DataFrame({"order": ["Coleoptera"] * 10, "family": ["Aidae"] * 10})


def test_an_experiment_that_the_data_cannot_fill_is_left_out_with_both_numbers() -> None:
    splits = make_splits(FRAME, medium=10, small=5)
    assert splits.roles.columns == ["large_insect_order", "medium_insect_order", "small_insect_order"]
    assert {*splits.skipped} == {f"{size}_diptera_family" for size in ("large", "medium", "small")}
    splits = make_splits(FRAME, medium=11, small=5)  # int(0.7 * 11) = 7 fit; int(0.2 * 11) = 2 fit
    assert "medium_insect_order" in splits.roles.columns
    splits = make_splits(FRAME, medium=2000, small=5)
    assert splits.skipped["medium_insect_order"] == (
        "2,000 specimens ask for 1,400 in train, the large split has 7"
    )


def test_a_named_experiment_that_cannot_be_made_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"medium_insect_order: 2,000 specimens ask for 1,400 in train"):
        make_splits(FRAME, medium=2000, experiments=["medium_insect_order"])
    with pytest.raises(RequestError, match="large_diptera_family: no family has the three specimens"):
        make_splits(FRAME, experiments=["large_diptera_family"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"families": 0}, "families is 0; at least 1 is needed"),
        ({"medium": -1}, "medium is -1"),
        ({"medium": 10, "small": 20}, "small is 20 and medium 10; small must not be larger"),
        ({"experiments": ["large_insect_orders"]}, "did you mean 'large_insect_order'"),
    ],
)
def test_a_wrong_request_is_named(arguments: dict[str, int | list[str]], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        make_splits(FRAME, **arguments)  # type: ignore[arg-type]


def test_a_table_without_order_or_without_any_label_or_row_is_said_to_be_one() -> None:
    with pytest.raises(RequestError, match="the split needs column 'order'"):
        make_splits(FRAME.drop("order"))
    unlabelled = pl.DataFrame({"order": [None] * 4, "family": [None] * 4})
    assert {*make_splits(unlabelled).skipped} == {*EXPERIMENTS}
    assert {*make_splits(FRAME.clear()).skipped} == {*EXPERIMENTS}


def test_many_classes_are_kept_apart() -> None:
    # more classes than a 16-bit number holds
    names = [f"Order{i}" for i in range(40_000) for _ in range(3)]
    frame = pl.DataFrame({"order": names, "family": pl.Series([None] * len(names), dtype=pl.String)})
    counted = role_counts(frame["order"], make_splits(frame).roles["large_insect_order"])
    assert counted.select(*ROLES).unique().rows() == [(1, 1, 1)]
