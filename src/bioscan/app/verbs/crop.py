"""`bioscan crop`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.failures import tell_failures, write_failures
from bioscan.app.flags import Address, Engine, Failures, Form, Json, Overwrite, crew, flags_of
from bioscan.config import layered
from bioscan.data.packages import package_name
from bioscan.data.preprocess import CropSettings, ResizeSettings
from bioscan.errors import RequestError
from bioscan.files import refuse_in_use

Flags = flags_of(CropSettings)

_NAMED = 5
"""Pictures without a specimen, and failures, that are told."""


def run(
    package: Path,
    crops: Path | None = None,
    /,
    *,
    detector: str = "classical",
    threshold: float | None = None,
    boxes: Path | None = None,
    boxes_only: Annotated[bool, Parameter(negative="")] = False,
    boxes_out: Path | None = None,
    settings: Annotated[Flags | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    resize: int | None = None,
    fix: Literal["shorter", "height"] | None = None,
    enlarge: Annotated[bool, Parameter(negative="")] = False,
    quality: int = 75,
    subsampling: Literal["420", "422", "444", "gray"] = "420",
    many: Literal["best", "all", "skip"] = "best",
    none: Literal["skip", "whole"] = "skip",
    mm_per_px: float | None = None,
    scale: Path | None = None,
    sheet: Path | None = None,
    doubtful: int = 40,
    form: Form = None,
    device: str = "auto",
    engine: Engine = "local",
    address: Address = None,
    workers: int | None = None,
    failures: Failures = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Find the insect on each photograph and cut it out; boxes and lengths go to a table.

    The classical detector needs no network and no training. A picture without an insect is a finding, not a
    failure: a row of the table, and no crop. Run again after an interruption, the same command goes on where
    it was. The paper's crops: the default margin; its small package: --resize 256 --fix height --enlarge too.

    Args:
        package: Photographs: folder, part folders, ZIP, TAR, HDF5 or Parquet.
        crops: New package of crops, by its ending .zip, .hdf5, .tar or .parquet, else a folder.
        detector: classical, a folder of `bioscan train-detector`, or the .ckpt of the paper's crop tool.
        threshold: Score below which a learned detector's picture has no insect [default: its own].
        boxes: Cut out the boxes of this table (.parquet, .csv, .json COCO, .tsv BIOSCAN-5M) instead of
            looking for them. Boxes told of another size of the picture are scaled.
        boxes_only: Make the table alone; CROPS is not given.
        boxes_out: Box table, by its ending as --boxes [default: CROPS.boxes.parquet].
        resize: Pixels of the crop's side that --fix names [default: as cut].
        fix: With --resize: shorter or height, as in `bioscan resize` [default: shorter].
        enlarge: With --resize, enlarge smaller crops too, as the paper's program does.
        quality: Of JPEGs, 1 to 100 as libjpeg counts.
        subsampling: Chroma of JPEGs: 420, 422, 444, or gray for none.
        many: Where several insects are: crop the best, all (further ones as NAME.2.jpg), or skip.
        none: Where no insect is: skip, or the whole picture.
        mm_per_px: Millimetres a pixel of the photographs, for lengths in millimetres.
        scale: The same by picture: a table (.tsv, .csv, .parquet) with image_file and mm_per_px.
        sheet: PNG of doubtful crops, for a person to check.
        doubtful: Pictures on the sheet.
        device: Of a learned detector: auto, cpu, cuda or mps.
        workers: Processes [default: one per core; for a learned detector one].
    """
    table = _table(crops, boxes_only, boxes_out)
    if sheet and sheet.suffix.lower() != ".png":
        raise RequestError(f"--sheet is {sheet}; its name must end in .png")
    if resize is None and (fix or enlarge):
        raise RequestError(f"--{'fix' if fix else 'enlarge'} is about the size of crops; add --resize")
    if mm_per_px is not None and scale is not None:
        raise RequestError("--mm-per-px and --scale say the same thing; give one of the two")
    if doubtful < 1:
        raise RequestError(f"--doubtful is {doubtful}; 1 or more is needed")
    chosen = layered(CropSettings, flags=settings)
    given = {"shorter_side": resize, "fix": fix or "shorter", "quality": quality, "subsampling": subsampling}
    output = layered(ResizeSettings, flags={**given, "enlarge": enlarge})
    from bioscan.data.images import Images
    from bioscan.jobs.crop import CropResult, crop
    from bioscan.jobs.crop import doubtful as find_doubtful

    images = Images(package)

    def finish(made: CropResult) -> None:
        write_failures(failures, made.failed)
        if sheet:
            from bioscan.app.box_sheet import write_doubtful_sheet

            write_doubtful_sheet(
                sheet, images, find_doubtful(made.boxes, doubtful), made.boxes, overwrite=True
            )

    with out.progress("cropping", "pictures") as progress:
        made = crop(
            images,
            crops,
            detector=detector,
            threshold=threshold,
            boxes=boxes,
            settings=chosen,
            resize=resize is not None,
            output=output,
            many=many,
            none=none,
            mm_per_px=mm_per_px if scale is None else scale,
            boxes_out=table,
            form=form,
            device=device,
            engine=engine,
            address=address,
            workers=crew(workers, engine) if detector == "classical" or boxes else workers,
            overwrite=overwrite,
            progress=progress,
            finish=finish,
            outputs=[*filter(None, (sheet, failures))],
        )
    facts = made.to_dict()
    if json:
        out.show(out.to_json({"crops": made.target, "boxes": table, "sheet": sheet} | facts))
    else:
        out.show(_text(facts, crops, table, sheet))
    return tell_failures(made.failed, made.pictures, failures)


def _table(crops: Path | None, boxes_only: bool, boxes_out: Path | None) -> Path:
    """Where the box table goes."""
    if boxes_only and crops:
        raise RequestError("--boxes-only makes no crops; name the table alone: --boxes-out")
    if boxes_only and not boxes_out:
        raise RequestError("--boxes-only needs --boxes-out, the table to make")
    if boxes_out and (boxes_only or crops):
        return boxes_out
    if crops is None:
        raise RequestError("where do the crops go? Name a package, or pass --boxes-only")
    refuse_in_use(crops)
    return crops.with_name(f"{package_name(crops)}.boxes.parquet")


def _text(facts: dict[str, Any], crops: Path | None, table: Path, sheet: Path | None) -> str:
    kinds = facts["kinds"]
    found = f"{kinds['one']:,} with one insect, {kinds['none']:,} none, {kinds['many']:,} many"
    lines = [f"{facts['pictures']:,} pictures: {found}"]
    if names := facts["without_specimen"]:
        more = ", …" if len(names) > _NAMED else ""
        lines.append(f"none: {', '.join(map(out.printable, names[:_NAMED]))}{more} (kind none in the table)")
    for unit, told in facts["lengths"].items():
        least, median, most = (f"{told[name]:,.4g}" for name in ("least", "median", "most"))
        lines.append(f"length: median {median} {unit}, {least} to {most}, {told['specimens']:,} insects")
    if facts["without_scale"]:
        lines.append(f"scale: none for {facts['without_scale']:,} of {facts['pictures']:,} pictures")
    if crops:
        made = (
            f"{crops}, {facts['cropped']:,} pictures" if facts["cropped"] else f"none; {crops} is not written"
        )
        lines.append(f"crops: {made}")
    lines.append(f"boxes: {table}")
    if sheet:
        lines.append(f"doubtful: {sheet}")
    return "\n".join(lines)
