"""The k largest magnitudes of a tensor that is never held whole: exact, with ties spread evenly.

The choice is that of `paretune.operators.largest`: of c entries that tie at the k-th magnitude and r still wanted,
those of rank ⌊i·c/r⌋ in index order. Magnitudes are compared as integers: the bits of |x|, whose order is theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .numbers import Bits

BLOCK = 1 << 16  # elements looked at together; ties are counted for each
ROOM = 1 << 22  # elements near the threshold that are kept before the histogram takes over
_SMALL = 1 << 13  # up to this many elements all are kept
_RUN = 32  # elements at each place that the sample looks at
_SAMPLE = 1 << 16  # elements of a large tensor that the sample looks at, and 1/64 of a smaller one
_HIGHEST = 0x7FFFFFFF
_MAGNITUDE = np.uint32(_HIGHEST)

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Cut:
    """Which entries are kept: magnitude above ``threshold``, and ``wanted`` of the ``tied`` ones that equal it.

    ``before[i]`` counts the tied ones before block i; None where all of them are kept.
    """

    threshold: int
    tied: int = 0
    wanted: int = 0
    before: Counts | None = None

    def drop(self, bits: Bits, start: int, kept: Bits, shift: Bits) -> None:
        """Zero the entries that are dropped, in place; ``kept`` becomes all ones where one is kept, else zero.

        Args:
            bits: the float32 entries ``start …``, as words.
            start: a multiple of `BLOCK`.
            kept: as many words; overwritten.
            shift: not used.
        """
        np.bitwise_and(bits, _MAGNITUDE, out=kept)
        if self.before is not None:
            for begin in range(0, bits.size, BLOCK):
                place = np.flatnonzero(kept[begin : begin + BLOCK] == self.threshold)
                rank = np.arange(place.size) + self.before[(start + begin) // BLOCK]
                # rank t is kept if it is ⌊i·c/r⌋ for some i: the only candidate is i = ⌈t·r/c⌉
                i = -(-rank * self.wanted // self.tied)
                lost = (i >= self.wanted) | (i * self.tied // self.wanted != rank)
                kept[begin + place[lost]] = 0
        # (threshold − 1 − |x|) is negative, its sign bit set, exactly where |x| ≥ threshold: an arithmetic shift
        # spreads it over a mask without a branch.
        signed = kept.view(np.int32)
        np.subtract(np.int32(self.threshold - 1), signed, out=signed)
        np.right_shift(signed, 31, out=signed)
        np.bitwise_and(bits, kept, out=bits)


EVERYTHING = Cut(1)  # every entry but zeros, whose magnitude is 0


class Magnitudes(Protocol):
    """The magnitudes of a tensor of n elements, as words, read where they are asked for."""

    n: int
    largest: int  # that `bracket` has met

    def sample(self, places: Counts, run: int) -> Bits:
        """A copy of ``run`` magnitudes at each of some places."""
        ...

    def bracket(self, low: int, middle: int, high: int) -> tuple[Counts, Bits]:
        """Which magnitudes are about ``middle``.

        Returns:
            for each block how many are above ``high``, above ``middle``, equal to it, and how many others are in
            low … high; and these others themselves, or some of them if they are more than `ROOM`.
        """
        ...

    def count(self, threshold: int) -> Counts:
        """For each block how many are above a threshold, and how many equal it."""
        ...

    def histogram(self, high: int | None) -> Counts:
        """How often each high half of a word occurs, or each low half of the words that have this high half."""
        ...


def find_cut(magnitudes: Magnitudes, k: int) -> Cut:
    """The cut that keeps the k largest magnitudes."""
    n = magnitudes.n
    if k >= n:
        return EVERYTHING
    low, middle, high = (0, 0, _HIGHEST) if n <= _SMALL else _bracket(magnitudes, k)
    counts, others = magnitudes.bracket(low, middle, high)
    above_high, above, at, inside = map(int, counts.sum(0))
    if above < k <= above + at:
        return _spread(middle, k - above, counts[:, 2])
    if not above_high < k <= above_high + inside + at or inside > others.size:
        return _by_histogram(magnitudes, k)
    rank = k - above_high - (at if k > above else 0)
    threshold = kth_largest(others, rank)
    ties = np.flatnonzero(others == threshold)
    blocks = np.searchsorted(np.cumsum(counts[:, 3]), ties, side="right")
    tied = np.bincount(blocks, minlength=len(counts))
    greater = int(np.count_nonzero(others > threshold))
    return _spread(threshold, rank - greater, tied)


def kth_largest(words: Bits, k: int) -> int:
    """The k-th largest of some words, from 1; puts them in no other order."""
    copy = words.copy()
    copy.partition(words.size - k)
    return int(copy[words.size - k])


def _spread(threshold: int, wanted: int, tied: Counts) -> Cut:
    if threshold == 0:
        return EVERYTHING
    total = int(tied.sum())
    if wanted == total:
        return Cut(threshold, total, wanted)
    return Cut(threshold, total, wanted, np.cumsum(tied) - tied)


def _bracket(magnitudes: Magnitudes, k: int) -> tuple[int, int, int]:
    """Three magnitudes: the k-th most probably lies between the outer ones, and equals the middle one if many tie."""
    n = magnitudes.n
    runs = max(_SMALL, min(_SAMPLE, n // 64) * (1 if n < 1 << 26 else 4)) // _RUN
    sample = magnitudes.sample(np.linspace(0, n - _RUN, runs).astype(np.int64), _RUN)
    sample[::-1].sort()  # descending
    rank = sample.size * k / n
    slack = 6 * (rank * (1 - k / n)) ** 0.5 + 4  # runs are correlated: wider than independent draws would need

    def at(place: float) -> int:
        return int(sample[min(sample.size - 1, max(0, int(place)))])

    low = 0 if rank + slack >= sample.size else at(rank + slack)
    high = _HIGHEST if rank - slack < 0 else at(rank - slack)
    return low, at(rank), high


def _by_histogram(magnitudes: Magnitudes, k: int) -> Cut:
    """In two passes that count words by their high, then by their low half, and one that counts ties."""
    part, rest = _reach(magnitudes.histogram(None), k)
    threshold = (part << 16) | _reach(magnitudes.histogram(part), rest)[0]
    counts = magnitudes.count(threshold)
    return _spread(threshold, k - int(counts[:, 0].sum()), counts[:, 1])


def _reach(counts: Counts, k: int) -> tuple[int, int]:
    """The bin, counted from the top, in which the k-th lies, and which it is within that bin."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return counts.size - 1 - place, k - above


