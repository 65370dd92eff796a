"""`sae-analyze eval --downstream`: what an SAE costs the model of its cache, on held-out contexts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_kit import invoke
from lm_kit import demo_texts, harvest, trained_model
from sae_kit import saved
from scipy.stats import spearmanr
from sklearn.metrics.pairwise import cosine_similarity
from test_analyze_eval import copying, dictionary, run

from sae_granary import sae_core
from sae_granary.analyze.errors import DownstreamError
from sae_granary.analyze.evaluation.downstream import Models, evaluate_downstream
from sae_granary.analyze.evaluation.stored import load_evaluation
from sae_granary.analyze.source import Source, open_source
from sae_granary.cache.load.selection import Selection
from sae_granary.cache.load.whole_contexts import read_contexts

# One predicts the next token, the other masked ones.
KINDS = ("llama", pytest.param("modernbert", marks=pytest.mark.slow))


@pytest.fixture(scope="module", params=KINDS)
def cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Harvested from a tiny trained model."""
    folder = tmp_path_factory.mktemp("model")
    return harvest(trained_model(folder / "model", request.param, n_steps=100), folder / "cache")


@pytest.fixture
def open_with(cache: Path, tmp_path: Path):
    def make(sae: sae_core.SAE, name: str) -> Source:
        sae_core.save(sae, tmp_path / name)
        return open_source(tmp_path / name, cache, device="cpu")

    return make


def test_the_identity_scores_1_and_zeros_score_0(open_with) -> None:
    models = Models()
    numbers, notes = evaluate_downstream(open_with(copying(64), "same"), "heldout", 4000, models)
    assert notes == []
    assert numbers["ce_score"] == pytest.approx(1.0, abs=1e-6)
    assert numbers["kl"] == pytest.approx(0.0, abs=1e-6)
    assert numbers["ce_spliced"] == numbers["ce_clean"] < numbers["ce_ablated"] - 0.1
    ablated, _ = evaluate_downstream(open_with(copying(64, 0.0), "zeros"), "heldout", 4000, models)
    assert ablated["ce_score"] == pytest.approx(0.0, abs=1e-6)
    assert ablated["ce_spliced"] == ablated["ce_ablated"] == numbers["ce_ablated"]
    half, _ = evaluate_downstream(open_with(copying(64, 0.5), "half"), "heldout", 4000, models)
    assert 0 < half["ce_score"] < 1
    assert half["kl"] > 0


def test_the_contexts_are_held_out_and_as_many_as_asked_for(open_with) -> None:
    source = open_with(copying(64), "same")
    whole = sum(
        batch.n_rows
        for batch in read_contexts(source.cache, batch_rows=100, selection=Selection(part="heldout"), epochs=1)
    )
    predicted = [
        evaluate_downstream(source, part, n_rows, Models())[0]["n_predicted"]
        for part, n_rows in (("heldout", 10**9), ("all", 1), ("all", 10**9))
    ]
    assert 0 < predicted[0] <= whole
    assert 0 < predicted[1] < predicted[2]


def test_the_command_keeps_what_was_measured_and_skips_a_model_that_is_not_there(open_with, tmp_path: Path) -> None:
    source = open_with(copying(64), "same")
    flags = [source.folder, "--cache", source.cache.path]
    assert "ce_score" in run(*flags, "--downstream", "--downstream-rows", 500).stdout
    measured = load_evaluation(source)["downstream"]
    assert measured["ce_score"] == pytest.approx(1.0, abs=1e-6)
    assert "ce_score" in run(*flags).stdout  # measured before
    assert load_evaluation(source)["downstream"] == measured
    missing = run(*flags, "--downstream", "--model", tmp_path / "nowhere", code=2).output
    assert missing.startswith("error: the model ")
    assert load_evaluation(source)["downstream"] == measured


def test_a_type_that_reads_several_hook_points_is_skipped_in_words(make_cache, tmp_path: Path) -> None:
    saved(tmp_path / "cross", "crosscoder", d_sae=32)
    cache = make_cache(hooks=("layer_1", "layer_2"))
    source = open_source(tmp_path / "cross", cache, hooks=("layer_1", "layer_2"), device="cpu")
    with pytest.raises(DownstreamError, match="crosscoder reads several hook points"):
        evaluate_downstream(source, "heldout", 100, Models())


@pytest.mark.slow
def test_sentence_embeddings_and_the_order_of_their_similarities(tmp_path: Path) -> None:
    """The demo model, a Sentence-Transformer; rows of its caches are tokens, or whole texts."""
    from sae_granary.harvest.cli import app as harvest_app

    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text[:150]}) + "\n" for text in demo_texts()[:20]), encoding="utf-8")
    for name, flags in (("tokens", ["--layer", "3"]), ("texts", ["--unit", "text"])):
        arguments = ["run", "--model", "demo", "--dataset", str(data), *flags, "--out", str(tmp_path / name)]
        invoke(harvest_app, *arguments, "--device", "cpu")
        for label, sae in (("same", copying(384)), ("half", dictionary(d_in=384, d_sae=64))):
            sae_core.save(sae, tmp_path / label)
            source = open_source(tmp_path / label, tmp_path / name, device="cpu")
            numbers, _ = evaluate_downstream(source, "all", 10**6, Models())
            assert numbers["n_embeddings"] == 20
            if label == "same":
                assert numbers["embedding_cosine"] == pytest.approx(1.0, abs=1e-6)
                assert numbers["embedding_rank_correlation"] == pytest.approx(1.0, abs=1e-6)
            else:
                assert -1 < numbers["embedding_cosine"] < 0.99
                assert abs(numbers["embedding_rank_correlation"]) < 0.999
        if name == "tokens":
            assert -1 < numbers["embedding_cosine_ablated"] < 0.99
            continue
        x = torch.from_numpy(source.cache.hook()[:].copy())
        with torch.no_grad():
            x_hat = source.sae(x).x_hat
        pairs = np.triu_indices(20, 1)
        before, after = (cosine_similarity(rows.double().numpy())[pairs] for rows in (x, x_hat))
        assert numbers["embedding_rank_correlation"] == pytest.approx(spearmanr(before, after).statistic, abs=1e-4)
