"""`bioscan split`, `check` and `mend` on real and made-up files, as a user runs them."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from bioscan.analysis.checks import CHECKS as TABLE_CHECKS
from bioscan.analysis.splits import split_hash
from bioscan.app.verbs.check import MEANINGS
from bioscan.data.metadata import read_footer, read_metadata
from bioscan.errors import DataError
from bioscan.jobs.check import CHECKS, STEPS, read_list
from bioscan.vocabulary import EXPERIMENTS

Run = Callable[..., tuple[int, str, str]]
LABELS = [("Coleoptera", "Aidae", 12), ("Diptera", "Bidae", 30), ("Diptera", "Cidae", 8), ("Psocodea", "", 4)]


@pytest.fixture
def tsv(tmp_path: Path) -> Path:
    """54 specimens whose missing cells are marked in every way there is, and a column of the user's own."""
    lines = ["sampleid\tdna_bin\torder\tfamily\tgenus\tspecies\tnucraw\tsmall_insect_order\tmy note"]
    missing = ["", "not_classified", "no_data"]
    for order, family, count in LABELS:
        for _ in range(count):
            n = len(lines)
            cells = [f"BIOUG{n:05}-A01", missing[n % 3], order, family or missing[n % 3]]
            cells += [missing[(n + 1) % 3], missing[(n + 2) % 3], missing[n % 3], "no_split", f"note {n % 2}"]
            lines.append("\t".join(cells))
    path = tmp_path / "metadata.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def cells(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


# -- split


@pytest.mark.parametrize(("seed", "medium", "small"), [(1, 1000, 500), (7, 900, 200)])
def test_the_command_makes_the_papers_split_and_changes_no_other_cell(
    shared: Path, tmp_path: Path, run_bioscan: Run, seed: int, medium: int, small: int
) -> None:
    source = shared / "data/bioscan_records/bioscan1m_draft_metadata.tsv"
    target = tmp_path / "split.tsv"
    status, out, _ = run_bioscan(
        "split", source, "--seed", seed, "--medium", medium, "--small", small, "-o", target
    )
    assert status == 0
    read = {"separator": "\t", "infer_schema": False, "quote_char": None}
    made, before = pl.read_csv(target, **read), pl.read_csv(source, **read)  # type: ignore[arg-type]
    golden = pl.read_csv(shared / f"golden/paper_split_seed{seed}.tsv", **read)  # type: ignore[arg-type]
    assert made.columns == before.columns
    assert made.select(golden.columns).equals(golden)
    assert made.drop(*EXPERIMENTS).equals(before.drop(*EXPERIMENTS))
    for name in EXPERIMENTS:
        assert split_hash(golden["sampleid"], golden[name])[:16] in out


@pytest.mark.parametrize("through_a_catalogue", [False, True])
@pytest.mark.parametrize("form", [".tsv", ".parquet"])
def test_every_other_cell_is_written_as_it_stood(
    tsv: Path, tmp_path: Path, run_bioscan: Run, form: str, through_a_catalogue: bool
) -> None:
    source = tsv
    if through_a_catalogue:
        source = tmp_path / "catalogue.parquet"
        assert run_bioscan("import", tsv, source)[0] == 0
    before = source.read_bytes()
    target = tmp_path / f"split{form}"
    arguments = ["split", source, "-o", target, "--medium", 30, "--small", 20]
    assert run_bioscan(*arguments)[0] == 0
    if form == ".parquet":
        assert run_bioscan("export", target, "-o", tmp_path / "split.tsv")[0] == 0
    old, new = cells(tsv), cells(tmp_path / "split.tsv")
    assert new[0][: len(old[0])] == old[0]
    assert {*new[0]} == {*old[0], *EXPERIMENTS}
    place = old[0].index("small_insect_order")
    for before_row, after_row in zip(old[1:], new[1:], strict=True):
        assert before_row[:place] == after_row[:place]
        assert before_row[place + 1] == after_row[place + 1]
    assert {row[place] for row in new[1:]} == {"train", "validation", "test", "no_split"}
    assert source.read_bytes() == before
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_json_and_the_footer_record_the_split_and_its_hash(
    tsv: Path, tmp_path: Path, run_bioscan: Run
) -> None:
    target = tmp_path / "split.parquet"
    status, out, _ = run_bioscan("split", tsv, "-o", target, "--medium", 30, "--small", 20, "--json")
    result = json.loads(out)
    assert (status, result["schema_version"], result["seed"], result["rule"]) == (0, 1, 1, "paper")
    frame = read_metadata(target)
    footer = read_footer(target)
    assert footer["split"]["settings"] == {
        "rule": "paper",
        "seed": 1,
        "families": 40,
        "medium": 30,
        "small": 20,
    }
    assert footer["source"] == "metadata.tsv"
    for name, made in result["experiments"].items():
        assert made["hash"] == split_hash(frame["sampleid"], frame[name])
        assert footer["split"]["experiments"][name] == made
        assert made["specimens"] == {r: int((frame[name] == r).sum()) for r in made["specimens"]}
    assert result["experiments"]["large_insect_order"]["classes"] == 3


