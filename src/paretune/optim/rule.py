"""How an update and the task vector become one: sparsify both, find consensus. Dense (the oracle) and sparse (fast).

Sharded parameters take the same two ways, each rank on its own elements, after `agree`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..operators import (
    SPARSE_LIMIT,
    Consensus,
    Magnitude,
    Random,
    Source,
    Sparsify,
    above,
    bernoulli_mask,
    kept,
    largest_streamed,
    mask_key,
    sampled_indices_of,
)
from ..operators.masks import PAGE
from .adamw import AdamUpdate
from .parts import Part, sums
from .sparse import union
from .tau import Tau
from .threshold import Threshold, Wanted, thresholds

_BATCH = 1 << 17  # kept entries handled at once: bounds the scratch memory
_MAGNITUDE_LIMIT = 0.25  # up to this density selecting is cheaper than the dense form


@dataclass
class DenseUpdate:
    """An update that is there already, flat."""

    values: Tensor

    @property
    def n(self) -> int:
        return self.values.numel()

    def at(self, index: Tensor) -> Tensor:
        return self.values[index]

    def slice(self, start: int, stop: int, step: int = 1) -> Tensor:
        return self.values[start:stop:step]

    def cut(self, start: int, stop: int) -> DenseUpdate:
        return DenseUpdate(self.values[start:stop])

    def above(self, start: int, stop: int, bound: float) -> Tensor:
        return above(self.values[start:stop], bound)


class Piece(NamedTuple):
    """One parameter in a merge: its plain name, δ of this rank's elements, and which elements these are."""

    name: str
    update: Source
    part: Part


