"""Answers as paths down the taxonomy: how far right, how far wrong, and what backing off gains. No torch.

`jobs.evaluate` looks at one rank at a time; here an answer counts as a whole. The formulas are in
`analysis.hierarchical_metrics`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.analysis import hierarchical_metrics, intervals
from bioscan.analysis.hierarchical_metrics import Paths
from bioscan.errors import DataError, RequestError
from bioscan.jobs.evaluate import Score
from bioscan.jobs.evaluation_inputs import Inputs, Ints, Taxa, leaf_paths, numbers_of, paths_of
from bioscan.vocabulary import RANKS

METRICS: Final = hierarchical_metrics.METRICS | {
    "consistency": "share of the answers whose names stand together in a lineage that is known",
}
"""Metric -> what it says."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Hierarchy:
    """Scores of whole paths: of the forced ones, named down to the deepest rank, and of the assigned ones.

    A name deeper than the label, or at a rank where the label has none, cannot be checked: it counts neither
    as right nor as wrong.
    """

    ranks: tuple[str, ...]
    """Of the names, root down."""
    experiment: str | None
    role: str | None
    within: str | None
    n: int
    """Specimens that count: of the role, labelled at one of the ranks, with a row in the predictions."""
    metrics: dict[str, Score]
    """One of `METRICS` -> its score over the forced paths; intervals by bootstrap over specimens, of shares
    of specimens (correct_or_ancestor, exact, consistency) Wilson's. `n` are the specimens in it. A metric
    over nothing (the severity of no mistake) is left out."""
    assigned_metrics: dict[str, Score]
    """The same over the assigned paths; empty where the predictions assign nothing."""
    assigned: pl.DataFrame
    """What is assigned, a row a rank: `rank`; `labelled` (specimens with a name there, so that the answer can
    be checked); of these `named` and `wrong`; `coverage` (named of labelled); `error_over_all` (wrong of
    labelled) with `over_all_low, over_all_high`; `error_among_named` with `among_named_low,
    among_named_high` (null where nothing is named; Wilson's 95 %); `unchecked` (named without a label there).
    No rows where the predictions assign nothing."""
    operating: pl.DataFrame
    """What is right and what is said if answers stop at the deepest name that reaches a threshold: columns as
    in `hierarchical_metrics.operating_curve`, `deepest_TR` as `deepest_<rank>`. Empty without
    probabilities."""
    max_error: float | None
    """Error that the assigned names were to keep over all specimens, at each rank or, if `promises_answers`,
    counting a specimen as wrong where any of its names is; None: not asked for."""
    promises_answers: bool
    min_precision: float | None
    """Precision that each assigned taxon was to keep; None: not asked for."""
    specimens: pl.DataFrame
    """A row each: key; `rank` and `taxon` of the label; `named` (the deepest name that could be checked);
    `distance` (steps along the tree from it to the taxon), `height` (steps from the taxon up to the last one
    in common), `parted` (rank at which the answer leaves the true path; null: never); `assigned_rank`,
    `assigned_taxon`, `error`."""
    not_computable: dict[str, str]
    """Part -> why it is not there."""
    record: dict[str, Any]
    """What the predictions follow from."""

    @property
    def key(self) -> str:
        """The column by which predictions and catalogue were joined."""
        return self.specimens.columns[0]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: everything but the single specimens."""
        made = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("specimens", "record")}
        scores = {
            part: {name: asdict(score) for name, score in made[part].items()}
            for part in ("metrics", "assigned_metrics")
        }
        return made | scores | {name: made[name].to_dicts() for name in ("assigned", "operating")}

    def table(self) -> pl.DataFrame:
        """The metrics as columns `metric, answer, value, low, high, n`; answer: `forced` or `assigned`."""
        columns = ("value", "low", "high", "n")
        rows = [
            {"metric": name, "answer": answer, **{c: getattr(score, c) for c in columns}}
            for answer, scores in (("forced", self.metrics), ("assigned", self.assigned_metrics))
            for name, score in scores.items()
        ]
        return pl.DataFrame(rows, infer_schema_length=None)


def evaluate_hierarchy(
    predictions: Path | str | pl.DataFrame,
    catalogue: Path | str | pl.DataFrame,
    *,
    experiment: str | None = None,
    role: str | None = None,
    within: str | None = None,
    seed: int = 1,
) -> Hierarchy:
    """Score answers as paths against the names in a catalogue, joined by key.

    The forced path are the names in the rank columns, the assigned one ends at `assigned_rank`. A specimen
    without an answer has an empty path.

    Args:
        predictions: A predictions table, or the frame.
        catalogue: A catalogue or TSV, or the frame.
        experiment: As the next ones in `jobs.evaluate.evaluate`.
        role: See there.
        within: See there.
        seed: Of the bootstrap.

    Raises:
        RequestError: a column or name that is not there; no specimen left.
        DataError: an input that cannot be used; an assigned taxon that is not on its path.
    """
    found = Inputs.read(predictions, catalogue, experiment=experiment, role=role, within=within)
    ranks = found.ranks
    joined = _joined(found, ranks)
    true_NR, named_NR, lineages_MR = _codes(found, joined, ranks)
    paths = hierarchical_metrics.compare_paths(true_NR, named_NR)
    one_path_N = hierarchical_metrics.is_one_path(named_NR, lineages_MR)
    why: dict[str, str] = {}
    assigned_NR = _assigned(joined, named_NR, ranks, found.record.get("ranks_left_empty") or ())
    shorter = None
    if assigned_NR is None:
        why["assigned"] = "the predictions have no column assigned_rank"
    else:
        shorter = hierarchical_metrics.compare_paths(true_NR, assigned_NR)
    probability_NR = _probabilities(joined, ranks)
    if np.isnan(probability_NR).all():
        why["operating"] = "the predictions have no probabilities of their names"
        operating = pl.DataFrame()
    else:
        bits_NR = hierarchical_metrics.information(named_NR, lineages_MR)
        curve = hierarchical_metrics.operating_curve(probability_NR, true_NR, named_NR, bits_NR=bits_NR)
        deepest_TR = curve.pop("deepest_TR")
        operating = pl.DataFrame(curve).with_columns(
            pl.Series(f"deepest_{rank}", deepest_TR[:, place]) for place, rank in enumerate(ranks)
        )
    return Hierarchy(
        ranks=ranks,
        experiment=found.experiment,
        role=found.role,
        within=found.within,
        n=joined.height,
        metrics=_scores(paths, one_path_N, seed),
        assigned_metrics=_scores(shorter, None, seed) if shorter else {},
        assigned=_by_rank(true_NR, assigned_NR, ranks),
        operating=operating,
        max_error=found.record.get("max_error"),
        promises_answers=found.record.get("promise") == "answer",
        min_precision=found.record.get("min_precision"),
        specimens=_specimens(joined, paths, ranks),
        not_computable=why,
        record=found.record,
    )


def _joined(found: Inputs, ranks: Sequence[str]) -> pl.DataFrame:
    """The specimens that count: key, true names at all ranks down to the last, and the predictions' columns
    as `given …`.

    Answers that failed have no names.
    """
    there = [rank for rank in ranks if rank in found.chosen.columns]
    if not there:
        raise RequestError(f"the catalogue has no column of the predictions' ranks ({', '.join(ranks)})")
    labelled = found.chosen.filter(pl.any_horizontal(pl.col(there).is_not_null()))
    if labelled.is_empty():
        raise RequestError(f"no specimen has a name at a rank of the predictions ({', '.join(ranks)})")
    truth = labelled.select(found.key, *paths_of(labelled, ranks[-1]))
    kept = [
        c
        for c in found.table.columns
        if c in (*ranks, "assigned_rank", "assigned_taxon", "error", *(f"{r}_probability" for r in ranks))
    ]
    answers = found.table.select(found.key, pl.col(kept).name.prefix("given "))
    if "error" in kept:
        others = [c for c in answers.columns if c not in (found.key, "given error")]
        answers = answers.with_columns(pl.when(pl.col("given error").is_null()).then(pl.col(others)))
    joined = truth.join(answers, on=found.key, how="inner", maintain_order="left")
    if joined.is_empty():
        raise RequestError(
            f"none of the {truth.height:,} specimens with a name at a rank of the predictions "
            f"({', '.join(ranks)}) is in them"
        )
    return joined


def _codes(found: Inputs, joined: pl.DataFrame, ranks: Sequence[str]) -> tuple[Ints, Ints, Ints]:
    """Names as numbers, -1 for none: of the truth, of the answers, and of the known lineages, shape M × R.

    The lineages are those of the model's leaves, without them the catalogue's.
    """
    parts: tuple[list[Ints], list[Ints], list[Ints]] = ([], [], [])
    if found.scores:
        known = leaf_paths(found.scores, ranks[-1])
    else:
        known = paths_of(found.inside, ranks[-1]).unique(maintain_order=True)
    for rank in ranks:
        paths = paths_of(joined, rank), paths_of(joined, rank, "given "), paths_of(known, rank)
        taxa = Taxa.of(rank, paths[0], leaf_paths(found.scores, rank))
        labels = [taxa.labels(one) for one in paths]
        numbered = pl.concat(labels).drop_nulls().unique().to_list()
        for part, names in zip(parts, labels, strict=True):
            part.append(numbers_of(names, numbered))
    true_NR, named_NR, known_MR = (np.stack(part, axis=1) for part in parts)
    lineages_MR = np.unique(known_MR, axis=0)
    return true_NR, named_NR, lineages_MR[(lineages_MR >= 0).any(axis=1)]


def _assigned(
    joined: pl.DataFrame, named_NR: Ints, ranks: Sequence[str], empty: Sequence[str]
) -> Ints | None:
    """The names down to the assigned rank, but for ranks that the back-off passes over: nothing is promised
    of names there. None where the predictions assign nothing.
    """
    if "given assigned_rank" not in joined.columns:
        return None
    places = {rank: place for place, rank in enumerate(RANKS)}
    ends = joined["given assigned_rank"].replace_strict(places, default=-1, return_dtype=pl.Int64)
    end_N = ends.fill_null(-1).to_numpy()
    levels_R = np.array([places[rank] for rank in ranks])
    if "given assigned_taxon" in joined.columns:
        on_path = pl.lit(True)
        for rank in reversed(ranks):
            here = pl.col("given assigned_rank") == rank
            name = pl.col("given assigned_taxon").eq_missing(pl.col(f"given {rank}"))
            on_path = pl.when(here).then(name).otherwise(on_path)
        off = joined.filter(~on_path.fill_null(True))
        if off.height:
            row = off.row(0, named=True)
            raise DataError(
                f"{off.height:,} of {joined.height:,} predictions assign a taxon that is not the name at its "
                f"rank (first: {off[0, 0]}, {row['given assigned_rank']} {row['given assigned_taxon']})"
            )
    given_NR = (levels_R <= end_N[:, None]) & ~np.isin(ranks, list(empty))
    return np.where(given_NR, named_NR, -1)


def _probabilities(joined: pl.DataFrame, ranks: Sequence[str]) -> Floats:
    """Of the names, shape N × R; NaN where not given."""
    columns = [
        pl.col(f"given {r}_probability") if f"given {r}_probability" in joined.columns else pl.lit(None)
        for r in ranks
    ]
    return joined.select(c.cast(pl.Float64).alias(r) for c, r in zip(columns, ranks, strict=True)).to_numpy()


_SHARES: Final = frozenset({"correct_or_ancestor", "exact"})
"""Shares of specimens. Where all are alike the bootstrap would give a point, however few they are."""


def _scores(paths: Paths, one_path_N: NDArray[np.bool_] | None, seed: int) -> dict[str, Score]:
    """Each metric with its interval; those over nothing are left out."""
    terms = hierarchical_metrics.terms(paths)
    parts_NS, wholes_NS = (np.stack([term[side] for term in terms.values()], axis=1) for side in (0, 1))
    low_S, high_S = intervals.bootstrap_ratio(parts_NS, wholes_NS, np.random.default_rng(seed))
    counted_S = (wholes_NS != 0).sum(axis=0)
    made = {
        name: Score(value, float(low), float(high), int(counted), None)
        for (name, value), low, high, counted in zip(
            hierarchical_metrics.values(paths).items(), low_S, high_S, counted_S, strict=True
        )
        if counted
    }
    for name in _SHARES & made.keys():
        right, n = (int(side_N.sum()) for side_N in terms[name])
        low, high = intervals.wilson(right, n)
        made[name] = replace(made[name], low=float(low), high=float(high))
    if one_path_N is not None:
        named_N = paths.depth_given_N > 0
        hits, n = int((one_path_N & named_N).sum()), int(named_N.sum())
        if n:
            low, high = intervals.wilson(hits, n)
            made["consistency"] = Score(hits / n, float(low), float(high), n, None)
    return made


_ASSIGNED: Final[dict[str, Any]] = {
    "rank": pl.String,
    "labelled": pl.Int64,
    "named": pl.Int64,
    "wrong": pl.Int64,
    "coverage": pl.Float64,
    "error_over_all": pl.Float64,
    "over_all_low": pl.Float64,
    "over_all_high": pl.Float64,
    "error_among_named": pl.Float64,
    "among_named_low": pl.Float64,
    "among_named_high": pl.Float64,
    "unchecked": pl.Int64,
}


def _by_rank(true_NR: Ints, assigned_NR: Ints | None, ranks: Sequence[str]) -> pl.DataFrame:
    """See `Hierarchy.assigned`. A name is wrong by itself here, as a taxon, not for the names above it."""
    if assigned_NR is None:
        return pl.DataFrame(schema=_ASSIGNED)
    labelled_NR, given_NR = true_NR >= 0, assigned_NR >= 0
    labelled_R = labelled_NR.sum(axis=0)
    named_R = (labelled_NR & given_NR).sum(axis=0)
    wrong_R = (labelled_NR & given_NR & (true_NR != assigned_NR)).sum(axis=0)
    over_all, among = intervals.wilson(wrong_R, labelled_R), intervals.wilson(wrong_R, named_R)
    with np.errstate(invalid="ignore"):
        shares = {
            "coverage": named_R / labelled_R,
            "error_over_all": wrong_R / labelled_R,
            "over_all_low": over_all[0],
            "over_all_high": over_all[1],
            "error_among_named": wrong_R / named_R,
            "among_named_low": among[0],
            "among_named_high": among[1],
        }
    counts = {
        "rank": list(ranks),
        "labelled": labelled_R,
        "named": named_R,
        "wrong": wrong_R,
        "unchecked": (given_NR & ~labelled_NR).sum(axis=0),
    }
    table = pl.DataFrame(counts | shares).with_columns(pl.col(pl.Float64).fill_nan(None))
    return table.select(pl.col(c).cast(t) for c, t in _ASSIGNED.items())


def _specimens(joined: pl.DataFrame, paths: Paths, ranks: Sequence[str]) -> pl.DataFrame:
    """See `Hierarchy.specimens`."""
    checked = [pl.when(pl.col(r).is_not_null()).then(pl.col(f"given {r}")) for r in reversed(ranks)]
    last = pl.coalesce(pl.when(pl.col(r).is_not_null()).then(pl.lit(r)) for r in reversed(ranks))
    parted = pl.Series([*ranks, None], dtype=pl.String).gather(paths.parted_N % (len(ranks) + 1))
    others = [
        (pl.col(f"given {c}") if f"given {c}" in joined.columns else pl.lit(None, pl.String)).alias(c)
        for c in ("assigned_rank", "assigned_taxon", "error")
    ]
    return joined.select(
        joined.columns[0],
        last.alias("rank"),
        pl.coalesce(reversed(ranks)).alias("taxon"),
        pl.coalesce(checked).alias("named"),
        pl.Series("distance", paths.distance_N),
        pl.Series("height", paths.height_N),
        parted.alias("parted"),
        *others,
    )
