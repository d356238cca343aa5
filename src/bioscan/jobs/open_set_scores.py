"""What an open-set evaluation starts from: which specimens are seen, which unseen, and how novel each looks.

N specimens that count, G training specimens, K classes of the model at the rank, L leaf taxa, F features, B
rows of a block. Scores and embeddings are gone through in blocks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.analysis import neighbours, novelty
from bioscan.data.embeddings import Embeddings
from bioscan.errors import DataError, RequestError
from bioscan.jobs.evaluation_inputs import (
    AtRank,
    Inputs,
    Taxa,
    down_to,
    joined_at,
    leaf_paths,
    named_ranks,
    numbers_of,
    paths_of,
    places,
)
from bioscan.jobs.linear_head import LinearHead, read_linear_head
from bioscan.vocabulary import RANKS

NEIGHBOURS: Final = 1
"""Which of the nearest training specimens `knn` looks at. With a later one a taxon of few specimens would
look novel itself."""
FROM_EMBEDDINGS: Final = ("knn", "mahalanobis", "relative_mahalanobis", "vim")
"""Scores that embeddings are needed for."""

_NO_ENERGY: Final = 1e-6
"""Energies no larger than this are rounding: the leaf logits are log-probabilities."""

Values = NDArray[np.float64]
Ints = NDArray[np.int64]


# -- who is seen, who is not


@dataclass(frozen=True)
class Names:
    """The true taxa at a rank, and what else goes by their labels."""

    rank: str
    taxa: Taxa
    labels: pl.Series
    """N; null where the catalogue has no name."""

    @classmethod
    def at(cls, rank: str, joined: pl.DataFrame, trained: pl.DataFrame, known: pl.DataFrame) -> "Names":
        """By all lineages that occur: in the catalogue, and those that the model knows."""
        catalogue = pl.concat([paths_of(joined, rank), paths_of(trained, rank)])
        taxa = Taxa.of(rank, catalogue, known.select(down_to(rank)))
        return cls(rank, taxa, taxa.labels(paths_of(joined, rank)))

    def of(self, paths: pl.DataFrame) -> pl.Series:
        """Labels of other lineages, of this rank or deeper."""
        return self.taxa.labels(paths.select(down_to(self.rank)))

    def right(self, paths_N: pl.DataFrame) -> pl.Series:
        """Who is named right; null where there is no name to compare with."""
        right = (self.of(paths_N) == self.labels).fill_null(False)
        return right.set(self.labels.is_null(), None)


@dataclass(frozen=True)
class Pool:
    """The specimens that count, seen and unseen."""

    rank: str
    above: str | None
    """The rank above that most taxa have a name at; None where there is none."""
    joined: pl.DataFrame
    """As `joined_at` makes it, N rows."""
    labels: pl.Series
    """Taxon at the rank."""
    unseen_N: NDArray[np.bool_]
    known: pl.DataFrame
    """Lineages of the taxa that the model knows, down to the rank."""
    trained: pl.DataFrame
    """Training specimens of known taxa: key and ranks; without an experiment none."""
    counts: dict[str, int]

    @classmethod
    def of(cls, found: Inputs, rank: str) -> "Pool":
        """From the inputs, checked."""
        key, split = found.key, found.experiment
        roles = pl.col(split).fill_null("") if split else pl.lit("")
        learned = roles.is_in(["train", "validation"])
        labelled = found.inside.filter(pl.col(rank).is_not_null())
        trained, free = labelled.filter(roles == "train"), labelled.filter(~learned)
        known = _known(found, roles, rank)
        if free.is_empty():
            raise RequestError(f"no specimen outside train and validation has a name at rank {rank}")
        joined = joined_at(free, found.table, key, rank)
        names = Names.at(rank, joined, trained, known)
        known_labels = names.of(known).drop_nulls().implode()
        unseen = ~names.labels.is_in(known_labels)
        wanted = free.filter(roles == (found.role or ""))[key].implode()
        seen = ~unseen & joined[key].is_in(wanted)
        _check(found, rank, seen, unseen)
        kept = unseen | seen
        absent = free.join(joined, on=key, how="anti")
        is_missed = absent[key].is_in(wanted) | ~names.of(paths_of(absent, rank)).is_in(known_labels)
        predicted = found.inside.join(found.table, on=key, how="semi")
        counts = {
            "failed": int(joined.filter(kept)["error"].is_not_null().sum()),
            "unlabelled": predicted.filter(~learned, pl.col(rank).is_null()).height,
            "learned_from": predicted.filter(learned).height,
            "other": int((~kept).sum()),
            "not_predicted": int(is_missed.sum()),
        }
        ranks = [c for c in free.columns if c in RANKS]
        is_known = names.of(paths_of(trained, rank)).is_in(known_labels)
        return cls(
            rank,
            _above(known.filter(pl.col(rank).is_not_null()), rank),
            joined.filter(kept),
            names.labels.filter(kept),
            unseen.filter(kept).to_numpy(),
            known,
            trained.filter(is_known).select(key, *ranks),
            counts,
        )

    def names_at(self, rank: str) -> Names:
        """The true taxa at this rank or one above."""
        return Names.at(rank, self.joined, self.trained, self.known)


def _known(found: Inputs, roles: pl.Expr, rank: str) -> pl.DataFrame:
    """Lineages of the taxa that the model knows, down to the rank."""
    trained = found.inside.filter(roles == "train")
    if found.scores is not None:
        known = leaf_paths(found.scores, rank)
    elif trained.height:
        known = paths_of(trained, rank)
    else:
        raise RequestError(
            "which taxa the model knows is told by the scores file beside the predictions, or by the "
            "training specimens of a split (--experiment); there are neither"
        )
    known = known.unique(maintain_order=True)
    if known[rank].null_count() == known.height:
        raise RequestError(f"the model has no taxon at rank {rank}")
    return known


def _check(found: Inputs, rank: str, seen: pl.Series, unseen: pl.Series) -> None:
    """Raise where one of the two is missing."""
    if not unseen.any():
        raise RequestError(
            f"all {unseen.len():,} predicted specimens that have a name at rank {rank}, train and validation "
            "left out, are of taxa that the model knows: nothing is unseen (specimens without a role are "
            "predicted with bioscan predict --all-rows --scores)"
        )
    if not seen.any():
        of_role = f" of role {found.role}" if found.role else ""
        raise RequestError(
            f"no predicted specimen{of_role} is of a taxon that the model knows at rank {rank}: there is "
            "nothing to tell the unseen from"
        )


def _above(known: pl.DataFrame, rank: str) -> str | None:
    """The nearest rank above at which most taxa have a name, and not all the same."""
    for level in reversed(down_to(rank)[:-1]):
        names = known[level].drop_nulls()
        if 2 * names.len() > known.height:
            return level if names.n_unique() > 1 else None
    return None


def ranks_to_compare(found: Inputs, pool: Pool) -> list[str]:
    """Ranks that names are compared at, root down: the model's, and those that tell specimens apart."""
    own = found.record.get("ranks") or ()
    ranks = {*(own if len(own) > 1 else named_ranks(found.table)), *([pool.above] if pool.above else [])}
    above = [r for r in down_to(pool.rank)[:-1] if r in ranks and r in pool.joined.columns]
    return [*(r for r in above if pool.joined[r].drop_nulls().n_unique() > 1), pool.rank]


