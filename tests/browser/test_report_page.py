"""The report in headless Chromium: no error, no request, no overflow, every figure drawn, light and dark, table and print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Page, find_chromium
from ray_nodes import wait_for
from report_inputs import TARGET, fitted, fronts, production, promotions
from synthetic_ladder import DEMO, REAL, LadderSpec

from analysis.report import write_report

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on the PATH (apt-get install chromium)")
WIDTHS = (1280, 390)
FIGURES = [
    "isoflop",
    "surface",
    "residuals",
    "allocation_N",
    "allocation_D",
    "allocation_ratio",
    "batch_size_cells",
    "batch_size_law",
    "learning_rate_cells",
    "learning_rate_law",
    "weight_decay_cells",
    "weight_decay_law",
    "frontier",
    "errors",
    "noise",
    "front_0",
]
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
TOP = "document.querySelector('{}').getBoundingClientRect().top"
# Text that sticks out of the window at the right, outside of boxes that scroll by themselves.
STICKING_OUT = """Array.from(document.querySelectorAll('main *')).filter(e =>
  !e.closest('.scroll') && !e.closest('.js-plotly-plot') && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.outerHTML.slice(0, 80))"""
DRAWN = """Object.fromEntries(Array.from(document.querySelectorAll('.plot'), e => [e.dataset.figure,
  [e.classList.contains('js-plotly-plot'), e.querySelectorAll('.main-svg').length > 0,
   e.querySelectorAll('.scatterlayer .points path, .scatterlayer .js-line').length,
   Array.from(e.querySelectorAll('.main-svg')).every(s => s.getBoundingClientRect().right <= innerWidth + 1)]]))"""


def make_report(folder: Path, spec: LadderSpec, target: float) -> Path:
    laws, table = fitted(spec, target)
    made = production(measured=1.63, run_id=table.frame["run_id"].iloc[0])
    extra = {"production": made, "promotions": promotions(), "fronts": fronts()}
    return write_report(laws, table, folder / "report.html", title="A ladder & <more>", **extra)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_report(tmp_path_factory.mktemp("demo"), DEMO, TARGET)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    binary = find_chromium()
    assert binary is not None
    with Page(binary) as page:
        yield page


def look(page: Page, report: Path, width: int, *, dark: bool = False) -> None:
    page.errors.clear()
    page.requests.clear()
    page.view(width, dark=dark, phone=width < 600)
    page.open(report)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_goes_wrong_at_any_width_and_theme(page: Page, demo: Path, width: int, dark: bool):
    look(page, demo, width, dark=dark)
    assert page.errors == []
    assert page.evaluate("document.querySelector('main > section').id") == "verdict"
    assert page.evaluate(f"{TOP.format('.warnings')} > {TOP.format('#verdict')}"), "what to do comes before what to mind"
    assert page.evaluate(OVERFLOW) == 0
    assert page.evaluate(STICKING_OUT) == []
    assert [u for u in page.requests if not u.startswith(("file:", "data:"))] == []
    assert sum(u.startswith("file:") for u in page.requests) == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_every_figure_is_drawn_with_its_points_and_fits(page: Page, demo: Path, width: int):
    look(page, demo, width)
    drawn = page.evaluate(DRAWN)
    assert set(FIGURES) <= set(drawn)
    for name, (is_plot, has_svg, marks, fits) in drawn.items():
        assert is_plot and has_svg and fits, name
        assert marks >= 2, name


def test_the_real_scale_draws_too(page: Page, tmp_path: Path):
    report = make_report(tmp_path, REAL, 1.2e20)
    look(page, report, 1280)
    assert page.errors == []
    assert all(v[2] >= 2 for v in page.evaluate(DRAWN).values())
    ticks = page.evaluate("Array.from(document.querySelectorAll('[data-figure=isoflop] .xtick text'), t => t.textContent)")
    assert any(t.endswith("M") for t in ticks) and not any("e+" in t for t in ticks)


def test_the_theme_follows_the_system_and_the_button_and_figures_follow(page: Page, demo: Path):
    paper = "getComputedStyle(document.body).backgroundColor"
    line = "document.querySelector('[data-figure=frontier] .js-line').style.stroke"
    look(page, demo, 1280)
    light = (page.evaluate(paper), page.evaluate(line))
    page.evaluate("document.getElementById('toggle').click()")
    page.wait(f"{line} !== '{light[1]}'")
    dark = (page.evaluate(paper), page.evaluate(line))
    assert light[0] != dark[0]
    look(page, demo, 1280, dark=True)
    assert (page.evaluate(paper), page.evaluate(line)) == dark
    assert page.errors == []


def test_runs_can_be_filtered_and_sorted(page: Page, demo: Path):
    look(page, demo, 1280)
    rows = "document.querySelectorAll('#runs-table tbody tr').length"
    total = page.evaluate("JSON.parse(document.getElementById('data-runs').textContent).length")
    assert page.evaluate(rows) == min(50, total)
    page.evaluate("document.getElementById('more').click()")
    assert page.evaluate(rows) == total
    page.evaluate("(f => { f.value = 'weight_decay'; f.dispatchEvent(new Event('input')); })(document.getElementById('filter'))")
    assert 0 < page.evaluate(rows) < total
    page.evaluate("(f => { f.value = ''; f.dispatchEvent(new Event('input')); })(document.getElementById('filter'))")
    head = "Array.from(document.querySelectorAll('#runs-table th button')).find(b => b.textContent === 'Loss')"
    column = "Array.from(document.querySelectorAll('#runs-table tbody tr td:nth-child(2)'), c => Number(c.textContent))"
    page.evaluate(f"{head}.click()")
    values = page.evaluate(column)
    assert values == sorted(values) and len(set(values)) > 10
    page.evaluate(f"{head}.click()")
    values = page.evaluate(column)
    assert values == sorted(values, reverse=True)


def test_a_click_on_a_point_finds_the_run_in_the_table(page: Page, demo: Path):
    look(page, demo, 1280)
    point = page.evaluate(
        """(() => { const d = document.querySelector('[data-figure=isoflop]');
        d.scrollIntoView({block: 'center', behavior: 'instant'});
        const p = d.querySelector('.scatterlayer .points path').getBoundingClientRect();
        return [p.x + p.width / 2, p.y + p.height / 2]; })()"""
    )

    def is_labelled() -> bool:
        page.mouse("mouseMoved", *point)
        return page.evaluate("Boolean(document.querySelector('[data-figure=isoflop] .hoverlayer text'))")

    wait_for(is_labelled)
    shown = page.evaluate("document.querySelector('[data-figure=isoflop] .hoverlayer').textContent")
    page.mouse("mousePressed", *point, clicks=1)
    page.mouse("mouseReleased", *point, clicks=1)
    page.wait("document.getElementById('filter').value !== ''")
    found = page.evaluate("document.getElementById('filter').value")
    assert found in shown
    assert page.evaluate("document.querySelectorAll('#runs-table tbody tr').length") == 1
    assert page.errors == []


def test_paper_is_light_and_fits(page: Page, demo: Path, tmp_path: Path):
    look(page, demo, 1280, dark=True)
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert page.errors == []
