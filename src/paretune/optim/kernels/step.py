"""The optimizer step in C (``native/step.c`` and ``largest.c``): for float32 and bfloat16 parameters on the CPU.

moments                one pass over g, m, v
OnDARE                 then δ and θ only at the sampled positions; above density 1/16 one pass with a hash an element
OnTIES                 the pass also finds the candidates for the k largest |δ|; θ only where something is kept
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ...native import Adam, Kept, Parameter
from ...operators import Magnitude, Random, SignElection, WeightedSum, kept
from ...operators.masks import mask_limit
from ..adamw import AdamUpdate
from ..rule import Piece, Rule
from ..sparse import SparseVector
from ..tau import Tau
from ..weights import Weights

_TILE = 512  # as in numbers.h
_SMALL = 1 << 14  # up to this size all elements are candidates: 4·LINE·LINES there
_SHARE = 1 << 20  # elements that one thread takes at a time
_LARGEST = 2**31 - _TILE  # positions are stored in 32 bits


class Compiled:
    """`update_moments` and `Rule.merged` by the compiled kernels, for what these know; the rest stays as it was.

    Args:
        library: from `paretune.native.kernels`.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def knows(self, update: AdamUpdate, gradient: Tensor) -> bool:
        """Whether the moments of a parameter are its to compute."""
        return (
            update.mean.device.type == gradient.device.type == "cpu"
            and update.mean.dtype == torch.float32
            and gradient.dtype in (torch.float32, torch.bfloat16)
        )

    def merges(self, rule: Rule, piece: Piece, weights: Weights) -> bool:
        """Whether the merge of a parameter that it `knows` is its as well."""
        rule, n = rule.for_size(piece.part.whole), piece.part.n
        return (
            not piece.part.sharded
            and 0 < n < _LARGEST
            and isinstance(rule.consensus, WeightedSum | SignElection)
            and (weights.flat.dtype == torch.float32 or weights.low is not None)
            and (self._selects(rule, n) or _draws_each(rule, piece))
        )

    def _selects(self, rule: Rule, n: int) -> bool:
        """Whether its work follows the kept entries."""
        few = not isinstance(rule.sparsify, Magnitude) or n <= _SMALL or 4 * kept(rule.sparsify.density, n) < n
        return rule.is_sparse and isinstance(rule.sparsify, Random | Magnitude) and few

    def moments(self, updates: Sequence[AdamUpdate], gradients: Sequence[Tensor]) -> None:
        """m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g², in place."""
        tasks = []
        for update, gradient in zip(updates, gradients, strict=True):
            adam = ctypes.byref(_adam(update))
            marks = [*range(0, update.n, _SHARE), update.n]
            for start, stop in pairwise(marks):
                area = _parameter(update, gradient, None, start, stop)
                tasks.append(partial(self._library.paretune_moments, adam, ctypes.byref(area)))
        _run(tasks, sum(update.n for update in updates))

    def scale(self, weights: Weights, factor: float) -> None:
        """θ ← factor·θ."""
        if weights.low is None or weights.flat.device.type != "cpu":
            weights.scale(factor)  # one operation of torch
            return
        area = Parameter(theta=weights.flat.data_ptr(), low=weights.low.data_ptr(), n=weights.n)
        self._library.paretune_scale(ctypes.byref(area), factor)

    def merge(
        self,
        rule: Rule,
        pieces: Sequence[Piece],
        weights: Sequence[Weights],
        gradients: Sequence[Tensor],
        tau: Tau,
        weight: float,
        call: int,
    ) -> None:
        """The moments, and θ += C(F(δ), F(τ)), of parameters that `knows` and `merges` accepted.

        Args:
            rule: the merge.
            pieces: the parameters' names and updates.
            weights: θ.
            gradients: g, flat.
            tau: the task vector.
            weight: α.
            call: the step, which keys the masks.
        """
        adams = _Adams(rule, weight)
        if isinstance(rule.sparsify, Random) and not rule.is_sparse:
            for piece, theta, gradient in zip(pieces, weights, gradients, strict=True):
                marks = [*range(0, piece.part.n, _SHARE), piece.part.n]
                ranges = [(start, stop) for start, stop in pairwise(marks)]
                _run(
                    [
                        partial(self._add_masked, rule, adams.of(piece), piece, theta, gradient, tau, call, *at)
                        for at in ranges
                    ],
                    piece.part.n,
                )
            return
        if isinstance(rule.sparsify, Random):
            cut = [(i, start, part) for i, each in enumerate(pieces) for start, part in rule.cut(each)]
            for batch in rule.batches([part for _, _, part in cut]):
                own, other, values = rule.drawn([cut[j][2] for j in batch], tau, call)
                theirs = zip(other, values.split([index.numel() for index in other]), strict=True)
                drawn = []
                for j, index, entries in zip(batch, own, theirs, strict=True):
                    i, start, part = cut[j]
                    area = _parameter(_adam_update(pieces[i]), gradients[i], weights[i], start, start + part.part.n)
                    drawn.append(partial(self._add_at, adams.of(pieces[i]), area, index, *entries))
                _run(drawn, sum(cut[j][2].part.n for j in batch))
            return
        density = rule.sparsify.density
        tasks = []
        for piece, theta, gradient in zip(pieces, weights, gradients, strict=True):
            stored, area = (
                tau.largest(piece.name, density, piece.part),
                _parameter(_adam_update(piece), gradient, theta),
            )
            k = kept(density, piece.part.n)
            tasks.append(partial(self._add_largest, adams.of(piece), area, k, stored))
        _run(tasks, sum(piece.part.n for piece in pieces))

    def _add_at(self, adam: Adam, area: Parameter, index: Tensor, places: Tensor, values: Tensor) -> None:
        entries = Kept(places.data_ptr(), None, None, values.data_ptr(), places.numel())
        self._library.paretune_add_at(
            ctypes.byref(adam), ctypes.byref(area), index.data_ptr(), index.numel(), ctypes.byref(entries)
        )

    def _add_masked(
        self,
        rule: Rule,
        adam: Adam,
        piece: Piece,
        theta: Weights,
        gradient: Tensor,
        tau: Tau,
        call: int,
        start: int,
        stop: int,
    ) -> None:
        first = piece.part.range[0]
        values = tau.dense(piece.name, replace(piece.part, columns=(first + start, first + stop)))
        self._library.paretune_add_masked(
            ctypes.byref(adam),
            ctypes.byref(_parameter(_adam_update(piece), gradient, theta, start, stop)),
            first + start,
            *rule.mask_keys(piece.name, call),
            mask_limit(rule.sparsify.density),
            values.data_ptr(),
        )

    def _add_largest(self, adam: Adam, area: Parameter, k: int, tau: SparseVector) -> None:
        size = 3 * k + _SMALL + _TILE
        index, values = torch.empty(size, dtype=torch.int32), torch.empty(size)
        entries = Kept(None, tau.local.data_ptr(), tau.pages.data_ptr(), tau.values.data_ptr(), tau.values.numel())
        self._library.paretune_add_largest(
            ctypes.byref(adam),
            ctypes.byref(area),
            k,
            ctypes.byref(entries),
            index.data_ptr(),
            values.data_ptr(),
            size,
        )


