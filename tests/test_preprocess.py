"""Resizing, encoding and cropping, against ImageMagick, Pillow and a transcription of the paper's rule."""

import io
import math
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from bioscan.data.boxes import Finding
from bioscan.data.decode import decode_image
from bioscan.data.preprocess import (
    CropSettings,
    Resized,
    ResizeSettings,
    aspect_box,
    crop_padded,
    crop_picture,
    encode_jpeg,
    encode_png,
    margin_box,
    resize_file,
    resize_pixels,
    resized_shape,
    shrink,
)
from bioscan.errors import DataError, ImageError, RequestError

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
LANCZOS = Image.Resampling.LANCZOS


def psnr(one: Pixels, other: Pixels) -> float:
    """Peak signal to noise, dB."""
    error = float(((one.astype(float) - other) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def picture(width: int, height: int, seed: int = 0) -> Pixels:
    """Soft spots of colour."""
    rough = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC))


def saved(image: Image.Image | Pixels, form: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    made = image if isinstance(image, Image.Image) else Image.fromarray(image)
    made.save(file, form, **options)
    return file.getvalue()


def resized(data: bytes, name: str = "a.jpg", **options: Any) -> Resized:
    return resize_file(data, ResizeSettings(**options), name=name, place="b.zip @ 7")


def pixels_of(made: Resized) -> Pixels:
    return decode_image(made.data, name="", place="")


# -- sizes


@pytest.mark.parametrize(("geometry", "fix"), [("x256", "height"), ("256x256^", "shorter")])
def test_sizes_are_those_of_imagemagick(geometry: str, fix: str, oracle: Callable[[str], str]) -> None:
    chance = random.Random(1)
    sizes = [(chance.randint(1, 900), chance.randint(1, 900)) for _ in range(50)]
    sizes += [(2880, 2160), (300, 600), (341, 256), (256, 341), (1, 700), (700, 256), (513, 384), (1, 1)]
    sizes = [(w, h) for w, h in sizes if max(w, h) * 256 / min(w, h) < 8_000]
    command = [oracle("convert-im6.q16"), "-filter", "point"]
    for width, height in sizes:
        command += ["(", "-size", f"{width}x{height}", "xc:", "-resize", geometry, ")"]
    command += ["-format", "%h %w\n", "info:"]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    expected = [tuple(map(int, line.split())) for line in made if line]
    assert [resized_shape(h, w, 256, fix, enlarge=True) for w, h in sizes] == expected


@given(
    st.integers(1, 70_000),
    st.integers(1, 70_000),
    st.integers(1, 2_000),
    st.sampled_from(["shorter", "height"]),
)
def test_no_side_vanishes_and_nothing_grows_unasked(height: int, width: int, size: int, fix: str) -> None:
    new_height, new_width = resized_shape(height, width, size, fix)
    assert 1 <= new_height <= height
    assert 1 <= new_width <= width
    fixed, new_fixed = (
        (height, new_height) if fix == "height" else (min(height, width), min(new_height, new_width))
    )
    assert new_fixed == min(fixed, size)
    if new_fixed < fixed:  # the other side is the nearest whole number
        assert abs(new_width - max(width * size / fixed, 0.5)) <= 0.5 + 1e-9
        assert abs(new_height - max(height * size / fixed, 0.5)) <= 0.5 + 1e-9


def test_portraits_keep_their_shorter_side_unless_the_height_is_fixed() -> None:
    assert shrink(picture(300, 600)).shape == (512, 256, 3)
    assert shrink(picture(300, 600), fix="height").shape == (256, 128, 3)
    assert shrink(picture(600, 300)).shape == shrink(picture(600, 300), fix="height").shape == (256, 512, 3)


def test_small_pictures_are_enlarged_only_when_asked() -> None:
    small = picture(120, 90)
    assert shrink(small) is small
    assert shrink(small, enlarge=True).shape == (256, 341, 3)
    assert shrink(picture(3, 500), 10, "height").shape == (10, 1, 3)  # .06 pixels wide by arithmetic


def test_an_enlargement_beyond_all_memory_is_refused_before_it_begins() -> None:
    with pytest.raises(DataError, match=r"enlarged to 256 x 15,360,000 pixels, more than 100,000,000"):
        shrink(np.zeros((60_000, 1, 3), np.uint8), enlarge=True)
    with pytest.raises(ImageError, match=r"^a\.jpg: enlarged to .* \(b\.zip @ 7\)$"):
        resized(encode_jpeg(np.zeros((60_000, 1, 3), np.uint8)), enlarge=True)
    with pytest.raises(DataError, match="empty picture of 0 x 5 pixels"):
        shrink(np.zeros((5, 0, 3), np.uint8))
    with pytest.raises(RequestError, match="unknown side to fix: 'width'"):
        shrink(picture(9, 9), 4, "width")


# -- encoding


@pytest.mark.parametrize("quality", [30, 75, 98])
@pytest.mark.parametrize(("subsampling", "layers"), [("420", (2, 2)), ("422", (2, 1)), ("444", (1, 1))])
def test_jpegs_are_those_of_pillow(quality: int, subsampling: str, layers: tuple[int, int]) -> None:
    pixels = picture(101, 75)
    data = encode_jpeg(pixels, quality, subsampling)
    expected = saved(pixels, quality=quality, subsampling=":".join(subsampling))
    with Image.open(io.BytesIO(data)) as made, Image.open(io.BytesIO(expected)) as pillow:
        assert made.quantization == pillow.quantization  # type: ignore[attr-defined]
        assert made.layer[0][1:3] == layers  # type: ignore[attr-defined]
        if quality >= 96:  # below, libjpeg-turbo's own interface takes the faster cosine transform
            assert np.array_equal(np.asarray(made), np.asarray(pillow))
        assert abs(psnr(np.asarray(made), pixels) - psnr(np.asarray(pillow), pixels)) < 0.3
        assert "exif" not in made.info


def test_gray_and_png_are_as_they_say() -> None:
    pixels = picture(40, 30)
    with Image.open(io.BytesIO(encode_jpeg(pixels, 90, "gray"))) as made:
        assert made.mode == "L"
    with Image.open(io.BytesIO(encode_png(pixels[:, ::-1]))) as made:
        assert np.array_equal(np.asarray(made), pixels[:, ::-1])


def test_what_cannot_be_encoded_is_refused() -> None:
    pixels = picture(8, 8)
    with pytest.raises(RequestError, match="quality is 0; it must be from 1 to 100"):
        encode_jpeg(pixels, 0)
    with pytest.raises(RequestError, match="unknown subsampling '421'; did you mean '422'"):
        encode_jpeg(pixels, 75, "421")
    with pytest.raises(DataError, match=r"70,000 x 1 pixels; a JPEG has 1 to 65,500 a side"):
        encode_jpeg(np.zeros((1, 70_000, 3), np.uint8))
    for empty in (np.zeros((0, 3, 3), np.uint8), np.zeros((3, 0, 3), np.uint8)):
        with pytest.raises(DataError, match=r"0"):
            encode_jpeg(empty)
        with pytest.raises(DataError, match="empty picture"):
            encode_png(empty)
    with pytest.raises(RequestError, match="shorter_side is 0; it must be at least 1"):
        ResizeSettings(shorter_side=0)


# -- files


def test_real_originals_shrunk_on_load_equal_a_full_resize_to_48_db(shared: Path) -> None:
    files = sorted((shared / "data/bioscan1m_orders/original_full").glob("*.jpg"))
    assert len(files) == 18
    for file in files:
        data = file.read_bytes()
        made = resized(data, name="a.png")  # as PNG, so that the encoder's loss stays out
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(image.resize((341, 256), LANCZOS))
        assert psnr(pixels_of(made), expected) >= 48, file.name


def test_mid_sized_photographs_equal_a_full_resize_to_48_db(shared: Path) -> None:
    files = sorted((shared / "data/bioscan_crop/original_1024").glob("*.jpg"))[::60]
    for size in (100, 219, 256):  # 1024 x 768: at 1/4, 1/2, and whole
        for file in files:
            with Image.open(file) as image:
                wanted = max(1, math.floor(size / image.height * image.width + 0.5)), size
                expected = np.asarray(image.resize(wanted, LANCZOS))
            made = pixels_of(resized(file.read_bytes(), name="a.png", shorter_side=size))
            assert psnr(made, expected) >= 48, (file.name, size)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_shrunk_jpeg_stands_upright_and_in_its_place(orientation: int) -> None:
    # at 1/4 it is 251 x 195, not 250.25 x 194.25: resized as it comes, the picture shifts (then 43 dB)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture(1001, 777), quality=95, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        made = resized(data, name="a.png", shorter_side=100)
        assert (made.width, made.height) == upright.size
        expected = np.asarray(upright.resize((made.new_width, made.new_height), LANCZOS))
    assert made.how == "shrunk"
    assert min(made.new_width, made.new_height) == 100
    assert psnr(pixels_of(made), expected) >= 52


@pytest.mark.parametrize(
    ("mode", "form", "options"),
    [
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("P", "GIF", {}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("RGB", "WEBP", {"lossless": True}),
        ("RGB", "BMP", {}),
    ],
)
def test_every_kind_of_file_becomes_a_small_rgb_jpeg(mode: str, form: str, options: dict[str, Any]) -> None:
    data = saved(Image.fromarray(picture(200, 150)).convert(mode), form, **options)
    made = resized(data, name="a.tif", shorter_side=64, quality=95)
    expected = shrink(decode_image(data, name="", place=""), 64)
    with Image.open(io.BytesIO(made.data)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (85, 64))
    assert psnr(pixels_of(made), expected) > 35


def test_a_jpeg_that_needs_no_change_is_copied() -> None:
    exif = Image.Exif()
    exif[0x0110] = "Keyence"
    data = saved(picture(300, 200), quality=50, exif=exif)
    assert resized(data) == (data, "copied", 300, 200, 300, 200)
    assert resized(data, fix="height") == (data, "copied", 300, 200, 300, 200)
    exact = saved(picture(300, 256))
    assert resized(exact).data == exact
    grey = saved(Image.fromarray(picture(30, 20)).convert("L"))
    assert resized(grey).how == resized(grey, subsampling="gray").how == "copied"


def test_a_small_jpeg_that_needs_a_change_is_encoded_anew() -> None:
    pixels = picture(300, 200)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = resized(saved(pixels, exif=exif))
    assert turned[1:] == ("encoded", 200, 300, 200, 300)
    assert b"Exif" not in turned.data
    assert resized(saved(Image.fromarray(pixels).convert("CMYK"))).how == "encoded"
    assert resized(saved(pixels), subsampling="gray").how == "encoded"
    png = resized(saved(pixels), name="a.PNG")  # the name promises a PNG
    assert png.how == "encoded"
    assert png.data.startswith(b"\x89PNG")
    assert resized(saved(pixels), shorter_side=300, enlarge=True)[1:] == ("enlarged", 300, 200, 450, 300)


def test_a_broken_jpeg_is_never_copied() -> None:
    data = saved(picture(300, 200))
    for end in (len(data) // 2, len(data) - 3):
        with pytest.raises(ImageError, match=r"a\.jpg: truncated JPEG \(b\.zip @ 7\)"):
            resized(data[:end])


def test_an_array_of_pixels_is_resized_like_a_file() -> None:
    pixels = picture(400, 300)
    made = resize_pixels(pixels, ResizeSettings(shorter_side=60), name="a.png", place="")
    assert made[1:] == ("shrunk", 400, 300, 80, 60)
    assert np.array_equal(pixels_of(made), np.asarray(Image.fromarray(pixels).resize((80, 60), LANCZOS)))
    with pytest.raises(ImageError, match="empty picture"):
        resize_pixels(np.zeros((0, 3, 3), np.uint8), ResizeSettings(), name="a.png", place="")


# -- the crop of the paper's program


def paper_crop(
    image: Image.Image, box: list[float], ratio: float, equal: bool, grey: int
) -> tuple[tuple[int, ...], Pixels]:
    """The rule as ../shared/facts/dataset_and_reference.md 2.4 tells it, in steps, with Pillow's calls."""
    left, top, right, bottom = (float(v) for v in np.round(np.array(box), 0))
    if equal:
        x_change = y_change = (ratio - 1) * max(right - left, bottom - top)
    else:
        x_change = (right - left) * ratio - (right - left)
        y_change = (bottom - top) * ratio - (bottom - top)
    x0, x1 = int(left - x_change / 2), int(right + x_change / 2)
    y0, y1 = int(top - y_change / 2), int(bottom + y_change / 2)
    window = (x0, y0, x1, y1)
    fill = (grey,) * 3
    if x0 < 0:
        image = ImageOps.expand(image, (-x0, 0, 0, 0), fill)
        x0, x1 = 0, x1 - x0
    if y0 < 0:
        image = ImageOps.expand(image, (0, -y0, 0, 0), fill)
        y0, y1 = 0, y1 - y0
    if x1 > image.width:
        image = ImageOps.expand(image, (0, 0, x1 - image.width + 1, 0), fill)
    if y1 > image.height:
        image = ImageOps.expand(image, (0, 0, 0, y1 - image.height + 1), fill)
    return window, np.asarray(image.crop((x0, y0, x1, y1)))


EDGE = st.floats(-150, 250, allow_nan=False) | st.integers(-60, 160).map(lambda n: n / 2)


@settings(max_examples=300, deadline=None)
@given(
    *(EDGE,) * 4,
    st.integers(1, 90),
    st.integers(1, 70),
    st.sampled_from([1.0, 1.1, 1.4, 1.4, 2.0]),
    st.booleans(),
    st.sampled_from([0, 240]),
)
def test_the_paper_crop_is_exact_to_the_pixel(
    x: float,
    y: float,
    other_x: float,
    other_y: float,
    width: int,
    height: int,
    ratio: float,
    equal: bool,
    grey: int,
) -> None:
    box = [*map(min, ((x, other_x), (y, other_y))), *map(max, ((x, other_x), (y, other_y)))]
    pixels = picture(width, height)
    window, expected = paper_crop(Image.fromarray(pixels), box, ratio, equal, grey)
    assert margin_box((box[0], box[1], box[2], box[3]), ratio, equal_extend=equal) == window
    chosen = CropSettings(ratio=ratio, equal_extend=equal, fill=str(grey))
    if expected.size:
        assert np.array_equal(
            crop_padded(pixels, margin_box(*_args(box, ratio), equal_extend=equal), (grey,) * 3), expected
        )
        assert np.array_equal(crop_picture(pixels, found(box), chosen), expected)
    else:  # Pillow gives a picture without pixels, which cannot be saved
        with pytest.raises(DataError, match="a crop without pixels"):
            crop_picture(pixels, found(box), chosen)


def test_margins_by_hand() -> None:
    # 100 wide: 20 on each side of both axes; halves are rounded to even first: 10.5 -> 10, 110.5 -> 110
    assert margin_box((10.5, 30, 110.5, 80)) == (-9, 10, 130, 100)  # left: -9.99… truncated toward zero
    assert margin_box((100, 100, 200, 150)) == (80, 80, 220, 170)
    assert margin_box((100, 100, 200, 150), equal_extend=False) == (80, 90, 220, 160)
    assert margin_box((100, 100, 200, 150), 1.0) == (100, 100, 200, 150)


# -- better crops


def found(box: list[float], mask: np.ndarray[Any, np.dtype[np.bool_]] | None = None) -> Finding:
    return Finding("one", np.array([box], float), np.ones(1), mask)


def _args(box: list[float], ratio: float) -> tuple[tuple[float, float, float, float], float]:
    return (box[0], box[1], box[2], box[3]), ratio


@given(
    st.floats(-50, 50),
    st.floats(-50, 50),
    st.floats(1, 300),
    st.floats(1, 300),
    st.sampled_from([1.0, 4 / 3, 0.5, 3.0]),
    st.floats(1, 3),
    st.booleans(),
)
def test_a_window_of_given_proportions_holds_the_margins(
    x: float, y: float, width: float, height: float, aspect: float, ratio: float, equal: bool
) -> None:
    left, top, right, bottom = aspect_box((x, y, x + width, y + height), aspect, ratio, equal_extend=equal)
    assert abs((right - left) - (bottom - top) * aspect) <= max(0.5, 0.5 * aspect) + 1e-9
    longer = max(width, height)
    across = width + (ratio - 1) * (longer if equal else width)
    down = height + (ratio - 1) * (longer if equal else height)
    assert right - left >= across - max(0.5, 0.5 * aspect) - 0.5 - 1e-9
    assert bottom - top >= down - max(0.5, 0.5 / aspect) - 0.5 - 1e-9
    assert right - left <= max(across, down * aspect) + 1 + aspect  # and is not larger than it must be
    assert abs((left + right) / 2 - (x + width / 2)) <= 0.5 + 1e-9
    assert abs((top + bottom) / 2 - (y + height / 2)) <= 0.5 + 1e-9


def test_square_and_aspect_windows_by_hand() -> None:
    box = (100.0, 100.0, 200.0, 150.0)  # 100 x 50, with margins 140 x 90, centre 150, 125
    assert aspect_box(box, 1.0) == (80, 55, 220, 195)
    assert aspect_box(box, 2.0) == (60, 80, 240, 170)
    pixels = picture(400, 300)
    assert crop_picture(pixels, found([*box]), CropSettings(margin="square")).shape == (140, 140, 3)
    wide = crop_picture(pixels, found([*box]), CropSettings(margin="aspect", aspect="16:9"))
    assert wide.shape == (90, 160, 3)
    assert np.array_equal(wide, pixels[80:170, 70:230])


def test_a_colour_fills_what_lies_outside() -> None:
    pixels = np.full((20, 30, 3), 9, np.uint8)
    made = crop_picture(pixels, found([0, 0, 10, 10]), CropSettings(fill="204,218,243"))
    assert made.shape == (13, 13, 3)  # 2 to the left and right, the left one truncated to 1 by 1.4 - 1
    assert made[0, 0].tolist() == [204, 218, 243]
    assert (made[1:, 1:] == 9).all()


def test_the_background_is_continued_and_the_specimen_is_not() -> None:
    # a floor that darkens to the right, and a black specimen that lies at the left and lower edge
    floor = np.broadcast_to(np.linspace(220, 120, 200)[None, :, None], (150, 200, 3)).astype(np.uint8).copy()
    mask = np.zeros((150, 200), np.bool_)
    mask[110:150, 0:60] = True
    floor[mask] = 0
    settings = CropSettings(margin="square", fill="background", ratio=2)
    for finding in (found([0, 110, 60, 150], mask), found([0, 110, 60, 150])):
        made = crop_picture(floor, finding, settings)
        assert made.shape == (120, 120, 3)  # from x -30, y 70
        assert np.array_equal(made[:80, 30:], floor[70:150, :90])
        outside = np.concatenate([made[:, :30].reshape(-1, 3), made[80:].reshape(-1, 3)])
        assert outside.min() > 170  # the floor that is seen has 175 to 220
        assert outside.max() <= 221
    flat = np.full((50, 50, 3), (90, 140, 200), np.uint8)
    made = crop_picture(flat, found([-10, 20, 10, 40]), settings)
    assert np.abs(made.astype(int) - (90, 140, 200)).max() <= 1


def test_the_shadow_around_a_specimen_is_no_background() -> None:
    pixels = np.full((150, 200, 3), 200, np.uint8)
    mask = np.zeros((150, 200), np.bool_)
    mask[112:150, 70:132] = True
    pixels[110:150, 68:134] = 20  # two pixels more than the mask
    made = crop_picture(
        pixels, found([70, 112, 132, 150], mask), CropSettings(margin="square", fill="background")
    )
    outside = made[150 - 88 :]  # 87 square around the centre 101, 131
    assert made.shape == (87, 87, 3)
    assert outside.min() >= 199


def test_a_crop_that_shows_nothing_of_the_picture_is_the_papers_grey() -> None:
    made = crop_picture(picture(20, 20), found([100, 100, 120, 120]), CropSettings(fill="background"))
    assert made.shape == (28, 28, 3)
    assert (made == 240).all()


def bar(angle: float) -> tuple[Pixels, np.ndarray[Any, np.dtype[np.bool_]], list[float]]:
    """A black bar of 80 x 12 pixels, its right end turned down by the angle; its mask and box."""
    y, x = np.mgrid[:160, :200] + 0.5
    turn = math.radians(angle)
    along = (x - 95) * math.cos(turn) + (y - 70) * math.sin(turn)
    across = (y - 70) * math.cos(turn) - (x - 95) * math.sin(turn)
    mask = (np.abs(along) < 40) & (np.abs(across) < 6)
    pixels = np.full((160, 200, 3), 220, np.uint8)
    pixels[mask] = 0
    rows, columns = np.nonzero(mask)
    return pixels, mask, [float(columns.min()), float(rows.min()), columns.max() + 1.0, rows.max() + 1.0]


@pytest.mark.parametrize("angle", [0, 20, -35, 60, 89, 90, -70])
def test_the_long_axis_is_turned_level(angle: float) -> None:
    pixels, mask, box = bar(angle)
    made = crop_picture(pixels, found(box, mask), CropSettings(rotate=True, fill="background"))
    dark = made[..., 0] < 110
    rows, columns = np.nonzero(dark)
    assert abs(np.ptp(rows) + 1 - 12) <= 2
    assert abs(np.ptp(columns) + 1 - 80) <= 2
    assert dark.sum() == pytest.approx(80 * 12, rel=0.04)
    # 80 x 12 with a margin of .2 x 80 on all sides; the turned pixels stand out by their corners
    assert made.shape[0] == pytest.approx(12 + 32, abs=3)
    assert made.shape[1] == pytest.approx(80 + 32, abs=3)
    assert abs(rows.mean() + 0.5 - made.shape[0] / 2) <= 1
    assert abs(columns.mean() + 0.5 - made.shape[1] / 2) <= 1
    assert (made[~dark].astype(int) > 100).all()


def test_a_turned_crop_shows_nothing_mirrored() -> None:
    pixels, mask, box = bar(90)
    pixels[40:50, 89:101] = (255, 0, 0)  # the upper end is red, on its right side a green dot
    pixels[60:70, 105:110] = (0, 255, 0)
    made = crop_picture(pixels, found(box, mask), CropSettings(rotate=True)).astype(int)
    red = np.nonzero((made[..., 0] > 200) & (made[..., 1] < 90))
    green = np.nonzero((made[..., 1] > 200) & (made[..., 0] < 90))
    middle = made.shape[0] / 2, made.shape[1] / 2
    if red[1].mean() < middle[1]:  # turned left: up is left, right is up
        assert green[0].mean() < middle[0]
    else:
        assert green[0].mean() > middle[0]


def test_outside_of_a_turned_picture_is_the_fill() -> None:
    pixels = np.full((60, 60, 3), 100, np.uint8)
    mask = np.eye(60, dtype=np.bool_)
    grey = crop_picture(pixels, found([0, 0, 60, 60], mask), CropSettings(rotate=True))
    assert grey[0, 0].tolist() == [240, 240, 240]
    matched = crop_picture(pixels, found([0, 0, 60, 60], mask), CropSettings(rotate=True, fill="background"))
    assert np.abs(matched.astype(int) - 100).max() <= 1


def test_a_box_alone_is_turned_by_a_quarter_when_it_is_high() -> None:
    pixels = picture(90, 120)
    settings = CropSettings(rotate=True)
    high, wide = found([20, 10, 40, 60]), found([20, 10, 70, 30])
    plain = crop_picture(pixels, high, CropSettings())
    assert np.array_equal(crop_picture(pixels, high, settings), np.rot90(plain))
    assert np.array_equal(crop_picture(pixels, wide, settings), crop_picture(pixels, wide, CropSettings()))


def test_boxes_that_are_none_are_refused() -> None:
    pixels = picture(20, 20)
    nothing = Finding("none", np.zeros((0, 4)), np.zeros(0))
    with pytest.raises(DataError, match="a finding without a box"):
        crop_picture(pixels, nothing, CropSettings())
    for box in ([5.0, 5, 3, 9], [0.0, 0, math.nan, 4], [0.0, 0, math.inf, 4]):
        with pytest.raises(DataError, match="a box that is none"):
            crop_picture(pixels, found(box), CropSettings())
    for fill in ("240", "background"):
        with pytest.raises(DataError, match="a crop without pixels"):
            crop_picture(pixels, found([5, 5, 5, 5]), CropSettings(fill=fill))
        with pytest.raises(DataError, match=r"a crop of .* pixels, more than 100,000,000"):
            crop_picture(pixels, found([0, 0, 1e7, 1e7]), CropSettings(fill=fill))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratio": 0.9}, "ratio is 0.9; it must be at least 1"),
        ({"ratio": math.nan}, "ratio is nan"),
        ({"aspect": "wide"}, "aspect is 'wide'; expected width to height, like 4:3"),
        ({"aspect": "4:0"}, "aspect is '4:0'"),
        ({"aspect": "-4:3"}, "aspect is '-4:3'"),
        ({"fill": "256"}, "fill is '256'; expected a grey like 240"),
        ({"fill": "1,2"}, "fill is '1,2'"),
        ({"fill": "floor"}, "fill is 'floor'"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        CropSettings(**wrong)
    assert message in str(caught.value)
