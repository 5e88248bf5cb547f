"""Small pieces of HTML: escaped text, tables, figures with captions, chips. Every text passes through `escape` exactly once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import plotly.graph_objects as go

CHIPS = {
    "ok": "good",
    "adopt": "good",
    "converged": "good",
    "interior": "good",
    "averaged": "good",
    "warn": "warn",
    "undecided": "warn",
    "at_bound": "warn",
    "not_identifiable": "warn",
    "edge": "warn",
    "low": "warn",
    "high": "warn",
    "flat": "warn",
    "too_few": "warn",
    "refuse": "bad",
    "reject": "bad",
    "failed": "bad",
}
WORDS = {
    "at_bound": "at a bound",
    "not_identifiable": "not identifiable",
    "too_few": "too few runs",
    "low": "low edge",
    "high": "high edge",
    "edge": "at the edge",
    "warn": "with cautions",
    "refuse": "not recommended",
}


CODE = re.compile(r"`([^`]+)`")
EXPONENT = re.compile(r"\^(?:\(([^)]*)\)|([−-]?[0-9.]*[0-9]|[a-zα-ω]{1,5}\b))")


@dataclass(frozen=True)
class Html:
    """Text that is HTML already; everything else is escaped where it is put in."""

    text: str

    def __str__(self) -> str:
        return self.text


Content = str | Html


def put(content: Content) -> str:
    return content.text if isinstance(content, Html) else escape(content)


def tag(name: str, content: Content | Iterable[Content], css: str = "", **attributes: str) -> Html:
    inner = put(content) if isinstance(content, (str, Html)) else "".join(put(c) for c in content)
    given = ({"class": css} if css else {}) | {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items()}
    written = "".join(f' {k}="{escape(v, quote=True)}"' for k, v in given.items())
    return Html(f"<{name}{written}>{inner}</{name}>")


def join(parts: Iterable[Content]) -> Html:
    return Html("\n".join(put(p) for p in parts if p is not None))


def chip(status: str) -> Html:
    return tag("span", WORDS.get(status, status.replace("_", " ")), f"chip {CHIPS.get(status, 'plain')}")


def lead(text: Content) -> Html:
    return tag("p", rich(text) if isinstance(text, str) else text, "lead")


def missing(text: str) -> Html:
    return tag("p", rich(text), "missing")


def table(
    heads: Sequence[Content], rows: Sequence[Sequence[Any]], *, numbers: Sequence[int] = (), marked: Sequence[int] = ()
) -> Html:
    """A table that scrolls inside itself. `numbers`: columns set right; `marked`: rows with the accent's wash."""
    css = ["n" if i in numbers else "" for i in range(len(heads))]
    head = tag("tr", [tag("th", h, css[i], scope="col") for i, h in enumerate(heads)])
    body = [
        tag("tr", [tag("td", c, css[i]) for i, c in enumerate(row)], "mark" if r in marked else "") for r, row in enumerate(rows)
    ]
    return tag("div", tag("table", [tag("thead", head), tag("tbody", body)], "data"), "scroll")


def details(summary: str, content: Content) -> Html:
    return tag("details", [tag("summary", summary), content])


def bar(share: float) -> Html:
    """A plain bar of `share` (0..1) of its track."""
    return tag("span", tag("span", "", "bar", style=f"width: {100 * min(1.0, max(0.0, share)):.1f}%"), "track")


def rich(text: str) -> Html:
    """Plain text of the facts as HTML: C^0.46 and C^(b−a) get a raised exponent, `words` a code font."""
    return Html(CODE.sub(r"<code>\1</code>", EXPONENT.sub(r"<sup>\1\2</sup>", escape(text))))


@dataclass
class Figures:
    """The page's figures by name; hands each out once as a numbered <figure>, nothing where there is no figure."""

    by_name: dict[str, go.Figure]
    shown: list[str] = field(default_factory=list)

    def show(self, name: str, caption: Content) -> Html:
        if name not in self.by_name:
            return Html("")
        self.shown.append(name)
        height = int(self.by_name[name].layout.height or 400)
        plot = tag("div", "", "plot", data_figure=name, style=f"min-height: {height}px", role="img", aria_label=_plain(caption))
        told = rich(caption) if isinstance(caption, str) else caption
        text = Html(f"<b>Figure {len(self.shown)}.</b> {told}")
        return tag("figure", [plot, tag("figcaption", text)])

    def row(self, css: str, shown: Sequence[Html]) -> Html:
        """Several figures side by side; one alone takes the whole width."""
        kept = [s for s in shown if s.text]
        return Html("") if not kept else tag("div", kept, css if len(kept) > 1 else "")


def _plain(caption: Content) -> str:
    return str(caption)[:300]
