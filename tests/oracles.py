"""Naive, obviously correct versions of the online merging optimizers: dense, one tensor at a time, float64.

Written from the equations of arXiv 2405.17931 (and the arithmetic of its released code) alone; nothing here
comes from the package. Random masks are not drawn here: the oracle is told which entries are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
#: (step counted from 0, "update" or "tau", parameter name) -> boolean tensor of the kept entries.
Masks = Callable[[int, str, str], Tensor]


def keep_everything(step: int, stream: str, name: str) -> Tensor:
    return torch.tensor(True)


def rescaled(x: Tensor, kept: Tensor, rescale: str | None, density: float) -> Tensor:
    """F(x) with the lost mass given back: × 1/p, × ‖x‖₁/‖F(x)‖₁, or not at all."""
    if rescale in (None, "none"):
        return kept
    if rescale == "expectation":
        return kept / density
    if rescale == "l1":
        norm = kept.abs().sum()
        return kept * (x.abs().sum() / norm) if norm > 0 else kept
    raise ValueError(rescale)


def random(x: Tensor, mask: Tensor, density: float, rescale: str | None = "none") -> Tensor:
    """Random(p) with a given mask."""
    if density == 1:
        return x.clone()
    return rescaled(x, torch.where(mask, x, torch.zeros_like(x)), rescale, density)


def magnitude(x: Tensor, density: float, rescale: str | None = "none", released: bool = False) -> Tensor:
    """Magnitude(p): the int(p·n) largest; at least one (released: all of them if int(p·n) < 1).

    Of c entries tied at the k-th magnitude, r still wanted: those of rank floor(i·c/r) in index order.
    """
    n = x.numel()
    count = int(density * n)
    if n == 0 or density == 1 or (released and count < 1):
        return x.clone()
    count = max(1, count)
    flat = x.flatten()
    # NaN ranks above infinity, zero is never worth keeping.
    size = [float("inf") if v != v else abs(v) for v in flat.tolist()]
    above = [1 if v != v else 0 for v in flat.tolist()]
    order = sorted(range(n), key=lambda i: (-above[i], -size[i], i))
    threshold = (above[order[count - 1]], size[order[count - 1]])
    larger = [i for i in range(n) if (above[i], size[i]) > threshold]
    tied = [i for i in range(n) if (above[i], size[i]) == threshold and size[i] > 0]
    wanted = min(count - len(larger), len(tied))
    chosen = larger + [tied[i * len(tied) // wanted] for i in range(wanted)]
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.tensor(chosen, dtype=torch.int64)] = True
    return rescaled(x, torch.where(mask, flat, torch.zeros_like(flat)).view_as(x), rescale, density)


def weighted_sum(a: Tensor, b: Tensor, weight: float) -> Tensor:
    return (1 - weight) * a + weight * b


def elect_weighted(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Eq. 5–7: the weighted vectors are added where they agree, else the larger one stays alone."""
    u, v = (1 - weight) * a, weight * b
    conflict = torch.sign(u) * torch.sign(v) == -1
    larger = torch.where(u.abs() > v.abs(), u, torch.where(v.abs() > u.abs(), v, torch.zeros_like(u)))
    return torch.where(conflict, larger, u + v)


