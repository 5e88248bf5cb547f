"""The chat page in headless Chromium: typing and reading, stop, copy, regenerate, card, phone, both themes, hostile text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Page, find_chromium
from served import serving, slowed, wait_until, write_checkpoint

from nanochat_model.checkpoint import load_model, tokenizer_dir
from nanochat_model.conversations import render_prompt
from nanochat_model.engine import generate
from nanochat_model.tokenizer import Tokenizer
from nanoladder.serve.service import Service

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on the PATH (apt-get install chromium)")
NAME = "<b onclick=alert(1)>tiny</b>"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
OUTSIDE = """Array.from(document.querySelectorAll('header *, main *, aside *')).filter(e => e.checkVisibility() && !e.closest('pre')
  && !e.closest('.hidden') && (e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1))
  .map(e => e.outerHTML.slice(0, 80))"""
IDLE = "document.getElementById('stop').hidden && document.querySelectorAll('.streaming').length === 0"
LAST = "Array.from(document.querySelectorAll('.message.assistant .text')).at(-1)"
HOSTILE = "<img src=x onerror=alert(1)> **<script>alert(2)</script>** `<i>` \\n```\\n<b>code</b>\\n"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("page"), context=4096)


@pytest.fixture(scope="module")
def server(run_dir: Path) -> Iterator[tuple[str, Service]]:
    with serving(run_dir, max_rows=2, max_reply_tokens=4096, name=NAME) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    binary = find_chromium()
    assert binary is not None
    with Page(binary) as page:
        page.grant_clipboard()
        yield page


@pytest.fixture
def page(browser: Page, server: tuple[str, Service]) -> Iterator[Page]:
    """The page afresh; at the end no error and no request to anybody else."""
    browser.errors.clear()
    browser.requests.clear()
    browser.view(1280)
    browser.goto(server[0])
    yield browser
    assert browser.errors == []
    assert [u for u in browser.requests if not u.startswith((server[0], "data:"))] == []


def write(page: Page, text: str) -> None:
    page.evaluate("document.getElementById('input').focus()")
    page.type(text)
    page.press("Enter", 13)


def set_field(page: Page, name: str, value: str) -> None:
    page.evaluate(f"document.getElementById('{name}').value = '{value}'")


def engines_own(run_dir: Path, messages: list[dict[str, str]], seed: int, max_tokens: int) -> str:
    tokenizer = Tokenizer.load(tokenizer_dir(run_dir))
    settings = {"temperature": 0.6, "top_k": 50, "seed": seed, "max_tokens": max_tokens}
    steps = generate(load_model(run_dir), [render_prompt(messages, tokenizer)], **settings)
    return tokenizer.decode([s[0] for s in steps])


def squeezed(text: str) -> str:
    return "".join(text.split())


def test_one_types_and_reads_a_reply_and_goes_on(page: Page, run_dir: Path) -> None:
    """Lines and markers apart, what is seen is what the engine says to the same conversation."""
    set_field(page, "seed", "11")
    set_field(page, "max-tokens", "30")
    write(page, "hello there")
    page.wait(f"{IDLE} && document.querySelectorAll('.message').length === 2")
    first = engines_own(run_dir, [{"role": "user", "content": "hello there"}], 11, 30)
    assert page.evaluate("document.querySelector('.message.user .text').textContent") == "hello there"
    shown = squeezed(page.evaluate(f"{LAST}.textContent"))
    assert shown.replace("`", "").replace("*", "") == squeezed(first).replace("`", "").replace("*", "")
    assert "30 tokens" in page.evaluate("document.querySelector('.actions span').textContent")
    assert squeezed(first) in squeezed(page.evaluate("document.getElementById('status').textContent"))
    write(page, "and then")
    page.wait(f"{IDLE} && document.querySelectorAll('.message').length === 4")
    talk = [("user", "hello there"), ("assistant", first), ("user", "and then")]
    second = engines_own(run_dir, [{"role": r, "content": c} for r, c in talk], 11, 30)
    assert squeezed(page.evaluate(f"{LAST}.textContent")).replace("`", "") == squeezed(second).replace("`", "")


def test_copy_regenerate_and_new_chat(page: Page) -> None:
    set_field(page, "max-tokens", "20")
    write(page, "ab")
    page.wait(f"{IDLE} && document.querySelectorAll('.actions').length === 1")
    said = page.evaluate(f"{LAST}.textContent")
    page.evaluate("window.setTimeout = () => 0")  # which would take the word away again
    page.click(".copy")
    page.wait("document.querySelector('.copy').textContent === 'Copied'")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert squeezed(copied).replace("`", "").replace("*", "") == squeezed(said).replace("`", "").replace("*", "")
    page.click(".again")
    page.wait(f"{IDLE} && document.querySelectorAll('.message').length === 2 && {LAST}.textContent")
    assert page.evaluate(f"{LAST}.textContent") != said, "another seed"
    page.click("#new")
    assert page.evaluate("document.querySelectorAll('.message').length") == 0
    assert page.evaluate("document.activeElement.id") == "input"
    page.click(".examples button")
    page.wait(f"{IDLE} && document.querySelectorAll('.actions').length === 1")


@pytest.mark.parametrize("way", ["button", "escape", "new chat"])
def test_a_reply_can_be_stopped_and_its_row_is_free(page: Page, server: tuple[str, Service], way: str) -> None:
    set_field(page, "max-tokens", "4000")
    with slowed(server[1].worker, 0.02):
        write(page, "ab")
        page.wait(f"document.querySelector('.streaming') && {LAST}.textContent.length > 20")
        assert server[1].worker.status()["running"] == 1
        if way == "button":
            page.click("#stop")
        elif way == "escape":
            page.press("Escape", 27)
        else:
            page.click("#new")
        page.wait(IDLE)
        wait_until(lambda: server[1].worker.status()["running"] == 0)
    if way == "new chat":
        assert page.evaluate("document.querySelectorAll('.message').length") == 0
        return
    assert page.evaluate("document.querySelector('.actions span').textContent") == "stopped"
    set_field(page, "max-tokens", "5")
    write(page, "go on")
    page.wait(f"{IDLE} && document.querySelectorAll('.message').length === 4")
    assert page.evaluate("document.querySelectorAll('.error').length") == 0


def test_text_is_never_taken_for_html(page: Page) -> None:
    write(page, "<img src=x onerror=alert(1)><b>bold</b>")
    page.wait(f"{IDLE} && document.querySelectorAll('.message').length === 2")
    assert page.evaluate("document.querySelector('.message.user .text').innerHTML").startswith("&lt;img")
    assert page.evaluate("document.getElementById('name').textContent") == NAME
    page.click("#card-button")
    assert page.evaluate("document.querySelector('aside h2').textContent") == NAME
    found = page.evaluate(
        f"""import('./render.js').then(m => {{ const d = document.createElement('div'); m.render(d, "{HOSTILE}");
        return [d.querySelectorAll('img, script, b, i').length, d.textContent,
          Array.from(d.querySelectorAll('*'), e => e.tagName)]; }})"""
    )
    assert found[0] == 0 and "<img src=x onerror=alert(1)>" in found[1] and "<b>code</b>" in found[1]
    assert set(found[2]) == {"P", "STRONG", "CODE", "PRE"}


def rendered(page: Page, text: str, what: str) -> str:
    """What the page makes of a reply's text: its `what` (innerText, innerHTML)."""
    return page.evaluate(
        f"""import('./render.js').then(m => {{ const d = document.createElement('div'); m.render(d, '{text}');
        return d.{what}; }})"""
    )


