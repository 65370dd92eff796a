"""docs/parameters.md is current, and every parameter on it does something that can be seen."""

import json
import re
import runpy
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_cache
from safetensors.torch import load_file

from sae_granary import sae_core, train_sae
from sae_granary.common.errors import ConfigError
from sae_granary.common.finished_run import read_metrics
from sae_granary.sae_core.options import LM_LOSSES
from sae_granary.train.config.merge import TRAINER_KEYS, make_config
from sae_granary.train.config.resolve import DERIVED_OPTIONS
from sae_granary.train.loop import train_step
from sae_granary.train.sinks.sink import TIMING
from sae_granary.train.state.run_state import Run, build_sae
from sae_granary.train.step_input import RowInput

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_is_current() -> None:
    module = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert module["page"]() == module["PAGE"].read_text(encoding="utf-8"), "write it again with `make regenerate`"


def test_the_page_names_everything() -> None:
    from sae_granary.analyze.settings import COMMANDS
    from sae_granary.harvest.settings.make import DECLARED

    page = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert set(TRAINER_KEYS) <= named
    for name in sae_core.registry.names():
        assert {f.name for f in fields(sae_core.registry.get(name).Config)} - set(DERIVED_OPTIONS) <= named, name
    harvest, analyze = page[page.index("## Harvest") :].split("## Analyze")
    assert re.findall(r"^\| `(\w+)` \|", harvest, re.MULTILINE) == list(DECLARED)
    for command, options in COMMANDS.items():
        assert {f.name for f in fields(options)} <= set(re.findall(r"^\| `(\w+)` \|", analyze, re.MULTILINE)), command


# -- settings of a run ---------------------------------------------------------------------------------------------

BASE = {"type": "batchtopk", "k": 3, "d_sae": 24, "batch_size": 64, "steps": 8, "log_every": 4, "eval_rows": 150}
BASE |= {"lr": 0.01, "keep_special": True, "warmup_steps": 0, "hook": "layer_1"}
SGD = {"optimizer": "sgd", "lr": 0.1}
FEW = {"type": "topk", "k": 1, "d_sae": 200, "dead_after_tokens": 65, "resample_rows": 256}  # most latents are dead


@dataclass(frozen=True)
class Effect:
    """Two runs that differ in one setting, and what must differ in what they leave: weights, log, summary, files."""

    change: Any
    seen_in: str = "weights"
    base: dict[str, Any] = field(default_factory=dict)  # of both runs; the setting's first value may stand here


EFFECTS = {
    "cache": Effect("other"),
    "type": Effect("topk"),
    "hook": Effect("layer_2"),
    "name": Effect("b", "folder"),
    "runs_dir": Effect("elsewhere", "folder"),
    "seed": Effect(1),
    "shuffle_seed": Effect(1),
    "init_seed": Effect(1),
    "device": Effect("cuda:99", "refusal"),
    "compute_dtype": Effect("bfloat16"),
    "expansion_factor": Effect(2, base={"d_sae": None, "expansion_factor": 4}),
    "init_from": Effect("start"),
    "batch_size": Effect(32),
    "grad_acc_steps": Effect(4),  # batchtopk selects over a micro-batch
    "tokens": Effect(320, "summary", {"steps": None, "tokens": 256}),
    "steps": Effect(6, "summary"),
    "epochs": Effect(0.2, "summary", {"steps": None, "epochs": 0.1}),
    **{f"optimizer:{name}": Effect(name) for name in ("adamw", "sgd", "muon", "adafactor", "signum")},
    "optimizer:adamw": Effect("adamw", base={"weight_decay": 0.5}),
    "lr": Effect(0.02),
    "matrix_lr_scale": Effect(1.0),
    "weight_decay": Effect(0.5),
    "beta1": Effect(0.5),
    "beta2": Effect(0.5),
    "eps": Effect(0.1),
    "grad_clip": Effect(1e-3, base=SGD),
    "lr_schedule": Effect("cosine", base={"decay_fraction": 1.0}),
    "warmup_steps": Effect(4),
    "decay_fraction": Effect(1.0),
    "lr_final": Effect(0.5),
    "ema_decay": Effect(0.9),
    "resample_every": Effect(2, base=FEW),
    "resample_until": Effect(1.0, base={**FEW, "resample_every": 3}),
    "resample_rows": Effect(64, base={**FEW, "resample_every": 2, "resample_rows": 256}),
    "early_stop": Effect(1, "summary", {"eval_every": 1, "lr": 1e-30, "type": "topk"}),
    "keep_special": Effect(False),
    "keep_first_position": Effect(False),
    "exclude_tokens": Effect("5,6"),
    "min_position": Effect(4),
    "max_position": Effect(9),
    "min_norm": Effect(2.0),
    "max_norm": Effect(3.0),
    "holdout": Effect(0.3),
    "holdout_seed": Effect(1),
    "pool_rows": Effect(128),
    "block_rows": Effect(50, base={"pool_rows": 200}),
    "shuffle_shards": Effect(1),
    "log_every": Effect(2, "log"),
    "save_every": Effect(3, "files"),
    "keep": Effect(1, "files", {"save_every": 3}),
    "save_minutes": Effect(1e-9, "files"),
    "keep_best": Effect(True, "files", {"save_every": 1, "keep": 1, "eval_every": 1, "lr": 3.0}),
    "eval_rows": Effect(30, "summary"),
    "eval_every": Effect(4, "log"),
    "val_rows": Effect(64, "log", {"eval_every": 4}),
    "density_every": Effect(4, "log"),
    "tensorboard": Effect(True, "files"),
    "dead_threshold": Effect(0.2, "summary"),
}
# Slow to see (a language model, wandb's process): these tests see them.
ELSEWHERE = {
    "finetune_kl": "test_train_splice.py::test_kl_finetuning_lowers_the_kl",
    "shard_latents": "test_train_shards.py::test_a_sweep_divides_its_saes",
    "lm": "test_train_splice.py::test_another_model_is_refused",
    "eval_downstream": "test_train_splice.py::test_whole_runs_through_the_model_from_the_command_line",
    "downstream_rows": "test_train_splice.py::test_the_evaluation_reads_as_many_rows_as_asked",
    "allow_incomplete": "test_train_knobs.py::test_a_run_on_a_growing_cache_keeps_its_shards",
    "wandb_artifacts": "test_train_log.py::test_wandb_offline_writes_the_history_and_touches_no_network",
    "wandb": "test_train_log.py::test_wandb_offline_writes_the_history_and_touches_no_network",
    "wandb_project": "test_train_log.py::test_wandb_offline_writes_the_history_and_touches_no_network",
}


