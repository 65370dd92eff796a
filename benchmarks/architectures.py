"""Every architecture of the installed transformers: are harvested rows what the model computes for the window alone?

`python -m benchmarks.architectures` builds each from a tiny configuration, harvests rows at the first, a middle and the
last block from ragged texts, and compares them with each window run alone (no padding, no mask, float32). Writes
benchmarks/ARCHITECTURES.md: equal, or refused with the reason, or not built. Takes about 10 minutes on 2 cores.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TABLE = Path(__file__).with_name("ARCHITECTURES.md")
TOLERANCE = 1e-4  # of a row's length
MAX_PARAMETERS = 60_000_000
SECONDS = 60  # for one architecture
N_LAYERS, WIDTH, N_HEADS, CTX_LEN, VOCAB = 4, 32, 4, 12, 128
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", *(f"<{i}>" for i in range(4, 16)))  # the last for pictures and sound

# What the configs call a size, and its small value.
SIZES: tuple[tuple[int, str], ...] = (
    (WIDTH, "hidden_size d_model n_embd dim emb_dim embed_dim model_dim word_embed_proj_dim "
     "embedding_size d_embed encoder_hidden_size attention_hidden_size projection_dim "
     "lru_width attention_dim decoder_hidden_size backbone_hidden_size"),
    (2 * WIDTH, "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim hidden_dim n_inner dff "
     "ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size dim_ff "
     "mlp_hidden_size expert_ffn_hidden_size feed_forward_size d_inner intermediate_size_mlp"),
    (N_LAYERS, "num_hidden_layers num_layers n_layers n_layer encoder_layers decoder_layers "
     "num_encoder_layers num_decoder_layers depth l_layers x_layers r_layers"),
    (N_HEADS, "num_attention_heads n_heads n_head num_heads encoder_attention_heads "
     "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
     "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_top_k top_k_experts moe_k n_group "
        "num_activated_experts num_experts_per_token"),
    (1, "topk_group n_shared_experts"),
    (16, "q_lora_rank kv_lora_rank mamba_d_state state_size mamba_chunk_size chunk_size ssm_state_size n_hash_buckets"),
    (8, "head_dim d_kv kv_channels d_head attention_head_size rotary_dim qk_rope_head_dim qk_nope_head_dim v_head_dim "
        "index_head_dim mamba_d_head mamba_n_heads linear_key_head_dim linear_value_head_dim"),
    (VOCAB, "vocab_size text_vocab_size vocab_size_per_layer_input"),
    (256, "max_position_embeddings n_positions n_ctx max_source_positions max_target_positions"),
)  # fmt: skip
SMALL = {name: size for size, names in SIZES for name in names.split()}
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
             "unk_token_id": 3, "decoder_start_token_id": 0}  # fmt: skip
# Some configs want sizes that belong together: what more is tried when the first config cannot be built.
MORE: tuple[dict[str, Any], ...] = (
    {},
    {"hidden_size": 64, "head_dim": 16, "d_model": 64, "d_kv": 16},
    {"num_key_value_heads": 4},
    {"hidden_size": 128, "d_model": 128, "embed_dim": 128, "head_dim": 32},
    {"num_hidden_layers": 8, "num_layers": 8},
    {"keep": "head_dim moe"},
    {"keep": "layer"},
)


def main() -> None:
    """Print and write the table, or the lines of some architectures for it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help="model types (default: all)")
    parser.add_argument("--lines", action="store_true", help="print one line of JSON each and write nothing")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--debug", action="store_true", help="print tracebacks")
    arguments = parser.parse_args()
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    names = arguments.names or sorted(MODEL_MAPPING_NAMES)
    if arguments.lines or arguments.names:
        quiet()
        for name in names:
            print(json.dumps({"name": name} | try_one(name, debug=arguments.debug)), flush=True)
        return
    start = time.monotonic()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        parts = pool.map(in_process, [names[i :: arguments.jobs] for i in range(arguments.jobs)])
        found = sorted((line for part in parts for line in part), key=lambda line: str(line["name"]))
    TABLE.write_text(table(found), encoding="utf-8")
    print(f"{summary(found)}; {time.monotonic() - start:.0f} s; {TABLE}")
    if any(line["outcome"] in ("WRONG", "TRACEBACK") for line in found):
        sys.exit(1)


