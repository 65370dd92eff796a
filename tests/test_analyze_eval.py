"""`sae-analyze eval`: every metric against a dense float64 reference over the whole held-out split."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from command_kit import invoke
from sae_kit import copying, new
from scipy.stats import spearmanr
from sklearn.metrics import r2_score

from sae_granary import sae_core
from sae_granary.analyze.cli import app
from sae_granary.analyze.errors import AnalyzeError, DamagedCodesError
from sae_granary.analyze.evaluation.downstream import rank_correlation, similarity
from sae_granary.analyze.evaluation.groups import (
    POSITION_BINS,
    TOKEN_CLASSES,
    GroupedErrors,
    TokenClasses,
    position_bin,
)
from sae_granary.analyze.evaluation.measure import evaluate
from sae_granary.analyze.evaluation.stored import evaluation_path, load_evaluation, save_evaluation
from sae_granary.analyze.source import Source, open_source
from sae_granary.cache.load.selection import Holdout
from sae_granary.common.finished_run import NotARunError
from sae_granary.common.rows import FLAG_SPECIAL

D_IN, D_SAE = 16, 32


def dictionary(type_name: str = "topk", **options) -> sae_core.SAE:
    """An SAE with random weights and one latent that never fires."""
    sae = new(type_name, {"k": 4}, **{"d_in": D_IN, "d_sae": D_SAE, **options})
    sae.reset_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(2))
        if sae.has_encoder:
            sae.encoder_bias[5] = -1e6
    return sae


@pytest.fixture
def open_with(make_cache, tmp_path: Path):
    """An SAE, saved and opened with a toy cache."""

    def make(sae: sae_core.SAE, name: str = "sae", **options) -> Source:
        if not (tmp_path / "toy").exists():
            make_cache(**options)
        sae_core.save(sae, tmp_path / name)
        return open_source(tmp_path / name, tmp_path / "toy", device="cpu")

    return make


def heldout_rows(source: Source) -> np.ndarray:
    """Rows that are no special tokens, of the documents that are held out by default."""
    flags, doc_id = source.cache.column("flags")[:], source.cache.column("doc_id")[:]
    return np.flatnonzero((flags & FLAG_SPECIAL == 0) & Holdout().mask(doc_id))


@pytest.mark.parametrize("type_name", ["topk", "vanilla", "batchtopk", "matching_pursuit"])
def test_metrics_are_those_of_dense_arrays(open_with, type_name) -> None:
    source = open_with(dictionary(type_name))
    found = evaluate(source)
    rows = heldout_rows(source)
    x32 = torch.from_numpy(source.cache.hook("layer_3")[rows])
    with torch.no_grad():
        out = source.sae(x32)
    z, x, x_hat = (t.detach().numpy().astype(np.float64) for t in (out.codes.dense(), out.x, out.x_hat))
    e, active = x - x_hat, z != 0
    W = source.sae.W_dec.detach().numpy().astype(np.float64)
    W /= np.linalg.norm(W, axis=1, keepdims=True)
    cosines = np.abs(W @ W.T)
    np.fill_diagonal(cosines, 0)
    norms, norms_hat = (np.linalg.norm(values, axis=1) for values in (x, x_hat))
    density = active.mean(0)
    expected = {
        "l0": active.sum(1).mean(),
        "fvu": (e**2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "explained_variance": 1 - (e**2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "mse": (e**2).sum(1).mean(),
        "cosine": ((x * x_hat).sum(1) / (norms * norms_hat)).mean(),
        "l2_ratio": (norms_hat / norms).mean(),
        "l1": np.abs(z).sum(1).mean(),
        "activation_mean": np.abs(z)[active].mean(),
        "activation_max": np.abs(z).max(),
        "rare": (density < 0.0005).mean(),
        "never_fired": (density == 0).mean(),
        "decoder_max_cosine": cosines.max(1).mean(),
    }
    assert found["n_rows"] == len(rows) > 100
    assert found["metrics"].keys() == expected.keys() | {"dead"}
    for name, value in expected.items():
        assert found["metrics"][name] == pytest.approx(value, rel=1e-6), name
    assert found["metrics"]["explained_variance"] == pytest.approx(
        r2_score(x, x_hat, multioutput="variance_weighted"), rel=1e-6
    )
    histogram = found["density_histogram"]
    assert sum(histogram["counts"]) + histogram["never_fired"] == D_SAE
    position = source.cache.column("position")[:][rows]
    for entry in found["by_position"]:
        low, _, high = entry["group"].partition("-")
        here = (position >= int(low)) & (position <= int(high or low))
        assert entry["n_rows"] == here.sum() > 0
        assert entry["l0"] == pytest.approx(active[here].sum(1).mean())
        assert entry["fvu"] == pytest.approx((e[here] ** 2).sum() / ((x[here] - x.mean(0)) ** 2).sum(), rel=1e-6)
    assert sum(entry["n_rows"] for entry in found["by_position"]) == len(rows)


def test_a_part_of_the_rows(open_with) -> None:
    source = open_with(dictionary())
    n_rows = {part: evaluate(source, part)["n_rows"] for part in ("heldout", "train", "all")}
    assert n_rows["heldout"] == len(heldout_rows(source))
    assert n_rows["heldout"] + n_rows["train"] == n_rows["all"]


def test_the_identity_and_zeros(open_with) -> None:
    same = evaluate(open_with(copying(D_IN), "same"))["metrics"]
    assert (same["fvu"], same["explained_variance"], same["mse"]) == (0.0, 1.0, 0.0)
    assert same["cosine"] == pytest.approx(1.0) == same["l2_ratio"]
    zeros = evaluate(open_with(copying(D_IN, 0.0), "zeros"))["metrics"]
    assert zeros["l2_ratio"] == 0.0
    assert zeros["fvu"] >= 1.0


def test_positions_by_powers_of_two() -> None:
    bins = position_bin(np.array([0, 1, 2, 3, 4, 7, 8, 511, 512]))
    assert [POSITION_BINS[i] for i in bins] == ["0", "1", "2-3", "2-3", "4-7", "4-7", "8-15", "256-511", "512-1023"]


@pytest.mark.parametrize(
    ("vocabulary", "expected"),
    [
        (["[CLS]", "the", "##s", "##2", "7", "##.", "é"], "special start continuation other other other start"),
        (["<s>", "\u0120the", "ing", "\u01207", "\u0120\u00c3\u00a9", "\u00e2\u0122\u013b"],
         "special start continuation other start other"),
        (["<s>", "\u2581the", "ing", "\u25817", "\u2581", "."], "special start continuation other other other"),
    ],
)  # fmt: skip
def test_tokens_by_the_conventions_of_three_tokenizers(vocabulary, expected) -> None:
    names = dict(zip(("special", "start", "continuation", "other"), TOKEN_CLASSES, strict=True))
    n = len(vocabulary)
    flags = np.zeros(n, np.uint8)
    flags[0] = FLAG_SPECIAL
    classes = TokenClasses(vocabulary)(np.arange(n), flags, np.arange(n))
    assert [TOKEN_CLASSES[i] for i in classes] == [names[word] for word in expected.split()]
    first = TokenClasses(vocabulary)(np.array([2]), flags[1:2], np.array([0]))
    assert TOKEN_CLASSES[first[0]] == names["start"]  # nothing is before it that it could continue


def test_groups_do_not_depend_on_the_batches_and_cancel_nothing() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)) + 1e6
    error, active, group = rng.random(200), rng.integers(0, 9, 200), rng.integers(0, 2, 200)
    sums = GroupedErrors(["a", "b", "empty"], 3)
    for rows in np.array_split(np.arange(200), 7):
        tensors = (torch.from_numpy(values[rows]).double() for values in (x, error, active))
        sums.update(group[rows], *tensors)
    table = sums.table()
    assert [entry["group"] for entry in table] == ["a", "b"]
    for i, entry in enumerate(table):
        here = group == i
        assert entry["fvu"] == pytest.approx(error[here].sum() / ((x[here] - x.mean(0)) ** 2).sum(), rel=1e-6)
        assert entry["l0"] == pytest.approx(active[here].mean())


def test_rows_without_variance_have_no_fvu(open_with) -> None:
    source = open_with(copying(D_IN), n_docs=30)
    for shard in range(len(source.cache.shards)):
        with source.cache.shard_path("layer_3", shard).open("r+b") as stream:
            n_rows = source.cache.shards[shard].n_rows
            stream.write(np.ones((n_rows, D_IN), np.float32).tobytes())
    found = evaluate(source, "all")
    assert found["metrics"]["fvu"] is found["metrics"]["explained_variance"] is None
    assert found["by_position"][0]["fvu"] is None
    assert found["notes"][0] == f"FVU is not defined: the {found['n_rows']:,} evaluated rows do not vary"


def test_a_reconstruction_that_overflows_is_null_with_a_note(open_with) -> None:
    source = open_with(copying(D_IN))
    with torch.no_grad():
        source.sae.W_dec.fill_(3e38)
    found = evaluate(source)
    assert found["metrics"]["mse"] is found["metrics"]["fvu"] is found["by_position"][0]["fvu"] is None
    assert "NaN or Inf" in found["notes"][0]
    assert save_evaluation(source, found).is_file()


def test_ranks_are_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 20, 300).astype(float), rng.normal(size=300)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert rank_correlation(a, a) == pytest.approx(1.0)
    assert rank_correlation(a, np.ones(300)) is None
    embeddings = torch.from_numpy(rng.normal(size=(20, 4)))
    found = similarity(embeddings, -2 * embeddings)  # all turned around: the angles between them are the same
    assert found["embedding_cosine"] == pytest.approx(-1.0)
    assert found["embedding_rank_correlation"] == pytest.approx(1.0)


def test_an_evaluation_is_stored_for_its_own_sae_and_cache(open_with, tmp_path: Path) -> None:
    source = open_with(dictionary())
    assert load_evaluation(source) is None
    found = evaluate(source)
    path = save_evaluation(source, found)
    assert path == source.place / "eval.json"
    assert load_evaluation(source) == json.loads(json.dumps(found))
    assert load_evaluation(source, "train") is None
    other = open_with(dictionary(k=5))  # in the same folder
    assert evaluation_path(other) == path
    assert load_evaluation(other) is None
    path.write_text(path.read_text().replace('"l0": 4.0', '"l0": 3.0'))
    with pytest.raises(DamagedCodesError, match="checksum"):
        load_evaluation(source)


run = partial(invoke, app, "eval", "--device", "cpu", "-q")


def test_the_command_prints_saes_side_by_side_and_json(open_with, tmp_path: Path) -> None:
    first, second = open_with(dictionary(), "first"), open_with(dictionary(k=8), "second")
    cache = first.cache.path
    printed = run(first.folder, second.folder, "--cache", cache).stdout
    assert [word for word in ("first", "second", "layer_3", "4.00", "8.00") if word not in printed] == []
    found = json.loads(run(first.folder, "--cache", cache, "--json", "--out", tmp_path / "out.json").stdout)
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert found["evaluations"] == [load_evaluation(first)]
    both = json.loads(run(tmp_path, "--cache", cache, "--json").stdout)["evaluations"]  # the folder that holds them
    assert [one["name"] for one in both] == ["first", "second"]
    wrong = run(first.folder, "--cache", cache, "--part", "test", code=2)
    assert wrong.output == "error: part='test': expected one of heldout, train, all\n"
    wrong = run(first.folder, "--cache", cache, "--downstream", "--downstream-rows", "many", code=2)
    assert wrong.output.count("\n") == 1
    (tmp_path / "zz").mkdir()
    damaged = run(first.folder, tmp_path / "zz", "--cache", cache, "--out", tmp_path / "some.json", code=2)
    assert "error: " in damaged.stderr
    assert "first" in damaged.stdout
    assert len(json.loads((tmp_path / "some.json").read_text())["evaluations"]) == 1
    skipped = run(first.folder, "--cache", cache, "--downstream").stdout  # the toy cache is of no model
    assert "first: downstream skipped: " in skipped
    assert load_evaluation(first)["downstream"] is None


def test_saes_on_different_caches_are_never_in_one_table(make_cache, tmp_path: Path) -> None:
    from sae_granary import train_sae

    settings = {"type": "topk", "k": 4, "d_sae": D_SAE, "batch_size": 128, "steps": 3, "device": "cpu"}
    for name, seed in (("one", 0), ("two", 1)):
        make_cache(name, seed=seed)
        train_sae(cache=str(tmp_path / name), runs_dir=str(tmp_path / "runs"), name=f"sae_{name}", **settings)
    result = run(tmp_path / "runs" / "sae_one", tmp_path / "runs" / "sae_two")
    assert f"{tmp_path / 'one'} and {tmp_path / 'two'}: compare within one only" in " ".join(result.stderr.split())
    assert result.stdout.count("hook point") == 2


def test_a_run_is_evaluated_on_what_it_held_out_itself(make_cache, tmp_path: Path) -> None:
    from sae_granary import train_sae

    settings = {"type": "topk", "k": 4, "d_sae": D_SAE, "batch_size": 128, "steps": 3, "device": "cpu"}
    settings |= {"holdout": 0.3, "holdout_seed": 7, "keep_special": True, "dead_threshold": 0.01}
    settings |= {"keep_first_position": False, "max_position": 20}
    cache, runs = str(make_cache()), tmp_path / "runs"
    train_sae(cache=cache, runs_dir=str(runs), name="own", **settings)
    summary = json.loads((runs / "own" / "summary.json").read_text())
    found = evaluate(open_source(runs / "own", device="cpu"))
    assert found["n_rows"] == summary["eval"]["n_rows"] == summary["rows"]["heldout"]
    assert found["metrics"]["dead"] == summary["dead"]
    for name in ("l0", "fvu", "mse", "cosine", "rare", "never_fired", "decoder_max_cosine"):
        assert found["metrics"][name] == pytest.approx(summary["eval"][name], rel=1e-6), name
    [step] = (runs / "own" / "checkpoints").iterdir()
    trained = sae_core.load_native(step / "sae").train()
    source, last = open_source(runs / "own", device="cpu"), sae_core.Progress(2, 3)
    position = source.cache.column("position")[:]
    rows = np.flatnonzero(Holdout(0.3, 7).mask(source.cache.column("doc_id")[:]) & (position > 0) & (position <= 20))
    with torch.no_grad():
        terms = trained.losses(trained(torch.from_numpy(source.cache.hook()[rows])), last)
    assert found["losses"].keys() == {"loss", *terms}
    assert found["losses"]["loss"] == pytest.approx(float(sum(terms.values())), rel=1e-5)
    with (runs / "own" / "config.yaml").open("a") as stream:
        stream.write("# edited\n")
    with pytest.raises(NotARunError, match=r"config\.yaml was changed since the run started"):
        evaluate(open_source(runs / "own", device="cpu"))
    train_sae(cache=cache, runs_dir=str(runs), name="nothing", **{**settings, "holdout": 0.0})
    source = open_source(runs / "nothing", device="cpu")
    with pytest.raises(AnalyzeError, match=r"has no held-out rows for .*--part train or --part all"):
        evaluate(source)
    assert evaluate(source, "train")["notes"] == ["evaluated on training rows"]