def test_every_setting_has_an_effect_here_or_elsewhere() -> None:
    assert {name.split(":")[0] for name in EFFECTS} | set(ELSEWHERE) == set(TRAINER_KEYS)
    for name, test in ELSEWHERE.items():
        file, function = test.split("::")
        text = (ROOT / "tests" / file).read_text()
        body = text[text.index(f"def {function}(") :].split("\ndef ")[0]
        assert name in text, (name, file)
        assert name in body or file == "test_train_splice.py", (name, function)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("effects")
    for seed, name in enumerate(("cache", "other")):
        write_cache(path / name, n_docs=16, d_in=8, hooks=("layer_1", "layer_2"), rows_per_shard=200, seed=seed)
    train_sae(**BASE, cache=str(path / "cache"), runs_dir=str(path), name="start")
    return path


@pytest.fixture(scope="module")
def observe(folder: Path):
    seen: dict[str, dict[str, Any]] = {}

    def run(settings: dict[str, Any]) -> dict[str, Any]:
        key = json.dumps(settings, sort_keys=True)
        if key not in seen:
            places = {"cache": "cache", "runs_dir": f"runs{len(seen)}", "name": "a", **settings}
            places |= {k: str(folder / places[k]) for k in ("cache", "runs_dir", "init_from") if k in places}
            seen[key] = observed(train_sae(**{**settings, **places}).folder)
        return seen[key]

    return run


def observed(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "weights": {n: t.tolist() for n, t in load_file(folder / "sae_weights.safetensors").items()},
        "log": [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(folder)],
        "summary": {k: summary[k] for k in ("steps", "tokens", "eval")},
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()),
        "folder": (folder.parent.name[:4], folder.name),
    }


@pytest.mark.parametrize("name", EFFECTS)
def test_a_setting_has_an_effect(observe, name: str) -> None:
    effect, key = EFFECTS[name], name.split(":")[0]
    base = {k: v for k, v in {**BASE, **effect.base}.items() if v is not None}
    if effect.seen_in == "refusal":
        with pytest.raises(ConfigError, match=key):
            observe({**base, key: effect.change})
        return
    before, after = observe(base), observe({**base, key: effect.change})
    assert before[effect.seen_in] != after[effect.seen_in]


# -- options of the types ------------------------------------------------------------------------------------------

