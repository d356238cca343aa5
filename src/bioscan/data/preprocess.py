"""From pixels to the pictures of a package: encoding, resizing, and cutting out a specimen.

Boxes are (x0, y0, x1, y1) in pixels, x to the right and y down; the left edge of the first pixel is 0.
"""

import io
import math
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from bioscan.config import setting
from bioscan.data.boxes import Finding
from bioscan.data.decode import MAX_PIXELS, decode_image, read_jpeg_header, turn
from bioscan.errors import DataError, ImageError, RequestError, unknown

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]
Window = tuple[int, int, int, int]
"""A box of whole pixels; it may lie outside of the picture."""

SUBSAMPLINGS: Final = {"420": "420", "422": "422", "444": "444", "gray": "Gray"}
"""Chroma of a JPEG -> its name in simplejpeg; `gray` has none."""
FIXES: Final = ("shorter", "height")

SHRINK_GAP: Final = 1.75
"""A JPEG is decoded at 1/2, 1/4 or 1/8 as long as that leaves so many times the wanted pixels.

Measured against Lanczos from the full size on 18 originals of BIOSCAN-1M (2880 x 2160) and on 1024-px
photographs: the worst picture has 49.2 dB with a gap of 1.75 and 47.0 dB with 1.5; from 2880 to 341 pixels
across, where 1/4 is taken, 52.2 dB."""
_MAX_JPEG_SIDE: Final = 65_500

CROP_RATIO: Final = 1.4
"""`--crop_ratio` of the paper's program."""
PADDING: Final = "240"
"""Grey that the paper's program lays outside of the picture."""
_GRID: Final = 24
"""Cells of the coarse picture, along the longer side, from which the background is continued."""


@dataclass(frozen=True)
class ResizeSettings:
    """How a package of photographs is resized. The defaults are what the published packages have."""

    shorter_side: int = setting(256, "Pixels of the shorter side, or of the height with --fix height.")
    fix: Literal["shorter", "height"] = setting(
        "shorter",
        "Which side gets these pixels: the shorter one, or the height as in the paper's program, where "
        "portraits come out smaller.",
    )
    quality: int = setting(75, "Of JPEGs, 1 to 100 as libjpeg counts.")
    subsampling: Literal["420", "422", "444", "gray"] = setting(
        "420", "Chroma of JPEGs: 420, 422, 444, or gray for none."
    )
    enlarge: bool = setting(False, "Enlarge smaller images too, as the paper's program does.")

    def __post_init__(self) -> None:
        if self.shorter_side < 1:
            raise RequestError(f"shorter_side is {self.shorter_side}; it must be at least 1")
        _require_encoding(self.quality, self.subsampling)


class Resized(NamedTuple):
    """An image file at another size."""

    data: bytes
    how: Literal["shrunk", "enlarged", "encoded", "copied"]
    """`encoded`: new bytes at the same size; `copied`: the very bytes that came."""
    width: int
    """Of the picture that came, upright."""
    height: int
    new_width: int
    new_height: int


def resize_file(data: bytes, settings: ResizeSettings, *, name: str, place: str) -> Resized:
    """An image file of any kind at the wanted size, upright.

    A large JPEG is decoded at a fraction of its size (see SHRINK_GAP). What comes out is a JPEG without EXIF
    and colour profile, or a PNG where the name ends so. A JPEG that has the size already and stands upright
    is decoded, to know that it is sound, and stays as it is.

    Args:
        data: The file's bytes.
        settings: Size and encoding.
        name: The image's name, whose ending decides on PNG.
        place: For the error: where it lies.

    Raises:
        ImageError: cannot be decoded; the new size is too large for memory or for a JPEG.
    """
    header = read_jpeg_header(data, name=name, place=place)
    if header is None:
        pixels = decode_image(data, name=name, place=place)
        return resize_pixels(pixels, settings, name=name, place=place)
    stored = header.height, header.width
    upright = stored if header.orientation < 5 else stored[::-1]
    try:
        wanted = resized_shape(*upright, settings.shorter_side, settings.fix, enlarge=settings.enlarge)
    except DataError as error:
        raise ImageError(name, place, str(error)) from None
    shrinks = min(wanted) < min(upright)
    pixels = decode_image(
        data,
        name=name,
        place=place,
        min_size=math.ceil(SHRINK_GAP * min(wanted)) if shrinks else None,
        upright=False,
    )
    same = wanted == upright and header.orientation == 1 and not _is_png(name)
    if same and header.components in ((1,) if settings.subsampling == "gray" else (1, 3)):
        return Resized(data, "copied", *upright[::-1], *wanted[::-1])
    if wanted != upright:
        factor = _factor(stored, pixels.shape[:2])
        # libjpeg rounds up: of its last column and row only a part is picture
        box = (0.0, 0.0, stored[1] / factor, stored[0] / factor)
        pixels = _scaled(pixels, wanted if upright == stored else wanted[::-1], box)
    made = _encoded(turn(pixels, header.orientation), settings, name=name, place=place)
    return Resized(made, _how(upright, wanted), *upright[::-1], *wanted[::-1])


