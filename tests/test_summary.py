import csv
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan.analysis.summary import (
    BIN,
    QUANTILES,
    TOTAL,
    Distribution,
    path_text,
    summarise,
    taxa_of_paths,
)
from bioscan.analysis.taxonomy import resolve_paths
from bioscan.data.metadata import read_metadata, write_catalogue
from bioscan.errors import RequestError
from bioscan.vocabulary import EXPERIMENTS, NO_SPLIT, RANKS, ROLES

Run = Callable[..., tuple[int, str, str]]


def specimens() -> pl.DataFrame:
    """Nine specimens: three orders, a genus name in two of them, a hole, plates A and B."""
    rows = [
        # order, family, subfamily, genus, BIN, barcode, sampleid, large_insect_order, small_insect_order
        ("Diptera", "Muscidae", "Muscinae", "Alpha", "BOLD:AAA0001", "ACGTN", "A-A01", "train", "train"),
        ("Diptera", "Muscidae", None, "Alpha", "BOLD:AAA0001", "ACGTN", "A-A02", "train", "no_split"),
        ("Diptera", "Muscidae", "Muscinae", None, "BOLD:AAA0001", "acgtn", "A-A03", "validation", "no_split"),
        ("Diptera", "Sciaridae", None, None, "BOLD:AAA0002", "AC-GT", "A-H12", "test", "test"),
        ("Diptera", None, None, None, None, None, "odd name", "train", "no_split"),
        ("Coleoptera", "Carabidae", None, "Alpha", "BOLD:AAA0003", "A" * 658, "B-A01", "train", None),
        ("Coleoptera", "Carabidae", None, "Alpha", "BOLD:AAA0003", "A" * 661, "B-A02", "test", "no_split"),
        ("Coleoptera", "Carabidae", None, "Beta", "BOLD:AAA0004", "ACGR", "B-A03", "validation", "no_split"),
        ("Odonata", None, None, None, None, None, "B-A04", "no_split", "no_split"),
    ]
    columns = ["order", "family", "subfamily", "genus", "uri", "nucraw", "sampleid"]
    return pl.DataFrame(rows, [*columns, "large_insect_order", "small_insect_order"], orient="row")


# -- worked by hand


def test_every_number_of_a_table_small_enough_to_count_by_hand() -> None:
    made = summarise(specimens())
    assert made.specimens == 9
    # Diptera 5, Coleoptera 3, Odonata 1: the middle one is 3
    assert made.rank("order") == {
        **{"rank": "order", "specimens": 9, "labelled": 9, "unlabelled": 0, "labelled_share": 1.0},
        **{"taxa": 3, "names": 3, "largest": 5, "largest_taxon": "Diptera", "smallest": 1},
        **{"smallest_taxon": "Odonata", "imbalance": 5.0, "median": 3.0, "singletons": 1},
        **{"many": 0, "medium": 0, "few": 3},
    }
    family = made.rank("family")
    assert (family["taxa"], family["labelled"], family["unlabelled"]) == (3, 7, 2)
    assert (family["labelled_share"], family["imbalance"], family["singletons"]) == (7 / 9, 3.0, 1)
    assert made.taxa_of("family").rows() == [
        ("family", "Carabidae", ";;Coleoptera;Carabidae", 3, 3 / 7, 3 / 9),
        ("family", "Muscidae", ";;Diptera;Muscidae", 3, 3 / 7, 3 / 9),
        ("family", "Sciaridae", ";;Diptera;Sciaridae", 1, 1 / 7, 1 / 9),
    ]
    assert made.absent["species"] == "no column 'species'"
    assert "genus" not in made.absent


def test_homonyms_are_counted_apart_and_a_hole_does_not_make_a_second_taxon() -> None:
    made = summarise(specimens())
    genus = made.rank("genus")
    assert (genus["taxa"], genus["names"], genus["labelled"]) == (3, 2, 5)
    assert made.taxa_of("genus").select("path", "specimens").rows() == [
        (";;Coleoptera;Carabidae;;;Alpha", 2),
        (";;Diptera;Muscidae;Muscinae;;Alpha", 2),  # with and without its subfamily
        (";;Coleoptera;Carabidae;;;Beta", 1),
    ]


