"""Loss curves of the shipped weights: keeps what TensorBoard logged as CSV, and draws the picture of docs/training.md.

python docs/curves.py                                     # draws docs/curves/*.csv
python docs/curves.py --run runs/text_to_image --name base --samples-per-step 32 --offset 80640 --append
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

FOLDER = Path(__file__).parent / "curves"
PICTURE = Path(__file__).parent / "pictures" / "training_curves.png"


def keep(run: Path, name: str, samples_per_step: int, offset: int, append: bool) -> Path:
    """Writes a run's validation and loss as docs/curves/NAME.csv (samples seen, metric, value), or adds them to it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    rows = [
        (offset + (point.step + 1) * samples_per_step, tag, round(point.value, 5))
        for tag in sorted(events.Tags()["scalars"])
        if "loss" in tag or "validation" in tag
        for point in events.Scalars(tag)
    ]
    if not rows:
        raise SystemExit(f"{run} holds no scalar with a loss: is it the folder of a run's events.out.tfevents?")
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.csv"
    added = append and path.is_file()
    with path.open("a" if added else "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not added:
            writer.writerow(("samples", "metric", "value"))
        writer.writerows(rows)
    return path


def draw() -> None:
    """One panel per CSV: validation thick, training faint; both axes logarithmic, so that a power law is a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = sorted(FOLDER.glob("*.csv"))
    figure, panels = pyplot.subplots(1, len(files), figsize=(6 * len(files), 4), squeeze=False)
    for panel, path in zip(panels[0], files, strict=True):
        curves: dict[str, list[tuple[float, float]]] = {}
        with path.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                curves.setdefault(row["metric"], []).append((float(row["samples"]), float(row["value"])))
        for metric, points in curves.items():
            points.sort()
            faint = not metric.startswith("validation")
            panel.plot(*zip(*points, strict=True), alpha=0.3 if faint else 1.0, linewidth=1 if faint else 2,
                       marker=None if faint else "o", markersize=3, label=metric)  # fmt: skip
        panel.set(title=path.stem.replace("_", " "), xlabel="samples seen", xscale="log", yscale="log")
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=100)
    print(PICTURE)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a run's TensorBoard events")
    parser.add_argument("--name", help="of the CSV")
    parser.add_argument("--samples-per-step", type=int, default=1)
    parser.add_argument("--offset", type=int, default=0, help="samples seen before the run")
    parser.add_argument("--append", action="store_true", help="the run goes on where the CSV ends")
    options = parser.parse_args()
    if (options.run is None) != (options.name is None):
        parser.error("--run and --name belong together")
    if options.run is not None:
        print(keep(options.run, options.name, options.samples_per_step, options.offset, options.append))
    draw()


if __name__ == "__main__":
    main()
