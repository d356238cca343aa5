"""Groups of specimens, and cuts that keep them whole."""

from hashlib import blake2b

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan.analysis.groups import LEAST, cut, groups_of, too_few
from bioscan.errors import RequestError


def plates(number: int, wells: int = 4) -> list[str]:
    return [f"BIOUG{plate:05d}-{'ABCD'[well]}01" for plate in range(number) for well in range(wells)]


def test_a_plate_is_what_stands_before_the_well() -> None:
    frame = pl.DataFrame({"sampleid": ["BIOUG68001-C12", "BIOUG68001-A01", "BIOUG-2-H9", "MP-17", None]})
    groups, by = groups_of(frame, "plate")
    # MP-17 has no well, the last one no id: each is a group of its own
    assert groups.to_list() == ["BIOUG68001", "BIOUG68001", "BIOUG-2", "MP-17", "4"]
    assert by == "plate"


def test_specimens_without_a_bin_are_groups_of_their_own() -> None:
    frame = pl.DataFrame({"key": ["a", "b", "c", "d"], "uri": ["BOLD:AAA0001", None, "BOLD:AAA0001", None]})
    assert groups_of(frame, "bin")[0].to_list() == ["BOLD:AAA0001", "b", "BOLD:AAA0001", "d"]
    assert groups_of(frame, "none")[0].to_list() == ["a", "b", "c", "d"]


def test_any_column_groups_whatever_its_type() -> None:
    frame = pl.DataFrame({"image_file": ["a.jpg", "b.jpg", "c.jpg"], "trap": [3, None, 3]})
    groups, by = groups_of(frame, "trap")
    assert (groups.to_list(), by) == (["3", "b.jpg", "3"], "trap")


def test_a_column_that_is_not_there_is_told_with_the_nearest() -> None:
    frame = pl.DataFrame({"sampleid": ["a"], "trap": [1]})
    with pytest.raises(RequestError, match="no column 'trp' to group specimens by; did you mean 'trap'"):
        groups_of(frame, "trp")
    with pytest.raises(RequestError, match="no column 'uri'"):
        groups_of(frame, "bin")
    with pytest.raises(RequestError, match="key, sampleid, image_file"):
        groups_of(frame.select("trap"), "trap")


@pytest.mark.parametrize(
    ("frame", "by"),
    [
        (pl.DataFrame({"sampleid": plates(2 * LEAST)}), "plate"),
        (pl.DataFrame({"key": plates(2 * LEAST)}), "plate"),
        # nine in ten have a plate, then fewer
        (pl.DataFrame({"sampleid": [*plates(27, 1), "x", "y", "z"]}), "plate"),
        (pl.DataFrame({"sampleid": [*plates(27, 1), "x", "y", "z", "w"]}), "none"),
        # too few plates for a cut: BINs, else nothing
        (pl.DataFrame({"sampleid": plates(5), "uri": [f"B{i}" for i in range(20)]}), "bin"),
        (pl.DataFrame({"sampleid": plates(5), "uri": [f"B{i % 7}" for i in range(20)]}), "none"),
        (pl.DataFrame({"sampleid": plates(5), "uri": pl.Series([None] * 20, dtype=pl.String)}), "none"),
        (pl.DataFrame({"sampleid": []}, {"sampleid": pl.String}), "none"),
    ],
)
def test_what_specimens_are_grouped_by_follows_from_what_they_have(frame: pl.DataFrame, by: str) -> None:
    groups, found = groups_of(frame)
    assert found == by
    assert groups.equals(groups_of(frame, by)[0])


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.text(max_size=3), min_size=1, max_size=60),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_a_group_is_on_one_side_whatever_else_there_is(names: list[str], share: float, seed: int) -> None:
    groups = pl.Series(names, dtype=pl.String)
    second_N = cut(groups, share, seed)
    alone_N = [bool(cut(pl.Series([name]), share, seed)[0]) for name in names]
    assert second_N.tolist() == alone_N
    assert cut(groups.reverse(), share, seed).tolist() == alone_N[::-1]
    assert not cut(groups, 0, seed).any()


def test_the_share_is_one_of_groups_and_the_seed_makes_another_cut() -> None:
    groups = pl.Series([f"plate {n}" for n in range(20_000)])
    for share in (0.1, 0.5, 0.8):
        # within four standard deviations of the binomial
        wide = 4 * np.sqrt(share * (1 - share) / groups.len())
        assert abs(cut(groups, share).mean() - share) < wide
    both = cut(groups, 0.5, 1) & cut(groups, 0.5, 2)
    assert abs(both.mean() - 0.25) < 0.02


def test_the_cut_is_by_a_hash_that_is_the_same_on_every_machine() -> None:
    names = [f"BIOUG{n:05d}" for n in range(40)]
    for seed in (0, 3):
        digests = [blake2b(f"{seed}\0group {name}".encode(), digest_size=8).digest() for name in names]
        drawn = [int.from_bytes(digest, "little") / 2**64 for digest in digests]
        assert cut(pl.Series(names), 0.5, seed).tolist() == [value < 0.5 for value in drawn]


def test_each_part_needs_groups_not_specimens() -> None:
    names = [f"g{n}" for n in range(2 * LEAST)]
    half = np.arange(2 * LEAST) < LEAST
    assert not too_few(pl.Series(names), half)
    assert too_few(pl.Series(names), np.arange(2 * LEAST) < LEAST - 1)
    assert too_few(pl.Series(["one"] * 500 + names), np.arange(500 + 2 * LEAST) < 500)
    assert too_few(pl.Series([], dtype=pl.String), np.zeros(0, bool))
