"""`bioscan demo`."""

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.flags import Overwrite, Seed
from bioscan.data.synthesis import METADATA, PACKAGE
from bioscan.vocabulary import IMAGE_FOLDER


def run(
    folder: Path = Path("demo"),
    /,
    *,
    specimens: int = 2000,
    epochs: int = 20,
    seed: Seed = 1,
    threads: Annotated[int | None, Parameter(help="torch threads [default: all cores].")] = None,
    overwrite: Overwrite = False,
) -> int:
    """Run the whole pipeline on a small artificial dataset: each step is printed as the command that does it.

    Metadata and pictures are made, imported, checked, counted and split; a small network is trained on the
    orders, names the validation and test specimens, and is evaluated; a report page shows it all.

    Args:
        folder: Where everything goes.
        specimens: Specimens to make.
        epochs: Epochs of training.
    """
    from bioscan.app import cli

    steps = commands(folder, specimens=specimens, epochs=epochs, seed=seed, threads=threads)
    for number, (title, arguments) in enumerate(steps, 1):
        if overwrite and arguments[0] != "check":
            arguments.append("--overwrite")
        out.show(f"\n{number}/{len(steps)}  {title}\n$ bioscan {shlex.join(arguments)}\n")
        status = cli.run(arguments)
        if status not in (0, 1):
            return status
    out.show(f"\nThe report is {folder / 'report.html'}: open it in a browser.")
    return 0


def commands(
    folder: Path, *, specimens: int, epochs: int, seed: int, threads: int | None
) -> list[tuple[str, list[str]]]:
    """What each step does, and its command line."""
    data, catalogue, roles = folder / "data", folder / "catalogue.parquet", folder / "split.parquet"
    package, model, predictions = (
        data / IMAGE_FOLDER / PACKAGE,
        folder / "run",
        folder / "predictions.parquet",
    )
    small, medium = round(0.4 * specimens), round(0.7 * specimens)
    few_threads = [] if threads is None else ["--threads", threads]
    network = "--rank order --model test_resnet --image-size 72 --crop-size 64 --batch-size 32 --lr 3e-3"
    steps: dict[str, list[object]] = {
        "an artificial dataset": ["synthesize", data, "--specimens", specimens, "--seed", seed],
        "its metadata as a catalogue": ["import", data / METADATA, catalogue],
        "what is odd in it": ["check", catalogue, "--images", package, "--limit", 2],
        "statistics": ["summary", catalogue, "--images", package, "--figures", folder / "figures"],
        "train, validation and test roles by the paper's rule": [
            *("split", catalogue, "-o", roles, "--seed", seed, "--medium", medium, "--small", small)
        ],
        "a classifier of orders": [
            *("train", roles, package, "-o", model, *network.split(), "--epochs", epochs),
            *("--seed", seed, *few_threads),
        ],
        "names for the validation and test specimens": [
            *("predict", model, roles, "--images", package, "-o", predictions, *few_threads)
        ],
        "scores": ["evaluate", predictions, roles, "-o", folder / "evaluation.json"],
        "a report": [
            *("report", predictions, roles, "--run", model, "--images", package),
            *("-o", folder / "report.html"),
        ],
    }
    return [(title, [str(a) for a in arguments]) for title, arguments in steps.items()]
