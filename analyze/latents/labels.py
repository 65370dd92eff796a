"""Names of documents, values and latents on the command line."""

from __future__ import annotations

import json

from sae_granary.common.errors import ConfigError, printable
from sae_granary.common.rows import DocumentRow, Scalar

VALUE_CHARACTERS = 40  # shown of a value


def check_latent(latent: int, d_sae: int) -> None:
    """Raise ConfigError for a latent out of range."""
    if not 0 <= latent < d_sae:
        raise ConfigError(f"--latent is {latent}, expected 0 to {d_sae - 1}")


def document_labels(document: DocumentRow | None) -> list[str]:
    """`category=billing` for each kept column, or the source of a document without kept columns."""
    if document is None:
        return ["-"]
    cells = [f"{value_label(name)}={value_label(value)}" for name, value in document.columns.items()]
    return cells or [value_label(document.source)]


def value_label(value: Scalar) -> str:
    """A value of a kept column in one short line, with control characters escaped."""
    text = " ".join((str(value) if isinstance(value, str | float) else json.dumps(value)).split())
    return printable(text if len(text) <= VALUE_CHARACTERS else text[: VALUE_CHARACTERS - 3] + "...")
