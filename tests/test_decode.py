"""Decoding: RGB pixels equal to those of other decoders, and one error for whatever is broken."""

import io
import random
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from bioscan.data.decode import decode_image, read_rgb
from bioscan.data.images import Images
from bioscan.errors import ImageError

RNG = np.random.default_rng(0)
SMOOTH = np.asarray(Image.fromarray(RNG.integers(0, 256, (6, 8, 3), np.uint8)).resize((101, 75), 3))
"""A picture without sharp edges, height 75, width 101."""


def decode(data: bytes, **options: Any) -> np.ndarray[Any, Any]:
    return decode_image(data, name="a.jpg", place="b.zip @ 7", **options)


def refused(data: bytes, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, **options)
    assert (caught.value.name, caught.value.place) == ("a.jpg", "b.zip @ 7")
    assert str(caught.value) == f"a.jpg: {caught.value.reason} (b.zip @ 7)"
    return caught.value.reason


def saved(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(SMOOTH).convert(mode)


JPEG = saved(picture())


@pytest.fixture(scope="module")
def photographs(shared: Path) -> list[Path]:
    root = shared / "data/insects/bioscan/images/cropped_256"
    return random.Random(0).sample(sorted(root.rglob("*.jpg")), 60)


def test_real_photographs_equal_djpeg_and_pillow(
    photographs: list[Path], oracle: Callable[[str], str]
) -> None:
    for path in photographs:
        pixels = decode(path.read_bytes())
        made = subprocess.run([oracle("djpeg"), "-ppm", path], capture_output=True, check=True).stdout
        with Image.open(io.BytesIO(made)) as image:
            assert np.array_equal(pixels, np.asarray(image.convert("RGB"))), path.name
        with Image.open(path) as image:
            assert np.array_equal(pixels, np.asarray(ImageOps.exif_transpose(image).convert("RGB"))), (
                path.name
            )


def test_full_size_originals_equal_pillow(shared: Path) -> None:
    package = Images(shared / "data/bioscan1m_orders/original_full", save_index=False)
    pixels = read_rgb(package, 0)
    with Image.open(io.BytesIO(package.read(0))) as image:
        assert np.array_equal(pixels, np.asarray(image.convert("RGB")))
    assert read_rgb(package, 0, min_size=256).shape[0] == 270  # 2160 / 8


@pytest.mark.parametrize(
    ("mode", "form", "options"),
    [
        ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "JPEG", {"subsampling": 0, "quality": 95}),
        ("RGB", "JPEG", {"restart_marker_blocks": 3}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("L", "PNG", {}),
        ("P", "PNG", {}),
        ("1", "PNG", {}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("CMYK", "TIFF", {}),
        ("RGB", "BMP", {}),
        ("RGB", "WEBP", {"lossless": True}),
    ],
)
def test_each_kind_of_file_gives_pillows_rgb(mode: str, form: str, options: dict[str, Any]) -> None:
    data = saved(picture(mode), form, **options)
    pixels = decode(data)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(pixels, np.asarray(image.convert("RGB")))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (75, 101, 3)
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


def test_16_bit_grey_is_scaled_to_8_bits() -> None:
    grey = np.array([[0, 256, 257, 32768, 65535]], np.uint16)
    assert decode(saved(Image.fromarray(grey), "PNG"))[0, :, 0].tolist() == [0, 0, 1, 127, 255]
    assert decode(saved(Image.fromarray(grey), "TIFF"))[0, :, 1].tolist() == [0, 0, 1, 127, 255]


def test_transparent_parts_are_white() -> None:
    image = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 51))  # a fifth black on white: 255 * 4 / 5
    assert decode(saved(image, "PNG"))[0].tolist() == [[200, 0, 0], [255, 255, 255], [204, 204, 204]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 7, 7, 7])
    palette.putpixel((1, 0), 1)
    assert decode(saved(palette, "PNG", transparency=1))[0].tolist() == [[9, 9, 9], [255, 255, 255]]


def test_of_a_moving_picture_the_first_is_taken() -> None:
    frames = [Image.new("P", (4, 4), n) for n in range(3)]
    for frame, colour in zip(frames, ([250, 0, 0], [0, 250, 0], [0, 0, 250]), strict=True):
        frame.putpalette(colour * 3)
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[0, 0].tolist() == [250, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("form", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("TIFF", "RGB")]
)
def test_pictures_stand_upright(form: str, mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture(mode), form, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    pixels = decode(data)
    assert np.array_equal(pixels, expected)
    assert pixels.shape == ((75, 101, 3) if orientation < 5 else (101, 75, 3))
    assert pixels.flags.c_contiguous


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x05"]
)
def test_a_broken_exif_block_turns_nothing(exif: bytes) -> None:
    block = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    assert np.array_equal(decode(JPEG[:2] + block + JPEG[2:]), decode(JPEG))


def test_a_smaller_jpeg_keeps_the_shorter_side_that_is_asked_for(
    tmp_path: Path, oracle: Callable[[str], str]
) -> None:
    # 75 x 101 at 1/2, 1/4, 1/8, rounded up: 38 x 51, 19 x 26, 10 x 13
    sizes = {1: 10, 10: 10, 11: 19, 19: 19, 20: 38, 38: 38, 39: 75, 75: 75, 76: 75, 500: 75}
    assert {size: decode(JPEG, min_size=size).shape[0] for size in sizes} == sizes
    assert decode(JPEG, min_size=19).shape == (19, 26, 3)
    (tmp_path / "a.jpg").write_bytes(JPEG)
    for factor, size in ((2, 38), (4, 19), (8, 10)):
        command = [oracle("djpeg"), "-ppm", "-scale", f"1/{factor}", str(tmp_path / "a.jpg")]
        made = subprocess.run(command, capture_output=True, check=True).stdout
        with Image.open(io.BytesIO(made)) as image:
            assert np.array_equal(decode(JPEG, min_size=size), np.asarray(image))


