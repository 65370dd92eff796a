"""What a reader of a run's numbers should know: the words for latents that hardly fire, and remarks with a remedy.

dead          share of latents that were silent for the last `dead_after_tokens` rows of training. In tables.
rare          share of latents that fire on less than `dead_threshold` of the evaluated rows, silent ones included
never_fired   share of latents that fire on none of the evaluated rows
density/rare, density/never_fired   the same of the batches measured while training, in metrics.jsonl
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

FEW_ROWS = 2000  # evaluated rows; on fewer a latent of the usual `dead_threshold` cannot be told from a silent one
STORED = 0.05  # storage error, relative to the SAE's
WAITED_SECONDS, WAITED_SHARE = 10.0, 0.2  # from which on the time for which a training waited for its rows is named
MANY_DEAD = 0.25  # share of the latents
MISSED_L0, SHIFTED_L0 = 0.1, 0.25  # relative, in training and in inference on other rows


def remarks(summary: Mapping[str, Any], *, wanted_l0: float | None, warmup_steps: int) -> list[str]:
    """Remarks on a summary; `wanted_l0` is the requested L0, if any."""
    return [
        *damage(summary),
        *_storage(summary),
        *_evaluation(summary, wanted_l0),
        *_training(summary, wanted_l0, warmup_steps),
    ]


def damage(summary: Mapping[str, Any]) -> list[str]:
    """Damaged data that a run left out; shown in red."""
    found = []
    if rejected := summary.get("rejected", 0):
        found.append(f"{rejected:,} of {summary['steps']:,} batches were rejected for NaN, Inf or absurd values")
    if dropped := summary["eval"].get("n_dropped", 0):
        found.append(f"{dropped:,} damaged rows were left out of the evaluation")
    return [f"{text}: run sae-cache verify {summary['cache']}" for text in found]


def slow_rows(seconds: float, share: float) -> list[str]:
    """A remark on a training that waited for its rows, of so many seconds and this share of its time."""
    if seconds < WAITED_SECONDS or share < WAITED_SHARE:
        return []
    return [
        f"{share:.0%} of the training time was spent on waiting for rows: reading is the limit, not the steps; copy "
        "the cache to a faster disk, or harvest with --dtype int8"
    ]


def _storage(summary: Mapping[str, Any]) -> Iterator[str]:
    """An SAE is measured on rows as they were stored: what storing lost is not in its FVU."""
    fvu, errors = summary["eval"].get("fvu"), summary.get("storage_error") or {}
    worst = max((max(error["fvu"], error["fvu_ordinary"]) for error in errors.values()), default=0.0)
    if fvu is not None and worst > STORED * fvu:
        yield (
            f"the rows lost an FVU of {worst:.2g} when they were stored, which the SAE's {fvu:.2g} does not count: "
            "harvest with --dtype bfloat16"
        )


def _evaluation(summary: Mapping[str, Any], wanted_l0: float | None) -> Iterator[str]:
    numbers = summary["eval"]
    n_rows = numbers["n_rows"]
    if summary.get("eval_part", "heldout") != "heldout":
        yield "L0, FVU and the other metrics are of training rows: there are no held-out ones; give a larger --holdout"
    if n_rows and numbers["fvu"] is None:
        yield f"FVU is not defined: the {n_rows:,} evaluated rows do not vary; give a larger --holdout"
    elif n_rows < FEW_ROWS:
        yield f"evaluated on {n_rows:,} rows only, other rows may differ: give a larger --holdout, or harvest more text"
    l0 = numbers.get("l0")
    met = not _misses(summary["l0_train"], wanted_l0, MISSED_L0)
    if met and _misses(l0, wanted_l0, SHIFTED_L0):
        yield (
            f"L0 on {summary['eval_part']} rows is {l0:.1f}, {wanted_l0:g} was asked for: the threshold fits "
            "the training rows only; harvest more text"
        )


def _training(summary: Mapping[str, Any], wanted_l0: float | None, warmup_steps: int) -> Iterator[str]:
    steps, found = summary["steps"], summary["l0_train"]
    if _misses(found, wanted_l0, MISSED_L0):
        remedy = "train longer, or change the coefficient" if found > wanted_l0 else "train longer, or raise --d-sae"
        yield f"L0 of the last training batch measured is {found:.1f}, {wanted_l0:g} was asked for: {remedy}"
    if summary["dead"] > MANY_DEAD:
        yield (
            f"{summary['dead']:.0%} of the latents are dead: try a smaller --d-sae, a longer run, or --resample-every "
            f"{max(steps // 10, 1)}"
        )
    if warmup_steps >= steps:
        yield (
            f"the learning rate was still rising at the end: the warm-up takes {warmup_steps} steps, the run had "
            f"{steps}; train longer, or give fewer --warmup-steps"
        )


def _misses(l0: float | None, wanted: float | None, share: float) -> bool:
    return l0 is not None and wanted is not None and abs(l0 - wanted) > share * wanted


def legend(summaries: Sequence[Mapping[str, Any]]) -> str:
    """What "dead" means in a table of these runs."""
    spans = {summary.get("dead_after_tokens") for summary in summaries}
    span = next(iter(spans)) if len(spans) == 1 else None
    return f"dead: silent for the last {f'{span:,}' if span else '`dead_after_tokens`'} rows of training"