def resize_pixels(pixels: Pixels, settings: ResizeSettings, *, name: str, place: str) -> Resized:
    """As `resize_file`, from RGB pixels, H x W x 3."""
    shape = pixels.shape[0], pixels.shape[1]
    try:
        new = shrink(pixels, settings.shorter_side, settings.fix, enlarge=settings.enlarge)
    except DataError as error:
        raise ImageError(name, place, str(error)) from None
    wanted = new.shape[0], new.shape[1]
    data = _encoded(new, settings, name=name, place=place)
    return Resized(data, _how(shape, wanted), *shape[::-1], *wanted[::-1])


def shrink(pixels: Pixels, size: int = 256, fix: str = "shorter", *, enlarge: bool = False) -> Pixels:
    """The picture with `size` pixels on its shorter side, or of height, by a Lanczos filter.

    Args:
        pixels: RGB, H x W x 3.
        size: Wanted pixels.
        fix: `shorter`, or `height` as ImageMagick's `-resize x256`.
        enlarge: Enlarge smaller pictures too; without it they stay as they are.

    Raises:
        DataError: an empty picture; enlarged it would have more than MAX_PIXELS.
    """
    shape = pixels.shape[0], pixels.shape[1]
    wanted = resized_shape(*shape, size, fix, enlarge=enlarge)
    return pixels if wanted == shape else _scaled(pixels, wanted, None)


def resized_shape(
    height: int, width: int, size: int = 256, fix: str = "shorter", *, enlarge: bool = False
) -> tuple[int, int]:
    """Height and width after resizing, the other side rounded as ImageMagick does: half up, at least 1.

    >>> resized_shape(2160, 2880), resized_shape(600, 300), resized_shape(600, 300, fix="height")
    ((256, 341), (512, 256), (256, 128))

    Raises:
        DataError: an empty picture; enlarged it would have more than MAX_PIXELS.
    """
    if fix not in FIXES:
        raise unknown("side to fix:", fix, FIXES)
    fixed = height if fix == "height" else min(height, width)
    if fixed < 1 or width < 1:
        raise DataError(f"an empty picture of {width} x {height} pixels")
    if fixed == size or (fixed < size and not enlarge):
        return height, width
    scale = size / fixed
    wanted = max(1, math.floor(height * scale + 0.5)), max(1, math.floor(width * scale + 0.5))
    if math.prod(wanted) > max(MAX_PIXELS, height * width):
        raise DataError(f"enlarged to {wanted[1]:,} x {wanted[0]:,} pixels, more than {MAX_PIXELS:,}")
    return wanted


def encode_jpeg(pixels: Pixels, quality: int = 75, subsampling: str = "420") -> bytes:
    """A baseline JPEG, without EXIF and colour profile.

    Args:
        pixels: RGB, H x W x 3.
        quality: 1 to 100, as libjpeg counts.
        subsampling: A key of SUBSAMPLINGS.

    Raises:
        RequestError: quality or subsampling out of range.
        DataError: a side of 0 or more than 65,500 pixels, which a JPEG cannot have.
    """
    _require_encoding(quality, subsampling)
    height, width = pixels.shape[:2]
    if not (0 < height <= _MAX_JPEG_SIDE and 0 < width <= _MAX_JPEG_SIDE):
        raise DataError(f"{width:,} x {height:,} pixels; a JPEG has 1 to {_MAX_JPEG_SIDE:,} a side")
    whole = np.ascontiguousarray(pixels)
    return bytes(simplejpeg.encode_jpeg(whole, quality, "RGB", SUBSAMPLINGS[subsampling]))


