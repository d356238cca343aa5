"""`bioscan convert`."""

from pathlib import Path

from bioscan.app import output as out
from bioscan.app.failures import tell_failures, write_failures
from bioscan.app.flags import Address, Engine, Failures, Form, Json, Overwrite, Workers, crew


def run(
    source: Path,
    target: Path,
    /,
    *,
    form: Form = None,
    raw: str = "png",
    quality: int | None = None,
    engine: Engine = "local",
    address: Address = None,
    workers: Workers = None,
    failures: Failures = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Put the images of a package, byte for byte, into a new package of another form.

    Images that are stored as arrays of pixels are encoded, and counted. An image that cannot be read, whose
    name leads out of the package or that has the name of one before it is listed, not written; the exit
    status is then 1. Run again after an interruption, the same command goes on where it was.

    Args:
        source: Folder, part folders, ZIP, TAR (WebDataset), HDF5 or Parquet; many archives as a folder of
            them or a quoted pattern.
        target: New package, by its ending .zip, .hdf5, .tar or .parquet, else a folder.
        raw: Arrays of pixels become png or jpeg.
        quality: Of the JPEGs made of arrays, as libjpeg counts [default: 95].
    """
    from bioscan.jobs.convert import convert

    with out.progress("converting", "images") as progress:
        made = convert(
            source,
            target,
            form=form,
            raw=raw,
            quality=quality,
            engine=engine,
            address=address,
            workers=crew(workers, engine),
            overwrite=overwrite,
            progress=progress,
            finish=lambda bulk: write_failures(failures, bulk.failed),
            outputs=[failures] if failures else [],
        )
    bulk = made.bulk
    total = bulk.images + bulk.failed.height
    if json:
        out.show(out.to_json({"source": source, **made.to_dict()}))
    elif bulk.target is None:
        out.say(f"no image could be converted: {target} is not written")
    else:
        out.show(f"{bulk.images:,} of {total:,} images, {bulk.bytes:,} bytes: {target} ({bulk.form})")
        if made.encoded:
            how = "PNG" if raw == "png" else "JPEG"
            out.show(
                f"encoded: {made.encoded:,} arrays of pixels as {how}; "
                f"{made.renamed:,} names got another ending"
            )
        if made.parts_lost:
            out.show("parts: not kept, HDF5 packages have none")
    return tell_failures(bulk.failed, total, failures)
