"""`sae-analyze report`: what the page holds is what was measured, decoded again in Python; hostile texts are inert."""

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_kit import invoke, refused
from conftest import write_cache
from sae_kit import saved

from sae_granary import train_sae
from sae_granary.analyze.cli import app
from sae_granary.analyze.encoding.encode import encode_cache
from sae_granary.analyze.evaluation.measure import evaluate
from sae_granary.analyze.evaluation.stored import save_evaluation
from sae_granary.analyze.latents.stats import LatentStats, find_stats
from sae_granary.analyze.report.latent_data import LATENTS, latent_data
from sae_granary.analyze.report.packed import ALIGNMENT, pack, pack_json
from sae_granary.analyze.report.page import inline_json
from sae_granary.analyze.report.run_facts import curves_of
from sae_granary.analyze.report.words import most_frequent
from sae_granary.analyze.source import Source, open_source
from sae_granary.analyze.token_texts import displayed
from sae_granary.cache.format.spec import CacheSpec
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common import threads
from sae_granary.common.rows import DocumentRow, HookPoint, Rows
from sae_granary.common.signed import CHECKSUM, write_signed

D_SAE = 300  # several blobs


@pytest.fixture
def source(make_cache, tmp_path: Path) -> Source:
    """A cache of 40 documents and a topk SAE with random weights, of which latent 5 never fires."""
    folder = saved(tmp_path / "sae", d_sae=D_SAE, k=8, silent=[5])
    return open_source(folder, make_cache(n_docs=40), device="cpu")


def blobs_of(page: str) -> dict[str, str]:
    return dict(re.findall(r'<script type="text/plain" id="blob-(\w+)">([^<]*)</script>', page))


def facts_of(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="facts">([^<]*)</script>', page)
    return json.loads(text)


def inflated(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text), -15)


def unpack(text: str) -> dict[str, np.ndarray]:
    """The arrays of a packed text, flat, as data.js reads them."""
    data = inflated(text)
    place, found = 4 + int.from_bytes(data[:4], "little"), {}
    for name, kind, n in json.loads(data[4:place]):
        found[name] = np.frombuffer(data, "<" + kind, n, place)
        place += -(-found[name].nbytes // ALIGNMENT) * ALIGNMENT
    return found


def unpack_json(text: str) -> Any:
    return json.loads(inflated(text))


def test_packed_arrays_come_back_as_they_were() -> None:
    arrays = {
        "a": np.array([1, 2, 3], np.uint8),
        "b": np.array([[-1.5, 2.0]], np.float32),
        "c": np.zeros(0, np.uint32),
        "long name": np.arange(-9, 9, dtype=np.int8),
    }
    found = unpack(pack(arrays))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array.ravel())
    assert unpack_json(pack_json(["<", None])) == ["<", None]
    with pytest.raises(TypeError, match="float64"):
        pack({"d": np.zeros(1)})


def test_json_cannot_end_its_script() -> None:
    hostile = {"</script>": "<!--<script>&\u2028\u202e\x1b\ud800", "n": [float("nan"), 1.5]}
    text = inline_json(hostile)
    assert not set("<>&\u2028\u202e\x1b\ud800") & set(text)
    name, told = next(iter(json.loads(text).items()))
    assert (name, told) == ("</script>", "<!--<script>&\\u2028\\u202e\\x1b\\ud800")
    assert json.loads(text)["n"] == [None, 1.5]


def test_tokens_are_pieces_of_text() -> None:
    assert displayed(["the", "##re", "##"], ["the"]) == [" the", "re", " ##"]
    assert displayed(["\u2581the", "re"], ["\u2581a"]) == [" the", "re"]
    assert displayed(["\u0120the", "\u010a", "\u00c3"], ["\u0120a"]) == [" the", "\n", "\ufffd"]


def test_themost_frequent_tokens_come_first() -> None:
    places = np.array([[7, 3, 3, 9, 7, 3], [0, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]])
    assert most_frequent(places, 3).tolist() == [[3, 7, 9], [0, 0, 0], [4, 0, 0]]


