"""A report of 50,000 latents: its size, first paint, and how long a latent takes to open, in headless Chromium.

    python -m benchmarks.report --cache cache/demo_l3

An SAE of random weights (topk, k = 64) encodes the cache; its statistics (10 strongest and 5 further examples,
neighbors and histogram of each latent) become the page. First paint is Chromium's `first-contentful-paint`, opening is
measured by `performance.now()` from the call to the frame after the latent was drawn. Needs Chromium and the extra
`browser`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe
from sae_granary import open_cache, sae_core
from sae_granary.analyze.encoding.encode import encode_cache
from sae_granary.analyze.latents.stats import find_stats
from sae_granary.analyze.report.report import report_run
from sae_granary.analyze.source import open_source

N_OPENED = 40
OPEN = """async (latents) => {
    const taken = [];
    for (const latent of latents) {
        const start = performance.now();
        await openLatent(latent);
        await new Promise(requestAnimationFrame);
        taken.push(performance.now() - start);
    }
    return taken;
}"""
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("cache/demo_l3"))
    parser.add_argument("--latents", type=int, default=50_000)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--keep", type=Path, help="keep the page in this file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        built = build(Path(folder) / "sae", given.cache, given.latents, given.k, page)
        measured = measure(page, given.latents)
        if given.keep:
            shutil.copy(page, given.keep)
    print(json.dumps({"machine": describe(), "latents": given.latents, **built, **measured}))


def build(folder: Path, cache: Path, d_sae: int, k: int, page: Path) -> dict[str, float]:
    """Make an SAE, encode, and write the page; seconds of each step and the size."""
    source = open_source(random_sae(folder, cache, d_sae, k), cache)
    clock = [time.perf_counter()]
    codes = encode_cache(source, source.place / "codes")
    clock.append(time.perf_counter())
    stats = find_stats(source, lambda: codes)
    clock.append(time.perf_counter())
    report_run(folder, page, stats, source, codes)
    clock.append(time.perf_counter())
    seconds = zip(("encode_s", "stats_s", "page_s"), np.diff(clock).round(1).tolist(), strict=True)
    examples = int((stats.example_rows >= 0).sum() + (stats.quantile_rows >= 0).sum())
    sizes = {"active": int((stats.fired > 0).sum()), "examples": examples}
    return {**dict(seconds), **sizes, "megabytes": round(page.stat().st_size / 1e6, 1)}


def random_sae(folder: Path, cache: Path, d_sae: int, k: int) -> Path:
    """Save a topk SAE with random weights for the rows of a cache."""
    cls = sae_core.registry.get("topk")
    d_in = next(iter(open_cache(cache).hook_points.values())).d_in
    sae = cls(sae_core.make_config(cls, {"d_in": d_in, "d_sae": d_sae, "k": k}))
    sae.reset_weights(torch.Generator().manual_seed(0))
    sae_core.save(sae, folder)
    return folder


def measure(page: Path, d_sae: int) -> dict[str, Any]:
    """Milliseconds: first paint, and opening latents drawn at random."""
    from playwright.sync_api import sync_playwright

    chosen = np.random.default_rng(0).choice(d_sae, N_OPENED, replace=False).tolist()
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    paints = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for _ in range(3):
            tab = browser.new_page(viewport={"width": 1440, "height": 1000})
            tab.goto(page.as_uri())
            tab.wait_for_selector(".row")
            paints.append(tab.evaluate(PAINT))
        ready = tab.evaluate("performance.now()")
        taken = tab.evaluate(OPEN, chosen)
        browser.close()
    return {
        "first_paint_ms": [round(paint) for paint in paints],
        "table_ms_at_most": round(ready),
        "open_ms_median": round(float(np.median(taken)), 1),
        "open_ms_max": round(max(taken), 1),
    }


if __name__ == "__main__":
    main()
