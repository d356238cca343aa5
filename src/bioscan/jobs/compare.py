"""Runs side by side: mean and deviation over seeds, beside the figures published with the paper. No torch."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import polars as pl

from bioscan.analysis.published import PER_CLASS, TEST_SIZES, Figure, figures_of
from bioscan.data.predictions import FORMS as PREDICTION_FORMS
from bioscan.errors import DataError, RequestError
from bioscan.jobs.evaluate import evaluate, evaluate_ranks
from bioscan.jobs.experiments import EVALUATION, ONLY_TIME, PLAN, PREDICTIONS
from bioscan.vocabulary import EXPERIMENTS, RANKS

TASK: Final = ("experiment", "role", "within", "rank")
"""Columns that say what was asked of a model."""
KIND: Final = ("model", "loss", "images", "variant")
"""Columns that say which runs repeat one another, with other seeds."""

_NAMED: Final = ("seed", "experiment", "rank", "ranks", "within", "model", "loss")
"""Settings that have a column, or that the task follows from."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` finds; a group is the runs of one task and kind."""

    runs: pl.DataFrame
    """A row each: `place` (its number), `run`, the columns of TASK and KIND, `seed`, `n` (specimens scored),
    `classes`, `split_hash`, `model_sha256`. Null: not known."""
    scores: pl.DataFrame
    """Per group: TASK, KIND, `metric`, `average`, `runs`, `mean`, `deviation` (of a sample, n − 1; null of
    one run), `lowest`, `highest`."""
    per_class: pl.DataFrame
    """Per group: TASK, KIND, `taxon`, `support` (of the first run), `runs`, `recall` (mean), `deviation`,
    `published` (a bar of a figure, to two decimals), `published_support`."""
    published: tuple[Figure, ...]
    """What belongs beside the scores, by experiment."""
    unfinished: list[str]
    """Runs without an evaluation."""
    notes: list[str]
    """What has to be known before numbers are compared."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        tables = {name: getattr(self, name).to_dicts() for name in ("runs", "scores", "per_class")}
        figures = [vars(figure) for figure in self.published]
        return {**tables, "published": figures, "unfinished": self.unfinished, "notes": self.notes}


@dataclass(frozen=True)
class _Found:
    """An evaluation, and what is known of its run."""

    name: str
    evaluation: Mapping[str, Any]
    settings: Mapping[str, Any]
    """Of the training; empty where they are not known."""
    images: str | None


def compare(
    sources: Sequence[Path | str],
    *,
    catalogue: Path | str | None = None,
    rank: str | None = None,
    experiment: str | None = None,
    role: str | None = None,
) -> Comparison:
    """Gather evaluations of runs.

    Runs that differ in their seed alone are repetitions. Where the settings of a run are not known (another
    tool's predictions) it repeats no other.

    Args:
        sources: Plan folders, folders of run folders, run folders, evaluations (`.json`, as `bioscan evaluate
            --output` writes them) or, with a catalogue, predictions (`.parquet`, `.csv`).
        catalogue: True names, for predictions that are not evaluated yet.
        rank: As the next ones in `jobs.evaluate.evaluate`, for those; `all`: each that they name.
        experiment: Split column.
        role: Whose specimens count.

    Raises:
        RequestError: nothing to compare; predictions without a catalogue.
        DataError: a file that cannot be read.
    """
    found: list[_Found] = []
    unfinished: list[str] = []
    seen: set[Path] = set()
    for source in map(Path, sources):
        for place in _places(source):
            key = (place / EVALUATION if (place / EVALUATION).is_file() else place).resolve()
            if key in seen:
                continue
            seen.add(key)
            made = _read(place, catalogue, rank, experiment, role)
            found += made
            if not made:
                unfinished.append(place.name)
    if not found:
        left = f" (unfinished runs: {len(unfinished):,})" if unfinished else ""
        raise RequestError(f"no evaluation in {', '.join(map(str, sources))}{left}")
    runs = _runs(found)
    scores, per_class = _scores(runs, found), _per_class(runs, found)
    experiments = [e for e in runs["experiment"].unique(maintain_order=True) if e]
    at_task = {row["experiment"] for row in runs.to_dicts() if _as_published(row)}
    return Comparison(
        runs=runs,
        scores=scores,
        per_class=per_class,
        published=tuple(f for e in experiments if e in at_task for f in figures_of(e)),
        unfinished=unfinished,
        notes=[*_notes(runs, found)],
    )


# -- finding


def _places(source: Path) -> list[Path]:
    """Run folders, evaluations and predictions that a source stands for."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise RequestError(f"{source}: no such run, evaluation or predictions")
    if (source / PLAN).is_file():
        planned = _json(source / PLAN).get("runs", [])
        return [source / "runs" / run["name"] for run in planned]
    if _is_run(source):
        return [source]
    inside = sorted(entry for entry in source.iterdir() if entry.is_dir() and _is_run(entry))
    if not inside:
        raise RequestError(f"{source} holds no runs: no {EVALUATION}, {PREDICTIONS} or record.json")
    return inside


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (EVALUATION, PREDICTIONS, "record.json"))


