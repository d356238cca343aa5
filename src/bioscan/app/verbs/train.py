"""`bioscan train`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite, SettingsFile, flags_of
from bioscan.config import layered
from bioscan.errors import unknown
from bioscan.learn.settings import RECIPES, TrainSettings

Flags = flags_of(TrainSettings)


def run(
    catalogue: Path,
    images: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    recipe: str = "default",
    config: SettingsFile = None,
    settings: Annotated[Flags | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    resume: Annotated[bool, Parameter(negative="")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Train a classifier on a catalogue and its images.

    Settings come from the recipe, then the TOML file, then the flags. The run folder gets history.csv,
    TensorBoard curves and, after every epoch, a checkpoint; after a kill --resume goes on from it and ends
    with the same model.

    Args:
        catalogue: Catalogue or TSV with the experiment's split column.
        images: Package of images: folder, part folders, ZIP or HDF5.
        output: Run folder; the model will be in OUTPUT/model.
        recipe: default, or paper: every setting of the paper's program. Its pretrained weights come from
            the internet; --weights none, or a file, takes their place.
        resume: Go on with an interrupted run in the run folder.
    """
    if recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    chosen = layered(TrainSettings, recipe=RECIPES[recipe], file=config, table="train", flags=settings)
    from bioscan.jobs.train import train

    with out.progress("training", "specimens") as progress:
        result = train(
            catalogue, images, output, chosen, resume=resume, overwrite=overwrite, progress=progress
        )
    if json:
        out.show(out.to_json(result))
    else:
        scores = {k: v for k, v in result["validation_scores"].items() if v is not None}
        out.show(
            f"{chosen.model}, {result['classes']} taxa at rank {result['rank']}: "
            f"{result['training']:,} training, {result['validation']:,} validation specimens"
        )
        for reason, count in result["left_out"].items():
            out.show(f"left out: {count:,} with {reason}")
        out.show(f"kept epoch {result['best_epoch']} of {result['epochs']} (by {chosen.criterion})")
        out.show("\n".join(f"validation {name}: {value:.4f}" for name, value in scores.items()))
        out.show(f"model: {result['model']}")
    failed = result["failed"]
    if failed:
        first = f"{failed[0]['image_file']}: {failed[0]['error']}"
        out.say(f"{len(failed):,} images could not be read (first: {first}); see {output / 'failed.csv'}")
    return 1 if failed else 0
