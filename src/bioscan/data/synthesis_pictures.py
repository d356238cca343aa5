"""Drawn insects in drawn wells: pictures like those of BIOSCAN-1M, with the exact mask of the specimen.

A plan says what an order (or a group of families) looks like, in numbers of the field: lengths, proportions,
colours. Traits are deviations from the plan. Everything is drawn at twice the size and halved, so that a
pixel of the mask is one that the drawing changed.

Axes: H, W picture; P points; a body's own axes are x towards the head and y to its left, in body lengths.
"""

import colorsys
import math
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

HEIGHT: Final = 256
WIDTH: Final = 341
"""Pixels: originals of 2880 x 2160 with the shorter side at 256, as in the package `original_256`."""
QUALITY: Final = 75
"""JPEG quality of the published pictures, with 4:2:0 chroma."""
SCALE: Final = 2
"""Pictures are drawn at so many times their size."""

Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Points = NDArray[np.float64]
Colour = tuple[int, int, int]

TRAITS: Final[dict[str, tuple[float, float, bool]]] = {
    "length": (78, 0.2, True),  # body, pixels
    "width": (0.25, 0.16, True),  # body, in lengths
    "head": (0.8, 0.1, True),  # in body widths
    "thorax": (0.32, 0.1, True),  # in lengths
    "waist": (0.7, 0.12, True),  # in body widths
    "taper": (0.35, 0.2, True),  # end of the abdomen, in body widths
    "hue": (0.075, 0.018, False),
    "saturation": (0.45, 0.1, False),
    "value": (0.36, 0.09, False),
    "abdomen_value": (0.06, 0.08, False),  # added to value
    "bands": (0.12, 0.12, False),  # contrast
    "band_count": (5, 0.2, True),
    "leg": (0.6, 0.16, True),  # in lengths
    "leg_width": (0.024, 0.18, True),
    "hind": (1.2, 0.08, True),  # hind leg, in legs
    "leg_value": (0.04, 0.08, False),  # added to value
    "antenna": (0.35, 0.2, True),  # in lengths
    "wing": (0.85, 0.1, True),  # in lengths
    "wing_width": (0.34, 0.12, True),  # in wing lengths
    "spread": (30, 0.25, True),  # degrees from the body's axis
    "opacity": (70, 0.2, True),  # of 255
    "wing_hue": (0.1, 0.02, False),
    "wing_saturation": (0.18, 0.06, False),
    "wing_value": (0.55, 0.09, False),
    "veins": (5, 0.2, True),
    "spots": (-0.2, 0.3, False),  # drawn where above 0
    "eye": (0.55, 0.12, True),  # in heads
    "eye_red": (0.25, 0.2, False),
    "hair": (0.25, 0.2, False),
    "tail": (0.5, 0.15, True),  # in lengths, where the plan has tails
}
"""Trait -> usual value, deviation (of the logarithm, or of the value), whether on the logarithm."""

MAX_LENGTH: Final = 180
"""Pixels: longer bodies do not fit into a well."""
INDIVIDUAL: Final = 0.4
"""Deviation of a specimen from its species, in units of the trait's."""


@dataclass(frozen=True)
class Plan:
    """What an order or a group of families has in common.

    Attributes:
        wings: `two`, `four`, `elytra`, `short elytra`, `scaled`, `roof`, `half` (hemelytra), `cover`
            (leathery forewings), `fringed`, `upright` or `none`.
        antennae: `thread`, `short`, `beads`, `club`, `elbow`, `plume` or `comb`.
        tails: Threads or, with `forceps`, tongs at the end.
        means: Trait -> usual value, where it differs from that of `TRAITS`.
    """

    wings: str
    antennae: str
    tails: int = 0
    forceps: bool = False
    means: dict[str, float] = field(default_factory=dict)


