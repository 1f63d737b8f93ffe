"""OnlineMerging around torch's own optimizers: update → sparsify → consensus → apply."""

from __future__ import annotations

import io

import oracles
import pytest
import torch
from builders import assert_close, gradients, pair, parameters, project_masks, run
from inner_optimizers import DECOUPLED, INNER, settings
from torch import Tensor, nn

import paretune as pt
from paretune.errors import ArgumentError, MismatchError, StateError

SHAPES = {"w": (12, 10), "v": (8, 8)}  # Muon takes matrices only
OPERATORS = {
    "dare": (pt.Random(0.3), pt.WeightedSum()),
    "dare rescaled": (pt.Random(0.3, rescale="l1"), pt.WeightedSum()),
    "ties": (pt.Magnitude(0.2), pt.SignElection(weighted=True)),
    "ties unweighted": (pt.Magnitude(0.2, rescale="l1"), pt.SignElection(weighted=False)),
}
WEIGHT = 0.1


def merged(which: str, delta: Tensor, tau: Tensor, name: str, step: int) -> Tensor:
    if which.startswith("dare"):
        masks, rescale = project_masks(SHAPES, 0.3), "l1" if which.endswith("rescaled") else None
        a = oracles.random(delta, masks(step, "update", name), 0.3, rescale)
        return oracles.weighted_sum(a, oracles.random(tau, masks(step, "tau", name), 0.3, rescale), WEIGHT)
    rescale = "l1" if which.endswith("unweighted") else None
    a, b = oracles.magnitude(delta, 0.2, rescale), oracles.magnitude(tau, 0.2, rescale)
    return (oracles.elect_unweighted if rescale else oracles.elect_weighted)(a, b, WEIGHT)


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("every", [1, 3])
def test_against_the_oracle(inner: str, which: str, every: int) -> None:
    """A twin of the inner optimizer is put at the policy each step; what it adds is δ."""
    reference, tau, vector = pair(0, SHAPES)
    params, twin = parameters(reference), parameters(reference)
    sparsify, consensus = OPERATORS[which]
    wrapped = pt.OnlineMerging(
        INNER[inner](list(params.items())), vector, sparsify, consensus, WEIGHT, every, **settings(inner)
    )
    shadow = INNER[inner](list(twin.values()))
    pending = {k: torch.zeros(s, dtype=torch.float64) for k, s in SHAPES.items()}
    for t, step in enumerate(gradients(6, SHAPES)):
        before = {k: p.detach().clone() for k, p in params.items()}
        for k, p in twin.items():
            p.data.copy_(before[k])
        run(wrapped, params, [step])
        run(shadow, twin, [step])
        for k in SHAPES:
            delta = (twin[k].detach() - before[k]).double()
            want = before[k].double()
            if (t + 1) % every:
                pending[k] += delta
                want = want + delta
            else:
                want = want - pending[k] + merged(which, pending[k] + delta, tau[k].double(), k, t)
                pending[k].zero_()
            assert_close(params[k], want, 2e-6, what=f"{k} at {t}")


@pytest.mark.parametrize("inner", DECOUPLED)
def test_decoupled_decay_is_applied_outside(inner: str) -> None:
    """A step shrinks every entry by 1 − ηλ, kept or not; λ in the groups is what the user set."""
    reference, _, vector = pair(0, SHAPES)
    grads, decay, results = gradients(3, SHAPES), 0.5, []
    for value in (decay, 0.0):
        params = parameters(reference)
        made = INNER[inner](list(params.items()), weight_decay=value)
        optimizer = pt.OnlineMerging(made, vector, *OPERATORS["ties"], weight=WEIGHT, **settings(inner))
        run(optimizer, params, grads[:1])
        results.append({k: p.detach().clone() for k, p in params.items()})
        run(optimizer, params, grads[1:])
        assert optimizer.param_groups[0]["weight_decay"] == value
    lr = optimizer.param_groups[0]["lr"]
    for k in SHAPES:
        want = results[1][k].double() - lr * decay * reference[k].double()
        assert_close(results[0][k], want, 3e-7, 1e-9, what=k)


