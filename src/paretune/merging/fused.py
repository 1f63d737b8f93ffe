"""The arithmetic of every method by compiled kernels, which read stored numbers where they are mapped."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..native import ALL, KINDS, MAGNITUDE, RANDOM, TILE, Keep, Range, Result, Source
from .arithmetic import Ready, Releaser, Sums
from .masks import Mask
from .methods import MergeMethod
from .numbers import STORED, Bits
from .plan import Part
from .selection import BLOCK, ROOM, Counts
from .views import Stored, View, numel

_PLACES = 256  # of a sample, before memory is let go: each makes its neighbourhood resident
_CHUNK = 1 << 18  # elements: enough to forget the cost of a call, few enough for the results to stay in the cache


class Fused:
    """`paretune.merging.arithmetic.Arithmetic` by `paretune.native`.

    Args:
        library: from `paretune.native.kernels`.
        rule: the method.
        careful: NaN may occur.
        chunk: elements of a range at most.
    """

    def __init__(
        self, library: ctypes.CDLL, rule: MergeMethod, *, careful: bool = False, chunk: int | None = None
    ) -> None:
        self._library, self.rule, self.careful = library, rule, careful
        self.chunk = chunk or _CHUNK
        self._call: _Call | None = None
        self._filled: dict[int, NDArray[np.float32]] = {}
        self._scratch = np.empty(0, np.float32)
        self._room = np.empty(0, np.uint32)
        self._memory: list[NDArray[np.uint8]] = []

    def load(self, part: Part, ready: tuple[Ready, ...], start: int, stop: int) -> list[int]:
        call = self._call
        if call is None or call.ready is not ready:
            call = self._call = self._new_call(part, ready, [])
        call.run(self._library, self._sources(part.views, start, stop), start, stop)
        return call.largest[: len(part.sources)].tolist()

    def result(self, number: int) -> tuple[NDArray[Any], int]:
        if self._call is None:
            raise TypeError("load comes first")
        call = self._call
        return call.outputs[number][: call.n], int(call.largest[call.count + number])

    def into(self, part: Part, ready: Ready, address: int) -> None:
        """Compute one result of a whole tensor where it is wanted.

        Args:
            address: of the first element; the memory is as `Part.kind` says.
        """
        call = self._new_call(part, (ready,), [address])
        size = np.dtype(STORED[part.kind]).itemsize
        for start in range(0, part.numel, self.chunk):
            stop = min(part.numel, start + self.chunk)
            call.aim(address + start * size)
            call.run(self._library, self._sources(part.views, start, stop), start, stop)

    def products(self, part: Part, start: int, stop: int, lanes: Sums) -> None:
        sources = self._sources(part.views, start, stop)  # held until the call is over
        area = self._range(part, sources, start, stop)
        self._library.paretune_products(ctypes.addressof(area), lanes.ctypes.data)

    def norms(self, part: Part, ready: Ready, start: int, stop: int, lanes: Sums) -> None:
        sources = self._sources(part.views, start, stop)
        area = self._range(part, sources, start, stop)
        keep, ranks = _keep(ready), np.zeros(len(part.sources), np.int64)
        self._library.paretune_norms(
            ctypes.addressof(area), ctypes.addressof(keep), ranks.ctypes.data, lanes.ctypes.data
        )

    def magnitudes(self, source: View, base: View) -> FusedScan:
        if not self._room.size:
            self._room = np.empty(ROOM, np.uint32)
        return FusedScan(self, source, base)

    def _sources(self, views: Sequence[View], start: int, stop: int) -> ctypes.Array[Source]:
        """Where the elements of a range lie; those that are computed are computed now."""
        found = (Source * len(views))()
        for number, view in enumerate(views):
            if isinstance(view, Stored):
                found[number] = Source(view.address(start), KINDS[view.kind])
                continue
            buffer = self._filled.get(number)
            if buffer is None or buffer.size < stop - start:
                buffer = self._filled[number] = np.empty(max(self.chunk, stop - start), np.float32)
            for begin in range(start, stop, BLOCK):
                end = min(stop, begin + BLOCK)
                view.fill(begin, end, buffer[begin - start : end - start])
            found[number] = Source(buffer.ctypes.data, KINDS["F32"])
        return found

    def _range(self, part: Part, sources: ctypes.Array[Source], start: int, stop: int) -> Range:
        count = len(part.sources)
        if self._scratch.size < (3 * count + 6) * TILE:
            self._scratch = np.empty((3 * count + 6) * TILE, np.float32)
        return Range(
            sources=ctypes.addressof(sources),
            count=count,
            based=part.base is not None,
            start=start,
            n=stop - start,
            kind=KINDS[part.kind],
            election=self.rule.family == "election",
            careful=self.careful,
            scratch=self._scratch.ctypes.data,
        )

    def _outputs(self, part: Part, count: int) -> list[NDArray[Any]]:
        """Memory for the results of a range, used again: new memory would cost more than filling it."""
        dtype = np.dtype(STORED[part.kind])
        size = min(self.chunk, part.numel)
        while len(self._memory) < count:
            self._memory.append(np.empty(0, np.uint8))
        for number in range(count):
            if self._memory[number].size < size * dtype.itemsize:
                self._memory[number] = np.empty(self.chunk * dtype.itemsize, np.uint8)
        return [memory[: size * dtype.itemsize].view(dtype) for memory in self._memory[:count]]

    def _new_call(self, part: Part, ready: tuple[Ready, ...], addresses: list[int]) -> _Call:
        outputs: list[NDArray[Any]] = []
        if not addresses:
            outputs = self._outputs(part, len(ready))
            addresses = [output.ctypes.data for output in outputs]
        area = self._range(part, (Source * 0)(), 0, 0)  # each run says where its sources are
        return _Call(area, ready, outputs, addresses, sparse=self.rule.sparsify is not None)


class _Call:
    """The arguments of a merge, made once for a tensor."""

    def __init__(
        self,
        area: Range,
        ready: tuple[Ready, ...],
        outputs: list[NDArray[Any]],
        addresses: list[int],
        *,
        sparse: bool,
    ) -> None:
        self.ready, self.outputs, self.count, self.n = ready, outputs, area.count, 0
        self._area = area
        self._held: list[Any] = []  # what the structures point to
        self._results = (Result * len(ready))()
        for result, each, address in zip(self._results, ready, addresses, strict=True):
            coefficients, weights = np.array(each.coefficients), np.array(each.weights, np.float32)
            keep = _keep(each) if sparse else None
            self._held += [coefficients, weights, keep]
            result.coefficients, result.weights = coefficients.ctypes.data, weights.ctypes.data
            result.keep = None if keep is None else ctypes.addressof(keep)
            result.out, result.scale, result.normalize = address, each.scale, each.normalize
        self.largest = np.zeros(self.count + len(ready), np.uint32)
        self._ranks = np.zeros(self.count * len(ready), np.int64)
        self._pointers = [ctypes.addressof(area), ctypes.addressof(self._results), len(ready)]
        self._pointers += [self._ranks.ctypes.data, self.largest.ctypes.data]

    def aim(self, address: int) -> None:
        """Put the only result there."""
        self._results[0].out = address

    def run(self, library: ctypes.CDLL, sources: ctypes.Array[Source], start: int, stop: int) -> None:
        self._area.sources, self._area.start, self._area.n = ctypes.addressof(sources), start, stop - start
        self.n = stop - start
        library.paretune_merge(*self._pointers)


def _keep(ready: Ready) -> ctypes.Array[Keep]:
    found = (Keep * len(ready.keep))()
    for slot, choice in zip(found, ready.keep, strict=True):
        if choice is None:
            slot.how = ALL
        elif isinstance(choice, Mask):
            slot.how, slot.key, slot.limit = RANDOM, choice.key, choice.limit
        else:
            slot.how, slot.threshold, slot.tied, slot.wanted = MAGNITUDE, choice.threshold, choice.tied, choice.wanted
            slot.before = None if choice.before is None else choice.before.ctypes.data
    return found


class FusedScan:
    """`paretune.merging.selection.Magnitudes` by `paretune.native`."""

    def __init__(self, fused: Fused, source: View, base: View) -> None:
        self.n, self.largest = numel(source.shape), 0
        self._fused, self._views = fused, (source, base)

    def sample(self, places: Counts, run: int) -> Bits:
        found = np.empty(places.size * run, np.uint32)
        if all(isinstance(view, Stored) for view in self._views):
            pair = self._fused._sources(self._views, 0, 0)
            for first in range(0, places.size, _PLACES):
                group, out = places[first : first + _PLACES], found[first * run :]
                self._fused._library.paretune_sample(
                    ctypes.addressof(pair), group.ctypes.data, group.size, run, out.ctypes.data
                )
                for view in self._views:
                    view.release(int(group[0]), int(group[-1]) + run)
            return found
        start = np.zeros(1, np.int64)
        for number, place in enumerate(places.tolist()):
            pair, out = self._fused._sources(self._views, place, place + run), found[number * run :]
            self._fused._library.paretune_sample(ctypes.addressof(pair), start.ctypes.data, 1, run, out.ctypes.data)
        return found

    def bracket(self, low: int, middle: int, high: int) -> tuple[Counts, Bits]:
        room, inside = self._fused._room, 0
        counts = np.zeros((-(-self.n // BLOCK), 4), np.int64)
        for start, stop, pair in self._ranges():
            rows = counts[start // BLOCK : -(-stop // BLOCK)]
            used = min(inside, room.size)
            largest = self._fused._library.paretune_bracket(
                ctypes.addressof(pair),
                stop - start,
                low,
                middle,
                high,
                rows.ctypes.data,
                room[used:].ctypes.data,
                room.size - used,
            )
            self.largest = max(self.largest, largest)
            inside += int(rows[:, 3].sum())
        # A tile for which there might be no room is not copied.
        return counts, room[: inside if inside <= room.size - TILE else 0]

    def count(self, threshold: int) -> Counts:
        counts = np.zeros((-(-self.n // BLOCK), 2), np.int64)
        for start, stop, pair in self._ranges():
            rows = counts[start // BLOCK :]
            self._fused._library.paretune_count(ctypes.addressof(pair), stop - start, threshold, rows.ctypes.data)
        return counts

    def histogram(self, high: int | None) -> Counts:
        counts = np.zeros(1 << 16, np.int64)
        wanted = -1 if high is None else high
        for start, stop, pair in self._ranges():
            self._fused._library.paretune_histogram(ctypes.addressof(pair), stop - start, wanted, counts.ctypes.data)
        return counts

    def _ranges(self) -> Any:
        release = Releaser(self._views)
        for start in range(0, self.n, self._fused.chunk):
            stop = min(self.n, start + self._fused.chunk)
            yield start, stop, self._fused._sources(self._views, start, stop)
            release(start, stop)
