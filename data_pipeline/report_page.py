"""The page of the report: HTML with inline SVG, from counts alone. Nothing is read or written here."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.safe_text import html

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


TABLE = """\
<table><tr>{% for name in header %}<th scope="col">{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}\
{% if cell is number %}<td class="n">{{ "{:,}".format(cell) }}</td>{% else %}<td>{{ cell }}</td>{% endif %}\
{% endfor %}</tr>{{ "\n" }}{% endfor %}</table>"""


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; numbers are set right."""
    return html(TABLE, header=header, rows=rows)


COLUMN_CHART = """\
<figure><figcaption>{{ title }}</figcaption>\
<svg role="img" aria-label="{{ summary }}" width="{{ wide + 10 }}" height="{{ high + 44 }}" \
viewBox="0 0 {{ wide + 10 }} {{ high + 44 }}">\
{% for bar in bars %}\
<rect x="{{ "%.1f"|format(bar.x + 1) }}" y="{{ "%.1f"|format(20 + high - bar.tall) }}" \
width="{{ "%.1f"|format(bar.width) }}" height="{{ "%.1f"|format(bar.tall) }}" fill="#2a78dc">\
<title>{{ bar.label }}: {{ bar.count }}</title></rect>\
{% if bar.counted %}\
<text x="{{ "%.1f"|format(bar.x + step / 2) }}" y="{{ "%.1f"|format(16 + high - bar.tall) }}" text-anchor="middle">\
{{ bar.count }}</text>\
{% endif %}{% if bar.labelled %}\
<text x="{{ "%.1f"|format(bar.x + step / 2 if centred else bar.x) }}" y="{{ 36 + high }}" \
text-anchor="{{ "middle" if centred else "start" }}">{{ bar.label }}</text>\
{% endif %}{% endfor %}\
<line x1="0" x2="{{ wide }}" y1="{{ 20 + high }}" y2="{{ 20 + high }}" stroke="#888"/></svg>\
<br><small>{{ summary }}</small></figure>"""


