"""How a direction of the residual stream changes the logits of a model's head.

Shapes: D = d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sae_granary.models.errors import SpliceError
from sae_granary.models.language.splice import load_with_head


@dataclass(frozen=True, eq=False)
class Unembedding:
    """The linear part of a head: logits = direction @ W_U, up to what the final norm divides each token by."""

    W_U: Tensor  # (D, V), float32
    has_norm: bool  # whether the final norm's weight, and its centering, are folded in


def open_unembedding(
    record: Mapping[str, Any], *, lm: str | None = None, option: str = "--lm", device: str = "cpu"
) -> Unembedding:
    """The unembedding of the model of a cache's manifest; `lm`, given by the flag `option`, names another place.

    A causal head gets the weight of the final norm folded in, as TransformerLens' `fold_ln` does. The head of a masked
    language model transforms its rows before (dense, activation, norm); that part is left out. Raises ModelError.
    """
    model, located, is_causal = load_with_head(record, lm, device=device, option=option)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise SpliceError(f"{located.source} has no unembedding matrix")
    W_U = head.weight.detach().float().t()
    norm = final_norm(getattr(model, "base_model", model), len(W_U)) if is_causal else None
    return Unembedding(W_U if norm is None else folded(norm, W_U), norm is not None)


def final_norm(base: nn.Module, d_model: int) -> nn.Module | None:
    """The norm of width D behind the list of blocks, or None where there is none."""
    found, behind = None, False
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList):
            behind, found = True, None
        elif behind and not any(part.isdigit() for part in name.split(".")):
            weight = getattr(module, "weight", None)
            if "norm" in type(module).__name__.lower() and getattr(weight, "shape", None) == (d_model,):
                found = module
    return found


@torch.no_grad()
def folded(norm: nn.Module, W_U: Tensor) -> Tensor:
    """W_U (D, V) with a norm's weight, and its centering where it has one, in front.

    The weight is read from what the norm returns for a row of mean 0 and mean square 1: some are stored as 1 + weight.
    """
    row = torch.ones(len(W_U), device=W_U.device)
    row[1::2] = -1
    if len(row) % 2:
        row[-3:] = torch.tensor([2.0, -1.0, -1.0])
    row /= row.square().mean().sqrt()
    dtype = next(norm.parameters()).dtype
    up, down, shifted = (norm(x.to(dtype)[None])[0].float() for x in (row, -row, row + 1))
    W: Tensor = W_U * ((up - down) / (2 * row))[:, None]
    return W - W.mean(0) if torch.allclose(up, shifted, atol=1e-3) else W
