"""Every method against the dense operators, written out in torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from merge_models import SHAPES, family, read, tensors, ulps
from torch import Tensor

import paretune as pt
from paretune.operators import bernoulli_mask, mask_key
from paretune.operators.methods import METHODS as PUBLISHED

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BIG = SHAPES | {"model.layers.0.big.weight": (300, 700)}  # more than one block, and ends within one


def models(count: int, dtype: torch.dtype, shapes: dict = BIG) -> list[dict[str, Tensor]]:
    return [{n: t.double() for n, t in tensors(seed, dtype, shapes).items()} for seed in range(count + 1)]


def close(found: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype, scale: float = 4.0) -> None:
    """Equal but for the last place of numbers as large as the inputs are."""
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}[dtype]
    assert found.keys() == exact.keys()
    for name in found:
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name].double(), exact[name], rtol=unit, atol=unit * scale / 4, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [(0.25, 0.75), (0.3, 0.7), (0.5, 0.5), (1 / 3, 2 / 3)])
def test_linear_is_exact_to_the_last_place(dtype: torch.dtype, weights: tuple[float, float], tmp_path: Path) -> None:
    paths = family(tmp_path, 1, dtype, BIG)
    pt.merge("linear", dict(zip(paths, weights, strict=True)), out=tmp_path / "out")
    a, b = models(1, dtype)
    for name, found in read(tmp_path / "out").items():
        assert ulps(found, weights[0] * a[name] + weights[1] * b[name]) <= 1


def test_soup_normalizes_its_weights(tmp_path: Path) -> None:
    paths = family(tmp_path, 3, torch.float32)
    pt.merge("linear", paths, out=tmp_path / "out")
    every = models(3, torch.float32, SHAPES)
    mean = {name: sum(m[name] for m in every) / 4 for name in SHAPES}
    close(read(tmp_path / "out"), mean, torch.float32)
    pt.merge("linear", dict.fromkeys(paths, 0.5), out=tmp_path / "sum", normalize=False)
    close(read(tmp_path / "sum"), {name: 2 * value for name, value in mean.items()}, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_task_arithmetic(dtype: torch.dtype, tmp_path: Path) -> None:
    base, a, b = family(tmp_path, 2, dtype, BIG)
    pt.merge("task_arithmetic", {a: 0.7, b: -0.2}, base, tmp_path / "out", scale=0.5)
    w, x, y = models(2, dtype)
    exact = {n: w[n] + 0.5 * (0.7 * (x[n] - w[n]) - 0.2 * (y[n] - w[n])) for n in w}
    close(read(tmp_path / "out"), exact, dtype)


def sparse(kind: str, density: float, rescale: str, delta: Tensor, model: int, name: str) -> Tensor:
    if kind == "magnitude":
        return pt.Magnitude(density, rescale=rescale)(delta)
    return pt.Random(density, rescale=rescale)(delta, key=mask_key(3, 0, f"model {model}", name))


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("rescale", ["none", "expectation", "l1"])
def test_dare_linear(density: float, rescale: str, tmp_path: Path) -> None:
    """The mask is the operators' own, element for element."""
    base, a, b = family(tmp_path, 2, torch.float32, BIG)
    pt.merge("dare_linear", {a: 0.7, b: 0.3}, base, tmp_path / "out", density=density, rescale=rescale, seed=3)
    w, x, y = ({n: t.float() for n, t in m.items()} for m in models(2, torch.float32))
    exact = {}
    for n in w:
        parts = [sparse("random", density, rescale, m[n] - w[n], i, n) for i, m in ((1, x), (2, y))]
        exact[n] = (w[n] + (0.7 * parts[0] + 0.3 * parts[1])).double()
    close(read(tmp_path / "out"), exact, torch.float32, 16 / density)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_election_of_two_is_the_consensus_operator(
    method: str, dtype: torch.dtype, density: float, tmp_path: Path
) -> None:
    base, a, b = family(tmp_path, 2, dtype, BIG)
    alpha = 0.3
    pt.merge(
        method,
        {a: 1 - alpha, b: alpha},
        base,
        tmp_path / "out",
        density=density,
        normalize=False,
        rescale="none",
        seed=3,
    )
    w, x, y = ({n: t.float() for n, t in m.items()} for m in models(2, dtype))
    kind = "magnitude" if method == "ties" else "random"
    exact = {}
    for n in w:
        first, second = (sparse(kind, density, "none", m[n] - w[n], i, n) for i, m in ((1, x), (2, y)))
        exact[n] = (w[n] + pt.SignElection()(first, second, alpha)).to(dtype)
    found = read(tmp_path / "out")
    for n in w:
        torch.testing.assert_close(
            found[n].float(), exact[n].float(), rtol=2**-8 if dtype != torch.float32 else 1e-6, atol=1e-7
        )
        # A dropped entry leaves the base as it is: the choice of entries is exactly the operators'.
        assert torch.equal(found[n] == w[n], exact[n] == w[n])