def test_what_is_no_picture_is_said_in_plain_words() -> None:
    png, start = saved(picture(), "PNG"), JPEG.index(b"\xff\xda")
    assert refused(b"") == "empty file"
    assert refused(b"hello world") == "not an image (starts with b'hello wo')"
    assert refused(b"<html>") == "not an image (starts with b'<html>')"
    assert refused(JPEG[:2]) == "truncated JPEG"
    assert refused(JPEG[:100]) == "truncated JPEG"
    assert refused(JPEG[: start + 40]) == "truncated JPEG"
    assert refused(JPEG[: len(JPEG) // 2]) == "truncated JPEG"
    assert refused(JPEG[:start] + b"\xff\xd9" + bytes(9)) == "a JPEG file without an image"
    assert refused(png[:4]) == "truncated or damaged PNG"
    assert refused(png[: len(png) // 2]).startswith("truncated or damaged image")
    assert refused(saved(picture("F"), "TIFF")).startswith("pixels of 32 bits")


def test_a_jpeg_cut_anywhere_is_never_half_a_picture() -> None:
    for end in range(0, len(JPEG) - 2, 7):
        refused(JPEG[:end])
    assert decode(JPEG).shape == (75, 101, 3)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))


def test_a_header_that_promises_too_much_is_refused_before_decoding() -> None:
    frame = JPEG.index(b"\xff\xc0")
    bomb = bytearray(JPEG)
    bomb[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    assert refused(bytes(bomb)) == "65,535 x 65,535 pixels, more than 100,000,000"
    assert refused(png_header(10_100, 10_000)) == "10,100 x 10,000 pixels, more than 100,000,000"
    assert refused(png_header(60_000, 60_000)) == "more than 100,000,000 pixels"
    assert refused(JPEG, max_pixels=7_574) == "101 x 75 pixels, more than 7,574"
    assert decode(JPEG, max_pixels=7_575).shape == (75, 101, 3)


def test_kinds_of_jpeg_that_are_not_supported_are_named() -> None:
    frame = JPEG.index(b"\xff\xc0")
    lossless, deep = bytearray(JPEG), bytearray(JPEG)
    lossless[frame + 1] = 0xC3
    deep[frame + 4] = 12
    assert refused(bytes(lossless)) == "a JPEG of a kind that is not supported (8 bits, frame 0xc3)"
    assert refused(bytes(deep)) == "a JPEG of a kind that is not supported (12 bits, frame 0xc0)"


def damage(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, taken out or put in, more often near the beginning."""
    damaged = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(min(len(damaged), chance.choice([700, len(damaged)])) or 1)
        kind = chance.random()
        if kind < 0.6:
            damaged[at : at + 1] = bytes([chance.choice([0, 255, chance.randrange(256)])])
        elif kind < 0.8:
            del damaged[at : at + chance.randint(1, 20)]
        else:
            damaged[at:at] = chance.randbytes(chance.randint(1, 20))
    return bytes(damaged[: chance.randrange(len(damaged) + 1)] if chance.random() < 0.1 else damaged)


def hammer(sources: list[bytes], rounds: int) -> tuple[int, int]:
    """How many damaged files were decoded, and how many refused; anything else fails."""
    chance = random.Random(0)
    decoded = 0
    for _ in range(rounds):
        data = damage(chance.choice(sources), chance)
        try:
            pixels = decode(data, min_size=chance.choice([None, 30, 100]))
        except ImageError:
            continue
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        decoded += 1
    return decoded, rounds - decoded


def test_damaged_photographs_are_decoded_or_refused(photographs: list[Path]) -> None:
    decoded, refused_ = hammer([path.read_bytes() for path in photographs], 2_000)
    assert decoded > 100
    assert refused_ > 100


def test_damaged_files_of_all_kinds_are_decoded_or_refused() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    sources = [
        saved(picture(mode), form, **options)
        for mode, form, options in (
            ("RGB", "PNG", {}),
            ("LA", "PNG", {}),
            ("P", "GIF", {}),
            ("RGB", "BMP", {}),
            ("RGB", "WEBP", {}),
            ("CMYK", "JPEG", {"exif": exif}),
            ("L", "JPEG", {}),
            ("RGB", "JPEG", {"progressive": True, "exif": exif}),
        )
    ]
    assert min(hammer(sources, 1_000)) > 50


def test_a_package_names_the_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    (tmp_path / "p/part1").mkdir(parents=True)
    (tmp_path / "p/part1/good.jpg").write_bytes(JPEG)
    (tmp_path / "p/part1/bad.jpg").write_bytes(JPEG[:500])
    package = Images(tmp_path / "p")
    bad, good = package.find(["bad.jpg", "good.jpg"])
    assert np.array_equal(read_rgb(package, good), decode(JPEG))
    assert read_rgb(package, good, min_size=10).shape == (10, 13, 3)
    with pytest.raises(ImageError, match=r"^bad\.jpg: truncated JPEG \(p/part1/bad\.jpg\)$"):
        read_rgb(package, bad)
