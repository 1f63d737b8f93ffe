"""How many bytes training holds for each parameter: planned before a run, counted in one, and which card that needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from .parts import local

PARTS = ("model", "gradients", "moments", "master", "pending", "tau", "other")
_KINDS = {
    "exp_avg": "moments",
    "exp_avg_sq": "moments",
    "max_exp_avg_sq": "moments",
    "momentum_buffer": "moments",
    "exp_avg_sq_row": "moments",
    "exp_avg_sq_col": "moments",
    "row_var": "moments",
    "col_var": "moments",
    "variance": "moments",
    "basis": "moments",
    "master_low": "master",
    "pending": "pending",
}
CARDS = (16, 24, 32, 40, 48, 80, 96, 141, 192)  # GB of memory on cards that are sold
_FREE = 0.8  # the share of a card that weights and state may take: the rest is for activations and the framework


# bytes a parameter of both moments, tables included: 8, and 4 bits in blocks of 256 and 128 (torchao's defaults)
MOMENTS = {"float32": 8.0, "8bit": 2 * (1 + 4 / 256), "fp8": 2 * (1 + 4 / 256), "4bit": 2 * (0.5 + 4 / 128)}
TAU = {"files": 0.0, "bfloat16": 2.0, "int8": 1 + 4 / 64, "memory": 4.0, "none": 0.0}


def planned(
    method: str,
    dtype: torch.dtype,
    *,
    density: float = 0.05,
    every: int = 1,
    tau: str = "files",
    moments: str | float = "float32",
) -> dict[str, float]:
    """Bytes a trained parameter by part, before anything is built.

    Args:
        method: ``"adamw"``, ``"ondare"`` or ``"onties"``.
        dtype: of the parameters: float32, bfloat16 or float64.
        density: p; counts for OnTIES, which keeps F(τ) at 6 bytes a kept entry.
        every: K; above 1 the sum of what awaits its merge is held.
        tau: ``"files"`` (two checkpoints on disk), ``"memory"`` (models in memory: 4 bytes), ``"bfloat16"`` or
            ``"int8"`` (`TaskVector.stored`), or ``"none"``.
        moments: ``"float32"``; ``"8bit"``, ``"fp8"``, ``"4bit"`` (torchao's AdamW) or a number, from `projected`
            (GaLoreAdamW). Other than float32, merging wraps that optimizer, which takes a copy of the parameters for
            the time of a step.

    Raises:
        ArgumentError: an unknown method, place of τ or kind of moments.

    Example:
        >>> planned("onties", torch.bfloat16, density=0.05)
        {'model': 2.0, 'gradients': 2.0, 'moments': 8.0, 'master': 2.0, 'tau': 0.3}
        >>> planned("ondare", torch.bfloat16, moments="4bit")
        {'model': 2.0, 'gradients': 2.0, 'moments': 1.0625, 'master': 2.0, 'copy': 2.0, 'tau': 0.0}
    """
    if method not in ("adamw", "ondare", "onties"):
        raise ArgumentError("method", method, "choose adamw, ondare or onties")
    if tau not in TAU:
        raise ArgumentError("tau", tau, f"choose one of {', '.join(TAU)}")
    if isinstance(moments, str) and moments not in MOMENTS:
        raise ArgumentError("moments", moments, f"choose one of {', '.join(MOMENTS)}, or pass a number of bytes")
    size = float(dtype.itemsize)
    held = {"model": size, "gradients": size, "moments": MOMENTS[moments] if isinstance(moments, str) else moments}
    if method == "adamw":
        return held if moments != "float32" else {**held, "moments": 2 * size}
    if size == 8 and moments == "float32":
        held["moments"] = 16.0
    if dtype == torch.bfloat16:
        held["master"] = 2.0
    if every > 1:
        held["pending"] = max(4.0, size)
    if moments != "float32":
        held["copy"] = size
    held["tau"] = TAU[tau]
    if method == "onties" and tau != "none":
        held["tau"] += round(6 * density, 9)
    return held


def projected(shapes: Iterable[Sequence[int]], rank: int) -> float:
    """Bytes a parameter of `GaLoreAdamW`'s moments and projections.

    Args:
        shapes: of the trained parameters.
        rank: of the projections; matrices no larger on their smaller side keep whole moments.

    Example:
        >>> projected([(2048, 2048)], rank=128)
        0.75
    """
    held = count = 0
    for shape in shapes:
        n = math.prod(shape)
        small = len(shape) == 2 and min(shape) > rank
        held += 4 * rank * (2 * max(shape) + min(shape)) if small else 8 * n
        count += n
    return held / max(1, count)


def moments_of(optim: str, itemsize: float) -> float:
    """Bytes a parameter of the moments of transformers' own optimizers (``--optim``), like the parameter if unknown.

    Args:
        optim: transformers' name.
        itemsize: of the parameter's dtype.

    Example:
        >>> moments_of("adamw_torch_fused", 2.0), moments_of("lion_32bit", 4.0), moments_of("adamw_torch_4bit", 4.0)
        (4.0, 4.0, 1.0625)
    """
    if optim in ("sgd", "adafactor"):  # no momentum by default; rows and columns
        return 0.0
    both = next((MOMENTS[kind] for kind in ("8bit", "4bit") if kind in optim), 2 * itemsize)
    return both / 2 if "lion" in optim else both


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that this rank holds, by part.

    Args:
        parameters: trained parameters on this rank.
        held: bytes by part, of `PARTS`; the model's and the gradients' are those of the trained parameters.
    """

    parameters: int
    held: Mapping[str, int]

    @property
    def per_parameter(self) -> dict[str, float]:
        """Bytes a trained parameter, by part."""
        return {part: size / max(1, self.parameters) for part, size in self.held.items()}

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {size:.3g}" for part, size in self.per_parameter.items() if size)
        total = sum(self.held.values())
        return f"bytes per trained parameter: {parts}; {total / 2**30:.2f} GiB for {self.parameters:,} on this rank"


def report(parameters: Iterable[Tensor], states: Iterable[Mapping[str, Any]], tau_bytes: int) -> MemoryReport:
    """Count what an optimizer and its parameters hold now.

    Args:
        parameters: the trained ones; their gradients count where they are there.
        states: the optimizer's state of each.
        tau_bytes: what the task vector holds.
    """
    held = dict.fromkeys(PARTS, 0)
    count = 0
    for p in parameters:
        mine = local(p.detach())
        count += mine.numel()
        held["model"] += mine.nbytes
        if p.grad is not None:
            held["gradients"] += local(p.grad).nbytes
    for state in states:
        for key, value in state.items():
            if isinstance(value, Tensor):
                held[_KINDS.get(key, "other")] += _stored(local(value))
    held["tau"] = tau_bytes
    return MemoryReport(count, held)


def _stored(value: Tensor) -> int:
    """Bytes in memory; low-bit tensors (torchao's moments) call themselves float32 and hold codes and scales."""
    if not hasattr(value, "__tensor_flatten__"):
        return value.nbytes
    names, _ = value.__tensor_flatten__()
    return sum(_stored(getattr(value, name)) for name in names)


def needed(parameters: float, per_parameter: Mapping[str, float], ranks: int = 1, frozen_bytes: float = 0.0) -> float:
    """GB (10⁹ bytes) that each of ``ranks`` holds, fully sharded, without activations.

    Args:
        parameters: how many are trained.
        per_parameter: from `planned`.
        ranks: among which everything is divided.
        frozen_bytes: of weights that are not trained: a reference model, the model under an adapter.
    """
    return (parameters * sum(per_parameter.values()) + frozen_bytes) / ranks / 1e9


def smallest_card(gigabytes: float) -> int | None:
    """The smallest card that holds so much in four fifths of its memory; None where none does.

    Example:
        >>> smallest_card(18.0), smallest_card(500.0)
        (24, None)
    """
    return next((card for card in CARDS if gigabytes <= _FREE * card), None)


def ranks_needed(gigabytes: float, card: int = 80) -> int:
    """How many cards of one size together hold so much in four fifths of their memory."""
    return max(1, math.ceil(gigabytes / (_FREE * card)))
