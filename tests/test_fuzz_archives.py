"""Damaged archives end in images or in errors of ours, never in another exception, a crash or a hang.

Real photographs are packed by the owner of each form and a few bytes changed, cut out or put in, half of the
time where the form keeps its own notes (headers, directories, footers). A child process reads a batch of
them, so that a crash inside a C library is a failed test with its seed, not the end of all tests; its memory
is bounded.
"""

import io
import itertools
import json
import os
import random
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan.data.images import Images
from bioscan.errors import DataError, ImageError, RequestError

IMAGES = 6
MOST_MB = 2_000
"""Address space of the child beyond what it has when it starts: no claim of a damaged archive is believed."""
MOST_S = 5


def photographs(shared: Path) -> dict[str, bytes]:
    """The smallest real ones, so that much of each archive is its own notes."""
    found = sorted(
        (shared / "data/insects").rglob("*.jpg"), key=lambda path: (path.stat().st_size, path.name)
    )
    return {f"part{n % 2 + 1}/{n}.jpg": path.read_bytes() for n, path in enumerate(found[:IMAGES])}


def pack_zip(
    path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED, wide: bool = False
) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=wide) as member:
                member.write(data)


def pack_tar(path: Path, files: dict[str, bytes], form: int) -> None:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(("x" * 120 if form != tarfile.USTAR_FORMAT else "x") + "/" + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def pack_hdf5(
    path: Path, files: dict[str, bytes], libver: str, chunked: bool = False, pixels: bool = False
) -> None:
    options = {"chunks": (500,), "compression": "gzip"} if chunked else {}
    with h5py.File(path, "w", libver=libver) as file:
        group = file.create_group("bioscan_dataset")
        for name, data in files.items():
            content = np.frombuffer(data, np.uint8)
            if pixels:
                content = content[: len(data) // 30 * 30].reshape(-1, 10, 3)
            group.create_dataset(name.split("/")[1], data=content, **options)


def pack_parquet(path: Path, files: dict[str, bytes], compression: str) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": data, "path": name} for name, data in files.items()]
    pq.write_table(
        pa.table({"image": pa.array(cells, kind)}), path, row_group_size=2, compression=compression
    )


def pack_index(path: Path, files: dict[str, bytes]) -> None:
    """An archive whose saved index is what gets damaged."""
    pack_zip(path, files)
    Images(path)
    saved = path.with_name(f"{path.name}.index.parquet")
    path.with_name("kept.zip").write_bytes(path.read_bytes())
    saved.replace(path)


Pack = Callable[[Path, dict[str, bytes]], None]
PACKERS: dict[str, Pack] = {
    "stored.zip": pack_zip,
    "deflated.zip": lambda path, files: pack_zip(path, files, zipfile.ZIP_DEFLATED),
    "wide.zip": lambda path, files: pack_zip(path, files, wide=True),
    "ustar.tar": lambda path, files: pack_tar(path, files, tarfile.USTAR_FORMAT),
    "pax.tar": lambda path, files: pack_tar(path, files, tarfile.PAX_FORMAT),
    "gnu.tar": lambda path, files: pack_tar(path, files, tarfile.GNU_FORMAT),
    "plain.hdf5": lambda path, files: pack_hdf5(path, files, "earliest"),
    "latest.hdf5": lambda path, files: pack_hdf5(path, files, "latest"),
    "chunked.hdf5": lambda path, files: pack_hdf5(path, files, "earliest", chunked=True),
    "pixels.hdf5": lambda path, files: pack_hdf5(path, files, "latest", pixels=True),
    "snappy.parquet": lambda path, files: pack_parquet(path, files, "snappy"),
    "none.parquet": lambda path, files: pack_parquet(path, files, "none"),
    "index": pack_index,
}


def notes(whole: bytes, files: dict[str, bytes]) -> list[int]:
    """Places that are not within an image's bytes."""
    own = np.ones(len(whole), np.bool_)
    for data in files.values():
        at = whole.find(data)
        if at >= 0:
            own[at : at + len(data)] = False
    return np.flatnonzero(own).tolist()


def damaged(whole: bytes, places: list[int], seed: int) -> bytes:
    """A few changes; the same for the same seed."""
    chance = random.Random(seed)
    data = bytearray(whole)
    for _ in range(chance.randint(1, 6)):
        if not data:
            break
        at = chance.choice(places) if places and chance.random() < 0.7 else chance.randrange(len(data))
        at = min(at, len(data) - 1)
        kind = chance.random()
        if kind < 0.5:
            data[at] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
        elif kind < 0.65:
            data[at] ^= 1 << chance.randrange(8)
        elif kind < 0.8:  # a number of a header, say
            width = chance.choice([2, 4, 8])
            value = chance.choice(
                [0, 1, 1 << (8 * width - 1), (1 << 8 * width) - 1, chance.getrandbits(8 * width)]
            )
            data[at : at + width] = value.to_bytes(width, "little")
        elif kind < 0.87:
            del data[at : at + chance.choice([1, 4, 100, 1000])]
        elif kind < 0.94:
            data[at:at] = chance.randbytes(chance.choice([1, 4, 100]))
        else:
            other = chance.randrange(len(data))
            data[at : at + 30] = data[other : other + 30]
    return bytes(data[: chance.randrange(len(data) + 1)] if data and chance.random() < 0.1 else data)


def read_all(path: Path) -> str:
    """What becomes of an archive: `read`, `some failed`, `refused`; any other exception passes."""
    try:
        images = Images(path)
    except (DataError, RequestError):
        return "refused"
    outcome = "read"
    for row in range(len(images)):
        try:
            images.array(row) if images.is_array(row) else images.read_checked(row)
        except (ImageError, DataError):
            outcome = "some failed"
    return outcome


def fuzz(forms: list[str], folder: Path, first: int, last: int) -> None:
    """In the child: damage and read; the log tells where it ended, the outcomes are written at the end."""
    import resource

    files = {
        f"part{path.name.replace('_', '/')}": path.read_bytes() for path in sorted(folder.glob("*_*.jpg"))
    }
    outcomes: Counter[str] = Counter()
    log = folder / "log"
    prepared = {}
    for form in forms:
        work = folder / form
        work.mkdir()
        undamaged = work / f"whole.{form.split('.')[-1]}"
        PACKERS[form](undamaged, files)
        whole = undamaged.read_bytes()
        prepared[form] = whole, notes(whole, files)
        # Libraries are loaded: what they need is no part of the bound.
        assert read_all(undamaged) == ("refused" if form == "index" else "read")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MB * 1_000_000,) * 2)
    for form, seed in itertools.product(forms, range(first, last)):
        log.write_text(f"{form}, seed {seed}")
        data = damaged(*prepared[form], seed)
        path = folder / form / f"{seed}.{form.split('.')[-1]}"  # a new name: libraries keep open what failed
        if form == "index":
            path = folder / form / f"{seed}.zip"
            path.write_bytes((folder / form / "kept.zip").read_bytes())
            path.with_name(f"{path.name}.index.parquet").write_bytes(data)
        else:
            path.write_bytes(data)
        start = time.process_time()
        outcomes[f"{form}: {read_all(path)}"] += 1
        assert time.process_time() - start < MOST_S, "too slow"
        for left in path.parent.glob(f"{seed}.*"):
            left.unlink()
    (folder / "outcomes").write_text(json.dumps(outcomes))


