"""Finds the insect in a photograph of its well, without a network.

A pixel's chance to belong to an insect is a sum of one curve per measurement (a generalised additive model,
`PIXEL_CURVES`): darkness and colour against the floor of the well, texture, edges, distance from the centre.
A second sum (`NEAR_CURVES`) adds what the first says of the neighbourhood: a faint wing counts beside a body,
a speck alone does not. Regions of likely pixels grow into what differs from the floor at all; a third sum
(`REGION_CURVES`) says how likely a region is the specimen. The curves stand in `localise_curves`.

Axes: H, W picture; h, w working picture; N regions. Colours are CIE Lab: lightness L from 0 to 100, a and b.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bioscan.data.boxes import Finding
from bioscan.data.localise_curves import KNOTS, NEAR_CURVES, PIXEL_CURVES, REGION_CURVES, Curves
from bioscan.errors import RequestError, require

WORKING_PX: Final = 216
"""Shorter side of the working picture: 288 x 216 for the usual 4:3. At 288 and 384 boxes were no better."""
MAX_ASPECT: Final = 4
"""Longer pictures get a smaller shorter side, so that time and memory stay bounded."""
MIN_SIDE_PX: Final = 16
"""The least side of a working picture."""
FLOOR_L: Final = 75.0
"""Lightness that every floor is brought to, about that of the published pictures."""
CORE: Final = 0.87
"""Chance of a pixel that makes a region. Not .5: the curves saw more hard pixels than easy ones."""
GROWN: Final = 0.15
"""Chance from which a pixel that differs from the floor belongs to the region it touches."""
DIFFERS: Final = 7.0
"""Difference from the floor, in units of Lab, of such a pixel; or 4 deviations of the floor if more."""
MIN_CORE_PX: Final = 10
"""Likely pixels of a region; less, about 1/70 of the frame across, is a speck."""
MAX_REGIONS: Final = 8
"""So many regions are looked at, the heaviest first."""
NONE_BELOW: Final = 0.35
"""Score of the best region below which there is no specimen."""
MANY_FROM: Final = 0.6
"""Score, were the first region not there, from which another is a second specimen; the first needs it too."""

_MEANS: Final = (
    *("dark_wide", "dark_near", "dark_rad", "b_wide", "a_wide", "chroma"),
    *("edge", "edge_2", "black_hat_5", "top_hat_11", "radius"),
)
_EXTREMES: Final = ("dark_wide", "edge", "b_wide")
"""Measurements of pixels whose mean, or 90th percentile, is one of a region."""

Pixels = NDArray[np.uint8]
Plane = NDArray[np.float32]


class Region(NamedTuple):
    """Connected pixels of the working picture that may be the specimen."""

    box: tuple[int, int, int, int]
    """x0, y0, x1, y1 in pixels of the working picture."""
    mask: NDArray[np.bool_]
    """Of the box alone."""
    mass: float
    """Sum of its likely pixels' chances."""
    measured: dict[str, float]
    """Scaled to 0 to 255, without what compares it with other regions."""


def find_insects(pictures: Sequence[Pixels]) -> list[Finding]:
    """What `find_insect` says of each picture; a `bioscan.data.boxes.Detector`."""
    return [find_insect(pixels) for pixels in pictures]


def find_insect(pixels: Pixels) -> Finding:
    """Box, score, mask and length of the insect in a photograph of a well.

    The score is the chance that the box and the one a person would draw overlap by half (IoU >= .5). The kind
    is `many` where another region would surely be taken for the specimen if the first were not there; such
    boxes come second and on, with those scores, none above the first's. Wings and legs belong to the mask as
    far as they differ from the floor; what is much thinner than a pixel of the working picture does not.
    `length_px` is the largest distance between two points of the mask (maximum Feret diameter).

    Args:
        pixels: RGB, H x W x 3, of any size.

    Raises:
        MissingExtraError: OpenCV is not installed.
        RequestError: other pixels than H x W x 3 of uint8.
    """
    cv2 = require("cv2", "crop")
    kind = getattr(pixels, "dtype", type(pixels).__name__)
    shape: tuple[int, ...] = getattr(pixels, "shape", ())
    if kind != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise RequestError(f"find_insect takes an H x W x 3 array of uint8, RGB, not {kind} {shape}")
    height, width = pixels.shape[:2]
    picture = working_picture(pixels)
    maps = measure_pixels(picture)
    regions = find_regions(pixel_chances(maps), maps)
    kind, order, scores = choose_regions(regions)
    if kind == "none":
        return Finding(kind, np.zeros((0, 4)), np.zeros(0))
    best = regions[order[0]]
    scale = np.tile([width / picture.shape[1], height / picture.shape[0]], 2)
    whole = np.zeros(picture.shape[:2], np.float32)
    x0, y0, x1, y1 = best.box
    whole[y0:y1, x0:x1] = best.mask
    return Finding(
        kind,
        np.array([regions[i].box for i in order]) * scale,
        np.array(scores),
        cv2.resize(whole, (width, height), interpolation=cv2.INTER_LINEAR) >= 0.5,
        _length(best, scale[:2]),
    )


