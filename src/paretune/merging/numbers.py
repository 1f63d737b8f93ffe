"""Between stored numbers (bf16, f16, f32) and the float32 in which merging computes.

numpy alone does it, so that merging on the command line need not import torch; where torch is loaded already its
conversions are used, which are faster and give the same bits.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bits = NDArray[np.uint32]

STORED: dict[str, Any] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4}
ULP = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}  # half a unit in the last place, relative

_HALF = np.uint32(16)
_ONE = np.uint32(1)
_ROUND = np.uint32(0x7FFF)
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16"}


def widen(stored: NDArray[Any], kind: str, out: Floats) -> None:
    """Stored numbers as float32; exact.

    Args:
        stored: as `STORED` says for ``kind``.
        kind: BF16, F16 or F32.
        out: float32, of the same length.
    """
    if kind == "F32":
        np.copyto(out, stored)
    elif (torch := sys.modules.get("torch")) is not None and stored.flags.writeable and stored.flags.aligned:
        dtype = getattr(torch, _TORCH_NAMES[kind])
        torch.from_numpy(out).copy_(torch.from_numpy(stored.view(np.int16)).view(dtype))
    elif kind == "BF16":
        bits = out.view(np.uint32)
        np.copyto(bits, stored)
        np.left_shift(bits, _HALF, out=bits)
    else:
        np.copyto(out, stored)


def narrow(values: Floats, kind: str, out: NDArray[Any], scratch: Bits, *, careful: bool = False) -> None:
    """float32 rounded once, half to even, to a stored dtype.

    Args:
        values: float32.
        kind: BF16, F16 or F32.
        out: as `STORED` says for ``kind``, of the same length.
        scratch: as many 32-bit words; overwritten.
        careful: values may hold NaN: every NaN becomes one and the same quiet NaN.
    """
    torch = sys.modules.get("torch")
    if kind == "F32":
        np.copyto(out, values)
    elif torch is not None and not careful:
        torch.from_numpy(out.view(np.int16)).view(getattr(torch, _TORCH_NAMES[kind])).copy_(torch.from_numpy(values))
    elif kind == "BF16":
        bits = values.view(np.uint32)
        np.right_shift(bits, _HALF, out=scratch)
        np.bitwise_and(scratch, _ONE, out=scratch)
        np.add(scratch, bits, out=scratch)
        np.add(scratch, _ROUND, out=scratch)
        np.right_shift(scratch, _HALF, out=scratch)
        np.copyto(out, scratch, casting="unsafe")
    else:
        with np.errstate(over="ignore"):  # the caller looks for infinities
            np.copyto(out, values, casting="same_kind")
    if careful:
        nan = np.isnan(values)
        if nan.any():
            out.view(np.uint32 if kind == "F32" else np.uint16)[nan] = {
                "BF16": 0x7FC0,
                "F16": 0x7E00,
                "F32": 0x7FC00000,
            }[kind]


def is_finite(values: Floats) -> bool:
    """Whether every value is finite. A sum is the probe: one pass; only a sum that overflows is looked at again."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.add.reduce(values))) or bool(np.isfinite(values).all())
