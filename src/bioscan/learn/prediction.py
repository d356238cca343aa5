"""From images to named specimens: leaf probabilities, then every rank by summing up the tree.

N: specimens, L: leaf taxa, G: taxa at one rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from bioscan.analysis.taxonomy import Taxonomy
from bioscan.data.images import Images
from bioscan.learn.augmentation import to_network
from bioscan.learn.dataset import SpecimenDataset
from bioscan.learn.loader import Loader, default_workers
from bioscan.learn.model_folder import Model
from bioscan.learn.training import autocast, choose_precision
from bioscan.vocabulary import RANKS


def predict_batches(
    model: Model,
    images: Images,
    specimens: pl.DataFrame,
    *,
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
        batch_size: Specimens at a time.
        workers: Loader processes; None: by the number of cores.
        amp: As in the training settings.

    Yields:
        A table as `data.predictions` has it, and the leaf probabilities, shape N × L, NaN where there is no
        image.
    """
    device = next(model.network.parameters()).device
    precision = choose_precision(amp, device)
    naming = Naming.of(model.taxonomy)
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
            probabilities = np.full((rows.height, model.taxonomy.num_leaves), np.nan, np.float32)
            if batch.size:
                with torch.inference_mode(), autocast(device, precision):
                    logits_BL = model.network(
                        to_network(batch.images_BCHW, model.spec, device, channels_last=False)
                    )
                made = torch.softmax(logits_BL.cpu().double(), dim=1).float().numpy()
                probabilities[batch.numbers_B.numpy() - start] = made
            reasons = dict(batch.failures)
            errors = [reasons.get(start + place) for place in range(rows.height)]
            yield naming.table(rows, probabilities, errors), probabilities


@dataclass(frozen=True)
class _AtRank:
    """How the leaves make up the taxa of one rank."""

    names_L: list[str | None]
    """Name at the rank of each leaf's lineage."""
    taxon_L: NDArray[np.int64]
    """Its taxon's number, 0 to G - 1."""
    order_L: NDArray[np.int64]
    """Leaves by taxon."""
    starts_G: NDArray[np.int64]
    """Where each taxon begins in `order_L`."""


@dataclass(frozen=True)
class Naming:
    """From leaf probabilities to names: those of the best leaf's lineage, each with the sum over its taxon's
    leaves, so that the names of a specimen never contradict each other.
    """

    ranks: dict[str, _AtRank]
    """Ranks at which some leaf's lineage has a name."""
    leaf_ranks: list[str]
    leaf_names: list[str | None]

    @classmethod
    def of(cls, taxonomy: Taxonomy) -> "Naming":
        """Prepared once for a taxonomy."""
        paths = taxonomy.leaf_paths
        ranks = {}
        for level, rank in enumerate(RANKS):
            prefixes = [p[: level + 1] if len(p) > level and p[level] is not None else None for p in paths]
            if not any(prefixes):
                continue
            numbers = {prefix: number for number, prefix in enumerate(dict.fromkeys(prefixes))}
            taxon_L = np.array([numbers[prefix] for prefix in prefixes])
            order_L = np.argsort(taxon_L, kind="stable")
            starts_G = np.searchsorted(taxon_L[order_L], np.arange(len(numbers)))
            names = [None if prefix is None else prefix[-1] for prefix in prefixes]
            ranks[rank] = _AtRank(names, taxon_L, order_L, starts_G)
        return cls(ranks, [RANKS[len(path) - 1] for path in paths], [path[-1] for path in paths])

    def table(
        self, specimens: pl.DataFrame, probabilities_NL: NDArray[np.float32], errors_N: Sequence[str | None]
    ) -> pl.DataFrame:
        """A predictions table; the assigned taxon is the best leaf, rows of NaN have no names.

        Args:
            specimens: Columns `sampleid`, `image_file`.
            probabilities_NL: Of the leaves.
            errors_N: Why there is no prediction.
        """
        known = ~np.isnan(probabilities_NL[:, 0])
        filled = np.where(known[:, None], probabilities_NL, 0).astype(np.float64)
        best = filled.argmax(axis=1)
        rows = np.arange(best.size)
        columns: dict[str, Any] = {name: specimens[name] for name in ("sampleid", "image_file")}
        for rank, at in self.ranks.items():
            sums_NG = np.add.reduceat(filled[:, at.order_L], at.starts_G, axis=1)
            columns[rank] = _texts(at.names_L, best, known)
            columns[f"{rank}_probability"] = _floats(sums_NG[rows, at.taxon_L[best]], columns[rank])
        columns["assigned_rank"] = _texts(self.leaf_ranks, best, known)
        columns["assigned_taxon"] = _texts(self.leaf_names, best, known)
        columns["assigned_probability"] = _floats(filled[rows, best], columns["assigned_taxon"])
        columns["error"] = pl.Series(errors_N, dtype=pl.String)
        return pl.DataFrame(columns)


def _texts(names_L: Sequence[str | None], best_N: NDArray[np.int64], known_N: NDArray[np.bool_]) -> pl.Series:
    """The name of each specimen's best leaf, null where there is no picture."""
    return pl.Series(names_L, dtype=pl.String).gather(pl.Series(best_N).set(pl.Series(~known_N), None))


def _floats(values_N: NDArray[np.float64], names_N: pl.Series) -> pl.Series:
    """Probabilities, null where there is no name; a sum of rounded floats may pass 1."""
    return pl.Series(np.minimum(values_N, 1.0)).set(names_N.is_null(), None)
