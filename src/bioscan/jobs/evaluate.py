"""From a predictions table and a catalogue to scores. No model, no torch."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.analysis import intervals, metrics
from bioscan.analysis.splits import split_hash
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.analysis.taxonomy import within as rows_within
from bioscan.data.metadata import key_of, read_footer, read_metadata, scan_metadata
from bioscan.data.predictions import Scores, check_predictions, read_predictions, read_record, read_scores
from bioscan.errors import DataError, RequestError, near, unknown
from bioscan.vocabulary import KEYS, RANKS, ROLES

KS: Final = (1, 3, 5, 10)
NO_EXPERIMENT: Final = "none"
"""Instead of an experiment: every labelled specimen counts, whatever its role."""

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

Ints = NDArray[np.int64]


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
class Threshold:
    """What the probability of a class must reach for average-k."""

    value: float
    validation: int
    """Validation specimens that it comes from."""
    mean_set_size: float
    """Classes that reach it per evaluated specimen: near k if the validation specimens are like them."""


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
        tables = {name: getattr(self, name).to_dicts() for name in ("per_class", "confusion")}
        scores = {
            metric: {average: asdict(score) for average, score in averages.items()}
            for metric, averages in self.metrics.items()
        }
        thresholds = {metric: asdict(threshold) for metric, threshold in self.thresholds.items()}
        made = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "specimens"}
        return made | {"metrics": scores, "thresholds": thresholds} | tables

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
        seed: Of the bootstrap.

    Raises:
        RequestError: a column or name that is not there; no specimen left.
        DataError: an input that cannot be used.
    """
    found = _Inputs.read(predictions, catalogue, experiment=experiment, role=role, within=within, ks=ks)
    return _evaluate(found, _rank(rank or found.record.get("rank"), found.table), ks, seed)


def evaluate_ranks(
    predictions: Path | str | pl.DataFrame,
    catalogue: Path | str | pl.DataFrame,
    *,
    experiment: str | None = None,
    role: str | None = None,
    within: str | None = None,
    ks: Sequence[int] = KS,
    seed: int = 1,
) -> dict[str, Evaluation]:
    """Rank -> scores, root down, for each rank of the model; where it has one only, or is not known, for each
    rank that the predictions name. Ranks at which no specimen is labelled are left out.

    At each rank the specimens labelled there count: an answer deeper than the label is compared at the
    label's rank, and is unknown, not wrong, below it. The rest as `evaluate`.

    Raises:
        RequestError: a column or name that is not there; no specimen left at any rank.
        DataError: an input that cannot be used.
    """
    found = _Inputs.read(predictions, catalogue, experiment=experiment, role=role, within=within, ks=ks)
    ranks = found.record.get("ranks") or ()
    if len(ranks) < 2:
        ranks = _named_ranks(found.table)
    labelled = [rank for rank in ranks if rank in found.frame.columns and found.predicted_at(rank)]
    if not labelled:
        _joined(found.chosen, found.table, found.key, RANKS[-1])  # tells where no key is in both
        raise RequestError(
            f"no predicted specimen has a name at a rank of the predictions ({', '.join(ranks) or 'none'})"
        )
    return {rank: _evaluate(found, rank, ks, seed) for rank in labelled}


