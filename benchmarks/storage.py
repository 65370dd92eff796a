"""What storing rows as int8 costs, beside other schemes of about a byte per value: `python -m benchmarks.storage`.

Exact rows are harvested in float32 by `sae-harvest run`, or simulated, and stored by `sae-cache convert --dtype int8`;
what that records is shown. The other schemes are computed from the same exact rows. Storage FVU: sum of
(stored - exact)^2 over the sum of squared deviations from the mean.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from benchmarks import machine
from benchmarks.harvest_speed import random_rows, write_cache
from benchmarks.table import markdown
from sae_granary import open_cache
from sae_granary.cache.format.stats import MASSIVE

F32 = NDArray[np.float32]
MINILM = ("--model", "demo", "--dataset", "demo", "--layers", "all")
HOOKS = ("encoder.layer.3.attention.output.dense", "encoder.layer.3.intermediate", "encoder.layer.3.output.dense")
_LOW = (-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105, 0)
_HIGH = (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1)
NF4 = np.array((*_LOW, *_HIGH), np.float32)


def grouped_int8(x: F32, width: int) -> F32:
    """int8 with a float16 scale per group of so many values: Q8_0 of llama.cpp has 32, `width` d_in is one per row."""
    groups = x.reshape(len(x), -1, width)
    scale = (np.abs(groups).max(-1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    scale = np.where(np.isfinite(scale) & (scale > 0), scale, 1)
    stored: F32 = (np.clip(np.rint(groups / scale), -127, 127) * scale).reshape(x.shape)
    return stored


def hadamard_int8(x: F32) -> F32:
    """int8 per row of the rows without their mean, rotated by a Hadamard matrix in blocks of at most 128."""
    width = math.gcd(x.shape[1], 128)
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= math.sqrt(width)
    mean = x.mean(0)
    rotated = ((x - mean).reshape(len(x), -1, width) @ matrix).reshape(x.shape)
    stored: F32 = (grouped_int8(rotated, x.shape[1]).reshape(len(x), -1, width) @ matrix).reshape(x.shape) + mean
    return stored


def e4m3(x: F32) -> F32:
    """float8 e4m3 with a scale per row."""
    scale = np.abs(x).max(1, keepdims=True) / 448
    stored: F32 = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    return stored


def nf4(x: F32) -> F32:
    """4 bits: NormalFloat of QLoRA in groups of 32, scales exact."""
    groups = x.reshape(len(x), -1, 32)
    scale = np.maximum(np.abs(groups).max(-1, keepdims=True), 1e-30)
    nearest = np.searchsorted((NF4[1:] + NF4[:-1]) / 2, groups / scale)
    stored: F32 = (NF4[nearest] * scale).reshape(x.shape)
    return stored


SCHEMES: dict[str, Callable[[F32], F32]] = {
    "int8 per row": lambda x: grouped_int8(x, x.shape[1]),
    "Q8_0": lambda x: grouped_int8(x, 32),
    "Hadamard + int8": hadamard_int8,
    "e4m3 per row": e4m3,
    "NF4": nf4,
    "bf16": lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32),
}


def fvu(stored: F32, exact: F32, rows: NDArray[np.bool_] | None = None) -> tuple[float, float]:
    """Storage FVU over all dimensions, and over those that are not massive."""
    stored, exact = (stored, exact) if rows is None else (stored[rows], exact[rows])
    error = np.square(stored.astype(np.float64) - exact).sum(0)
    exact64 = exact.astype(np.float64)
    total, square = exact64.var(0) * len(exact), np.square(exact64).mean(0)
    ordinary = square <= MASSIVE * np.median(square[square > 0])
    return float(error.sum() / total.sum()), float(error[ordinary].sum() / total[ordinary].sum())


def command(stage: str, *args: object) -> str:
    """Run a command of ours in another process; what it printed. A refusal is printed too."""
    line = [sys.executable, "-m", f"sae_granary.{stage}.cli", *map(str, args)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr.strip(), file=sys.stderr)
    return done.stdout


def harvested(folder: Path, *args: object) -> Path:
    """Exact rows of a model."""
    command("harvest", "run", *args, "--dtype", "float32", "--device", "cpu", "--out", folder, "--quiet")
    return folder


def simulated(folder: Path, kind: str) -> Path:
    """Normal rows with three massive dimensions, 800 times larger: constant, of varying sign, or on few rows."""
    rng, rows = np.random.default_rng(0), random_rows(49_152, 384)
    x = rng.normal(size=(49_152, 384)).astype(np.float32)
    n, dimensions = len(x), [17, 120, 301]
    size = 800 * (1 + 0.02 * rng.normal(size=(n, 3)))
    sign = rng.choice([-1, 1], (n, 3)) if kind == "varying" else np.array([1, -1, 1])
    there = np.ones((n, 1), bool) if kind != "rare" else (rng.random((n, 1)) < 0.005) & (np.arange(n)[:, None] > 16384)
    x[:, dimensions] += size * sign * there
    write_cache(folder, replace(rows, activations={"layer_6": x}), 16384)
    return folder


def sink_model(folder: Path) -> Path:
    """A GPT-2 of random weights, 96 wide: three dimensions are about 100 at each position, 2,000 at the first one."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    torch.manual_seed(0)
    words = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"])}
    sizes: dict[str, Any] = {"n_embd": 96, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(words), **sizes, **ends))
    with torch.no_grad():
        model.transformer.wpe.weight[:, [3, 40, 77]] += torch.tensor([100.0, -100.0, 100.0])
        model.transformer.wpe.weight[0, [3, 40, 77]] *= 20
    model.save_pretrained(folder)
    transformers.GPT2Tokenizer(vocab=words, merges=[], model_max_length=128).save_pretrained(folder)
    return folder


