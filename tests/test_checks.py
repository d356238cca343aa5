"""Checks and mending steps on small tables whose faults are planted by hand."""

import random
from pathlib import Path

import polars as pl
import pytest
from Bio.Data import CodonTable
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan.analysis.checks import CHECKS, NEEDS, STEPS, check, mend
from bioscan.data.metadata import read_metadata
from bioscan.errors import RequestError
from bioscan.vocabulary import BIN_URI, GENETIC_CODE_5, PLACEHOLDER_PATTERN, RANKS, SAMPLE_ID

RANK_COLUMNS = ("order", "family", "subfamily", "genus", "species")
Row = tuple[str | None, ...]


def table(*rows: Row, **more: list[object]) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema=dict.fromkeys(RANK_COLUMNS, pl.String), orient="row")
    keys = pl.Series("sampleid", [f"BIOUG00001-A{i + 1:02}" for i in range(frame.height)], pl.String)
    return frame.insert_column(0, keys).with_columns(**{k: pl.Series(v) for k, v in more.items()})


def found(frame: pl.DataFrame, name: str) -> list[tuple[str, int, str]]:
    return check(frame, [name]).select("subject", "rows", "detail").rows()


# -- each check


def test_a_genus_in_two_families_of_one_order_is_a_parent_conflict() -> None:
    frame = table(
        ("Diptera", "Aidae", None, "Aus", None),
        ("Diptera", "Aidae", None, "Aus", None),
        ("Diptera", "Bidae", None, "Aus", None),
        ("Coleoptera", "Cidae", None, "Bus", None),
    )
    assert found(frame, "parent_conflicts") == [("Aus", 3, "genus in family Aidae 2, Bidae 1")]
    assert found(frame, "homonyms") == []


def test_a_genus_in_two_orders_and_a_name_at_two_ranks_are_homonyms() -> None:
    frame = table(
        ("Diptera", "Aidae", None, "Aus", None),
        ("Coleoptera", "Cidae", None, "Aus", None),
        ("Coleoptera", "Dus", None, "Dus", None),
    )
    assert found(frame, "parent_conflicts") == []
    assert found(frame, "homonyms") == [
        ("Aus", 2, "genus in order Coleoptera 1, Diptera 1"),
        ("Dus", 2, "at ranks family, genus"),
    ]


def test_ranks_left_out_above_a_known_one_are_holes() -> None:
    frame = table(
        ("Diptera", None, None, "Aus", None),
        ("Diptera", "Aidae", None, "Aus", "Aus bus"),
        ("Diptera", "Aidae", None, None, None),
    )
    text = "no name here, one at a deeper rank"
    assert found(frame, "holes") == [("subfamily", 2, text), ("family", 1, text)]


def test_a_species_needs_the_genus_that_its_name_says() -> None:
    frame = table(
        ("Diptera", "Aidae", None, None, "Aus bus"),
        ("Diptera", "Aidae", None, "Bus", "Aus bus"),
        ("Diptera", "Aidae", None, "Aus", "Aus bus"),
        ("Diptera", "Aidae", None, "Aus", "sp. 7"),  # an interim name says no genus
    )
    assert found(frame, "species_without_genus") == [
        ("Aus bus", 1, "genus is Bus"),
        ("Aus bus", 1, "genus missing"),
    ]


@pytest.mark.parametrize(
    ("name", "interim"),
    [
        ("Aus bus", False),
        ("Polygonia c-album", False),
        ("Dicranomyia (Dicranomyia) brevivena", False),  # a subgenus
        ("Bembidion genei illigeri", False),
        ("Apis", False),
        ("phyMalaise01 Malaise2939", True),
        ("Aus sp. 3JH", True),
        ("Aus cf. bus", True),
        ("Olixon nr testaceum", True),
        ("AlticinaeGEN", True),
        ("Metopina_group", True),
        ("aus bus", True),
    ],
)
def test_interim_names_are_told_from_names_of_the_codes(name: str, interim: bool) -> None:
    assert pl.Series([name]).str.contains(PLACEHOLDER_PATTERN).item() is interim


def test_half_of_the_real_species_strings_are_interim(shared: Path) -> None:
    frame = read_metadata(shared / "data/bioscan_records/bioscan1m_draft_metadata.tsv")
    species = frame["species"].drop_nulls()
    digits = species.str.contains(r"\d")
    interim = species.str.contains(PLACEHOLDER_PATTERN)
    assert digits.sum() / species.len() == pytest.approx(0.51, abs=0.02)
    assert (interim | ~digits).all()
    assert {*species.filter(interim & ~digits)} == {"Olixon cf. testaceum"}
    counted = check(frame, ["placeholder_names"]).filter(pl.col("detail") == "species")
    assert counted["rows"].sum() == interim.sum()


def test_real_names_of_published_barcodes_are_not_interim(shared: Path) -> None:
    frame = read_metadata(shared / "data/barcodes/bold_insect_coi.tsv", ["genus", "species"])
    names = pl.concat([frame["genus"], frame["species"]]).unique()
    flagged = names.filter(names.str.contains(PLACEHOLDER_PATTERN))
    assert flagged.to_list() == ["Ethmia Janzeni"]  # of 1,132 names; a capital where none belongs


