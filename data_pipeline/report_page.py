"""The page of the report: HTML with inline SVG, from counts alone. Nothing is read or written here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1540px; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: .5em 0 1.5em; }
td, th { padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
code, bdi, pre { overflow-wrap: anywhere; }
pre { margin: .3em 0; white-space: pre-wrap; font-size: 12px; }
.bar { background: #2a78dc; height: .9em; display: inline-block; }
.charts { display: flex; flex-wrap: wrap; gap: 1em 2em; }
figure { margin: 0; } figcaption { font-weight: 600; }
svg { max-width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: #444; }
img { max-width: 100%; border: 1px solid #ddd; }
summary { cursor: pointer; } small { color: #555; }
@media (max-width: 900px) {
  body { margin: 1em auto; padding: 0 .5em; }
  td, th { padding: .2em .25em; font-size: 12px; }
  .funnel { overflow-x: auto; }
  .funnel :is(td, th):nth-child(2) { display: none; }
}
"""
SERVED = ("boxes by ", "masks by ")  # how notes begin that say where those came from
MOST_EVIDENCE, MOST_TRACEBACK = 600, 4000  # characters
PHRASES_SHOWN = 20
CHART = (420, 170)  # pixels of a chart's bars, without the text round them


@dataclass
class Histogram:
    """Counts of values in bins of one width; values from ``last`` on are counted together, in an ``open_end``."""

    title: str
    unit: str
    """What is counted: "samples" or "subjects"."""
    width: float
    last: float
    open_end: bool = False
    counts: Counter[int] = field(default_factory=Counter)
    sum: float = 0.0
    number: int = 0

    def add(self, value: float) -> None:
        """Counts one value, 0 or more."""
        # The small number puts a value like 0.15 into its own bin, whatever its last bit says.
        self.counts[min(int(value / self.width + 1e-9), round(self.last / self.width))] += 1
        self.sum += value
        self.number += 1

    def bars(self) -> list[tuple[str, int]]:
        """Label and count of every bin between the first and the last one that holds something."""
        if not self.counts:
            return []
        bars = []
        for place in range(min(self.counts), max(self.counts) + 1):
            label = f"{round(place * self.width, 6):g}"
            more = self.open_end and place == round(self.last / self.width)
            bars.append((f"{label} or more" if more else label, self.counts[place]))
        return bars

    def summary(self) -> str:
        """One sentence for those who do not see the chart."""
        bars = self.bars()
        if not bars:
            return f"{self.title}: nothing to count."
        label, most = max(bars, key=lambda bar: bar[1])
        start = "is" if self.width == 1 else "starts at"
        return (
            f"{self.number:,} {self.unit}, mean {self.sum / self.number:.3g}; the most common bin {start} {label}, "
            f"with {most:,}."
        )


def sample_histograms() -> dict[str, Histogram]:
    """The charts of the kept samples, empty."""
    return {
        "subjects": Histogram("Subjects per sample", "samples", 1, 16, open_end=True),
        "area": Histogram("Area of a subject's mask (share of the picture)", "subjects", 0.05, 1),
        "similarity": Histogram("Least similarity of the matches of a sample", "samples", 0.05, 1),
        "score": Histogram("Least detection score of a sample", "samples", 0.05, 1),
        "gap": Histogram("Seconds between reference and target", "samples", 0.5, 30, open_end=True),
    }


class Tally:
    """What came of the videos of a dataset: counts only, so that its size does not depend on theirs."""

    def __init__(self, stages: Sequence[str]) -> None:
        self.stages = list(stages)
        self.videos = self.samples = self.subjects = 0
        self.reached: Counter[str] = Counter()
        self.rejected: dict[str, Counter[str]] = {stage: Counter() for stage in self.stages}
        self.histograms = sample_histograms()
        self.phrases: Counter[str] = Counter()
        self.kept_videos = 0

    def reject(self, stage: str, reason: str) -> None:
        """Counts a rejected video."""
        self.videos += 1
        self.reached.update(self.stages[: self.stages.index(stage) + 1])
        self.rejected[stage][reason] += 1

    def keep_video(self) -> None:
        """Counts a video that gave at least one sample."""
        self.videos += 1
        self.kept_videos += 1
        self.reached.update(self.stages)

    def add_sample(self, row: Mapping[str, Any]) -> None:
        """Counts a sample by its row in the index."""
        self.samples += 1
        self.subjects += row["num_subjects"]
        self.phrases.update(row["phrases"])
        self.histograms["subjects"].add(row["num_subjects"])
        for area in row["areas"]:
            self.histograms["area"].add(area)
        self.histograms["score"].add(row["min_detection_score"])
        for name, column in (("similarity", "min_match_similarity"), ("gap", "frame_gap_seconds")):
            if row[column] is not None:  # pairs that were imported, not mined
                self.histograms[name].add(max(0.0, row[column]))