def test_what_is_not_made_stays_as_it_was_and_is_said(tsv: Path, tmp_path: Path, run_bioscan: Run) -> None:
    target = tmp_path / "split.tsv"
    status, out, _ = run_bioscan("split", tsv, "-o", target)  # budgets of the release
    assert status == 0
    assert (
        "small_insect_order: not made, 50,000 specimens ask for 35,000 in train, the large split has" in out
    )
    assert "columns kept as they were: small_insect_order" in out
    new = cells(target)
    assert {row[new[0].index("small_insect_order")] for row in new[1:]} == {"no_split"}


def test_wrong_requests_end_in_one_line_and_no_file(tsv: Path, tmp_path: Path, run_bioscan: Run) -> None:
    bare = tmp_path / "bare.tsv"
    bare.write_text("sampleid\tfamily\na\tAidae\n", encoding="utf-8")
    unlabelled = tmp_path / "unlabelled.tsv"
    unlabelled.write_text("sampleid\torder\tfamily\na\t\t\nb\tnot_classified\t\n", encoding="utf-8")
    twice = tmp_path / "twice.tsv"
    twice.write_text("sampleid\torder\tfamily\na\tDiptera\t\na\tDiptera\t\n", encoding="utf-8")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    new = tmp_path / "new.tsv"
    for arguments, text in (
        ([bare, "-o", new], "bare.tsv has no column 'order', which a split needs"),
        ([unlabelled, "-o", new], "unlabelled.tsv: no experiment can be made: "),
        ([twice, "-o", new], "occurs more than once: a (lines 2, 3)"),
        ([tsv, "-o", tsv, "--overwrite"], "metadata.tsv is the input; name a new file"),
        ([tsv, "-o", bare], "bare.tsv exists; choose another name or pass --overwrite"),
        ([tsv, "-o", tmp_path / "new.xlsx"], "unknown form of output '.xlsx'"),
        ([tsv, "-o", bare / "in a file.tsv"], "bare.tsv"),
        ([tsv, "-o", new, "--families", 0], "families is 0; at least 1 is needed"),
        ([tsv, "-o", new, "--medium", 20, "--small", 30], "small must not be larger"),
        ([tsv, "-o", new, "--experiment", "medium_insect_order"], "the large split has"),
        ([tsv, "-o", new, "--experiment", "medum_insect_order"], "did you mean 'medium_insect_order'"),
        ([tmp_path / "metadat.tsv", "-o", new], "no such file; did you mean 'metadata.tsv'"),
    ):
        status, out, err = run_bioscan("split", *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1), arguments
        assert err.startswith("bioscan split: ")
        assert text in err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# -- check


def test_findings_are_grouped_with_what_to_do_and_what_was_in_order(
    shared: Path, tmp_path: Path, run_bioscan: Run
) -> None:
    source = shared / "data/bioscan_records/bioscan1m_draft_metadata.tsv"
    status, out, _ = run_bioscan("check", source, "--limit", 1, "-o", tmp_path / "findings.csv")
    assert status == 0
    assert out.startswith("5,109 records\n")
    assert "holes: 3 findings. Ranks without a name although a deeper rank has one.\n" in out
    assert "  tribe    1,487  no name here, one at a deeper rank\n  … and 2 more\n" in out
    assert "`bioscan mend --step drop_placeholders` makes them missing; the rows stay." in out
    assert "shared_barcodes: nothing to look at, column nucraw is absent or empty" in out
    assert "nothing found: duplicate_keys, parent_conflicts, homonyms, bins_across_taxa" in out
    findings = pl.read_csv(tmp_path / "findings.csv")
    holes = findings.filter(pl.col("check") == "holes")
    assert holes["rows"].to_list() == [1487, 250, 1]
    result = json.loads(run_bioscan("check", source, "--json")[1])
    assert result["rows"] == 5109
    assert len(result["findings"]) == findings.height
    assert result["no_data"] == {"duplicate_barcodes": "nucraw", "shared_barcodes": "nucraw"}


