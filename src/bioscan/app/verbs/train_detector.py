"""`bioscan train-detector`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite, SettingsFile, flags_of
from bioscan.config import layered
from bioscan.errors import RequestError, unknown
from bioscan.learn.detector_settings import RECIPES, DetectorSettings

Flags = flags_of(DetectorSettings)


def run(
    boxes: Path,
    images: Path,
    /,
    *more: Path,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    validation: Path | None = None,
    validation_images: Path | None = None,
    recipe: str = "default",
    config: SettingsFile = None,
    settings: Annotated[Flags | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    resume: Annotated[bool, Parameter(negative="")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Train a detector on photographs with known boxes; those without a box are its negatives.

    Settings come from the recipe, then the TOML file, then the flags. The run folder gets history.csv,
    TensorBoard curves and, after every epoch, a checkpoint; after a kill --resume goes on from it and, on a
    CPU, ends with the same detector.

    Args:
        boxes: COCO file, or another table of boxes as `bioscan crop` writes it.
        images: Package of the photographs: folder, ZIP, HDF5 …
        more: Further boxes and images, in pairs.
        output: Run folder; the detector will be in OUTPUT/model, for `bioscan crop --detector`.
        validation: Boxes to choose the epoch and the thresholds by; taken out of the training ones. Without
            it: VALIDATION_SHARE of each set.
        validation_images: Package of their photographs, where it is none of the training ones.
        recipe: default, or paper: DETR-R50 with the settings of the paper's crop tool. Its weights come from
            the internet; --weights FOLDER, of facebook/detr-resnet-50, takes their place.
        resume: Go on with an interrupted run in the run folder.
    """
    if recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    if len(more) % 2:
        raise RequestError(f"boxes and images come in pairs; {more[-1]} has no partner")
    if validation_images is not None and validation is None:
        raise RequestError("--validation-images goes with --validation")
    chosen = layered(
        DetectorSettings, recipe=RECIPES[recipe], file=config, table="train-detector", flags=settings
    )
    from bioscan.jobs.train_detector import train_detector

    with out.progress("training", "pictures") as progress:
        result = train_detector(
            [(boxes, images), *zip(more[::2], more[1::2], strict=True)],
            output,
            chosen,
            validation=validation,
            validation_images=validation_images,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    failed = result["failed"]
    if failed:
        first = f"{failed[0]['image_file']}: {failed[0]['error']}"
        out.say(f"{len(failed):,} pictures could not be used (first: {first}); see {output / 'failed.csv'}")
    if json:
        out.show(out.to_json(result))
        return 1 if failed else 0
    for known in result["sets"]:
        out.show(f"{known['boxes']}: {known['pictures']:,} training pictures, {known['empty']:,} empty")
    out.show(f"validation: {result['validation']:,} pictures, {result['empty_validation']:,} empty")
    out.show(f"kept epoch {result['best_epoch']} of {result['epochs']} (by {chosen.criterion})")
    scores = {k: v for k, v in result["validation_scores"].items() if v is not None}
    out.show("\n".join(f"validation {name}: {value:.4f}" for name, value in scores.items()))
    limits = result["thresholds"]
    many = "never" if limits["many_from"] is None else f"second score from {limits['many_from']:.3f}"
    out.show(f"none: best score below {limits['none_below']:.3f}; many: {many}")
    out.show(f"detector: {result['model']}")
    return 1 if failed else 0