PLANS: Final = {
    "Diptera": Plan(
        "two",
        "short",
        means=dict(length=70, width=0.3, head=0.85, value=0.3, eye=0.75, eye_red=0.45, hair=0.5),
    ),
    "midges": Plan(
        "two",
        "thread",
        means=dict(
            length=64, width=0.17, head=0.8, thorax=0.27, leg=0.95, leg_width=0.02, antenna=0.45, wing=0.9
        ),
    ),
    "plumed midges": Plan(
        "two",
        "plume",
        means=dict(
            length=66, width=0.18, head=0.75, thorax=0.32, leg=0.8, leg_width=0.02, antenna=0.42, wing=0.75
        ),
    ),
    "Hymenoptera": Plan(
        "four",
        "elbow",
        means=dict(
            **dict(
                length=78, width=0.22, head=1.0, thorax=0.33, waist=0.14, taper=0.15, value=0.2, antenna=0.5
            ),
            **dict(wing=0.75, spread=38, saturation=0.5, veins=3, opacity=45, hue=0.06),
        ),
    ),
    "Coleoptera": Plan(
        "elytra",
        "club",
        means=dict(
            **dict(length=76, width=0.46, head=0.55, thorax=0.24, waist=0.92, taper=0.45, leg=0.42),
            **dict(
                leg_width=0.045, antenna=0.32, value=0.26, wing_value=0.3, wing_saturation=0.5, wing_hue=0.06
            ),
        ),
    ),
    "Hemiptera": Plan(
        "half",
        "thread",
        means=dict(
            **dict(length=78, width=0.36, head=0.75, thorax=0.25, waist=0.98, taper=0.25, hue=0.17, leg=0.55),
            **dict(saturation=0.5, value=0.55, antenna=0.35, wing_hue=0.18, wing_saturation=0.4, opacity=190),
        ),
    ),
    "Lepidoptera": Plan(
        "scaled",
        "thread",
        means=dict(
            **dict(
                length=88, width=0.22, head=0.8, waist=0.9, antenna=0.55, wing=0.95, wing_width=0.5, hair=0.9
            ),
            **dict(wing_hue=0.085, wing_saturation=0.35, wing_value=0.5, opacity=235, spread=24, spots=0.4),
        ),
    ),
    "Psocodea": Plan(
        "roof",
        "thread",
        means=dict(
            **dict(
                length=60, width=0.34, head=1.05, thorax=0.25, waist=0.8, taper=0.5, antenna=0.95, value=0.5
            ),
            **dict(wing=1.0, wing_width=0.4, spread=14, opacity=60, leg=0.5, eye=0.45, saturation=0.4),
        ),
    ),
    "Thysanoptera": Plan(
        "fringed",
        "beads",
        means=dict(
            **dict(
                length=62, width=0.17, head=0.75, thorax=0.28, waist=0.95, taper=0.12, leg=0.28, antenna=0.2
            ),
            **dict(wing=0.62, wing_width=0.12, spread=12, opacity=110, value=0.28, bands=0.2),
        ),
    ),
    "Trichoptera": Plan(
        "roof",
        "thread",
        means=dict(
            **dict(
                length=84,
                width=0.22,
                head=0.85,
                antenna=1.15,
                wing=1.15,
                wing_width=0.34,
                spread=13,
                hair=0.9,
            ),
            **dict(opacity=170, wing_value=0.42, wing_saturation=0.4, leg=0.75),
        ),
    ),
    "Orthoptera": Plan(
        "cover",
        "thread",
        means=dict(
            **dict(length=106, width=0.24, head=0.95, thorax=0.26, waist=0.98, taper=0.4, hind=2.1, leg=0.5),
            **dict(leg_width=0.04, antenna=0.9, hue=0.14, value=0.5, wing=0.7, wing_width=0.22, opacity=215),
        ),
    ),
    "Blattodea": Plan(
        "cover",
        "thread",
        tails=2,
        means=dict(
            **dict(
                length=88, width=0.42, head=0.5, thorax=0.3, waist=1.0, taper=0.6, antenna=0.85, tail=0.16
            ),
            **dict(wing=0.75, wing_width=0.34, spread=7, opacity=215, hue=0.06, value=0.38, leg=0.55),
        ),
    ),
    "Neuroptera": Plan(
        "roof",
        "thread",
        means=dict(
            **dict(
                length=84, width=0.17, head=0.95, antenna=0.7, wing=1.3, wing_width=0.36, spread=26, veins=10
            ),
            **dict(opacity=42, hue=0.2, value=0.55),
        ),
    ),
    "Ephemeroptera": Plan(
        "upright",
        "short",
        tails=3,
        means=dict(length=86, width=0.17, wing=0.9, wing_width=0.5, spread=75, tail=1.1, opacity=60, veins=9),
    ),
    "Dermaptera": Plan(
        "short elytra",
        "beads",
        tails=2,
        forceps=True,
        means=dict(length=98, width=0.19, head=0.9, waist=0.95, taper=0.7, antenna=0.5, tail=0.24, hue=0.06),
    ),
    "Archaeognatha": Plan(
        "none",
        "thread",
        tails=3,
        means=dict(length=92, width=0.25, head=0.7, waist=1.0, taper=0.15, antenna=0.8, tail=0.7, leg=0.35),
    ),
    "Plecoptera": Plan(
        "cover",
        "thread",
        tails=2,
        means=dict(
            length=88, width=0.18, antenna=0.7, wing=0.95, wing_width=0.26, spread=8, tail=0.4, opacity=110
        ),
    ),
    "Embioptera": Plan(
        "none",
        "beads",
        means=dict(length=92, width=0.16, head=1.0, waist=0.95, taper=0.6, leg=0.35, leg_width=0.05),
    ),
    "Odonata": Plan(
        "four",
        "short",
        means=dict(length=125, width=0.1, head=1.6, wing=0.75, wing_width=0.24, spread=82, veins=12, eye=0.9),
    ),
    "Strepsiptera": Plan(
        "two", "comb", means=dict(length=52, width=0.3, wing=0.8, wing_width=0.7, spread=60)
    ),
    "Zoraptera": Plan("none", "beads", means=dict(length=56, width=0.24, head=0.95, antenna=0.5)),
}

FAMILY_PLANS: Final = {
    **dict.fromkeys(("Cecidomyiidae", "Sciaridae", "Mycetophilidae", "Limoniidae", "Keroplatidae"), "midges"),
    **dict.fromkeys(("Ditomyiidae", "Bibionidae", "Scatopsidae", "Simuliidae"), "midges"),
    **dict.fromkeys(("Chironomidae", "Ceratopogonidae", "Culicidae", "Psychodidae"), "plumed midges"),
}
"""Families of Diptera that are no flies to look at."""


