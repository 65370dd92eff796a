"""Which modules of a model are harvested, and the names of their hook points.

Layer i is the output of transformer block i, counted from 0. Module paths are relative to the base model (of an
encoder-decoder: to its encoder). Everything here works on a model on the meta device, without weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_granary.common.errors import nearest
from sae_granary.models.config import WhereConfig
from sae_granary.models.errors import HookError
from sae_granary.models.hooks import Hook, Seen

if TYPE_CHECKING:
    from torch import nn

INPUT_MARK = ":in"
_LISTED = 12  # module paths named in an error message
Ran = Mapping[str, Seen]  # of the modules that run on text and give one vector per token (`hooks.probe_all`)


@dataclass(frozen=True)
class Blocks:
    """The transformer blocks of a model."""

    path: str  # of the ModuleList, relative to the base model
    n: int
    shared: bool = False  # each is applied several times
    silent: frozenset[int] = frozenset()  # numbers of those that do not run on text alone


def find_blocks(base: nn.Module, n_layers: int | None, ran: Ran | None = None) -> Blocks:
    """The ModuleList of the transformer blocks: as long as the config says, else the longest outermost one.

    `ran` leaves only lists of which every module runs on text and gives one vector per token. Raises HookError where
    no list is left, or several that could be meant.
    """
    lists = _lists(base, ran)
    if not lists or (ran is not None and n_layers not in lists.values() and n_layers in _lists(base, None).values()):
        raise _no_blocks(base, n_layers, ran)
    n = n_layers if n_layers is not None and n_layers in lists.values() else max(lists.values())
    paths = [path for path, length in lists.items() if length == n]
    if len(paths) > 1:  # a block has modules of its own: no list of norms or embeddings
        inner = [path for path in paths if all(list(m.children()) for m in base.get_submodule(path).children())]
        if len(inner) > 1 and ran is not None:
            raise HookError(
                f"{type(base).__name__} has {len(paths)} lists of {n} modules that could be its blocks "
                f"({', '.join(paths)}): name the modules with --hook, such as --hook {paths[-1]}.{n // 2}"
            )
        paths = inner or paths
    if ran is None:
        return Blocks(paths[0], n)
    calls = {i: ran[f"{paths[0]}.{i}"].n_calls for i in range(n) if f"{paths[0]}.{i}" in ran}
    return Blocks(paths[0], n, max(calls.values()) > 1, frozenset(range(n)) - calls.keys())


def _no_blocks(base: nn.Module, n_layers: int | None, ran: Ran | None) -> HookError:
    lists = _lists(base, None)
    if not lists:
        return HookError(f"{type(base).__name__} has no list of blocks: name modules with --hook (sae-harvest names)")
    inside = {path: [name for name in ran or () if name.startswith(f"{path}.{n // 2}.")] for path, n in lists.items()}
    path = max(lists, key=lambda path: (bool(inside[path]), lists[path] == n_layers, lists[path]))
    return HookError(
        f"the blocks of {type(base).__name__} ({path}) do not give one vector per token of the text: name "
        "other modules with --hook"
        + (f", such as --hook {inside[path][-1]}" if inside[path] else " (sae-harvest names)")
    )


def _lists(base: nn.Module, ran: Ran | None) -> dict[str, int]:
    """Path -> length of the outermost ModuleLists whose modules all run, else of which at least half run."""
    if ran is None:
        return _module_lists(base, lambda paths: True)
    return _module_lists(base, lambda paths: all(path in ran for path in paths)) or _module_lists(
        base, lambda paths: 2 * sum(path in ran for path in paths) >= len(paths)
    )


def _module_lists(base: nn.Module, wanted: Callable[[Sequence[str]], bool]) -> dict[str, int]:
    from torch import nn

    found: dict[str, int] = {}
    for path, module in base.named_modules():
        if not path or not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(path.startswith(other + ".") for other in found):
            continue
        if wanted([f"{path}.{i}" for i in range(len(module))]):
            found[path] = len(module)
    return found


def choose_hooks(base: nn.Module, n_layers: int | None, where: WhereConfig, ran: Ran | None = None) -> tuple[Hook, ...]:
    """The hooks that `--layer`, `--layer-stride` and `--hook` select, in model order."""
    hooks: list[Hook] = []
    if where.layers or not where.hooks:
        blocks = find_blocks(base, n_layers, ran)
        hooks += [Hook(f"layer_{i}", f"{blocks.path}.{i}") for i in choose_layers(blocks, where)]
    for pattern in where.hooks:
        hooks += [hook for hook in _match(base, pattern) if hook.name not in {other.name for other in hooks}]
    order = {path: i for i, (path, _) in enumerate(base.named_modules())}
    return tuple(sorted(hooks, key=lambda hook: order[hook.module]))


def choose_layers(blocks: Blocks, where: WhereConfig) -> list[int]:
    """Selected block numbers. Raises HookError, with the number of layers, for one out of range."""
    if blocks.shared and where.layers != (0,):
        raise HookError(
            f"this model applies the {blocks.n} block(s) of {blocks.path} several times; only --layer 0 (the first "
            "application) can be hooked by number"
        )
    if where.layers == "all" or not where.layers:
        return [i for i in range(0, blocks.n, where.layer_stride) if i not in blocks.silent]
    bad = [i for i in where.layers if not 0 <= i < blocks.n]
    if bad:
        raise HookError(f"layer {bad[0]} is out of range: the model has {blocks.n} layers, 0 to {blocks.n - 1}")
    if silent := sorted(blocks.silent.intersection(where.layers)):
        others = ", ".join(str(i) for i in range(blocks.n) if i not in blocks.silent)
        raise HookError(f"layer {silent[0]} does not run on text alone: the layers that do are {others}")
    return list(where.layers[:: where.layer_stride])


def hook_names(base: nn.Module) -> list[str]:
    """All module paths that `--hook` accepts."""
    return [path for path, _ in base.named_modules() if path]


def _match(base: nn.Module, pattern: str) -> list[Hook]:
    path, mark, rest = pattern.partition(":")
    if mark and mark + rest != INPUT_MARK:
        raise HookError(f"--hook {pattern!r}: after the module path only {INPUT_MARK!r} (the module's input) is known")
    names = hook_names(base)
    found = [name for name in names if _glob(path).fullmatch(name)]
    if not found:
        if "*" in path:  # compared with paths of which each number is any number
            names = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
        hint = nearest(path, names, n=3, cutoff=0.5) or f" (it has: {', '.join(names[:_LISTED])}, ...)"
        problem = f"--hook {pattern!r} is not a module of {type(base).__name__}"
        raise HookError(f"{problem}; `sae-harvest names` lists them{hint}")
    return [Hook(hook_name(name, bool(mark)), name, "input" if mark else "output") for name in found]


def _glob(pattern: str) -> re.Pattern[str]:
    """Match paths: `*` matches part of one path component, `**` any number of components, `?` one character."""
    known = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    return re.compile("".join(known.get(part, re.escape(part)) for part in parts))


def hook_name(path: str, is_input: bool) -> str:
    """Convert a module path to a folder name."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", path) + (".in" if is_input else "")
    return name if re.match(r"[A-Za-z0-9]", name) else "m" + name