def elect_unweighted(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Released: sign(a + b) elects, +1 where it is zero; dissenters are dropped; then the weighted sum."""
    elected = torch.where(a + b >= 0, 1.0, -1.0).to(a.dtype)
    drop_a = (a != 0) & (torch.sign(a) != elected)
    drop_b = (b != 0) & (torch.sign(b) != elected)
    a = torch.where(drop_a & (a == a), torch.zeros_like(a), a)
    b = torch.where(drop_b & (b == b), torch.zeros_like(b), b)
    return (1 - weight) * a + weight * b


class AdamOracle:
    """AdamW, and the skeleton of the merging ones: update, sparsify, consensus, apply.

    Args:
        params: where the policy starts.
        tau: task vector per name.
        released: √v + ε before the bias correction, decay after the merge; else torch's AdamW order.
        dtype: float64 for the truth, float32 to compare roundings.
    """

    released = False

    def __init__(
        self,
        params: Tensors,
        tau: Tensors,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        density: float = 1.0,
        weight: float = 0.0,
        every: int = 1,
        rescale: str | None = None,
        clip: float = 1.0,
        masks: Masks = keep_everything,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.params = {k: v.detach().to(dtype).clone() for k, v in params.items()}
        self.tau = {k: tau[k].detach().to(dtype).view(v.shape).clone() for k, v in params.items() if k in tau}
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, weight_decay
        self.density, self.weight, self.every = density, weight, every
        self.rescale, self.clip, self.masks, self.dtype = rescale, clip, masks, dtype
        self.m = {k: torch.zeros_like(v) for k, v in self.params.items()}
        self.v = {k: torch.zeros_like(v) for k, v in self.params.items()}
        self.cached = {k: torch.zeros_like(v) for k, v in self.params.items()}
        self.t = dict.fromkeys(self.params, 0)
        self.calls = 0
        self.prepare()

    def prepare(self) -> None:
        """What happens once, at construction."""

    def merge(self, name: str, delta: Tensor) -> Tensor:
        """consensus(F(δ), F(τ))."""
        return delta

    def update(self, name: str, grad: Tensor) -> Tensor:
        """δ of Adam."""
        g = grad.to(self.dtype)
        b1, b2 = self.betas
        self.t[name] += 1
        self.m[name] = b1 * self.m[name] + (1 - b1) * g
        self.v[name] = b2 * self.v[name] + (1 - b2) * g * g
        c1, c2 = 1 - b1 ** self.t[name], 1 - b2 ** self.t[name]
        if self.released:
            return -self.lr * c2**0.5 / c1 * self.m[name] / (self.v[name].sqrt() + self.eps)
        return -self.lr / c1 * self.m[name] / ((self.v[name] / c2).sqrt() + self.eps)

    def step(self, grads: Mapping[str, Tensor | None]) -> None:
        merging = (self.calls + 1) % self.every == 0
        for name, grad in grads.items():
            if grad is None:
                continue
            delta = self.update(name, grad)
            theta, shrink = self.params[name], 1 - self.lr * self.decay
            if not self.released:
                theta = theta * shrink
            if merging:  # roll back what was moved, merge the whole of it (Algorithm 2)
                theta = theta - self.cached[name] + self.merge(name, self.cached[name] + delta)
                self.cached[name] = torch.zeros_like(delta)
            else:
                theta = theta + delta
                self.cached[name] = self.cached[name] + delta
            if self.released:
                theta = theta * shrink
            self.params[name] = theta
        self.calls += 1


class OnDAREOracle(AdamOracle):
    """Eq. 3: (1−α)F_R(δ) + αF_R(τ), fresh masks for both each step."""

    def merge(self, name: str, delta: Tensor) -> Tensor:
        a = random(delta, self.masks(self.calls, "update", name), self.density, self.rescale)
        if self.weight == 0:
            return a
        b = random(self.tau[name], self.masks(self.calls, "tau", name), self.density, self.rescale)
        return weighted_sum(a, b, self.weight)


class OnTIESOracle(AdamOracle):
    """Eq. 5: SignElection(weighted)(F(δ), F(τ)) with F = Magnitude(p)."""

    def merge(self, name: str, delta: Tensor) -> Tensor:
        a = magnitude(delta, self.density, self.rescale)
        if self.weight == 0:
            return a
        return elect_weighted(a, magnitude(self.tau[name], self.density, self.rescale), self.weight)


class OnDAREReleasedOracle(AdamOracle):
    """τ masked once, × 1/p, clamped; δ masked each step, × 1/p, with "l1" brought back to ‖δ‖₁ and clamped."""

    released = True

    def prepare(self) -> None:
        self.sparse_tau = {}
        for name, tau in self.tau.items():
            kept = random(tau, self.masks(0, "tau", name), self.density) / self.density
            self.sparse_tau[name] = kept.clamp(-self.clip, self.clip)

    def merge(self, name: str, delta: Tensor) -> Tensor:
        a = random(delta, self.masks(self.calls, "update", name), self.density) / self.density
        norm = delta.abs().sum()
        if self.rescale == "l1" and norm >= 1e-8:
            a = (a * (norm / (a.abs().sum() + self.eps))).clamp(-self.clip, self.clip)
        return a if self.weight == 0 else weighted_sum(a, self.sparse_tau[name], self.weight)


class OnTIESReleasedOracle(AdamOracle):
    """Magnitude of both, τ once; the sign is elected on the unweighted vectors."""

    released = True

    def prepare(self) -> None:
        self.sparse_tau = {k: magnitude(v, self.density, self.rescale, True) for k, v in self.tau.items()}

    def merge(self, name: str, delta: Tensor) -> Tensor:
        a = magnitude(delta, self.density, self.rescale, True)
        return elect_unweighted(a, self.sparse_tau[name], self.weight)
