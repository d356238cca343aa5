"""`bioscan train`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

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
    inexact: Annotated[bool, Parameter(negative="")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Train a classifier on a catalogue and its images.

    Settings come from the recipe, then the TOML file, then the flags. The run folder gets history.csv,
    TensorBoard curves and, after every epoch, a checkpoint; after a kill --resume goes on from it and ends
    with the same model.

    Several processes, each with a GPU or some cores, share every batch:
    `torchrun --nproc-per-node 4 -m bioscan train ...`, or `srun bioscan train ...` in a SLURM job.

    Args:
        catalogue: Catalogue or TSV with the experiment's split column.
        images: Package of images: folder, part folders, ZIP or HDF5.
        output: Run folder; the model will be in OUTPUT/model.
        recipe: default, or paper: every setting of the paper's program. Its pretrained weights come from
            the internet; --weights none, or a file, takes their place.
        resume: Go on with an interrupted run in the run folder.
        inexact: Resume also with other numbers of processes or threads, or on another device: the model is
            then as good, but not the same to the last bit.
    """
    if recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    chosen = layered(TrainSettings, recipe=RECIPES[recipe], file=config, table="train", flags=settings)
    from bioscan.jobs.train import train
    from bioscan.learn.distributed import ToldElsewhere, is_first

    speaks = is_first()
    with out.progress("training", "specimens") if speaks else nullcontext() as progress:
        try:
            result = train(
                catalogue,
                images,
                output,
                chosen,
                resume=resume,
                inexact=inexact,
                overwrite=overwrite,
                progress=progress,
                tell=out.say,
            )
        except ToldElsewhere:
            return 2
    if speaks:
        out.show(out.to_json(result) if json else _in_words(result, chosen))
    failed = result["failed"]
    if failed and speaks:
        first = f"{failed[0]['image_file']}: {failed[0]['error']}"
        out.say(f"{len(failed):,} images could not be read (first: {first}); see {output / 'failed.csv'}")
    return 1 if failed else 0


def _in_words(result: dict[str, Any], settings: TrainSettings) -> str:
    ranks = result["ranks"]
    at_ranks = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks)}"
    lines = [
        f"{settings.model}, {result['classes']} taxa at {at_ranks}: "
        f"{result['training']:,} training, {result['validation']:,} validation specimens"
    ]
    if result["coarse"]:
        lines.append(f"{result['coarse']:,} of the training specimens are named to a higher taxon only")
    if result["lifted"]:
        lines.append(f"{result['lifted']:,} specimens of taxa without training specimens count higher up")
    lines += [f"left out: {count:,} with {reason}" for reason, count in result["left_out"].items()]
    lines.append(f"kept epoch {result['best_epoch']} of {result['epochs']} (by {settings.criterion})")
    if result["calibration"]:
        lines.append(
            f"kept from that for thresholds and sets: {result['calibration']:,} validation specimens"
        )
    scores = result["validation_scores"].items()
    lines += [f"validation {name}: {value:.4f}" for name, value in scores if value is not None]
    if result["temperature"] is not None:
        lines.append(f"temperature {result['temperature']:.3f} (bioscan predict applies it)")
    return "\n".join([*lines, f"model: {result['model']}"])