def working_picture(pixels: Pixels) -> Pixels:
    """The picture with its shorter side at `WORKING_PX`."""
    cv2 = require("cv2", "crop")
    height, width = pixels.shape[:2]
    factor = WORKING_PX * min(1 / min(height, width), MAX_ASPECT / max(height, width))
    size = max(MIN_SIDE_PX, round(width * factor)), max(MIN_SIDE_PX, round(height * factor))
    way = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(np.ascontiguousarray(pixels), size, interpolation=way))


def measure_pixels(picture: Pixels) -> dict[str, Pixels]:
    """Measurement -> h x w bytes. One-sided ones are roots, so that small differences are told apart.

    The floor is taken three ways: one colour (`dark`, `a`, `b`), a radial profile of lightness (`dark_rad`:
    the glare of a well is made of rings), and medians over about 1/2 and 1/7 of the shorter side (`wide`,
    `near`). Numbers in names are pixels of the working picture.
    """
    cv2 = require("cv2", "crop")
    h, w = picture.shape[:2]
    smooth = cv2.GaussianBlur(picture, (0, 0), 0.7).astype(np.float32) / np.float32(255)
    lab = cv2.cvtColor(smooth, cv2.COLOR_RGB2Lab)
    y, x = np.arange(h, dtype=np.float32) - (h - 1) / 2, np.arange(w, dtype=np.float32) - (w - 1) / 2
    radius = np.sqrt(x * x + (y * y)[:, None]).astype(np.float32) * np.float32(2 / min(h, w))
    quarter, quarter_radius = _shrunk(lab, 4), _shrunk(radius, 4)
    inside = quarter[quarter_radius < 0.95]
    middle = max(float(np.median(inside[:, 0])), 5.0)  # black pictures
    floor_a, floor_b = np.median(inside[inside[:, 0] >= np.median(inside[:, 0])][:, 1:], axis=0)
    gain, zero = np.array([FLOOR_L / middle, 1, 1], np.float32), np.array([0, floor_a, floor_b], np.float32)
    lab, quarter = lab * gain - zero, quarter * gain - zero
    half = _shrunk(lab, 2)
    lightness, a, b = cv2.split(lab)
    rings = _enlarged(_radial_floor(quarter[..., 0], quarter_radius), w, h)
    wide, near = _enlarged(_median(quarter, 31), w, h) - lab, _enlarged(_median(half, 15), w, h) - lab
    maps = {
        "dark_rad": _bytes(rings - lightness, 4, 64),
        "dark": _bytes(FLOOR_L - lightness, 4, 64),
        "a": _bytes(a, 8, 96),
        "b": _bytes(b, 8, 96),
        "chroma": _roots(_magnitude(a, b), 50),
    }
    for name, difference in (("wide", wide), ("near", near)):
        maps[f"dark_{name}"] = _bytes(difference[..., 0], 5, 64)
        maps[f"a_{name}"] = _bytes(-difference[..., 1], 10, 96)
        maps[f"b_{name}"] = _bytes(-difference[..., 2], 10, 96)
    for size in (5, 11):
        for name, kind in (("black_hat", cv2.MORPH_BLACKHAT), ("top_hat", cv2.MORPH_TOPHAT)):
            maps[f"{name}_{size}"] = _roots(cv2.morphologyEx(lightness, kind, _disc(size)), 40)
    edge = _gradient(lightness)
    maps["edge"] = _roots(edge, 45)
    edge, colour_edge = _shrunk(edge, 2), _gradient(half[..., 2])
    around = _shrunk(cv2.merge([cv2.max(wide[..., 0], 0), -wide[..., 2]]), 2)
    for deviation in (2, 5, 12):
        maps[f"edge_{deviation}"] = _roots(_spread(edge, deviation, w, h), 65)
    for deviation in (3, 8):
        maps[f"colour_edge_{deviation}"] = _roots(_spread(colour_edge, deviation, w, h), 100)
    for deviation in (3, 8, 20):
        darkness, yellow = cv2.split(_spread(around, deviation, w, h))
        maps[f"dark_{deviation}"] = _roots(darkness, 60)
        maps[f"b_{deviation}"] = _bytes(yellow, 16, 96)
    maps["radius"] = _bytes(radius, 130, 0)
    return maps


