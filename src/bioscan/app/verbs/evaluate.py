"""`bioscan evaluate`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import polars as pl
from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite, Seed
from bioscan.app.scores import (
    assigned_note,
    assigned_rows,
    bucket_rows,
    caption,
    confidence_lines,
    counted,
    hierarchy_rows,
    interval,
    metric_rows,
    notes,
    place,
    set_rows,
    set_warnings,
    without,
)
from bioscan.errors import RequestError
from bioscan.files import refuse_existing, refuse_input, writing_folder
from bioscan.jobs.evaluate import (
    BUCKETS,
    COUNTS,
    COVERAGE,
    KS,
    SETS,
    Evaluation,
    evaluate,
    evaluate_ranks,
)
from bioscan.jobs.evaluate_hierarchy import METRICS, Hierarchy, evaluate_hierarchy

SHOWN = 40
"""Classes that the text lists; the CSV and JSON have all."""
ALL_RANKS = "all"
"""Instead of a rank: each that the model names."""
NO_SETS = "none"
"""Instead of methods of prediction sets."""
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
    sets: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = SETS,
    coverage: float = COVERAGE,
    buckets: Annotated[tuple[int, int], Parameter(negative="")] = BUCKETS,
    open_set: Annotated[bool, Parameter(negative="")] = False,
    embeddings: Path | None = None,
    model: Path | None = None,
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
            predicted, from the first with several taxa [default: the model's deepest, else the deepest
            predicted].
        experiment: Split column, or none: every labelled specimen counts [default: the model's].
        role: Whose specimens count [default: test].
        within: Only specimens below this taxon [default: the model's].
        k: k of top-k and average-k.
        sets: Conformal prediction sets: lac, aps, raps, pas, mondrian, or none. Their thresholds come from
            validation specimens.
        coverage: Share of the specimens whose true taxon the sets shall hold.
        buckets: Training specimens from which a taxon is medium, no longer few, and above which many.
        open_set: How well specimens of taxa that the model has never seen are told from the others.
        embeddings: Embeddings of the specimens and of those of training, for more scores of --open-set.
        model: Model folder, for the scores of --open-set that need its last layer.
        output: JSON file.
        csv: New folder for a CSV of each table: metrics, per_class, confusion, errors and others.
    """
    for target in filter(None, (output, csv)):
        refuse_existing(target, overwrite=overwrite)
        refuse_input(target, predictions, catalogue, embeddings)
    if not open_set and (embeddings or model):
        raise RequestError("--embeddings and --model are for --open-set")
    which: dict[str, Any] = {"experiment": experiment, "role": role, "within": within, "seed": seed}
    methods = () if sets == (NO_SETS,) else sets
    how: dict[str, Any] = {"ks": k, "sets": methods, "coverage": coverage, "buckets": buckets}
    if open_set:
        from bioscan.app import open_set as shown_open_set
        from bioscan.jobs.open_set import evaluate_open_set

        if rank == ALL_RANKS:
            raise RequestError("--open-set is told at one rank and those above it: name that --rank")
        unseen = evaluate_open_set(
            predictions, catalogue, rank=rank, embeddings=embeddings, model=model, **which
        )
        told, shown = unseen.to_dict(), shown_open_set.text(unseen)
        tables = shown_open_set.csv_tables(unseen)
    elif rank == ALL_RANKS:
        by_rank = evaluate_ranks(predictions, catalogue, **which, **how)
        whole = evaluate_hierarchy(predictions, catalogue, **which)
        ranks = {name: found.to_dict() for name, found in by_rank.items()}
        told = {"ranks": ranks, "hierarchy": whole.to_dict()}
        shown = f"{ranks_text(by_rank)}\n\n{hierarchy_text(whole)}"
        tables = ranks_csv_tables(by_rank) | hierarchy_csv_tables(whole)
    else:
        found = evaluate(predictions, catalogue, rank=rank, **which, **how)
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
    """File name without ending -> table; an empty one is left out."""
    worth = found.confidence
    tables = {
        "metrics": found.table(),
        "per_class": found.per_class,
        "confusion": found.confusion,
        "errors": found.errors(),
    }
    more = {
        "reliability": worth.reliability if worth else None,
        "risk_coverage": worth.risk_coverage if worth else None,
        "buckets": found.buckets,
        "sets": found.sets.with_columns(pl.col("warnings").list.join("; ")),
        "set_sizes": found.set_sizes,
    }
    return tables | {name: table for name, table in more.items() if table is not None and table.height}


def hierarchy_csv_tables(found: Hierarchy) -> dict[str, pl.DataFrame]:
    """As `csv_tables`, of the whole paths."""
    tables = {
        "hierarchy": found.table(),
        "assigned": found.assigned,
        "operating": found.operating,
        "paths": found.specimens,
    }
    return {name: table for name, table in tables.items() if table.height}


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
        error = found.confidence.ece if found.confidence else None
        means = [micro.value, ends[0], macro.value, ends[1], f1, error]
        rows.append([rank, *means, found.n, macro.classes, *others])
    header = ["rank", "top_1 micro", "95 %", "top_1 macro", "95 %", "F1 macro", "ECE", "n", "taxa", *AT_RANK]
    told: dict[str, list[str]] = {}
    for rank, found in by_rank.items():
        for line in counted(found, [name for name in COUNTS if name not in AT_RANK]):
            told.setdefault(line, []).append(rank)
    lines = [
        line if len(ranks) == len(by_rank) else f"{', '.join(ranks)}: {line}" for line, ranks in told.items()
    ]
    return "\n".join([place(next(iter(by_rank.values()))), *lines, "", out.table(rows, header)])


def hierarchy_text(found: Hierarchy) -> str:
    """Whole paths, for eyes: their metrics, then what is assigned at each rank."""
    names = [name for name in METRICS if name in {**found.metrics, **found.assigned_metrics}]
    parts = [
        f"whole paths of {found.n:,} specimens; what is named below or beside the label is not counted",
        out.table(*hierarchy_rows(found)),
        *(f"{name}: {METRICS[name]}" for name in names),
        "",
    ]
    if found.assigned.is_empty():
        return "\n".join([*parts, f"assigned taxa: {found.not_computable['assigned']}"])
    return "\n".join([*parts, "assigned taxa", out.table(*assigned_rows(found)), assigned_note(found)])


def text(found: Evaluation) -> str:
    """The evaluation for eyes."""
    parts = [caption(found), *counted(found), "", out.table(*metric_rows(found))]
    for reason, names in without(found).items():
        parts.append(f"not computable: {', '.join(names)} ({reason})")
    parts += notes(found)
    parts += _more(found)
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


def _more(found: Evaluation) -> Iterable[str]:
    """Confidence, buckets and prediction sets, where they are there."""
    if found.confidence:
        yield from ("", *confidence_lines(found.confidence))
    if found.buckets.height:
        yield from ("", out.table(*bucket_rows(found.buckets)))
    if found.sets.height:
        yield from ("", out.table(*set_rows(found.sets)), *set_warnings(found.sets))
