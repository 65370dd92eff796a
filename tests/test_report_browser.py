"""The page of a report in headless Chromium: it loads, sorts, filters and opens latents; hostile texts are inert."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fork_kit import LIMIT

from sae_granary import train_sae
from sae_granary.analyze.encoding.encode import encode_cache
from sae_granary.analyze.latents.stats import LatentStats, find_stats
from sae_granary.analyze.report.report import report_comparison, report_run
from sae_granary.analyze.source import Source, open_source

D_SAE = 300  # several blobs
HOSTILE = [
    "</script><script>window.hurt = 1</script>",
    "<img src=x onerror='window.hurt = 2'>",
    "\"'><b onmouseover=alert(1)>bold</b>",
    "\u202egnp.exe",
    "\u05e9\u05dc\u05d5\u05dd",
    "\x1b[31mred\x00",
    "&lt;&#60;",
    "{{ 7 * 7 }}",
]
WORDS = [f"word{i}" if i % 3 else HOSTILE[i // 3 % len(HOSTILE)] for i in range(130)]
SOURCE = "<i>so\"urce</i>'\u202e"
SETTINGS = {"type": "topk", "k": 4, "steps": 8, "batch_size": 128, "log_every": 2}


class Made:
    """A run, its page, a comparison page, and what they are made from; made once."""

    run: Path
    page: Path
    comparison: Path
    source: Source
    stats: LatentStats


@pytest.fixture
def made(make_cache, tmp_path: Path) -> type[Made]:
    if not hasattr(Made, "run"):
        cache = str(make_cache(n_docs=40, vocabulary=WORDS, source=SOURCE))
        runs = [
            train_sae(cache=cache, name=name, d_sae=d_sae, runs_dir=str(tmp_path), **SETTINGS).folder
            for name, d_sae in (("<b>run&amp;'", D_SAE), ("other", 32))
        ]
        Made.run, Made.page, Made.comparison = runs[0], runs[0] / "report.html", tmp_path / "report.html"
        Made.source = open_source(Made.run, device="cpu")
        codes = encode_cache(Made.source, Made.source.place / "codes")
        Made.stats = find_stats(Made.source, lambda: codes)
        report_run(Made.run, Made.page, Made.stats, Made.source, codes)
        report_comparison(runs, Made.comparison, "</title><i>both")
    return Made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("needs Chromium and playwright: pip install playwright")
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"], timeout=1000 * LIMIT
        )
        yield opened
        opened.close()


@pytest.fixture
def tab(browser) -> Iterator[Any]:
    """A tab that fails the test for any message in its console, any error and any request but for the page itself."""
    context = browser.new_context(viewport={"width": 1300, "height": 900}, color_scheme="light")
    context.set_default_timeout(1000 * LIMIT)
    opened, heard = context.new_page(), []
    opened.on("console", lambda message: heard.append(f"console: {message.text}"))
    opened.on("pageerror", lambda error: heard.append(f"error: {error}"))
    opened.on("request", lambda request: heard.append(request.url) if not request.is_navigation_request() else None)
    yield opened
    context.close()
    assert heard == []


def open_page(tab: Any, path: Path, address: str = "") -> None:
    tab.goto(path.as_uri() + address)
    tab.wait_for_selector(".row")


def shown(tab: Any, n: int = 10) -> list[int]:
    """The latents at the top of the table."""
    found: list[int] = tab.eval_on_selector_all(".row", "rows => rows.map(row => Number(row.dataset.latent))")
    return found[:n]


def drawn(tab: Any, selector: str, n: int) -> None:
    """Wait for so many: plots are drawn once their width is known."""
    tab.wait_for_function("([selector, n]) => document.querySelectorAll(selector).length === n", arg=[selector, n])


def heading(tab: Any, latent: int) -> None:
    tab.wait_for_selector(f"#latent h2:text-is('Latent {latent}')")


def by_density(stats: LatentStats) -> list[int]:
    active = np.flatnonzero(stats.fired)
    density = stats.density[active].astype(np.float32)
    return active[np.lexsort((active, -density))].tolist()


def test_a_run_is_shown_with_numbers_plots_and_settings(tab, made) -> None:
    open_page(tab, made.page)
    assert tab.text_content("h1") == made.run.name
    names, values = (tab.locator(f"#tiles {tag}").all_text_contents() for tag in ("dt", "dd"))
    tiles = dict(zip(names, values, strict=True))
    assert (tiles["latents"], tiles["k"]) == ("300", "4")
    assert tiles["silent here"] == str(int((made.stats.fired == 0).sum()))
    captions = tab.locator("#plots figcaption b").all_text_contents()
    assert captions == ["Loss", "L0", "FVU", "Dead latents", "Density of latents"]
    drawn(tab, "#plots path.curve", 4)
    tab.click("#settings summary")
    assert tab.locator("#settings dt", has_text="batch_size").is_visible()


def test_latents_are_sorted_by_any_column(tab, made) -> None:
    open_page(tab, made.page)
    tab.click("#columns [data-key=density] button")
    expected = by_density(made.stats)
    assert shown(tab) == expected[:10]
    assert tab.get_attribute("#columns [data-key=density]", "aria-sort") == "descending"
    tab.click("#columns [data-key=number] button")
    assert shown(tab) == sorted(expected)[:10]
    tab.click("#columns [data-key=number] button")
    assert shown(tab) == sorted(expected)[: -10 - 1 : -1]
    tab.click("#columns [data-key=label] button")
    names = [name.lower() for name in tab.locator(".row .labels b").all_text_contents()[:10]]
    assert names == sorted(names)


def test_latents_are_found_by_token_and_by_number(tab, made) -> None:
    open_page(tab, made.page)
    tab.fill("#search", "word17")
    found = shown(tab, 1000)
    assert found
    assert tab.text_content("#count") == str(len(found))
    for text in tab.locator(".row .labels").all_text_contents():
        assert "word17" in text
    tab.fill("#search", "<IMG")
    assert all("<img src=x" in text for text in tab.locator(".row .labels").all_text_contents())
    assert shown(tab)
    tab.fill("#search", str(by_density(made.stats)[0]))
    assert by_density(made.stats)[0] in shown(tab)
    tab.fill("#search", "no such token")
    assert (shown(tab), tab.text_content("#count")) == ([], "0")
    tab.fill("#search", "")
    tab.select_option("#which", "silent")
    assert shown(tab) == np.flatnonzero(made.stats.fired == 0)[:10].tolist()


def test_a_click_opens_a_latent_with_its_examples(tab, made) -> None:
    open_page(tab, made.page)
    tab.click("#columns [data-key=density] button")
    latent = by_density(made.stats)[2]
    tab.click(f".row[data-latent='{latent}']")
    heading(tab, latent)
    assert tab.evaluate("location.hash") == f"#latent-{latent}"
    rows = made.stats.example_rows[latent]
    texts = tab.locator(".examples").first.locator(".text").all_text_contents()
    assert len(texts) == (rows >= 0).sum()
    context = made.source.cache.context(int(rows[0]))
    words = [repr(word)[1:-1] if "\x1b" in word or "\u202e" in word else word for word in context.tokens]
    assert texts[0].split() == " ".join(words).split()
    own = tab.locator(".examples .text").first.locator("mark.own")
    assert own.text_content() == words[context.index]
    assert float(own.get_attribute("title")) == pytest.approx(made.stats.example_values[latent, 0], rel=0.01)
    neighbor = tab.locator(".side a").first
    assert neighbor.text_content() == str(made.stats.neighbors[latent, 0])
    neighbor.click()
    heading(tab, int(made.stats.neighbors[latent, 0]))


def test_everything_is_reached_by_the_keyboard(tab, made) -> None:
    open_page(tab, made.page)
    tab.click("#columns [data-key=density] button")
    first, second, third = by_density(made.stats)[:3]
    tab.keyboard.press("/")
    assert tab.evaluate("document.activeElement.id") == "search"
    tab.keyboard.press("Escape")
    assert tab.evaluate("document.activeElement.id") == "grid"
    for key in ("Home", "ArrowDown", "Enter"):
        tab.keyboard.press(key)
    heading(tab, second)
    tab.keyboard.press("j")
    heading(tab, third)
    tab.keyboard.press("k")
    tab.keyboard.press("k")
    heading(tab, first)
    tab.focus("#grid")
    tab.keyboard.press("End")
    tab.wait_for_selector(f".row.cursor[data-latent='{by_density(made.stats)[-1]}']")
    tab.keyboard.press("/")
    tab.keyboard.type("word")
    tab.keyboard.press("Enter")
    heading(tab, shown(tab)[0])


def test_the_address_of_a_latent_opens_it(tab, made) -> None:
    latent = by_density(made.stats)[20]
    open_page(tab, made.page, f"#latent-{latent}")
    heading(tab, latent)
    assert tab.locator(f".row.open[data-latent='{latent}']").is_visible()


def test_hostile_texts_stay_texts(tab, made) -> None:
    open_page(tab, made.page)
    seen = ""
    for latent in by_density(made.stats)[:12]:
        tab.evaluate(f"openLatent({latent})")
        heading(tab, latent)
        seen += tab.text_content("#latent")
        assert tab.locator("#latent :is(img, b[onmouseover], i, script)").count() == 0
    for text in ("</script><script>window.hurt = 1</script>", "<img src=x onerror", "{{ 7 * 7 }}", "&lt;&#60;"):
        assert text in seen
    assert "\\x1b[31mred\\x00" in seen
    assert "<i>so\"urce</i>'\\u202e" in seen
    assert not re.search("[\x00-\x08\x1b\u202e]", seen)
    assert tab.evaluate("window.hurt") is None
    assert tab.locator("h1 b").count() == 0
    assert tab.title() == f"{made.run.name} - SAE report"


def test_light_dark_and_phone(tab, made) -> None:
    open_page(tab, made.page)
    color = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(color)
    tab.emulate_media(color_scheme="dark")
    dark = tab.evaluate(color)
    assert light != dark
    tab.click("#theme")
    assert (tab.evaluate(color), tab.text_content("#theme")) == (light, "Theme: light")
    tab.set_viewport_size({"width": 390, "height": 800})
    tab.reload()
    tab.wait_for_selector(".row")
    assert tab.evaluate(color) == light  # the choice is kept
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert not tab.locator("#latent").is_visible()
    tab.locator(".row").nth(2).click()
    tab.wait_for_selector("#latent h2")
    assert tab.evaluate("document.getElementById('latent').scrollWidth") <= 390
    tab.click("#close")
    assert not tab.locator("#latent").is_visible()


def test_runs_are_compared(tab, made) -> None:
    tab.goto(made.comparison.as_uri())
    tab.wait_for_selector("#runs tbody tr")
    assert tab.text_content("h1") == "</title><i>both"
    assert tab.locator("#plots figcaption b").all_text_contents() == ["Pareto", "Loss", "L0", "FVU", "Dead latents"]
    drawn(tab, "#plots circle.dot", 2)
    names = tab.locator("#runs tbody td:first-child")
    assert names.all_text_contents() == [made.run.name, "other"]
    tab.click("#runs th:has-text('latents') button")
    assert names.all_text_contents() == ["other", made.run.name]
    assert "model.d_sae" in tab.text_content("#settings details")
    tab.click("#runs a")
    tab.wait_for_selector(".row")
    assert tab.text_content("h1") == made.run.name


def test_ticks_that_are_close_have_enough_digits(tab, made) -> None:
    tab.goto(made.comparison.as_uri())
    drawn = """(x) => {
        const image = svg("svg", {});
        axes(image, 370, 250, x, [0, 0.5]);
        return [...image.querySelectorAll("text")].map((text) => text.textContent);
    }"""
    up = ["0", "0.1", "0.2", "0.3", "0.4", "0.5"]
    assert tab.evaluate(drawn, [31.93, 32]) == [*up, "31.94", "31.96", "31.98", "32"]
    assert tab.evaluate(drawn, [9.5, 15]) == [*up, "10", "12", "14"]
    assert tab.evaluate(drawn, [1, 1]) == [*up, "1"]


def test_the_style_and_code_name_no_other_place(made) -> None:
    page = made.page.read_text(encoding="utf-8")
    facts = re.search(r'id="facts">(.*?)</script>', page)[1]
    assert json.loads(facts)["title"] == made.run.name
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}
