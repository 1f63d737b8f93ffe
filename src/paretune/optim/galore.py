"""AdamW whose moments of a matrix live in a small subspace of its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ArgumentError
from .arguments import in_range, number, whole
from .tau_adapter import factors


class GaLoreAdamW(Optimizer):
    """AdamW with projected moments: few bytes a parameter, updates of full size but low rank.

        R = P·G,   δ = −η·scale · Pᵀ·AdamW(R)        P: the ``rank`` leading singular vectors of G on its smaller side

    P is taken anew from the gradient every ``refresh`` steps; the first moment is turned into the new subspace, the
    second is carried over. Parameters that are no matrices, and matrices whose smaller side is at most ``rank``, have
    whole moments and make exactly the steps of ``torch.optim.AdamW(foreach=False)``. A matrix of m × n, m ≤ n, holds
    2·rank·n + rank·m numbers instead of 2·m·n. Moments are float32 also for bfloat16 parameters. Sharded parameters
    are refused: P needs whole gradients.

    Args:
        params: as any torch optimizer takes them; named ones for `OnlineMerging`.
        lr: η ≥ 0.
        betas: β₁, β₂ in [0, 1).
        eps: ≥ 0.
        weight_decay: λ ≥ 0, decoupled.
        rank: rows of P, ≥ 1.
        refresh: steps between two P, ≥ 1.
        scale: > 0, of projected updates.

    Raises:
        ArgumentError: a value out of range, a sharded parameter.

    Reference: arXiv 2403.03507, algorithm 2 (there both moments are carried over as they are, so that the result
        depends on the signs of singular vectors; those of large matrices come from a randomised decomposition here).

    Example:
        >>> import torch, paretune as pt
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = pt.GaLoreAdamW(model.named_parameters(), lr=1e-3, rank=4)
        >>> model(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg"].shape
        torch.Size([4, 64])
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 128,
        refresh: int = 200,
        scale: float = 0.25,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            in_range(name, value, 0, float("inf"))
        for beta in betas:
            if not 0 <= number(beta, "betas") < 1:
                raise ArgumentError("betas", betas, "must be in [0, 1)")
        whole("rank", rank, 1)
        whole("refresh", refresh, 1)
        if not 0 < number(scale, "scale") < math.inf:
            raise ArgumentError("scale", scale, "must be above 0")
        group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**group, "rank": rank, "refresh": refresh, "scale": scale})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: evaluated first, with gradients enabled.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        if hasattr(p, "device_mesh"):
            raise ArgumentError("params", "a sharded parameter", "projected moments need whole gradients: take AdamW")
        (one, two), lr, state = group["betas"], float(group["lr"]), self.state[p]
        assert p.grad is not None  # the caller's condition
        gradient = p.grad if p.dtype == torch.float64 else p.grad.float()
        taken = state.get("step", 0)
        projected = p.dim() == 2 and min(p.shape) > group["rank"]
        if projected:
            if taken % group["refresh"] == 0:
                old, state["basis"] = state.get("basis"), _basis(gradient, group["rank"])
                if old is not None:  # the signs of singular vectors are arbitrary: a mean in the old ones means nothing
                    state["exp_avg"] = _project(_project_back(state["exp_avg"], old, p.shape), state["basis"])
            gradient = _project(gradient, state["basis"])
        if not taken:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] = taken = taken + 1
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - one)
        square.mul_(two).addcmul_(gradient, gradient, value=1 - two)
        spread = (square.sqrt() / (1 - two**taken) ** 0.5).add_(group["eps"])
        size = -lr / (1 - one**taken)
        p.mul_(1 - lr * group["weight_decay"])
        if not projected:
            p.addcdiv_(mean, spread, value=size)
        else:
            p.add_(_project_back(mean / spread, state["basis"], p.shape), alpha=size * group["scale"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; torch would cast float32 moments to bfloat16 parameters' dtype."""
        super().load_state_dict(state_dict)
        for group, packed in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, index in zip(group["params"], packed["params"], strict=True):
                for key, value in state_dict["state"].get(index, {}).items():
                    self.state[p][key] = value.to(p.device, copy=True) if isinstance(value, Tensor) else value


def _basis(gradient: Tensor, rank: int) -> Tensor:
    """P: rank × smaller side, with orthonormal rows."""
    tall = gradient.shape[0] > gradient.shape[1]
    return factors(gradient if tall else gradient.T, rank, f"{tuple(gradient.shape)}")[1]


def _project(gradient: Tensor, basis: Tensor) -> Tensor:
    return gradient @ basis.T if gradient.shape[0] > gradient.shape[1] else basis @ gradient


def _project_back(update: Tensor, basis: Tensor, shape: torch.Size) -> Tensor:
    return update @ basis if shape[0] > shape[1] else basis.T @ update
