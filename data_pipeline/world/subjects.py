"""Subjects of the procedural world: an identity, and its picture drawn by parts.

An identity is what a reference picture has to carry into a new scene: the category, three colours, a pattern and a
variant of the part shapes. A pose changes what may differ between two frames of one video (legs, tail, clock hands).
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.world.palette import CATEGORIES, COLORS, OUTLINE, PATTERNS

Point = tuple[float, float]
SHAPE_VARIANTS = 4
HELD_OUT_SHARE = 5
"""One colour-pattern combination of this many is held out everywhere; one more of this many in a given category."""


@dataclass(frozen=True)
class Identity:
    """What makes a subject itself. ValueError for a name outside the palette, equal colours, or a shape out of range.

    category: one of CATEGORIES. main_color: of the body, a key of COLORS. second_color: of the pattern on the body;
    equal to `accent_color`, that of the small parts (ears, handle, sole, ...), when the pattern is plain. pattern: one
    of PATTERNS. shape: variant of the part shapes, 0 to SHAPE_VARIANTS - 1.
    """

    category: str
    main_color: str
    second_color: str
    accent_color: str
    pattern: str
    shape: int

    def __post_init__(self) -> None:
        if self.category not in CATEGORIES:
            raise ValueError(f"unknown category {self.category!r}; known: {', '.join(CATEGORIES)}")
        if self.pattern not in PATTERNS:
            raise ValueError(f"unknown pattern {self.pattern!r}; known: {', '.join(PATTERNS)}")
        for color in (self.main_color, self.second_color, self.accent_color):
            if color not in COLORS:
                raise ValueError(f"unknown color {color!r}; known: {', '.join(COLORS)}")
        if self.main_color in (self.second_color, self.accent_color):
            raise ValueError(f"second and accent color must differ from the main color {self.main_color!r}")
        if self.pattern == "plain" and self.second_color != self.accent_color:
            raise ValueError("a plain subject has no pattern color: second_color must equal accent_color")
        if not 0 <= self.shape < SHAPE_VARIANTS:
            raise ValueError(f"shape must be in 0..{SHAPE_VARIANTS - 1}, got {self.shape}")

    @property
    def split(self) -> str:
        """Either "held_out", for identities never used in training, or "train": a pure function of the identity.

        A fifth of all (main, second, pattern) combinations is held out in every category; of the other combinations
        a further fifth is held out in this category only, so some held-out subjects have familiar colours on an
        unfamiliar thing.
        """
        combination = f"{self.main_color}/{self.second_color}/{self.pattern}"
        everywhere = _bucket(combination) % HELD_OUT_SHARE == 0
        here = _bucket(f"{self.category}/{combination}") % HELD_OUT_SHARE == 0
        return "held_out" if everywhere or here else "train"

    def describe(self, detail: str = "full") -> str:
        """Noun phrase with its article, in one of three degrees of detail: "plain" ("a dog"), "color" ("an orange dog")
        or "full" ("an orange and green dog with blue checks").
        """
        if detail == "plain":
            words = self.category
        elif detail == "color":
            words = f"{self.main_color} {self.category}"
        elif detail == "full":
            words = f"{self.main_color} and {self.accent_color} {self.category}"
            if self.pattern == "patch":
                words += f" with {_article(self.second_color)} {self.second_color} patch"
            elif self.pattern != "plain":
                words += f" with {self.second_color} {self.pattern}"
        else:
            raise ValueError(f"detail must be plain, color or full, got {detail!r}")
        return f"{_article(words)} {words}"

    def as_dict(self) -> dict[str, str | int]:
        """The fields as a plain dictionary, for sidecars."""
        return asdict(self)


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _bucket(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def sample_identity(rng: np.random.Generator, split: str = "train", category: str | None = None) -> Identity:
    """Draws an identity of one split, uniform over patterns and colours.

    split: "train", "held_out" or "all"; ValueError for another. category: None for any.
    """
    if split not in ("train", "held_out", "all"):
        raise ValueError(f"split must be train, held_out or all, got {split!r}")
    names = list(COLORS)
    while True:
        main, second, accent = (names[i] for i in rng.choice(len(names), 3, replace=False))
        pattern = PATTERNS[rng.integers(len(PATTERNS))]
        identity = Identity(
            category=category or CATEGORIES[rng.integers(len(CATEGORIES))],
            main_color=main,
            second_color=accent if pattern == "plain" else second,
            accent_color=accent,
            pattern=pattern,
            shape=int(rng.integers(SHAPE_VARIANTS)),
        )
        if split in ("all", identity.split):
            return identity


def render_subject(
    identity: Identity, size: int, *, pose: float = 0.0, flip: bool = False, light: float = 1.0, supersample: int = 3
) -> np.ndarray:
    """Draws a subject on a transparent ground: (height, width, 4) uint8 RGBA, straight alpha, cropped tight.

    size: long side of the result in pixels; ValueError under 8. pose: in [0, 1); moves legs, tail or hands. Identity
    does not depend on it. flip: mirror left to right. light: factor on the colours, about 0.8 to 1.2. supersample: the
    drawing is made this many times larger and shrunk, for smooth edges.
    """
    if size < 8:
        raise ValueError(f"a subject needs at least 8 pixels, got size {size}")
    brush = _Brush(identity, size * supersample)
    _PAINTERS[identity.category](brush, identity.shape, pose * 2 * math.pi)
    picture = brush.image.crop(brush.image.getbbox())
    factor = size / max(picture.size)
    small = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    # Premultiplied alpha while shrinking: otherwise the transparent black bleeds into the edges.
    pixels = np.asarray(picture.convert("RGBa").resize(small, Image.Resampling.BOX).convert("RGBA"))
    if flip:
        pixels = pixels[:, ::-1]
    if light != 1.0:
        pixels = np.concatenate([np.clip(pixels[..., :3] * light, 0, 255).astype(np.uint8), pixels[..., 3:]], -1)
    return np.ascontiguousarray(pixels)


class _Brush:
    """Draws outlined parts in unit coordinates (x right, y down, both in [0, 1])."""

    def __init__(self, identity: Identity, size: int) -> None:
        self.size = size
        self.image = Image.new("RGBA", (size, size))
        self.draw = ImageDraw.Draw(self.image)
        self.main = COLORS[identity.main_color]
        self.accent = COLORS[identity.accent_color]
        self.line_width = max(2, round(size * 0.020))
        self.texture = _texture(identity, size)

    def part(self, points: Sequence[Point], color: tuple[int, int, int] | None = None, outline: bool = True) -> None:
        """A closed polygon in one colour, or, without a colour, in the identity's main colour and pattern."""
        pixels = [(x * self.size, y * self.size) for x, y in points]
        if color is not None:
            self.draw.polygon(pixels, fill=color)
        else:
            mask = Image.new("L", (self.size, self.size))
            ImageDraw.Draw(mask).polygon(pixels, fill=255)
            self.image.paste(self.texture, (0, 0), mask)
        if outline:
            self.draw.line([*pixels, *pixels[:2]], fill=OUTLINE, width=self.line_width, joint="curve")

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: tuple[int, int, int] | None = None,
                outline: bool = True) -> None:  # fmt: skip
        self.part(_ellipse(x, y, rx, ry), color, outline)

    def box(self, x1: float, y1: float, x2: float, y2: float, color: tuple[int, int, int] | None = None,
            radius: float = 0.03) -> None:  # fmt: skip
        self.part(_rounded(x1, y1, x2, y2, radius), color)

    def stroke(self, points: Sequence[Point], width: float, color: tuple[int, int, int] = OUTLINE) -> None:
        pixels = [(x * self.size, y * self.size) for x, y in points]
        self.draw.line(pixels, fill=color, width=max(1, round(width * self.size)), joint="curve")

    def tube(self, points: Sequence[Point], width: float, color: tuple[int, int, int]) -> None:
        """A thick outlined line with round ends, for handles and tails."""
        for extra, fill in ((0.036, OUTLINE), (0.0, color)):
            self.stroke(points, width + extra, fill)
            for x, y in (points[0], points[-1]):
                r = (width + extra) / 2 * self.size
                x, y = x * self.size, y * self.size
                self.draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def _texture(identity: Identity, size: int) -> Image.Image:
    """The body's colour and pattern as an opaque size x size picture; periods are fractions of the subject."""
    main, second = np.array(COLORS[identity.main_color]), np.array(COLORS[identity.second_color])
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    if identity.pattern == "plain":
        on = np.zeros((size, size), bool)
    elif identity.pattern == "stripes":
        on = (x * 5.2) % 1 < 0.5
    elif identity.pattern == "bands":
        on = (y * 5.2) % 1 < 0.5
    elif identity.pattern == "checks":
        on = ((x * 4.2) % 1 < 0.5) ^ ((y * 4.2) % 1 < 0.5)
    elif identity.pattern == "dots":
        row = np.floor(y * 4.8)
        u, v = (x * 4.8 + 0.5 * (row % 2)) % 1 - 0.5, (y * 4.8) % 1 - 0.5
        on = u * u + v * v < 0.10
    else:
        angle = np.arctan2(y - 0.56, x - 0.44)
        on = np.hypot(x - 0.44, y - 0.56) < 0.19 + 0.045 * np.sin(3 * angle + 1) + 0.025 * np.sin(5 * angle)
    shade = (1.10 - 0.22 * y)[..., None]
    rgb = np.clip(np.where(on[..., None], second, main) * shade, 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([rgb, np.full((size, size), 255, np.uint8)]), "RGBA")