def measure_neighbourhood(chance: Plane) -> dict[str, Pixels]:
    """Measurement -> h x w bytes, of the chances: around a pixel, and of what is left without thin things."""
    cv2 = require("cv2", "crop")
    h, w = chance.shape
    half = _shrunk(chance, 2)
    maps = {"chance": _bytes(chance, 255, 0)}
    for deviation in (3, 8, 20):
        maps[f"chance_{deviation}"] = _roots(_spread(half, deviation, w, h), 255)
    for size in (5, 9, 17):
        maps[f"thick_{size}"] = _bytes(cv2.morphologyEx(chance, cv2.MORPH_OPEN, _disc(size)), 255, 0)
    return maps


def pixel_chances(maps: Mapping[str, Pixels]) -> Plane:
    """The chance of every pixel to belong to an insect, h x w, from `measure_pixels`."""
    alone = curve_sum(maps, PIXEL_CURVES)
    return curve_sum({**maps, **measure_neighbourhood(alone)}, NEAR_CURVES)


def curve_sum(maps: Mapping[str, Pixels], curves: Curves) -> Plane:
    """The logistic function of the sum of each map's curve."""
    cv2 = require("cv2", "crop")
    total = np.zeros(next(iter(maps.values())).shape, np.float32)
    for name, curve in curves.items():
        total += cv2.LUT(maps[name], _table(curve))
    return np.asarray(1 / (1 + np.exp(-total)), np.float32)


def find_regions(chance: Plane, maps: Mapping[str, Pixels]) -> list[Region]:
    """Regions that may be the specimen, heaviest first, by `pixel_chances` and `measure_pixels`."""
    cv2 = require("cv2", "crop")
    core = chance >= CORE
    grown = core | ((chance >= GROWN) & _differing(maps))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(grown.astype(np.uint8))
    flat = labels.ravel()
    cores = np.bincount(flat, core.ravel(), count)
    masses = np.bincount(flat, np.where(core, chance, 0).ravel(), count)
    cores[0] = 0
    regions = []
    for k in [k for k in np.argsort(-masses, kind="stable") if cores[k] >= MIN_CORE_PX][:MAX_REGIONS]:
        x0, y0, width, height = (int(v) for v in stats[k, :4])
        box = x0, y0, x0 + width, y0 + height
        mask = labels[y0 : box[3], x0 : box[2]] == k
        regions.append(Region(box, mask, float(masses[k]), _measured(box, mask, core, chance, maps)))
    return regions


def choose_regions(
    regions: Sequence[Region], curves: Curves = REGION_CURVES
) -> tuple[Literal["one", "none", "many"], list[int], list[float]]:
    """Kind of finding, numbers of the regions in it, the specimen first, and their scores, falling."""
    scores = _scores(regions, curves)
    if not scores or max(scores) < NONE_BELOW:
        return "none", [], []
    first = int(np.argmax(scores))
    rest = [i for i in range(len(regions)) if i != first]
    # No surer than the first, which has to be sure itself: in noise every speck is as good as another.
    without_first = [min(score, scores[first]) for score in _scores([regions[i] for i in rest], curves)]
    more = sorted(((s, i) for s, i in zip(without_first, rest, strict=True) if s >= MANY_FROM), reverse=True)
    found = [(scores[first], first), *more]
    return "many" if more else "one", [i for _, i in found], [score for score, _ in found]


