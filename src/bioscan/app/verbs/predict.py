"""`bioscan predict`."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

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
    batch_size: int = 64,
    device: str = "auto",
    workers: int | None = None,
    threads: int | None = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Name the specimens of a catalogue or of a folder of photographs.

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
        out.show(f"{result['specimens'] - result['failed']:,} of {result['specimens']:,} specimens named")
        out.show(f"predictions: {result['predictions']}")
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
