"""`bioscan rebalance`."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.failures import end_with_failures
from bioscan.app.flags import Failures, Json, Overwrite, Seed


def run(
    model: Path,
    catalogue: Path,
    images: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    method: Literal["crt", "tau_norm"] = "crt",
    tau: float | None = None,
    epochs: int = 10,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
    device: str = "auto",
    threads: int | None = None,
    seed: Seed = 1,
    failures: Failures = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Make the head of a trained model fair to rare taxa; the backbone stays as it is.

    `crt` trains the head again on frozen features with class-balanced sampling; `tau_norm` only rescales its
    weights. Both raise macro accuracy, and may cost some micro accuracy: both are told, on the validation
    specimens, before and after. `bioscan predict --tau` is the third way, without a new model.

    Args:
        model: Model folder, or the run folder that holds it.
        catalogue: Catalogue or TSV that the model was trained on.
        images: Package of its images.
        output: New model folder.
        method: Classifier re-training, or tau-normalisation.
        tau: Of tau_norm, 0 to 1 [default: the best by macro top-1 on the validation specimens].
        epochs: Of crt.
        lr: Highest learning rate of crt.
        weight_decay: Of crt.
        batch_size: Photographs at a time.
        device: auto, cpu, cuda or mps.
        threads: torch threads [default: all cores].
    """
    from bioscan.jobs.rebalance import rebalance

    with out.progress("reading", "photographs") as progress:
        result = rebalance(
            model,
            catalogue,
            images,
            output,
            method=method,
            tau=tau,
            epochs=epochs,
            lr=lr,
            weight_decay=weight_decay,
            batch_size=batch_size,
            device=device,
            threads=threads,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
    if json:
        out.show(out.to_json(result))
    else:
        how = f"tau {result['tau']}" if method == "tau_norm" else f"{result['training']:,} training specimens"
        out.show(f"{method}: {how}; {result['validation']:,} validation specimens")
        rows = [
            [name, result["before"][name], result["after"][name]] for name in ("micro_top_1", "macro_top_1")
        ]
        out.show(out.table(rows, ("validation", "before", "after")))
        if result["after"]["macro_top_1"] < result["before"]["macro_top_1"]:
            out.say("macro top-1 fell: the model as it was is the better one, also for rare taxa")
        out.show(f"model: {result['model']}")
    return end_with_failures(
        result["failures"], result["training"] + result["validation"] + result["failed"], failures
    )
