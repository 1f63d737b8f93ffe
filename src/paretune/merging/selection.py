"""The k largest magnitudes of a tensor that is never held whole: exact, with ties spread evenly.

The choice is that of `paretune.operators.largest`: of c entries that tie at the k-th magnitude and r still wanted,
those of rank ⌊i·c/r⌋ in index order. Magnitudes are compared as integers: the bits of |x|, whose order is theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .numbers import Bits

BLOCK = 1 << 16  # elements looked at together; ties are counted for each
HELD = 1 << 22  # a tensor of up to this many elements is partitioned in memory
_CANDIDATES = 1 << 22  # elements near the threshold that are kept before the histogram takes over
_RUN = 32  # elements at each place that the sample looks at
_SAMPLE = 1 << 14

Keys = Callable[[int, int], Bits]  # the magnitudes of a range, valid until the next call
Room = Callable[[str, int], Bits]  # memory for so many words, the same for the same name


def _new(name: str, n: int) -> Bits:
    return np.empty(n, np.uint32)


@dataclass(frozen=True)
class Cut:
    """Which entries are kept: magnitude above ``threshold``, and ``wanted`` of the ``tied`` ones that equal it.

    ``before[i]`` counts the tied ones before block i; None where all of them are kept.
    """

    threshold: int
    tied: int = 0
    wanted: int = 0
    before: NDArray[np.int64] | None = None


EVERYTHING = Cut(1)  # every entry but zeros, whose magnitude is 0


def find_cut(n: int, k: int, keys: Keys, room: Room = _new) -> Cut:
    """The cut that keeps the k largest of n magnitudes.

    Args:
        n: how many there are.
        k: how many are wanted.
        keys: computes magnitudes, as bits, where asked.
        room: gives two arrays of up to `HELD` words; new memory would cost more than the search.
    """
    if k >= n:
        return EVERYTHING
    if n <= HELD:
        held, order = room("held", n), room("order", n)
        for start in range(0, n, BLOCK):
            stop = min(n, start + BLOCK)
            held[start:stop] = keys(start, stop)
        np.copyto(order, held)
        return _cut(held, order, k)
    found = _threshold(n, k, keys)
    if found == 0:
        return EVERYTHING
    above, tied = 0, np.zeros(-(-n // BLOCK), np.int64)
    for block, start in enumerate(range(0, n, BLOCK)):
        part = keys(start, min(n, start + BLOCK))
        above += int(np.count_nonzero(part > found))
        tied[block] = np.count_nonzero(part == found)
    return _spread(found, k - above, tied)


def drop_below(bits: Bits, cut: Cut, start: int, magnitude: Bits) -> None:
    """Zero the entries that a cut drops, in place; ``magnitude`` becomes all ones where one is kept, else zero.

    Args:
        bits: the float32 entries ``start …``, as words.
        cut: from `find_cut`.
        start: a multiple of `BLOCK`.
        magnitude: as many words; overwritten.
    """
    np.bitwise_and(bits, np.uint32(0x7FFFFFFF), out=magnitude)
    if cut.before is not None:
        for begin in range(0, bits.size, BLOCK):
            place = np.flatnonzero(magnitude[begin : begin + BLOCK] == cut.threshold)
            rank = np.arange(place.size) + cut.before[(start + begin) // BLOCK]
            # rank t is kept if it is ⌊i·c/r⌋ for some i: the only candidate is i = ⌈t·r/c⌉
            i = -(-rank * cut.wanted // cut.tied)
            lost = (i >= cut.wanted) | (i * cut.tied // cut.wanted != rank)
            magnitude[begin + place[lost]] = 0
    # (threshold − 1 − |x|) is negative, its sign bit set, exactly where |x| ≥ threshold: an arithmetic shift
    # spreads it over a mask without a branch.
    signed = magnitude.view(np.int32)
    np.subtract(np.int32(cut.threshold - 1), signed, out=signed)
    np.right_shift(signed, 31, out=signed)
    np.bitwise_and(bits, magnitude, out=bits)


def kth_largest(keys: Bits, k: int) -> int:
    """The k-th largest of some words.

    Args:
        keys: not changed.
        k: from 1.
    """
    copy = keys.copy()
    copy.partition(keys.size - k)
    return int(copy[keys.size - k])


def _cut(held: Bits, order: Bits, k: int) -> Cut:
    """The cut of magnitudes that are at hand twice; ``order`` is put in another order."""
    order.partition(held.size - k)
    top = order[held.size - k :]
    threshold = int(top[0])
    if threshold == 0:
        return EVERYTHING
    above = int(np.count_nonzero(top > threshold))
    tied = np.empty(-(-held.size // BLOCK), np.int64)
    for block, start in enumerate(range(0, held.size, BLOCK)):
        tied[block] = np.count_nonzero(held[start : start + BLOCK] == threshold)
    return _spread(threshold, k - above, tied)


def _spread(threshold: int, wanted: int, tied: NDArray[np.int64]) -> Cut:
    total = int(tied.sum())
    if wanted == total:
        return Cut(threshold, total, wanted)
    return Cut(threshold, total, wanted, np.cumsum(tied) - tied)


def _threshold(n: int, k: int, keys: Keys) -> int:
    """The k-th largest magnitude: bracketed by a sample, found among the elements inside the bracket."""
    low, middle, high = _bracket(n, k, keys)
    above_high = above_middle = at_middle = inside = 0
    candidates: list[Bits] = []
    for start in range(0, n, BLOCK):
        part = keys(start, min(n, start + BLOCK))
        above_high += int(np.count_nonzero(part > high))
        greater = int(np.count_nonzero(part > middle))
        above_middle += greater
        at_middle += int(np.count_nonzero(part >= middle)) - greater
        if inside <= _CANDIDATES and low < high:
            # unsigned subtraction wraps what lies below the bracket to above it
            found = part[np.flatnonzero(part - np.uint32(low) <= high - low)]
            inside += found.size
            candidates.append(found)
    if above_middle < k <= above_middle + at_middle:
        return middle
    if inside <= _CANDIDATES and above_high < k <= above_high + inside:
        return kth_largest(np.concatenate(candidates), k - above_high)
    return _by_histogram(n, k, keys)


def _bracket(n: int, k: int, keys: Keys) -> tuple[int, int, int]:
    runs = _SAMPLE // _RUN * (1 if n < 1 << 26 else 8)
    places = np.linspace(0, n - _RUN, runs).astype(np.int64)
    sample = np.concatenate([keys(int(place), int(place) + _RUN).copy() for place in places])
    sample[::-1].sort()  # descending
    rank = sample.size * k / n
    slack = 6 * (rank * (1 - k / n)) ** 0.5 + 4  # runs are correlated: wider than independent draws would need

    def at(place: float) -> int:
        return int(sample[min(sample.size - 1, max(0, int(place)))])

    low = 0 if rank + slack >= sample.size else at(rank + slack)
    high = 0xFFFFFFFF if rank - slack < 0 else at(rank - slack)
    return low, at(rank), high


def _by_histogram(n: int, k: int, keys: Keys) -> int:
    """The k-th largest in two passes that count words by their high, then by their low half."""
    high = _histogram(n, keys, None)
    part, k = _reach(high, k)
    low = _histogram(n, keys, part)
    return (part << 16) | _reach(low, k)[0]


def _histogram(n: int, keys: Keys, high: int | None) -> NDArray[np.int64]:
    counts = np.zeros(1 << 16, np.int64)
    for start in range(0, n, BLOCK):
        part = keys(start, min(n, start + BLOCK))
        if high is None:
            counts += np.bincount(part >> 16, minlength=1 << 16)
        else:
            counts += np.bincount(part[part >> 16 == high] & 0xFFFF, minlength=1 << 16)
    return counts


def _reach(counts: NDArray[np.int64], k: int) -> tuple[int, int]:
    """The bin, counted from the top, in which the k-th lies, and which it is within that bin."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return counts.size - 1 - place, k - above
