"""Resizing: originals to 256 pixels, file to file, against ImageMagick; packages by 1 and 2 processes."""

import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from benchmarks.measure import interleaved, peak_mb
from bioscan.data.decode import decode_image
from bioscan.data.images import Images
from bioscan.data.preprocess import ResizeSettings, resize_file
from bioscan.jobs.resize import resize

SHARED: Final = Path(os.environ.get("BIOSCAN_SHARED", Path(__file__).parents[1] / ".." / "shared"))
IMAGEMAGICK: Final = ("convert-im6.q16", "magick", "convert")
FILES: Final = 18
PACKAGE: Final = {"small": 288, "full": 1_000}
_ONE_THREAD: Final = {"MAGICK_THREAD_LIMIT": "1", "OMP_NUM_THREADS": "1"}


def originals(work: Path) -> tuple[str, list[Path]]:
    """Photographs of 2880 x 2160 pixels: the paper's, else made ones of the same size in bytes."""
    found = sorted((SHARED / "data/bioscan1m_orders/original_full").glob("*.jpg"))
    if found:
        return "real originals", found
    rng = np.random.default_rng(1)
    files = []
    for number in range(FILES):
        file = work / f"original_{number}.jpg"
        if not file.is_file():
            rough = Image.fromarray(rng.integers(60, 230, (90, 120, 3), np.uint8))
            soft = np.asarray(rough.resize((2880, 2160), Image.Resampling.BICUBIC), np.int16)
            grain = rng.normal(0, 3.2, soft.shape[:2])[..., None]
            pixels = np.clip(soft + grain, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(file, "JPEG", quality=75)
        files.append(file)
    return "made originals", files


def ours(files: list[Path], folder: Path) -> None:
    """Each file to 256 pixels of height, written."""
    settings = ResizeSettings(fix="height")
    for file in files:
        made = resize_file(file.read_bytes(), settings, name=file.name, place="")
        (folder / file.name).write_bytes(made.data)


def imagemagick(program: str, files: list[Path], folder: Path) -> None:
    """The same by a process a file, as the paper's program does."""
    for file in files:
        command = [program, str(file), "-resize", "x256", str(folder / file.name)]
        subprocess.run(command, check=True, env={**os.environ, **_ONE_THREAD})


def worst_psnr(files: list[Path]) -> float:
    """Least likeness, dB, to Lanczos from the full size, before encoding."""
    worst = np.inf
    for file in files:
        data = file.read_bytes()
        made = resize_file(data, ResizeSettings(fix="height"), name="a.png", place="")
        pixels = decode_image(made.data, name="", place="").astype(float)
        with Image.open(io.BytesIO(data)) as image:
            size = made.new_width, made.new_height
            error = pixels - np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
        worst = min(worst, 10 * np.log10(255**2 / np.mean(error**2)))
    return float(worst)


def _file_rows(kind: str, files: list[Path], work: Path) -> Iterator[dict[str, Any]]:
    program = next(filter(None, map(shutil.which, IMAGEMAGICK)), None)
    folder = work / "resized"
    folder.mkdir(exist_ok=True)
    works = [partial(ours, files, folder)]
    if program:
        works.append(partial(imagemagick, program, files, folder))
    taken, *floor = interleaved(*works, rounds=3)
    yield {
        "work": f"resize to 256, file to file, {worst_psnr(files):.1f} dB at worst (floor: ImageMagick)",
        "size": f"{len(files)} {kind}, 2880 x 2160",
        "value": len(files) / taken,
        "unit": "images/s a core",
        "floor": len(files) / floor[0] if floor else None,
        "ratio": floor[0] / taken if floor else None,
        "bound": ">= 9 x, >= 48 dB",
    }


def package(source: Path, target: Path, workers: int) -> None:
    """A package resized into a ZIP."""
    resize(source, target, workers=workers, overwrite=True)


def bare(source: Path) -> None:
    """The floor of a package: each image read and resized, nothing kept."""
    images = Images(source)
    for row in range(len(images)):
        resize_file(images.read(row), ResizeSettings(), name="", place="")


def _package_rows(kind: str, files: list[Path], count: int, work: Path) -> Iterator[dict[str, Any]]:
    source = work / f"originals_{count}"
    for number in range(count):
        link = source / f"part{number // 500 + 1}" / f"{number}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(files[number % len(files)].resolve())
    target = work / "resized.zip"
    works = [partial(package, source, target, workers) for workers in (1, 2)]
    *taken, least = interleaved(*works, partial(bare, source), rounds=3)
    for workers, seconds in enumerate(taken, 1):
        yield {
            "work": f"resize of a package, folder to ZIP, {workers} process(es) (floor: bare loop of one)",
            "size": f"{count:,} {kind}, 2880 x 2160",
            "value": count / seconds,
            "unit": "images/s",
            "floor": count / least,
            "ratio": least / seconds,
            "peak_mb": peak_mb(package, source, target, 1) if workers == 1 else None,
        }


def run(size: str, work: Path) -> list[dict[str, Any]]:
    """Images per second of single files and of packages."""
    kind, files = originals(work)
    return [*_file_rows(kind, files, work), *_package_rows(kind, files, PACKAGE[size], work)]
