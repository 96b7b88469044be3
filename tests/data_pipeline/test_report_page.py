import re
from collections import Counter
from xml.etree import ElementTree

import pytest

from data_pipeline.report_page import (
    Histogram,
    Tally,
    column_chart,
    funnel,
    in_words,
    page,
    phrase_chart,
    table,
)

BUILD = {"settings": {"read": {"a": 1}, "filter": {"b": "<x>"}, "write": {}}, "versions": {"numpy": "2.0"}}
BUILD["version"] = "0.7"


def row(**changes):
    values = {"num_subjects": 2, "phrases": ["dog", "cat"], "areas": [0.1, 0.32], "min_match_similarity": 0.9}
    return {**values, "min_detection_score": 1.0, "frame_gap_seconds": 0.625, **changes}


@pytest.fixture
def tally():
    """Four videos: one kept with two samples, two that fell out at once and one later."""
    counts = Tally(list(BUILD["settings"]))
    counts.keep_video()
    counts.add_sample(row())
    counts.add_sample(row(num_subjects=1, phrases=["dog"], areas=[0.5]))
    for stage, reason in (("read", "empty file"), ("read", "empty file"), ("filter", "no <subject>")):
        counts.reject(stage, reason)
    return counts


def test_tally(tally):
    assert (tally.videos, tally.kept_videos, tally.samples, tally.subjects) == (4, 1, 2, 3)
    assert tally.reached == {"read": 4, "filter": 2, "write": 1}
    assert tally.rejected == {"read": {"empty file": 2}, "filter": {"no <subject>": 1}, "write": {}}
    assert tally.phrases == {"dog": 2, "cat": 1}
    assert tally.histograms["subjects"].counts == {1: 1, 2: 1}
    assert tally.histograms["area"].number == 3


def test_bins_are_closed_below_and_the_last_one_takes_the_rest():
    histogram = Histogram("seconds", "samples", 0.5, 2, open_end=True)
    for value in (0.0, 0.49, 0.5, 1.99, 2.0, 99):
        histogram.add(value)
    assert histogram.bars() == [("0", 2), ("0.5", 1), ("1", 0), ("1.5", 1), ("2 or more", 2)]


@pytest.mark.parametrize("value", [0.05, 0.1, 0.15, 0.3, 0.35, 0.6, 0.7, 0.95])
def test_a_value_on_an_edge_counts_above_it(value):
    histogram = Histogram("area", "subjects", 0.05, 1)
    histogram.add(value)
    assert histogram.bars() == [(f"{value:g}", 1)]


def test_a_chart_says_in_words_what_it_shows():
    histogram = Histogram("Subjects per sample", "samples", 1, 16)
    assert histogram.summary() == "Subjects per sample: nothing to count."
    assert column_chart(histogram) == ""
    for value in (1, 2, 2, 3):
        histogram.add(value)
    assert histogram.summary() == "4 samples, mean 2; the most common bin is 2, with 2."
    chart = column_chart(histogram)
    assert f'role="img" aria-label="{histogram.summary()}"' in chart
    assert chart.count("<rect") == 3
    assert "<title>2: 2</title>" in chart


def test_phrases_by_count_then_alphabet_and_no_more_than_fit():
    phrases = Counter({f"thing {i:02d}": 2 for i in range(30)} | {"zebra": 9, "<b>": 9})
    chart = phrase_chart(phrases)
    assert chart.index("&lt;b&gt;") < chart.index("zebra") < chart.index("thing 00") < chart.index("thing 01")
    assert "thing 20" not in chart
    assert "32 phrases; the most common one is &lt;b&gt;, of 9 subjects; 12 rarer ones, of 24 subjects" in chart
    assert phrase_chart(Counter()) == ""


def test_charts_are_well_formed():
    histogram = Histogram("seconds & <more>", "samples", 0.5, 30, open_end=True)
    for value in (0.2, 3, 45):
        histogram.add(value)
    for chart in (column_chart(histogram), phrase_chart(Counter({"a & b": 3, "x" * 40: 1}))):
        drawing = ElementTree.fromstring(chart[chart.index("<svg") : chart.index("</svg>") + 6])
        wide, high = float(drawing.get("width")), float(drawing.get("height"))
        for bar in drawing.iter("rect"):
            assert 0 <= float(bar.get("x")) <= float(bar.get("x")) + float(bar.get("width")) <= wide
            assert 0 <= float(bar.get("y")) <= float(bar.get("y")) + float(bar.get("height")) <= high


