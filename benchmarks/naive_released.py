"""The arithmetic of the released code of arXiv 2405.17931, spelled out densely: the slow side of the benchmarks.

Every step draws a dense random mask per tensor (OnDARE) or sorts each tensor (OnTIES), takes two L1 norms whether a
rescale needs them or not, and keeps a dense task vector in memory: the passes over memory are those of the released
steps. Nothing here is meant to be used for training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional


class NaiveReleased(torch.optim.Optimizer):
    """Adam moments and the loop over parameters; subclasses say how an update is merged with τ.

    Args:
        named_params: (name, parameter) pairs.
        tau: the dense task vector of each name, as large as the model.
        density: kept fraction.
        weight: merging weight α.
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, nn.Parameter]],
        tau: Mapping[str, Tensor],
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        density: float = 5e-4,
        weight: float = 5e-7,
        clip: float = 1.0,
    ) -> None:
        self.density, self.weight, self.clip = density, weight, clip
        named = list(named_params)
        super().__init__([p for _, p in named], {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.tau = {p: self.sparse_tau(tau[name]) for name, p in named}

    def sparse_tau(self, tau: Tensor) -> Tensor:
        raise TypeError("use NaiveOnDARE or NaiveOnTIES")

    def merge(self, p: Tensor, delta: Tensor, tau: Tensor) -> None:
        raise TypeError("use NaiveOnDARE or NaiveOnTIES")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                denominator = state["exp_avg_sq"].sqrt().add_(group["eps"])
                correction = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                delta = (state["exp_avg"] / denominator) * (-group["lr"] * correction)
                self.merge(p, delta, self.tau[p])
                if group["weight_decay"]:
                    p.add_(p, alpha=-group["lr"] * group["weight_decay"])
        return loss


class NaiveOnDARE(NaiveReleased):
    """θ ← θ + (1−α)·dropout(δ) + α·clamp(dropout(τ))."""

    def sparse_tau(self, tau: Tensor) -> Tensor:
        return functional.dropout(tau, 1 - self.density, training=True).clamp_(-self.clip, self.clip)

    def merge(self, p: Tensor, delta: Tensor, tau: Tensor) -> None:
        delta.abs().sum()
        functional.dropout(delta, 1 - self.density, training=True, inplace=True)
        delta.abs().sum()
        p.add_(tau, alpha=self.weight).add_(delta, alpha=1 - self.weight)


class NaiveOnTIES(NaiveReleased):
    """Both trimmed to the int(p·n) largest by a full sort; the sign is elected on the unweighted vectors."""

    def sparse_tau(self, tau: Tensor) -> Tensor:
        return self.trim(tau.clone())

    def trim(self, x: Tensor) -> Tensor:
        kept = int(self.density * x.numel())
        if kept < 1:
            return x
        order = torch.argsort(x.view(-1).abs(), descending=True)
        mask = torch.zeros_like(x)
        mask.view(-1)[order[:kept]] = 1
        x.abs().sum()
        x.mul_(mask).abs().sum()
        return x

    def merge(self, p: Tensor, delta: Tensor, tau: Tensor) -> None:
        both = torch.stack([self.trim(delta), tau])
        elected = (both.sum(0) >= 0) * 2 - 1
        both.mul_(both.sign() == elected)
        weights = torch.tensor([1 - self.weight, self.weight]).view(-1, *[1] * delta.dim())
        p.add_((both * weights).sum(0))
