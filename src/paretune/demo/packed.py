"""Sequences side by side: short ones cost no more than their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Sequences side by side in fewer rows, none of which sees its neighbours.

    Args:
        order: which sequences, in the order of their tokens.
        source: [tokens, 2] each token's sequence and its place there.
        flat: [tokens] where it goes.
        positions: [rows, width] the tokens' places.
        mask: [rows, 1, width, width] bool: what each token attends to.
    """

    order: list[int]
    source: tuple[Tensor, Tensor]
    flat: Tensor
    positions: Tensor
    mask: Tensor

    @classmethod
    def of(cls, rows: Sequence[int], lengths: Sequence[int]) -> Packed:
        """Rows that hold two of the longest, filled by the longest that still fits.

        Args:
            rows: the sequences' numbers.
            lengths: how many of their tokens to take.

        Example:
            >>> import torch
            >>> Packed.of([0, 1, 2], [3, 1, 2]).take(torch.tensor([[1, 2, 3], [4, 0, 0], [5, 6, 0]]))
            tensor([[1, 2, 3, 5, 6, 4]])
        """
        import torch

        width = 2 * max(lengths)
        taken: list[int] = []
        order, starts, sizes = [], [], []
        for length, row in sorted(zip(lengths, rows, strict=True), reverse=True):
            bin_ = next((number for number, used in enumerate(taken) if used + length <= width), len(taken))
            taken += [0] * (bin_ == len(taken))
            order.append(row)
            starts.append(bin_ * width + taken[bin_])
            sizes.append(length)
            taken[bin_] += length
        # In the order of the tokens.
        by_start = sorted(range(len(order)), key=starts.__getitem__)
        order, starts, sizes = ([each[i] for i in by_start] for each in (order, starts, sizes))
        size = torch.tensor(sizes)
        place = torch.arange(int(size.sum())) - (size.cumsum(0) - size).repeat_interleave(size)
        flat = torch.tensor(starts).repeat_interleave(size) + place
        positions, owner = (torch.zeros(len(taken) * width, dtype=torch.long) for _ in range(2))
        positions[flat] = place
        owner[flat] = torch.tensor(order).repeat_interleave(size) + 1
        owner = owner.view(-1, width)
        mask = (owner[:, :, None] == owner[:, None, :]) & torch.ones(width, width, dtype=torch.bool).tril()
        source = (torch.tensor(order).repeat_interleave(size), place)
        return cls(order, source, flat, positions.view(-1, width), mask[:, None])

    def take(self, values: Tensor) -> Tensor:
        """Values by sequence and place, [sequences, length], packed; zeros elsewhere."""
        found = values.new_zeros(self.positions.numel())
        found[self.flat] = values[self.source]
        return found.view(self.positions.shape)