def test_funnel_rows(tally):
    text = funnel(tally, {"read": 0.008})
    assert '<td class="n">4</td><td class="n">2</td><td class="n">2</td><td>2 empty file</td><td>2.00</td>' in text
    assert '<td class="n">1</td><td class="n">0</td><td class="n">1</td><td></td><td></td>' in text
    assert "1 no &lt;subject&gt;" in text


def test_page(tally):
    notes = {"dropped": [["filter", "box too small", 7]], "lost_pairs": [["filter", "near-identical frames", 3]]}
    notes["clips"] = [["HDR", 2], ["in <another> language", 1]]
    traceback = f"Traceback ...\n  {'x' * 1000}\nIndexError: list index <out> of range\n"
    entry = {"video": "a<b.mp4", "evidence": {"caption": "a 'dog' & 狗", "traceback": traceback}}
    text = page(tally, BUILD, notes, {"kept": "report/kept.png"}, {("read", "empty file"): [entry]})
    assert "4 videos gave 2 samples with 3 subjects; 3 videos were rejected" in text
    assert '<td>box too small</td><td class="n">7</td>' in text
    assert "Pairs that fell out of clips that were kept" in text
    assert '<td>near-identical frames</td><td class="n">3</td>' in text
    assert '<img src="report/kept.png" alt=' in text
    assert "there are no pictures" in text
    assert "read: empty file (2)" in text
    assert "a&lt;b.mp4" in text
    assert "<bdi>caption: a &#39;dog&#39; &amp; 狗; error: IndexError: list index &lt;out&gt; of range</bdi>" in text
    assert f"<pre>Traceback ...\n  {'x' * 1000}\nIndexError: list index &lt;out&gt;" in text
    assert '<td>HDR</td><td class="n">2</td></tr>\n<tr><td>in &lt;another&gt; language</td><td class="n">1</td>' in text
    assert "<small>data_pipeline 0.7, numpy 2.0</small>" in text
    assert "{&#34;b&#34;: &#34;&lt;x&gt;&#34;}" in text


def test_on_a_narrow_screen_the_bars_make_room_for_the_counts(tally):
    """At 400 pixels in Chromium nothing but the funnel is wider than the screen, and its counts are seen."""
    text = page(tally, BUILD, {}, {}, {})
    assert '<meta name="viewport" content="width=device-width">' in text
    narrow = text[text.index("@media (max-width: 900px) {") : text.index("</style>")]
    assert ".funnel :is(td, th):nth-child(2) { display: none; }" in narrow
    table = text[text.index('<div class="funnel">') : text.index("</table></div>")]
    assert re.findall(r'<th scope="col">(.*?)</th>', table)[:5] == ["step", "", "clips in", "rejected", "clips out"]
    assert table.count('<td><span class="bar"') == len(BUILD["settings"])
    assert "svg { max-width: 100%; height: auto; }" in text


def test_a_page_without_anything_kept_has_no_charts():
    counts = Tally(list(BUILD["settings"]))
    counts.reject("read", "empty file")
    text = page(counts, BUILD, {}, {}, {})
    assert "<svg" not in text
    assert "left out" not in text


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        ({"seconds": 0.1, "min_gap": 0.25}, "seconds: 0.1; min gap: 0.25"),
        ({"video": [4, 3], "error": "ключ", "caption": ""}, "video: [4, 3]; error: ключ"),
        ({"error": "ValueError: no", "caption": "a dog", "traceback": "..."}, "error: ValueError: no; caption: a dog"),
        ({"error": "x" * 30}, f"error: {'x' * 20} ..."),
        ({}, ""),
        ([1, 2], "[1, 2]"),
    ],
)
def test_evidence_in_words(evidence, words):
    assert in_words(evidence, 20) == words


def test_table_groups_thousands_and_escapes_text():
    assert '<td class="n">12,345</td><td>a&lt;br&gt;b</td>' in table(("n", "text"), [(12345, "a<br>b")])
