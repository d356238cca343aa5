"""From a predictions table and a catalogue to scores. No model, no torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.analysis import confidence, conformal, groups, intervals, metrics
from bioscan.errors import RequestError, near, unknown
from bioscan.jobs.evaluation_inputs import (
    AtRank,
    Inputs,
    Ints,
    Taxa,
    down_to,
    joined_at,
    leaf_paths,
    numbers_of,
    paths_of,
    rank_to_compare,
)
from bioscan.jobs.evaluation_scores import (
    SETS_SCHEMA,
    SIZES_SCHEMA,
    FromScores,
    SetsWanted,
    Threshold,
    Validation,
    from_scores,
    needing_scores,
)
from bioscan.vocabulary import RANKS

KS: Final = (1, 3, 5, 10)
SETS: Final = ("lac", "pas", "mondrian")
"""Methods of prediction sets that are made unasked: the smallest, the fairest to rare taxa, and a promise for
rare and common taxa each. `aps` and `raps` cost more time than these together."""
COVERAGE: Final = 0.9
BUCKETS: Final = (20, 100)
"""Training specimens of a taxon: fewer are few, up to the second medium, more many (Liu et al. 2019)."""
RISKS: Final = (0.01, 0.02, 0.05, 0.1)
"""Shares of wrong answers for which `Confidence.coverage_at` says how many specimens can be answered."""
AVERAGES: Final = {"macro": "support", "macro_all": "all", "macro_seen": "seen"}
"""Average over classes -> its convention in `metrics.CONVENTIONS`. `micro` is the mean over specimens."""

COUNTS: Final = {
    "failed": "without an answer because the image failed: counted as errors",
    "unnamed": "without a predicted name at the rank: counted as errors",
    "unknown_to_model": "of a taxon that the model cannot name: counted as errors",
    "unlabelled": "without a name in the catalogue at the rank: left out",
    "not_predicted": "not in the predictions: left out",
    "other": "predicted, but of another role or taxon: left out",
    "not_in_catalogue": "predicted, but not in the catalogue: left out",
}


@dataclass(frozen=True)
class Score:
    """A value, how far it may be off by chance, and what it is the mean over."""

    value: float
    low: float
    """Lower end of the 95 % interval: Wilson for shares of specimens, else class-stratified bootstrap."""
    high: float
    n: int
    """Specimens."""
    classes: int | None
    """Classes averaged over; None for micro."""


@dataclass(frozen=True)
class Confidence:
    """What the probability of an answer is worth. See `analysis.confidence` for the formulas.

    A specimen without an answer, or whose answer has no probability, is left out of the calibration errors
    and the reliability curve; in risk and coverage it comes last and is wrong.
    """

    n: int
    """Specimens that count."""
    answered: int
    """Of these, with a probability of their answer."""
    mean: float
    """Mean probability of the answers."""
    accuracy: float
    """Share of the same answers that is right: what `mean` promises."""
    ece: float
    """Expected calibration error, bins of equal width."""
    ece_mass: float
    """The same, bins of equally many specimens."""
    ece_classwise: float | None
    """The same over all classes' probabilities; None where there are no scores."""
    brier: Score | None
    """Mean Brier score, 0 to 2; the interval is the normal one of a mean. None where there are no scores."""
    nll: Score | None
    """Mean negative log-likelihood; its `n` are the specimens whose taxon the model knows. None where there
    are no scores."""
    aurc: float
    """Area under the risk-coverage curve."""
    aurc_best: float
    """The least that it could be with as many errors: all of them less sure than all right answers."""
    coverage_at: dict[float, float]
    """Share of wrong answers -> greatest share of specimens, the surest first, with no more of them. Found on
    the same specimens: a description, no promise."""
    reliability: pl.DataFrame
    """Bins of equal width: `low, high, n, confidence, accuracy, accuracy_low, accuracy_high`."""
    risk_coverage: pl.DataFrame
    """From the surest specimens down: `coverage, threshold, n, risk, low, high`; at most 200 rows. The
    threshold is null where specimens without a probability come in."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        made = {f.name: getattr(self, f.name) for f in fields(self)}
        scores = {name: asdict(made[name]) for name in ("brier", "nll") if made[name]}
        return made | scores | {name: made[name].to_dicts() for name in ("reliability", "risk_coverage")}


BUCKETS_SCHEMA: Final[dict[str, Any]] = {
    "bucket": pl.String,
    "at_least": pl.Int64,
    "at_most": pl.Int64,
    "taxa": pl.Int64,
    "specimens": pl.Int64,
    "micro": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "macro": pl.Float64,
    "macro_low": pl.Float64,
    "macro_high": pl.Float64,
}
"""Columns of `Evaluation.buckets`."""
_TABLES: Final = ("per_class", "confusion", "buckets", "sets", "set_sizes")


@dataclass(frozen=True)
class Evaluation:
    """Scores of one predictions table at one rank."""

    rank: str
    experiment: str | None
    role: str | None
    within: str | None
    n: int
    """Specimens that count: of the role, labelled at the rank, with a row in the predictions."""
    counts: dict[str, int]
    """What `COUNTS` says -> specimens; `unknown_to_model` only where there are scores."""
    metrics: dict[str, dict[str, Score]]
    """Metric (`top_1`, `average_3`, `f1` …) -> `micro` or one of `AVERAGES` -> score."""
    thresholds: dict[str, Threshold]
    """Of the average-k metrics."""
    not_computable: dict[str, str]
    """Metric -> why not."""
    per_class: pl.DataFrame
    """By descending support: `taxon, support, correct, recall, recall_low, recall_high, predicted, precision,
    f1, confused_with, confused` (the most common wrong answer and how often it was given)."""
    confusion: pl.DataFrame
    """Cells that are not empty: `taxon`, `named` (null: no answer), `specimens`."""
    confidence: Confidence | None
    """None where no answer has a probability."""
    buckets: pl.DataFrame
    """Taxa by how many training specimens they have, the most first: `bucket` (many, medium, few, unseen),
    `at_least` and `at_most` (training specimens; null: no bound), `taxa`, `specimens`; top-1 `micro` with its
    interval `low, high`, and `macro` with `macro_low, macro_high`. No rows where training is not known."""
    sets: pl.DataFrame
    """Conformal prediction sets, a row a method: `method`, `asked` (coverage), `threshold`, `calibration` and
    `groups` (validation specimens that calibrate, and their groups), `n`, `coverage` with `low, high`,
    `macro_coverage` (mean over taxa), `mean_size`, `median_size`, `empty` (sets), `warnings` (list)."""
    set_sizes: pl.DataFrame
    """How often a set has a size: `method, size, specimens`."""
    specimens: pl.DataFrame
    """A row each: key, `taxon`, `named`, `probability` of the answer (null where not given), `error`."""
    same_split: bool | None
    """Whether the roles are those that the model was trained with, by their hash; None where it is not known.
    If not, specimens that count here may have been trained on."""
    homonyms: list[str]
    """Names that stand for several taxa here; they are told apart by the ranks above."""
    record: dict[str, Any]
    """What the predictions follow from."""

    @property
    def key(self) -> str:
        """The column by which predictions and catalogue were joined."""
        return self.specimens.columns[0]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: everything but the single specimens."""
        tables = {name: getattr(self, name).to_dicts() for name in _TABLES}
        scores = {
            metric: {average: asdict(score) for average, score in averages.items()}
            for metric, averages in self.metrics.items()
        }
        thresholds = {metric: asdict(threshold) for metric, threshold in self.thresholds.items()}
        made = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "specimens"}
        worth = self.confidence.to_dict() if self.confidence else None
        return made | {"metrics": scores, "thresholds": thresholds, "confidence": worth} | tables

    def table(self) -> pl.DataFrame:
        """The metrics as columns `metric, average, value, low, high, n, classes`."""
        rows = [
            {"metric": metric, "average": average, **asdict(score)}
            for metric, averages in self.metrics.items()
            for average, score in averages.items()
        ]
        return pl.DataFrame(rows, infer_schema_length=None)

    def errors(self) -> pl.DataFrame:
        """The specimens that were not named right, the most confident wrong answers first."""
        wrong = self.specimens.filter(pl.col("named").ne_missing(pl.col("taxon")))
        return wrong.sort("probability", descending=True, nulls_last=True, maintain_order=True)


