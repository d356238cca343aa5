"""An artificial dataset in the layout of BIOSCAN-1M, with the truth about it beside it."""

import csv
import functools
import json
import math
import multiprocessing
import shutil
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.config import record, setting
from bioscan.data.synthesis_faults import Planted, plant
from bioscan.data.synthesis_tree import (
    Barcodes,
    Numbers,
    Specimens,
    Tree,
    evolve,
    grow,
    inherit,
    populate,
)
from bioscan.errors import RequestError
from bioscan.files import refuse_existing, writing_folder
from bioscan.vocabulary import (
    BARCODE_LENGTH,
    COLUMNS,
    EXPERIMENTS,
    HDF5_GROUP,
    IMAGE_FOLDER,
    NO_SPLIT,
    NOT_CLASSIFIED,
    RANKS,
)

METADATA: Final = "BIOSCAN_Insect_Dataset_metadata.tsv"
PACKAGE: Final = "original_256"
CONTROLS: Final = "control_wells"
WELLS: Final = tuple(f"{row}{column:02d}" for row in "ABCDEFGH" for column in range(1, 13))
"""Of a plate; the last, H12, stays empty."""
PER_PLATE: Final = len(WELLS) - 1
MOST: Final = 5_000_000
"""Specimens for which plate numbers of five digits last."""

ATTRIBUTION: Final = {
    "copyright_license": "CC0 1.0 (artificial)",
    "copyright_holder": "nobody (artificial data)",
    "copyright_institution": "bioscan synthesize (artificial data, no specimen of any collection)",
    "copyright_contact": "none",
    "photographer": "bioscan synthesize",
    "author": "bioscan synthesize",
}
"""The constant columns."""
HDF5_ATTRIBUTES: Final = {
    "Description": "Artificial insects in the layout of BIOSCAN-1M",
    "Copyright Holder": ATTRIBUTION["copyright_holder"],
    "Copyright Institution": ATTRIBUTION["copyright_institution"],
    "Copyright License": ATTRIBUTION["copyright_license"],
    "Copyright Contact": ATTRIBUTION["copyright_contact"],
    "Copyright Year": "none",
    "Photographer": ATTRIBUTION["photographer"],
    "Author": ATTRIBUTION["author"],
    "Date": "none",
}
"""Of the group; the names are those of the published files."""

SHORT: Final = 0.09
"""Share of barcodes that lack bases at their end."""
WITH_N: Final = 0.08
"""Share of barcodes with bases that could not be read."""

_BATCH: Final = 50_000
_CHUNK: Final = 50
"""Rows written at a time; pictures drawn at a time."""
_STREAMS: Final = (
    "tree",
    "specimens",
    "barcodes",
    "traits",
    "ids",
    "faults",
    "reads",
    "plates",
    "poses",
    "cameras",
)


_UNGUARDED: Final = (
    "a process that draws ended early: memory, or a script that calls synthesize outside of "
    "`if __name__ == '__main__':`; workers=1 draws without other processes"
)


