"""A picture of a report: ``python -m benchmarks.report_screenshot RESULTS_DIR OUT.png``.

Needs a Chromium on the machine (Debian's package ``chromium``) and playwright (``dev`` extra).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fxquant.evaluation.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """The path of an installed Chromium, None where there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def screenshot(
    browser: Any,
    page_file: Path,
    out: Path,
    *,
    width: int = 1240,
    height: int | None = None,
    theme: str = "light",
    scale: float = 1.0,
) -> None:
    """Write ``out``: the first ``height`` pixels of the page, or all of it.

    ``browser``: playwright's. Raises its TimeoutError if no chart is drawn.
    """
    page = browser.new_page(
        viewport={"width": width, "height": height or 900},
        color_scheme=theme,
        device_scale_factor=scale,
    )
    page.goto(page_file.resolve().as_uri())
    page.wait_for_selector("[data-chart] svg", state="attached")
    page.evaluate("document.fonts.ready")
    page.wait_for_timeout(300)  # charts follow their width once more when fonts have come
    page.screenshot(path=out, full_page=height is None)
    page.close()


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1240)
    parser.add_argument("--height", type=int, help="pixels from the top (the whole page)")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--scale", type=float, default=1.0, help="device pixels a CSS pixel (1)")
    options = parser.parse_args()
    path = find_browser()
    if path is None:
        parser.error(f"no browser: looked for {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        page = Path(folder) / "report.html"
        write_report(options.results, page)
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        screenshot(
            browser,
            page,
            options.out,
            width=options.width,
            height=options.height,
            theme=options.theme,
            scale=options.scale,
        )
        browser.close()
    print(f"{options.out}: {options.out.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
