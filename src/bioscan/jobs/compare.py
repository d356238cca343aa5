"""Runs side by side: mean and deviation over seeds, beside the figures published with the paper, and the
differences between kinds of runs on the same specimens. No torch.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl

from bioscan.analysis.groups import groups_of
from bioscan.analysis.paired import holm, mcnemar, paired_bootstrap
from bioscan.analysis.published import PER_CLASS, TEST_SIZES, Figure, figures_of
from bioscan.data.metadata import read_metadata, scan_metadata
from bioscan.data.predictions import FORMS as PREDICTION_FORMS
from bioscan.errors import BioscanError, DataError, RequestError
from bioscan.jobs.evaluate import Evaluation, evaluate, evaluate_ranks
from bioscan.jobs.evaluation_inputs import NO_EXPERIMENT
from bioscan.jobs.experiments import EVALUATION, ONLY_TIME, PLAN, PREDICTIONS
from bioscan.vocabulary import EXPERIMENTS, KEYS, RANKS

TASK: Final = ("experiment", "role", "within", "rank")
"""Columns that say what was asked of a model."""
KIND: Final = ("model", "loss", "images", "variant")
"""Columns that say which runs repeat one another, with other seeds."""

EVERY_PAIR: Final = 6
"""Kinds of runs of which every pair is compared; of more, each is with the one that is most often right."""

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
    one run), `lowest`, `highest`; of one run `low` and `high`, the ends of its 95 % interval, else null."""
    per_class: pl.DataFrame
    """Per group: TASK, KIND, `taxon`, `support` (of the first run), `runs`, `recall` (mean), `deviation`,
    `published` (a bar of a figure, to two decimals), `published_support`."""
    pairs: pl.DataFrame
    """Two groups `a` and `b` of a task on the `n` specimens that both answered: TASK, how many runs each has
    (`runs_a`, `runs_b`), top-1 accuracies `micro_a`, `micro_b`, their difference `micro` (a less b) with the
    95 % interval `micro_low`, `micro_high`, and the same for `macro`; where both are single runs, specimens
    right by one alone (`only_a`, `only_b`) and `p` of McNemar's exact test, `p_holm` corrected for the tests
    of the task. Empty where the answers of single specimens are not known."""
    published: tuple[Figure, ...]
    """What belongs beside the scores, by experiment."""
    unfinished: list[str]
    """Runs without an evaluation."""
    notes: list[str]
    """What has to be known before numbers are compared."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        tables = {name: getattr(self, name).to_dicts() for name in ("runs", "scores", "per_class", "pairs")}
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
    specimens: pl.DataFrame | None
    """Key, `taxon`, `right`: of predictions."""


def compare(
    sources: Sequence[Path | str],
    *,
    catalogue: Path | str | None = None,
    rank: str | None = None,
    experiment: str | None = None,
    role: str | None = None,
    group: str = "none",
) -> Comparison:
    """Gather evaluations of runs, and with a catalogue compare their answers specimen by specimen.

    Runs that differ in their seed alone are repetitions. Where the settings of a run are not known (another
    tool's predictions) it repeats no other.

    Tests and intervals of differences have specimens as their sample, never the seeds: nothing can be tested
    on three of them. A group of several seeds is taken as its mean over them, per specimen, and has an
    interval of the difference alone; McNemar's test is between single runs. Both speak of the models that
    were trained; how much another training would differ is what the deviation over seeds shows. The group
    that others are compared with, where there are many, is the best on these specimens: it owes some of that
    to chance.

    Args:
        sources: Plan folders, folders of run folders, run folders, evaluations (`.json`, as `bioscan evaluate
            --output` writes them) or, with a catalogue, predictions (`.parquet`, `.csv`).
        catalogue: True names, for predictions that are not evaluated yet, and for comparing the answers of
            runs: their folders hold predictions beside the evaluation.
        rank: As the next ones in `jobs.evaluate.evaluate`, for those; `all`: each that they name.
        experiment: Split column.
        role: Whose specimens count.
        group: What makes specimens resemble each other, of `analysis.groups`: `plate`, `bin`, a column,
            `auto`. Intervals of differences are then of whole groups, resampled; McNemar's test takes
            specimens as independent all the same.

    Raises:
        RequestError: nothing to compare; predictions without a catalogue; groups without one.
        DataError: a file that cannot be read.
    """
    if group != "none" and catalogue is None:
        raise RequestError("groups of specimens come from the catalogue: pass --catalogue")
    found: list[_Found] = []
    unfinished: list[str] = []
    notes: list[str] = []
    seen: set[Path] = set()
    for source in map(Path, sources):
        for place in _places(source):
            key = (place / EVALUATION if (place / EVALUATION).is_file() else place).resolve()
            if key in seen:
                continue
            seen.add(key)
            made = _read(place, catalogue, rank, experiment, role, notes)
            found += made
            if not made:
                unfinished.append(place.name)
    if not found:
        left = f" (unfinished runs: {len(unfinished):,})" if unfinished else ""
        raise RequestError(f"no evaluation in {', '.join(map(str, sources))}{left}")
    runs = _runs(found)
    scores, per_class = _scores(runs, found), _per_class(runs, found)
    experiments = [e for e in runs["experiment"].unique(maintain_order=True) if e]
    pairs = _pairs(runs, found, _groups(catalogue, group), notes)
    at_task = {row["experiment"] for row in runs.to_dicts() if as_published(row)}
    return Comparison(
        runs=runs,
        scores=scores,
        per_class=per_class,
        pairs=pairs,
        published=tuple(f for e in experiments if e in at_task for f in figures_of(e)),
        unfinished=unfinished,
        notes=[*_notes(runs, found), *notes],
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
    place: Path,
    catalogue: Path | str | None,
    rank: str | None,
    experiment: str | None,
    role: str | None,
    notes: list[str],
) -> list[_Found]:
    """The evaluations of a place, one for each rank; none of an unfinished run. Adds to the notes."""
    folder = place if place.is_dir() else place.parent
    if place.is_dir() or not place.exists():
        files = [f for f in (place / EVALUATION, place / PREDICTIONS) if f.is_file()]
        if not files or (files[0].name == PREDICTIONS and catalogue is None):
            return []
        file, name = files[0], place.name
    else:
        files = [place]
        file, name = place, folder.name if place.name in (EVALUATION, PREDICTIONS) else place.stem
    if file.suffix in PREDICTION_FORMS:
        if catalogue is None:
            raise RequestError(f"{file} holds predictions: pass --catalogue with the true names")
        asked: dict[str, Any] = {"experiment": experiment, "role": role}
        if rank == "all":
            fresh = [*evaluate_ranks(file, catalogue, **asked).values()]
        else:
            fresh = [evaluate(file, catalogue, rank=rank, **asked)]
        evaluations: list[tuple[Any, pl.DataFrame | None]] = [(e.to_dict(), _right(e)) for e in fresh]
    else:
        content = _json(file)
        stored = content["ranks"].values() if "ranks" in content else [content]
        evaluations = [(evaluation, None) for evaluation in stored]
    made = []
    for evaluation, specimens in evaluations:
        try:
            record = evaluation["record"]
            _ = evaluation["metrics"]["top_1"]["micro"], evaluation["per_class"], evaluation["n"]
            _ = evaluation["rank"]
        except (KeyError, TypeError, AttributeError):
            raise DataError(f"{file}: no evaluation, as bioscan evaluate --output writes it") from None
        if specimens is None and catalogue is not None and len(files) > 1:
            specimens = _specimens(files[1], catalogue, evaluation, name, notes)
        settings = record.get("training") or _settings_of(folder, record)
        made.append(_Found(name, evaluation, settings, record.get("images"), specimens))
    return made


def _specimens(
    predictions: Path, catalogue: Path | str, evaluation: Mapping[str, Any], name: str, notes: list[str]
) -> pl.DataFrame | None:
    """The answers that an evaluation was made of; None, with a note, where they cannot be had."""
    task: dict[str, Any] = {key: evaluation.get(key) for key in TASK}
    task["experiment"] = task["experiment"] or NO_EXPERIMENT
    try:
        fresh = evaluate(predictions, catalogue, ks=(1,), sets=(), **task)
    except BioscanError as error:
        notes.append(f"{name}: no paired tests, as its predictions cannot be scored ({error})")
        return None
    scored = evaluation["n"], evaluation["metrics"]["top_1"]["micro"]["value"]
    now = fresh.n, fresh.metrics["top_1"]["micro"].value
    if now != scored:
        notes.append(
            f"{name}: no paired tests, as its evaluation is of other predictions or another catalogue "
            f"({scored[0]:,} specimens, now {now[0]:,}; top-1 {scored[1]}, now {now[1]}): evaluate it again"
        )
        return None
    return _right(fresh)


def _right(evaluation: Evaluation) -> pl.DataFrame:
    right = pl.col("named").eq_missing(pl.col("taxon")).alias("right")
    return evaluation.specimens.select(evaluation.key, "taxon", right)


def _settings_of(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the training in a folder, if its model made the predictions; {} where nobody knows."""
    model = folder / "model" / "model.json"
    if not model.is_file():
        return {}
    info = _json(model)
    weights = record.get("weights_sha256"), info.get("weights_sha256")
    if all(weights):  # a model that was calibrated anew since has another content, and the same settings
        made_here = weights[0] == weights[1]
    else:
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
        settings |= {f"predicted with {k}": record[k] for k in ("tau", "decode") if k in record}
        ranks = record.get("ranks") or one.settings.get("ranks") or [one.settings.get("rank")]
        told[place] = settings | ({"ranks": ",".join(ranks)} if all(ranks) else {})
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
        {"place": place, "metric": metric, "average": average}
        | {name: score.get(name) for name in ("value", "low", "high")}
        for place in runs["place"]
        for metric, averages in found[place].evaluation["metrics"].items()
        for average, score in averages.items()
    )
    numbers = dict.fromkeys(("value", "low", "high"), pl.Float64)
    schema = {"metric": pl.String, "average": pl.String, **numbers}
    values = _long(runs, rows, schema).filter(pl.col("value").is_not_null() & pl.col("value").is_not_nan())
    return values.group_by(*TASK, *KIND, "metric", "average", maintain_order=True).agg(
        pl.len().alias("runs"),
        pl.col("value").mean().alias("mean"),
        pl.col("value").std(ddof=1).alias("deviation"),
        pl.col("value").min().alias("lowest"),
        pl.col("value").max().alias("highest"),
        *(pl.when(pl.len() == 1).then(pl.col(end).first()).alias(end) for end in ("low", "high")),
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
        if any(row["experiment"] == name and as_published(row) for row in runs.to_dicts())
    ]
    columns = {
        "experiment": pl.String,
        "taxon": pl.String,
        "published": pl.Float64,
        "published_support": pl.Int64,
    }
    table = pl.DataFrame(bars, schema=columns)
    joined = grouped.join(table, on=["experiment", "taxon"], how="left", maintain_order="left")
    published = [as_published(row) for row in joined.to_dicts()]
    return joined.with_columns(
        pl.when(pl.Series(published, dtype=pl.Boolean)).then(pl.col(c)).alias(c)
        for c in ("published", "published_support")
    )