def evaluate(
    predictions: Path | str | pl.DataFrame,
    catalogue: Path | str | pl.DataFrame,
    *,
    rank: str | None = None,
    experiment: str | None = None,
    role: str | None = None,
    within: str | None = None,
    ks: Sequence[int] = KS,
    sets: Sequence[str] = SETS,
    coverage: float = COVERAGE,
    buckets: tuple[int, int] = BUCKETS,
    seed: int = 1,
) -> Evaluation:
    """Score predictions against the names in a catalogue, joined by key.

    Top-k takes the named taxon first, then the others by probability, ties in the order of the model's
    leaves. Memory does not grow with specimens × taxa.

    Args:
        predictions: A predictions table (scores are taken from the file beside it), or the frame.
        catalogue: A catalogue or TSV, or the frame.
        rank: Rank to compare at; None: the record's, else the deepest with predictions.
        experiment: Split column, or `none`: every labelled specimen counts. None: the record's, if any.
        role: Whose specimens count; None: `test` where there is an experiment.
        within: Only specimens below this taxon; None: the record's.
        ks: k of top-k and average-k.
        sets: Methods of conformal prediction sets, of `analysis.conformal.METHODS`. They are calibrated on
            the validation specimens that the model's calibration kept from its temperature (and a training
            from the choice of the epoch), or on all where it is not known which these are.
        coverage: Share of specimens whose true taxon the sets shall hold.
        buckets: Training specimens of a taxon from which it is medium, and above which many.
        seed: Of the bootstrap.

    Raises:
        RequestError: a column or name that is not there; no specimen left.
        DataError: an input that cannot be used.
    """
    wanted = _Wanted.checked(ks, sets, coverage, buckets, seed)
    found = Inputs.read(predictions, catalogue, experiment=experiment, role=role, within=within, rank=rank)
    return _evaluate(found, rank_to_compare(rank or found.record.get("rank"), found.table), wanted)