def test_what_one_genus_tells_of_its_family_holds_for_the_other_genera_of_the_family() -> None:
    rows = [
        ("Diptera", None, "Alpha"),  # with the next: Xidae are Diptera
        (None, "Xidae", "Alpha"),
        (None, "Xidae", "Beta"),
        (None, "Xidae", "Gamma"),
    ]
    made = summarise(pl.DataFrame(rows, ["order", "family", "genus"], orient="row"))
    expected = [f";;Diptera;Xidae;;;{genus}" for genus in ("Alpha", "Beta", "Gamma")]
    assert made.taxa_of("genus")["path"].to_list() == expected
    assert made.rank("family")["taxa"] == made.rank("order")["taxa"] == 1


def test_bins_and_their_sizes() -> None:
    made = summarise(specimens())
    row = made.rank(BIN)
    assert (row["taxa"], row["labelled"], row["unlabelled"], row["singletons"]) == (4, 7, 2, 2)
    assert made.bins is not None
    assert made.bins.to_frame("specimens", "bins").rows() == [(1, 2), (2, 1), (3, 1)]
    assert (made.bins.size, made.bins.total, made.bins.mean, made.bins.quantile(0.5)) == (4, 7, 1.75, 1)


def test_barcodes_are_counted_as_they_stand() -> None:
    codes = summarise(specimens()).barcodes
    assert codes is not None
    assert (codes.present, codes.missing, codes.standard, codes.over) == (7, 2, 1, 1)
    assert (codes.with_n, codes.with_gap, codes.with_other) == (3, 1, 1)
    # five bases each, one N: three of 4 * 5 + 4 + 658 + 661 characters
    assert codes.n_share == 3 / (4 * 5 + 4 + 658 + 661)
    # ACGTN twice is one barcode; acgtn is written differently
    assert (codes.distinct, codes.shared, codes.commonest) == (6, 2, 2)
    assert codes.lengths.to_frame("length", "n").rows() == [(4, 1), (5, 4), (658, 1), (661, 1)]
    test = codes.roles.filter(experiment="large_insect_order", role="test").to_dicts()
    assert test == [
        {
            **{"experiment": "large_insect_order", "role": "test", "specimens": 2, "barcodes": 2},
            **{"min": 5, "lower_quartile": 5, "median": 5, "upper_quartile": 661, "max": 661},
        }
    ]


def test_plates_are_read_from_sample_ids_of_the_form_plate_well() -> None:
    plates = summarise(specimens()).plates
    assert plates is not None
    assert plates.to_frame("specimens", "plates").rows() == [(4, 2)]  # A and B; «odd name» has none


def test_roles_by_class_and_what_has_no_role_is_in_no_experiment() -> None:
    made = summarise(specimens())
    assert made.classes_of("large_insect_order").drop("experiment", "path").rows() == [
        ("Diptera", 3, 1, 1, 5, 5 / 8),
        ("Coleoptera", 1, 1, 1, 3, 3 / 8),
    ]
    assert made.classes_of("small_insect_order").drop("experiment", "path").rows() == [
        ("Diptera", 1, 0, 1, 2, 1.0)
    ]
    train = made.experiments.filter(experiment="large_insect_order", role="train", rank="family").to_dicts()
    assert [(r["specimens"], r["labelled"], r["unlabelled"], r["taxa"]) for r in train] == [(4, 3, 1, 2)]
    bins = made.experiments.filter(experiment="large_insect_order", rank=BIN).select("role", "taxa").rows()
    assert bins == [("train", 2), ("validation", 2), ("test", 2), (TOTAL, 4)]
    assert made.absent["large_diptera_family"] == "no column 'large_diptera_family'"


def test_classes_fall_into_many_medium_and_few_at_the_published_borders() -> None:
    counts = {"a": 19, "b": 20, "c": 100, "d": 101}
    frame = pl.DataFrame({"order": [name for name, n in counts.items() for _ in range(n)]})
    row = summarise(frame).rank("order")
    assert (row["few"], row["medium"], row["many"]) == (1, 2, 1)


# -- tables that lack something


@pytest.mark.parametrize("kept", [["image_file"], ["order"], ["uri"], ["nucraw"], ["large_insect_order"]])
def test_a_table_of_one_column_is_summarised_and_the_rest_is_said_to_be_absent(kept: list[str]) -> None:
    frame = specimens().with_columns(image_file=pl.col("sampleid") + ".jpg").select(kept)
    made = summarise(frame)
    assert made.specimens == 9
    columns = {*RANKS, *EXPERIMENTS, "uri"} - {*kept}
    assert {what for what, why in made.absent.items() if why == f"no column '{what}'"} == columns
    assert ("barcodes" in made.absent) == (kept != ["nucraw"])
    assert "plates" in made.absent
    assert json.loads(json.dumps(made.to_dict()))["specimens"] == 9