def _scores(regions: Sequence[Region], curves: Curves) -> list[float]:
    """For each region, the chance that it is the specimen, if these are all there are."""
    found = []
    for region in regions:
        measured = region_measurements(region, regions)
        logit = sum(np.interp(measured[name], KNOTS, curve) for name, curve in curves.items())
        found.append(float(1 / (1 + np.exp(-logit))))
    return found


def region_measurements(region: Region, regions: Sequence[Region]) -> dict[str, float]:
    """All that `REGION_CURVES` asks for, 0 to 255, of one among the regions of a picture."""
    masses = [r.mass for r in regions]
    share, of_most = region.mass / sum(masses), region.mass / max(masses)
    return region.measured | {"share": 255 * share, "of_most": 255 * of_most}


def _measured(
    box: tuple[int, int, int, int],
    mask: NDArray[np.bool_],
    core: NDArray[np.bool_],
    chance: Plane,
    maps: Mapping[str, Pixels],
) -> dict[str, float]:
    cv2 = require("cv2", "crop")
    h, w = chance.shape
    x0, y0, x1, y1 = box
    place = slice(y0, y1), slice(x0, x1)
    area, width, height = int(mask.sum()), x1 - x0, y1 - y0
    margin = max(2, round(0.15 * max(width, height)))
    around = chance[max(0, y0 - margin) : y1 + margin, max(0, x0 - margin) : x1 + margin]
    in_box = float(chance[place].sum())
    outside = (float(around.sum()) - in_box) / max(1, around.size - width * height)
    at_frame = width * ((y0 <= 1) + (y1 >= h - 1)) + height * ((x0 <= 1) + (x1 >= w - 1))
    depth = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 3)
    thickness = float(depth.max())
    rows, columns = np.nonzero(mask)
    hull = cv2.convexHull(np.stack([columns, rows], 1).astype(np.int32))
    likely_rows, likely_columns = np.nonzero(mask & core[place])
    likely_area = (np.ptp(likely_rows) + 1) * (np.ptp(likely_columns) + 1)
    wider = slice(max(0, y0 - 8), y1 + 8), slice(max(0, x0 - 8), x1 + 8)
    dark = int(np.count_nonzero(maps["dark_wide"][wider] > 64 + 15))  # 3 units of L
    found = {
        "area": 16 * np.log2(area),
        "fill": 255 * area / (width * height),
        "slender": 255 * min(width, height) / max(width, height),
        "solid": 255 * area / (cv2.contourArea(hull) + 1 + width + height),
        "off_middle": 255 * np.hypot(columns.mean() / width - 0.5, rows.mean() / height - 0.5),
        "core": 255 * core[place][mask].mean(),
        "core_box": 255 * likely_area / (width * height),
        "chance": 255 * chance[place][mask].mean(),
        "in_box": 255 * in_box / (width * height),
        "outside": 510 * outside,
        "dark_outside": 255 * (1 - area / max(area, dark)),
        "thickness": 64 * np.log2(thickness + 1),
        "thick_share": 500 * thickness / area**0.5,
        "thin": 255 * np.count_nonzero((depth > 0) & (depth < 2)) / area,
        "at_frame": 300 * at_frame / (width + height),
    }
    for name in _MEANS:
        found[name] = maps[name][place][mask].mean()
    for name in _EXTREMES:
        found[f"{name}_most"] = np.percentile(maps[name][place][mask], 90)
    return {name: min(255.0, max(0.0, float(value))) for name, value in found.items()}


def _differing(maps: Mapping[str, Pixels]) -> NDArray[np.bool_]:
    """Pixels that differ from the floor, darker or coloured; never those that are only brighter."""
    wide = np.maximum(maps["dark_wide"].astype(np.float32) - 64, 0) / 5
    rings = np.maximum(maps["dark_rad"].astype(np.float32) - 64, 0) / 4
    a, b = (maps[f"{axis}_wide"].astype(np.float32) - 96 for axis in "ab")
    colour = np.maximum(_magnitude(a, b) / 10 - 1.5, 0)
    darkness = np.maximum(wide, np.minimum(rings, 3 * wide))
    difference = _magnitude(darkness, (1.3 * colour).astype(np.float32))
    floor = difference[maps["radius"] < 0.95 * 130]
    middle = float(np.median(floor))
    deviation = 1.4826 * float(np.median(np.abs(floor - middle)))
    return np.asarray(difference > max(DIFFERS, middle + 4 * deviation))