def _ellipse(x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 2 * math.pi) -> list[Point]:
    turns = np.linspace(start, stop, 36)
    return [(x + rx * math.cos(t), y + ry * math.sin(t)) for t in turns]


def _rounded(x1: float, y1: float, x2: float, y2: float, r: float) -> list[Point]:
    corners = ((x2 - r, y2 - r, 0.0), (x1 + r, y2 - r, 0.5), (x1 + r, y1 + r, 1.0), (x2 - r, y1 + r, 1.5))
    points: list[Point] = []
    for cx, cy, turn in corners:
        points += [(cx + r * math.cos(t), cy + r * math.sin(t)) for t in np.linspace(turn, turn + 0.5, 6) * math.pi]
    return points


WHITE, BLACK, GLASS, STEEL = (250, 250, 248), (30, 26, 34), (190, 226, 246), (150, 152, 160)


def _paint_dog(brush: _Brush, shape: int, pose: float) -> None:
    swing = 0.03 * math.sin(pose)
    brush.tube([(0.20, 0.48), (0.10, 0.38), (0.07, 0.25 + swing)], 0.06, brush.main)
    for x, s in ((0.20, swing), (0.34, -swing), (0.58, swing), (0.72, -swing)):
        brush.box(x - 0.055 + s, 0.60, x + 0.055 + s, 0.92, brush.main, 0.04)
    brush.box(0.12, 0.40, 0.80, 0.70, None, 0.12)
    if shape % 2:
        brush.part([(0.63, 0.18), (0.68, 0.02), (0.77, 0.16)], brush.accent)
        brush.ellipse(0.73, 0.29, 0.15, 0.15)
    else:
        brush.ellipse(0.73, 0.29, 0.15, 0.15)
        brush.ellipse(0.63, 0.31, 0.065, 0.15, brush.accent)
    brush.ellipse(0.86, 0.35, 0.10, 0.075, WHITE)
    brush.ellipse(0.935, 0.32, 0.032, 0.028, BLACK)
    brush.ellipse(0.78, 0.25, 0.026, 0.032, BLACK)
    if shape >= 2:
        brush.box(0.60, 0.42, 0.82, 0.485, brush.accent, 0.03)