# Option -> a changed value, or (what both have, the changed value), where another value than `another` gives is needed.
ALWAYS_DEAD = {"dead_after_tokens": 1}
CHANGES: dict[str, Any] = {
    "d_sae": 24,
    "normalize": "none",
    "loss": "mse",
    "b_dec_init": "zero",
    "dead_after_tokens": 1,
    "k": 2,
    "auxk_coef": (ALWAYS_DEAD, 0.9),
    "k_aux": ({**ALWAYS_DEAD, "auxk_coef": 1.0}, 1),
    "k_start": ({"k_anneal": 1.0}, 6),
    "k_anneal": ({"k_start": 8}, 1.0),
    "l1_coef": 1.0,
    "l1_warmup": 1.0,
    "p_end": 0.5,
    "p_anneal_from": ({"p_end": 0.5}, 0.0),
    "l0_coef": ({"recipe": "tanh"}, 3.0),
    "l0_warmup": ({"recipe": "tanh"}, 0.1),
    "l0_target": 2.0,
    "tanh_scale": ({"recipe": "tanh"}, 1.0),
    "dead_coef": ({**ALWAYS_DEAD, "recipe": "tanh", "threshold_init": 3.0}, 0.5),
    "threshold_init": 0.5,
    "bandwidth": 1.0,
    "fractions": (0.5, 1.0),
    "group_sizes": (4, 44),
    "temporal_coef": 5.0,
    "temperature": ({"temporal_coef": 5.0}, 0.1),
    "max_pairs": ({"temporal_coef": 5.0}, 2),
    "base": "gated",
    "base_options": {"auxk_coef": 0.0, "multi_topk": True},
}
# Where the general change is none for a type.
OWN_CHANGES: dict[tuple[str, str], Any] = {
    ("gated", "dead_after_tokens"): None,  # only counted: shown as `dead`
    ("vanilla", "dead_after_tokens"): None,
    ("matching_pursuit", "dead_after_tokens"): None,
    ("route", "normalize"): None,  # one choice
    ("route_matryoshka", "normalize"): None,
    ("route_matryoshka", "base"): "batchtopk",
    ("route", "base"): ({"k": None}, "gated"),
    ("temporal", "fractions"): (0.5, 1.0),
}
CASES = [
    (name, f.name)
    for name in sae_core.registry.names()
    for f in fields(sae_core.registry.get(name).Config)
    if f.name not in ("d_in", "n_hooks", "d_out")
]


def another(spec: Field[Any]) -> Any:
    """A value that an option may take and that is not its default: an option of a new type needs no line above."""
    default, choices = spec.default, spec.metadata["choices"]
    if choices is not None:
        return next(choice for choice in choices if choice != default)
    if isinstance(default, bool):
        return not default
    least = max((spec.metadata[bound] or 0 for bound in ("ge", "gt")), default=0)
    return default + 1 if isinstance(default, int) else (default or least or 0.5) / 2


def rows(n: int, seed: int, reads: sae_core.Reads) -> sae_core.Rows:
    source = torch.Generator().manual_seed(seed)
    directions = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(99))
    active = (torch.rand(n, 12, generator=source) < 0.3) * torch.rand(n, 12, generator=source)
    x = {"a": active @ directions[0] + 0.3, "b": active @ directions[1]}
    return {"a": x["a"]} if reads.one_row else x


def after_some_steps(type: str, options: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[float]]:
    cls = sae_core.registry.get(type)
    known = {f.name for f in fields(cls.Config)}
    given = {"d_in": 6, "d_sae": 48, "dead_after_tokens": 10_000, **({"k": 3} if "k" in known else {})}
    given |= {"l0_target": 3.0} if "l0_target" in known else {}
    given |= {"n_hooks": 2} if "n_hooks" in known else {}
    settings = {"type": type, "steps": 6, "batch_size": 6, "lr": 0.01, "warmup_steps": 0, **given, **options}
    config = replace(make_config([settings]), device="cpu", compute_dtype="float32")
    sae = build_sae(config)
    sae.initialize(rows(200, 0, cls.reads), torch.Generator().manual_seed(0))
    run = Run.create(config, sae)
    losses = [train_step(run, RowInput(rows(6, i, cls.reads)), measure=True).loss for i in range(6)]
    return sae.state_dict(), [*losses, float(sae.dead_mask.sum())]


@pytest.mark.parametrize(("type", "option"), CASES, ids=lambda value: value)
def test_an_option_of_a_type_has_an_effect(type: str, option: str) -> None:
    spec = {f.name: f for f in fields(sae_core.registry.get(type).Config)}[option]
    change = OWN_CHANGES[type, option] if (type, option) in OWN_CHANGES else CHANGES.get(option) or another(spec)
    if (type, option) in OWN_CHANGES and change is None:
        if option == "dead_after_tokens":
            changed, plain = (after_some_steps(type, {option: n}) for n in (1, 10_000))
            assert changed[1][-1] > plain[1][-1]
        else:
            assert len(spec.metadata["choices"]) == 1
        return
    base, value = change if isinstance(change, tuple) and isinstance(change[0], dict) else ({}, change)
    known = {f.name for f in fields(sae_core.registry.get(type).Config)}
    base = {key: value for key, value in base.items() if key in known}
    before, after = after_some_steps(type, base), after_some_steps(type, {**base, option: value})
    same = before[1] == after[1] and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))
        for a, b in zip(before[0].values(), after[0].values(), strict=True)
    )
    assert not same


def test_losses_through_the_model_are_tested_where_a_model_is() -> None:
    assert all(loss in (ROOT / "tests" / "test_train_splice.py").read_text() for loss in LM_LOSSES)
