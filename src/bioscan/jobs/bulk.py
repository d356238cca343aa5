"""Work on every image of a package, in shards: parallel, resumable, its failures listed.

Shards are consecutive images in storage order. What a shard makes depends on its images alone, never on time,
workers or machine, and the package is put together in the order of the shards: a job that was killed and
taken up again ends byte for byte like one that was not.
"""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.data.image_index import HIDDEN, IMAGE
from bioscan.data.images import Images
from bioscan.data.packages import (
    SPOOLED,
    Add,
    assemble,
    clashes,
    form_of,
    hdf5_attributes,
    is_folder,
    package_name,
    refusal,
    spooling,
)
from bioscan.errors import ImageError
from bioscan.files import behind_link, refuse_in_use, refuse_unwritable, remove, writing
from bioscan.jobs.work_folder import (
    WHOLE,
    WorkFolder,
    held,
    put,
    refuse_outputs,
    refuse_overlap,
    refuse_target,
    remove_work_folder,
    telling_of_a_full_disk,
)
from bioscan.parallel import map_shards
from bioscan.vocabulary import FOOTER

VERSION: Final = 1
"""Of the work folder and of what is made in it; a folder of another one is not taken up."""

SHARD_BYTES: Final = 64 << 20
_LEAST_IMAGES, _MOST_IMAGES = 16, 1000
_SHARDS: Final = 64
"""A package is cut into so many at least, if they have the least images then: work for each core."""


class Made(NamedTuple):
    """What was made of an image."""

    name: str
    """Under which it is put into the new package."""
    part: int | None
    data: bytes | None
    """The new image file; None: a row alone."""
    row: dict[str, Any]
    """Columns of `rows_schema`; missing ones are null."""


class Failed(NamedTuple):
    """An image of which nothing could be made."""

    name: str
    part: int | None
    place: str
    reason: str


Step = Callable[[Images], Iterable[Made | Failed]]
"""Gets the images of one shard, in order, and yields in order; several results for an image, or none, are
allowed. It can be pickled, and gives the same for the same images."""

Progress = Callable[..., None]

FAILED: Final = pl.Schema(
    {"name": pl.String(), "part": pl.Int32(), "place": pl.String(), "reason": pl.String()}
)
_LEFT_OUT: Final = {
    "duplicate": "another image before it has this name",
    "link": "a link, no image of its own",
    "special": "a device or FIFO, no file",
    "not an image": "a dataset that holds neither a file's bytes nor H x W x 3 pixels of 8 bits",
}
"""Why a member is not in the index -> in words; of what is named like an image, only HDF5 datasets are
`not an image`."""
_SIDECAR: Final = pl.Schema({**SPOOLED, "place": pl.String(), "reason": pl.String()})
_MADE: Final = "shards.done"
"""File of the work folder that says: every shard is there."""


@dataclass(frozen=True)
class Bulk:
    """What a job came to."""

    target: Path | None
    """None where none was wanted, or there is no image to put into it: nothing is then written."""
    form: str
    """Of the target; empty where none was wanted."""
    images: int
    """Written."""
    bytes: int
    """Of these images."""
    failed: pl.DataFrame
    """name, part, place, reason; in storage order. place is null where it is the new name that failed."""
    rows: pl.DataFrame
    """name, part and the columns of the rows' schema; in storage order."""
    resumed: int
    """Shards that an earlier run had done."""

    def to_dict(self) -> dict[str, Any]:
        """Counts and failures, for JSON."""
        return {
            "target": self.target,
            "form": self.form,
            "images": self.images,
            "bytes": self.bytes,
            "failed": self.failed.height,
            "failures": self.failed.to_dicts(),
            "resumed_shards": self.resumed,
        }


def each(function: Callable[[Images, int], Made]) -> Step:
    """The usual step: one image at a time, by its row; an ImageError is a failure.

    Args:
        function: Can be pickled.
    """
    return functools.partial(_each, function)


def _each(function: Callable[[Images, int], Made], images: Images) -> Iterator[Made | Failed]:
    for row in range(len(images)):
        try:
            yield function(images, row)
        except ImageError as error:
            yield Failed(images.name(row), images.index["part"][row], error.place, error.reason)