def _read(
    place: Path, catalogue: Path | str | None, rank: str | None, experiment: str | None, role: str | None
) -> list[_Found]:
    """The evaluations of a place, one for each rank; none of an unfinished run."""
    folder = place if place.is_dir() else place.parent
    if place.is_dir() or not place.exists():
        files = [f for f in (place / EVALUATION, place / PREDICTIONS) if f.is_file()]
        if not files or (files[0].name == PREDICTIONS and catalogue is None):
            return []
        file, name = files[0], place.name
    else:
        file, name = place, folder.name if place.name in (EVALUATION, PREDICTIONS) else place.stem
    if file.suffix in PREDICTION_FORMS:
        if catalogue is None:
            raise RequestError(f"{file} holds predictions: pass --catalogue with the true names")
        asked: dict[str, Any] = {"experiment": experiment, "role": role}
        if rank == "all":
            evaluations = [e.to_dict() for e in evaluate_ranks(file, catalogue, **asked).values()]
        else:
            evaluations = [evaluate(file, catalogue, rank=rank, **asked).to_dict()]
    else:
        content = _json(file)
        evaluations = list(content["ranks"].values()) if "ranks" in content else [content]
    made = []
    for evaluation in evaluations:
        try:
            record = evaluation["record"]
            _ = evaluation["metrics"]["top_1"], evaluation["per_class"], evaluation["n"], evaluation["rank"]
        except (KeyError, TypeError, AttributeError):
            raise DataError(f"{file}: no evaluation, as bioscan evaluate --output writes it") from None
        settings = record.get("training") or _settings_of(folder, record)
        made.append(_Found(name, evaluation, settings, record.get("images")))
    return made