def test_every_check_is_explained_and_every_step_that_it_advises_exists() -> None:
    assert {*MEANINGS} == {*CHECKS}
    assert {*TABLE_CHECKS} < {*CHECKS}
    advised = [word.strip("`,") for _, text in MEANINGS.values() for word in text.split() if "_" in word]
    assert {word for word in advised if not word.startswith("--")} <= {*STEPS}


def test_missing_and_surplus_pictures_are_counted_and_dropped(
    tsv: Path, tmp_path: Path, run_bioscan: Run
) -> None:
    package = tmp_path / "images"
    for part, names in (("part1", ["1.jpg", "2.jpg"]), ("part2", ["2.jpg", "9.jpg"])):
        (package / part).mkdir(parents=True)
        for name in names:
            (package / part / name).write_bytes(b"\xff\xd8\xff\xd9")
    rows = ["a\t1.jpg\t1", "b\t2.jpg\t1", "c\t3.jpg\t1", "d\t\t", "e\t2.jpg\t2"]
    table = tmp_path / "pictures.tsv"
    table.write_text("sampleid\timage_file\tchunk_number\n" + "\n".join(rows) + "\n", encoding="utf-8")
    status, out, _ = run_bioscan("check", table, "--images", package, "--only", "images")
    assert status == 0
    assert "missing from the package     1  for example 3.jpg" in out
    assert "in no row                    1  for example " in out
    assert "9.jpg" in out
    mended = tmp_path / "mended.parquet"
    arguments = ["--images", package, "--step", "drop_missing_images", "-o", mended]
    assert run_bioscan("mend", table, *arguments)[0] == 0
    assert read_metadata(mended)["sampleid"].to_list() == ["a", "b", "e"]


def write_xlsx(path: Path, rows: list[list[str]]) -> None:
    """A workbook of one sheet with inline texts: the least that the format asks for."""
    body = "".join(
        "<row>" + "".join(f'<c t="inlineStr"><is><t>{cell}</t></is></c>' for cell in row) + "</row>"
        for row in rows
    )
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    sheet_type = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    files = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{sheet_type}.sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{sheet_type}.worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{office}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets>'
        '<sheet name="list" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{office}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{body}</sheetData></worksheet>',
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, f'<?xml version="1.0" encoding="UTF-8"?>{text}')


@pytest.mark.parametrize("form", [".txt", ".csv", ".tsv", ".xlsx"])
@pytest.mark.parametrize("header", [[], ["Sample ID"]])
def test_a_list_of_poor_images_is_read_from_any_form(tmp_path: Path, form: str, header: list[str]) -> None:
    path = tmp_path / f"list{form}"
    ids = ["BIOUG00001-A01", " BIOUG00003-A01 ", ""]
    if form == ".xlsx":
        write_xlsx(path, [[cell] for cell in [*header, *ids]])
    else:
        path.write_text("\n".join([*header, *ids]) + "\n", encoding="utf-8")
    assert read_list(path) == ["BIOUG00001-A01", "BIOUG00003-A01"]


def test_the_column_sampleid_of_a_list_is_taken_wherever_it_stands(tmp_path: Path) -> None:
    write_xlsx(tmp_path / "list.xlsx", [["reason", "sampleid"], ["blurred", "x"], ["empty", "y"]])
    assert read_list(tmp_path / "list.xlsx") == ["x", "y"]


def test_poor_images_are_found_and_dropped(tsv: Path, tmp_path: Path, run_bioscan: Run) -> None:
    poor = tmp_path / "BIOSCAN_1M_low_quality_images.xlsx"
    write_xlsx(poor, [["sampleid"], ["BIOUG00002-A01"], ["BIOUG00003-A01"], ["not in the table"]])
    out = run_bioscan("check", tsv, "--low-quality", poor)[1]
    assert "on the list     2  for example BIOUG00002-A01, BIOUG00003-A01" in out
    target = tmp_path / "mended.parquet"
    arguments = ["--low-quality", poor, "--step", "drop_low_quality", "-o", target]
    assert "drop_low_quality             2" in run_bioscan("mend", tsv, *arguments)[1]
    assert read_metadata(target).height == 52


def test_a_broken_list_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "list.xlsx").write_text("no workbook", encoding="utf-8")
    (tmp_path / "empty.csv").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="not an Excel workbook"):
        read_list(tmp_path / "list.xlsx")
    with pytest.raises(DataError, match="the list is empty"):
        read_list(tmp_path / "empty.csv")


# -- mend


