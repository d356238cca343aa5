"""The insect finder: on drawn wells, whose masks are exact, and on real photographs."""

import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from bioscan.data.boxes import Finding
from bioscan.data.decode import decode_image
from bioscan.data.localise import (
    find_insect,
    find_insects,
    find_regions,
    measure_neighbourhood,
    measure_pixels,
    pixel_chances,
    region_measurements,
    working_picture,
)
from bioscan.data.localise_curves import KNOTS, NEAR_CURVES, PIXEL_CURVES, REGION_CURVES
from bioscan.data.synthesis_pictures import HEIGHT, PLANS, TRAITS, WIDTH, Studio, Subject, plate_light
from bioscan.errors import MissingExtraError, RequestError

pytest.importorskip("cv2")

Pixels = NDArray[np.uint8]


class Well(NamedTuple):
    pixels: Pixels
    mask: NDArray[np.bool_]

    @property
    def box(self) -> NDArray[np.float64]:
        rows, columns = np.nonzero(self.mask)
        return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], float)


def jpeg(pixels: Pixels, quality: int = 75) -> Pixels:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=quality)
    return np.array(Image.open(data))


def draw(count: int, seed: int, *, empty: bool = False) -> list[Well]:
    studio, plans = Studio(), list(PLANS.values())
    wells = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        light = plate_light(rng)
        own = rng.standard_normal(len(TRAITS), dtype=np.float32)
        subject = None if empty else Subject(plans[number % len(plans)], own, rng)
        picture, mask = studio.photograph(subject, light, rng)
        wells.append(Well(jpeg(picture), mask))
    return wells


@pytest.fixture(scope="module")
def wells() -> list[Well]:
    return draw(42, seed=5)


@pytest.fixture(scope="module")
def findings(wells: list[Well]) -> list[Finding]:
    return find_insects([w.pixels for w in wells])


def iou(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    shared = np.prod(np.maximum(high - low, 0))
    areas = sum(np.prod(box[2:] - box[:2]) for box in (first, second))
    return float(shared / (areas - shared))


def overlaps(found: list[Finding], expected: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    pairs = zip(found, expected, strict=True)
    return np.array([iou(f.boxes[0], box) if len(f.boxes) else 0.0 for f, box in pairs])


def test_drawn_insects_get_their_boxes(wells: list[Well], findings: list[Finding]) -> None:
    overlap = overlaps(findings, [w.box for w in wells])
    assert overlap.mean() >= 0.85
    assert (overlap >= 0.5).mean() >= 0.95


def test_masks_cover_the_drawn_insects(wells: list[Well], findings: list[Finding]) -> None:
    # Legs and antennae are thin, so the outline weighs much; a mask of the box alone would reach 0.35.
    shares = []
    for well, found in zip(wells, findings, strict=True):
        assert found.mask is not None
        assert found.mask.shape == well.mask.shape
        shares.append((found.mask & well.mask).sum() / (found.mask | well.mask).sum())
    assert np.mean(shares) >= 0.6


def test_empty_wells_hold_nothing() -> None:
    found = find_insects([w.pixels for w in draw(40, seed=6, empty=True)])
    assert sum(f.kind == "none" for f in found) >= 38
    nothing = next(f for f in found if f.kind == "none")
    assert nothing.boxes.shape == (0, 4)
    assert nothing.scores.shape == (0,)
    assert nothing.mask is None
    assert nothing.length_px is None


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 205, 210), (120, 60, 20), (0, 255, 0)])
def test_a_picture_of_one_colour_holds_nothing(colour: tuple[int, int, int]) -> None:
    assert find_insect(np.full((256, 341, 3), colour, np.uint8)).kind == "none"


