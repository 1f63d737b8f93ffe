"""A rank's part of a parameter against slices of the whole; the global k-th magnitude against the local one."""

from __future__ import annotations

import itertools
import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paretune.operators import bernoulli_mask, largest, sampled_indices, sampled_indices_of
from paretune.optim import threshold as module
from paretune.optim.parts import Part, whole
from paretune.optim.rule import DenseUpdate
from paretune.optim.threshold import Wanted, thresholds

SIZES = st.tuples(st.integers(1, 7), st.integers(1, 9))


@given(size=SIZES, ends=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)))
def test_positions_and_cuts(size: tuple[int, int], ends: tuple[float, float, float, float]) -> None:
    rows = sorted(int(e * size[0]) for e in ends[:2])
    columns = sorted(int(e * size[1]) for e in ends[2:])
    part = Part(size[0] * size[1], size[1], (rows[0], rows[1]), (columns[0], columns[1]), ("group",))
    positions = torch.arange(part.whole).view(size)[rows[0] : rows[1], columns[0] : columns[1]].reshape(-1)
    assert part.n == positions.numel()
    assert torch.equal(part.whole_positions(torch.arange(part.n)), positions)
    assert torch.equal(part.local(positions), torch.arange(part.n))
    start, stop = part.range
    assert torch.equal(part.keep(torch.arange(start, stop)), positions)
    values = torch.rand(part.whole)
    assert torch.equal(part.cut(lambda i, j: values[i:j]), values[positions])


@given(
    sizes=st.lists(st.integers(0, 200_000), min_size=1, max_size=4),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    density=st.sampled_from([5e-4, 0.03, 0.3]),
)
def test_masks_of_ranges_are_cut_from_the_whole(sizes: list[int], cut: tuple[float, float], density: float) -> None:
    ranges = [(int(min(cut) * n), int(max(cut) * n)) for n in sizes]
    keys = list(range(len(sizes)))
    for key, n, (start, stop), got in zip(
        keys, sizes, ranges, sampled_indices_of(keys, sizes, density, ranges=ranges), strict=True
    ):
        full = sampled_indices(key, n, density)
        assert torch.equal(got, full[(full >= start) & (full < stop)])
        assert torch.equal(bernoulli_mask(key, n, density, start, stop).nonzero().view(-1) + start, got)


def _values(kind: str, n: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
    if kind == "tied":
        return (x * 1.3).round()
    if kind == "equal":
        return torch.ones_like(x)
    if kind == "wild":
        x[::3] = 0
        x[1::50], x[2::70], x[5::90] = math.nan, math.inf, -math.inf
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["smooth", "tied", "equal", "wild"])
def test_threshold_of_many_ranks_keeps_what_one_keeps(kind: str, dtype: torch.dtype) -> None:
    """The ranks take turns: their exchanges are answered with what all of them would have sent."""
    for n, ranks in itertools.product((1, 7, 1000, 100_000), (1, 2, 3)):
        x = _values(kind, n, dtype)
        ends = [n * r // ranks for r in range(ranks + 1)]
        parts = [Part(n, n, (0, 1), (i, j)) for i, j in itertools.pairwise(ends)]
        for k in sorted({1, max(1, n // 20), max(1, n // 2), n}):
            wants = [Wanted(DenseUpdate(x[p.range[0] : p.range[1]]), p, k, dtype == torch.float64) for p in parts]
            chosen = [t.select(w.source) for t, w in zip(_agreed(wants), wants, strict=True)]
            index = torch.cat([i + p.range[0] for (i, _), p in zip(chosen, parts, strict=True)])
            assert torch.equal(index, largest(x, k))
            assert torch.equal(torch.cat([v for _, v in chosen]), x[index]) or kind == "wild"


def _agreed(wants: list[Wanted]) -> list[module.Threshold]:
    """Threshold of each rank: exchange after exchange, all ranks compute, then all get the sum."""
    sent: list[list[Tensor]] = []  # for each exchange, what each rank sends

    def run(rank: int, known: int) -> module.Threshold | Tensor:
        at = itertools.count()

        class Waiting(Exception):
            pass

        def answer(parts: object, values: Tensor, together: object) -> object:
            i = next(at)
            if i == known:
                waiting.append(values)
                raise Waiting
            return together(sent[i])

        waiting: list[Tensor] = []
        with (
            mock.patch.object(module, "sums", lambda p, v: answer(p, v, lambda all_: torch.stack(all_).sum(0))),
            mock.patch.object(module, "gathered", lambda p, v: answer(p, v, lambda all_: [torch.cat(all_)])),
        ):
            try:
                return thresholds([wants[rank]])[0]
            except Waiting:
                return waiting[0]

    for known in itertools.count():
        results = [run(rank, known) for rank in range(len(wants))]
        if isinstance(results[0], module.Threshold):
            return [r for r in results if isinstance(r, module.Threshold)]
        sent.append([r for r in results if isinstance(r, Tensor)])
    raise AssertionError


def test_whole() -> None:
    part = whole(6)
    assert (part.n, part.range, part.sharded, part.contiguous) == (6, (0, 6), False, True)
    assert whole(0).range == (0, 0)
