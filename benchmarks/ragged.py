"""Real ragged text without a download: the paragraphs of Python's own help topics."""

import json
import re
from pathlib import Path
from pydoc_data.topics import topics


def paragraphs(n_texts: int) -> list[str]:
    """The first n paragraphs of at least three words, in the order of the topics' names."""
    found = [
        " ".join(part.split())
        for name in sorted(topics)
        for part in re.split(r"\n\s*\n", topics[name])
        if len(part.split()) >= 3
    ]
    return found[:n_texts]


def write_jsonl(path: Path, n_texts: int) -> Path:
    """Write the paragraphs as a local dataset with a `text` column."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs(n_texts)), encoding="utf-8")
    return path
