"""Damaged model files: one line, exit code 2, nothing written, nothing unpickled."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
from command_kit import invoke
from harvest_kit import build_model
from safetensors.torch import load_file, save_file

from sae_granary.harvest.cli import app


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    build_model(folder, "bert")
    (folder.parent / "texts.txt").write_text("one text\n\nand another\n")
    return folder


@pytest.fixture
def model(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "bert"))


def refused(model: Path, *words: str, unit: tuple[str, ...] = ("--layer", "0")) -> str:
    out = model.parent / "out"
    flags = ["--dataset", model.parent / "texts.txt", "--out", out, "--device", "cpu", *unit]
    (model.parent / "texts.txt").write_text("one text\n\nand another\n")
    line = invoke(app, "run", "--model", model, "--quiet", *flags, code=2).stderr  # libraries print to stdout
    assert line.count("\n") == 1
    assert all(word in line for word in words), line
    assert not list(out.glob("*.json"))
    return line


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


def _header(length: int, text: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + text


WEIGHTS = {
    "empty": lambda data: b"",
    "cut in the length": lambda data: data[:5],
    "cut in the header": lambda data: data[:100],
    "cut in the data": lambda data: data[:-7],
    "cut to half": lambda data: data[: len(data) // 2],
    "text": lambda data: b"not weights at all\n" * 20,
    "header longer than the file": lambda data: _header(2**60),
    "header that is no JSON": lambda data: _header(4, b"abcd"),
    "header of another type": lambda data: _header(4, b"[12]"),
    "no tensors": lambda data: _header(2),
    "deep header": lambda data: _header(20_000, b'{"a":' * 4000),
    "a line of git lfs": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n",
}


SOME = {"empty", "cut in the data", "header that is no JSON"}
MANY = [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in WEIGHTS]


@pytest.mark.parametrize("damage", MANY)
def test_damaged_safetensors_are_one_line(model, damage) -> None:
    file = model / "model.safetensors"
    file.write_bytes(WEIGHTS[damage](file.read_bytes()))
    refused(model, str(model))


@pytest.mark.parametrize("kind", ["pickle", "garbage", "empty", "zip"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle_is_refused_and_not_run(model, name, kind) -> None:
    (model / "model.safetensors").unlink()
    canary = model.parent / "canary"
    content = {
        "pickle": pickle.dumps(Evil(canary)),
        "garbage": b"\x80\x04" + b"x" * 99,
        "empty": b"",
        "zip": b"PK\3\4abc",
    }
    (model / name).write_bytes(content[kind])
    refused(model, str(model))
    assert not canary.exists()


def test_weights_of_another_type_are_refused(model) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor.flatten()[:1].clone() for name, tensor in tensors.items()}, model / "model.safetensors")
    refused(model, "do not fit its config")


CONFIGS = [
    {"hidden_size": "wide"},
    {"hidden_size": -1},
    {"hidden_size": 10**400},
    {"hidden_size": 2**40},
    {"num_attention_heads": 0},
    {"num_hidden_layers": None},
    {"num_hidden_layers": "many"},
    {"vocab_size": None},
    {"vocab_size": 1.5},
    {"hidden_act": "shrug"},
    {"hidden_act": 3},
    {"model_type": 7},
    {"model_type": "\x1b[31m"},
    {"max_position_embeddings": "x"},
]


@pytest.mark.slow
@pytest.mark.parametrize("change", CONFIGS, ids=lambda change: json.dumps(change)[:40])
def test_a_config_of_wrong_types_is_one_line(model, change) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert "\x1b" not in refused(model).replace("\x1b[31merror", "").replace("\x1b[0m", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "null", '"x"', "{", "[" * 100_000, "\xff\xfe"])
def test_what_is_no_json_object_is_one_line(model, name, text) -> None:
    (model / name).write_bytes(text.encode("latin-1"))
    refused(model)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "[]", "{}", '[{"type": 3}]', "[" * 100_000])
@pytest.mark.parametrize("name", ["modules.json", "1_Pooling/config.json"])
def test_damaged_files_of_a_sentence_transformer_are_one_line(model, name, text) -> None:
    modules = [("0", "", "models.Transformer"), ("1", "1_Pooling", "models.Pooling")]
    listed = [
        {"idx": int(i), "name": i, "path": path, "type": f"sentence_transformers.{kind}"} for i, path, kind in modules
    ]
    (model / "modules.json").write_text(json.dumps(listed))
    (model / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (model / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (model / name).write_text(text)
    refused(model, unit=("--unit", "text"))
