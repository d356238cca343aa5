"""From images to named specimens: leaf probabilities, one answer by a decoding, then every rank by summing up
the tree.

N: specimens, L: leaf taxa, M: outputs of the network, R: ranks.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from bioscan.analysis.backoff import deepest
from bioscan.analysis.confidence import running_minimum
from bioscan.analysis.hierarchy import DECODINGS, decode, lineages
from bioscan.analysis.taxonomy import Lineage, Taxonomy
from bioscan.data.images import Images
from bioscan.errors import RequestError, unknown
from bioscan.learn import model_folder
from bioscan.learn.augmentation import to_network
from bioscan.learn.dataset import SpecimenDataset
from bioscan.learn.device import autocast, choose_device, choose_precision
from bioscan.learn.loader import Batch, Loader, default_workers
from bioscan.learn.losses import adjusted
from bioscan.learn.model_folder import Model
from bioscan.learn.promises import BackOff, TaxonSets, at_rank, names_of, ranks_of
from bioscan.vocabulary import RANKS

_NO_NUMBER: Final = "the network's outputs for it, or tau, are too large to make probabilities of"


class Predicted(NamedTuple):
    """A batch of predictions."""

    table: pl.DataFrame
    """As `data.predictions` has it."""
    probabilities_NL: NDArray[np.float32]
    """Of the leaves; NaN where there is no prediction."""
    energy_N: NDArray[np.float64]
    """See `energy`; NaN where there is no prediction."""


def open_model(
    folder: Path | str,
    *,
    tau: float,
    decode: str,
    batch_size: int,
    device: str,
    workers: int | None,
    threads: int | None,
) -> Model:
    """A model on its device, for what is asked of it; arguments as in `jobs.predict.predict`.

    Raises:
        RequestError: a value out of range, an unknown decoding or device, no model folder, a tau for a model
            of which it is not known how common its taxa were.
        DataError: as the model folder tells.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        ("threads", threads, 1),
    ):
        if value is not None and value < least:
            raise RequestError(f"{name} is {value}; it must be at least {least}")
    if not math.isfinite(tau):
        raise RequestError(f"tau is {tau}; it must be a number, such as 0 or 1")
    if decode not in DECODINGS:
        raise unknown("decoding", decode, DECODINGS)
    if threads:
        torch.set_num_threads(threads)
    model = model_folder.load(folder, device=choose_device(device))
    if tau and not model.target_counts_N.any():
        raise RequestError(f"{folder}: how common its taxa were in training is not known; --tau needs that")
    return model


def predict_batches(
    model: Model,
    images: Images,
    specimens: pl.DataFrame,
    naming: "Naming",
    *,
    tau: float = 0.0,
    temperature: float = 1.0,
    batch_size: int = 64,
    workers: int | None = None,
    amp: str = "auto",
) -> Iterator[Predicted]:
    """Predictions of specimens in order, a batch at a time.

    Args:
        model: On its device.
        images: The package.
        specimens: Columns `sampleid`, `image_file` and `row` (row of the image in `images`, -1 where it is
            not there).
        naming: Of the model's taxonomy.
        tau: Strength of the logit adjustment, as in `shown_logits`.
        temperature: As in `probabilities`.
        batch_size: Specimens at a time.
        workers: Loader processes; None: by the number of cores.
        amp: As in the training settings.
    """
    made = output_batches(
        model, images, specimens["row"].to_numpy(), batch_size=batch_size, workers=workers, amp=amp
    )
    for number, (batch, outputs_BM) in enumerate(made):
        start = number * batch_size
        rows = specimens.slice(start, batch_size)
        found_NL = np.full((rows.height, model.taxonomy.num_leaves), np.nan, np.float32)
        energy_N = np.full(rows.height, np.nan)
        if outputs_BM is not None:
            places_B = batch.numbers_B.numpy() - start
            logits_BL = shown_logits(model, outputs_BM, tau=tau)
            found_NL[places_B] = probabilities(logits_BL, temperature=temperature)
            energy_N[places_B] = energy(logits_BL, temperature=temperature)
        wild_N = np.isnan(found_NL).any(axis=1)
        found_NL[wild_N] = np.nan
        energy_N[wild_N] = np.nan
        reasons = dict.fromkeys((np.flatnonzero(wild_N) + start).tolist(), _NO_NUMBER)
        reasons.update(batch.failures)
        errors = [reasons.get(start + place) for place in range(rows.height)]
        yield Predicted(naming.table(rows, found_NL, errors), found_NL, energy_N)