def test_same_as_the_dedicated_optimizers() -> None:
    reference, _, vector = pair(0, SHAPES)
    for which, kind, density in (("dare", pt.OnDARE, 0.3), ("ties", pt.OnTIES, 0.2)):
        ours, wrapped, grads = parameters(reference), parameters(reference), gradients(5, SHAPES)
        inner = INNER["AdamW"](list(wrapped.items()), weight_decay=0.1)
        run(pt.OnlineMerging(inner, vector, *OPERATORS[which], weight=WEIGHT), wrapped, grads)
        options = {"lr": 1e-3, "eps": 0.05, "weight_decay": 0.1, "density": density, "weight": WEIGHT}
        run(kind(ours.items(), vector, **options), ours, grads)
        for k in SHAPES:
            assert_close(wrapped[k], ours[k].double(), 2e-6, what=f"{which} {k}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("inner", INNER)
def test_weight_zero_density_one_is_the_inner_optimizer(inner: str, dtype: torch.dtype) -> None:
    reference, _, vector = pair(0, SHAPES)
    grads = gradients(8, SHAPES)
    for every, sparsify, consensus in ((1, pt.Random(1.0), None), (3, pt.Magnitude(1.0), pt.SignElection())):
        ours, theirs = parameters(reference, dtype), parameters(reference, dtype)
        made = INNER[inner](list(ours.items()), weight_decay=0.1)
        run(pt.OnlineMerging(made, vector, sparsify, consensus, 0.0, every, **settings(inner)), ours, grads)
        run(INNER[inner](list(theirs.values()), weight_decay=0.1), theirs, grads)
        assert all(torch.equal(ours[k], theirs[k]) for k in SHAPES)


def test_an_unweighted_election_listens_to_tau_at_weight_zero() -> None:
    reference, tau, vector = pair(0, SHAPES)
    ours, theirs, grads = parameters(reference), parameters(reference), gradients(1, SHAPES)
    election = pt.SignElection(weighted=False)
    run(pt.OnlineMerging(INNER["SGD"](list(ours.items())), vector, pt.Magnitude(1.0), election, 0.0), ours, grads)
    run(INNER["SGD"](list(theirs.values())), theirs, grads)
    for k in SHAPES:
        delta = (theirs[k].detach() - reference[k]).double()
        want = reference[k].double() + oracles.elect_unweighted(delta, tau[k].double(), 0.0)
        assert_close(ours[k], want, 2e-7, what=k)
        assert not torch.equal(ours[k], theirs[k])


def test_groups_and_state_are_the_inner_optimizers() -> None:
    reference, _, vector = pair(0, SHAPES)
    params = parameters(reference)
    inner = INNER["AdamW"](list(params.items()))
    wrapped = pt.OnlineMerging(inner, vector, *OPERATORS["dare"], weight=WEIGHT)
    assert wrapped.param_groups is inner.param_groups
    assert wrapped.state is inner.state
    schedule = torch.optim.lr_scheduler.LambdaLR(wrapped, lambda t: 0.1**t)
    run(wrapped, params, gradients(1, SHAPES))
    schedule.step()
    assert inner.param_groups[0]["lr"] == pytest.approx(1e-4)
    assert isinstance(wrapped, torch.optim.Optimizer)
    wrapped.zero_grad()
    assert all(p.grad is None for p in params.values())


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inner", INNER)
def test_resume(inner: str, every: int, dtype: torch.dtype) -> None:
    reference, _, vector = pair(0, SHAPES)
    grads = gradients(8, SHAPES)

    def make(values: dict[str, Tensor]) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        params = parameters(values, dtype)
        made = INNER[inner](list(params.items()), weight_decay=0.1)
        return params, pt.OnlineMerging(made, vector, *OPERATORS["dare"], WEIGHT, every, **settings(inner))

    params, optimizer = make(reference)
    run(optimizer, params, grads[:4])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, resumed = make({k: p.detach() for k, p in params.items()})
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, params, grads[4:])
    run(resumed, again, grads[4:])
    assert all(torch.equal(params[k], again[k]) for k in SHAPES)
    made = INNER[inner](list(parameters(reference, dtype).items()))
    other = pt.OnlineMerging(made, pair(5, SHAPES)[2], *OPERATORS["dare"], weight=WEIGHT, **settings(inner))
    with pytest.raises(StateError):
        other.load_state_dict(optimizer.state_dict())


