"""The bare forward pass of a model that is cut behind a layer, and where its time goes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.cuda_visit import models
from benchmarks.cuda_visit.part import tell
from benchmarks.cuda_visit.place import Place
from benchmarks.cuda_visit.profile import by_kernel
from benchmarks.table import growing, markdown, say

BARE_TOKENS = 500_000
N_KERNELS = 8


@dataclass(frozen=True)
class Batches:
    """Batches of neighbors in length, on the device."""

    ids: list[Tensor]  # (S, T) each
    masks: list[Tensor]  # (S, T) each
    n_tokens: int  # real ones, special ones counted as a harvest counts them

    @classmethod
    def of(cls, at: Place, folder: Path, batch_tokens: int) -> Batches:
        """All texts, as often as needed."""
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        known = [ids[: models.CTX_LEN] for ids in tokenizer(models.texts(at))["input_ids"]]
        n_times = 1 if at.tiny else math.ceil(BARE_TOKENS / sum(map(len, known)))
        rows = sorted((ids for ids in known for _ in range(n_times)), key=len, reverse=True)
        all_ids, masks, start = [], [], 0
        while start < len(rows):
            width = len(rows[start])
            part = rows[start : start + max(1, batch_tokens // width)]
            start += len(part)
            ids, mask = (torch.zeros(len(part), width, dtype=torch.int64) for _ in range(2))
            for row, tokens in enumerate(part):
                ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
            all_ids.append(ids.to(at.device))
            masks.append(mask.to(at.device))
        return cls(all_ids, masks, sum(map(len, rows)))


def cut(at: Place, folder: Path, layer: int) -> Any:
    """The model in a harvest's dtype, without what follows a layer."""
    from transformers import AutoModel

    dtype = torch.float32 if at.tiny else torch.bfloat16
    model = AutoModel.from_pretrained(folder, dtype=dtype).to(at.device).eval()
    del _blocks(model)[layer + 1 :]
    model.config.num_hidden_layers = layer + 1
    model.config.use_cache = False
    model.pooler = None
    return model


def _blocks(model: Any) -> Any:
    return model.encoder.layer if hasattr(model, "encoder") else model.layers


def flops(model: Any) -> int:
    """Of a token, in the linear layers of all blocks."""
    return 2 * sum(p.numel() for p in _blocks(model).parameters() if p.dim() == 2)


def seconds(at: Place, model: Any, batches: Batches) -> float:
    """All batches with their masks."""
    return _least(at, _plain(model, batches.ids, batches.masks))


def explain(at: Place, model: Any, sizes: Mapping[int, Batches]) -> None:
    """What is won without masks, and without launches; the kernels that take most time."""
    say("\nThe same without masks: rows of equal length, for which attention may take its fastest kernel.\n")
    add, tables = growing(["batches", "forward", "ms", "TFLOP/s", "device idle"], say), []
    for n_tokens, batches in sizes.items():
        no_masks = [None] * len(batches.ids)
        ways: dict[str, Callable[[], Callable[[], object]]] = {
            "with masks": partial(_plain, model, batches.ids, batches.masks),
            "without": partial(_plain, model, batches.ids, no_masks),
            "without, CUDA graphs": partial(_graphs, model, batches.ids),
        }
        for way, prepare in list(ways.items())[: 2 if at.tiny else 3]:
            tell(f"{n_tokens:,} tokens, {way}")
            try:
                run = prepare()
                took, (spent, calls) = _least(at, run), _profiled(at, run)
            except RuntimeError as error:  # a model may wait for the device, which a graph cannot hold
                add([f"{n_tokens:,}", way, " ".join(str(error).split())[:60], "", ""])
                continue
            idle = max(0.0, 1 - sum(spent.values()) / 1e6 / took)
            rate = batches.n_tokens * flops(model) / took / 1e12
            add([f"{n_tokens:,}", way, f"{1e3 * took:.1f}", f"{rate:.0f}", f"{idle:.0%}"])
            tables.append(_kernels(f"{n_tokens:,} tokens, {way}", spent, calls, len(batches.ids)))
    say("\n" + "\n\n".join(tables))


def _kernels(title: str, spent: Counter[str], calls: Counter[str], n_batches: int) -> str:
    total = sum(spent.values())
    rows = [
        [kernel[:90], f"{calls[kernel] / n_batches:.1f}", f"{us / 1e3:.2f}", f"{us / total:.0%}"]
        for kernel, us in spent.most_common(N_KERNELS)
    ]
    return markdown([f"kernel; {title}", "calls per batch", "ms", "of the device"], rows)


def _plain(model: Any, ids: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Callable[[], None]:
    def run() -> None:
        for each, mask in zip(ids, masks, strict=True):
            model(input_ids=each, attention_mask=mask)

    return run


@torch.inference_mode()
def _graphs(model: Any, ids: Sequence[Tensor]) -> Callable[[], object]:
    graphs = [torch.cuda.CUDAGraph() for _ in ids]
    pool = torch.cuda.graph_pool_handle()
    for graph, each in zip(graphs, ids, strict=True):
        with torch.cuda.graph(graph, pool=pool):
            model(input_ids=each)
    return lambda: [graph.replay() for graph in graphs]


@torch.inference_mode()
def _least(at: Place, run: Callable[[], object]) -> float:
    """Seconds, the least of three times."""
    took = []
    for _ in range(3):
        start = at.wait()
        run()
        took.append(at.wait() - start)
    return min(took)


@torch.inference_mode()
def _profiled(at: Place, run: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    with profile(activities=[ProfilerActivity.CPU if at.tiny else ProfilerActivity.CUDA]) as profiled:
        run()
        at.wait()
    return by_kernel(profiled, at)
