"""The statistics of a catalogue, against Polars counting the values of the same columns."""

from pathlib import Path
from typing import Any, Final

import polars as pl

from benchmarks.measure import interleaved, peak_mb
from benchmarks.synthesis import metadata
from bioscan import import_metadata, make_splits, read_metadata, summarise
from bioscan.data.metadata import write_catalogue
from bioscan.vocabulary import EXPERIMENTS, RANKS

BOUND_S: Final = 0.5


def catalogue(size: str, work: Path) -> Path:
    """An artificial catalogue with all split columns; kept if it is there."""
    source = metadata(size, work)
    made = work / f"{source.parent.name}.parquet"
    if not made.is_file():
        plain = work / f"{source.parent.name}.plain.parquet"
        import_metadata(source, plain, overwrite=True)
        frame = read_metadata(plain, ["order", "family"])
        roles = make_splits(frame, medium=frame.height // 6, small=frame.height // 24).roles
        table = pl.concat([pl.scan_parquet(plain).drop(roles.columns), roles.lazy()], how="horizontal")
        write_catalogue(table, made)
        plain.unlink()
    return made


def counted(path: Path) -> None:
    """The floor: how often each value of each column occurs, nothing more."""
    scan = pl.scan_parquet(path)
    columns = [*RANKS, *EXPERIMENTS, "uri"]
    pl.collect_all([scan.group_by(column).len() for column in columns], engine="streaming")


def without_barcodes(path: Path) -> None:
    """Every rank, BINs, experiments and roles."""
    summarise(path, skip=("barcodes", "plates"))


def run(size: str, work: Path) -> list[dict[str, Any]]:
    """Seconds of the statistics without and with barcodes and plates."""
    path = catalogue(size, work)
    taken, floor, whole = interleaved(
        lambda: without_barcodes(path), lambda: counted(path), lambda: summarise(path)
    )
    rows = pl.scan_parquet(path).select(pl.len()).collect().item()
    row = {"size": f"{rows:,} rows", "unit": "s"}
    return [
        {
            **row,
            "work": "all statistics, barcodes and plates apart (floor: counting each column alone)",
            "value": taken,
            "floor": floor,
            "ratio": taken / floor,
            "bound": f"<= {BOUND_S:g} s",
            "peak_mb": peak_mb(without_barcodes, path),
        },
        {
            **row,
            "work": "all statistics, barcodes and plates too",
            "value": whole,
            "peak_mb": peak_mb(summarise, path),
        },
    ]
