"""`bioscan embed`."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.failures import end_with_failures
from bioscan.app.flags import Address, Engine, Failures, Json, Overwrite


def run(
    source: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    model: str,
    weights: str | None = None,
    images: Path | None = None,
    image_size: int | None = None,
    crop_size: int | None = None,
    precision: Literal["float16", "float32"] = "float16",
    amp: Literal["auto", "off", "bf16", "fp16"] = "off",
    batch_size: int = 64,
    device: str = "auto",
    threads: int | None = None,
    engine: Engine = "local",
    workers: int | None = None,
    address: Address = None,
    failures: Failures = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Features of photographs by a backbone, as Parquet: sampleid, image_file, embedding.

    Run again after an interruption, the same command goes on where it was. Photographs that cannot be read
    are left out and listed; the exit status is then 1.

    Args:
        source: Catalogue or TSV (with --images), or a package of photographs.
        output: File of embeddings, .parquet.
        model: Model folder, or the name of any timm backbone: resnet50, vit_small_patch14_dinov2,
            vit_base_patch16_clip_224 …
        weights: Of a named backbone: hub (pretrained, from the internet), or a local file or folder
            [default: hub].
        images: Package of the catalogue's images.
        image_size: Shorter side that photographs are resized to [default: as the weights have it].
        crop_size: Side of the central square [default: as the weights have it].
        precision: Of the stored numbers.
        amp: Mixed precision of the computation.
        batch_size: Photographs at a time.
        device: auto, cpu, cuda or mps.
        threads: torch threads [default: all cores].
        workers: Processes, each with a backbone of its own [default: one, with all cores; on Ray two per
            core].
    """
    from bioscan.jobs.embed import embed

    with out.progress("embedding", "photographs") as progress:
        result = embed(
            source,
            output,
            model=model,
            weights=weights,
            images=images,
            image_size=image_size,
            crop_size=crop_size,
            precision=precision,
            amp=amp,
            batch_size=batch_size,
            device=device,
            threads=threads,
            engine=engine,
            workers=workers,
            address=address,
            overwrite=overwrite,
            progress=progress,
        )
    if json:
        out.show(out.to_json(result))
    else:
        out.show(
            f"{result['embedded']:,} of {result['specimens']:,} photographs: {result['width']:,} features by "
            f"{result['backbone']}"
        )
        out.show(f"embeddings: {result['embeddings']}")
    return end_with_failures(result["failures"], result["specimens"], failures)
