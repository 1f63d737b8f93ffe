"""What the two forms of the arithmetic, numpy's (`eager`) and the compiled one (`fused`), have in common.

Both give the same bits, whatever the range that is asked for, as long as it begins at a multiple of `BLOCK`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .masks import Mask
from .plan import Part
from .selection import Cut, Magnitudes
from .views import View

LANES = 64  # sums over a tensor are kept in so many, whose order is fixed: element i belongs to sum i mod LANES
INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}

Sums = NDArray[np.float64]


@dataclass(frozen=True)
class Ready:
    """What one tensor's arithmetic needs to know: for each model a coefficient, a weight and what is kept (None: all).

    ``normalize`` is an election's: the agreeing entries' mean.
    """

    coefficients: tuple[float, ...]
    weights: tuple[float, ...]
    keep: tuple[Cut | Mask | None, ...]
    scale: float
    normalize: bool

    @property
    def alone(self) -> int | None:
        """The model that the sum consists of, where all others' coefficients are 0."""
        others_none = self.coefficients.count(0.0) == len(self.coefficients) - 1
        return self.coefficients.index(1.0) if others_none and 1.0 in self.coefficients else None


class Arithmetic(Protocol):
    """The arithmetic on ranges of tensors, in buffers that are used again: one object a worker."""

    chunk: int  # elements of a range at most

    def load(self, part: Part, ready: tuple[Ready, ...], start: int, stop: int) -> list[int]:
        """Take up a range; the largest magnitudes, as bits, of the vectors of which something is dropped at random."""
        ...

    def result(self, number: int) -> tuple[NDArray[Any], int]:
        """One result of the range, as stored and valid until the next call, and its largest magnitude."""
        ...

    def products(self, part: Part, start: int, stop: int, lanes: Sums) -> None:
        """Add a range's inner products to ``lanes``: pairs (i ≤ j) x LANES."""
        ...

    def norms(self, part: Part, ready: Ready, start: int, stop: int, lanes: Sums) -> None:
        """Add a range's Σ|x| and Σ|F(x)| to ``lanes``: models x 2 x LANES."""
        ...

    def magnitudes(self, source: View, base: View) -> Magnitudes:
        """The magnitudes of a task vector."""
        ...


class Releaser:
    """Lets memory of views go while they are read from front to back."""

    STRIDE = 1 << 21  # elements

    def __init__(self, views: tuple[View, ...]) -> None:
        self._views, self._done = views, 0

    def __call__(self, start: int, stop: int) -> None:
        if start < self._done:
            self._done = 0
        if stop - self._done >= self.STRIDE:
            for view in self._views:
                view.release(self._done, stop)
            self._done = stop
