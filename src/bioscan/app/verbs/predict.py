"""`bioscan predict`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from bioscan.analysis.backoff import LEVEL
from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite


def run(
    model: Path,
    source: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    images: Path | None = None,
    role: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = ("validation", "test"),
    all_rows: Annotated[bool, Parameter(negative="")] = False,
    scores: bool | None = None,
    tau: float = 0.0,
    decode: Literal["leaf", "greedy", "distance"] = "leaf",
    max_error: float | None = None,
    promise: Literal["rank", "answer"] = "rank",
    min_precision: float | None = None,
    sets: Literal["lac", "aps", "raps", "pas", "mondrian"] | None = None,
    coverage: float = 0.9,
    set_rank: str | None = None,
    calibration: bool = True,
    batch_size: int = 64,
    device: str = "auto",
    workers: int | None = None,
    threads: int | None = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Name the specimens of a catalogue or of a folder of photographs.

    A model that was calibrated, by bioscan train from validation specimens or by bioscan calibrate from your
    own, gives calibrated probabilities, and beside each assigned taxon how reliable its name was.

    Images that cannot be read are rows with a text in column `error`; the exit status is then 1. Run again
    after an interruption, the same command goes on where it was.

    Args:
        model: Model folder, or the run folder that holds it.
        source: Catalogue or TSV (with --images), or a package of photographs.
        output: Predictions: .parquet or .csv.
        images: Package of the catalogue's images.
        role: Whose specimens, where the catalogue has the model's split column; of a model trained within a
            taxon, only those below it.
        all_rows: Every row of the catalogue, whatever its role.
        scores: Write the probabilities of all taxa beside the table [default: where specimens have roles].
        tau: Fairness to rare taxa: 0 as the network says (most specimens right), 1 as if all taxa were
            equally common (most taxa right). Logits are lowered by tau times the log of the taxon's share of
            the training specimens; on top of loss logit_adjusted, where -1 undoes the training's 1.
        decode: Which answer: the most probable leaf taxon; greedy: the best order, in it the best family, and
            so on; distance: the leaf taxon that is expected to be least far off in the tree.
        max_error: Back off to the deepest rank at which at most this share of specimens, on average, gets a
            wrong name: 0.05, say. For specimens like those of the calibration.
        promise: What max_error is of: the names at each rank by itself, or each answer as a whole, which is
            wrong where any of its names is.
        min_precision: Back off to the deepest taxon whose name, where it was as probable, was right at least
            this often.
        sets: Add the taxa that each specimen may be, as a set that holds the true one in a share --coverage
            of specimens: lac gives the smallest, pas and mondrian are fair to rare taxa, aps and raps give
            more taxa where the model hesitates.
        coverage: Share of the specimens whose set holds their taxon.
        set_rank: Of the taxa in the sets [default: the model's deepest].
        calibration: Apply the model's calibration. Without it, probabilities are as the network gives them.
        batch_size: Images at a time.
        device: auto, cpu, cuda or mps.
        workers: Loader processes [default: by the number of cores].
        threads: torch threads [default: all cores].
    """
    from bioscan.jobs.predict import predict

    with out.progress("predicting", "specimens") as progress:
        result = predict(
            model,
            source,
            output,
            images=images,
            roles=() if all_rows else role,
            scores=scores,
            tau=tau,
            decode=decode,
            calibration=calibration,
            max_error=max_error,
            promise=promise,
            min_precision=min_precision,
            sets=sets,
            coverage=coverage,
            set_rank=set_rank,
            batch_size=batch_size,
            device=device,
            workers=workers,
            threads=threads,
            overwrite=overwrite,
            progress=progress,
        )
    if json:
        out.show(out.to_json(result))
    else:
        out.show("\n".join(_told(result)))
    for note in _talk(result):
        out.say(note)
    if tau and result["balanced"]:
        by = ", ".join(f"{what} {name}" for what, name in result["balanced"].items())
        out.say(f"the model was made fair to rare taxa in training ({by}): --tau {tau:g} is on top of that")
    if result["failed"]:
        first = result["first_failed"][0]
        name = first["image_file"] or first["sampleid"]
        out.say(
            f"{result['failed']:,} of {result['specimens']:,} pictures could not be named "
            f"(first: {name}: {first['error']}); see the column 'error'"
        )
    return 1 if result["failed"] else 0