def encode_png(pixels: Pixels) -> bytes:
    """A PNG of RGB pixels, H x W x 3.

    Raises:
        DataError: an empty picture.
    """
    if not pixels.size:
        raise DataError(f"an empty picture of {pixels.shape[1]} x {pixels.shape[0]} pixels")
    file = io.BytesIO()
    _image(pixels).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class CropSettings:
    """How a specimen is cut out of its photograph. The defaults are the rule of the paper's program."""

    margin: Literal["paper", "square", "aspect"] = setting(
        "paper",
        "What is cut out: paper (the box and the same margin on all sides), square (around the box with that "
        "margin), or aspect (of the proportions of --aspect).",
    )
    ratio: float = setting(CROP_RATIO, "The margins of two sides together are (RATIO - 1) x the longer side.")
    equal_extend: bool = setting(True, "Margins of both axes by the longer side; else each by its own side.")
    aspect: str = setting("4:3", "Width to height, for --margin aspect.")
    fill: str = setting(
        PADDING,
        "Outside of the picture: a grey (240), a colour (R,G,B), or background (what is around the specimen, "
        "continued smoothly).",
    )
    rotate: bool = setting(
        False,
        "Turn the specimen's long axis level: by its mask, or, of a box alone that is higher than wide, by a "
        "quarter. Where the head is stays open.",
    )

    def __post_init__(self) -> None:
        if not 1 <= self.ratio < math.inf:
            raise RequestError(f"ratio is {self.ratio}; it must be at least 1")
        _read_aspect(self.aspect)
        _read_fill(self.fill)


def margin_box(box: Box, ratio: float = CROP_RATIO, *, equal_extend: bool = True) -> Window:
    """The box with the margins of the paper's program, in whole pixels, exactly as it computes them.

    The box is rounded first (half to even), then widened, then truncated toward zero. In its floating-point
    arithmetic 1.4 - 1 is a little less than .4: at the edge of the picture a margin may be a pixel smaller
    than on paper.

    >>> margin_box((100, 100, 200, 150)), margin_box((100, 100, 200, 150), equal_extend=False)
    ((80, 80, 220, 170), (80, 90, 220, 160))

    Args:
        box: Of the specimen.
        ratio: (ratio - 1) x the longer side is added to each axis, half on either side.
        equal_extend: Else (ratio - 1) x its own side is added to each axis.

    Returns:
        x0, y0, x1, y1, which may lie outside of the picture.
    """
    left, top, right, bottom = (float(round(side)) for side in box)
    width, height = right - left, bottom - top
    if equal_extend:
        across = down = (ratio - 1) * max(width, height)
    else:
        across, down = width * ratio - width, height * ratio - height
    return int(left - across / 2), int(top - down / 2), int(right + across / 2), int(bottom + down / 2)


def aspect_box(box: Box, aspect: float, ratio: float = CROP_RATIO, *, equal_extend: bool = True) -> Window:
    """The smallest window of given proportions around a box with its margins, centred on it.

    >>> aspect_box((100, 100, 200, 150), 1.0)
    (80, 55, 220, 195)

    Args:
        box: Of the specimen.
        aspect: Width through height.
        ratio: As for `margin_box`.
        equal_extend: As for `margin_box`.
    """
    width, height = box[2] - box[0], box[3] - box[1]
    across, down = (max(width, height),) * 2 if equal_extend else (width, height)
    width, height = width + (ratio - 1) * across, height + (ratio - 1) * down
    if width < height * aspect:
        rows = max(1, round(height))
        columns = max(1, round(rows * aspect))
    else:
        columns = max(1, round(width))
        rows = max(1, round(columns / aspect))
    left = round((box[0] + box[2] - columns) / 2)
    top = round((box[1] + box[3] - rows) / 2)
    return left, top, left + columns, top + rows


def crop_padded(pixels: Pixels, window: Window, fill: tuple[int, int, int] = (240, 240, 240)) -> Pixels:
    """What the window shows of the picture, the fill where it lies outside.

    The paper's program pads a pixel more than it needs on the right and at the bottom, and then cuts it off:
    the crops are the same.

    Args:
        pixels: RGB, H x W x 3.
        window: x0, y0, x1, y1.
        fill: RGB.

    Raises:
        DataError: a window without pixels, or of more than MAX_PIXELS.
    """
    left, top, right, bottom = window
    _require_window(window)
    height, width = pixels.shape[:2]
    made = np.empty((bottom - top, right - left, 3), np.uint8)
    made[:] = fill
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if x0 < x1 and y0 < y1:
        made[y0 - top : y1 - top, x0 - left : x1 - left] = pixels[y0:y1, x0:x1]
    return made


