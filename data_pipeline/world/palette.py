"""The vocabulary of the procedural world: categories, colours, patterns, backgrounds."""

CATEGORIES: tuple[str, ...] = (
    "dog", "cat", "teapot", "backpack", "clock", "lantern", "sneaker", "hat", "fish", "car",
)  # fmt: skip

COLORS: dict[str, tuple[int, int, int]] = {
    "white": (240, 240, 236),
    "gray": (128, 128, 134),
    "brown": (124, 76, 40),
    "red": (218, 38, 44),
    "orange": (248, 138, 30),
    "yellow": (250, 216, 46),
    "green": (52, 158, 66),
    "teal": (28, 172, 180),
    "blue": (44, 88, 216),
    "purple": (132, 62, 186),
    "pink": (248, 138, 188),
}
"""Colour name to RGB in [0, 255]."""

PATTERNS: tuple[str, ...] = ("plain", "stripes", "bands", "dots", "patch", "checks")
"""stripes are vertical, bands are horizontal; a patch is one irregular spot."""

BACKGROUNDS: dict[str, str] = {
    "room": "in a room",
    "snow": "in the snow",
    "jungle": "in the jungle",
    "beach": "on the beach",
    "grass": "on the grass",
    "street": "on a cobblestone street",
}
"""Background name to the MS-Bench phrase that asks for it."""

OUTLINE: tuple[int, int, int] = (34, 28, 38)
"""RGB of every part's outline."""