def _draws_each(rule: Rule, piece: Piece) -> bool:
    """Whether masks are drawn element by element, and δ has the bits of the kernels."""
    sparsify, part = rule.sparsify, piece.part
    return (
        isinstance(sparsify, Random)
        and not rule.is_sparse
        and sparsify.density < 1
        and sparsify.rescale != "l1"
        and _adam_update(piece).rounded
        and part.contiguous_everywhere
        and part.range[0] % _TILE == 0
    )


class _Adams:
    """The numbers of a merge for each of the settings among its parameters."""

    def __init__(self, rule: Rule, weight: float) -> None:
        self._rule, self._weight = rule, weight
        self._found: dict[tuple[object, ...], Adam] = {}

    def of(self, piece: Piece) -> Adam:
        update = _adam_update(piece)
        settings = update.settings()
        if settings not in self._found:
            self._found[settings] = _adam(update, self._rule, self._weight)
        return self._found[settings]


def _adam_update(piece: Piece) -> AdamUpdate:
    if not isinstance(piece.update, AdamUpdate):
        raise TypeError("the compiled kernels know AdamW's updates only")
    return piece.update


def _adam(update: AdamUpdate, rule: Rule | None = None, weight: float = 0.0) -> Adam:
    """The numbers of a step, rounded to float32 where torch rounds them."""
    (beta1, beta2), (size, root) = update.betas, update.scales()
    adam = Adam(toward=1 - beta1, keep=beta2, add=1 - beta2, size=-size, eps=update.eps, density=1.0, clip=math.inf)
    adam.root = 1.0 if update.released else root
    # a little less than the bound of `AdamUpdate.above`
    adam.cautious = (1 / size) ** 2 / (1.0 if update.released else root**2) * (1 - 1e-5) if size else 0.0
    adam.least = update.eps / size if size else 0.0
    if rule is None:
        return adam
    adam.own, adam.weight = 1 - weight, weight
    elects = isinstance(rule.consensus, SignElection)
    adam.consensus = (1 if rule.consensus.weighted else 2) if elects else 0  # type: ignore[attr-defined]
    if rule.sparsify.rescale == "expectation":
        adam.density = rule.sparsify.density
    if rule.released and isinstance(rule.sparsify, Random):
        adam.clip = rule.clip
    return adam


def _parameter(
    update: AdamUpdate, gradient: Tensor, weights: Weights | None, start: int = 0, stop: int | None = None
) -> Parameter:
    """Addresses; the caller holds the tensors."""
    flat = None if weights is None else weights.flat
    low = None if weights is None else weights.low
    return Parameter(
        None if flat is None else flat.data_ptr() + flat.element_size() * start,
        None if low is None else low.data_ptr() + 2 * start,
        update.mean.data_ptr() + 4 * start,
        update.square.data_ptr() + 4 * start,
        gradient.data_ptr() + gradient.element_size() * start,
        gradient.dtype == torch.bfloat16,
        (update.n if stop is None else stop) - start,
    )


def _run(tasks: Sequence[Callable[[], object]], elements: int) -> None:
    """All of them, on as many threads as torch uses (ctypes releases the interpreter's lock)."""
    threads = min(torch.get_num_threads(), len(tasks), elements // _SHARE)
    if threads <= 1:
        for task in tasks:
            task()
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(task) for task in tasks]:
            done.result()
