"""From boxes and packages of images to a detector folder."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
import torch

from bioscan.config import record as record_of
from bioscan.data.boxes import XYXY, find_pictures, pictures, read_boxes
from bioscan.data.images import Images
from bioscan.errors import DataError, RequestError
from bioscan.files import sha256, writing
from bioscan.learn import detection, detector_folder, detector_training, run_folder
from bioscan.learn.detector_images import Picture
from bioscan.learn.detector_settings import DetectorSettings
from bioscan.learn.device import choose_device, choose_precision, precision_name
from bioscan.vocabulary import part_path

_ABSENT: Final = "not in the package"


@dataclass(frozen=True)
class _Set:
    """The pictures of a file of boxes that are in a package, and the names of those that are not."""

    boxes: Path
    pictures: list[Picture]
    absent: list[str]

    @property
    def empty(self) -> int:
        return sum(not len(picture.boxes_K4) for picture in self.pictures)


def train_detector(
    sets: Sequence[tuple[Path | str, Path | str | Images]],
    output: Path | str,
    settings: DetectorSettings | None = None,
    *,
    validation: Path | str | None = None,
    validation_images: Path | str | Images | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Train a detector on pictures with known boxes; pictures without one are negatives.

    Args:
        sets: Boxes (COCO or another table that `read_boxes` takes) and the package of their pictures, in
            pairs.
        output: Run folder; the detector is in its folder `model`.
        settings: None: the default recipe.
        validation: Boxes to choose the epoch and the thresholds by. What of it is among the training pictures
            is taken out of them. None: a random share of each set.
        validation_images: Package of their pictures; None: those of the sets.
        resume: Go on with an interrupted run in `output`, with the same settings and data.
        overwrite: Throw away what is in `output`.
        progress: Called as `progress(done, total, **values)`, pictures over all epochs.

    Returns:
        `model` (folder), `architecture`, `sets` (`boxes`, `pictures`, `empty`, of the training part each),
        `validation` (pictures), `empty_validation`, `failed` pictures (`image_file`, `error`; also in
        failed.csv), `best_epoch`, `epochs`, `validation_scores` of the kept epoch with one box a picture,
        `thresholds` (`none_below`, `many_from`), `history`.

    Raises:
        RequestError: an unknown name, no picture to train on, a run in the way.
        DataError: an input that cannot be used.
    """
    settings = settings or DetectorSettings()
    output = Path(output)
    if not sets:
        raise RequestError("nothing to train on: pass a file of boxes and the package of its pictures")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    packages = [images if isinstance(images, Images) else Images(images) for _, images in sets]
    known = [_select(Path(boxes), [package]) for (boxes, _), package in zip(sets, packages, strict=True)]
    if validation is not None:
        if isinstance(validation_images, Path | str):
            validation_images = Images(validation_images)
        where = packages if validation_images is None else [validation_images]
        held_out = _select(Path(validation), where)
        taken = {(p.images.fingerprint, p.row) for p in held_out.pictures}
        parts = [[p for p in s.pictures if (p.images.fingerprint, p.row) not in taken] for s in known]
        valid = held_out.pictures
        absent = [*(name for s in known for name in s.absent), *held_out.absent]
    else:
        cuts = [_cut(s.pictures, settings) for s in known]
        parts, valid = [rest for rest, _ in cuts], [p for _, chosen in cuts for p in chosen]
        absent = [name for s in known for name in s.absent]
    if settings.boxes == "first":
        parts = [[p._replace(boxes_K4=p.boxes_K4[:1]) for p in part] for part in parts]
    _refuse_too_little(parts, valid, settings, absent)
    torch.manual_seed(settings.seed)
    network, config, spec = detector_folder.start(settings)
    record = record_of(
        settings,
        data_fingerprint=_fingerprint(parts, valid),
        sets=[
            {
                "boxes": s.boxes.name,
                "boxes_sha256": sha256(s.boxes),
                "images": package.path.name,
                "pictures": len(part),
                "empty": sum(not len(p.boxes_K4) for p in part),
            }
            for s, part, package in zip(known, parts, packages, strict=True)
        ],
        validation_pictures=len(valid),
        device=device.type,
        precision=precision_name(settings.amp, device),
        threads=torch.get_num_threads(),
        licences=sorted({name for s in known for name in _licences(s.boxes)}),
    )
    going_on = run_folder.open_run(output, record, resume=resume, overwrite=overwrite)
    result = detector_training.fit(
        network,
        parts,
        valid,
        spec=spec,
        settings=settings,
        folder=output,
        resume=going_on,
        progress=progress,
    )
    run = result.run
    network.load_state_dict(result.state)
    none_below, many_from = 0.0, None
    if valid:
        found, truths, _ = detector_training.find_all(
            network.to(device).eval(),
            valid,
            spec,
            device=device,
            precision=None if device.type == "cpu" else choose_precision(settings.amp, device),
            batch_size=settings.batch_size,
        )
        none_below, many_from = detection.thresholds(found, np.array([len(boxes) for boxes in truths]))
    everyone = [picture for part in parts for picture in part]
    failed = _failed(absent, [(everyone, run.failures), (valid, run.validation_failures)])
    with writing(output / "failed.csv", overwrite=True) as partial:
        failed.write_csv(partial)
    best = run.history[run.best_epoch - 1]
    scores = {k.removeprefix("validation_"): v for k, v in best.items() if k.startswith("validation_")}
    detector_folder.save(
        output / "model",
        result.state,
        architecture=settings.architecture,
        config=config,
        spec=spec,
        none_below=none_below,
        many_from=many_from,
        record={**record, "best_epoch": run.best_epoch, "validation": scores},
        history=run.history,
        overwrite=True,
    )
    run_folder.tidy(output)
    return {
        "model": str(output / "model"),
        "architecture": settings.architecture,
        "sets": [{k: s[k] for k in ("boxes", "pictures", "empty")} for s in record["sets"]],
        "validation": len(valid),
        "empty_validation": sum(not len(p.boxes_K4) for p in valid),
        "failed": failed.to_dicts(),
        "best_epoch": run.best_epoch,
        "epochs": len(run.history),
        "validation_scores": scores,
        "thresholds": {"none_below": none_below, "many_from": many_from},
        "history": run.history,
    }