@pytest.mark.parametrize("normalize", [True, False])
def test_election_of_three(normalize: bool, tmp_path: Path) -> None:
    base, *paths = family(tmp_path, 3, torch.float32, BIG)
    weights = (0.5, 0.2, 0.4)
    pt.merge("ties", dict(zip(paths, weights, strict=True)), base, tmp_path / "out", density=0.4, normalize=normalize)
    w, *tuned = ({n: t.float() for n, t in m.items()} for m in models(3, torch.float32))
    exact = {}
    for n in w:
        deltas = torch.stack([pt.Magnitude(0.4)(m[n] - w[n]) for m in tuned])
        weight = torch.tensor(weights).view(-1, *[1] * w[n].dim())
        agree = (deltas.sign() == (weight * deltas).sum(0).sign()) & (deltas != 0)
        total = (weight * deltas * agree).sum(0)
        if normalize:
            total = total / (weight * agree).sum(0).clamp(min=1e-9)
        exact[n] = (w[n] + total).double()
    close(read(tmp_path / "out"), exact, torch.float32, 16)


def test_opposite_and_equal_votes_cancel(tmp_path: Path) -> None:
    from merge_models import write

    base = write(tmp_path / "base", {"w": torch.zeros(4)})
    a = write(tmp_path / "a", {"w": torch.tensor([1.0, -1.0, 2.0, 0.0])})
    b = write(tmp_path / "b", {"w": torch.tensor([-1.0, 1.0, 2.0, 0.0])})
    pt.merge("ties", {a: 0.5, b: 0.5}, base, tmp_path / "out", density=1.0)
    assert read(tmp_path / "out")["w"].tolist() == [0.0, 0.0, 2.0, 0.0]


def test_negative_weights_in_an_election(tmp_path: Path) -> None:
    """The weights of those who agree may sum to 0: what they say is added as it is."""
    from merge_models import write

    base = write(tmp_path / "base", {"w": torch.zeros(3)})
    a = write(tmp_path / "a", {"w": torch.tensor([1.0, 1.0, 2.0])})
    b = write(tmp_path / "b", {"w": torch.tensor([-1.0, 1.0, 0.0])})
    pt.merge("ties", {a: 0.5, b: -0.5}, base, tmp_path / "out", density=1.0)
    assert read(tmp_path / "out")["w"].tolist() == [1.0, 0.0, 2.0]


