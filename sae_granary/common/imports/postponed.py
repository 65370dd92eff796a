"""Libraries import others that a command does not use: those are loaded when something first uses them, if ever.

Of the time that it takes to import transformers and sentence-transformers, more than half goes into torch._dynamo,
torch.distributed.tensor, scipy and scikit-learn (benchmarks/RESULTS.md). The garbage collector takes as long as another
library: it looks through everything that is imported several times, and once more when the process ends. Only the
commands change any of this, before they import anything; importing or calling the library leaves a process as it is.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_OWNERS = ("transformers", "sentence_transformers")
_IMPORT_UTILS = "transformers.utils.import_utils"
# What transformers asks before it imports torch.distributed.tensor: "no" is an installation that it supports.
_DISTRIBUTED = "is_torch_distributed_available"

_running: list[str] = []  # the modules of the owners whose code runs
_decorated: list[tuple[str, Any]] = []  # by decorators of torch._dynamo, to be decorated once it is loaded


def _real(module: str, name: str) -> Any:
    if isinstance(found := importlib.import_module(module), _Postponed):
        found.load()
    return getattr(found, name)


def _on_call(module: str, name: str) -> Callable[..., Any]:
    """A function that loads the module of the real one when it is called."""

    def function(*args: Any, **more: Any) -> Any:
        return _real(module, name)(*args, **more)

    return function


def _decorator(name: str) -> Callable[..., Any]:
    """A placeholder for a decorator of torch's compiler: it matters only once the compiler is loaded."""

    def decorate(function: Any = None, *args: Any, **more: Any) -> Any:
        # Without a wrapper: by torch itself, at the first call of the function. With one: it would be for generation.
        if not _running and more.get("wrapping", True):
            return _on_call("torch._dynamo", name)(function, *args, **more)
        _decorated.append((name, function))
        return (lambda decorated: decorated) if function is None else function

    return decorate


# Packages, and the names in them that are used without being needed. Another name loads its package.
_POSTPONED: dict[str, dict[str, Any]] = {
    "torch._dynamo": {name: _decorator(name) for name in ("disable", "allow_in_graph", "assume_constant_result")},
    "scipy.optimize": {"linear_sum_assignment": _on_call("scipy.optimize", "linear_sum_assignment")},
    "sklearn": {},
    "sklearn.metrics": {"pairwise_distances": _on_call("sklearn.metrics", "pairwise_distances")},
}


def postpone_unused_imports() -> None:
    """From now on transformers and sentence-transformers are imported without what no command uses.

    The garbage collector is off meanwhile, and while torch is imported; what lives at the end of the process it leaves.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
        atexit.register(gc.freeze)


class _Finder(MetaPathFinder):
    """Finds modules as ever: torch, those of the owners, and what is postponed while they are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The usual spec with a loader of ours; None for all other modules."""
        loads: Callable[[Loader], Loader]
        if fullname.split(".", 1)[0] in _OWNERS:
            loads = _OwnersLoader
        elif fullname == "torch":
            loads = _TorchLoader
        elif fullname in _POSTPONED:
            loads = _PostponedLoader
        else:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, Loader):
            spec.loader = loads(spec.loader)
        return spec


class _TorchLoader(Loader):
    """Runs the code of a module without the garbage collector, which then never looks at what is there by now."""

    def __init__(self, usual: Loader) -> None:
        self._usual = usual

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        _put_back(module, self._usual)
        with _uncollected():
            self._usual.exec_module(module)
            gc.freeze()  # no tensor is there yet that would never be freed


class _OwnersLoader(_TorchLoader):
    """Runs the code of a module, in which other packages are postponed and torch.distributed seems to be missing."""

    def exec_module(self, module: ModuleType) -> None:
        _put_back(module, self._usual)
        _running.append(module.__name__)
        try:
            with _uncollected(), _without_distributed():
                self._usual.exec_module(module)
        finally:
            _running.pop()
        if module.__name__ == _IMPORT_UTILS:
            _read_once(module)


class _PostponedLoader(Loader):
    """Runs no code: the module loads itself when it is used."""

    def __init__(self, usual: Loader) -> None:
        self._usual = usual

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Postponed(spec.name)
        vars(module)["__path__"] = spec.submodule_search_locations  # until it is imported: asking for it loads it
        return module

    def exec_module(self, module: ModuleType) -> None:
        _put_back(module, self._usual)
        vars(module).pop("__path__")


class _Postponed(ModuleType):
    """A package that loads itself when something of it is asked for, or a module in it imported."""

    def __getattr__(self, name: str) -> Any:
        if _running and name == "__path__" and self.__spec__ is not None:
            return self.__spec__.submodule_search_locations
        if name in (names := _POSTPONED[self.__name__]):
            return names[name]
        if name.startswith("__") and name != "__path__":  # what is asked of any module
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.load()
        return getattr(self, name)

    def load(self) -> None:
        """Become the package of this name."""
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        parent = sys.modules.get(self.__name__.rpartition(".")[0])
        if isinstance(parent, _Postponed):
            parent.load()
        vars(self)["__path__"] = self.__spec__.submodule_search_locations
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__spec__.loader.exec_module(self)
        if self.__name__ == "torch._dynamo":
            _decorate()


def _decorate() -> None:
    for name, function in _decorated:
        if name != "disable":
            _real("torch._dynamo", name)(function)
        elif hasattr(function, "__dynamo_disable"):
            del function.__dynamo_disable  # where torch keeps what it got: it asks again
    _decorated.clear()


def _put_back(module: ModuleType, usual: Loader) -> None:
    assert module.__spec__ is not None
    module.__loader__ = module.__spec__.loader = usual


@contextmanager
def _uncollected() -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def _without_distributed() -> Iterator[None]:
    found = [(m, usual) for name in (_IMPORT_UTILS, "transformers.utils")
             if (usual := getattr(m := sys.modules.get(name), _DISTRIBUTED, bool)) is not bool]  # fmt: skip
    for module, _ in found:
        setattr(module, _DISTRIBUTED, bool)  # bool() is False
    try:
        yield
    finally:
        for module, usual in found:
            setattr(module, _DISTRIBUTED, usual)


def _read_once(module: ModuleType) -> None:
    """Have transformers read its 3,000 files for the names in them once: its own memory of them is too short."""
    structure: Any = getattr(module, "create_import_structure_from_path", None)
    if hasattr(structure, "__wrapped__"):
        vars(module)["create_import_structure_from_path"] = functools.cache(structure.__wrapped__)
