"""The model's tokenizer: loading, its special tokens, and batches of texts -> ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

from sae_granary.common.errors import ConfigError, one_line
from sae_granary.models.config import TokenConfig
from sae_granary.models.errors import LOAD_ERRORS, ModelError
from sae_granary.models.tokens.contexts import IntArray, Tokenize, WindowRules
from sae_granary.models.tokens.document import Render, join_chat
from sae_granary.models.tokens.long_texts import PLAIN, encode
from sae_granary.models.tokens.vocabulary import check_files, check_vocabulary

if TYPE_CHECKING:
    from sae_granary.models.locate import Located

_PROBES = ("a", "the", "hello", "1")
_SANE_LENGTH = 10**7  # transformers writes 10**30 for "no limit"


def load_tokenizer(located: Located) -> Any:
    """The tokenizer that belongs to the model, in lower case where a Sentence-Transformer says so. ModelError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(located.source, **located.kwargs_of("tokenizer"))
    except LOAD_ERRORS as error:
        check_files(located)
        raise ModelError(f"the tokenizer of {located.name} cannot be loaded: {one_line(error)}") from error
    check_vocabulary(tokenizer, located)
    if located.do_lower_case:
        _lower_case(tokenizer)
    return tokenizer


def _lower_case(tokenizer: Any) -> None:
    """As the Transformer module of sentence-transformers does it: before every other normalizer, unless one does."""
    from tokenizers import normalizers

    if not tokenizer.is_fast:
        tokenizer.do_lower_case = True
        return
    backend = tokenizer.backend_tokenizer
    have: Any = backend.normalizer
    is_list = isinstance(have, normalizers.Sequence)
    parts: list[Any] = list(have) if is_list else [have] if have is not None else []
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])


def window_rules(
    tokenizer: Any, config: TokenConfig, *, is_decoder: bool, max_positions: int | None, default_len: int
) -> WindowRules:
    """Rules by which texts become contexts for this model. Raises ConfigError for impossible settings."""
    limit = _limit(tokenizer, max_positions)
    ctx_len = config.ctx_len if config.ctx_len is not None else min(default_len, limit or default_len)
    if limit is not None and ctx_len > limit:
        raise ConfigError(f"--ctx-len is {ctx_len}, but the model takes at most {limit} tokens")
    prefix, suffix = special_tokens_around(tokenizer)
    prefix = _with_bos(tokenizer, prefix, config.bos)
    separator = None
    if config.pack:
        if not is_decoder:
            raise ConfigError("--pack joins documents for decoders; an encoder would attend across them: leave it out")
        separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if separator is None:
            raise ConfigError("--pack puts a separator after each document, but the tokenizer has no EOS token")
        suffix = ()
    unk = getattr(tokenizer, "unk_token_id", None)
    special = frozenset(int(token) for token in tokenizer.all_special_ids if token != unk or token == separator)
    if unk is not None and unk in {tokenizer.bos_token_id, tokenizer.eos_token_id}:
        special |= {int(unk)}  # GPT-2 names one token for everything
    rules = WindowRules(ctx_len, prefix, suffix, separator, special, _control_ids(tokenizer) - special)
    if rules.room < 1:
        raise ConfigError(
            f"--ctx-len is {ctx_len}, but each context holds {len(prefix) + len(suffix)} special tokens beside its text"
        )
    return rules


def _control_ids(tokenizer: Any) -> frozenset[int]:
    """Ids marked as special among the added tokens, the unknown token apart: it is a piece of the text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(int(i) for i, token in added.items() if token.special and i != tokenizer.unk_token_id)


def special_tokens_around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(before, after): what the tokenizer puts around a single text."""
    for text in _PROBES:
        bare = list(tokenizer(text, add_special_tokens=False, **PLAIN)["input_ids"])
        full = list(tokenizer(text, add_special_tokens=True, **PLAIN)["input_ids"])
        if not bare:
            continue
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return tuple(full[:start]), tuple(full[start + len(bare) :])
    raise ModelError("the tokenizer's special tokens are not around the text: this model is not supported")


def text_tokenizer(tokenizer: Any, load: Callable[[], Any], num_proc: int, prompt: str = "") -> Tokenize:
    """Batches of texts -> ids of `prompt` + text without special tokens; slow tokenizers use `num_proc` processes."""
    if num_proc > 1 and not getattr(tokenizer, "is_fast", False):
        import multiprocessing

        pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), _start_worker, (load,))

        def in_processes(texts: Sequence[str]) -> Sequence[IntArray]:
            prompted = [prompt + text for text in texts]
            return list(pool.map(_work, prompted, chunksize=max(1, len(texts) // (4 * num_proc))))

        return in_processes
    return lambda texts: encode(tokenizer, [prompt + text for text in texts])


def chat_renderer(tokenizer: Any) -> Render:
    """Chat messages -> text by the tokenizer's template, or `role: content` when it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return join_chat
    prefix, _ = special_tokens_around(tokenizer)
    bos = tokenizer.bos_token if prefix and tokenizer.bos_token_id == prefix[0] else None

    def render(messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError:  # for instance roles that the template does not know
            return join_chat(messages)
        return text.removeprefix(bos) if bos else text  # each window gets its own

    return render


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of the tokenizer's behavior, independent of its folder."""
    import xxhash

    digest = xxhash.xxh3_128()
    if getattr(tokenizer, "is_fast", False):
        backend = tokenizer.backend_tokenizer
        state = backend.__class__.from_str(backend.to_str())
        state.no_padding()
        state.no_truncation()
        digest.update(state.to_str().encode())
    else:
        digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
        digest.update(type(tokenizer).__name__.encode())
    template = getattr(tokenizer, "chat_template", None)
    digest.update((template or "").encode() if isinstance(template, str | None) else b"*")
    return digest.hexdigest()


def _limit(tokenizer: Any, max_positions: int | None) -> int | None:
    limits = [limit for limit in (tokenizer.model_max_length, max_positions) if limit and limit < _SANE_LENGTH]
    return int(min(limits)) if limits else None


def _with_bos(tokenizer: Any, prefix: tuple[int, ...], wanted: bool | None) -> tuple[int, ...]:
    bos = tokenizer.bos_token_id
    if wanted is False:
        return tuple(token for token in prefix if token != bos)
    if wanted and bos is None:
        raise ConfigError("--bos: the tokenizer has no BOS token")
    return (bos, *prefix) if wanted and bos not in prefix else prefix


_worker_tokenizer: Any = None


def _start_worker(load: Callable[[], Any]) -> None:
    global _worker_tokenizer  # noqa: PLW0603 one per process
    _worker_tokenizer = load()


def _work(text: str) -> IntArray:
    return encode(_worker_tokenizer, [text])[0]