def test_keys_and_images_that_occur_twice_are_found_within_their_part() -> None:
    frame = table(
        *[("Diptera", None, None, None, None)] * 4,
        processid=["P1", "P1", None, None],
        image_file=["1.jpg", "2.jpg", "2.jpg", "1.jpg"],
        chunk_number=[1, 1, 1, 2],
    ).with_columns(sampleid=pl.Series(["a", "a", "a", "b"]))
    assert found(frame, "duplicate_keys") == [
        ("a", 3, "sampleid"),
        ("2.jpg", 2, "image_file"),
        ("P1", 2, "processid"),
    ]


def test_one_barcode_for_two_families_is_found_past_padding_and_case() -> None:
    tail = "ACGT" * 170  # longer than 660: what comes later is not compared
    frame = table(
        ("Diptera", "Aidae", None, None, None),
        ("Diptera", "Bidae", None, None, None),
        ("Diptera", None, None, None, None),
        ("Diptera", "Aidae", None, None, None),
        ("Diptera", "Cidae", None, None, None),
        nucraw=["NNACGTT--", "acgtt", "ACGTT", tail[:660] + "A", tail[:660] + "C"],
        uri=["BOLD:AAA0001", "BOLD:AAA0001", None, "BOLD:AAA0002", "BOLD:AAA0002"],
    )
    assert found(frame, "shared_barcodes") == [
        ("ACGTT", 3, "family: Aidae / Bidae"),
        (tail[:40], 2, "family: Aidae / Cidae"),
    ]
    assert found(frame, "duplicate_barcodes") == []  # as given, each is another text
    twice = frame.with_columns(nucraw=pl.Series(["A", "A", "A", "C", "C"]))
    assert found(twice, "duplicate_barcodes") == [
        ("nucraw", 5, "2 barcodes of more than one specimen, the commonest of 3")
    ]


def test_a_bin_across_orders_and_families_is_found_and_a_long_list_is_cut() -> None:
    frame = table(
        *[("Diptera" if i else "Coleoptera", f"F{i}idae", None, None, None) for i in range(7)],
        uri=["BOLD:AAA0001"] * 7,
    )
    assert found(frame, "bins_across_taxa") == [
        (
            "BOLD:AAA0001",
            7,
            "order: Coleoptera / Diptera; family: F0idae / F1idae / F2idae / F3idae / F4idae / …",
        )
    ]


def test_identifiers_of_another_form_are_counted() -> None:
    frame = table(*[("Diptera", None, None, None, None)] * 3, uri=["BOLD:AAA0001", "BOLD:1", None])
    frame = frame.with_columns(sampleid=pl.Series(["BIOUG58326-C03", "051-HH1-2", "CCDB-35803-E02"]))
    assert found(frame, "odd_identifiers") == [
        ("sampleid", 1, "no plate and well in it, for example 051-HH1-2"),
        ("uri", 1, "not of the form BOLD:AAA0000, for example BOLD:1"),
    ]


def test_a_table_without_the_columns_of_a_check_has_no_finding() -> None:
    assert check(pl.DataFrame({"sampleid": ["BIOUG00001-A01"]})).is_empty()
    assert {*NEEDS} <= {*CHECKS}


def test_an_unknown_check_or_step_is_named_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="unknown check 'hols'; did you mean 'holes'"):
        check(table(), ["hols"])
    with pytest.raises(RequestError, match="unknown step 'fill_hole'; did you mean 'fill_holes'"):
        mend(table(), ["fill_hole"])
    with pytest.raises(RequestError, match="name at least one step of fill_genus"):
        mend(table(), [])


names = st.sampled_from(["Aus", "Bus", "Aus bus", "Aus sp. 1", None])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(*[names] * 5), min_size=1, max_size=12), shuffle=st.randoms(use_true_random=False)
)
def test_findings_do_not_depend_on_the_order_of_the_rows(rows: list[Row], shuffle: random.Random) -> None:
    barcodes = [str(row[0]) * 3 for row in rows]
    frame = table(*rows, nucraw=list(barcodes), uri=list(barcodes))
    moved = frame[shuffle.sample(range(frame.height), frame.height)]
    # the examples in odd_identifiers are the first ones met
    assert (
        check(frame, CHECKS.keys() - {"odd_identifiers"})
        .sort(pl.all())
        .equals(check(moved, CHECKS.keys() - {"odd_identifiers"}).sort(pl.all()))
    )


# -- each step


def test_the_genus_of_a_binomial_is_filled_in_and_counted() -> None:
    frame = table(
        ("Diptera", "Aidae", None, None, "Aus bus"),
        ("Diptera", "Aidae", None, None, "Aus sp. 1"),
        ("Diptera", "Aidae", None, "Bus", "Aus bus"),
    )
    mended, counts = mend(frame, ["fill_genus"])
    assert mended["genus"].to_list() == ["Aus", None, "Bus"]
    assert counts == {"fill_genus": 1}


