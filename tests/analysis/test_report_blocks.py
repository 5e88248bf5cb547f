"""HTML pieces: whatever a run is called, it is text; and the palette has a dark twin for every colour drawn."""

import json
import re

from analysis.report.blocks import Figures, rich, table, tag
from analysis.report.figures import theme
from analysis.report.html import script_json


def test_texts_are_escaped_once():
    assert str(tag("p", "a < b & <script>")) == "<p>a &lt; b &amp; &lt;script&gt;</p>"
    assert str(tag("p", [tag("b", "x & y"), " < z"])) == "<p><b>x &amp; y</b> &lt; z</p>"
    assert 'title="&quot;x&quot;"' in str(tag("p", "", title='"x"'))


def test_json_cannot_leave_its_script_element():
    text = script_json({"name": "</script><!-- <script> \u2028"})
    assert "<" not in text and "\u2028" not in text
    assert json.loads(text) == {"name": "</script><!-- <script> \u2028"}


def test_exponents_are_raised_and_nothing_else():
    assert str(rich("N* ∝ C^0.46, D^−1.85 and C^(b−a) < 2^x")) == (
        "N* ∝ C<sup>0.46</sup>, D<sup>−1.85</sup> and C<sup>b−a</sup> &lt; 2<sup>x</sup>"
    )
    assert str(rich("C^0.46.")) == "C<sup>0.46</sup>."


def test_a_table_marks_rows_and_sets_numbers_right():
    html = str(table(["a", "b"], [["x", "1"], ["y", "2"]], numbers=(1,), marked=(1,)))
    assert html.count('<td class="n">') == 2
    assert html.count('<tr class="mark">') == 1


def test_a_figure_that_is_not_there_leaves_nothing():
    figures = Figures({})
    assert str(figures.show("absent", "caption")) == ""
    assert str(figures.row("pair", [figures.show("absent", "caption")])) == ""
    assert figures.shown == []


def test_every_ramp_colour_has_a_dark_twin_and_ends_are_the_anchors():
    twins = theme.dark_twins()
    colours = [theme.ramp(i, n) for n in (1, 2, 4, 7, 30) for i in range(n)]
    assert set(colours) <= set(twins)
    assert all(re.fullmatch("#[0-9a-f]{6}", c) for c in twins) and all(re.fullmatch("#[0-9a-f]{6}", c) for c in twins.values())
    assert (theme.ramp(0, 4), theme.ramp(3, 4)) == (theme.RAMP_LIGHT[0], theme.RAMP_LIGHT[-1])
    assert len({theme.ramp(i, 8) for i in range(8)}) == 8


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio of two sRGB colours (https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_colours_can_be_read_and_lines_seen_on_both_papers():
    paper = theme.PALETTE["paper"]
    for name in ("ink", "soft", "accent", "amber", "red"):
        light, dark = theme.PALETTE[name]
        assert contrast(light, paper[0]) >= 4.5, name
        assert contrast(dark, paper[1]) >= 4.5, name
    for light, dark in theme.dark_twins().items():
        if light in {theme.ramp(i, 9) for i in range(9)}:
            assert contrast(light, paper[0]) >= 2.4, light
            assert contrast(dark, paper[1]) >= 3, dark