def _evaluate(found: "_Inputs", rank: str, ks: Sequence[int], seed: int) -> Evaluation:
    """The scores at a rank."""
    table, scores, experiment = found.table, found.scores, found.experiment
    if rank not in found.frame.columns:
        raise RequestError(f"the catalogue has no column '{rank}'{near(rank, found.frame.columns)}")
    key = found.key
    joined = _joined(found.chosen, table, key, rank)
    counted = joined.filter(pl.col(rank).is_not_null())
    if counted.is_empty():
        raise RequestError(f"none of the {joined.height:,} predicted specimens has a name at rank {rank}")
    truth, answers, model = _paths(counted, rank), _paths(counted, rank, "named "), _leaf_paths(scores, rank)
    taxa = _Taxa.of(rank, truth, model)
    names = {"taxon": taxa.labels(truth), "named": taxa.labels(answers)}
    specimens = counted.with_columns(**names).select(key, "taxon", "named", "probability", "error")
    leaf_labels = taxa.labels(model)
    known = leaf_labels.drop_nulls().unique(maintain_order=True)
    others = [specimens[column].drop_nulls().unique().sort() for column in ("taxon", "named")]
    labels = pl.concat([known, *others]).unique(maintain_order=True).to_list()
    sample = _Sample.of(specimens, labels)
    made = {"top_1": _shares(sample.named_N == sample.targets_N, sample, seed)}
    thresholds: dict[str, Threshold] = {}
    if scores is None:
        why = dict.fromkeys(_needing_scores(ks), "there is no scores file beside the predictions")
    elif known.is_empty():
        why = dict.fromkeys(_needing_scores(ks), f"the model has no taxon at rank {rank}")
    else:
        at_rank = _AtRank(scores, _numbers(leaf_labels, labels), known.len())
        has_role = pl.col(experiment) == "validation" if experiment else pl.lit(False)
        validation = found.inside.filter(has_role, pl.col(rank).is_not_null())[key]
        right, thresholds, why = _from_scores(at_rank, specimens, sample, validation, ks)
        made |= {name: _shares(right_N, sample, seed) for name, right_N in right.items()}
    made["f1"] = _f1(sample, seed)
    in_catalogue = int(table[key].is_in(found.frame[key].drop_nulls().implode()).sum())
    return Evaluation(
        rank=rank,
        experiment=experiment,
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
        thresholds=thresholds,
        not_computable=why,
        per_class=_per_class(sample, labels),
        confusion=_confusion(sample, labels),
        specimens=specimens,
        same_split=found.same_split,
        homonyms=sorted(taxa.homonyms),
        record=found.record,
    )


# -- reading


@dataclass(frozen=True)
class _Inputs:
    """What an evaluation at any rank starts from."""

    table: pl.DataFrame
    """The predictions."""
    scores: Scores | None
    record: dict[str, Any]
    frame: pl.DataFrame
    """Of the catalogue: keys, ranks and roles."""
    inside: pl.DataFrame
    """Its rows below `within`."""
    chosen: pl.DataFrame
    """Of these the rows of the role."""
    key: str
    experiment: str | None
    role: str | None
    within: str | None
    same_split: bool | None

    @classmethod
    def read(
        cls,
        predictions: Path | str | pl.DataFrame,
        catalogue: Path | str | pl.DataFrame,
        *,
        experiment: str | None,
        role: str | None,
        within: str | None,
        ks: Sequence[int],
    ) -> "_Inputs":
        """The tables, checked; the arguments are those of `evaluate`."""
        if role is not None and role not in ROLES:
            raise unknown("role", role, ROLES)
        if not ks or min(ks) < 1:
            raise RequestError("k must be 1 or more")
        if isinstance(predictions, pl.DataFrame):
            table, scores, record = check_predictions(predictions), None, {}
        else:
            table = read_predictions(predictions)
            scores, record = read_scores(predictions), read_record(predictions)
        within = within or record.get("within")
        frame = _catalogue(catalogue, experiment, record.get("experiment"))
        experiment = None if experiment == NO_EXPERIMENT else experiment or record.get("experiment")
        if role and not experiment:
            raise RequestError(f"role {role} of which split? Name its column: --experiment")
        role = (role or "test") if experiment else None
        inside = rows_within(frame, within) if within else frame
        chosen = inside.filter(pl.col(experiment) == role) if experiment else inside
        if chosen.is_empty():
            below = f" of {within}" if within else ""
            raise RequestError(
                f"no specimen{below} has role {role} in {experiment}; "
                f"--experiment {NO_EXPERIMENT} counts every labelled specimen"
            )
        key, same_split = _common_key(table, frame), _same_split(catalogue, frame, experiment, record)
        return cls(table, scores, record, frame, inside, chosen, key, experiment, role, within, same_split)

    def predicted_at(self, rank: str) -> int:
        """Specimens that are chosen, labelled at a rank and predicted."""
        labelled = self.chosen.filter(pl.col(rank).is_not_null())
        return labelled.join(self.table, on=self.key, how="semi").height


def _named_ranks(table: pl.DataFrame) -> list[str]:
    """Ranks at which some specimen is named, root down."""
    return [r for r in RANKS if r in table.columns and table[r].null_count() < table.height]


