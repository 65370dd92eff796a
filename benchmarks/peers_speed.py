"""Step time and peak memory of SAELens, dictionary_learning and sparsify beside ours and the encoder product.

    make bench-peers                                  d_in 384, d_sae 12288, k 32, batch 2048, fp32
    make bench-peers ARGS="--cache cache/demo_l3"     on a cache's rows instead of synthetic ones

Each peer's own trainer takes the steps, as its users call it: SAELens' SAETrainer.step, dictionary_learning's
trainer.update, sparsify's Trainer.fit over a model whose hooked module returns the rows. Ours is train.loop.train_step,
with its checks and its clipping. Steps are interleaved and the medians compared. No latent is dead, so AuxK costs
nothing anywhere. Ours with a penalty start at trained density (biases set so that about 64 latents fire, and a
learning rate that keeps them there): their cost depends on it, a dense peer's does not. Peak memory is that of a fresh
process over two steps, above what it held before (on a GPU: allocated).
"""

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.table import markdown
from benchmarks.timing import interleaved
from sae_core import make_config, registry
from train.config.settings import TrainConfig
from train.heap import keep_freed_memory
from train.loop import train_step
from train.state import Run

TRAINED_L0 = 64
PAST_WARM_UP = 3000  # dictionary_learning's step: its threshold is updated from 1000 on
SHARES = (1 / 32, 2 / 32, 4 / 32, 8 / 32, 17 / 32)  # of the latents, in each group of a matryoshka
TYPES = ("topk", "batchtopk", "matryoshka", "vanilla", "gated", "jumprelu")

Step = Callable[[], object]


def main() -> None:
    """Print the table, or with --memory-of the peak memory of one contestant."""
    args = parse_args()
    warnings.simplefilter("ignore")
    if args.memory_of:
        print(peak_bytes(args.memory_of, args))
        return
    print(f"{machine.describe()}\n")
    print(table(args))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=384, help="ignored with --cache")
    parser.add_argument("--d-sae", type=int, default=12_288)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cache", help="take the rows of a cache with one hook point")
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=TYPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def table(args: argparse.Namespace) -> str:
    """Measure everything and return the table."""
    keep_freed_memory()  # as our trainer does; the peers gain by it here too
    x = rows(args)
    d_in, F = x.shape[1], args.d_sae
    W_enc, b_enc = torch.randn(F, d_in, device=x.device).t(), torch.zeros(F, device=x.device)
    makers = contestants(args)
    steps: dict[str, Step] = {"product": lambda: torch.addmm(b_enc, x, W_enc)}
    for name, maker in makers.items():
        steps[name] = maker(x, args)
    seconds = interleaved(steps, args.repeats)
    product = seconds.pop("product")
    lines = [["", "encoder product", f"{product * 1e3:.0f}", "1.00", "", ""]]
    for name, time in seconds.items():
        kind, trainer = name.split(" ", 1)
        faster = time / seconds[f"{kind} ours"]
        memory = "" if args.no_memory else f"{memory_of(name, args) / 2**20:.0f}"
        against = "" if trainer == "ours" else f"{faster:.1f}"
        lines.append([kind, trainer, f"{time * 1e3:.0f}", f"{time / product:.2f}", against, memory])
    source = args.cache or "synthetic mixtures"
    title = f"d_in {d_in}, d_sae {F}, k {args.k}, batch {len(x)}, fp32 on {args.device}; rows: {source}."
    header = ["type", "trainer", "ms per step", "encoder products", "times ours", "peak MiB"]
    return f"{title}\n\n{markdown(header, lines)}"


def rows(args: argparse.Namespace) -> Tensor:
    """One batch: a cache's rows, or sparse mixtures, whose pre-activations have the heavy tail of real ones."""
    if args.cache:
        import cache
        from cache.loader import Loader

        with Loader(cache.open(args.cache), batch_size=args.batch_size, device=args.device) as loader:
            x = next(loader).x
            assert isinstance(x, Tensor)
            return x
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2048, args.d_in, generator=generator)
    weights = torch.rand(args.batch_size, 2048, generator=generator)
    weights = weights * (torch.rand(args.batch_size, 2048, generator=generator) < 0.02)
    return (weights @ directions + 0.1 * torch.randn(args.batch_size, args.d_in, generator=generator)).to(args.device)


