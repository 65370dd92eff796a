"""The files of a local model that say what its weights compute: configurations, tokenizer, prompts, modules, code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import xxhash

from sae_granary.models.locate import Located, commit_of, file_of

_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".vocab", ".bpe", ".spm", ".merges", ".tiktoken", ".py")
_PAPERS = {"license", "notice", "readme", "requirements", "trainer_state", "all_results", "train_results"}


def config_hash(located: Located) -> str | None:
    """xxh3-128 of the names and bytes of these files of a local model, and of the commits of code from elsewhere.

    None for a hub model whose files all have a revision.
    """
    code = _code_elsewhere(located)
    if not located.is_local and not code:
        return None
    digest = xxhash.xxh3_128("\0".join(code).encode())
    root = Path(located.source)
    files = _config_files(located) if located.is_local else set()
    for path in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(data)}\0".encode("utf-8", "surrogateescape"))
        digest.update(data)
    return digest.hexdigest()


def _code_elsewhere(located: Located) -> list[str]:
    """`repository--module@commit` of the code that the configuration names in other repositories."""
    named = (getattr(located.config, "auto_map", None) or {}) if located.trust_remote_code else {}
    parts = [part for value in named.values() for part in (value if isinstance(value, list | tuple) else [value])]
    found = []
    for module in sorted({str(part).rpartition(".")[0] for part in parts if "--" in str(part)}):
        repository, _, name = module.partition("--")
        if repository != located.source:
            file = file_of(replace(located, source=repository, revision=None), f"{name}.py")
            found.append(f"{module}@{None if file is None else commit_of(file)}")
    return found


def _config_files(located: Located) -> set[Path]:
    """Files in the folder itself, in the folders of its modules and chat templates, and code at any depth."""
    root = Path(located.source)
    found = {*root.glob("*"), *root.glob("additional_chat_templates/*"), *root.rglob("*.py")}
    for module in located.modules:
        found |= set((root / module["path"]).rglob("*")) if module["path"] else set()
    return {path for path in found if _is_config(path.relative_to(root)) and path.is_file()}


def _is_config(path: Path) -> bool:
    hidden = any(part.startswith((".", "__pycache__", "checkpoint-")) for part in path.parts)
    return path.suffix.lower() in _SUFFIXES and path.stem.lower() not in _PAPERS and not hidden
