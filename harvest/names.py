"""`sae-harvest names`: what of a model can be hooked, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator

from harvest.config import ModelConfig
from harvest.errors import HookError
from harvest.hooks import Hook, find_blocks, hook_names
from harvest.hub import quiet
from harvest.locate import inner_transformer, locate
from harvest.model import n_layers, probe_outputs, skeleton


def name_lines(config: ModelConfig) -> Iterator[str]:
    """Lines for a person: the layers first, then every module with its width."""
    quiet()
    located = locate(config)
    inner_transformer(located)
    base = skeleton(located)
    layers = n_layers(located, base)
    yield f"{located.name}: {type(base).__name__}"
    try:
        blocks = find_blocks(base, layers)
        yield f"--layer 0 ... {blocks.n - 1}   output of {blocks.path}.<i>, counted from 0; --layers all"
    except HookError as error:
        yield str(error)
    yield "--hook   module path or glob; :in behind it takes the input"
    widths = probe_outputs(base, [Hook(path, path) for path in hook_names(base)])
    for path in hook_names(base):
        if widths is None:
            yield f"  {path}"
        elif path in widths:
            yield f"  {path:<60} {widths[path]:,}"