def as_published(task: Mapping[str, Any]) -> bool:
    """Whether a task is one of the paper's: its experiment, rank, and the test part."""
    experiment = EXPERIMENTS.get(task["experiment"] or "")
    return (
        experiment is not None
        and (task["rank"], task["role"]) == (experiment.rank, "test")
        and (task["within"] or experiment.within) == experiment.within
    )


# -- pairs


_PAIRS: Final[dict[str, Any]] = {
    **dict.fromkeys((*TASK, "a", "b"), pl.String),
    **dict.fromkeys(("runs_a", "runs_b", "n"), pl.Int64),
    **{
        column: pl.Float64
        for average in ("micro", "macro")
        for column in (f"{average}_a", f"{average}_b", average, f"{average}_low", f"{average}_high")
    },
    **{"only_a": pl.Int64, "only_b": pl.Int64, "p": pl.Float64, "p_holm": pl.Float64},
}


@dataclass(frozen=True)
class _Group:
    """The runs of a kind, as one."""

    name: str
    runs: int
    answers: pl.DataFrame
    """Key, `taxon`, `right`: share of the runs that are right."""


def _pairs(
    runs: pl.DataFrame, found: Sequence[_Found], groups: pl.DataFrame | None, notes: list[str]
) -> pl.DataFrame:
    """The table `Comparison.pairs`; adds to the notes."""
    rows: list[dict[str, Any]] = []
    several = False
    for _, task in runs.group_by(*TASK, maintain_order=True):
        varying = [column for column in KIND if task[column].n_unique() > 1] or ["model"]
        kinds = []
        for _, kind in task.group_by(*KIND, maintain_order=True):
            name = " ".join(str(kind[column][0]) for column in varying if kind[column][0] is not None)
            name = name or kind["model"][0]
            answers = [found[place].specimens for place in kind["place"]]
            kinds += _as_one(name, [one for one in answers if one is not None])
            several = several or kind.height < task.height
        made = []
        for a, b in _to_compare(kinds):
            compared = _compared(a, b, groups)
            if compared is None:
                notes.append(f"{a.name} and {b.name} have no specimens in common")
            else:
                made.append({column: task[column][0] for column in TASK} | compared)
        tested = [row for row in made if "p" in row]
        for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
            row["p_holm"] = p
        rows += made
    if several and all(one.specimens is None for one in found):
        notes.append(
            "no paired tests: they need the answers of single specimens, from predictions (or run folders "
            "that hold them) and --catalogue"
        )
    return pl.DataFrame(rows, schema=_PAIRS)