def _rank(wanted: str | None, table: pl.DataFrame) -> str:
    present = [r for r in RANKS if r in table.columns]
    if wanted is None:
        return (_named_ranks(table) or present)[-1]
    if wanted not in RANKS:
        raise unknown("rank", wanted, RANKS)
    if wanted not in present:
        raise RequestError(f"the predictions have no column '{wanted}'; they name {', '.join(present)}")
    return wanted


def _catalogue(
    catalogue: Path | str | pl.DataFrame, experiment: str | None, recorded: str | None
) -> pl.DataFrame:
    """Its keys, ranks and roles."""
    if isinstance(catalogue, pl.DataFrame):
        known = catalogue.columns
    else:
        known = scan_metadata(catalogue).collect_schema().names()
    column = None if experiment == NO_EXPERIMENT else experiment or recorded
    if column and column not in known:
        if experiment:
            raise RequestError(f"the catalogue has no column '{column}'{near(column, known)}")
        raise RequestError(
            f"the catalogue has no column '{column}', the experiment that the predictions were made for; "
            f"name another, or --experiment {NO_EXPERIMENT} to count every labelled specimen"
        )
    columns = [c for c in known if c in (*KEYS, *RANKS, column)]
    return (
        catalogue.select(columns)
        if isinstance(catalogue, pl.DataFrame)
        else read_metadata(catalogue, columns)
    )


def _same_split(
    catalogue: Path | str | pl.DataFrame, frame: pl.DataFrame, experiment: str | None, record: dict[str, Any]
) -> bool | None:
    """The split's hash against that of the training; a catalogue has it in its footer."""
    trained = record.get("split_hash") if record.get("experiment") == experiment else None
    if not trained or experiment is None:
        return None
    footer = {}
    if not isinstance(catalogue, pl.DataFrame) and Path(catalogue).suffix == ".parquet":
        footer = read_footer(catalogue)
    made = footer.get("split", {}).get("experiments", {}).get(experiment, {}).get("hash")
    if made is None or "mended" in footer:  # rows may have been dropped since
        made = split_hash(frame[key_of(frame.columns)], frame[experiment])
    return bool(made == trained)


def _common_key(table: pl.DataFrame, frame: pl.DataFrame) -> str:
    """The key column of both, checked."""
    usable = [k for k in KEYS if k in table.columns and not table[k].has_nulls()]
    common = [k for k in usable if k in frame.columns]
    if not common:
        raise DataError(f"the predictions have key {' and '.join(usable)}, which the catalogue has not")
    key = common[0]
    for where, keys in (("the predictions", table[key]), ("the catalogue", frame[key].drop_nulls())):
        if keys.n_unique() < keys.len():
            twice = keys.filter(keys.is_duplicated()).unique(maintain_order=True).head(3)
            raise DataError(f"{where}: {key} occurs more than once: {', '.join(twice)}")
    return key


def _joined(chosen: pl.DataFrame, table: pl.DataFrame, key: str, rank: str) -> pl.DataFrame:
    """The chosen specimens that have a prediction: key, ranks, the ranks as `named …`, `probability`,
    `error`.
    """
    answered = pl.col("error").is_null() if "error" in table.columns else pl.lit(True)
    named = [
        pl.when(answered).then(pl.col(r)).alias(f"named {r}") for r in _down_to(rank) if r in table.columns
    ]
    probability = f"{rank}_probability"
    answers = table.select(
        key,
        *named,
        (pl.col(probability) if probability in table.columns else pl.lit(None, pl.Float64)).alias(
            "probability"
        ),
        (pl.col("error") if "error" in table.columns else pl.lit(None, pl.String)).alias("error"),
    )
    truth = chosen.select(key, *(r for r in _down_to(rank) if r in chosen.columns))
    joined = truth.join(answers, on=key, how="inner", maintain_order="left")
    if joined.is_empty():
        raise DataError(
            f"none of the {chosen.height:,} specimens is in the predictions; their {key} is like "
            f"{chosen[key].drop_nulls().first()!r}, that of the predictions like {table[key].first()!r}"
        )
    return joined


def _down_to(rank: str) -> tuple[str, ...]:
    return RANKS[: RANKS.index(rank) + 1]


# -- names and classes