def test_other_pixels_are_refused() -> None:
    for wrong in (
        np.zeros((40, 40), np.uint8),
        np.zeros((40, 40, 4), np.uint8),
        np.zeros((0, 40, 3), np.uint8),
        np.zeros((40, 40, 3), np.float32),
        None,
    ):
        with pytest.raises(RequestError, match="takes an H x W x 3 array of uint8"):
            find_insect(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("deviation", [1, 4, 12, 30])
def test_noise_is_no_insect(deviation: float) -> None:
    noise = np.random.default_rng(0).normal(128, deviation, (256, 341, 3))
    assert find_insect(np.clip(noise, 0, 255).astype(np.uint8)).kind == "none"


def test_two_insects_in_a_well_are_many() -> None:
    studio, plans = Studio(), list(PLANS.values())
    short = np.zeros(len(TRAITS), np.float32)
    short[list(TRAITS).index("length")] = -2.5
    overlap = []
    for number in range(12):
        drawn = []
        for side in (-1, 1):
            subject = Subject(plans[number + (side + 1)], short, np.random.default_rng([number, side + 1]))
            subject.x, subject.y = WIDTH / 2 + 55 * side, HEIGHT / 2 + 20 * side
            # The same camera, so the same well.
            light = plate_light(np.random.default_rng([8, number]))
            drawn.append(Well(*studio.photograph(subject, light, np.random.default_rng([9, number]))))
        left, right = drawn
        found = find_insect(jpeg(np.where(right.mask[..., None], right.pixels, left.pixels)))
        assert found.kind == "many"
        # Which is the specimen, nobody can tell.
        for well in drawn:
            overlap.append(max(iou(box, well.box) for box in found.boxes))
    assert min(overlap) >= 0.25  # long antennae of a small body are lost
    assert np.mean(overlap) >= 0.65


def test_one_insect_is_not_many(findings: list[Finding]) -> None:
    assert sum(f.kind == "one" for f in findings) >= 40


def test_the_mask_lies_in_the_box_and_its_length_between_side_and_diagonal(
    wells: list[Well], findings: list[Finding]
) -> None:
    for well, found in zip(wells, findings, strict=True):
        assert found.mask is not None
        assert found.length_px is not None
        rows, columns = np.nonzero(found.mask)
        x0, y0, x1, y1 = found.boxes[0]
        assert x0 - 0.5 <= columns.min()
        assert columns.max() + 1 <= x1 + 0.5
        assert y0 - 0.5 <= rows.min()
        assert rows.max() + 1 <= y1 + 0.5
        assert 0 <= x0 < x1 <= well.pixels.shape[1]
        assert 0 <= y0 < y1 <= well.pixels.shape[0]
        assert max(x1 - x0, y1 - y0) - 1e-3 <= found.length_px <= np.hypot(x1 - x0, y1 - y0) + 1e-3


def test_the_length_is_the_largest_distance_within_the_mask(findings: list[Finding]) -> None:
    for found in findings[:6]:
        assert found.mask is not None
        assert found.length_px is not None
        rows, columns = np.nonzero(found.mask)
        corners = np.unique(
            np.concatenate([np.stack([columns + i, rows + j], 1) for i in (0, 1) for j in (0, 1)]), axis=0
        )
        brute = max(np.hypot(*(corners - corner).T).max() for corner in corners)
        # The mask is smoothed when it is enlarged: up to a pixel of the working picture an end.
        assert found.length_px == pytest.approx(brute, abs=2 * 341 / 288 + 0.5)


def test_scores_are_chances_and_fall(wells: list[Well], findings: list[Finding]) -> None:
    for found in findings:
        assert found.scores.shape == (len(found.boxes),)
        assert ((found.scores > 0) & (found.scores < 1)).all()
        assert (np.diff(found.scores) <= 0).all()


def test_a_clear_insect_scores_higher_than_a_faint_one(wells: list[Well]) -> None:
    # The same picture with its contrast taken away little by little.
    for well in wells[:5]:
        floor = np.median(well.pixels, axis=(0, 1))
        scores = []
        for contrast in (1.0, 0.3, 0.1, 0.03):
            faint = np.round(floor + contrast * (well.pixels - floor)).astype(np.uint8)
            found = find_insect(faint)
            scores.append(found.scores[0] if len(found.scores) else 0.0)
        assert scores[0] > scores[2] >= scores[3]
        assert scores[3] == 0


def turned(box: NDArray[np.float64], change: str, width: int, height: int) -> NDArray[np.float64]:
    x0, y0, x1, y1 = box
    return np.array(
        {
            "mirrored": (width - x1, y0, width - x0, y1),
            "upside down": (x0, height - y1, x1, height - y0),
            "turned left": (y0, width - x1, y1, width - x0),
            "turned round": (width - x1, height - y1, width - x0, height - y0),
        }[change]
    )


@pytest.mark.parametrize(
    ("change", "apply"),
    [
        ("mirrored", lambda p: p[:, ::-1]),
        ("upside down", lambda p: p[::-1]),
        ("turned left", np.rot90),
        ("turned round", lambda p: p[::-1, ::-1]),
    ],
)
def test_a_turned_picture_has_a_turned_box(
    wells: list[Well], findings: list[Finding], change: str, apply: Callable[[Pixels], Pixels]
) -> None:
    some = range(0, len(wells), 3)
    expected = [turned(findings[i].boxes[0], change, 341, 256) for i in some]
    overlap = overlaps([find_insect(apply(wells[i].pixels)) for i in some], expected)
    assert overlap.mean() >= 0.95
    assert overlap.min() >= 0.7


def scaled(pixels: Pixels, factor: float) -> Pixels:
    return np.clip(np.round(pixels * factor), 0, 255).astype(np.uint8)


def curved(pixels: Pixels, gamma: float) -> Pixels:
    bent: NDArray[np.float64] = 255 * (pixels / 255) ** gamma
    return np.round(bent).astype(np.uint8)


def grained(pixels: Pixels) -> Pixels:
    grain = np.random.default_rng(1).normal(0, 5, pixels.shape)
    return np.clip(pixels + grain, 0, 255).astype(np.uint8)


def warmed(pixels: Pixels) -> Pixels:
    tinted: NDArray[np.float64] = pixels * np.array([1.04, 1.0, 0.94])
    return np.clip(np.round(tinted), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda p: scaled(p, 0.7), id="dim"),
        pytest.param(lambda p: scaled(p, 1.12), id="bright"),
        pytest.param(lambda p: curved(p, 1.25), id="gamma 1.25"),
        pytest.param(lambda p: curved(p, 0.8), id="gamma 0.8"),
        pytest.param(grained, id="noise"),
        pytest.param(lambda p: jpeg(p, 40), id="JPEG 40"),
        pytest.param(warmed, id="warm"),
    ],
)
def test_light_noise_and_compression_leave_the_box(
    wells: list[Well], findings: list[Finding], change: Callable[[Pixels], Pixels]
) -> None:
    some = range(0, len(wells), 3)
    expected = [findings[i].boxes[0] for i in some]
    overlap = overlaps([find_insect(change(wells[i].pixels)) for i in some], expected)
    assert overlap.mean() >= 0.85
    assert (overlap >= 0.5).mean() >= 0.9


