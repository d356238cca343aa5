"""`bioscan mend`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite


def run(
    metadata: Path,
    /,
    *,
    step: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")],
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    images: Path | None = None,
    low_quality: Path | None = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Mend or drop what `check` lists, by named steps, and say how many rows each changed.

    - `fill_genus`: a missing genus becomes the first word of a binomial species.
    - `fill_holes`: missing ranks get the name that every other record of the taxon has.
    - `majority_parents`: of several parents in one order, that of more than half of a name's records.
    - `drop_placeholders`: interim genus and species names become missing.
    - `drop_duplicate_keys`: of rows with one sample id the first is kept.
    - `drop_missing_images`: rows without a picture in the package go (needs --images).
    - `drop_low_quality`: rows on the list go (needs --low-quality).

    No other cell changes.

    Args:
        metadata: Catalogue or TSV.
        step: Steps, done in the order given.
        output: New catalogue, with the steps recorded in its footer.
        images: Package of images.
        low_quality: List of sample ids of poor images (.txt, .csv, .tsv or .xlsx).
    """
    from bioscan.jobs.check import mend

    result = mend(metadata, output, steps=step, images=images, low_quality=low_quality, overwrite=overwrite)
    if json:
        out.show(out.to_json(result))
        return 0
    out.show(out.table(result["changed"].items(), ["step", "rows changed"]))
    out.show(f"{result['rows']:,} of {result['rows_before']:,} rows: {output}")
    return 0