def _paint_cat(brush: _Brush, shape: int, pose: float) -> None:
    sway = 0.05 * math.sin(pose)
    brush.tube([(0.62, 0.86), (0.86, 0.82), (0.92 + sway / 2, 0.64), (0.84 + sway, 0.46)], 0.075, brush.accent)
    brush.part(_ellipse(0.45, 0.74, 0.27, 0.22))
    ear = 0.02 if shape % 2 else 0.07
    for side in (-1, 1):
        color = brush.accent
        brush.part([(0.45 + side * 0.26, 0.38), (0.45 + side * 0.23, ear), (0.45 + side * 0.05, 0.22)], color)
    brush.ellipse(0.45, 0.36, 0.27, 0.21)
    for side in (-1, 1):
        brush.ellipse(0.45 + side * 0.11, 0.34, 0.052, 0.066, (238, 240, 130))
        brush.ellipse(0.45 + side * 0.11, 0.34, 0.016, 0.052, BLACK, False)
        brush.stroke([(0.45 + side * 0.10, 0.46), (0.45 + side * 0.29, 0.43 if shape >= 2 else 0.47)], 0.012)
        brush.ellipse(0.45 + side * 0.12, 0.93, 0.09, 0.05, brush.accent if shape >= 2 else brush.main)
    brush.part([(0.42, 0.43), (0.48, 0.43), (0.45, 0.47)], (232, 120, 130))


