"""Images that failed in a bulk job: as a file, and as words."""

from pathlib import Path
from typing import Any

import polars as pl

from bioscan.app import output as out
from bioscan.jobs.bulk import FAILED
from bioscan.vocabulary import part_path

_SHOWN = 5
"""Failures that are told where they are not written to a file."""


def write_failures(failures: Path | None, failed: pl.DataFrame) -> None:
    """The list as CSV, where one is wanted; of no failures the header, in place of an older list."""
    if failures:
        out.write_text(failures, failed.write_csv(), overwrite=True)


def end_with_failures(rows: list[dict[str, Any]], total: int, failures: Path | None) -> int:
    """Write and tell what failed in a job that lists it in its result; gives the exit status."""
    failed = pl.DataFrame(rows, schema=FAILED)
    write_failures(failures, failed)
    return tell_failures(failed, total, failures)


def tell_failures(failed: pl.DataFrame, total: int, failures: Path | None) -> int:
    """Say what failed, to stderr.

    Args:
        failed: Columns name, part, reason, place.
        total: Images that there are.
        failures: Where the list was written.

    Returns:
        The exit status.
    """
    if failed.is_empty():
        return 0
    where = f"see {failures}" if failures else "--failures FILE lists them"
    out.say(f"{failed.height:,} of {total:,} images failed; {where}")
    for row in failed.head(0 if failures else _SHOWN).iter_rows(named=True):
        name = part_path(row["name"], row["part"])
        place = f" ({row['place']})" if row["place"] else ""
        out.say("  " + out.printable(f"{name}: {row['reason']}{place}"))
    return 1
