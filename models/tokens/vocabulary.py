"""Whether a tokenizer is the model's own: its vocabulary against the model's, and unknown tokens in the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_granary.models.errors import ModelError
from sae_granary.models.tokens.contexts import IntArray, Tokenize

if TYPE_CHECKING:
    from sae_granary.models.locate import Located

_FILES = ("tokenizer.json", "tekken.json", "*vocab*", "*.model*", "*.tiktoken", "*.spm", "*.bpe")
_REMEDY = "save the model's own tokenizer beside its weights"
_PADDED = 128  # embeddings are padded to a multiple of this or less
_SURPLUS = 64  # added tokens without an embedding are harmless as long as no text has them
UNKNOWN_SHARE = 0.1  # of the tokens: above it the tokenizer is hardly the one for this text
_ENOUGH_TOKENS = 64


def vocabulary(tokenizer: Any) -> list[str]:
    """Token id -> string; ids without a token are empty."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    return [by_id.get(index, "") for index in range(max(by_id) + 1)] if by_id else []


def check_files(located: Located, *names: str) -> None:
    """Refuse a local model without a file of a vocabulary: transformers would make one up. Raises ModelError."""
    folder = Path(located.source) / located.subfolder
    if located.is_local and all(next(folder.glob(pattern), None) is None for pattern in (*names, *_FILES)):
        raise ModelError(f"{located.name} has no tokenizer files ({', '.join(_FILES[:3])} ...): {_REMEDY}")


def check_vocabulary(tokenizer: Any, located: Located) -> None:
    """Refuse a tokenizer that was made up for want of files, or whose vocabulary is not the model's. ModelError."""
    names = getattr(type(tokenizer), "vocab_files_names", {})
    if names:  # tokenizers of bytes or characters need no file
        check_files(located, *names.values())
    words = tokenizer.get_vocab()
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if set(words) <= added:
        raise ModelError(f"the tokenizer of {located.name} has no words, only {len(words)} special tokens: {_REMEDY}")
    size = getattr(located.text_config, "vocab_size", None) if located.config is not None else None
    if not isinstance(size, int) or size < 1:
        return
    last = max(words.values())
    if len(words) < size / 2 and size - len(words) > _PADDED:
        wrong = f"{len(words):,} tokens"
    elif sum(index >= size for index in words.values()) > max(_SURPLUS, size // 100):
        wrong = f"ids up to {last:,}"
    else:
        return
    raise ModelError(
        f"the tokenizer of {located.name} has {wrong}, but the model's vocab_size is {size:,}: it belongs to another "
        f"model; {_REMEDY}"
    )


def checked(tokenize: Tokenize, tokenizer: Any, located: Located, say: Callable[[str], None]) -> Tokenize:
    """`tokenize` that warns once above UNKNOWN_SHARE, and raises ModelError for an id that the model has no row for."""
    unknown, size = unknown_id(tokenizer), getattr(located.text_config, "vocab_size", None)
    n_tokens = n_unknown = 0
    warned = False

    def run(texts: Sequence[str]) -> Sequence[IntArray]:
        nonlocal n_tokens, n_unknown, warned
        found = tokenize(texts)
        for ids in found:
            if isinstance(size, int) and size > 0 and len(ids) and int(ids.max()) >= size:
                token = tokenizer.convert_ids_to_tokens(int(ids.max()))
                raise ModelError(
                    f"the text has the token {token!r} of id {int(ids.max()):,}, but {located.name} embeds only "
                    f"{size:,} ids: use the tokenizer that belongs to the model"
                )
        if unknown is not None and not warned:
            n_tokens += sum(len(ids) for ids in found)
            n_unknown += sum(int(np.count_nonzero(ids == unknown)) for ids in found)
            if n_tokens >= _ENOUGH_TOKENS and n_unknown > UNKNOWN_SHARE * n_tokens:
                warned = True
                say(
                    f"warning: {n_unknown:,} of the first {n_tokens:,} tokens are unknown to the tokenizer "
                    f"({tokenizer.unk_token}): is it the one for this model and this language?"
                )
        return found

    return run


def unknown_id(tokenizer: Any) -> int | None:
    """Id of the unknown token; None if there is none, or if it is also BOS or EOS, as in GPT-2."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    return None if unknown in (None, tokenizer.bos_token_id, tokenizer.eos_token_id) else int(unknown)