def _told(result: dict[str, Any]) -> list[str]:
    """What was named, and what may be expected of it."""
    lines = [f"{result['specimens'] - result['failed']:,} of {result['specimens']:,} specimens named"]
    back_off = result["back_off"]
    if back_off:
        assigned = ", ".join(f"{rank} {count:,}" for rank, count in result["assigned"].items())
        lines.append(f"assigned: {assigned or 'none'}; no name is sure enough: {result['unassigned']:,}")
        whole = back_off["promise"] == "answer"
        if back_off["asked"] == "min_precision":
            lines += [_precision_line(row, back_off["value"]) for row in back_off["ranks"]]
        else:
            lines += [_error_line(row, None if whole else back_off["value"]) for row in back_off["ranks"]]
        if whole or (len(back_off["ranks"]) > 1 and back_off["asked"] == "max_error"):
            lines.append(_error_line(back_off["answers"], back_off["value"] if whole else None))
    sets = result["sets"]
    if sets:
        mean = "–" if sets["mean_size"] is None else f"{sets['mean_size']:,.2f}"
        whom = (
            "of a taxon that the model knows" if sets["method"] == "mondrian" else "with a name at the rank"
        )
        lines.append(
            f"sets ({sets['method']}, {sets['rank']}): {mean} taxa on average, {sets['empty']:,} empty; they "
            f"hold the true one of {_percent(sets['coverage'])} of specimens {whom} "
            f"(promised by {sets['calibrated']:,} such calibration specimens)"
        )
    return [*lines, f"predictions: {result['predictions']}"]


def _error_line(row: dict[str, Any], promised: float | None) -> str:
    """What thresholds did at a rank, or for whole answers, on the calibration specimens."""
    if row.get("reason"):
        return f"{row['rank']}: not named: {row['reason']}"
    among = "none is named"
    if row["named"]:
        span = f"{100 * row['low']:.1f}–{_percent(row['high'])}"
        among = f"among the named {_percent(row['error_among_named'])} ({span})"
    if not row["checked"]:
        return f"{row.get('rank', 'whole answers')}: no calibration specimen can be checked"
    told = "not promised" if promised is None else f"promised: at most {_percent(promised)}"
    return (
        f"{row.get('rank', 'whole answers')}: named {_percent(row['named'] / row['checked'], 0)} of "
        f"{row['checked']:,} checked specimens; wrong among all {_percent(row['error_over_all'])} ({told}), "
        f"{among}"
    )


def _precision_line(row: dict[str, Any], asked: float) -> str:
    """What the thresholds of a rank's taxa did on the calibration specimens."""
    if row["reason"]:
        return f"{row['rank']}: not named: {row['reason']}"
    return (
        f"{row['rank']}: {row['taxa_given']:,} of {row['taxa']:,} taxa can be named with a precision of "
        f"{_percent(asked)}; that names {_percent(row['named'] / row['checked'], 0)} of {row['checked']:,} "
        "checked specimens"
    )


def _talk(result: dict[str, Any]) -> list[str]:
    """What to know before the promises are believed."""
    notes = list(result["notes"])
    for row in (result["back_off"] or {"ranks": []})["ranks"]:
        if row["held_back"]:
            notes.append(
                f"{row['rank']}: {row['held_back']:,} taxa are never assigned: nothing tells them from "
                "relatives that training specimens name no deeper than their parent"
            )
    if result["back_off"] and result["back_off"]["asked"] == "min_precision":
        notes.append(
            f"each taxon's precision was tested by itself, at a confidence of {_percent(LEVEL)}: of the taxa "
            f"that are less precise than asked, up to {_percent(1 - LEVEL)} are named all the same"
        )
    if result["sets"]:
        notes += [f"sets: {warning}" for warning in result["sets"]["warnings"]]
    if result["back_off"] or result["sets"]:
        notes.append(
            "promises are for specimens like those of the calibration: collected, photographed and named in "
            "the same way; and specimens that somebody could name are no random sample of all"
        )
    return notes


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}".removesuffix(".0") + " %"