def run_bulk(
    source: Images,
    step: Step,
    target: Path | None,
    *,
    form: str | None = None,
    record: Mapping[str, Any],
    rows_schema: pl.Schema | None = None,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    shard_images: int | None = None,
    work: Path | None = None,
    finish: Callable[[Bulk], None] | None = None,
    outputs: Sequence[Path] = (),
    inputs: Sequence[Path] = (),
) -> Bulk:
    """Do a step for every image of a package and put what it makes into a new package.

    Work lies in a folder beside the target, `.<name>.unfinished`, until the target is whole. After a kill,
    a full disk or Ctrl-C the same call goes on with what is there; a call with other settings is refused
    unless told to overwrite. Of an image listed as failed nothing is in the target: one that the step could
    not do, one whose name leads out of the package, one whose name another one before it has.

    Args:
        source: The package.
        step: What to do with the images of a shard; `each(function)` for one image at a time.
        target: New package; its form follows from its ending. None: only rows are made.
        form: One of `data.packages.FORMS`, where the ending does not say it.
        record: Settings of the job that decide what comes out (`config.record`), ready for JSON.
        rows_schema: Columns of `Made.row`; None: it is empty. Neither `name` nor `part`.
        engine: As for `parallel.map_shards`; on Ray every node needs the source and the work folder.
        workers: As for `parallel.map_shards`.
        address: As for `parallel.map_shards`.
        overwrite: Replace the target (a folder only if it is a package that was made here) and drop an
            unfinished job of other settings.
        progress: Called with `done` and `total` images.
        shard_images: Images in a shard; None: a 64th of the package, from 16 to 1,000. A shard has at most
            64 MiB of stored images, or one image.
        work: The work folder; None: beside the target (without a target: none, nothing is resumed).
        finish: Called with the result when the target is there and before the work folder goes: a kill
            until its end costs nothing. What a rerun finds written by it, it must be able to replace.
        outputs: Files that `finish` writes; what was there before the job is replaced only when told.
        inputs: Files and folders that are read beside the source: no output may take their place.

    Raises:
        RequestError: the target or an output exists, cannot be written or would take the place of what is
            read; another process works on it; an unfinished job of other settings; a full disk.
        BioscanError: what `map_shards` or the step raise.
    """
    schema = rows_schema or pl.Schema()
    assert not {"name", "part"} & set(schema), "these two are columns of every row"
    form = form_of(target, form) if target else ""
    whole = Path(os.path.abspath(target)) if target else None  # noqa: PTH100 - `resolve` follows links
    refuse_overlap(source, [*([target] if target else []), *outputs], inputs)
    for output in outputs:
        refuse_unwritable(output)
    if whole and is_folder(whole, form):
        refuse_in_use(whole)
        whole = behind_link(whole)
    sizes, stamp = _stamp(source)
    job = {
        "version": VERSION,
        "source": stamp,
        "form": form,
        "package": package_name(whole) if whole else "",
        "shard_images": shard_images,
        "rows": {name: str(kind) for name, kind in schema.items()},
        "record": record,
    }
    job = json.loads(json.dumps(job))
    with contextlib.ExitStack() as stack:
        if work is None:
            if whole:
                work = whole.with_name(f".{whole.name}.unfinished")
            else:
                work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bioscan-"))) / "work"
        work = Path(os.path.abspath(work))  # noqa: PTH100 - other nodes have another working folder
        place = WorkFolder(work, whole, str(target or work), form, schema)
        refuse_target(place, job, overwrite=overwrite)
        refuse_outputs(place, job, outputs, overwrite=overwrite)
        stack.enter_context(held(place, job, overwrite=overwrite))
        stack.enter_context(telling_of_a_full_disk(place))
        safe = ~source.index["unsafe"].to_numpy() if target else np.ones(len(source), np.bool_)
        rows = np.flatnonzero(safe)
        cuts = _cut(sizes[rows], shard_images)
        resumed = len(cuts)
        if not place.has(_MADE):
            spools = {number: _whole_spool(place, number) for number in range(len(cuts))}
            for spool in place.spools.glob("*.spool"):
                if spool not in spools.values():
                    remove(spool)
            done = [number for number, spool in spools.items() if spool]
            resumed = len(done)
            shards = _Pending(source, [(n, rows[cut]) for n, cut in enumerate(cuts) if not spools[n]])
            ready = sum(len(rows[cuts[number]]) for number in done)
            tell = progress or _silent
            tell(ready, total=len(rows))
            function = functools.partial(_do_shard, place, step)
            for number, _ in map_shards(function, shards, engine=engine, workers=workers, address=address):
                ready += len(shards.shards[number][1])
                tell(ready, total=len(rows))
            place.mark(_MADE)
        images, failed, made = _collected(place, len(cuts))
        wanted = target is not None and not images.is_empty()  # a package without images is none
        if target and wanted and not place.has(WHOLE):
            facts = {"images": images.height, "failed": failed.height, **job}
            assemble(
                images, place.spools, place.staged, target, form, attributes=_attributes(source), record=facts
            )
            place.mark(WHOLE)
        if target and place.staged.exists():
            put(place, overwrite=overwrite)
        bulk = Bulk(
            target if wanted else None,
            form,
            images.height,
            int(images["length"].sum()),
            pl.concat([left_out(source), _unsafe(source, np.flatnonzero(~safe)), failed])
            if target
            else failed,
            made,
            resumed,
        )
        if finish and outputs:
            refuse_outputs(place, job, outputs, overwrite=overwrite)  # some may have come meanwhile
            with writing(place.written, overwrite=True) as partial:
                partial.write_text(
                    json.dumps([str(output.resolve()) for output in outputs]), encoding="utf-8"
                )
        if finish:
            finish(bulk)
        remove_work_folder(place.work)
    return bulk


