"""Step-K between its two ends: every step, and once at the end of the run."""

from __future__ import annotations

import logging
import warnings

import oracles
import pytest
import torch
from builders import SHAPES, assert_close, gradients, pair, parameters, project_masks, run

import paretune as pt

T = 12
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 0.05}


@pytest.mark.parametrize("density", [1.0, 0.3, 0.02])
@pytest.mark.parametrize("kind", ["OnDARE", "OnTIES"])
def test_once_at_the_end_is_the_offline_merge(kind: str, density: float) -> None:
    """K = T equals θ_r + consensus(F(θ_T − θ_r), F(τ)) of torch's plain AdamW run."""
    reference, tau, vector = pair()
    grads, weight = gradients(T), 0.2
    plain = parameters(reference)
    run(torch.optim.AdamW(plain.values(), weight_decay=0.0, foreach=False, **OPTIONS), plain, grads)
    params = parameters(reference)
    run(getattr(pt, kind)(params.items(), vector, density=density, weight=weight, every=T, **OPTIONS), params, grads)
    masks = project_masks(SHAPES, density)
    for name in reference:
        moved = plain[name].detach().double() - reference[name].double()
        if kind == "OnDARE":
            a = oracles.random(moved, masks(T - 1, "update", name), density)
            b = oracles.random(tau[name].double(), masks(T - 1, "tau", name), density)
            merged = oracles.weighted_sum(a, b, weight)
        else:
            a, b = oracles.magnitude(moved, density), oracles.magnitude(tau[name].double(), density)
            merged = oracles.elect_weighted(a, b, weight)
        want = reference[name].double() + merged
        assert_close(params[name], want, 2e-6, what=name)
        assert not torch.equal(params[name], plain[name]), "the merge shows"


@pytest.mark.parametrize("kind", ["OnDARE", "OnTIES"])
def test_every_one_is_the_default(kind: str) -> None:
    reference, _, vector = pair()
    one, other = parameters(reference), parameters(reference)
    run(getattr(pt, kind)(one.items(), vector, density=0.3, weight=0.1, **OPTIONS), one, gradients(5))
    run(getattr(pt, kind)(other.items(), vector, density=0.3, weight=0.1, every=1, **OPTIONS), other, gradients(5))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_between_merges_every_parameter_moves_plainly() -> None:
    """The released code returns from inside the loop: only its first parameter moves. Ours all do."""
    reference, _, vector = pair()
    plain, params, grads = parameters(reference), parameters(reference), gradients(7)
    optimizer = pt.OnDARE(params.items(), vector, density=0.3, weight=0.1, every=4, **OPTIONS)
    run(torch.optim.AdamW(plain.values(), weight_decay=0.0, foreach=False, **OPTIONS), plain, grads[:3])
    run(optimizer, params, grads[:3])
    for name in reference:
        assert_close(params[name], plain[name].double(), 2e-7, what=name)
        assert not torch.equal(params[name], reference[name])
        assert_close(optimizer.state[params[name]]["pending"], (plain[name] - reference[name]).double(), 1e-4)


def test_steps_after_the_last_multiple_stay_unmerged() -> None:
    reference, _, vector = pair()
    grads, params = gradients(7), parameters(reference)
    optimizer = pt.OnDARE(params.items(), vector, density=0.3, weight=0.9, every=3, **OPTIONS)
    run(optimizer, params, grads[:6])
    at_six = {k: v.detach().clone() for k, v in params.items()}
    assert not optimizer.state[params["layer.0.bias"]]["pending"].any(), "cleared by the merge"
    moments = {k: {m: s.clone() for m, s in optimizer.state[p].items()} for k, p in params.items()}
    run(optimizer, params, grads[6:])
    for name, before in at_six.items():
        m = 0.9 * moments[name]["exp_avg"] + 0.1 * grads[6][name]
        v = 0.98 * moments[name]["exp_avg_sq"] + 0.02 * grads[6][name] ** 2
        delta = -1e-3 / (1 - 0.9**7) * m / ((v / (1 - 0.98**7)).sqrt() + 0.05)
        assert_close(params[name] - before, delta, 1e-4, 1e-8, what=name)


@pytest.mark.parametrize(("every", "total", "warned"), [(3, 7, True), (3, 6, False), (1, 7, False)])
def test_an_unmerged_rest_is_announced(every: int, total: int, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    reference, _, vector = pair()
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING, logger="paretune"):
        warnings.simplefilter("always")
        pt.OnDARE(parameters(reference).items(), vector, pull=1e-3, total_steps=total, every=every)
    said = [str(w.message) for w in caught] + [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert any("unmerged" in line or "not merged" in line for line in said) == warned, said


def test_a_late_gradient_loses_nothing() -> None:
    """A parameter without a gradient at the merge keeps its cached movement for a later one."""
    shapes = {"a": (50,), "b": (50,)}
    reference, tau, vector = pair(0, shapes)
    grads: list = gradients(4, shapes)
    grads[1]["b"] = None
    params = parameters(reference)
    run(pt.OnDARE(params.items(), vector, density=1.0, weight=1.0, every=2, **OPTIONS), params, grads)
    merges = {"a": 2, "b": 1}
    for name, count in merges.items():  # with weight 1 and density 1 only τ is left after a merge
        want = reference[name].double() + tau[name].double() * count
        got = params[name].detach().double()
        unmerged_b = (got - reference[name].double()).abs().max() < 0.5 * tau[name].abs().max()
        assert not unmerged_b
        if name == "a":
            assert_close(got, want, 1e-6)


@pytest.mark.parametrize("kind", ["OnDARE", "OnTIES"])
def test_pull_counts_merges_only(kind: str) -> None:
    reference, _, vector = pair()
    options = {"pull": 0.01, "total_steps": 10, "density": 0.5}
    one = getattr(pt, kind)(parameters(reference).items(), vector, **options)
    three = getattr(pt, kind)(parameters(reference).items(), vector, every=3, **options)
    assert three.param_groups[0]["weight"] == pytest.approx(one.param_groups[0]["weight"] * 10 / 3)
