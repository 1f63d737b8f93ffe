"""Pull: the share of the task vector that a whole run adds, and the statement of it that every optimizer makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..operators import Magnitude, Random, Sparsify
from .rule import Tau
from .weights import Weights

_SAMPLE = 1024  # elements per tensor that the rounding estimate looks at
_ROUGH = 1 << 16  # … and the estimate of ‖F(τ)‖₁/‖τ‖₁ of a sparsifier that is not ours


def tau_share(sparsify: Sparsify, tau: Tau, names: Iterable[str]) -> float:
    """s: the expected share ‖F(τ)‖₁/‖τ‖₁ that one unsparsified merge of weight 1 would add.

    p for Random without rescale; 1 with ``"l1"`` or ``"expectation"`` (Random); for Magnitude without rescale the
    share of ‖τ‖₁ that its k largest entries hold, computed exactly.

    Reference: ALGORITHMS, section 2 (pull); not in the paper.
    """
    if sparsify.density == 1 or sparsify.rescale == "l1":
        return 1.0
    if isinstance(sparsify, Random):
        return 1.0 if sparsify.rescale == "expectation" else sparsify.density
    if not isinstance(sparsify, Magnitude) or tau.vector is None:
        return sparsify.density
    total = kept = 0.0
    for name in names:
        kept += float(tau.largest(name, sparsify.density).values.abs().sum(dtype=torch.float64))
        n = tau.numel(name)
        for start in range(0, n, _ROUGH * 8):
            total += float(tau.vector.dense(name, start, min(n, start + _ROUGH * 8)).abs().sum(dtype=torch.float64))
    share = kept / total if total else 1.0
    return share / sparsify.density if sparsify.rescale == "expectation" else share


def weight_for_pull(pull: float, share: float, total_steps: int, every: int) -> float:
    """α = ρ / (⌊T/K⌋·s).

    Args:
        pull: ρ, the share of τ to add over the run; ≥ 0.
        share: s, from `tau_share`.
        total_steps: T, optimizer steps of the run.
        every: K, steps between merges.

    Raises:
        ArgumentError: α would exceed 1, or no step of the run merges.

    Example:
        >>> weight_for_pull(0.05, share=5e-4, total_steps=1000, every=1)
        0.1
    """
    merges = total_steps // every
    if merges == 0:
        raise ArgumentError("every", every, f"no step of {total_steps} would merge: must be at most total_steps")
    weight = pull / (merges * share)
    if weight > 1:
        raise ArgumentError(
            "pull", pull, f"would need a weight of {weight:.3g}; the largest possible pull here is {merges * share:.3g}"
        )
    return weight


@dataclass(frozen=True)
class Amount:
    """What τ will amount to. ``pull`` is over ``steps`` optimizer steps; ``lost`` is the share of τ's additions that
    rounding swallows; ``passed`` is the share of the update that its mask passes (None: not known in advance)."""

    method: str
    weight: float
    density: float
    every: int
    pull: float
    steps: int
    known_steps: bool
    upper_bound: bool
    lost: float
    passed: float | None
    lr: float
    inner: str = "AdamW"  # the optimizer whose learning rate is meant

    def __str__(self) -> str:
        of = f"{self.steps} steps" if self.known_steps else f"every {self.steps} steps"
        bound = "at most " if self.upper_bound else ""
        text = f"{self.method}: pull {bound}{self.pull:.3g} of τ over {of} (weight {self.weight:.3g}, density "
        text += f"{self.density:.3g}, every {self.every})"
        if self.weight == 0:
            text = f"{self.method}: weight 0, no τ is added (density {self.density:.3g}, every {self.every})"
        elif self.lost >= 5e-4:  # less would print as 0.0%
            text += f"; {self.lost:.1%} of these additions are lost to rounding"
        if self.passed is None:
            text += (
                f"; its update is at least that of {self.inner} at lr {(1 - self.weight) * self.density * self.lr:.3g}"
            )
        else:
            text += (
                f"; its update is on average that of {self.inner} at lr {(1 - self.weight) * self.passed * self.lr:.3g}"
            )
        return text + ": compare with that, and with weight 0"


def share_lost(weights: Mapping[str, Weights], tau: Tau, size: float) -> float:
    """The share of entries with τ ≠ 0 whose addition θ + size·τ rounds back to θ, estimated at 1,024 places a tensor.

    Args:
        weights: the parameters by plain name.
        tau: the task vector.
        size: weight times rescale: the factor of τ in one addition.
    """
    if size == 0 or tau.vector is None:
        return 0.0
    lost = moved = 0.0
    for name, weight in weights.items():
        n = weight.n
        if n == 0:
            continue
        places = (torch.arange(min(n, _SAMPLE), dtype=torch.float64) * (n / min(n, _SAMPLE))).long()
        values = _float32(weight, places).cpu()
        added = tau.gather(name, places)
        still = values + (size * added).to(values.dtype) == values
        nonzero = added != 0
        lost += float((still & nonzero).sum()) * n / places.numel()
        moved += float(nonzero.sum()) * n / places.numel()
    return lost / moved if moved else 0.0


def _float32(weight: Weights, places: Tensor) -> Tensor:
    if weight.parameter.dtype == torch.bfloat16:  # its master is float32, whether it exists already or not
        return weight.flat[places.to(weight.flat.device)].float()
    return weight.get(places.to(weight.flat.device))