@pytest.mark.parametrize("through_a_catalogue", [False, True])
def test_mending_changes_only_what_it_says(
    tsv: Path, tmp_path: Path, run_bioscan: Run, through_a_catalogue: bool
) -> None:
    lines = tsv.read_text(encoding="utf-8").splitlines()
    for number, genus, species in ((3, "no_data", "Aus bus"), (4, "", "Aus Mal7"), (5, "Aus", "Aus cus")):
        row = lines[number].split("\t")
        row[4:6] = genus, species
        lines[number] = "\t".join(row)
    tsv.write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = tsv
    if through_a_catalogue:
        source = tmp_path / "catalogue.parquet"
        assert run_bioscan("import", tsv, source)[0] == 0
    target = tmp_path / "mended.parquet"
    status, out, _ = run_bioscan("mend", source, "-o", target, "--step", "fill_genus", "drop_placeholders")
    assert status == 0
    assert [line.split() for line in out.splitlines()[1:3]] == [
        ["fill_genus", "1"],
        ["drop_placeholders", "1"],
    ]
    assert run_bioscan("export", target, "-o", tmp_path / "mended.tsv")[0] == 0
    before, after = cells(tsv), cells(tmp_path / "mended.tsv")
    before[3][4] = "Aus"
    before[4][5] = "not_classified"
    assert after == before
    assert read_footer(target)["mended"] == [["fill_genus", 1], ["drop_placeholders", 1]]
    again = tmp_path / "again.parquet"
    assert run_bioscan("mend", target, "-o", again, "--step", "fill_holes")[0] == 0
    assert read_footer(again)["mended"] == [["fill_genus", 1], ["drop_placeholders", 1], ["fill_holes", 0]]
    assert read_footer(again)["missing"]["genus"] == read_metadata(again)["genus"].null_count()


def test_duplicate_keys_are_listed_and_dropped_by_name(tmp_path: Path, run_bioscan: Run) -> None:
    source = tmp_path / "twice.tsv"
    source.write_text("sampleid\torder\nx\tDiptera\ny\t\nx\tColeoptera\n", encoding="utf-8")
    assert "x           2  sampleid" in run_bioscan("check", source)[1]
    target = tmp_path / "mended.parquet"
    status, _, err = run_bioscan("mend", source, "-o", target, "--step", "fill_holes")
    assert status == 2
    assert "twice.tsv has duplicate keys; add the step drop_duplicate_keys" in err
    assert run_bioscan("mend", source, "-o", target, "--step", "fill_holes", "drop_duplicate_keys")[0] == 0
    assert read_metadata(target).rows() == [("x", "Diptera"), ("y", None)]


def test_wrong_requests_of_check_and_mend_end_in_one_line(
    tsv: Path, tmp_path: Path, run_bioscan: Run
) -> None:
    new = tmp_path / "new.parquet"
    everything = tmp_path / "all.csv"
    everything.write_text("\n".join(row[0] for row in cells(tsv)), encoding="utf-8")
    pictures = tmp_path / "pictures.tsv"
    pictures.write_text("sampleid\timage_file\na\t1.jpg\n", encoding="utf-8")
    before = {p.name for p in tmp_path.iterdir()}
    for arguments, text in (
        (["check", tsv, "--only", "hols"], "unknown check 'hols'; did you mean 'holes'"),
        (["check", tsv, "--only", "images"], "images needs --images"),
        (["check", pictures, "--images", tmp_path / "no.zip"], "no.zip"),
        (["check", tsv, "--images", tmp_path], "has no column 'image_file'"),
        (["check", tsv, "--limit", -1], "--limit is -1"),
        (["check", tsv, "-o", tsv], "metadata.tsv exists"),
        (["check", tsv, "--low-quality", tmp_path / "no.xlsx"], "no.xlsx: no such list"),
        (["check", tsv, "--low-quality", new.with_suffix(".docx")], "no such list"),
        (["mend", tsv, "-o", new, "--step", "fill"], "unknown step 'fill'"),
        (["mend", tsv, "-o", new, "--step", "drop_missing_images"], "drop_missing_images needs --images"),
        (["mend", tsv, "-o", new, "--step", "drop_low_quality"], "drop_low_quality needs --low-quality"),
        (
            ["mend", tsv, "-o", new.with_suffix(".tsv"), "--step", "fill_genus"],
            "a catalogue is a .parquet file",
        ),
        (
            ["mend", tsv, "-o", new, "--step", "drop_low_quality", "--low-quality", everything],
            "no row is left after drop_low_quality",
        ),
    ):
        status, out, err = run_bioscan(*arguments)
        assert (status, out, err.count("\n")) == (2, "", 1), arguments
        assert text in err
    assert {p.name for p in tmp_path.iterdir()} == before
