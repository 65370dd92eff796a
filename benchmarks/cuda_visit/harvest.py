"""A harvest against the forward pass of the same model cut behind the hooked layer, on batches sorted by length.

The bare pass knows nothing of our code: the model's blocks behind the layer are removed, nothing is captured, nothing
is written, and its batches are on the device before the clock starts.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda_visit import models
from benchmarks.cuda_visit.part import tell
from benchmarks.cuda_visit.place import Place
from benchmarks.table import markdown
from sae_granary.harvest.result import HarvestResult
from sae_granary.harvest.run import harvest_activations

STEADY_SECONDS = 15.0
FIRST_TOKENS, MOST_TOKENS = 1_500_000, 20_000_000
BARE_TOKENS = 500_000
BATCHES = (16_384, 65_536)  # tokens of a batch: a harvest's default on a GPU, and larger
Batch = tuple[Tensor, Tensor]  # input_ids (S, T), attention_mask (S, T)


def bert(at: Place) -> bool:
    """BERT-base, layer 6."""
    return _tokens(at, "BERT-base", models.bert(at), 1 if at.tiny else 6, 768)


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


def _tokens(at: Place, name: str, folder: Path, layer: int, d_in: int) -> bool:
    first = 2000 if at.tiny else FIRST_TOKENS
    settings = {"model": str(folder), "layers": layer, "dataset": str(models.corpus(at, 1 if at.tiny else 200))}
    start = _harvest(at, **settings, max_tokens=first)
    tell(f"{first:,} tokens: {start.rows_per_second:,.0f} tokens/s; now the bare forward pass")
    bare = {n_tokens: _bare(at, folder, layer, n_tokens) for n_tokens in BATCHES}
    n_tokens = first if at.tiny else _steady_tokens(at, start.rows_per_second, first, d_in)
    tell(f"{n_tokens:,} tokens, for a steady state")
    steady = _harvest(at, **settings, max_tokens=n_tokens)
    best = max(bare.values())
    rows = [
        [f"bare forward, batches of {n:,} tokens", f"{rate:,.0f}", f"{rate / best:.2f}", ""] for n, rate in bare.items()
    ]
    for what, result in (("from its start", start), ("steady", steady)):
        rate = result.rows_per_second
        label = f"harvest, {what}: {result.n_rows:,} tokens in {result.seconds:.1f} s"
        rows.append([label, f"{rate:,.0f}", f"{rate / best:.2f}", _busy(result)])
    print(f"{name}, layer {layer}, ragged texts, {'float32' if at.tiny else 'bfloat16'}, written to {at.folder}.\n")
    print(markdown(["", "tokens/s", "of the best", "busy"], rows), flush=True)
    return True


def _steady_tokens(at: Place, per_second: float, least: int, d_in: int) -> int:
    """As many as take STEADY_SECONDS, and fit a third of the free disk."""
    room = shutil.disk_usage(at.folder).free // (3 * 2 * d_in)
    return max(least, min(int(STEADY_SECONDS * per_second), MOST_TOKENS, room))


def _harvest(at: Place, **settings: Any) -> HarvestResult:
    out = at.folder / "harvested"
    result = harvest_activations(**settings, out=str(out), device=at.device, quiet=True)
    shutil.rmtree(out)
    return result


def _busy(result: HarvestResult) -> str:
    return ", ".join(f"{stage} {share:.0%}" for stage, share in result.busy)


@torch.inference_mode()
def _bare(at: Place, folder: Path, layer: int, batch_tokens: int) -> float:
    """Real tokens per second, special ones counted as a harvest counts them."""
    model, batches, n_tokens = _cut(at, folder, layer), *_batches(at, folder, batch_tokens)
    seconds = []
    for _ in range(3):
        start = at.wait()
        for ids, mask in batches:
            model(input_ids=ids, attention_mask=mask)
        seconds.append(at.wait() - start)
    return n_tokens / min(seconds)


def _cut(at: Place, folder: Path, layer: int) -> Any:
    from transformers import AutoModel

    dtype = torch.float32 if at.tiny else torch.bfloat16
    model = AutoModel.from_pretrained(folder, dtype=dtype).to(at.device).eval()
    blocks = model.encoder.layer if hasattr(model, "encoder") else model.layers
    del blocks[layer + 1 :]
    model.config.num_hidden_layers = layer + 1
    model.config.use_cache = False
    model.pooler = None
    return model


def _batches(at: Place, folder: Path, batch_tokens: int) -> tuple[list[Batch], int]:
    """Batches of neighbors in length, on the device, and the number of real tokens."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    texts = models.texts(at)
    known = [ids[: models.CTX_LEN] for ids in tokenizer(texts)["input_ids"]]
    n_times = 1 if at.tiny else math.ceil(BARE_TOKENS / sum(map(len, known)))
    lengths = sorted((ids for ids in known for _ in range(n_times)), key=len, reverse=True)
    batches, start = [], 0
    while start < len(lengths):
        width = len(lengths[start])
        part = lengths[start : start + max(1, batch_tokens // width)]
        start += len(part)
        ids, mask = torch.zeros(len(part), width, dtype=torch.int64), torch.zeros(len(part), width, dtype=torch.int64)
        for row, tokens in enumerate(part):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        batches.append((ids.to(at.device), mask.to(at.device)))
    return batches, sum(map(len, lengths))