def evaluate_ranks(
    predictions: Path | str | pl.DataFrame,
    catalogue: Path | str | pl.DataFrame,
    *,
    experiment: str | None = None,
    role: str | None = None,
    within: str | None = None,
    ks: Sequence[int] = KS,
    sets: Sequence[str] = SETS,
    coverage: float = COVERAGE,
    buckets: tuple[int, int] = BUCKETS,
    seed: int = 1,
) -> dict[str, Evaluation]:
    """Rank -> scores, root down, for each rank of the model; where it has one only, or is not known, for each
    rank that the predictions name, from the first with several taxa. Ranks at which no specimen is labelled
    are left out.

    At each rank the specimens labelled there count: an answer deeper than the label is compared at the
    label's rank, and is unknown, not wrong, below it. The rest as `evaluate`.

    Raises:
        RequestError: a column or name that is not there; no specimen left at any rank.
        DataError: an input that cannot be used.
    """
    wanted = _Wanted.checked(ks, sets, coverage, buckets, seed)
    found = Inputs.read(predictions, catalogue, experiment=experiment, role=role, within=within)
    ranks = found.ranks
    labelled = [rank for rank in ranks if rank in found.frame.columns and found.predicted_at(rank)]
    if not labelled:
        joined_at(found.chosen, found.table, found.key, RANKS[-1])  # tells where no key is in both
        raise RequestError(
            f"no predicted specimen has a name at a rank of the predictions ({', '.join(ranks) or 'none'})"
        )
    return {rank: _evaluate(found, rank, wanted) for rank in labelled}


@dataclass(frozen=True)
class _Wanted:
    """What to compute; the fields are arguments of `evaluate`."""

    ks: tuple[int, ...]
    sets: tuple[str, ...]
    coverage: float
    buckets: tuple[int, int]
    seed: int

    @classmethod
    def checked(
        cls, ks: Sequence[int], sets: Sequence[str], coverage: float, buckets: tuple[int, int], seed: int
    ) -> "_Wanted":
        if not ks or min(ks) < 1:
            raise RequestError("k must be 1 or more")
        for method in sets:
            if method not in conformal.METHODS:
                raise unknown("method of prediction sets", method, conformal.METHODS)
        if not 0 < coverage < 1:
            raise RequestError(f"the coverage of prediction sets must lie between 0 and 1, not {coverage:g}")
        if not 0 < buckets[0] <= buckets[1]:
            raise RequestError(f"buckets are two rising numbers above 0, not {buckets[0]} and {buckets[1]}")
        return cls(tuple(ks), tuple(dict.fromkeys(sets)), coverage, buckets, seed)


