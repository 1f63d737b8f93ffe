"""Sparse vectors: what OnTIES keeps of τ, and the union of two of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import paretune as pt
from paretune.optim.parts import whole
from paretune.optim.sparse import SparseVector, union
from paretune.optim.tau import Tau


@pytest.mark.parametrize("n", [0, 1, 5, 65_535, 65_536, 65_537, 300_000])
def test_positions_survive(n: int) -> None:
    index = torch.arange(0, n, 7)
    vector = SparseVector(index, torch.ones(index.numel()), n)
    assert torch.equal(vector.index, index)
    assert vector.index.dtype == torch.int64


def test_six_bytes_an_entry() -> None:
    """Resident τ of OnTIES ≤ 6p bytes a parameter (and 4 bytes per 65,536 entries for the counts)."""
    n, p = 1_000_000, 0.05
    tau = pt.TaskVector.between(base={"w": torch.zeros(n)}, reference={"w": torch.randn(n)})
    vector = Tau(tau).largest("w", p, whole(n))
    assert vector.index.numel() == int(p * n)
    assert vector.resident_bytes <= 6 * p * n + 4 * (n // 65_536 + 1)
    assert torch.equal(vector.values, tau.dense("w")[vector.index])
    assert torch.equal(pt.Magnitude(p)(tau.dense("w")).nonzero().flatten(), vector.index)


@pytest.mark.parametrize(("kind", "density"), [("OnDARE", 5e-4), ("OnTIES", 0.05)])
def test_resident_tau_of_the_optimizers(kind: str, density: float, tmp_path) -> None:
    n, sides = 400_000, []
    for side in ("base", "reference"):
        (tmp_path / side).mkdir()
        save_file({"w": torch.randn(n)}, tmp_path / side / "model.safetensors")
        sides.append(tmp_path / side)
    tau = pt.TaskVector.between(base=sides[0], reference=sides[1])
    p = torch.nn.Parameter(torch.zeros(n))
    optimizer = getattr(pt, kind)([("w", p)], tau, density=density, weight=0.1)
    for _ in range(2):
        p.grad = torch.randn(n)
        optimizer.step()
    resident = optimizer._tau.resident_bytes
    assert resident <= (0 if kind == "OnDARE" else 6 * density * n + 64)


positions = st.sets(st.integers(0, 30)).map(sorted)


@given(a=positions, b=positions)
def test_union(a: list[int], b: list[int]) -> None:
    x, y = torch.randn(31), torch.randn(31)
    index_a, index_b = torch.tensor(a, dtype=torch.int64), torch.tensor(b, dtype=torch.int64)
    alone, values_a, values_b = union(index_a, x[index_a], index_b, y[index_b])
    assert alone.tolist() == sorted(set(b) - set(a))
    together = torch.cat([index_a, alone])
    dense_a, dense_b = torch.zeros(31), torch.zeros(31)
    dense_a[index_a], dense_b[index_b] = x[index_a], y[index_b]
    assert torch.equal(values_a, dense_a[together])
    assert torch.equal(values_b, dense_b[together])
