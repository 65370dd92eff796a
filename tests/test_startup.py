"""What a user waits for before and after the work: imports, and counting for a threshold."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from command_kit import run_python
from harvest_kit import build_model, config_of, texts
from torch.utils._python_dispatch import TorchDispatchMode

from sae_granary.harvest import plan, run
from sae_granary.harvest.prepare import Prepared
from sae_granary.sae_core.functional import BLOCK_ENTRIES
from sae_granary.sae_core.latents import DROPPED_BITS, N_BINS, _bins
from sae_granary.sae_core.normalize import Normalizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_positive_numbers_are_counted_by_their_bits(dtype: torch.dtype) -> None:
    values = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[:4] = torch.tensor([0.0, -0.0, 1e-44, torch.inf], dtype=dtype)[:, None]
    positive = values[values > 0].float()
    expected = torch.bincount(positive.view(torch.int32) >> DROPPED_BITS, minlength=N_BINS)
    assert torch.equal(_bins(values), expected)
    assert torch.equal(_bins(values.t()), expected)


class _SeenError(Exception):
    """What a command was waiting for when it came to the part that a test looks at."""


def test_reading_the_first_documents_of_a_harvest_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 of them are tokenized, however long they are."""
    now: list[str] = []

    @contextmanager
    def waiting(what: str) -> Iterator[None]:
        now.append(what)
        yield
        now.remove(what)

    def sampled(prepared: Prepared) -> None:
        raise _SeenError(*now)

    monkeypatch.setattr(run, "waiting", waiting)
    monkeypatch.setattr(plan, "estimate_rows", sampled)
    (text := tmp_path / "text.txt").write_text("\n".join(texts(3)))
    with pytest.raises(_SeenError, match="first documents"):
        run.harvest_activations(config_of(build_model(tmp_path / "model", "bert"), text, tmp_path / "out"), quiet=True)


class _Float64(TorchDispatchMode):
    """The most elements of a float64 tensor that an operation made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
            self.most = max(self.most, made.numel())
        return made


def test_a_normalization_is_fitted_without_a_copy_of_the_sample() -> None:
    """Memory of this size is new, and zeroed first: that took twice as long as the sums."""
    rows = torch.randn(4096, 384)
    with _Float64() as seen:
        Normalizer("dataset", 384).fit(rows)
    assert 0 < seen.most <= BLOCK_ENTRIES < rows.numel()


def test_training_does_not_import_the_compiler(make_cache, tmp_path) -> None:
    """torch._dynamo takes seconds, and torch.optim imports it unless it is kept from doing so."""
    script = f"""
import sys
from sae_granary import train_sae
train_sae(cache={str(make_cache())!r}, type="batchtopk", k=4, d_sae=64, steps=2, batch_size=64, device="cpu",
          runs_dir={str(tmp_path / "runs")!r})
heavy = ("torch._dynamo", "sympy", "transformers", "datasets", "scipy", "sklearn", "pandas", "matplotlib", "zarr")
print([name for name in heavy if name in sys.modules])
"""
    assert run_python(script).stdout.strip() == "[]"


POSTPONED = """
import sys
from sae_granary.common.imports.postponed import postpone_unused_imports
postpone_unused_imports()
"""


def test_a_command_loads_a_model_without_libraries_that_it_does_not_use(tmp_path: Path) -> None:
    """transformers imports them: seconds of each command."""
    (tmp_path / "torchvision.dist-info").mkdir()
    (tmp_path / "torchvision.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.26.0\n")
    (tmp_path / "torchvision.py").touch()
    script = f"""{POSTPONED}
sys.path.insert(0, {str(tmp_path)!r})
from sae_granary.models.config import ModelConfig
from sae_granary.models.load import load_base, skeleton
from sae_granary.models.locate import locate
located = locate(ModelConfig({str(build_model(tmp_path / "model", "bert"))!r}))
skeleton(located)
load_base(located, "float32", "cpu")
heavy = ("torch._dynamo.eval_frame", "torch.distributed.tensor", "scipy.optimize._optimize", "sklearn.base")
heavy += ("torchvision",)
print([name for name in heavy if name in sys.modules])
"""
    assert _output(script) == ["[]"]


def test_a_library_that_imports_a_module_of_a_postponed_package_gets_all_of_it_once(tmp_path: Path) -> None:
    """torchvision does, while transformers imports it."""
    (tmp_path / "sentence_transformers.py").write_text("from torch._dynamo.utils import counters\n")
    script = f"""{POSTPONED}
sys.path.insert(0, {str(tmp_path)!r})
import sentence_transformers, torch
print(torch.compiler.allow_in_graph(abs) is abs)
print(sentence_transformers.counters is torch._dynamo.utils.counters is torch._dynamo.convert_frame.counters)
print(torch._dynamo.utils is sys.modules["torch._dynamo.utils"], torch._dynamo.utils.__spec__.origin is not None)
"""
    assert _output(script) == ["True", "True", "True True"]


def test_a_command_collects_no_garbage_from_what_it_imports() -> None:
    """Looking through it took a fifth of a command: while it is imported, and again when the process ends."""
    script = f"""
import atexit, gc
kept = []
atexit.register(lambda: print(len(gc.get_objects()) < 1000))  # after those that are registered later
{POSTPONED}
full = []
gc.callbacks.append(lambda phase, found: full.append(phase) if found["generation"] == 2 else None)
import torch
print(gc.isenabled(), gc.get_freeze_count() > 100_000, full)
kept += [[] for _ in range(1000)]
"""
    assert _output(script) == ["True True []", "True"]


@pytest.mark.slow
def test_postponed_libraries_are_whole_for_whoever_uses_them() -> None:
    script = f"""{POSTPONED}
import importlib
import torch
from transformers.loss.loss_for_object_detection import linear_sum_assignment
from sentence_transformers.util import pairwise_euclidean_sim
print("sklearn.base" in sys.modules, pairwise_euclidean_sim(torch.eye(2), torch.zeros(2, 2)).tolist())
print(linear_sum_assignment(torch.eye(2).numpy())[1].tolist())
print(importlib.import_module("sklearn.metrics").accuracy_score([1], [1]))
hidden = torch._compile._disable_dynamo(lambda x: x + 1)
print(hidden(1), "torch._dynamo.eval_frame" in sys.modules)
graphs = []
def count(graph, inputs):
    graphs.append(graph)
    return graph.forward
print(torch.compile(lambda x: hidden(x * 2) * 2, backend=count)(torch.ones(1)).tolist(), len(graphs))
"""
    assert _output(script) == ["False [-1.0, -1.0]", "[1, 0]", "1.0", "2 False", "[6.0] 2"]


def _output(script: str) -> list[str]:
    return run_python(script).stdout.splitlines()[-5:]
