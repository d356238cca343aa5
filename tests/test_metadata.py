"""Metadata in and out: what was read comes back cell for cell, and what is wrong is named with its place."""

import csv
import hashlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan.data import metadata
from bioscan.data.metadata import (
    export_metadata,
    fingerprint,
    import_metadata,
    key_of,
    read_footer,
    read_metadata,
    scan_metadata,
    write_catalogue,
)
from bioscan.errors import BioscanError, DataError, RequestError
from bioscan.vocabulary import COLUMNS, EXPERIMENTS, MISSING, NO_SPLIT, ROLE_ALIASES, ROLES

HEADER = "sampleid\timage_file\tchunk_number\tfamily\tsmall_insect_order\tauthor"
ROWS = (
    "a\ta.jpg\t1\tMuscidae\ttrain\tMe",
    "b\tb.jpg\t\tnot_classified\tval\tMe",
    "c\tc.jpg\t3\tno_data\tvalidation\tMe",
)
TSV = "\n".join((HEADER, *ROWS)) + "\n"
CSV = 'sampleid,chunk_number,author\na,1,"two\nlines"\n'


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def round_trip(source: Path, folder: Path) -> bytes:
    catalogue, back = folder / "catalogue.parquet", folder / f"back{source.suffix}"
    import_metadata(source, catalogue)
    export_metadata(catalogue, back)
    return back.read_bytes()


# -- there and back


@pytest.mark.parametrize(
    "name",
    [
        "insects/metadata.tsv",
        "barcodes/bold_insect_coi.tsv",
        "bioscan1m_orders/orders.tsv",
        "bioscan_records/aacta_metadata.tsv",
        "bioscan_records/bioscan1m_draft_metadata.tsv",
        "bioscan_records/bioscan5m_25_records_no_sequence.tsv",
    ],
)
def test_a_real_tsv_comes_back_byte_for_byte(shared: Path, tmp_path: Path, name: str) -> None:
    source = shared / "data" / name
    assert round_trip(source, tmp_path) == source.read_bytes()