def _paint_teapot(brush: _Brush, shape: int, pose: float) -> None:
    brush.tube([(0.28, 0.46), (0.10, 0.44), (0.09, 0.66), (0.28, 0.72)], 0.055, brush.accent)
    tip = 0.30 if shape % 2 else 0.36
    brush.part([(0.68, 0.72), (0.86, 0.60), (0.90, tip), (0.98, tip), (0.94, 0.68), (0.72, 0.84)], brush.accent)
    if shape >= 2:
        brush.part(_ellipse(0.48, 0.62, 0.29, 0.25))
    else:
        brush.part([(0.34, 0.36), (0.62, 0.36), (0.78, 0.84), (0.18, 0.84)])
    brush.box(0.30, 0.83, 0.66, 0.90, brush.accent, 0.03)
    brush.part(_ellipse(0.48, 0.38, 0.18, 0.13, math.pi, 2 * math.pi), brush.accent)
    brush.ellipse(0.48, 0.22, 0.045 + 0.004 * math.sin(pose), 0.045, brush.main)


def _paint_backpack(brush: _Brush, shape: int, pose: float) -> None:
    brush.tube([(0.40, 0.14), (0.42, 0.04), (0.58, 0.04), (0.60, 0.14)], 0.035, brush.accent)
    for x in (0.15, 0.85):
        brush.box(x - 0.09, 0.54, x + 0.09, 0.86, brush.accent, 0.05)
    top = 0.10
    brush.part([*_ellipse(0.5, 0.40, 0.32, 0.40 - top, math.pi, 2 * math.pi), (0.82, 0.90), (0.78, 0.95), (0.22, 0.95),
                (0.18, 0.90)])  # fmt: skip
    if shape % 2:
        brush.box(0.28, 0.60, 0.72, 0.86, brush.accent, 0.06)
        brush.stroke([(0.28, 0.68), (0.72, 0.68)], 0.018)
    else:
        brush.part(_ellipse(0.5, 0.66, 0.22, 0.20, 0, math.pi), brush.accent)
    brush.stroke(_ellipse(0.5, 0.44, 0.22, 0.22, math.pi, 2 * math.pi), 0.018 if shape < 2 else 0.04)
    brush.ellipse(0.5, 0.74 + 0.02 * math.sin(pose), 0.028, 0.034, (246, 214, 90))


def _paint_clock(brush: _Brush, shape: int, pose: float) -> None:
    for side in (-1, 1):
        brush.tube([(0.5 + side * 0.20, 0.82), (0.5 + side * 0.30, 0.95)], 0.05, brush.accent)
        brush.part(_ellipse(0.5 + side * 0.25, 0.18, 0.15, 0.13), brush.accent)
    if shape % 2:
        brush.tube([(0.40, 0.08), (0.5, 0.03), (0.60, 0.08)], 0.03, brush.accent)
    brush.ellipse(0.5, 0.55, 0.38, 0.38)
    face = 0.225 if shape < 2 else 0.19
    brush.ellipse(0.5, 0.55, face, face, WHITE)
    for k in range(4):
        t = k * math.pi / 2
        brush.stroke([(0.5 + face * r * math.cos(t), 0.55 + face * r * math.sin(t)) for r in (0.72, 0.9)], 0.022)
    for t, length, width in ((pose, 0.74, 0.024), (pose / 3 + 2, 0.5, 0.034)):
        brush.stroke([(0.5, 0.55), (0.5 + face * length * math.cos(t), 0.55 + face * length * math.sin(t))], width)


def _paint_lantern(brush: _Brush, shape: int, pose: float) -> None:
    brush.tube([(0.40, 0.14), (0.42, 0.05), (0.58, 0.05), (0.60, 0.14)], 0.03, STEEL)
    for x in (0.40, 0.50, 0.60):
        brush.stroke([(x, 0.84), (x + 0.02 * math.sin(pose), 0.97)], 0.035, OUTLINE)
    if shape % 2:
        brush.part(_ellipse(0.5, 0.50, 0.34, 0.32))
    else:
        brush.part([(0.34, 0.18), (0.66, 0.18), (0.84, 0.50), (0.66, 0.82), (0.34, 0.82), (0.16, 0.50)])
    brush.box(0.30, 0.12, 0.70, 0.21, brush.accent, 0.02)
    brush.box(0.32, 0.79, 0.68, 0.88, brush.accent, 0.02)
    glow = 0.10 if shape < 2 else 0.075
    brush.ellipse(0.5, 0.50, glow, 0.14, (255, 246, 170))


