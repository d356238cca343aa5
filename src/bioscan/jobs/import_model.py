"""From a checkpoint of the paper's program, or of another, to a model folder."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl

from bioscan.analysis.published import PER_CLASS
from bioscan.analysis.splits import class_sizes
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.config import record
from bioscan.data.metadata import fingerprint, read_metadata, scan_metadata
from bioscan.errors import DataError, RequestError, unknown
from bioscan.files import refuse_existing, sha256
from bioscan.learn import model_folder, models, weights
from bioscan.learn.dataset import ImageSpec
from bioscan.learn.model_names import MODEL_NAMES, resolve
from bioscan.vocabulary import EXPERIMENTS, RANKS

PUBLISHED: Final = "published"
_TABLES: Final = (".parquet", ".tsv", ".csv", ".jsonld")
_LOSSES: Final = {"CE": "cross_entropy", "Focal": "focal"}
_NAME: Final = re.compile(
    rf"(?P<experiment>{'|'.join(EXPERIMENTS)})"
    rf"(?:_(?P<model>{'|'.join(sorted(MODEL_NAMES, key=len, reverse=True))}))?"
    rf"(?:_(?P<loss>{'|'.join(_LOSSES)}))?(?:_s?(?P<seed>\d+))?(?:_weights(?:_best_acc)?)?"
)
"""`large_insect_order_vit_base_patch16_224_CE_s2_weights_best_acc`; the paper's program itself writes the
experiment alone into the file's name, and the rest into its folder's."""


class _Classes(NamedTuple):
    """What the outputs of a checkpoint stand for."""

    taxonomy: Taxonomy
    """Its leaves are the outputs, in their order; counts are of training specimens, 0 where not known."""
    order: str
    """Where the order of the classes is from, for the record."""
    doubt: str | None
    """What of it is not certain."""


def import_model(
    file: Path | str,
    output: Path | str,
    *,
    classes: Path | str,
    model: str | None = None,
    experiment: str | None = None,
    rank: str | None = None,
    normalise: bool = False,
    image_size: int = 256,
    crop_size: int = 224,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make a model folder of a checkpoint with a trained head.

    Args:
        file: A torch or safetensors file; the paper's program writes `*_weights_best_acc.tar`. Reading it
            runs no code from it.
        output: Model folder.
        classes: What the outputs are, in their order: a file with one name a line, or a JSON list, or a JSON
            object of name -> number; or a catalogue with the experiment's split column, from which classes
            are numbered as the paper's program does; or `published`: the published order of a large
            experiment.
        model: timm model name, or one of the paper's program; None: by the name of the file or its folder.
        experiment: Of the paper; None: by that name, if it has one.
        rank: Of the classes; None: the experiment's.
        normalise: Its images were normalised with the backbone's mean and deviation; the paper's were not.
        image_size: Shorter side that its images were resized to, pixels.
        crop_size: Side of the square that it was trained on, pixels.
        overwrite: Replace a model folder.

    Returns:
        `model` (folder), `backbone`, `experiment`, `rank`, `classes` (names in the order of the outputs),
        `order`, `doubt` (or None), `loss`, `seed`, `filled` (entries), `unused` (names in the file that have
        no place).

    Raises:
        RequestError: a name that is not known or not given, a checkpoint of another network or number of
            classes, an order of classes that cannot be known.
        DataError: a file that cannot be read.
    """
    file, output = Path(file), Path(output)
    if not file.exists():
        raise RequestError(f"{file}: no such file")
    refuse_existing(output, overwrite=overwrite)
    told = _told_by_name(file)
    model, experiment = model or told["model"], experiment or told["experiment"]
    if experiment is not None and experiment not in EXPERIMENTS:
        raise unknown("experiment", experiment, EXPERIMENTS)
    if model is None:
        raise RequestError(f"{file.name}: the name does not tell the network; pass --model")
    if rank is None and experiment is not None:
        rank = EXPERIMENTS[experiment].rank
    if rank is None:
        raise RequestError(f"{file.name}: the name does not tell the rank of the classes; pass --rank")
    if rank not in RANKS:
        raise unknown("rank", rank, RANKS)
    known = _classes(classes, experiment, rank)
    taxonomy = known.taxonomy
    state = weights.read_state(file)
    network = models.create(model, outputs=taxonomy.num_leaves, crop_size=crop_size)
    fit = _fill(network, state, file, taxonomy.num_leaves)
    mean, std = models.normalisation(network) if normalise else ((0.0,) * 3, (1.0,) * 3)
    if experiment is not None and not normalise and resolve(model).split(".")[0] == "inception_v3":
        mean, std = _inside_inception()
    names = [taxonomy.name(int(node)) for node in taxonomy.leaves_L]
    facts = {
        "experiment": experiment,
        "within": EXPERIMENTS[experiment].within if experiment else None,
        "loss": _LOSSES.get(told["loss"] or ""),
        "seed": int(told["seed"]) if told["seed"] else None,
        "data_fingerprint": fingerprint(classes) if _is_table(classes) else None,
        "imported": {
            "file": file.name,
            "sha256": None if file.is_dir() else sha256(file),
            "class_order": known.order,
            "doubt": known.doubt,
        },
    }
    model_folder.save(
        output,
        network.state_dict(),
        backbone=model,
        taxonomy=taxonomy,
        spec=ImageSpec(image_size=image_size, crop_size=crop_size, mean=mean, std=std),
        record=record(**facts),
        history=[],
        overwrite=overwrite,
    )
    return {
        "model": str(output),
        "backbone": resolve(model),
        "experiment": experiment,
        "rank": rank,
        "classes": names,
        "order": known.order,
        "doubt": known.doubt,
        "loss": facts["loss"],
        "seed": facts["seed"],
        "filled": fit.filled,
        "unused": list(fit.unused),
    }


