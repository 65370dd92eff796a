"""A row is what the model computes for its window alone, whatever it does with padding, layout and its own state."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harvest_kit import N_LAYERS, WIDTH, CutOff, cut_off_after, row_errors, texts, tiny_tokenizer
from test_harvest_forward import a_buffer, run_model
from torch import nn

from sae_granary import open_cache
from sae_granary.cache.read.reader import Cache
from sae_granary.common.errors import ConfigError
from sae_granary.harvest.errors import HarvestError
from sae_granary.harvest.run import harvest_activations
from sae_granary.harvest.settings.names import name_lines
from sae_granary.models.behavior.checks import Behavior, observe, pad_id_for
from sae_granary.models.behavior.state import unchanged
from sae_granary.models.blocks import choose_hooks, find_blocks
from sae_granary.models.config import ModelConfig, WhereConfig
from sae_granary.models.errors import HookError, ModelError
from sae_granary.models.forward import TokenModel
from sae_granary.models.hooks import Hook, Seen, probe, probe_all
from sae_granary.models.load import n_layers
from sae_granary.models.locate import Located
from sae_granary.models.tokens.batches import plan_batches

CTX_LEN = 16
Make = Callable[[Any], Path]


def sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tiny_tokenizer("bert")), "hidden_size": WIDTH, "intermediate_size": 64,
        "num_hidden_layers": N_LAYERS, "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0,
    } | more  # fmt: skip


def xlnet() -> Any:
    from transformers import XLNetConfig

    return XLNetConfig(vocab_size=sizes()["vocab_size"], d_model=WIDTH, n_layer=N_LAYERS, n_head=4, d_inner=64)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """config or model -> a folder with its weights and the words' tokenizer."""

    def build(what: Any) -> Path:
        from transformers import AutoModel

        torch.manual_seed(0)
        model = what if isinstance(what, nn.Module) else AutoModel.from_config(what)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4.0)
        model.save_pretrained(tmp_path / "model")
        tiny_tokenizer("bert").save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return build


def harvest(folder: Path, docs: list[str], **settings: Any) -> Cache:
    (folder.parent / "text.txt").write_text("\n".join(docs))
    settings = {"layers": 1, "ctx_len": CTX_LEN, "batch_tokens": CTX_LEN**2} | settings
    harvest_activations(
        model=str(folder), dataset=str(folder.parent / "text.txt"), documents="line", device="cpu",
        out=folder.parent / "out", quiet=True, **settings,
    )  # fmt: skip
    return open_cache(folder.parent / "out")


def errors_of(cache: Cache, folder: Path, state: int = 2) -> float:
    """The largest error of a row: against its window alone, through the model as it is read from its files."""
    from transformers import AutoModel

    ids, window = cache.column("token_id")[0 : cache.n_rows], cache.column("window")[0 : cache.n_rows]
    want = []
    for number in range(int(window.max()) + 1):
        model = AutoModel.from_pretrained(folder).eval()
        with torch.inference_mode():
            out = model(
                input_ids=torch.from_numpy(ids[window == number].astype(np.int64))[None], output_hidden_states=True
            )
        want.append(out.hidden_states[state].reshape(-1, WIDTH)[: int((window == number).sum())].numpy())
    return float(row_errors(cache.hook()[0 : cache.n_rows], np.concatenate(want)).max())


def test_a_model_that_mixes_padding_in_gets_batches_of_one_length(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import FNetConfig

    config = sizes()
    del config["num_attention_heads"]
    folder = make(FNetConfig(**config))
    cache = harvest(folder, texts(24))
    assert errors_of(cache, folder) < 1e-5
    assert "batches hold windows of one length only" in (cache.path / "harvest.log").read_text()


def longrope() -> Any:
    """As Phi-3: other rotations where the longest text of a batch is above 24 tokens."""
    from transformers import Phi3Config

    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0],
        "factor": 4.0, "original_max_position_embeddings": 24,
    }  # fmt: skip
    return Phi3Config(**sizes(num_key_value_heads=2), original_max_position_embeddings=24, rope_parameters=rope)


def test_short_windows_beside_long_ones_are_read_as_if_alone(make: Make) -> None:
    folder = make(longrope())
    cache = harvest(folder, texts(40), ctx_len=64, batch_tokens=1024)
    assert errors_of(cache, folder) < 1e-5
    assert cache.manifest.provenance["compute"]["batching"] == "equal"


