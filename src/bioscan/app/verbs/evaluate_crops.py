"""`bioscan evaluate-crops`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite, Seed
from bioscan.app.scores import interval
from bioscan.errors import RequestError
from bioscan.files import refuse_existing

if TYPE_CHECKING:
    from bioscan.analysis.boxes import BoxEvaluation
    from bioscan.jobs.evaluate_crops import CropEvaluation

SHOWN = ("ap", "ap_50", "ap_75", "ar", "mean_iou", "median_iou", "share_50", "share_75")
"""Measures of a group's line; two more, of its empty and missed pictures, follow."""


def run(
    boxes: Path,
    truth: Path,
    /,
    *,
    by: str | None = None,
    groups: Path | None = None,
    common: Annotated[bool, Parameter(negative="")] = False,
    max_boxes: int = 1,
    resamples: int = 1000,
    seed: Seed = 1,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    csv: Path | None = None,
    sheet: Path | None = None,
    images: Path | None = None,
    worst: int = 20,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Score boxes against a person's, as COCO does (equal to pycocotools). Reads no picture, but for --sheet.

    Boxes are those of `bioscan crop`, a COCO dataset or result list, or the box table of BIOSCAN-5M; they are
    joined by file name. An image without an annotation is an empty picture. One box a picture counts, as in
    COCO's AR@1, unless --max-boxes says more: COCO's own AP takes 100. Intervals are at 95 %: Wilson for
    shares of pictures, bootstrap of pictures for the rest.

    Args:
        boxes: Predicted boxes: .parquet, .csv, .json (COCO) or .tsv (BIOSCAN-5M).
        truth: True boxes, in the same forms; usually COCO annotations.
        by: Column of --groups: each of its values is scored on its own too.
        groups: Table (.tsv, .csv, .parquet) with image_file and that column.
        common: Leave out pictures that the boxes do not mention [default: they count as without a box].
        max_boxes: Boxes of a picture that count, best score first.
        resamples: Of the bootstrap; 0 saves the time.
        output: JSON file.
        csv: CSV file with a row for each picture, its overlap among them.
        sheet: PNG of the worst pictures, both boxes drawn; needs --images.
        images: Package of the pictures.
        worst: Pictures on the sheet.
    """
    from bioscan.jobs.evaluate_crops import evaluate_crops

    for target in filter(None, (output, csv, sheet)):
        refuse_existing(target, overwrite=overwrite)
    if (sheet is None) != (images is None):
        raise RequestError("--sheet and --images go together")
    if worst < 1:
        raise RequestError(f"--worst is {worst}; 1 or more is needed")
    found = evaluate_crops(
        boxes,
        truth,
        groups=groups,
        by=by,
        common=common,
        max_boxes=max_boxes,
        resamples=resamples,
        seed=seed,
    )
    as_json = out.to_json(found.to_dict())
    if output:
        out.write_text(output, as_json + "\n", overwrite=overwrite)
    if csv:
        out.write_text(csv, found.pictures.write_csv(), overwrite=overwrite)
    if sheet and images:
        from bioscan.app.box_sheet import write_worst_sheet

        write_worst_sheet(sheet, images, found.worst(worst), overwrite=overwrite)
    out.show(as_json if json else text(found))
    return 0


def text(found: "CropEvaluation") -> str:
    """The evaluation for eyes."""
    from bioscan.analysis.boxes import MEANINGS
    from bioscan.jobs.evaluate_crops import COUNTS

    overall = found.overall
    limit = "one box a picture" if overall.max_boxes == 1 else f"up to {overall.max_boxes} boxes a picture"
    parts = [
        f"{overall.pictures:,} pictures, {overall.empty:,} of them empty; {overall.true_boxes:,} true and "
        f"{overall.predicted_boxes:,} predicted boxes, {limit}"
    ]
    parts += [
        f"{found.counts[name]:,} {meaning}" for name, meaning in COUNTS.items() if found.counts.get(name)
    ]
    rows = [
        [name, measure.value, interval(measure.low, measure.high), measure.n, MEANINGS[name]]
        for name, measure in overall.measures.items()
    ]
    parts += ["", out.table(rows, ["measure", "value", "95 %", "n", "what it says"])]
    if found.groups:
        parts += ["", out.table([_line(name, group) for name, group in found.groups.items()], _header(found))]
    return "\n".join(parts)


def _header(found: "CropEvaluation") -> list[str]:
    return [str(found.by), "pictures", "empty", *SHOWN, "false_none", "false_box"]


def _line(name: str, group: "BoxEvaluation") -> list[object]:
    values = [group.measures[m].value for m in (*SHOWN, "false_none", "false_box")]
    return [name, group.pictures, group.empty, *values]
