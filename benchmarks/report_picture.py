"""The README's picture: the page of a report, one latent open, as headless Chromium draws it.

python -m benchmarks.report_picture runs/demo_batchtopk/report.html --latent 17 --out docs/images/report.png
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--latent", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/images/report.png"))
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--width", type=int, default=1360)
    parser.add_argument("--height", type=int, default=860)
    given = parser.parse_args()
    from playwright.sync_api import sync_playwright

    given.out.parent.mkdir(parents=True, exist_ok=True)
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        size = {"width": given.width, "height": given.height}
        tab = browser.new_page(viewport=size, color_scheme=given.scheme)
        tab.goto(f"{given.page.resolve().as_uri()}#latent-{given.latent}")
        tab.wait_for_selector(f"#latent h2:text-is('Latent {given.latent}')")
        tab.wait_for_timeout(200)
        tab.screenshot(path=given.out)
        browser.close()


if __name__ == "__main__":
    main()
