"""How a model meets taxa that it has never seen: from predictions, catalogue and embeddings to scores. No
torch.

Seen taxa are those that the model can name, unseen ones all others. Two questions: does a score tell their
specimens apart, and how well is each named at every rank. That an unseen species is named right at its genus
and flagged as new is worth more than the flag alone.

N specimens, S seen ones, U unseen ones, G training specimens, C taxa, R resamples, F features.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.analysis import intervals, novelty
from bioscan.data.embeddings import read_embeddings
from bioscan.errors import RequestError
from bioscan.jobs.evaluation_inputs import Inputs, paths_of, rank_to_compare
from bioscan.jobs.open_set_scores import (
    FROM_EMBEDDINGS,
    Names,
    Pool,
    from_embeddings,
    from_outputs,
    ranks_to_compare,
)

SCORES: Final = {
    "msp": "1 less the largest probability at the rank",
    "msp_within": "1 less the largest probability within the most probable taxon of the rank above",
    "max_logit": "minus the largest logit of a leaf taxon",
    "energy": "minus logsumexp of the logits of all leaf taxa",
    "knn": "1 less the cosine with the nearest training specimen",
    "mahalanobis": "squared Mahalanobis distance to the nearest taxon",
    "relative_mahalanobis": "that less the squared distance to all training specimens",
    "vim": "virtual-logit matching",
}
"""Scores, all higher for what looks more novel; see `analysis.novelty`."""

ANSWERS: Final = {
    "model": "the names in the predictions",
    "nearest": "those of the nearest training specimen by the cosine of the embeddings, of those that have a "
    "name at the evaluated rank: other taxa, which the model may confuse them with, are not in this gallery",
    "nearest_keys": "likewise, with the other unseen specimens in the gallery (CLIBD's protocol, by leaving "
    "one out)",
}
"""Where names come from."""

COUNTS: Final = {
    "failed": "without an answer because the image failed: errors in naming, without a score",
    "unlabelled": "without a name in the catalogue at the rank: left out",
    "learned_from": "of role train or validation: left out",
    "other": "of a taxon that the model knows, but of another role: left out",
    "not_predicted": "not in the predictions: left out",
    "not_embedded": "without an embedding: without its scores, errors in naming by it",
}

Values = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class OpenSet:
    """How well unseen taxa are told from seen ones at a rank, and how well each is named above it."""

    rank: str
    above: str | None
    """The rank above that most of the model's taxa have a name at; None where there is none."""
    experiment: str | None
    role: str | None
    """Of the seen specimens; unseen ones have any but train and validation."""
    within: str | None
    seen: int
    """Specimens of taxa that the model knows."""
    unseen: int
    """Specimens of other taxa."""
    seen_taxa: int
    unseen_taxa: int
    counts: dict[str, int]
    """What `COUNTS` says -> specimens."""
    scores: pl.DataFrame
    """A row each: `score, auroc, auroc_low, auroc_high, aupr_unseen, aupr_seen, fpr95, missed95, oscr,
    threshold, flagged_above, seen, unseen` (see `novelty.Separation`). Flagging what scores above `threshold`
    flags 5 % of the seen and misses `missed95` of the unseen; `flagged_above` is the share of the unseen that
    are flagged so and named right at the rank above, of those with a name there. `seen` and `unseen` are
    specimens that have the score."""
    curves: pl.DataFrame
    """`score, threshold, seen_flagged, unseen_flagged, right_kept`, see `novelty.curve`."""
    ranks: pl.DataFrame
    """By `answers` (see `ANSWERS`) and `rank`: for `seen`, `unseen` and their harmonic mean `hm`, `_micro`
    and `_macro` accuracy with `_low` and `_high`, specimens `seen`, `unseen`, and taxa `seen_taxa`,
    `unseen_taxa`. Seen and unseen are always those of the evaluated rank."""
    named_above: pl.DataFrame
    """How often unseen specimens are named right at the rank above. Rows: `of` all with a name there, and of
    those whose taxon there the model knows (`known`); `specimens, right, share, low, high`."""
    taxa: pl.DataFrame
    """Unseen taxa: `taxon, specimens, right_above, named, times` (the most common answer), and the area under
    the ROC curve of each score against all seen specimens."""
    specimens: pl.DataFrame
    """A row each: key, `taxon`, `unseen`, `named`, `error`, `nearest` where there are embeddings, scores."""
    not_computable: dict[str, str]
    """Score -> why not."""
    same_split: bool | None
    """As in `Evaluation`."""
    homonyms: list[str]
    record: dict[str, Any]
    """What the predictions follow from."""
    embeddings: dict[str, Any] | None
    """What the embeddings follow from."""

    @property
    def key(self) -> str:
        """The column by which everything was joined."""
        return self.specimens.columns[0]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: everything but the single specimens."""
        made = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "specimens"}
        return {k: v.to_dicts() if isinstance(v, pl.DataFrame) else v for k, v in made.items()}


def evaluate_open_set(
    predictions: Path | str | pl.DataFrame,
    catalogue: Path | str | pl.DataFrame,
    *,
    rank: str | None = None,
    experiment: str | None = None,
    role: str | None = None,
    within: str | None = None,
    embeddings: Path | str | None = None,
    model: Path | str | None = None,
    seed: int = 1,
) -> OpenSet:
    """Score predictions, and embeddings, by how they meet specimens of taxa that the model does not know.

    Seen specimens are of the role and of a taxon that is among the model's; unseen ones have a name at the
    rank that is none of the model's, and any role but train and validation. Which taxa the model knows is
    told by the scores file beside the predictions, else by the training specimens of the split.

    Args:
        predictions: As for `evaluate`; of seen and unseen specimens.
        catalogue: As for `evaluate`.
        rank: Rank at which taxa are seen or unseen; None: the record's, else the deepest with predictions.
        experiment: Split column, or `none`: every labelled specimen counts. None: the record's, if any.
        role: Of the seen specimens; None: `test` where there is an experiment.
        within: Only specimens below this taxon; None: the record's.
        embeddings: A file of `bioscan embed` with the training specimens and those that are evaluated; needs
            an experiment.
        model: Model folder that the embeddings come from, for `vim`.
        seed: Of the bootstrap.

    Raises:
        RequestError: a column or name that is not there; nothing unseen, or nothing seen.
        DataError: an input that cannot be used.
    """
    found = Inputs.read(predictions, catalogue, experiment=experiment, role=role, within=within, rank=rank)
    rank = rank_to_compare(rank or found.record.get("rank"), found.table)
    if rank not in found.frame.columns:
        raise RequestError(f"the catalogue has no column '{rank}'; it cannot tell what is unseen there")
    if model is not None and embeddings is None:
        raise RequestError("a model is for the score vim, which needs embeddings too: --embeddings")
    pool = Pool.of(found, rank)
    scores_N, why = from_outputs(found, pool)
    space = None
    if embeddings is not None:
        space = from_embeddings(found, pool, read_embeddings(embeddings), model)
    scores_N |= space.scores_N if space else {}
    why |= space.why if space else dict.fromkeys(FROM_EMBEDDINGS, "there are no embeddings")
    answers = {"model": paths_of(pool.joined, rank, "named ")}
    if space:
        answers |= {"nearest": space.nearest, "nearest_keys": space.nearest_keys}
    names = {level: pool.names_at(level) for level in ranks_to_compare(found, pool)}
    named = names[rank].of(answers["model"])
    right_N = names[rank].right(answers["model"]).to_numpy()
    above = names[pool.above].right(answers["model"]) if pool.above in names else None
    told = [_told(pool, name, score_N, right_N, above) for name, score_N in scores_N.items()]
    shown = {name: pl.Series(score_N).fill_nan(None) for name, score_N in scores_N.items()}
    nearest = {"nearest": names[rank].of(space.nearest)} if space else {}
    specimens = pool.joined.select(
        found.key, taxon=pool.labels, unseen=pl.Series(pool.unseen_N), named=named, error="error"
    ).with_columns(**nearest, **shown)
    by_rank = [
        _rank_row(pool, name, at_rank, at_rank.right(paths), seed)
        for name, paths in answers.items()
        for at_rank in names.values()
    ]
    return OpenSet(
        rank=rank,
        above=pool.above,
        experiment=found.experiment,
        role=found.role,
        within=found.within,
        seen=int((~pool.unseen_N).sum()),
        unseen=int(pool.unseen_N.sum()),
        seen_taxa=pool.labels.filter(~pool.unseen_N).n_unique(),
        unseen_taxa=pool.labels.filter(pool.unseen_N).n_unique(),
        counts=pool.counts | ({"not_embedded": int((~space.there_N).sum())} if space else {}),
        scores=pl.DataFrame([row for row, _ in told], schema=_SCORES_SCHEMA),
        curves=pl.concat([pl.DataFrame(schema=_CURVES_SCHEMA), *(curve for _, curve in told)]),
        ranks=pl.DataFrame(by_rank, schema=_RANKS_SCHEMA),
        named_above=_named_above(pool, names.get(pool.above or ""), above),
        taxa=_taxa(pool, named, above, scores_N),
        specimens=specimens,
        not_computable=why,
        same_split=found.same_split,
        homonyms=sorted(names[rank].taxa.homonyms),
        record=found.record,
        embeddings=space.record if space else None,
    )


# -- tables

_PLACES: Final = ("seen", "unseen", "hm")
_SCORES_SCHEMA: Final = {
    "score": pl.String,
    **dict.fromkeys(("auroc", "auroc_low", "auroc_high", "aupr_unseen", "aupr_seen"), pl.Float64),
    **dict.fromkeys(("fpr95", "missed95", "oscr", "threshold", "flagged_above"), pl.Float64),
    **dict.fromkeys(("seen", "unseen"), pl.Int64),
}
_CURVES_SCHEMA: Final = {
    "score": pl.String,
    **dict.fromkeys(("threshold", "seen_flagged", "unseen_flagged", "right_kept"), pl.Float64),
}
_RANKS_SCHEMA: Final = {
    "answers": pl.String,
    "rank": pl.String,
    **dict.fromkeys(("seen", "seen_taxa", "unseen", "unseen_taxa"), pl.Int64),
    **{
        f"{place}_{average}{end}": pl.Float64
        for place in _PLACES
        for average in ("micro", "macro")
        for end in ("", "_low", "_high")
    },
}


def _told(
    pool: Pool, name: str, score_N: Values, right_N: NDArray[np.bool_], above: pl.Series | None
) -> tuple[dict[str, Any], pl.DataFrame]:
    """A score's row in the table, and its curve."""
    has_N = ~np.isnan(score_N)
    seen_N, unseen_N = has_N & ~pool.unseen_N, has_N & pool.unseen_N
    seen_S, unseen_U, right_S = score_N[seen_N], score_N[unseen_N], right_N[seen_N]
    row: dict[str, Any] = {"score": name, "seen": seen_S.size, "unseen": unseen_U.size}
    if not (seen_S.size and unseen_U.size):
        return row, pl.DataFrame(schema=_CURVES_SCHEMA)
    group_N = pool.labels.rank("dense").cast(pl.Int64).to_numpy()
    low, high = novelty.auroc_interval(seen_S, unseen_U, group_N[seen_N], group_N[unseen_N])
    row |= vars(novelty.separation(seen_S, unseen_U, right_S))
    row |= {"auroc_low": low, "auroc_high": high}
    row["threshold"] = novelty.missed(seen_S, unseen_U, novelty.SHARE)[0]
    if above is not None:
        flagged = pl.Series(np.nan_to_num(score_N, nan=-math.inf) > row["threshold"])
        row["flagged_above"] = (above & flagged).filter(pool.unseen_N & above.is_not_null().to_numpy()).mean()
    curve = pl.DataFrame(novelty.curve(seen_S, unseen_U, right_S))
    return row, curve.select(pl.lit(name).alias("score"), pl.all())