def run(forms: list[str], shared: Path, folder: Path, first: int, last: int) -> dict[str, int]:
    """Outcomes of damaged archives, counted in a process of its own."""
    if not Path("/proc/self/statm").is_file():
        pytest.skip("memory cannot be bounded here")
    for name, data in photographs(shared).items():
        (folder / name.removeprefix("part").replace("/", "_")).write_bytes(data)
    command = (
        "from pathlib import Path; from test_fuzz_archives import fuzz; "
        f"fuzz({forms!r}, Path({str(folder)!r}), {first}, {last})"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "PYTHONFAULTHANDLER": "1",
        "POLARS_MAX_THREADS": "1",
        "RUST_BACKTRACE": "0",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, f"{(folder / 'log').read_text()}:\n{done.stderr[-4000:]}"
    outcomes: dict[str, int] = json.loads((folder / "outcomes").read_text())
    return outcomes


def test_damaged_archives_end_in_images_or_in_our_errors(shared: Path, tmp_path: Path) -> None:
    outcomes = run(list(PACKERS), shared, tmp_path, 0, 30)
    assert sum(outcomes.values()) == 30 * len(PACKERS)
    for form in PACKERS:  # some damage is noticed, some does not matter; an index can always be made again
        found = {name.split(": ")[1] for name in outcomes if name.startswith(f"{form}: ")}
        assert len(found) > 1 or form == "index", form


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", PACKERS)
def test_five_thousand_damaged_archives(form: str, shared: Path, tmp_path: Path) -> None:
    count = -(-5_000 // len(PACKERS))
    assert sum(run([form], shared, tmp_path, 1_000, 1_000 + count).values()) == count


def test_the_damage_is_the_same_each_time() -> None:
    whole = bytes(range(256)) * 4
    assert damaged(whole, [1, 2, 3], 5) == damaged(whole, [1, 2, 3], 5) != damaged(whole, [1, 2, 3], 6)