class _Pending:
    """Shards to do; each is cut out of the package when it is its turn."""

    def __init__(self, source: Images, shards: list[tuple[int, NDArray[np.int64]]]) -> None:
        self.source, self.shards = source, shards

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[tuple[int, Images]]:
        for number, rows in self.shards:
            yield number, self.source.take(rows)


def _silent(done: int, total: int | None = None) -> None:
    """No progress shown."""


# -- before the work


def _stamp(source: Images) -> tuple[NDArray[np.int64], str]:
    """Bytes of each image as stored, and a digest of what the package is: another one, another job."""
    index = source.index
    if source.containers:
        sizes, changed = index["size"].fill_null(0).to_numpy(), index["offset"].fill_null(-1).to_numpy()
    else:
        status = [_status(f"{source.base}/{file}") for file in index["container"]]
        sizes, changed = np.array(status, np.int64).reshape(-1, 2).T
    digest = hashlib.sha256(json.dumps([source.form, source.containers]).encode())
    for column in ("name", "container"):
        digest.update("\0".join(index[column]).encode())
    for numbers in (index["part"].fill_null(-1).to_numpy(), sizes, changed):
        digest.update(np.ascontiguousarray(numbers).tobytes())
    return sizes, digest.hexdigest()


def _status(file: str) -> tuple[int, int]:
    try:
        status = os.stat(file)  # noqa: PTH116 - a million of them
    except OSError:
        return 0, 0  # reading it will say why
    return status.st_size, status.st_mtime_ns


