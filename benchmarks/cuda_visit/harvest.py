"""A harvest against the forward pass of the same model cut behind the hooked layer, on batches sorted by length.

The bare pass knows nothing of our code: the model's blocks behind the layer are removed, nothing is captured, nothing
is written, and its batches are on the device before the clock starts.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda_visit import forward, models
from benchmarks.cuda_visit.part import tell
from benchmarks.cuda_visit.place import Place
from benchmarks.table import growing, markdown, say
from sae_granary.harvest.result import HarvestResult
from sae_granary.harvest.run import harvest_activations

STEADY_SECONDS = 15.0
FIRST_TOKENS, MOST_TOKENS = 1_500_000, 20_000_000
BATCHES = (16_384, 65_536)  # tokens of a batch: a harvest's default on a GPU, and larger


def bert(at: Place) -> bool:
    """BERT-base, layer 6, and where its forward pass spends its time."""
    return _tokens(at, "BERT-base", models.bert(at), 1 if at.tiny else 6, 768, explain=True)


def llama(at: Place) -> bool:
    """A 1B Llama, layer 8."""
    return _tokens(at, "Llama 1B", models.llama(at), 1 if at.tiny else 8, 2048)


def pooled(at: Place) -> bool:
    """A Sentence-Transformer's embeddings against its own `encode`."""
    from sentence_transformers import SentenceTransformer

    folder, n_times = models.sentence_encoder(at), 1 if at.tiny else 50
    settings = {"model": str(folder), "dataset": str(models.corpus(at, n_times)), "unit": "text"}
    result = _harvest(at, **settings)
    texts = models.texts(at) * n_times
    tell(f"{result.n_rows:,} texts harvested; encoding them by SentenceTransformer.encode")
    dtype = {} if at.tiny else {"model_kwargs": {"dtype": torch.bfloat16}}
    model: Any = SentenceTransformer(str(folder), device=at.device, **dtype)
    model.encode(texts[:256])
    start = at.wait()
    model.encode(texts, batch_size=256, convert_to_numpy=False, convert_to_tensor=True)
    theirs = len(texts) / (at.wait() - start)
    rows = [
        ["SentenceTransformer.encode, batches of 256, bfloat16", f"{theirs:,.0f}", "1.00", ""],
        [
            "harvest --unit text",
            f"{result.rows_per_second:,.0f}",
            f"{result.rows_per_second / theirs:.2f}",
            _busy(result),
        ],
    ]
    print(f"Pooled, MiniLM's shape, {len(texts):,} texts.\n\n{markdown(['', 'texts/s', 'of encode', 'busy'], rows)}")
    return True


def _tokens(at: Place, name: str, folder: Path, layer: int, d_in: int, *, explain: bool = False) -> bool:
    first = 2000 if at.tiny else FIRST_TOKENS
    settings = {"model": str(folder), "layers": layer, "dataset": str(models.corpus(at, 1 if at.tiny else 200))}
    model = forward.cut(at, folder, layer)
    bare = {n_tokens: forward.Batches.of(at, folder, n_tokens) for n_tokens in BATCHES}
    dtype = "float32" if at.tiny else "bfloat16"
    print(f"{name}, layer {layer}, ragged texts, {dtype}, written to {at.folder}. TFLOP/s: linear layers of blocks.\n")
    add, best = growing(["", "tokens/s", "of the best", "TFLOP/s", "busy"], say), 0.0
    rates = {n_tokens: batches.n_tokens / forward.seconds(at, model, batches) for n_tokens, batches in bare.items()}
    best = max(rates.values())
    for n_tokens, rate in rates.items():
        label = f"bare forward, batches of {n_tokens:,} tokens"
        add([label, f"{rate:,.0f}", f"{rate / best:.2f}", f"{rate * forward.flops(model) / 1e12:.0f}", ""])
    rate = 0.0
    for what in ("from its start", "steady"):
        n_tokens = _steady_tokens(at, rate, first, d_in) if rate and not at.tiny else first
        tell(f"harvesting {n_tokens:,} tokens")
        result = _harvest(at, **settings, max_tokens=n_tokens)
        rate = result.rows_per_second
        label = f"harvest, {what}: {result.n_rows:,} tokens in {result.seconds:.1f} s"
        add([label, f"{rate:,.0f}", f"{rate / best:.2f}", "", _busy(result)])
    if explain:
        forward.explain(at, model, bare)
    return True


def _steady_tokens(at: Place, per_second: float, least: int, d_in: int) -> int:
    """As many as take STEADY_SECONDS, and fit half of the free disk."""
    room = shutil.disk_usage(at.folder).free // (2 * 2 * d_in)
    return max(least, min(int(STEADY_SECONDS * per_second), MOST_TOKENS, room))


def _harvest(at: Place, **settings: Any) -> HarvestResult:
    out = at.folder / "harvested"
    result = harvest_activations(**settings, out=str(out), device=at.device, quiet=True)
    shutil.rmtree(out)
    return result


def _busy(result: HarvestResult) -> str:
    return ", ".join(f"{stage} {share:.0%}" for stage, share in result.busy)
