"""The exact k-th magnitude of parameters of which every rank holds a part, in three exchanges for all together.

Magnitudes are compared as integers (the bits of |x|). Two all-reduces of histograms fix the upper bits of the k-th
magnitude; in the third exchange every rank tells how often it has each of the few values that are left, which also
says how many ties lie on the ranks before it. So the same entries are kept on any number of ranks.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..operators import Source, magnitude_keys
from .parts import Part, gathered, sums

_CHUNK = {"cpu": 1 << 16}  # elements looked at a time: the scratch stays in the cache …
_DEVICE_CHUNK = 1 << 24  # … which matters on the CPU only
_FEW = 24  # up to one element in so many is kept between passes: a sixth of a byte a parameter


class Wanted(NamedTuple):
    """The k largest of a parameter are wanted; ``source`` is this rank's ``part`` of it, ``wide`` if it is float64."""

    source: Source
    part: Part
    k: int
    wide: bool


@dataclass(frozen=True)
class Threshold:
    """The k-th magnitude of a whole parameter.

    Args:
        key: its bits.
        ties: how many elements have this magnitude.
        kept: how many of these are among the k.
        before: how many of these lie on ranks that hold earlier elements.
        wide: whether the bits are those of a float64.
    """

    key: int
    ties: int
    kept: int
    before: int
    wide: bool

    def select(self, source: Source) -> tuple[Tensor, Tensor]:
        """This rank's positions and values among the k; ties as `paretune.operators.Magnitude` spreads them."""
        nothing = source.slice(0, 0)
        positions, kept = [torch.empty(0, dtype=torch.int64, device=nothing.device)], [nothing]
        before = self.before
        for start, candidates, values in _at_least(source, self.key, self.wide):
            keys = magnitude_keys(values)
            take = keys > self.key
            if self.key > 0:
                tied = (keys == self.key).nonzero().view(-1)
                rank = torch.arange(before, before + tied.numel(), device=tied.device)
                before += tied.numel()
                # Kept are the ranks ⌊i·c/r⌋, i = 0 … r−1: a rank is one of them if it is that of i = ⌈rank·r/c⌉.
                i = (rank * self.kept + self.ties - 1) // max(1, self.ties)
                take[tied[(i < self.kept) & (i * self.ties // max(1, self.kept) == rank)]] = True
            chosen = take.nonzero().view(-1)
            kept.append(values[chosen])
            positions.append((chosen if candidates is None else candidates[chosen]).add_(start))
        return torch.cat(positions), torch.cat(kept)


def thresholds(wanted: Sequence[Wanted]) -> list[Threshold]:
    """The k-th magnitude of each; float64 parameters need three exchanges more than all others."""
    result: list[Threshold | None] = [None] * len(wanted)
    for wide in (False, True):
        chosen = [i for i, want in enumerate(wanted) if want.wide == wide]
        if chosen:
            for i, threshold in zip(chosen, _thresholds([wanted[i] for i in chosen], wide), strict=True):
                result[i] = threshold
    return [threshold for threshold in result if threshold is not None]


def _thresholds(wanted: Sequence[Wanted], wide: bool) -> Iterator[Threshold]:
    parts = [want.part for want in wanted]
    left = torch.tensor([want.k for want in wanted])  # how many are still wanted at or below the prefix
    prefix = torch.zeros(len(wanted), dtype=torch.int64)
    inside: dict[int, Tensor] = {}
    bits = 63 if wide else 31
    each = digit_bits(max((math.prod(group.size() for group in part.groups) for part in parts), default=1))
    while bits > each:
        bits -= each
        counts = sums(parts, _histograms(wanted, prefix, bits, each, inside))
        left, prefix = descend(counts, left, prefix, each)
    own = _histograms(wanted, prefix, 0, bits, inside)
    begins = torch.tensor([part.range[0] for part in parts]).unsqueeze(1)
    everyone = gathered(parts, torch.cat([begins, own], 1))
    counts = torch.stack([rows[:, 1:].sum(0) for rows in everyone])
    left, key = descend(counts, left, prefix, bits)
    for i, (want, rows) in enumerate(zip(wanted, everyone, strict=True)):
        at = 1 + (int(key[i]) & ((1 << bits) - 1))
        earlier = rows[:, 0] < int(begins[i])
        ties, before = int(rows[:, at].sum()), int(rows[earlier, at].sum())
        yield Threshold(int(key[i]), ties, int(left[i]), before, want.wide)


def digit_bits(ranks: int) -> int:
    """Bits that an all-reduce fixes: more ranks, so more to tell in the third exchange, want wider histograms.

    Example:
        >>> [(ranks, digit_bits(ranks), 31 - 2 * digit_bits(ranks)) for ranks in (8, 64, 1024)]
        [(8, 11, 9), (64, 12, 7), (1024, 13, 5)]
    """
    return 11 if ranks <= 16 else 12 if ranks <= 128 else 13


def _histograms(wanted: Sequence[Wanted], prefix: Tensor, shift: int, bits: int, inside: dict[int, Tensor]) -> Tensor:
    """How many of this rank's magnitudes have the prefix and then each value of the next ``bits`` bits.

    ``inside`` keeps those that have the prefix, once they are few, so that no later digit needs another pass.
    """
    counts = torch.zeros(len(wanted), 1 << bits, dtype=torch.int64)
    for row, want in enumerate(wanted):
        first, limit = int(prefix[row]) << (shift + bits), want.source.n // _FEW
        chunks = (inside[row],) if row in inside else (v for _, _, v in _at_least(want.source, first, want.wide))
        total: Tensor | None = None
        found: list[Tensor] = []
        size = 0
        for values in chunks:
            keys = values if row in inside else magnitude_keys(values)
            keys = keys[(keys >> (shift + bits)) == int(prefix[row])]
            size += keys.numel()
            if first and size <= limit:
                found.append(keys)
            here = torch.bincount((keys >> shift) & ((1 << bits) - 1), minlength=1 << bits)
            total = here if total is None else total.add_(here)
        if found and size <= limit:
            inside[row] = torch.cat(found)
        if total is not None:
            counts[row] = total.cpu()
    return counts


def descend(counts: Tensor, left: Tensor, prefix: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """One digit more: the bin in which the k-th magnitude lies, and how many are still wanted in it."""
    tail = counts.flip(1).cumsum(1)
    at = (tail >= left.unsqueeze(1)).int().argmax(1, keepdim=True)  # the first of them
    digit = counts.shape[1] - 1 - at
    inside = counts.gather(1, digit)
    return left - (tail.gather(1, at) - inside).squeeze(1), (prefix << bits) | digit.squeeze(1)


def _at_least(source: Source, key: int, wide: bool) -> Iterator[tuple[int, Tensor | None, Tensor]]:
    """A superset of the elements of magnitude ≥ key: chunk by chunk its start, positions from there, and values.

    Positions None: every element of the chunk.
    """
    bound = 0.0
    if key:
        infinite = 0x7FF << 52 if wide else 0xFF << 23  # beyond it are NaNs, which `above` gives for any bound
        packed = min(key, infinite).to_bytes(8 if wide else 4, "little")
        (bound,) = struct.unpack("<d" if wide else "<f", packed)
    step = _CHUNK.get(source.slice(0, 0).device.type, _DEVICE_CHUNK)
    for start in range(0, source.n, step):
        stop = min(source.n, start + step)
        if key:
            candidates = source.above(start, stop, bound)
            yield start, candidates, source.at(candidates + start)
        else:
            yield start, None, source.slice(start, stop)
