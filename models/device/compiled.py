"""`--compile`: the transformer blocks up to the last hook point through torch.compile; refused where it cannot work.

Each block's `forward` is compiled, not its `__call__`: hooks on a block, and the stop after the last one, stay
outside of the compiled code and fire as ever. Blocks with a hook inside run as they are.

Shapes: S sequences, T tokens. One graph serves all of them (`dynamic=True`): a batch's T is any number up to the
window, so a graph per length would compile dozens of times. Everything is compiled by three passes of fixed shape
before the first batch, and a batch that they do not cover runs uncompiled instead of compiling again: whether it runs
compiled is a function of its shape alone, so that a resumed harvest repeats the bits of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sae_granary.common.errors import ConfigError, one_line
from sae_granary.models.blocks import find_blocks
from sae_granary.models.config import WhereConfig
from sae_granary.models.errors import HookError, ModelError
from sae_granary.models.hooks import Capture, Hook

if TYPE_CHECKING:
    from torch import nn

_S, _OTHER_S = 73, 71  # primes, unlike any T below and any width: equal sizes would be taken for one
_LENGTHS = (61, 59, 53, 47, 31, 29, 13, 11, 7, 5, 3, 2)
_GRAPHS = 64  # a model has several kinds of blocks, each with and without mask, with one sequence and with more
_ADVICE = "leave out --compile"


def check_compile(
    where: WhereConfig, base: nn.Module | None, n_layers: int | None, hooks: Sequence[Hook], device: str
) -> None:
    """Refuse `--compile` where nothing can be compiled. Raises ConfigError, or HookError for the hook points."""
    if where.unit == "text" or base is None:
        raise ConfigError(
            f"--compile is for --unit token; --unit text runs the Sentence-Transformer's own code: {_ADVICE}"
        )
    problem = _missing_tool(device)
    if problem:
        raise ConfigError(f"--compile on {device} needs {problem}, or {_ADVICE}")
    if not compiled_blocks(base, n_layers, hooks):
        names = ", ".join(hook.name for hook in hooks)
        raise HookError(
            f"--compile compiles blocks without a hook point inside, and none runs before {names}: harvest the output "
            f"of a block (--layer), or {_ADVICE}"
        )


def _missing_tool(device: str) -> str:
    """What torch.compile lacks on this device; empty if nothing."""
    if device.startswith("cuda"):
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Triton: install the triton package that belongs to this PyTorch"
        compiler, variable = os.environ.get("CC") or "cc", "CC"
    else:
        compiler, variable = os.environ.get("CXX") or "g++", "CXX"
    if any(shutil.which(name) for name in (compiler, *(("gcc", "clang") if variable == "CC" else ()))):
        return ""
    return f"a compiler, and there is no {compiler!r}: install one, name it in {variable}"


def compiled_blocks(base: nn.Module, n_layers: int | None, hooks: Sequence[Hook]) -> list[str]:
    """Paths of the blocks up to the last hook point that have no hook point inside, in model order."""
    blocks = find_blocks(base, n_layers)
    order = {path: i for i, (path, _) in enumerate(base.named_modules())}
    paths = [f"{blocks.path}.{i}" for i in range(blocks.n)]
    return [
        path
        for path in paths
        if not any(hook.module.startswith(path + ".") for hook in hooks)
        and any(_runs_before(path, hook, order) for hook in hooks)
    ]


def _runs_before(block: str, hook: Hook, order: dict[str, int]) -> bool:
    if block == hook.module or block.startswith(hook.module + "."):
        return hook.side == "output"
    return order[block] < order[hook.module]


def compile_blocks(base: nn.Module, blocks: Sequence[str], capture: Capture, device: str, ctx_len: int) -> None:
    """Compile blocks of a loaded model in place, and run until every kind of batch is compiled. Raises ModelError."""
    import torch

    for path in blocks:
        block = base.get_submodule(path)
        block.forward = torch.compile(block.forward, dynamic=True)
    first, second = [*(n for n in _LENGTHS if n <= ctx_len), 2][:2]
    try:
        with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=_GRAPHS):
            _warm_up(capture, device, _S, first)
            with torch.compiler.set_stance("fail_on_recompile"):
                _warm_up(capture, device, _OTHER_S, second)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the errors of torch.compile and of its compilers are such
        raise ModelError(f"--compile: this model cannot be compiled ({one_line(error)}): {_ADVICE}") from error


def _warm_up(capture: Capture, device: str, n_sequences: int, n_tokens: int) -> None:
    """One batch of each kind: padded, unpadded, a single sequence."""
    import torch

    ids = torch.zeros((n_sequences, n_tokens), dtype=torch.long, device=device)
    mask = torch.ones_like(ids)
    mask[-1, n_tokens // 2 :] = 0
    for input_ids, attention_mask in ((ids, mask), (ids, None), (ids[:1].clone(), None)):
        capture.run(input_ids, attention_mask, lambda hook, value: None)


@contextlib.contextmanager
def no_recompiling() -> Iterator[None]:
    """Context manager: code that is not compiled yet runs uncompiled."""
    import torch

    with torch.compiler.set_stance("eager_on_recompile"):
        yield
