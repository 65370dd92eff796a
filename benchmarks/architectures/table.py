"""benchmarks/ARCHITECTURES.md out of the lines."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.architectures.trial import TOLERANCE

Line = dict[str, Any]


def summary(found: Sequence[Line]) -> str:
    """How many of each outcome."""
    return ", ".join(f"{n} {outcome}" for outcome, n in sorted(Counter(str(line["outcome"]) for line in found).items()))


def table(found: Sequence[Line]) -> str:
    import torch
    import transformers

    by: dict[str, list[Line]] = defaultdict(list)
    for line in found:
        by[str(line["outcome"])].append(line)
    worst = max((float(line["error"]) for line in by["equal"]), default=0.0)
    lines = [
        "# Architectures",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}; written by "
        "`python -m benchmarks.architectures`.",
        "",
        "| outcome | architectures | what it means |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {len(by[name])} | {what} |" for name, what in MEANINGS.items() if by[name]]
    for bad in ("WRONG", "TRACEBACK", "not tried"):
        if by[bad]:
            lines += ["", f"## {bad}", "", *(f"- `{line['name']}`: {line['why']}" for line in by[bad])]
    lines += ["", "## Equal", "", f"The largest error is {worst:.0e} of a row's length."]
    for title, chosen in _equal(by["equal"]):
        lines += ["", f"**{title}** ({len(chosen)}): {_names(chosen)}"]
    lines += ["", "## Refused"]
    for why, chosen in _by_reason(by["refused"]):
        lines += ["", f"**{why}** ({len(chosen)}): {_names(chosen)}"]
    lines += ["", "## Not built"]
    for why, chosen in _by_reason(by["not built"]):
        lines += ["", f"**{why}** ({len(chosen)}): {_names(chosen)}"]
    return "\n".join(lines) + "\n"


MEANINGS = {
    "equal": f"every row at the first, a middle and the last block is within {TOLERANCE:g} of the window run alone "
    "(no padding, no mask, float32)",
    "refused": "the harvest says in one line why not, before anything is written",
    "not built": "no tiny model could be built from the configuration class, or a library is not installed",
    "not tried": "building and trying it takes too long",
    "WRONG": "rows differ",
    "TRACEBACK": "an error that is not ours",
}


def _equal(lines: Sequence[Line]) -> Iterable[tuple[str, list[Line]]]:
    def kind(line: Line) -> str:
        told = "at the place that the refusal of all layers names" if line.get("only") else ""
        batches = f"batches of {line['batches']}" if line["batches"] else ""
        return ", ".join(filter(None, ("causal" if line["causal"] else "bidirectional", batches, told)))

    return _grouped(lines, kind)


def _by_reason(lines: Sequence[Line]) -> Iterable[tuple[str, list[Line]]]:
    def kind(line: Line) -> str:
        text = re.sub(r": give a model that reads text.*|^it: | \(sae-harvest names\)", "", str(line["why"]))
        for pattern, words in REASONS:
            if re.search(pattern, text):
                return words
        return re.sub(r"\b[A-Z]\w*(Model|Encoder|Transformer)\b", "the model", text).replace("<", "&lt;")

    return _grouped(lines, kind)


REASONS = (
    (r"takes \w+, not the token ids", "Its forward pass takes no token ids"),
    (r"requires the (\w+) library", "A library is not installed"),
    (r"million parameters", "Too large at the sizes that are known"),
    (r"Class validation error", "Sizes that do not belong together"),
    (r"Unrecognized configuration class|Could not find \w+ neither", "No model class for AutoModel"),
    (r"cannot run on text alone \((ValueError: You (have to|must) specify|TypeError: .*missing|ValueError: Exactly|"
     r"ValueError: (Bbox|`visual_feats`)|.*'NoneType' object has no|.*NoneType, Parameter)",
     "It cannot run on text alone: pictures, sound or boxes are wanted too"),
)  # fmt: skip


def _grouped(lines: Iterable[Line], kind: Any) -> Iterable[tuple[str, list[Line]]]:
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        groups[kind(line)].append(line)
    return sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))


def _names(lines: Iterable[Line]) -> str:
    return ", ".join(f"{line['name']} (`{line['only']}`)" if line.get("only") else str(line["name"]) for line in lines)
