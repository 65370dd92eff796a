"""One byte per value (dtype `int8`): what is stored of a row, and how it is read back.

    x[i, j] = q (|q| + 32) scale[i] step[j] + offset[j]        q = codes[i, j] in -127..127

The codes are fine near zero and coarse far out. `step` and `offset` are fixed for a hook point, each row has a `scale`.
q (|q| + 32) has 15 bits, a scale 6 significant bits and a step 3, so that their product is exact in float32 in any
order and only the last addition rounds: numpy, torch and any other reader get equal bits. Only decoding is part of the
format; another encoder may choose other codes.

Shapes: N rows, D = d_in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_granary.cache.format.signed import Fields, to_base64
from sae_granary.cache.format.storage import Array

F32 = npt.NDArray[np.float32]

MAX_CODE, BEND = 127, 32
MAX_PRODUCT = MAX_CODE * (MAX_CODE + BEND)  # 20,193
SCALE_BITS, STEP_BITS = 6, 3
MIN_SCALE, MAX_SCALE = 2.0**-18, 64512.0  # what float16 holds with 6 significant bits
MIN_STEP, MAX_STEP = 2.0**-100, 2.0**96  # no decoded value is subnormal or infinite
MAX_OFFSET = 2.0**126
MAX_ERROR = 16.75  # of a code, in units of its slope: |x - decoded| <= step[j] scale[i] (|q| + MAX_ERROR)
_BLOCK = 1 << 16  # values that are worked on at once: they fit a core's cache
FORMULA = "x[i, j] = q * (abs(q) + 32) * scale[i] * step[j] + offset[j], q = this array[i, j]"


@dataclass(frozen=True, eq=False)
class Affine:
    """Step and offset of each dimension of one hook point."""

    step_D: F32  # positive, 3 significant bits
    offset_D: F32

    def equals(self, other: Affine) -> bool:
        """Whether both hold the same numbers."""
        return bool((self.step_D == other.step_D).all() and (self.offset_D == other.offset_D).all())

    def encode(self, x_ND: Array, codes_ND: Array, scales_N: Array) -> int | None:
        """Codes (int8) and scales (float16) of rows of any float type; the first row that does not fit, or None.

        A row does not fit if it holds NaN or Inf, or a value farther from the offset than 1.3e9 steps.
        """
        misfit = None
        for rows in _blocks(x_ND):
            with np.errstate(over="ignore", invalid="ignore"):
                z_ND = (x_ND[rows].astype(np.float32, copy=False) - self.offset_D) / self.step_D
                magnitude_ND = np.abs(z_ND)
                peak_N = magnitude_ND.max(axis=1)
                if misfit is None and not (fits := peak_N <= MAX_PRODUCT * MAX_SCALE).all():  # NaN does not fit either
                    misfit = rows.start + int(fits.argmin())
                scale_N = round_up(peak_N / np.float32(MAX_PRODUCT), SCALE_BITS)
                np.maximum(scale_N, np.float32(MIN_SCALE), out=scale_N)
                magnitude_ND *= np.float32(4) / scale_N[:, None]
                magnitude_ND += np.float32(BEND**2)
                np.sqrt(magnitude_ND, out=magnitude_ND)
                magnitude_ND -= np.float32(BEND)
                magnitude_ND *= np.float32(0.5)
                np.rint(magnitude_ND, out=magnitude_ND)
                np.minimum(magnitude_ND, np.float32(MAX_CODE), out=magnitude_ND)
                codes_ND[rows] = np.copysign(magnitude_ND, z_ND)
                scales_N[rows] = scale_N
        return misfit

    def decode(self, codes: Array, scales: Array | np.float16) -> F32:
        """The rows (N, D) of codes and scales (N,), or one row (D,) of its codes and its scale."""
        if codes.ndim == 1:
            row: F32 = self.decode(codes[None], np.asarray(scales).reshape(1))[0]
            return row
        scale_N = np.asarray(scales, np.float32)
        x_ND = np.empty(codes.shape, np.float32)
        for rows in _blocks(codes):
            product_ND = codes[rows].astype(np.int16)
            product_ND *= np.abs(product_ND) + np.int16(BEND)
            np.multiply(product_ND, scale_N[rows, None], out=x_ND[rows])
            x_ND[rows] *= self.step_D
            x_ND[rows] += self.offset_D
        return x_ND

    def rounded(self, x_ND: Array) -> F32:
        """The rows as they would be stored and read back; those that do not fit are not finite."""
        codes_ND, scales_N = np.empty(x_ND.shape, np.int8), np.empty(len(x_ND), np.float16)
        self.encode(x_ND, codes_ND, scales_N)
        return self.decode(codes_ND, scales_N)

    def to_json(self) -> dict[str, Any]:
        """JSON form: base64 of little-endian float32."""
        return {"step": to_base64(self.step_D, "<f4"), "offset": to_base64(self.offset_D, "<f4")}


def parse_affine(fields: Fields) -> Affine:
    """Step and offset from their JSON form. Raises CorruptCacheError for values that no writer stores."""
    step_D, offset_D = (fields.vector(name, "<f4") for name in ("step", "offset"))
    if step_D.shape != offset_D.shape:
        raise fields.error("offset", f"{len(offset_D)} numbers", f"{len(step_D)}, as many as step has")
    good = (step_D >= MIN_STEP) & (step_D <= MAX_STEP) & (step_D == round_up(step_D, STEP_BITS))
    if not good.all():
        expected = f"{MIN_STEP:.3g} to {MAX_STEP:.3g} with {STEP_BITS} significant bits"
        raise fields.error("step", float(step_D[good.argmin()]), expected)
    good = (np.abs(offset_D) <= MAX_OFFSET) & ((offset_D == 0) | (np.abs(offset_D) >= MIN_STEP))
    if not good.all():
        raise fields.error("offset", float(offset_D[good.argmin()]), f"0, or {MIN_STEP:.3g} to {MAX_OFFSET:.3g}")
    return Affine(step_D, offset_D)


def affines_json(affines: Mapping[str, Affine]) -> dict[str, Any]:
    """JSON form of the affine maps of hook points."""
    return {hook: affine.to_json() for hook, affine in affines.items()}


def is_scale(scales_N: Array) -> npt.NDArray[np.bool_]:
    """(N,) whether each is a scale that a writer stores: finite, positive, of 6 significant bits."""
    wide_N = scales_N.astype(np.float32)
    with np.errstate(invalid="ignore"):
        in_range_N = (wide_N >= MIN_SCALE) & (wide_N <= MAX_SCALE)
    good_N: npt.NDArray[np.bool_] = in_range_N & (wide_N == round_up(wide_N, SCALE_BITS))
    return good_N


def round_up(values: F32, n_bits: int) -> F32:
    """Positive float32 values rounded up to n significant bits."""
    mask = (1 << (24 - n_bits)) - 1
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32) + np.uint32(mask)
    rounded: F32 = (bits & ~np.uint32(mask)).view(np.float32)
    return rounded


def _blocks(x_ND: Array) -> list[slice]:
    """Slices of rows that fit a core's cache."""
    step = max(_BLOCK // max(x_ND.shape[1], 1), 1)
    return [slice(start, min(start + step, len(x_ND))) for start in range(0, len(x_ND), step)]