@pytest.mark.parametrize("factor", [0.5, 2, 4])
def test_the_box_grows_with_the_picture(wells: list[Well], findings: list[Finding], factor: float) -> None:
    some = range(0, len(wells), 6)
    size = round(341 * factor), round(256 * factor)
    enlarged = [
        np.array(Image.fromarray(wells[i].pixels).resize(size, Image.Resampling.BICUBIC)) for i in some
    ]
    found = find_insects(enlarged)
    overlap = overlaps(found, [findings[i].boxes[0] * factor for i in some])
    assert overlap.mean() >= 0.85
    lengths = np.array(
        [[f.length_px, findings[i].length_px] for f, i in zip(found, some, strict=True)], float
    )
    assert np.median(lengths[:, 0] / lengths[:, 1]) == pytest.approx(factor, rel=0.1)


def test_an_insect_in_a_grey_picture_is_found(wells: list[Well]) -> None:
    some = wells[::3]
    greys = [np.repeat(np.array(Image.fromarray(w.pixels).convert("L"))[..., None], 3, axis=2) for w in some]
    overlap = overlaps(find_insects(greys), [w.box for w in some])
    assert np.median(overlap) >= 0.5  # worse than in colour: wings and legs are told by it
    assert (overlap > 0).all()


def test_a_picture_says_the_same_alone_again_and_among_others(
    wells: list[Well], findings: list[Finding]
) -> None:
    before = wells[0].pixels.copy()
    again = find_insect(wells[0].pixels)
    assert np.array_equal(wells[0].pixels, before)
    assert np.array_equal(again.boxes, findings[0].boxes)
    assert np.array_equal(again.scores, findings[0].scores)
    assert again.mask is not None
    assert findings[0].mask is not None
    assert np.array_equal(again.mask, findings[0].mask)
    assert find_insects([]) == []


