"""The files of a local model that say what its weights compute: configurations, tokenizer, prompts, modules, code."""

from __future__ import annotations

from pathlib import Path

import xxhash

from sae_granary.models.locate import Located

_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".vocab", ".bpe", ".spm", ".merges", ".tiktoken", ".py")
_PAPERS = {"license", "notice", "readme", "requirements", "trainer_state", "all_results", "train_results"}


def config_hash(located: Located) -> str:
    """xxh3-128 over the names and bytes of these files of a local model."""
    root, digest = Path(located.source), xxhash.xxh3_128()
    for path in sorted(_config_files(located), key=lambda path: path.relative_to(root).as_posix()):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(data)}\0".encode("utf-8", "surrogateescape"))
        digest.update(data)
    return digest.hexdigest()


def _config_files(located: Located) -> set[Path]:
    """Those in the folder itself, in the folders of its modules and chat templates, and code at any depth."""
    root = Path(located.source)
    found = {*root.glob("*"), *root.glob("additional_chat_templates/*"), *root.rglob("*.py")}
    for module in located.modules:
        found |= set((root / module["path"]).rglob("*")) if module["path"] else set()
    return {path for path in found if _is_config(path.relative_to(root)) and path.is_file()}


def _is_config(path: Path) -> bool:
    hidden = any(part.startswith((".", "__pycache__", "checkpoint-")) for part in path.parts)
    return path.suffix.lower() in _SUFFIXES and path.stem.lower() not in _PAPERS and not hidden
