"""A model's confidence, fitted to labelled specimens: its validation specimens, or a user's own."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

from bioscan.data.images import Images
from bioscan.data.metadata import fingerprint, scan_metadata
from bioscan.errors import DataError, RequestError
from bioscan.files import refuse_existing
from bioscan.learn import calibrating, model_folder
from bioscan.learn.calibration import Calibration
from bioscan.learn.prediction import open_model
from bioscan.learn.promises import by_error
from bioscan.learn.specimens import NOT_IN_PACKAGE, Labelled, labelled

ERRORS: Final = (0.02, 0.05, 0.1)
"""Asked errors that are told."""
_SHARE: Final = 0.5


def calibrate(
    model: Path | str,
    catalogue: Path | str,
    images: Path | str | Images,
    output: Path | str | None = None,
    *,
    roles: Collection[str] = ("validation",),
    tau: float = 0.0,
    decode: str = "leaf",
    group: str | None = None,
    share: float | None = None,
    per_rank: bool = False,
    batch_size: int = 64,
    device: str = "auto",
    workers: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Fit a model's temperature to labelled specimens, and keep others of them for thresholds and sets.

    Specimens are cut in two, groups kept whole; see `learn.calibration`.

    Args:
        model: Model folder, or the run folder that holds it.
        catalogue: Catalogue or TSV of labelled specimens that the model was not trained on.
        images: Package of their images.
        output: New model folder; None: into the model's own.
        roles: With the model's split column: whose specimens; empty: every row, whatever its role.
        tau: Strength of the logit adjustment that `bioscan predict` will have.
        decode: Its decoding.
        group: What is kept together; see `groups.groups_of`. None: for the validation specimens of the
            training as that had it, else `auto`.
        share: Of the groups, kept from the temperature; None: as the training had it, else a half.
        per_rank: Give each rank a temperature of its own besides.
        batch_size: Images at a time.
        device: auto, cpu, cuda or mps.
        workers: Loader processes; None: by the number of cores.
        threads: torch threads; None: as torch has it.
        overwrite: Replace the output, or the model's own calibration.
        progress: Called as `progress(done, total)`.

    Returns:
        `model` (folder), `temperature`, `rank_temperatures`, `tau`, `decode`, what `Calibration.info` has,
        `thresholds` (for each of ERRORS: `max_error`, and `ranks` as in `promises.BackOff.measured`, with the
        `threshold`), `specimens`, `left_out` (reason -> count), `failed` (count), `failures` (name, part,
        place, reason).

    Raises:
        RequestError: an unknown name; specimens that the model was trained on, or none; an output, or a
            calibration, in the way.
        DataError: an input that cannot be used.
    """
    if share is not None and not 0 <= share <= 0.9:
        raise RequestError(f"share is {share:g}; it must be from 0 to 0.9")
    target = _target(model, output, overwrite=overwrite)
    loaded = open_model(
        model,
        tau=tau,
        decode=decode,
        batch_size=batch_size,
        device=device,
        workers=workers,
        threads=threads,
    )
    package = images if isinstance(images, Images) else Images(images)
    experiment = _experiment(loaded, catalogue, roles)
    trained_group = loaded.trained_with("calibration_group") or "auto"
    trained_share = loaded.trained_with("calibration_share") or 0.0
    own = set(roles) == {"validation"}  # perhaps those that the training had
    chosen = labelled(
        catalogue,
        package,
        loaded.taxonomy,
        experiment=experiment,
        roles=roles,
        within=loaded.info.get("within"),
        group=group or (trained_group if own else "auto"),
    )
    if share is None:
        share = trained_share if own and trained_share else _SHARE
    as_trained = (group or trained_group, share) == (trained_group, trained_share)
    told = {
        "experiment": experiment,
        "roles": list(roles) if experiment else [],
        "share": share,
        "seed": calibrating.SEED,
        "data_fingerprint": fingerprint(catalogue),
        "warnings": _warnings(loaded, chosen, as_trained=as_trained),
    }
    rows = chosen.table["row"].to_numpy()
    with calibrating.outputs_of(
        loaded, package, rows, batch_size=batch_size, workers=workers, progress=progress
    ) as outputs:
        second_X = calibrating.second_part(chosen, share)
        made = calibrating.calibrate(
            outputs, chosen, second_X, tau=tau, rule=decode, per_rank=per_rank, info=told
        )
    model_folder.recalibrated(model, target, made, overwrite=overwrite or output is None)
    failures = _failures(chosen, package, outputs.failures)
    return {
        "model": str(target),
        "temperature": made.temperature,
        "rank_temperatures": made.rank_temperatures,
        "tau": tau,
        "decode": decode,
        **made.info,
        "thresholds": [_at_error(loaded, made, error) for error in ERRORS if made.records is not None],
        "specimens": chosen.table.height + chosen.not_in_package.height,
        "left_out": chosen.left_out,
        "failed": len(failures),
        "failures": failures,
    }