def _as_one(name: str, answers: Sequence[pl.DataFrame]) -> list[_Group]:
    """The runs of a kind, on the specimens that all of them answered; none where no answers are known."""
    if not answers or len({one.columns[0] for one in answers}) > 1:
        return []
    key = answers[0].columns[0]
    mean = (
        pl.concat(answers)
        .group_by(key, maintain_order=True)
        .agg(pl.col("taxon").first(), pl.col("right").mean(), pl.len().alias("runs"))
    )
    return [_Group(name, len(answers), mean.filter(pl.col("runs") == len(answers)).drop("runs"))]


def _to_compare(groups: Sequence[_Group]) -> Iterator[tuple[_Group, _Group]]:
    """Every pair, or of many groups the best with each."""
    if len(groups) <= EVERY_PAIR:
        yield from itertools.combinations(groups, 2)
        return
    best = max(groups, key=lambda group: float(np.mean(group.answers["right"].to_numpy())))
    yield from ((best, group) for group in groups if group is not best)


def _compared(a: _Group, b: _Group, groups: pl.DataFrame | None) -> dict[str, Any] | None:
    """A row without its task; None where there is no specimen that both answered."""
    key = a.answers.columns[0]
    if key != b.answers.columns[0]:
        return None
    both = a.answers.join(b.answers.select(key, right_b="right"), on=key, maintain_order="left")
    if both.is_empty():
        return None
    groups_N = None
    if groups is not None:
        of_specimen = both.join(groups.select(key, "group"), on=key, how="left", maintain_order="left")
        groups_N = of_specimen["group"].rank("dense").to_numpy().astype(np.int64) - 1
    right_a_N, right_b_N = both["right"].to_numpy(), both["right_b"].to_numpy()
    classes_N = both["taxon"].rank("dense").to_numpy().astype(np.int64) - 1
    row: dict[str, Any] = {"a": a.name, "b": b.name, "runs_a": a.runs, "runs_b": b.runs, "n": both.height}
    generator = np.random.default_rng(1)
    by_class = both.group_by("taxon").agg(pl.col("right", "right_b").mean())
    for average, difference in paired_bootstrap(
        right_a_N, right_b_N, classes_N, generator, groups_N=groups_N
    ).items():
        of = both if average == "micro" else by_class
        row |= {f"{average}_a": of["right"].mean(), f"{average}_b": of["right_b"].mean()}
        row |= {average: difference.value}
        row |= {f"{average}_low": difference.low, f"{average}_high": difference.high}
    if a.runs == b.runs == 1:
        row |= mcnemar(right_a_N == 1, right_b_N == 1)._asdict()
    return row


def _groups(catalogue: Path | str | None, by: str) -> pl.DataFrame | None:
    """Keys of the catalogue and `group`, the name of each specimen's group."""
    if by == "none" or catalogue is None:
        return None
    known = scan_metadata(catalogue).collect_schema().names()
    frame = read_metadata(catalogue, [column for column in known if column in (*KEYS, "uri", by)])
    return frame.select(column for column in KEYS if column in known).with_columns(
        groups_of(frame, by)[0].alias("group")
    )


def _notes(runs: pl.DataFrame, found: Sequence[_Found]) -> Iterable[str]:
    for (experiment, *rest), task in runs.group_by(*TASK, maintain_order=True):
        row = dict(zip(TASK, (experiment, *rest), strict=True))
        title = f"{experiment or 'all specimens'} at rank {row['rank']}"
        sizes = task["n"].unique().sort().to_list()
        if len(sizes) > 1 or task["split_hash"].drop_nulls().n_unique() > 1:
            yield f"{title}: the runs were not scored on the same specimens ({_numbers(sizes)})"
        if figures_of(str(experiment)) and as_published(row) and sizes != [TEST_SIZES[str(experiment)]]:
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
