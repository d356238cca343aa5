"""`bioscan check`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite

if TYPE_CHECKING:
    from bioscan.jobs.check import Checked

MEANINGS = {
    "duplicate_keys": (
        "Sample ids, process ids and image files that occur more than once.",
        "`bioscan mend --step drop_duplicate_keys` keeps the first row of each sample id.",
    ),
    "parent_conflicts": (
        "Names with several parents within one order.",
        "`bioscan mend --step majority_parents` takes the parent of more than half of a name's records.",
    ),
    "homonyms": (
        "One name for several taxa: under different orders, or at two ranks.",
        "No error: a taxon is its path. A rank in front of the name (order:NAME) says which is meant.",
    ),
    "holes": (
        "Ranks without a name although a deeper rank has one.",
        "`bioscan mend --step fill_holes` fills those on which the taxon's other records agree.",
    ),
    "species_without_genus": (
        "Species whose genus is missing or is another word than their first.",
        "`bioscan mend --step fill_genus` takes the first word of a binomial where the genus is missing.",
    ),
    "placeholder_names": (
        "Interim genus and species names: digits, «sp.», a second capital.",
        "`bioscan mend --step drop_placeholders` makes them missing; the rows stay.",
    ),
    "duplicate_barcodes": (
        "Specimens that share their barcode, as given, with another.",
        "No error: siblings do. A test set that shares barcodes with the training set is an easy one.",
    ),
    "shared_barcodes": (
        "Barcodes of several specimens that differ in BIN, order or family.",
        "Look at these specimens: a wrong name, or a mix-up in the laboratory.",
    ),
    "bins_across_taxa": (
        "BINs whose specimens differ in order or family.",
        "Look at these specimens: a wrong name, or a mix-up in the laboratory.",
    ),
    "odd_identifiers": (
        "Sample ids without plate and well, and BINs of an odd form.",
        "No error: such specimens have no plate.",
    ),
    "images": (
        "Pictures that rows name and the package has not, and the reverse.",
        "`bioscan mend --step drop_missing_images --images PACKAGE` drops rows without a picture.",
    ),
    "low_quality": (
        "Specimens on the list of low-quality images.",
        "`bioscan mend --step drop_low_quality --low-quality LIST` drops them.",
    ),
}
"""Check -> what it looks for, and what to do about it."""


def run(
    metadata: Path,
    /,
    *,
    images: Path | None = None,
    low_quality: Path | None = None,
    only: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    limit: int = 5,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """List what is wrong or odd in metadata: taxonomy, keys, barcodes, pictures. Nothing is changed.

    `bioscan mend` changes what you ask it to. The exit status is 0 whatever is found.

    Args:
        metadata: Catalogue or TSV.
        images: Package of images, to find missing and surplus pictures.
        low_quality: List of sample ids of poor images (.txt, .csv, .tsv or .xlsx), as published.
        only: Only these checks.
        limit: Findings shown of each check; all go to the output file and to JSON.
        output: CSV of every finding.
    """
    from bioscan.errors import RequestError
    from bioscan.files import refuse_existing
    from bioscan.jobs.check import check

    if limit < 0:
        raise RequestError(f"--limit is {limit}; 0 or more is needed")
    if output:
        refuse_existing(output, overwrite=overwrite)
    checked = check(metadata, images=images, low_quality=low_quality, checks=only or None)
    if output:
        out.write_text(output, checked.findings.write_csv(), overwrite=overwrite)
    if json:
        facts = {"rows": checked.rows, "looked": checked.looked, "no_data": checked.no_data}
        out.show(out.to_json({**facts, "findings": checked.findings.to_dicts()}))
    else:
        out.show(as_text(checked, limit))
    return 0


def as_text(checked: "Checked", limit: int) -> str:
    """Findings grouped by check, with what they mean and what to do; then what was in order."""
    blocks = [f"{checked.rows:,} records"]
    found = checked.findings.partition_by("check", as_dict=True, maintain_order=True)
    for (name,), group in found.items():
        meaning, advice = MEANINGS[name]
        count = f"{group.height:,} finding{'s' * (group.height > 1)}"
        lines = [f"{name}: {count}. {meaning}"]
        if limit:
            shown = group.head(limit).select("subject", "rows", "detail").rows()
            lines.append(out.table(shown, ["subject", "rows", "detail"], indent="  "))
        if group.height > limit:
            lines.append(f"  … and {group.height - limit:,} more")
        blocks.append("\n".join([*lines, f"  {advice}"]))
    for name, column in checked.no_data.items():
        blocks.append(f"{name}: nothing to look at, column {column} is absent or empty")
    fine = [n for n in checked.looked if (n,) not in found and n not in checked.no_data]
    if fine:
        blocks.append(f"nothing found: {', '.join(fine)}")
    return "\n\n".join(blocks)
