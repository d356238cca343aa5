"""The command line's edge: help, verbs, exit statuses, interruptions, and what it does not import."""

import importlib.util
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bioscan import __version__
from bioscan.app import output as out
from bioscan.app.cli import VERBS

Run = Callable[..., tuple[int, str, str]]
BIOSCAN = [sys.executable, "-m", "bioscan"]


def run_process(*arguments: object, **more: object) -> "subprocess.CompletedProcess[str]":
    command = [*BIOSCAN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload, no-any-return]


def module_of(verb: str) -> str:
    return f"bioscan.app.verbs.{'import_' if verb == 'import' else verb.replace('-', '_')}"


def present_verbs() -> list[str]:
    return [verb for verb in VERBS if importlib.util.find_spec(module_of(verb))]


@pytest.fixture
def tsv(tmp_path: Path) -> Path:
    path = tmp_path / "metadata.tsv"
    rows = [f"BIOUG{n:05}-A01\t{'Diptera' if n % 3 else 'Coleoptera'}\tAidae" for n in range(60)]
    path.write_text("sampleid\torder\tfamily\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


# -- help


def test_help_lists_every_verb_on_one_line_of_eighty_columns(
    run_bioscan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (["--help"], ["-h"], []):
        status, shown, err = run_bioscan(*arguments)
        assert (status, err) == (0, "")
        lines = shown.splitlines()
        assert lines[0] == "Usage: bioscan COMMAND"
        for verb, line in VERBS.items():
            plain = line.replace("`", "")
            assert (
                sum(re.fullmatch(rf"│ {verb} +{re.escape(plain)} +│", text) is not None for text in lines)
                == 1
            )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_that_reads_well(
    verb: str, run_bioscan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, shown, err = run_bioscan(verb, "--help")
    assert (status, err) == (0, "")
    assert shown.startswith(f"Usage: bioscan {verb}")
    assert "Args:" not in shown
    assert not re.search(r"\[default: (False|None|\(.*\)|)\]", shown)
    assert shown.count("[default: none]") <= shown.count("--")
    # no line of the text breaks off early: the docstring's own line breaks are undone
    text = shown.split("╭")[0]
    for paragraph in re.split(r"\n\s*\n| • ", text):
        lines = [line.strip() for line in paragraph.strip().splitlines()]
        for line, following in itertools.pairwise(lines):
            assert len(line) + 1 + len(following.split()[0]) > 76, line


def test_help_and_tables_do_without_torch_and_other_heavy_libraries(tsv: Path) -> None:
    script = """
import sys
from pathlib import Path
import bioscan
from bioscan.app.cli import run
heavy = {"torch", "torchvision", "timm", "matplotlib", "plotly", "seaborn", "jinja2", "h5py"}
verbs, folder = sys.argv[1].split(), Path(sys.argv[2])
assert run(["--help"]) == 0
assert not heavy & {*sys.modules}, ("help", heavy & {*sys.modules})
for verb in verbs:
    assert run([verb, "--help"]) == 0
    assert not heavy & {*sys.modules}, (verb, heavy & {*sys.modules})
tsv = str(folder / "metadata.tsv")
for line in (
    ["import", tsv, "a.parquet"],
    ["export", "a.parquet", "-o", "b.tsv"],
    ["mend", tsv, "--step", "fill_genus", "-o", "c.parquet"],
    ["split", "a.parquet", "-o", "d.parquet", "--medium", "30", "--small", "20"],
):
    assert run(line) == 0
    assert "torch" not in sys.modules, line
for line in (["check", tsv], ["summary", "a.parquet"]):
    if line[0] in verbs:
        assert run(line) == 0
        assert "torch" not in sys.modules, line
"""
    verbs = " ".join(present_verbs())
    done = subprocess.run(
        [sys.executable, "-c", script, verbs, str(tsv.parent)],
        cwd=tsv.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_module_lies_behind_every_verb() -> None:
    assert [verb for verb in VERBS if verb not in present_verbs()] == []
    folder = Path(__file__).parents[1] / "src/bioscan/app/verbs"
    files = {path.stem.rstrip("_").replace("_", "-") for path in folder.glob("[!_]*.py")}
    assert files == {*VERBS}


def test_the_version_is_that_of_the_package(run_bioscan: Run) -> None:
    assert run_bioscan("--version") == (0, f"bioscan {__version__}\n", "")
    done = run_process("--version")
    assert (done.returncode, done.stdout) == (0, f"bioscan {__version__}\n")


# -- wrong requests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["splt"], "bioscan: unknown verb 'splt'; did you mean 'split'?"),
        (["--json"], "bioscan: unknown verb '--json'"),
        (["split"], "bioscan split: METADATA is missing (see bioscan split --help)"),
        (["split", "a.tsv"], "bioscan split: --output is missing (see bioscan split --help)"),
        (["split", "a.tsv", "-o"], "bioscan split: "),
        (["split", "a.tsv", "-o", "b.tsv", "c.tsv"], "bioscan split: unexpected argument c.tsv (see"),
        (
            ["split", "a.tsv", "-o", "b.tsv", "--sead", "1"],
            "Unknown option: --sead. Did you mean --seed? (see",
        ),
        (["split", "a.tsv", "-o", "b.tsv", "--seed", "x"], 'Invalid value for --seed: unable to convert "x"'),
        (["export", "a.parquet", "--to", "xml"], "bioscan export: "),
        (["check", "a.tsv"], "bioscan check: a.tsv: no such file"),
    ],
)
def test_a_wrong_request_is_one_line_on_stderr_and_status_2(
    arguments: list[str], message: str, run_bioscan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, shown, err = run_bioscan(*arguments)
    assert (status, shown, err.count("\n")) == (2, "", 1), err
    assert message in err


def test_what_the_system_refuses_is_one_line(tsv: Path, run_bioscan: Run) -> None:
    status, _, err = run_bioscan("import", tsv, tsv / "catalogue.parquet")  # a folder that is a file
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"bioscan import: {tsv}")


@pytest.mark.parametrize("target", ["split.tsv", "split.parquet"])
def test_a_full_disk_is_one_line_and_leaves_nothing(shared: Path, tmp_path: Path, target: str) -> None:
    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    source = shared / "data/bioscan_records/bioscan1m_draft_metadata.tsv"
    done = run_process("split", source, "-o", tmp_path / target, preexec_fn=small_files_only)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert [*tmp_path.iterdir()] == []


def test_a_bug_shows_its_traceback_and_says_that_it_is_one(tsv: Path) -> None:
    script = """
import sys
import bioscan.jobs.split
from bioscan.__main__ import main
def broken(*arguments, **more):
    return {}["no such key"]
bioscan.jobs.split.split = broken
sys.argv = ["bioscan", "split", "a.tsv", "-o", "b.tsv"]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 70
    assert "KeyError: 'no such key'" in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "This is a bug in bioscan. Please report it with the lines above."
    )


# -- signals and pipes


def test_a_closed_pipe_ends_quietly(tsv: Path) -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for unbuffered in ({}, {"PYTHONUNBUFFERED": "1"}):  # the pipe breaks at the end, or at the first line
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [*BIOSCAN, "check", str(tsv)],
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
            env=buffered | unbuffered,
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (0, b"")


def test_an_interruption_ends_with_130_and_one_word(tmp_path: Path) -> None:
    script = """
import sys
import bioscan.jobs.check
from bioscan.__main__ import main
def waiting(*arguments, **more):
    print("ready", flush=True)
    while True:
        pass
bioscan.jobs.check.check = waiting
sys.argv = ["bioscan", "check", "a.tsv"]
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "interrupted\n"


# -- output


def test_results_go_to_stdout_and_json_has_a_schema_version(
    tsv: Path, tmp_path: Path, run_bioscan: Run
) -> None:
    target = tmp_path / "catalogue.parquet"
    for arguments in (
        ["import", tsv, target],
        ["check", tsv],
        ["split", target, "-o", tmp_path / "split.parquet", "--medium", 30, "--small", 20],
        ["mend", target, "-o", tmp_path / "mended.parquet", "--step", "fill_holes"],
        ["export", target, "-o", tmp_path / "out.csv", "--to", "csv"],
    ):
        status, shown, err = run_bioscan(*arguments, "--json")
        assert (status, err) == (0, "")
        assert json.loads(shown)["schema_version"] == out.SCHEMA_VERSION
        assert next(iter(json.loads(shown))) == "schema_version"


def test_json_turns_arrays_into_lists_and_what_is_no_number_into_null() -> None:
    import numpy as np

    inner = {2: (np.int64(3), float("inf"))}
    values = {"a": np.array([1.5, np.nan]), "b": inner, "name": "Ötzi", "path": Path("x")}
    made = out.to_json(values)
    assert json.loads(made) == {
        "schema_version": 1,
        "a": [1.5, None],
        "b": {"2": [3, None]},
        "name": "Ötzi",
        "path": "x",
    }
    assert "Ötzi" in made


def test_tables_align_numbers_right_and_show_what_is_missing() -> None:
    text = out.table(
        [["Diptera", 896324, 0.5], ["Embioptera", 6, float("nan")], ["x", None, None]],
        ["order", "images", "top-1"],
    )
    assert text.splitlines() == [
        "order        images   top-1",
        "Diptera     896,324  0.5000",
        "Embioptera        6       –",
        "x                 –       –",
    ]
    assert out.table([], ["order", "images"]) == "order  images"
    assert [out.cell(v) for v in (True, 1234, 12345.678, -0.25, "x")] == [
        "yes",
        "1,234",
        "12,345.7",
        "-0.2500",
        "x",
    ]


def test_progress_is_silent_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with out.progress("reading") as update:
        update(1, 2, loss=0.5)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("odd", ["\x1b[2J", "\r", "\x9b31m", "\u202e", "\u2066", "\u2028", "\udcff"])
def test_what_a_terminal_would_act_on_is_spelled_out(odd: str, capsys: pytest.CaptureFixture[str]) -> None:
    out.say(f"a{odd}\nKäfer – 漢字")
    out.show(f"a{odd}\nKäfer – 漢字")
    spelled = f"a{ascii(odd)[1:-1]}\nKäfer – 漢字\n"
    assert capsys.readouterr() == (spelled, spelled)
    text = out.to_json({"name": f"{odd}\nKäfer"})
    assert text.replace("\n", "").isprintable()
    assert "Käfer" in text
    assert json.loads(text)["name"] == f"{odd}\nKäfer"


def test_a_name_is_on_one_line_and_a_long_one_keeps_its_ends() -> None:
    assert out.printable("a\nb\tc") == r"a\nb\tc"
    assert out.printable("a" * 10 + "b" * 10, 8) == "aaa…bbbb"
    assert out.printable("a" * 8, 8) == "a" * 8
