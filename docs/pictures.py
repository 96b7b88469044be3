"""Draws the pictures of the documents that come straight from the code: `make docs`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.world import BACKGROUNDS, CATEGORIES, render_subject, sample_identity, sample_scene
from data_pipeline.world.renderings import center_view
from msdiffusion.figures import COLORS

FOLDER = Path(__file__).parent / "pictures"


def sheet(pictures: list[np.ndarray], columns: int, gap: int = 6) -> Image.Image:
    """Equal pictures, (H, W, 3) uint8 RGB, side by side on white, row by row."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        canvas.paste(Image.fromarray(picture), (gap + column * (width + gap), gap + row * (height + gap)))
    return canvas


def on_white(sprite: np.ndarray, size: int) -> np.ndarray:
    """An RGBA sprite (h, w, 4) uint8, centred on a white square: (size, size, 3) uint8."""
    ground = Image.new("RGBA", (size, size), "white")
    ground.alpha_composite(Image.fromarray(center_view(sprite, size)))
    return np.asarray(ground.convert("RGB"))


def draw_subjects(size: int = 96) -> Image.Image:
    """A column per category, two rows of trained and two rows of held-out identities."""
    rng = np.random.default_rng(0)
    return sheet(
        [
            on_white(render_subject(sample_identity(rng, split, category), size, pose=rng.random()), size)
            for split in ("train", "train", "held_out", "held_out")
            for category in CATEGORIES
        ],
        columns=len(CATEGORIES),
    )


def draw_scenes(size: int = 128) -> Image.Image:
    """A column per background, with one, two and three subjects; the boxes are drawn in the order of the caption."""
    rng = np.random.default_rng(0)
    pictures = []
    for count in (1, 2, 3):
        for background in BACKGROUNDS:
            scene = sample_scene(rng, num_subjects=count, size=size, background=background)
            image = Image.fromarray(scene.image)
            for box, color in zip(scene.boxes * size, COLORS, strict=False):
                x1, y1, x2, y2 = box.tolist()
                ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), outline=color)
            pictures.append(np.asarray(image))
    return sheet(pictures, columns=len(BACKGROUNDS))


def draw_model(rows: Path, count: int = 9) -> Image.Image:
    """What the shipped model draws for the first cases of the world benchmark, marked by the judge.

    Args:
        rows: folder `rows` of a `msdiffusion bench world` that has measured shipped, adapter_off and true_renders.
        count: columns.
    """
    from msdiffusion.evaluation.drawing import varied
    from msdiffusion.evaluation.instruments.judge import Judge
    from msdiffusion.evaluation.report import GridRow, draw_grid
    from msdiffusion.evaluation.world import draw_cases, read_pictures
    from msdiffusion.places import DEFAULT_MODEL

    judge = Judge.from_pretrained(DEFAULT_MODEL / "judge")
    drawn = len(list((rows / "shipped" / "seed_0" / "pictures").glob("????.png")))
    cases = draw_cases(pictures=drawn, seed=0)
    chosen = varied(cases, count)
    columns = [cases[index] for index in chosen]
    grid = []
    for name, label in (("shipped", "adapter on"), ("adapter_off", "adapter off"), ("true_renders", "true renders")):
        folder = rows / name / "seed_0" / "pictures"
        pictures = [Image.open(folder / f"{index:04d}.png").convert("RGB") for index in chosen]
        grid.append(GridRow(label, pictures, read_pictures(judge, columns, pictures)))
    return draw_grid(columns, grid)


def main() -> None:
    """Writes every picture, smallest lossless PNG; that of the model only where the benchmark has been run."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in {"world_subjects": draw_subjects, "world_scenes": draw_scenes}.items():
        path = FOLDER / f"{name}.png"
        draw().save(path, optimize=True)
        print(path, f"{path.stat().st_size / 1000:.0f} kB")
    rows = FOLDER.parents[1] / "runs" / "world_benchmark" / "rows"
    if all((rows / name / "seed_0" / "measures.json").is_file() for name in ("shipped", "adapter_off", "true_renders")):
        draw_model(rows).save(FOLDER / "embedded_model.png", optimize=True)
        print(FOLDER / "embedded_model.png")
    else:
        print("embedded_model.png is left as it is: it needs the pictures of `msdiffusion bench world`")


if __name__ == "__main__":
    main()