@dataclass(frozen=True)
class _Taxa:
    """Labels of taxa: their names, and where a name stands for several taxa also the names above."""

    rank: str
    homonyms: frozenset[str]
    tree: Taxonomy | None
    """Of the homonyms."""

    @classmethod
    def of(cls, rank: str, truth: pl.DataFrame, model: pl.DataFrame) -> "_Taxa":
        """Truth and model may disagree about the names above: that alone makes no homonym."""
        homonyms = _homonyms(truth, rank) | _homonyms(model, rank)
        both = pl.concat([truth, model]).filter(pl.col(rank).is_in(list(homonyms)))
        return cls(rank, frozenset(homonyms), Taxonomy.build(both, [rank]) if homonyms else None)

    def labels(self, paths: pl.DataFrame) -> pl.Series:
        """Label of the taxon of each path; null where the path has no name at the rank."""
        names = paths[self.rank]
        if self.tree is None:
            return names
        known = {int(node): _long_label(self.tree.paths[node]) for node in self.tree.leaves_L}
        nodes = pl.Series(self.tree.targets(paths))
        longer = nodes.replace_strict(known, default=None, return_dtype=pl.String)
        return longer.zip_with(names.is_in(list(self.homonyms)) & longer.is_not_null(), names)


def _long_label(path: Sequence[str | None]) -> str:
    return f"{path[-1]} ({' > '.join(name for name in path[:-1] if name) or 'no ranks above'})"


def _homonyms(paths: pl.DataFrame, rank: str) -> set[str]:
    """Names at the rank that stand for several taxa."""
    distinct = paths.filter(pl.col(rank).is_not_null()).unique(maintain_order=True)
    several = distinct.filter(pl.col(rank).is_duplicated())
    if several.is_empty():
        return set()
    tree = Taxonomy.build(several, [rank])
    taxa = Counter(tree.name(int(node)) for node in tree.leaves_L)
    return {name for name, count in taxa.items() if count > 1}


def _paths(frame: pl.DataFrame, rank: str, prefix: str = "") -> pl.DataFrame:
    """The rank columns down to a rank, absent ones null."""
    return frame.select(
        (pl.col(f"{prefix}{r}") if f"{prefix}{r}" in frame.columns else pl.lit(None, pl.String)).alias(r)
        for r in _down_to(rank)
    )


def _leaf_paths(scores: Scores | None, rank: str) -> pl.DataFrame:
    """Lineages of the model's leaves down to a rank."""
    ranks = _down_to(rank)
    rows = [(*leaf, *(None,) * len(ranks))[: len(ranks)] for leaf in scores.leaves] if scores else []
    return pl.DataFrame(rows, schema=dict.fromkeys(ranks, pl.String), orient="row")


def _numbers(names: pl.Series, labels: Sequence[str]) -> Ints:
    table = {label: number for number, label in enumerate(labels)}
    return names.replace_strict(table, default=-1, return_dtype=pl.Int64).fill_null(-1).to_numpy()


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
        targets_N, named_N = (_numbers(specimens[column], labels) for column in ("taxon", "named"))
        return cls(
            targets_N,
            named_N,
            metrics.class_counts(targets_N, len(labels)),
            metrics.class_counts(named_N, len(labels)),
        )


def _counts(specimens: pl.DataFrame, known: pl.Series | None) -> dict[str, int]:
    failed = specimens["error"].is_not_null()
    counts = {"failed": int(failed.sum()), "unnamed": int((specimens["named"].is_null() & ~failed).sum())}
    if known is not None:
        counts["unknown_to_model"] = int((~specimens["taxon"].is_in(known.to_list())).sum())
    return counts


# -- scores of the leaves


