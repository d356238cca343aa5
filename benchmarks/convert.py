"""Conversion: images/s from form to form, against reading the same bytes and writing them to one file."""

import os
import resource
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.images import make_folder, make_zip
from benchmarks.measure import interleaved, peak_mb
from bioscan.data.images import Images
from bioscan.jobs.convert import convert

CONVERTED: Final = {"small": 5_000, "full": 100_000}
IMAGE_BYTES: Final = 23_400
"""Mean of the published original_256 package."""
ROUNDS: Final = 3


def converted(source: Path, target: Path, form: str | None, workers: int) -> None:
    """One conversion into nothing, with the index that is there."""
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    made = convert(source, target, form=form, workers=workers)
    assert made.bulk.failed.is_empty()


def copied(source: Path, target: Path) -> None:
    """The floor: read each image by its place, write all to one file, wait for the disk."""
    images = Images(source)
    with target.open("wb", buffering=1 << 20) as file:
        handles: dict[Path, int] = {}
        for row, (offset, length) in enumerate(images.index.select("offset", "length").iter_rows()):
            path = images.file(row)
            if length is None:  # a file of a folder
                handle = os.open(path, os.O_RDONLY)
                file.write(os.pread(handle, os.fstat(handle).st_size, 0))
                os.close(handle)
            else:
                handle = handles.setdefault(path, -1)
                if handle < 0:
                    handle = handles[path] = os.open(path, os.O_RDONLY)
                file.write(os.pread(handle, length, offset))
        file.flush()
        os.fsync(file.fileno())
        for handle in handles.values():
            os.close(handle)


def memory_mb(source: Path, target: Path, form: str | None, workers: int) -> float:
    """Peak memory of the process and of its largest worker together."""
    alone = peak_mb(_noting_workers, source, target, form, workers)
    note = target.with_suffix(".note")
    alone += float(note.read_text())
    note.unlink()
    return alone


def _noting_workers(source: Path, target: Path, form: str | None, workers: int) -> None:
    converted(source, target, form, workers)
    most_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss if workers > 1 else 0
    target.with_suffix(".note").write_text(str(most_kb / 1024))


def run(size: str, work: Path) -> list[dict[str, Any]]:
    """From folder to ZIP, from ZIP to HDF5 and to WebDataset shards, with one and with two processes."""
    count = CONVERTED[size]
    folder = make_folder(work / f"convert_{count}", count, IMAGE_BYTES)
    archive = make_zip(work / f"convert_{count}.zip", count, IMAGE_BYTES)
    for source in (folder, archive):
        Images(source)  # saves the index, which is measured elsewhere
    rows = []
    for what, source, name, form in (
        ("folder to ZIP", folder, "made.zip", None),
        ("ZIP to HDF5", archive, "made.hdf5", None),
        ("ZIP to WebDataset", archive, "made", "webdataset"),
    ):
        target = work / name
        one, two, least = interleaved(
            partial(converted, source, target, form, 1),
            partial(converted, source, target, form, 2),
            partial(copied, source, work / "floor"),
            rounds=ROUNDS,
        )
        for workers, taken in ((1, one), (2, two)):
            rows.append(
                {
                    "work": f"{what}, {workers} process{'es' * (workers > 1)} "
                    "(floor: pread of each, one file written and synced)",
                    "size": f"{count:,} images of {IMAGE_BYTES:,} bytes",
                    "value": count / taken,
                    "unit": "images/s",
                    "floor": count / least,
                    "ratio": least / taken,
                    "bound": None,
                    "peak_mb": memory_mb(source, target, form, workers),
                }
            )
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    (work / "floor").unlink()
    return rows
