"""The evaluation of an SAE on a cache as a signed JSON file beside its codes: eval.json.

{
  "format": 1,
  "identity": ...                        the SAE, cache, shards and hook points, as `Source.identity`
  "name", "type", "d_in", "d_sae"        of the SAE
  "cache", "hooks", "part", "selection"  which rows: path of the cache, filters, held-out documents
  "rows"                                 where every row of the cache went, as `Counts`
  "n_rows"                               rows that were evaluated
  "dead_threshold"                       firing rate under which a latent is rare
  "metrics"                              name -> number, or null where it is not defined
  "losses"                               what a run minimized: "loss" and its terms; null without a checkpoint
  "downstream"                           the same through the language model; null where it was not measured
  "routing"                              share of the rows per hook point; null where the type chooses none
  "density_histogram"                    {"log10_edges", "counts", "never_fired"}: firing rates of the latents
  "by_position", "by_token_class"        [{"group", "n_rows", "l0", "fvu"}, ...]; null where rows are whole texts
  "notes"                                what a reader should know, one line each
}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_granary.analyze.encoding.codes import CodesFields
from sae_granary.analyze.source import Source
from sae_granary.cache.load.selection import Part
from sae_granary.common.finished_run import EVALUATION
from sae_granary.common.signed import CHECKSUM, write_signed

FORMAT = 1


def evaluation_path(source: Source, part: Part = "heldout") -> Path:
    """File of a part's evaluation: eval.json, or eval_train.json and eval_all.json."""
    return source.place / (EVALUATION if part == "heldout" else f"eval_{part}.json")


def save_evaluation(source: Source, evaluation: Mapping[str, Any]) -> Path:
    """Store an evaluation beside the codes of its SAE and cache."""
    path = evaluation_path(source, evaluation["part"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_signed(path, {"format": FORMAT, **evaluation})
    return path


def load_evaluation(source: Source, part: Part = "heldout") -> dict[str, Any] | None:
    """The stored evaluation of an SAE on a cache; None if there is none, or it is of other weights or rows.

    Raises DamagedCodesError for a truncated or altered file.
    """
    path = evaluation_path(source, part)
    if not path.is_file():
        return None
    fields = CodesFields.of_file(path, "remove it and run `sae-analyze eval` again", signed_since=1, key="format")
    if fields.get("format", int) != FORMAT or fields.get("identity", dict) != source.identity:
        return None
    return {name: value for name, value in fields.body.items() if name not in ("format", CHECKSUM)}