@dataclass(frozen=True)
class _AtRank:
    """Probabilities of the K classes at a rank: sums over the leaves below each."""

    scores: Scores
    class_L: Ints
    num_classes: int

    def batches(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Rows of the scores file, and their probabilities of shape (rows, K)."""
        order = np.argsort(self.class_L, kind="stable")
        order = order[self.class_L[order] >= 0]
        starts = np.searchsorted(self.class_L[order], np.arange(self.num_classes))
        same = np.array_equal(order, np.arange(self.num_classes)) and order.size == self.class_L.size
        for rows, batch_NL in self.scores.batches():
            yield rows, batch_NL if same else np.add.reduceat(batch_NL[:, order], starts, axis=1)


_AVERAGE_RULES: Final = ("average", "reference_average")


def _needing_scores(ks: Sequence[int]) -> list[str]:
    return [f"top_{k}" for k in ks if k > 1] + [f"{rule}_{k}" for rule in _AVERAGE_RULES for k in ks]


def _from_scores(
    at_rank: _AtRank, specimens: pl.DataFrame, sample: _Sample, validation: pl.Series, ks: Sequence[int]
) -> tuple[dict[str, NDArray[np.bool_]], dict[str, Threshold], dict[str, str]]:
    """What needs probabilities: who is right by each metric, thresholds, and what cannot be computed.

    The scores are gone through in batches, several times.
    """
    num_classes, keys = at_rank.num_classes, at_rank.scores.keys[specimens.columns[0]]
    at_S = _places(keys, specimens[:, 0])
    is_validation_S = _places(keys, validation) >= 0
    expected_N = specimens["error"].is_null().to_numpy().copy()
    expected_N[at_S[at_S >= 0]] = False
    absent = np.flatnonzero(expected_N)
    if absent.size:
        raise DataError(
            f"{at_rank.scores.path}: {absent.size:,} of the {specimens.height:,} specimens are not in it "
            f"(first: {specimens[int(absent[0]), 0]}); it is not of these predictions"
        )
    place_N = np.full(specimens.height, num_classes)
    score_N = np.full(specimens.height, np.nan)
    ends: list[NDArray[np.float32]] = []  # the first and the last validation row
    validations = 0
    for rows, batch_BK in at_rank.batches():
        here_B = at_S[rows] >= 0
        part_BK, at_B = batch_BK[here_B], at_S[rows][here_B]
        targets_B, named_B = sample.targets_N[at_B], sample.named_N[at_B]
        truth_B = metrics.rank_of_truth(part_BK, targets_B)
        behind_B = metrics.rank_of_truth(part_BK, named_B) > truth_B  # the named taxon moves to the front
        place_N[at_B] = np.where(named_B == targets_B, 0, truth_B + behind_B)
        score_N[at_B] = metrics.score_of_truth(part_BK, targets_B)
        part_BK = _complete(batch_BK[is_validation_S[rows]])
        if part_BK.shape[0]:
            ends = [ends[0] if ends else part_BK[0], part_BK[-1]]
        validations += part_BK.shape[0]
    inner = [k for k in ks if k < num_classes]
    too_large = f"k is not below {num_classes}, the classes of the model: every answer would be right"
    why = {name: too_large for name in _needing_scores([k for k in ks if k >= num_classes])}
    right = {f"top_{k}": place_N < k for k in inner if k > 1}
    if not validations:
        names = [f"{rule}_{k}" for rule in _AVERAGE_RULES for k in inner]
        why |= dict.fromkeys(names, "thresholds come from validation specimens; there are none with scores")
        return right, {}, why

    def validation_batches() -> Iterator[NDArray[np.float32]]:
        return (_complete(batch_BK[is_validation_S[rows]]) for rows, batch_BK in at_rank.batches())

    found = metrics.average_k_thresholds(validation_batches, inner)
    values = {f"average_{k}": value for k, value in zip(inner, found, strict=True)}
    values |= {
        f"reference_average_{k}": metrics.reference_average_k_threshold(np.stack(ends), k) for k in inner
    }
    sizes = dict.fromkeys(values, 0)
    scored = 0
    for rows, batch_BK in at_rank.batches():
        part_BK = _complete(batch_BK[at_S[rows] >= 0])
        scored += part_BK.shape[0]
        for name, value in values.items():
            sizes[name] += int(metrics.set_sizes(part_BK, value).sum())
    thresholds = {
        name: Threshold(value, validations, sizes[name] / max(1, scored)) for name, value in values.items()
    }
    return right | {name: score_N >= value for name, value in values.items()}, thresholds, why


def _places(keys: pl.Series, wanted: pl.Series) -> Ints:
    """Per key its place among the wanted ones, -1 where it is none of them."""
    places = pl.DataFrame({"key": wanted}).with_row_index("place")
    found = pl.DataFrame({"key": keys}).join(places, on="key", how="left", maintain_order="left")["place"]
    return found.cast(pl.Int64).fill_null(-1).to_numpy()


def _complete(batch_BK: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rows that have scores."""
    rows: NDArray[np.float32] = batch_BK[~np.isnan(batch_BK[:, 0])]
    return rows


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
