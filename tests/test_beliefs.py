"""Three sentences that must be true whatever the numbers are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan.app.beliefs import beliefs
from bioscan.data.predictions import PredictionsWriter
from bioscan.jobs.evaluate import Evaluation, evaluate
from bioscan.jobs.evaluate_hierarchy import evaluate_hierarchy

TAXA = ("Diptera", "Coleoptera", "Hymenoptera")


def evaluated(
    truth: Sequence[str],
    named: Sequence[str | None],
    probability: Sequence[float | None] | None = None,
    *,
    roles: Sequence[str] | None = None,
) -> Evaluation:
    """Of specimens given one by one; with roles, those of the test count."""
    keys = [f"s{i}" for i in range(len(truth))]
    table = {"sampleid": keys, "order": pl.Series(named, dtype=pl.String)}
    if probability is not None:
        table["order_probability"] = pl.Series(probability, dtype=pl.Float64)
    catalogue = pl.DataFrame({"sampleid": keys, "order": truth, **({"split": roles} if roles else {})})
    return evaluate(pl.DataFrame(table), catalogue, experiment="split" if roles else None, rank="order")


def drawn(n: int, said: float, right: float) -> Evaluation:
    """n specimens of two taxa, all named with probability `said`, a share `right` of them rightly."""
    truth = [TAXA[i % 2] for i in range(n)]
    wrong = {TAXA[0]: TAXA[1], TAXA[1]: TAXA[0]}
    named = [t if i < round(right * n) else wrong[t] for i, t in enumerate(truth)]
    return evaluated(truth, named, [said] * n)


def test_the_first_sentence_says_how_often_and_how_sure_that_is() -> None:
    first = beliefs(drawn(200, 0.9, 0.9))[0]
    # Wilson at 180 of 200: 85.1 to 93.4 %; each taxon 90 of 100
    assert first.startswith(
        "Of 200 specimens, 90.0 % got the right name at rank order (85.1–93.4 % with 95 % confidence)"
    )
    assert "with each of the 2 taxa counting alike, rare as common, it is 90.0 %" in first


def test_few_specimens_are_called_few_and_get_no_decimals() -> None:
    first = beliefs(evaluated(["Diptera", "Diptera", "Coleoptera"], ["Diptera"] * 3))[0]
    # Wilson at 2 of 3: 20.8 to 93.9 %
    assert first.startswith("Only 3 specimens were checked: 67 % got the right name at rank order (21–94 %")
    alone = beliefs(evaluated(["Diptera"], ["Diptera"]))[0]
    assert alone.startswith("Only 1 specimen was checked: 100 %")
    assert alone.endswith("they are all of one taxon, so that nothing shows how well taxa are told apart.")


@pytest.mark.parametrize(
    ("said", "right", "expected"),
    [
        (0.9, 0.9, "can be taken at their word: they are off by 0.0 percentage points"),
        (0.9, 0.7, "promise too much: they say 90.0 % on average where 70.0 % are right"),
        (0.6, 0.9, "are too modest: they say 60.0 % on average where 90.0 % are right"),
    ],
)
def test_the_second_sentence_holds_the_probabilities_against_the_truth(
    said: float, right: float, expected: str
) -> None:
    assert f"The probabilities {expected}" in beliefs(drawn(400, said, right))[1]


def test_probabilities_that_are_right_on_average_only_are_told_from_right_ones() -> None:
    """Half the answers say 0.6 and are right in 0.9, half the other way round: 0.75 said, 0.75 right."""
    truth = ["Diptera", "Coleoptera"] * 200
    right = [i % 10 < (9 if i < 200 else 6) for i in range(400)]
    named = [t if r else "Hymenoptera" for t, r in zip(truth, right, strict=True)]
    second = beliefs(evaluated(truth, named, [0.6] * 200 + [0.9] * 200))[1]
    assert "right on average but not one by one: they are off by 30.0 percentage points" in second


def test_an_error_that_chance_makes_is_not_held_against_the_probabilities() -> None:
    """20 specimens at 0.8 of which 15 are right: off by 5 points, where one in six draws is further off."""
    assert "about what chance makes of so few specimens" in beliefs(drawn(20, 0.8, 0.75))[1]


def test_answers_without_probabilities_are_said_to_have_none() -> None:
    assert "came without probabilities" in beliefs(evaluated(["Diptera"] * 3, ["Diptera"] * 3))[1]
    failed = evaluated(["Diptera"] * 2, [None, None], [None, None])
    assert "came without probabilities" in beliefs(failed)[1]


def test_what_is_kept_at_five_per_cent_wrong() -> None:
    truth = ["Diptera", "Coleoptera"] * 50
    named = [t if i < 80 else "Hymenoptera" for i, t in enumerate(truth)]  # the 20 least sure are wrong
    probability = [0.99 - 0.009 * i for i in range(100)]
    # 80 right and 4 wrong of the surest 84: 4.8 %; with 5 wrong of 85 it is 5.9 %
    assert (
        "of the surest 84.0 % (a probability of 0.243 or more) no more than 5 % are wrong here"
        in beliefs(evaluated(truth, named, probability))[1]
    )
    assert beliefs(evaluated(truth, truth, probability))[1].endswith(
        "all answers kept, no more than 5 % are wrong."
    )
    assert beliefs(evaluated(truth, ["Hymenoptera"] * 100, probability))[1].endswith(
        "however few of the surest answers are kept, more than 5 % of them are wrong."
    )


def test_a_handful_of_sure_answers_among_many_is_called_little() -> None:
    truth = ["Diptera", "Coleoptera"] * 200
    named = [t if i == 0 else "Hymenoptera" for i, t in enumerate(truth)]
    second = beliefs(evaluated(truth, named, [0.99 - 0.001 * i for i in range(400)]))[1]
    assert second.endswith("less than 1 % of the answers, the surest, keep to no more than 5 % wrong.")


def test_the_third_sentence_names_what_is_not_known() -> None:
    truth = ["Diptera"] * 150 + ["Coleoptera"] * 12
    roles = ["train"] * 120 + ["test"] * 30 + ["train"] * 8 + ["test"] * 4
    named = ["Diptera"] * 158 + ["Coleoptera", "Diptera", "Diptera", "Hymenoptera"]
    third = beliefs(evaluated(truth, named, roles=roles))[2]
    assert third.startswith("All of this holds for specimens like these")
    assert (
        "taxa with few training specimens are named right in 25 % of cases, those with many in 100 %" in third
    )
    assert "1 of the 2 taxa has fewer than 5 specimens here" in third
    assert "1 more taxon that it may answer was not tested" in third


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        # of 40 that can be checked 30 keep the species, 3 of them wrong: 8 % of all, 10 % of the named
        (
            {"max_error": 0.1},
            "75 % keep a name at rank species; 8 % of all get a wrong one, which is 10 % of ",
        ),
        ({"max_error": 0.1}, "the named (asked: at most 10 % of all)."),
        # Wilson at 3 of 40: 2.6 to 19.9 %
        ({"max_error": 0.02}, "(asked: at most 2 % of all, which these specimens do not keep)."),
        (
            {"min_precision": 0.8},
            "75 % keep a name at rank species, 10 % of them a wrong one (asked: at least 80 %",
        ),
    ],
)
def test_where_answers_stop_the_sentence_says_what_is_left_and_what_was_asked(
    record: dict[str, float], expected: str, tmp_path: Path
) -> None:
    keys, names = [f"s{i:02d}" for i in range(40)], ["Aus bus" if i % 2 else "Aus cus" for i in range(40)]
    other = {"Aus bus": "Aus cus", "Aus cus": "Aus bus"}
    named = [other[name] if i < 3 else name for i, name in enumerate(names)]
    stops = [i >= 30 for i in range(40)]
    table = pl.DataFrame({"sampleid": keys, "genus": "Aus", "species": named}).with_columns(
        image_file=pl.lit(None, pl.String),
        genus_probability=pl.lit(1.0),
        species_probability=pl.lit(0.9),
        assigned_rank=pl.Series(["genus" if stop else "species" for stop in stops]),
        assigned_taxon=pl.Series(["Aus" if stop else n for stop, n in zip(stops, named, strict=True)]),
        assigned_probability=pl.lit(0.9),
        error=pl.lit(None, pl.String),
    )
    place = tmp_path / "p.parquet"
    with PredictionsWriter(place, ranks=["genus", "species"], leaves=None, record=record) as writer:
        writer.write(table)
    catalogue = pl.DataFrame({"sampleid": keys, "genus": "Aus", "species": names})
    second = beliefs(evaluate(place, catalogue), evaluate_hierarchy(place, catalogue))[1]
    assert expected in second


def test_answers_that_never_reach_the_rank_are_said_to_stop_above_it(tmp_path: Path) -> None:
    keys = ["a", "b"]
    table = pl.DataFrame({"sampleid": keys, "genus": "Aus", "species": "Aus bus"}).with_columns(
        image_file=pl.lit(None, pl.String),
        genus_probability=pl.lit(1.0),
        species_probability=pl.lit(0.9),
        assigned_rank=pl.lit("genus"),
        assigned_taxon=pl.lit("Aus"),
        assigned_probability=pl.lit(1.0),
        error=pl.lit(None, pl.String),
    )
    place = tmp_path / "p.parquet"
    ranks = ["genus", "species"]
    with PredictionsWriter(place, ranks=ranks, leaves=None, record={"max_error": 0.05}) as writer:
        writer.write(table)
    catalogue = pl.DataFrame({"sampleid": keys, "genus": "Aus", "species": ["Aus bus", "Aus cus"]})
    second = beliefs(evaluate(place, catalogue), evaluate_hierarchy(place, catalogue))[1]
    assert second.endswith(
        "as asked, answers stop where they are unsure, and none goes down to rank species."
    )


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_there_are_always_three_sentences_and_none_says_nan(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    truth = generator.choice(TAXA[: data.draw(st.integers(1, 3))], n).tolist()
    named = [None if x < 0.1 else str(generator.choice(TAXA)) for x in generator.random(n)]
    if not any(named):
        named[0] = "Diptera"
    probability = [None if name is None else float(generator.random()) for name in named]
    for given_ in (probability, None):
        made = beliefs(evaluated(truth, named, given_))
        assert len(made) == 3
        for sentence in made:
            assert sentence[0].isupper()
            assert sentence.endswith(".")
            assert "nan" not in sentence
            assert ".." not in sentence