def output_batches(
    model: Model,
    images: Images,
    rows_X: NDArray[np.int64],
    *,
    batch_size: int,
    workers: int | None = None,
    amp: str = "auto",
) -> Iterator[tuple[Batch, Tensor | None]]:
    """What a network says of images, a batch at a time, in order.

    Args:
        model: On its device.
        images: The package.
        rows_X: Row of each image in it, -1 where it is not there.
        batch_size: Images at a time.
        workers: Loader processes; None: by the number of cores.
        amp: As in the training settings.

    Yields:
        The batch, with the numbers of the images that were read and the failures, and the outputs for those
        that were, on the device, shape B × M; None where none was.
    """
    device = next(model.network.parameters()).device
    precision = choose_precision(amp, device)
    dataset = SpecimenDataset(
        images, rows_X, image_size=model.spec.image_size, crop_size=model.spec.crop_size
    )
    if not len(dataset):
        return
    with Loader(
        dataset,
        batch_size=batch_size,
        workers=default_workers() if workers is None else workers,
        pin_memory=device.type == "cuda",
    ) as loader:
        for batch in loader.epoch():
            outputs_BM = None
            if batch.size:
                images_BCHW = to_network(batch.images_BCHW, model.spec, device, channels_last=False)
                with torch.inference_mode(), autocast(device, precision):
                    outputs_BM = model.network(images_BCHW)
            yield batch, outputs_BM


def shown_logits(model: Model, outputs_BM: Tensor, *, tau: float = 0.0) -> Tensor:
    """Leaf logits of a network's outputs less tau · log prior, shape B × L, in float64 on the CPU.

    Post-hoc logit adjustment (Menon et al., ICLR 2021): with tau 1 every leaf taxon counts as if all were
    equally common in training, with 0 as common as they were. For a conditional softmax the logits are the
    leaves' log-probabilities.
    """
    with torch.inference_mode():
        logits_BL: Tensor = model.leaf_logits(outputs_BM.cpu().double())
        return adjusted(logits_BL, torch.from_numpy(model.log_prior_L), tau) if tau else logits_BL


def probabilities(logits_BL: Tensor, *, temperature: float = 1.0) -> NDArray[np.float32]:
    """Leaf probabilities, softmax(logits / temperature), shape B × L."""
    with torch.inference_mode():
        made: NDArray[np.float32] = torch.softmax(logits_BL / temperature, dim=1).float().numpy()
    return made


def energy(logits_BL: Tensor, *, temperature: float = 1.0) -> NDArray[np.float64]:
    """−T · logsumexp(logits / T), shape B: the higher, the less the picture is like those of training.

    Free energy, Liu et al., NeurIPS 2020. Of a conditional softmax at temperature 1 and tau 0 it is 0
    whatever the picture, as its logits are log-probabilities.
    """
    with torch.inference_mode():
        made: NDArray[np.float64] = (-temperature * torch.logsumexp(logits_BL / temperature, dim=1)).numpy()
    return made


