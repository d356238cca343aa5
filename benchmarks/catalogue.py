"""TSV to catalogue, against Polars' own streaming CSV-to-Parquet sink; and the way back."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl

from benchmarks.measure import interleaved, peak_mb
from bioscan import export_metadata, import_metadata, read_metadata
from bioscan.vocabulary import COLUMNS, EXPERIMENTS

SIZES: Final = {"small": 50_000, "full": 1_128_313}
BOUND: Final = 1.5
ATTRIBUTION: Final = {
    "copyright_license": "Creative Commons Attribution 3.0 Unported",
    "copyright_holder": "CBG Photography Group",
    "copyright_institution": "Centre for Biodiversity Genomics",
    "copyright_contact": "collectionsBIO@gmail.com",
    "photographer": "CBG Robotic Imager",
    "author": "Centre for Biodiversity Genomics",
}
LABELLED: Final = {"subfamily": 0.235, "tribe": 0.054, "genus": 0.225, "species": 0.075, "subspecies": 0.0}
"""Share of specimens with a name at the lower ranks, as published."""


def write_table(path: Path, rows: int, seed: int = 1) -> Path:
    """A TSV with the published columns and about the published bytes per row; kept if it is there."""
    if path.is_file():
        return path
    rng = np.random.default_rng(seed)
    ancestors = rng.integers(0, 4, (1000, 658), np.uint8)
    with path.open("wb") as file:
        for start in range(0, rows, 50_000):
            batch = _rows(rng, ancestors, np.arange(start, min(start + 50_000, rows)))
            batch.write_csv(file, separator="\t", include_header=start == 0, quote_style="never")
    return path


def _rows(rng: np.random.Generator, ancestors: Any, number: Any) -> pl.DataFrame:
    size = number.size
    barcodes = ancestors[rng.integers(0, len(ancestors), size)]
    changed = np.nonzero(rng.random(barcodes.shape, np.float32) < 0.01)
    barcodes[changed] = rng.integers(0, 4, changed[0].size, np.uint8)
    letters = np.frombuffer(b"ACGT", np.uint8)[barcodes]
    family = pl.format("Familia{}", pl.Series(rng.zipf(1.3, size) % 491))
    named = {
        rank: pl.when(pl.Series(rng.random(size)) < share)
        .then(pl.format(f"{rank.title()}{{}}", pl.Series(rng.integers(0, 8355, size))))
        .otherwise(pl.lit("not_classified"))
        for rank, share in LABELLED.items()
    }
    roles = np.array(["train", "validation", "test", "no_split"])
    n = pl.Series(number)
    columns: dict[str, Any] = {
        "sampleid": pl.format("BIOUG{}-A01", n + 10_000),
        "processid": pl.format("PLECF{}-20", n),
        "uri": pl.format("BOLD:AAA{}", pl.Series(rng.integers(1000, 9999, size))),
        "name": family,
        "phylum": pl.lit("Arthropoda"),
        "class": pl.lit("Insecta"),
        "order": pl.lit("Diptera"),
        "family": family,
        "nucraw": pl.Series(letters.view("S658")[:, 0]).cast(pl.String),
        "image_file": pl.format("{}.jpg", n + 5_000_000),
        "chunk_number": n // 10_000 + 1,
        **named,
        **{name: pl.Series(roles[rng.integers(0, 4, size)]) for name in EXPERIMENTS},
        **{name: pl.lit(text) for name, text in ATTRIBUTION.items()},
    }
    made: pl.DataFrame = pl.select(**columns)
    return made.select(COLUMNS)


def ours(source: Path, target: Path) -> None:
    """Import."""
    import_metadata(source, target, overwrite=True)


def polars_sink(source: Path, target: Path) -> None:
    """The floor: the same file to Parquet, nothing looked at."""
    pl.scan_csv(source, separator="\t", quote_char=None, infer_schema=False).sink_parquet(target)


def run(size: str, work: Path) -> list[dict[str, Any]]:
    """Seconds of import, of export and of reading three columns."""
    rows = SIZES[size]
    source = write_table(work / f"metadata_{rows}.tsv", rows)
    catalogue, plain, back = work / "catalogue.parquet", work / "plain.parquet", work / "back.tsv"
    taken, floor = interleaved(
        lambda: ours(source, catalogue),
        lambda: polars_sink(source, plain),
        rounds=5 if size == "small" else 3,
    )
    exported, sunk, reading = interleaved(
        lambda: export_metadata(catalogue, back, overwrite=True),
        lambda: pl.scan_parquet(plain).sink_csv(work / "sunk.tsv", separator="\t", quote_style="never"),
        lambda: read_metadata(catalogue, ["order", "family", "large_insect_order"]),
        rounds=3,
    )
    row = {"size": f"{rows:,} rows, {source.stat().st_size / 1e9:.2g} GB", "unit": "s"}
    return [
        {
            **row,
            "work": "TSV to catalogue (floor: Polars' streaming CSV to Parquet)",
            "value": taken,
            "floor": floor,
            "ratio": taken / floor,
            "bound": f"<= {BOUND:g} x, under 2,000 MB",
            "peak_mb": peak_mb(ours, source, catalogue),
        },
        {
            **row,
            "work": "catalogue to TSV (floor: Polars' Parquet to CSV)",
            "value": exported,
            "floor": sunk,
            "ratio": exported / sunk,
        },
        {**row, "work": "three columns of the catalogue", "value": reading, "floor": None, "ratio": None},
    ]
