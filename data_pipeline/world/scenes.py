"""Scenes of the procedural world: backgrounds, subjects placed in boxes, captions, exact masks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data_pipeline.world.palette import BACKGROUNDS, CATEGORIES
from data_pipeline.world.subjects import Identity, render_subject, sample_identity

Color = tuple[int, int, int]
MAX_SUBJECTS = 4
SIZE_RANGES: dict[int, tuple[float, float]] = {1: (0.50, 0.76), 2: (0.36, 0.48), 3: (0.29, 0.36), 4: (0.25, 0.31)}
"""Number of subjects to the range of a subject's long side, as a fraction of the picture's side."""


@dataclass(frozen=True)
class Scene:
    """A picture with its truth.

    image: (size, size, 3) uint8 RGB. boxes: (S, 4) float32, normalised xyxy, tight around the visible mask. masks: (S,
    size, size) bool; a subject in front takes the pixels of one behind. subjects: the S identities, in the order of the
    caption. background: a key of BACKGROUNDS. caption: MS-Bench template, "a dog and a teapot on the beach".
    """

    image: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray
    subjects: list[Identity]
    background: str
    caption: str


def write_caption(subjects: Sequence[Identity], background: str, detail: str = "plain") -> str:
    """Caption in the MS-Bench template: "a dog, a hat and a car in the snow". ValueError without a subject.

    background: a key of BACKGROUNDS. detail: how much of each identity is named, see `Identity.describe`.
    """
    if not subjects:
        raise ValueError("a caption needs at least one subject")
    nouns = [subject.describe(detail) for subject in subjects]
    listed = nouns[0] if len(nouns) == 1 else f"{', '.join(nouns[:-1])} and {nouns[-1]}"
    return f"{listed} {BACKGROUNDS[background]}"


def render_background(name: str, rng: np.random.Generator, size: int, width: int | None = None) -> np.ndarray:
    """Draws one of the six backgrounds, out of focus, with random colours and details: (size, width, 3) uint8 RGB.

    name: a key of BACKGROUNDS; ValueError for another. size, width: in pixels; the width is `size` when None.
    """
    if name not in _BACKGROUND_PAINTERS:
        raise ValueError(f"unknown background {name!r}; known: {', '.join(BACKGROUNDS)}")
    width = width or size
    image = Image.new("RGB", (width, size))
    _BACKGROUND_PAINTERS[name](image, ImageDraw.Draw(image), rng)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(size / 64)))


def compose(
    background: np.ndarray, sprites: Sequence[np.ndarray], corners: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Puts sprites onto a background, later ones in front, each with a soft shadow on the ground. Returns the image
    (H, W, 3) uint8 and masks (S, H, W) bool of the visible pixels.

    background: (H, W, 3) uint8 RGB. sprites: (h, w, 4) uint8 RGBA each. corners: (x, y) pixel of each sprite's top left
    corner; sprites may reach over the border.
    """
    canvas = background.astype(np.float32)
    height, width = canvas.shape[:2]
    masks = np.zeros((len(sprites), height, width), bool)
    for (x, y), sprite in zip(corners, sprites, strict=True):
        _cast_shadow(canvas, x, y, sprite.shape[1], sprite.shape[0])
    for index, ((x, y), sprite) in enumerate(zip(corners, sprites, strict=True)):
        x1, y1 = max(x, 0), max(y, 0)
        x2, y2 = min(x + sprite.shape[1], width), min(y + sprite.shape[0], height)
        if x1 >= x2 or y1 >= y2:
            continue
        visible = sprite[y1 - y : y2 - y, x1 - x : x2 - x]
        alpha = visible[..., 3:].astype(np.float32) / 255
        canvas[y1:y2, x1:x2] += alpha * (visible[..., :3] - canvas[y1:y2, x1:x2])
        solid = alpha[..., 0] >= 0.5
        masks[:index, y1:y2, x1:x2] &= ~solid
        masks[index, y1:y2, x1:x2] = solid
    return np.clip(canvas, 0, 255).astype(np.uint8), masks


def _cast_shadow(canvas: np.ndarray, x: int, y: int, width: int, height: int) -> None:
    """Darkens an ellipse under a sprite in place; `canvas` is (H, W, 3) float."""
    radius_x, radius_y = 0.52 * width, 0.10 * height + 1
    center_x, center_y = x + width / 2, y + height - 0.03 * height
    x1, x2 = max(0, math.floor(center_x - radius_x)), min(canvas.shape[1], math.ceil(center_x + radius_x))
    y1, y2 = max(0, math.floor(center_y - radius_y)), min(canvas.shape[0], math.ceil(center_y + radius_y))
    if x1 >= x2 or y1 >= y2:
        return
    u = (np.arange(x1, x2) + 0.5 - center_x) / radius_x
    v = (np.arange(y1, y2) + 0.5 - center_y) / radius_y
    shade = np.clip(1 - (u[None] ** 2 + v[:, None] ** 2), 0, 1)[..., None]
    canvas[y1:y2, x1:x2] *= 1 - 0.45 * shade.astype(np.float32)


