"""Consensus: how two sparsified vectors become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Consensus(Protocol):
    """What a consensus must offer: ``consensus(a, b, weight)``, element by element; weight belongs to b."""

    def __call__(self, a: Tensor, b: Tensor, weight: float) -> Tensor: ...


@dataclass(frozen=True)
class WeightedSum:
    """The weighted sum of two vectors.

        C(a, b) = (1−α)·a + α·b

    Called with a, b (tensors of one shape) and the merging weight α in [0, 1], which belongs to b.

    Reference: arXiv 2405.17931, Eq. 3.

    Example:
        >>> import torch, paretune as pt
        >>> pt.WeightedSum()(torch.tensor([4.0]), torch.tensor([8.0]), 0.25)
        tensor([5.])
    """

    def __call__(self, a: Tensor, b: Tensor, weight: float) -> Tensor:
        return (1 - weight) * a + weight * b


@dataclass(frozen=True)
class SignElection:
    """Where the signs of two vectors conflict, one of them gives way.

    ``weighted=True``: with a' = (1−α)a and b' = αb: a' + b' where the signs agree or one is zero; else the one that is
    larger in magnitude; 0 where they are equal and opposite. With α small, a decides nearly every conflict.

    ``weighted=False``: the elected sign is that of a + b (+ where the sum is 0), on the *unweighted* vectors; an entry
    of the other sign is dropped; (1−α)a + αb of what is left. With |b| ≫ |a|, b decides nearly every conflict.

    A zero entry has no sign and never conflicts.

    Args:
        weighted: which of the two.

    Reference: arXiv 2405.17931, Eq. 5-7 (weighted); its released code (not weighted). For equal magnitudes and
    opposite signs the released code and mergekit keep the positive one; the weighted form keeps neither.

    Example:
        >>> import torch, paretune as pt
        >>> a, b = torch.tensor([1.0, 1.0]), torch.tensor([2.0, -2.0])
        >>> pt.SignElection()(a, b, 0.25), pt.SignElection(weighted=False)(a, b, 0.25)
        (tensor([1.2500, 0.7500]), tensor([ 1.2500, -0.5000]))
    """

    weighted: bool = True

    def __call__(self, a: Tensor, b: Tensor, weight: float) -> Tensor:
        if self.weighted:
            a, b = (1 - weight) * a, weight * b
            conflict = a.sign() * b.sign() < 0
            larger = torch.where(a.abs() > b.abs(), a, torch.where(b.abs() > a.abs(), b, torch.zeros_like(b)))
            # a NaN has no sign: the sum propagates it
            return torch.where(conflict, larger, a + b)
        positive = a + b >= 0
        keep_a, keep_b = positive == (a >= 0), positive == (b >= 0)
        zero = torch.zeros_like(a)
        return (1 - weight) * torch.where(keep_a | (a == 0) | a.isnan(), a, zero) + weight * torch.where(
            keep_b | (b == 0) | b.isnan(), b, zero
        )
