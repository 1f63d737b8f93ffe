"""The compiled optimizer step gives the bits of the eager one, whatever the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import paretune as pt
from paretune import native
from paretune.errors import ArgumentError
from paretune.optim.kernels import Compiled, compiled

built = pytest.mark.skipif(
    native._loaded() is None or not native._loaded().paretune_fuses(),  # type: ignore[union-attr]
    reason="the kernels are not built for this processor: pip install with a C compiler",
)
SHAPES = {
    "large": (300, 211),
    "odd": (17, 5),
    "one": (1,),
    "row": (40_003,),
    "small": (16_384,),
    "next": (16_385,),
    "none": (0, 3),
}


def _gradients(shapes: dict[str, tuple[int, ...]], steps: int, kind: str) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)

    def draw(shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, generator=generator) * 1e-3
        if kind == "rows":  # most of an embedding has no gradient
            x[torch.rand(shape, generator=generator) < 0.99] = 0
        if kind == "ties":
            x = x.sign() * 0.25
        if kind == "wild":
            x *= torch.exp2(torch.randint(-90, 60, shape, generator=generator).float())
            x[torch.rand(shape, generator=generator) < 0.01] = torch.nan
        return x

    return [{name: draw(shape) for name, shape in shapes.items()} for _ in range(steps)]


def _trajectory(
    monkeypatch: pytest.MonkeyPatch, choice: str, method: str, kind: str, dtype: torch.dtype, options: dict[str, Any]
) -> list[Tensor]:
    """Parameters, states and F(τ) after some steps, as bits."""
    monkeypatch.setenv(native.VARIABLE, choice)
    generator = torch.Generator().manual_seed(1)
    reference = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    reference["large"][0] = -0.0
    base = {name: x + torch.randn(x.shape, generator=generator) * 1e-2 for name, x in reference.items()}
    tau = pt.TaskVector.between(base=base, reference=reference)
    params = {name: torch.nn.Parameter(x.to(dtype)) for name, x in reference.items()}
    optimizer = getattr(pt, method)(params.items(), tau, **options)
    for step, gradients in enumerate(_gradients(SHAPES, 4, kind)):
        for name, p in params.items():
            p.grad = None if name == "odd" and step == 1 else gradients[name].to(dtype)
        optimizer.step()
    found = []
    for p in params.values():
        found.append(p.detach())
        found += [optimizer.state[p][key] for key in sorted(optimizer.state[p])]
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.int16: torch.int16}
    return [x.nan_to_num(torch.nan).view(kinds[x.dtype]) for x in found]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("OnDARE", {"density": 5e-4}),
    ("OnDARE", {"density": 0.06, "weight": 0.3, "rescale": "expectation", "weight_decay": 0.1}),
    ("OnDARE", {"density": 0.05, "weight": 0.3, "variant": "released", "clip": 0.1, "weight_decay": 0.1}),
    ("OnDARE", {"density": 0.5, "weight": 0.3}),
    ("OnDARE", {"density": 0.07, "weight": 0.3, "rescale": "expectation", "weight_decay": 0.1}),
    ("OnDARE", {"density": 0.9, "weight": 0.3, "variant": "released", "clip": 0.01, "weight_decay": 0.1}),
    ("OnDARE", {"density": 0.5, "weight": 0.3, "variant": "released", "rescale": "l1"}),
    ("OnDARE", {"density": 1 - 1e-12, "weight": 0.3}),
    ("OnDARE", {"density": 1.0, "weight": 0.3, "betas": (0.3, 0.9)}),
    ("OnDARE", {"density": 0.05, "weight": 0.3, "every": 2}),
    ("OnTIES", {"density": 0.01, "weight": 0.3}),
    ("OnTIES", {"density": 0.24, "weight": 5e-7, "weight_decay": 0.1, "lr": 1e-3}),
    ("OnTIES", {"density": 0.05, "weight": 0.3, "rescale": "expectation", "eps": 0.05}),
    ("OnTIES", {"density": 0.05, "weight": 0.3, "variant": "released", "weight_decay": 0.1}),
    ("OnTIES", {"density": 0.01, "weight": 0.3, "eps": 0.0, "betas": (0.3, 0.9)}),
    ("OnTIES", {"density": 0.01, "weight": 0.3, "lr": 0.0}),
    ("OnTIES", {"density": 0.1, "weight": 0.3, "every": 2}),
    ("OnTIES", {"density": 0.1, "weight": 0.3, "rescale": "l1"}),
]


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["plain", "rows", "ties", "wild"])
@pytest.mark.parametrize(("method", "options"), CASES)
def test_same_bits(
    monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, Any], kind: str, dtype: torch.dtype
) -> None:
    eager = _trajectory(monkeypatch, "eager", method, kind, dtype, options)
    for a, b in zip(eager, _trajectory(monkeypatch, "native", method, kind, dtype, options), strict=True):
        assert torch.equal(a, b)


@built
@pytest.mark.parametrize(("method", "density"), [("OnDARE", 1e-3), ("OnTIES", 1e-2)])
def test_same_bits_on_some_threads(monkeypatch: pytest.MonkeyPatch, method: str, density: float) -> None:
    monkeypatch.setattr("paretune.optim.kernels.step._SHARE", 1 << 14)
    eager = _trajectory(monkeypatch, "eager", method, "plain", torch.float32, {"density": density, "weight": 0.3})
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = _trajectory(monkeypatch, "native", method, "plain", torch.float32, {"density": density, "weight": 0.3})
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(eager, found, strict=True))


@pytest.mark.parametrize("choice", ["eager", pytest.param("native", marks=built)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"rescale": "expectation", "weight_decay": 0.1}, {"variant": "released"}])
def test_a_large_tensor_is_drawn_in_ranges(
    monkeypatch: pytest.MonkeyPatch, choice: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    monkeypatch.setitem(SHAPES, "large", (1000, 301))
    found = []
    for together in (1 << 17, 1):  # kept entries
        monkeypatch.setattr("paretune.optim.rule._BATCH", together)
        found.append(
            _trajectory(monkeypatch, choice, "OnDARE", "plain", dtype, {"density": 0.01, "weight": 0.3} | options)
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@built
def test_layouts_that_are_not_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for choice in ("eager", "native"):
        monkeypatch.setenv(native.VARIABLE, choice)
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(64, 96).t())
        tau = pt.TaskVector.between(base={"w": torch.zeros(96, 64)}, reference={"w": p.detach()})
        optimizer = pt.OnTIES([("w", p)], tau, density=0.1, weight=0.3, lr=1e-2)
        for _ in range(3):
            p.grad = torch.randn(64, 96).t()
            optimizer.step()
        found.append(p.detach().clone())
    assert torch.equal(*found)


@built
def test_it_is_the_compiled_step_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    merge = Compiled.merge

    def counting(self: Compiled, rule: Any, pieces: Any, *rest: Any) -> None:
        calls.append(len(pieces))
        merge(self, rule, pieces, *rest)

    monkeypatch.setattr(Compiled, "merge", counting)
    for method in ("OnDARE", "OnTIES"):
        for choice in ("native", "auto", "eager"):
            _trajectory(monkeypatch, choice, method, "plain", torch.bfloat16, {"density": 0.01})
    assert len(calls) == 2 * 2 * 4
    assert set(calls) == {5, 6}  # all that have a gradient and any element


def test_the_variable_is_heeded_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "eager")
    assert compiled() is None
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = pt.OnDARE([("w", p)], None, density=0.01, weight=0.0)
    p.grad = torch.ones(3)
    for choice, mend in (("fastest", "choose one of"), ("native", "C compiler")):
        monkeypatch.setenv(native.VARIABLE, choice)
        monkeypatch.setattr(native, "_loaded", lambda: None)
        with pytest.raises(ArgumentError, match=f"PARETUNE_KERNELS.*{mend}"):
            optimizer.step()
    assert not optimizer.state[p]["exp_avg"].any()
