"""Damaged image files of every kind: pixels of a sane size or one listed error, soon, in bounded memory.

The damage is done in a process of its own (this file as a program), so that a crash, a hang or too much
memory is seen; `-m slow` does it to 5,000 real photographs.
"""

import io
import json
import os
import random
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from bioscan.data.decode import MAX_PIXELS, decode_image
from bioscan.data.preprocess import ResizeSettings, resize_file
from bioscan.errors import ImageError

ADDRESSES_GB = 6
"""Above what one image of MAX_PIXELS may need."""
PEAK_MB = 2_000
SLOWEST_S = 30

Chance = random.Random


def made() -> list[bytes]:
    """Small pictures of all kinds of files."""
    rng = np.random.default_rng(3)
    rough = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for size, mode, kind, options in (
        ((640, 480), "RGB", "JPEG", {"quality": 75}),
        ((641, 481), "RGB", "JPEG", {"quality": 60, "exif": exif}),
        ((400, 300), "RGB", "JPEG", {"progressive": True, "subsampling": 0}),
        ((400, 300), "L", "JPEG", {"restart_marker_blocks": 7}),
        ((200, 150), "CMYK", "JPEG", {}),
        ((200, 150), "RGB", "PNG", {}),
        ((200, 150), "P", "PNG", {"transparency": 3}),
        ((200, 150), "RGB", "TIFF", {}),
        ((200, 150), "RGB", "TIFF", {"compression": "tiff_lzw"}),
        ((200, 150), "RGB", "TIFF", {"compression": "jpeg"}),
        ((200, 150), "P", "GIF", {}),
        ((200, 150), "RGB", "WEBP", {}),
        ((200, 150), "RGB", "WEBP", {"lossless": True}),
        ((200, 150), "RGB", "BMP", {}),
    ):
        file = io.BytesIO()
        rough.resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, kind, **options)
        files.append(file.getvalue())
    return files


def damaged(data: bytes, others: list[bytes], chance: Chance) -> bytes:
    """One to four kinds of damage, one after the other."""
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        data = chance.choice(DAMAGE)(bytearray(data), others, chance) or b"\0"
    return data


def flip_bytes(data: bytearray, others: list[bytes], chance: Chance) -> bytes:
    for _ in range(chance.choice([1, 1, 3, 20])):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def edit_header(data: bytearray, others: list[bytes], chance: Chance) -> bytes:
    for _ in range(chance.choice([1, 2, 6])):
        at = chance.randrange(min(len(data), chance.choice([32, 200, 700])))
        data[at] = chance.choice([0, 1, 127, 128, 254, 255, data[at] ^ (1 << chance.randrange(8))])
    return bytes(data)


def cut(data: bytearray, others: list[bytes], chance: Chance) -> bytes:
    return bytes(data[: chance.randrange(len(data))])


def take_out(data: bytearray, others: list[bytes], chance: Chance) -> bytes:
    at = chance.randrange(len(data))
    del data[at : at + chance.choice([1, 2, 30, 4_000])]
    return bytes(data)


def splice(data: bytearray, others: list[bytes], chance: Chance) -> bytes:
    other = chance.choice(others)
    at, start = chance.randrange(len(data)), chance.randrange(len(other))
    data[at : at + chance.choice([0, 50])] = other[start : start + chance.choice([2, 60, 5_000])]
    return bytes(data)


def shuffle_segments(data: bytearray, others: list[bytes], chance: Chance) -> bytes:
    """Segments of a JPEG or chunks of a PNG dropped, doubled or out of order; else, pieces of the file."""
    if data[:2] == b"\xff\xd8":
        start, parts = 2, []
        while start + 4 <= len(data) and data[start] == 0xFF and data[start + 1] != 0xDA:
            end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
            parts.append(bytes(data[start:end]))
            start = end
        head, tail = bytes(data[:2]), bytes(data[start:])
    elif data[:4] == b"\x89PNG":
        start, parts = 8, []
        while start + 12 <= len(data) and len(parts) < 1_000:
            end = start + 12 + int.from_bytes(data[start : start + 4], "big")
            parts.append(bytes(data[start:end]))
            start = end
        head, tail = bytes(data[:8]), b""
    else:
        places = sorted(chance.sample(range(len(data)), min(4, len(data))))
        ends = [*places[1:], len(data)]
        head, tail = bytes(data[: places[0]]), b""
        parts = [bytes(data[a:b]) for a, b in zip(places, ends, strict=True)]
    for _ in range(chance.choice([1, 3])):
        if parts:
            at = chance.randrange(len(parts))
            parts[at : at + 1] = chance.choice([[], [parts[at]] * 2, [parts[at]] * 40])
    if chance.random() < 0.5:
        chance.shuffle(parts)
    return head + b"".join(parts) + tail


