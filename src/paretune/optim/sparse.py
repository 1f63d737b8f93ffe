"""Sparse vectors: a task vector of which only the kept entries are stored, and the union of two index lists."""

from __future__ import annotations

import torch
from torch import Tensor

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
        self.local = (index % _PAGE - _PAGE // 2).to(torch.int16)
        self.pages = torch.bincount(index // _PAGE, minlength=(n + _PAGE - 1) // _PAGE).to(torch.int32)

    @property
    def index(self) -> Tensor:
        """The positions, ascending, as int64."""
        pages = torch.arange(self.pages.numel()).repeat_interleave(self.pages)
        return pages.mul_(_PAGE).add_(self.local).add_(_PAGE // 2)

    @property
    def resident_bytes(self) -> int:
        """Memory it holds."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.local, self.pages))


def union(index_a: Tensor, values_a: Tensor, index_b: Tensor, values_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two sparse vectors over common positions: those of a, then those of b alone.

    Args:
        index_a, index_b: ascending positions (int64), each without repetition.
        values_a, values_b: their values.

    Returns:
        ``(alone, a, b)``: the positions of b that a lacks, ascending; and both vectors' values over the positions
        ``[index_a, alone]``, zero where one of them has no entry.
    """
    values_b = values_b.to(values_a.dtype)
    if index_a.numel() == 0:
        return index_b, torch.zeros_like(values_b), values_b
    place = torch.searchsorted(index_a, index_b).clamp_(max=index_a.numel() - 1)
    shared = index_a[place] == index_b
    alone = ~shared
    own = torch.zeros_like(values_a)
    own[place[shared]] = values_b[shared]
    rest = values_b[alone]
    return index_b[alone], torch.cat([values_a, torch.zeros_like(rest)]), torch.cat([own, rest])