def test_a_call_is_shown_as_a_sum(page: Page) -> None:
    text = "so <|python_start|>2*3<|python_end|><|output_start|>6<|output_end|>."
    assert rendered(page, text, "innerText") == "so 2*3 = 6."


def test_a_heading_is_bold_and_so_is_a_final_answer(page: Page) -> None:
    text = "# Ladders\\nThey #1 lean.\\n#### 55"
    assert rendered(page, text, "innerHTML") == "<p><strong>Ladders</strong></p><p>They #1 lean.</p><p><strong>55</strong></p>"


@pytest.mark.parametrize("width, dark", [(1280, False), (1280, True), (390, False), (390, True)])
def test_it_fits_any_width_and_theme(page: Page, width: int, dark: bool, tmp_path: Path) -> None:
    page.view(width, 800, dark=dark, phone=width < 600)
    set_field(page, "max-tokens", "60")
    write(page, "a" * 300 + " and words " * 20)
    page.wait(f"{IDLE} && document.querySelectorAll('.actions').length === 1")
    for step in ("", "#card-button", "aside .top button", "#settings summary"):
        if step:
            page.click(step)
        assert page.evaluate(OVERFLOW) == 0 and page.evaluate(OUTSIDE) == [], step
        if step == "#card-button":  # read to its end, it can still be closed
            page.evaluate("document.getElementById('card').scrollTo(0, 9999)")
            assert page.evaluate("document.querySelector('aside .top button').getBoundingClientRect().top >= 0")
    page.wait("(log => log.scrollHeight - log.scrollTop - log.clientHeight < 2)(document.getElementById('log'))")  # the end is seen
    box = "document.querySelector('.box').getBoundingClientRect()"
    assert page.evaluate(f"{box}.bottom <= innerHeight && {box}.width > innerWidth * 0.5")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(19, 22, 24)") == dark
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper


def test_every_control_has_a_name_and_can_be_reached(page: Page) -> None:
    nameless = """Array.from(document.querySelectorAll('button, input, textarea')).filter(e => !(e.ariaLabel || e.textContent.trim()
      || e.labels?.length)).map(e => e.outerHTML)"""
    assert page.evaluate(nameless) == []
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate("document.getElementById('send').disabled") is True


def test_without_a_server_it_says_so(browser: Page, run_dir: Path) -> None:
    with serving(run_dir, api_key="secret") as (url, _):
        browser.view(1280)
        browser.goto(url)
        assert "API key" in browser.evaluate("document.querySelector('.error').textContent")
        change = "(k => { k.value = '%s'; k.dispatchEvent(new Event('change')); })(document.getElementById('key'))"
        browser.evaluate("document.querySelector('.error').remove()")
        browser.evaluate(change % "wrong")
        browser.wait("document.querySelector('.error')")
        browser.evaluate(change % "secret")
        browser.wait("document.querySelector('.welcome')")
    write(browser, "hello")
    browser.wait("document.querySelector('.message .error')")
    assert browser.evaluate("document.querySelector('.message .error').textContent") == "The server cannot be reached."
    assert browser.evaluate("document.querySelector('.again').textContent") == "Try again"
