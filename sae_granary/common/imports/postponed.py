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
# What transformers asks before it imports torch.distributed.tensor and torchvision: it supports installations without.
_ASKED = ("is_torch_distributed_available", "is_torchvision_available")

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
    "sklearn.metrics": {name: _on_call("sklearn.metrics", name) for name in ("pairwise_distances", "roc_curve")},
}
_ALONE = ("torch._dynamo._trace_wrapped_higher_order_op",)  # modules of postponed packages that do without them


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
        """The usual spec with a loader of ours; None for all other modules.

        A module of a postponed package is imported after it, or with it.
        """
        loads: Callable[[Loader], Loader]
        parent = sys.modules.get(fullname.rpartition(".")[0])
        if isinstance(parent, _Postponed) and fullname not in (*_POSTPONED, *_ALONE):
            parent.load()
            if (found := sys.modules.pop(fullname, None)) is not None:  # it comes back as what is imported
                return ModuleSpec(fullname, _FoundLoader(found))
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
    """Runs the code of a module, in which other packages are postponed or seem to be missing."""

    def exec_module(self, module: ModuleType) -> None:
        _put_back(module, self._usual)
        _running.append(module.__name__)
        try:
            with _uncollected(), _without_asked():
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
        return _Postponed(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        _put_back(module, self._usual)


class _FoundLoader(Loader):
    """Gives a module that was imported meanwhile. Python would run its code again."""

    def __init__(self, found: ModuleType) -> None:
        self._found, self._spec = found, found.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._found

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


class _Postponed(ModuleType):
    """A package that loads itself when something of it is asked for, or a module in it imported."""

    def __getattr__(self, name: str) -> Any:
        if name in (names := _POSTPONED[self.__name__]):
            return names[name]
        if name.startswith("__"):  # what is asked of any module
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
def _without_asked() -> Iterator[None]:
    found = [(m, asked, usual) for name in (_IMPORT_UTILS, "transformers.utils") for asked in _ASKED
             if (usual := getattr(m := sys.modules.get(name), asked, bool)) is not bool]  # fmt: skip
    for module, asked, _ in found:
        setattr(module, asked, bool)  # bool() is False
    try:
        yield
    finally:
        for module, asked, usual in found:
            setattr(module, asked, usual)


def _read_once(module: ModuleType) -> None:
    """Have transformers read its 3,000 files for the names in them once: its own memory of them is too short."""
    structure: Any = getattr(module, "create_import_structure_from_path", None)
    if hasattr(structure, "__wrapped__"):
        vars(module)["create_import_structure_from_path"] = functools.cache(structure.__wrapped__)
