"""The demo: every step runs as the command that it prints, and its outputs are there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest


def run_demo(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "bioscan", "demo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.timeout(300)
def test_the_demo_ends_with_a_report_and_prints_each_step_as_its_command(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    done = run_demo(folder, "--specimens", 400, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    commands = re.findall(r"^\$ bioscan (\w+)", done.stdout, re.MULTILINE)
    steps = ["synthesize", "import", "check", "summary", "split", "train", "predict", "evaluate", "report"]
    assert commands == steps
    assert str(folder / "report.html") in done.stdout.splitlines()[-1]
    assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")
    scores = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    predictions = pl.read_parquet(folder / "predictions.parquet")
    assert 0 < scores["n"] < predictions.height  # the test part of validation and test
    again = run_demo(folder, "--specimens", 400, "--epochs", 1)
    assert again.returncode == 2
    assert "pass --overwrite" in again.stderr
