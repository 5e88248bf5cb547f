"""The facts as Markdown: the page's own sections, written as GitHub's Markdown, so that both say the same. Figures are left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

from analysis.report import format as fmt
from analysis.report.blocks import Figures
from analysis.report.html import RUN_COLUMNS, page_sections

Facts = Mapping[str, Any]
HEADINGS = {"h1": "# ", "h2": "## ", "h3": "### "}
PARAGRAPHS = ("p", "caption", "summary", "footer")
LIVE_ONLY = ("button", "label", "input", "select")  # what only a page can do; its text is no fact
PLAIN_POWER = re.compile(r"\^\(([−-]?[\w.]+)\)")  # needs no brackets
FORMATS = {"loss": fmt.loss, "count": fmt.count, "flops": fmt.flops, "whole": fmt.whole, "seconds": fmt.duration}


def to_markdown(facts: Facts) -> str:
    """One Markdown document (GitHub's tables) from the dict of report_facts."""
    parts: list[str] = []
    for section in page_sections(facts, Figures({})):
        reader = _Reader()
        reader.feed(section.text)
        reader.close()
        parts += reader.parts
        if 'id="runs"' in section.text:
            parts.append(_runs(facts["runs"]))
    return "\n\n".join(parts) + "\n"


def _runs(runs: Facts) -> str:
    """Every run, in the columns of the page's table that hold anything."""
    columns = runs["columns"]
    known = [c for c in RUN_COLUMNS if c[0] == "run_id" or any(v not in (None, "") for v in columns.get(c[0]) or ())]
    rows = [[_run_cell(columns[key][i], kind) for key, _, kind in known] for i in range(runs["length"])]
    return _table([[title for _, title, _ in known], *rows])


def _run_cell(value: Any, kind: str) -> str:
    if value is None or kind == "text":
        return str(value or "")
    return FORMATS[kind](value) if kind in FORMATS else f"{value:.5g}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)


class _Reader(HTMLParser):
    """HTML of the page's sections -> `parts`, Markdown blocks in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.text: list[str] = []
        self.rows: list[list[str]] | None = None
        self.items: list[str] | None = None
        self.headed = False  # the table has a row of heads
        self.ordered = False
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        css = dict(attrs).get("class") or ""
        if tag in LIVE_ONLY:
            self.hidden += tag != "input"  # an input has no end
        elif tag in HEADINGS or tag in PARAGRAPHS or tag in ("td", "th", "li", "dt", "dd"):
            self.text = []
            self.headed |= tag == "th"
        elif tag == "table":
            self.rows, self.headed = [], False
        elif tag == "tr" and self.rows is not None:
            self.rows.append([])
        elif tag in ("ul", "ol", "dl"):
            self.items, self.ordered = [], tag == "ol"
        elif tag == "small":
            self.text.append("; " if "".join(self.text).strip() else "")
        elif tag == "sup":
            self.text.append("^(")
        elif tag == "code":
            self.text.append("`")
        elif tag == "span" and css.startswith("chip") and "".join(self.text).strip():
            self.text.append(": ")
        elif tag == "b":
            self.text.append("**")

    def handle_endtag(self, tag: str) -> None:
        if tag in LIVE_ONLY:
            self.hidden -= tag != "input"
        elif tag == "b":
            self.text.append(":** ")
        elif tag == "sup":
            self.text.append(")")
        elif tag == "code":
            self.text.append("`")
        elif tag in HEADINGS:
            self._block(HEADINGS[tag])
        elif tag in PARAGRAPHS:
            self._block("")
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append(self._taken())
        elif tag in ("li", "dt", "dd") and self.items is not None:
            self._item(tag, self.items)
        elif tag in ("ul", "ol", "dl") and self.items is not None:
            self.parts.append("\n".join(self.items))
            self.items = None
        elif tag == "table" and self.rows is not None:
            self._end_table(self.rows)

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.text.append(data)

    def _taken(self) -> str:
        text, self.text = " ".join("".join(self.text).split()).replace(" ; ", "; "), []
        return PLAIN_POWER.sub(r"^\1", text)

    def _block(self, mark: str) -> None:
        if text := self._taken():
            self.parts.append(mark + text)

    def _item(self, tag: str, items: list[str]) -> None:
        text = self._taken()
        if tag == "li":
            items.append((f"{len(items) + 1}. " if self.ordered else "- ") + text)
        elif tag == "dt":
            items.append(f"- {text}:")
        else:
            items[-1] += (" " if items[-1].endswith(":") else "; ") + text

    def _end_table(self, rows: list[list[str]]) -> None:
        self.rows = None
        rows = [row for row in rows if row]
        if rows:
            width = max(map(len, rows))
            heads = [] if self.headed else [[""] * width]
            self.parts.append(_table([*heads, *(row + [""] * (width - len(row)) for row in rows)]))