def _evaluate(found: Inputs, rank: str, wanted: _Wanted) -> Evaluation:
    """The scores at a rank."""
    table, scores, seed = found.table, found.scores, wanted.seed
    if rank not in found.frame.columns:
        raise RequestError(f"the catalogue has no column '{rank}'{near(rank, found.frame.columns)}")
    key = found.key
    joined = joined_at(found.chosen, table, key, rank)
    counted = joined.filter(pl.col(rank).is_not_null())
    if counted.is_empty():
        raise RequestError(f"none of the {joined.height:,} predicted specimens has a name at rank {rank}")
    truth, answers, model = (
        paths_of(counted, rank),
        paths_of(counted, rank, "named "),
        leaf_paths(scores, rank),
    )
    taxa = Taxa.of(rank, truth, model)
    names = {"taxon": taxa.labels(truth), "named": taxa.labels(answers)}
    specimens = counted.with_columns(**names).select(key, "taxon", "named", "probability", "error")
    leaf_labels = taxa.labels(model)
    known = leaf_labels.drop_nulls().unique(maintain_order=True)
    others = [specimens[column].drop_nulls().unique().sort() for column in ("taxon", "named")]
    labels = pl.concat([known, *others]).unique(maintain_order=True).to_list()
    sample = _Sample.of(specimens, labels)
    training = _training(found, taxa, labels)
    made = {"top_1": _shares(sample.named_N == sample.targets_N, sample, seed)}
    from_all: FromScores | None = None
    why: dict[str, str] = {}
    if scores is None:
        why |= dict.fromkeys(needing_scores(wanted.ks), "there is no scores file beside the predictions")
    elif known.is_empty():
        why |= dict.fromkeys(needing_scores(wanted.ks), f"the model has no taxon at rank {rank}")
    else:
        counts_K = None if training is None else training[: known.len()]
        sets = SetsWanted(wanted.sets, wanted.coverage, counts_K, wanted.buckets)
        validation = _validation(found, taxa, labels[: known.len()])
        at_rank = AtRank.of(scores, numbers_of(leaf_labels, labels), known.len(), rank, found.record)
        from_all = from_scores(
            at_rank, specimens, sample.targets_N, sample.named_N, validation, wanted.ks, sets
        )
        made |= {name: _shares(right_N, sample, seed) for name, right_N in from_all.right.items()}
        why |= from_all.not_computable
    made["f1"] = _f1(sample, seed)
    worth = _confidence(specimens, sample, from_all)
    if worth is None:
        why["confidence"] = f"no answer has a probability (column {rank}_probability)"
    if training is None:
        why["buckets"] = "the catalogue has no training specimens with a name at the rank"
    in_catalogue = found.frame.select(key).join(table.select(key), on=key, how="semi").height
    return Evaluation(
        rank=rank,
        experiment=found.experiment,
        role=found.role,
        within=found.within,
        n=specimens.height,
        counts=_counts(specimens, known if scores else None)
        | {
            "unlabelled": joined.height - counted.height,
            "not_predicted": found.chosen.height - joined.height,
            "other": in_catalogue - joined.height,
            "not_in_catalogue": table.height - in_catalogue,
        },
        metrics=made,
        thresholds=from_all.thresholds if from_all else {},
        not_computable=why,
        per_class=_per_class(sample, labels),
        confusion=_confusion(sample, labels),
        confidence=worth,
        buckets=_buckets(sample, training, wanted),
        sets=from_all.sets if from_all else pl.DataFrame(schema=SETS_SCHEMA),
        set_sizes=from_all.set_sizes if from_all else pl.DataFrame(schema=SIZES_SCHEMA),
        specimens=specimens,
        same_split=found.same_split,
        homonyms=sorted(taxa.homonyms),
        record=found.record,
    )


