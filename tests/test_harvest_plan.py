"""What `plan` foretells is what `run` does, from the text column alone and without weights."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import harvest_kit
import pyarrow
import pyarrow.parquet
import pytest
from command_kit import invoke
from harvest_kit import WIDTH, build_model, texts
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as sentence_modules

from sae_granary.harvest.cli import app
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.plan import Plan, plan
from sae_granary.harvest.run import harvest_activations
from sae_granary.models.config import ModelConfig, TokenConfig, WhereConfig

N_TICKETS = 1500
TICKETS = [{"id": i, "log": "stack trace " * 40, "body": text} for i, text in enumerate(texts(N_TICKETS, longest=8))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "bert", "bert")


def config_of(model: Path, data: Path, **options: object) -> HarvestConfig:
    given = {"documents": "auto", "text_columns": "body", "layers": 0, "ctx_len": 16}
    return harvest_kit.config_of(model, data, data.with_name("cache"), **given, **options)


def planned(config: HarvestConfig) -> Plan:
    return plan(config, lambda message: None)


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, TICKETS[0])
        writer.writeheader()
        writer.writerows(TICKETS)


WRITE: dict[str, Callable[[Path], object]] = {
    "a.csv": write_csv,
    "a.jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in TICKETS)),
    "a.json": lambda path: path.write_text(json.dumps(TICKETS)),
    "a.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TICKETS), path),
}


def test_rows_are_planned_from_the_text_not_from_other_columns(model: Path, tmp_path: Path) -> None:
    found = {}
    for name, write in WRITE.items():
        write(tmp_path / name)
        found[name] = planned(config_of(model, tmp_path / name)).n_rows
    n_rows = harvest_activations(config_of(model, tmp_path / "a.csv"), quiet=True).n_rows
    for name, estimate in found.items():
        assert estimate == pytest.approx(n_rows, rel=0.1), name
    by_docs = planned(config_of(model, tmp_path / "a.csv", max_docs=500))
    assert by_docs.n_rows == pytest.approx(n_rows / 3, rel=0.1)


def test_plan_needs_no_weights(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    WRITE["a.jsonl"](tmp_path / "a.jsonl")
    want = planned(config_of(model, tmp_path / "a.jsonl"))
    assert planned(config_of(bare, tmp_path / "a.jsonl")).n_bytes == want.n_bytes


def test_plan_exits_1_when_the_disk_is_too_small_and_names_the_column(model: Path, tmp_path: Path) -> None:
    WRITE["a.jsonl"](tmp_path / "a.jsonl")
    line = (app, "plan", "--model", model, "--layer", 1, "--device", "cpu", "--out", tmp_path / "out", "--dataset")
    fits = invoke(*line, tmp_path / "a.jsonl", "--text-column", "body").output
    assert "a.jsonl, column body" in fits
    assert "0.0" not in fits.split("bytes")[1].split("\n")[0]
    assert "it does NOT fit" in invoke(*line, "-", "--max-tokens", "900T", code=1).output


@pytest.mark.parametrize("options", [{}, {"dtype": "int8"}, {"unit": "text"}], ids=str)
def test_bytes_of_a_harvest_are_planned_within_2_percent(model: Path, tmp_path: Path, options: dict[str, str]) -> None:
    WRITE["a.jsonl"](tmp_path / "a.jsonl")
    config = replace(config_of(model, tmp_path / "a.jsonl", max_tokens=5000, rows_per_shard=2048))
    config = replace(config, dtype=options.get("dtype", "auto"), text=replace(config.text, keep_columns=("log",)))
    if "unit" in options:
        place = tmp_path / "pooled"
        models = [sentence_modules.Transformer(str(model)), sentence_modules.Pooling(WIDTH)]
        SentenceTransformer(modules=models, device="cpu").save(str(place))
        config = replace(config, model=ModelConfig(str(place), device="cpu"), tokens=TokenConfig(), max_tokens=None)
        config = replace(config, where=WhereConfig(unit="text"))
    told = planned(config).n_bytes
    harvest_activations(config, quiet=True)
    files = [f for f in config.out_path.rglob("*") if f.is_file() and f.name not in ("about.json", "harvest.log")]
    assert told == pytest.approx(sum(f.stat().st_size for f in files), rel=0.02)
