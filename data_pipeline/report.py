"""report.html: what came out, what fell out where and why, and pictures of both to look at."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.drawing import HEIGHT, beside, contact_sheet, draw_cut_out, draw_frame
from data_pipeline.journal import Journal, write_atomically
from data_pipeline.records import VideoFile, decode_mask

STYLE = """ body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1540px; padding: 0 1em; color:
#222; } table { border-collapse: collapse; margin: .5em 0 1.5em; } td, th { padding: .2em .8em; text-align: left;
border-bottom: 1px solid #ddd; vertical-align: top; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
.bar { background: #2a78dc; height: .9em; display: inline-block; } img { max-width: 100%; border: 1px solid #ddd; }
summary { cursor: pointer; } small { color: #666; }
"""


class Tally:
    """Counts over the markers of all clips, and the clips to show."""

    def __init__(self, stages: Sequence[str]) -> None:
        self.stages = list(stages)
        self.videos = self.samples = self.subjects = 0
        self.reached: Counter[str] = Counter()
        self.rejected: dict[str, Counter[str]] = defaultdict(Counter)
        self.dropped: Counter[tuple[str, str]] = Counter()
        self.subject_counts: Counter[int] = Counter()
        self.seconds: Counter[str] = Counter()
        self.kept_keys: list[str] = []
        self.rejected_markers: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)

    def add(self, marker: Mapping[str, Any], examples: int) -> None:
        """Counts one clip; keeps the first ``examples`` rejected ones of every reason."""
        self.videos += 1
        last = self.stages[-1] if marker["kept"] else marker["stage"]
        self.reached.update(self.stages[: self.stages.index(last) + 1])
        self.seconds.update(marker["seconds"])
        if marker["kept"]:
            self.kept_keys.append(marker["key"])
            self.samples += len(marker["samples"])
            for sample in marker["samples"]:
                self.subjects += len(sample["subjects"])
                self.subject_counts[len(sample["subjects"])] += 1
            self.dropped.update((dropped["stage"], dropped["reason"]) for dropped in marker["dropped"])
        else:
            self.rejected[marker["stage"]][marker["reason"]] += 1
            shown = self.rejected_markers[marker["stage"], marker["reason"]]
            if len(shown) < examples:
                shown.append(dict(marker))


def read_samples(blocks: bytes) -> list[dict[str, Any]]:
    """The samples in some tar blocks: {"json": metadata, "target.jpg": bytes, "reference_0.png": bytes, ...} each."""
    samples: dict[str, dict[str, Any]] = {}
    with tarfile.open(fileobj=io.BytesIO(blocks + bytes(2 * tarfile.BLOCKSIZE))) as archive:
        for member in archive:
            key, suffix = member.name.split(".", 1)
            samples.setdefault(key, {})[suffix] = archive.extractfile(member).read()
    return [{**members, "json": json.loads(members["json"])} for members in samples.values()]


def draw_sample(sample: Mapping[str, Any]) -> tuple[Image.Image, str]:
    """Cut-outs, then the target with its boxes and masks; and the caption."""
    metadata = sample["json"]
    cutouts = [
        draw_cut_out(Image.open(io.BytesIO(sample[f"reference_{i}.png"])), HEIGHT // 2)
        for i in range(len(metadata["subjects"]))
    ]
    target = np.asarray(Image.open(io.BytesIO(sample["target.jpg"])))
    subjects = [
        (subject["phrase"], tuple(subject["target_box"]), decode_mask(subject["target_mask_rle"]))
        for subject in metadata["subjects"]
    ]
    similarity = ", ".join(f"{subject['match_similarity']:.2f}" for subject in metadata["subjects"])
    text = f"{metadata['caption']} [{metadata['key']}; similarity {similarity}]"
    return beside([*cutouts, draw_frame(target, subjects)]), text


def write_report(
    journal: Journal, files: Sequence[VideoFile], stages: Sequence[str], build: Mapping[str, Any], examples: int = 48
) -> Tally:
    """Writes report.html and the contact sheets in report/. Needs the journal as a finished run leaves it.

    examples: kept clips to show, evenly spread over the dataset; and half as many rejected ones, up to 8 of a reason.
    """
    tally = Tally(stages)
    for marker in journal.markers(list(files)):
        tally.add(marker, examples=8)
    folder = journal.out / "report"
    folder.mkdir(exist_ok=True)
    shown = tally.kept_keys[:: max(1, -(-len(tally.kept_keys) // examples))]
    sheets = {}
    if shown:
        tiles = [draw_sample(sample) for key in shown for sample in read_samples(journal.blocks(key))]
        sheets["kept"] = _save_sheet(folder, "kept", tiles)
    rejected = []
    for (stage, reason), markers in sorted(tally.rejected_markers.items()):
        for marker in markers[: max(1, examples // 2 // max(1, len(tally.rejected_markers)))]:
            preview = journal.preview(marker["key"])
            if preview is not None:
                text = f"{stage}: {reason} [{marker['video']}] {json.dumps(marker['evidence'], ensure_ascii=False)}"
                rejected.append((Image.open(io.BytesIO(preview)).convert("RGB"), text))
    if rejected:
        sheets["rejected"] = _save_sheet(folder, "rejected", rejected)
    write_atomically(journal.out / "report.html", _page(tally, build, sheets).encode())
    return tally


def _save_sheet(folder: Any, name: str, tiles: list[tuple[Image.Image, str]]) -> str:
    buffer = io.BytesIO()
    contact_sheet(tiles).save(buffer, "PNG")
    write_atomically(folder / f"{name}.png", buffer.getvalue())
    return f"report/{name}.png"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, int | float):
            return f'<td class="n">{value:,}</td>'
        return f"<td>{value}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows) + "</table>"


def _page(tally: Tally, build: Mapping[str, Any], sheets: Mapping[str, str]) -> str:
    funnel = []
    for stage in tally.stages:
        reached, lost = tally.reached[stage], sum(tally.rejected[stage].values())
        bar = f'<span class="bar" style="width:{240 * reached / max(1, tally.videos):.0f}px"></span>'
        reasons = "<br>".join(f"{count:,} {escape(reason)}" for reason, count in tally.rejected[stage].most_common())
        milliseconds = f"{1000 * tally.seconds[stage] / max(1, reached):.2f}"
        funnel.append((stage, bar, reached, lost, reached - lost, reasons, milliseconds))
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Mining report</title>",
        f"<style>{STYLE}</style><h1>Mining report</h1>",
        f"<p>{tally.videos:,} videos gave {tally.samples:,} samples with {tally.subjects:,} subjects; "
        f"{tally.videos - len(tally.kept_keys):,} videos were rejected (all in <code>rejected.jsonl</code>).</p>",
        "<h2>Funnel</h2>",
        _table(("step", "", "clips in", "rejected", "clips out", "reasons", "ms per clip"), funnel),
        "<h2>Subjects</h2>",
        _table(("subjects in a sample", "samples"), sorted(tally.subject_counts.items())),
    ]
    if tally.dropped:
        rows = [(stage, escape(reason), count) for (stage, reason), count in tally.dropped.most_common()]
        parts += ["<p>Left out of samples that were kept:</p>", _table(("step", "reason", "subjects"), rows)]
    titles = {
        "kept": "Kept: the reference cut-outs, and the target with its boxes and masks",
        "rejected": "Rejected: reference and target frame, with what had been found in them",
    }
    for name, source in sheets.items():
        parts.append(f'<h2>{titles[name]}</h2><img src="{source}" alt="{name} clips">')
    if tally.videos and not sheets.get("rejected") and any(tally.rejected.values()):
        parts.append(
            "<p><small>Every rejected clip fell out before a frame was decoded: no pictures of them.</small></p>"
        )
    settings = [(escape(step), f"<code>{escape(json.dumps(own))}</code>") for step, own in build["settings"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in build["versions"].items())
    parts += [
        "<h2>Settings</h2>",
        _table(("step", "settings"), settings),
        f"<p><small>{escape(versions)}</small></p></html>",
    ]
    return "\n".join(parts)