def _length(region: Region, scale: NDArray[np.float64]) -> float:
    """Maximum Feret diameter in pixels of the picture, between the outer corners of pixels."""
    cv2 = require("cv2", "crop")
    rows, columns = np.nonzero(region.mask)
    hull = cv2.convexHull(np.stack([columns, rows], 1).astype(np.int32))[:, 0]
    corners = np.concatenate([hull + shift for shift in ([0, 0], [0, 1], [1, 0], [1, 1])]) * scale
    return float(np.sqrt(((corners[:, None] - corners[None]) ** 2).sum(axis=2)).max())


def _radial_floor(lightness: Plane, radius: Plane) -> Plane:
    """The 60th percentile of lightness at each distance from the centre: glare above is left out by a cap."""
    ring = np.minimum((radius * 20).astype(np.int32), 39)
    order = np.lexsort((lightness.ravel(), ring.ravel()))
    counts = np.bincount(ring.ravel(), minlength=40)
    starts = np.cumsum(counts) - counts
    at = np.minimum(starts + (0.6 * counts).astype(np.int64), lightness.size - 1)
    profile = np.where(counts > 5, lightness.ravel()[order][at], FLOOR_L).astype(np.float32)
    return np.asarray(_blurred(np.minimum(profile, FLOOR_L + 3)[None], 1)[0][ring])


def _median(lab: Plane, size: int) -> Plane:
    """The median of each channel over size x size."""
    cv2 = require("cv2", "crop")
    half, planes = size // 2, []
    for plane, (scale, zero) in zip(cv2.split(lab), ((2.5, 0), (5, 128), (5, 128)), strict=True):
        padded = cv2.copyMakeBorder(_bytes(plane, scale, zero), *[half] * 4, cv2.BORDER_REFLECT)
        middle = cv2.medianBlur(padded, size)[half:-half, half:-half]
        planes.append((middle.astype(np.float32) - zero) / scale)
    return np.asarray(cv2.merge(planes))


def _gradient(plane: Plane) -> Plane:
    cv2 = require("cv2", "crop")
    across, down = (cv2.Sobel(plane, cv2.CV_32F, *axis, scale=1 / 8) for axis in ((1, 0), (0, 1)))
    return _magnitude(across, down)


def _magnitude(x: Plane, y: Plane) -> Plane:
    # Not cv2.magnitude: its last bit changes from run to run, and a pixel on a threshold with it.
    return np.asarray(np.sqrt(x * x + y * y), np.float32)


def _spread(half: Plane, deviation: float, w: int, h: int) -> Plane:
    """A map of half the size, blurred by so many pixels of the whole."""
    return _enlarged(_blurred(half, deviation / 2), w, h)


def _blurred(plane: Plane, deviation: float) -> Plane:
    cv2 = require("cv2", "crop")
    return np.asarray(cv2.GaussianBlur(plane, (0, 0), deviation, borderType=cv2.BORDER_REFLECT))


def _shrunk(plane: Plane, factor: int) -> Plane:
    cv2 = require("cv2", "crop")
    size = plane.shape[1] // factor, plane.shape[0] // factor
    return np.asarray(cv2.resize(plane, size, interpolation=cv2.INTER_AREA))


def _enlarged(plane: Plane, w: int, h: int) -> Plane:
    cv2 = require("cv2", "crop")
    return np.asarray(cv2.resize(plane, (w, h), interpolation=cv2.INTER_LINEAR))


def _disc(size: int) -> Any:
    cv2 = require("cv2", "crop")
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))


def _bytes(plane: Plane, scale: float, zero: float) -> Pixels:
    """Scale x plane + zero, cut to 0 to 255."""
    cv2 = require("cv2", "crop")
    return np.asarray(cv2.convertScaleAbs(cv2.max(plane, -zero / scale), alpha=scale, beta=zero))


def _roots(plane: Plane, scale: float) -> Pixels:
    cv2 = require("cv2", "crop")
    return np.asarray(cv2.convertScaleAbs(cv2.sqrt(cv2.max(plane, 0)), alpha=scale))


@cache
def _table(curve: tuple[float, ...]) -> Plane:
    """The curve at every byte."""
    return np.interp(np.arange(256), KNOTS, curve).astype(np.float32)