def test_holes_are_filled_only_where_the_other_records_agree() -> None:
    frame = table(
        ("Diptera", "Aidae", "Ainae", "Aus", None),
        ("Diptera", "Aidae", None, "Aus", None),
        ("Diptera", "Bidae", "Binae", "Bus", None),
        ("Diptera", "Bidae", "Cinae", "Bus", None),
        ("Diptera", "Bidae", None, "Bus", None),
    )
    mended, counts = mend(frame, ["fill_holes"])
    assert mended["subfamily"].to_list() == ["Ainae", "Ainae", "Binae", "Cinae", None]
    assert counts == {"fill_holes": 1}
    assert mended.drop("subfamily").equals(frame.drop("subfamily"))


def test_the_parents_of_more_than_half_of_the_records_win_and_a_tie_stays() -> None:
    frame = table(
        *[("Diptera", "Aidae", "Ainae", "Aus", None)] * 2,
        ("Diptera", "Bidae", "Binae", "Aus", None),
        ("Diptera", "Cidae", None, "Cus", None),
        ("Diptera", "Didae", None, "Cus", None),
        ("Coleoptera", "Eidae", None, "Aus", None),  # a homonym, not a conflict
    )
    mended, counts = mend(frame, ["majority_parents"])
    assert mended["family"].to_list() == ["Aidae"] * 3 + ["Cidae", "Didae", "Eidae"]
    assert mended["subfamily"].to_list() == ["Ainae"] * 3 + [None] * 3
    assert counts == {"majority_parents": 1}  # one row, though two of its cells


def test_interim_names_become_missing_and_the_rows_stay() -> None:
    frame = table(
        ("Diptera", "Aidae", None, "ausMal01", "ausMal01 x2"), ("Diptera", "Aidae", None, "Aus", "Aus bus")
    )
    mended, counts = mend(frame, ["drop_placeholders"])
    assert mended.select("genus", "species").rows() == [(None, None), ("Aus", "Aus bus")]
    assert counts == {"drop_placeholders": 1}


def test_of_rows_with_one_key_the_first_stays() -> None:
    frame = table(("A", None, None, None, None), ("B", None, None, None, None), ("C", None, None, None, None))
    frame = frame.with_columns(sampleid=pl.Series(["x", "y", "x"]))
    mended, counts = mend(frame, ["drop_duplicate_keys"])
    assert mended["order"].to_list() == ["A", "B"]
    assert counts == {"drop_duplicate_keys": 1}


def test_a_hole_that_is_clear_only_after_another_was_filled_is_filled_too() -> None:
    frame = table(
        ("Aus", "Aus", "Bus", "Bus", "Aus"),
        ("Aus", None, "Bus", "Aus", "Aus"),  # fits the last row's subfamily as long as that has a hole
        ("Aus", "Bus", "Aus", "Aus", "Aus"),
        ("Bus", "Bus", "Bus", "Bus", "Aus"),
        (None, "Bus", "Bus", "Bus", "Aus"),
    )
    mended, counts = mend(frame, ["fill_holes"])
    assert mended["order"].to_list() == ["Aus"] * 3 + ["Bus"] * 2
    assert mended["family"].to_list() == ["Aus", "Aus", "Bus", "Bus", "Bus"]
    assert counts == {"fill_holes": 2}


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(*[names] * 5), min_size=1, max_size=10))
def test_steps_count_the_rows_that_they_change_and_the_safe_ones_end(rows: list[Row]) -> None:
    frame = table(*rows)
    for step in STEPS:
        once, counts = mend(frame, [step])
        if once.height == frame.height:
            differing = sum(a != b for a, b in zip(once.rows(), frame.rows(), strict=True))
            assert counts[step] == differing
        if step != "majority_parents":  # a winner may make a conflict at another rank
            assert mend(once, [step])[1][step] == 0


def test_steps_leave_a_table_without_their_columns_alone() -> None:
    bare = pl.DataFrame({"sampleid": ["a", "b"]})
    for step in STEPS:
        assert mend(bare, [step])[1] == {step: 0}


# -- the words of the field


def test_the_genetic_code_is_that_of_invertebrate_mitochondria() -> None:
    theirs = CodonTable.unambiguous_dna_by_id[5]
    ours = {codon: amino for codon, amino in GENETIC_CODE_5.items() if amino != "*"}
    assert ours == theirs.forward_table
    assert {c for c, amino in GENETIC_CODE_5.items() if amino == "*"} == {*theirs.stop_codons}


def test_plate_and_well_are_read_from_the_odd_sample_ids_too(shared: Path) -> None:
    match = SAMPLE_ID.match("BCS-OHWO-38435-H10")
    assert match is not None
    assert match.groupdict() == {"plate": "BCS-OHWO-38435", "well": "H10"}
    assert SAMPLE_ID.match("051-HH1-2") is None
    frame = read_metadata(shared / "data/bioscan_records/bioscan1m_draft_metadata.tsv", ["sampleid", "uri"])
    assert sum(SAMPLE_ID.match(s) is None for s in frame["sampleid"]) / frame.height < 0.001
    assert all(BIN_URI.match(u) for u in frame["uri"].drop_nulls())
    assert len(RANKS) == 9