def _cut(sizes: NDArray[np.int64], images: int | None) -> list[slice]:
    """Where shards begin and end.

    >>> _cut(np.array([10, 10, 10, 10]), 3)
    [slice(0, 3, None), slice(3, 4, None)]
    """
    most = images or min(max(-(-sizes.size // _SHARDS), _LEAST_IMAGES), _MOST_IMAGES)
    before = np.r_[0, np.cumsum(sizes)]
    cuts = []
    start = 0
    while start < sizes.size:
        full = int(np.searchsorted(before, before[start] + SHARD_BYTES, side="right")) - 1
        stop = min(start + most, max(full, start + 1), sizes.size)
        cuts.append(slice(start, stop))
        start = stop
    return cuts


# -- a shard


def _do_shard(place: WorkFolder, step: Step, shard: tuple[int, Images]) -> None:
    """Make a shard's spool and, when that is whole, its sidecar.

    The spool's name is new each time, and the sidecar tells it: a worker that was thought dead and is not
    disturbs nobody.
    """
    number, images = shard
    spool = place.spools / f"{number:07d}-{uuid.uuid4().hex[:8]}.spool"
    partial = spool.with_suffix(".spool.partial")
    rows: list[dict[str, Any]] = []
    with telling_of_a_full_disk(place):
        try:
            with spooling(partial, place.form, package_name(place.target or spool)) as add:
                for result in step(images):
                    rows.append(_row(result, add, place, spool.name))
            partial.replace(spool)
            schema = _schema(place)
            text = json.dumps({"spool": spool.name, "version": VERSION})
            sidecar = partial.with_suffix(".parquet.partial")
            pl.DataFrame(rows, schema=schema, orient="row").write_parquet(sidecar, metadata={FOOTER: text})
            sidecar.replace(place.sidecar(number))
        except BaseException:
            remove(partial)
            raise


def _row(result: Made | Failed, add: Add, place: WorkFolder, spool: str) -> dict[str, Any]:
    """A row of a sidecar."""
    name = unicodedata.normalize("NFC", result.name)
    found = {"name": name, "part": result.part}
    if isinstance(result, Failed):
        return found | {"place": result.place, "reason": result.reason}
    if result.data is not None and place.target:
        if reason := refusal(name, result.part, place.form):
            return found | {"reason": reason}
        found |= {"spool": spool, **add(name, result.part, result.data)._asdict()}
    assert result.row.keys() <= place.schema.keys(), "columns that rows_schema has not"
    return found | ({"row": result.row} if place.schema else {})


def _schema(place: WorkFolder) -> pl.Schema:
    return pl.Schema({**_SIDECAR, "row": pl.Struct(place.schema)} if place.schema else _SIDECAR)


def _whole_spool(place: WorkFolder, number: int) -> Path | None:
    """The spool of a shard that is done; it may have lost its end when the machine stopped."""
    sidecar = place.sidecar(number)
    try:
        spool = place.spools / json.loads(pl.read_parquet_metadata(sidecar)[FOOTER])["spool"]
        frame = pl.read_parquet(sidecar).filter(pl.col("start").is_not_null())
        if place.form == "folder":
            files = frame.select("start", "length").iter_rows()
            whole = all((spool / str(file)).stat().st_size == length for file, length in files)
        else:
            whole = spool.stat().st_size == (frame["end"].max() or 0)
    except (OSError, pl.exceptions.PolarsError, KeyError, ValueError):
        return None
    return spool if whole else None


# -- after the work


def _collected(place: WorkFolder, shards: int) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Images (columns of SPOOLED), failures and rows of all shards, in order."""
    frames = [pl.read_parquet(place.sidecar(number), schema=_schema(place)) for number in range(shards)]
    frame = pl.concat([pl.DataFrame(schema=_schema(place)), *frames])
    spooled = frame["start"].is_not_null()
    if place.target:
        folds = place.form == "folder" and place.job.with_name("JOB.JSON").exists()
        images = frame.filter(spooled)
        reasons = clashes(images, place.form, fold_case=folds)
        numbers = spooled.arg_true().filter(reasons.is_not_null())
        frame = frame.with_row_index("number").with_columns(
            clash=pl.col("number").replace_strict(
                numbers, reasons.drop_nulls(), default=None, return_dtype=pl.String
            )
        )
        frame = frame.with_columns(pl.col("reason").fill_null(pl.col("clash")))
    good = frame.filter(pl.col("reason").is_null())
    failed = frame.filter(pl.col("reason").is_not_null()).select(FAILED.names())
    images = good.filter(pl.col("start").is_not_null()).select(SPOOLED.names())
    rows = good.select("name", "part", *(["row"] if place.schema else []))
    return images, failed, rows.unnest("row") if place.schema else rows


def left_out(source: Images) -> pl.DataFrame:
    """Members that are images by their name, but not in the index; columns of FAILED."""
    name, why = pl.col("name"), pl.col("left_out").cast(pl.String)
    images = name.str.contains(IMAGE) & ~name.str.contains(HIDDEN)
    left = source.left_out.filter((why == "duplicate") | (images & why.is_in([*_LEFT_OUT])))
    return left.select("name", "part", place="container", reason=why.replace_strict(_LEFT_OUT))


def _unsafe(source: Images, rows: NDArray[np.int64]) -> pl.DataFrame:
    places = pl.Series([source.place(row) for row in rows.tolist()], dtype=pl.String)
    reason = pl.lit("its path leads out of the archive")
    return source.index[rows].select("name", "part", place=places, reason=reason)


def _attributes(source: Images) -> dict[str, Any]:
    """Of a new HDF5 package: those of an HDF5 source, which say whose the pictures are; none are invented."""
    if source.form == "hdf5":
        return hdf5_attributes(source.base / next(iter(source.containers)))
    return {"Description": "Image files, a dataset each"}
