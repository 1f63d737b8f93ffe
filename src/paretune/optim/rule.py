"""How an update and the task vector become one: sparsify both, find consensus. Dense (the oracle) and sparse (fast)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from ..operators import (
    SPARSE_LIMIT,
    Consensus,
    Magnitude,
    Random,
    Source,
    Sparsify,
    above,
    kept,
    largest_streamed,
    mask_key,
    sampled_indices_of,
)
from ..task_vector import TaskVector
from .adamw import AdamUpdate
from .sparse import SparseVector, sparse_tau, union

_BATCH = 1 << 20  # kept entries handled at once: bounds the scratch memory
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

    def above(self, start: int, stop: int, bound: float) -> Tensor:
        return above(self.values[start:stop], bound)


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
        self, updates: Sequence[Source], names: Sequence[str], tau: Tau, weight: float, call: int, device: torch.device
    ) -> Iterator[tuple[int, Tensor | None, Tensor]]:
        """What is added to some parameters: ``(which, positions, values)``, or positions None for all elements.

        Args:
            updates: δ of each parameter.
            names: their plain names.
            tau: the task vector.
            weight: α.
            call: the step, which keys the masks.
            device: where the parameters are.
        """
        rules = [self._for_size(update.n) for update in updates]
        batch: list[int] = []
        expected = 0.0
        for i, (rule, update) in enumerate(zip(rules, updates, strict=True)):
            if not rule.is_sparse:
                yield i, None, rule.dense(update, names[i], tau, weight, call, device)
                continue
            batch.append(i)
            expected += update.n * rule.sparsify.density
            if expected > _BATCH:
                yield from self._sparse_batch(batch, updates, names, tau, weight, call, device)
                batch, expected = [], 0.0
        if batch:
            yield from self._sparse_batch(batch, updates, names, tau, weight, call, device)

    @property
    def is_sparse(self) -> bool:
        """Whether the sparse form applies (and pays)."""
        if isinstance(self.sparsify, Random):
            return self.sparsify.density <= SPARSE_LIMIT and self.sparsify.rescale != "l1"
        if isinstance(self.sparsify, Magnitude):
            return self.sparsify.density <= _MAGNITUDE_LIMIT and self.sparsify.rescale != "l1"
        return False

    def dense(self, update: Source, name: str, tau: Tau, weight: float, call: int, device: torch.device) -> Tensor:
        """The definition, on a whole tensor."""
        delta = update.slice(0, update.n)
        kept_delta = self._sparsified_update(delta, name, call)
        kept_tau = self._sparsified_tau(tau, name, call).to(device, delta.dtype)
        return self.consensus(kept_delta, kept_tau, weight)

    def sparse(
        self, updates: Sequence[Source], names: Sequence[str], tau: Tau, weight: float, call: int, device: torch.device
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """The same at the kept positions only, for some tensors at once.

        Each tensor's result is two disjoint lists of positions and values: those of δ, and those of τ alone.
        """
        density = self.sparsify.density
        sizes = [update.n for update in updates]
        if isinstance(self.sparsify, Random):
            keys = [self._key(stream, name, call) for stream in ("update", "tau") for name in names]
            indices = sampled_indices_of(keys, sizes * 2, density)
            own, other = [index.to(device) for index in indices[: len(names)]], indices[len(names) :]
            delta = _at_all(updates, own)
            tau_values = tau.gather_all(names, other)
        else:
            found = [largest_streamed(update, kept(density, update.n)) for update in updates]
            own, delta = [index for index, _ in found], torch.cat([values for _, values in found])
            stored = [tau.largest(name, density) for name in names]
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
        parts = zip(
            own,
            values[: shifted.numel()].split([index.numel() for index in own]),
            alone.split(counts.tolist()),
            values[shifted.numel() :].split(counts.tolist()),
            begins,
            strict=False,
        )
        return [[(index, v), (rest - begin, w)] for index, v, rest, w, begin in parts]

    def _sparse_batch(
        self,
        batch: list[int],
        updates: Sequence[Source],
        names: Sequence[str],
        tau: Tau,
        weight: float,
        call: int,
        device: torch.device,
    ) -> Iterator[tuple[int, Tensor | None, Tensor]]:
        results = self.sparse([updates[i] for i in batch], [names[i] for i in batch], tau, weight, call, device)
        for i, parts in zip(batch, results, strict=True):
            for index, values in parts:
                yield i, index, values

    def _sparsified_update(self, delta: Tensor, name: str, call: int) -> Tensor:
        key = self._key("update", name, call)
        if not (self.released and isinstance(self.sparsify, Random) and self.sparsify.rescale == "l1"):
            return self.sparsify(delta, key)
        out = Random(self.sparsify.density, "expectation")(delta, key)
        norm = delta.abs().sum()
        if norm >= 1e-8:
            out = out.mul_(norm / (out.abs().sum() + self.eps)).clamp_(-self.clip, self.clip)
        return out

    def _sparsified_tau(self, tau: Tau, name: str, call: int) -> Tensor:
        if isinstance(self.sparsify, Random):
            rescale = "expectation" if self.released else self.sparsify.rescale
            out = Random(self.sparsify.density, rescale)(tau.dense(name), self._key("tau", name, call))
            return out.clamp_(-self.clip, self.clip) if self.released else out
        if isinstance(self.sparsify, Magnitude) and self.sparsify.rescale != "l1":
            stored = tau.largest(name, self.sparsify.density)
            out = torch.zeros(stored.n)
            out[stored.index] = stored.values
            return out if self.sparsify.rescale == "none" else out.div_(self.sparsify.density)
        return self.sparsify(tau.dense(name), self._key("tau", name, call))

    def _key(self, stream: str, name: str, call: int) -> int:
        if stream == "tau" and self.released:
            call = 0  # one mask for the whole run
        return mask_key(self.seed, call, stream, name)

    def _for_size(self, n: int) -> Rule:
        if self.released and isinstance(self.sparsify, Magnitude) and int(self.sparsify.density * n) < 1:
            return replace(self, sparsify=Magnitude(1.0, self.sparsify.rescale))
        return self


class Tau:
    """The task vector as the optimizers use it: by plain parameter name, with F(τ) by magnitude kept once computed.

    Args:
        vector: the task vector; None is τ = 0.
        shapes: the parameters' shapes by plain name, for τ = 0.
    """

    def __init__(self, vector: TaskVector | None, shapes: dict[str, tuple[int, ...]]) -> None:
        self.vector = vector
        self._shapes = shapes
        self._largest: dict[tuple[str, float], SparseVector] = {}

    def numel(self, name: str) -> int:
        n = 1
        for size in self._shapes[name]:
            n *= size
        return n

    def dense(self, name: str) -> Tensor:
        return torch.zeros(self.numel(name)) if self.vector is None else self.vector.dense(name)

    def gather(self, name: str, index: Tensor) -> Tensor:
        return torch.zeros(index.numel()) if self.vector is None else self.vector.gather(name, index)

    def gather_all(self, names: Sequence[str], indices: Sequence[Tensor]) -> Tensor:
        if self.vector is None:
            return torch.zeros(sum(index.numel() for index in indices))
        return self.vector.gather_all(names, indices)

    def largest(self, name: str, density: float) -> SparseVector:
        """F(τ) by magnitude: static, so computed once and kept sparse (6 bytes a kept entry)."""
        key = (name, density)
        if key not in self._largest:
            if self.vector is None:
                nothing = torch.empty(0, dtype=torch.int64)
                self._largest[key] = SparseVector(nothing, torch.empty(0), self.numel(name))
            else:
                self._largest[key] = sparse_tau(self.vector, name, density)
        return self._largest[key]

    @property
    def resident_bytes(self) -> int:
        """Memory that F(τ) holds, beside what the task vector itself holds."""
        own = self.vector.resident_bytes if self.vector is not None else 0
        return own + sum(stored.resident_bytes for stored in self._largest.values())

    @property
    def fingerprint(self) -> str:
        return "none" if self.vector is None else self.vector.fingerprint


def _at_all(updates: Sequence[Source], indices: Sequence[Tensor]) -> Tensor:
    if all(isinstance(update, AdamUpdate) for update in updates):
        return AdamUpdate.at_all(cast(Sequence[AdamUpdate], updates), indices)
    return torch.cat([update.at(index) for update, index in zip(updates, indices, strict=True)])
