"""Steps of small SAEs, counted: waits for a device, launches, bytes. A CPU is made to count as a device of its own."""

import sys
import traceback
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae_granary.sae_core import registry
from sae_granary.sae_core.kernels import deferred
from sae_granary.train.config.merge import make_config
from sae_granary.train.state.run_state import Run, build_sae
from sae_granary.train.step_input import RowInput

D_IN, D_SAE, N_ROWS = 8, 512, 64
READ = ("_local_scalar_dense", "nonzero.default", "masked_select", "is_nonzero", "unique", "bincount", "aten.equal")


class Waits(TorchDispatchMode):
    """Counts what makes the host wait on CUDA: numbers that are read, and sizes that depend on data."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, kwargs = str(operation), kwargs or {}
        masks = args[1] if name.startswith(("aten.index.", "aten.index_put")) else []
        waits = any(op in name for op in READ) and not name.startswith("aten.count_nonzero")
        waits |= "repeat_interleave" in name and kwargs.get("output_size") is None
        if waits or any(m is not None and m.dtype == torch.bool for m in masks):
            self.note(name)
        return operation(*args, **kwargs)

    def note(self, name: str) -> None:
        frames = [f for f in traceback.extract_stack() if "site-packages" not in f.filename][:-2]
        self.places[f"{name} in {frames[-1].filename}:{frames[-1].lineno}"] += 1


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes the CPU count as a device of its own; gives how many numbers each read of the answers returned."""
    for module in [m for name, m in sys.modules.items() if name.startswith("sae_granary.")]:
        if hasattr(module, "host_waits"):
            monkeypatch.setattr(module, "host_waits", lambda tensor: True)
    reads: list[int] = []
    read = deferred.to_host
    monkeypatch.setattr(deferred, "to_host", lambda numbers: reads.append(numbers.numel()) or read(numbers))
    return reads


def make_run(name: str, **settings) -> Run:
    known = registry.get(name).Config.__dataclass_fields__
    options = {option: 3 for option in ("k", "l0_target") if option in known}
    options |= {"n_hooks": 2} if "n_hooks" in known else {}
    options |= {"d_out": D_IN} if "d_out" in known else {}
    options |= {"dead_after_tokens": 2 * N_ROWS, "d_in": D_IN, "d_sae": D_SAE}
    given = {"type": name, "cache": "c", "steps": 50, "lr": 1e-3, "warmup_steps": 0, "device": "cpu"}
    config = make_config([given, {"compute_dtype": "float32"}, options, settings])
    sae = build_sae(config)
    x = batch(name, 0).rows
    sae.initialize(x, torch.Generator().manual_seed(0))
    if not {"k", "l0_target", "base"} & set(known):  # few active latents
        with torch.no_grad():
            sae.encoder_bias.sub_(sae.pre_acts(sae.encoder_input(x)).dense.quantile(0.98))
    return Run.create(config, sae)


def batch(name: str, seed: int, n_rows: int = N_ROWS) -> RowInput:
    reads = registry.get(name).reads
    two = reads.several or reads.previous or "d_out" in registry.get(name).Config.__dataclass_fields__
    generator = torch.Generator().manual_seed(seed)
    hooks = ["a", "b"] if two else ["a"]
    return RowInput({hook: torch.randn(n_rows, D_IN, generator=generator) for hook in hooks})


class Launches(TorchDispatchMode):
    """Counts the operations of a step that a GPU would run as a kernel or more: all but views and bookkeeping."""

    FREE = ("view", "t", "transpose", "slice", "select", "expand", "detach", "alias", "unsqueeze", "squeeze", "permute")
    FREE += ("empty", "empty_like", "empty_strided", "new_empty", "_local_scalar_dense", "promote_types", "as_strided")
    FREE += ("_record_function_enter_new", "_record_function_exit", "_unsafe_view", "split_with_sizes", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.n += str(operation).split(".")[1] not in self.FREE
        return operation(*args, **(kwargs or {}))


class Bytes(TorchDispatchMode):
    """Counts the bytes of all matrices (F, D) that operations read and write, and how many were written."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes = self.n_written = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if str(operation).split(".")[1] not in Launches.FREE:
            given, made = ([t for t in tree_leaves(part) if self.is_large(t)] for part in ((args, kwargs), out))
            self.n_bytes += sum(t.nbytes for t in given + made)
            self.n_written += len(made)
        return out

    @staticmethod
    def is_large(value: object) -> bool:
        return isinstance(value, torch.Tensor) and value.shape in ((D_SAE, D_IN), (D_IN, D_SAE))
