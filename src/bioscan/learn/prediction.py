"""From images to named specimens: leaf probabilities, one answer by a decoding, then every rank by summing up
the tree.

N: specimens, L: leaf taxa, M: outputs of the network, R: ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from bioscan.analysis.hierarchy import DECODINGS, decode
from bioscan.analysis.taxonomy import Lineage, Taxonomy
from bioscan.data.images import Images
from bioscan.errors import unknown
from bioscan.learn.augmentation import to_network
from bioscan.learn.dataset import SpecimenDataset
from bioscan.learn.device import autocast, choose_precision
from bioscan.learn.loader import Loader, default_workers
from bioscan.learn.losses import adjusted
from bioscan.learn.model_folder import Model
from bioscan.vocabulary import RANKS

_NO_NUMBER: Final = "the network's outputs for it, or tau, are too large to make probabilities of"


def predict_batches(
    model: Model,
    images: Images,
    specimens: pl.DataFrame,
    *,
    tau: float = 0.0,
    rule: str = "leaf",
    batch_size: int = 64,
    workers: int | None = None,
    amp: str = "auto",
) -> Iterator[tuple[pl.DataFrame, NDArray[np.float32]]]:
    """Predictions of specimens in order, a batch at a time.

    Args:
        model: On its device.
        images: The package.
        specimens: Columns `sampleid`, `image_file` and `row` (row of the image in `images`, -1 where it is
            not there).
        tau: Strength of the logit adjustment, as in `probabilities`.
        rule: From probabilities to one answer: one of `hierarchy.DECODINGS`.
        batch_size: Specimens at a time.
        workers: Loader processes; None: by the number of cores.
        amp: As in the training settings.

    Yields:
        A table as `data.predictions` has it, and the leaf probabilities, shape N × L, NaN where there is no
        image.
    """
    device = next(model.network.parameters()).device
    precision = choose_precision(amp, device)
    naming = Naming.of(model.taxonomy, rule)
    dataset = SpecimenDataset(
        images,
        specimens["row"].to_numpy(),
        image_size=model.spec.image_size,
        crop_size=model.spec.crop_size,
    )
    if not len(dataset):
        return
    with Loader(
        dataset,
        batch_size=batch_size,
        workers=default_workers() if workers is None else workers,
        pin_memory=device.type == "cuda",
    ) as loader:
        for number, batch in enumerate(loader.epoch()):
            start = number * batch_size
            rows = specimens.slice(start, batch_size)
            found_NL = np.full((rows.height, model.taxonomy.num_leaves), np.nan, np.float32)
            if batch.size:
                images_BCHW = to_network(batch.images_BCHW, model.spec, device, channels_last=False)
                with torch.inference_mode(), autocast(device, precision):
                    outputs_BM = model.network(images_BCHW)
                found_NL[batch.numbers_B.numpy() - start] = probabilities(model, outputs_BM, tau=tau)
            wild_N = np.isnan(found_NL).any(axis=1)
            found_NL[wild_N] = np.nan
            reasons = dict.fromkeys((np.flatnonzero(wild_N) + start).tolist(), _NO_NUMBER)
            reasons.update(batch.failures)
            errors = [reasons.get(start + place) for place in range(rows.height)]
            yield naming.table(rows, found_NL, errors), found_NL


def probabilities(model: Model, outputs_BM: Tensor, *, tau: float = 0.0) -> NDArray[np.float32]:
    """Leaf probabilities of a network's outputs, shape B × L: softmax(logits − tau · log prior), in float64.

    Post-hoc logit adjustment (Menon et al., ICLR 2021): with tau 1 every leaf taxon counts as if all were
    equally common in training, with 0 as common as they were. For a conditional softmax the logits are the
    leaves' log-probabilities.
    """
    with torch.inference_mode():
        logits_BL: Tensor = model.leaf_logits(outputs_BM.cpu().double())
        if tau:
            logits_BL = adjusted(logits_BL, torch.from_numpy(model.log_prior_L), tau)
        made: NDArray[np.float32] = torch.softmax(logits_BL, dim=1).float().numpy()
    return made


@dataclass(frozen=True)
class Naming:
    """From leaf probabilities to names: those of one leaf's lineage, each with the sum over its taxon's
    leaves, so that the names of a specimen never contradict each other.
    """

    taxonomy: Taxonomy
    rule: str
    """Which leaf: one of `hierarchy.DECODINGS`."""
    lineages: pl.DataFrame
    """A row per leaf, a column per rank at which some leaf's lineage has a name."""
    taxon_RL: NDArray[np.int64]
    """Per column the number of each leaf's taxon; ranks above and between those of the tree have taxa too."""

    @classmethod
    def of(cls, taxonomy: Taxonomy, rule: str = "leaf") -> "Naming":
        """Prepared once for a taxonomy.

        Raises:
            RequestError: an unknown rule.
        """
        if rule not in DECODINGS:
            raise unknown("decoding", rule, DECODINGS)
        paths = taxonomy.leaf_paths
        rows = [(*path, *(None,) * (len(RANKS) - len(path))) for path in paths]
        lineages = pl.DataFrame(rows, dict.fromkeys(RANKS, pl.String), orient="row")
        ranks = [rank for rank in RANKS if lineages[rank].null_count() < lineages.height]
        taxon_RL = np.empty((len(ranks), len(paths)), np.int64)
        for rank, taxon_L in zip(ranks, taxon_RL, strict=True):
            numbers: dict[Lineage, int] = {}
            end = RANKS.index(rank) + 1
            taxon_L[:] = [numbers.setdefault(path[:end], len(numbers)) for path in paths]
        return cls(taxonomy, rule, lineages.select(ranks), taxon_RL)

    def table(
        self, specimens: pl.DataFrame, probabilities_NL: NDArray[np.float32], errors_N: Sequence[str | None]
    ) -> pl.DataFrame:
        """A predictions table; the assigned taxon is the leaf that the rule chooses.

        Args:
            specimens: Columns `sampleid`, `image_file`.
            probabilities_NL: Of the leaves; rows of NaN get no names.
            errors_N: Why there is no prediction.
        """
        known_N = ~np.isnan(probabilities_NL[:, 0])
        values_NL = np.where(known_N[:, None], probabilities_NL, 0).astype(np.float64)
        nodes_N = decode(self.taxonomy, values_NL, self.rule)
        leaf_N = self.taxonomy.first_leaf_N[nodes_N]
        answer_N = pl.Series(leaf_N).set(pl.Series(~known_N), None)
        names = self.lineages.select(pl.all().gather(answer_N))
        columns: dict[str, Any] = {name: specimens[name] for name in ("sampleid", "image_file")}
        for rank, taxon_L in zip(names.columns, self.taxon_RL, strict=True):
            sum_N = (values_NL * (taxon_L == taxon_L[leaf_N][:, None])).sum(axis=1)
            columns[rank] = names[rank]
            columns[f"{rank}_probability"] = _floats(sum_N, names[rank].is_null())
        ranks = pl.Series(RANKS).gather(self.taxonomy.rank_N[nodes_N])
        columns["assigned_rank"] = ranks.set(answer_N.is_null(), None)
        columns["assigned_taxon"] = names.select(pl.coalesce(reversed(names.columns))).to_series()
        sum_N = values_NL[np.arange(leaf_N.size), leaf_N]
        columns["assigned_probability"] = _floats(sum_N, answer_N.is_null())
        columns["error"] = pl.Series(errors_N, dtype=pl.String)
        return pl.DataFrame(columns)


def _floats(values_N: NDArray[np.float64], absent_N: pl.Series) -> pl.Series:
    """Probabilities, null where there is no name; a sum of rounded floats may pass 1."""
    return pl.Series(np.minimum(values_N, 1.0)).set(absent_N, None)
