"""`encode_texts`: the rows of texts are those of a harvest of the same texts."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from command_kit import invoke, refused
from sae_kit import saved
from safetensors.torch import load_file, save_file

from sae_granary import encode_texts, harvest_activations, open_cache
from sae_granary.analyze.cli import app
from sae_granary.analyze.encoding import text_rows
from sae_granary.analyze.encoding.codes import open_codes
from sae_granary.analyze.encoding.encode import encode_cache
from sae_granary.analyze.errors import AnalyzeError, MismatchError
from sae_granary.analyze.latents.show import text_lines
from sae_granary.analyze.source import open_source
from sae_granary.common.errors import ConfigError
from sae_granary.models.demo import demo_model_path
from sae_granary.models.errors import ModelError

TEXTS = ["A loop ends with break.", "The cats are asleep", "word " * 40]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A harvest of three texts, the last of which takes several windows, and an SAE of its width."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    harvest_activations(
        model="demo", dataset=str(folder / "texts.txt"), documents="line", layers=3, ctx_len=16, out=folder / "cache",
        device="cpu", quiet=True,
    )  # fmt: skip
    saved(folder / "sae", d_in=384, d_sae=64, k=8)
    return folder


def test_codes_of_texts_are_those_of_their_harvest(place: Path, tmp_path: Path) -> None:
    found = encode_texts(place / "sae", TEXTS, cache=place / "cache", device="cpu")
    cache = open_cache(place / "cache")
    stored = encode_cache(open_source(place / "sae", place / "cache", device="cpu"), tmp_path / "codes")
    assert found.codes.shape == stored.shape
    assert list(found.tokens) == [cache.token(row) for row in range(len(cache))]
    np.testing.assert_array_equal(found.text, cache.column("doc_id")[:])
    np.testing.assert_array_equal(found.flags, cache.column("flags")[:])
    np.testing.assert_allclose(found.codes.dense().numpy(), stored.dense(), atol=1e-4)


def test_codes_of_whole_texts_are_those_of_their_harvest(place: Path, tmp_path: Path) -> None:
    harvest_activations(
        model="demo", dataset=str(place / "texts.txt"), documents="line", unit="text", out=tmp_path / "cache",
        dtype="bfloat16", device="cpu", quiet=True,
    )  # fmt: skip
    source = open_source(place / "sae", tmp_path / "cache", device="cpu")
    found = encode_texts(place / "sae", [TEXTS[0], " ", *TEXTS[1:]], cache=tmp_path / "cache", device="cpu")
    assert found.text.tolist() == [0, 2, 3]  # an empty text has no row, as in a harvest
    assert found.tokens == tuple(TEXTS)
    stored = encode_cache(source, source.place / "codes").dense()
    np.testing.assert_allclose(found.codes.dense().numpy(), stored, atol=1e-5)
    shown = list(text_lines(found))
    assert [line[:40].strip() for line in shown if line] == [text[:40].strip() for text in TEXTS]


def test_many_texts_are_encoded_in_parts(place: Path, monkeypatch) -> None:
    whole = encode_texts(place / "sae", TEXTS, cache=place / "cache", device="cpu")
    monkeypatch.setattr(text_rows, "BUFFER_TOKENS", 10)
    parts = encode_texts(place / "sae", TEXTS, cache=place / "cache", device="cpu")
    assert (parts.tokens, parts.text.tolist()) == (whole.tokens, whole.text.tolist())
    np.testing.assert_allclose(parts.codes.dense().numpy(), whole.codes.dense().numpy(), atol=1e-4)


@pytest.mark.parametrize("given", ["text", "stdin"])
def test_the_command_writes_codes_of_texts(place: Path, tmp_path: Path, given: str) -> None:
    texts, pipe = [TEXTS[0], "", TEXTS[1]], None
    flags = [part for text in texts for part in ("--text", text)]
    if given == "stdin":
        flags, pipe = ["--texts", "-", "--text-column", "t"], "".join(json.dumps({"t": text}) + "\n" for text in texts)
    sae = [str(place / "sae"), "--cache", str(place / "cache"), "--device", "cpu"]
    done = invoke(app, "encode", *sae, *flags, "--out", tmp_path / "out", stdin=pipe)
    assert done.stdout == f"{tmp_path / 'out'}: 2 texts, 64 latents\n"
    assert done.stderr == "1 of 3 texts hold no tokens and have no rows; the first is text 1, counted from 0\n"
    codes = open_codes(tmp_path / "out")
    expected = encode_texts(place / "sae", texts, cache=place / "cache", device="cpu")
    assert codes.doc_ids is not None
    assert codes.doc_ids.tolist() == expected.text.tolist()
    np.testing.assert_allclose(codes.dense(), expected.codes.dense().numpy(), atol=1e-5)


def test_codes_of_texts_are_pooled_and_stored_as_the_codes_of_a_cache_are(place: Path, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("".join(f"{text}\n" for text in TEXTS))
    sae = [
        str(place / "sae"),
        "--cache",
        str(place / "cache"),
        "--device",
        "cpu",
        "--pool",
        "max",
        "--format",
        "parquet",
    ]
    for flags in (
        ["--out", str(tmp_path / "cache.parquet")],
        ["--texts", f"{tmp_path}/t", "--out", f"{tmp_path}/t.parquet"],
    ):
        invoke(app, "encode", *sae, *flags)
    expected, found = (pq.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("cache", "t"))
    assert [row["doc_id"] for row in found] == [0, 1, 2]
    for want, have in zip(expected, found, strict=True):
        assert have["latents"] == want["latents"]
        np.testing.assert_allclose(have["activations"], want["activations"], atol=1e-4)


def test_texts_that_all_hold_no_tokens_leave_nothing_behind(place: Path, tmp_path: Path) -> None:
    sae = [str(place / "sae"), "--cache", str(place / "cache"), "--device", "cpu", "--out", str(tmp_path / "out")]
    for form in ("granary", "parquet"):
        done = refused(app, "encode", *sae, "--format", form, "--text", " ")
        assert "none of 1 texts holds tokens" in done
        assert list(tmp_path.iterdir()) == []


def test_texts_without_tokens_and_another_model_are_refused(place: Path, make_cache) -> None:
    with pytest.raises(AnalyzeError, match="none of the texts holds a token"):
        encode_texts(place / "sae", ["", " "], cache=place / "cache", device="cpu")
    with pytest.raises(AnalyzeError, match="no texts are given"):
        encode_texts(place / "sae", [], cache=place / "cache", device="cpu")
    for wrong, words in (("one text", "texts is one string"), (["a", None], "text 1 is NoneType, expected a string")):
        with pytest.raises(ConfigError, match=words):
            encode_texts(place / "sae", wrong, cache=place / "cache", device="cpu")
    with pytest.raises(AnalyzeError, match=r"no record of its windows"):
        encode_texts(saved(place / "narrow", d_sae=32), TEXTS, cache=make_cache(), device="cpu", model="demo")
    with pytest.raises(MismatchError, match=r"reads rows of width 384, .* has width 16"):
        encode_texts(place / "sae", TEXTS, cache=make_cache("other"), device="cpu")


def test_a_model_of_other_weights_and_one_that_is_missing_are_refused(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(demo_model_path("--model"), other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, other / "model.safetensors")
    with pytest.raises(ModelError, match=r"has other weights .*name its hub id or folder with --model"):
        encode_texts(place / "sae", TEXTS, cache=place / "cache", device="cpu", model=str(other))
    with pytest.raises(ModelError, match=r"is not there: no such folder; name its hub id or folder with --model"):
        encode_texts(place / "sae", TEXTS, cache=place / "cache", device="cpu", model=str(tmp_path / "none"))


def test_the_latents_of_a_text_are_shown_token_by_token(place: Path) -> None:
    found = encode_texts(place / "sae", TEXTS[:1], cache=place / "cache", device="cpu")
    dense = found.codes.dense().numpy()
    best = int(dense[1].argmax())
    given = [str(place / "sae"), "--cache", str(place / "cache"), "--device", "cpu"]
    shown = invoke(app, "show", *given, "--text", TEXTS[0])
    lines = shown.output.splitlines()
    assert [line.split()[0] for line in lines] == ["a", "loop", "ends", "with", "break", ".", "(text)"]  # none special
    assert lines[0].split()[1:3] == [str(best), f"({dense[1, best]:.2f})" + ","]
    most = np.argsort(-dense[1:-1].max(0))[:2]  # over the tokens of the text
    tokens = [found.tokens[1 + int(dense[1:-1, latent].argmax())] for latent in most]
    pairs = [f"{i} ({dense[1:-1, i].max():.2f} at {token})" for i, token in zip(most, tokens, strict=True)]
    assert lines[-1].split(maxsplit=1)[1].startswith(", ".join(pairs))
    two = invoke(app, "show", *given, "--text", TEXTS[0], "--text", "a \x1b[31m \u202e", "--top", "1")
    assert two.output.splitlines()[7] == ""  # between the texts
    assert re.findall("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", two.output) == []
    assert two.output.splitlines()[0].count("(") == 1
    assert refused(app, "show", *given, "--text", "a", "--top", "0") == "error: --top is 0, expected 1 or more\n"
    for wrong in ([], ["--latent", "3", "--text", "a"]):
        assert "give either --latent or --text" in refused(app, "show", *given, *wrong)
