"""In a training loop: closures, schedulers, scalers, clipping, odd parameters and odd gradients."""

from __future__ import annotations

import oracles
import pytest
import torch
from builders import assert_close, gradients, pair, parameters, project_masks, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import paretune as pt
from paretune.errors import PareTuneError

KINDS = ["OnDARE", "OnTIES"]
OPTIONS = {"lr": 1e-3, "density": 0.5, "weight": 0.1}


def test_closure() -> None:
    reference, _, tau = pair()
    params, other = parameters(reference), parameters(reference)
    optimizer = pt.OnDARE(params.items(), tau, **OPTIONS)
    seen = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p * g).sum() for p, g in zip(params.values(), gradients(1)[0].values(), strict=True))
        loss.backward()
        seen.append(torch.is_grad_enabled())
        return loss

    loss = optimizer.step(closure)
    assert seen == [True]
    assert loss.requires_grad or loss.numel() == 1
    run(pt.OnDARE(other.items(), tau, **OPTIONS), other, gradients(1))
    assert all(torch.equal(params[k], other[k]) for k in params)
    assert optimizer.step() is None


@pytest.mark.parametrize("scheduler", ["LambdaLR", "CosineAnnealingLR", "OneCycleLR", "ReduceLROnPlateau"])
def test_schedulers(scheduler: str) -> None:
    reference, tau, vector = pair()
    params, grads = parameters(reference), gradients(10)
    optimizer = pt.OnDARE(params.items(), vector, **OPTIONS)
    options: dict = {
        "LambdaLR": {"lr_lambda": lambda t: t / 4 if t < 4 else 1.0},
        "CosineAnnealingLR": {"T_max": 10},
        "OneCycleLR": {"max_lr": 2e-3, "total_steps": 11},
        "ReduceLROnPlateau": {"patience": 0, "factor": 0.5},
    }[scheduler]
    schedule = getattr(torch.optim.lr_scheduler, scheduler)(optimizer, **options)
    oracle = oracles.OnDAREOracle(
        reference, tau, masks=project_masks({k: v.shape for k, v in reference.items()}, 0.5), **OPTIONS
    )
    rates = []
    for step in grads:
        group = optimizer.param_groups[0]
        oracle.lr, oracle.betas = group["lr"], tuple(group["betas"])
        rates.append(group["lr"])
        run(optimizer, params, [step])
        oracle.step(step)
        schedule.step(1.0) if scheduler == "ReduceLROnPlateau" else schedule.step()
    assert len(set(rates)) > 2
    for name in reference:
        assert_close(params[name], oracle.params[name], 2e-6, what=name)