def column_chart(histogram: Histogram) -> str:
    """A histogram as a figure with upright bars."""
    bars = histogram.bars()
    if not bars:
        return ""
    wide, high = CHART
    step, most = min(60, wide / len(bars)), max(count for _, count in bars)
    every = -(-len(bars) // 14)
    shown = [
        {
            "x": place * step,
            "width": max(1.0, step - 2),
            "tall": high * count / most,
            "label": label,
            "count": f"{count:,}",
            "counted": len(bars) <= 14 and count,
            "labelled": place % every == 0,
        }
        for place, (label, count) in enumerate(bars)
    ]
    how = {"wide": wide, "high": high, "step": step, "centred": histogram.width == 1}
    return html(COLUMN_CHART, title=histogram.title, summary=histogram.summary(), bars=shown, **how)


PHRASE_CHART = """\
<figure><figcaption>Phrases</figcaption>\
<svg role="img" aria-label="{{ summary }}" width="450" height="{{ high }}" viewBox="0 0 450 {{ high }}">\
{% for bar in bars %}\
<text x="150" y="{{ bar.y + 12 }}" text-anchor="end">{{ bar.name }}</text>\
<rect x="156" y="{{ bar.y + 3 }}" width="{{ "%.1f"|format(bar.long) }}" height="{{ line - 5 }}" fill="#2a9d4c"/>\
<text x="{{ "%.1f"|format(160 + bar.long) }}" y="{{ bar.y + 12 }}">{{ bar.count }}</text>\
{% endfor %}</svg><br><small>{{ summary }}.</small></figure>"""


def phrase_chart(phrases: Counter[str]) -> str:
    """The most common phrases as a figure with lying bars; equal counts in the order of the alphabet."""
    ordered = sorted(phrases.items(), key=lambda item: (-item[1], item[0]))
    shown, rest = ordered[:PHRASES_SHOWN], ordered[PHRASES_SHOWN:]
    if not shown:
        return ""
    most, line = shown[0][1], 17
    bars = [
        {
            "y": place * line,
            "long": 240 * count / most,
            "name": phrase if len(phrase) <= 26 else f"{phrase[:25]}…",
            "count": f"{count:,}",
        }
        for place, (phrase, count) in enumerate(shown)
    ]
    summary = f"{len(phrases):,} phrases; the most common one is {shown[0][0]}, of {shown[0][1]:,} subjects"
    if rest:
        summary += f"; {len(rest):,} rarer ones, of {sum(count for _, count in rest):,} subjects, are not shown"
    return html(PHRASE_CHART, summary=summary, bars=bars, line=line, high=len(shown) * line + 6)


BAR = '<span class="bar" style="width:{{ "%.0f"|format(width) }}px"></span>'
REASONS = "{% for reason, count in reasons %}{{ count }} {{ reason }}{% if not loop.last %}<br>{% endif %}{% endfor %}"


def funnel(tally: Tally, seconds: Mapping[str, float]) -> str:
    """One row per step: videos in, rejected and out, the reasons, and the mean time if it was recorded."""
    rows = []
    for stage in tally.stages:
        reached, lost = tally.reached[stage], sum(tally.rejected[stage].values())
        bar = html(BAR, width=240 * reached / max(1, tally.videos))
        ordered = sorted(tally.rejected[stage].items(), key=lambda item: (-item[1], item[0]))
        reasons = html(REASONS, reasons=[(reason, f"{count:,}") for reason, count in ordered])
        time = f"{1000 * seconds[stage] / max(1, reached):.2f}" if stage in seconds else ""
        rows.append((stage, bar, reached, lost, reached - lost, reasons, time))
    header = ("step", "", "clips in", "rejected", "clips out", "reasons", "ms per clip")
    return html('<div class="funnel">{{ table }}</div>', table=table(header, rows))


PAGE = """\
<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\
<title>{{ name }} report</title>
<style>{{ style }}</style><h1>{{ name }} report</h1>
<p>{{ "{:,}".format(tally.videos) }} {{ one }} gave {{ "{:,}".format(tally.samples) }} samples with \
{{ "{:,}".format(tally.subjects) }} subjects; {{ "{:,}".format(rejected) }} {{ one }} were rejected \
(all in <code>rejected.jsonl</code>).</p>
<h2>Funnel</h2>
{{ funnel }}
{% for title, content in tables %}
<h3>{{ title }}</h3>
{{ content }}
{% endfor %}
{% if charts %}
<h2>Samples</h2>
<div class="charts">
{% for chart in charts %}
{{ chart }}
{% endfor %}
</div>
{% endif %}
{% for title, sheet, source in sheets %}
<h2>{{ title }}</h2><img src="{{ source }}" alt="Contact sheet of {{ sheet }} clips">
{% endfor %}
{% if unpictured %}
<p><small>Of the rejected clips there are no pictures: no frame had been decoded.</small></p>
{% endif %}
{% if examples %}
<h2>Examples of rejected {{ one }}</h2>
{% endif %}
{% for stage, reason, count, content in examples %}
<details><summary>{{ stage }}: {{ reason }} ({{ count }})</summary>{{ content }}</details>
{% endfor %}
<h2>Settings</h2>
{{ settings }}
<p><small>{{ versions }}</small></p>
</html>
"""


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
    tables = []
    kinds = ((True, "Where boxes and masks came from"), (False, "Clips out of the ordinary, kept or rejected"))
    for served, title in kinds:
        rows = [(note, count) for note, count in notes.get("clips", ()) if note.startswith(SERVED) is served]
        if rows:
            tables.append((title, table(("what", one), rows)))
    for key, title, unit in (
        ("dropped", "Subjects left out of samples that were kept", "subjects"),
        ("lost_pairs", "Pairs that fell out of clips that were kept", "pairs"),
    ):
        if notes.get(key):
            tables.append((title, table(("step", "reason", unit), notes[key])))
    charts = []
    if tally.samples:
        charts = [*map(column_chart, tally.histograms.values()), phrase_chart(tally.phrases)]
    titles = {
        "kept": "Kept: the reference cut-outs, and the target with its boxes and masks",
        "rejected": "Rejected: reference and target frame, with what had been found in them",
    }
    shown = []
    for (stage, reason), entries in examples.items():
        rows = [
            (html("<bdi>{{ video }}</bdi>", video=entry["video"]), _evidence_cell(entry["evidence"]))
            for entry in entries
        ]
        count = f"{tally.rejected[stage][reason]:,}"
        shown.append((stage, reason, count, table(("video", "what was measured"), rows)))
    settings = [
        (step, html("<code>{{ own }}</code>", own=_as_json(own, ascii=True))) for step, own in build["settings"].items()
    ]
    packages = {"data_pipeline": build["version"], **build["versions"]} if "version" in build else build["versions"]
    return html(
        PAGE,
        style=STYLE,
        name=name,
        one=one,
        tally=tally,
        rejected=rejected,
        funnel=funnel(tally, notes.get("seconds", {})),
        tables=tables,
        charts=charts,
        sheets=[(titles[sheet], sheet, source) for sheet, source in sheets.items()],
        unpictured=rejected and "rejected" not in sheets,
        examples=shown,
        settings=table(("step", "settings"), settings),
        versions=", ".join(f"{package} {version}" for package, version in packages.items()),
    )


def in_words(evidence: Any, longest: int = MOST_EVIDENCE) -> str:
    """What was measured of a rejected clip, "seconds: 0.1; min gap: 0.25". longest: characters of one value. A
    traceback is left out; its last line is the error.
    """
    if not isinstance(evidence, Mapping):
        return _cut(_as_json(evidence), longest)
    values = {name: value for name, value in evidence.items() if name != "traceback" and value not in ("", None)}
    if "traceback" in evidence and "error" not in values:
        values["error"] = str(evidence["traceback"]).strip().rsplit("\n", 1)[-1]
    texts = {name: value if isinstance(value, str) else _as_json(value) for name, value in values.items()}
    return "; ".join(f"{name.replace('_', ' ')}: {_cut(text, longest)}" for name, text in texts.items())


def _as_json(value: Any, ascii: bool = False) -> str:
    try:
        return json.dumps(value, ensure_ascii=ascii)
    except RecursionError:
        return "(nested too deeply to be shown)"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} ..."


def _evidence_cell(evidence: Any) -> str:
    told = evidence.get("traceback", "") if isinstance(evidence, Mapping) else ""
    return html(
        "<bdi>{{ words }}</bdi>{% if traceback %}<pre>{{ traceback }}</pre>{% endif %}",
        words=_cut(in_words(evidence), MOST_EVIDENCE),
        traceback=str(told)[-MOST_TRACEBACK:],
    )
