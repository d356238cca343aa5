"""What the documents promise: commands that parse, Python that runs, verbs that exist, links that lead
somewhere.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bioscan.app.cli import VERBS, build

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")


def command_lines(document: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


def test_every_command_line_of_the_readme_is_understood() -> None:
    lines = [line for line in command_lines("README.md") if line.startswith("bioscan ")]
    assert len(lines) >= 10
    for line in lines:
        build().parse_args(shlex.split(line)[1:], exit_on_error=False, print_error=False)


def test_a_flag_that_does_not_exist_is_noticed() -> None:
    from cyclopts import CycloptsError

    with pytest.raises(CycloptsError):
        build().parse_args(
            ["split", "a.tsv", "-o", "b.tsv", "--sead", "1"], exit_on_error=False, print_error=False
        )


def test_every_verb_is_in_the_readme_with_a_line_of_its_own() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"| `{verb}` |" not in readme] == []


def test_every_make_target_of_the_documents_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {line.split()[1] for d in DOCUMENTS for line in command_lines(d) if line.startswith("make ")}
    assert named >= {"demo", "test"}
    assert {target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in t]
    assert [t for t in targets if not (ROOT / document).parent.joinpath(t).exists()] == []


def test_the_python_of_the_readme_names_what_the_library_has() -> None:
    import bioscan

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    compile(block, "README.md", "exec")
    names = set(re.findall(r"bioscan\.(\w+)", block))
    assert len(names) >= 8
    assert [name for name in names if not hasattr(bioscan, name)] == []


@pytest.mark.timeout(300)
def test_the_quickstart_runs_as_it_stands(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/quickstart.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "macro top-1" in done.stdout
    assert (tmp_path / "run/model/model.safetensors").is_file()
