"""Random, Magnitude, WeightedSum and SignElection against their naive definitions."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paretune as pt
from paretune.errors import ArgumentError
from paretune.operators import mask_key

RESCALES = ["none", "expectation", "l1"]
KEY = mask_key(0, 0, "update", "w")


def small_floats() -> st.SearchStrategy[float]:
    return st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0]), st.floats(-4, 4, width=16))


vectors = st.lists(small_floats(), max_size=60).map(lambda v: torch.tensor(v, dtype=torch.float32))
densities = st.one_of(st.sampled_from([1.0, 0.5, 0.25, 0.01]), st.floats(1e-4, 1.0))


@settings(max_examples=200)
@given(x=vectors, density=densities, rescale=st.sampled_from(RESCALES))
def test_magnitude(x: Tensor, density: float, rescale: str) -> None:
    """The same entries as the naive sort keeps (ties spread evenly), the same values."""
    got = pt.Magnitude(density, rescale=rescale)(x)
    want = oracles.magnitude(x.double(), density, rescale)
    assert torch.equal(got != 0, want != 0)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    if rescale == "none":
        assert torch.equal(got, want.float())


@settings(max_examples=100)
@given(x=vectors, density=densities, rescale=st.sampled_from(RESCALES), key=st.integers(0, 2**62))
def test_random(x: Tensor, density: float, rescale: str, key: int) -> None:
    kept = pt.Random(density)(torch.ones_like(x), key=key) != 0
    got = pt.Random(density, rescale=rescale)(x, key=key)
    torch.testing.assert_close(got.double(), oracles.random(x.double(), kept, density, rescale), rtol=1e-6, atol=0)


@settings(max_examples=200)
@given(
    pairs=st.lists(st.tuples(small_floats(), small_floats()), max_size=40),
    weight=st.one_of(st.sampled_from([0.0, 0.5, 1.0, 5e-7]), st.floats(0, 1)),
)
def test_consensus(pairs: list[tuple[float, float]], weight: float) -> None:
    a = torch.tensor([p[0] for p in pairs], dtype=torch.float64)
    b = torch.tensor([p[1] for p in pairs], dtype=torch.float64)
    for operator, oracle in (
        (pt.WeightedSum(), oracles.weighted_sum),
        (pt.SignElection(weighted=True), oracles.elect_weighted),
        (pt.SignElection(weighted=False), oracles.elect_unweighted),
    ):
        want = oracle(a, b, weight)
        torch.testing.assert_close(operator(a, b, weight), want, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(operator(a.float(), b.float(), weight).double(), want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("kind", [pt.Random, pt.Magnitude])
def test_density_one_is_the_identity_exactly(kind: type, rescale: str, dtype: torch.dtype) -> None:
    x = torch.randn(31, 7).to(dtype)
    x[0, :4] = torch.tensor([0.0, float("nan"), float("inf"), -0.0]).to(dtype)
    got = kind(1.0, rescale=rescale)(x, key=KEY)
    assert got.dtype == dtype
    assert got.shape == x.shape
    as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    assert torch.equal(got.view(as_int), x.view(as_int))


@pytest.mark.parametrize(("count", "wanted"), [(1000, 100), (10, 3), (7, 5), (9, 1), (1000, 999)])
def test_ties_are_spread_evenly(count: int, wanted: int) -> None:
    """Of c tied entries the r kept have ranks floor(i·c/r)."""
    x = torch.ones(count)
    x[::3] = -1
    kept = pt.Magnitude((wanted + 0.5) / count)(x).nonzero().flatten()
    assert kept.tolist() == [i * count // wanted for i in range(wanted)]


def test_ties_beside_larger_entries() -> None:
    x = torch.zeros(60)
    x[5], x[50] = 9.0, -7.0
    tied = torch.arange(10, 40, 3)
    x[tied] = 2.0
    kept = pt.Magnitude(6.5 / 60)(x).nonzero().flatten().tolist()
    assert kept == sorted([5, 50, *(tied[i * 10 // 4].item() for i in range(4))])


def test_zeros_are_never_kept() -> None:
    x = torch.zeros(100)
    x[3] = 1e-20
    got = pt.Magnitude(0.5)(x)
    assert got.nonzero().flatten().tolist() == [3]
    l1 = pt.Magnitude(0.5, rescale="l1")(torch.zeros(10))
    assert torch.equal(l1, torch.zeros(10))


def test_fewer_than_one_entry_keeps_one() -> None:
    x = torch.tensor([0.1, -3.0, 2.0])
    assert torch.equal(pt.Magnitude(1e-3)(x), torch.tensor([0.0, -3.0, 0.0]))
    assert torch.equal(pt.Magnitude(1e-3)(torch.tensor(5.0)), torch.tensor(5.0))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("density", [0.3, 0.03, 0.003])
def test_magnitude_of_a_large_tensor(density: float, seed: int) -> None:
    """Exactly k entries and none larger left out, on heavy ties too (bf16 differences)."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(200_003, generator=generator) * 1e-3).bfloat16().float()
    got = pt.Magnitude(density)(x)
    kept = got != 0
    assert kept.sum() == int(density * x.numel())
    assert torch.equal(got[kept], x[kept])
    assert x[~kept].abs().max() <= x[kept].abs().min()


