"""From a model and labelled specimens to its calibration.

X: specimens, B: block or batch of them, L: leaf taxa, M: outputs of the network, N: nodes of the taxonomy, G:
nodes at one rank.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from bioscan.analysis import confidence, conformal
from bioscan.analysis.backoff import indistinguishable
from bioscan.analysis.groups import LEAST, cut, too_few
from bioscan.analysis.hierarchy import decode, lineages
from bioscan.analysis.reliability import UNKNOWN, reliability
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.data.images import Images
from bioscan.errors import DataError
from bioscan.learn.calibration import Calibration
from bioscan.learn.model_folder import Model
from bioscan.learn.prediction import output_batches, probabilities, shown_logits
from bioscan.learn.promises import at_rank
from bioscan.learn.specimens import Labelled

Progress = Callable[..., None]

SEED: Final = 0
"""Of the cut: runs of one experiment with different seeds have the same parts."""
_VALUES: Final = 4_000_000
"""Outputs that are worked on at a time."""
_FEW: Final = 10
"""Specimens that got a name, or have it, below which little is known of a taxon."""
_SURE: Final = 50
"""Specimens below which a temperature says little."""
_ASKED: Final = 0.05
"""Error that the warnings are about, where records are too few for it."""


def second_part(labelled: Labelled, share: float, seed: int = SEED) -> NDArray[np.bool_]:
    """Which specimens are kept for thresholds and sets: whole groups, or none where groups are too few."""
    groups = labelled.table["group"]
    second_X = cut(groups, share, seed)
    return np.zeros(groups.len(), bool) if too_few(groups, second_X) else second_X


@dataclass(frozen=True)
class Outputs:
    """What a network says of specimens, in a temporary file: 1.7 GB for 50,000 of them and 8,355 taxa."""

    model: Model
    read_X: NDArray[np.int64]
    """Numbers of the specimens that could be read, ascending; a row of the file for each."""
    failures: dict[int, str]
    """Number of a specimen -> why it could not be read."""
    outputs_XM: NDArray[np.float32]

    def logits(self, rows: NDArray[np.int64], tau: float) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of some rows of the file: which of these, and their leaf logits at tau, in float64."""
        step = max(1, _VALUES // self.outputs_XM.shape[1])
        for start in range(0, rows.size, step):
            block = slice(start, start + step)
            outputs_BM = torch.from_numpy(self.outputs_XM[rows[block]])
            yield block, shown_logits(self.model, outputs_BM, tau=tau)


@contextlib.contextmanager
def outputs_of(
    model: Model,
    images: Images,
    rows_X: NDArray[np.int64],
    *,
    batch_size: int = 64,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Outputs]:
    """The outputs of a network, as `bioscan predict` would have them, while the block lasts.

    Args:
        model: On its device.
        images: The package.
        rows_X: Row of each specimen's image in it.
        batch_size: Images at a time.
        workers: Loader processes; None: by the number of cores.
        progress: Called as `progress(done, total)`.
    """
    read: list[NDArray[np.int64]] = []
    failures: dict[int, str] = {}
    width = 0
    with tempfile.TemporaryFile() as file:
        made = output_batches(model, images, rows_X, batch_size=batch_size, workers=workers)
        for number, (batch, outputs_BM) in enumerate(made, 1):
            failures.update(batch.failures)
            if outputs_BM is not None:
                values_BM = outputs_BM.float().cpu().numpy()
                finite_B = np.isfinite(values_BM).all(axis=1)
                numbers_B = batch.numbers_B.numpy()
                failures |= dict.fromkeys(
                    numbers_B[~finite_B].tolist(), "the network's outputs are no numbers"
                )
                values_BM[finite_B].tofile(file)
                read.append(numbers_B[finite_B])
                width = values_BM.shape[1]
            if progress:
                progress(min(number * batch_size, rows_X.size), int(rows_X.size))
        file.flush()
        read_X = np.concatenate(read) if read else np.zeros(0, np.int64)
        outputs_XM: NDArray[np.float32] = np.zeros((0, max(1, width)), np.float32)
        if read_X.size:
            outputs_XM = np.memmap(file, np.float32, "r", shape=(read_X.size, width))
        yield Outputs(model, read_X, failures, outputs_XM)


def calibrate(
    outputs: Outputs,
    labelled: Labelled,
    second_X: NDArray[np.bool_],
    *,
    tau: float = 0.0,
    rule: str = "leaf",
    per_rank: bool = False,
    info: Mapping[str, Any] | None = None,
) -> Calibration:
    """The temperature from the first part of the specimens, the rest from the second.

    Args:
        outputs: Of the model, for the rows of `labelled.table`.
        labelled: The specimens.
        second_X: Which of them are of the second part; see `second_part`.
        tau: Strength of the logit adjustment that the probabilities are shown with.
        rule: From probabilities to one answer: one of `hierarchy.DECODINGS`.
        per_rank: Give each rank a temperature of its own besides.
        info: What else is to be told of it; its `warnings` come first.

    Raises:
        DataError: no specimen of the first part can be read and has a taxon of the model.
    """
    model = outputs.model
    taxonomy = model.taxonomy
    table = labelled.table[outputs.read_X]
    second_X = second_X[outputs.read_X]
    nodes_X = table["node"].to_numpy()
    first = np.flatnonzero(~second_X)

    def batches() -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        for block, logits_BL in outputs.logits(first, tau):
            yield logits_BL.numpy(), nodes_X[first[block]]

    if not (nodes_X[first] > 0).any():
        raise DataError(
            f"none of the {first.size:,} specimens for the temperature has a taxon that the model knows"
        )
    fit = _sensible(confidence.fit_temperature(batches, taxonomy))
    ranks = None
    if per_rank:
        fitted = confidence.fit_rank_temperatures(batches, taxonomy, temperature=fit.value)
        ranks = {rank: _sensible(one).value for rank, one in fitted.items()}
    measured = np.flatnonzero(second_X) if second_X.any() else first
    truths = table[measured]
    before = records_of(outputs, measured, truths, tau=tau, rule=rule)
    after = records_of(outputs, measured, truths, tau=tau, rule=rule, temperature=fit.value, ranks=ranks)
    kept = second_X.any()
    table_of_taxa = reliability_of(taxonomy, model.target_counts_N, after) if kept else None
    told = dict(info or {})
    warnings = [
        *told.pop("warnings", ()),
        *_warnings(model, labelled, fit, after, table_of_taxa, told.get("share")),
    ]
    return Calibration(
        temperature=fit.value,
        rank_temperatures=ranks,
        tau=tau,
        decode=rule,
        info={
            **told,
            "group": labelled.group,
            "first": _size(table.filter(~pl.Series(second_X))),
            "second": _size(table.filter(pl.Series(second_X))),
            "fit": {
                "n": fit.n,
                "nll_before": fit.nll_before,
                "nll_after": fit.nll_after,
                "at_bound": fit.at_bound,
            },
            "measured_on": "second" if kept else "first",
            "ranks": {rank: _measured(before, after, rank) for rank in taxonomy.ranks},
            "warnings": warnings,
        },
        records=after if kept else None,
        reliability=table_of_taxa,
    )


def _sensible(fit: confidence.Temperature) -> confidence.Temperature:
    """The fit; 1 where all answers are right, as the surer the likelier then, without end."""
    if fit.at_bound and fit.value < 1:
        return replace(fit, value=1.0, nll_after=fit.nll_before)
    return fit


def records_of(
    outputs: Outputs,
    rows: NDArray[np.int64],
    truths: pl.DataFrame,
    *,
    tau: float,
    rule: str,
    temperature: float = 1.0,
    ranks: Mapping[str, float] | None = None,
) -> pl.DataFrame:
    """Calibration records of some rows of the outputs; see `Calibration.records`.

    Args:
        outputs: Of a model.
        rows: Of its file.
        truths: Columns `group` and `<rank>_true` of these rows.
        tau: Strength of the logit adjustment.
        rule: One of `hierarchy.DECODINGS`.
        temperature: Of the leaf logits.
        ranks: Temperatures of the ranks; None: probabilities add up along the tree.
    """
    taxonomy = outputs.model.taxonomy
    blocks = []
    for block, logits_BL in outputs.logits(rows, tau):
        # as bioscan predict has them: rounded to float32, then added up in float64
        probabilities_BL = probabilities(logits_BL, temperature=temperature).astype(np.float64)
        named_RB = lineages(taxonomy, decode(taxonomy, probabilities_BL, rule))
        columns: dict[str, Any] = {"group": truths["group"][block]}
        shown = []
        for rank, named_B in zip(taxonomy.ranks, named_RB, strict=True):
            sums_BG, nodes_G = at_rank(taxonomy, probabilities_BL, rank, (ranks or {}).get(rank, 1.0))
            place_B = np.searchsorted(nodes_G, np.maximum(named_B, nodes_G[0]))
            found_B = sums_BG[np.arange(len(sums_BG)), place_B]
            shown.append(np.where(named_B >= 0, np.minimum(found_B, 1.0), np.nan))
            true = truths[f"{rank}_true"][block]
            true_B = true.fill_null(UNKNOWN).to_numpy()
            known_B = true_B >= 0
            targets_B = np.where(known_B, np.searchsorted(nodes_G, np.where(known_B, true_B, nodes_G[0])), -1)
            truth = conformal.truth_of(sums_BG, targets_B)
            columns |= {
                f"{rank}_true": true,
                f"{rank}_named": pl.Series(named_B, dtype=pl.Int32).set(pl.Series(named_B < 0), None),
                f"{rank}_probability": pl.Series(shown[-1]),
                f"{rank}_truth_probability": pl.Series(truth.probability_N).set(true.is_null(), None),
                f"{rank}_before": pl.Series(truth.before_N).set(true.is_null(), None),
                f"{rank}_place": pl.Series(truth.place_N).set(true.is_null(), None),
            }
        if ranks is not None:
            least_BR = confidence.running_minimum(np.column_stack(shown))
            columns |= {
                f"{rank}_probability": pl.Series(least_B)
                for rank, least_B in zip(taxonomy.ranks, least_BR.T, strict=True)
            }
        blocks.append(pl.DataFrame(columns))
    made = pl.concat(blocks)
    return made.with_columns(pl.col(f"{rank}_probability").fill_nan(None) for rank in taxonomy.ranks)


def reliability_of(
    taxonomy: Taxonomy, target_counts_N: NDArray[np.int64], records: pl.DataFrame
) -> pl.DataFrame:
    """How reliable each taxon's name was among calibration records; see `Calibration.reliability`."""
    parts = []
    for rank in taxonomy.ranks:
        rows = records.filter(pl.col(f"{rank}_true").is_not_null())
        named_X = rows[f"{rank}_named"].fill_null(UNKNOWN).to_numpy()
        parts.append(reliability(taxonomy, target_counts_N, rank, rows[f"{rank}_true"].to_numpy(), named_X))
    return pl.concat(parts)


def _measured(before: pl.DataFrame, after: pl.DataFrame, rank: str) -> dict[str, Any]:
    """Of the records labelled at a rank: how many, and what their probabilities are worth.

    The likelihood is of those whose taxon the model knows; names of the others are wrong.
    """
    labelled = pl.col(f"{rank}_true").is_not_null()
    made: dict[str, Any] = {"n": after.filter(labelled).height, "known": 0}
    for when, records in (("before", before), ("after", after)):
        rows = records.filter(labelled)
        known = rows.filter(pl.col(f"{rank}_true") >= 0)
        made["known"] = known.height
        likely = np.maximum(known[f"{rank}_truth_probability"].to_numpy(), np.finfo(np.float32).tiny)
        right = (rows[f"{rank}_named"] == rows[f"{rank}_true"]).fill_null(value=False).to_numpy()
        shown = rows[f"{rank}_probability"].fill_null(float("nan")).to_numpy()
        error = confidence.calibration_error(shown, right)
        made[f"nll_{when}"] = float(-np.log(likely).mean()) if known.height else None
        made[f"ece_{when}"] = None if np.isnan(error) else error
    return made


def _size(table: pl.DataFrame) -> dict[str, int]:
    return {"n": table.height, "groups": table["group"].n_unique()}


def _warnings(
    model: Model,
    labelled: Labelled,
    fit: confidence.Temperature,
    records: pl.DataFrame,
    taxa: pl.DataFrame | None,
    share: float | None,
) -> list[str]:
    """What to know before the numbers are believed."""
    made = []
    if fit.at_bound and fit.value == 1:
        made.append(
            f"all {fit.n:,} specimens for the temperature are named right: none follows from that; it stays 1"
        )
    elif fit.at_bound:
        made.append(
            f"the temperature ended at its bound, {fit.value:g}: something else is wrong with the model, or "
            "with the names of these specimens"
        )
    if fit.n < _SURE:
        made.append(f"{fit.n:,} specimens for the temperature are few: it is chance as much as the model")
    if taxa is None:
        return [*made, _uncut(labelled, share)]
    least = conformal.least_records(_ASKED)
    few, rare, alike = [], [], []
    alike_N = indistinguishable(model.taxonomy, model.target_counts_N)
    for rank in model.taxonomy.ranks:
        if (count := records[f"{rank}_true"].drop_nulls().len()) < least:
            few.append(f"{count:,} ({rank})")
        of_rank = taxa.filter(pl.col("rank") == rank)
        if count := of_rank.filter(pl.col("support") < _FEW).height:
            rare.append(f"{count:,} of {of_rank.height:,} ({rank})")
        if count := int(alike_N[of_rank["taxon"].to_numpy()].sum()):
            alike.append(f"{count:,} of {of_rank.height:,} ({rank})")
    if few:
        made.append(f"too few specimens for an error of {_ASKED:g}, which takes {least:,}: {', '.join(few)}")
    if rare:
        made.append(
            f"taxa with fewer than {_FEW} specimens, so that little is known of each: {', '.join(rare)}"
        )
    if alike:
        made.append(
            "taxa that cannot be told from sisters that nobody named in training, so that --max-error stops "
            f"above them: {', '.join(alike)}"
        )
    return made


def _uncut(labelled: Labelled, share: float | None) -> str:
    """Why there are no records."""
    made = "nothing was kept from the temperature's fit for thresholds and prediction sets"
    if share == 0:
        return f"{made}, as asked; what is measured is of the same specimens, and a little too good"
    groups = labelled.table["group"].n_unique()
    known = {"none": "specimens", "plate": "plates", "bin": "BINs"}
    what = known.get(labelled.group, f"groups by {labelled.group}")
    return f"{made}: of {groups:,} {what} no two parts of {LEAST} or more were made"
