"""Whether the hub can be reached, asked once with a short time limit: no command waits minutes without a network."""

from __future__ import annotations

import functools
import os

OFFLINE_HINT = (
    "there is no network (or HF_HUB_OFFLINE is set) and it is not in the local cache; "
    "{kind} also takes a local path, and the model and the text that come with the package are both named demo"
)
_TIMEOUT_SECONDS = 10.0


@functools.cache
def online() -> bool:
    """Whether the hub responds."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_SECONDS)
    except Exception:  # whichever client is installed has its own errors; all mean: not now
        return False
    return True


def quiet() -> None:
    """Turn off progress bars and notices of the Hugging Face libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