def test_batches_of_rows_that_are_committed_stay_as_they_were(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(longrope())
    settings = {"ctx_len": 32, "batch_tokens": 64, "rows_per_shard": 128}
    with monkeypatch.context() as before:
        before.setattr("sae_granary.models.forward.observe", lambda *_, **__: Behavior())
        with cut_off_after(30), pytest.raises(CutOff):
            harvest(folder, texts(50), **settings)
    with pytest.raises(HarvestError, match=r"computed in batches that are padded, but with .* only equal ones give"):
        harvest(folder, texts(50), **settings)


def test_a_harvest_in_batches_of_one_length_is_continued(make: Make) -> None:
    folder = make(longrope())
    settings = {"ctx_len": 32, "batch_tokens": 64, "rows_per_shard": 128}
    with cut_off_after(30), pytest.raises(CutOff):
        harvest(folder, texts(50), **settings)
    assert errors_of(harvest(folder, texts(50), **settings), folder) < 1e-5


def test_a_layout_with_time_first_is_undone_also_where_the_batch_is_square(make: Make) -> None:
    folder = make(xlnet())
    words = texts(1, longest=60)[0].split()
    docs = [" ".join(words[(i + j) % len(words)] for j in range(CTX_LEN - 2)) for i in range(CTX_LEN)]
    cache = harvest(folder, docs)  # one batch of 16 x 16
    assert errors_of(cache, folder) < 1e-5


def test_lists_that_could_all_be_the_blocks_are_refused_by_name(make: Make) -> None:
    from transformers import XLMConfig

    words = sizes()["vocab_size"]
    folder = make(XLMConfig(vocab_size=words, emb_dim=WIDTH, n_layers=N_LAYERS, n_heads=4, pad_token_id=0))
    with pytest.raises(
        HookError, match=r"4 lists of 3 modules .*attentions, layer_norm1, ffns, layer_norm2.*--hook lay"
    ):
        harvest(folder, texts(3))
    assert errors_of(harvest(folder, texts(12), layers=[], hooks="layer_norm2.1"), folder) < 1e-5
    assert any("by their names alone" in line for line in name_lines(ModelConfig(str(folder))))


def test_names_offers_only_the_layer_of_shared_blocks_that_can_be_harvested(make: Make) -> None:
    from transformers import AlbertConfig

    folder = make(AlbertConfig(**sizes(embedding_size=16)))
    (line,) = [line for line in name_lines(ModelConfig(str(folder))) if line.startswith("--layer")]
    assert line.startswith("--layer 0   output of encoder.albert_layer_groups.0 at its first use")
    assert harvest(folder, texts(3), layers=0).n_rows > 0


class Towers(nn.Module):
    """Two lists of blocks of one length; only the second reads text."""

    def __init__(self) -> None:
        super().__init__()
        self.sight = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])
        self.embed = nn.Embedding(50, 4)
        self.words = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.words:
            x = layer(x)
        return x


def test_the_blocks_are_those_that_run_on_text() -> None:
    model = Towers()
    assert find_blocks(model, 3, probe_all(model, "cpu")).path == "words"
    assert find_blocks(model, 3).path == "sight"  # what the names alone tell


def test_a_width_that_depends_on_the_text_is_no_width() -> None:
    class Square(Towers):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.words[0](self.embed(input_ids)[..., :1].expand(-1, -1, input_ids.shape[1]))

    model = Square()
    model.words[0] = nn.Identity()
    with pytest.raises(HookError, match="expected one vector per token"):
        probe(model, [Hook("x", "words.0")], "cpu")


def test_a_short_window_does_not_change_the_model_for_later_ones(make: Make) -> None:
    from transformers import BigBirdConfig  # which turns its sparse attention off at a short input, for good

    folder = make(BigBirdConfig(**sizes(block_size=2, num_random_blocks=1)))
    words = " ".join(texts(8, longest=60)).split()
    docs = [" ".join(words[i : i + n]) for i, n in enumerate([46, 2, 37, 45, 1, 12, 46, 31])]
    cache = harvest(folder, docs, ctx_len=48, batch_tokens=48, layers=1)  # an odd window is padded to blocks of 2
    assert errors_of(cache, folder) < 1e-5


