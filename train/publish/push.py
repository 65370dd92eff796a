"""A run on the model hub: the inference form and a model card. Nothing leaves the machine in a dry run."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_granary.common.errors import one_line
from sae_granary.common.finished_run import NotARunError, read_metadata, read_summary
from sae_granary.train.errors import TrainError
from sae_granary.train.folders import check_one_run
from sae_granary.train.publish.published import public, stage

CARD = "README.md"
_HUB_ID = r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?"  # user/name, or a name alone
METRICS = ("l0", "fvu", "explained_variance", "cosine", "l2_ratio", "rare", "never_fired", "decoder_max_cosine")


@contextmanager
def staged(run: Path, license: str) -> Iterator[Path]:
    """A temporary folder that holds what is uploaded: the model card and the files of a run, never checkpoints or logs.

    No file names a path of this machine. Raises NotARunError for a folder without a finished SAE.
    """
    check_one_run(run)
    if not (run / "sae_weights.safetensors").is_file():
        raise NotARunError(f"{run} holds no finished SAE: expected sae_weights.safetensors")
    card = model_card(run, license)
    with tempfile.TemporaryDirectory() as folder:
        stage(run, Path(folder))
        (Path(folder) / CARD).write_text(card, encoding="utf-8")
        yield Path(folder)


def model_card(run: Path, license: str) -> str:
    """README.md of the repository: what it is, from which cache, how good, under which license."""
    summary, metadata = read_summary(run), read_metadata(run)
    found = {name: summary["eval"].get(name) for name in METRICS}
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in found.items() if value is not None)
    model, fingerprint = metadata.get("model_name"), metadata.get("cache_fingerprint") or {}
    # The hub refuses a base model that is none of its own, and a local path tells names.
    is_of_hub = fingerprint.get("weights_xxh3") is None and _is_hub_id(model)
    base = f"base_model: {model}\n" if is_of_hub else ""
    shown = {name: public(value) for name, value in fingerprint.items() if value is not None}
    provenance = "\n".join(f"- {name}: `{value}`" for name, value in sorted(shown.items()))
    library = "saelens" if (run / "cfg.json").is_file() else "sae-granary"  # what SAELens' search finds
    return f"""---
license: {license}
library_name: {library}
tags: [sparse-autoencoder, interpretability, sae-granary]
{base}---

# {summary["name"]}

A **{summary["type"]}** sparse autoencoder with {summary["d_sae"]:,} latents on `{metadata.get("hf_hook_name")}` of
`{public(model)}` (width {summary["d_in"]}), trained on {summary["tokens"]:,} rows with Granary.

Cache:

{provenance}

| metric on {summary["eval_part"]} rows | |
|---|---|
{rows}

`sae_core.load(folder)` reads it; where `cfg.json` is present, so does `SAE.load_from_disk(folder)` of SAELens.
"""


def push(run: Path, repo: str, *, license: str, private: bool) -> str:
    """Upload a run and its card; return the address. The token is the hub client's own, and is never written."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        url = api.create_repo(repo, private=private, exist_ok=True)
        with staged(run, license) as folder:
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Add {run.name}")
    except (HfHubHTTPError, OSError, ValueError) as error:
        problem = f"could not push to {repo!r}: {one_line(error)}"
        raise TrainError(f"{problem}; log in with `hf auth login`, check the name") from error
    return str(url)


def _is_hub_id(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(_HUB_ID, name) is not None and not Path(name).exists()