def crop_picture(pixels: Pixels, finding: Finding, settings: CropSettings) -> Pixels:
    """The specimen cut out of its photograph by the settings, RGB.

    Args:
        pixels: RGB, H x W x 3.
        finding: Its first box is the specimen, and its mask, where it has one.
        settings: Margin, filling and rotation.

    Raises:
        DataError: a finding without a box; a box whose crop has no pixels, or more than MAX_PIXELS.
    """
    if not len(finding.boxes):
        raise DataError("a finding without a box: there is nothing to crop")
    x0, y0, x1, y1 = finding.boxes[0].tolist()
    if not (math.isfinite(x0 + y0 + x1 + y1) and x0 <= x1 and y0 <= y1):
        raise DataError(f"a box that is none: {x0:g}, {y0:g}, {x1:g}, {y1:g}")
    mask = finding.mask
    if settings.rotate and mask is not None and mask.any():
        return _turned_crop(pixels, mask, settings)
    if settings.rotate and y1 - y0 > x1 - x0:  # a quarter to the left
        width = pixels.shape[1]
        pixels = np.rot90(pixels)
        mask = None if mask is None else np.rot90(mask)
        x0, y0, x1, y1 = y0, width - x1, y1, width - x0
    window = _window((x0, y0, x1, y1), settings)
    if settings.fill != "background":
        return crop_padded(pixels, window, _read_fill(settings.fill))
    _require_window(window)
    inside = np.ones(pixels.shape[:2], np.bool_)
    around = inside.copy()
    if mask is None:
        around[max(0, math.floor(y0)) : math.ceil(y1), max(0, math.floor(x0)) : math.ceil(x1)] = False
    else:
        around &= ~mask
    made = crop_padded(pixels, window)
    cut = [_cut_plane(plane, window) for plane in (inside, around)]
    return made if cut[0].all() else _on_background(made, *cut)


def _window(box: Box, settings: CropSettings) -> Window:
    equal = settings.equal_extend
    if settings.margin == "paper":
        return margin_box(box, settings.ratio, equal_extend=equal)
    aspect = 1.0 if settings.margin == "square" else _read_aspect(settings.aspect)
    return aspect_box(box, aspect, settings.ratio, equal_extend=equal)


def _turned_crop(pixels: Pixels, mask: NDArray[np.bool_], settings: CropSettings) -> Pixels:
    """The crop, turned about the mask's centre so that its longest axis lies level."""
    from PIL import Image

    rows, columns = np.nonzero(mask)
    points = np.stack((columns + 0.5, rows + 0.5))
    centre = points.mean(axis=1)
    away = points - centre[:, None]
    axes = np.linalg.eigh(away @ away.T)[1]
    across, down = axes[:, 1]  # of the largest eigenvalue
    if across < 0:  # at most a quarter, to either side
        across, down = -across, -down
    along, beside = across * away[0] + down * away[1], across * away[1] - down * away[0]
    pixel = 0.5 * (abs(across) + abs(down))  # how far a pixel reaches from its centre, turned
    box = along.min() - pixel, beside.min() - pixel, along.max() + pixel, beside.max() + pixel
    window = _window(box, settings)
    _require_window(window)
    left, top, right, bottom = window
    affine = (
        *(across, -down, centre[0] + across * left - down * top),
        *(down, across, centre[1] + down * left + across * top),
    )
    size = right - left, bottom - top
    fill = (240,) * 3 if settings.fill == "background" else _read_fill(settings.fill)
    made = np.array(
        _image(pixels).transform(
            size, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC, fillcolor=fill
        )
    )
    if settings.fill != "background":
        return made
    inside, around = (
        np.asarray(
            Image.fromarray(plane.astype(np.uint8)).transform(
                size, Image.Transform.AFFINE, affine, Image.Resampling.NEAREST
            )
        ).astype(np.bool_)
        for plane in (np.ones_like(mask), ~mask)
    )
    return made if inside.all() else _on_background(made, inside, around)


