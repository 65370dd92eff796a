"""`--compile`: the same rows to rounding, hooks and truncation as ever, refused in one line where it cannot be."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from harvest_kit import CutOff, build_model, config_of, cut_off_after, row_errors, texts

from sae_granary import open_cache
from sae_granary.cache.errors import CacheError
from sae_granary.common.errors import ConfigError
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.prepare import prepare
from sae_granary.harvest.run import harvest_activations
from sae_granary.harvest.spec import fingerprint
from sae_granary.models.blocks import choose_hooks
from sae_granary.models.config import WhereConfig
from sae_granary.models.device.compiled import compiled_blocks
from sae_granary.models.errors import HookError, ModelError
from sae_granary.models.load import skeleton
from sae_granary.models.locate import locate

Config = Callable[..., HarvestConfig]
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """(architecture, layers, hooks) -> a harvest of ragged lines with `--compile`."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(texts(80)))

    def make(architecture: str, layers: tuple[int, ...] = (1,), hooks: tuple[str, ...] = ()) -> HarvestConfig:
        model = tmp_path / architecture
        if not model.exists():
            build_model(model, architecture)
        sizes = {"ctx_len": 32, "batch_tokens": 32, "rows_per_shard": 512}
        return config_of(model, corpus, tmp_path / "out", layers=layers, hooks=hooks, compile=True, **sizes)

    return make


def eager(config: HarvestConfig) -> HarvestConfig:
    return replace(config, model=replace(config.model, compile=False), out=config.out_path.with_name("eager"))


def test_which_blocks_are_compiled(config: Config) -> None:
    made = config("bert")
    base = skeleton(locate(made.model))

    def blocks(*hooks: str) -> list[str]:
        found = compiled_blocks(base, 3, choose_hooks(base, 3, WhereConfig(hooks=hooks)))
        return [path.removeprefix("encoder.layer.") for path in found]

    assert blocks("encoder.layer.1") == ["0", "1"]
    assert blocks("encoder.layer.1:in") == ["0"]
    assert blocks("encoder.layer.1.attention") == ["0"]  # a hook inside: this block runs as it is
    assert blocks("encoder.layer.0.attention", "encoder.layer.2") == ["1", "2"]
    assert blocks("encoder") == ["0", "1", "2"]
    assert blocks("encoder:in") == blocks("embeddings") == blocks("encoder.layer.*.output") == []


def no_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CXX", "no-such-compiler")


def refusal(config: HarvestConfig) -> str:
    with pytest.raises((ConfigError, HookError)) as caught:
        harvest_activations(config, quiet=True)
    assert not config.out_path.exists()
    return str(caught.value)


def test_refusals_before_anything_is_written(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config("bert")
    assert refusal(replace(made, where=WhereConfig("text"))) == (
        "--compile is for --unit token; --unit text runs the Sentence-Transformer's own code: leave out --compile"
    )
    monkeypatch.setenv("CXX", "true")  # a compiler by name, before the hooks are looked at
    assert refusal(config("bert", (), ("encoder.layer.*.output",))) == (
        "--compile compiles blocks without a hook point inside, and none runs before encoder.layer.0.output, "
        "encoder.layer.1.output, encoder.layer.2.output: harvest the output of a block (--layer), or leave out "
        "--compile"
    )
    no_compiler(monkeypatch)
    assert refusal(made) == (
        "--compile on cpu needs a compiler, and there is no 'no-such-compiler': install one, name it in CXX, or leave "
        "out --compile"
    )


def test_a_failing_compiler_leaves_nothing_behind(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    from torch._inductor import config as inductor

    made = config("bert")
    failing = inductor.patch({"cpp.cxx": (None, "false")})
    with (
        failing,
        pytest.raises(ModelError, match=r"^--compile: this model cannot be compiled \(.*\): leave out --compile$"),
    ):
        harvest_activations(made, quiet=True)
    assert not made.out_path.exists()


def test_it_belongs_to_the_fingerprint(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "true")
    made = config("bert")
    assert fingerprint(prepare(made, print))["compile"] is True
    assert "compile" not in fingerprint(prepare(eager(made), print))  # as in caches of earlier versions this setting
    harvest_activations(eager(made), quiet=True)
    with pytest.raises(CacheError, match=r"compile.*\n.*--out"):
        harvest_activations(replace(made, out=eager(made).out_path), quiet=True)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bert", "modernbert", "gpt2", "llama", "t5"])
def test_rows_equal_the_uncompiled_and_a_resume_repeats_their_bits(architecture: str, config: Config) -> None:
    import torch
    from torch._dynamo.utils import counters

    hooks = ("encoder.layer.2.attention",) if architecture == "bert" else ()
    made = config(architecture, hooks=hooks)
    graphs = counters["stats"]["unique_graphs"]
    harvest_activations(made, quiet=True)
    assert counters["stats"]["unique_graphs"] >= graphs + 2
    harvest_activations(eager(made), quiet=True)
    got, want = open_cache(made.out_path), open_cache(eager(made).out_path)
    for name in want.hook_points:
        found, expected = np.asarray(got.hook(name)[:]), np.asarray(want.hook(name)[:])
        errors = row_errors(found, expected)
        assert np.quantile(errors, 0.99) < 1e-5 > errors.max() / 3  # T5 has a row of 1.2e-5
        assert (found != expected).any(1).mean() > 0.5  # compiled code rounds otherwise: it did run
    assert got.manifest.provenance["compute"]["compile"] is True

    torch._dynamo.reset()
    again = replace(made, out=made.out_path.with_name("cut"))
    with pytest.raises(CutOff), cut_off_after(75):
        harvest_activations(again, quiet=True)
    torch._dynamo.reset()
    result = harvest_activations(again, quiet=True)
    assert result.resumed_rows > 0
    for name in got.hook_points:
        assert np.array_equal(open_cache(result.path).hook(name)[:], got.hook(name)[:])
