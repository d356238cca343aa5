"""`bioscan calibrate`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.failures import end_with_failures
from bioscan.app.flags import Failures, Json, Overwrite


def run(
    model: Path,
    catalogue: Path,
    /,
    *,
    images: Path,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    role: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = ("validation",),
    all_rows: Annotated[bool, Parameter(negative="")] = False,
    tau: float = 0.0,
    decode: Literal["leaf", "greedy", "distance"] = "leaf",
    group: str | None = None,
    share: float | None = None,
    per_rank: Annotated[bool, Parameter(negative="")] = False,
    batch_size: int = 64,
    device: str = "auto",
    workers: int | None = None,
    threads: int | None = None,
    failures: Failures = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Make a model's confidence mean something, on labelled specimens that it was not trained on.

    One part of the specimens gives the temperature: of names with probability 0.9, nine in ten should then
    be right. The other part is kept in the model folder: from it `bioscan predict` finds how deep a name may
    go (--max-error, --min-precision), which sets of taxa hold the true one (--sets), and how reliable each
    taxon's name is. `bioscan train` does all this with its validation specimens already; do it again for
    your own specimens, where light, camera or region differ, or for another --tau or --decode.

    Args:
        model: Model folder, or the run folder that holds it.
        catalogue: Catalogue or TSV of labelled specimens.
        images: Package of their images.
        output: New model folder [default: into the model's own, if it has no calibration yet].
        role: Whose specimens, where the catalogue has the model's split column.
        all_rows: Every row of the catalogue, whatever its role: for specimens of your own.
        tau: As it will be in bioscan predict.
        decode: As it will be in bioscan predict.
        group: What is kept together when the specimens are cut in two, as specimens of one plate resemble
            each other: plate, bin, a column or none [default: plate, else bin, else none].
        share: Of the groups, kept from the temperature; 0: none, a temperature only
            [default: as in training, else 0.5].
        per_rank: Give each rank a temperature of its own besides. No rank is then surer than those above it,
            but probabilities no longer add up along the tree.
        batch_size: Images at a time.
        device: auto, cpu, cuda or mps.
        workers: Loader processes [default: by the number of cores].
        threads: torch threads [default: all cores].
    """
    from bioscan.jobs.calibrate import calibrate

    with out.progress("calibrating", "specimens") as progress:
        result = calibrate(
            model,
            catalogue,
            images,
            output,
            roles=() if all_rows else role,
            tau=tau,
            decode=decode,
            group=group,
            share=share,
            per_rank=per_rank,
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
        out.show(_in_words(result))
        for warning in result["warnings"]:
            out.say(f"note: {warning}")
    return end_with_failures(result["failures"], result["specimens"], failures)


def _in_words(result: dict[str, Any]) -> str:
    first, second = result["first"], result["second"]
    told = f"temperature {result['temperature']:.3f}, from {_size(first, result)}"
    if strangers := first["n"] - result["fit"]["n"]:
        told += f", less {strangers:,} of taxa that the model does not know"
    lines = [told]
    if result["rank_temperatures"]:
        each = ", ".join(f"{rank} {value:.3f}" for rank, value in result["rank_temperatures"].items())
        lines.append(f"temperatures of the ranks, after it: {each}")
    if result["measured_on"] == "second":
        lines.append(f"kept for thresholds and sets: {_size(second, result)}")
    lines += [f"left out: {count:,} with {reason}" for reason, count in result["left_out"].items() if count]
    whom = "kept" if result["measured_on"] == "second" else "same"
    lines += ["", f"probabilities of the {whom} specimens, before and after:"]
    names = ("nll_before", "nll_after", "ece_before", "ece_after")
    rows = [[rank, row["n"], *(row[name] for name in names)] for rank, row in result["ranks"].items()]
    lines.append(out.table(rows, ("rank", "specimens", "NLL", "after", "ECE", "after")))
    if result["thresholds"]:
        lines += ["", "how deep names go when at most a share of all specimens may get a wrong one:"]
        header = ("asked", "rank", "named from", "checked", "named", "wrong of all", "wrong of named", "95 %")
        rows = [_row(one["max_error"], row) for one in result["thresholds"] for row in one["ranks"]]
        lines.append(out.table(rows, header))
        lines.append("the first is promised on average, for specimens like these; the second is measured")
    return "\n".join([*lines, "", f"model: {result['model']}"])


def _size(part: dict[str, int], result: dict[str, Any]) -> str:
    what = {"plate": "plates", "bin": "BINs"}.get(result["group"], f"groups by {result['group']}")
    groups = "" if result["group"] == "none" else f" of {part['groups']:,} {what}"
    return f"{part['n']:,} specimens{groups}"


def _row(error: float, row: dict[str, Any]) -> list[Any]:
    """A line of the thresholds' table."""
    asked, checked = _percent(error), row["checked"]
    if row["reason"]:
        return [asked, row["rank"], "never", checked, *("–",) * 4]
    span = f"{100 * row['low']:.1f}–{_percent(row['high'])}" if row["named"] else "–"
    shares = (row["named"] / checked, row["error_over_all"], row["error_among_named"])
    least = f"{row['threshold']:.4f}" if row["threshold"] else "any"
    return [asked, row["rank"], least, checked, *map(_percent, shares), span]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