# -- scores


def from_outputs(found: Inputs, pool: Pool) -> tuple[dict[str, Values], dict[str, str]]:
    """MSP, and where the scores file allows it the other scores from a model's outputs; and why not."""
    if found.scores is None:
        why = dict.fromkeys(
            ("msp_within", "max_logit", "energy"), "there is no scores file beside the predictions"
        )
        given = pool.joined["probability"].cast(pl.Float64)
        if given.null_count() == given.len():
            return {}, {"msp": f"the predictions have no column {pool.rank}_probability"} | why
        return {"msp": 1.0 - given.fill_null(math.nan).to_numpy()}, why
    at_rank = _classes(found, pool.rank)
    at_above = _classes(found, pool.above) if pool.above else None
    made = {"msp": np.full(pool.joined.height, np.nan)}
    why = {}
    if at_above:
        made["msp_within"] = made["msp"].copy()
        parent_K = np.full(at_rank.num_classes, -1, np.int64)
        both = (at_rank.class_L >= 0) & (at_above.class_L >= 0)
        parent_K[at_rank.class_L[both]] = at_above.class_L[both]
    else:
        why["msp_within"] = f"no rank above {pool.rank} tells the model's taxa apart"
    best_N = made["msp"].copy()
    row_N = places(pool.joined[found.key], found.scores.keys[found.key])
    absent = pool.joined.filter((row_N < 0) & pool.joined["error"].is_null().to_numpy())
    if absent.height:
        raise DataError(
            f"{found.scores.path}: {absent.height:,} of the {row_N.size:,} specimens are not in it (first: "
            f"{absent[found.key][0]}); it is not of these predictions"
        )
    above_batches = at_above.batches() if at_above else None
    for rows, batch_BK in at_rank.batches():
        here = np.flatnonzero((row_N >= rows.start) & (row_N < rows.start + len(batch_BK)))
        at = row_N[here] - rows.start
        made["msp"][here] = novelty.msp(batch_BK[at])
        if above_batches:
            made["msp_within"][here] = novelty.msp_within(batch_BK[at], next(above_batches)[1][at], parent_K)
    energy = found.scores.energy
    if energy is None:
        reason = "the scores file holds no energy; bioscan predict writes it since it is kept"
        return made, why | {"max_logit": reason, "energy": reason}
    energy_N = np.append(energy.cast(pl.Float64).fill_null(math.nan).to_numpy(), math.nan)[row_N]
    if not (np.abs(energy_N) > _NO_ENERGY).any():
        reason = "the model gives log-probabilities, not logits: the energy is 0 for every specimen"
        return made, why | {"max_logit": reason, "energy": reason}
    for rows, batch_BL in found.scores.batches():
        here = np.flatnonzero((row_N >= rows.start) & (row_N < rows.start + len(batch_BL)))
        best_N[here] = batch_BL[row_N[here] - rows.start].max(axis=1)
    temperature = float(found.record.get("temperature") or 1.0)
    made["max_logit"] = novelty.max_logit(energy_N, best_N, temperature)
    made["energy"] = np.where(np.isnan(best_N), math.nan, energy_N)
    return made, why


