"""A model for 20 butterflies and moths from 5, 10 and 20 photographs of each, by `bioscan adapt`.

The photographs are the Lepidoptera of `data/insects` in the folder of real data (BIOSCAN_SHARED), scored on
its 212 test photographs. No pretrained weights can be had without the internet, so a small backbone is first
trained by `bioscan train`, on the other orders of that folder and on artificial specimens: it has seen none
of these species, no butterfly, and few photographs. With a backbone trained on millions of photographs the
figures are others. The floor is the same network trained from scratch on the same photographs; they are
chosen anew for each of several seeds.
"""

import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import torch

from bioscan.data.synthesis import SynthesisSettings, synthesize
from bioscan.jobs.adapt import adapt
from bioscan.jobs.predict import predict
from bioscan.jobs.train import train
from bioscan.learn.adaptation import HEADS
from bioscan.learn.settings import TrainSettings

SHARED = Path(os.environ.get("BIOSCAN_SHARED", Path(__file__).parents[1] / ".." / "shared"))
PHOTOGRAPHS = (5, 10, 20)
SEEDS = {"small": 1, "full": 3}
ARTIFICIAL = {"small": 500, "full": 4_000}
EPOCHS = {"small": 2, "full": 30}
"""Of the pretraining."""
SCRATCH_EPOCHS = {"small": 10, "full": 40}
EXPERIMENT = "large_insect_order"
RANKS = ("order", "family", "genus", "species")
NETWORK: dict[str, Any] = {
    "model": "test_byobnet",
    "image_size": 72,
    "crop_size": 64,
    "experiment": EXPERIMENT,
    "criterion": "last",
    "lr": 2e-3,
    "workers": 0,
    "threads": 1,
}


def run(size: str, work: Path) -> list[dict[str, Any]]:
    """Pretraining (kept in `work`), then accuracy and seconds for each number of photographs and method."""
    insects = SHARED / "data" / "insects"
    if not insects.is_dir():
        print("adapt: no real data (set BIOSCAN_SHARED)", file=sys.stderr)
        return []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = insects / "bioscan" / "images" / "cropped_256"
    table = pl.read_csv(insects / "metadata.tsv", separator="\t", infer_schema=False)
    backbone = work / f"adapt_backbone_{size}"
    rows = []
    if not (backbone / "model").is_dir():
        folder = work / f"adapt_pretraining_{size}"
        count = _pretraining_data(folder, table, images, ARTIFICIAL[size])
        settings = TrainSettings(**NETWORK, ranks=RANKS, epochs=EPOCHS[size], min_area=0.35)
        start = time.perf_counter()
        train(folder / "pretraining.tsv", folder / "images", backbone, settings, overwrite=True)
        rows.append(_row("pretraining of the backbone", count, time.perf_counter() - start, "s"))
    made: dict[tuple[str, int], list[tuple[float, float]]] = {}
    lepidoptera = table.filter(pl.col("order") == "Lepidoptera")
    test = lepidoptera.filter(pl.col(EXPERIMENT) == "test")
    for seed in range(SEEDS[size]):
        mixed = lepidoptera.filter(pl.col(EXPERIMENT) != "test").sample(fraction=1, shuffle=True, seed=seed)
        for photographs in PHOTOGRAPHS:
            place = work / f"adapt_{size}_{photographs}_{seed}"
            place.mkdir(exist_ok=True)
            chosen = mixed.group_by("species", maintain_order=True).head(photographs)
            for method in (*HEADS, "scratch"):
                result = _tried(method, place, chosen, test, images, backbone, SCRATCH_EPOCHS[size])
                made.setdefault((method, photographs), []).append(result)
    torch.set_num_threads(threads)
    for photographs in PHOTOGRAPHS:
        floor, floor_s = _means(made["scratch", photographs])
        for method in (*HEADS, "scratch"):
            accuracy, seconds = _means(made[method, photographs])
            spread = statistics.pstdev(right for right, _ in made[method, photographs])
            name = f"{'from scratch' if method == 'scratch' else f'adapt {method}'}, {photographs} a species"
            unit = f"test top-1 (± {spread:.3f}, {SEEDS[size]} choices)"
            rows.append(_row(name, 20 * photographs, accuracy, unit, floor))
            rows.append(_row(name, 20 * photographs, seconds, "s", floor_s))
    return rows


def _row(work: str, size: int, value: float, unit: str, floor: float | None = None) -> dict[str, Any]:
    ratio = None if floor is None else value / floor
    row = {"work": work, "size": size, "value": value, "unit": unit, "floor": floor, "ratio": ratio}
    return row | {"bound": "–", "peak_mb": None}


def _means(results: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.mean(a for a, _ in results), statistics.mean(s for _, s in results)


def _pretraining_data(folder: Path, table: pl.DataFrame, images: Path, artificial: int) -> int:
    """A catalogue and a folder of pictures without any butterfly or moth; the number of its specimens."""
    made = synthesize(
        folder / "artificial", SynthesisSettings(specimens=artificial, imbalance=0.0), overwrite=True
    )
    lineage = pl.read_csv(made["truth"] / "lineage.tsv", separator="\t", infer_schema=False)
    metadata = pl.read_csv(made["metadata"], separator="\t", infer_schema=False)
    drawn = metadata.select("sampleid", "image_file").join(lineage, on="sampleid")
    drawn = drawn.filter(pl.col("order") != "Lepidoptera")
    real = table.filter(pl.col("order") != "Lepidoptera")
    (folder / "images").mkdir(exist_ok=True)
    for source, wanted in ((made["images"], drawn), (images, real)):
        names = set(wanted["image_file"])
        for path in source.rglob("*.jpg"):
            if path.name in names:
                target = folder / "images" / path.name
                if not target.exists():
                    shutil.copyfile(path, target)
    columns = ["sampleid", *RANKS, "image_file"]
    whole = pl.concat([drawn.select(columns), real.select(columns)])
    whole.with_columns(pl.lit("train").alias(EXPERIMENT)).write_csv(
        folder / "pretraining.tsv", separator="\t"
    )
    return whole.height


def _tried(
    method: str,
    place: Path,
    chosen: pl.DataFrame,
    test: pl.DataFrame,
    images: Path,
    backbone: Path,
    epochs: int,
) -> tuple[float, float]:
    """Share of the test photographs named right, and the seconds that the making of the model took."""
    model, labels = place / method, place / f"{method}.tsv"
    frame = chosen.select("sampleid", "image_file", "species", pl.lit("train").alias(EXPERIMENT))
    frame.write_csv(labels, separator="\t")
    start = time.perf_counter()
    if method == "scratch":
        settings = TrainSettings(**NETWORK, rank="species", epochs=epochs, batch_size=32)
        train(labels, images, model, settings, overwrite=True)
    else:
        adapt(images, labels, model, model=backbone / "model", head=method, overwrite=True)
    seconds = time.perf_counter() - start
    unseen = place / "test.tsv"
    test.select("sampleid", "image_file").write_csv(unseen, separator="\t")
    named = place / f"{method}.parquet"
    predict(model, unseen, named, images=images, roles=(), workers=0, overwrite=True)
    both = pl.read_parquet(named).select("sampleid", named="species").join(test, on="sampleid")
    return float(both.select((pl.col("named") == pl.col("species")).mean()).item()), seconds
