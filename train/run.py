"""A whole run: from a config to runs/<name>/, and resuming from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sae_granary import sae_core
from sae_granary.common.errors import ConfigError, nearest
from sae_granary.common.finished_run import RECORD, SUMMARY, is_complete, read_summary
from sae_granary.common.signals import StopRequest
from sae_granary.train.callbacks import AnyCallback
from sae_granary.train.config.merge import differing, make_config, to_flat
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.data.cache_of_run import find_cache
from sae_granary.train.data.language import check_language_model
from sae_granary.train.data.run_data import RunData
from sae_granary.train.data.stage import stage
from sae_granary.train.data.verify import verify_files
from sae_granary.train.errors import RunExistsError, shortage_is_clear
from sae_granary.train.folders import check_name, claim_folder, exclusive, read_run
from sae_granary.train.lockstep import train_together
from sae_granary.train.memory.capacity import check_capacity, needed_disk
from sae_granary.train.memory.shrink import out_of_memory_is_clear
from sae_granary.train.open_trainer import open_trainer
from sae_granary.train.ranks.place import place_of_process
from sae_granary.train.sinks.sink import BaseSink
from sae_granary.train.state.identity import check_identity
from sae_granary.train.trainer import Result, Trainer

Begun = tuple[RunData, Path] | Result  # a run to train, or the result of one that is complete


def train_sae(
    config: TrainConfig | None = None,
    *,
    sinks: Sequence[BaseSink] = (),
    callbacks: Sequence[AnyCallback] = (),
    overwrite: bool = False,
    resume: Literal["never", "auto"] = "never",
    verify: bool = False,
    stop: StopRequest | None = None,
    **settings: Any,
) -> Result:
    """Train an SAE from a cache: `train_sae(cache="cache/bert_l6", type="topk", k=32)`.

    Settings are those of `TrainConfig` and of the variant; together with a `config` they replace its values. `sinks`
    receive the metrics, `callbacks` follow the steps (`train.callbacks`).
    Everything that can be wrong is told before anything is written (ConfigError, CacheError, SAEError).
    With `verify` the checksums of the files that the run reads are checked first (CorruptCacheError).
    With resume="auto" the same call starts a run, continues it from its newest checkpoint, or returns its result.

    >>> from sae_granary import train_sae
    >>> result = train_sae(cache="cache/demo_l3", type="batchtopk", k=8, steps=4, batch_size=256, device="cpu")
    >>> result.folder.as_posix(), result.sae.type_name, 0 < result.summary["eval"]["fvu"] < 2
    ('runs/demo_l3_layer_3_batchtopk_d3072_k8_s0', 'batchtopk', True)
    """
    _check_resume(resume, overwrite)
    config = make_config([settings]) if config is None else _replace(config, settings)
    begin = partial(_begin, config, overwrite=overwrite, resume=resume, verify=verify)
    return _train(begin, to_flat(config), config.device, sinks, callbacks, stop)


def _begin(
    config: TrainConfig, part: Callable[[RunData], RunData], *, overwrite: bool, resume: str, verify: bool
) -> Begun:
    """Start a run, or find the one that is there; `part` checks what was resolved, and gives this rank its part."""
    data = part(RunData.open(config))
    if resume == "auto" and (begun := _begun(config, data)) is not None:
        if isinstance(begun, Result):
            return begun
        if verify:
            verify_files([begun[0]])
        return part(begun[0]), begun[1]
    check_language_model(data)
    check_capacity(data)
    stage(data, copy=False)
    if verify:
        verify_files([data])
    return data, claim_folder(data.config, overwrite=overwrite)


def _check_resume(resume: str, overwrite: bool) -> None:
    if resume not in ("never", "auto"):
        raise ConfigError(f"resume={resume!r}: expected auto or never{nearest(resume, ('auto', 'never'))}")
    if resume == "auto" and overwrite:
        raise ConfigError("--resume auto continues a run, --overwrite starts it anew every time: give one of them")


def _begun(config: TrainConfig, found: RunData) -> Begun | None:
    """A run of the same config: a function that continues it, or its result; None if there is none.

    Its cache may have moved. Raises RunExistsError for a run of another config, CheckpointError for one of another
    cache.
    """
    resolved = found.config
    folder = Path(resolved.runs_dir) / check_name(str(resolved.name))
    if not (folder / RECORD).is_file():
        return None
    saved, record = read_run(folder)
    moved = found.cache.manifest.fingerprint == record["cache"]
    cache = (
        resolved.cache if moved else find_cache(saved.cache, record, folder, by_shard=saved.shuffle_shards is not None)
    )
    saved = replace(saved, cache=cache, lm=resolved.lm or saved.lm)  # its weights are compared where it is loaded
    data = RunData.reopen(saved, record)
    check_identity({"cache": record["cache"], "order": record["order"]}, asdict(data.identity), folder / RECORD)
    opened = RunData.open(config, data.cache)  # on the shards that it started with
    now = replace(opened.config, runs_dir=saved.runs_dir, lm=saved.lm)
    if Path(saved.cache).resolve() != Path(resolved.cache).resolve():
        now = replace(now, cache=resolved.cache)
    if differences := differing(saved, now):
        raise RunExistsError(
            f"{folder} was started with other settings ({', '.join(differences[:4])}): choose another --name, "
            "or give its own"
        )
    if is_complete(folder):
        return Result(sae_core.load(folder), folder, read_summary(folder))
    return data, folder


def resume_training(
    folder: str | Path,
    *,
    cache: str | Path | None = None,
    lm: str | None = None,
    sinks: Sequence[BaseSink] = (),
    callbacks: Sequence[AnyCallback] = (),
    stop: StopRequest | None = None,
) -> Result:
    """Continue a run from its newest checkpoint, bit for bit as if it had never stopped, on the same machine and under
    the same process settings (`common.process`). A cache that was moved is found relative to the run, or is given;
    `lm` is where the language model is now, if it was moved.

    >>> from sae_granary import resume_training
    >>> resume_training("runs/stopped").summary["steps"]
    4

    Raises NotARunError, CheckpointError (damaged, or another cache), RunExistsError (already complete).
    """
    folder = Path(folder)

    def begin(part: Callable[[RunData], RunData]) -> Begun:
        config, record = read_run(folder)
        if is_complete(folder):
            raise RunExistsError(f"{folder} is complete; its result is in {folder / SUMMARY}")
        place = find_cache(config.cache, record, folder, cache, by_shard=config.shuffle_shards is not None)
        config = replace(config, cache=place, lm=lm or config.lm)
        return part(RunData.reopen(config, record)), folder

    given = {"folder": folder, "cache": cache, "lm": lm}
    return _train(begin, given, read_run(folder)[0].device, sinks, callbacks, stop)


def _train(
    begin: Callable[[Callable[[RunData], RunData]], Begun],
    given: Mapping[str, Any],
    device: str,
    sinks: Sequence[BaseSink],
    callbacks: Sequence[AnyCallback],
    stop: StopRequest | None,
) -> Result:
    """Train a run from its current step to its result, with the other ranks if torchrun started several."""
    open_run = partial(_opened, extra=sinks, callbacks=callbacks)
    if (place := place_of_process()) is not None:
        from sae_granary.train.ranks.run import train_on_ranks  # torch.distributed

        return train_on_ranks(place, begin, open_run, given, device, stop)
    begun = begin(lambda data: data)
    if isinstance(begun, Result):
        return begun
    with open_run(*begun) as trainer:
        return train_together([trainer], StopRequest() if stop is None else stop)[trainer]


@contextmanager
def _opened(
    data: RunData, folder: Path, extra: Sequence[BaseSink], callbacks: Sequence[AnyCallback]
) -> Iterator[Trainer]:
    """The trainer of a run's folder, which is held until the block ends."""
    with ExitStack() as stack:
        stack.enter_context(shortage_is_clear(folder, needed_disk(data.config)))
        stack.enter_context(exclusive(folder))
        stack.enter_context(out_of_memory_is_clear(data.config, folder))
        yield open_trainer(data, folder, extra, callbacks, stack)


def _replace(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """Replace settings of a config, with the usual checks."""
    if not settings:
        return config
    own = {k: v for k, v in settings.items() if k in TrainConfig.__dataclass_fields__ and k != "options"}
    options = {k: v for k, v in settings.items() if k not in own}
    checked = make_config([{"type": own.get("type", config.type), **own, **options}])
    changed = {k: getattr(checked, k) for k in own}
    kept = config.options if checked.type == config.type else {}  # another type has other options
    return replace(config, **changed, options={**kept, **checked.options})