def test_windows_of_any_length_are_tried_where_a_pass_changes_the_model(make: Make) -> None:
    from transformers import BigBirdConfig  # sparse above 112 tokens: a shorter window beside such a one too

    folder = make(BigBirdConfig(**sizes(block_size=16, num_random_blocks=1)))
    cache = harvest(folder, texts(24, longest=124), ctx_len=126, batch_tokens=1260)
    assert errors_of(cache, folder) < 1e-5
    assert cache.manifest.provenance["compute"]["batching"] == "equal"


def test_windows_are_padded_to_the_multiple_that_the_attention_wants(make: Make) -> None:
    from transformers import LongformerConfig

    folder = make(LongformerConfig(**sizes(attention_window=[8] * N_LAYERS)))  # whose blocks see the padding
    assert errors_of(harvest(folder, texts(24), ctx_len=21, batch_tokens=64), folder) < 1e-5
    assert [list(batch) for batch in plan_batches([9, 9, 8, 8], 32, multiple=8)] == [[0, 1], [2, 3]]


class Skips(Towers):
    """Its second block runs only when there is a picture, as cross-attention does."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.words[2](self.words[0](self.embed(input_ids)))


def test_blocks_that_do_not_run_on_text_are_left_out_and_refused_by_number() -> None:
    model = Skips()
    ran = probe_all(model, "cpu")
    assert [hook.module for hook in choose_hooks(model, 3, WhereConfig(layers="all"), ran)] == ["words.0", "words.2"]
    with pytest.raises(HookError, match=r"layer 1 does not run on text alone: the layers that do are 0, 2$"):
        choose_hooks(model, 3, WhereConfig(layers=(1,)), ran)


class Streams(Towers):
    """Its blocks carry two vectors for each token."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = torch.stack([self.embed(input_ids)] * 2, dim=2)
        for block in self.words:
            x = torch.stack([block[0](x[:, :, 0]), x[:, :, 1]], dim=2)
            block(x)
        return x


def test_blocks_without_one_vector_per_token_are_refused_with_a_module_that_has_one() -> None:
    model = Streams()
    with pytest.raises(HookError, match=r"\(words\) do not give one vector per token .* such as --hook words\.1\.0$"):
        find_blocks(model, 3, {f"words.{i}.0": Seen(4, None, time_first=False) for i in range(3)})


def test_how_often_a_block_runs_is_no_matter_of_names() -> None:
    assert not find_blocks(Towers(), 6).shared  # LongCat counts two layers for each block
    from transformers import LxmertConfig

    assert n_layers(Located("x", "x", "x", config=LxmertConfig()), None) is None  # it has a mapping of three numbers