def tight_boxes(masks: np.ndarray) -> np.ndarray:
    """Boxes around masks: (S, H, W) bool to (S, 4) float32 normalised xyxy; an empty mask gives a zero box."""
    count, height, width = masks.shape
    columns, rows = masks.any(1), masks.any(2)
    x1, x2 = columns.argmax(1), width - columns[:, ::-1].argmax(1)
    y1, y2 = rows.argmax(1), height - rows[:, ::-1].argmax(1)
    boxes = np.stack([x1 / width, y1 / height, x2 / width, y2 / height], 1).astype(np.float32)
    return np.where(columns.any(1)[:, None], boxes, 0).reshape(count, 4)


def sample_placement(rng: np.random.Generator, count: int, aspects: Sequence[float]) -> list[tuple[float, ...]]:
    """Draws boxes for subjects, 1 to MAX_SUBJECTS (ValueError for another count): normalised xyxy inside [0.01, 0.99],
    each of its subject's own aspect (width / height). They may touch or overlap a little.
    """
    if count not in SIZE_RANGES:
        raise ValueError(f"a scene holds 1 to {MAX_SUBJECTS} subjects, got {count}")
    best: list[tuple[float, ...]] = []
    best_overlap = math.inf
    for _ in range(24):
        boxes = []
        for aspect in aspects:
            side = rng.uniform(*SIZE_RANGES[count])
            w, h = (side, side / aspect) if aspect >= 1 else (side * aspect, side)
            x, y = rng.uniform(0.01, 0.99 - w), rng.uniform(0.05, 0.99 - h)
            boxes.append((x, y, x + w, y + h))
        overlap = max((_overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i]), default=0.0)
        if overlap < best_overlap:
            best, best_overlap = boxes, overlap
        if best_overlap <= 0.06:
            break
    return best


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over the smaller area."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(w, 0) * max(h, 0) / smaller


def sample_subjects(rng: np.random.Generator, count: int, split: str = "train") -> list[Identity]:
    """Draws `count` identities of different categories, so that a caption names each one unambiguously."""
    categories = rng.choice(len(CATEGORIES), count, replace=False)
    return [sample_identity(rng, split, CATEGORIES[i]) for i in categories]


def sample_count(rng: np.random.Generator, shares: Sequence[float] = (0.4, 0.4, 0.2)) -> int:
    """Draws a number of subjects; `shares` are the probabilities of 1, 2, 3, ..."""
    return 1 + int(rng.choice(len(shares), p=np.asarray(shares) / sum(shares)))


def sample_scene(
    rng: np.random.Generator,
    split: str = "train",
    num_subjects: int | None = None,
    size: int = 64,
    background: str | None = None,
    subjects: Sequence[Identity] | None = None,
    boxes: Sequence[Sequence[float]] | None = None,
) -> Scene:
    """Draws a scene: identities, boxes, background and light; with exact boxes and masks.

    rng: the only source of randomness; an equal state gives an equal scene. split: identities to draw from, see
    `sample_identity`. num_subjects: 1 to MAX_SUBJECTS; None draws one to three. size: side of the square picture in
    pixels. background: a key of BACKGROUNDS, or None for any. subjects: fixed identities instead of drawn ones; `split`
    and `num_subjects` are then not used. boxes: fixed normalised xyxy boxes instead of drawn ones, to which the
    subjects are stretched.
    """
    if subjects is None:
        subjects = sample_subjects(rng, sample_count(rng) if num_subjects is None else num_subjects, split)
    background = background or tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    masters = [render_subject(s, size, pose=rng.random(), flip=rng.random() < 0.5, supersample=2) for s in subjects]
    if boxes is None:
        boxes = sample_placement(rng, len(subjects), [m.shape[1] / m.shape[0] for m in masters])
    sprites, corners = fit_sprites(masters, boxes, size)
    ground = render_background(background, rng, size)
    image, masks = compose(ground, sprites, corners)
    image = np.clip(image * rng.uniform(0.92, 1.08), 0, 255).astype(np.uint8)
    caption = write_caption(subjects, background)
    return Scene(image, tight_boxes(masks), masks, list(subjects), background, caption)


