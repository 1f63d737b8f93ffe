"""Projected moments: against a float64 oracle, AdamW where nothing is projected, and what they weigh."""

from __future__ import annotations

import io

import pytest
import torch
from builders import assert_close, gradients, pair, parameters, run, tensors
from torch import Tensor

import paretune as pt
from paretune.errors import ArgumentError

SHAPES = {"wide": (12, 40), "tall": (40, 12), "bias": (12,)}


class Oracle:
    """Algorithm 2 of arXiv 2403.03507 with whole decompositions, and the mean turned into each new subspace."""

    def __init__(self, value: Tensor, lr: float, eps: float, decay: float, rank: int, refresh: int) -> None:
        self.value, self.t, self.m, self.v = value.double(), 0, 0.0, 0.0
        self.lr, self.eps, self.decay, self.rank, self.refresh = lr, eps, decay, rank, refresh

    def step(self, gradient: Tensor) -> None:
        g = gradient.double()
        left = g.shape[0] <= g.shape[1]
        if self.t % self.refresh == 0:
            u, _, v = torch.linalg.svd(g, full_matrices=False)
            p = u[:, : self.rank] if left else v[: self.rank].T
            if self.t:
                self.m = p.T @ (self.p @ self.m) if left else (self.m @ self.p.T) @ p
            self.p = p
        r = self.p.T @ g if left else g @ self.p
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * r
        self.v = 0.999 * self.v + 0.001 * r * r
        n = (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)).sqrt() + self.eps)
        whole = self.p @ n if left else n @ self.p.T
        self.value = self.value * (1 - self.lr * self.decay) - self.lr * 0.25 * whole


def test_against_the_oracle() -> None:
    start, grads = tensors(0, SHAPES), gradients(7, SHAPES)
    params = parameters(start)
    settings = {"lr": 1e-2, "eps": 0.05, "rank": 4, "refresh": 3}
    run(pt.GaLoreAdamW(params.items(), weight_decay=0.1, **settings), params, grads)
    for name in ("wide", "tall"):
        oracle = Oracle(start[name], decay=0.1, **settings)
        for step in grads:
            oracle.step(step[name])
        assert_close(params[name], oracle.value, 1e-5, what=name)


def test_whole_moments_are_adamw() -> None:
    start, grads = tensors(0, SHAPES), gradients(20, SHAPES)
    ours, theirs = parameters(start), parameters(start)
    run(pt.GaLoreAdamW(ours.values(), lr=1e-3, weight_decay=0.1, rank=12), ours, grads)
    run(torch.optim.AdamW(theirs.values(), lr=1e-3, weight_decay=0.1, foreach=False), theirs, grads)
    assert all(torch.equal(ours[k], theirs[k]) for k in SHAPES)


def test_it_learns_a_low_rank_task() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(64, 2, generator=generator) @ torch.randn(2, 48, generator=generator)
    p = torch.nn.Parameter(torch.zeros(64, 48))
    optimizer = pt.GaLoreAdamW([p], lr=0.5, rank=4, refresh=20)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (p - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.01 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_keeps_float32_moments_and_the_basis(dtype: torch.dtype) -> None:
    start, grads = tensors(0, SHAPES), gradients(7, SHAPES)
    params = parameters(start, dtype)
    optimizer = pt.GaLoreAdamW(params.values(), lr=1e-2, rank=4, refresh=3)
    run(optimizer, params, grads[:4])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = parameters({k: p.detach() for k, p in params.items()}, dtype)
    resumed = pt.GaLoreAdamW(again.values(), lr=1e-2, rank=4, refresh=3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert all(v.dtype == torch.float32 for s in resumed.state.values() for v in s.values() if isinstance(v, Tensor))
    run(optimizer, params, grads[4:])
    run(resumed, again, grads[4:])
    assert all(torch.equal(params[k], again[k]) for k in SHAPES)


def test_bytes_of_moments() -> None:
    shapes = {"w": (256, 512)}
    reference, _, vector = pair(0, shapes)
    params = parameters(reference)
    optimizer = pt.OnlineMerging(pt.GaLoreAdamW(params.items(), rank=8), vector, weight=1e-3)
    run(optimizer, params, gradients(1, shapes))
    want = 4 * (2 * 8 * 512 + 8 * 256) / (256 * 512)
    assert optimizer.memory_report().per_parameter["moments"] == pytest.approx(want)
    assert want < 0.04 * 8


def test_refused() -> None:
    p = [torch.nn.Parameter(torch.ones(2, 2))]
    wrong = {"lr": -1.0, "betas": (1.0, 0.9), "eps": -1.0, "weight_decay": -1.0, "rank": 0, "refresh": 0, "scale": 0.0}
    for argument, value in wrong.items():
        with pytest.raises(ArgumentError, match=argument):
            pt.GaLoreAdamW(p, **{argument: value})