class Remembers(Towers):
    """Counts its passes in an attribute, a buffer and a list, and answers with the count."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.seen: list[int] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        self.seen.append(random.randrange(9) + int(np.random.rand()) + len(torch.rand(9)))  # noqa: NPY002
        self.count += 1
        self.last, self.words[2] = len(input_ids), nn.Identity()
        return self.words[0](self.embed(input_ids) + self.count)


def test_the_state_of_a_model_is_put_back() -> None:
    model = Remembers()
    before = model.words[2]
    draws = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    with unchanged(model) as state:
        model(torch.ones((2, 3), dtype=torch.long))
        assert set(state.changed()) == {"seen", "last", "words._modules", "buffers"}
    assert (model.seen, float(model.count)) == ([], 0.0)
    assert model.words[2] is before
    assert draws == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    assert not hasattr(model, "last")


def seen_of(model: nn.Module) -> Behavior:
    windows = [[1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16], [7, 8, 9], [7]]
    return observe(
        model, probe(model, [Hook("x", "words.0")], "cpu"), windows, pad_id=0, ctx_len=9, batch_tokens=64, name="it"
    )


def test_a_model_that_remembers_its_passes_is_harvested_as_if_it_did_not() -> None:
    model = Remembers()
    hooks = [Hook("x", "words.0", d_in=4)]
    behavior = seen_of(model)
    assert behavior.batching == "padded"
    assert "seen" in behavior.changed
    out = [
        run_model(
            TokenModel(m, hooks, "cpu", batch_tokens=8, pad_id=0, say=print, behavior=behavior), a_buffer([3, 2, 5])
        )
        for m in (model, model)
    ]
    assert torch.equal(out[0]["x"], out[1]["x"])


class Reads(Towers):
    """Adds to each token what `look` makes of the batch (S, T, D)."""

    def __init__(self, look: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.look = look

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(input_ids)
        return self.words[0](x + self.look(x))


@pytest.mark.parametrize(
    ("look", "batching", "causal"),
    [
        (lambda x: x, "padded", True),
        (lambda x: x.cumsum(1), "padded", True),
        (lambda x: x.mean(1, keepdim=True), "equal", False),
        (lambda x: x.mean((0, 1), keepdim=True), "single", False),
        (lambda x: x.cumsum(0), "single", True),
    ],
)
def test_what_a_model_does_is_seen(look: Any, batching: str, causal: bool) -> None:
    torch.manual_seed(0)
    found = seen_of(Reads(look))
    assert (found.batching, found.causal, found.changed) == (batching, causal, ())
    assert bool(found.notice) == (batching != "padded")


def test_a_model_that_draws_random_numbers_is_refused() -> None:
    with pytest.raises(ModelError, match="other activations for the same text at each pass"):
        seen_of(Reads(torch.rand_like))


def test_batches_of_one_length() -> None:
    lengths = [5, 9, 9, 5, 8, 9, 1]
    batches = plan_batches(lengths, 18, padded=False)
    assert [[lengths[i] for i in batch] for batch in batches] == [[9, 9], [9], [8], [5, 5], [1]]


@pytest.mark.parametrize("told", [True, False])
def test_direction_is_what_the_model_does(make: Make, told: bool) -> None:
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(**sizes(head_dim=8, num_key_value_heads=2, use_bidirectional_attention=True))
    folder = make(config if told else xlnet())  # XLNet's type is a causal model's
    with pytest.raises(ConfigError, match="--pack joins documents for decoders"):
        harvest(folder, texts(3), pack=True)
    assert not (folder.parent / "out").exists()
    model = harvest(folder, texts(12)).manifest.provenance["model"]
    assert (model["is_decoder"], model["family"]) == (False, "encoder")


def test_a_pad_token_that_the_embedding_does_not_have_is_replaced(make: Make) -> None:
    from transformers import BertConfig

    folder = make(BertConfig(**sizes()))
    tokenizer = tiny_tokenizer("bert")
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    tokenizer.save_pretrained(folder)
    assert tokenizer.pad_token_id >= sizes()["vocab_size"]
    assert errors_of(harvest(folder, texts(12)), folder) < 1e-5
    assert [pad_id_for(Towers(), i) for i in (None, -1, 3)] == [0, 0, 3]


def test_models_that_want_pictures_or_sound_are_refused_in_one_line(make: Make) -> None:
    from transformers import CLIPConfig, WhisperConfig

    tower = sizes(projection_dim=16)
    folder = make(CLIPConfig(text_config=tower, vision_config=tower | {"image_size": 8, "patch_size": 4}))
    with pytest.raises(ModelError, match=r"cannot run on text alone .*: give a model that reads text"):
        harvest(folder, texts(3))
    folder = make(
        WhisperConfig(
            vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=4, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    )  # fmt: skip
    with pytest.raises(ModelError, match="WhisperEncoder takes input_features, not the token ids of a text"):
        harvest(folder, texts(3))
    assert not (folder.parent / "out").exists()


def test_an_error_of_the_models_own_code_is_one_line() -> None:
    class Fails(Towers):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            if input_ids.shape[1] > 8:
                raise IndexError("index out of range\nin self")
            return super().forward(input_ids)

    model = TokenModel(Fails(), [Hook("x", "words.0", d_in=4)], "cpu", batch_tokens=16, pad_id=0, say=print)
    with pytest.raises(ModelError, match=r"failed on a batch of 1 x 9 tokens: IndexError: index out of range$"):
        run_model(model, a_buffer([9, 3]))
    with pytest.raises(ModelError, match=r"it cannot run on text alone \(IndexError: index out of range\)"):
        seen_of(Fails())


def test_the_encoder_of_an_encoder_decoder_saved_by_itself(make: Make) -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=sizes()["vocab_size"], d_model=WIDTH, d_kv=8, d_ff=64, num_layers=N_LAYERS, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    folder = make(T5EncoderModel(config))
    cache = harvest(folder, texts(12))
    assert cache.hook_points["layer_1"].module == "encoder.block.1"
    model = T5EncoderModel.from_pretrained(folder).eval()
    ids = cache.column("token_id")[0 : cache.n_rows][cache.column("window")[0 : cache.n_rows] == 2]
    with torch.inference_mode():
        out = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True)
    rows = cache.hook()[0 : cache.n_rows][cache.column("window")[0 : cache.n_rows] == 2]
    assert row_errors(rows, out.hidden_states[2][0].numpy()).max() < 1e-5