@dataclass
class Agreed:
    """What the ranks that share a parameter had to find out together for one merge.

    Args:
        threshold: the k-th magnitude of δ, for Magnitude.
        norms: ‖δ‖₁, ‖F(δ)‖₁, ‖τ‖₁, ‖F(τ)‖₁ of the whole parameter, with F not rescaled; for the l1 rescale.
    """

    threshold: Threshold | None = None
    norms: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Rule:
    """One merge: C(F(δ), F(τ)) with the weight on τ.

    Args:
        sparsify: F.
        consensus: C.
        seed: keys the random masks, with the step and the parameter's name.
        released: follow the released code of 2405.17931 where it differs from the paper: Random draws τ's mask once
            and clamps the result to ±clip, an l1 rescale of δ comes on top of 1/p; Magnitude keeps everything where
            int(p·n) = 0.
        clip: the released clamp.
        eps: the released guard of the l1 rescale.
    """

    sparsify: Sparsify
    consensus: Consensus
    seed: int
    released: bool = False
    clip: float = 1.0
    eps: float = 1e-8

    def merged(
        self,
        pieces: Sequence[Piece],
        tau: Tau,
        weight: float,
        call: int,
        device: torch.device,
        agreed: Mapping[str, Agreed],
    ) -> Iterator[tuple[int, Tensor | None, Tensor]]:
        """What is added to some parameters: ``(which, positions, values)``, or positions None for all elements.

        Positions are those of this rank's part.

        Args:
            pieces: the parameters.
            tau: the task vector.
            weight: α.
            call: the step, which keys the masks.
            device: where the parameters are.
            agreed: from `agree`, for sharded parameters.
        """
        for i, piece in enumerate(pieces):
            rule = self.for_size(piece.part.whole)
            if rule.is_sparse:
                continue
            if piece.part.sharded:
                yield i, None, rule._dense_part(piece, tau, weight, call, device, agreed[piece.name])
            else:
                yield i, None, rule.dense(piece, tau, weight, call, device)
        cut = [(i, start, piece) for i, each in enumerate(pieces) for start, piece in self.cut(each)]
        for batch in self.batches([piece for _, _, piece in cut]):
            results = self.sparse([cut[j][2] for j in batch], tau, weight, call, device, agreed)
            for j, parts in zip(batch, results, strict=True):
                which, start, _ = cut[j]
                for index, values in parts:
                    yield which, index + start if start else index, values

    def cut(self, piece: Piece) -> list[tuple[int, Piece]]:
        """A piece in ranges that bounded scratch memory can draw masks for, each with where it starts in the piece."""
        size = max(1, int(_BATCH / self.sparsify.density) // PAGE) * PAGE
        first, stop = piece.part.range
        update = piece.update
        if (
            stop - first <= size
            or not isinstance(self.sparsify, Random)
            or not self.is_sparse
            or not piece.part.contiguous_everywhere
            or not isinstance(update, AdamUpdate | DenseUpdate)
        ):
            return [(0, piece)]
        marks = [first, *range(first // PAGE * PAGE + size, stop, size), stop]
        parts = [(i, replace(piece.part, columns=(i, j))) for i, j in pairwise(marks)]
        return [(i - first, Piece(piece.name, update.cut(i - first, i - first + part.n), part)) for i, part in parts]

    def batches(self, pieces: Sequence[Piece]) -> Iterator[list[int]]:
        """Which pieces take the sparse form, as many at a time as bounded scratch memory allows."""
        batch: list[int] = []
        expected = 0.0
        for i, piece in enumerate(pieces):
            rule = self.for_size(piece.part.whole)
            if not rule.is_sparse:
                continue
            size = piece.part.n * rule.sparsify.density
            if batch and expected + size > _BATCH:
                yield batch
                batch, expected = [], 0.0
            batch.append(i)
            expected += size
        if batch:
            yield batch

    @property
    def is_sparse(self) -> bool:
        """Whether the sparse form applies (and pays)."""
        if isinstance(self.sparsify, Random):
            return self.sparsify.density <= SPARSE_LIMIT and self.sparsify.rescale != "l1"
        if isinstance(self.sparsify, Magnitude):
            return self.sparsify.density <= _MAGNITUDE_LIMIT and self.sparsify.rescale != "l1"
        return False

    def dense(self, piece: Piece, tau: Tau, weight: float, call: int, device: torch.device) -> Tensor:
        """The definition, on a whole tensor."""
        delta = piece.update.slice(0, piece.update.n)
        kept_delta = self._sparsified_update(delta, piece.name, call)
        kept_tau = self._sparsified_tau(tau, piece, call).to(device, delta.dtype)
        return self.consensus(kept_delta, kept_tau, weight)

    def sparse(
        self,
        pieces: Sequence[Piece],
        tau: Tau,
        weight: float,
        call: int,
        device: torch.device,
        agreed: Mapping[str, Agreed],
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """The same at the kept positions of this rank's parts only, for some tensors at once.

        Each tensor's result is two disjoint lists of positions and values: those of δ, and those of τ alone.
        """
        density = self.sparsify.density
        updates, parts = [piece.update for piece in pieces], [piece.part for piece in pieces]
        sizes = [part.n for part in parts]
        if isinstance(self.sparsify, Random):
            own, other, tau_values = self.drawn(pieces, tau, call)
            own = [index.to(device) for index in own]
            delta = _at_all(updates, own)
        else:
            found = [self._largest(piece, agreed) for piece in pieces]
            own, delta = [index for index, _ in found], torch.cat([values for _, values in found])
            stored = [tau.largest(piece.name, density, piece.part) for piece in pieces]
            other = [vector.index for vector in stored]
            tau_values = torch.cat([vector.values for vector in stored])
        if self.sparsify.rescale == "expectation":
            delta, tau_values = delta / density, tau_values / density
        if self.released and isinstance(self.sparsify, Random):
            tau_values = tau_values.clamp(-self.clip, self.clip)
        # One union for all tensors: positions shifted by where each tensor would begin.
        begins = [0, *accumulate(sizes)]
        shifted = torch.cat([index + begin for index, begin in zip(own, begins, strict=False)])
        shifted_tau = torch.cat([index + begin for index, begin in zip(other, begins, strict=False)]).to(device)
        alone, a, b = union(shifted, delta, shifted_tau, tau_values.to(device))
        values = self.consensus(a, b, weight)
        ends = torch.tensor(begins[1:], device=device)
        counts = torch.searchsorted(alone, ends).diff(prepend=torch.zeros(1, dtype=torch.int64, device=device))
        split = zip(
            own,
            values[: shifted.numel()].split([index.numel() for index in own]),
            alone.split(counts.tolist()),
            values[shifted.numel() :].split(counts.tolist()),
            begins,
            strict=False,
        )
        return [[(index, v), (rest - begin, w)] for index, v, rest, w, begin in split]

    def drawn(self, pieces: Sequence[Piece], tau: Tau, call: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Random's positions in this rank's parts, for δ and for τ, and τ's elements there, concatenated."""
        parts = [piece.part for piece in pieces]
        keys = [self.key(stream, piece.name, call) for stream in ("update", "tau") for piece in pieces]
        ranges = [part.range for part in parts]
        found = sampled_indices_of(keys, [part.whole for part in parts] * 2, self.sparsify.density, ranges=ranges * 2)
        found = [part.keep(index) for part, index in zip(parts * 2, found, strict=True)]
        places = [part.local(index) for part, index in zip(parts * 2, found, strict=True)]
        values = tau.gather_all([piece.name for piece in pieces], found[len(pieces) :])
        return places[: len(pieces)], places[len(pieces) :], values

    def _largest(self, piece: Piece, agreed: Mapping[str, Agreed]) -> tuple[Tensor, Tensor]:
        if piece.name in agreed and (threshold := agreed[piece.name].threshold) is not None:
            return threshold.select(piece.update)
        return largest_streamed(piece.update, kept(self.sparsify.density, piece.update.n))

    def _sparsified_update(self, delta: Tensor, name: str, call: int) -> Tensor:
        key = self.key("update", name, call)
        if not (self.released and isinstance(self.sparsify, Random) and self.sparsify.rescale == "l1"):
            return self.sparsify(delta, key)
        out = Random(self.sparsify.density, "expectation")(delta, key)
        norm = delta.abs().sum()
        if norm >= 1e-8:
            out = out.mul_(norm / (out.abs().sum() + self.eps)).clamp_(-self.clip, self.clip)
        return out

    def _sparsified_tau(self, tau: Tau, piece: Piece, call: int) -> Tensor:
        if isinstance(self.sparsify, Random):
            rescale = "expectation" if self.released else self.sparsify.rescale
            key = self.key("tau", piece.name, call)
            out = Random(self.sparsify.density, rescale)(tau.dense(piece.name, piece.part), key)
            return out.clamp_(-self.clip, self.clip) if self.released else out
        if isinstance(self.sparsify, Magnitude) and self.sparsify.rescale != "l1":
            stored = tau.largest(piece.name, self.sparsify.density, piece.part)
            out = torch.zeros(stored.n)
            out[stored.index] = stored.values
            return out if self.sparsify.rescale == "none" else out.div_(self.sparsify.density)
        return self.sparsify(tau.dense(piece.name, piece.part), self.key("tau", piece.name, call))

    # -- parts of sharded parameters -------------------------------------------------------------------------

    def _dense_part(
        self, piece: Piece, tau: Tau, weight: float, call: int, device: torch.device, agreed: Agreed
    ) -> Tensor:
        """`dense` on this rank's part of a tensor."""
        delta = self._scaled(self._kept_update(piece, call, agreed), agreed.norms[:2], update=True)
        kept_tau = self._scaled(self._kept_tau(piece, tau, call), agreed.norms[2:], update=False)
        return self.consensus(delta, kept_tau.to(device, delta.dtype), weight)

    def _kept_update(self, piece: Piece, call: int, agreed: Agreed) -> Tensor:
        """This rank's part of F(δ), not rescaled."""
        delta = piece.update.slice(0, piece.update.n)
        if isinstance(self.sparsify, Random) or agreed.threshold is None:
            return self._masked(delta, piece, "update", call)
        out = torch.zeros_like(delta)
        index, values = agreed.threshold.select(piece.update)
        out[index] = values
        return out

    def _kept_tau(self, piece: Piece, tau: Tau, call: int) -> Tensor:
        """This rank's part of F(τ), not rescaled."""
        if isinstance(self.sparsify, Random) or self.sparsify.density == 1:
            return self._masked(tau.dense(piece.name, piece.part), piece, "tau", call)
        stored = tau.largest(piece.name, self.sparsify.density, piece.part)
        out = torch.zeros(stored.n)
        out[stored.index] = stored.values
        return out

    def _masked(self, x: Tensor, piece: Piece, stream: str, call: int) -> Tensor:
        density, part = self.sparsify.density, piece.part
        if density == 1:
            return x
        key = self.key(stream, piece.name, call)
        mask = part.cut(lambda i, j: bernoulli_mask(key, part.whole, density, i, j, device=x.device))
        return torch.where(mask, x, 0.0)

    def _scaled(self, kept_part: Tensor, norms: tuple[float, ...], *, update: bool) -> Tensor:
        """F's rescale of one vector's kept part, with the norms of the whole vector before and after."""
        density, rescale = self.sparsify.density, self.sparsify.rescale
        before, after = norms
        if self.released and isinstance(self.sparsify, Random):
            out = kept_part / density
            if not update:
                return out.clamp_(-self.clip, self.clip)
            if rescale == "l1" and before >= 1e-8:
                out = out.mul_(before / (after / density + self.eps)).clamp_(-self.clip, self.clip)
            return out
        if rescale == "expectation":
            return kept_part / density
        return kept_part * (before / after) if rescale == "l1" and after and density < 1 else kept_part

    def mask_keys(self, name: str, call: int) -> tuple[int, int]:
        """The keys of δ's mask and of τ's."""
        return self.key("update", name, call), self.key("tau", name, call)

    def key(self, stream: str, name: str, call: int) -> int:
        """What determines a mask of one of the two: stream `update` or `tau`."""
        if stream == "tau" and self.released:
            call = 0  # one mask for the whole run
        return mask_key(self.seed, call, stream, name)

    def for_size(self, n: int) -> Rule:
        """The rule for a tensor of n elements."""
        if self.released and isinstance(self.sparsify, Magnitude) and int(self.sparsify.density * n) < 1:
            return replace(self, sparsify=Magnitude(1.0, self.sparsify.rescale))
        return self


def agree(merges: Sequence[tuple[Rule, Sequence[Piece], int]], tau: Tau) -> dict[str, Agreed]:
    """What the ranks find out together before they merge: three exchanges for all sharded parameters together.

    (One more for the l1 rescale, and three more where some parameters are float64 and some are not.)

    Args:
        merges: each group's rule, parameters and step; the same on all ranks.
        tau: the task vector; its F(τ) by magnitude is made ready at the first call.
    """
    agreed: dict[str, Agreed] = {}
    updates: list[tuple[str, Wanted]] = []
    stored: list[tuple[str, float, Wanted]] = []
    normed: list[tuple[Rule, Piece, int]] = []
    for whole_rule, pieces, call in merges:
        for piece in pieces:
            if not piece.part.sharded:
                continue
            rule, name, part = whole_rule.for_size(piece.part.whole), piece.name, piece.part
            agreed[name], density = Agreed(), rule.sparsify.density
            if isinstance(rule.sparsify, Magnitude) and density < 1:
                wide = piece.update.slice(0, 0).dtype == torch.float64
                updates.append((name, Wanted(piece.update, part, kept(density, part.whole), wide)))
                if (want := tau.wanted(name, density, part)) is not None:
                    stored.append((name, density, want))
            if rule.sparsify.rescale == "l1":
                normed.append((rule, piece, call))
    found = thresholds([want for _, want in updates] + [want for _, _, want in stored])
    for (name, _), threshold in zip(updates, found, strict=False):
        agreed[name].threshold = threshold
    for (name, density, want), threshold in zip(stored, found[len(updates) :], strict=True):
        tau.largest(name, density, want.part, threshold)
    if normed:
        own = torch.zeros(len(normed), 4, dtype=torch.float64)
        for row, (rule, piece, call) in enumerate(normed):
            delta = piece.update.slice(0, piece.update.n)
            vectors = (
                delta,
                rule._kept_update(piece, call, agreed[piece.name]),
                tau.dense(piece.name, piece.part),
                rule._kept_tau(piece, tau, call),
            )
            for column, x in enumerate(vectors):
                own[row, column] = x.abs().sum(dtype=torch.float64)
        for (_, piece, _), row in zip(normed, sums([piece.part for _, piece, _ in normed], own).tolist(), strict=True):
            agreed[piece.name].norms = tuple(row)
    return agreed


def require_shardable(name: str, part: Part, sparsify: Sparsify) -> None:
    """Refuse a sparsifier that cannot be exact on this part.

    Raises:
        ArgumentError: Magnitude where the part is no contiguous range; a sparsifier that is not ours.
    """
    if not part.sharded:
        return
    if not isinstance(sparsify, Random | Magnitude):
        raise ArgumentError(
            "sparsify", sparsify, f"{name} is sharded: only Random and Magnitude know what other ranks hold"
        )
    if isinstance(sparsify, Magnitude) and sparsify.density < 1 and not part.contiguous_everywhere:
        raise ArgumentError(
            name, "Shard(1)", "Magnitude needs shards of dimension 0: shard rows (fully_shard), or use Random (OnDARE)"
        )


def _at_all(updates: Sequence[Source], indices: Sequence[Tensor]) -> Tensor:
    if all(isinstance(update, AdamUpdate) for update in updates):
        return AdamUpdate.at_all(cast(Sequence[AdamUpdate], updates), indices)
    return torch.cat([update.at(index) for update, index in zip(updates, indices, strict=True)])
