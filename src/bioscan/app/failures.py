"""Images that failed in a bulk job: as a file, and as words."""

from pathlib import Path

import polars as pl

from bioscan.app import output as out
from bioscan.errors import RequestError
from bioscan.files import refuse_existing

_SHOWN = 5
"""Failures that are told where they are not written to a file."""


def refuse_failures(failures: Path | None, target: Path, *, overwrite: bool) -> None:
    """Raise a RequestError, before any work, where the list of failures could not be written."""
    if failures:
        refuse_existing(failures, overwrite=overwrite)
        if failures.absolute() == target.absolute():
            raise RequestError(f"{failures}: the list of failures cannot be the target")


def write_failures(failures: Path | None, failed: pl.DataFrame) -> None:
    """The list as CSV, where one is wanted and something failed."""
    if failures and not failed.is_empty():
        out.write_text(failures, failed.write_csv(), overwrite=True)


def tell_failures(failed: pl.DataFrame, total: int, failures: Path | None) -> int:
    """Say what failed, to stderr.

    Args:
        failed: Columns name, reason, place.
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
        place = f" ({row['place']})" if row["place"] else ""
        out.say(f"  {row['name']}: {row['reason']}{place}")
    return 1