def trait_values(plan: Plan, deviations: NDArray[np.float32]) -> dict[str, float]:
    """The traits of a specimen: its plan's, moved by deviations in units of each trait's own."""
    found = {}
    for (name, (usual, deviation, logarithmic)), z in zip(TRAITS.items(), deviations.tolist(), strict=True):
        mean = plan.means.get(name, usual)
        found[name] = mean * math.exp(deviation * z) if logarithmic else mean + deviation * z
    return found | {"length": min(found["length"], MAX_LENGTH)}


class Subject:
    """A specimen as it lies in its well.

    Attributes:
        plan: Its order's.
        traits: Trait -> value.
        x: Where its middle is, pixels from the left.
        y: The same from the top.
        rng: Its pose and its losses.
    """

    def __init__(self, plan: Plan, deviations: NDArray[np.float32], rng: np.random.Generator) -> None:
        """`deviations` are those of its species; the specimen adds its own."""
        own = rng.standard_normal(len(TRAITS), dtype=np.float32) * np.float32(INDIVIDUAL)
        self.plan, self.traits, self.rng = plan, trait_values(plan, deviations + own), rng
        across, down = rng.normal(0, (26, 18))
        self.x = WIDTH / 2 + min(max(across, -70), 70)
        self.y = HEIGHT / 2 + min(max(down, -45), 45)

    def around(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of what it can reach within the picture."""
        t = self.traits
        ends = 0.5 + max(t["antenna"], t["tail"] if self.plan.tails else 0)
        reach = 6 + t["length"] * max(ends, 0.35 + t["leg"] * max(t["hind"], 1), 0.3 + t["wing"])
        left, top = max(0, int(self.x - reach)), max(0, int(self.y - reach))
        return left, top, min(WIDTH, int(self.x + reach) + 1), min(HEIGHT, int(self.y + reach) + 1)


class Light(NamedTuple):
    """How a plate was lit and photographed."""

    tone: tuple[float, float, float]
    """Colour of the well's floor, 0 to 255."""
    rim: tuple[float, float, float]
    """Colour outside of the rim."""
    radius: float
    """Of the well, pixels."""
    rings: tuple[tuple[float, float, float], ...]
    """Radius (in well radii), width and strength of each glare ring."""
    lamps: int
    """Reflections of the ring light; 0: none seen."""
    spokes: float
    """Strength of the bright centre with its spokes."""


def plate_light(rng: np.random.Generator) -> Light:
    """The light of one plate: specimens of a plate share it."""
    grey = rng.uniform(192, 216)
    blue = rng.choice([rng.uniform(-3, 5), rng.uniform(6, 18)], p=[0.6, 0.4])
    tone = (grey - 0.8 * blue, grey + rng.uniform(-1, 2), grey + 0.6 * blue)
    bright = grey + rng.uniform(12, 30)
    rim = (bright + rng.uniform(-1, 3), bright - rng.uniform(1, 6), bright + rng.uniform(0, 8))
    rings = tuple(
        (float(r), float(rng.uniform(0.03, 0.08)), float(rng.uniform(4, 22)))
        for r in np.sort(rng.uniform(0.3, 0.85, rng.integers(1, 4)))
    )
    lamps = int(rng.choice([0, 0, 0, 9, 14]))
    return Light(tone, rim, rng.uniform(118, 146), rings, lamps, rng.uniform(5, 30))


_NOISE_SIZE = 512
_STEPS = 512
_ANGLES = 256


class Studio:
    """What every picture needs and is made once: grids and grain."""

    def __init__(self) -> None:
        y, x = np.mgrid[0 : HEIGHT // 2, 0 : WIDTH // 2 + 1].astype(np.float32) * 2
        self._x, self._y = x, y
        grain = np.random.default_rng(0).standard_normal((_NOISE_SIZE, _NOISE_SIZE, 3), dtype=np.float32)
        grain += 0.7 * grain.mean(axis=2, keepdims=True) * math.sqrt(3)
        self._grain = grain

    def well(self, light: Light, rng: np.random.Generator) -> Image.Image:
        """An empty well, HEIGHT x WIDTH, without grain."""
        off = rng.normal(0, (5, 4))
        radius = light.radius * rng.normal(1, 0.02)
        dx, dy = self._x - (WIDTH / 2 + off[0]), self._y - (HEIGHT / 2 + off[1])
        r = np.sqrt(dx * dx + dy * dy)
        step = np.minimum(r * (_STEPS / 2 / radius), _STEPS - 1).astype(np.int16)
        angle = (np.arctan2(dy, dx) * (_ANGLES / 2 / math.pi) + _ANGLES / 2).astype(np.int16) % _ANGLES
        steady, glare, spokes = _profiles(light, radius)
        around, lines = _around(rng)
        shade = steady[step]
        shade += around[angle][..., None] * glare[step]
        shade += (lines[angle] * spokes[step])[..., None]
        tilt = rng.normal(0, 0.02, 2)
        shade *= 1 + tilt[0] * dx[..., None] / 170 + tilt[1] * dy[..., None] / 128 + rng.normal(0, 0.015)
        picture = Image.fromarray(np.clip(shade, 0, 255, out=shade).astype(np.uint8)).resize(
            (WIDTH, HEIGHT), Image.Resampling.BILINEAR
        )
        self._clutter(picture, light, radius, WIDTH / 2 + off[0], HEIGHT / 2 + off[1], rng)
        return picture

    def _clutter(
        self, picture: Image.Image, light: Light, radius: float, x: float, y: float, rng: np.random.Generator
    ) -> None:
        """Lamps, edges of the glass, scratches, fibres and dust."""
        draw = ImageDraw.Draw(picture, "RGBA")
        for _ in range(rng.integers(2, 5)):
            r, start = radius * rng.uniform(0.97, 1.05), rng.uniform(0, 360)
            fill = (255, 255, 255, int(rng.uniform(70, 220)))
            draw.arc(
                (x - r, y - r, x + r, y + r), start, start + rng.uniform(8, 60), fill, int(rng.integers(1, 3))
            )
        for lamp in range(light.lamps):
            turn = 2 * math.pi * (lamp + rng.uniform(-0.5, 0.5)) / light.lamps
            r, size = radius * 0.62, rng.uniform(2, 5)
            at = x + r * math.cos(turn), y + r * math.sin(turn)
            strength = int(rng.uniform(30, 190))
            for grow, alpha in ((2.2, strength // 5), (1.5, strength // 3), (1.0, strength)):
                w, h = size * grow, size * grow * 0.7
                draw.ellipse((at[0] - w, at[1] - h, at[0] + w, at[1] + h), (255, 255, 255, alpha))
        for _ in range(rng.poisson(1.2)):
            points = np.cumsum(rng.normal(0, 1, (10, 2)) * 2 + rng.normal(0, 4, 2), axis=0)
            points += rng.normal((x, y), 55)
            shade = int(rng.choice([70, 120, 235]))
            draw.line(points.ravel().tolist(), (shade, shade, shade, int(rng.uniform(60, 150))), 1)
        for _ in range(rng.poisson(7)):
            (px, py), size = rng.normal((x, y), 55), rng.uniform(0.4, 1.3)
            shade = int(rng.uniform(60, 150))
            draw.ellipse((px - size, py - size, px + size, py + size), (shade, shade, shade, 150))

    def photograph(
        self, subject: Subject | None, light: Light, rng: np.random.Generator
    ) -> tuple[Picture, Mask]:
        """A picture (HEIGHT x WIDTH x 3) and the mask of its specimen; without one, of an empty well."""
        picture = self.well(light, rng)
        grain_at = rng.integers(0, (_NOISE_SIZE - HEIGHT, _NOISE_SIZE - WIDTH))
        strength = rng.uniform(1.0, 2.2)
        mask = np.zeros((HEIGHT, WIDTH), dtype=np.bool_)
        if subject is not None:
            left, top, right, bottom = box = subject.around()
            size = SCALE * (right - left), SCALE * (bottom - top)
            large = picture.resize(size, Image.Resampling.NEAREST, box)
            pen = Pen(large, (left, top), sum(light.tone) / 3 / 205)
            draw_insect(pen, subject)
            picture.paste(large.reduce(SCALE), box)
            mask[top:bottom, left:right] = np.asarray(pen.mask.reduce(SCALE)) > 0
        grain = self._grain[grain_at[0] : grain_at[0] + HEIGHT, grain_at[1] : grain_at[1] + WIDTH]
        # Skin is rough: on the specimen the grain is coarser than what the sensor adds.
        noisy = np.where(mask, np.float32(strength + 4.5), np.float32(strength))[..., None] * grain
        noisy += np.asarray(picture)
        return np.clip(noisy, 0, 255, out=noisy).astype(np.uint8), mask


def _profiles(light: Light, radius: float) -> tuple[Picture, Picture, Picture]:
    """Colour by distance from the middle (steps x 3): what is steady, glare around, and spokes (steps)."""
    at = np.arange(_STEPS, dtype=np.float32) * (2 / _STEPS)  # in well radii
    inside = 1 / (1 + np.exp((at - 1.02) * 60))
    tone, rim = np.array(light.tone, np.float32), np.array(light.rim, np.float32)
    steady = inside[:, None] * (tone + 9 * at[:, None] ** 2) + (1 - inside[:, None]) * rim
    steady -= (26 * np.exp(-(((at - 0.99) / 0.014) ** 2)) + 14 * np.exp(-(((at - 1.1) / 0.03) ** 2)))[:, None]
    steady += (12 * np.exp(-(((at - 1.05) / 0.03) ** 2)))[:, None]
    for ring, width, strength in light.rings:
        steady += (strength * np.exp(-(((at - ring) / width) ** 2)))[:, None]
    centre = np.exp(-(((at - 0.2) / 0.07) ** 2))
    steady += (0.6 * light.spokes * centre)[:, None]
    steady -= (10 * np.exp(-((at / 0.1) ** 2)))[:, None]
    glare = (
        95 * np.exp(-(((at - 1.0) / 0.018) ** 2))
        + 34 * np.exp(-(((at - 1.17) / 0.07) ** 2))
        + 16 * np.exp(-(((at - 1.4) / 0.1) ** 2))
    )
    glare += 10 * np.exp(-(((at - 0.9) / 0.06) ** 2)) + 5 * inside
    coloured = glare[:, None] * np.array([1.0, 0.94, 1.02], np.float32)
    return steady.astype(np.float32), coloured.astype(np.float32), (light.spokes * centre).astype(np.float32)


def _around(rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """By angle: how bright the glare is (a few broad flares), and the spokes."""
    angle = np.arange(_ANGLES) * (2 * math.pi / _ANGLES)
    flares = np.full(_ANGLES, -0.35)
    for _ in range(rng.integers(3, 7)):
        away = np.angle(np.exp(1j * (angle - rng.uniform(0, 2 * math.pi))))
        flares += rng.uniform(0.4, 1.3) * np.exp(-((away / rng.uniform(0.08, 0.35)) ** 2))
    lines = rng.standard_normal(_ANGLES)
    lines = 0.5 * lines + 0.25 * (np.roll(lines, 1) + np.roll(lines, -1))
    return flares.astype(np.float32), (0.5 * lines).astype(np.float32)


class Pen:
    """Draws on an enlarged cut-out of a picture and, with the same strokes, on the mask.

    Points are given in the body's axes, in pixels of the final picture.

    Args:
        picture: The cut-out, SCALE times its size.
        corner: Its left and top in the picture.
        brightness: Of the light, 1 as usual.
    """

    def __init__(self, picture: Image.Image, corner: tuple[int, int], brightness: float) -> None:
        self._corner = np.array(corner)
        self.mask = Image.new("L", picture.size)
        self._draw = ImageDraw.Draw(picture, "RGBA")
        self._mark = ImageDraw.Draw(self.mask)
        self._brightness = brightness
        self._turn = np.eye(2)
        self._shift: Points = np.zeros(2)

    def place(self, x: float, y: float, angle: float, mirrored: bool) -> None:
        """Where the body's middle is, where its head points (radians), and whether it is mirrored."""
        c, s = math.cos(angle) * SCALE, math.sin(angle) * SCALE
        self._turn = np.array([[c, s], [s, -c] if mirrored else [-s, c]])
        self._shift = (np.array([x, y]) - self._corner) * SCALE

    def _at(self, points: Any) -> list[float]:
        placed: list[float] = (np.asarray(points) @ self._turn + self._shift).ravel().tolist()
        return placed

    def _ink(self, colour: Colour, alpha: float) -> tuple[int, int, int, int]:
        r, g, b = (min(255, int(c * self._brightness)) for c in colour)
        return r, g, b, max(1, min(255, int(alpha)))

    def shape(self, points: Any, colour: Colour, alpha: float = 255) -> None:
        """A filled outline."""
        placed = self._at(points)
        self._draw.polygon(placed, self._ink(colour, alpha))
        self._mark.polygon(placed, 255)

    def line(self, points: Any, colour: Colour, width: float, alpha: float = 255) -> None:
        """A stroke; `width` in pixels of the final picture."""
        placed, thick = self._at(points), max(1, round(width * SCALE))
        self._draw.line(placed, self._ink(colour, alpha), thick)
        self._mark.line(placed, 255, thick)

    def dot(self, point: Any, radius: float, colour: Colour, alpha: float = 255) -> None:
        """A filled circle."""
        (x, y), r = self._at(point), radius * SCALE
        self._draw.ellipse((x - r, y - r, x + r, y + r), self._ink(colour, alpha))
        self._mark.ellipse((x - r, y - r, x + r, y + r), 255)


def colour(hue: float, saturation: float, value: float) -> Colour:
    """RGB of a hue (turns), saturation and value (0 to 1, cut there)."""
    r, g, b = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 0.95), min(max(value, 0.06), 0.95))
    return int(255 * r), int(255 * g), int(255 * b)


def _shaded(ink: Colour, factor: float) -> Colour:
    r, g, b = (min(255, int(c * factor)) for c in ink)
    return r, g, b


class _Body:
    """The axis of a body with its half width, and what lies on it."""

    def __init__(self, t: dict[str, float], bend: float) -> None:
        self.length = t["length"]
        self.half = 0.5 * t["width"] * self.length
        self.s = np.linspace(0, 1, 33)
        heading = bend * (self.s - 0.35) ** 2 * np.sign(self.s - 0.35)
        steps = np.stack([-np.cos(heading), np.sin(heading)], axis=1) * (self.length / 32)
        axis = np.cumsum(steps, axis=0)
        self.axis = axis - axis[14]
        self.side = np.stack([np.sin(heading), np.cos(heading)], axis=1)
        self.head = min(0.5 * t["head"] * t["width"] * 1.1, 0.14)
        self.neck = 2 * self.head
        self.waist = min(self.neck + t["thorax"], 0.7)
        neck = 0.55 * min(t["head"], 1)
        tail = min(max(t["taper"], 0.08), 0.9)
        belly = 0.5 * (self.waist + 1)
        knots = [self.neck - 0.02, 0.5 * (self.neck + self.waist), self.waist, belly, 0.95, 1]
        widths = [neck, 0.92, min(t["waist"], 0.98), 1.0, tail, 0.3 * tail]
        if t["waist"] < 0.4:  # a stalk
            knots[2:3] = [self.waist - 0.02, self.waist + 0.05]
            widths[2:3] = [widths[2], widths[2]]
        self.width = np.interp(self.s, knots, widths) * self.half

    def point(self, s: float, across: float = 0.0) -> Points:
        """A point at s along the axis, `across` half widths to the left."""
        i = s * 32
        low = int(min(max(i, 0), 31))
        part = i - low
        centre = self.axis[low] * (1 - part) + self.axis[low + 1] * part
        placed: Points = centre + self.side[low] * (across * self.width[low])
        return placed

    def strip(self, start: float, end: float, low: float = -1.0, high: float = 1.0) -> Points:
        """The outline from s start to end, between `low` and `high` half widths."""
        i, j = max(0, round(start * 32)), min(32, round(end * 32))
        rows = slice(i, max(j, i + 1) + 1)
        axis, side, width = self.axis[rows], self.side[rows], self.width[rows, None]
        return np.concatenate([axis + side * (low * width), (axis + side * (high * width))[::-1]])


def draw_insect(pen: Pen, subject: Subject) -> None:
    """Draw a specimen, lying as it fell."""
    plan, t, rng = subject.plan, subject.traits, subject.rng
    body = _Body(t, float(rng.normal(0, 1.1)))
    pen.place(subject.x, subject.y, rng.uniform(0, 2 * math.pi), bool(rng.random() < 0.5))
    lateral = bool(rng.random() < 0.45)
    skin = colour(t["hue"], t["saturation"], t["value"])
    belly = colour(t["hue"], t["saturation"] + 0.05, t["value"] + t["abdomen_value"])
    limb = colour(t["hue"], t["saturation"], t["value"] + t["leg_value"])
    _tails(pen, plan, body, t, limb, rng)
    behind = plan.wings in ("two", "four", "upright", "scaled") and lateral
    if behind:
        _wing(pen, plan, body, t, -1, 0.85, rng)
    _legs(pen, body, t, limb, lateral, rng)
    _trunk(pen, body, t, skin, belly)
    _head(pen, plan, body, t, skin, limb, lateral, rng)
    if t["hair"] > 0.25:
        _hair(pen, body, t, skin, rng)
    _wings(pen, plan, body, t, skin, lateral, behind, rng)


def _trunk(pen: Pen, body: _Body, t: dict[str, float], skin: Colour, belly: Colour) -> None:
    for start, end, ink in ((body.waist - 0.01, 1.0, belly), (body.neck - 0.03, body.waist + 0.02, skin)):
        pen.shape(body.strip(start, end), _shaded(ink, 0.72))
        pen.shape(body.strip(start, end, -0.82, 0.7), ink)
        pen.shape(body.strip(start + 0.03, end - 0.04, -0.45, 0.2), _shaded(ink, 1.22), 130)
        pen.shape(body.strip(start + 0.05, end - 0.06, -0.3, -0.12), _shaded(ink, 1.8), 70)
    contrast = min(max(t["bands"], 0), 0.9)
    count = max(2, round(t["band_count"]))
    step = (0.97 - body.waist) / count
    for band in range(count):
        start = body.waist + (band + 0.62) * step
        pen.shape(body.strip(start, start + 0.38 * step), _shaded(belly, 0.45), 60 + 195 * contrast)


def _head(
    pen: Pen,
    plan: Plan,
    body: _Body,
    t: dict[str, float],
    skin: Colour,
    limb: Colour,
    lateral: bool,
    rng: np.random.Generator,
) -> None:
    radius = body.head * body.length
    centre = body.point(body.head)
    _antennae(pen, plan, body, t, limb, centre, radius, rng)
    pen.dot(centre, radius, _shaded(skin, 0.8))
    pen.dot(centre + radius * np.array([0.1, -0.15]), 0.72 * radius, _shaded(skin, 1.1))
    size = min(t["eye"], 1.1) * radius * 0.62
    red = min(max(t["eye_red"], 0), 1)
    ink = colour(0.01, 0.75 * red + 0.15, 0.14 + 0.32 * red)
    for side in (1,) if lateral else (-1, 1):
        eye = centre + radius * np.array([0.22, side * (0.45 if lateral else 0.68)])
        pen.dot(eye, size, ink)
        pen.dot(eye + size * np.array([0.25, -0.3]), 0.25 * size, (235, 225, 220), 150)


def _antennae(
    pen: Pen,
    plan: Plan,
    body: _Body,
    t: dict[str, float],
    ink: Colour,
    centre: Points,
    radius: float,
    rng: np.random.Generator,
) -> None:
    short = plan.antennae == "short"
    reach = 0.13 * body.length if short else t["antenna"] * body.length
    thick = max(0.55, 0.012 * body.length)
    for side in (-1, 1):
        if rng.random() < 0.06:
            continue
        aim = side * rng.uniform(0.25, 0.8)
        curve = side * rng.uniform(-0.4, 1.2)
        u = np.linspace(0, 1, 9)
        turn = aim + curve * u
        if plan.antennae == "elbow":
            turn = np.where(u < 0.35, aim - 0.3 * side, aim + side * 0.9 + 0.3 * curve * u)
        steps = np.stack([np.cos(turn), np.sin(turn)], axis=1) * (reach / 8)
        points = np.vstack([np.zeros(2), np.cumsum(steps[1:], axis=0)]) + centre
        points += radius * np.array([0.75, 0.3 * side])
        pen.line(points, ink, thick * (1.3 if short else 1))
        kind = plan.antennae
        if kind == "club":
            for place, size in ((points[-2], 1.6), (points[-1], 2.0)):
                pen.dot(place, thick * size, ink)
        elif kind == "beads":
            for place in points[1:]:
                pen.dot(place, thick * 1.25, ink)
        elif kind in ("plume", "comb"):
            away = np.stack([-np.sin(turn), np.cos(turn)], axis=1)
            hair = (0.22 if kind == "plume" else 0.35) * reach
            for place, across in zip(points[2:], away[2:], strict=True):
                ends = (place - across * hair, place, place + across * hair)
                pen.line(ends, ink, 0.5, 120 if kind == "plume" else 230)
        elif short:
            pen.dot(points[4], thick * 1.5, ink)


def _legs(
    pen: Pen, body: _Body, t: dict[str, float], ink: Colour, lateral: bool, rng: np.random.Generator
) -> None:
    length = t["leg"] * body.length
    thick = max(t["leg_width"] * body.length, 0.6)
    span = body.waist - body.neck
    aims = (0.75, 1.55, 2.3)  # radians from the head: forwards, outwards, backwards
    for pair, aim in enumerate(aims):
        long = length * (t["hind"] if pair == 2 else 1.0)
        femur = thick * (1 + 0.9 * max(t["hind"] - 1.2, 0) if pair == 2 else 1.0)
        for side in (-1, 1):
            if rng.random() < 0.07:
                continue
            way = 1 if lateral else side
            start = body.point(body.neck + span * (0.25 + 0.28 * pair), 0.7 * way)
            first = aim + rng.normal(0, 0.3) + (0.25 * side if lateral else 0)
            second = first + rng.normal(0.55 if pair == 2 else -0.35, 0.5)
            third = second + rng.normal(0.1, 0.35)
            joints = [start]
            for turn, share in ((first, 0.42), (second, 0.36), (third, 0.22)):
                joints.append(joints[-1] + long * share * np.array([math.cos(turn), way * math.sin(turn)]))
            pen.line(joints[:2], ink, femur * 1.5)
            pen.line(joints[1:3], _shaded(ink, 0.9), thick)
            pen.line(joints[2:], _shaded(ink, 0.8), max(0.5, 0.6 * thick))


def _tails(
    pen: Pen, plan: Plan, body: _Body, t: dict[str, float], ink: Colour, rng: np.random.Generator
) -> None:
    base = body.point(0.97)
    reach = t["tail"] * body.length
    away = body.axis[-1] - body.axis[-3]
    aim = math.atan2(away[1], away[0])
    for tail in range(plan.tails):
        part = tail - (plan.tails - 1) / 2
        u = np.linspace(0, 1, 7)
        if plan.forceps:
            turn = aim + part * (1.5 - 2.6 * u)
        else:
            turn = aim + part * rng.uniform(0.5, 1.0) * (1 + 0.4 * u) + rng.normal(0, 0.1)
        steps = np.stack([np.cos(turn), np.sin(turn)], axis=1) * (reach / 6)
        points = np.vstack([np.zeros(2), np.cumsum(steps[1:], axis=0)]) + base
        pen.line(points, ink, 0.035 * body.length if plan.forceps else max(0.6, 0.011 * body.length))


def _hair(pen: Pen, body: _Body, t: dict[str, float], skin: Colour, rng: np.random.Generator) -> None:
    count = int(min(t["hair"], 1.2) * 34)
    places = rng.uniform((body.neck, -1), (1, 1), (count, 2))
    reach = rng.uniform(0.03, 0.07, count) * body.length
    ink = _shaded(skin, 0.6)
    for (s, across), long in zip(places.tolist(), reach.tolist(), strict=True):
        root = body.point(s, math.copysign(0.9, across))
        pen.line((root, root + long * np.array([-0.6, math.copysign(1, across)])), ink, 0.5, 170)


def _wings(
    pen: Pen,
    plan: Plan,
    body: _Body,
    t: dict[str, float],
    skin: Colour,
    lateral: bool,
    behind: bool,
    rng: np.random.Generator,
) -> None:
    kind = plan.wings
    if kind == "none":
        return
    case = colour(t["wing_hue"], t["wing_saturation"], t["wing_value"])
    if kind in ("elytra", "short elytra"):
        _elytra(pen, body, t, case, short=kind == "short elytra", rng=rng)
        return
    if behind:
        _wing(pen, plan, body, t, -1, 1.0, rng, forward=0.15)
        return
    for side in (-1, 1):
        if rng.random() < 0.05:
            continue
        if kind in ("four", "scaled", "upright"):
            _wing(pen, plan, body, t, side, 0.72, rng, forward=-0.35)
        _wing(pen, plan, body, t, side, 1.0, rng)
    if kind == "half":
        middle = body.point(body.waist + 0.12)
        corners = (body.point(body.waist - 0.03, 0.6), body.point(body.waist - 0.03, -0.6), middle)
        pen.shape(corners, _shaded(skin, 0.8))


def _elytra(
    pen: Pen, body: _Body, t: dict[str, float], case: Colour, *, short: bool, rng: np.random.Generator
) -> None:
    end = body.waist + (0.16 if short else 0.95 * (0.98 - body.waist))
    gap = rng.uniform(0, 0.12)
    for side in (-1, 1):
        edge, inner = side * 1.1, side * gap
        pen.shape(body.strip(body.waist - 0.03, end, edge, inner), _shaded(case, 0.7))
        pen.shape(body.strip(body.waist - 0.02, end - 0.02, edge * 0.9, inner + side * 0.06), case)
        pen.shape(body.strip(body.waist + 0.03, end - 0.08, side * 0.55, side * 0.3), _shaded(case, 1.5), 110)
        for line in (0.25, 0.5, 0.75):
            s = np.linspace(body.waist, end - 0.03, 6).tolist()
            pen.line([body.point(x, side * line) for x in s], _shaded(case, 0.55), 0.5, 120)
        if t["spots"] > 0:
            for s in (0.3, 0.65):
                at = body.point(body.waist + s * (end - body.waist), side * 0.55)
                pen.dot(at, 0.24 * body.half, _shaded(case, 0.35))


_U = np.linspace(0, 1, 13)
_LEADING = -0.22 * np.sin(math.pi * _U**0.8)
_OUTLINES: Final = {
    "narrow": 0.78 * np.sin(math.pi * _U**1.15),
    "broad": 0.8 * np.sin(math.pi * _U**1.5) ** 0.75,
    "even": 0.78 * np.sin(math.pi * _U) ** 0.5,
}


def _wing(
    pen: Pen,
    plan: Plan,
    body: _Body,
    t: dict[str, float],
    side: int,
    size: float,
    rng: np.random.Generator,
    forward: float = 0.0,
) -> None:
    """One wing: outline, veins, spots; `forward` turns it (radians)."""
    kind = plan.wings
    long = t["wing"] * body.length * size
    wide = t["wing_width"] * long * (1 if size == 1 else 1.15)
    # Folded, half open or spread: most lie as they do at rest.
    spread = math.radians(t["spread"]) * float(rng.choice([0.45, 1.0, 2.1], p=[0.35, 0.45, 0.2]))
    if kind in ("half", "cover", "roof", "fringed"):
        spread = math.radians(t["spread"]) * rng.uniform(0.3, 1.2)
    turn = math.pi - min(spread + rng.normal(0, 0.06) + forward * -1, 1.9)
    outline = {"scaled": "broad", "upright": "broad", "half": "even", "cover": "even"}.get(kind, "narrow")
    trailing = np.abs(_OUTLINES[outline])
    away, across = (
        np.array([math.cos(turn), side * math.sin(turn)]),
        np.array([math.sin(turn), -side * math.cos(turn)]),
    )
    u = _U[:, None] * long
    base = body.point(body.neck + 0.6 * (body.waist - body.neck), 0.55 * side)
    # The trailing edge looks at the body.
    lead = base + away * u + across * (_LEADING[:, None] * wide) * -1
    trail = base + away * u - across * (trailing[:, None] * wide)
    ink = colour(t["wing_hue"], t["wing_saturation"], t["wing_value"])
    alpha = min(max(t["opacity"], 25), 245)
    pen.shape(np.concatenate([lead, trail[::-1]]), ink, alpha)
    dark = _shaded(ink, 0.5)
    edge = 110 if kind == "scaled" else 80 + 0.5 * alpha
    pen.line(lead, dark, 0.9, min(edge + 50, 255))
    pen.line(trail, dark, 0.5, edge)
    for vein in range(max(1, round(t["veins"]))):
        part = (vein + 1) / (round(t["veins"]) + 1)
        stop = 12 - int(5 * part)
        path = lead[1 : stop + 1] * (1 - part) + trail[1 : stop + 1] * part
        pen.line(path, dark, 0.5, edge * 0.8)
    if t["veins"] > 6:
        for i in (4, 6, 8, 10):
            pen.line((lead[i], trail[i]), dark, 0.5, edge * 0.6)
    if kind == "scaled":
        for i, strength in ((5, 90), (9, 130)):
            pen.line((lead[i], 0.4 * lead[i + 1] + 0.6 * trail[i + 1], trail[i]), dark, 1.6, strength)
    if kind == "half":
        tip = np.concatenate([lead[8:], trail[8:][::-1]])
        pen.shape(tip, (190, 190, 180), 130)
    if kind == "fringed":
        for i in range(2, 13):
            pen.line((trail[i], trail[i] + (away * 0.5 - across) * 0.09 * body.length), dark, 0.5, 110)
    if t["spots"] > 0:
        for i, part in ((7, 0.4), (10, 0.3)):
            middle = lead[i] * (1 - part) + trail[i] * part
            pen.dot(middle, 0.12 * wide + 0.5, _shaded(ink, 0.4), min(alpha + 60, 230))
