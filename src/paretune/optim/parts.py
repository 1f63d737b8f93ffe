"""Which elements of a parameter this rank holds, and sums over the ranks that hold the others.

A parameter sharded by FSDP2 or tensor parallelism (a DTensor) is cut along one or two of its dimensions. Seen as a
matrix whose columns are what lies behind the last cut, a rank's part is some columns of some rows: for FSDP2's
``Shard(0)`` one contiguous range of the flat parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError

_ROWS = 1 << 19  # elements of whole rows that are cut at a time


@dataclass(frozen=True)
class Part:
    """A rank's elements of one parameter: ``columns`` of ``rows`` of a matrix of ``width`` columns.

    Args:
        whole: elements of the whole parameter.
        width: columns of the matrix.
        rows, columns: half-open ranges.
        groups: the process groups, one for each mesh dimension that cuts the parameter; () where nothing is cut.
        device: where these groups communicate.
    """

    whole: int
    width: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    groups: tuple[Any, ...] = ()
    device: str = "cpu"

    @property
    def n(self) -> int:
        """How many elements this rank holds."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])

    @property
    def sharded(self) -> bool:
        """Whether other ranks hold the rest."""
        return bool(self.groups)

    @property
    def contiguous(self) -> bool:
        """Whether the elements are one range of the flat parameter."""
        return self.columns == (0, self.width) or self.rows[1] - self.rows[0] <= 1

    @property
    def contiguous_everywhere(self) -> bool:
        """Whether that holds for every rank's elements, which then are in the order of their ranges."""
        return self.width == self.whole

    @property
    def range(self) -> tuple[int, int]:
        """The smallest range of the flat parameter that holds the elements."""
        if self.n == 0:
            start = min(self.whole, self.rows[0] * self.width + self.columns[0])
            return start, start
        return self.rows[0] * self.width + self.columns[0], (self.rows[1] - 1) * self.width + self.columns[1]

    def keep(self, positions: Tensor) -> Tensor:
        """Of ascending positions within `range`, those that are this rank's."""
        if self.contiguous:
            return positions
        column = positions % self.width
        return positions[(column >= self.columns[0]) & (column < self.columns[1])]

    def local(self, positions: Tensor) -> Tensor:
        """Where this rank's positions of the whole parameter are in its part."""
        if self.contiguous:
            return positions - self.range[0] if self.range[0] else positions
        row = positions // self.width
        held = self.columns[1] - self.columns[0]
        return (row - self.rows[0]) * held + (positions - row * self.width - self.columns[0])

    def whole_positions(self, local: Tensor) -> Tensor:
        """The reverse of `local`."""
        if self.contiguous:
            return local + self.range[0] if self.range[0] else local
        held = self.columns[1] - self.columns[0]
        row = local // held
        return (row + self.rows[0]) * self.width + (local - row * held + self.columns[0])

    def cut(self, read: Callable[[int, int], Tensor]) -> Tensor:
        """This rank's elements of what ``read(start, stop)`` gives for ranges of the flat parameter."""
        if self.contiguous:
            return read(*self.range)
        step = max(1, _ROWS // self.width)
        found = []
        for row in range(self.rows[0], self.rows[1], step):
            stop = min(self.rows[1], row + step)
            block = read(row * self.width, stop * self.width).view(stop - row, self.width)
            found.append(block[:, self.columns[0] : self.columns[1]].reshape(-1))
        return torch.cat(found)


def whole(n: int) -> Part:
    """A parameter that every rank holds whole.

    Example:
        >>> whole(6).range
        (0, 6)
    """
    return Part(n, n, (0, 1 if n else 0), (0, n))


def part_of(name: str, parameter: Tensor) -> Part:
    """Which elements of a parameter this rank holds.

    Raises:
        ArgumentError: a DTensor that is cut in a way that has no such form, or whose values are partial sums.
    """
    if not hasattr(parameter, "device_mesh"):
        known: Part | None = getattr(parameter, "paretune_part", None)  # a fragment of ZeRO's: `zero.pieces`
        return whole(parameter.numel()) if known is None else known
    mesh: Any = parameter.device_mesh
    dimensions = [getattr(placement, "dim", None) for placement in parameter.placements]  # type: ignore[attr-defined]
    cuts = sorted({dim for dim in dimensions if dim is not None})
    unknown = any(
        dim is None and not placement.is_replicate()
        for dim, placement in zip(dimensions, parameter.placements, strict=True)  # type: ignore[attr-defined]
    )
    if unknown or len(cuts) > 2 or (len(cuts) == 2 and cuts[0] != 0):
        mend = "this layout is not supported: shard dimension 0 (fully_shard), and at most one other (tensor parallel)"
        raise ArgumentError(name, parameter.placements, mend)  # type: ignore[attr-defined]
    held = {dim: (0, size) for dim, size in enumerate(parameter.shape)}
    # A strided shard is cut after the mesh dimensions behind it: FSDP2 over tensor parallelism of one dimension.
    order = sorted(range(mesh.ndim), key=lambda i: type(parameter.placements[i]).__name__ == "_StridedShard")  # type: ignore[attr-defined]
    for i in order:
        dim = dimensions[i]
        if dim is not None:
            low, high = held[dim]
            each = -(-(high - low) // mesh.size(i))
            start = min(high, low + each * mesh.get_local_rank(i))
            held[dim] = start, min(high, start + each)
    sizes = tuple(stop - start for start, stop in held.values())
    local = parameter.to_local()  # type: ignore[attr-defined]
    if sizes != tuple(local.shape):
        mend = f"this rank should hold {list(sizes)} of {list(parameter.shape)} but holds {list(local.shape)}"
        raise ArgumentError(name, parameter.placements, f"{mend}: this layout is not supported")  # type: ignore[attr-defined]
    groups = tuple(mesh.get_group(i) for i, dim in enumerate(dimensions) if dim is not None and mesh.size(i) > 1)
    last = cuts[-1] if cuts else 0
    behind = _product(parameter.shape[last + 1 :])
    width = parameter.shape[last] * behind if last else parameter.numel()
    if last == 0:  # a range of rows of the parameter is a range of columns of the one-row matrix
        low, high = held.get(0, (0, 1))
        filled = int(high > low and behind > 0)
        return Part(parameter.numel(), width, (0, filled), (low * behind, high * behind), groups, mesh.device_type)
    between = _product(parameter.shape[1:last])
    rows = (held[0][0] * between, held[0][1] * between)
    columns = (held[last][0] * behind, held[last][1] * behind)
    return Part(parameter.numel(), width, rows, columns, groups, mesh.device_type)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is.

    Args:
        tensor: a tensor or DTensor.

    Returns:
        A plain tensor.

    Example:
        >>> local(torch.ones(1))
        tensor([1.])
    """
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def any_nonzero(parameters: Iterable[Tensor]) -> bool:
    """Whether any gradient of these parameters has a non-zero element, on any rank."""
    graded = [(p, p.grad) for p in parameters if p.grad is not None]
    counts = [int(local(g).count_nonzero()) if g.layout == torch.strided else 1 for _, g in graded]
    parts = [part_of("gradient", p) for p, _ in graded]
    return bool(sums(parts, torch.tensor(counts, dtype=torch.int64).view(-1, 1)).any())


def sums(parts: Sequence[Part], values: Tensor) -> Tensor:
    """For each parameter the sum over all ranks that hold other elements of it: one all-reduce for all together.

    Args:
        parts: the parameters' parts, in the same order on all ranks.
        values: one row for each; a rank's own. Returned: on the values' device.
    """
    result = values.clone()
    for rows, groups, device in _together(parts):
        # gloo and NCCL each reduce on their own device only
        shared = values[rows].to(device)
        for group in groups:
            torch.distributed.all_reduce(shared, group=group)
        result[rows] = shared.to(values.device)
    return result


def gathered(parts: Sequence[Part], values: Tensor) -> list[Tensor]:
    """For each parameter the rows of all ranks that hold elements of it (ranks × columns), in no certain order."""
    result = [values[i : i + 1] for i in range(len(parts))]
    for rows, groups, device in _together(parts):
        shared = values[rows].to(device).unsqueeze(0)
        for group in groups:
            every = [torch.empty_like(shared) for _ in range(group.size())]
            torch.distributed.all_gather(every, shared, group=group)
            shared = torch.cat(every)
        for place, row in enumerate(rows):
            result[row] = shared[:, place].to(values.device)
    return result


def _together(parts: Sequence[Part]) -> Iterable[tuple[list[int], tuple[Any, ...], str]]:
    """Parameters whose ranks are the same, in the order of their first."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for i, part in enumerate(parts):
        if part.sharded:
            found.setdefault((part.groups, part.device), []).append(i)
    return [(rows, groups, device) for (groups, device), rows in found.items()]


def _product(sizes: Iterable[int]) -> int:
    n = 1
    for size in sizes:
        n *= size
    return n