def test_a_real_tsv_goes_through_json_ld_and_comes_back(shared: Path, tmp_path: Path) -> None:
    source = shared / "data/bioscan_records/aacta_metadata.tsv"
    export_metadata(source, tmp_path / "a.jsonld")
    text = io.StringIO(source.read_text(encoding="utf-8"), newline="")
    rows = list(csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert json.loads((tmp_path / "a.jsonld").read_text(encoding="utf-8")) == rows
    export_metadata(tmp_path / "a.jsonld", tmp_path / "b.tsv")
    assert (tmp_path / "b.tsv").read_bytes() == source.read_bytes()


def test_missing_markers_and_role_names_may_be_mixed_in_one_file(tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", TSV)
    assert round_trip(source, tmp_path) == TSV.encode()
    frame = read_metadata(source)
    assert frame["family"].to_list() == ["Muscidae", None, None]
    assert frame["small_insect_order"].to_list() == ["train", "validation", "validation"]
    assert frame["chunk_number"].to_list() == [1, None, 3]
    assert frame["chunk_number"].dtype == pl.Int64


@pytest.mark.parametrize(
    "content",
    [
        TSV.replace("\n", "\r\n").encode(),
        TSV[:-1].encode(),
        b"\xef\xbb\xbf" + TSV.encode(),
        b"\xef\xbb\xbf" + TSV.replace("\n", "\r\n").encode(),
    ],
    ids=["CRLF", "no last line break", "BOM", "BOM and CRLF"],
)
def test_line_ends_and_byte_order_marks_are_not_part_of_the_cells(tmp_path: Path, content: bytes) -> None:
    source = write(tmp_path / "a.tsv", content)
    assert round_trip(source, tmp_path) == TSV.encode()


def test_a_quote_in_a_tsv_is_a_letter_like_any_other(tmp_path: Path) -> None:
    text = 'sampleid\tfamily\tauthor\na\t"Musc\t5" lens\nb\t"x"\t"\n'
    assert round_trip(write(tmp_path / "a.tsv", text), tmp_path) == text.encode()


def test_columns_that_we_use_while_reading_may_be_in_the_file(tmp_path: Path) -> None:
    text = "sampleid\trow\tlast is empty\tfamily value\tliteral\tfamily\na\tA\t\tx\ty\tMuscidae\n"
    source = write(tmp_path / "a.tsv", text)
    assert round_trip(source, tmp_path) == text.encode()
    assert read_metadata(source)["family value"].to_list() == ["x"]


def test_columns_of_other_schemas_get_our_names_and_theirs_back(tmp_path: Path) -> None:
    text = "processid\tsampleid\tdna_bin\tdna_barcode\tdepth\np1\ts1\tBOLD:AAA0001\tACGT\t3.0\n"
    source = write(tmp_path / "a.tsv", text)
    assert round_trip(source, tmp_path) == text.encode()
    assert read_metadata(source).columns == ["processid", "sampleid", "uri", "nucraw", "depth"]


def test_roles_made_later_are_written_by_their_full_names(tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", TSV)
    import_metadata(source, tmp_path / "a.parquet")
    made = pl.scan_parquet(tmp_path / "a.parquet").with_columns(small_insect_order=pl.lit("validation"))
    footer = read_footer(tmp_path / "a.parquet") | {"split": {"experiments": {"small_insect_order": {}}}}
    write_catalogue(made, tmp_path / "b.parquet", footer=footer)
    export_metadata(tmp_path / "b.parquet", tmp_path / "b.tsv")
    assert "\tval\t" not in (tmp_path / "b.tsv").read_text()


def test_each_column_can_hold_its_forms_in_two_bits() -> None:
    # and all of them in one unsigned number of 64 bits
    assert all(len(metadata._forms(column)) <= 4 for column in COLUMNS)
    assert 2 * len(COLUMNS) <= 64


letters = st.text(st.characters(exclude_characters="\t\r\n", exclude_categories=["Cs"]), max_size=8)
roles = st.sampled_from([*ROLES, NO_SPLIT, *ROLE_ALIASES, *MISSING])


def cells(column: str, text: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    if column in EXPERIMENTS:
        return roles
    if column == "chunk_number":
        return st.integers(0, 10**12).map(str) | st.sampled_from(MISSING)
    return text | st.sampled_from(MISSING)


@st.composite
def tables(draw: st.DrawFn, text: st.SearchStrategy[str] = letters) -> list[dict[str, str]]:
    """Some columns, ours and others, the key somewhere among them, with rows."""
    others = st.lists(st.sampled_from(["depth", "row", "x value", "dna_bin", "a, b", 'q"q']), unique=True)
    columns = draw(st.lists(st.sampled_from(COLUMNS[1:]), unique=True, max_size=8)) + draw(others)
    if {"uri", "dna_bin"} <= {*columns}:
        columns.remove("dna_bin")
    columns = draw(st.permutations([*columns, "sampleid"]))
    keys = draw(
        st.lists(st.text("abcÄ 漢-\"',", min_size=1, max_size=6), min_size=1, max_size=6, unique=True)
    )
    return [
        {c: key if c == "sampleid" else draw(cells(c, text)) for c in columns}
        for key in keys
        if key not in MISSING
    ]


@settings(max_examples=30, deadline=None)
@given(tables())
def test_any_tsv_comes_back_byte_for_byte(rows: list[dict[str, str]]) -> None:
    lines = [[*rows[0]], *([*row.values()] for row in rows)]
    content = "".join("\t".join(line) + "\n" for line in lines).encode()
    if content.startswith(b"\xef\xbb\xbf"):
        return
    with tempfile.TemporaryDirectory() as folder:
        assert round_trip(write(Path(folder, "a.tsv"), content), Path(folder)) == content


whole_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=30, deadline=None)
@given(tables(whole_text))
def test_any_json_ld_comes_back_record_for_record(rows: list[dict[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder, "a.jsonld"), json.dumps(rows))
        assert json.loads(round_trip(source, Path(folder))) == rows


@settings(max_examples=30, deadline=None)
@given(tables(whole_text.filter(lambda text: "\r" not in text and "\0" not in text)))
def test_any_csv_comes_back_cell_for_cell(rows: list[dict[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with tempfile.TemporaryDirectory() as folder:
        back = round_trip(write(Path(folder, "a.csv"), text.getvalue()), Path(folder))
    assert list(csv.DictReader(io.StringIO(back.decode(), newline=""))) == rows


def test_a_json_ld_is_written_as_the_published_one_is(tmp_path: Path) -> None:
    rows = [{"sampleid": "ä", "family": "not_classified"}, {"sampleid": "b", "family": 'x"\t'}]
    text = json.dumps(rows, indent=4, ensure_ascii=False) + "\n"
    assert round_trip(write(tmp_path / "a.jsonld", text), tmp_path) == text.encode()


def test_null_and_absent_cells_of_json_are_missing(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.json",
        '[{"sampleid": "a", "family": null, "chunk_number": 7}, {"sampleid": "b", "chunk_number": "8"}]',
    )
    assert read_metadata(source).rows() == [("a", None, 7), ("b", None, 8)]


# -- the catalogue


def test_the_footer_says_what_was_read(tmp_path: Path) -> None:
    text = (
        "sampleid\tdna_bin\tcopyright_license\tlarge_insect_order\na\t\tCC BY\tval\nb\tBOLD:AAA0001\tCC0\t\n"
    )
    source = write(tmp_path / "a.tsv", text)
    footer = import_metadata(source, tmp_path / "a.parquet")
    assert footer == read_footer(tmp_path / "a.parquet")
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert footer == {
        "source": "a.tsv",
        "sha256": digest,
        "rows": 2,
        "key": "sampleid",
        "columns": [
            ["sampleid", "sampleid"],
            ["dna_bin", "uri"],
            ["copyright_license", "copyright_license"],
            ["large_insect_order", "large_insect_order"],
        ],
        "missing": {"sampleid": 0, "uri": 1, "copyright_license": 0, "large_insect_order": 1},
        "licences": ["CC BY", "CC0"],
        "roles_renamed": {"val": "validation"},
        "last_line_ends": True,
    }
    assert fingerprint(tmp_path / "a.parquet") == fingerprint(source) == digest


def test_a_catalogue_reads_like_its_source_whole_and_by_column(shared: Path, tmp_path: Path) -> None:
    source = shared / "data/insects/metadata.tsv"
    import_metadata(source, tmp_path / "a.parquet")
    whole = read_metadata(source)
    assert whole.equals(read_metadata(tmp_path / "a.parquet"))
    some = ["chunk_number", "order"]
    assert whole.select(some).equals(read_metadata(source, some))
    assert whole.select(some).equals(scan_metadata(tmp_path / "a.parquet", some).collect())


def test_a_file_without_sample_ids_is_keyed_by_its_image_files(tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", "image_file\tfamily\nx.jpg\tMuscidae\n")
    assert import_metadata(source, tmp_path / "a.parquet")["key"] == "image_file"
    assert read_metadata(tmp_path / "a.parquet")["key"].to_list() == ["image_file"]
    export_metadata(tmp_path / "a.parquet", tmp_path / "b.tsv")
    assert (tmp_path / "b.tsv").read_bytes() == source.read_bytes()
    assert key_of(["x", "image_file"]) == "image_file"
    with pytest.raises(DataError, match="neither column sampleid nor image_file"):
        key_of(["x"])


def test_duplicate_keys_pass_only_when_asked_for(tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", TSV + ROWS[0] + "\n")
    with pytest.raises(DataError, match=r"one sampleid occurs more than once: a \(lines 2, 5\)"):
        read_metadata(source)
    assert read_metadata(source, allow_duplicates=True).height == 4


def test_a_table_with_a_bad_key_makes_no_catalogue(tmp_path: Path) -> None:
    target = tmp_path / "a.parquet"
    with pytest.raises(DataError, match="1 rows have no sampleid"):
        write_catalogue(pl.DataFrame({"sampleid": ["a", None]}), target)
    with pytest.raises(DataError, match=r"more than once: a \(records 1, 2\)"):
        write_catalogue(pl.DataFrame({"sampleid": ["a", "a"]}), target)
    with pytest.raises(DataError, match="no key"):
        write_catalogue(pl.DataFrame({"family": ["a"]}), target)
    assert list(tmp_path.iterdir()) == []


# -- what is wrong, and where

BAD: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("a.tsv", "", "a.tsv: the file is empty"),
    "header only": ("a.tsv", HEADER + "\n", "a.tsv: no rows below the first line"),
    "first line empty": ("a.tsv", "\n" + TSV, "a.tsv: line 1 has no column names"),
    "no key": ("a.tsv", "id\tfamily\nx\ty\n", "no key column: expected sampleid (or image_file)"),
    "key in other letters": ("a.tsv", "SampleID\tfamily\nx\ty\n", "did you mean 'SampleID'?"),
    "same column twice": ("a.tsv", "sampleid\turi\tdna_bin\nx\ty\tz\n", "columns uri and dna_bin mean the"),
    "our own column": ("a.tsv", "sampleid\tkey\nx\ty\n", "column name 'key' is ours"),
    "commas in a TSV": ("a.tsv", TSV.replace("\t", ","), "line 1: columns are separated by commas"),
    "semicolons in a CSV": ("a.csv", TSV.replace("\t", ";"), "line 1: columns are separated by semicolons"),
    "tabs in a CSV": ("a.csv", TSV, "line 1: columns are separated by tabs"),
    "old line ends": ("a.tsv", TSV.replace("\n", "\r"), "lines end in a carriage return alone"),
    "duplicates": (
        "a.tsv",
        "\n".join((HEADER, *ROWS * 4)),
        "3 values of sampleid occur more than once: a (lines 2, 5, 8, …); b (lines 3, 6, 9, …); c (",
    ),
    "duplicates in a CSV": ("a.csv", CSV + "b,2,x\na,3,x\n", "more than once: a (lines 2, 5)"),
    "no sample id": ("a.tsv", TSV.replace("\nb\t", "\n\t"), "line 3: sampleid is empty"),
    "text for a number": (
        "a.tsv",
        TSV.replace("\t3\t", "\tx\t"),
        "line 4: chunk_number is 'x', expected a whole number",
    ),
    "decimal number": ("a.tsv", TSV.replace("\t3\t", "\t3.0\t"), "line 4: chunk_number is '3.0'"),
    "leading zero": ("a.tsv", TSV.replace("\t3\t", "\t03\t"), "line 4: chunk_number is '03'"),
    "negative number": ("a.tsv", TSV.replace("\t3\t", "\t-3\t"), "line 4: chunk_number is '-3'"),
    "number beyond 64 bits": (
        "a.tsv",
        TSV.replace("\t3\t", f"\t{10**20}\t"),
        "line 4: chunk_number is '1000",
    ),
    "number after a cell of two lines": ("a.csv", CSV + "b,x,c\n", "line 4: chunk_number is 'x'"),
    "unknown role": (
        "a.tsv",
        TSV.replace("\tval\t", "\tvalid\t"),
        "line 3: small_insect_order is 'valid', expected one of train, validation, test, no_split",
    ),
    "several bad cells": ("a.tsv", TSV.replace("\t3\t", "\tx\t").replace("\t1\t", "\ty\t"), "2 such cells"),
    "cut within a line": ("a.tsv", TSV[:-16], "line 4: 4 cells where the first line has 6; is the file cut"),
    "cut within the key": ("a.tsv", f"{HEADER}\nbb", "line 2: 1 cells where the first line has 6; is the"),
    "empty line": ("a.tsv", TSV + "\n", "line 5: 1 cells where the first line has 6"),
    "a cell too many": ("a.tsv", TSV.replace("\tval\t", "\tval\t\t"), "line 3: 7 cells where the first line"),
    "a cell too many in a CSV": ("a.csv", CSV + "b,1,c,d\n", "line 4: 4 cells where the first line has 3"),
    "a cell too few in a CSV": ("a.csv", CSV + "b,1\n", "line 4: 2 cells where the first line has 3"),
    "a quote that does not end": ("a.csv", CSV + 'b,1,"c\n', "could not parse"),
    "Latin-1": (
        "a.tsv",
        TSV.replace("no_data", "é").encode("latin-1"),
        "line 4: not UTF-8 text (byte 0xe9 at place 11)",
    ),
    "Latin-1 in the first line": ("a.tsv", TSV.replace("author", "é").encode("latin-1"), "line 1: not UTF-8"),
    "UTF-16": ("a.tsv", TSV.encode("utf-16"), "line 1: not UTF-8 text"),
    "no JSON": ("a.jsonld", "", "not valid JSON"),
    "JSON cut within a record": ("a.jsonld", '[{"sampleid": "a"}, {"samp', "after record 1: not valid JSON"),
    "JSON cut after a record": ("a.jsonld", '[{"sampleid": "a"},', "after record 1: not valid JSON"),
    "more than JSON": ("a.jsonld", '[{"sampleid": "a"}] x', "after record 1: not valid JSON"),
    "JSON in Latin-1": ("a.jsonld", '[{"sampleid": "é"}]'.encode("latin-1"), "not valid JSON"),
    "no list": ("a.jsonld", '{"@graph": []}', "expected a list of records"),
    "list of numbers": ("a.jsonld", "[1]", "record 1: expected an object of cells"),
    "a number that is no text": ("a.jsonld", '[{"sampleid": "a", "x": 1.5}]', "record 1: x is 1.5, expected"),
    "truth value": ("a.jsonld", '[{"sampleid": "a", "x": true}]', "record 1: x is True, expected text"),
    "record in a record": ("a.jsonld", '[{"sampleid": "a", "x": {}}]', "record 1: x is {}, expected text"),
    "column of one record": (
        "a.jsonld",
        '[{"sampleid": "a"}, {"sampleid": "b", "x": "1"}]',
        "record 2: column 'x' is not in the first record",
    ),
    "duplicates in JSON": ("a.jsonld", '[{"sampleid": "a"}, {"sampleid": "a"}]', "a (records 1, 2)"),
    "unknown form": ("a.xlsx", "x", "a.xlsx: unknown form of metadata file (known: .csv"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_its_place_and_nothing_is_written(tmp_path: Path, case: str) -> None:
    name, content, message = BAD[case]
    source = write(tmp_path / name, content)
    for work in (
        lambda: import_metadata(source, tmp_path / "out/a.parquet"),
        lambda: read_metadata(source),
    ):
        with pytest.raises(BioscanError) as caught:
            work()
        assert message in str(caught.value)
        assert name in str(caught.value)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_the_first_of_many_bad_cells_is_found_in_a_long_file(tmp_path: Path) -> None:
    rows = [f"s{n}\t{'x' if n in (61_003, 64_000, 99_000) else n}\tAuthor" for n in range(100_000)]
    source = write(tmp_path / "a.tsv", "\n".join(["sampleid\tchunk_number\tauthor", *rows]) + "\n")
    with pytest.raises(DataError, match=r"line 61,005: chunk_number is 'x', .*; 3 such cells in all"):
        import_metadata(source, tmp_path / "a.parquet")


def test_a_file_cut_anywhere_is_refused_or_ends_in_its_last_cell(tmp_path: Path) -> None:
    text = TSV.encode()
    second = len(HEADER) + 1 + len(ROWS[0]) + 1
    for end in range(second + 1, len(text) - 1):
        source = write(tmp_path / "a.tsv", text[:end])
        last = text[:end].rsplit(b"\n", 1)[1]
        if last and last.count(b"\t") < 5:
            with pytest.raises(DataError, match="is the file cut short"):
                read_metadata(source)
        else:
            assert import_metadata(source, tmp_path / "a.parquet", overwrite=True)["last_line_ends"] == (
                not last
            )


def test_asking_for_what_is_not_there_names_what_is_near(tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", TSV)
    with pytest.raises(RequestError, match="no column 'famly'; did you mean 'family'"):
        read_metadata(source, ["famly"])
    with pytest.raises(RequestError, match=r"b\.tsv: no such file; did you mean 'a\.tsv'"):
        read_metadata(tmp_path / "b.tsv")
    import_metadata(source, tmp_path / "a.parquet")
    with pytest.raises(RequestError, match="no column 'famly'; did you mean 'family'"):
        read_metadata(tmp_path / "a.parquet", ["famly"])
    with pytest.raises(RequestError, match="no such file"):
        read_metadata(tmp_path / "b.parquet")


def test_a_catalogue_that_is_none_is_refused(tmp_path: Path) -> None:
    cut = write(tmp_path / "cut.parquet", b"PAR1 and no more")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_metadata(cut)
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_footer(cut)
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match="no catalogue"):
        read_metadata(tmp_path / "other.parquet")


def test_a_tsv_is_refused_where_a_cell_cannot_stand_in_it(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"sampleid": "a", "name": "two\nlines"}]
    source = write(tmp_path / "a.jsonld", json.dumps(rows))
    with pytest.raises(DataError, match="'name' holds a tab or line break"):
        export_metadata(source, tmp_path / "a.tsv")
    source = write(tmp_path / "a.jsonld", json.dumps([{"sampleid": "a", "na\tme": "x"}]))
    with pytest.raises(DataError, match=r"'na\\tme' holds a tab or line break"):
        export_metadata(source, tmp_path / "a.tsv")
    assert not (tmp_path / "a.tsv").exists()
