# ruff: noqa: F811
"""Faults that the tests of single parts leave out: of the disk, of rights, of the user, of another revision."""

import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from cache_kit import contents
from test_cache_travel import Faulty, cache, faulty, run  # noqa: F401
from test_harvest_extend import config, harvest, models  # noqa: F401
from test_small_disk import small_disk  # noqa: F401

from sae_granary import open_cache
from sae_granary.cache.errors import CacheError
from sae_granary.cache.remote.pull import plan_pull, pull
from sae_granary.cache.remote.push import plan_push, push
from sae_granary.common.files import free_bytes
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.errors import HarvestError
from sae_granary.harvest.replay.add import add_hooks
from sae_granary.harvest.replay.repair import repair
from sae_granary.models.config import ModelConfig, WhereConfig

REPO = Path(__file__).parents[1]


def test_a_pull_on_a_full_disk_names_it_and_continues(small_disk, cache, faulty) -> None:
    folder, _ = small_disk
    push(plan_push(cache, "faulty://b/c"))

    first = threading.Lock()

    def fill(n_bytes: int) -> None:  # another program's file, after the pull has begun and before it writes
        with first:
            if not (folder / "other").exists():
                (folder / "other").write_bytes(bytes(max(0, free_bytes(folder) - (8 << 10))))

    with pytest.raises(CacheError, match=r"no space left for .*/disk/c: up to [\d.]+ KiB needed, .* free; free some"):
        pull(plan_pull("faulty://b/c", folder / "c"), progress=fill)
    assert not (folder / "c/manifest.json").exists()
    (folder / "other").unlink()
    pull(plan_pull("faulty://b/c", folder / "c"))
    (folder / "c/.lock").unlink(missing_ok=True)
    assert contents(folder / "c") == contents(cache)


def test_a_pull_without_rights_is_one_line(tmp_path, cache, faulty, monkeypatch) -> None:
    push(plan_push(cache, "faulty://b/c"))

    def refuse(self, path, **options):
        if path.endswith("manifest.json"):
            return Faulty.__mro__[1].cat_file(self, path, **options)
        raise PermissionError("Access Denied")

    monkeypatch.setattr(Faulty, "cat_file", refuse)
    error = run("pull", "faulty://b/c", tmp_path / "back", code=2).stderr
    assert "no right to read faulty://b/c/" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "back/manifest.json").exists()


def test_another_revision_of_a_hub_model_is_refused_with_both(
    config: HarvestConfig, models: dict[str, str], tmp_path: Path, monkeypatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    repository, first, second = tmp_path / "hub/models--org--tiny", "1" * 40, "2" * 40
    (repository / "refs").mkdir(parents=True)
    for revision in (first, second):
        shutil.copytree(models["bert"], repository / "snapshots" / revision)
    (repository / "refs/main").write_text(first)
    config = replace(config, model=ModelConfig("org/tiny", device="cpu"))
    harvest(config)
    (repository / "refs/main").write_text(second)
    with pytest.raises(CacheError, match=f"revision.*{first}.*{second}"):
        harvest(config)
    harvest(replace(config, model=replace(config.model, revision=first)))  # the recorded one
    added = add_hooks(config.out_path, WhereConfig(layers=(2,)), quiet=True)  # takes it by itself
    assert added.n_rows == open_cache(config.out_path).n_rows
    shutil.rmtree(repository / "snapshots" / first)
    with pytest.raises(Exception, match=r"org/tiny") as lost:
        add_hooks(config.out_path, WhereConfig(layers=(0,)), quiet=True)
    assert getattr(lost.value, "exit_code", None) == 2


def test_another_tokenizer_is_refused_by_extend_and_repair(
    config: HarvestConfig, models: dict[str, str], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(models["bert"], tmp_path / "model"))
    config = replace(config, model=ModelConfig(str(model), device="cpu"))
    harvest(config)
    words = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(words.replace('"fox"', '"vixen"'))
    before = contents(config.out_path)
    with pytest.raises(CacheError, match="tokenizer_xxh3"):
        harvest(config, extend=True, max_tokens=2400)
    shard = next((config.out_path / "norms").rglob("c.0"))
    shard.write_bytes(bytes(shard.stat().st_size))
    damaged = contents(config.out_path)
    with pytest.raises(HarvestError, match="tokenizer_xxh3"):
        repair(config.out_path, quiet=True)
    assert contents(config.out_path) == damaged
    shard.write_bytes(before[shard.relative_to(config.out_path).as_posix()])
    assert contents(config.out_path) == before


def test_secrets_of_the_environment_are_in_no_file_of_a_cache(config: HarvestConfig, tmp_path: Path) -> None:
    secrets = {name: f"CANARY-{i}" for i, name in enumerate(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"))}
    given = ["run", "--model", config.model.model, "--layer", "1", "--device", "cpu", "--max-tokens", "200"]
    given += ["--dataset", config.text.dataset, "--out", str(tmp_path / "c")]
    command = [sys.executable, "-m", "sae_granary.harvest.cli", *given]
    environment = {**os.environ, **secrets, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = b"".join(file.read_bytes() for file in (tmp_path / "c").rglob("*") if file.is_file())
    assert b"CANARY" not in written
    assert "CANARY" not in done.stdout + done.stderr
