"""A model folder: everything needed to use a trained model, and nothing else. Loading runs no code from
it.

N: nodes of the taxonomy, L: its leaf taxa.
"""

import csv
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from bioscan.analysis.hierarchy import leaf_prior
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import DataError, RequestError, unknown
from bioscan.files import sha256, writing_folder
from bioscan.learn import calibration as calibrations
from bioscan.learn import models
from bioscan.learn.calibration import Calibration
from bioscan.learn.dataset import ImageSpec
from bioscan.learn.losses import Softmax, leaf_logits, outputs_of
from bioscan.learn.sampling import Sampler, expected_counts
from bioscan.vocabulary import RANKS

SCHEMA_VERSION = 2
"""1: one softmax over the leaves of a tree without placeholders, a linear head."""


@dataclass(frozen=True)
class Model:
    """A network with what is needed to use it."""

    network: nn.Module
    taxonomy: Taxonomy
    spec: ImageSpec
    info: dict[str, Any]
    """The whole of model.json."""
    fingerprint: str
    """SHA-256 of what model.json says, the hash of the weights among it."""
    softmax: Softmax
    """`flat`: the network gives leaf logits; `conditional`: logits of each node among its siblings."""
    target_counts_N: NDArray[np.int64]
    """Training specimens whose deepest known taxon is the node."""
    calibration: Calibration | None = None
    """What its probabilities are worth, where that was measured."""

    @cached_property
    def log_prior_L(self) -> NDArray[np.float64]:
        """Log of the share of each leaf taxon in what the head was trained on (`hierarchy.leaf_prior`).

        That is not their share of the training specimens where a sampler showed rare taxa more often.
        """
        sampler: Sampler = self.trained_with("sampler") or "uniform"
        if (self.info.get("rebalanced") or {}).get("method") == "crt":
            sampler = "class_balanced"  # the head alone was trained anew, by that
        threshold = self.trained_with("repeat_threshold") or 0.0
        seen_N = expected_counts(sampler, self.target_counts_N, repeat_threshold=threshold)
        return np.log(leaf_prior(self.taxonomy, seen_N))

    @cached_property
    def leaf_logits(self) -> nn.Module:
        """What turns the network's outputs into leaf logits; on the CPU until it is moved."""
        return leaf_logits(self.taxonomy, self.softmax)

    def trained_with(self, name: str) -> Any:
        """A setting of the training, such as `loss`; None where model.json does not tell."""
        return _setting(self.info, name)