def _select(boxes: Path, packages: Sequence[Images]) -> _Set:
    """The pictures that a file of boxes speaks of, from the first package that has each."""
    frame = read_boxes(boxes)
    if frame.is_empty():
        raise DataError(f"{boxes}: no pictures in it")
    names = pictures(frame).select("image_file", "part", "width", "height")
    package_N = np.full(names.height, -1)
    row_N = np.full(names.height, -1)
    for number, package in enumerate(packages):
        rows = find_pictures(names, package.index.select(pl.col("name").alias("image_file"), "part"))
        new = (row_N < 0) & (rows >= 0)
        row_N[new], package_N[new] = rows[new], number
    corners: dict[tuple[str, int | None], list[list[float]]] = {}
    for name, part, *box in frame.select("image_file", "part", *XYXY).rows():
        corners.setdefault((name, part), []).extend([] if box[0] is None else [box])
    chosen, absent = [], []
    for (name, part, width, height), row, package_number in zip(names.rows(), row_N, package_N, strict=True):
        shown = part_path(name, part)
        if row < 0:
            absent.append(shown)
            continue
        array = np.array(corners[name, part], np.float64).reshape(-1, 4)
        if width is not None and height is not None:
            array = array.clip(0, (width, height, width, height))
        chosen.append(Picture(packages[package_number], int(row), array, shown, width, height))
    return _Set(boxes, chosen, absent)


def _cut(known: list[Picture], settings: DetectorSettings) -> tuple[list[Picture], list[Picture]]:
    """A set without its validation pictures, and these: the same share with and without a box."""
    generator = np.random.default_rng((settings.seed, 2))
    is_empty = np.array([not len(picture.boxes_K4) for picture in known], bool)
    held_out: set[int] = set()
    for kind in (False, True):
        numbers = np.flatnonzero(is_empty == kind)
        count = round(settings.validation_share * numbers.size)
        held_out.update(generator.permutation(numbers)[:count].tolist())
    return (
        [picture for number, picture in enumerate(known) if number not in held_out],
        [known[number] for number in sorted(held_out)],
    )


def _refuse_too_little(
    parts: Sequence[Sequence[Picture]],
    valid: Sequence[Picture],
    settings: DetectorSettings,
    absent: Sequence[str],
) -> None:
    missing = f" ({len(absent):,} are {_ABSENT}, first: {absent[0]})" if absent else ""
    boxes = sum(len(picture.boxes_K4) for part in parts for picture in part)
    count = sum(map(len, parts))
    if count < 2 or not boxes:
        raise RequestError(
            f"{count:,} training pictures with {boxes:,} boxes: nothing to learn from{missing}"
        )
    if not any(len(picture.boxes_K4) for picture in valid) and settings.criterion != "last":
        raise RequestError(
            "no validation picture with a box to choose an epoch by; pass a larger --validation-share, "
            f"--validation, or --criterion last to keep the last epoch{missing}"
        )


def _fingerprint(parts: Sequence[Sequence[Picture]], valid: Sequence[Picture]) -> str:
    """Of the pictures' names, boxes and packages, in their roles."""
    made = hashlib.sha256()
    for role, part in [*(("train", part) for part in parts), ("validation", valid)]:
        for picture in part:
            line = (role, picture.images.fingerprint, picture.name, picture.boxes_K4.tolist())
            made.update(json.dumps(line).encode())
    return made.hexdigest()


def _licences(boxes: Path) -> list[str]:
    """Names of the licences that a COCO file states."""
    if boxes.suffix != ".json":
        return []
    content = json.loads(boxes.read_text(encoding="utf-8"))
    stated = content.get("licenses") if isinstance(content, Mapping) else None
    names = [entry.get("name") for entry in stated or [] if isinstance(entry, Mapping)]
    return [str(name) for name in names if name]


def _failed(
    absent: Sequence[str], failures: Sequence[tuple[Sequence[Picture], Mapping[int, str]]]
) -> pl.DataFrame:
    """Pictures that are absent or cannot be read: columns `image_file`, `error`."""
    rows = [(name, _ABSENT) for name in absent]
    rows += [(known[n].name, reasons[n]) for known, reasons in failures for n in sorted(reasons)]
    return pl.DataFrame(rows, {"image_file": pl.String, "error": pl.String}, orient="row")