def test_examples_have_their_tokens_and_activations(source: Source) -> None:
    codes = encode_cache(source, source.place / "codes")
    stats = find_stats(source, lambda: codes)
    data = latent_data(stats, source.cache, codes)
    words, overview = unpack_json(data.blobs["words"]), unpack(data.blobs["overview"])
    documents = unpack_json(data.blobs["documents_0"])
    stream = np.concatenate([unpack(data.blobs[name])["token"] for name in data.blobs if name.startswith("tokens_")])
    np.testing.assert_allclose(overview["density"], stats.density, rtol=1e-6)
    dense, n_checked = codes.dense(), 0
    for latent in range(D_SAE):
        chunk, i = unpack(data.blobs[f"latents_{latent // LATENTS}"]), latent % LATENTS
        rows = [*stats.example_rows[latent], *stats.quantile_rows[latent, ::-1]]
        n = len(rows)
        part = slice(i * n, (i + 1) * n)
        assert chunk["neighbor"].reshape(-1, 5)[i].tolist() == stats.neighbors[latent].tolist()
        together = chunk["coactive"].view(np.int32).reshape(-1, 5)[i].tolist()
        assert together == stats.coactive[latent].tolist()
        starts = np.concatenate([[0], np.cumsum(chunk["length"], dtype=np.int64)])
        for e, row in zip(range(part.start, part.stop), rows, strict=True):
            if row < 0:
                assert chunk["length"][e] == 0
                continue
            context = source.cache.context(int(row))
            length, start = int(chunk["length"][e]), int(chunk["start"][e])
            assert [words[t] for t in stream[start : start + length]] == [f" #{token}" for token in context.tokens]
            assert chunk["before"][e] == context.index
            assert chunk["value"][e] == dense[row, latent]
            acts = chunk["activation"][starts[e] : starts[e + 1]] / 127 * stats.largest[latent]
            exact = dense[list(context.rows), latent]
            np.testing.assert_allclose(acts, exact, atol=float(stats.largest[latent]) / 127)
            assert ((acts != 0) == (exact != 0)).all()
            assert documents[chunk["document"][e]][:2] == [context.document.source, context.document.source_row]
            n_checked += 1
        counts = stats.histogram[latent]
        bins = np.concatenate([[0], np.cumsum(chunk["bin_n"], dtype=np.int64)])
        low = int(chunk["bin_low"][i])
        shown = chunk["bins"][bins[i] : bins[i + 1]]
        assert counts[low : low + len(shown)].tolist() == shown.tolist()
        assert shown.sum() == counts.sum() == stats.fired[latent]
    assert n_checked > D_SAE


def test_statistics_without_the_cache_still_give_latents(source: Source) -> None:
    stats = find_stats(source, lambda: encode_cache(source, source.place / "codes"))
    data = latent_data(stats)
    assert data.about["texts"] == "none"
    assert unpack_json(data.blobs["words"]) == []
    chunk = unpack(data.blobs["latents_0"])
    assert "start" not in chunk
    assert chunk["value"].reshape(LATENTS, -1)[0, :10].tolist() == stats.example_values[0].tolist()
    assert isinstance(stats, LatentStats)


def test_the_command_writes_one_file_of_a_run(make_cache, tmp_path: Path) -> None:
    settings = {"type": "topk", "k": 4, "d_sae": 32, "steps": 8, "batch_size": 128, "log_every": 2}
    run = train_sae(cache=str(make_cache(n_docs=40)), name="<i>&x", runs_dir=str(tmp_path), **settings).folder
    invoke(app, "report", run, "--device", "cpu")
    page = (run / "report.html").read_text(encoding="utf-8")
    facts = facts_of(page)
    told = facts["runs"][0]
    assert "<i>" not in page
    assert (facts["title"], told["type"], told["d_sae"], told["hook"]) == ("<i>&x", "topk", 32, "layer_3")
    assert told["curves"]["loss"][0] == [1, 2, 4, 6, 8]
    assert sum(told["density"]["counts"]) + told["silent"] == 32
    assert dict(map(tuple, dict(told["settings"])["run"]))["type"] == "topk"
    assert {"overview", "words", "latents_0", "tokens_0"} <= set(blobs_of(page))
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


def test_a_run_whose_cache_is_gone_reports_what_is_stored(make_cache, tmp_path: Path) -> None:
    settings = {"type": "topk", "k": 4, "d_sae": 32, "steps": 4, "batch_size": 128, "runs_dir": str(tmp_path)}
    cache = make_cache(n_docs=40)
    run = train_sae(cache=str(cache), name="run", **settings).folder
    cache.rename(tmp_path / "elsewhere")
    command = ["report", str(run), "--device", "cpu"]
    assert "--cache FOLDER" in refused(app, *command)
    assert not (run / "report.html").exists()
    invoke(app, *command, "--cache", tmp_path / "elsewhere")
    whole = (run / "report.html").read_text(encoding="utf-8")
    done = invoke(app, *command)
    assert "without texts" in done.output
    page = (run / "report.html").read_text(encoding="utf-8")
    assert facts_of(page)["latents"]["texts"] == "none"
    assert facts_of(page)["runs"][0]["density"] == facts_of(whole)["runs"][0]["density"]
    record = json.loads((run / "run.json").read_text())  # of a run whose shards were fetched: without the cache's path
    write_signed(run / "run.json", {name: v for name, v in record.items() if name not in ("cache_paths", CHECKSUM)})
    assert "--cache FOLDER, or the URL" in invoke(app, *command).output
    page = (run / "report.html").read_text(encoding="utf-8")
    assert facts_of(page)["runs"][0]["density"] == facts_of(whole)["runs"][0]["density"]
    refused(app, "report", run, "--device", "cuda:99")
    assert (run / "report.html").read_text(encoding="utf-8") == page  # not replaced by a lesser one
    write_cache(tmp_path / "other", n_docs=30, seed=1)
    invoke(app, "stats", run, "--cache", tmp_path / "other")
    invoke(app, *command)
    assert facts_of((run / "report.html").read_text(encoding="utf-8")) == facts_of(page)
    for name in ("density", "mean", "largest"):
        both = [unpack(blobs_of(each)["overview"])[name] for each in (page, whole)]
        np.testing.assert_array_equal(*both)