def _on_background(made: Pixels, inside: NDArray[np.bool_], around: NDArray[np.bool_]) -> Pixels:
    """A crop with its surroundings continued smoothly to where it lies outside of the picture.

    The pixels around the specimen are averaged in a coarse grid; each cell of the result is their mean
    weighted by distance (normalised convolution), so that near the edge of the picture it has the colour of
    what lies there, and of the whole far from it.

    Args:
        made: The crop, H x W x 3.
        inside: H x W, where it shows the picture.
        around: H x W, where it shows the picture without the specimen.
    """
    from PIL import Image, ImageFilter

    known = around if around.any() else inside
    if not known.any():
        return made
    height, width = known.shape
    scale = min(1.0, _GRID / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    box = Image.Resampling.BOX
    weight = np.asarray(Image.fromarray(known.astype(np.float32)).resize(size, box))
    specimen = Image.fromarray(np.where(inside & ~around, np.uint8(255), np.uint8(0))).resize(size, box)
    shaded = np.asarray(specimen.filter(ImageFilter.MaxFilter(3))) > 0  # with the cells beside it
    clear = np.where(shaded, 0, weight)
    weight = clear if clear.any() else weight
    kernels = []
    for count in size:
        apart = np.subtract.outer(np.arange(count), np.arange(count))
        kernels.append(1 / (1 + apart**2) ** 2)  # it never vanishes: every cell gets a colour
    total = kernels[1] @ weight @ kernels[0]
    channels = []
    for channel in range(3):
        plane = np.where(known, made[..., channel], 0).astype(np.float32)
        cells = np.where(weight > 0, np.asarray(Image.fromarray(plane).resize(size, box)), 0)
        summed = kernels[1] @ cells @ kernels[0]
        channels.append(np.rint(summed / total).astype(np.uint8))
    coarse = _image(np.stack(channels, axis=-1))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return np.where(inside[..., None], made, smooth)


def _cut_plane(plane: NDArray[np.bool_], window: Window) -> NDArray[np.bool_]:
    """What the window shows of a mask, False outside."""
    left, top, right, bottom = window
    made = np.zeros((bottom - top, right - left), np.bool_)
    part = plane[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    y, x = max(-top, 0), max(-left, 0)
    made[y : y + part.shape[0], x : x + part.shape[1]] = part
    return made


def _require_window(window: Window) -> None:
    width, height = window[2] - window[0], window[3] - window[1]
    if width < 1 or height < 1:
        raise DataError(f"a crop without pixels: {window}")
    if width * height > MAX_PIXELS:
        raise DataError(f"a crop of {width:,} x {height:,} pixels, more than {MAX_PIXELS:,}")


def _read_aspect(text: str) -> float:
    """Width through height of a text like `4:3` or `1.33`."""
    try:
        width, _, height = text.partition(":")
        value = float(width) / float(height or 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0.01 <= value <= 100:
        raise RequestError(f"aspect is '{text}'; expected width to height, like 4:3, from 0.01 to 100")
    return value


def _read_fill(text: str) -> tuple[int, int, int]:
    """RGB of a text like `240` or `204,218,243`; the paper's grey for `background`."""
    parts = (PADDING if text == "background" else text).split(",")
    values = [int(part) if part.strip().isdecimal() else -1 for part in parts]
    if len(values) not in (1, 3) or not all(0 <= value <= 255 for value in values):
        raise RequestError(
            f"fill is '{text}'; expected a grey like 240, a colour like 204,218,243 or background"
        )
    red, green, blue = values * 3 if len(values) == 1 else values
    return red, green, blue


def _require_encoding(quality: int, subsampling: str) -> None:
    if not 1 <= quality <= 100:
        raise RequestError(f"quality is {quality}; it must be from 1 to 100")
    if subsampling not in SUBSAMPLINGS:
        raise unknown("subsampling", subsampling, SUBSAMPLINGS)


def _is_png(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() == ".png"


def _encoded(pixels: Pixels, settings: ResizeSettings, *, name: str, place: str) -> bytes:
    try:
        if _is_png(name):
            return encode_png(pixels)
        return encode_jpeg(pixels, settings.quality, settings.subsampling)
    except DataError as error:
        raise ImageError(name, place, str(error)) from None


def _how(before: tuple[int, int], after: tuple[int, int]) -> Literal["shrunk", "enlarged", "encoded"]:
    if before == after:
        return "encoded"
    return "shrunk" if min(after) < min(before) else "enlarged"


def _factor(stored: tuple[int, int], decoded: tuple[int, ...]) -> int:
    """By which a JPEG was shrunk when it was decoded."""
    for factor in (8, 4, 2):
        if decoded == tuple(-(-side // factor) for side in stored) and decoded != stored:
            return factor
    return 1


def _image(pixels: Pixels) -> "Image":
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(pixels))


def _scaled(pixels: Pixels, shape: tuple[int, int], box: Box | None) -> Pixels:
    from PIL import Image

    return np.array(_image(pixels).resize(shape[::-1], Image.Resampling.LANCZOS, box))
