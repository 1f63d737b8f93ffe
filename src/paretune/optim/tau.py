"""The task vector as the optimizers use it: this rank's part, by plain parameter name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..operators import above, kept, largest_streamed
from ..task_vector import TaskVector
from .parts import Part
from .sparse import SparseVector
from .threshold import Threshold, Wanted, thresholds


class Tau:
    """The task vector by plain parameter name, with F(τ) by magnitude kept once computed (6 bytes a kept entry).

    Args:
        vector: the task vector; None is τ = 0.
    """

    def __init__(self, vector: TaskVector | None) -> None:
        self.vector = vector
        self._largest: dict[str, tuple[float, Part, SparseVector]] = {}

    def dense(self, name: str, part: Part) -> Tensor:
        """This rank's elements, flat, float32."""
        vector = self.vector
        return torch.zeros(part.n) if vector is None else part.cut(lambda i, j: vector.dense(name, i, j))

    def gather_all(self, names: Sequence[str], positions: Sequence[Tensor]) -> Tensor:
        """The elements at positions of the whole parameters, concatenated."""
        if self.vector is None:
            return torch.zeros(sum(index.numel() for index in positions))
        return self.vector.gather_all(names, positions)

    def wanted(self, name: str, density: float, part: Part) -> Wanted | None:
        """What the ranks must agree on before `largest`; None where nothing is missing."""
        if not part.sharded or self.vector is None or density == 1 or self._found(name, density, part):
            return None
        return Wanted(TauSource(self.vector, name, part), part, kept(density, part.whole), False)

    def largest(
        self, name: str, density: float, part: Part, threshold: Threshold | None = None, keep: bool = True
    ) -> SparseVector:
        """This rank's part of F(τ) by magnitude: static, so computed once.

        Args:
            threshold: of what `wanted` asked for.
            keep: whether to keep it for the next time.
        """
        if (found := self._found(name, density, part)) is not None:
            return found
        if self.vector is None:
            result = SparseVector(torch.empty(0, dtype=torch.int64), torch.empty(0), part.n)
        else:
            source = TauSource(self.vector, name, part)
            if density == 1:
                values = source.slice(0, source.n)
                index = values.nonzero().view(-1)
                result = SparseVector(index, values[index], part.n)
            elif threshold is not None:
                result = SparseVector(*threshold.select(source), part.n)
            else:
                result = SparseVector(*largest_streamed(source, kept(density, part.n)), part.n)
        if keep:
            self._largest[name] = density, part, result
        return result

    def _found(self, name: str, density: float, part: Part) -> SparseVector | None:
        if name in self._largest and self._largest[name][:2] == (density, part):
            return self._largest[name][2]
        return None

    @property
    def resident_bytes(self) -> int:
        """Memory that F(τ) holds, with what the task vector itself holds."""
        own = self.vector.resident_bytes if self.vector is not None else 0
        return own + sum(stored.resident_bytes for _, _, stored in self._largest.values())

    @property
    def fingerprint(self) -> str:
        """The task vector's; "none" for τ = 0."""
        return "none" if self.vector is None else self.vector.fingerprint


class TauSource:
    """This rank's part of one tensor of τ, read where asked and never held whole."""

    def __init__(self, vector: TaskVector, name: str, part: Part) -> None:
        self.vector, self.name, self.part, self.n = vector, name, part, part.n

    def at(self, index: Tensor) -> Tensor:
        return self.vector.gather(self.name, self.part.whole_positions(index))

    def slice(self, start: int, stop: int, step: int = 1) -> Tensor:
        if step == 1 and self.part.contiguous:
            begin = self.part.range[0]
            return self.vector.dense(self.name, begin + start, begin + stop)
        return self.at(torch.arange(start, stop, step))

    def above(self, start: int, stop: int, bound: float) -> Tensor:
        return above(self.slice(start, stop), bound)


def make_ready(tau: Tau, parts: Mapping[str, Part], density: float) -> None:
    """Compute F(τ) by magnitude of these parameters, in three exchanges between the ranks where they are sharded."""
    missing = [(name, want) for name, part in parts.items() if (want := tau.wanted(name, density, part)) is not None]
    for (name, want), threshold in zip(missing, thresholds([want for _, want in missing]), strict=True):
        tau.largest(name, density, want.part, threshold)


def shares(tau: Tau, parts: Mapping[str, Part], density: float, chunk: int = 1 << 19) -> Tensor:
    """‖F(τ)‖₁ and ‖τ‖₁ of this rank's parts, one row for each parameter (float64).

    F(τ) is kept for the steps, but not that of whole parameters among several ranks: accelerate shards them later.
    """
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    alone = alone or torch.distributed.get_world_size() == 1
    rows = torch.zeros(len(parts), 2, dtype=torch.float64)
    for row, (name, part) in enumerate(parts.items()):
        if tau.vector is None:
            continue
        stored = tau.largest(name, density, part, keep=alone or part.sharded)
        rows[row, 0] = stored.values.abs().sum(dtype=torch.float64)
        source = TauSource(tau.vector, name, part)
        for start in range(0, part.n, chunk):
            rows[row, 1] += source.slice(start, min(part.n, start + chunk)).abs().sum(dtype=torch.float64)
    return rows