class Scan:
    """`Magnitudes` by numpy.

    Args:
        n: how many there are.
        keys: computes the magnitudes ``start … stop−1``, valid until the next call.
    """

    def __init__(self, n: int, keys: Callable[[int, int], Bits]) -> None:
        self.n, self.largest, self._keys = n, 0, keys
        self._blocks = [(start, min(n, start + BLOCK)) for start in range(0, n, BLOCK)]

    def sample(self, places: Counts, run: int) -> Bits:
        return np.concatenate([self._keys(int(place), int(place) + run).copy() for place in places])

    def bracket(self, low: int, middle: int, high: int) -> tuple[Counts, Bits]:
        counts = np.zeros((len(self._blocks), 4), np.int64)
        others: list[Bits] = [np.empty(0, np.uint32)]
        inside = 0
        for row, (start, stop) in zip(counts, self._blocks, strict=True):
            part = self._keys(start, stop)
            self.largest = max(self.largest, int(part.max()))
            greater = int(np.count_nonzero(part > middle))
            at = int(np.count_nonzero(part >= middle)) - greater
            # unsigned subtraction wraps what lies below the bracket to above it
            found = part[np.flatnonzero(part - np.uint32(low) <= high - low)]
            row[:] = np.count_nonzero(part > high), greater, at, found.size - at
            inside += found.size - at
            if inside <= ROOM:
                others.append(found[found != middle] if at else found)
        return counts, np.concatenate(others)

    def count(self, threshold: int) -> Counts:
        counts = np.zeros((len(self._blocks), 2), np.int64)
        for row, (start, stop) in zip(counts, self._blocks, strict=True):
            part = self._keys(start, stop)
            row[:] = np.count_nonzero(part > threshold), np.count_nonzero(part == threshold)
        return counts

    def histogram(self, high: int | None) -> Counts:
        counts = np.zeros(1 << 16, np.int64)
        for start, stop in self._blocks:
            part = self._keys(start, stop)
            if high is not None:
                part = part[part >> 16 == high] & 0xFFFF
            counts += np.bincount(part if high is not None else part >> 16, minlength=1 << 16)
        return counts
