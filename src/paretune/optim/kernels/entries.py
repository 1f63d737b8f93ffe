"""The kept entries of τ on a device: OnDARE's are drawn and read by the host ahead of the step that needs them.

Masks follow from the step's number, so that a thread can read the next step's entries while the model computes. For
OnTIES F(τ) is static, and its entries stay on the device: 8 bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...operators import sampled_indices_of
from ..parts import Part
from ..rule import Piece, Rule
from ..sparse import SparseVector
from ..tau import Tau

_BATCH = 1 << 17  # entries drawn at once


class Entries(NamedTuple):
    """Entries of τ, one parameter after the other: positions in each (int32), values, and how many each has."""

    places: Tensor
    values: Tensor
    counts: list[int]

    def to(self, device: torch.device) -> Entries:
        """The same on a device."""
        return Entries(self.places.to(device), self.values.to(device), self.counts)


_AHEAD: WeakKeyDictionary[Tau, dict[tuple[object, ...], tuple[int, Future[Entries]]]] = WeakKeyDictionary()
_STORED: WeakKeyDictionary[SparseVector, Entries] = WeakKeyDictionary()


def drawn(pieces: Sequence[Piece], rule: Rule, tau: Tau, call: int, device: torch.device) -> Entries:
    """Random's entries of τ for a step; those of the next step are read from now on.

    Args:
        pieces: the parameters.
        rule: the merge, with `Random`.
        tau: the task vector.
        call: the step, which keys the masks.
        device: where they are wanted.
    """
    names, parts = tuple(piece.name for piece in pieces), tuple(piece.part for piece in pieces)
    ahead = _AHEAD.setdefault(tau, {})
    for stale in [key for key, (step, _) in ahead.items() if step < call]:
        del ahead[stale]
    key = rule, names, parts
    step, future = ahead.pop(key, (-1, None))
    found = future.result() if future is not None and step == call else _read(names, parts, rule, tau, call)
    ahead[key] = call + 1, _reader().submit(_read, names, parts, rule, tau, call + 1)
    return found.to(device)


def stored(pieces: Sequence[Piece], density: float, tau: Tau, device: torch.device) -> Entries:
    """Magnitude's entries of τ."""
    found = []
    for piece in pieces:
        vector = tau.largest(piece.name, density, piece.part)
        if vector not in _STORED or _STORED[vector].places.device != device:
            index = vector.index.to(torch.int32)
            _STORED[vector] = Entries(index, vector.values.to(torch.float32), [index.numel()]).to(device)
        found.append(_STORED[vector])
    places, values = torch.cat([e.places for e in found]), torch.cat([e.values for e in found])
    return Entries(places, values, [e.counts[0] for e in found])


def _read(names: Sequence[str], parts: Sequence[Part], rule: Rule, tau: Tau, call: int) -> Entries:
    places, values, counts = [], [], []
    for some in _batches(parts, rule.sparsify.density):
        index = sampled_indices_of(
            [rule.key("tau", name, call) for name in names[some]],
            [part.whole for part in parts[some]],
            rule.sparsify.density,
            ranges=[part.range for part in parts[some]],
        )
        places += [part.local(one).to(torch.int32) for part, one in zip(parts[some], index, strict=True)]
        values.append(tau.gather_all(names[some], index).float())
        counts += [one.numel() for one in index]
    return Entries(torch.cat(places), torch.cat(values), counts)


def _batches(parts: Sequence[Part], density: float) -> Iterator[slice]:
    """Some parameters at a time, so that drawing needs little scratch memory."""
    start, expected = 0, 0.0
    for i, part in enumerate(parts):
        expected += part.n * density
        if expected > _BATCH or i == len(parts) - 1:
            yield slice(start, i + 1)
            start, expected = i + 1, 0.0


@cache
def _reader() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "paretune-tau")