@dataclass(frozen=True)
class Naming:
    """From leaf probabilities to names: those of one leaf's lineage, each with the sum over its taxon's
    leaves, so that the names of a specimen never contradict each other.

    V: nodes of the taxonomy, T: its ranks, R: ranks that have a column, T of them among them.
    """

    taxonomy: Taxonomy
    rule: str
    """Which leaf: one of `hierarchy.DECODINGS`."""
    lineages: pl.DataFrame
    """A row per leaf, a column per rank at which some leaf's lineage has a name."""
    taxon_RL: NDArray[np.int64]
    """Per column the number of each leaf's taxon; ranks above and between those of the tree have taxa too."""
    node_TL: NDArray[np.int32]
    """Per rank of the tree the node that each leaf's lineage has there, -1 for none."""
    rank_temperatures: Mapping[str, float] | None = None
    """Of the probabilities at ranks of the tree (`Calibration.rank_temperatures`); None: they are sums."""
    backoff: BackOff | None = None
    """What is assigned; None: the leaf."""
    reliability: pl.DataFrame | None = None
    """Further columns on the assigned taxon, a row per node."""
    sets: TaxonSets | None = None
    """Further columns, where asked for."""

    @cached_property
    def names_V(self) -> pl.Series:
        """Name of each node."""
        return names_of(self.taxonomy)

    @cached_property
    def ranks_V(self) -> pl.Series:
        """Rank of each node."""
        return ranks_of(self.taxonomy)

    @classmethod
    def of(
        cls,
        taxonomy: Taxonomy,
        rule: str = "leaf",
        *,
        rank_temperatures: Mapping[str, float] | None = None,
    ) -> "Naming":
        """Prepared once for a taxonomy; arguments as the fields.

        Raises:
            RequestError: an unknown rule.
        """
        if rule not in DECODINGS:
            raise unknown("decoding", rule, DECODINGS)
        paths = taxonomy.leaf_paths
        rows = [(*path, *(None,) * (len(RANKS) - len(path))) for path in paths]
        table = pl.DataFrame(rows, dict.fromkeys(RANKS, pl.String), orient="row")
        ranks = [rank for rank in RANKS if table[rank].null_count() < table.height]
        taxon_RL = np.empty((len(ranks), len(paths)), np.int64)
        for rank, taxon_L in zip(ranks, taxon_RL, strict=True):
            numbers: dict[Lineage, int] = {}
            end = RANKS.index(rank) + 1
            taxon_L[:] = [numbers.setdefault(path[:end], len(numbers)) for path in paths]
        return cls(
            taxonomy,
            rule,
            table.select(ranks),
            taxon_RL,
            lineages(taxonomy, taxonomy.leaves_L),
            rank_temperatures,
        )

    @property
    def optional(self) -> list[str]:
        """Columns beyond names, probabilities and errors that the table has."""
        made = [] if self.reliability is None else self.reliability.columns
        return [*made, *(self.sets.COLUMNS if self.sets else ())]

    def table(
        self, specimens: pl.DataFrame, probabilities_NL: NDArray[np.float32], errors_N: Sequence[str | None]
    ) -> pl.DataFrame:
        """A predictions table.

        The names are those down to the leaf that the rule chooses; the assigned taxon is the deepest of them,
        or the deepest that the back-off leaves.

        Args:
            specimens: Columns `sampleid`, `image_file`.
            probabilities_NL: Of the leaves; rows of NaN get no names.
            errors_N: Why there is no prediction.
        """
        absent_N = np.isnan(probabilities_NL[:, 0])
        values_NL = np.where(
            absent_N[:, None], 1 / self.taxonomy.num_leaves, probabilities_NL.astype(np.float64)
        )
        leaf_N = self.taxonomy.first_leaf_N[decode(self.taxonomy, values_NL, self.rule)]
        nodes_NT, tree_NT = self._path(values_NL, leaf_N)
        names = self.lineages.select(pl.all().gather(pl.Series(leaf_N).set(pl.Series(absent_N), None)))
        columns: dict[str, Any] = {name: specimens[name] for name in ("sampleid", "image_file")}
        for name, shown_N in zip(names, self._shown(values_NL, leaf_N, tree_NT), strict=True):
            columns[name.name] = name
            columns[f"{name.name}_probability"] = _floats(shown_N, name.is_null().to_numpy())
        level_N = self._deepest(nodes_NT, tree_NT)
        level_N[absent_N] = -1
        rows = np.arange(len(leaf_N))
        assigned_N = pl.Series(nodes_NT[rows, level_N]).set(pl.Series(level_N < 0), None)
        columns["assigned_rank"] = self.ranks_V.gather(assigned_N)
        columns["assigned_taxon"] = self.names_V.gather(assigned_N)
        columns["assigned_probability"] = _floats(tree_NT[rows, level_N], level_N < 0)
        if self.reliability is not None:
            columns |= self.reliability.select(pl.all().gather(assigned_N)).to_dict()
        if self.sets:
            keys = specimens.select(pl.coalesce("sampleid", "image_file")).to_series()
            columns |= self.sets.columns(probabilities_NL, keys.to_list()).to_dict()
        columns["error"] = pl.Series(errors_N, dtype=pl.String)
        return pl.DataFrame(columns)

    def _path(
        self, values_NL: NDArray[np.float64], leaf_N: NDArray[np.integer[Any]]
    ) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Nodes of leaves' lineages at the tree's ranks, and their probabilities as shown, N × T each.

        Node -1 and NaN where a lineage has no taxon at the rank.
        """
        nodes_NT = self.node_TL[:, leaf_N].T
        shown_NT = np.full(nodes_NT.shape, np.nan)
        for place, rank in enumerate(self.taxonomy.ranks):
            rows = np.flatnonzero(nodes_NT[:, place] >= 0)
            nodes = nodes_NT[rows, place]
            temperature = (self.rank_temperatures or {}).get(rank, 1.0)
            if temperature == 1:
                kept_NL = values_NL[rows] if rows.size < len(values_NL) else values_NL
                shown_NT[rows, place] = _sums(self.taxonomy, kept_NL, nodes)
            else:
                found_NK, nodes_K = at_rank(self.taxonomy, values_NL, rank, temperature)
                shown_NT[rows, place] = found_NK[rows, np.searchsorted(nodes_K, nodes)]
        if self.rank_temperatures:
            shown_NT = running_minimum(shown_NT)
        return nodes_NT, np.minimum(shown_NT, 1.0)  # a sum of rounded floats may pass 1

    def _shown(
        self,
        values_NL: NDArray[np.float64],
        leaf_N: NDArray[np.int32],
        tree_NT: NDArray[np.float64],
    ) -> Iterator[NDArray[np.float64]]:
        """Probability of each column's name. Those between ranks of the tree stay between theirs."""
        tree = dict(zip(self.taxonomy.ranks, tree_NT.T, strict=True))
        above_N = np.ones(len(leaf_N))
        for place, (rank, taxon_L) in enumerate(zip(self.lineages.columns, self.taxon_RL, strict=True)):
            if rank in tree:
                above_N = np.fmin(above_N, tree[rank])
                yield tree[rank]
                continue
            sum_N = (values_NL * (taxon_L == taxon_L[leaf_N][:, None])).sum(axis=1)
            deeper = [tree[name] for name in self.lineages.columns[place:] if name in tree]
            yield np.fmin(np.fmax.reduce([sum_N, *deeper]), above_N)

    def _deepest(self, nodes_NT: NDArray[np.int32], tree_NT: NDArray[np.float64]) -> NDArray[np.integer[Any]]:
        """Index of the rank of the tree whose name is assigned; -1: none."""
        if self.backoff:
            return self.backoff.deepest(nodes_NT, tree_NT)
        return deepest(nodes_NT >= 0)


def _sums(
    taxonomy: Taxonomy, values_NL: NDArray[np.float64], nodes_N: NDArray[np.integer[Any]]
) -> NDArray[np.float64]:
    """Probability of one node for each specimen: the sum over its leaves, which are an interval."""
    rows_N = np.arange(len(nodes_N)) * taxonomy.num_leaves
    first_N, end_N = taxonomy.first_leaf_N[nodes_N] + rows_N, taxonomy.end_leaf_N[nodes_N] + rows_N
    bounds = np.column_stack([first_N, end_N]).ravel()
    if bounds.size and bounds[-1] == values_NL.size:
        bounds = bounds[:-1]  # the last interval ends with the values
    sums_N: NDArray[np.float64] = np.add.reduceat(values_NL.ravel(), bounds)[::2]
    return sums_N


def _floats(values_N: NDArray[np.float64], absent_N: NDArray[np.bool_]) -> pl.Series:
    """Probabilities, null where there is no name."""
    return pl.Series(np.minimum(values_N, 1.0)).set(pl.Series(absent_N), None)
