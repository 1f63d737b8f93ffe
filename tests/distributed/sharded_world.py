"""A model with everything that makes sharding awkward, and the optimizers that are run on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import paretune as pt

VOCABULARY = 301  # not divisible by 2 or 4


class Awkward(nn.Module):
    """A tied vocabulary, one-row and one-element parameters (empty shards), a frozen one, an expert-like 3-d one."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.embedding = nn.Embedding(VOCABULARY, 24)
        self.layers = nn.ModuleList([nn.Linear(24, 37), nn.Linear(37, 24, bias=False)])
        self.experts = nn.Parameter(torch.empty(3, 24, 5))
        self.gate = nn.Linear(5, 1)
        self.frozen = nn.Linear(24, 24)
        self.head = nn.Linear(24, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        self.to(dtype)
        for p in self.frozen.parameters():
            p.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.layers[1](torch.tanh(self.layers[0](x)))
        x = x + self.frozen(x) * self.gate(torch.einsum("bth,eho->bto", x, self.experts))
        return self.head(x)


def fully_sharded(dtype: torch.dtype = torch.float32, model: nn.Module | None = None) -> nn.Module:
    """The model under FSDP2, layer by layer."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = Awkward(dtype) if model is None else model
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def loss(model: nn.Module, step: int, ranks: int = 1, rank: int = 0) -> Tensor:
    """Mean over this rank's rows of one batch of eight."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (8, 6), generator=generator)
    target = torch.randint(0, VOCABULARY, (8, 6), generator=generator)
    mine = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    logits = model(tokens[mine]).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), target[mine].flatten())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    ranks: int = 1,
    rank: int = 0,
    accumulate: int = 1,
    clip: float | None = None,
) -> None:
    for step in steps:
        optimizer.zero_grad()
        for micro in range(accumulate):
            (loss(model, step * accumulate + micro, ranks, rank) / accumulate).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def move(value: Tensor, seed: int) -> Tensor:
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def task_vector(model: nn.Module | None = None) -> pt.TaskVector:
    whole = {name: p.detach().float() for name, p in (model or Awkward()).named_parameters()}
    base = {name: value - move(value, i) for i, (name, value) in enumerate(whole.items())}
    return pt.TaskVector.between(base=base, reference=whole)


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def online(kind: str, **options: Any) -> Callable[[Any, pt.TaskVector], torch.optim.Optimizer]:
    settings = {"lr": 1e-2, "eps": 0.05, "weight": 0.2, "weight_decay": 0.01, **options}
    return lambda params, tau: getattr(pt, kind)(params, tau, **settings)


def wrapped(inner: Callable[[Any], torch.optim.Optimizer], sparsify: Any, consensus: Any, every: int = 1) -> Any:
    return lambda params, tau: pt.OnlineMerging(inner(params), tau, sparsify, consensus, weight=0.2, every=every)


def _adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, eps=0.05, weight_decay=0.01)


OPTIMIZERS: dict[str, Callable[[Any, pt.TaskVector], torch.optim.Optimizer]] = {
    "dare dense": online("OnDARE", density=0.3),
    "dare sparse": online("OnDARE", density=0.04),
    "dare l1": online("OnDARE", density=0.3, rescale="l1"),
    "dare released": online("OnDARE", density=0.3, variant="released"),
    "dare released l1": online("OnDARE", density=0.3, variant="released", rescale="l1"),
    "dare step-k": online("OnDARE", density=0.04, every=3),
    "ties sparse": online("OnTIES", density=0.1),
    "ties dense": online("OnTIES", density=0.5),
    "ties whole": online("OnTIES", density=1.0),
    "ties l1": online("OnTIES", density=0.2, rescale="l1"),
    "ties expectation": online("OnTIES", density=0.2, rescale="expectation"),
    "ties released": online("OnTIES", density=0.2, variant="released"),
    "ties released l1": online("OnTIES", density=0.2, variant="released", rescale="l1"),
    "ties step-k": online("OnTIES", density=0.1, every=3),
    "around AdamW, random": wrapped(_adamw, pt.Random(0.04), pt.WeightedSum()),
    "around AdamW, magnitude": wrapped(_adamw, pt.Magnitude(0.1), pt.SignElection(), every=2),
    "around SGD": wrapped(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), pt.Magnitude(0.5), pt.SignElection()),
}
