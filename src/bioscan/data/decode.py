"""From an image file's bytes to RGB pixels."""

import io
import re
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
"""Of one image. Decoding takes 3 to 13 bytes of memory a pixel, the more the odder the kind of file."""
MAX_SCANS: Final = 64
"""Of a progressive JPEG. Encoders make about ten; each costs a pass over the whole image, and needs but a few
bytes in the file."""

_FORMATS: Final = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP")
_JPEG: Final = b"\xff\xd8"
_STARTS: Final = {
    _JPEG: "JPEG",
    b"\x89PNG": "PNG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"BM": "BMP",
    b"GIF8": "GIF",
    b"RIFF": "WebP",
}
_SEGMENT: Final = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])")
"""Marker of a segment with a length, or of the end; filling and markers that stand alone are passed over."""
_NO_SEGMENT: Final = frozenset((0x00, 0x01, 0xFF, *range(0xD0, 0xD9)))
_FRAME: Final = struct.Struct(">BHHB")
"""Bits, height, width, components."""
_PROGRESSIVE: Final = (0xC2, 0xC6, 0xCA, 0xCE)
_LOSSLESS: Final = (0xC3, 0xC7, 0xCB, 0xCF)
_ORIENTATION: Final = 0x0112
_PHOTOMETRIC: Final = 0x0106
_NO_MEMORY: Final = "not enough memory to decode it"
_HARMLESS: Final = ("extraneous bytes", "Adobe color", "Inconsistent progression", "JFIF")
"""Warnings of libjpeg after which Pillow may try; it goes on where only the order of things is odd."""


class _Broken(Exception):
    """Why an image cannot be decoded, in plain words."""


class JpegHeader(NamedTuple):
    """What the segments before the first scan of a JPEG say."""

    height: int
    """As stored, before it is turned."""
    width: int
    components: int
    """1 grey, 3 colours, 4 CMYK or YCCK."""
    orientation: int
    """EXIF: 1 upright, 2 to 8 mirrored or turned."""


def decode_image(
    data: bytes,
    *,
    name: str,
    place: str,
    min_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    upright: bool = True,
) -> NDArray[np.uint8]:
    """RGB pixels, H x W x 3, upright by EXIF.

    Transparent parts are laid on white; 16-bit grey is scaled to 8 bits; of several pages or frames the first
    is taken. Colour profiles are not applied: the numbers are taken for sRGB.

    Args:
        data: The file's bytes.
        name: For the error: the image's name.
        place: For the error: where it lies.
        min_size: If given, a JPEG may come at 1/2, 1/4 or 1/8 of its size as long as the shorter side keeps
            at least this many pixels; decoding is then faster.
        max_pixels: Refuse larger images before decoding them.
        upright: False: a JPEG stays as it is stored, whatever its EXIF says (see `read_jpeg_header`).

    Raises:
        ImageError: empty, not an image, truncated, damaged, too large.
    """
    try:
        return _decode(data, min_size, max_pixels, upright=upright)
    except _Broken as error:
        raise ImageError(name, place, str(error)) from None


def read_jpeg_header(data: bytes, *, name: str, place: str) -> JpegHeader | None:
    """Size and orientation of a JPEG, without decoding it; None for any other kind of file.

    Raises:
        ImageError: a JPEG that is truncated before its first scan, or of a kind that is not supported.
    """
    try:
        return _jpeg_header(data) if data.startswith(_JPEG) else None
    except _Broken as error:
        raise ImageError(name, place, str(error)) from None


def read_rgb(
    images: Images, row: int, min_size: int | None = None, *, checked: bool = False
) -> NDArray[np.uint8]:
    """RGB pixels of one image of a package, H x W x 3.

    Args:
        images: The package.
        row: Of the image in its index.
        min_size: As in `decode_image`.
        checked: Compare the bytes with the checksum that a ZIP archive holds. It costs some 5 % of decoding
            a small photograph, and finds damage that still decodes.

    Raises:
        ImageError: cannot be read or decoded, or the checksum is another one.
    """
    if images.is_array(row):
        return images.array(row)
    data = images.read_checked(row) if checked else images.read(row)
    try:
        return _decode(data, min_size, MAX_PIXELS)
    except _Broken as error:
        raise ImageError(images.name(row), images.place(row), str(error)) from None