def printable(text: str) -> str:
    """The text without halves of characters, which file names can hold and no encoding knows."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; numbers are set right, strings must be escaped already."""

    def cell(value: Any) -> str:
        if isinstance(value, int | float):
            return f'<td class="n">{value:,}</td>'
        return f"<td>{value}</td>"

    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def column_chart(histogram: Histogram) -> str:
    """A histogram as a figure with upright bars."""
    bars = histogram.bars()
    if not bars:
        return ""
    wide, high = CHART
    step, most = min(60, wide / len(bars)), max(count for _, count in bars)
    every = -(-len(bars) // 14)
    shapes = []
    for place, (label, count) in enumerate(bars):
        tall = high * count / most
        x = place * step
        shapes.append(
            f'<rect x="{x + 1:.1f}" y="{20 + high - tall:.1f}" width="{max(1.0, step - 2):.1f}" height="{tall:.1f}" '
            f'fill="#2a78dc"><title>{escape(label)}: {count:,}</title></rect>'
        )
        if len(bars) <= 14 and count:
            shapes.append(
                f'<text x="{x + step / 2:.1f}" y="{16 + high - tall:.1f}" text-anchor="middle">{count:,}</text>'
            )
        if place % every == 0:
            middle = x + step / 2 if histogram.width == 1 else x
            anchor = "middle" if histogram.width == 1 else "start"
            shapes.append(f'<text x="{middle:.1f}" y="{36 + high}" text-anchor="{anchor}">{escape(label)}</text>')
    summary = escape(histogram.summary())
    return (
        f"<figure><figcaption>{escape(histogram.title)}</figcaption>"
        f'<svg role="img" aria-label="{summary}" width="{wide + 10}" height="{high + 44}" '
        f'viewBox="0 0 {wide + 10} {high + 44}">{"".join(shapes)}'
        f'<line x1="0" x2="{wide}" y1="{20 + high}" y2="{20 + high}" stroke="#888"/></svg>'
        f"<br><small>{summary}</small></figure>"
    )


def phrase_chart(phrases: Counter[str]) -> str:
    """The most common phrases as a figure with lying bars; equal counts in the order of the alphabet."""
    ordered = sorted(phrases.items(), key=lambda item: (-item[1], item[0]))
    shown, rest = ordered[:PHRASES_SHOWN], ordered[PHRASES_SHOWN:]
    if not shown:
        return ""
    most, line = shown[0][1], 17
    shapes = []
    for place, (phrase, count) in enumerate(shown):
        y = place * line
        long = 240 * count / most
        name = printable(phrase) if len(phrase) <= 26 else f"{printable(phrase[:25])}…"
        shapes.append(
            f'<text x="150" y="{y + 12}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="156" y="{y + 3}" width="{long:.1f}" height="{line - 5}" fill="#2a9d4c"/>'
            f'<text x="{160 + long:.1f}" y="{y + 12}">{count:,}</text>'
        )
    summary = f"{len(phrases):,} phrases; the most common one is {printable(shown[0][0])}, of {shown[0][1]:,} subjects"
    if rest:
        summary += f"; {len(rest):,} rarer ones, of {sum(count for _, count in rest):,} subjects, are not shown"
    high = len(shown) * line + 6
    return (
        "<figure><figcaption>Phrases</figcaption>"
        f'<svg role="img" aria-label="{escape(summary)}" width="450" height="{high}" viewBox="0 0 450 {high}">'
        f"{''.join(shapes)}</svg><br><small>{escape(summary)}.</small></figure>"
    )


def funnel(tally: Tally, seconds: Mapping[str, float]) -> str:
    """One row per step: videos in, rejected and out, the reasons, and the mean time if it was recorded."""
    rows = []
    for stage in tally.stages:
        reached, lost = tally.reached[stage], sum(tally.rejected[stage].values())
        bar = f'<span class="bar" style="width:{240 * reached / max(1, tally.videos):.0f}px"></span>'
        ordered = sorted(tally.rejected[stage].items(), key=lambda item: (-item[1], item[0]))
        reasons = "<br>".join(f"{count:,} {escape(reason)}" for reason, count in ordered)
        time = f"{1000 * seconds[stage] / max(1, reached):.2f}" if stage in seconds else ""
        rows.append((stage, bar, reached, lost, reached - lost, reasons, time))
    header = ("step", "", "clips in", "rejected", "clips out", "reasons", "ms per clip")
    return f'<div class="funnel">{table(header, rows)}</div>'


def page(
    tally: Tally,
    build: Mapping[str, Any],
    notes: Mapping[str, Any],
    sheets: Mapping[str, str],
    examples: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
) -> str:
    """The whole page.

    notes: what only the run itself knew (report/notes.json), or nothing. sheets: "kept" and "rejected" to the place of
    their picture, where there is one. examples: stage and reason to a few lines of rejected.jsonl.
    """
    rejected = tally.videos - tally.kept_videos
    name, one = ("Import", "items") if "importer" in build else ("Mining", "videos")
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{name} report</title>',
        f"<style>{STYLE}</style><h1>{name} report</h1>",
        f"<p>{tally.videos:,} {one} gave {tally.samples:,} samples with {tally.subjects:,} subjects; "
        f"{rejected:,} {one} were rejected (all in <code>rejected.jsonl</code>).</p>",
        "<h2>Funnel</h2>",
        funnel(tally, notes.get("seconds", {})),
    ]
    for title, served in (
        ("Where boxes and masks came from", True),
        ("Clips out of the ordinary, kept or rejected", False),
    ):
        rows = [(escape(note), count) for note, count in notes.get("clips", ()) if note.startswith(SERVED) is served]
        if rows:
            parts += [f"<h3>{title}</h3>", table(("what", one), rows)]
    for name, title, unit in (
        ("dropped", "Subjects left out of samples that were kept", "subjects"),
        ("lost_pairs", "Pairs that fell out of clips that were kept", "pairs"),
    ):
        if notes.get(name):
            rows = [(escape(stage), escape(reason), count) for stage, reason, count in notes[name]]
            parts += [f"<h3>{title}</h3>", table(("step", "reason", unit), rows)]
    if tally.samples:
        charts = [column_chart(histogram) for histogram in tally.histograms.values()]
        parts += ["<h2>Samples</h2>", '<div class="charts">', *charts, phrase_chart(tally.phrases), "</div>"]
    titles = {
        "kept": "Kept: the reference cut-outs, and the target with its boxes and masks",
        "rejected": "Rejected: reference and target frame, with what had been found in them",
    }
    for sheet, source in sheets.items():
        parts.append(f'<h2>{titles[sheet]}</h2><img src="{source}" alt="Contact sheet of {sheet} clips">')
    if rejected and "rejected" not in sheets:
        parts.append("<p><small>Of the rejected clips there are no pictures: no frame had been decoded.</small></p>")
    if examples:
        parts.append(f"<h2>Examples of rejected {one}</h2>")
    for (stage, reason), entries in examples.items():
        rows = [
            (f"<bdi>{escape(printable(entry['video']))}</bdi>", _evidence_cell(entry["evidence"])) for entry in entries
        ]
        count = tally.rejected[stage][reason]
        parts.append(
            f"<details><summary>{escape(stage)}: {escape(reason)} ({count:,})</summary>"
            f"{table(('video', 'what was measured'), rows)}</details>"
        )
    settings = [(escape(step), f"<code>{escape(json.dumps(own))}</code>") for step, own in build["settings"].items()]
    packages = {"data_pipeline": build["version"], **build["versions"]} if "version" in build else build["versions"]
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    parts += ["<h2>Settings</h2>", table(("step", "settings"), settings), f"<p><small>{escape(versions)}</small></p>"]
    return "\n".join([*parts, "</html>", ""])


def in_words(evidence: Any, longest: int = MOST_EVIDENCE) -> str:
    """What was measured of a rejected clip, "seconds: 0.1; min gap: 0.25". longest: characters of one value. A
    traceback is left out; its last line is the error.
    """
    if not isinstance(evidence, Mapping):
        return _cut(json.dumps(evidence, ensure_ascii=False), longest)
    values = {name: value for name, value in evidence.items() if name != "traceback" and value not in ("", None)}
    if "traceback" in evidence and "error" not in values:
        values["error"] = str(evidence["traceback"]).strip().rsplit("\n", 1)[-1]
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in values.items()
    }
    return "; ".join(f"{name.replace('_', ' ')}: {_cut(text, longest)}" for name, text in texts.items())


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} ..."


def _evidence_cell(evidence: Any) -> str:
    cell = f"<bdi>{escape(printable(_cut(in_words(evidence), MOST_EVIDENCE)))}</bdi>"
    if isinstance(evidence, Mapping) and "traceback" in evidence:
        cell += f"<pre>{escape(printable(str(evidence['traceback'])[-MOST_TRACEBACK:]))}</pre>"
    return cell
