"""A trained model's head made fair to rare taxa: the backbone stays as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import nn

from bioscan.analysis.taxonomy import Taxonomy
from bioscan.config import record as record_of
from bioscan.data.images import Images
from bioscan.data.metadata import fingerprint
from bioscan.errors import DataError, RequestError, unknown
from bioscan.files import refuse_existing
from bioscan.jobs.adapt import save_with_head
from bioscan.learn import model_folder
from bioscan.learn.adaptation import retrain, tau_normalised
from bioscan.learn.device import choose_device
from bioscan.learn.embeddings import Backbone, backbone_sha256, gather
from bioscan.learn.heads import head_of
from bioscan.learn.specimens import select

METHODS: Final = ("crt", "tau_norm")
TAUS: Final = tuple(round(0.05 * step, 2) for step in range(21))
"""Of tau-norm: 0 (the weights as they are) to 1 (all of one length)."""
Features = NDArray[np.float16] | NDArray[np.float32]
_KEPT: Final = ("experiment", "within", "split_hash", "licences", "left_out", "settings")
"""What model.json tells of the first training, and still holds."""


def rebalance(
    model: Path | str,
    catalogue: Path | str,
    images: Path | str | Images,
    output: Path | str,
    *,
    method: str = "crt",
    tau: float | None = None,
    epochs: int = 10,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    seed: int = 1,
    batch_size: int = 64,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Fit a model's head anew on its frozen features, on the specimens that it was trained on.

    `crt`: trained again with class-balanced sampling. `tau_norm`: each taxon's weights divided by their norm
    to the power of tau, without biases. See `learn.adaptation`.

    Args:
        model: Model folder, or the run folder that holds it.
        catalogue: The one that the model was trained on.
        images: Package of its images.
        output: New model folder.
        method: One of METHODS.
        tau: Of tau_norm; None: the least of those with the best macro top-1 on the validation specimens.
        epochs: Of crt.
        lr: Highest learning rate of crt.
        weight_decay: Of crt.
        seed: Of crt's draws.
        batch_size: Photographs at a time.
        device: auto, cpu, cuda or mps.
        threads: torch threads; None: as torch has it.
        overwrite: Replace the output.
        progress: Called as `progress(done, total)`, photographs.

    Returns:
        `model` (folder), `method`, `tau` (of tau_norm), `training`, `validation` (specimens), `before` and
        `after` (`micro_top_1`, `macro_top_1` at the lowest rank, on the validation specimens; None without
        any), `failed` (count), `failures` (name, part, place, reason).

    Raises:
        RequestError: an unknown name; a model whose head is not linear; no validation specimens to choose
            tau by.
        DataError: another catalogue than the model's.
    """
    output = Path(output)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if tau is not None and method != "tau_norm":
        raise RequestError("tau goes with method tau_norm")
    if tau is not None and tau < 0:
        raise RequestError(f"tau is {tau}; it must be at least 0")
    for name, value in (("batch_size", batch_size), ("threads", threads), ("epochs", epochs)):
        if value is not None and value < 1:
            raise RequestError(f"{name} is {value}; it must be at least 1")
    refuse_existing(output, overwrite=overwrite or (output.is_dir() and not any(output.iterdir())))
    if threads:
        torch.set_num_threads(threads)
    loaded = model_folder.load(model, device=choose_device(device))
    old = head_of(loaded.network)
    if not isinstance(old, nn.Linear) or loaded.softmax != "flat":
        raise RequestError(f"{model}: its head is not linear, or its softmax not flat; train it anew instead")
    experiment = loaded.info.get("experiment")
    if not experiment:
        raise RequestError(f"{model} was not trained on an experiment of a catalogue; bioscan adapt balances")
    package = images if isinstance(images, Images) else Images(images)
    chosen = select(
        catalogue,
        package,
        experiment=experiment,
        ranks=loaded.taxonomy.ranks,
        within=loaded.info.get("within"),
    )
    if chosen.taxonomy.paths != loaded.taxonomy.paths:
        absent = chosen.not_in_package.filter(pl.col("role") == "train").height
        without = f" ({absent:,} of them are not in {package.path})" if absent else ""
        raise DataError(
            f"{catalogue}: its training specimens{without} have other taxa, or in another order, than "
            f"{model} was trained on"
        )
    backbone = Backbone(
        loaded.network,
        str(loaded.info["backbone"]),
        loaded.spec,
        backbone_sha256(loaded.network),
        loaded.fingerprint,
    )
    wanted = {"train", "validation"} if method == "crt" else {"validation"}
    table = chosen.table.filter(pl.col("role").is_in(wanted))
    features_NF, failures = gather(
        backbone, package, table["row"].to_numpy(), batch_size=batch_size, half=True, progress=progress
    )
    readable = ~np.isnan(features_NF).any(axis=1)
    table, features_NF = table.filter(pl.Series(readable)), features_NF[readable]
    nodes_N = table["node"].to_numpy()
    trained = (table["role"] == "train").to_numpy()
    valid_VF, valid_V = features_NF[~trained], nodes_N[~trained]
    taxonomy = loaded.taxonomy
    old = old.cpu()
    if method == "crt":
        if not trained.any():
            raise RequestError("none of the training photographs can be read")
        torch.manual_seed(seed)
        made = retrain(
            features_NF[trained],
            nodes_N[trained],
            taxonomy,
            epochs=epochs,
            lr=lr,
            weight_decay=weight_decay,
            seed=seed,
        )
    else:
        if tau is None:
            if not valid_V.size:
                raise RequestError(
                    f"{experiment} has no validation specimens to choose tau by; pass --tau, as 1"
                )
            macros = [_scores(tau_normalised(old, t), valid_VF, valid_V, taxonomy)[1] for t in TAUS]
            tau = TAUS[int(np.argmax(macros))]
        made = tau_normalised(old, tau)
    before, after = (_named(_scores(head, valid_VF, valid_V, taxonomy)) for head in (old, made))
    crt = {"epochs": epochs, "lr": lr, "weight_decay": weight_decay, "seed": seed}
    save_with_head(
        output,
        backbone,
        {"kind": "linear"},
        made,
        taxonomy=taxonomy,
        record={
            **record_of(
                data_fingerprint=fingerprint(catalogue),
                images=package.path.name,
                rebalanced={
                    "method": method,
                    "model_sha256": loaded.fingerprint,
                    **(crt if method == "crt" else {"tau": tau}),
                },
                validation=after,
            ),
            **{name: loaded.info[name] for name in _KEPT if name in loaded.info},
        },
        target_counts=loaded.target_counts_N,
        overwrite=overwrite,
    )
    return {
        "model": str(output),
        "method": method,
        "tau": tau,
        "training": int(trained.sum()),
        "validation": int(valid_V.size),
        "before": before,
        "after": after,
        "failed": len(failures),
        "failures": failures,
    }


def _scores(
    head: nn.Linear, features_VF: Features, nodes_V: NDArray[np.int64], taxonomy: Taxonomy
) -> tuple[float, float]:
    """Micro and macro top-1 among the leaf taxa, over specimens known to a leaf; NaN without any."""
    leaf_V = np.isin(nodes_V, taxonomy.leaves_L)
    if not leaf_V.any():
        return float("nan"), float("nan")
    truth = taxonomy.first_leaf_N[nodes_V[leaf_V]]
    with torch.inference_mode():
        named = head(torch.from_numpy(features_VF[leaf_V]).float()).argmax(dim=1).numpy()
    support = np.bincount(truth, minlength=taxonomy.num_leaves)
    right = np.bincount(truth[named == truth], minlength=taxonomy.num_leaves)
    some = support > 0
    return float(right.sum() / support.sum()), float((right[some] / support[some]).mean())


def _named(scores: tuple[float, float]) -> dict[str, float | None]:
    return {
        name: None if np.isnan(value) else value
        for name, value in zip(("micro_top_1", "macro_top_1"), scores, strict=True)
    }