def mend_checksums(data: bytearray, others: list[bytes], chance: Chance) -> bytes:
    """A PNG with damage that its checksums do not tell of."""
    at = 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if chance.random() < 0.2 and end > at + 8 and end <= len(data):
            data[chance.randrange(at + 8, end)] = chance.randrange(256)
        if end + 4 <= len(data):
            data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


DAMAGE = (flip_bytes, edit_header, edit_header, cut, take_out, splice, shuffle_segments, mend_checksums)


def hammer(sources: list[bytes], rounds: int, seed: int) -> dict[str, Any]:
    """What becomes of damaged files; anything but pixels or an ImageError ends it."""
    chance = Chance(seed)
    count = {"decoded": 0, "refused": 0, "resized": 0, "not resized": 0, "compared": 0}
    slowest = 0.0
    for number in range(rounds):
        data = damaged(chance.choice(sources), sources, chance)
        kept = os.environ.get("BIOSCAN_FUZZ_KEEP")  # what was tried last, for a look at a crash
        if kept:
            Path(kept).write_bytes(data)
        start = time.perf_counter()
        try:
            pixels = decode_image(data, name="a.jpg", place="b.zip @ 7")
        except ImageError:
            count["refused"] += 1
        else:
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
            assert 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS
            count["decoded"] += 1
            if number % 4 == 0:
                count["compared"] += as_pillow(data, pixels)
        settings = ResizeSettings(shorter_side=chance.choice([64, 256]))
        try:
            new = resize_file(data, settings, name="a.jpg", place="b.zip @ 7")
        except ImageError:
            count["not resized"] += 1
        else:
            count["resized"] += 1
            small = decode_image(new.data, name="", place="")
            assert small.shape == (new.new_height, new.new_width, 3)
            assert min(small.shape[:2]) <= max(
                settings.shorter_side, new.height if new.how == "copied" else 0
            )
        slowest = max(slowest, time.perf_counter() - start)
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return {**count, "slowest_s": slowest, "peak_mb": int(peak.split()[1]) / 1024}


def as_pillow(data: bytes, pixels: np.ndarray[Any, Any]) -> bool:
    """Whether Pillow reads the file too; then the pixels are its own, to one level."""
    if not data.startswith(b"\xff\xd8"):
        return False
    try:
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
    except Exception:  # noqa: BLE001 - Pillow, not ours
        return False
    assert expected.shape == pixels.shape
    assert np.abs(expected - pixels).max() <= 1
    return True


def run_apart(folder: Path | None, rounds: int, *, seed: int, timeout: int) -> dict[str, Any]:
    command = [sys.executable, __file__, str(rounds), str(seed), str(folder or "")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def check(report: dict[str, Any], rounds: int) -> None:
    assert report["decoded"] + report["refused"] == rounds
    assert min(report["decoded"], report["refused"], report["resized"]) > rounds / 20, report
    assert report["compared"] > rounds / 100, report
    assert report["slowest_s"] < SLOWEST_S, report
    assert report["peak_mb"] < PEAK_MB, report


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_damaged_files_of_all_kinds_give_pixels_or_an_error() -> None:
    check(run_apart(None, 600, seed=1, timeout=50), 600)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_5000_damaged_real_photographs_give_pixels_or_an_error(shared: Path) -> None:
    check(run_apart(shared / "data", 5_000, seed=2, timeout=1_700), 5_000)


def main() -> None:
    import resource

    limit = ADDRESSES_GB << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    rounds, seed, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    sources = made()
    if folder:
        chance = Chance(0)
        found = [
            *chance.sample(sorted(Path(folder, "bioscan_crop").rglob("*.jpg")), 100),
            *chance.sample(sorted(Path(folder, "insects").rglob("*.jpg")), 200),
            *sorted(Path(folder, "bioscan1m_orders").rglob("*.jpg")),
        ]
        sources = [path.read_bytes() for path in found]
    sys.stdout.write(json.dumps(hammer(sources, rounds, seed)))


if __name__ == "__main__":
    main()
