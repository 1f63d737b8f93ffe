"""The optimizer step in Triton (``triton_kernels.py``): float32 parameters, and bfloat16 ones with the split master.

OnDARE     one launch for all tensors: moments, δ's mask drawn in registers, θ at the drawn positions
OnTIES     one launch for moments and candidates, three counts of digits for the exact k-th magnitude, one for θ at the
           kept positions
both       a last one for the positions of τ that δ lacks

τ's entries come from the host: see `entries`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from ...operators import SPARSE_LIMIT, Magnitude, Random, SignElection, WeightedSum, kept, largest
from ..adamw import AdamUpdate
from ..parts import whole
from ..rule import Piece, Rule
from ..tau import Tau
from ..threshold import descend
from ..weights import Weights
from . import triton_kernels as kernels
from .entries import Entries, drawn, stored

_PAGE, _TILE, _BLOCK, _BINS = (int(x.value) for x in (kernels.PAGE, kernels.TILE, kernels.BLOCK, kernels.BINS))
_SAMPLES = 1 << 12  # elements of a tensor looked at to guess the k-th magnitude
_SMALL = 4 * _SAMPLES  # up to this size all elements but zeros are candidates
_TOGETHER = 1 << 20  # candidates held at once, if not one of _SHARE elements: at most 0.2 bytes a parameter
_SHARE = 40
_DRAWS = 1 << 10  # positions drawn at once, at most
_LARGEST = 2**31 - _PAGE  # positions are stored in 32 bits
_DIGITS = ((20, 11), (10, 10), (0, 10))  # of a magnitude's bits: how far up, and how many
_OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}


class _Member(NamedTuple):
    """One parameter in a launch; without weights for its moments alone."""

    piece: Piece
    update: AdamUpdate
    gradient: Tensor
    weights: Weights | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """What parameters must have in common to be taken together."""
        update, weights = self.update, self.weights
        split = weights is not None and weights.low is not None
        return self.gradient.device, self.gradient.dtype, split, update.betas, update.eps, update.released


class Triton:
    """`update_moments` and `Rule.merged` by Triton kernels, for what these know; the rest stays as it was.

    Args:
        device: the kind of device that they run on: ``"cuda"``, or ``"cpu"`` in Triton's interpreter.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    def knows(self, update: AdamUpdate, gradient: Tensor) -> bool:
        """Whether the moments of a parameter are its to compute."""
        return (
            update.mean.device.type == gradient.device.type == self._device
            and update.mean.dtype == torch.float32
            and gradient.dtype in (torch.float32, torch.bfloat16)
            and update.rounded  # the others promise the bits of torch's own operations on this device
            and 0 < update.n < _LARGEST
        )

    def merges(self, rule: Rule, piece: Piece, weights: Weights) -> bool:
        """Whether the merge of a parameter that it `knows` is its as well."""
        part = piece.part
        rule = rule.for_size(part.whole)
        if not rule.is_sparse or not isinstance(rule.consensus, WeightedSum | SignElection):
            return False
        if weights.flat.dtype != torch.float32 and weights.low is None:
            return False
        if isinstance(rule.sparsify, Random):
            return part.contiguous and rule.sparsify.density <= SPARSE_LIMIT
        # of a sharded parameter the threshold is found by `agree`, between moments and merge
        return isinstance(rule.sparsify, Magnitude) and not part.sharded

    def moments(self, updates: Sequence[AdamUpdate], gradients: Sequence[Tensor]) -> None:
        """m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g², in place."""
        pairs = zip(updates, gradients, strict=True)
        for some in _alike([_Member(Piece("", update, whole(update.n)), update, g) for update, g in pairs]):
            _Launch(some).advance()

    def scale(self, weights: Weights, factor: float) -> None:
        """θ ← factor·θ."""
        if weights.low is None or weights.flat.device.type != self._device or not weights.n:
            weights.scale(factor)
            return
        with torch.cuda.device_of(weights.flat):
            grid = (-(-weights.n // _TILE),)
            kernels.scale_split[grid](weights.flat.view(torch.int16), weights.low, weights.n, factor, **_OPTIONS)

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
        """The moments, and θ += C(F(δ), F(τ)), of parameters that `knows` and `merges` accepted; see `Kernels`."""
        triples = zip(pieces, gradients, weights, strict=True)
        for alike in _alike([_Member(piece, _adam_update(piece), g, theta) for piece, g, theta in triples]):
            device = alike[0].gradient.device
            if isinstance(rule.sparsify, Random):
                entries = drawn([member.piece for member in alike], rule, tau, call, device)
                _Merge(alike, rule, weight, call, entries).add_drawn()
            else:
                for some in _bounded(alike, rule.sparsify.density):
                    entries = stored([member.piece for member in some], rule.sparsify.density, tau, device)
                    merge = _Merge(some, rule, weight, call, entries)
                    for member in merge.add_largest():  # the candidates were not what the sample had promised
                        _merge_eagerly(member, rule, tau, weight, call)


class _Launch:
    """Parameters of one kind that a launch takes together."""

    def __init__(self, members: Sequence[_Member]) -> None:
        self.members = members
        self.device = members[0].gradient.device
        update = members[0].update
        self.table = torch.zeros(len(members), int(kernels.COLUMNS.value), dtype=torch.int64)
        starts = [member.piece.part.range[0] for member in members]
        addresses = [[x.data_ptr() for x in (m.update.mean, m.update.square, m.gradient)] for m in members]
        self.aligned = not any(a % 16 for three in addresses for a in three) and not any(s % 16 for s in starts)
        stops = [start + member.update.n for start, member in zip(starts, members, strict=True)]
        pages = [-(-stop // _PAGE) - start // _PAGE for start, stop in zip(starts, stops, strict=True)]
        for column, numbers in (
            *zip((kernels.MEAN, kernels.SQUARE, kernels.GRADIENT), zip(*addresses, strict=True), strict=True),
            (kernels.COUNT, [member.update.n for member in members]),
            (kernels.START, starts),
            (kernels.PAGES, [b - s // _PAGE for b, s in zip(_begins(pages), starts, strict=True)]),
        ):
            self.fill(column, numbers)
        self.pages = self.owners(pages)
        toward = numpy.float32(1 - update.betas[0])
        self.near = bool(toward < 0.5)  # torch's lerp starts from the nearer end
        slope = toward if self.near else toward - numpy.float32(1)
        self.adam = float(slope), float(update.betas[1]), float(1 - update.betas[1]), float(update.eps)
        self.half = members[0].gradient.dtype == torch.bfloat16
        scales = [member.update.scales() for member in members]
        self.numbers = self.put([[-size, 1.0 if update.released else root] for size, root in scales], torch.float32)

    def fill(self, column: Any, numbers: Sequence[int]) -> None:
        """A column of the table."""
        self.table[:, int(column.value)] = torch.tensor(numbers)

    def put(self, numbers: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """Numbers on the device."""
        return torch.tensor(numbers, dtype=dtype).to(self.device)

    def owners(self, counts: Sequence[int]) -> Tensor:
        """The row of each program, where row i has ``counts[i]`` programs."""
        rows = torch.arange(len(counts), dtype=torch.int32, device=self.device)
        return rows.repeat_interleave(self.put(counts, torch.int64), output_size=sum(counts))

    def advance(self) -> None:
        """The moments."""
        table, none = self.table.to(self.device), torch.empty(0, device=self.device)
        with torch.cuda.device_of(table):
            kernels.advance[(self.pages.numel(),)](
                table, self.pages, self.numbers, none, none, none, none,
                *self.adam, 0.0, 0.0, 1.0, 1.0,
                NEAR=self.near, HALF=self.half, SPLIT=False, ALIGNED=self.aligned, DRAWS=0, KIND=0, **_OPTIONS,
            )  # fmt: skip


class _Merge(_Launch):
    """A launch that also merges.

    Args:
        members: the parameters.
        rule: the merge.
        weight: α.
        call: the step, which keys the masks.
        tau: τ's kept entries.
    """

    def __init__(self, members: Sequence[_Member], rule: Rule, weight: float, call: int, tau: Entries) -> None:
        super().__init__(members)
        self.density, self.tau, thetas = rule.sparsify.density, tau, [m.weights for m in members if m.weights]
        blocks = [-(-count // _BLOCK) for count in tau.counts]
        self.ends = [0, *accumulate(tau.counts)]
        keys = [rule.key("update", member.piece.name, call) for member in members]
        for column, numbers in (
            (kernels.THETA, [theta.flat.data_ptr() for theta in thetas]),
            (kernels.LOW, [0 if theta.low is None else theta.low.data_ptr() for theta in thetas]),
            (kernels.KEY_LOW, [key & 0xFFFFFFFF for key in keys]),
            (kernels.KEY_HIGH, [key >> 32 for key in keys]),
            (kernels.TAU, self.ends[:-1]),
            (kernels.TAU_END, self.ends[1:]),
            (kernels.TAU_BLOCKS, _begins(blocks)),
        ):
            self.fill(column, numbers)
        self.blocks = self.owners(blocks)
        self.taken = torch.zeros(self.ends[-1], dtype=torch.int8, device=self.device)
        divisor = self.density if rule.sparsify.rescale == "expectation" else 1.0
        clip = rule.clip if rule.released and isinstance(rule.sparsify, Random) else math.inf
        self.consensus = 1.0 - weight, float(weight), divisor, float(clip)
        kind = kernels.SUM
        if isinstance(rule.consensus, SignElection):
            kind = kernels.ELECTION if rule.consensus.weighted else kernels.ELECTION_UNWEIGHTED
        self.forms = {"KIND": int(kind.value), "SPLIT": thetas[0].low is not None}

    def add_drawn(self) -> None:
        """The moments, and θ where δ or τ were drawn."""
        mean = _PAGE * self.density
        draws = 1 << math.ceil(math.log2(mean + 6 * math.sqrt(mean) + 8))  # seldom has a page more
        shrink = self.put([1 / math.log1p(-self.density)], torch.float64)
        table = self.table.to(self.device)
        with torch.cuda.device_of(table):
            kernels.advance[(self.pages.numel(),)](
                table, self.pages, self.numbers, shrink, *self.tau[:2], self.taken, *self.adam, *self.consensus,
                NEAR=self.near, HALF=self.half, ALIGNED=self.aligned, DRAWS=min(draws, _DRAWS),
                **self.forms, **_OPTIONS,
            )  # fmt: skip
            self._add_rest(table)

    def add_largest(self) -> list[_Member]:
        """The moments, and θ where δ or τ are largest. Returned: whose merge is still to be done."""
        sizes = [member.update.n for member in self.members]
        wanted = [kept(self.density, n) for n in sizes]
        rooms = [_room(self.density, n) for n in sizes]
        blocks = [-(-room // _BLOCK) for room in rooms]
        ends = [0, *accumulate(rooms)]
        self.fill(kernels.ROOM, ends[:-1])
        self.fill(kernels.ROOM_END, ends[1:])
        self.fill(kernels.ROOM_BLOCKS, _begins(blocks))
        table, owners = self.table.to(self.device), self.owners(blocks)
        index = torch.empty(ends[-1], dtype=torch.int32, device=self.device)
        values = torch.empty(ends[-1], device=self.device)
        found = torch.zeros(len(sizes), dtype=torch.int32, device=self.device)
        with torch.cuda.device_of(table):
            bounds = self._bounds(table, sizes)
            kernels.advance_and_collect[(self.pages.numel(),)](
                table, self.pages, self.numbers, bounds, found, index, values, *self.adam,
                NEAR=self.near, HALF=self.half, ALIGNED=self.aligned, **_OPTIONS,
            )  # fmt: skip
            left, key = self.put(wanted, torch.int64), torch.zeros(len(sizes), dtype=torch.int64, device=self.device)
            for shift, bits in _DIGITS:
                counts = torch.zeros(len(sizes), _BINS, dtype=torch.int32, device=self.device)
                kernels.tally[(owners.numel(),)](
                    table, owners, found, values, key, counts, SHIFT=shift, BITS=bits, **_OPTIONS
                )
                counts = counts[:, : 1 << bits]
                left, key = descend(counts, left, key, bits)
            ties = counts.gather(1, (key & ((1 << bits) - 1)).unsqueeze(1)).squeeze(1)
            rows = torch.stack([found.long(), bounds.long(), left, ties.long(), key], 1).tolist()  # the step's one wait
            thresholds, undone = [1] * len(sizes), []
            for i, (count, bound, missing, tied, threshold) in enumerate(rows):
                if count > rooms[i] or (count < wanted[i] and bound > 1):
                    undone.append(i)
                elif count > wanted[i] and tied > missing:
                    rows[i][0] = _choose(index[ends[i] : ends[i] + count], values[ends[i] :], wanted[i])
                elif count > wanted[i]:
                    thresholds[i] = threshold
            for i in undone:
                rows[i][0] = 0
                self.taken[self.ends[i] : self.ends[i + 1]] = 1
            kernels.add_chosen[(owners.numel(),)](
                table, owners, self.put([row[0] for row in rows], torch.int32), self.put(thresholds, torch.int32),
                index, values, *self.tau[:2], self.taken, *self.consensus, **self.forms, **_OPTIONS,
            )  # fmt: skip
            self._add_rest(table)
        return [self.members[i] for i in undone]

    def _bounds(self, table: Tensor, sizes: Sequence[int]) -> Tensor:
        """A magnitude (bits, ≥ 1) for each parameter that the k-th is hardly ever below."""
        samples = torch.empty(len(sizes), _SAMPLES, dtype=torch.int32, device=self.device)
        kernels.sample[(len(sizes), _SAMPLES // _TILE)](
            table, self.numbers, samples, *self.adam, NEAR=self.near, HALF=self.half, SAMPLES=_SAMPLES, **_OPTIONS
        )
        ranks = self.put([[_rank(self.density, n)] for n in sizes], torch.int64)
        bounds = samples.sort(1, descending=True).values.gather(1, ranks).squeeze(1).clamp_(min=1)
        return bounds.masked_fill_(self.put([n <= _SMALL for n in sizes], torch.bool), 1)

    def _add_rest(self, table: Tensor) -> None:
        if self.blocks.numel():
            kernels.add_rest[(self.blocks.numel(),)](
                table, self.blocks, *self.tau[:2], self.taken, *self.consensus, **self.forms, **_OPTIONS
            )


# ---- which parameters together --------------------------------------------------------------------------------------


def _alike(members: Sequence[_Member]) -> list[list[_Member]]:
    found: dict[tuple[object, ...], list[_Member]] = {}
    for member in members:
        found.setdefault(member.kind, []).append(member)
    return list(found.values())


def _bounded(members: Sequence[_Member], density: float) -> Iterator[list[_Member]]:
    """Some at a time, so that there are not too many candidates at once."""
    limit = max(_TOGETHER, sum(member.update.n for member in members) // _SHARE)
    some: list[_Member] = []
    held = 0
    for member in members:
        room = _room(density, member.update.n)
        if some and held + room > limit:
            yield some
            some, held = [], 0
        some.append(member)
        held += room
    if some:
        yield some


def _begins(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)][:-1]


# ---- selection ------------------------------------------------------------------------------------------------------


def _rank(density: float, n: int) -> int:
    """Which of the sampled magnitudes, from the largest, is the bound: four standard deviations beyond the k-th."""
    share = _SAMPLES * kept(density, n) / n
    return min(_SAMPLES - 1, int(share + 4 * math.sqrt(share) + 4))


def _room(density: float, n: int) -> int:
    """How many candidates there may be: twice what is expected."""
    return n if n <= _SMALL else min(n, 2 * (_rank(density, n) + 1) * n // _SAMPLES + _BLOCK)


def _choose(index: Tensor, values: Tensor, k: int) -> int:
    """Puts the k largest of some candidates to the front where some tie at the k-th magnitude. Returned: how many."""
    place, order = index.sort()
    delta = values[: index.numel()][order]
    chosen = largest(delta, k)
    index[: chosen.numel()], values[: chosen.numel()] = place[chosen], delta[chosen]
    return chosen.numel()


def _merge_eagerly(member: _Member, rule: Rule, tau: Tau, weight: float, call: int) -> None:
    """θ += C(F(δ), F(τ)) by torch's operations, after the moments."""
    theta = member.weights
    if theta is None:
        return
    for _, index, values in rule.merged([member.piece], tau, weight, call, theta.flat.device, {}):
        if index is not None:
            theta.add_at(index, values)


def _adam_update(piece: Piece) -> AdamUpdate:
    if not isinstance(piece.update, AdamUpdate):
        raise TypeError("the Triton kernels know AdamW's updates only")
    return piece.update
