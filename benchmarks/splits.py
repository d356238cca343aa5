"""All six split columns by the paper's rule, against shuffling the same classes and nothing else."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.measure import interleaved, peak_mb
from bioscan.analysis.splits import make_splits, split_hash

COUNTS = Path(__file__).parents[1] / "tests/data/published_counts.tsv"
ROWS = 1_128_313
SIZES = {"full": 1, "small": 20}
BOUND_S = 3.0


def labels(divisor: int = 1, seed: int = 1) -> pl.DataFrame:
    """Columns `order` and `family` with the published class counts over `divisor`, in random row order."""
    counts = pl.read_csv(COUNTS, separator="\t")
    families = counts.filter(pl.col("rank") == "family")
    orders = counts.filter((pl.col("rank") == "order") & (pl.col("taxon") != "Diptera"))
    in_diptera = counts.filter(pl.col("taxon") == "Diptera")["images"].item() - families["images"].sum()
    table = pl.concat(
        [
            families.select(pl.lit("Diptera").alias("order"), pl.col("taxon").alias("family"), "images"),
            orders.select(pl.col("taxon").alias("order"), pl.lit(None, pl.String).alias("family"), "images"),
            pl.DataFrame({"order": ["Diptera"], "family": [None], "images": [in_diptera]}),
            # five specimens of orders too small to be split
            pl.DataFrame({"order": ["Odonata", "Strepsiptera", "Zoraptera"], "images": [2, 2, 1]}).select(
                "order", pl.lit(None, pl.String).alias("family"), "images"
            ),
        ]
    )
    rows = table.select(pl.exclude("images").repeat_by(pl.max_horizontal(1, pl.col("images") // divisor)))
    exploded = rows.explode("order", "family")
    return exploded[np.random.default_rng(seed).permutation(exploded.height)]


def shuffles(classes: list[list[int]]) -> None:
    """The floor: Python's `random.shuffle` of the same classes, alone."""
    generator = random.Random(1)
    for rows in classes:
        generator.shuffle(rows)


def run(size: str, work: Path) -> list[dict[str, Any]]:
    """Seconds of the rule and of its shuffles; `work` is not used."""
    divisor = SIZES[size]
    frame = labels(divisor)
    split = partial(make_splits, medium=200_000 // divisor, small=50_000 // divisor)
    of_diptera = frame.with_row_index("row").filter(pl.col("order") == "Diptera")
    classes = [rows.to_list() for rows in of_diptera.group_by("family").agg("row")["row"]]
    others = frame.with_row_index("row").filter(pl.col("order") != "Diptera")
    classes += [rows.to_list() for rows in others.group_by("order").agg("row")["row"]]
    keys = pl.select(pl.format("BIOUG{}-A01", pl.int_range(frame.height).shuffle(seed=1))).to_series()
    roles = split(frame).roles

    taken, floor, hashing = interleaved(
        lambda: split(frame),
        lambda: shuffles(classes),
        lambda: [split_hash(keys, roles[name]) for name in roles.columns],
        rounds=3,
    )
    row = {"size": f"{frame.height:,} rows", "unit": "s"}
    return [
        {
            **row,
            "work": "all six split columns, paper's rule (floor: random.shuffle of the same classes)",
            "value": taken,
            "floor": floor,
            "ratio": taken / floor,
            "bound": f"<= {BOUND_S:g} s at {ROWS:,} rows",
            "peak_mb": peak_mb(_alone, divisor),
        },
        {**row, "work": "hashes of the six splits", "value": hashing, "floor": None, "ratio": None},
    ]


def _alone(divisor: int) -> None:
    make_splits(labels(divisor), medium=200_000 // divisor, small=50_000 // divisor)
