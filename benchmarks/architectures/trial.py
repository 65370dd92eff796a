"""One architecture: harvested rows against each window run alone."""

import contextlib
import re
import signal
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.architectures.tiny import CTX_LEN, build, part, texts

TOLERANCE = 1e-4  # of a row's length
SECONDS = 120  # for one architecture
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # nothing here needs a disk
Line = dict[str, Any]


def quiet() -> None:
    """Only our lines."""
    import logging
    import warnings

    from sae_granary.models import online

    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    online.quiet()


def try_one(name: str, *, debug: bool = False) -> Line:
    """What becomes of one architecture: outcome, largest error, why."""
    from sae_granary.common.errors import GranaryError

    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, time_limit(SECONDS):
        try:
            build(name, Path(folder) / "model")
        except (Exception, TooLong) as error:
            return _line("not built", error, debug)
        try:
            return compare_as_told(Path(folder))
        except TooLong as error:
            return _line("not tried", error, debug)
        except GranaryError as error:
            return _line("refused", error, debug)
        except Exception as error:
            return _line("TRACEBACK", error, True)
    raise AssertionError


def _line(outcome: str, error: BaseException, debug: bool) -> Line:
    if debug:
        traceback.print_exception(error)
    text = re.sub(r"/\S*?/tmp\w*/model", "it", " ".join(str(error).split())) or type(error).__name__
    return {"outcome": outcome, "why": text if outcome == "refused" else f"{type(error).__name__}: {text}"[:160]}


class TooLong(BaseException):
    """An architecture took too long to try."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Inside, TooLong after so many seconds."""

    def over(signum: int, frame: Any) -> None:
        raise TooLong(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def compare_as_told(folder: Path) -> Line:
    """With all layers; where the harvest refuses that and names a layer or hook to give instead, with that."""
    from sae_granary.models.errors import HookError

    try:
        return compare(folder, layers="all")
    except HookError as error:
        told = re.search(r"--(layer|hook) ([\w.]+)(?= \(the first|$)", str(error))
        if told is None:
            raise
        where: dict[str, Any] = {"layers": [0]} if told[1] == "layer" else {"layers": [], "hooks": told[2]}
    return compare(folder, **where) | {"only": told[0]}


def compare(folder: Path, **where: Any) -> Line:
    """Harvested rows against the window run alone. Raises GranaryError where the harvest refuses."""
    import numpy as np
    import torch

    from sae_granary import harvest_activations, open_cache

    (folder / "text.txt").write_text("\n".join(texts()))
    harvest_activations(
        model=str(folder / "model"), dataset=str(folder / "text.txt"), documents="line", ctx_len=CTX_LEN,
        batch_tokens=CTX_LEN * CTX_LEN, device="cpu", compute_dtype="float32", out=folder / "cache", quiet=True,
        **where,
    )  # fmt: skip
    cache = open_cache(folder / "cache")
    n = cache.n_rows
    ids, window = cache.column("token_id")[0:n], cache.column("window")[0:n]
    blocks = list(cache.hook_points)
    chosen = sorted({0, len(blocks) // 2, len(blocks) - 1})
    points = {i: cache.hook_points[blocks[i]] for i in chosen}
    rows = {i: cache.hook(point.name)[0:n].astype(np.float64) for i, point in points.items()}
    errors: dict[int, list[float]] = {}
    model = fresh(folder / "model")
    for number in range(int(window.max()) + 1):
        here = np.flatnonzero(window == number)
        for i, wants in alone(model, torch.from_numpy(ids[here].astype(np.int64))[None], points).items():
            wrong = [np.linalg.norm(rows[i][here] - w, axis=1) / np.linalg.norm(w, axis=1).clip(1e-12) for w in wants]
            errors[i] = [max(a, float(b.max())) for a, b in zip(errors.get(i, [0.0] * len(wrong)), wrong, strict=True)]
    # The block's own output, and one of the hidden states where there is one for each block. The last one may be
    # behind a final norm.
    layers = {
        i: max(own, min(states) if len(states) == len(blocks) + 1 and i != chosen[-1] else 0.0)
        for i, (own, *states) in errors.items()
    }
    worst = max(layers.values())
    record, log = cache.manifest.provenance["model"], (cache.path / "harvest.log").read_text()
    line: Line = {"outcome": "equal" if worst <= TOLERANCE else "WRONG", "error": worst}
    line["class"], line["causal"] = record["class"], record["is_decoder"]
    line["blocks"] = next(iter(points.values())).module.rsplit(".", 1)[0]
    line["layers"] = len(blocks)
    notices = {"one length only": "one length", "hold one window": "one window"}
    line["batches"] = next((words for notice, words in notices.items() if notice in log), "")
    if worst > TOLERANCE:
        line["why"] = ", ".join(f"layer {i} {error:.2g}" for i, error in layers.items())
    return line


def fresh(folder: Path) -> Any:
    """The model as `from_pretrained` gives it; of an encoder-decoder the encoder."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    model.config.get_text_config().use_cache = model.config.use_cache = False
    return part(model)


def alone(model: Any, ids: Any, points: dict[int, Any]) -> dict[int, list[Any]]:
    """Block -> its output (T, D) for one window alone, and all hidden states of the model as wide.

    Models that pad a window to a multiple of their own have the tokens in front.
    """
    import torch

    seen: dict[int, Any] = {}

    def look(i: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            tensor = output if isinstance(output, torch.Tensor) else output[0]
            seen.setdefault(i, tensor.detach().clone())

        return hook

    def rows(tensor: Any) -> Any:
        tensor = tensor[:, : ids.shape[1]] if tensor.ndim == 3 and tensor.shape[0] == 1 else tensor
        return tensor.reshape(ids.shape[1], -1).double().numpy()

    handles = [model.get_submodule(point.module).register_forward_hook(look(i)) for i, point in points.items()]
    with torch.inference_mode():
        states = getattr(model(input_ids=ids, output_hidden_states=True), "hidden_states", None)
    for handle in handles:
        handle.remove()
    states = [x for x in states or () if isinstance(x, torch.Tensor)]
    return {i: [rows(own), *(rows(x) for x in states if x.numel() == own.numel())] for i, own in seen.items()}