def quadratic(params: dict[str, nn.Parameter], target: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([((params[k] - target[k]) ** 2).sum() for k in params]).sum()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_grad_scaler(kind: str, unscale: bool) -> None:
    """A power of two in and out of the gradients leaves no trace; a step with infinities does not happen."""
    reference, _, tau = pair()
    target = {k: v + 1 for k, v in reference.items()}
    plain, scaled = parameters(reference), parameters(reference)
    one = getattr(pt, kind)(plain.items(), tau, **OPTIONS)
    other = getattr(pt, kind)(scaled.items(), tau, **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for t in range(6):
        other.zero_grad()
        scaler.scale(quadratic(scaled, target)).backward()
        if t == 2:
            scaled["layer.0.weight"].grad[3, 3] = float("inf")
        if unscale:
            scaler.unscale_(other)
        scaler.step(other)
        scaler.update()
        if t != 2:
            one.zero_grad()
            quadratic(plain, target).backward()
            one.step()
        assert all(torch.equal(plain[k], scaled[k]) for k in plain), f"step {t}"
    assert other.param_groups[0]["calls"] == 5


def test_gradient_clipping() -> None:
    reference, _, tau = pair()
    target = {k: v + 1 for k, v in reference.items()}
    params, other = parameters(reference), parameters(reference)
    optimizer = pt.OnDARE(params.items(), tau, **OPTIONS)
    quadratic(params, target).backward()
    norm = torch.nn.utils.clip_grad_norm_(params.values(), 0.1)
    assert norm > 0.1
    optimizer.step()
    run(pt.OnDARE(other.items(), tau, **OPTIONS), other, [{k: p.grad for k, p in params.items()}])
    assert all(torch.equal(params[k], other[k]) for k in params)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_and_unused_parameters_stay(kind: str, every: int) -> None:
    reference, _, tau = pair()
    params = parameters(reference)
    params["embed.weight"].requires_grad_(False)
    optimizer = getattr(pt, kind)(params.items(), tau, every=every, weight_decay=0.1, **OPTIONS)
    for step in gradients(4):
        step.pop("embed.weight")
        step.pop("norm.weight")
        run(optimizer, {k: p for k, p in params.items() if k != "embed.weight"}, [step])
    for still in ("embed.weight", "norm.weight"):
        assert torch.equal(params[still], reference[still])
        assert not optimizer.state.get(params[still])
    assert not torch.equal(params["scale"], reference["scale"])


def test_a_step_without_any_gradient_moves_nothing() -> None:
    reference, _, tau = pair()
    params = parameters(reference)
    optimizer = pt.OnDARE(params.items(), tau, **OPTIONS)
    optimizer.step()
    assert all(torch.equal(params[k], reference[k]) for k in params)


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_gradients_are_refused(kind: str) -> None:
    reference, _, tau = pair()
    params = parameters(reference)
    optimizer = getattr(pt, kind)(params.items(), tau, **OPTIONS)
    params["embed.weight"].grad = torch.eye(32, 16).to_sparse()
    with pytest.raises(PareTuneError, match=r"embed\.weight") as caught:
        optimizer.step()
    assert "sparse" in str(caught.value)
    assert torch.equal(params["embed.weight"], reference["embed.weight"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("kind", "density", "weight"),
    [("OnDARE", 1.0, 0.1), ("OnTIES", 1.0, 0.1), ("OnTIES", 0.2, 0.1), ("OnTIES", 0.2, 0.0)],
)
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_non_finite_gradients_propagate_as_in_torch(
    kind: str, density: float, weight: float, variant: str, bad: float
) -> None:
    """AdamW makes NaN of the entry (inf/inf) and of nothing else; so do we, and never silently zero it."""
    shapes = {"w": (50,)}
    reference, _, tau = pair(0, shapes)
    params, theirs = parameters(reference), parameters(reference)
    grad = gradients(1, shapes)
    grad[0]["w"][7] = bad
    run(getattr(pt, kind)(params.items(), tau, lr=1e-3, density=density, weight=weight, variant=variant), params, grad)
    run(torch.optim.AdamW(theirs.values(), lr=1e-3, foreach=False), theirs, grad)
    assert torch.equal(params["w"].isnan(), theirs["w"].isnan())
    assert params["w"].isnan().sum() == 1


def test_nan_reaches_every_sampled_entry() -> None:
    """Dropped entries may stay or become NaN at once: their moments are lost either way."""
    shapes = {"w": (400,)}
    reference, _, tau = pair(0, shapes)
    params = parameters(reference)
    optimizer = pt.OnDARE(params.items(), tau, lr=1e-3, density=0.25, weight=0.1)
    run(optimizer, params, [{"w": torch.full((400,), float("nan"))}])
    assert params["w"].isnan()[project_masks(shapes, 0.25)(0, "update", "w")].all()
    assert optimizer.state[params["w"]]["exp_avg"].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("rescale", [None, "l1"])
def test_all_zero_tensors_stay_finite(kind: str, variant: str, rescale: str | None) -> None:
    """τ = 0 and δ = 0: ‖x‖₁/‖F(x)‖₁ is 0/0, and nothing must come of it."""
    values = {"w": torch.zeros(30), "v": torch.ones(30)}
    tau = pt.TaskVector.between(base=values, reference={k: v.clone() for k, v in values.items()})
    params = parameters(values)
    optimizer = getattr(pt, kind)(params.items(), tau, rescale=rescale, variant=variant, **OPTIONS)
    run(optimizer, params, [{"w": torch.zeros(30), "v": torch.zeros(30)}] * 3)
    assert torch.equal(params["w"], values["w"])
    assert torch.equal(params["v"], values["v"])


def test_equal_magnitudes_keep_k_evenly_spread() -> None:
    """The first Adam update is ±lr everywhere: OnTIES keeps int(p·n) of them, spread, and always the same."""
    n, p = 1000, 0.1
    tau = pt.TaskVector.between(base={"w": torch.zeros(n)}, reference={"w": torch.zeros(n)})
    results = []
    for _ in range(2):
        params = parameters({"w": torch.zeros(n)})
        grad = torch.ones(n)
        grad[::2] = -1
        run(pt.OnTIES(params.items(), tau, lr=1.0, density=p, weight=0.0), params, [{"w": grad}])
        results.append(params["w"].detach())
    assert torch.equal(results[0], results[1])
    where = results[0].nonzero().flatten()
    assert torch.equal(where, torch.arange(100) * 10)


def strided(shape: tuple[int, ...], values: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return values.reshape(shape).t().contiguous().t()
    if layout == "channels_last":
        return values.reshape(shape).to(memory_format=torch.channels_last)
    return values.reshape(shape)


@pytest.mark.parametrize(("layout", "shape"), [("transposed", (12, 18)), ("channels_last", (2, 3, 4, 9))])
@pytest.mark.parametrize("grad_too", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind: str, layout: str, shape: tuple[int, ...], grad_too: bool) -> None:
    """Masks and τ follow the logical order of a tensor, as the checkpoint stores it."""
    reference, _, tau = pair(0, {"w": shape})
    plain = parameters(reference)
    odd = {"w": nn.Parameter(strided(shape, reference["w"], layout))}
    one, other = (getattr(pt, kind)(p.items(), tau, **OPTIONS) for p in (plain, odd))
    for step in gradients(3, {"w": shape}):
        plain["w"].grad = step["w"].clone()
        odd["w"].grad = strided(shape, step["w"].clone(), layout if grad_too else "plain")
        one.step()
        other.step()
    assert_close(odd["w"], plain["w"].double(), 1e-7)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    values=st.lists(
        st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, float("nan")]), st.floats(-2, 2, width=16)), max_size=40
    ),
    density=st.floats(1e-3, 1.0),
    weight=st.sampled_from([0.0, 0.3]),
    every=st.integers(1, 2),
)
def test_any_gradient(kind, dtype, values, density, weight, every) -> None:
    """No crash, and a parameter is NaN only where its gradient was; at density 1 exactly there."""
    n = len(values)
    shapes = {"w": (n,)}
    reference, _, tau = pair(0, shapes)
    params = parameters(reference, dtype)
    optimizer = getattr(pt, kind)(params.items(), tau, lr=1e-2, density=density, weight=weight, every=every)
    grad = {"w": torch.tensor(values, dtype=torch.float32)}
    run(optimizer, params, [grad] * 2)
    bad = params["w"].detach().isnan()
    assert not (bad & ~grad["w"].isnan()).any()
    if density == 1:
        assert torch.equal(bad, grad["w"].isnan())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("OnDARE", {"density": 0.5, "rescale": "expectation"}),
        ("OnDARE", {"density": 0.5}),
        ("OnDARE", {"density": 0.5, "variant": "released"}),
        ("OnTIES", {"density": 0.2}),
        ("OnTIES", {"density": 0.2, "every": 5}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_converges_on_a_quadratic(kind: str, options: dict, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    reference, _, tau = pair(0, {"w": (20, 10)})
    target = {"w": reference["w"] + torch.randn(20, 10)}
    params = parameters(reference, dtype)
    optimizer = getattr(pt, kind)(params.items(), tau, lr=0.02, weight=1e-6, **options)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 600)
    start = quadratic(params, target).item()
    for _ in range(600):
        optimizer.zero_grad()
        quadratic(params, target).backward()
        optimizer.step()
        scheduler.step()
    assert quadratic(params, target).item() < 0.02 * start


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("density", [0.003, 0.1])
def test_non_finite_entries_of_large_tensors_are_not_lost(density: float, every: int, bad: float) -> None:
    """Where the k largest are searched in a stream: δ = inf/inf is NaN, and NaN ranks first."""
    shapes = {"w": (250, 200)}
    reference, _, tau = pair(0, shapes)
    params = parameters(reference)
    grad = gradients(1, shapes)[0]
    grad["w"][123, 45] = bad
    run(pt.OnTIES(params.items(), tau, lr=1e-3, density=density, weight=0.1, every=every), params, [grad] * every)
    assert params["w"].isnan().nonzero().tolist() == [[123, 45]]


def test_equal_magnitudes_of_a_large_tensor() -> None:
    n = 60_000
    params = parameters({"w": torch.zeros(n)})
    grad = torch.ones(n)
    grad[::7] = -1
    run(pt.OnTIES(params.items(), None, lr=1.0, density=0.05, weight=0.0), params, [{"w": grad}])
    assert torch.equal(params["w"].detach().nonzero().flatten(), torch.arange(3000) * 20)


@pytest.mark.parametrize("with_tau", [True, False])
def test_unfreezing_later(with_tau: bool) -> None:
    """Gradual unfreezing: a parameter that was frozen at construction takes part once it has gradients."""
    reference, _, tau = pair()
    params, other = parameters(reference), parameters(reference)
    params["embed.weight"].requires_grad_(False)
    options = OPTIONS if with_tau else {"lr": 1e-3, "density": 0.5, "weight": 0.0}
    optimizer = pt.OnDARE(params.items(), tau if with_tau else None, **options)
    params["embed.weight"].requires_grad_(True)
    run(optimizer, params, gradients(3))
    run(pt.OnDARE(other.items(), tau if with_tau else None, **options), other, gradients(3))
    assert all(torch.equal(params[k], other[k]) for k in params)


@pytest.mark.parametrize("kind", KINDS)
def test_step_hooks_and_profiler_names(kind: str) -> None:
    reference, _, tau = pair()
    params = parameters(reference)
    optimizer = getattr(pt, kind)(params.items(), tau, **OPTIONS)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    run(optimizer, params, gradients(2))
    assert seen == ["before", "after"] * 2
    assert kind in repr(optimizer)