@dataclass(frozen=True)
class _Sample:
    """Truth and answers as class numbers, and how often each class occurs."""

    targets_N: Ints
    named_N: Ints
    support_C: Ints
    predicted_C: Ints

    @classmethod
    def of(cls, specimens: pl.DataFrame, labels: Sequence[str]) -> "_Sample":
        """Class numbers are places in `labels`."""
        targets_N, named_N = (numbers_of(specimens[column], labels) for column in ("taxon", "named"))
        return cls(
            targets_N,
            named_N,
            metrics.class_counts(targets_N, len(labels)),
            metrics.class_counts(named_N, len(labels)),
        )

    def only(self, rows_N: NDArray[np.bool_]) -> "_Sample":
        """The same classes, fewer specimens."""
        targets_N, named_N = self.targets_N[rows_N], self.named_N[rows_N]
        counts = (metrics.class_counts(column, self.support_C.size) for column in (targets_N, named_N))
        return _Sample(targets_N, named_N, *counts)


def _counts(specimens: pl.DataFrame, known: pl.Series | None) -> dict[str, int]:
    failed = specimens["error"].is_not_null()
    counts = {"failed": int(failed.sum()), "unnamed": int((specimens["named"].is_null() & ~failed).sum())}
    if known is not None:
        counts["unknown_to_model"] = int((~specimens["taxon"].is_in(known.to_list())).sum())
    return counts


# -- specimens of other roles


def _training(found: Inputs, taxa: Taxa, labels: Sequence[str]) -> Ints | None:
    """Training specimens of each class; None where there are none."""
    if found.experiment is None:
        return None
    there = [rank for rank in down_to(taxa.rank) if rank in found.inside.columns]
    columns = found.inside.select(found.experiment, *there)
    rows = columns.filter(pl.col(found.experiment) == "train", pl.col(taxa.rank).is_not_null())
    if rows.is_empty():
        return None
    counted = taxa.labels(paths_of(rows, taxa.rank)).value_counts(name="specimens")
    classes = numbers_of(counted[:, 0], labels)
    counts_C = np.bincount(classes + 1, counted["specimens"].to_numpy(), len(labels) + 1)
    return counts_C[1:].astype(np.int64)


def _validation(found: Inputs, taxa: Taxa, known: Sequence[str]) -> Validation:
    """The labelled validation specimens, and which of them prediction sets are calibrated on."""
    has_role = pl.col(found.experiment) == "validation" if found.experiment else pl.lit(False)
    rows = found.inside.filter(has_role, pl.col(taxa.rank).is_not_null())
    targets_V = numbers_of(taxa.labels(paths_of(rows, taxa.rank)), known)
    cut = found.record.get("calibration_cut")
    by = cut["group"] if cut else "auto"
    column = "uri" if by == "bin" else by
    lacks = by not in ("auto", "plate", "none") and column not in rows.columns
    names, _ = groups.groups_of(rows, "none" if lacks else by)
    calibrates_V = np.ones(rows.height, bool)
    if found.role == "validation":
        calibrates_V[:] = False
        told = "prediction sets come from validation specimens, and these are the ones that are evaluated"
    elif rows.is_empty():
        told = ""
    elif lacks:
        calibrates_V[:] = False
        told = f"the catalogue has no column '{column}', which the model's calibration was cut by"
    elif cut:
        calibrates_V = groups.cut(names, cut["share"], cut["seed"])
        by = "specimen" if by == "none" else by
        told = f"calibrated on the validation specimens that the temperature does not come from (cut by {by})"
    else:
        told = "calibrated on all validation specimens, also those that chose the epoch"
    return Validation(rows[found.key], targets_V, calibrates_V, names.filter(calibrates_V).n_unique(), told)


# -- confidence and buckets