def contestants(args: argparse.Namespace) -> dict[str, Callable[[Tensor, argparse.Namespace], Step]]:
    """'type trainer' -> what builds its step."""
    found: dict[str, Callable[[Tensor, argparse.Namespace], Step]] = {}
    for kind in args.types:
        found[f"{kind} ours"] = lambda x, a, kind=kind: our_step(kind, x, a)
        found[f"{kind} SAELens"] = lambda x, a, kind=kind: saelens_step(kind, x, a)
        found[f"{kind} dictionary_learning"] = lambda x, a, kind=kind: dictionary_learning_step(kind, x, a)
        if kind == "topk":
            found["topk sparsify"] = lambda x, a: sparsify_step("signum", x, a)
            found["topk sparsify (adam)"] = lambda x, a: sparsify_step("adam", x, a)
    return found


def our_step(kind: str, x: Tensor, args: argparse.Namespace) -> Step:
    """One step of our loop."""
    cls = registry.get(kind)
    options: dict[str, Any] = {"d_in": x.shape[1], "d_sae": args.d_sae}
    sparse = hasattr(cls.Config, "k")
    if sparse:
        options["k"] = args.k
    sae = cls(make_config(cls, options)).to(x.device)
    sae.initialize(x, torch.Generator(device=x.device).manual_seed(0))
    if not sparse:
        with torch.no_grad():
            pre_acts = sae.pre_acts(sae.centre(sae.prepare(x).input)).dense
            sae.encoder_bias.sub_(pre_acts.flatten()[::97].quantile(1 - TRAINED_L0 / args.d_sae))
    lr = 2e-4 if sparse else 1e-12
    config = TrainConfig(
        type=kind, device=args.device, compute_dtype="float32", steps=10**6, lr=lr, warmup_steps=0, options=options
    )
    run = Run.create(config, sae)
    return lambda: train_step(run, x)


def saelens_step(kind: str, x: Tensor, args: argparse.Namespace) -> Step:
    """One step of SAELens' trainer."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    name = {"topk": "TopK", "batchtopk": "BatchTopK", "matryoshka": "MatryoshkaBatchTopK"}.get(kind)
    name = name or {"vanilla": "Standard", "gated": "Gated", "jumprelu": "JumpReLU"}[kind]
    options: dict[str, Any] = {"k": args.k} if "TopK" in name else {}
    if kind == "matryoshka":
        options["matryoshka_widths"] = [round(sum(SHARES[: i + 1]) * args.d_sae) for i in range(len(SHARES))]
    if kind == "jumprelu":
        options |= {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_bandwidth": 2.0, "pre_act_loss_coefficient": 3e-6}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")
    sae = getattr(sae_lens, f"{name}TrainingSAE")(
        config(d_in=x.shape[1], d_sae=args.d_sae, device=args.device, **options)
    )
    settings = SAETrainerConfig(10**9, args.batch_size, lr_end=3e-5, device=args.device)
    trainer = SAETrainer(settings, sae, iter(()))
    return lambda: trainer.step(x)


def dictionary_learning_step(kind: str, x: Tensor, args: argparse.Namespace) -> Step:
    """One step of dictionary_learning's trainer, the penalised ones with the paper's recipe that ours follow."""
    from dictionary_learning import trainers
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k

    assert trainers
    cls: Any = {
        "topk": top_k.TopKTrainer,
        "batchtopk": batch_top_k.BatchTopKTrainer,
        "matryoshka": matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
        "vanilla": standard.StandardTrainerAprilUpdate,
        "gated": gdm.GatedSAETrainer,
        "jumprelu": jumprelu.JumpReluTrainer,
    }[kind]
    options: dict[str, Any] = {"k": args.k} if "topk" in kind or kind == "matryoshka" else {}
    if kind == "matryoshka":
        options["group_fractions"] = list(SHARES)
    trainer = cls(
        steps=10**6,
        activation_dim=x.shape[1],
        dict_size=args.d_sae,
        layer=0,
        lm_name="rows",
        device=args.device,
        **options,
    )
    return lambda: trainer.update(PAST_WARM_UP, x)


def sparsify_step(optimizer: str, x: Tensor, args: argparse.Namespace) -> Step:
    """One step of sparsify's Trainer.fit, which runs in a thread and is let through one forward pass at a time."""
    from datasets import Dataset
    from sparsify import SaeConfig, Trainer
    from sparsify import TrainConfig as SparsifyConfig

    gate = Gate()
    model = rows_model(x, gate)
    n_steps = 10_000
    dataset = Dataset.from_dict({"input_ids": [list(range(len(x)))] * 8}).with_format("torch")
    dataset = dataset.select([0] * n_steps)
    quiet = io.StringIO()  # its progress bar keeps the stream that it was made with
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        config = SparsifyConfig(
            SaeConfig(num_latents=args.d_sae, k=args.k),
            batch_size=1,
            optimizer=optimizer,  # type: ignore[arg-type]
            hookpoints=["rows"],
            save_every=10**9,
            log_to_wandb=False,
            save_dir=tempfile.gettempdir(),
        )
        gate.open = True  # the constructor's own forward pass, which finds the widths
        trainer = Trainer(config, dataset, model)
        gate.open = False
        gate.start(trainer.fit)
    return gate.step


