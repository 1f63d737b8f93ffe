"""The fast index forms against dense float64 oracles of Eq. 1–7 and of the released arithmetic."""

from __future__ import annotations

import itertools

import oracles
import pytest
import torch
from builders import SHAPES, assert_close, gradients, pair, parameters, project_masks, run
from hypothesis import given, settings
from hypothesis import strategies as st

import paretune as pt
from paretune.errors import ArgumentError

STEPS = 7
LARGE = {**SHAPES, "large": (45, 70), "empty": (0,), "one": (1,)}


def compare(
    optimizer_kind: type,
    oracle_kind: type[oracles.AdamOracle],
    shapes: dict[str, tuple[int, ...]] = LARGE,
    steps: int = STEPS,
    seed: int = 0,
    variant: str = "paper",
    **options: object,
) -> None:
    # eps 0.05: with a small one Adam's first update is ±lr everywhere and rounding decides the top p.
    options = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 0.05, **options}
    reference, tau, vector = pair(3, shapes)
    grads = gradients(steps, shapes)
    params = parameters(reference)
    optimizer = optimizer_kind(params.items(), vector, variant=variant, seed=seed, **options)
    oracle = oracle_kind(reference, tau, masks=project_masks(shapes, options["density"], seed), **options)  # type: ignore[arg-type]
    for t in range(steps):
        run(optimizer, params, [grads[t]])
        oracle.step(grads[t])
        for name in shapes:
            # Against the movement, not the parameter: two ulps of the parameter a step, and 1e-5 of δ.
            moved = oracle.params[name] - reference[name].double()
            ulp = 2**-24 * 2 * (t + 1) * (oracle.params[name].abs().max().item() if moved.numel() else 0)
            assert_close(params[name].double() - reference[name].double(), moved, 1e-5, ulp, f"{name} at {t + 1}")


DENSITIES = [1.0, 0.9, 0.5, 0.1, 0.02, 5e-4]


@pytest.mark.parametrize("rescale", [None, "expectation", "l1"])
@pytest.mark.parametrize("density", DENSITIES)
def test_ondare_paper(density: float, rescale: str | None) -> None:
    lr = 1e-3 if rescale is None else 1e-3 * max(density, 0.01)
    compare(pt.OnDARE, oracles.OnDAREOracle, density=density, rescale=rescale, weight=0.1, lr=lr, weight_decay=0.1)


@pytest.mark.parametrize("rescale", [None, "l1", "expectation"])
@pytest.mark.parametrize("density", DENSITIES)
def test_onties_paper(density: float, rescale: str | None) -> None:
    lr = 1e-3 if rescale is None else 1e-3 * max(density, 0.01)
    compare(pt.OnTIES, oracles.OnTIESOracle, density=density, rescale=rescale, weight=0.1, lr=lr, weight_decay=0.1)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("density", [0.2, 0.03, 0.002])
def test_onties_of_large_tensors(density: float, variant: str, every: int) -> None:
    """Where the k-th magnitude is searched in a stream instead of sorting."""
    oracle = oracles.OnTIESOracle if variant == "paper" else oracles.OnTIESReleasedOracle
    shapes = {"w": (170, 130), "b": (31,)}
    compare(pt.OnTIES, oracle, shapes, 4, variant=variant, density=density, weight=0.1, every=every)


@pytest.mark.parametrize("density", [0.5, 0.02, 1e-3])
def test_ondare_of_large_tensors(density: float) -> None:
    """Several pages and chunks of the generator, several tensors in a batch."""
    shapes = {"w": (700, 400), "b": (31,), "v": (65_536,), "u": (65_537,)}
    compare(pt.OnDARE, oracles.OnDAREOracle, shapes, 2, density=density, weight=0.1)


def test_float64_parameters_are_exact() -> None:
    reference, tau, vector = pair()
    wide = {k: v.double() for k, v in reference.items()}
    params = parameters(wide, torch.float64)
    grads = gradients(5)
    options = {"lr": 1e-3, "density": 0.3, "weight": 0.1, "weight_decay": 0.1}
    run(pt.OnDARE(params.items(), vector, **options), params, grads)
    oracle = oracles.OnDAREOracle(wide, tau, masks=project_masks(SHAPES, 0.3), **options)
    for step in grads:
        oracle.step(step)
    for name in wide:
        assert_close(params[name], oracle.params[name], 1e-12, what=name)


@pytest.mark.parametrize("weight", [0.0, 5e-4, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["OnDARE", "OnTIES"])
def test_weights(kind: str, weight: float) -> None:
    """From "no conflict is won by τ" to "τ alone"."""
    for density in (0.2, 1.0):
        compare(getattr(pt, kind), getattr(oracles, f"{kind}Oracle"), density=density, weight=weight)


@pytest.mark.parametrize("rescale", [None, "expectation", "l1"])
@pytest.mark.parametrize(("density", "clip"), [(1.0, 1.0), (0.5, 1.0), (0.1, 2e-3), (0.01, 0.05)])
def test_ondare_released(density: float, clip: float, rescale: str | None) -> None:
    compare(
        pt.OnDARE,
        oracles.OnDAREReleasedOracle,
        variant="released",
        density=density,
        clip=clip,
        weight=0.1,
        rescale=rescale,
        weight_decay=0.1,
        eps=1e-8,
        lr=1e-4,
    )


@pytest.mark.parametrize("weight", [0.0, 0.2])
@pytest.mark.parametrize("rescale", [None, "none", "l1"])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.02])
def test_onties_released(density: float, rescale: str | None, weight: float) -> None:
    """Small tensors stay dense where int(p·n) < 1; weight 0 keeps the entries of δ that survive the election."""
    compare(
        pt.OnTIES,
        oracles.OnTIESReleasedOracle,
        variant="released",
        density=density,
        weight=weight,
        rescale=rescale,
        weight_decay=0.1,
    )


