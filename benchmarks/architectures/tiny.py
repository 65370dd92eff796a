"""Tiny models with random weights of every architecture, and a tokenizer and texts for them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_PARAMETERS = 60_000_000
N_LAYERS, WIDTH, N_HEADS, CTX_LEN, VOCAB = 4, 32, 4, 12, 128
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", *(f"<{i}>" for i in range(4, 16)))  # the last for pictures and sound
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

# What the configs call a size, and its small value.
SIZES: tuple[tuple[int, str], ...] = (
    (WIDTH, "hidden_size d_model n_embd dim emb_dim embed_dim model_dim word_embed_proj_dim "
     "embedding_size d_embed encoder_hidden_size attention_hidden_size projection_dim "
     "lru_width attention_dim decoder_hidden_size backbone_hidden_size"),
    (2 * WIDTH, "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim hidden_dim n_inner dff "
     "ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size dim_ff "
     "mlp_hidden_size expert_ffn_hidden_size feed_forward_size d_inner intermediate_size_mlp"),
    (N_LAYERS, "num_hidden_layers num_layers n_layers n_layer encoder_layers decoder_layers "
     "num_encoder_layers num_decoder_layers depth l_layers x_layers r_layers"),
    (N_HEADS, "num_attention_heads n_heads n_head num_heads encoder_attention_heads "
     "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
     "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_heads "
     "linear_num_key_heads linear_num_value_heads"),
    (2, "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_top_k top_k_experts moe_k n_group "
        "num_activated_experts num_experts_per_token num_expert_group"),
    (1, "topk_group n_shared_experts"),
    (16, "q_lora_rank kv_lora_rank mamba_d_state state_size mamba_chunk_size chunk_size ssm_state_size n_hash_buckets"),
    (8, "head_dim d_kv kv_channels d_head attention_head_size rotary_dim qk_rope_head_dim qk_nope_head_dim v_head_dim "
        "index_head_dim mamba_d_head mamba_n_heads linear_key_head_dim linear_value_head_dim linear_head_dim"),
    (VOCAB, "vocab_size text_vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size entity_vocab_size"),
    (256, "max_position_embeddings n_positions n_ctx max_source_positions max_target_positions"),
)  # fmt: skip
SMALL: dict[str, Any] = {name: size for size, names in SIZES for name in names.split()}
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
             "unk_token_id": 3, "decoder_start_token_id": 0}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Some configs want sizes that belong together: what more is tried while a model cannot be built, or fails on shapes.
MORE: tuple[dict[str, Any], ...] = (
    {},
    {"hidden_size": 64, "head_dim": 16, "d_model": 64, "d_kv": 16},
    {"num_key_value_heads": 4},
    {"mrope_section": [1, 1, 2]},
    {"mrope_section": [1, 1, 0]},
    {"hidden_size": 128, "d_model": 128, "embed_dim": 128, "head_dim": 32},
    {"fill": True},  # also where the default is None
    {"fill": True, "rope_parameters": ROPE},
    {"fill": True, "num_key_value_heads": 4},
    {"num_hidden_layers": 8, "num_layers": 8},
    {"keep": "head_dim moe"},
    {"keep": "layer"},
)
FAMILIES: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "cohere_compass": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "funnel": {"num_hidden_layers": None, "block_sizes": [2, 1, 1]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "longformer": {"attention_window": 8},
    "led": {"attention_window": 8},
    "pegasus_x": {"block_size": 8, "num_global_tokens": 4},
    "big_bird": {"block_size": 2, "num_random_blocks": 1},
    "bigbird_pegasus": {"block_size": 2, "num_random_blocks": 1},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "mistral4": {
        "num_key_value_heads": 4,
        "rope_parameters": ROPE
        | {"partial_rotary_factor": 1.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8192},
    },
    "mllama": {"cross_attention_layers": [1]},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16]},
    "step3p": {"sliding_window": 4},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
}  # by how the model type starts


def build(name: str, folder: Path) -> None:
    """A tiny model with random weights and a tokenizer, saved. Raises what transformers raises."""
    import torch

    problem: Exception | None = None
    built = None
    for more in MORE:
        try:
            model = _model(name, more)
        except Exception as error:
            problem = problem or error
            continue
        built = model if built is None else built
        if not _fails_on_shapes(model):
            built = model
            break
    if built is None:
        assert problem is not None
        raise problem
    with torch.no_grad():  # larger than the usual start, so that layers differ clearly
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
    built.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def _model(name: str, more: dict[str, Any]) -> Any:
    import torch
    from transformers import CONFIG_MAPPING, AutoModel

    family = next((sizes for start, sizes in FAMILIES.items() if name.startswith(start)), {})
    config = CONFIG_MAPPING[name](**small(CONFIG_MAPPING[name], more | family))
    with torch.device("meta"):
        n = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
    if n > MAX_PARAMETERS:
        raise ValueError(f"{n / 1e6:.0f} million parameters at the sizes that are known")
    torch.manual_seed(0)
    return AutoModel.from_config(config).float().eval()


def _fails_on_shapes(model: Any) -> bool:
    """Whether a pass over some ids fails in a way that other sizes may avoid."""
    import torch

    try:
        with torch.inference_mode():
            part(model)(input_ids=torch.arange(20, 25)[None])
    except (RuntimeError, IndexError, AssertionError):
        return True
    except TypeError as error:
        return "required" not in str(error)
    except Exception:
        return False
    return False


def part(model: Any) -> Any:
    """What is harvested: of an encoder-decoder the encoder."""
    return model.get_encoder() if model.config.is_encoder_decoder else model


def small(kind: Any, more: dict[str, Any]) -> dict[str, Any]:
    """Keywords of a config class that make the model small, those of its parts included."""
    return dict(_small(kind, more))


def _small(kind: Any, more: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    parts = dict(getattr(kind, "sub_configs", {}) or {})
    sizes, kept = SMALL | more, str(more.get("keep", "")).split()
    for name, value in kind().to_dict().items():
        if name in parts and parts[name].__name__ != "AutoConfig":
            yield name, small(parts[name], more)
        elif name in parts and value is not None:
            from transformers import CONFIG_MAPPING

            model_type = value.get("model_type") if isinstance(value, dict) else value.model_type
            yield name, {"model_type": model_type} | small(CONFIG_MAPPING[model_type], more)
        elif name == "rope_parameters" and "mrope_section" in more:
            yield name, {**(value or ROPE), "mrope_section": more["mrope_section"]}
        elif name in TOKEN_IDS and (isinstance(value, int) or value is None):
            yield name, TOKEN_IDS[name]
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= VOCAB:
            yield name, 4 + sum(map(ord, name)) % 12
        elif name == "vocab_size" and value is None:
            yield name, VOCAB
        elif any(word in name for word in kept) or sizes.get(name) is None:
            continue
        elif name in more or (isinstance(value, int) and value > 0) or (value is None and "fill" in more):
            yield name, sizes[name]


def tokenizer() -> Any:
    """Bytes between <s> and </s>, as many tokens as the models' embeddings; of a kind that every class reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *LETTERS, *(chr(0x100 + i) for i in range(VOCAB - len(SPECIAL) - len(LETTERS)))]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[4:]),
    )  # fmt: skip


def texts() -> list[str]:
    """Ragged documents, as many in a batch as tokens in a window among them."""
    lengths = [3, 10, 1, 10, 7, 10, 10, 4, 10, 10, 10, 9, 8, 10, 10, 2, 10, 10, 10, 5, 23, 10]
    return ["".join(LETTERS[(7 * i + 13 * j * j + 5 * j) % 62] for j in range(n)) for i, n in enumerate(lengths)]