def _target(model: Path | str, output: Path | str | None, *, overwrite: bool) -> Path:
    """Where the calibrated model goes, known to be free."""
    if output is not None:
        target = Path(output)
        refuse_existing(target, overwrite=overwrite or (target.is_dir() and not any(target.iterdir())))
        return target
    target = model_folder.place_of(model)
    known = target / "model.json"
    if known.is_file() and not overwrite and _told(known).get("calibration"):
        raise RequestError(
            f"{target} has a calibration; pass --overwrite to replace it, or -o for a new model folder"
        )
    return target


def _told(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    return content


def _experiment(model: model_folder.Model, catalogue: Path | str, roles: Collection[str]) -> str | None:
    """The model's split column, where the catalogue has it."""
    experiment: str | None = model.info.get("experiment")
    if experiment in scan_metadata(catalogue).collect_schema().names():
        return experiment
    if roles:
        column = f"no column '{experiment}'" if experiment else "no column that tells the model's roles"
        raise RequestError(
            f"{catalogue} has {column}; pass --all-rows if the model was trained on none of its specimens"
        )
    return None


def _warnings(model: model_folder.Model, chosen: Labelled, *, as_trained: bool) -> list[str]:
    """What the specimens' part in the training means for the calibration.

    Raises:
        RequestError: the model was trained on some of them.
    """
    if chosen.split_hash is None:
        return []
    roles = chosen.table["role"]
    trained = int((roles == "train").sum())
    if chosen.split_hash != model.info.get("split_hash"):
        if not trained:
            return []
        return [
            f"{trained:,} of these specimens have role train, if not in the very split that the model was "
            "trained with: it may have been trained on them, and be surer of them than of others"
        ]
    if trained:
        raise RequestError(
            f"the model was trained on {trained:,} of these {roles.len():,} specimens, and is surer of them "
            "than of others; choose another --role"
        )
    made = []
    if (roles == "validation").any() and not as_trained and model.trained_with("criterion") != "last":
        made.append(
            "these validation specimens also chose the model's epoch, some of those measured on among them: "
            "what is measured may be a little too good"
        )
    if (roles == "test").any():
        made.append("test specimens are among these: scores of predictions on them test nothing any more")
    return made


def _at_error(model: model_folder.Model, calibration: Calibration, error: float) -> dict[str, Any]:
    """What one asked error makes of each rank."""
    rule = by_error(model.taxonomy, calibration, model.target_counts_N, error)
    assert rule.threshold_R is not None
    ranks = [
        {"rank": row["rank"], "threshold": float(threshold), **row}
        for row, threshold in zip(rule.measured, rule.threshold_R, strict=True)
    ]
    return {"max_error": error, "ranks": ranks}


def _failures(chosen: Labelled, package: Images, unread: dict[int, str]) -> list[dict[str, Any]]:
    """Images that are absent or cannot be read."""
    made = [
        {"name": name, "part": None, "place": package.path.name, "reason": NOT_IN_PACKAGE}
        for name in chosen.not_in_package["image_file"]
    ]
    for number, reason in sorted(unread.items()):
        name, row = chosen.table.select("image_file", "row").row(number)
        part = package.index.item(row, "part")
        made.append({"name": name, "part": part, "place": None, "reason": reason})
    return made
