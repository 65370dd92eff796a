"""Random damages for the tests that try thousands of them."""

import random
from typing import Any

STRANGE = [None, True, -1, 0, 1.5, 2**70, "", "x" * 5000, "\x1b[31m", [], {}, [[]], "nan", float("nan"), float("inf")]


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """One flipped bit, cut, other digit, or line that is lost or there twice, ..."""
    out, at = bytearray(data), chance.randrange(len(data))
    kind = chance.choice(["flip", "flip", "flip", "cut", "append", "zero", "digit", "drop", "double", "empty"])
    if kind == "flip":
        out[at] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del out[at:]
    elif kind == "append":
        out.append(chance.randrange(256))
    elif kind == "zero":
        out[at : at + 16] = bytes(16)
    elif kind == "digit":
        digits = [i for i, c in enumerate(out) if chr(c).isdigit()]
        out[chance.choice(digits)] = ord(chance.choice("0123456789"))
    elif kind in ("drop", "double"):
        lines = data.splitlines(keepends=True)
        i = chance.randrange(len(lines))
        return b"".join(lines[:i] + [lines[i]] * (2 * (kind == "double")) + lines[i + 1 :])
    return b"" if kind == "empty" else bytes(out)


def mutate_value(value: Any, chance: random.Random) -> Any:
    """Another value, or the same with another value, or none, somewhere inside of it."""
    if isinstance(value, dict | list) and value and chance.random() < 0.8:
        key = chance.choice(list(value) if isinstance(value, dict) else list(range(len(value))))
        out = value.copy()
        if chance.random() < 0.15:
            del out[key]
        else:
            out[key] = mutate_value(value[key], chance)
        return out
    if type(value) in (int, float) and chance.random() < 0.5:
        return value + chance.choice([1, -1, 7, 0.5])
    return chance.choice(STRANGE)
