"""Models with random weights, a tokenizer trained on Python's own help, and texts of ragged lengths."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda_visit.part import tell
from benchmarks.cuda_visit.place import Place
from benchmarks.ragged import paragraphs

VOCABULARY, CTX_LEN = 16_384, 512
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


def corpus(at: Place, n_times: int) -> Path:
    """All paragraphs so often, as a local dataset with a `text` column."""
    path = at.folder / f"texts_{n_times}.jsonl"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(at))
    path.write_text(lines * n_times, encoding="utf-8")
    return path


def texts(at: Place) -> list[str]:
    """Paragraphs of Python's help: some two thousand, of 3 words to some hundreds."""
    return paragraphs(200 if at.tiny else 10**9)


def bert(at: Place) -> Path:
    """BERT-base: 12 layers, 768 wide."""
    from transformers import BertConfig

    return _saved(at, "bert", BertConfig(**TINY) if at.tiny else BertConfig())


def llama(at: Place) -> Path:
    """The shape of Llama 3.2 1B: 16 layers, 2048 wide."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    sizes |= {"num_key_value_heads": 8, "max_position_embeddings": 8192}
    tiny = TINY | {"num_key_value_heads": 4}
    return _saved(at, "llama", LlamaConfig(**(tiny if at.tiny else sizes), bos_token_id=0, eos_token_id=0))


def sentence_encoder(at: Place) -> Path:
    """A Sentence-Transformer of the shape of MiniLM-L6: 6 layers, 384 wide, mean pooling."""
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig

    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    inner = _saved(at, "minilm", BertConfig(**(TINY if at.tiny else sizes)))
    path = at.folder / "encoder"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a folder without pooling gets the mean
        model = SentenceTransformer(str(inner), device="cpu")
        model.max_seq_length = 256
        model.save(str(path))
    return path


def _saved(at: Place, name: str, config: Any) -> Path:
    """Its folder, with the weights in the dtype of a harvest on the device."""
    from transformers import AutoModel

    path = at.folder / f"model_{name}"
    tell(f"building {name}")
    tokenizer = _tokenizer(at, decoder=name == "llama")
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    with torch.device(at.device):
        model = AutoModel.from_config(config, dtype=torch.float32 if at.tiny else torch.bfloat16)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _tokenizer(at: Place, *, decoder: bool) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>"] if decoder else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    options = {"vocab_size": VOCABULARY, "special_tokens": special, "show_progress": False}
    trainer: Any
    if decoder:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(**options, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        template, names = "<s> $A", {"bos_token": "<s>", "eos_token": "<s>"}
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**options)
        template = "[CLS] $A [SEP]"
        names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer.train_from_iterator(texts(at), trainer)
    used = [(token, tokenizer.token_to_id(token)) for token in special if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CTX_LEN, **names)
