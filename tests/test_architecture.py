"""Who imports whom, read from the source: arrows point down only, and there are no circles."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from bioscan.app.cli import VERBS

SOURCE = Path(__file__).parents[1] / "src"
README = Path(__file__).parents[1] / "README.md"

GROUND = ("vocabulary", "errors", "config", "files", "parallel")
MAY_IMPORT = {
    "app": {"app", "jobs", "learn", "analysis", "data", "ground"},
    "jobs": {"jobs", "learn", "analysis", "data", "ground"},
    "learn": {"learn", "analysis", "data", "ground"},
    "analysis": {"analysis", "ground"},
    "data": {"data", "ground"},
    "ground": {"ground"},
}
HEAVY = {"torch", "torchvision", "timm", "transformers", "safetensors", "tensorboard"}
PLOTTING = {"matplotlib", "seaborn", "plotly", "jinja2"}


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((SOURCE / "bioscan").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, *, at_import_only: bool = False) -> Iterator[str]:
    """Full names of what a module imports; `from a import b` gives a.b. Not those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif not (at_import_only and isinstance(node, ast.FunctionDef)):
            yield from imports(node, at_import_only=at_import_only)


@functools.cache
def parsed() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules().items()}


def known(name: str) -> str | None:
    """The module of ours that an imported name lies in."""
    parts = name.split(".")
    for end in range(len(parts), 1, -1):
        if ".".join(parts[:end]) in modules():
            return ".".join(parts[:end])
    return None


def room(module: str) -> str:
    second = module.split(".")[1]
    return "ground" if second in GROUND else second


def test_arrows_between_rooms_point_down_only() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, tree in parsed().items()
        if module.count(".") and module != "bioscan.__main__"
        for name in imports(tree)
        if name.startswith("bioscan.")
        and (inner := known(name))
        and room(inner) not in MAY_IMPORT[room(module)]
    ]
    assert wrong == []


def test_every_module_lies_in_a_room() -> None:
    rooms = {room(name) for name in modules() if name.count(".") and name != "bioscan.__main__"}
    assert rooms <= {*MAY_IMPORT}


def test_only_learn_and_jobs_import_torch() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, tree in parsed().items()
        if module.count(".") and room(module) not in ("learn", "jobs")
        for name in imports(tree)
        if name.split(".")[0] in HEAVY
    ]
    assert wrong == []


def test_analysis_touches_no_file_no_clock_and_prints_nothing() -> None:
    banned = {"pathlib", "os", "io", "time", "datetime", "shutil", "tempfile", "rich", "cyclopts"}
    for module, tree in parsed().items():
        if module.startswith("bioscan.analysis"):
            assert {name.split(".")[0] for name in imports(tree)} & banned == set(), module
            called = {
                n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
            }
            assert called & {"print", "open"} == set(), module


def test_drawing_and_page_libraries_are_imported_where_they_are_used() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, tree in parsed().items()
        for name in imports(tree, at_import_only=True)
        if name.split(".")[0] in PLOTTING
    ]
    # app.figures may import them: it is imported itself only by verbs that draw
    assert [w for w in wrong if not w.startswith(("bioscan.app.figures ", "bioscan.app.report "))] == []


def test_there_are_no_circles() -> None:
    edges = {
        module: {
            inner
            for name in imports(tree)
            if name.startswith("bioscan.") and (inner := known(name)) and inner not in (module, "bioscan")
        }
        for module, tree in parsed().items()
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " > ".join((*way[way.index(module) :], module)) if module in way else ""
        if module not in done:
            for inner in sorted(edges[module]):
                visit(inner, (*way, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_a_verb_is_imported_by_no_other_room() -> None:
    for module, tree in parsed().items():
        if not module.startswith("bioscan.app.verbs"):
            assert [n for n in imports(tree) if n.startswith("bioscan.app.verbs")] == [], module


def test_every_verb_is_documented_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    missing = [verb for verb in VERBS if f"`{verb}`" not in text and f"`bioscan {verb}" not in text]
    assert missing == [], f"the README does not tell of: {', '.join(missing)}"


def test_the_walk_sees_what_it_is_to_see() -> None:
    tree = ast.parse(
        "import torch.nn\nfrom bioscan.data import metadata\n"
        "def f():\n    import timm\nif TYPE_CHECKING:\n    import seaborn\n"
    )
    assert [*imports(tree)] == ["torch.nn", "bioscan.data.metadata", "timm"]
    assert [*imports(tree, at_import_only=True)] == ["torch.nn", "bioscan.data.metadata"]
    assert known("bioscan.data.metadata.read_metadata") == "bioscan.data.metadata"
    assert room("bioscan.errors") == "ground"