def _told_by_name(file: Path) -> dict[str, str | None]:
    """Experiment, model, loss and seed, by the name of a file or of its folder, whichever tells more."""
    best: dict[str, str | None] = dict.fromkeys(("experiment", "model", "loss", "seed"))
    for name in (file.name.removesuffix(file.suffix), file.absolute().parent.name):
        match = _NAME.fullmatch(name)
        if match and sum(v is not None for v in match.groups()) > sum(v is not None for v in best.values()):
            best = match.groupdict()
    return best


def _fill(network: Any, state: Mapping[str, Any], file: Path, outputs: int) -> weights.Fit:
    """Load everything, and tell a head of another size apart from another network."""
    try:
        return weights.load_state(network, state, str(file), head=True)
    except RequestError as error:
        try:
            weights.load_state(network, state, str(file))
        except RequestError:
            raise error from None
    raise RequestError(
        f"{file}: the backbone fits, but its head does not have {outputs:,} outputs, as many as classes"
    )


def _inside_inception() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that stand for what torchvision's pretrained Inception v3 does to its input.

    The paper's program made it with `pretrained=True`, which sets `transform_input`: the network itself turns
    x into (x · d + m - 0.5) / 0.5, with the m and d of ImageNet. Our network does not, so the image
    specification does: (x - (0.5 - m) / d) / (0.5 / d).
    """
    mean, deviation = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    return tuple(((0.5 - mean) / deviation).tolist()), tuple((0.5 / deviation).tolist())


# -- what the outputs are


def _classes(classes: Path | str, experiment: str | None, rank: str) -> _Classes:
    if str(classes) == PUBLISHED:
        return _published(experiment, rank)
    path = Path(classes)
    if not path.is_file():
        raise RequestError(
            f"{path}: no such file; --classes takes a list of names, a catalogue or TSV, or '{PUBLISHED}'"
        )
    if _is_table(path):
        return _by_catalogue(path, experiment, rank)
    names = _listed(path)
    _refuse_bad(names, path)
    return _Classes(_tree(names, dict.fromkeys(names, 0), experiment, rank), f"list {path.name}", None)


def _is_table(classes: Path | str) -> bool:
    return Path(classes).suffix in _TABLES


def _published(experiment: str | None, rank: str) -> _Classes:
    """The classes of a large experiment, most common first."""
    if experiment is None:
        raise RequestError(f"--classes {PUBLISHED} needs to know the experiment: pass --experiment")
    if rank != EXPERIMENTS[experiment].rank:
        raise RequestError(
            f"the published classes of {experiment} are at rank {EXPERIMENTS[experiment].rank}"
        )
    if experiment not in PER_CLASS:
        raise RequestError(
            f"the class order of {experiment} does not follow from the published counts: its big classes are "
            "cut at an equal number, and equal ones are numbered as they appear in the metadata; "
            "pass --classes METADATA.tsv"
        )
    training = {name: class_sizes(bar.images)[0] for name, bar in PER_CLASS[experiment].items()}
    tied = [name for name, count in training.items() if Counter(training.values())[count] > 1]
    doubt = None
    if tied:
        doubt = (
            f"{' and '.join(tied)} have equally many training specimens: which of them came first is not "
            "published, and they may be swapped; --classes METADATA.tsv tells"
        )
    return _Classes(_tree(list(training), training, experiment, rank), PUBLISHED, doubt)


def _by_catalogue(path: Path, experiment: str | None, rank: str) -> _Classes:
    """Classes as the paper's program numbers them: by descending count in the training part."""
    if experiment is None:
        raise RequestError(f"{path}: classes from a catalogue need an experiment: pass --experiment")
    known = scan_metadata(path).collect_schema().names()
    columns = [r for r in RANKS[: RANKS.index(rank) + 1] if r in known]
    frame = read_metadata(path, [*columns, experiment])
    training = frame.filter(pl.col(experiment) == "train")
    if training.is_empty():
        raise RequestError(f"{path}: {experiment} has no training specimens")
    return _Classes(Taxonomy.build(training, [rank]), f"training counts in {path.name}", None)


def _listed(path: Path) -> list[str]:
    """Names of a text file, one a line, or of JSON."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        content = json.loads(text)
        if isinstance(content, dict):
            if sorted(content.values()) != list(range(len(content))):
                raise DataError(f"{path}: the numbers of the classes are not 0 to {len(content) - 1}")
            content = sorted(content, key=content.__getitem__)
        if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
            raise DataError(f"{path}: a list of names, or an object of name and number, is needed")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as a list of classes ({error})") from None
    return content


def _refuse_bad(names: list[str], path: Path) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path}: the class {twice[0]} is named twice")
    if len(names) < 2:
        raise DataError(f"{path}: {len(names)} classes; at least 2 are needed")


def _tree(names: list[str], counts: Mapping[str, int], experiment: str | None, rank: str) -> Taxonomy:
    """One leaf per name, in their order, below the taxa that the experiment is restricted to."""
    above = {"phylum": "Arthropoda", "class": "Insecta"} if experiment else {}
    if experiment and EXPERIMENTS[experiment].within:
        above["order"] = str(EXPERIMENTS[experiment].within)
    above = {r: name for r, name in above.items() if RANKS.index(r) < RANKS.index(rank)}
    frame = pl.DataFrame({**{r: [name] * len(names) for r, name in above.items()}, rank: names})
    tree = Taxonomy.build(frame, [rank])
    numbers = [counts[tree.name(int(node))] for node in range(1, tree.num_nodes)]
    return dataclasses.replace(tree, counts_N=np.array([sum(numbers), *numbers], np.int64))
