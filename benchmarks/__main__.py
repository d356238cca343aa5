"""Run the benchmarks and print their rows: `python -m benchmarks [NAME…] [--full] [--json FILE]`.

A row says what was done, how fast, how fast the floor did the same in the same run, their ratio, the bound
that the design asks for, and the peak memory. Without --full the sizes take seconds; with it they are those
of the published dataset.
"""

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path

NAMES = (
    "synthesis",
    "catalogue",
    "summary",
    "splits",
    "images",
    "convert",
    "resize",
    "crops",
    "loader",
    "training",
    "losses",
    "long_tail",
    "adapt",
    "promises",
    "evaluation",
)
COLUMNS = ("work", "size", "value", "unit", "floor", "ratio", "bound", "peak_mb")


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all if none")
    parser.add_argument("--full", action="store_true", help="1,128,313 rows, a million images")
    parser.add_argument("--work", type=Path, help="keep what is made in this folder, for the next run")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    arguments = parser.parse_args()
    unknown = sorted({*arguments.names} - {*NAMES})
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; known: {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        rows = []
        for name in arguments.names or NAMES:
            print(f"{name} …", file=sys.stderr)
            module = importlib.import_module(f"benchmarks.{name}")
            made = module.run("full" if arguments.full else "small", work)
            rows += made
            for row in made:
                print("  ".join(f"{column} {_cell(row.get(column))}" for column in COLUMNS), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:,.0f}"
        if isinstance(value, int | float)
        else str(value)
    )


if __name__ == "__main__":
    main()