def test_evaluation_columns_thresholds_and_plots_are_there(make_cache, tmp_path: Path) -> None:
    settings = {
        "type": "jumprelu",
        "l0_target": 4,
        "d_sae": 32,
        "steps": 4,
        "batch_size": 128,
        "runs_dir": str(tmp_path),
    }
    cache = make_cache(n_docs=40, columns={"category": ("billing", "<b>login")})
    run = train_sae(cache=str(cache), name="run", **settings).folder
    source = open_source(run, device="cpu")
    save_evaluation(source, evaluate(source))
    plots = tmp_path / "plots"
    given = ["report", str(run), "--device", "cpu", "--png", str(plots), "--svg", str(plots)]
    invoke(app, *given)
    page = (run / "report.html").read_text(encoding="utf-8")
    told = facts_of(page)["runs"][0]
    assert sum(told["thresholds"]["counts"]) == 32
    assert dict(told["evaluation"][0][1])["fvu"] == pytest.approx(told["fvu"], rel=1e-6)
    documents = unpack_json(blobs_of(page)["documents_0"])
    assert {document[2]["category"] for document in documents} == {"billing", "<b>login"}
    names = {"pareto", "loss", "l0", "fvu", "dead", "density", "thresholds"}
    assert {path.name for path in plots.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}


def test_pooled_rows_are_shown_as_their_texts(tmp_path: Path) -> None:
    texts = [f"<i>text</i> {i} " + "long " * 100 for i in range(30)]
    rows = Rows(
        {"layer_1": np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)},
        np.full(30, -1, np.int32), np.arange(30), np.arange(30, dtype=np.uint64), np.zeros(30, np.int32),
        np.zeros(30, np.int32), np.zeros(30, np.uint8),
    )  # fmt: skip
    point = HookPoint("layer_1", "encoder.1", "output", 0, 8)
    spec = CacheSpec("text", (point,), "float32", 100, {"model": {"id": "toy"}}, {"model": "toy"})
    with CacheWriter.open(tmp_path / "cache", spec) as writer:
        writer.begin_buffer({"next_doc": 0})
        writer.append(rows, [DocumentRow(i, "toy", i, text) for i, text in enumerate(texts)])
        writer.finish({"documents": 30})
    source = open_source(saved(tmp_path / "sae", d_in=8, d_sae=16), tmp_path / "cache", device="cpu")
    codes = encode_cache(source, source.place / "codes")
    stats = find_stats(source, lambda: codes)
    data = latent_data(stats, source.cache, codes)
    words, documents = unpack_json(data.blobs["words"]), unpack_json(data.blobs["documents_0"])
    labels, chunk = unpack(data.blobs["overview"])["labels"].reshape(16, 3), unpack(data.blobs["latents_0"])
    strongest = int(stats.example_rows[0, 0])
    assert words[labels[0, 0] - 1].startswith(f"<i>text</i> {strongest} long")
    assert documents[chunk["document"][0]][3].startswith(f"<i>text</i> {strongest} long")
    assert all(len(document[3]) <= 400 for document in documents)


def test_curves_are_thinned_and_end_where_the_run_ended(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1 / step, "fvu": float("nan")}) for step in range(1, 1800)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": ']))
    curves = curves_of(tmp_path)
    steps, losses = curves.pop("loss")
    assert (steps[-1], losses[-1], curves) == (1799, 1 / 1799, {})
    assert 400 <= len(steps) <= 500


def test_a_folder_of_runs_is_compared_and_an_empty_one_refused(make_cache, tmp_path: Path) -> None:
    settings = {"type": "topk", "d_sae": 32, "steps": 4, "batch_size": 128, "cache": str(make_cache(n_docs=40))}
    (tmp_path / "runs").mkdir()
    for k in (2, 4):
        train_sae(name=f"k{k}", k=k, runs_dir=str(tmp_path / "runs"), **settings)
    invoke(app, "report", tmp_path / "runs")
    facts = facts_of((tmp_path / "runs" / "report.html").read_text(encoding="utf-8"))
    assert ([run["k"] for run in facts["runs"]], facts["latents"]) == ([2, 4], None)
    (tmp_path / "empty").mkdir()
    refused(app, "report", tmp_path / "empty")
    refused(app, "report", tmp_path / "runs", "--cache", settings["cache"])


def test_what_takes_long_is_said_off_a_terminal(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "FIRST_SECONDS", 0.0)  # everything takes long
    command = ["report", str(tmp_path / "sae"), "--cache", str(source.cache.path), "--device", "cpu"]
    shown = invoke(app, *command)
    for what in ("encoding", "computing the statistics of the latents", "collecting the examples of the latents"):
        assert what in shown.stderr, shown.stderr
    assert invoke(app, *command, "--quiet").stderr == ""
