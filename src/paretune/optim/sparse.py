"""Sparse vectors: a task vector of which only the kept entries are stored, and the union of two index lists."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import kept, largest, largest_streamed
from ..task_vector import TaskVector

_PAGE = 1 << 16


class SparseVector:
    """Positions and float32 values of the kept entries of a tensor: 6 bytes an entry.

    Positions are stored page by page (65,536 elements) in 16 bits, so that any tensor size costs the same.

    Args:
        index: ascending flat positions (int64).
        values: their values.
        n: how many elements the whole tensor has.
    """

    def __init__(self, index: Tensor, values: Tensor, n: int) -> None:
        self.n = n
        self.values = values
        self._local = (index % _PAGE - _PAGE // 2).to(torch.int16)
        self._counts = torch.bincount(index // _PAGE, minlength=(n + _PAGE - 1) // _PAGE).to(torch.int32)

    @property
    def index(self) -> Tensor:
        """The positions, ascending, as int64."""
        pages = torch.arange(self._counts.numel()).repeat_interleave(self._counts)
        return pages.mul_(_PAGE).add_(self._local).add_(_PAGE // 2)

    @property
    def resident_bytes(self) -> int:
        """Memory it holds."""
        return sum(t.numel() * t.element_size() for t in (self.values, self._local, self._counts))


def sparse_tau(tau: TaskVector, name: str, density: float) -> SparseVector:
    """F(τ) of one tensor by magnitude, with τ read in chunks and never held whole."""
    n = tau.numel(name)
    if density == 1:
        index = tau.dense(name).nonzero().view(-1)
    elif n <= _PAGE:
        index = largest(tau.dense(name), kept(density, n))
    else:
        index = largest_streamed(
            lambda start, stop: tau.dense(name, start, stop),
            lambda places: tau.gather(name, places),
            n,
            kept(density, n),
        )
    return SparseVector(index, tau.gather(name, index), n)


def union(index_a: Tensor, values_a: Tensor, index_b: Tensor, values_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two sparse vectors over common positions: ``(index, a, b)`` with zeros where one of them has no entry.

    Args:
        index_a, index_b: ascending positions (int64), each without repetition.
        values_a, values_b: their values.
    """
    if index_a.numel() == 0 or index_b.numel() == 0:
        index = torch.cat([index_a, index_b])
        a = torch.cat([values_a, torch.zeros_like(values_b, dtype=values_a.dtype)])
        return index, a, torch.cat([torch.zeros_like(values_a), values_b.to(values_a.dtype)])
    place = torch.searchsorted(index_a, index_b).clamp_(max=index_a.numel() - 1)
    shared = index_a[place] == index_b
    values_b = values_b.to(values_a.dtype)
    alone = values_b[~shared]
    b = torch.cat([torch.zeros_like(values_a), alone])
    b[place[shared]] = values_b[shared]
    return torch.cat([index_a, index_b[~shared]]), torch.cat([values_a, torch.zeros_like(alone)]), b