def _decode(data: bytes, min_size: int | None, max_pixels: int, *, upright: bool = True) -> NDArray[np.uint8]:
    if not data:
        raise _Broken("empty file")
    if not data.startswith(_JPEG):
        return _decode_with_pillow(data, max_pixels)
    header = _jpeg_header(data)
    _refuse_huge(header.width, header.height, max_pixels)
    if header.components == 4:  # CMYK or YCCK
        return _decode_with_pillow(data, max_pixels, upright=upright)
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
            return _decode_with_pillow(data, max_pixels, upright=upright)
        raise _Broken(f"damaged JPEG ({text})") from None
    except MemoryError:
        raise _Broken(_NO_MEMORY) from None
    return turn(pixels, header.orientation) if upright else pixels


def _jpeg_header(data: bytes) -> JpegHeader:
    """Size and orientation from the segments before the first scan, without decoding."""
    frame: tuple[int, int, int] | None = None
    orientation: int | None = None
    progressive = False
    at, end = 2, len(data) - 4
    while at <= end:
        marker = data[at + 1]
        if data[at] != 0xFF or marker in _NO_SEGMENT:
            found = _SEGMENT.search(data, at)
            at = found.start() if found else len(data)
            continue
        if marker in (0xD9, 0xDA):
            break
        length = data[at + 2] << 8 | data[at + 3]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if at + 10 > len(data):
                raise _Broken("truncated JPEG")
            bits, height, width, components = _FRAME.unpack_from(data, at + 4)
            if bits != 8 or marker in _LOSSLESS:
                raise _Broken(f"a JPEG of a kind that is not supported ({bits} bits, frame {marker:#x})")
            frame = height, width, components
            progressive = marker in _PROGRESSIVE
        elif marker == 0xE1 and orientation is None and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[at + 10 : at + 2 + length])
        at += 2 + length
    else:
        raise _Broken("truncated JPEG")
    if frame is None or data[at + 1] == 0xD9:
        raise _Broken("a JPEG file without an image")
    if progressive and (scans := _num_scans(data, at)) > MAX_SCANS:
        raise _Broken(f"a progressive JPEG of more than {MAX_SCANS} scans ({scans:,})")
    return JpegHeader(*frame, orientation or 1)


def _num_scans(data: bytes, at: int) -> int:
    """Scans from a place on, up to the end of the image."""
    scans = 0
    while (found := _SEGMENT.search(data, at)) and found[1] != b"\xd9":
        scans += found[1] == b"\xda"
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return scans


def _exif_orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory; 1 where it is absent or makes no sense."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(f"{order}L", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == _ORIENTATION:
                value = struct.unpack_from(f"{order}{'L' if kind == 4 else 'H'}", tiff, entry + 8)[0]
                return value if kind in (3, 4) and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def turn(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Pixels as stored, H x W x C, turned and mirrored upright by the orientation of EXIF, 1 to 8."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _decode_with_pillow(data: bytes, max_pixels: int, *, upright: bool = True) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(data), formats=_FORMATS) as image,
        ):
            _refuse_huge(*image.size, max_pixels)
            image.load()
            orientation = _orientation(image) if upright else 1
            return turn(np.array(_as_rgb(image)), orientation)
    except _Broken:
        raise
    except UnidentifiedImageError:
        kind = next((kind for start, kind in _STARTS.items() if data.startswith(start)), None)
        if kind:
            raise _Broken(f"truncated or damaged {kind}") from None
        raise _Broken(f"not an image (starts with {data[:8]!r})") from None
    except Image.DecompressionBombError:
        raise _Broken(f"more than {max_pixels:,} pixels") from None
    except MemoryError:
        raise _Broken(_NO_MEMORY) from None
    except Exception as error:  # noqa: BLE001 - damaged files make Pillow's parsers fail in any way
        text = str(error) or type(error).__name__
        raise _Broken(f"truncated or damaged image ({text})") from None


def _orientation(image: "Image") -> int:
    """Of EXIF, wherever the kind of file keeps it; 1 where it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - damaged EXIF makes Pillow's parser fail in any way; the pixels are sound
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _as_rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = np.asarray(image).astype(np.uint32)
        if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # white is zero; Pillow sees to 8 bits only
            grey = 65535 - grey
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
