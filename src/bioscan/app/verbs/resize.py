"""`bioscan resize`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.failures import tell_failures, write_failures
from bioscan.app.flags import Address, Engine, Failures, Form, Json, Overwrite, Workers, crew, flags_of
from bioscan.config import layered
from bioscan.data.preprocess import ResizeSettings

Flags = flags_of(ResizeSettings)


def run(
    source: Path,
    target: Path,
    /,
    *,
    settings: Annotated[Flags | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    form: Form = None,
    engine: Engine = "local",
    address: Address = None,
    workers: Workers = None,
    failures: Failures = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Make a package of the same photographs at another size, upright by EXIF.

    Names are kept: the catalogue finds each image in the new package as in the old one. What comes out are
    JPEGs without EXIF and colour profile, but PNGs where the name says so. Smaller images keep their size
    unless --enlarge; a JPEG that needs no change is copied byte for byte. An image that cannot be read is
    listed, not written; the exit status is then 1. Run again after an interruption, the same command goes on
    where it was.

    Args:
        source: Folder, part folders, ZIP, TAR (WebDataset), HDF5 or Parquet; many archives as a folder of
            them or a quoted pattern.
        target: New package, by its ending .zip, .hdf5, .tar or .parquet, else a folder.
    """
    from bioscan.jobs.resize import resize

    chosen = layered(ResizeSettings, flags=settings)
    with out.progress("resizing", "images") as progress:
        made = resize(
            source,
            target,
            chosen,
            form=form,
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
        out.say(f"no image could be resized: {target} is not written")
    else:
        out.show(f"{bulk.images:,} of {total:,} images, {bulk.bytes:,} bytes: {target} ({bulk.form})")
        out.show(", ".join(f"{count:,} {how}" for how, count in made.counts.items() if count))
        if made.parts_lost:
            out.show("parts: not kept, HDF5 packages have none")
    if not made.odd_names.is_empty():
        out.say(
            f"JPEGs now, under the names of other kinds of files: {made.odd_names.len():,} "
            f"(first: {out.printable(made.odd_names[0])})"
        )
    return tell_failures(bulk.failed, total, failures)
