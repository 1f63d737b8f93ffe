"""bf16 parameters with 16 more bits beside them behave as fp32 ones."""

from __future__ import annotations

import pytest
import torch
from builders import gradients, pair, parameters, run, tensors
from torch import Tensor

import paretune as pt

SHAPES = {"w": (64, 48), "b": (48,)}


def bf16_pair() -> tuple[dict[str, Tensor], pt.TaskVector]:
    """A reference that bf16 holds exactly, so that both runs start at one point."""
    reference = {k: v.bfloat16().float() for k, v in tensors(0, SHAPES, 0.5).items()}
    move = tensors(7, SHAPES, 0.02)
    return reference, pt.TaskVector.between(base={k: reference[k] - move[k] for k in move}, reference=reference)


def rounded(grads: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{k: g.bfloat16().float() for k, g in step.items()} for step in grads]


def master(optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor:
    """The fp32 number whose high half is the parameter and whose low half is the state."""
    high = p.detach().view(torch.int16).to(torch.int32) << 16
    low = optimizer.state[p]["master_low"].to(torch.int32).view(p.shape)
    return (high + low).view(torch.float32)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize(
    ("kind", "density", "weight"),
    [("OnDARE", 1.0, 1e-4), ("OnDARE", 0.3, 1e-4), ("OnDARE", 0.01, 1e-3), ("OnTIES", 0.2, 1e-4), ("OnTIES", 1.0, 0.0)],
)
def test_follows_fp32(kind: str, density: float, weight: float, every: int) -> None:
    reference, tau = bf16_pair()
    grads = rounded(gradients(100, SHAPES))
    options = {"lr": 2e-6, "density": density, "weight": weight, "every": every, "weight_decay": 0.01, "eps": 0.05}
    low, high = parameters(reference, torch.bfloat16), parameters(reference)
    split = getattr(pt, kind)(low.items(), tau, **options)
    run(split, low, grads)
    run(getattr(pt, kind)(high.items(), tau, **options), high, grads)
    for name in SHAPES:
        total = high[name].detach() - reference[name]
        error = (master(split, low[name]) - high[name].detach()).norm() / total.norm()
        assert error < (2e-3 if kind == "OnTIES" else 1e-4), f"{name}: {error:.2e} of the total movement"
        ulp = high[name].detach().abs() * 2**-8 + 1e-12
        assert ((low[name].detach().float() - master(split, low[name])).abs() <= ulp).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "density", "weight"), [("OnDARE", 1.0, 1e-4), ("OnDARE", 5e-4, 5e-7), ("OnTIES", 0.05, 5e-7)]
)
def test_follows_fp32_for_a_thousand_steps(kind: str, density: float, weight: float) -> None:
    reference, tau = bf16_pair()
    grads = rounded(gradients(1000, SHAPES))
    options = {"lr": 1e-6, "density": density, "weight": weight, "weight_decay": 0.01}
    low, high = parameters(reference, torch.bfloat16), parameters(reference)
    split = getattr(pt, kind)(low.items(), tau, **options)
    run(split, low, grads)
    run(getattr(pt, kind)(high.items(), tau, **options), high, grads)
    for name in SHAPES:
        total = high[name].detach() - reference[name]
        assert total.norm() > 0
        assert (master(split, low[name]) - high[name].detach()).norm() <= 1e-3 * total.norm()


def test_movements_below_half_an_ulp_add_up() -> None:
    """2000 updates of 1e-6 on parameters near 1 (half an ulp of bf16: 2e-3) arrive; alone none would."""
    reference = {"w": torch.ones(512)}
    params = parameters(reference, torch.bfloat16)
    optimizer = pt.OnDARE(params.items(), None, lr=1e-6, density=1.0, weight=0.0)
    run(optimizer, params, [{"w": torch.ones(512)}] * 2000)
    moved = master(optimizer, params["w"]) - 1
    assert torch.allclose(moved, torch.full((512,), -2e-3), rtol=2e-2)
    run(optimizer, params, [{"w": torch.ones(512)}] * 400)
    assert (params["w"] < 1).all(), "and in the end the parameter itself moves"


def test_tau_below_half_an_ulp_adds_up() -> None:
    reference, tau = {"w": torch.ones(256)}, None
    tau = pt.TaskVector.between(base={"w": torch.zeros(256)}, reference=reference)
    params = parameters(reference, torch.bfloat16)
    optimizer = pt.OnDARE(params.items(), tau, lr=0.0, density=1.0, weight=1e-6)
    run(optimizer, params, [{"w": torch.ones(256)}] * 500)
    assert torch.allclose(master(optimizer, params["w"]) - 1, torch.full((256,), 5e-4), rtol=0.1)


def test_the_parameter_is_the_rounded_master() -> None:
    reference, tau = bf16_pair()
    params = parameters(reference, torch.bfloat16)
    optimizer = pt.OnDARE(params.items(), tau, lr=1e-4, density=0.5, weight=0.01)
    run(optimizer, params, rounded(gradients(20, SHAPES)))
    for name in SHAPES:
        exact = master(optimizer, params[name])
        nearest = exact.bfloat16()
        tie = (exact.view(torch.int32) & 0xFFFF) == 0x8000
        assert torch.equal(params[name].detach()[~tie], nearest[~tie])


def test_starts_where_the_parameter_is() -> None:
    reference, tau = bf16_pair()
    params = parameters(reference, torch.bfloat16)
    optimizer = pt.OnDARE(params.items(), tau, lr=0.0, density=1.0, weight=0.0)
    run(optimizer, params, gradients(1, SHAPES))
    assert all(torch.equal(params[k].float(), reference[k]) for k in SHAPES)
    assert not optimizer.state[params["w"]]["master_low"].any()


def test_mixed_dtypes_in_one_optimizer() -> None:
    reference, _, tau = pair(0, SHAPES)
    start = {k: v.bfloat16().float() for k, v in reference.items()}
    params = {"w": parameters({"w": start["w"]}, torch.bfloat16)["w"], "b": parameters({"b": start["b"]})["b"]}
    optimizer = pt.OnDARE(params.items(), tau, lr=1e-3, density=0.5, weight=0.1)
    run(optimizer, params, gradients(3, SHAPES))
    assert "master_low" in optimizer.state[params["w"]]
    assert "master_low" not in optimizer.state[params["b"]]
    assert params["w"].dtype == torch.bfloat16
    assert params["b"].dtype == torch.float32


def test_non_finite_gradients_reach_the_parameter() -> None:
    reference, tau = bf16_pair()
    params = parameters(reference, torch.bfloat16)
    optimizer = pt.OnDARE(params.items(), tau, lr=1e-3, density=1.0, weight=0.1)
    grad = gradients(1, SHAPES)[0]
    grad["w"][0, 0] = float("nan")
    run(optimizer, params, [grad])
    bad = params["w"].isnan()
    assert bad[0, 0]
    assert bad.sum() == 1
