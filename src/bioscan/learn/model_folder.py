"""A model folder: everything needed to use a trained model, and nothing else. Loading runs no code from
it.
"""

import csv
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import DataError, RequestError
from bioscan.files import sha256, writing_folder
from bioscan.learn import models
from bioscan.learn.dataset import ImageSpec

SCHEMA_VERSION = 1


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


def save(
    folder: Path,
    state: Mapping[str, Tensor],
    *,
    backbone: str,
    taxonomy: Taxonomy,
    spec: ImageSpec,
    record: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    overwrite: bool = False,
) -> None:
    """Write a model folder, whole or not at all.

    Args:
        folder: model.safetensors, model.json, history.csv and README.md go here.
        state: The network's state dict.
        backbone: timm name.
        taxonomy: Its leaves are the network's outputs.
        spec: Input image.
        record: The run: settings, versions, data fingerprint, split hash, experiment, rank, licences,
        validation.
        history: One row per epoch.
        overwrite: Replace a folder.
    """
    with writing_folder(folder, overwrite=overwrite, mark="model.json") as partial:
        write_state(partial / "model.safetensors", state)
        info = {
            "schema_version": SCHEMA_VERSION,
            "backbone": backbone,
            "num_leaves": taxonomy.num_leaves,
            "image": dataclasses.asdict(spec),
            "weights_sha256": sha256(partial / "model.safetensors"),
            **record,
            "taxonomy": taxonomy.to_dict(),
        }
        info["content_sha256"] = content_sha256(info)
        (partial / "model.json").write_text(json.dumps(info, indent=1, ensure_ascii=False), encoding="utf-8")
        write_history(partial / "history.csv", history)
        (partial / "README.md").write_text(_card(info, taxonomy), encoding="utf-8")


def load(folder: Path | str, *, device: str | torch.device = "cpu") -> Model:
    """A model from its folder, in evaluation mode.

    Raises:
        RequestError: no such folder, or not a model folder.
        DataError: a file that is broken, altered or of a newer schema.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as load_bytes

    folder = Path(folder)
    if (folder / "model" / "model.json").is_file():  # a run folder: its model
        folder = folder / "model"
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
        backbone = info["backbone"]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / 'model.json'}: cannot be read ({error})") from None
    weights = (folder / "model.safetensors").read_bytes()
    if hashlib.sha256(weights).hexdigest() != info.get("weights_sha256"):
        raise DataError(
            f"{folder / 'model.safetensors'}: not the weights that model.json names (SHA-256 differs)"
        )
    network = models.create(backbone, num_leaves=taxonomy.num_leaves, crop_size=spec.crop_size)
    try:
        network.load_state_dict(load_bytes(weights))
    except (RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{folder}: the weights do not fit {backbone} ({str(error).splitlines()[0]})"
        ) from None
    return Model(network.to(device).eval(), taxonomy, spec, info, info["content_sha256"])


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
    counts = taxonomy.counts_N[leaves]
    rows = "\n".join(
        f"| {taxonomy.name(int(node))} | {count:,} |"
        for node, count in sorted(zip(leaves, counts, strict=True), key=lambda item: -item[1])[:50]
    )
    more = f"\n\n… and {leaves.size - 50:,} more." if leaves.size > 50 else ""
    validation = info.get("validation") or {}
    scores = "\n".join(f"- {name}: {value:.4f}" for name, value in validation.items() if value is not None)
    within = f" within {info['within']}" if info.get("within") else ""
    licences = "; ".join(info.get("licences") or []) or "none stated in the metadata"
    return f"""# {info["backbone"]}: {leaves.size} taxa at rank {info.get("rank")}{within}

Trained by bioscan {info.get("versions", {}).get("bioscan", "")} on the training part of
`{info.get("experiment")}` ({taxonomy.counts_N[0]:,} specimens).
Names are never indices: `model.json` holds the taxonomy, the image specification and the run's settings.

## Intended use

Naming photographs of single specimens taken like the training images. It gives one of the taxa below to any
picture, also to what is none of them.

## Validation scores of the chosen epoch

{scores or "none: there were no validation specimens"}

## Training specimens

| taxon | specimens |
| --- | --- |
{rows}{more}

## Data and licence

Metadata SHA-256 `{info.get("data_fingerprint")}`; split hash `{info.get("split_hash")}`.
Licences of the images as the metadata states them: {licences}.
"""