def test_a_table_without_rows_gives_zeros_and_nulls() -> None:
    made = summarise(specimens().clear())
    row = made.rank("order")
    assert (made.specimens, row["taxa"], row["labelled"], row["labelled_share"]) == (0, 0, 0, None)
    assert made.bins is not None
    assert (made.bins.size, made.bins.mean, made.bins.quantile(0.5)) == (0, None, None)
    assert made.plates is None
    assert made.taxa.is_empty()
    assert made.barcodes is not None
    assert made.barcodes.present == 0


def test_left_out_parts_are_named_and_unknown_ones_refused() -> None:
    made = summarise(specimens(), skip=["barcodes", "plates"])
    assert made.barcodes is None
    assert made.absent["plates"] == "left out"
    with pytest.raises(RequestError, match="unknown part 'barcode'; did you mean 'barcodes'"):
        summarise(specimens(), skip=["barcode"])


def test_asking_for_a_rank_that_the_table_has_not_names_those_that_it_has() -> None:
    with pytest.raises(RequestError, match="known: bin, family, genus, order, subfamily"):
        summarise(specimens()).rank("species")


def test_a_lazy_table_and_a_catalogue_give_the_same_numbers(tmp_path: Path) -> None:
    from bioscan.jobs.summary import summarise as summarise_file

    write_catalogue(specimens(), tmp_path / "c.parquet")
    expected = summarise(specimens()).to_dict()
    assert summarise(specimens().lazy()).to_dict() == expected
    assert summarise_file(tmp_path / "c.parquet").to_dict() == expected
    assert summarise_file(specimens()).to_dict() == expected


# -- real records, against plain loops


@pytest.mark.parametrize(
    "name",
    [
        "insects/metadata.tsv",
        "bioscan_records/aacta_metadata.tsv",
        "bioscan_records/bioscan1m_draft_metadata.tsv",
        "barcodes/bold_insect_coi.tsv",
    ],
)
def test_real_records_counted_by_loops_over_the_lines_of_the_file(shared: Path, name: str) -> None:
    path = shared / "data" / name
    made = summarise(read_metadata(path))
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    missing = ("", "not_classified")
    assert made.specimens == len(rows)
    for rank in RANKS:
        counts = Counter(row[rank] for row in rows if row[rank] not in missing)
        seen = made.rank(rank)
        assert seen["labelled"] == counts.total()
        assert seen["names"] == len(counts)
        by_name = made.taxa_of(rank).group_by("taxon").agg(pl.col("specimens").sum())
        assert dict(by_name.iter_rows()) == dict(counts)
    bins = Counter(row["uri"] for row in rows if row["uri"] not in missing)
    assert made.bins is not None
    assert dict(made.bins.to_frame("specimens", "bins").iter_rows()) == Counter(bins.values())
    barcodes = [row["nucraw"] for row in rows if row["nucraw"] not in missing]
    codes = made.barcodes
    assert codes is not None
    assert dict(codes.lengths.to_frame("length", "n").iter_rows()) == Counter(map(len, barcodes))
    assert codes.with_gap == sum("-" in b for b in barcodes)
    assert codes.with_n == sum("N" in b.upper() for b in barcodes)
    assert codes.with_other == sum(bool(set(b.upper()) - set("ACGTN-")) for b in barcodes)
    copies = Counter(barcodes)
    assert codes.distinct == len(copies)
    assert codes.shared == sum(n for n in copies.values() if n > 1)
    for experiment in EXPERIMENTS.values():
        roles = Counter((row[experiment.rank], row[experiment.name]) for row in rows)
        seen_roles = {
            (row["taxon"], role): row[role]
            for row in made.classes_of(experiment.name).to_dicts()
            for role in ROLES
            if row[role]
        }
        assert seen_roles == {key: n for key, n in roles.items() if key[1] in ROLES}


# -- laws

names = st.sampled_from([None, "a", "b", "c"])