def rows_model(x: Tensor, gate: "Gate") -> Any:
    """A model of one embedding whose weights are the rows."""
    from transformers import PretrainedConfig, PreTrainedModel

    class Rows(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self) -> None:
            super().__init__(PretrainedConfig())
            self.rows = torch.nn.Embedding.from_pretrained(x)

        @property
        def dummy_inputs(self) -> dict[str, Tensor]:
            return {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

        def forward(self, input_ids: Tensor) -> Tensor:
            gate.wait()
            return self.rows(input_ids)

    return Rows().to(x.device)


class Gate:
    """Lets a training loop that runs in a thread take one step when told to, and no more."""

    def __init__(self) -> None:
        self.open = False
        self._go, self._arrived = threading.Semaphore(0), threading.Semaphore(0)

    def start(self, fit: Callable[[], object]) -> None:
        """Run `fit` up to its first forward pass."""
        threading.Thread(target=fit, daemon=True).start()
        self._arrived.acquire()

    def wait(self) -> None:
        """Called by the model: report arrival, wait to be let through."""
        if not self.open:
            self._arrived.release()
            self._go.acquire()

    def step(self) -> None:
        """Let one step through and wait for the next forward pass."""
        self._go.release()
        self._arrived.acquire()


def memory_of(name: str, args: argparse.Namespace) -> int:
    """Peak bytes of one contestant, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.peers_speed", "--memory-of", name]
    for flag in ("d_in", "d_sae", "k", "batch_size", "device", "cache"):
        if getattr(args, flag) is not None:
            command += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def peak_bytes(name: str, args: argparse.Namespace) -> int:
    """Two steps of one contestant: the highest memory above what was held before it was built."""
    args.types = [name.split(" ", 1)[0]]
    x = rows(args)
    maker = contestants(args)[name]
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        import sae_lens  # noqa: F401  # so that imports do not count
        import sparsify  # noqa: F401
        from dictionary_learning import trainers  # noqa: F401

        x @ x.t()  # the math library's own buffers
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
        before = high_water()
    step = maker(x, args)
    step()
    step()
    return (torch.cuda.max_memory_allocated() if args.device.startswith("cuda") else high_water()) - before


def high_water() -> int:
    """VmHWM of this process in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory needs Linux, pass --no-memory")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # sparsify's threads wait at their gates