def fit_sprites(
    masters: Sequence[np.ndarray], boxes: Sequence[Sequence[float]], size: int
) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Shrinks master sprites into normalised boxes of a size x size picture; returns sprites and pixel corners."""
    sprites, corners = [], []
    for master, (x1, y1, x2, y2) in zip(masters, boxes, strict=True):
        shape = (max(2, round((x2 - x1) * size)), max(2, round((y2 - y1) * size)))
        image = Image.fromarray(master).convert("RGBa").resize(shape, Image.Resampling.BOX).convert("RGBA")
        sprites.append(np.asarray(image))
        corners.append((round(x1 * size), round(y1 * size)))
    return sprites, corners


def _jitter(rng: np.random.Generator, color: Color, amount: int = 16) -> Color:
    r, g, b = np.clip(np.array(color) + rng.integers(-amount, amount + 1, 3), 0, 255)
    return int(r), int(g), int(b)


def _gradient(image: Image.Image, top: Color, bottom: Color, y1: float, y2: float) -> None:
    """Fills rows y1 to y2 (fractions) with a vertical gradient."""
    a, b = round(y1 * image.height), round(y2 * image.height)
    ramp = np.linspace(0, 1, max(b - a, 1))[:, None, None]
    rows = np.array(top) * (1 - ramp) + np.array(bottom) * ramp
    image.paste(Image.fromarray(np.broadcast_to(rows, (len(ramp), image.width, 3)).astype(np.uint8)), (0, a))


def _paint_room(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    w, h = image.size
    wall = _jitter(rng, ((226, 206, 196), (206, 214, 226), (216, 226, 206))[rng.integers(3)])
    horizon = rng.uniform(0.5, 0.62)
    _gradient(image, _jitter(rng, wall, 6), wall, 0, horizon)
    floor = _jitter(rng, (150, 100, 70))
    _gradient(image, floor, _jitter(rng, (120, 76, 52), 8), horizon, 1)
    draw.line((0, horizon * h, w, horizon * h), fill=(240, 236, 230), width=max(1, h // 40))
    for k in range(-4, 12):
        x = (k / 8) * w
        draw.line(
            (w / 2 + (x - w / 2) * 0.6, horizon * h, x * 1.2 - w * 0.1, h), fill=(104, 66, 46), width=max(1, h // 90)
        )
    x, y, s = rng.uniform(0.06, 0.62) * w, 0.08 * h, 0.28 * h
    draw.rectangle((x, y, x + s, y + s), fill=(250, 250, 250))
    for i in (0, 1):
        for j in (0, 1):
            px, py = x + s * (0.08 + 0.46 * i), y + s * (0.08 + 0.46 * j)
            draw.rectangle((px, py, px + s * 0.38, py + s * 0.38), fill=(150, 200, 240))


def _tree(draw: ImageDraw.ImageDraw, x: float, base: float, s: float, color: Color) -> None:
    for k in range(3):
        y = base - s * (0.2 + 0.27 * k)
        draw.polygon([(x - s * (0.34 - 0.08 * k), y), (x + s * (0.34 - 0.08 * k), y), (x, y - s * 0.42)], fill=color)


def _paint_snow(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    w, h = image.size
    horizon = rng.uniform(0.40, 0.52)
    _gradient(image, _jitter(rng, (140, 164, 204)), _jitter(rng, (206, 216, 232), 8), 0, horizon)
    for _ in range(rng.integers(3, 7)):
        _tree(draw, rng.uniform(0, w), horizon * h + 0.03 * h, rng.uniform(0.18, 0.32) * h, _jitter(rng, (64, 104, 96)))
    _gradient(image, (224, 230, 242), (250, 252, 255), horizon, 1)
    for _ in range(24):
        x, y, r = rng.uniform(0, w), rng.uniform(0, horizon * h), h / 110 * rng.uniform(0.7, 1.8)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 255, 255))


def _paint_jungle(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    w, h = image.size
    horizon = rng.uniform(0.60, 0.72)
    _gradient(image, _jitter(rng, (22, 74, 46), 10), _jitter(rng, (34, 104, 54), 10), 0, horizon)
    for _ in range(rng.integers(3, 6)):
        x, s = rng.uniform(0, w), rng.uniform(0.04, 0.08) * h
        draw.rectangle((x - s, 0, x + s, horizon * h), fill=_jitter(rng, (72, 50, 38), 8))
    for _ in range(30):
        x, y, s = rng.uniform(0, w), rng.uniform(0, horizon * h), rng.uniform(0.05, 0.10) * h
        t = rng.uniform(0, math.pi)
        dx, dy = s * math.cos(t), s * math.sin(t)
        leaf = [(x - dx, y - dy), (x - dy * 0.35, y + dx * 0.35), (x + dx, y + dy), (x + dy * 0.35, y - dx * 0.35)]
        draw.polygon(leaf, fill=_jitter(rng, (44, 132, 60), 26))
    _gradient(image, _jitter(rng, (66, 88, 42), 8), _jitter(rng, (92, 96, 46), 8), horizon, 1)


def _cloud(draw: ImageDraw.ImageDraw, x: float, y: float, s: float) -> None:
    for dx, dy, r in ((-0.8, 0.1, 0.45), (0, -0.1, 0.6), (0.8, 0.1, 0.45)):
        draw.ellipse(
            (x + s * (dx - r), y + s * (dy - r * 0.7), x + s * (dx + r), y + s * (dy + r * 0.7)), fill=(252, 253, 255)
        )


def _paint_beach(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    w, h = image.size
    sea, sand = rng.uniform(0.34, 0.42), rng.uniform(0.50, 0.58)
    _gradient(image, _jitter(rng, (98, 168, 236)), _jitter(rng, (190, 222, 244), 8), 0, sea)
    x, r = rng.uniform(0.1, 0.9) * w, 0.075 * h
    draw.ellipse((x - r, 0.12 * h - r, x + r, 0.12 * h + r), fill=(255, 232, 130))
    _cloud(draw, rng.uniform(0, w), rng.uniform(0.1, 0.2) * h, 0.10 * h)
    _gradient(image, _jitter(rng, (36, 134, 182), 10), (86, 190, 206), sea, sand)
    draw.line((0, sand * h, w, sand * h), fill=(240, 246, 246), width=max(1, h // 32))
    _gradient(image, _jitter(rng, (226, 198, 144), 8), _jitter(rng, (206, 172, 114), 8), sand + 0.02, 1)


def _paint_grass(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    w, h = image.size
    horizon = rng.uniform(0.44, 0.54)
    _gradient(image, _jitter(rng, (108, 170, 244)), _jitter(rng, (204, 228, 250), 8), 0, 0.7)
    for _ in range(rng.integers(1, 4)):
        _cloud(draw, rng.uniform(0, w), rng.uniform(0.08, 0.26) * h, rng.uniform(0.08, 0.13) * h)
    hill = _jitter(rng, (104, 178, 88), 10)
    for _ in range(3):
        x, r = rng.uniform(0, w), rng.uniform(0.35, 0.6) * w
        draw.ellipse((x - r, horizon * h, x + r, horizon * h + r), fill=_jitter(rng, hill, 8))
    _gradient(image, _jitter(rng, (92, 176, 74), 8), _jitter(rng, (60, 136, 52), 8), horizon + 0.10, 1)
    for _ in range(16):
        x, y, r = rng.uniform(0, w), rng.uniform(horizon + 0.16, 1) * h, h / 100
        draw.ellipse((x - r, y - r, x + r, y + r), fill=((250, 250, 250), (250, 220, 240))[rng.integers(2)])


def _paint_street(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    w, h = image.size
    horizon = rng.uniform(0.44, 0.54)
    _gradient(image, _jitter(rng, (160, 190, 220)), (206, 218, 230), 0, horizon)
    x = -rng.uniform(0, 0.2) * w
    while x < w:
        s = rng.uniform(0.18, 0.28) * h
        top = rng.uniform(0.10, 0.20) * h
        wall = _jitter(rng, ((206, 130, 110), (222, 184, 120), (150, 170, 190), (190, 150, 170))[rng.integers(4)])
        draw.rectangle((x, top, x + s, horizon * h), fill=wall)
        draw.polygon(
            [(x - 1, top), (x + s / 2, top - 0.10 * h), (x + s + 1, top)], fill=_jitter(rng, (150, 74, 58), 10)
        )
        for i in (0.18, 0.60):
            for j in (0.12, 0.52):
                wx, wy, ws = x + s * i, top + (horizon * h - top) * j, s * 0.22
                draw.rectangle((wx, wy, wx + ws, wy + ws * 1.3), fill=(90, 112, 140))
        x += s
    stone = _jitter(rng, (128, 126, 128), 10)
    draw.rectangle((0, horizon * h, w, h), fill=_jitter(rng, (100, 98, 100), 4))
    row, y = 0, horizon * h
    while y < h:
        s = (0.035 + 0.075 * (y / h - horizon) / (1 - horizon)) * h
        for k in range(int(w / (s * 1.5)) + 2):
            cx = (k + 0.5 * (row % 2)) * s * 1.5 - s / 2
            draw.ellipse((cx, y, cx + s * 1.35, y + s * 0.9), fill=_jitter(rng, stone, 14))
        y += s
        row += 1


_BACKGROUND_PAINTERS = {
    "room": _paint_room,
    "snow": _paint_snow,
    "jungle": _paint_jungle,
    "beach": _paint_beach,
    "grass": _paint_grass,
    "street": _paint_street,
}