@st.composite
def tables(draw: st.DrawFn) -> pl.DataFrame:
    """Random paths with holes and homonyms, BINs and roles."""
    ranks = draw(st.sampled_from([RANKS[:3], RANKS[2:6], RANKS]))
    roles = st.sampled_from([*ROLES, NO_SPLIT, None])
    columns = {**dict.fromkeys(ranks, names), "uri": names, "nucraw": names}
    columns |= dict.fromkeys(("large_insect_order", "small_diptera_family"), roles)
    rows = draw(st.lists(st.tuples(*columns.values()), min_size=1, max_size=25))
    return pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row")


@given(tables())
@settings(max_examples=150, deadline=None)
def test_taxa_worked_out_on_columns_are_those_of_the_taxonomy(frame: pl.DataFrame) -> None:
    ranks = [r for r in RANKS if r in frame.columns]
    aligned = frame.select(pl.col(r) if r in ranks else pl.lit(None, pl.String).alias(r) for r in RANKS)
    canonical = resolve_paths(aligned.unique().sort(RANKS).rows())
    found = taxa_of_paths(frame.select(ranks))
    for rank in ranks:
        place = RANKS.index(rank)
        expected = [
            path_text(canonical[row[: place + 1]]) if row[place] is not None else None
            for row in aligned.iter_rows()
        ]
        taxa = found[rank]
        assert [taxa.paths_K[c] if c >= 0 else None for c in taxa.codes_N] == expected


