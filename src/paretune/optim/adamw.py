"""AdamW's arithmetic as pure functions, equal bit for bit to ``torch.optim.AdamW(foreach=False)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .weights import CHUNK


def update_moments(
    means: Sequence[Tensor], squares: Sequence[Tensor], gradients: Sequence[Tensor], betas: tuple[float, float]
) -> None:
    """m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g², in place.

    Args:
        means, squares: m and v, flat, float32 (float64 for float64 parameters).
        gradients: g, flat, of any floating dtype.
        betas: (β₁, β₂).
    """
    beta1, beta2 = betas
    same = [i for i, (m, g) in enumerate(zip(means, gradients, strict=True)) if m.dtype == g.dtype]
    if same:
        m, v, g = ([tensors[i] for i in same] for tensors in (means, squares, gradients))
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
    for i in set(range(len(means))).difference(same):
        for start in range(0, means[i].numel(), CHUNK):
            at = slice(start, start + CHUNK)
            g32 = gradients[i][at].to(means[i].dtype)
            means[i][at].lerp_(g32, 1 - beta1)
            squares[i][at].mul_(beta2).addcmul_(g32, g32, value=1 - beta2)


@dataclass
class AdamUpdate:
    """δ = −η/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε), at the elements where it is asked for.

    ``released`` puts ε elsewhere: δ = −η·√(1−β₂ᵗ)/(1−β₁ᵗ) · m / (√v + ε).

    Args:
        mean, square: m and v after this step's gradient, flat.
        step: t, from 1.
        pending: the sum of earlier updates that await their merge (Step-K); None for none.
    """

    mean: Tensor
    square: Tensor
    step: float
    lr: float
    betas: tuple[float, float]
    eps: float
    released: bool = False
    pending: Tensor | None = None

    @property
    def n(self) -> int:
        return self.mean.numel()

    def at(self, index: Tensor) -> Tensor:
        """δ (with what is pending) at flat positions."""
        delta = self._delta(self.mean[index], self.square[index])
        return delta if self.pending is None else delta.add_(self.pending[index])

    def slice(self, start: int, stop: int) -> Tensor:
        """δ (with what is pending) of a range."""
        delta = self._delta(self.mean[start:stop], self.square[start:stop])
        return delta if self.pending is None else delta.add_(self.pending[start:stop])

    def _delta(self, mean: Tensor, square: Tensor) -> Tensor:
        # the order of operations is torch's: addcdiv computes (value·m)/denominator
        size = self.lr / (1 - self.betas[0] ** self.step)
        root = (1 - self.betas[1] ** self.step) ** 0.5
        if self.released:
            return (mean * -(size * root)).div_(square.sqrt().add_(self.eps))
        return (mean * -size).div_(square.sqrt().div_(root).add_(self.eps))
