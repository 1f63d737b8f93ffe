"""How an update and the task vector become one: sparsify both, find consensus. Dense (the oracle) and sparse (fast)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..operators import (
    SPARSE_LIMIT,
    Consensus,
    Magnitude,
    Random,
    Sparsify,
    kept,
    largest_streamed,
    mask_key,
    sampled_indices,
)
from ..task_vector import TaskVector
from .sparse import SparseVector, sparse_tau, union

_MAGNITUDE_LIMIT = 0.25  # up to this density selecting is cheaper than the dense form


class Update(Protocol):
    """The update δ of one parameter, computed where it is asked for."""

    @property
    def n(self) -> int: ...

    def at(self, index: Tensor) -> Tensor: ...
    def slice(self, start: int, stop: int) -> Tensor: ...


@dataclass
class DenseUpdate:
    """An update that is there already."""

    values: Tensor

    @property
    def n(self) -> int:
        return self.values.numel()

    def at(self, index: Tensor) -> Tensor:
        return self.values[index]

    def slice(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]


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
        self, update: Update, tau: Tau, name: str, weight: float, call: int, device: torch.device
    ) -> tuple[Tensor | None, Tensor]:
        """What is added to a parameter: ``(positions, values)``, or ``(None, values of all elements)``."""
        own = self._for_size(update.n)
        if own.is_sparse:
            return own.sparse(update, tau, name, weight, call, device)
        return None, own.dense(update, tau, name, weight, call, device)

    @property
    def is_sparse(self) -> bool:
        """Whether the sparse form applies (and pays)."""
        if isinstance(self.sparsify, Random):
            return self.sparsify.density <= SPARSE_LIMIT and self.sparsify.rescale != "l1"
        if isinstance(self.sparsify, Magnitude):
            return self.sparsify.density <= _MAGNITUDE_LIMIT and self.sparsify.rescale != "l1"
        return False

    def dense(self, update: Update, tau: Tau, name: str, weight: float, call: int, device: torch.device) -> Tensor:
        """The definition, on whole tensors."""
        delta = update.slice(0, update.n)
        kept_delta = self._sparsified_update(delta, name, call)
        kept_tau = self._sparsified_tau(tau, name, call).to(device, delta.dtype)
        return self.consensus(kept_delta, kept_tau, weight)

    def sparse(
        self, update: Update, tau: Tau, name: str, weight: float, call: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The same, at the kept positions only."""
        scale = 1 / self.sparsify.density if self.sparsify.rescale == "expectation" else 1.0
        if isinstance(self.sparsify, Random):
            index = sampled_indices(self._key("update", name, call), update.n, self.sparsify.density, device=device)
        else:
            index = _largest_of(update, self.sparsify.density, device)
        delta = update.at(index) * scale if scale != 1 else update.at(index)
        index_tau, values_tau = self._kept_tau(tau, name, call, scale)
        index, a, b = union(index, delta, index_tau.to(device), values_tau.to(device))
        return index, self.consensus(a, b, weight)

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
            index, values = self._kept_tau(tau, name, call, 1.0)
            out = torch.zeros(tau.numel(name))
            out[index] = values
            return out if self.sparsify.rescale == "none" else out.div_(self.sparsify.density)
        return self.sparsify(tau.dense(name), self._key("tau", name, call))

    def _kept_tau(self, tau: Tau, name: str, call: int, scale: float) -> tuple[Tensor, Tensor]:
        if isinstance(self.sparsify, Random):
            index = sampled_indices(self._key("tau", name, call), tau.numel(name), self.sparsify.density)
            values = tau.gather(name, index)
        else:
            stored = tau.largest(name, self.sparsify.density)
            index, values = stored.index, stored.values
        if scale != 1:
            values = values * scale
        if self.released and isinstance(self.sparsify, Random):
            values = values.clamp(-self.clip, self.clip)
        return index, values

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


def _largest_of(update: Update, density: float, device: torch.device) -> Tensor:
    def sample(places: Tensor) -> Tensor:
        return update.at(places.to(device))

    return largest_streamed(update.slice, sample, update.n, kept(density, update.n))
