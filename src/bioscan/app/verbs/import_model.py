"""`bioscan import-model`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite

_FEW = 8


def run(
    file: Path,
    /,
    *,
    classes: Annotated[str, Parameter(negative="")],
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    model: str | None = None,
    experiment: str | None = None,
    rank: str | None = None,
    normalise: bool = False,
    image_size: int = 256,
    crop_size: int = 224,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Make a model folder of a checkpoint: the paper's released ones, or any of a network that timm has.

    Names such as large_insect_order_vit_base_patch16_224_CE_s2_weights_best_acc.tar tell experiment, network,
    loss and seed; for other files pass --model and --rank. A checkpoint holds no names: the order of its
    classes must be right, or every answer is another taxon.

    Args:
        file: Checkpoint: torch (.tar, .pth, .bin) or safetensors, of torchvision's, timm's or transformers'
            layout. Reading it runs no code from it.
        classes: What its outputs are, in their order: a file with one name a line (or JSON); or a catalogue
            or TSV, from which classes are numbered as the paper's program does; or published, for the large
            experiments.
        output: New model folder, for bioscan predict.
        model: timm model name, or one of the paper's program.
        experiment: Experiment of the paper that it was trained on.
        rank: Rank of the classes [default: the experiment's].
        normalise: It was trained on images normalised with the backbone's mean and deviation; the paper's
            were not.
        image_size: Shorter side that images were resized to, pixels.
        crop_size: Side of the square that the network saw, pixels.
    """
    from bioscan.jobs.import_model import import_model

    result = import_model(
        file,
        output,
        classes=classes,
        model=model,
        experiment=experiment,
        rank=rank,
        normalise=normalise,
        image_size=image_size,
        crop_size=crop_size,
        overwrite=overwrite,
    )
    if json:
        out.show(out.to_json(result))
    else:
        names = result["classes"]
        more = f" … {names[-1]}" if len(names) > _FEW else ""
        entries = f"{result['filled']:,} entries of weights"
        out.show(f"{result['backbone']}, {len(names):,} taxa at rank {result['rank']}: {entries}")
        out.show(f"class order ({result['order']}): {', '.join(names[:_FEW])}{more}")
        if result["unused"]:
            out.show(f"not needed: {len(result['unused']):,} entries (first: {result['unused'][0]})")
        out.show(f"model: {result['model']}")
    if result["doubt"]:
        out.say(f"careful: {result['doubt']}")
    return 0
