"""Artificial metadata and pictures."""

import time
from pathlib import Path
from typing import Any, Final

from benchmarks.measure import peak_mb
from bioscan.data.synthesis import METADATA, SynthesisSettings, synthesize

ROWS: Final = {"small": 50_000, "full": 1_128_313}
PICTURES: Final = {"small": 200, "full": 2_000}


def metadata(size: str, work: Path) -> Path:
    """An artificial TSV without pictures; kept if it is there."""
    folder = work / f"artificial_{ROWS[size]}"
    if not (folder / METADATA).is_file():
        synthesize(folder, SynthesisSettings(specimens=ROWS[size], images=False))
    return folder / METADATA


def drawn(folder: Path, specimens: int) -> None:
    """A small dataset with pictures, in one process."""
    synthesize(folder, SynthesisSettings(specimens=specimens, workers=1), overwrite=True)


def run(size: str, work: Path) -> list[dict[str, Any]]:
    """Seconds of metadata alone, pictures a second; there is no floor to compare with."""
    start = time.perf_counter()
    peak = peak_mb(metadata, size, work)  # made in that process, unless it is there
    taken = time.perf_counter() - start
    table = metadata(size, work)
    count = PICTURES[size]
    begun = time.perf_counter()
    drawn(work / "artificial_pictures", count)
    pictures_s = time.perf_counter() - begun
    return [
        {
            "work": "artificial metadata",
            "size": f"{ROWS[size]:,} rows, {table.stat().st_size / 1e9:.2g} GB",
            "value": taken,
            "unit": "s",
            "bound": "< 120 s",
            "peak_mb": peak,
        },
        {
            "work": "artificial pictures, one process",
            "size": f"{count:,} of 341 x 256",
            "value": count / pictures_s,
            "unit": "images/s",
        },
    ]
