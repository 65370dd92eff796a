"""The page: one HTML file with style, code and data inside; it loads nothing from the network.

Data is JSON in which `<`, `>` and `&` are escaped, or base64; the code inserts texts by textContent only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_granary.common.errors import printable
from sae_granary.common.files import write_bytes

FOLDER = Path(__file__).parent
SCRIPTS = ("data.js", "charts.js", "overview.js", "table.js", "latent.js", "start.js")
ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def render(facts: Mapping[str, Any], blobs: Mapping[str, str] | None = None) -> str:
    """The page of facts (see `report.report_facts`) and of the latents' blobs (see `latent_data`)."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html").render(
        title=printable(str(facts["title"])),
        style=(FOLDER / "report.css").read_text(encoding="utf-8"),
        scripts=[(FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS],
        facts=inline_json(facts),
        blobs=blobs or {},
    )


def inline_json(value: Any) -> str:
    """JSON for use inside <script>: no `<`, no line separators; NaN and Inf become null."""
    return json.dumps(_finite(value), allow_nan=False).translate(ESCAPES)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {printable(str(name)): _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, str):
        return printable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_page(path: Path, page: str) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, page.encode("utf-8", "replace"))
