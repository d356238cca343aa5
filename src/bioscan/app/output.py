"""Results to stdout as aligned text or JSON; talk and progress to stderr."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from bioscan.files import writing

SCHEMA_VERSION = 1


def say(message: str) -> None:
    """Lines of talk, to stderr; see `printable`."""
    print(_lines(message), file=sys.stderr)


def show(text: str) -> None:
    """A result, to stdout; see `printable`."""
    print(_lines(text))


def printable(name: str, width: int | None = None) -> str:
    r"""A name from an input, on one line: what a terminal would act on is spelled out.

    Args:
        name: Any text.
        width: Characters at most; of a longer name the middle is left out.

    >>> print(printable("a\x1b[2J\nb.jpg"))
    a\x1b[2J\nb.jpg
    """
    plain = name if name.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    if width is None or len(plain) <= width:
        return plain
    return f"{plain[: width // 2 - 1]}…{plain[-width // 2 :]}"


def _lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def to_json(result: Mapping[str, Any]) -> str:
    """JSON with `schema_version` first; arrays become lists, paths text, NaN and infinity null.

    What a terminal would act on is escaped.
    """
    text = json.dumps({"schema_version": SCHEMA_VERSION, **_plain(result)}, indent=2, ensure_ascii=False)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def write_text(path: Path, text: str, *, overwrite: bool = False) -> None:
    """Write a text file whole or not at all."""
    with writing(path, overwrite=overwrite) as partial:
        partial.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def table(rows: Iterable[Sequence[Any]], header: Sequence[str], *, indent: str = "") -> str:
    """Aligned columns: numbers right, text left; floats as given by `cell`."""
    cells = [[cell(v) for v in row] for row in rows]
    rows = [list(header), *cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    right = [all(_number(row[i]) for row in cells) and bool(cells) for i in range(len(header))]
    lines = []
    for row in rows:
        parts = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append((indent + "  ".join(parts)).rstrip())
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A value as text: thousands separated, floats to four significant decimals, missing as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    return str(value)


def _number(text: str) -> bool:
    return text == "–" or text.replace(",", "").replace(".", "").replace("%", "").lstrip("-").isdigit()


class Progress(Protocol):
    """What a long job calls to tell how far it is."""

    def __call__(self, done: int, total: int | None = None, **values: Any) -> None:
        """Say that `done` of `total` are done, with values worth showing."""


@contextmanager
def progress(title: str, unit: str = "") -> Iterator[Progress]:
    """A progress bar on stderr; silent where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total=None, **values: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, values="")

        def update(done: int, total: int | None = None, **values: Any) -> None:
            text = " ".join(f"{k} {cell(v)}" for k, v in values.items())
            bar.update(task, completed=done, total=total, values=text)

        yield update