@dataclass(frozen=True, kw_only=True)
class SynthesisSettings:
    """What an artificial dataset follows from: equal settings give equal bytes, whatever the workers."""

    specimens: int = setting(2000, "Specimens to make.")
    seed: int = setting(1, "Seed of every random choice.")
    images: bool = setting(True, "Draw the pictures, as a package of part folders.")
    zip: bool = setting(False, "Write the package as original_256.zip too.")
    hdf5: bool = setting(False, "Write the package as original_256.hdf5 too.")
    faults: bool = setting(
        False,
        "Plant mislabels, swapped barcodes, duplicates, leaks, broken files; truth/faults.tsv lists them.",
    )
    imbalance: float | None = setting(
        None,
        "Power of the real shares of orders and Diptera families: 1 as in BIOSCAN-1M, 0 all equal; "
        "none: from 0.4 at 3,000 specimens to 1 at 300,000.",
    )
    part_size: int = setting(10_000, "Pictures in a part folder.")
    workers: int | None = setting(
        None, "Processes that draw; none: one a core on the command line, one in Python."
    )

    def __post_init__(self) -> None:
        for name, low, high in (
            ("specimens", 1, MOST),
            ("seed", 0, 2**63),
            ("imbalance", 0, 1),
            ("part_size", 1, MOST),
            ("workers", 1, 256),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise RequestError(f"{name} is {value}; it must be from {low} to {high:,}")
        if not self.images and (self.zip or self.hdf5):
            raise RequestError("a ZIP or HDF5 package holds pictures: leave out --no-images or the package")

    @property
    def power(self) -> float:
        """The imbalance, chosen by the number of specimens where it is not set."""
        if self.imbalance is not None:
            return self.imbalance
        steps = (math.log10(self.specimens) - math.log10(3_000)) / 2
        return 0.4 + 0.6 * min(max(steps, 0), 1)


def synthesize(
    out: Path | str,
    settings: SynthesisSettings | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Write an artificial dataset in the layout of BIOSCAN-1M: metadata, pictures, and the truth.

    The folder holds the metadata (28 columns), `bioscan/images/original_256/part<N>/` and, when asked for,
    `original_256.zip` and `original_256.hdf5`; `control_wells/`, a picture of the empty well H12 of each
    plate; and `truth/`: `lineage.tsv` (taxa and BIN that a specimen has whatever the metadata says, plate,
    well), `boxes.coco.json` (box and mask of each; paths from the folder), `faults.tsv` and `record.json`.

    At 1,128,313 specimens orders and Diptera families have exactly the published counts.

    Args:
        out: A new folder.
        settings: Defaults where None.
        overwrite: Replace an artificial dataset that is there.
        progress: Called with `done` and `total`: pictures, or rows where there are none.

    Returns:
        Paths (`metadata`, `images`, `zip`, `hdf5`, `controls`, `truth`; None where not made) and counts
        (`specimens`, `orders`, `families`, `genera`, `species`, `bins`, `plates`, `labelled` by rank,
        `faults` by kind).

    Raises:
        RequestError: settings out of range; the folder exists, or is no artificial dataset.
    """
    out, settings = Path(out), settings or SynthesisSettings()
    if (settings.workers or 1) > 1 and getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RequestError(_UNGUARDED)  # in a process that draws, which has run the script that started it
    _refuse(out, overwrite)
    made = _Dataset.make(settings)
    with writing_folder(out, overwrite=overwrite) as folder:
        truth = folder / "truth"
        truth.mkdir()
        steps = settings.specimens + (made.plates if settings.images else 0)
        tell = progress or _silent
        labelled = made.write_metadata(folder / METADATA, _silent if settings.images else tell)
        made.write_lineage(truth / "lineage.tsv")
        if settings.faults:
            made.write_faults(truth / "faults.tsv")
        if settings.images:
            made.write_pictures(folder, functools.partial(tell, total=steps))
        text = json.dumps(record(replace(settings, workers=None)), indent=1, ensure_ascii=False)
        (truth / "record.json").write_text(text + "\n", encoding="utf-8")
    present = made.tree.lineage(np.unique(made.specimens.species[made.planted.being]))
    ranks = {"orders": "order", "families": "family", "genera": "genus", "species": "species"}
    images = out / IMAGE_FOLDER / PACKAGE
    return {
        "metadata": out / METADATA,
        "images": images if settings.images else None,
        "zip": out / f"{PACKAGE}.zip" if settings.zip else None,
        "hdf5": out / f"{PACKAGE}.hdf5" if settings.hdf5 else None,
        "controls": out / CONTROLS if settings.images else None,
        "truth": out / "truth",
        "specimens": settings.specimens,
        **{name: len(np.unique(present[rank])) for name, rank in ranks.items()},
        "bins": len(np.unique(made.specimens.bin[made.planted.being])),
        "plates": made.plates,
        "labelled": labelled,
        "faults": dict(Counter(kind for kind, _, _ in made.planted.table)),
    }


def _refuse(out: Path, overwrite: bool) -> None:
    """Only what this function made is replaced: a wrong name must not cost a folder of something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    refuse_existing(out, overwrite=overwrite)
    if not (out / "truth" / "record.json").is_file():
        raise RequestError(f"{out} is no artificial dataset; it is not replaced, choose another folder")


def _silent(done: int, total: int | None = None) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class _Dataset:
    """Everything but the pictures, as arrays with an entry a specimen, in the order of the metadata."""

    settings: SynthesisSettings
    tree: Tree
    specimens: Specimens
    planted: Planted
    barcodes: Barcodes
    haplotype: Numbers
    length: Numbers
    unread: Numbers
    """Start and number of the bases that could not be read, n x 2."""
    plate: Numbers
    """Number of each specimen's plate among ours."""
    first_plate: int
    names: dict[str, pl.Series]
    """Those of the tree."""

    @classmethod
    def make(cls, settings: SynthesisSettings) -> "_Dataset":
        count = settings.specimens
        tree = grow(count, settings.power, _chance(settings.seed, "tree"))
        specimens = populate(tree, _chance(settings.seed, "specimens"))
        plate = np.arange(count) // PER_PLATE
        planted = Planted.none(count)
        if settings.faults:
            chance = _chance(settings.seed, "faults")
            planted = plant(specimens, tree, plate, chance, pictures=settings.images)
        rng = _chance(settings.seed, "barcodes")
        barcodes = evolve(tree, rng)
        haplotype = barcodes.choose(specimens.bin, rng)
        reads = _chance(settings.seed, "reads")
        lost = np.minimum(1 + reads.exponential(30, count).astype(np.int64), 158)
        length = np.where(reads.random(count) < SHORT, BARCODE_LENGTH - lost, BARCODE_LENGTH)
        unread = np.where(reads.random(count) < WITH_N, 1 + reads.exponential(4, count).astype(np.int64), 0)
        unread = np.stack([reads.integers(0, 480, count), np.minimum(unread, 20)], axis=1)
        first = int(_chance(settings.seed, "ids").integers(10_000, 99_999 - plate[-1]))
        names = {rank: pl.Series(taxa.tolist()) for rank, taxa in tree.names.items()}
        return cls(
            settings, tree, specimens, planted, barcodes, haplotype, length, unread, plate, first, names
        )

    @property
    def plates(self) -> int:
        return int(self.plate[-1]) + 1

    def sampleids(self, rows: Numbers) -> list[str]:
        plates = (self.first_plate + self.plate[rows]).tolist()
        return [f"BIOUG{p:05d}-{WELLS[w]}" for p, w in zip(plates, (rows % PER_PLATE).tolist(), strict=True)]

    def image_files(self, rows: Numbers) -> list[str]:
        """BOLD's picture number for two plates of five, the sample id for the others, as published."""
        numbered = self.plate[rows] % 5 < 2
        numbers = (1_000_000 + 3 * rows + rows % 2).tolist()
        ids = self.sampleids(rows)
        return [
            f"{n}.jpg" if b else f"{i}.jpg" for n, b, i in zip(numbers, numbered.tolist(), ids, strict=True)
        ]

    def parts(self, rows: Numbers) -> Numbers:
        return rows // self.settings.part_size + 1

    def _names(self, taxa: dict[str, Numbers]) -> dict[str, pl.Series]:
        """Columns phylum to species; null where a number is -1."""
        size = len(taxa["order"])
        found = {
            "phylum": pl.repeat("Arthropoda", size, eager=True),
            "class": pl.repeat("Insecta", size, eager=True),
        }
        for rank in ("order", "family", "subfamily", "tribe", "genus", "species"):
            number = pl.Series(taxa[rank])
            found[rank] = self.names[rank].gather(number.set(number < 0, None))
        return found

    def labels(self, rows: Numbers) -> dict[str, pl.Series]:
        """What the metadata says of specimens, faults and all."""
        taxa = self.specimens.labels(self.tree, self.planted.labels[rows])
        for rank, hidden in self.planted.hidden.items():
            taxa[rank] = np.where(hidden[rows], -1, taxa[rank])
        given = self.planted.family[rows]
        taxa["family"] = np.where(given >= 0, given, taxa["family"])
        return self._names(taxa)

    def nucraw(self, rows: Numbers) -> pl.Series:
        """Barcodes as text."""
        whose = self.planted.barcode[rows]
        bases = self.barcodes.bases(self.haplotype[whose])
        start, unread = self.unread[whose].T
        for row in np.flatnonzero(unread).tolist():
            bases[row, start[row] : start[row] + unread[row]] = ord("N")
        lengths = self.length[whose]
        for row in np.flatnonzero(lengths < BARCODE_LENGTH).tolist():
            bases[row, lengths[row] :] = 0  # numpy drops zero bytes at the end
        return pl.Series(bases.view(f"S{BARCODE_LENGTH}").ravel().tolist(), dtype=pl.Binary).cast(pl.String)

    def write_metadata(self, path: Path, tell: Callable[..., None]) -> dict[str, int]:
        """Write the table and return how many specimens are labelled at each rank."""
        labelled: Counter[str] = Counter()
        with path.open("wb") as file:
            for rows in _batches(self.settings.specimens):
                labels = self.labels(rows)
                labelled.update({rank: len(column) - column.null_count() for rank, column in labels.items()})
                whose = self.planted.barcode[rows]
                projects = (
                    f"SY{_letters(n // 5_000)}{n % 5_000 + 1}-{18 + n // 5_000 % 5}" for n in rows.tolist()
                )
                frame = pl.DataFrame(
                    {
                        "sampleid": self.sampleids(rows),
                        "processid": list(projects),
                        "uri": pl.Series(self.tree.bin_uri[self.specimens.bin[whose]].tolist()),
                        **labels,
                        "nucraw": self.nucraw(rows),
                        "image_file": self.image_files(rows),
                        "chunk_number": self.parts(rows),
                    }
                )
                deepest = pl.coalesce(*reversed([r for r in RANKS if r in labels]))
                frame = frame.with_columns(
                    deepest.alias("name"),
                    pl.lit(None, pl.String).alias("subspecies"),
                    **{name: pl.lit(text) for name, text in ATTRIBUTION.items()},
                    **{name: pl.lit(NO_SPLIT) for name in EXPERIMENTS},
                )
                frame.select(COLUMNS).write_csv(
                    file,
                    separator="\t",
                    quote_style="never",
                    null_value=NOT_CLASSIFIED,
                    include_header=rows[0] == 0,
                )
                tell(int(rows[-1]) + 1, total=self.settings.specimens)
        return {rank: labelled[rank] for rank in RANKS}

    def write_lineage(self, path: Path) -> None:
        with path.open("wb") as file:
            for rows in _batches(self.settings.specimens):
                being = self.planted.being[rows]
                frame = pl.DataFrame(
                    {
                        "sampleid": self.sampleids(rows),
                        **self._names(self.tree.lineage(self.specimens.species[being])),
                        "uri": self.tree.bin_uri[self.specimens.bin[being]].tolist(),
                        "plate": [f"BIOUG{self.first_plate + p:05d}" for p in self.plate[rows].tolist()],
                        "well": [WELLS[w] for w in (rows % PER_PLATE).tolist()],
                    }
                )
                frame.write_csv(file, separator="\t", quote_style="never", include_header=rows[0] == 0)

    def write_faults(self, path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE)
            writer.writerow(("kind", "sampleid", "detail"))
            for kind, row, detail in self.planted.table:
                before, _, rest = detail.partition("{")
                number, _, after = rest.partition("}")
                other = self.sampleids(np.array([int(number)]))[0] if number else ""
                writer.writerow((kind, self.sampleids(np.array([row]))[0], f"{before}{other}{after}"))

    def write_pictures(self, folder: Path, tell: Callable[..., None]) -> None:
        """Draw all pictures and write them as they come, with their boxes and masks."""
        settings = self.settings
        rows = np.arange(settings.specimens)
        names, parts = self.image_files(rows), self.parts(rows).tolist()
        package = folder / IMAGE_FOLDER / PACKAGE
        for part in range(1, parts[-1] + 1):
            (package / f"part{part}").mkdir(parents=True)
        (folder / CONTROLS).mkdir()
        jobs = self._jobs()
        with ExitStack() as stack:
            packers = [_pack_folder(package)]
            if settings.zip:
                packers.append(_pack_zip(folder / f"{PACKAGE}.zip", stack))
            if settings.hdf5:
                packers.append(_pack_hdf5(folder / f"{PACKAGE}.hdf5", stack))
            boxes = stack.enter_context(_Boxes(folder / "truth" / "boxes.coco.json"))
            done = 0
            for job, drawn in _drawn(jobs, settings.workers or 1):
                for row, (data, mask) in zip(job.rows, drawn, strict=True):
                    if job.poses is None:
                        name = f"BIOUG{self.first_plate + row:05d}-{WELLS[-1]}"
                        (folder / CONTROLS / f"{name}.jpg").write_bytes(data)
                        boxes.add(f"{CONTROLS}/{name}.jpg", name, None)
                        continue
                    file = f"part{parts[row]}/{names[row]}"
                    found = _broken(data, self.planted.broken.get(row))
                    if found is not None:
                        for packer in packers:
                            packer(file, found)
                    sampleid = self.sampleids(np.array([row]))[0]
                    boxes.add(f"{IMAGE_FOLDER}/{PACKAGE}/{file}", sampleid, mask)
                done += len(job.rows)
                tell(done)

    def _jobs(self) -> Iterator["_Job"]:
        """What to draw, a chunk at a time: every specimen, then the control wells."""
        from bioscan.data.synthesis_pictures import FAMILY_PLANS, PLANS, TRAITS

        seed = self.settings.seed
        deviations = inherit(self.tree, len(TRAITS), _chance(seed, "traits"))
        lineage = self.tree.lineage(np.arange(len(deviations)))
        plan_of_family = [
            FAMILY_PLANS.get(family, order)
            for family, order in zip(
                self.tree.names["family"].tolist(),
                self.tree.names["order"][self.tree.above["family"]].tolist(),
                strict=True,
            )
        ]
        assert set(plan_of_family) <= PLANS.keys()
        for rows in _batches(self.settings.specimens, _CHUNK):
            shown = self.planted.picture[rows]
            poses = np.where(shown == rows, self.planted.pose[rows], shown)
            species = self.specimens.species[poses]
            yield _Job(
                seed,
                rows.tolist(),
                shown.tolist(),
                self.plate[shown].tolist(),
                poses.tolist(),
                [plan_of_family[f] for f in lineage["family"][species].tolist()],
                deviations[species],
            )
        for plates in _batches(self.plates, _CHUNK):
            cameras = (self.settings.specimens + plates).tolist()
            yield _Job(seed, plates.tolist(), cameras, plates.tolist(), None, [], None)


def _chance(seed: int, stream: str, number: int = 0) -> np.random.Generator:
    """A generator of its own for each kind of choice, and for each specimen or plate where asked."""
    return np.random.default_rng([seed, _STREAMS.index(stream), number])


def _batches(count: int, size: int = _BATCH) -> Iterator[Numbers]:
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))