def _rank_row(pool: Pool, answers: str, names: Names, right: pl.Series, seed: int) -> dict[str, Any]:
    """Accuracy of seen and unseen specimens, and their harmonic means, with intervals.

    Wilson's for the shares of specimens; else by bootstrap within the taxa, seen and unseen ones together.
    """
    row: dict[str, Any] = {"answers": answers, "rank": names.rank}
    supports, rights = [], []
    for place, part_N in (("seen", ~pool.unseen_N), ("unseen", pool.unseen_N)):
        part_N = part_N & right.is_not_null().to_numpy()
        class_M = names.labels.filter(part_N).rank("dense").cast(pl.Int64).to_numpy() - 1
        supports.append(np.bincount(class_M))
        rights.append(np.bincount(class_M[right.filter(part_N).to_numpy()], minlength=supports[-1].size))
        row |= {place: class_M.size, f"{place}_taxa": supports[-1].size}
    sizes = [support_C.size for support_C in supports]
    if not sum(sizes):
        return row
    support_C, right_C = np.concatenate(supports), np.concatenate(rights)

    def values(drawn_RM: Ints) -> Values:
        """Micro and macro of the seen, of the unseen, harmonic means; NaN where there is none."""
        found = []
        right_RC = drawn_RM[:, : support_C.size]
        for first, last in ((0, sizes[0]), (sizes[0], support_C.size)):
            part_RC, part_C = right_RC[:, first:last], support_C[first:last]
            if first == last:
                found += [np.full(len(drawn_RM), math.nan)] * 2
                continue
            found += [part_RC.sum(axis=1) / part_C.sum(), (part_RC / part_C).mean(axis=1)]
        found += [novelty.harmonic_mean(found[0], found[2]), novelty.harmonic_mean(found[1], found[3])]
        return np.column_stack(found)

    cells_M = np.tile(np.arange(support_C.size), 2)  # right and wrong of each
    counts_M = np.concatenate([right_C, support_C - right_C])
    low, high = intervals.bootstrap(values, cells_M, counts_M, np.random.default_rng(seed))
    columns = [f"{place}_{average}" for place in _PLACES for average in ("micro", "macro")]
    for name, value, *ends in zip(columns, values(counts_M[None])[0], low, high, strict=True):
        row |= {name: value, f"{name}_low": ends[0], f"{name}_high": ends[1]}
    for place, hits_C, all_C in zip(("seen", "unseen"), rights, supports, strict=True):
        wilson_low, wilson_high = intervals.wilson(int(hits_C.sum()), int(all_C.sum()))
        row |= {f"{place}_micro_low": float(wilson_low), f"{place}_micro_high": float(wilson_high)}
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in row.items()}