def reference_slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0)
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    omega = torch.arccos(cosine)
    return (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / torch.sin(omega)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slerp(dtype: torch.dtype, tmp_path: Path) -> None:
    a, b = family(tmp_path, 1, dtype, BIG)
    pt.merge("slerp", {a: 0.7, b: 0.3}, out=tmp_path / "weights")
    pt.merge("slerp", [b, a], a, tmp_path / "t", t=0.3)  # t = 0 is the base, wherever it is listed
    x, y = models(1, dtype)
    close(read(tmp_path / "t"), {n: reference_slerp(x[n], y[n], 0.3) for n in x}, dtype)
    assert all(
        torch.equal(p, q)
        for p, q in zip(read(tmp_path / "t").values(), read(tmp_path / "weights").values(), strict=True)
    )


def test_nested_slerp_of_task_vectors(tmp_path: Path) -> None:
    base, *paths = family(tmp_path, 3, torch.float32, BIG)
    pt.merge("nuslerp", paths, base, tmp_path / "out")
    w, x, y, z = models(3, torch.float32)
    exact = {}
    for n in w:
        pair = reference_slerp(x[n] - w[n], y[n] - w[n], 1 / 2)
        exact[n] = w[n] + reference_slerp(pair, z[n] - w[n], 1 / 3)
    close(read(tmp_path / "out"), exact, torch.float32)


def test_model_stock(tmp_path: Path) -> None:
    base, *paths = family(tmp_path, 2, torch.float32, BIG)
    pt.merge("model_stock", paths, base, tmp_path / "out")
    w, x, y = models(2, torch.float32)
    exact = {}
    for n in w:
        a, b = x[n] - w[n], y[n] - w[n]
        cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0)
        exact[n] = w[n] + 2 * cosine / (1 + cosine) * (a + b) / 2
    close(read(tmp_path / "out"), exact, torch.float32)


def test_partwise(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.weight": (8, 8) for i in range(6)}
    shapes |= {"model.embed.weight": (9, 8), "lm_head.weight": (9, 8), "model.norm.weight": (8,)}
    pre, post = family(tmp_path, 1, torch.float32, shapes)
    pt.merge("linear", [pre, post], out=tmp_path / "out", pivots=(1, 3), ratios=(0.4, 0.3, 0.2), head=1.0)
    x, y = models(1, torch.float32, shapes)
    wanted = dict(zip([f"model.layers.{i}.mlp.weight" for i in range(6)], [0.4, 0.4, 0.3, 0.3, 0.2, 0.2], strict=True))
    wanted |= {"model.embed.weight": 0.3, "lm_head.weight": 1.0, "model.norm.weight": 0.3}
    close(read(tmp_path / "out"), {n: a * x[n] + (1 - a) * y[n] for n, a in wanted.items()}, torch.float32)


def test_defaults_are_the_published_ones() -> None:
    from paretune.merging import METHODS

    for name in ("dare_linear", "dare_ties", "ties"):
        assert METHODS[name].defaults["density"] == PUBLISHED[name].density
        assert METHODS[name].defaults["rescale"] == PUBLISHED[name].rescale


def test_output_dtype(tmp_path: Path) -> None:
    """Rounded once, from float32, whatever the inputs are."""
    a, b = family(tmp_path, 1, torch.float32)
    pt.merge("linear", {a: 0.3, b: 0.7}, out=tmp_path / "out", dtype=torch.bfloat16)
    x, y = models(1, torch.float32, SHAPES)
    for name, found in read(tmp_path / "out").items():
        assert found.dtype == torch.bfloat16
        assert ulps(found, 0.3 * x[name] + 0.7 * y[name]) <= 0.5001


@pytest.mark.parametrize("density", [0.01, 1 / 16, 0.07, 0.5, 0.999999])
@pytest.mark.parametrize("start", [0, 3 << 16, (1 << 32) - (1 << 16), 1 << 32, 5 << 32])
def test_masks_are_the_operators(density: float, start: int) -> None:
    import numpy as np

    from paretune.merging.masks import Mask
    from paretune.merging.masks import mask_key as key_of

    n = 3 * (1 << 16) - 77
    key = key_of(7, 2, "layer.weight")
    assert key == mask_key(7, 0, "model 2", "layer.weight")
    bits = np.arange(1, n + 1, dtype=np.uint32)
    Mask(key, start + n, density).drop(bits, start, np.empty_like(bits), np.empty_like(bits))
    mask = bernoulli_mask(key, start + n, density, start).numpy()
    assert np.array_equal(bits != 0, mask)
    assert np.array_equal(bits[mask], np.arange(1, n + 1)[mask])