def _letters(number: int) -> str:
    """Three letters of a project, AAA to ZZZ.

    >>> _letters(27)
    'ABB'
    """
    return "".join(chr(65 + number // 26**place % 26) for place in (2, 1, 0))


class _Job(NamedTuple):
    """Pictures to draw, for another process."""

    seed: int
    rows: list[int]
    """Whose pictures they will be; of control wells: the plate."""
    cameras: list[int]
    """Number of each picture's own chance: well, place of the grain."""
    plates: list[int]
    """In whose light."""
    poses: list[int] | None
    """Whose body each shows; None: empty wells."""
    plans: list[str]
    deviations: NDArray[np.float32] | None
    """Of each one's species, n x traits."""


class _Region(NamedTuple):
    """Where a specimen is in its picture."""

    box: tuple[int, int, int, int]
    """Left, top, width, height."""
    area: int
    runs: list[int]
    """Lengths of runs of background and specimen in turn, down the columns: COCO's uncompressed form."""


_Drawn = tuple[bytes, _Region | None]


@functools.cache
def _studio() -> Any:
    from bioscan.data.synthesis_pictures import Studio

    return Studio()


def _draw(job: _Job) -> list[_Drawn]:
    """JPEG bytes and region of each picture of a job."""
    import simplejpeg

    from bioscan.data.synthesis_pictures import PLANS, QUALITY, Subject, plate_light

    drawn: list[_Drawn] = []
    for place, (camera, plate) in enumerate(zip(job.cameras, job.plates, strict=True)):
        subject = None
        if job.poses is not None and job.deviations is not None:
            pose = _chance(job.seed, "poses", job.poses[place])
            subject = Subject(PLANS[job.plans[place]], job.deviations[place], pose)
        light = plate_light(_chance(job.seed, "plates", plate))
        picture, mask = _studio().photograph(subject, light, _chance(job.seed, "cameras", camera))
        data = simplejpeg.encode_jpeg(picture, quality=QUALITY, colorsubsampling="420")
        drawn.append((data, _region(mask) if subject else None))
    return drawn


def _region(mask: NDArray[np.bool_]) -> _Region:
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    left, top = int(columns[0]), int(rows[0])
    flat = mask.T.ravel()
    edges = np.r_[0, np.flatnonzero(flat[1:] != flat[:-1]) + 1, flat.size]
    runs = np.diff(edges).tolist()
    box = left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1
    return _Region(box, int(mask.sum()), [0, *runs] if flat[0] else runs)


def _drawn(jobs: Iterable[_Job], workers: int) -> Iterator[tuple[_Job, list[_Drawn]]]:
    """Each job with its pictures, in order; a few jobs ahead of their use."""
    if workers == 1:
        for job in jobs:
            yield job, _draw(job)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    waiting: deque[tuple[_Job, Future[list[_Drawn]]]] = deque()
    try:
        for job in jobs:
            waiting.append((job, pool.submit(_draw, job)))
            if len(waiting) >= 3 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool:
        raise RequestError(_UNGUARDED) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _broken(data: bytes, kind: str | None) -> bytes | None:
    """What is left of a picture file; None where it is gone."""
    match kind:
        case "truncated_picture":
            return data[: len(data) // 3]
        case "empty_picture":
            return b""
        case "not_a_picture":
            return b"<!DOCTYPE html><title>404 Not Found</title>"
        case "missing_picture":
            return None
    return data


_Packer = Callable[[str, bytes], None]


def _pack_folder(package: Path) -> _Packer:
    def pack(file: str, data: bytes) -> None:
        (package / file).write_bytes(data)

    return pack


def _pack_zip(path: Path, stack: ExitStack) -> _Packer:
    archive = stack.enter_context(zipfile.ZipFile(path, "w", zipfile.ZIP_STORED))

    def pack(file: str, data: bytes) -> None:
        # The oldest time that ZIP knows: equal runs write equal bytes.
        archive.writestr(zipfile.ZipInfo(f"{IMAGE_FOLDER}/{PACKAGE}/{file}", (1980, 1, 1, 0, 0, 0)), data)

    return pack


def _pack_hdf5(path: Path, stack: ExitStack) -> _Packer:
    import h5py

    group = stack.enter_context(h5py.File(path, "w")).create_group(HDF5_GROUP)
    group.attrs.update(HDF5_ATTRIBUTES)

    def pack(file: str, data: bytes) -> None:
        group.create_dataset(file.rpartition("/")[2], data=np.frombuffer(data, np.uint8))

    return pack


class _Boxes:
    """A COCO file, written as its entries come: the images aside first, then put behind the annotations."""

    def __init__(self, path: Path) -> None:
        self._images = path.with_suffix(".images").open("w+", encoding="utf-8")
        self._file = path.open("w", encoding="utf-8")
        self._number = 0
        self._annotations = 0

    def __enter__(self) -> "_Boxes":
        info = {"description": HDF5_ATTRIBUTES["Description"], "version": "1"}
        licences = [{"id": 1, "name": ATTRIBUTION["copyright_license"], "url": ""}]
        categories = [{"id": 0, "name": "insect", "supercategory": "insect"}]
        head = {"info": info, "licenses": licences, "categories": categories}
        self._file.write(json.dumps(head)[:-1] + ', "annotations": [\n')
        return self

    def add(self, file_name: str, sampleid: str, region: _Region | None) -> None:
        from bioscan.data.synthesis_pictures import HEIGHT, WIDTH

        self._number += 1
        image = {"id": self._number, "file_name": file_name, "width": WIDTH, "height": HEIGHT, "license": 1}
        self._images.write(",\n" if self._number > 1 else "")
        json.dump(image | {"sampleid": sampleid}, self._images)
        if region is None:
            return
        self._annotations += 1
        annotation = {
            "id": self._annotations,
            "image_id": self._number,
            "category_id": 0,
            "bbox": region.box,
            "area": region.area,
            "iscrowd": 0,
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": region.runs},
        }
        self._file.write(",\n" if self._annotations > 1 else "")
        json.dump(annotation, self._file)

    def __exit__(self, *failure: object) -> None:
        self._file.write('\n], "images": [\n')
        self._images.seek(0)
        shutil.copyfileobj(self._images, self._file)
        self._file.write("\n]}\n")
        self._file.close()
        self._images.close()
        Path(self._images.name).unlink()