_ABOVE_SCHEMA: Final = {
    "of": pl.String,
    **dict.fromkeys(("specimens", "right"), pl.Int64),
    **dict.fromkeys(("share", "low", "high"), pl.Float64),
}


def _named_above(pool: Pool, names: Names | None, above: pl.Series | None) -> pl.DataFrame:
    """How often the rank above is right for unseen specimens; no rows without a rank above."""
    if names is None or above is None:
        return pl.DataFrame(schema=_ABOVE_SCHEMA)
    is_known = names.labels.is_in(names.of(pool.known).drop_nulls().implode())
    rows = []
    for of, part in (("all", above.is_not_null()), ("known", is_known.fill_null(False))):
        chosen = above.filter(part.to_numpy() & pool.unseen_N)
        low, high = intervals.wilson(int(chosen.sum()), chosen.len())
        row = {"of": of, "specimens": chosen.len(), "right": int(chosen.sum())}
        ends = {"share": chosen.mean(), "low": float(low), "high": float(high)} if chosen.len() else {}
        rows.append(row | ends)
    return pl.DataFrame(rows, schema=_ABOVE_SCHEMA)


def _taxa(pool: Pool, named: pl.Series, above: pl.Series | None, scores_N: dict[str, Values]) -> pl.DataFrame:
    """The unseen taxa, those with most specimens first."""
    shares = {}
    for name, score_N in scores_N.items():
        seen_S = score_N[~pool.unseen_N]
        seen_S = seen_S[~np.isnan(seen_S)]
        share_N = np.full(score_N.size, math.nan)
        has_N = ~np.isnan(score_N) & pool.unseen_N
        if seen_S.size:
            share_N[has_N] = 1.0 - novelty.placements(seen_S, score_N[has_N])
        shares[name] = pl.Series(share_N).fill_nan(None)
    frame = pl.DataFrame(
        {
            "taxon": pool.labels,
            "named": named,
            "right_above": pl.Series([None] * named.len(), dtype=pl.Boolean) if above is None else above,
            **shares,
        }
    ).filter(pool.unseen_N)
    made = frame.group_by("taxon", maintain_order=True).agg(
        specimens=pl.len().cast(pl.Int64),
        right_above=pl.col("right_above").cast(pl.Float64).mean(),
        **{name: pl.col(name).mean() for name in shares},
    )
    answers = frame.drop_nulls("named").group_by("taxon", "named").agg(times=pl.len().cast(pl.Int64))
    common = answers.sort(["times", "named"], descending=[True, False]).group_by("taxon").first()
    joined = made.join(common, on="taxon", how="left", maintain_order="left")
    columns = ["taxon", "specimens", "right_above", "named", "times", *shares]
    return joined.select(columns).sort(["specimens", "taxon"], descending=[True, False])
