"""Decoding: RGB pixels equal to those of other decoders, and one error for whatever is broken."""

import io
import random
import struct
import subprocess
import sys
import zipfile
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


def test_16_bit_colours_are_scaled_and_white_may_be_zero(
    tmp_path: Path, oracle: Callable[[str], str]
) -> None:
    grey = np.array([[0, 65535, 2570]], np.uint16)
    data = saved(Image.fromarray(grey), "TIFF", tiffinfo={0x0106: 0})
    (tmp_path / "a.tif").write_bytes(data)
    command = [oracle("convert-im6.q16"), str(tmp_path / "a.tif"), "-depth", "8", "gray:-"]
    made = subprocess.run(command, capture_output=True, check=True).stdout
    assert decode(data)[0, :, 0].tolist() == [*made] == [255, 0, 245]
    colours = np.array([[[0, 0x1234, 0xFFFF], [0x8000, 0x00FF, 0x0100]]], ">u2")
    body = zlib.compress(b"\0" + colours.tobytes())
    assert decode(png(2, 1, body, bits=16))[0].tolist() == [[0, 0x12, 0xFF], [0x80, 0, 1]]


@pytest.mark.parametrize("switches", [("-arithmetic",), ("-arithmetic", "-progressive"), ("-restart", "1")])
def test_rare_codings_of_jpeg_give_the_pixels_of_djpeg(
    switches: tuple[str, ...], oracle: Callable[[str], str]
) -> None:
    source = saved(picture(), "PPM")
    data = subprocess.run([oracle("cjpeg"), *switches], input=source, capture_output=True, check=True).stdout
    made = subprocess.run([oracle("djpeg"), "-ppm"], input=data, capture_output=True, check=True).stdout
    with Image.open(io.BytesIO(made)) as image:
        assert np.array_equal(decode(data), np.asarray(image))


def test_transparent_parts_are_white() -> None:
    image = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 51))  # a fifth black on white: 255 * 4 / 5
    assert decode(saved(image, "PNG"))[0].tolist() == [[200, 0, 0], [255, 255, 255], [204, 204, 204]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 7, 7, 7])
    palette.putpixel((1, 0), 1)
    assert decode(saved(palette, "PNG", transparency=1))[0].tolist() == [[9, 9, 9], [255, 255, 255]]


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_of_several_frames_or_pages_the_first_is_taken(form: str) -> None:
    first = Image.new("RGB", (40, 30), (250, 0, 0))
    others = [Image.new("RGB", (40, 30), (0, 250, 0)), Image.new("RGB", (40, 30), (0, 0, 250))]
    lossless = {"lossless": True} if form == "WEBP" else {}
    data = saved(first, form, save_all=True, append_images=others, **lossless)
    assert np.array_equal(decode(data), np.asarray(first))


def test_the_name_says_nothing_of_the_kind() -> None:
    assert np.array_equal(decode(saved(picture(), "PNG")), SMOOTH)  # all are named a.jpg


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


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "value"), [(3, "H2x"), (4, "L")])
def test_the_orientation_may_be_a_short_or_a_long_number(order: str, kind: int, value: str) -> None:
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    exif = mark + struct.pack(f"{order}LHHHL{value}", 8, 1, 0x0112, kind, 1, 6)
    block = b"Exif\0\0" + exif
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    second = segment.replace(struct.pack(f"{order}{value}", 6), struct.pack(f"{order}{value}", 3))
    assert np.array_equal(decode(JPEG[:2] + segment + second + JPEG[2:]), np.rot90(decode(JPEG), -1))


def test_exif_that_cannot_be_read_does_not_cost_the_picture() -> None:
    for exif in (b"", b"MM", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + bytes(range(200))):
        data = saved(picture(), "PNG", exif=b"Exif\0\0" + exif)
        assert np.array_equal(decode(data), SMOOTH)


def test_a_huge_exif_block_is_passed_over() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    exif[0x927C] = bytes(60_000)
    data = saved(picture(), exif=exif)
    more = b"\xff\xe1\xff\xff" + b"Exif\0\0" + bytes(65_527)
    assert np.array_equal(decode(data[:2] + more * 200 + data[2:]), decode(JPEG))  # the first counts
    assert np.array_equal(decode(data), decode(JPEG)[::-1, ::-1])


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