@given(
    height=st.integers(1, 320),
    width=st.integers(1, 320),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["noise", "spot", "stripes"]),
)
@settings(max_examples=40, deadline=None)
def test_any_picture_gives_a_finding(height: int, width: int, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(190, 215, (height, width, 3)).astype(np.uint8)
    if kind == "spot":
        y, x = rng.integers(height), rng.integers(width)
        pixels[y : y + max(1, height // 3), x : x + max(1, width // 4)] = rng.integers(0, 120, 3)
    elif kind == "stripes":
        pixels[:, :: int(rng.integers(2, 40))] = rng.integers(0, 255, 3)
    elif rng.random() < 0.5:
        pixels = rng.integers(0, 256, pixels.shape).astype(np.uint8)
    well_formed(find_insect(pixels), height, width)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (32, 32), (32, 2880), (2160, 40), (2160, 2880)])
def test_odd_sizes_give_a_finding(height: int, width: int) -> None:
    pixels = np.full((height, width, 3), 200, np.uint8)
    pixels[height // 3 : height // 2 + 1, width // 3 : width // 2 + 1] = (80, 50, 30)
    well_formed(find_insect(pixels), height, width)


def well_formed(found: Finding, height: int, width: int) -> None:
    assert found.boxes.shape == (len(found.scores), 4)
    assert (found.kind == "none") == (len(found.boxes) == 0)
    assert (found.kind == "many") == (len(found.boxes) > 1)
    assert np.isfinite(found.boxes).all()
    assert (found.boxes[:, :2] >= 0).all()
    assert (found.boxes[:, 2:] <= np.array([width, height]) + 1e-6).all()
    assert (found.boxes[:, :2] < found.boxes[:, 2:]).all()
    if found.mask is not None:
        assert found.mask.shape == (height, width)


def test_every_curve_is_of_something_measured_and_the_other_way_round(wells: list[Well]) -> None:
    maps = measure_pixels(working_picture(wells[0].pixels))
    chance = pixel_chances(maps)
    regions = find_regions(chance, maps)
    assert set(PIXEL_CURVES) == set(maps)
    assert set(NEAR_CURVES) == set(maps) | set(measure_neighbourhood(chance))
    assert set(REGION_CURVES) == set(region_measurements(regions[0], regions))
    for curves in (PIXEL_CURVES, NEAR_CURVES, REGION_CURVES):
        assert {len(curve) for curve in curves.values()} == {len(KNOTS)}


def test_without_opencv_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtraError, match=r"bioscan\[crop\]"):
        find_insect(np.zeros((32, 32, 3), np.uint8))


def read(path: Path) -> Pixels:
    return decode_image(path.read_bytes(), name=path.name, place="")


def test_failed_crops_of_bioscan_are_found(shared: Path) -> None:
    # A sample of half A, to which the curves were fitted; all of half B is in the benchmark.
    folder = shared / "data" / "bioscan_crop"
    with (folder / "quality.tsv").open(encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file, delimiter="\t") if r["processid"][:5] in ("CRCEA", "CRALA")]
    valid = [r for r in rows if r["quality"] == "valid"][::6]
    empty = [r for r in rows if r["quality"] == "empty" and r["has_box"] == "0"][::6]
    corners = [[float(r[name]) for name in "xywh"] for r in valid]
    boxes = [np.array([x, y, x + w, y + h]) for x, y, w, h in corners]
    found = find_insects([read(folder / "original_1024" / r["image_file"]) for r in valid])
    assert np.median(overlaps(found, boxes)) >= 0.65
    nothing = find_insects([read(folder / "original_1024" / r["image_file"]) for r in empty])
    assert np.mean([f.kind == "none" for f in nothing]) >= 0.7


@pytest.mark.parametrize(
    ("name", "box"),
    [
        # Where the published crops lie in the originals, found by matching, less the margin rule's margin.
        ("BIOUG68001-C12", (160, 119, 205, 156)),
        ("BIOUG68020-A01", (162, 107, 237, 149)),
        ("BIOUG68021-F12", (145, 106, 220, 172)),
        ("BIOUG68104-C02", (125, 100, 198, 145)),
        ("BIOUG68134-F03", (141, 119, 190, 150)),
    ],
)
def test_the_box_of_a_published_crop_is_found_again(
    shared: Path, name: str, box: tuple[int, int, int, int]
) -> None:
    pixels = read(shared / "data" / "bioscan1m_orders" / "original_256" / f"{name}.jpg")
    found = find_insect(pixels)
    assert found.kind == "one"
    assert iou(found.boxes[0], np.array(box, float)) >= 0.6
