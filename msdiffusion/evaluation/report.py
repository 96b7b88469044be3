"""Pictures and pages for people: the grid of cases, and a page that opens by a double click, all in one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from data_pipeline.safe_text import html
from msdiffusion.errors import DataError
from msdiffusion.evaluation.world import QUESTIONS, Readings, WorldCase, accepted_answers
from msdiffusion.figures import LINE_HEIGHT, PAPER, color_of, draw_boxes, enlarge, text_block

CELL = 192
"""Side of a picture in the grid, in pixels."""
LABEL_WIDTH = 190
TITLE_HEIGHT = 44
GAP = 10
GOOD, BAD = "#1f8a4c", "#c43c3c"


@dataclass(frozen=True)
class GridRow:
    """One condition in the grid: its label, one picture per case, and what the judge read in them (None: no marks)."""

    label: str
    pictures: Sequence[Image.Image]
    readings: Readings | None = None


def draw_grid(cases: Sequence[WorldCase], rows: Sequence[GridRow]) -> Image.Image:
    """One column per case: prompt, reference cut-outs, boxes, then each condition with the judge's answers below it.

    Args:
        cases: at least one.
        rows: conditions, top to bottom.

    Returns:
        RGB picture.

    Raises:
        DataError: no cases, or a row with another number of pictures than cases.
    """
    if not cases:
        raise DataError("a grid needs at least one case")
    for row in rows:
        if len(row.pictures) != len(cases):
            raise DataError(f"row {row.label!r} has {len(row.pictures)} pictures for {len(cases)} cases")
    marks = LINE_HEIGHT * (max(len(case.subjects) for case in cases) + 1)
    heights = [CELL, CELL] + [CELL + (marks if row.readings else 0) for row in rows]
    width = LABEL_WIDTH + len(cases) * (CELL + GAP) + GAP
    sheet = Image.new("RGB", (width, TITLE_HEIGHT + sum(heights) + GAP * (len(heights) + 1)), PAPER)
    draw = ImageDraw.Draw(sheet)
    tops = [TITLE_HEIGHT + GAP + sum(heights[:index]) + GAP * index for index in range(len(heights))]
    for top, label in zip(tops, ["references", "boxes", *(row.label for row in rows)], strict=True):
        text_block(draw, label, GAP, top + CELL // 2 - LINE_HEIGHT, LABEL_WIDTH - 2 * GAP, size=16)
    first_box = 0
    for column, case in enumerate(cases):
        left = LABEL_WIDTH + column * (CELL + GAP)
        text_block(draw, case.prompt, left, 4, CELL, size=14)
        sheet.paste(_reference_cell(case), (left, tops[0]))
        sheet.paste(draw_boxes(case.boxes, case.phrases, CELL), (left, tops[1]))
        for row, top in zip(rows, tops[2:], strict=True):
            sheet.paste(enlarge(row.pictures[column], CELL), (left, top))
            if row.readings:
                _draw_marks(draw, case, row.readings, column, first_box, left, top + CELL + 2)
        first_box += len(case.subjects)
    return sheet


PAGE = """\
<!doctype html><html lang="en"><head><meta charset="utf-8">\
<meta name="viewport" content="width=device-width, initial-scale=1">\
<title>{{ title }}</title><style>{{ style }}</style></head><body><main><h1>{{ title }}</h1>\
{% for paragraph in paragraphs %}<p>{{ paragraph }}</p>{% endfor %}{{ table }}\
{% for heading, picture in pictures %}<h2>{{ heading }}</h2><img src="{{ picture }}" alt="{{ heading }}">{% endfor %}\
{% for label, to in links.items() %}<p><a href="{{ to }}">{{ label }}</a></p>{% endfor %}\
<h2>How it was made</h2><dl>\
{% for label, text in details.items() %}<dt>{{ label }}</dt><dd><code>{{ text }}</code></dd>{% endfor %}\
</dl></main></body></html>
"""
SCORE_TABLE = """\
<p><b>{{ subjects }} subjects in {{ pictures }} pictures.</b> \
Share that the judge reads right, with a 95 % interval:</p>\
<table><tr><th></th>{% for name in header %}<th>{{ name }}</th>{% endfor %}<th>chance</th></tr>\
{% for question, note, cells, chance in rows %}\
<tr><th>{{ question }}{% if note %}<small>{{ note }}</small>{% endif %}</th>\
{% for rate, interval in cells %}<td>{{ rate }}{% if interval %} <small>{{ interval }}</small>{% endif %}</td>\
{% endfor %}<td>{{ chance }}</td></tr>{% endfor %}</table>\
<ul>{% for test in tests %}<li>{{ test }}</li>{% endfor %}</ul>"""


def write_page(
    path: str | Path,
    *,
    title: str,
    introduction: str,
    scores: Mapping[str, Any] | None,
    pictures: Sequence[tuple[str, Image.Image]],
    details: Mapping[str, str],
    links: Mapping[str, str],
) -> None:
    """Writes one HTML file with everything inside it, for a double click.

    Args:
        path: of the file.
        title, introduction: plain text; it is escaped here. Blank lines part paragraphs.
        scores: report of `evaluate_world`, or None.
        pictures: heading and picture, in order.
        details: label to text, shown at the bottom (commands, versions, times).
        links: label to address of other pages, relative to this one.
    """
    page = html(
        PAGE,
        style=_STYLE,
        title=title,
        paragraphs=introduction.split("\n\n"),
        table=score_table(scores) if scores else "",
        pictures=[(heading, _data_uri(picture)) for heading, picture in pictures],
        links=links,
        details=details,
    )
    Path(path).write_text(page, encoding="utf-8")


def score_table(report: Mapping[str, Any]) -> str:
    """The scores as HTML: one row per question, one column per condition, then the paired tests."""
    questions = report["questions"]
    conditions = list(questions["category"]["conditions"])
    rows = []
    for question in QUESTIONS:
        rates = [questions[question]["conditions"][name] for name in conditions]
        cells = [(f"{each['rate']:.0%}", f"[{each['low']:.0%}, {each['high']:.0%}]") for each in rates]
        rows.append((_readable(question), "", cells, f"{questions[question]['chance']:.0%}"))
    if any(questions["mixing"].values()):
        cells = [(f"{own['rate']:.0%}" if own else "", "") for own in questions["mixing"].values()]
        rows.append(("colour of another subject ", "(less is better)", cells, ""))
    tests = [_test_line(question, test) for question in QUESTIONS for test in questions[question]["tests"]]
    how = {"subjects": report["subjects"], "pictures": report["pictures"]}
    return html(SCORE_TABLE, header=[_readable(name) for name in conditions], rows=rows, tests=tests, **how)


def format_p(value: float) -> str:
    """A p value for people: three significant digits, and a bound where it is tiny."""
    return "< 1e-15" if value < 1e-15 else f"{value:.3g}"


def summarize(report: Mapping[str, Any]) -> str:
    """The scores as lines of text for a terminal."""
    questions = report["questions"]
    conditions = list(questions["category"]["conditions"])
    width = max(len(_readable(name)) for name in conditions) + 2
    lines = [f"{report['subjects']} subjects in {report['pictures']} pictures; share right as the judge reads them:"]
    lines.append(f"{'':<14}" + "".join(f"{_readable(name):>{width}}" for name in conditions) + f"{'chance':>10}")
    for question in QUESTIONS:
        rates = [questions[question]["conditions"][name]["rate"] for name in conditions]
        chance = questions[question]["chance"]
        lines.append(
            f"{_readable(question):<14}" + "".join(f"{rate:>{width}.3f}" for rate in rates) + f"{chance:>10.3f}"
        )
    lines += [_test_line(question, test) for question in QUESTIONS for test in questions[question]["tests"]]
    return "\n".join(lines)


def _test_line(question: str, test: Mapping[str, Any]) -> str:
    return (
        f"{_readable(question)}: {_readable(test['first'])} - {_readable(test['second'])} = {test['difference']:+.3f} "
        f"[{test['low']:+.3f}, {test['high']:+.3f}], p = {format_p(test['p_value'])} over "
        f"{'pictures' if question == 'background' else 'subjects'}"
        + ("" if question == "background" else f", p = {format_p(test['pictures']['p_value'])} over pictures")
    )


def _readable(name: str) -> str:
    return {"color": "main colour", "body_color": "body colour"}.get(name, name.replace("_", " "))


def _reference_cell(case: WorldCase) -> Image.Image:
    """The case's cut-outs side by side, each over the colour of its box."""
    sheet = Image.new("RGB", (CELL, CELL), PAPER)
    share = CELL // len(case.references)
    draw = ImageDraw.Draw(sheet)
    for index, reference in enumerate(case.references):
        room = share - 14
        factor = min(room / reference.width, room / reference.height)
        size = (max(1, round(reference.width * factor)), max(1, round(reference.height * factor)))
        shown = reference.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
        left, top = index * share + (share - size[0]) // 2, (CELL - size[1]) // 2
        sheet.paste(shown, (left, top), shown)
        draw.rectangle((index * share + 4, CELL - 5, (index + 1) * share - 5, CELL - 2), fill=color_of(index))
    return sheet


