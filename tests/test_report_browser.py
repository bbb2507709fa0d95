"""The report in a real headless Chromium, from file://."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report_screenshot import BROWSERS, find_browser, screenshot
from fxquant.evaluation.report import write_report
from tests.report_folder import BLOCKS, GROUPS, KINDS, LADDER, sites, write_folder

pytestmark = [
    pytest.mark.needs_program(find_spec("playwright"), "playwright, of the dev extra"),
    pytest.mark.needs_program(find_browser(), f"a browser: looked for {', '.join(BROWSERS)}"),
]
Page = Any  # playwright's, which may not be there


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def report(folder: Path) -> Path:
    write_report(folder, folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright import sync_api

    with sync_api.sync_playwright() as play:
        # Root in a container has no user namespaces for the sandbox; the page is our own.
        found = play.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        yield found
        found.close()


def open_page(browser: Any, report: Path, **options: Any) -> Page:
    """A page that fails the test at its end if anything was said, thrown or fetched."""
    page = browser.new_page(**options)
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith(("file:", "data:"))
            else page.problems.append(request.url)
        ),
    )
    page.on("dialog", lambda dialog: page.problems.append(dialog.message))
    page.goto(report.as_uri())
    if options.get("java_script_enabled", True):
        page.wait_for_selector("[data-chart] svg", state="attached")
    return page


@pytest.fixture(scope="module")
def shared(browser: Any, report: Path) -> Iterator[Page]:
    yield (opened := open_page(browser, report, viewport={"width": 1240, "height": 900}))
    opened.close()


@pytest.fixture
def page(shared: Page) -> Iterator[Page]:
    """One page for all tests that leave it as they found it."""
    yield shared
    assert shared.problems == []


@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (768, "dark"), (1240, "dark")])
def test_every_size_and_theme_without_a_word_on_the_console(
    browser: Any, report: Path, width: int, scheme: str
) -> None:
    page = open_page(browser, report, viewport={"width": width, "height": 800}, color_scheme=scheme)
    for chart in page.query_selector_all("[data-chart]"):
        if chart.is_visible():
            assert chart.query_selector("svg") is not None
    for tab in page.query_selector_all("[role=tab]"):
        if tab.is_visible():
            tab.click()
            page.wait_for_timeout(20)
    # Nothing sticks out: tables scroll in their own box.
    assert page.evaluate("document.documentElement.scrollWidth") == width
    small = "[...document.querySelectorAll('p, td, button, summary')].filter(e => e.offsetParent &&"
    assert page.evaluate(f"{small} parseFloat(getComputedStyle(e).fontSize) < 11.5).length") == 0
    assert page.problems == []
    page.close()


def test_ladder_has_a_dot_a_scheme_in_the_order_of_its_loss(page: Page) -> None:
    dots = page.query_selector_all("#ladder-panel-0 [aria-label=dot] circle")
    x = [float(dot.get_attribute("cx")) for dot in dots]
    assert len(x) == len(LADDER)
    deltas = list(LADDER.values())
    assert sorted(range(len(x)), key=x.__getitem__) == sorted(range(len(x)), key=deltas.__getitem__)
    # One standard error bar for each scheme but the float model.
    bars = page.query_selector_all("#ladder-panel-0 .standard-error path")
    assert len(bars) == len(LADDER) - 1
    assert all(bar.bounding_box()["width"] > 0 for bar in bars)


def test_ladder_over_seeds_has_their_range_and_names_failures(page: Page) -> None:
    page.click("#ladder-panel-tab-2")
    page.wait_for_selector("#ladder-panel-2 svg")
    static = sum("static" in scheme for scheme in LADDER)
    assert len(page.query_selector_all("#ladder-panel-2 .seed-range path")) == static
    assert len(page.query_selector_all("#ladder-panel-2 [aria-label=tick] line")) == 3 * static
    assert "failed" in page.text_content("#ladder-panel-2 svg")
    assert "group 128 does not divide" in page.inner_text("#ladder-panel-2 table")
    page.click("#ladder-panel-tab-0")


def test_ladder_scale_and_order_can_be_chosen(page: Page) -> None:
    def centres() -> list[float]:
        dots = page.query_selector_all("#ladder-panel-0 [aria-label=dot] circle")
        return [float(dot.get_attribute("cx")) for dot in dots]

    assert page.is_checked("[name=ladder-scale-0][value=symlog]")
    before = centres()
    page.check("[name=ladder-scale-0][value=linear]", force=True)
    linear = centres()
    assert linear != before
    # Linear means linear: distances from the float model's dot are as the losses.
    zero, *rest = linear
    (_, *deltas) = LADDER.values()
    ratios = [(x - zero) / delta for x, delta in zip(rest, deltas, strict=True)]
    assert ratios == pytest.approx([ratios[-1]] * len(ratios), rel=1e-3)
    page.check("[name=ladder-order-0][value=delta]", force=True)
    dots = page.query_selector_all("#ladder-panel-0 [aria-label=dot] circle")
    by_y = sorted(dots, key=lambda dot: float(dot.get_attribute("cy")))
    x = [float(dot.get_attribute("cx")) for dot in by_y]
    assert x == sorted(x)
    page.check("[name=ladder-order-0][value=run]", force=True)
    page.check("[name=ladder-scale-0][value=symlog]", force=True)
    assert centres() == before


def numbers(page: Page, table: str, column: int) -> list[float]:
    cells = page.query_selector_all(f"{table} tbody tr:not([hidden]) > :nth-child({column})")
    return [float(cell.get_attribute("data-value")) for cell in cells]


def test_tables_sort_by_number_and_back(page: Page) -> None:
    heading = "#explain-0-sites thead th:nth-child(5)"
    assert page.inner_text(heading) == "in order Δ"
    original = numbers(page, "#explain-0-sites", 5)
    assert len(original) == len(sites())
    for direction in ("descending", "ascending"):
        page.click(f"{heading} button")
        assert page.get_attribute(heading, "aria-sort") == direction
        expected = sorted(original, reverse=direction == "descending")
        assert numbers(page, "#explain-0-sites", 5) == expected != original
    page.focus(f"{heading} button")
    page.keyboard.press("Enter")
    assert page.get_attribute(heading, "aria-sort") == "none"
    assert numbers(page, "#explain-0-sites", 5) == original


def test_values_that_are_not_there_sort_last(page: Page) -> None:
    page.click("#explain-table-0-tabs >> text=Validation")
    headings = page.query_selector_all("#explain-0-validation thead th")
    column = [heading.inner_text() for heading in headings].index("error")
    for _ in range(2):
        headings[column].query_selector("button").click()
        values = page.eval_on_selector_all(
            f"#explain-0-validation tbody tr > :nth-child({column + 1})",
            "cells => cells.map(cell => cell.dataset.value)",
        )
        assert values == ["0.06", ""]
    page.click("#explain-table-0-tab-0")


def test_tables_filter_by_words(page: Page) -> None:
    box = "input[aria-controls=explain-0-sites]"
    page.fill(box, "down_proj layers.1")
    rows = page.query_selector_all("#explain-0-sites tbody tr:not([hidden])")
    expected = [p for p, kind, _ in sites() if kind == "down_proj" and "layers.1" in p]
    assert [row.query_selector("td").inner_text() for row in rows] == expected
    count = page.inner_text(f".table-tools:has({box}) .count")
    assert count == f"{len(expected)} of {len(sites())} rows"
    page.fill(box, "nothing has this")
    assert page.query_selector_all("#explain-0-sites tbody tr:not([hidden])") == []
    page.fill(box, "")
    assert len(numbers(page, "#explain-0-sites", 5)) == len(sites())


HEATMAP = "[data-chart=heatmap]"


def test_heatmap_has_a_cell_a_site_and_marks_the_worst(page: Page) -> None:
    cells = page.query_selector_all(f"{HEATMAP} .cells rect")
    assert len(cells) == len(sites()) == BLOCKS * len(KINDS)
    fills = [cell.get_attribute("fill") for cell in cells]
    worst = max(fills, key=lambda fill: float(re.findall(r"([\d.]+)%", fill)[0]))
    assert sites()[fills.index(worst)] == ("model.layers.2.mlp.down_proj", "down_proj", 2)
    assert "warm" in worst
    page.select_option("[data-figure]", "sqnr_db")
    other = [c.get_attribute("fill") for c in page.query_selector_all(f"{HEATMAP} .cells rect")]
    assert other != fills
    assert "dB" in page.inner_text(".legend")
    page.select_option("[data-figure]", "in_order")


def test_heatmap_is_read_by_pointer_and_by_arrow_keys(page: Page, folder: Path) -> None:
    explained = json.loads((folder / "explanation.json").read_text())["sites"]
    page.locator(HEATMAP).scroll_into_view_if_needed()
    page.query_selector_all(f"{HEATMAP} .cells rect")[2 * len(KINDS) + 6].hover()
    assert "model.layers.2.mlp.down_proj" in page.text_content(f"{HEATMAP} [aria-label=tip]")
    assert page.inner_text(".heat .readout") == "model.layers.2.mlp.down_proj: in order Δ +1.9000"
    page.mouse.move(0, 0)
    page.focus(HEATMAP)
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    site = next(s for s in explained if s["site"] == "model.layers.1.self_attn.k_proj")
    said = page.inner_text(".heat .readout").replace("\N{MINUS SIGN}", "-")
    assert said == f"{site['site']}: in order Δ {site['in_order']:+.4f}"
    assert page.query_selector(f"{HEATMAP} .cursor rect") is not None


def test_tips_can_be_read_in_the_dark(browser: Any, report: Path) -> None:
    page = open_page(browser, report, color_scheme="dark", viewport={"width": 900, "height": 900})
    for chart in ("ladder", "causes", "recovery", "heatmap", "histogram"):
        page.locator(f"[data-chart={chart}] svg").first.hover()
        tip = f"[data-chart={chart}] [aria-label=tip]"
        page.wait_for_selector(f"{tip} path", state="attached")
        colours = page.evaluate(
            "tip => [getComputedStyle(document.querySelector(`${tip} path`)).fill,"
            " getComputedStyle(document.querySelector(`${tip} text`)).fill]",
            tip,
        )
        ground, ink = (sum(map(float, re.findall(r"[\d.]+", c)[:3])) / 3 for c in colours)
        assert ground < 60 < 180 < ink, (chart, colours)
    assert page.problems == []
    page.close()


def test_histogram_draws_the_range_and_what_it_clips(page: Page, folder: Path) -> None:
    rows = json.loads((folder / "inspect.json").read_text())["sites"]
    sites_read = [record for row in rows for record in row["records"]]
    chart = "[data-chart=histogram]"
    page.click("[data-most]")
    most = max(range(len(sites_read)), key=lambda i: sites_read[i]["clipped"])
    assert page.input_value("[data-site]") == str(most)
    site = sites_read[most]
    bars = page.query_selector_all(f"{chart} [aria-label=rect]:not(.clipped) rect")
    assert len(bars) == sum(count > 0 for count in site["histogram"])
    # The rules stand where the range is: the axis is linear from seen_low to seen_high.
    lines = page.query_selector_all(f"{chart} .range line")
    drawn = [float(line.get_attribute("x1")) for line in lines]
    left, right = 46.0, float(page.get_attribute(f"{chart} svg", "width")) - 14
    span = site["seen_high"] - site["seen_low"]
    expected = [
        left + (value - site["seen_low"]) / span * (right - left)
        for value in (site["low"], site["high"])
    ]
    assert drawn == pytest.approx(expected, abs=1)
    assert len(page.query_selector_all(f"{chart} .clipped rect")) == 2
    assert f"{site['clipped']:.4%} outside" in page.inner_text("#activations .readout")
    page.click(".bins summary")
    assert len(page.query_selector_all(".bins tbody tr")) == len(site["histogram"])
    last = page.inner_text(".bins tbody tr:last-child").split()
    assert last == ["13.56", "14", f"{site['histogram'][-1]:,}"]
    page.click("[data-step='1']")
    assert page.input_value("[data-site]") == str((most + 1) % len(sites_read))


def test_causes_and_recovery_are_drawn(page: Page) -> None:
    bars = page.query_selector_all("[data-chart=causes] [aria-label=bar] rect")
    assert len(bars) == 3 * (1 + len(set(GROUPS.values())))
    assert len(page.query_selector_all("[data-chart=recovery] circle")) == 8


def test_diffs_open_from_the_keyboard(page: Page) -> None:
    details = page.query_selector_all(".history details")
    assert len(details) == 4
    assert len(page.query_selector_all(".history li")) == 5
    page.focus(".history details summary")
    page.keyboard.press("Enter")
    assert details[0].get_attribute("open") is not None
    assert "quantize(x, scale" in page.inner_text(".history .diff .added")
    page.click("[data-open-all]")
    assert all(each.get_attribute("open") is not None for each in details)


def test_tabs_move_by_arrow_keys(page: Page) -> None:
    page.focus("#explain-table-0-tab-0")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "Kinds"
    assert page.is_visible("#explain-0-kinds")
    assert not page.is_visible("#explain-0-sites")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.get_attribute("#explain-table-0-tab-0", "tabindex") == "-1"
    assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    page.click("#explain-table-0-tab-0")


def luminance(page: Page) -> float:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


def test_theme_follows_the_system_until_the_button_says_otherwise(
    browser: Any, report: Path
) -> None:
    page = open_page(browser, report, color_scheme="dark")
    assert luminance(page) < 60
    for expected, bright in (("light", True), ("dark", False), ("as the system", False)):
        page.focus("#theme")
        page.keyboard.press("Space")
        assert page.get_attribute("#theme", "aria-label") == f"Colour theme: {expected}"
        assert (luminance(page) > 200) is bright
    page.click("#theme")
    page.reload()
    assert luminance(page) > 200
    assert page.problems == []
    page.close()


def test_focus_is_visible_and_begins_with_the_skip_link(page: Page) -> None:
    page.reload()
    seen = []
    for _ in range(14):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                "(e => [e.className || e.tagName, getComputedStyle(e).outlineStyle,"
                " getComputedStyle(e.parentElement).outlineStyle])(document.activeElement)"
            )
        )
    assert seen[0][0] == "skip"
    # A radio button is drawn by its label.
    assert all("solid" in (own, parents) for _, own, parents in seen), seen


def test_less_motion_where_it_is_asked_for(browser: Any, report: Path) -> None:
    durations = {}
    page = open_page(browser, report)
    for wish in ("reduce", "no-preference"):
        page.emulate_media(reduced_motion=wish)
        durations[wish] = page.evaluate(
            "[getComputedStyle(document.documentElement).scrollBehavior,"
            " getComputedStyle(document.querySelector('#theme')).transitionDuration]"
        )
    page.close()
    assert durations["reduce"] == ["auto", "0s"]
    assert durations["no-preference"][0] == "smooth"


def test_without_scripts_every_table_is_there(browser: Any, report: Path) -> None:
    page = open_page(browser, report, java_script_enabled=False)
    for table in ("#explain-0-sites", "#explain-0-worst_channels", "#ladder-panel-2 table"):
        assert page.is_visible(table)
    page.close()


def test_on_a_phone_the_heatmap_stands_upright(browser: Any, report: Path) -> None:
    page = open_page(browser, report, viewport={"width": 375, "height": 700}, has_touch=True)
    boxes = [cell.bounding_box() for cell in page.query_selector_all(f"{HEATMAP} .cells rect")]
    assert len(boxes) == len(sites())
    assert min(box["width"] for box in boxes) >= 24
    assert len({round(box["y"]) for box in boxes}) == BLOCKS
    page.locator(HEATMAP).scroll_into_view_if_needed()
    page.query_selector_all(f"{HEATMAP} .cells rect")[0].tap()
    assert "model.layers.0.self_attn.q_proj" in page.inner_text(".heat .readout")
    page.close()


LONG = "w8a8-static-asym:absmax+smooth(alpha=0.7,where=all)+split_outliers(threshold=4)"
OUTSIDE = """() => [...document.querySelectorAll('.chart svg')].flatMap((chart) => {
  const own = chart.closest('.chart').getBoundingClientRect();
  return [...chart.querySelectorAll('text')].filter((text) => {
    const box = text.getBoundingClientRect();
    return box.width > 0 && (box.left < own.left - 1 || box.right > own.right + 1);
  }).map((text) => text.textContent);
})"""


@pytest.mark.parametrize("width", [390, 700, 1280])
def test_no_label_leaves_its_chart_and_no_open_table_the_page(
    browser: Any, folder: Path, tmp_path: Path, width: int
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    results = tmp_path / "copy" / "results.json"
    data = json.loads(results.read_text())
    data["rows"].append({**data["rows"][-1], "scheme": LONG})
    data["rows"].append({**data["rows"][-1], "scheme": LONG.replace("=4", "=5")})
    results.write_text(json.dumps(data))
    write_report(tmp_path / "copy", tmp_path / "report.html")
    page = open_page(browser, tmp_path / "report.html", viewport={"width": width, "height": 900})
    assert page.evaluate(OUTSIDE) == []
    labels = page.locator("[data-chart=ladder] text").all_text_contents()
    cut = {label for label in labels if "\N{HORIZONTAL ELLIPSIS}" in label}
    assert len(cut) == 2
    assert all(label.startswith("w8a8-static-") for label in cut)
    whole = page.locator(".ladder-table tbody th").filter(has_text=LONG)
    assert whole.evaluate("cell => cell.scrollWidth <= cell.clientWidth + 1")
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_a_screenshot_has_the_size_asked_for(browser: Any, report: Path, tmp_path: Path) -> None:
    screenshot(browser, report, tmp_path / "report.png", height=700)
    content = (tmp_path / "report.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20]) == 1240
    assert int.from_bytes(content[20:24]) == 700
