"""Every optimizer that online merging is tested around."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import paretune as pt

Make = Callable[..., torch.optim.Optimizer]


class Lion(torch.optim.Optimizer):
    """θ ← (1 − ηλ)θ − η·sign(β₁m + (1−β₁)g),  m ← β₂m + (1−β₂)g (arXiv 2302.06675, algorithm 2)."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-4, betas: Any = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (one, two), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is not None:
                    m: Tensor = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.mul_(1 - lr * group["weight_decay"])
                    p.sub_(torch.sign(m * one + p.grad * (1 - one)) * lr)
                    m.mul_(two).add_(p.grad * (1 - two))


def _of(kind: str, **fixed: Any) -> Make:
    return lambda p, **options: getattr(torch.optim, kind)(p, **{"lr": 1e-3, "weight_decay": 0.0, **fixed, **options})


# eps 0.05: with a small one the first Adam update is ±lr everywhere, and rounding would choose the largest entries.
INNER: dict[str, Make] = {
    "SGD": _of("SGD", lr=1e-2),
    "SGD momentum": _of("SGD", lr=1e-2, momentum=0.9),
    "SGD nesterov": _of("SGD", lr=1e-2, momentum=0.9, nesterov=True),
    "AdamW": _of("AdamW", eps=0.05, foreach=False),
    "AdamW foreach": _of("AdamW", eps=0.05, foreach=True),
    "AdamW fused": _of("AdamW", eps=0.05, fused=True),
    "AdamW amsgrad": _of("AdamW", eps=0.05, amsgrad=True, maximize=True),
    "Adam": _of("Adam", eps=0.05),
    "NAdam": _of("NAdam", eps=0.05, decoupled_weight_decay=True),
    "RAdam": _of("RAdam", eps=0.05),
    "Adamax": _of("Adamax", eps=0.05),
    "RMSprop": _of("RMSprop", eps=0.05),
    "RMSprop centered": _of("RMSprop", eps=0.05, centered=True, momentum=0.9),
    "Adagrad": _of("Adagrad", lr=1e-2, eps=0.05),
    "Adadelta": _of("Adadelta", lr=1.0),
    "Lion": Lion,
    "Adafactor": _of("Adafactor", foreach=False),
    "Muon": _of("Muon"),
}
INNER["GaLoreAdamW"] = lambda p, **options: pt.GaLoreAdamW(
    p, **{"lr": 1e-2, "eps": 0.05, "rank": 3, "refresh": 2, **options}
)
if not hasattr(torch.optim, "Muon"):  # came after the oldest torch that we claim
    del INNER["Muon"]
DECOUPLED = [name for name in INNER if name.startswith(("AdamW", "NAdam", "Lion", "Adafactor", "Muon", "GaLore"))]
WHOLE_ONLY = ("Adafactor", "Muon", "GaLoreAdamW")  # not on sharded parameters


def settings(name: str) -> dict[str, Any]:
    """What `OnlineMerging` cannot know about it."""
    return {"decoupled": True} if name == "Lion" else {}