def _draw_marks(
    draw: ImageDraw.ImageDraw, case: WorldCase, readings: Readings, picture: int, first_box: int, left: int, top: int
) -> None:
    """The judge's answers: green where right, red where wrong; one line per box, then the background."""
    font = ImageFont.load_default(13)
    for row, subject in enumerate(case.subjects):
        accepted, x = accepted_answers(subject), left
        for question in ("body_color", "pattern", "category"):
            answer = readings.answers(question)[first_box + row]
            draw.text((x, top), answer, fill=GOOD if answer in accepted[question] else BAD, font=font)
            x += draw.textlength(answer + " ", font=font)
        top += LINE_HEIGHT
    answer = readings.background[picture]
    draw.text((left, top), answer, fill=GOOD if answer == case.background else BAD, font=font)


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


_STYLE = """
body{margin:0;background:#f6f7f9;color:#22262e;font:16px/1.55 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:30px;margin:0 0 8px}h2{font-size:20px;margin:36px 0 12px}
img{max-width:100%;background:#fff;border-radius:8px;box-shadow:0 1px 4px #0002}
table{border-collapse:collapse;background:#fff;border-radius:8px;box-shadow:0 1px 4px #0002}
th,td{padding:8px 14px;text-align:right;border-bottom:1px solid #eceef2}th:first-child{text-align:left}
small{color:#8b93a1;font-weight:normal}dt{font-weight:600;margin-top:10px}dd{margin:0}
code{font-size:13px;white-space:pre-wrap;overflow-wrap:anywhere}
"""