def table(folder: Path, n_tokens: str, only: str) -> str:
    """One line per hook point, its ordinary dimensions where it has massive ones."""
    extra = [part for hook in HOOKS for part in ("--hook", hook)]
    gpt2 = ("--layer", 1, "--dataset", "demo", "--ctx-len", 128, "--max-tokens", n_tokens)
    kinds = ("constant", "varying", "rare")
    caches: dict[str, Callable[[Path], Path]] = {
        "MiniLM": lambda path: harvested(path, *MINILM, *extra, "--max-tokens", n_tokens),
        **{f"massive, {kind}": lambda path, kind=kind: simulated(path, kind) for kind in kinds},  # type: ignore[misc]
        "GPT-2 with a sink": lambda path: harvested(path, "--model", sink_model(folder / "model"), *gpt2),
    }
    rows = []
    for name, make in caches.items():
        if only not in name:
            continue
        path = make(folder / name.replace(" ", "_").replace(",", ""))
        target = path.with_name(path.name + "_int8")
        command("cache", "convert", path, target, "--dtype", "int8")
        told = json.loads(command("cache", "info", target, "--json"))["statistics"] if target.exists() else {}
        exact_cache = open_cache(path)
        int8_cache = open_cache(target) if target.exists() else None
        for hook in exact_cache.hook_points:
            exact = exact_cache.hook(hook)[:]
            label = f"{name} {hook}" if name == "MiniLM" else name
            stored = {scheme: store(exact) for scheme, store in SCHEMES.items()}
            recorded = [told[hook]["storage_error"][key] for key in ("fvu", "fvu_ordinary")] if told else [math.nan] * 2
            found = {scheme: fvu(values, exact) for scheme, values in stored.items()} | {"this": tuple(recorded)}
            parts = {"": 0} | ({", other dimensions": 1} if found["bf16"][0] != found["bf16"][1] else {})
            rows += [[label + part, *(f"{found[s][i]:.1e}" for s in found)] for part, i in parts.items()]
            if name.startswith("GPT-2") and int8_cache is not None:
                later = exact_cache.column("position")[:] > 0
                stored["this"] = int8_cache.hook(hook)[:]
                rows.append([f"{label}, position 0 out", *(f"{fvu(v, exact, later)[0]:.1e}" for v in stored.values())])
    return markdown(["storage FVU", *SCHEMES, "this"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.storage", description=__doc__)
    parser.add_argument("--tokens", default="60k", help="of each harvest")
    parser.add_argument("--only", default="", help="caches whose name contains this")
    arguments = parser.parse_args()
    print(machine.describe(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        print(table(Path(folder), arguments.tokens, arguments.only))


if __name__ == "__main__":
    main()