def test_state_initialising_step() -> None:
    reference, _, vector = pair(0, SHAPES)
    params, twin = parameters(reference), parameters(reference)
    optimizer, other = (
        pt.OnlineMerging(INNER["AdamW"](list(p.items())), vector, *OPERATORS["dare"], weight=WEIGHT)
        for p in (params, twin)
    )
    run(optimizer, params, [{k: torch.zeros(s) for k, s in SHAPES.items()}], [0.0])
    assert all(torch.equal(params[k], reference[k]) for k in SHAPES)
    assert optimizer.param_groups[0]["merge_calls"] == 0
    run(optimizer, params, gradients(3, SHAPES), [1e-3] * 3)
    run(other, twin, gradients(3, SHAPES), [1e-3] * 3)
    for k in SHAPES:  # the masks are the same ones; AdamW's own count of the empty step is its affair
        assert torch.equal(params[k] != reference[k], twin[k] != reference[k])


@pytest.mark.parametrize("inner", INNER)
def test_grad_scaler_skips_the_whole_step(inner: str) -> None:
    reference, _, vector = pair(0, SHAPES)
    params = parameters(reference)
    made = INNER[inner](list(params.items()))
    optimizer = pt.OnlineMerging(made, vector, *OPERATORS["dare"], weight=WEIGHT, **settings(inner))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(sum(p.sum() for p in params.values())).backward()
    params["w"].grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(params[k], reference[k]) for k in SHAPES)
    assert optimizer.param_groups[0]["merge_calls"] == 0
    optimizer.zero_grad()
    scaler.scale(sum(p.sum() for p in params.values())).backward()
    scaler.step(optimizer)
    assert all(not torch.equal(params[k], reference[k]) for k in SHAPES)


def test_fused_inner_under_a_scaler() -> None:
    """A fused inner optimizer unscales its own gradients: found_inf and grad_scale must reach it."""
    reference, _, vector = pair(0, SHAPES)
    results = []
    for scale in (1.0, 2.0**12):
        params = parameters(reference)
        inner = torch.optim.AdamW(list(params.items()), lr=1e-3, eps=0.05, fused=True, weight_decay=0.0)
        optimizer = pt.OnlineMerging(inner, vector, *OPERATORS["dare"], weight=WEIGHT)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(sum((p * p).sum() for p in params.values())).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(params)
    for k in SHAPES:
        assert_close(results[0][k], results[1][k].double(), 1e-6)


def test_refusals() -> None:
    reference, _, vector = pair(0, SHAPES)
    params = parameters(reference)
    with pytest.raises(ArgumentError, match="LBFGS"):
        pt.OnlineMerging(torch.optim.LBFGS(list(params.items())), vector, weight=WEIGHT)
    with pytest.raises(ArgumentError, match=r"SparseAdam.*AdamW"):
        pt.OnlineMerging(torch.optim.SparseAdam(list(params.items())), vector, weight=WEIGHT)
    for option in ("capturable", "differentiable"):
        graphed = torch.optim.AdamW(list(params.items()), **{option: True})
        with pytest.raises(ArgumentError, match=f"AdamW.{option}=True"):
            pt.OnlineMerging(graphed, vector, weight=WEIGHT)
    with pytest.raises(ArgumentError, match=r"decoupled.*Lion"):
        pt.OnlineMerging(INNER["Lion"](list(params.items()), weight_decay=0.1), vector, weight=WEIGHT)
    with pytest.raises(ArgumentError, match=r"torch\.optim"):
        pt.OnlineMerging(object(), vector, weight=WEIGHT)
    with pytest.raises(ArgumentError, match="named"):
        pt.OnlineMerging(torch.optim.SGD(list(params.values()), lr=0.1), vector, weight=WEIGHT)
    for argument, value in (("weight", 1.5), ("weight", -1.0), ("every", 0)):
        options = {"weight": WEIGHT, argument: value}
        with pytest.raises(ArgumentError, match=argument):
            pt.OnlineMerging(INNER["SGD"](list(params.items())), vector, *OPERATORS["dare"], **options)
    with pytest.raises(MismatchError):
        pt.OnlineMerging(INNER["SGD"]([("unknown", params["w"])]), vector, *OPERATORS["dare"], weight=WEIGHT)
    with pytest.raises(ArgumentError):
        pt.OnlineMerging(pt.OnDARE(params.items(), vector), vector, *OPERATORS["dare"], weight=WEIGHT)


def test_closure() -> None:
    reference, _, vector = pair(0, SHAPES)
    params = parameters(reference)
    optimizer = pt.OnlineMerging(INNER["SGD"](list(params.items())), vector, *OPERATORS["dare"], weight=WEIGHT)
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = sum((p * p).sum() for p in params.values())
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert len(calls) == 1
    assert float(first.detach()) > 0
