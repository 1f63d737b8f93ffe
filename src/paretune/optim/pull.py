"""Pull: the share of the task vector that a whole run adds, and the statement of it that every optimizer makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..operators import Magnitude, Random, Sparsify
from .parts import Part, local, part_of, sums
from .tau import Tau, make_ready, shares

_SAMPLE = 1024  # elements per tensor that the rounding estimate looks at


def tau_share(sparsify: Sparsify, tau: Tau, parts: Mapping[str, Part]) -> float:
    """s: the expected share ‖F(τ)‖₁/‖τ‖₁ that one unsparsified merge of weight 1 would add.

    p for Random without rescale; 1 with ``"l1"`` or ``"expectation"`` (Random); for Magnitude without rescale the
    share of ‖τ‖₁ that its k largest entries hold, computed exactly (together with the other ranks where sharded).

    Reference: ALGORITHMS, section 2 (pull); not in the paper.
    """
    if sparsify.density == 1 or sparsify.rescale == "l1":
        return 1.0
    if isinstance(sparsify, Random):
        return 1.0 if sparsify.rescale == "expectation" else sparsify.density
    if not isinstance(sparsify, Magnitude) or tau.vector is None:
        return sparsify.density
    make_ready(tau, parts, sparsify.density)
    kept, total = sums(list(parts.values()), shares(tau, parts, sparsify.density)).sum(0).tolist()
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


def share_lost(parameters: Mapping[str, Tensor], tau: Tau, size: float) -> float:
    """The share of entries with τ ≠ 0 whose addition θ + size·τ rounds back to θ, estimated at 1,024 places a tensor.

    Args:
        parameters: by plain name. Those without values yet (on the meta device) are left out.
        tau: the task vector.
        size: weight times rescale: the factor of τ in one addition.
    """
    if size == 0 or tau.vector is None:
        return 0.0
    parts = [part_of(name, p) for name, p in parameters.items()]
    rows = torch.zeros(len(parts), 2, dtype=torch.float64)
    for row, (part, (name, p)) in enumerate(zip(parts, parameters.items(), strict=True)):
        if part.n == 0 or p.is_meta:
            continue
        places = (torch.arange(min(part.n, _SAMPLE), dtype=torch.float64) * (part.n / min(part.n, _SAMPLE))).long()
        flat = local(p.detach()).reshape(-1)
        values = flat[places.to(flat.device)].cpu()
        if p.dtype == torch.bfloat16:  # its master is float32, whether it exists already or not
            values = values.float()
        added = tau.gather_all([name], [part.whole_positions(places)])
        still = values + (size * added).to(values.dtype) == values
        nonzero = added != 0
        rows[row, 0] = float((still & nonzero).sum()) * part.n / places.numel()
        rows[row, 1] = float(nonzero.sum()) * part.n / places.numel()
    lost, moved = sums(parts, rows).sum(0).tolist()
    return lost / moved if moved else 0.0