@pytest.mark.parametrize(
    ("mode", "form", "options"),
    [
        ("RGB", "JPEG", {"progressive": True}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("P", "GIF", {}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("RGB", "WEBP", {"lossless": True}),
        ("RGB", "BMP", {}),
    ],
)
def test_a_file_cut_anywhere_gives_the_whole_picture_or_none(
    mode: str, form: str, options: dict[str, Any]
) -> None:
    data = saved(picture(mode), form, **options)
    whole = decode(data)
    for end in [*range(0, 60, 3), *range(60, len(data), 97), *range(len(data) - 30, len(data))]:
        try:
            assert np.array_equal(decode(data[:end]), whole), end
        except ImageError:
            continue


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, body: bytes, *, bits: int = 8, before: bytes = b"") -> bytes:
    """A PNG of colours with a compressed body, and chunks before that."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + before + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def png_header(width: int, height: int) -> bytes:
    return png(width, height, zlib.compress(bytes(100)))


def tiff(width: int, height: int, compression: int, body: bytes) -> bytes:
    """A grey TIFF with one strip, which is said to be as long as can be."""
    tags = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 8),
        (259, 3, compression),
        (262, 3, 1),
        (273, 4, 134),
        (277, 3, 1),
        (278, 4, 0xFFFFFFFF),
        (279, 4, 0xFFFFFFFF),
    ]
    entries = b"".join(struct.pack("<HHLL", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(4) + bytes(12) + body


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes so often."""
    data = saved(picture(), progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def bombs() -> dict[str, bytes]:
    """Small files that would fill the memory or take an hour if they were believed."""
    zeros = zlib.compress(bytes(100_000_000), 9)
    pixel = zlib.compress(bytes(4))
    gif = bytearray(saved(Image.new("P", (4, 4)), "GIF"))
    frame = gif.index(b"\x2c")
    tiny, wide = bytearray(gif), bytearray(gif)
    tiny[frame + 5 : frame + 9] = struct.pack("<HH", 65_000, 65_000)
    wide[6:10] = struct.pack("<HH", 65_000, 65_000)
    bmp, long = bytearray(saved(picture(), "BMP")), bytearray(JPEG)
    bmp[18:26] = struct.pack("<ii", 99_999, 99_999)
    at = long.index(b"\xff\xc0") + 5
    long[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    options = {"save_all": True, "append_images": [picture().rotate(90)], "lossless": True}
    webp = bytearray(saved(picture(), "WEBP", **options))
    canvas = webp.index(b"VP8X") + 12
    webp[canvas : canvas + 6] = b"\xff\x3f\0\xff\x3f\0"
    return {
        "PNG of 100,000 x 100,000": png_header(100_000, 100_000),
        "PNG, text": png(1, 1, pixel, before=chunk(b"zTXt", b"Comment\0\0" + zeros)),
        "PNG, international text": png(1, 1, pixel, before=chunk(b"iTXt", b"C\0\1\0\0\0" + zeros)),
        "PNG, profile": png(1, 1, pixel, before=chunk(b"iCCP", b"icc\0\0" + zeros)),
        "JPEG of 65,500 x 65,500": bytes(long),
        "JPEG of 10,000 scans": scans(10_000),
        "GIF, large frame on a tiny canvas": bytes(tiny),
        "GIF, large canvas": bytes(wide),
        "BMP of 99,999 x 99,999": bytes(bmp),
        "WebP, large canvas": bytes(webp),
        "TIFF of 60,000 x 60,000": tiff(60_000, 60_000, 8, zeros),
        "TIFF, strip of 4 GiB": tiff(9_000, 9_000, 1, bytes(500)),
        "TIFF, packed strip of 4 GiB": tiff(9_000, 9_000, 8, zlib.compress(bytes(500))),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_bombs_are_refused_in_little_memory_and_time(tmp_path: Path) -> None:
    for number, data in enumerate(bombs().values()):
        (tmp_path / f"{number:02}").write_bytes(data)
    program = f"""
import pathlib, resource
from bioscan.data.decode import decode_image
from bioscan.errors import ImageError
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
for path in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):
    try:
        print(decode_image(path.read_bytes(), name="", place="").shape)
    except ImageError:
        print("refused")
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    *said, peak_kb = done.stdout.splitlines()
    assert dict(zip(bombs(), said, strict=True)) == dict.fromkeys(bombs(), "refused")
    assert int(peak_kb) < 300_000


def test_progressive_jpegs_of_a_usual_number_of_scans_are_read() -> None:
    assert decode(scans(1)).shape == (75, 101, 3)
    assert refused(scans(100)).startswith("a progressive JPEG of more than 64 scans (1")
    thumbnail = b"\xff\xe1" + struct.pack(">H", 4002) + b"\xff\xda\0\2" * 1000
    data = saved(picture(), progressive=True)
    assert np.array_equal(decode(data[:2] + thumbnail + data[2:]), decode(data))  # no scans of this image


def test_long_filling_and_rubbish_are_passed_over() -> None:
    assert np.array_equal(decode(JPEG[:2] + b"\xff" * 20_000_000 + JPEG[2:]), decode(JPEG))
    assert refused(JPEG[:2] + bytes(20_000_000) + JPEG[:90]) == "truncated JPEG"


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


def test_a_checksum_is_compared_when_asked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jpg", JPEG)
    whole = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(
        whole.replace(b"JFIF\0\1\1", b"JFIF\0\1\2", 1)
    )  # the version: it decodes
    package = Images(tmp_path / "a.zip")
    assert np.array_equal(read_rgb(package, 0), decode(JPEG))
    with pytest.raises(ImageError, match=r"^a\.jpg: damaged: its checksum is another one"):
        read_rgb(package, 0, checked=True)


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
