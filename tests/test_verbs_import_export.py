"""`bioscan import` and `bioscan export`: what they print, write, refuse, and leave behind."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]

TSV = (
    "sampleid\tdna_bin\tfamily\tsmall_insect_order\tcopyright_license\n"
    "a\tBOLD:AAA0001\tMuscidae\ttrain\tCC BY\n"
    "b\t\tnot_classified\tval\tCC BY\n"
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.tsv"
    path.write_text(TSV, encoding="utf-8")
    return path


def test_import_says_what_it_read_and_export_gives_it_back(
    source: Path, tmp_path: Path, run_bioscan: Run
) -> None:
    status, out, err = run_bioscan("import", source, tmp_path / "a.parquet")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[:4] == [
        "2 specimens, 5 columns, key sampleid",
        "columns renamed: dna_bin → uri",
        "role val read as validation",
        "licences: CC BY",
    ]
    assert lines[4].startswith("SHA-256 of a.tsv: ")
    assert lines[5] == f"catalogue: {tmp_path / 'a.parquet'}"
    status, out, _ = run_bioscan("export", tmp_path / "a.parquet", "-o", tmp_path / "b.tsv")
    assert (status, out) == (0, f"2 rows, 5 columns: {tmp_path / 'b.tsv'}\n")
    assert (tmp_path / "b.tsv").read_text(encoding="utf-8") == TSV


def test_both_print_json(source: Path, tmp_path: Path, run_bioscan: Run) -> None:
    status, out, _ = run_bioscan("import", source, tmp_path / "a.parquet", "--json")
    assert status == 0
    assert {k: json.loads(out)[k] for k in ("schema_version", "rows", "key", "roles_renamed")} == {
        "schema_version": 1,
        "rows": 2,
        "key": "sampleid",
        "roles_renamed": {"val": "validation"},
    }
    _, out, _ = run_bioscan("export", tmp_path / "a.parquet", "--to", "jsonld", "--json")
    assert json.loads(out) == {
        "schema_version": 1,
        "rows": 2,
        "columns": 5,
        "output": str(tmp_path / "a.jsonld"),
    }
    assert json.loads((tmp_path / "a.jsonld").read_text())[1]["small_insect_order"] == "val"


def test_nothing_is_replaced_unless_told(source: Path, tmp_path: Path, run_bioscan: Run) -> None:
    target = tmp_path / "a.parquet"
    target.write_text("mine")
    status, out, err = run_bioscan("import", source, target)
    assert (status, out) == (2, "")
    assert err == f"bioscan import: {target} exists; choose another name or pass --overwrite\n"
    assert target.read_text() == "mine"
    assert run_bioscan("import", source, target, "--overwrite")[0] == 0
    status, _, err = run_bioscan("export", target)  # a.tsv is there
    assert (status, err) == (
        2,
        f"bioscan export: {source} exists; choose another name or pass --overwrite\n",
    )
    assert source.read_text() == TSV


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("import", "b.tsv", "b.parquet"), "b.tsv: no such file; did you mean 'a.tsv'?"),
        (("import", "a.tsv", "b.csv"), "b.csv: a catalogue is a .parquet file"),
        (("import", "b.parquet", "c.parquet"), "b.parquet is a catalogue already"),
        (("export", "b.parquet"), "b.parquet: no such file"),
        (("export", "a.tsv", "-o", "b.csv"), "b.csv: a .tsv file is asked for; name it so, or change --to"),
        (("export", "a.tsv", "--to", "xml"), "xml"),
        (("import", "a.tsv"), "catalogue"),
    ],
)
def test_a_wrong_request_is_one_message_and_status_2(
    source: Path, run_bioscan: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(source.parent)
    status, out, err = run_bioscan(*arguments)
    assert (status, out) == (2, "")
    assert message.lower() in err.lower()
    assert "Traceback" not in err
    assert [path.name for path in source.parent.iterdir()] == ["a.tsv"]


def test_a_bad_file_is_one_line_with_its_place_and_leaves_nothing(source: Path, run_bioscan: Run) -> None:
    source.write_text(TSV[:-7], encoding="utf-8")
    status, out, err = run_bioscan("import", source, source.parent / "a.parquet")
    assert (status, out) == (2, "")
    assert err == (
        f"bioscan import: {source}, line 3: 4 cells where the first line has 5; is the file cut short?\n"
    )
    assert [path.name for path in source.parent.iterdir()] == ["a.tsv"]


def test_a_last_line_without_end_is_noted(source: Path, run_bioscan: Run) -> None:
    source.write_text(TSV[:-2], encoding="utf-8")
    status, _, err = run_bioscan("import", source, source.parent / "a.parquet")
    assert status == 0
    assert err == f"note: the last line of {source} does not end in a line break; is the file cut short?\n"


def long_table(path: Path, rows: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.write("sampleid\tnucraw\n")
        file.writelines(f"s{n}\t{os.urandom(150).hex()}\n" for n in range(rows))
    return path


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path, run_bioscan: Run) -> None:
    source = long_table(tmp_path / "a.tsv", 4_000)
    assert run_bioscan("import", source, tmp_path / "a.parquet")[0] == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        imported = run_bioscan("import", source, tmp_path / "b.parquet")
        exported = [
            run_bioscan("export", tmp_path / "a.parquet", "--to", form, "-o", tmp_path / f"b.{form}")
            for form in ("tsv", "csv", "jsonld")
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    for status, out, err in (imported, *exported):
        assert (status, out) == (2, "")
        assert err.endswith(": File too large; nothing was written\n")
        assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "a.tsv"]


def test_a_kill_while_writing_leaves_no_half_catalogue(tmp_path: Path) -> None:
    source, target = long_table(tmp_path / "a.tsv", 30_000), tmp_path / "a.parquet"
    target.write_text("old")
    command = [sys.executable, "-m", "bioscan", "import", str(source), str(target), "--overwrite"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob(".a.parquet.*.partial")) and process.poll() is None:
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("30,000 specimens")


@pytest.mark.parametrize("name", ["insects/metadata.tsv", "bioscan_records/bioscan1m_draft_metadata.tsv"])
def test_real_metadata_comes_back_byte_for_byte(
    shared: Path, tmp_path: Path, run_bioscan: Run, name: str
) -> None:
    source = shared / "data" / name
    assert run_bioscan("import", source, tmp_path / "a.parquet")[0] == 0
    assert run_bioscan("export", tmp_path / "a.parquet", "--to", "tsv")[0] == 0
    assert (tmp_path / "a.tsv").read_bytes() == source.read_bytes()
