"""From an image file's bytes to RGB pixels."""

import io
import struct
import warnings
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from bioscan.data.images import Images
from bioscan.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS: Final = 100_000_000

_FORMATS: Final = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP")
_STARTS: Final = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"BM": "BMP",
    b"GIF8": "GIF",
    b"RIFF": "WebP",
}
_FRAME: Final = struct.Struct(">BHHB")
"""Bits, height, width, components."""
_HARMLESS: Final = ("extraneous bytes", "Adobe color", "Inconsistent progression", "JFIF")
"""Warnings of libjpeg after which Pillow may try; it goes on where only the order of things is odd."""


class _Broken(Exception):
    """Why an image cannot be decoded, in plain words."""


class _JpegHeader(NamedTuple):
    """What the segments before the first scan say."""

    height: int
    width: int
    components: int
    orientation: int
    """EXIF: 1 upright, 2 to 8 mirrored or turned."""


def decode_image(
    data: bytes, *, name: str, place: str, min_size: int | None = None, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """RGB pixels, H x W x 3, upright by EXIF.

    Transparent parts are laid on white; 16-bit grey is scaled to 8 bits; of several pages the first is taken.

    Args:
        data: The file's bytes.
        name: For the error: the image's name.
        place: For the error: where it lies.
        min_size: If given, a JPEG may come at 1/2, 1/4 or 1/8 of its size as long as the shorter side keeps
            at least this many pixels; decoding is then faster.
        max_pixels: Refuse larger images before decoding them.

    Raises:
        ImageError: empty, not an image, truncated, damaged, too large.
    """
    try:
        return _decode(data, min_size, max_pixels)
    except _Broken as error:
        raise ImageError(name, place, str(error)) from None


def read_rgb(images: Images, row: int, min_size: int | None = None) -> NDArray[np.uint8]:
    """RGB pixels of one image of a package, H x W x 3; `min_size` as in `decode_image`.

    Raises:
        ImageError: cannot be read or decoded.
    """
    if images.is_array(row):
        return images.array(row)
    data = images.read(row)
    try:
        return _decode(data, min_size, MAX_PIXELS)
    except _Broken as error:
        raise ImageError(images.name(row), images.place(row), str(error)) from None


def _decode(data: bytes, min_size: int | None, max_pixels: int) -> NDArray[np.uint8]:
    if not data:
        raise _Broken("empty file")
    if data[:2] != b"\xff\xd8":
        return _decode_with_pillow(data, max_pixels)
    header = _jpeg_header(data)
    _refuse_huge(header.width, header.height, max_pixels)
    if header.components == 4:  # CMYK or YCCK
        return _decode_with_pillow(data, max_pixels)
    height = width = 0
    if min_size is not None:
        for factor in (8, 4, 2):
            height, width = -(-header.height // factor), -(-header.width // factor)
            if min(height, width) >= min_size:
                break
        else:
            height = width = 0
    try:
        pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width)
    except ValueError as error:  # libjpeg's warnings too: it fills what is missing with grey
        text = str(error)
        if "Premature end" in text:
            raise _Broken("truncated JPEG") from None
        if any(warning in text for warning in _HARMLESS) or "tjDecompressHeader" in text:
            return _decode_with_pillow(data, max_pixels)
        raise _Broken(f"damaged JPEG ({text})") from None
    return _upright(pixels, header.orientation)


def _jpeg_header(data: bytes) -> _JpegHeader:
    """Size and orientation from the segments before the first scan, without decoding."""
    frame: tuple[int, int, int] | None = None
    orientation, at, end = 1, 2, len(data) - 4
    while at < end:
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xFF:  # filling between segments
            at += 1
            continue
        if marker == 0 or marker == 1 or 0xD0 <= marker <= 0xD8:  # no segment
            at += 2
            continue
        if marker in (0xD9, 0xDA):
            break
        length = data[at + 2] << 8 | data[at + 3]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if at + 10 > len(data):
                raise _Broken("truncated JPEG")
            bits, height, width, components = _FRAME.unpack_from(data, at + 4)
            if bits != 8 or marker in (0xC3, 0xC7, 0xCB, 0xCF):
                raise _Broken(f"a JPEG of a kind that is not supported ({bits} bits, frame {marker:#x})")
            frame = height, width, components
        elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[at + 10 : at + 2 + length])
        at += 2 + length
    else:
        raise _Broken("truncated JPEG")
    if frame is None or data[at + 1] == 0xD9:
        raise _Broken("a JPEG file without an image")
    return _JpegHeader(*frame, orientation)


def _exif_orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory; 1 where it is absent or makes no sense."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(f"{order}L", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHLH", tiff, entry)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _decode_with_pillow(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(data), formats=_FORMATS) as image,
        ):
            _refuse_huge(*image.size, max_pixels)
            image.load()
            return np.array(_as_rgb(ImageOps.exif_transpose(image)))
    except _Broken:
        raise
    except UnidentifiedImageError:
        kind = next((kind for start, kind in _STARTS.items() if data.startswith(start)), None)
        if kind:
            raise _Broken(f"truncated or damaged {kind}") from None
        raise _Broken(f"not an image (starts with {data[:8]!r})") from None
    except Image.DecompressionBombError:
        raise _Broken(f"more than {max_pixels:,} pixels") from None
    except Exception as error:  # noqa: BLE001 - damaged files make Pillow's parsers fail in any way
        text = str(error) or type(error).__name__
        raise _Broken(f"truncated or damaged image ({text})") from None


def _as_rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise _Broken("pixels of 32 bits, which have no known range of brightness")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _refuse_huge(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise _Broken(f"{width:,} x {height:,} pixels, more than {max_pixels:,}")
