"""`bioscan compare`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import polars as pl
from cyclopts import Parameter

from bioscan.analysis.published import Figure
from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite
from bioscan.app.scores import NOTES, interval
from bioscan.errors import RequestError, unknown
from bioscan.files import refuse_existing, refuse_input, writing_folder
from bioscan.jobs.compare import KIND, TASK, Comparison, as_published, compare

AVERAGES = ("micro", "macro")
"""Averages that the text shows; CSV and JSON have all."""
DEFAULT = ("top_1", "top_5", "f1", "average_1", "average_5")
"""The metrics of the paper's tables."""

PAIRED = (
    "a − b: difference of top-1 on the same specimens, with its 95 % interval (bootstrap of specimens; "
    "several seeds as their mean per specimen)",
    "p: McNemar's exact test between single runs, which takes specimens as independent, also with --group; "
    "Holm: corrected for the tests of a table. All this is about these trained models: what another training "
    "would give is what the deviation over seeds shows",
)
"""What has to be known about paired comparisons."""


def run(
    *runs: Path,
    catalogue: Path | None = None,
    rank: str | None = None,
    experiment: str | None = None,
    role: str | None = None,
    group: str = "none",
    metric: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = DEFAULT,
    per_class: Annotated[bool, Parameter(negative="")] = False,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    csv: Path | None = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Gather runs into the paper's tables: mean and deviation over seeds, beside the published figures.

    Runs that differ in their seed alone are taken together; the deviation is that of a sample (n − 1), the
    interval of a single run its own, at 95 %. Of the paper's own tables no figure is known; what is published
    otherwise is shown with its source. With --catalogue, runs whose predictions are there are also compared
    specimen by specimen: every pair of up to six kinds of runs, else each with the best.

    Args:
        runs: Folder of a plan or of runs, run folders, evaluations (.json); with --catalogue, predictions.
        catalogue: Catalogue or TSV with the true names, for predictions and paired comparisons.
        rank: Of predictions: rank to compare at, or all.
        experiment: Of predictions: split column, or none.
        role: Of predictions: whose specimens count.
        group: Of paired comparisons: draw whole plates, BINs (bin) or groups by a column, as their specimens
            resemble each other; auto or none.
        metric: Metrics that the text shows.
        per_class: Show the recall of each taxon too.
        output: JSON file.
        csv: New folder for runs.csv, scores.csv, per_class.csv, pairs.csv and published.csv.
    """
    if not runs:
        raise RequestError("name the runs: a folder of a plan, run folders, or evaluations")
    for target in filter(None, (output, csv)):
        refuse_existing(target, overwrite=overwrite)
        refuse_input(target, *runs, catalogue)
    found = compare(runs, catalogue=catalogue, rank=rank, experiment=experiment, role=role, group=group)
    there = found.scores["metric"].unique().to_list()
    for name in metric:
        if name not in there and metric != DEFAULT:
            raise unknown("metric", name, there)
    as_json = out.to_json(found.to_dict())
    if output:
        out.write_text(output, as_json + "\n", overwrite=overwrite)
    if csv:
        with writing_folder(csv, overwrite=overwrite) as partial:
            for name, table in csv_tables(found).items():
                table.write_csv(partial / f"{name}.csv")
    out.show(as_json if json else text(found, metric, per_class=per_class))
    return 0


def csv_tables(found: Comparison) -> dict[str, pl.DataFrame]:
    """File name without ending -> table."""
    published = pl.DataFrame([vars(figure) for figure in found.published], schema=list(_FIGURE))
    tables = {name: getattr(found, name) for name in ("runs", "scores", "per_class", "pairs")}
    return {**tables, "published": published}


_FIGURE = Figure.__dataclass_fields__


def text(found: Comparison, metrics: tuple[str, ...], *, per_class: bool) -> str:
    """The tables for eyes."""
    return "\n".join(_lines(found, metrics, per_class))


def _lines(found: Comparison, metrics: tuple[str, ...], per_class: bool) -> Iterator[str]:
    shown: set[str] = set()
    for _, runs in found.runs.group_by(*TASK, maintain_order=True):
        task = runs.row(0, named=True)
        scores = _of_task(found.scores, task).filter(pl.col("average").is_in(AVERAGES))
        present = [m for m in metrics if m in scores["metric"]]
        shown |= {*present}
        figures = [f for f in found.published if f.experiment in (task["experiment"], None)]
        if not as_published(task):
            figures = []
        kinds = [column for column in KIND if runs[column].n_unique() > 1 or column in ("model", "loss")]
        yield f"{_title(task)}: {_sizes(runs)}"
        rows = []
        for group in scores.unique(KIND, maintain_order=True).to_dicts():
            own = scores.filter(*(pl.col(c).eq_missing(pl.lit(group[c])) for c in KIND))
            number = _of_group(runs, group).height
            rows += [
                [
                    *(group[c] for c in kinds),
                    number,
                    average,
                    *(_cell(own, m, average, number) for m in present),
                ]
                for average in AVERAGES
            ]
        rows += [_published_row(figure, len(kinds), present) for figure in figures]
        yield out.table(rows, [*kinds, "runs", "average", *present])
        for figure in figures:
            yield f"published, {figure.average or 'average not said'}: {figure.what} ({figure.source})"
        if per_class:
            yield ""
            yield _per_class(found, runs, task, kinds)
        pairs = _of_task(found.pairs, task)
        if pairs.height:
            yield ""
            yield _pairs(pairs)
        yield ""
    for name, words in NOTES.items():
        if any(metric.rpartition("_")[0] == name for metric in shown):
            yield words
    if found.pairs.height:
        yield from PAIRED
    yield from found.notes
    if found.unfinished:
        yield f"unfinished runs: {len(found.unfinished):,} (first: {found.unfinished[0]})"


def _title(task: dict[str, Any]) -> str:
    which = f"{task['experiment']}, {task['role']}" if task["experiment"] else "all specimens"
    within = f", within {task['within']}" if task["within"] else ""
    return f"{which}{within}, rank {task['rank']}"


def _sizes(runs: pl.DataFrame) -> str:
    parts = []
    for column, word in (("n", "specimens"), ("classes", "taxa")):
        values = runs[column].to_list()
        low, high = min(values), max(values)
        parts.append(f"{low:,} {word}" if low == high else f"{low:,} to {high:,} {word}")
    return " of ".join(parts)


def _of_task(table: pl.DataFrame, task: dict[str, Any]) -> pl.DataFrame:
    return table.filter(*(pl.col(c).eq_missing(pl.lit(task[c])) for c in TASK))


def _of_group(table: pl.DataFrame, group: dict[str, Any]) -> pl.DataFrame:
    return table.filter(*(pl.col(c).eq_missing(pl.lit(group[c])) for c in (*TASK, *KIND)))


def _cell(scores: pl.DataFrame, metric: str, average: str, runs: int) -> str | None:
    """Mean ± deviation, of one run its interval; how many runs, where not all have the metric."""
    found = scores.filter(metric=metric, average=average).to_dicts()
    if not found:
        return None
    shown = _mean(found[0]["mean"], found[0]["deviation"], found[0]["runs"], runs)
    return shown if found[0]["low"] is None else f"{shown} ({interval(found[0]['low'], found[0]['high'])})"


def _mean(mean: float, deviation: float | None, number: int, runs: int) -> str:
    spread = "" if deviation is None else f" ± {deviation:.4f}"
    return f"{mean:.4f}{spread}{f' (n={number})' if number < runs else ''}"


def _published_row(figure: Figure, kinds: int, metrics: list[str]) -> list[Any]:
    values = [f"{figure.value:.4f}" if m == figure.metric else None for m in metrics]
    return ["published", *[None] * (kinds - 1), None, figure.average, *values]


def _pairs(pairs: pl.DataFrame) -> str:
    rows = []
    for row in pairs.to_dicts():
        differences = [
            f"{row[average]:+.4f} ({row[f'{average}_low']:+.4f} to {row[f'{average}_high']:+.4f})"
            for average in AVERAGES
        ]
        only = [row["only_a"], row["only_b"], _p(row["p"]), _p(row["p_holm"])]
        rows.append([row["a"], row["b"], row["n"], *differences, *only])
    names = ["a", "b", "n", *(f"{average} a − b" for average in AVERAGES)]
    return out.table(rows, [*names, "only a right", "only b", "p", "p (Holm)"])


def _p(value: float | None) -> str | None:
    """A probability to two digits."""
    return None if value is None else f"{value:.2g}"


def _per_class(found: Comparison, runs: pl.DataFrame, task: dict[str, Any], kinds: list[str]) -> str:
    """Recall of each taxon, a column a group."""
    table = _of_task(found.per_class, task)
    groups = table.unique(KIND, maintain_order=True).to_dicts()
    taxa = table.unique("taxon", maintain_order=True).sort("support", descending=True, maintain_order=True)
    published = table["published"].is_not_null().any()
    columns = []
    for group in groups:
        number = _of_group(runs, group).height
        own = _of_group(table, group)
        columns.append(
            {r["taxon"]: _mean(r["recall"], r["deviation"], r["runs"], number) for r in own.to_dicts()}
        )
    rows = [
        [
            row["taxon"],
            row["support"],
            *(column.get(row["taxon"]) for column in columns),
            *([row["published_support"], _bar(row["published"])] if published else []),
        ]
        for row in taxa.to_dicts()
    ]
    names = [" ".join(str(group[c]) for c in kinds if group[c] is not None) for group in groups]
    return out.table(rows, ["recall of", "n", *names, *(["published n", "published"] if published else [])])


def _bar(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"
