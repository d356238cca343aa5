"""`bioscan split`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite, Seed
from bioscan.vocabulary import ROLES


def run(
    metadata: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    seed: Seed = 1,
    experiment: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    families: int = 40,
    medium: int = 200_000,
    small: int = 50_000,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Make the six experiments' train, validation and test roles by the paper's rule.

    Large order and Diptera-family splits are 70/10/20 % per class; medium and small ones are drawn from them
    with the big classes cut at an equal number. The input is never changed. An experiment that the data
    cannot fill is left out, with both numbers; one that was named is an error.

    Args:
        metadata: Catalogue or TSV.
        output: New catalogue (.parquet), or a .tsv, .csv or .jsonld file.
        experiment: Only these experiments.
        families: How many Diptera families take part, the most populous.
        medium: Specimens of the medium experiments, all roles together.
        small: Specimens of the small experiments.
    """
    from bioscan.jobs.split import split

    result = split(
        metadata,
        output,
        seed=seed,
        experiments=experiment or None,
        families=families,
        medium=medium,
        small=small,
        overwrite=overwrite,
    )
    if json:
        out.show(out.to_json(result))
        return 0
    rows = [
        [name, made["classes"], *(made["specimens"][role] for role in ROLES), made["hash"][:16]]
        for name, made in result["experiments"].items()
    ]
    out.show(out.table(rows, ["experiment", "classes", *ROLES, "hash"]))
    for name, reason in result["skipped"].items():
        out.show(f"{name}: not made, {reason}")
    if result["kept"]:
        out.show(f"columns kept as they were: {', '.join(result['kept'])}")
    out.show(f"rule {result['rule']}, seed {seed}; roles in {output}")
    return 0
