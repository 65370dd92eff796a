"""The package imported anew in this process, for tests that change a module before the others import it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def fresh_package() -> Iterator[None]:
    """Inside, every import of sae_granary makes new modules; after it, the modules from before are back.

    What torch and other packages have loaded stays, which a new process would load again.
    """
    before = _modules()
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in _modules():
            del sys.modules[name]
        sys.modules.update(before)


def _modules() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "sae_granary"}
