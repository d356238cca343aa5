"""`bioscan adapt`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.failures import end_with_failures
from bioscan.app.flags import Failures, Json, Overwrite, Seed
from bioscan.errors import RequestError, unknown
from bioscan.vocabulary import RANKS

_SHOWN = 50
"""Taxa that are listed, those with the fewest specimens."""


def run(
    source: Path,
    /,
    *,
    labels: Path,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    model: str | None = None,
    weights: str | None = None,
    head: Literal["linear", "prototype", "nearest"] = "linear",
    ranks: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    label_rank: str = "species",
    balance: Literal["none", "weights"] = "none",
    l2: float | None = None,
    folds: int = 5,
    image_size: int | None = None,
    crop_size: int | None = None,
    batch_size: int = 64,
    device: str = "auto",
    threads: int | None = None,
    seed: Seed = 1,
    failures: Failures = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """A model for your own taxa from few labelled photographs, in minutes on a CPU.

    The backbone stays as it is; a head is fitted to its features, its strength chosen by cross-validation on
    the labelled photographs. The result is a model folder that `bioscan predict` takes.

    Args:
        source: Package of photographs, or embeddings made by `bioscan embed`.
        labels: CSV or TSV: image_file (or sampleid, with embeddings), and rank columns or one column label.
        output: Model folder.
        model: Model folder, or the name of any timm backbone. With embeddings of a named backbone it may be
            left out.
        weights: Of a named backbone: hub (pretrained, from the internet), or a local file or folder
            [default: hub].
        head: Logistic regression, the mean of each taxon, or the labelled photographs themselves.
        ranks: Ranks that the model names, as order,family,species [default: those that have names].
        label_rank: Rank of the names in column label.
        balance: With head linear: weights makes each taxon count alike.
        l2: With head linear: penalty on the weights [default: chosen by cross-validation].
        folds: Parts of the cross-validation.
        image_size: Shorter side that photographs are resized to [default: as the weights have it].
        crop_size: Side of the central square [default: as the weights have it].
        batch_size: Photographs at a time.
        device: auto, cpu, cuda or mps.
        threads: torch threads [default: all cores].
    """
    asked = [rank for part in ranks for rank in part.split(",") if rank]
    for rank in (*asked, label_rank):
        if rank not in RANKS:
            raise unknown("rank", rank, RANKS)
    if l2 is not None and l2 <= 0:
        raise RequestError(f"l2 is {l2}; it must be above 0")
    from bioscan.jobs.adapt import adapt

    with out.progress("reading", "photographs") as progress:
        result = adapt(
            source,
            labels,
            output,
            model=model,
            weights=weights,
            head=head,
            ranks=asked,
            label_rank=label_rank,
            balance=balance,
            l2=l2,
            folds=folds,
            image_size=image_size,
            crop_size=crop_size,
            batch_size=batch_size,
            device=device,
            threads=threads,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
    if json:
        out.show(out.to_json(result))
    else:
        out.show("\n".join(_lines(result)))
    return end_with_failures(result["failures"], result["specimens"] + result["failed"], failures)


def _lines(result: dict[str, Any]) -> list[str]:
    counts = sorted(result["counts"], key=lambda row: row["specimens"])
    rows = [[row["taxon"], row["rank"], row["specimens"], _share(row)] for row in counts[:_SHOWN]]
    lines = [out.table(rows, ("taxon", "rank", "photographs", "right, held out"))]
    if len(counts) > _SHOWN:
        lines.append(f"… and {len(counts) - _SHOWN:,} taxa with more photographs")
    scores = result["cross_validated"]
    chosen = ", ".join(f"{name} {value:.3g}" for name, value in result["chosen"].items())
    lines += [f"left out: {count:,} with {reason}" for reason, count in result["left_out"].items()]
    return [
        *lines,
        f"{result['specimens']:,} photographs, {result['classes']:,} taxa at {', '.join(result['ranks'])}",
        f"head {result['head']} on {result['backbone']}; by cross-validation: {chosen}",
        f"held out: micro top-1 {out.cell(scores['micro_top_1'])}, macro {out.cell(scores['macro_top_1'])} "
        f"({scores['specimens']:,} photographs)",
        f"model: {result['model']}",
    ]


def _share(row: dict[str, Any]) -> str:
    return f"{row['held_out_right']:,} of {row['held_out']:,}" if row["held_out"] else "–"
