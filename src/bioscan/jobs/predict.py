"""From a model and images to a predictions table."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import polars as pl

from bioscan.analysis.taxonomy import within as rows_within
from bioscan.config import record as record_of
from bioscan.data.images import Images
from bioscan.data.metadata import FORMS, fingerprint, read_metadata, scan_metadata
from bioscan.data.predictions import PredictionsWriter
from bioscan.errors import RequestError, unknown
from bioscan.files import refuse_input
from bioscan.learn import model_folder
from bioscan.learn.calibration import Calibration
from bioscan.learn.device import precision_name
from bioscan.learn.prediction import Naming, Predicted, open_model, predict_batches
from bioscan.learn.promises import Promise, TaxonSets, by_error, by_precision, reliability_by_node
from bioscan.vocabulary import RANKS, ROLES

_BLOCK_ROWS = 8_192
_BLOCK_VALUES = 8_000_000
"""Rows, and leaf probabilities, that are gathered before they are written."""
_BALANCING: Final[dict[str, tuple[str, ...]]] = {
    "loss": ("class_balanced", "logit_adjusted", "ldam"),
    "sampler": ("class_balanced", "square_root", "repeat_factor"),
    "method": ("crt", "tau_norm"),
    "balance": ("weights",),
}
"""Setting of a training -> its values that favour rare taxa."""


def predict(
    model: Path | str,
    source: Path | str,
    output: Path | str,
    *,
    images: Path | str | Images | None = None,
    roles: Collection[str] = ("validation", "test"),
    scores: bool | None = None,
    tau: float = 0.0,
    decode: str = "leaf",
    calibration: bool = True,
    max_error: float | None = None,
    promise: Promise = "rank",
    min_precision: float | None = None,
    sets: str | None = None,
    coverage: float = 0.9,
    set_rank: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    workers: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Name specimens. An interrupted job goes on where it was; images and probabilities are held a block at a
    time.

    Args:
        model: Model folder, or the run folder that holds it.
        source: A catalogue or TSV (then `images` is needed), or a package of bare photographs.
        output: Predictions, `.parquet` or `.csv`.
        images: Package of the catalogue's images.
        roles: With a catalogue that has the model's split column: whose specimens, of the taxon that the
            model was trained within; empty: every row.
        scores: Write leaf probabilities beside the table; None: where specimens have roles.
        tau: Strength of the logit adjustment: 0 as the network says, 1 as if all taxa were equally common. It
            is on top of what the training did: with loss `logit_adjusted`, minus its tau undoes that.
        decode: From leaf probabilities to one answer: `leaf` (the most probable leaf taxon), `greedy` (the
            most probable child, from the root down) or `distance` (least expected distance in the tree).
        calibration: Apply the model's calibration, where it has one: its temperature, and beside each
            assigned taxon how reliable its name was. False: probabilities as the network gives them.
        max_error: Assign the deepest rank at which the expected share of wrong names, over all specimens
            alike the calibration records, is at most this (see `analysis.backoff`).
        promise: What max_error is of: the names at each `rank` by itself, or each `answer` as a whole.
        min_precision: Assign the deepest taxon whose name, from a probability of its own on, is right for at
            least this share of specimens: tested by the calibration records, each taxon by itself, with 90 %
            confidence.
        sets: Also give conformal prediction sets, by one of `conformal.METHODS`.
        coverage: Share of the specimens whose set is to hold the true taxon.
        set_rank: Rank of the taxa in the sets; None: the deepest of the model.
        batch_size: Images at a time.
        device: auto, cpu, cuda or mps.
        workers: Loader processes; None: by the number of cores.
        threads: torch threads; None: as torch has it.
        overwrite: Replace the output.
        progress: Called as `progress(done, total)`.

    Returns:
        `predictions` (path), `specimens`, `failed` (rows with an error), `first_failed` (up to ten of them),
        `assigned` (rank -> specimens whose assigned taxon is of it; those without one are in `unassigned`),
        `balanced`: what in the model's training favoured rare taxa already (`loss`, `sampler` … -> name), on
        top of which tau comes; `temperature`; `back_off`: None, or `asked`, `value`, `promise`, `ranks`
        and `answers` (see `BackOff.measured`); `sets`: None, or what was asked, `calibrated` on how many
        records, `mean_size`, `empty` and `warnings`; `notes`: why the calibration was not applied as a whole.

    Raises:
        RequestError, DataError: as the model folder, the metadata or the package tell; thresholds or sets are
            asked for that the model has no calibration for.
    """
    if max_error is not None and min_precision is not None:
        raise RequestError("max_error and min_precision are two ways to choose the assigned taxon; give one")
    if promise not in get_args(Promise):
        raise unknown("promise", promise, get_args(Promise))
    if promise != "rank" and max_error is None:
        raise RequestError("promise goes with max_error, the share of wrong names that is promised")
    if set_rank is not None and sets is None:
        raise RequestError("set_rank goes with sets, the method that prediction sets are made by")
    loaded = open_model(
        model,
        tau=tau,
        decode=decode,
        batch_size=batch_size,
        device=device,
        workers=workers,
        threads=threads,
    )
    shown = _shown_with(loaded, tau) if calibration else None
    wanted = {"--max-error": max_error, "--min-precision": min_precision, "--sets": sets}
    needing = [flag for flag, asked in wanted.items() if asked is not None]
    if needing and not calibration:
        raise RequestError(f"{needing[0]} needs the model's calibration; leave out --no-calibration")
    for flag in needing:
        if shown is None or (shown.decode != decode and flag != "--sets"):
            raise RequestError(_no_calibration(flag, model, loaded, tau, decode))
    naming = _naming(loaded, shown, decode, max_error, promise, min_precision)
    if shown and sets:
        naming = replace(naming, sets=TaxonSets.of(loaded.taxonomy, shown, sets, coverage, set_rank))
    temperature = shown.temperature if shown else 1.0
    source, output = Path(source), Path(output)
    refuse_input(output, source, images)
    is_catalogue = source.suffix in FORMS
    if is_catalogue:
        if images is None:
            raise RequestError("a catalogue needs --images, the package of its photographs")
        package = images if isinstance(images, Images) else Images(images)
        specimens, has_roles = _of_catalogue(source, package, loaded.info, roles)
    else:
        if images is not None:
            raise RequestError(f"{source} is a package of images itself; --images goes with a catalogue")
        package, has_roles = Images(source), False
        specimens = package.index.select(
            pl.lit(None, pl.String).alias("sampleid"),
            pl.col("name").alias("image_file"),
            pl.int_range(pl.len()).alias("row"),
        )
    record = record_of(
        **{name: loaded.info.get(name) for name in ("experiment", "within", "split_hash")},
        rank=loaded.taxonomy.ranks[-1],
        ranks=list(loaded.taxonomy.ranks),
        tau=tau,
        decode=decode,
        temperature=temperature,
        rank_temperatures=shown.rank_temperatures if shown else None,
        calibration=shown.fingerprint if shown else None,
        calibration_cut=loaded.calibration.cut if loaded.calibration else None,
        max_error=max_error,
        promise=None if max_error is None else promise,
        min_precision=min_precision,
        ranks_left_empty=naming.backoff.never if naming.backoff else [],
        sets={"method": sets, "coverage": coverage, "rank": naming.sets.rank} if naming.sets else None,
        model=loaded.info["backbone"],
        model_sha256=loaded.fingerprint,
        weights_sha256=loaded.info["weights_sha256"],
        training=loaded.info.get("settings", {}),
        precision=precision_name("auto", next(loaded.network.parameters()).device),
        source=source.name,
        images=package.path.name,
        roles=list(roles) if has_roles else [],
        specimens=specimens.height,
        data_fingerprint=fingerprint(source) if is_catalogue else package.fingerprint,
        images_fingerprint=package.fingerprint,
    )
    keep_scores = has_roles if scores is None else scores
    taxonomy = loaded.taxonomy
    block = max(batch_size, min(_BLOCK_ROWS, _BLOCK_VALUES // taxonomy.num_leaves))
    with PredictionsWriter(
        output,
        ranks=naming.lineages.columns,
        leaves=taxonomy.leaf_paths if keep_scores else None,
        record=record,
        optional=naming.optional,
        overwrite=overwrite,
    ) as writer:
        done = writer.done
        held: list[Predicted] = []
        for made in predict_batches(
            loaded,
            package,
            specimens.slice(done),
            naming,
            tau=tau,
            temperature=temperature,
            batch_size=batch_size,
            workers=workers,
        ):
            held.append(made)
            done += made.table.height
            if sum(one.table.height for one in held) >= block or done == specimens.height:
                tables, probabilities, energies = zip(*held, strict=True)
                scored = (np.concatenate(probabilities), np.concatenate(energies)) if keep_scores else ()
                writer.write(pl.concat(tables), *scored)
                held = []
            if progress:
                progress(done, specimens.height)
    return {
        "predictions": str(output),
        "specimens": specimens.height,
        **_counted(output, naming),
        "balanced": _balanced(loaded),
        "temperature": temperature,
        "notes": _notes(loaded, tau, decode) if calibration else [],
    }


def _shown_with(model: model_folder.Model, tau: float) -> Calibration | None:
    """The model's calibration where its temperature is for what is shown: the same logit adjustment."""
    kept = model.calibration
    return kept if kept and kept.tau == tau else None


def _naming(
    model: model_folder.Model,
    calibration: Calibration | None,
    decode: str,
    max_error: float | None,
    promise: Promise,
    min_precision: float | None,
) -> Naming:
    """Names, and what the calibration says of them where it is for those that are given."""
    taxonomy, counts_N = model.taxonomy, model.target_counts_N
    if calibration is None:
        return Naming.of(taxonomy, decode)
    naming = Naming.of(taxonomy, decode, rank_temperatures=calibration.rank_temperatures)
    if calibration.decode != decode:
        return naming
    backoff = None
    if max_error is not None:
        backoff = by_error(taxonomy, calibration, counts_N, max_error, promise)
    elif min_precision is not None:
        backoff = by_precision(taxonomy, calibration, counts_N, min_precision)
    return replace(naming, backoff=backoff, reliability=reliability_by_node(taxonomy, calibration))


def _notes(model: model_folder.Model, tau: float, decode: str) -> list[str]:
    """What of the model's calibration is not applied, and why."""
    kept = model.calibration
    if kept is None:
        return []
    if kept.tau != tau:
        return [
            f"the model's calibration is for tau {kept.tau:g}, not {tau:g}: probabilities are not calibrated "
            f"(bioscan calibrate --tau {tau:g} makes it anew)"
        ]
    if kept.decode != decode and kept.reliability is not None:
        return [
            f"how reliable names are was measured for decode {kept.decode}, not {decode}, and is left out "
            f"(bioscan calibrate --decode {decode} measures it anew)"
        ]
    return []


def _no_calibration(flag: str, folder: Path | str, model: model_folder.Model, tau: float, decode: str) -> str:
    """Why what a flag needs is not there, and the way out."""
    kept = model.calibration
    command = f"bioscan calibrate {folder} CATALOGUE --images PACKAGE"
    if kept is None:
        options = f" --tau {tau:g}" * (tau != 0) + f" --decode {decode}" * (decode != "leaf")
        return f"{folder} has no calibration, which {flag} needs; make one: {command}{options}"
    return (
        f"the model's calibration is for tau {kept.tau:g} and decode {kept.decode}, and {flag} needs one for "
        f"tau {tau:g} and decode {decode}; make it: {command} --tau {tau:g} --decode {decode} -o NEW"
    )


def _balanced(model: model_folder.Model) -> dict[str, str]:
    """What in a model's training gave rare taxa more weight than they have in the data."""
    made_by = {
        "loss": model.trained_with("loss"),
        "sampler": model.trained_with("sampler"),
        "method": (model.info.get("rebalanced") or {}).get("method"),
        "balance": (model.info.get("adapted") or {}).get("balance"),
    }
    return {what: name for what, name in made_by.items() if name in _BALANCING[what]}


def _of_catalogue(
    catalogue: Path, package: Images, info: dict[str, Any], roles: Collection[str]
) -> tuple[pl.DataFrame, bool]:
    """The catalogue's specimens with their row in the package, and whether they were chosen by role."""
    for role in roles:
        if role not in ROLES:
            raise unknown("role", role, ROLES)
    known = scan_metadata(catalogue).collect_schema().names()
    if "image_file" not in known:
        raise RequestError(f"{catalogue} has no column 'image_file'; the package is searched by it")
    experiment, taxon = info.get("experiment"), info.get("within")
    has_roles = experiment in known and bool(roles)
    wanted = ["sampleid", "image_file", "chunk_number"]
    if has_roles:
        wanted += [str(experiment), *(RANKS if taxon else ())]
    frame = read_metadata(catalogue, [c for c in known if c in wanted])
    if has_roles:
        if taxon:
            frame = rows_within(frame, taxon)
        frame = frame.filter(pl.col(str(experiment)).is_in(list(roles)))
        if frame.is_empty():
            below = f" within {taxon}" if taxon else ""
            raise RequestError(
                f"no specimen of {catalogue}{below} has role {' or '.join(roles)} in {experiment}; "
                "pass --all-rows to predict every row"
            )
    if "sampleid" not in frame.columns:
        frame = frame.with_columns(pl.lit(None, pl.String).alias("sampleid"))
    parts = frame["chunk_number"] if "chunk_number" in frame.columns else None
    rows = pl.Series("row", package.find(frame["image_file"], parts))
    return frame.select("sampleid", "image_file").with_columns(rows), has_roles


def _counted(output: Path, naming: Naming) -> dict[str, Any]:
    """What the written table holds: failures, assigned ranks, sizes of sets; and what was promised."""
    if output.suffix == ".parquet":
        table = pl.scan_parquet(output)
    else:
        table = pl.scan_csv(output, infer_schema=False)
    bad = table.filter(pl.col("error").is_not_null()).select("sampleid", "image_file", "error")
    ranks = table.group_by("assigned_rank").len().collect()
    assigned = dict(ranks.iter_rows())
    failed = int(bad.select(pl.len()).collect().item())
    told: dict[str, Any] = {
        "failed": failed,
        "first_failed": bad.head(10).collect().to_dicts(),
        "assigned": {rank: assigned[rank] for rank in RANKS if rank in assigned},
        "unassigned": assigned.get(None, 0) - failed,
        "back_off": None,
        "sets": None,
    }
    if naming.backoff:
        rule = naming.backoff
        told["back_off"] = {
            "asked": rule.asked,
            "value": rule.value,
            "promise": rule.promise,
            "ranks": rule.measured,
            "answers": rule.answers,
        }
    if naming.sets:
        size = pl.col("set_size").cast(pl.Int64)
        sizes = table.select(mean_size=size.mean(), empty=(size == 0).sum()).collect()
        told["sets"] = naming.sets.told() | sizes.row(0, named=True)
    return told