def _classes(found: Inputs, rank: str) -> AtRank:
    """Probabilities of the model's taxa at a rank."""
    assert found.scores is not None
    paths = leaf_paths(found.scores, rank)
    labels = Taxa.of(rank, paths.clear(), paths).labels(paths)
    known = labels.drop_nulls().unique(maintain_order=True).to_list()
    return AtRank(found.scores, numbers_of(labels, known), len(known))


@dataclass(frozen=True)
class Space:
    """Scores and names from embeddings."""

    scores_N: dict[str, Values]
    why: dict[str, str]
    nearest: pl.DataFrame
    """Lineage of the nearest training specimen, N rows; null where there is no embedding."""
    nearest_keys: pl.DataFrame
    """Likewise of the nearest of these and the other unseen specimens."""
    there_N: NDArray[np.bool_]
    record: dict[str, Any]


def from_embeddings(found: Inputs, pool: Pool, held: Embeddings, model: Path | str | None) -> Space:
    """The training and the unseen specimens' embeddings are held; the others come block by block.

    Raises:
        RequestError: no split, specimens that are not in the file, a model that it does not come from.
        DataError: keys that are not unique, numbers that are not finite.
    """
    if found.experiment is None:
        raise RequestError("embeddings need the training specimens of a split: --experiment")
    key = found.key
    if held.keys[key].n_unique() < held.keys.height:
        raise DataError(f"{held.path}: some rows have no {key}, or the same; embed with the catalogue")
    row_N, row_G = (places(frame[key], held.keys[key]) for frame in (pool.joined, pool.trained))
    trained = pool.trained.filter(pl.Series(row_G >= 0))
    there_N = row_N >= 0
    if trained.is_empty() or not there_N.any():
        which = "training specimens of taxa that the model knows" if there_N.any() else "evaluated specimens"
        raise RequestError(f"{held.path} holds none of the {which}; embed the whole catalogue")
    features_GF = _finite(held, held.rows(row_G[row_G >= 0]))
    classes = pool.names_at(pool.rank).of(paths_of(trained, pool.rank))
    gaussians = novelty.Gaussians.fit(features_GF, classes.rank("dense").cast(pl.Int64).to_numpy())
    vim, why = None, {"vim": "it needs the model that the embeddings come from: --model"}
    if model is not None:
        head = _head(model, held)
        vim, why = novelty.Vim.fit(features_GF, head.weight_LF, head.bias_L), {}
    gallery_GF = neighbours.unit(features_GF)
    keys = np.flatnonzero(pool.unseen_N & there_N)  # specimens that are keys too
    keys_GF = neighbours.unit(_finite(held, held.rows(row_N[keys]))) if keys.size else gallery_GF[:0]
    names = [*FROM_EMBEDDINGS[:3], *(["vim"] if vim else [])]
    made = {name: np.full(there_N.size, np.nan) for name in names}
    nearest_N, among_keys_N = np.full(there_N.size, -1, np.int64), np.full(there_N.size, -1, np.int64)
    own_N = np.full(there_N.size, -1, np.int64)
    own_N[keys] = np.arange(keys.size)
    for here, values_BF in _blocks(held, row_N):
        places_BK, cosines_BK = neighbours.nearest(values_BF, gallery_GF, NEIGHBOURS)
        nearest_N[here] = among_keys_N[here] = places_BK[:, 0]
        made["knn"][here] = novelty.knn_distance(cosines_BK)
        squares_B = gaussians.mahalanobis(values_BF)
        made["mahalanobis"][here] = squares_B
        made["relative_mahalanobis"][here] = squares_B - gaussians.background(values_BF)
        if vim:
            made["vim"][here] = vim.score(values_BF)
        if keys.size:
            place_B1, cosine_B1 = neighbours.nearest(values_BF, keys_GF, 1, own_Q=own_N[here])
            nearer_B = cosine_B1[:, 0] > cosines_BK[:, 0]
            among_keys_N[here[nearer_B]] = place_B1[nearer_B, 0] + len(gallery_GF)
    lineages = pl.concat([paths_of(trained, pool.rank), paths_of(pool.joined[keys], pool.rank)])
    named, named_keys = (
        lineages.select(pl.all().gather(pl.Series(at_N).set(pl.Series(at_N < 0), None)))
        for at_N in (nearest_N, among_keys_N)
    )
    return Space(made, why, named, named_keys, there_N, held.record)


def _blocks(held: Embeddings, row_N: Ints) -> Iterator[tuple[Ints, NDArray[np.float32]]]:
    """Which specimens have their embedding in a block of the file, and these; -1 is none."""
    for start, values_BF in held.batches():
        here = np.flatnonzero((row_N >= start) & (row_N < start + len(values_BF)))
        if here.size:
            yield here, _finite(held, values_BF[row_N[here] - start])


def _finite(held: Embeddings, values_BF: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(values_BF).all():
        raise DataError(f"{held.path}: an embedding has a number that is not finite; embed again")
    return values_BF


def _head(model: Path | str, held: Embeddings) -> LinearHead:
    """The model's head, if it is of the network that the embeddings come from."""
    head = read_linear_head(model)
    if head.backbone_sha256 != held.record.get("weights_sha256"):
        raise RequestError(
            f"{held.path} does not come from {model}, but from {held.record.get('backbone')} with other "
            "weights; bioscan embed --model makes embeddings of a model"
        )
    return head