def _confidence(specimens: pl.DataFrame, sample: "_Sample", found: FromScores | None) -> Confidence | None:
    given = pl.when(pl.col("named").is_not_null()).then(pl.col("probability"))
    probability_N = specimens.select(given).to_series().cast(pl.Float64).to_numpy()
    answered_N = ~np.isnan(probability_N)
    if not answered_N.any():
        return None
    order = np.argsort(probability_N, kind="stable")  # once: what follows sorts again, and finds it sorted
    probability_N, right_N = probability_N[order], (sample.named_N == sample.targets_N)[order]
    falling = probability_N[::-1], right_N[::-1]
    curve = pl.DataFrame(confidence.risk_coverage(*falling))
    return Confidence(
        n=right_N.size,
        answered=int(answered_N.sum()),
        mean=float(np.nanmean(probability_N)),
        accuracy=float(right_N[: answered_N.sum()].mean()),
        ece=confidence.calibration_error(probability_N, right_N),
        ece_mass=confidence.calibration_error(probability_N, right_N, kind="mass"),
        ece_classwise=found.classwise if found else None,
        brier=_mean(found.brier_N) if found else None,
        nll=_mean(found.nll_N) if found else None,
        aurc=confidence.aurc(*falling),
        aurc_best=confidence.best_aurc(right_N),
        coverage_at={risk: confidence.coverage_at_risk(*falling, risk) for risk in RISKS},
        reliability=pl.DataFrame(confidence.reliability_curve(probability_N, right_N)),
        risk_coverage=curve.with_columns(pl.when(pl.col("threshold").is_finite()).then(pl.col("threshold"))),
    )


def _mean(values_N: NDArray[np.float64]) -> Score | None:
    """The mean of what is known, with the normal interval of a mean; None without a value."""
    known = values_N[~np.isnan(values_N)]
    if not known.size:
        return None
    value = float(known.mean())
    half = intervals.Z95 * float(known.std(ddof=1)) / known.size**0.5 if known.size > 1 else float("nan")
    return Score(value, max(0.0, value - half), value + half, known.size, None)


def _buckets(sample: "_Sample", training_C: Ints | None, wanted: _Wanted) -> pl.DataFrame:
    """See `Evaluation.buckets`."""
    if training_C is None:
        return pl.DataFrame(schema=BUCKETS_SCHEMA)
    few, many = wanted.buckets
    bounds: dict[str, tuple[int, int | None]] = {
        "many": (many + 1, None),
        "medium": (few, many),
        "few": (1, few - 1),
        "unseen": (0, 0),
    }
    rows = []
    right_N = sample.named_N == sample.targets_N
    for bucket, (least, most) in bounds.items():
        inside_C = (training_C >= least) & (True if most is None else training_C <= most)
        rows_N = inside_C[sample.targets_N]
        if not rows_N.any():
            continue
        part = sample.only(rows_N)
        scores = _shares(right_N[rows_N], part, wanted.seed)
        micro, macro = scores["micro"], scores["macro"]
        rows.append(
            {
                "bucket": bucket,
                "at_least": least,
                "at_most": most,
                "taxa": macro.classes,
                "specimens": micro.n,
                "micro": micro.value,
                "low": micro.low,
                "high": micro.high,
                "macro": macro.value,
                "macro_low": macro.low,
                "macro_high": macro.high,
            }
        )
    return pl.DataFrame(rows, schema=BUCKETS_SCHEMA)


# -- averages and intervals


def _shares(right_N: NDArray[np.bool_], sample: _Sample, seed: int) -> dict[str, Score]:
    """Every average of a metric that says right or wrong per specimen."""
    n, there = sample.targets_N.size, np.flatnonzero(sample.support_C)
    support = sample.support_C[there]
    right_C = metrics.class_counts(sample.targets_N[right_N], sample.support_C.size)
    right = right_C[there]

    def mean(drawn_RM: Ints) -> NDArray[np.float64]:
        means: NDArray[np.float64] = (drawn_RM[:, : there.size] / support).mean(axis=1, keepdims=True)
        return means

    low, high = intervals.bootstrap(
        mean, np.tile(there, 2), np.concatenate([right, support - right]), np.random.default_rng(seed)
    )
    micro_low, micro_high = intervals.wilson(int(right.sum()), n)
    micro = Score(metrics.micro(right_N, sample.targets_N), float(micro_low), float(micro_high), n, None)
    return _averages(micro, metrics.recall(right_C, sample.support_C), low[0], high[0], sample)