@given(tables(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_order_of_the_specimens_does_not_matter(frame: pl.DataFrame, random: Any) -> None:
    order = list(range(frame.height))
    random.shuffle(order)
    assert summarise(frame).to_dict() == summarise(frame[order]).to_dict()


@given(tables())
@settings(max_examples=50, deadline=None)
def test_totals_add_up(frame: pl.DataFrame) -> None:
    made = summarise(frame)
    for row in [*made.ranks.to_dicts(), *made.experiments.to_dicts()]:
        assert row["labelled"] + row["unlabelled"] == row["specimens"]
        assert row["many"] + row["medium"] + row["few"] == row["taxa"]
        assert row["singletons"] <= row["few"]
        assert row["names"] <= row["taxa"] <= row["labelled"]
        if row["taxa"]:
            assert row["imbalance"] == row["largest"] / row["smallest"] >= 1
            assert row["smallest"] <= row["median"] <= row["largest"]
    for rank in made.ranks["rank"]:
        if rank != BIN:
            assert made.taxa_of(rank)["specimens"].sum() == made.rank(rank)["labelled"]
            assert made.taxa_of(rank)["path"].n_unique() == made.rank(rank)["taxa"]
    for (_, rank), rows in made.experiments.group_by("experiment", "rank"):
        of = {row["role"]: row for row in rows.to_dicts()}
        for column in ("specimens", "labelled", "unlabelled"):
            assert sum(of[role][column] for role in ROLES) == of[TOTAL][column]
        assert max(of[role]["taxa"] for role in ROLES) <= of[TOTAL]["taxa"]
        assert of[TOTAL]["taxa"] <= made.rank(str(rank))["taxa"]
    classes = made.classes
    assert (classes.select(pl.sum_horizontal(ROLES)).to_series() == classes[TOTAL]).all()
    assert made.bins is not None
    assert made.bins.total == frame["uri"].count()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_a_distribution_knows_what_numpy_knows_of_the_numbers(numbers: list[int]) -> None:
    made = Distribution.of(np.array(numbers))
    assert (made.size, made.total) == (len(numbers), sum(numbers))
    assert made.mean == pytest.approx(np.mean(numbers))
    for share in (0.0, *QUANTILES, 1.0):
        assert made.quantile(share) == np.quantile(numbers, share, method="inverted_cdf")
    assert made.count(5, 9) == sum(5 <= n <= 9 for n in numbers)
    weighted = Distribution.of(np.array([1, 1, 4]), np.array([2, 3, 7]))
    assert weighted.to_frame("v", "n").rows() == [(1, 5), (4, 7)]


# -- the command


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    path = tmp_path / "metadata.tsv"
    frame = specimens().with_columns(pl.col("small_insect_order").fill_null(NO_SPLIT))
    frame.write_csv(path, separator="\t", null_value="not_classified")
    return path


def test_the_text_gives_each_number_with_what_it_is_of(run_bioscan: Run, metadata: Path) -> None:
    status, text, _ = run_bioscan("summary", metadata, "--rank", "genus", "--limit", "2")
    lines = text.splitlines()
    assert status == 0
    assert lines[0] == "metadata.tsv: 9 specimens"
    assert (
        "genus:     3 taxa of 2 names, 5 of 9 labelled (55.6 %), 1 singleton,"
        " imbalance 2.0 : 1 (Alpha 2 : Beta 1)"
    ) in lines
    assert "order:     3 taxa, 9 of 9 labelled (100.0 %), 1 singleton" in text
    assert "  … and 1 taxon more with 1 specimen" in lines
    # two taxa are called Alpha: the list says which is which
    assert "  ;;Coleoptera;Carabidae;;;Alpha              2       40.00%" in lines
    assert "large_insect_order: 8 of 9 specimens have a role, 2 classes at rank order" in lines
    assert any(line.split() == ["Diptera", "3", "1", "1", "5"] for line in lines)
    assert "barcodes: 7 of 9 specimens have one" in lines
    assert "plates: 2, which hold 8 of 9 specimens" in text
    assert "not counted: phylum, class, tribe, species, subspecies, large_diptera_family" in text


def test_json_holds_everything_with_a_schema_version(run_bioscan: Run, metadata: Path) -> None:
    status, text, _ = run_bioscan("summary", metadata, "--json")
    made = json.loads(text)
    assert status == 0
    assert made["schema_version"] == 1
    assert made["bins"]["histogram"] == [[1, 2], [2, 1], [3, 1]]
    expected = json.loads(json.dumps(summarise(read_metadata(metadata)).to_dict()))
    assert {key: made[key] for key in expected} == expected


def test_csv_files_hold_the_tables(run_bioscan: Run, metadata: Path, tmp_path: Path) -> None:
    status, _, _ = run_bioscan("summary", metadata, "--csv", tmp_path / "tables")
    assert status == 0
    made = summarise(read_metadata(metadata)).tables()
    assert {p.stem for p in (tmp_path / "tables").iterdir()} == set(made)
    for name, table in made.items():
        read = pl.read_csv(tmp_path / "tables" / f"{name}.csv", schema=table.schema)
        assert read.equals(table)
    ranks = pl.read_csv(tmp_path / "tables" / "ranks.csv")
    assert ranks["rank"].to_list() == ["order", "family", "subfamily", "genus", "bin"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "famly"], "unknown rank 'famly'; did you mean 'family'?"),
        (["--limit", "-1"], "--limit is -1; 0 lists all"),
        (["--skip", "plate"], "unknown part 'plate'; did you mean 'plates'?"),
        (["--images", "nowhere"], "say --figures FOLDER too"),
        (["--figures", "x", "--csv", "x"], "--figures and --csv are one folder"),
        (["--figures", "new", "--images", "nowhere"], "nowhere: no such image package"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_message_and_status_2(
    run_bioscan: Run,
    metadata: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, text, talk = run_bioscan("summary", metadata, *flags)
    assert (status, text) == (2, "")
    assert talk.startswith("bioscan summary: ")
    assert message in talk
    assert [p.name for p in tmp_path.iterdir()] == ["metadata.tsv"]


def test_nothing_that_exists_is_overwritten_unless_told(
    run_bioscan: Run, metadata: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tables"
    assert run_bioscan("summary", metadata, "--csv", folder)[0] == 0
    before = (folder / "ranks.csv").read_bytes()
    status, text, talk = run_bioscan("summary", metadata, "--csv", folder)
    assert (status, text) == (2, "")
    assert "exists; choose another name or pass --overwrite" in talk
    assert run_bioscan("summary", metadata, "--csv", folder, "--overwrite")[0] == 0
    assert (folder / "ranks.csv").read_bytes() == before


def test_the_same_input_prints_the_same_text(run_bioscan: Run, metadata: Path) -> None:
    assert run_bioscan("summary", metadata)[1] == run_bioscan("summary", metadata)[1]


def test_shares_are_numbers_between_0_and_1() -> None:
    made = summarise(specimens())
    for rank in ("order", "family", "genus"):
        assert math.isclose(made.taxa_of(rank)["share_of_labelled"].sum(), 1.0)
        assert math.isclose(made.taxa_of(rank)["share"].sum(), made.rank(rank)["labelled_share"])