def in_process(names: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of some architectures; one that kills its process has one too."""
    found: list[dict[str, Any]] = []
    while left := names[len(found) :]:
        command = [sys.executable, "-m", "benchmarks.architectures", "--lines", *left]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        found += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if len(found) < len(names):
            found.append({"name": names[len(found)], "outcome": "TRACEBACK", "why": f"process ended {done.returncode}"})
    return found


def quiet() -> None:
    """Only our lines."""
    import logging
    import warnings

    from sae_granary.models import online

    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    online.quiet()


def try_one(name: str, *, debug: bool = False) -> dict[str, Any]:
    """What becomes of one architecture: outcome, largest error, why."""
    import torch

    from sae_granary.common.errors import GranaryError

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, time_limit(SECONDS):
        try:
            build(name, Path(folder) / "model")
        except (Exception, TooLong) as error:
            return _line("not built", error, debug)
        try:
            return compare(Path(folder))
        except TooLong as error:
            return _line("not tried", error, debug)
        except GranaryError as error:
            return _line("refused", error, debug)
        except Exception as error:
            return _line("TRACEBACK", error, True)
    raise AssertionError


def _line(outcome: str, error: BaseException, debug: bool) -> dict[str, Any]:
    if debug:
        traceback.print_exception(error)
    text = re.sub(r"/tmp/\S*?/model", "it", " ".join(str(error).split())) or type(error).__name__
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


def build(name: str, folder: Path) -> None:
    """A tiny model with random weights and a tokenizer, saved. Raises what transformers raises."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModel

    problem: BaseException | None = None
    for more in MORE:
        try:
            config = CONFIG_MAPPING[name](**small(CONFIG_MAPPING[name], more))
            with torch.device("meta"):
                n = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
            if n > MAX_PARAMETERS:
                raise ValueError(f"{n / 1e6:.0f} million parameters at the sizes that are known")
            model = AutoModel.from_config(config).float().eval()
            break
        except Exception as error:
            problem = problem or error
    else:
        assert problem is not None
        raise problem
    with torch.no_grad():  # larger than the usual start, so that layers differ clearly
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def small(kind: Any, more: dict[str, Any]) -> dict[str, Any]:
    """Keywords of a config class that make the model small, those of its parts included."""
    default = kind()
    known, parts = default.to_dict(), dict(getattr(kind, "sub_configs", {}) or {})
    sizes = SMALL | {name: value for name, value in more.items() if name != "keep"}
    kept = str(more.get("keep", "")).split()
    found: dict[str, Any] = {}
    for name, value in known.items():
        if name in parts and parts[name].__name__ != "AutoConfig":
            found[name] = small(parts[name], more)
        elif name in parts and value is not None:
            from transformers import CONFIG_MAPPING

            model_type = value.get("model_type") if isinstance(value, dict) else value.model_type
            found[name] = {"model_type": model_type} | small(CONFIG_MAPPING[model_type], more)
        elif name in TOKEN_IDS and (isinstance(value, int) or value is None):
            found[name] = TOKEN_IDS[name]
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= VOCAB:
            found[name] = 4 + len(found) % 12
        elif name == "vocab_size" and value is None:
            found[name] = VOCAB
        elif name in sizes and isinstance(value, int) and value > 0 and not any(word in name for word in kept):
            found[name] = sizes[name]
    return found


def tokenizer() -> Any:
    """Words between <s> and </s>, as many as the models' embeddings."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(VOCAB - len(SPECIAL))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[4:]),
    )  # fmt: skip


def texts() -> list[str]:
    """Ragged documents, as many in a batch as tokens in a window among them."""
    lengths = [3, 10, 1, 10, 7, 10, 10, 4, 10, 10, 10, 9, 8, 10, 10, 2, 10, 10, 10, 5, 23, 10]
    return [" ".join(f"w{(7 * i + 13 * j * j + 5 * j) % 112}" for j in range(n)) for i, n in enumerate(lengths)]


def compare(folder: Path) -> dict[str, Any]:
    """Harvested rows against the window run alone. Raises GranaryError where the harvest refuses."""
    import numpy as np
    import torch

    from sae_granary import harvest_activations, open_cache

    (folder / "text.txt").write_text("\n".join(texts()))
    harvest_activations(
        model=str(folder / "model"), dataset=str(folder / "text.txt"), documents="line", layers="all", ctx_len=CTX_LEN,
        batch_tokens=CTX_LEN * CTX_LEN, device="cpu", compute_dtype="float32", out=folder / "cache", quiet=True,
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
    # the block's own output, and one of the hidden states; the last ones may be behind a final norm
    layers = {i: max(own, 0.0 if i == chosen[-1] else min(states, default=0.0)) for i, (own, *states) in errors.items()}
    worst = max(layers.values())
    record = cache.manifest.provenance["model"]
    line: dict[str, Any] = {"outcome": "equal" if worst <= TOLERANCE else "WRONG", "error": worst}
    line["class"], line["causal"] = record["class"], record["is_decoder"]
    line["blocks"] = next(iter(points.values())).module.rsplit(".", 1)[0]
    line["layers"] = len(blocks)
    if worst > TOLERANCE:
        line["why"] = ", ".join(f"layer {i} {error:.2g}" for i, error in layers.items())
    return line


def fresh(folder: Path) -> Any:
    """The model as `from_pretrained` gives it; of an encoder-decoder the encoder."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    model.config.get_text_config().use_cache = model.config.use_cache = False
    return model.get_encoder() if model.config.is_encoder_decoder else model


def alone(model: Any, ids: Any, points: dict[int, Any]) -> dict[int, list[Any]]:
    """Block -> its output (T, D) for one window alone, and all hidden states of the model as wide."""
    import torch

    seen: dict[int, Any] = {}

    def look(i: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            tensor = output if isinstance(output, torch.Tensor) else output[0]
            seen.setdefault(i, tensor.detach().clone())

        return hook

    handles = [model.get_submodule(point.module).register_forward_hook(look(i)) for i, point in points.items()]
    with torch.inference_mode():
        states = getattr(model(input_ids=ids, output_hidden_states=True), "hidden_states", None)
    for handle in handles:
        handle.remove()
    states = [x for x in states or () if isinstance(x, torch.Tensor)]
    return {
        i: [x.reshape(ids.shape[1], -1).double().numpy() for x in (own, *states) if x.numel() == own.numel()]
        for i, own in seen.items()
    }


def summary(found: Sequence[dict[str, Any]]) -> str:
    """How many of each outcome."""
    return ", ".join(f"{n} {outcome}" for outcome, n in sorted(Counter(str(line["outcome"]) for line in found).items()))


def table(found: Sequence[dict[str, Any]]) -> str:
    """The page."""
    import torch
    import transformers

    lines = [
        "# Architectures",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}; written by",
        "`python -m benchmarks.architectures`.",
        "",
        f"{summary(found)}. *equal*: every row at the first, a middle and the last block is within {TOLERANCE:g} of",
        "the window run alone (no padding, no mask, float32). *refused*: what the harvest answers. *not built*: no",
        "tiny model could be built from the configuration class.",
        "",
        "| architecture | outcome | blocks, or the reason |",
        "|---|---|---|",
    ]
    for line in found:
        if line["outcome"] == "equal":
            direction = "causal" if line["causal"] else "bidirectional"
            what = f"`{line['class']}` `{line['blocks']}`, {direction}, {line['error']:.0e}"
        else:
            what = str(line["why"]).replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {line['name']} | {line['outcome']} | {what} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
