"""`bioscan predict`."""

from pathlib import Path
from typing import Annotated

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
    if result["failed"]:
        first = result["first_failed"][0]
        out.say(
            f"{result['failed']:,} of {result['specimens']:,} pictures could not be read "
            f"(first: {first['image_file']}: {first['error']}); see the column 'error'"
        )
    return 1 if result["failed"] else 0