def save(
    folder: Path,
    state: Mapping[str, Tensor],
    *,
    backbone: str,
    taxonomy: Taxonomy,
    spec: ImageSpec,
    record: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    softmax: Softmax = "flat",
    head: Mapping[str, Any] | None = None,
    target_counts: ArrayLike | None = None,
    calibration: Calibration | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model folder, whole or not at all.

    Args:
        folder: model.safetensors, model.json, history.csv and README.md go here.
        state: The network's state dict.
        backbone: timm name.
        taxonomy: Its leaves are the network's outputs; with a conditional softmax its nodes but the root are,
            by parent.
        spec: Input image.
        record: The run: settings, versions, data fingerprint, split hash, experiment, licences, validation.
        history: One row per epoch.
        softmax: `flat` or `conditional`.
        head: What `heads.replace_head` makes the network's head from; None: a linear one.
        target_counts: Per node of the taxonomy the specimens trained on whose deepest known taxon it is;
            None: those that the taxonomy was built from.
        calibration: What its probabilities are worth.
        overwrite: Replace a folder.
    """
    if softmax not in get_args(Softmax):
        raise unknown("softmax", softmax, get_args(Softmax))
    counts_N = _own_counts(taxonomy) if target_counts is None else np.asarray(target_counts, np.int64)
    if counts_N.shape != (taxonomy.num_nodes,):
        raise ValueError(f"{taxonomy.num_nodes} target counts expected, one per node")
    with writing_folder(folder, overwrite=overwrite, mark="model.json") as partial:
        write_state(partial / "model.safetensors", state)
        info = {
            "schema_version": SCHEMA_VERSION,
            "backbone": backbone,
            "num_leaves": taxonomy.num_leaves,
            "image": dataclasses.asdict(spec),
            "weights_sha256": sha256(partial / "model.safetensors"),
            **record,
            "ranks": list(taxonomy.ranks),
            "rank": taxonomy.ranks[-1],
            "softmax": softmax,
            "head": None if head is None else dict(head),
            "target_counts": counts_N.tolist(),
            "taxonomy": taxonomy.to_dict(),
            "calibration": None if calibration is None else calibration.write(partial),
        }
        write_history(partial / "history.csv", history)
        _tell(partial, info, taxonomy)


def recalibrated(
    folder: Path | str, target: Path, calibration: Calibration, *, overwrite: bool = False
) -> None:
    """A model folder with another calibration and all else as it is; `target` may be the folder itself.

    Raises:
        RequestError: as `files.writing_folder`.
    """
    folder = place_of(folder)
    info = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    with writing_folder(target, overwrite=overwrite, mark="model.json") as partial:
        for path in folder.iterdir():
            if path.is_file() and path.name not in (calibrations.RECORDS, calibrations.RELIABILITY):
                shutil.copyfile(path, partial / path.name)
        info["calibration"] = calibration.write(partial)
        _tell(partial, info, Taxonomy.from_dict(info["taxonomy"]))


def _tell(folder: Path, info: dict[str, Any], taxonomy: Taxonomy) -> None:
    """Write model.json and the model card."""
    info["content_sha256"] = content_sha256(info)
    (folder / "model.json").write_text(json.dumps(info, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "README.md").write_text(_card(info, taxonomy), encoding="utf-8")


def load(folder: Path | str, *, device: str | torch.device = "cpu") -> Model:
    """A model from its folder, in evaluation mode.

    Raises:
        RequestError: no such folder, or not a model folder.
        DataError: a file that is broken, altered or of a newer schema.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as load_bytes

    folder = place_of(folder)
    for name in ("model.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise RequestError(
                f"{folder}: no model folder, {name} is missing (bioscan train writes it to RUN/model)"
            )
    try:
        info = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        if info["schema_version"] > SCHEMA_VERSION:
            raise DataError(
                f"{folder}: written by a newer bioscan (schema {info['schema_version']}); update bioscan"
            )
        if info["content_sha256"] != content_sha256(info):
            raise DataError(f"{folder / 'model.json'}: was altered after training (its SHA-256 differs)")
        taxonomy = Taxonomy.from_dict(info["taxonomy"])
        image = info["image"]
        spec = ImageSpec(
            image_size=int(image["image_size"]),
            crop_size=int(image["crop_size"]),
            mean=tuple(map(float, image["mean"])),
            std=tuple(map(float, image["std"])),
        )
        backbone, softmax, head = info["backbone"], info.get("softmax", "flat"), info.get("head")
        if softmax not in get_args(Softmax) or not isinstance(head, dict | None):
            raise ValueError(f"softmax {softmax!r} with head {head!r}")
        counts_N = np.array(info.get("target_counts", _own_counts(taxonomy)), np.int64)
        if counts_N.shape != (taxonomy.num_nodes,):
            raise ValueError(f"{taxonomy.num_nodes} target counts expected, one per node")
        calibration = calibrations.read(folder, info.get("calibration"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{folder / 'model.json'}: cannot be read ({error})") from None
    weights = (folder / "model.safetensors").read_bytes()
    if hashlib.sha256(weights).hexdigest() != info.get("weights_sha256"):
        raise DataError(
            f"{folder / 'model.safetensors'}: not the weights that model.json names (SHA-256 differs)"
        )
    try:
        state = load_bytes(weights)
    except SafetensorError as error:
        raise DataError(f"{folder / 'model.safetensors'}: cannot be read ({error})") from None
    return assembled(
        state,
        folder=folder,
        backbone=backbone,
        taxonomy=taxonomy,
        spec=spec,
        info=info,
        softmax=softmax,
        head=head,
        target_counts_N=counts_N,
        calibration=calibration,
        device=device,
    )


def assembled(
    state: Mapping[str, Tensor],
    *,
    folder: Path,
    backbone: str,
    taxonomy: Taxonomy,
    spec: ImageSpec,
    info: dict[str, Any],
    softmax: Softmax,
    head: Mapping[str, Any] | None,
    target_counts_N: NDArray[np.int64],
    calibration: Calibration | None = None,
    device: str | torch.device = "cpu",
) -> Model:
    """A model from its parts, in evaluation mode; those of `save`, and where they lie or will lie.

    Raises:
        DataError: the weights do not fit.
    """
    outputs = outputs_of(taxonomy, softmax)
    network = models.create(backbone, outputs=outputs, crop_size=spec.crop_size, head=head)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(
            f"{folder}: the weights do not fit {backbone} ({str(error).splitlines()[0]})"
        ) from None
    network = network.to(device).eval()
    fingerprint = info.get("content_sha256", "")
    return Model(network, taxonomy, spec, info, fingerprint, softmax, target_counts_N, calibration)


def place_of(folder: Path | str) -> Path:
    """The folder of the model itself where a run folder is named."""
    folder = Path(folder)
    return folder / "model" if (folder / "model" / "model.json").is_file() else folder


def _own_counts(taxonomy: Taxonomy) -> NDArray[np.int64]:
    """Per node the records of the taxonomy that are known to it and no deeper, shape N."""
    own_N = taxonomy.counts_N.copy()
    np.subtract.at(own_N, taxonomy.parent_N[1:], taxonomy.counts_N[1:])
    return own_N


def content_sha256(info: Mapping[str, Any]) -> str:
    """SHA-256 of what a model.json says, itself left out."""
    content = {key: value for key, value in info.items() if key != "content_sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """A state dict as safetensors, with the permissions that files have here (its own writer: owner only)."""
    from safetensors.torch import save as to_bytes

    path.write_bytes(to_bytes({name: value.detach().contiguous().cpu() for name, value in state.items()}))


def write_history(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """One CSV line per epoch."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if history:
            writer = csv.DictWriter(file, fieldnames=list(history[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(history)


def _card(info: Mapping[str, Any], taxonomy: Taxonomy) -> str:
    leaves = taxonomy.leaves_L
    several = len(taxonomy.ranks) > 1
    within = f" within {info['within']}" if info.get("within") else ""
    ranks = f"ranks {', '.join(taxonomy.ranks)}" if several else f"rank {taxonomy.ranks[0]}"
    origin = f" on the training part of `{info['experiment']}`" if info.get("experiment") else ""
    validation = info.get("validation") or {}
    scores = "\n".join(f"- {name}: {value:.4f}" for name, value in validation.items() if value is not None)
    facts = {"Metadata SHA-256": "data_fingerprint", "Split hash": "split_hash"}
    hashes = "".join(f"{name}: `{info[key]}`.\n" for name, key in facts.items() if info.get(key))
    licences = "; ".join(info.get("licences") or []) or "none stated in the metadata"
    version = info.get("versions", {}).get("bioscan", "")
    return f"""# {info["backbone"]}: {leaves.size:,} taxa at {ranks}{within}

{_method(info)}

Trained{origin} ({taxonomy.counts_N[0]:,} specimens); made by bioscan {version}.
Names are never indices: `model.json` holds the taxonomy, the image specification and the run's settings.

## Intended use

Naming photographs of single specimens taken like the training images. It gives one of the taxa below to any
picture, also to what is none of them.

## Validation scores

{scores or "none: there were no validation specimens"}

## Confidence

{_confidence(info.get("calibration"))}

## Training specimens

{_ranks_table(info, taxonomy) if several else ""}{_taxa_table(taxonomy)}

## Data and licence

{hashes}Licences of the images as the metadata states them: {licences}.
"""


def _confidence(told: Mapping[str, Any] | None) -> str:
    """What a model.json says of the calibration, in words."""
    if told is None:
        return (
            "Not calibrated: probabilities are as the network gives them. `bioscan calibrate` changes that."
        )
    second = told["second"]
    kept = (
        f"{second['n']:,} others were kept for thresholds and prediction sets (`calibration.parquet`), and "
        "for how reliable each taxon's name was (`reliability.parquet`)"
        if told["files"]
        else "none were kept for thresholds and prediction sets"
    )
    rows = [
        f"| {rank} | {row['n']:,} | {_number(row['nll_after'])} | {_number(row['ece_after'])} |"
        for rank, row in told["ranks"].items()
    ]
    notes = "".join(f"\n- {warning}" for warning in told["warnings"])
    header = "| rank | specimens | NLL | ECE |\n| --- | --- | --- | --- |\n"
    return (
        f"Temperature {told['temperature']:.4g} for tau {told['tau']:g} and decoding {told['decode']}, from "
        f"{told['fit']['n']:,} labelled specimens; {kept}. What is promised holds for specimens like these."
        "\n\n"
        f"{header}" + "\n".join(rows) + ("\n" + notes if notes else "")
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _method(info: Mapping[str, Any]) -> str:
    """How leaf probabilities are made and what they were trained by, in a paragraph."""
    loss, tau = _setting(info, "loss"), _setting(info, "tau")
    softmax = {
        "flat": "One softmax over all leaf taxa; a higher taxon's probability is the sum over its leaves.",
        "conditional": "A softmax among the children of each taxon; a taxon's probability is the product "
        "down its path.",
    }[info["softmax"]]
    head = f" Head: {info['head'].get('kind')}." if info["head"] else ""
    adjusted = f" with tau {tau:g}" if loss == "logit_adjusted" and tau is not None else ""
    return softmax + head + (f" Loss: {loss}{adjusted}." if loss else "")


def _setting(info: Mapping[str, Any], name: str) -> Any:
    """What a model.json says of a setting, at its top or in the settings of the training."""
    return info.get(name, (info.get("settings") or {}).get(name))


def _ranks_table(info: Mapping[str, Any], taxonomy: Taxonomy) -> str:
    """What of the training is known at each rank, and how much no deeper."""
    own_N = np.array(info["target_counts"])
    rows = []
    for rank in taxonomy.ranks:
        nodes = (taxonomy.rank_N == RANKS.index(rank)) & taxonomy.predictable_N
        named, no_deeper = taxonomy.counts_N[nodes].sum(), own_N[nodes].sum()
        rows.append(f"| {rank} | {nodes.sum():,} | {named:,} | {no_deeper:,} |")
    header = "| rank | taxa | named at it | and no deeper |\n| --- | --- | --- | --- |\n"
    return header + "\n".join(rows) + "\n\n"


def _taxa_table(taxonomy: Taxonomy) -> str:
    leaves = taxonomy.leaves_L
    counts = taxonomy.counts_N[leaves]
    rows = "\n".join(
        f"| {taxonomy.name(int(node))} | {count:,} |"
        for node, count in sorted(zip(leaves, counts, strict=True), key=lambda item: -item[1])[:50]
    )
    more = f"\n\n… and {leaves.size - 50:,} more." if leaves.size > 50 else ""
    return f"| taxon | specimens |\n| --- | --- |\n{rows}{more}"
