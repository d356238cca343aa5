"""The contact sheet, and thumbnails for pages.

Pixels come as RGB uint8, H x W x 3; whatever a sheet shows (examples, worst errors, doubtful crops), it is
made here.
"""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

_PAPER: Final = (255, 255, 255)
_INK: Final = (38, 38, 38)
_GREY: Final = (110, 110, 110)
_FRAME: Final = (214, 214, 214)
_GAP: Final = 14
"""Pixels between tiles and around the sheet."""
_QUALITY: Final = 85


def thumbnail(pixels: NDArray[np.uint8], size: int) -> bytes:
    """A JPEG of the picture no wider and no higher than `size` pixels, its aspect kept, never enlarged."""
    made = io.BytesIO()
    _fitted(pixels, size).save(made, "JPEG", quality=_QUALITY)
    return made.getvalue()


def thumbnail_data_uri(pixels: NDArray[np.uint8], size: int) -> str:
    """The thumbnail as a `data:` address, to stand in an `<img src>` of a page without other files."""
    return f"data:image/jpeg;base64,{base64.b64encode(thumbnail(pixels, size)).decode('ascii')}"


def contact_sheet(
    pictures: Sequence[tuple[str, NDArray[np.uint8]]],
    *,
    columns: int | None = None,
    size: int = 180,
    title: str = "",
) -> "Image":
    """Pictures side by side in reading order, each in a square with its caption below.

    Args:
        pictures: Caption and pixels. The first line of a caption is set in ink, further lines in grey; a line
            too long for its tile ends in an ellipsis.
        columns: Tiles in a row; None makes the sheet about three wide to two high.
        size: Side of a tile's square in pixels; pictures keep their aspect and fill it.
        title: A line above the sheet.
    """
    from PIL import Image, ImageDraw

    num = len(pictures)
    columns = columns or max(1, min(num, round((1.5 * num) ** 0.5)))
    columns = max(1, min(columns, num))
    rows = -(-num // columns)
    captions = [caption.split("\n") for caption, _ in pictures]
    font_px = max(11, size // 12)
    font, title_font = _font(font_px), _font(round(1.4 * font_px))
    line_px = round(1.35 * font_px)
    caption_px = max((len(lines) for lines in captions), default=0) * line_px + 4
    title_px = round(2.4 * font_px) if title else 0
    width = max(_GAP + columns * (size + _GAP), 2 * _GAP + round(title_font.getlength(title)))
    height = _GAP + title_px + rows * (size + caption_px + _GAP)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_GAP, _GAP), title, fill=_INK, font=title_font)
    for place, (lines, (_, pixels)) in enumerate(zip(captions, pictures, strict=True)):
        left = _GAP + place % columns * (size + _GAP)
        top = _GAP + title_px + place // columns * (size + caption_px + _GAP)
        picture = _fitted(pixels, size, enlarge=True)
        sheet.paste(picture, (left + (size - picture.width) // 2, top + (size - picture.height) // 2))
        draw.rectangle((left - 1, top - 1, left + size, top + size), outline=_FRAME)
        for number, line in enumerate(lines):
            at = (left, top + size + 4 + number * line_px)
            draw.text(at, _shortened(line, font, size), fill=_GREY if number else _INK, font=font)
    return sheet


def _fitted(pixels: NDArray[np.uint8], size: int, *, enlarge: bool = False) -> "Image":
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(pixels))
    factor = size / max(picture.size)
    if factor >= 1 and not enlarge:
        return picture
    width, height = (max(1, round(side * factor)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _font(size_px: int) -> "FreeTypeFont":
    """Pillow's own font, so that a sheet looks the same everywhere."""
    from PIL import ImageFont

    font = ImageFont.load_default(size=size_px)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow is built without FreeType"
    return font


def _shortened(text: str, font: "FreeTypeFont", width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"