def _settings_of(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the training in a folder, if its model made the predictions; {} where nobody knows."""
    model = folder / "model" / "model.json"
    if not model.is_file():
        return {}
    info = _json(model)
    made_here = record.get("model_sha256") in (None, info.get("content_sha256"))
    settings: dict[str, Any] = info.get("settings", {}) if made_here else {}
    return settings


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: no evaluation, as bioscan evaluate --output writes it")
    return content


# -- groups


def _runs(found: Sequence[_Found]) -> pl.DataFrame:
    rows = []
    for one in found:
        evaluation, record = one.evaluation, one.evaluation["record"]
        rows.append(
            {
                "run": one.name,
                "experiment": evaluation.get("experiment"),
                "role": evaluation.get("role"),
                "within": evaluation.get("within"),
                "rank": evaluation["rank"],
                "model": one.settings.get("model") or record.get("model") or one.name,
                "loss": one.settings.get("loss"),
                "images": one.images,
                "seed": one.settings.get("seed"),
                "n": evaluation["n"],
                "classes": evaluation["metrics"]["top_1"]["macro"]["classes"],
                "split_hash": record.get("split_hash"),
                "model_sha256": record.get("model_sha256"),
            }
        )
    text = dict.fromkeys(("run", *TASK, "model", "loss", "images", "split_hash", "model_sha256"), pl.String)
    schema: dict[str, Any] = {**text, "seed": pl.Int64, "n": pl.Int64, "classes": pl.Int64}
    runs = pl.DataFrame(rows, schema=schema).with_row_index("place")
    variants: dict[int, str | None] = {}
    for _, group in runs.group_by(*TASK, "model", "loss", "images", maintain_order=True):
        variants |= _variants({place: found[place] for place in group["place"]})
    by_table = [
        pl.col(column).replace_strict([*names], range(len(names)), default=len(names), return_dtype=pl.Int64)
        for column, names in (("experiment", EXPERIMENTS), ("rank", RANKS))
    ]
    return runs.with_columns(
        pl.Series("variant", [variants[place] for place in range(len(found))], pl.String)
    ).sort(by_table[0], "experiment", by_table[1], "within", "role", *KIND, "seed", "place")


def _variants(group: Mapping[int, _Found]) -> dict[int, str | None]:
    """Of runs of one model and loss: what else tells them apart, beside the seed."""
    told = {}
    for place, one in group.items():
        settings = {k: v for k, v in one.settings.items() if k not in (*_NAMED, *ONLY_TIME)}
        record = one.evaluation["record"]
        told[place] = settings | {f"predicted with {k}": record[k] for k in ("tau", "decode") if k in record}
    keys = dict.fromkeys(key for values in told.values() for key in values)
    varying = [k for k in keys if len({json.dumps(values.get(k)) for values in told.values()}) > 1]
    made = {}
    for place, one in group.items():
        parts = [f"{key}={_short(told[place][key])}" for key in varying if key in told[place]]
        if not one.settings and len(group) > 1:  # nobody knows whether it repeats another
            parts.insert(0, one.name)
        made[place] = ", ".join(parts) or None
    return made


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _long(runs: pl.DataFrame, rows: Iterable[dict[str, Any]], schema: Mapping[str, Any]) -> pl.DataFrame:
    """Rows with the column `place`, and the group columns of their run."""
    return pl.DataFrame(list(rows), schema={"place": pl.UInt32, **schema}).join(
        runs.select("place", *TASK, *KIND), on="place", how="inner"
    )


def _scores(runs: pl.DataFrame, found: Sequence[_Found]) -> pl.DataFrame:
    rows = (
        {"place": place, "metric": metric, "average": average, "value": score["value"]}
        for place in runs["place"]
        for metric, averages in found[place].evaluation["metrics"].items()
        for average, score in averages.items()
    )
    schema = {"metric": pl.String, "average": pl.String, "value": pl.Float64}
    values = _long(runs, rows, schema).filter(pl.col("value").is_not_null() & pl.col("value").is_not_nan())
    return values.group_by(*TASK, *KIND, "metric", "average", maintain_order=True).agg(
        pl.len().alias("runs"),
        pl.col("value").mean().alias("mean"),
        pl.col("value").std(ddof=1).alias("deviation"),
        pl.col("value").min().alias("lowest"),
        pl.col("value").max().alias("highest"),
    )


def _per_class(runs: pl.DataFrame, found: Sequence[_Found]) -> pl.DataFrame:
    rows = (
        {"place": place, "taxon": row["taxon"], "support": row["support"], "recall": row["recall"]}
        for place in runs["place"]
        for row in found[place].evaluation["per_class"]
    )
    schema = {"taxon": pl.String, "support": pl.Int64, "recall": pl.Float64}
    recalls = _long(runs, rows, schema).filter(pl.col("support") > 0)
    grouped = recalls.group_by(*TASK, *KIND, "taxon", maintain_order=True).agg(
        pl.col("support").first(),
        pl.len().alias("runs"),
        pl.col("recall").mean(),
        pl.col("recall").std(ddof=1).alias("deviation"),
    )
    bars = [
        {"experiment": name, "taxon": taxon, "published": bar.recall, "published_support": bar.test}
        for name, classes in PER_CLASS.items()
        for taxon, bar in classes.items()
        if any(row["experiment"] == name and _as_published(row) for row in runs.to_dicts())
    ]
    columns = {
        "experiment": pl.String,
        "taxon": pl.String,
        "published": pl.Float64,
        "published_support": pl.Int64,
    }
    table = pl.DataFrame(bars, schema=columns)
    joined = grouped.join(table, on=["experiment", "taxon"], how="left", maintain_order="left")
    as_published = [_as_published(row) for row in joined.to_dicts()]
    return joined.with_columns(
        pl.when(pl.Series(as_published, dtype=pl.Boolean)).then(pl.col(c)).alias(c)
        for c in ("published", "published_support")
    )


def _as_published(task: Mapping[str, Any]) -> bool:
    """Whether a task is one of the paper's: its experiment, rank, and the test part."""
    experiment = EXPERIMENTS.get(task["experiment"] or "")
    return (
        experiment is not None
        and (task["rank"], task["role"]) == (experiment.rank, "test")
        and (task["within"] or experiment.within) == experiment.within
    )


def _notes(runs: pl.DataFrame, found: Sequence[_Found]) -> Iterable[str]:
    for (experiment, *rest), task in runs.group_by(*TASK, maintain_order=True):
        row = dict(zip(TASK, (experiment, *rest), strict=True))
        title = f"{experiment or 'all specimens'} at rank {row['rank']}"
        sizes = task["n"].unique().sort().to_list()
        if len(sizes) > 1 or task["split_hash"].drop_nulls().n_unique() > 1:
            yield f"{title}: the runs were not scored on the same specimens ({_numbers(sizes)})"
        if figures_of(str(experiment)) and _as_published(row) and sizes != [TEST_SIZES[str(experiment)]]:
            yield (
                f"{title}: the published figures are of {TEST_SIZES[str(experiment)]:,} test specimens, ours "
                f"of {_numbers(sizes)}: they say nothing about one another"
            )
    for _, group in runs.group_by(*TASK, *KIND, maintain_order=True):
        seeds = group["seed"].drop_nulls()
        twice = seeds.filter(seeds.is_duplicated()).unique().sort().to_list()
        if twice:
            names = ", ".join(group.filter(pl.col("seed").is_in(twice))["run"])
            yield f"seed {_numbers(twice)} occurs more than once: {names}"
    for place in runs["place"]:
        if found[place].evaluation.get("same_split") is False:
            yield f"{found[place].name}: scored on another split than it was trained with"


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)
