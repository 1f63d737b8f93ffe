"""torchao's low-bit AdamW as inner optimizer: the same steps, saved and resumed, and what its moments weigh."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from builders import gradients, pair, parameters, run
from torch import Tensor, nn

import paretune as pt

torchao = pytest.importorskip(
    "torchao.optim", reason="needs torchao: pip install 'paretune[lowbit]'", exc_type=ImportError
)
KINDS = {"AdamW8bit": 2.5, "AdamW4bit": 1.3, "AdamWFp8": 2.2}  # at most so many bytes a parameter, tables included
SHAPES = {"w": (128, 64), "v": (64, 64), "b": (64,)}  # small tensors keep whole moments


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step would be compiled for half a minute; uncompiled it is the same arithmetic."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def make(kind: str, named: Any) -> torch.optim.Optimizer:
    return getattr(torchao, kind)(named, lr=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_zero_density_one_is_the_inner_optimizer(kind: str) -> None:
    reference, _, vector = pair(0, SHAPES)
    ours, theirs, grads = parameters(reference), parameters(reference), gradients(4, SHAPES)
    run(pt.OnlineMerging(make(kind, list(ours.items())), vector, pt.Random(1.0), weight=0.0), ours, grads)
    run(make(kind, list(theirs.values())), theirs, grads)
    assert all(torch.equal(ours[k], theirs[k]) for k in SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_and_weighed(kind: str, dtype: torch.dtype) -> None:
    reference, _, vector = pair(0, SHAPES)
    grads = gradients(6, SHAPES)

    def build(values: dict[str, Tensor]) -> tuple[dict[str, nn.Parameter], pt.OnlineMerging]:
        params = parameters(values, dtype)
        return params, pt.OnlineMerging(make(kind, list(params.items())), vector, pt.Random(0.3), weight=0.1)

    params, optimizer = build(reference)
    run(optimizer, params, grads[:3])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, resumed = build({k: p.detach() for k, p in params.items()})
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, params, grads[3:])
    run(resumed, again, grads[3:])
    assert all(torch.equal(params[k], again[k]) for k in SHAPES)
    assert type(resumed.state[again["w"]]["exp_avg"]).__name__.startswith("OptimState")
    held = optimizer.memory_report().per_parameter["moments"]
    assert held < KINDS[kind]
