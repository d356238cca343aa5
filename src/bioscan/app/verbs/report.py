"""`bioscan report`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite, Seed
from bioscan.jobs.evaluate import KS


def run(
    predictions: Path,
    catalogue: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    run: Path | None = None,
    images: Path | None = None,
    title: str | None = None,
    rank: str | None = None,
    experiment: str | None = None,
    role: str | None = None,
    within: str | None = None,
    k: Annotated[tuple[int, ...], Parameter(name="--k", consume_multiple=True, negative="")] = KS,
    seed: Seed = 1,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Write one self-contained HTML page: what to believe, scores, confidence, errors, record, licences.

    It opens with three sentences made from the numbers. Then: the scores, also rank by rank and up the
    taxonomy; what the probabilities are worth, and sets of names; taxa, rare and common, as a table and as a
    sunburst coloured by the share named right; confusions; the worst errors by confidence and by taxonomic
    distance; training curves, what was left out, settings, data and licences.

    The exit status is 1 if photographs of the worst errors could not be read; the page says which.

    Args:
        predictions: Predictions, as `evaluate` takes them.
        catalogue: Catalogue or TSV with the true names.
        output: The page, .html.
        run: Run or model folder of the training, for its settings and curves.
        images: Package of the images, for the worst errors.
        title: Heading of the page.
        rank: Rank to compare at [default: the model's, else the deepest predicted].
        experiment: Split column, or none: every labelled specimen counts [default: the model's].
        role: Whose specimens count [default: test].
        within: Only specimens below this taxon [default: the model's].
        k: k of top-k and average-k.
    """
    from bioscan.app.report import write_report

    result = write_report(
        predictions,
        catalogue,
        output,
        run=run,
        images=images,
        title=title,
        rank=rank,
        experiment=experiment,
        role=role,
        within=within,
        ks=k,
        seed=seed,
        overwrite=overwrite,
    )
    if json:
        out.show(out.to_json(result))
    else:
        out.show(f"{result['specimens']:,} specimens; report: {result['report']}")
    failed = result["failed"]
    if failed:
        first = f"{failed[0]['key']}: {failed[0]['error']}"
        out.say(f"{len(failed):,} photographs of errors could not be read (first: {first})")
    return 1 if failed else 0