def _f1(sample: _Sample, seed: int) -> dict[str, Score]:
    """Every average of F1."""
    num_classes, there = sample.support_C.size, np.flatnonzero(sample.support_C)
    true_M, named_M, counts_M = metrics.confusion_counts(sample.targets_N, sample.named_N)
    is_right_M = true_M == named_M

    def counted(drawn_RM: Ints, cells: NDArray[np.bool_]) -> Ints:
        """Answers per class, shape R × C."""
        resamples = drawn_RM.shape[0]
        places = np.arange(resamples)[:, None] * (num_classes + 1) + named_M[cells] + 1  # 0: no answer
        counts = np.bincount(places.ravel(), drawn_RM[:, cells].ravel(), resamples * (num_classes + 1))
        return counts.astype(np.int64).reshape(resamples, num_classes + 1)[:, 1:]

    def values(drawn_RM: Ints) -> NDArray[np.float64]:
        """Micro, and the mean over the classes with specimens."""
        right_RC, predicted_RC = counted(drawn_RM, is_right_M), counted(drawn_RM, np.ones_like(is_right_M))
        f1_RC = metrics.f1(right_RC[:, there], sample.support_C[there], predicted_RC[:, there])
        return np.column_stack(
            [metrics.f1_micro(right_RC, sample.support_C, predicted_RC), f1_RC.mean(axis=1)]
        )

    low, high = intervals.bootstrap(values, true_M, counts_M, np.random.default_rng(seed))
    n, micro = sample.targets_N.size, float(values(counts_M[None])[0, 0])
    right_C = counted(counts_M[None], is_right_M)[0]
    f1_C = metrics.f1(right_C, sample.support_C, sample.predicted_C)
    return _averages(Score(micro, float(low[0]), float(high[0]), n, None), f1_C, low[1], high[1], sample)


def _averages(
    micro: Score, values_C: NDArray[np.float64], low: float, high: float, sample: _Sample
) -> dict[str, Score]:
    """All averages; `low` and `high` are the ends for the mean over classes with specimens.

    A class without specimens counts 0 if it counts, so that the conventions differ by a factor.
    """
    support_C, predicted_C = sample.support_C, sample.predicted_C
    num_there = int((support_C > 0).sum())
    num_counted = {
        "macro": num_there,
        "macro_all": support_C.size,
        "macro_seen": int(((support_C > 0) | (predicted_C > 0)).sum()),
    }
    made = {"micro": micro}
    for average, num in num_counted.items():
        value = float(metrics.macro(values_C, support_C, predicted_C, AVERAGES[average]))
        factor = num_there / num
        made[average] = Score(value, float(low) * factor, float(high) * factor, micro.n, num)
    return made


# -- tables


def _per_class(sample: _Sample, labels: Sequence[str]) -> pl.DataFrame:
    support, predicted = sample.support_C, sample.predicted_C
    right = metrics.class_counts(sample.targets_N[sample.targets_N == sample.named_N], len(labels))
    low, high = intervals.wilson(right, support)
    made = pl.DataFrame(
        {
            "taxon": labels,
            "support": support,
            "correct": right,
            "recall": metrics.recall(right, support),
            "recall_low": low,
            "recall_high": high,
            "predicted": predicted,
            "precision": metrics.precision(right, predicted),
            "f1": metrics.f1(right, support, predicted),
        }
    ).with_columns(pl.col(pl.Float64).fill_nan(None))
    wrong = _confusion(sample, labels).filter(pl.col("named") != pl.col("taxon"))
    worst = wrong.group_by("taxon", maintain_order=True).first()
    worst = worst.select(
        "taxon", pl.col("named").alias("confused_with"), pl.col("specimens").alias("confused")
    )
    joined = made.join(worst, on="taxon", how="left", maintain_order="left")
    return joined.sort(["support", "taxon"], descending=[True, False])


def _confusion(sample: _Sample, labels: Sequence[str]) -> pl.DataFrame:
    """By taxon in the order of support, the most common answers first."""
    true, named, counts = metrics.confusion_counts(sample.targets_N, sample.named_N)
    names = pl.Series(labels, dtype=pl.String)
    made = pl.DataFrame(
        {
            "taxon": names.gather(true),
            "named": names.gather(pl.Series(named).set(pl.Series(named < 0), None)),
            "specimens": counts,
            "support": sample.support_C[true],
        }
    )
    keys = ["support", "taxon", "specimens", "named"]
    return made.sort(keys, descending=[True, False, True, False]).drop("support")
