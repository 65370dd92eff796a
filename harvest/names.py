"""`sae-harvest names`: what of a model can be hooked, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator

from sae_granary.models.config import ModelConfig
from sae_granary.models.errors import HookError
from sae_granary.models.hooks import Hook, find_blocks, hook_names
from sae_granary.models.load import n_layers, probe_outputs, skeleton
from sae_granary.models.locate import inner_transformer, locate
from sae_granary.models.online import quiet


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
