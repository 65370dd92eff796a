"""`sae-harvest names`: what of a model can be hooked, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator

from sae_granary.models.blocks import find_blocks, hook_names
from sae_granary.models.config import ModelConfig
from sae_granary.models.errors import HookError
from sae_granary.models.load import n_layers, run_skeleton, skeleton
from sae_granary.models.locate import inner_transformer, locate
from sae_granary.models.online import quiet


def name_lines(config: ModelConfig) -> Iterator[str]:
    """Lines for a person: the layers first, then every module with its width."""
    quiet()
    located = locate(config)
    inner_transformer(located)
    base = skeleton(located)
    layers = n_layers(located, base)
    ran = run_skeleton(base)
    yield f"{located.name}: {type(base).__name__}"
    try:
        blocks = find_blocks(base, layers, ran)
        if blocks.shared:
            yield f"--layer 0   output of {blocks.path}.0 at its first use: this model applies it several times"
        else:
            yield f"--layer 0 ... {blocks.n - 1}   output of {blocks.path}.<i>, counted from 0; --layers all" + (
                " (by their names alone: this model does not run without its weights)" if ran is None else ""
            )
        if blocks.silent:
            yield "without " + ", ".join(map(str, sorted(blocks.silent))) + ": they do not run on text alone"
    except HookError as error:
        yield str(error)
    yield "--hook   module path or glob; :in after it takes the input"
    for path in hook_names(base):
        if ran is None:
            yield f"  {path}"
        elif path in ran:
            yield f"  {path:<60} {ran[path].d_in:,}"
