"""AdamW's arithmetic as pure functions, equal bit for bit to ``torch.optim.AdamW(foreach=False)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from ..operators import above
from .weights import CHUNK

_WHOLE = 16  # elements of the widest register


def update_moments(
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    gradients: Sequence[Tensor],
    betas: tuple[float, float],
    exact: bool = True,
) -> None:
    """m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g², in place.

    Args:
        means, squares: m and v, flat, float32 (float64 for float64 parameters).
        gradients: g, flat, of any floating dtype.
        betas: (β₁, β₂).
        exact: equal to ``foreach=False`` to the last bit. Where not needed, float32 goes through torch's fused
            kernel at learning rate 0, which is faster than three passes; the gradient takes the parameter's place
            there and is written back as it was (but ±inf, which becomes NaN). The elements after the last whole
            register, which the kernel rounds another way, take the three passes.
    """
    beta1, beta2 = betas
    if not exact and all(g.dtype == torch.float32 and g.device.type in ("cpu", "cuda") for g in gradients):
        for device in {g.device for g in gradients}:
            at = [i for i, g in enumerate(gradients) if g.device == device and g.numel() >= _WHOLE]
            m, v, g = ([_head(tensors[i]) for i in at] for tensors in (means, squares, gradients))
            steps = [torch.ones((), device=device)] * len(at)  # without effect at learning rate 0
            if at:
                torch._fused_adamw_(
                    g, g, m, v, [], steps,
                    lr=0.0, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=1.0, amsgrad=False, maximize=False,
                )  # fmt: skip
        odd = [i for i, g in enumerate(gradients) if g.numel() % _WHOLE]
        means, squares, gradients = ([_tail(tensors[i]) for i in odd] for tensors in (means, squares, gradients))
    same = [i for i, (m, g) in enumerate(zip(means, gradients, strict=True)) if m.dtype == g.dtype]
    if same:
        m, v, g = ([tensors[i] for i in same] for tensors in (means, squares, gradients))
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
    for i in set(range(len(means))).difference(same):
        for start in range(0, means[i].numel(), CHUNK):
            part = slice(start, start + CHUNK)
            g32 = gradients[i][part].to(means[i].dtype)
            means[i][part].lerp_(g32, 1 - beta1)
            squares[i][part].mul_(beta2).addcmul_(g32, g32, value=1 - beta2)


def _head(x: Tensor) -> Tensor:
    return x[: x.numel() // _WHOLE * _WHOLE] if x.numel() % _WHOLE else x


def _tail(x: Tensor) -> Tensor:
    return x[x.numel() // _WHOLE * _WHOLE :]


@dataclass
class AdamUpdate:
    """δ = −η/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε), at the elements where it is asked for.

    ``released`` puts ε elsewhere: δ = −η·√(1−β₂ᵗ)/(1−β₁ᵗ) · m / (√v + ε).

    Args:
        mean, square: m and v after this step's gradient, flat.
        step: t, from 1.
        pending: the sum of earlier updates that await their merge (Step-K); None for none.
        factor: f, flat, of m's dtype: δ ← f ⊙ δ, learning rates that differ from entry to entry; None for none.
        rounded: take √v correctly rounded, as the compiled kernels and other processors do. torch's own (MKL's on x86)
            is an ulp off in 0.5% of the elements, which ``AdamW(foreach=False)`` has as well.
    """

    mean: Tensor
    square: Tensor
    step: float
    lr: float
    betas: tuple[float, float]
    eps: float
    released: bool = False
    pending: Tensor | None = None
    factor: Tensor | None = None
    rounded: bool = False

    @property
    def n(self) -> int:
        return self.mean.numel()

    def at(self, index: Tensor) -> Tensor:
        """δ (with what is pending) at flat positions."""
        delta = self._delta(self.mean.take(index), self.square.take(index))
        if self.factor is not None:
            delta.mul_(self.factor[index])
        return delta if self.pending is None else delta.add_(self.pending[index])

    @staticmethod
    def at_all(updates: Sequence[AdamUpdate], indices: Sequence[Tensor]) -> Tensor:
        """``at`` of some updates, concatenated; computed at once where their settings are the same."""
        pairs = list(zip(updates, indices, strict=True))
        first = updates[0]
        if any(u.pending is not None or u.factor is not None or u.settings() != first.settings() for u in updates):
            return torch.cat([u.at(index) for u, index in pairs])
        mean = torch.cat([u.mean.take(index) for u, index in pairs])
        return first._delta(mean, torch.cat([u.square.take(index) for u, index in pairs]))

    def slice(self, start: int, stop: int, step: int = 1) -> Tensor:
        """δ (with what is pending) of a range."""
        delta = self._delta(self.mean[start:stop:step], self.square[start:stop:step])
        if self.factor is not None:
            delta.mul_(self.factor[start:stop:step])
        return delta if self.pending is None else delta.add_(self.pending[start:stop:step])

    def cut(self, start: int, stop: int) -> AdamUpdate:
        """δ of a range, sharing the memory of this one."""
        at = slice(start, stop)
        pending, factor = (None if x is None else x[at] for x in (self.pending, self.factor))
        return replace(self, mean=self.mean[at], square=self.square[at], pending=pending, factor=factor)

    def above(self, start: int, stop: int, bound: float) -> Tensor:
        """Ascending positions, from ``start``, of a superset of the elements with |δ| ≥ bound > 0; NaN counts.

        |δ| ≥ bound needs |m|·η' ≥ bound·√v', thus m² ≥ c·v: no root and no division. Only where ε is so small that
        such an m² could underflow is δ itself computed.
        """
        size, root = self.scales()
        needed = bound * self.eps / size if size else 0.0  # |m| is at least this
        plain = self.pending is None and self.factor is None
        if not plain or not needed >= 1e-17:  # not a number for ε = 0 and an infinite bound
            return above(self.slice(start, stop), bound)
        factor = (bound / size) ** 2 * (1.0 if self.released else 1 / root**2) * (1 - 1e-5)
        mean = self.mean[start:stop]
        # as a difference, so that ∞ against ∞ is NaN and counts
        if mean.device.type == "cpu":
            # numpy compares and collects three times faster than torch here
            m = mean.numpy()
            with numpy.errstate(all="ignore"):
                below = self.square[start:stop].numpy() * m.dtype.type(factor)
                below -= m * m
                found = below >= 0
            return torch.from_numpy(numpy.flatnonzero(numpy.logical_not(found, out=found)))
        below = (self.square[start:stop] * factor).addcmul_(mean, mean, value=-1)
        return (below >= 0).bitwise_not_().nonzero().view(-1)

    def settings(self) -> tuple[object, ...]:
        """What two updates must have in common to be computed together."""
        return self.step, self.lr, self.betas, self.eps, self.released, self.rounded, self.mean.dtype

    def scales(self) -> tuple[float, float]:
        """The factor of m, and √(1−β₂ᵗ)."""
        root = (1 - self.betas[1] ** self.step) ** 0.5
        size = self.lr / (1 - self.betas[0] ** self.step)
        return (size * root if self.released else size), root

    def _delta(self, mean: Tensor, square: Tensor) -> Tensor:
        # the order of operations is torch's: addcdiv computes (value·m)/denominator
        size, root = self.scales()
        if self.rounded and square.device.type == "cpu":
            with numpy.errstate(all="ignore"):
                denominator = torch.from_numpy(numpy.sqrt(square.numpy()))
        else:
            denominator = square.sqrt()
        if not self.released:
            denominator.div_(root)
        return (mean * -size).div_(denominator.add_(self.eps))