def test_nan_ranks_above_infinity() -> None:
    x = torch.tensor([1.0, float("inf"), float("nan"), -5.0])
    assert pt.Magnitude(0.25)(x).isnan().tolist() == [False, False, True, False]
    both = pt.Magnitude(0.5)(x)
    assert both[1] == float("inf")
    assert both[2].isnan()


def test_random_is_determined_by_its_key() -> None:
    x = torch.randn(5000)
    same = [pt.Random(0.2)(x, key=KEY) for _ in range(2)]
    assert torch.equal(*same)
    assert torch.equal(pt.Random(0.2)(x.view(50, 100), key=KEY).flatten(), same[0])
    assert not torch.equal(pt.Random(0.2)(x, key=mask_key(0, 1, "update", "w")), same[0])
    with pytest.raises(ArgumentError, match="key"):
        pt.Random(0.2)(x, key=None)


def test_random_keeps_the_expectation() -> None:
    x = torch.rand(4000) + 1
    mean = torch.stack(
        [pt.Random(0.3, rescale="expectation")(x, key=mask_key(0, s, "update", "w")) for s in range(300)]
    )
    sigma = math.sqrt(0.7 / 0.3 * (x**2).sum().item() / 300)
    assert abs((mean.mean(0) - x).sum().item()) < 4 * sigma
    for s in range(5):
        kept = pt.Random(0.3, rescale="l1")(x, key=s)
        assert kept.abs().sum().item() == pytest.approx(x.abs().sum().item(), rel=1e-5)


def test_inputs_are_left_alone() -> None:
    x, y = torch.randn(50), torch.randn(50)
    before = x.clone(), y.clone()
    for density in (0.3, 1.0):
        for operator in (pt.Random(density), pt.Magnitude(density)):
            operator(x, key=KEY).add_(1)
    for consensus in (pt.WeightedSum(), pt.SignElection(weighted=True), pt.SignElection(weighted=False)):
        consensus(x, y, 0.5).add_(1)
        consensus(x, y, 0.0).add_(1)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_the_largest_decides() -> None:
    a, b = torch.tensor([1.0, 1.0, 1.0, 0.0, -1.0]), torch.tensor([-3.0, 2.0, -1.0, -2.0, 1.0])
    assert pt.SignElection(weighted=True)(a, b, 0.5).tolist() == [-1.5, 1.5, 0.0, -1.0, 0.0]
    assert pt.SignElection(weighted=False)(a, b, 0.5).tolist() == [-1.5, 1.5, 0.5, -1.0, 0.5]
    assert pt.SignElection(weighted=True)(a, b, 0.1).tolist() == pytest.approx([0.9, 1.1, 0.9, -0.2, -0.9])


@pytest.mark.parametrize(
    "consensus", [pt.WeightedSum(), pt.SignElection(weighted=True), pt.SignElection(weighted=False)]
)
def test_nan_survives_consensus(consensus: object) -> None:
    nan = torch.tensor([float("nan"), float("nan"), 1.0])
    other = torch.tensor([1.0, -1.0, 1.0])
    assert consensus(nan, other, 0.3).isnan().tolist() == [True, True, False]  # type: ignore[operator]
    assert consensus(other, nan, 0.3).isnan().tolist() == [True, True, False]  # type: ignore[operator]


@pytest.mark.parametrize("kind", [pt.Random, pt.Magnitude])
@pytest.mark.parametrize(
    ("argument", "value"), [("density", 0.0), ("density", 1.5), ("density", float("nan")), ("rescale", True)]
)
def test_ranges(kind: type, argument: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=argument):
        kind(**{"density": 0.5, argument: value})


def test_operators_are_values() -> None:
    assert pt.Random(0.5) == pt.Random(0.5, rescale="none")
    assert pt.Magnitude(0.5) != pt.Magnitude(0.4)
    assert "0.5" in repr(pt.Random(0.5))
    assert "weighted=False" in repr(pt.SignElection(weighted=False))
