"""What is planned is what is held."""

from __future__ import annotations

import pytest
import torch
from builders import gradients, pair, parameters, run
from safetensors.torch import save_file

import paretune as pt
from paretune.errors import ArgumentError
from paretune.optim.memory import MOMENTS, needed, planned, projected, ranks_needed, smallest_card

SHAPES = {"w": (400, 300), "b": (300,)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kind", ["OnDARE", "OnTIES"])
@pytest.mark.parametrize("where", ["files", "memory", "bfloat16", "int8"])
def test_report_equals_the_plan(kind: str, every: int, dtype: torch.dtype, where: str, tmp_path) -> None:
    reference, dense, tau = pair(0, SHAPES)
    if where == "files":
        for side, values in (("reference", reference), ("base", {k: reference[k] - dense[k] for k in dense})):
            (tmp_path / side).mkdir()
            save_file({k: v.contiguous() for k, v in values.items()}, tmp_path / side / "model.safetensors")
        tau = pt.TaskVector.between(base=tmp_path / "base", reference=tmp_path / "reference")
    elif where != "memory":
        tau = tau.stored(getattr(torch, where))
    params = parameters(reference, dtype)
    optimizer = getattr(pt, kind)(params.items(), tau, density=0.1, weight=0.1, every=every)
    run(optimizer, params, gradients(every, SHAPES))
    plan = planned(kind.lower(), dtype, density=0.1, every=every, tau=where)
    got = optimizer.memory_report().per_parameter
    for part, size in plan.items():
        assert got.get(part, 0.0) == pytest.approx(size, rel=1e-2, abs=1e-3), part
    assert got["other"] < 0.001  # the step counters


def test_report_of_a_wrapper_counts_the_inner_state() -> None:
    reference, _, tau = pair(0, SHAPES)
    params = parameters(reference)
    optimizer = pt.OnlineMerging(torch.optim.AdamW(params.items()), tau, weight=0.1, every=2)
    run(optimizer, params, gradients(2, SHAPES))
    got = optimizer.memory_report().per_parameter
    assert got["moments"] == 8
    assert got["pending"] == 4
    assert got["tau"] == 4
    assert "moments 8" in str(optimizer.memory_report())


def test_cards() -> None:
    per = planned("ondare", torch.bfloat16)
    assert sum(per.values()) == 14
    assert needed(7e9, per) == pytest.approx(98)
    assert needed(7e9, per, ranks=4, frozen_bytes=14e9) == pytest.approx(28)
    assert smallest_card(98) == 141
    assert ranks_needed(98, card=80) == 2
    for wrong in ({"method": "lion"}, {"tau": "float16"}, {"moments": "2bit"}):
        with pytest.raises(ArgumentError, match="choose"):
            planned(**({"method": "ondare", "dtype": torch.float32} | wrong))


def test_bfloat16_second_moments_would_stand_still() -> None:
    """Why they are not offered: 1,000 steps after gradients fell to a quarter v is twice what it should be."""
    generator = torch.Generator().manual_seed(0)
    exact, rounded = torch.ones(1000), torch.ones(1000)
    for _ in range(1000):
        square = (torch.randn(1000, generator=generator) / 4) ** 2
        exact = 0.999 * exact + 0.001 * square
        rounded = (0.999 * rounded + 0.001 * square).bfloat16().float()
    assert exact.mean() == pytest.approx(0.0625 + 0.9375 * 0.999**1000, rel=0.02)
    assert rounded.mean() > 2 * exact.mean()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projected_moments_are_held_as_planned(dtype: torch.dtype, every: int) -> None:
    reference, _, tau = pair(0, SHAPES)
    params = parameters(reference, dtype)
    inner = pt.GaLoreAdamW(params.items(), rank=16)
    optimizer = pt.OnlineMerging(inner, tau, pt.Random(0.1), weight=0.1, every=every)
    run(optimizer, params, gradients(every, SHAPES))
    plan = planned("ondare", dtype, every=every, tau="memory", moments=projected(SHAPES.values(), 16))
    got = optimizer.memory_report().per_parameter
    for part, size in plan.items():
        if part != "copy":  # for the time of a step
            assert got.get(part, 0.0) == pytest.approx(size, rel=1e-2, abs=1e-3), part


@pytest.mark.parametrize("kind", ["8bit", "4bit", "fp8"])
def test_low_bit_moments_are_held_as_planned(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    low = pytest.importorskip(
        "torchao.optim", reason="needs torchao: pip install 'paretune[lowbit]'", exc_type=ImportError
    )
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    shapes = {"w": (1024, 512)}
    reference, _, tau = pair(0, shapes)
    params = parameters(reference)
    inner = getattr(low, {"8bit": "AdamW8bit", "4bit": "AdamW4bit", "fp8": "AdamWFp8"}[kind])(list(params.items()))
    optimizer = pt.OnlineMerging(inner, tau, pt.Random(0.1), weight=0.1)
    run(optimizer, params, gradients(1, shapes))
    assert optimizer.memory_report().per_parameter["moments"] == pytest.approx(MOMENTS[kind], rel=1e-2)
