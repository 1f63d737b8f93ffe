"""How ratios are kept at their mean while they are learned, and what keeps them near it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ArgumentError
from .blocks import Layout

PARAMETRIZATIONS = ("sigmoid", "projection")
PENALTIES = ("l1", "depth", "released", "none")
DEFAULT_LR = {"sigmoid": 0.1, "projection": 0.02}


def normalized(logits: Tensor, mean: float, epsilon: float = 0.2) -> Tensor:
    """Ratios from logits: their mean stays, a single ratio may exceed 1.

        α_k = α₀ · K · (σ(a_k) + ε) / Σ_j (σ(a_j) + ε)

    Args:
        logits: [K].
        mean: α₀.
        epsilon: ε ≥ 0; bounds how far apart two ratios can be: by the factor (1 + ε)/ε.

    Reference: arXiv 2309.06256, section 5 (adaptive model averaging).

    Example:
        >>> normalized(torch.tensor([0.0, 0.0]), 0.25)
        tensor([0.2500, 0.2500])
    """
    raised = torch.sigmoid(logits) + epsilon
    return mean * len(logits) * raised / raised.sum()


def project(values: Tensor, mean: float) -> Tensor:
    """The nearest ratios, in Euclidean distance, with this mean and all in [0, 1].

        α_k = min(1, max(0, v_k − ν)),  ν such that their mean is α₀

    The mean is a piecewise linear function of ν whose corners are the v_k and v_k − 1: ν is found exactly.

    Args:
        values: [K].
        mean: α₀ in [0, 1].

    Example:
        >>> project(torch.tensor([0.5, 2.0, -1.0]), 0.5).tolist()
        [0.5, 1.0, 0.0]
    """
    v = values.double()
    corners = torch.cat([v, v - 1]).sort().values
    sums = (v[None] - corners[:, None]).clamp(0, 1).sum(1)  # descends along the corners, from K to 0
    wanted = mean * len(v)
    after = int((sums > wanted).sum())  # the first corner at which the sum is no more than wanted
    if after == 0:
        shift = corners[0]
    else:
        low, high = corners[after - 1], corners[after]
        shift = low + (high - low) * (sums[after - 1] - wanted) / (sums[after - 1] - sums[after])
    return (v - shift).clamp(0, 1).to(values.dtype)


class Parametrization(Protocol):
    """Ratios that can be moved against a gradient."""

    @property
    def ratios(self) -> Tensor:
        """α of each block."""
        ...

    def step(self, gradient: Tensor, lr: float) -> None:
        """Move the ratios against ∂L/∂α."""
        ...


class Sigmoid:
    """The published one: Adam on the logits of `normalized`."""

    def __init__(self, count: int, mean: float, epsilon: float = 0.2) -> None:
        self.mean, self.epsilon = mean, epsilon
        self._logits = torch.zeros(count, dtype=torch.float64, requires_grad=True)
        self._adam = torch.optim.Adam([self._logits], betas=(0.9, 0.99))

    @property
    def ratios(self) -> Tensor:
        return normalized(self._logits.detach(), self.mean, self.epsilon)

    def step(self, gradient: Tensor, lr: float) -> None:
        self._adam.param_groups[0]["lr"] = lr
        (self._logits.grad,) = torch.autograd.grad(
            normalized(self._logits, self.mean, self.epsilon), self._logits, gradient
        )
        self._adam.step()


class Projection:
    """Projected gradient steps with momentum.

    The step is scaled by one second moment for all ratios: with one each, as in Adam, the constrained optimum, where
    the gradients are equal but not 0, would be no fixed point.
    """

    def __init__(self, count: int, mean: float) -> None:
        self.mean = mean
        self.ratios = torch.full((count,), mean, dtype=torch.float64)
        self._first = torch.zeros(count, dtype=torch.float64)
        self._second = 0.0
        self._steps = 0

    def step(self, gradient: Tensor, lr: float) -> None:
        centred = gradient - gradient.mean()  # what moves all ratios alike is undone by the projection
        self._steps += 1
        self._first = 0.9 * self._first + 0.1 * centred
        self._second = 0.99 * self._second + 0.01 * float(centred.square().mean())
        scale = (self._second / (1 - 0.99**self._steps)) ** 0.5
        if scale > 0:
            move = self._first / (1 - 0.9**self._steps) / scale
            self.ratios = project(self.ratios - lr * move, self.mean)


def make(kind: str, count: int, mean: float, epsilon: float) -> Parametrization:
    """``sigmoid`` or ``projection`` for so many ratios.

    Raises:
        ArgumentError: there is no such parametrisation, or a number is out of range.
    """
    if not 0 <= mean <= 1:
        raise ArgumentError("mean", mean, "must be in [0, 1]: the mean weight of pre")
    if kind == "projection":
        return Projection(count, mean)
    if kind != "sigmoid":
        raise ArgumentError("parametrization", kind, f"choose one of {', '.join(PARAMETRIZATIONS)}")
    if not 0 <= epsilon < float("inf"):
        raise ArgumentError("epsilon", epsilon, "must be 0 or a positive number")
    return Sigmoid(count, mean, epsilon)


def penalty_weights(kind: str, layout: Layout) -> Tensor:
    """w_k of the penalty λ·Σ_k w_k·|α_k − α₀|, one a block.

    ``l1``: 1. ``depth``: the mean over the block's layers of (L−1)/(|l − L/2| + 1), which lets middle layers move
    least. ``released``: 25/(|l − 13| + 1) summed over the linear modules of the block, the head counted as layer 26
    (of the block that it is in, see ``head="last"``); made for 26 layers. ``none``: 0.

    Reference: arXiv 2309.06256, section 5 and released code.
    """
    if kind == "none":
        return torch.zeros(len(layout.groups), dtype=torch.float64)
    if kind == "l1":
        return torch.ones(len(layout.groups), dtype=torch.float64)
    if kind == "depth":
        return torch.tensor([_depth(group.layers, layout.layers) for group in layout.groups], dtype=torch.float64)
    if kind != "released":
        raise ArgumentError("penalty", kind, f"choose one of {', '.join(PENALTIES)}")
    weights = torch.zeros(len(layout.groups), dtype=torch.float64)
    for module in layout.linear_modules():
        layer = 26 if module.layer is None else module.layer
        weights[module.block] += 25 / (abs(layer - 13) + 1)
    return weights


def _depth(layers: Sequence[int], count: int) -> float:
    return sum((count - 1) / (abs(layer - count / 2) + 1) for layer in layers) / len(layers)