def test_the_two_elections_are_opposite_and_both_are_reachable() -> None:
    """With |τ| ≫ |δ|, the released election lets τ decide the conflicts and the paper's lets δ."""
    shapes = {"w": (400,)}
    reference, tau, vector = pair(1, shapes, distance=1.0)
    grad = {"w": tau["w"].clone()}  # δ = −lr·sign(τ): every entry conflicts
    moves = {}
    for variant in ("paper", "released"):
        params = parameters(reference)
        optimizer = pt.OnTIES(params.items(), vector, variant=variant, lr=1e-3, density=1.0, weight=1e-5)
        run(optimizer, params, [grad])
        moves[variant] = (params["w"].detach() - reference["w"]) * torch.sign(tau["w"])
    assert (moves["paper"] < 0).float().mean() > 0.9, "δ decides"
    assert (moves["released"] >= 0).all(), "τ decides"


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["OnDARE", "OnTIES"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_step_k(kind: str, variant: str, every: int) -> None:
    oracle = getattr(oracles, f"{kind}{'Released' if variant == 'released' else ''}Oracle")
    for density in (1.0, 0.3):
        compare(getattr(pt, kind), oracle, variant=variant, every=every, density=density, weight=0.2, weight_decay=0.1)


def test_missing_gradients_skip_the_parameter_alone() -> None:
    """Bias correction counts each parameter's own steps, masks count the optimizer's."""
    reference, tau, vector = pair()
    grads = [
        {k: (None if (i + t) % 3 == 0 else g) for i, (k, g) in enumerate(step.items())}
        for t, step in enumerate(gradients(9))
    ]
    params = parameters(reference)
    options = {"lr": 1e-3, "density": 0.5, "weight": 0.1}
    run(pt.OnDARE(params.items(), vector, **options), params, grads)
    oracle = oracles.OnDAREOracle(reference, tau, masks=project_masks(SHAPES, 0.5), **options)
    for step in grads:
        oracle.step(step)
    for name in reference:
        assert_close(params[name], oracle.params[name], 1e-6, what=name)


def test_learning_rate_per_step_and_betas_per_step() -> None:
    reference, tau, vector = pair()
    params, grads = parameters(reference), gradients(8)
    optimizer = pt.OnDARE(params.items(), vector, lr=1.0, density=0.5, weight=0.05)
    oracle = oracles.OnDAREOracle(reference, tau, masks=project_masks(SHAPES, 0.5), lr=1.0, density=0.5, weight=0.05)
    for t, step in enumerate(grads):
        rate = 0.0 if t == 0 else 1e-3 * t
        oracle.lr = rate
        oracle.step(step)
        run(optimizer, params, [step], [rate])
    assert optimizer.param_groups[0]["calls"] == 8, "a warm-up step at lr 0 with gradients counts"
    for name in reference:
        assert_close(params[name], oracle.params[name], 2e-6, what=name)


def test_lr_as_tensor() -> None:
    reference, _, vector = pair()
    one, other, grads = parameters(reference), parameters(reference), gradients(4)
    run(pt.OnDARE(one.items(), vector, lr=1e-3, density=0.5, weight=0.05), one, grads)
    run(pt.OnDARE(other.items(), vector, lr=torch.tensor(1e-3), density=0.5, weight=0.05), other, grads)
    for name in reference:
        assert_close(one[name], other[name].double(), 1e-6, what=name)


shapes_st = st.dictionaries(
    st.sampled_from(["a", "b.c", "d.e.f"]),
    st.sampled_from([(), (0,), (1,), (2, 0), (3,), (5, 7), (1, 1, 9), (64,), (33, 5)]),
    min_size=1,
)


@settings(max_examples=60)
@given(
    shapes=shapes_st,
    kind=st.sampled_from(["OnDARE", "OnTIES"]),
    variant=st.sampled_from(["paper", "released"]),
    density=st.one_of(st.sampled_from([1.0, 0.5]), st.floats(1e-4, 1.0)),
    weight=st.sampled_from([0.0, 1e-6, 0.3, 1.0]),
    every=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_density(shapes, kind, variant, density, weight, every, seed) -> None:
    oracle = getattr(oracles, f"{kind}{'Released' if variant == 'released' else ''}Oracle")
    options = {"density": density, "weight": weight, "every": every, "seed": seed, "clip": 10.0}
    compare(getattr(pt, kind), oracle, shapes, 4, variant=variant, **options)


@pytest.mark.parametrize(("kind", "rescale"), [("OnDARE", "none"), ("OnTIES", "expectation")])
def test_combinations_that_were_never_released_are_refused(kind: str, rescale: str) -> None:
    reference, _, vector = pair()
    with pytest.raises(ArgumentError, match="rescale"):
        getattr(pt, kind)(parameters(reference).items(), vector, variant="released", rescale=rescale)


def test_defaults_are_the_papers() -> None:
    """rescale=None: the paper's variant does not rescale; released OnDARE does (× 1/p)."""
    reference, _, vector = pair()
    grads = gradients(3)
    for kind, variant, same in itertools.chain(
        [("OnDARE", "paper", "none"), ("OnTIES", "paper", "none")],
        [("OnDARE", "released", "expectation"), ("OnTIES", "released", "none")],
    ):
        one, other = parameters(reference), parameters(reference)
        options = {"lr": 1e-3, "density": 0.3, "weight": 0.1, "variant": variant}
        run(getattr(pt, kind)(one.items(), vector, **options), one, grads)
        run(getattr(pt, kind)(other.items(), vector, rescale=same, **options), other, grads)
        assert all(torch.equal(one[k], other[k]) for k in one), (kind, variant)