def _paint_sneaker(brush: _Brush, shape: int, pose: float) -> None:
    top = 0.16 if shape % 2 else 0.26
    brush.part([(0.06, top), (0.42, top), (0.52, 0.42), (0.80, 0.54), (0.95, 0.64), (0.96, 0.78), (0.05, 0.78)])
    brush.part([(0.76, 0.52), (0.93, 0.62), (0.97, 0.78), (0.70, 0.78)], brush.accent)
    brush.box(0.03, top - 0.06, 0.45, top + 0.05, brush.accent, 0.04)
    brush.box(0.02, 0.76, 0.98, 0.88, WHITE, 0.05)
    if shape >= 2:
        brush.part([(0.05, 0.50), (0.20, 0.52), (0.20, 0.76), (0.05, 0.76)], brush.accent)
    for k in range(3):
        x, y = 0.44 + 0.10 * k, 0.34 + 0.075 * k
        brush.stroke([(x - 0.05, y + 0.10), (x + 0.05, y + 0.02 + 0.006 * math.sin(pose))], 0.034, WHITE)


def _paint_hat(brush: _Brush, shape: int, pose: float) -> None:
    brush.ellipse(0.5, 0.78, 0.47, 0.13, brush.accent)
    bend = 0.02 * math.sin(pose)
    if shape % 2:
        brush.part([(0.22, 0.76), (0.44, 0.22), (0.62 + bend, 0.04), (0.60 + bend, 0.24), (0.78, 0.76), (0.5, 0.83)])
        band = [(0.25, 0.68), (0.5, 0.75), (0.75, 0.68), (0.78, 0.77), (0.5, 0.84), (0.22, 0.77)]
    else:
        brush.part([(0.20 + bend, 0.18), (0.5, 0.12), (0.80 + bend, 0.18), (0.74, 0.76), (0.5, 0.83), (0.26, 0.76)])
        band = [(0.25, 0.64), (0.5, 0.71), (0.75, 0.64), (0.74, 0.76), (0.5, 0.83), (0.26, 0.76)]
    brush.part(band, brush.accent if shape < 2 else BLACK)
    if shape >= 2:
        brush.box(0.43, 0.68, 0.57, 0.84, (246, 214, 90), 0.02)


def _paint_fish(brush: _Brush, shape: int, pose: float) -> None:
    flap = 0.05 * math.sin(pose)
    fork = 0.0 if shape % 2 else 0.10
    brush.part([(0.30, 0.52), (0.04, 0.28 + flap), (0.06 + fork, 0.52), (0.04, 0.76 + flap)], brush.accent)
    brush.part([(0.40, 0.28), (0.52, 0.08), (0.70, 0.14), (0.68, 0.30)], brush.accent)
    brush.part([(0.46, 0.74), (0.44, 0.93), (0.60, 0.76)], brush.accent)
    brush.ellipse(0.58, 0.52, 0.37, 0.27 if shape < 2 else 0.31)
    brush.part([(0.56, 0.56), (0.40, 0.66 - flap), (0.56, 0.72)], brush.accent)
    brush.ellipse(0.81, 0.46, 0.05, 0.055, WHITE)
    brush.ellipse(0.825, 0.46, 0.022, 0.028, BLACK, False)
    brush.stroke([(0.93, 0.58), (0.86, 0.61)], 0.018)


def _paint_car(brush: _Brush, shape: int, pose: float) -> None:
    if shape % 2:
        cabin = [(0.24, 0.46), (0.34, 0.20), (0.66, 0.20), (0.78, 0.46)]
    else:
        cabin = [*_ellipse(0.50, 0.46, 0.28, 0.29, math.pi, 2 * math.pi)]
    brush.part(cabin, brush.accent)
    brush.part([(0.33, 0.44), (0.39, 0.27), (0.485, 0.25), (0.485, 0.44)], GLASS)
    brush.part([(0.53, 0.44), (0.53, 0.25), (0.62, 0.27), (0.69, 0.44)], GLASS)
    brush.part([(0.04, 0.54), (0.12, 0.44), (0.86, 0.44), (0.97, 0.56), (0.97, 0.74), (0.03, 0.74)])
    brush.ellipse(0.93, 0.58, 0.035, 0.045, (255, 246, 170))
    rim = brush.accent if shape >= 2 else STEEL
    for x in (0.25, 0.76):
        brush.ellipse(x, 0.75, 0.125, 0.125, BLACK)
        brush.ellipse(x, 0.75, 0.06, 0.06, rim)
        brush.stroke([(x, 0.75), (x + 0.05 * math.cos(pose), 0.75 + 0.05 * math.sin(pose))], 0.02)


_PAINTERS: dict[str, Callable[[_Brush, int, float], None]] = {
    "dog": _paint_dog,
    "cat": _paint_cat,
    "teapot": _paint_teapot,
    "backpack": _paint_backpack,
    "clock": _paint_clock,
    "lantern": _paint_lantern,
    "sneaker": _paint_sneaker,
    "hat": _paint_hat,
    "fish": _paint_fish,
    "car": _paint_car,
}
