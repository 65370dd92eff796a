"""Exports read back, refusals, and a dry run of publishing."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from command_kit import invoke, refused
from conftest import write_cache
from sae_kit import new

from sae_granary import sae_core, train_sae
from sae_granary.common.finished_run import read_summary
from sae_granary.train.cli import app
from sae_granary.train.publish.published import FILES as PUBLISHED
from sae_granary.train.publish.push import staged

SUMMARY = {"name": "run", "type": "topk", "d_sae": 64, "d_in": 16, "tokens": 100, "eval_part": "heldout", "eval": {}}


def saved(folder: Path, name: str = "topk", **options: object) -> Path:
    sae = new(name, d_in=16, d_sae=64, **options)
    sae.initialize(torch.randn(200, 16, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1))
    metadata = {"model_name": "toy", "hf_hook_name": "encoder.layer.3", "cache_fingerprint": {"dataset": "demo"}}
    sae_core.save(sae, folder, metadata)
    return folder


@pytest.mark.parametrize("tool", ["saelens", "sparsify", "delphi"])
def test_an_export_reads_back_as_the_same_function(tmp_path: Path, tool: str) -> None:
    source = saved(tmp_path / "run", k=4)
    invoke(app, "export", source, "--to", tool, "--out", tmp_path / "out")
    folder = tmp_path / "out" / "encoder.layer.3" if tool == "delphi" else tmp_path / "out"
    assert not (folder / "granary.json").exists()
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(sae_core.load(folder)(x).x_hat, sae_core.load(source)(x).x_hat)


@pytest.mark.parametrize(
    ("name", "tool", "message"),
    [
        ("topk", "saelen", "did you mean 'saelens'"),
        ("batchtopk", "sparsify", "cannot be written for sparsify"),
        ("batchtopk", "delphi", "--to delphi: delphi reads the coders of sparsify, and type='batchtopk' cannot be"),
        ("transcoder", "saelens", "cannot be written for SAELens"),
    ],
)
def test_what_a_tool_cannot_hold_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str, tool: str, message: str
) -> None:
    sae_core.save(new(name, d_in=16, d_sae=64, k=4), tmp_path / "run")
    assert message in refused(app, "export", tmp_path / "run", "--to", tool, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_push_prints_the_card_and_uploads_nothing(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", k=4)
    (folder / "summary.json").write_text(json.dumps({**SUMMARY, "k": 4, "eval": {"l0": 4.0, "fvu": 0.25}}))
    output = invoke(app, "push", folder, "someone/toy-sae").output
    assert "sae_weights.safetensors" in output
    assert "| fvu | 0.25 |" in output
    assert "dataset: `demo`" in output
    assert "nothing was uploaded" in output


@pytest.mark.parametrize(
    ("model", "fingerprint", "base"),
    [
        ("someone/bert", {"weights_xxh3": None}, "someone/bert"),
        ("gpt2", {}, "gpt2"),
        ("models/secret-bert", {"weights_xxh3": "0123"}, None),  # a relative path of the machine that harvested
        ("/home/alice/secret/my-bert", {}, None),
        ("~/my-bert", {}, None),
        ("C:\\Users\\alice\\my-bert", {}, None),
        (None, {}, None),
    ],
)
def test_the_card_names_a_base_model_of_the_hub_and_no_local_path(
    tmp_path: Path, model: str | None, fingerprint: dict[str, str | None], base: str | None
) -> None:
    sae = new("topk", d_in=16, d_sae=64, k=4)
    sae_core.save(sae, tmp_path, {"model_name": model, "cache_fingerprint": {"model": model, **fingerprint}})
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    output = invoke(app, "push", tmp_path, "someone/toy-sae").output
    head = yaml.safe_load(output[output.index("---") : output.rindex("---")].split("---")[1])
    assert head.get("base_model") == base
    assert head["library_name"] == "saelens"  # what SAELens' search for SAEs of the hub finds
    assert "alice" not in output
    assert "~" not in output


def test_a_type_that_saelens_cannot_load_is_not_tagged_as_its_own(tmp_path: Path) -> None:
    sae_core.save(new("transcoder", d_in=16, d_sae=64, k=4), tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({**SUMMARY, "type": "transcoder"}))
    assert "library_name: sae-granary" in invoke(app, "push", tmp_path, "someone/toy-sae").output


def test_a_run_records_what_the_tools_of_saelens_ask_for(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", decoder=True)
    settings = {"cache": str(tmp_path / "cache"), "runs_dir": str(tmp_path), "type": "topk", "k": 4, "steps": 1}
    folder = train_sae(**settings, batch_size=64, d_sae=32, name="run").folder
    cfg = json.loads((folder / "cfg.json").read_text())["metadata"]
    asked = ("model_name", "hook_name", "context_size", "prepend_bos", "dataset_path", "model_from_pretrained_kwargs")
    assert set(asked) <= cfg.keys()
    assert cfg["prepend_bos"] is False
    assert cfg["seqpos_slice"] == [1, None]  # a causal model: position 0 was left out of the training


def test_what_is_uploaded_names_no_path_of_this_machine_and_loads(tmp_path: Path) -> None:
    home = tmp_path / "home alice"
    settings = {"cache": str(write_cache(home / "cache" / "toy", n_docs=20)), "runs_dir": str(home / "runs")}
    settings |= {"type": "topk", "k": 4, "steps": 2, "batch_size": 64, "d_sae": 32}
    first = train_sae(**settings, name="first").folder
    trained = train_sae(**settings, name="second", init_from=str(first))
    assert "home alice" in (trained.folder / "summary.json").read_text()
    with staged(trained.folder, "mit") as folder:
        assert {path.name for path in folder.iterdir()} == {*PUBLISHED, "README.md"} - {"granary.safetensors"}
        for path in folder.iterdir():
            assert b"home alice" not in path.read_bytes(), path.name
            assert str(tmp_path).encode() not in path.read_bytes(), path.name
        x = torch.randn(20, 16, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            assert torch.equal(sae_core.load(folder)(x).x_hat, sae_core.load(trained.folder)(x).x_hat)
        summary, whole = read_summary(folder), read_summary(trained.folder)
        assert (summary["cache"], summary["eval"]) == ("toy", whole["eval"])
        assert summary["notes"][0].startswith("init_from=first: FVU ")
        config, own = (yaml.safe_load((at / "config.yaml").read_text()) for at in (folder, trained.folder))
        changed = {key for part in own for key in own[part] if own[part][key] != config[part][key]}
        assert changed == {"cache", "runs_dir", "init_from"}


def test_pushing_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    assert "holds no finished SAE" in refused(app, "push", tmp_path, "someone/toy-sae")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (Path(__file__).parents[1] / "train" / "new", "belongs to Python code (train/): choose another --out"),
        ("/dev/null", "/dev/null is no folder: choose another --out"),
    ],
)
def test_an_export_goes_to_a_folder_of_its_own(tmp_path: Path, out: object, message: str) -> None:
    assert message in refused(app, "export", saved(tmp_path / "run", k=4), "--to", "saelens", "--out", out)
    assert not (Path(__file__).parents[1] / "train" / "new").exists()
