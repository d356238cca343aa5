"""`bioscan evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import polars as pl
from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite, Seed
from bioscan.app.scores import caption, counted, interval, metric_rows, notes, place, without
from bioscan.files import refuse_existing, writing_folder
from bioscan.jobs.evaluate import COUNTS, KS, Evaluation, evaluate, evaluate_ranks

SHOWN = 40
"""Classes that the text lists; the CSV and JSON have all."""
ALL_RANKS = "all"
"""Instead of a rank: each that the model names."""
AT_RANK = ("unlabelled", "unnamed", "failed")
"""Counts that are columns in the table of all ranks; the last two are errors, the first is left out."""


def run(
    predictions: Path,
    catalogue: Path,
    /,
    *,
    rank: str | None = None,
    experiment: str | None = None,
    role: str | None = None,
    within: str | None = None,
    k: Annotated[tuple[int, ...], Parameter(name="--k", consume_multiple=True, negative="")] = KS,
    seed: Seed = 1,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    csv: Path | None = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Score predictions against a catalogue, joined by key. Needs no model.

    Any Parquet or CSV table with sampleid (or image_file) and a column of names at one rank will do.
    Specimens without an answer count as errors. Macro is the mean over classes with specimens; macro_all
    divides by all classes (the paper's program), macro_seen by those in the truth or among the answers
    (scikit-learn's recall_score). Intervals are at 95 %: Wilson for shares of specimens, bootstrap within
    classes for the rest.

    Args:
        predictions: Predictions; probabilities of all taxa are taken from the scores file beside it.
        catalogue: Catalogue or TSV with the true names.
        rank: Rank to compare at, or all: each rank of the model, and if it has but one, each that is
            predicted [default: the model's deepest, else the deepest predicted].
        experiment: Split column, or none: every labelled specimen counts [default: the model's].
        role: Whose specimens count [default: test].
        within: Only specimens below this taxon [default: the model's].
        k: k of top-k and average-k.
        output: JSON file.
        csv: New folder for metrics.csv, per_class.csv, confusion.csv and errors.csv.
    """
    for target in filter(None, (output, csv)):
        refuse_existing(target, overwrite=overwrite)
    if rank == ALL_RANKS:
        by_rank = evaluate_ranks(
            predictions, catalogue, experiment=experiment, role=role, within=within, ks=k, seed=seed
        )
        told = {"ranks": {name: found.to_dict() for name, found in by_rank.items()}}
        shown, tables = ranks_text(by_rank), ranks_csv_tables(by_rank)
    else:
        found = evaluate(
            predictions,
            catalogue,
            rank=rank,
            experiment=experiment,
            role=role,
            within=within,
            ks=k,
            seed=seed,
        )
        told, shown, tables = found.to_dict(), text(found), csv_tables(found)
    as_json = out.to_json(told)
    if output:
        out.write_text(output, as_json + "\n", overwrite=overwrite)
    if csv:
        with writing_folder(csv, overwrite=overwrite) as partial:
            for name, table in tables.items():
                table.write_csv(partial / f"{name}.csv")
    out.show(as_json if json else shown)
    return 0


def csv_tables(found: Evaluation) -> dict[str, pl.DataFrame]:
    """File name without ending -> table."""
    return {
        "metrics": found.table(),
        "per_class": found.per_class,
        "confusion": found.confusion,
        "errors": found.errors(),
    }


def ranks_csv_tables(by_rank: Mapping[str, Evaluation]) -> dict[str, pl.DataFrame]:
    """As `csv_tables`, of all ranks below each other with the column `rank` in front."""
    tables: dict[str, list[pl.DataFrame]] = {}
    for rank, found in by_rank.items():
        for name, table in csv_tables(found).items():
            tables.setdefault(name, []).append(table.select(pl.lit(rank).alias("rank"), pl.all()))
    return {name: pl.concat(parts, how="vertical_relaxed") for name, parts in tables.items()}


def ranks_text(by_rank: Mapping[str, Evaluation]) -> str:
    """A line a rank, for eyes; then what has to be known about the specimens."""
    rows = []
    for rank, found in by_rank.items():
        micro, macro = found.metrics["top_1"]["micro"], found.metrics["top_1"]["macro"]
        ends = [interval(score.low, score.high) for score in (micro, macro)]
        f1 = found.metrics["f1"]["macro"].value
        others = [found.counts[name] for name in AT_RANK]
        rows.append([rank, micro.value, ends[0], macro.value, ends[1], f1, found.n, macro.classes, *others])
    header = ["rank", "top_1 micro", "95 %", "top_1 macro", "95 %", "F1 macro", "n", "taxa", *AT_RANK]
    told: dict[str, list[str]] = {}
    for rank, found in by_rank.items():
        for line in counted(found, [name for name in COUNTS if name not in AT_RANK]):
            told.setdefault(line, []).append(rank)
    lines = [
        line if len(ranks) == len(by_rank) else f"{', '.join(ranks)}: {line}" for line, ranks in told.items()
    ]
    return "\n".join([place(next(iter(by_rank.values()))), *lines, "", out.table(rows, header)])


def text(found: Evaluation) -> str:
    """The evaluation for eyes."""
    parts = [caption(found), *counted(found), "", out.table(*metric_rows(found))]
    for reason, names in without(found).items():
        parts.append(f"not computable: {', '.join(names)} ({reason})")
    parts += notes(found)
    ranks = found.record.get("ranks") or ()
    if len(ranks) > 1:
        parts.append(f"the model names {', '.join(ranks)}: --rank all compares at each")
    shown = found.per_class.head(SHOWN)
    rows = [
        [
            row["taxon"],
            row["support"],
            row["correct"],
            row["recall"],
            interval(row["recall_low"], row["recall_high"]),
            row["precision"],
            row["f1"],
            f"{row['confused_with']} ({row['confused']:,})" if row["confused"] else None,
        ]
        for row in shown.to_dicts()
    ]
    header = ["taxon", "n", "right", "recall", "95 %", "precision", "F1", "mostly taken for"]
    parts += ["", out.table(rows, header)]
    if found.per_class.height > SHOWN:
        parts.append(f"… and {found.per_class.height - SHOWN:,} more taxa: --csv or --json gives all")
    return "\n".join(parts)
