"""Where a tensor's values come from: stored; plus a LoRA product; rows in another vocabulary's order."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import DTYPES, Checkpoint, TensorInfo
from .numbers import STORED, Floats, widen


class View(Protocol):
    """A tensor, flat, whose values are computed where they are asked for."""

    kind: str
    shape: tuple[int, ...]

    def fill(self, start: int, stop: int, out: Floats) -> None:
        """Write the elements ``start … stop−1`` to ``out`` as float32."""
        ...

    def release(self, start: int, stop: int) -> None:
        """Let the memory of these elements go; they can be read again."""
        ...


def numel(shape: tuple[int, ...]) -> int:
    """How many elements a shape has."""
    n = 1
    for size in shape:
        n *= size
    return n


class Stored:
    """A tensor of a checkpoint, memory-mapped."""

    def __init__(self, checkpoint: Checkpoint, info: TensorInfo) -> None:
        self.kind, self.shape, self.info = info.kind, info.shape, info
        self._checkpoint = checkpoint
        self._values: NDArray[Any] | None = None
        self._address: int | None = None

    @property
    def values(self) -> NDArray[Any]:
        """The stored numbers, flat."""
        if self._values is None:
            dtype = STORED.get(self.kind, DTYPES[self.kind][0])
            count = numel(self.shape)
            if count == 0:
                return np.empty(0, dtype)
            self._values = np.frombuffer(self._map, dtype, count=count, offset=self.info.start)
        return self._values

    def address(self, start: int) -> int:
        """Where in memory the element ``start`` is mapped."""
        if self._address is None:
            self._address = int(self.values.ctypes.data)
        return self._address + start * DTYPES[self.kind][1]

    @property
    def _map(self) -> mmap.mmap:
        return self._checkpoint.mapped(self.info.file)

    def fill(self, start: int, stop: int, out: Floats) -> None:
        widen(self.values[start:stop], self.kind, out)

    def release(self, start: int, stop: int) -> None:
        if not hasattr(mmap, "MADV_DONTNEED") or stop <= start:
            return
        size = DTYPES[self.kind][1]
        first = (self.info.start + start * size) // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, first, self.info.start + stop * size - first)


class Adapted:
    """A tensor plus a LoRA product: W + left·right, in float32.

    Args:
        stored: W.
        left: rows x rank, already scaled.
        right: rank x columns.
    """

    def __init__(self, stored: View, left: Floats, right: Floats) -> None:
        self.stored, self.left, self.right = stored, left, right
        self.kind, self.shape = stored.kind, stored.shape
        self._columns = right.shape[1]
        # The product is taken for whole groups of rows, so that it does not depend on which range is asked for.
        self._group = max(1, (1 << 16) // max(1, self._columns))

    def fill(self, start: int, stop: int, out: Floats) -> None:
        self.stored.fill(start, stop, out)
        if stop == start:
            return
        size = self._group * self._columns
        for group in range(start // size, (stop - 1) // size + 1):
            first = group * size
            product = (self.left[group * self._group : (group + 1) * self._group] @ self.right).reshape(-1)
            begin, end = max(start, first), min(stop, first + product.size)
            out[begin - start : end - start] += product[begin - first : end - first]

    def release(self, start: int, stop: int) -> None:
        self.stored.release(start, stop)


class Rows:
    """A tensor whose rows are those of another, picked by number; rows that it lacks come from further views.

    Args:
        shape: of the result.
        parts: for each output row which view it comes from, from 0.
        rows: for each output row its number there.
        views: the views that ``parts`` counts.
    """

    def __init__(
        self, shape: tuple[int, ...], parts: NDArray[np.int64], rows: NDArray[np.int64], views: Sequence[View]
    ) -> None:
        self.shape, self.kind, self.views = shape, views[0].kind, list(views)
        self._width = numel(shape[1:])
        # Runs of rows that follow one another in one view are read at once.
        breaks = np.flatnonzero((np.diff(parts) != 0) | (np.diff(rows) != 1)) + 1
        self._starts = np.concatenate([[0], breaks]).astype(np.int64)
        self._ends = np.append(self._starts[1:], shape[0])
        self._parts, self._rows = parts[self._starts], rows[self._starts]

    def fill(self, start: int, stop: int, out: Floats) -> None:
        width = self._width
        run = int(np.searchsorted(self._starts, start // width, side="right")) - 1 if width else 0
        at = start
        while at < stop:
            end = min(stop, int(self._ends[run]) * width)
            source = (int(self._rows[run]) - int(self._starts[run])) * width
            self.views[int(self._parts[run])].fill(at + source, end + source, out[at - start : end - start])
            at, run = end, run + 1

    def release(self, start: int, stop: int) -> None:
        for view in self.views:
            view.release(0, numel(view.shape))
