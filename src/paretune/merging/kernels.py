"""One merge method on one tensor: what has to be known of the whole of it, then range by range.

The compiled arithmetic does it where it was built (see `paretune.native`), numpy elsewhere: the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from math import fsum

import numpy as np

from ..errors import CheckpointError
from ..native import kernels
from . import coefficients
from .arithmetic import INFINITY, LANES, Arithmetic, Ready, Releaser
from .eager import Eager
from .fused import Fused
from .masks import Mask, mask_key
from .methods import MergeMethod
from .plan import Part, Settings
from .selection import BLOCK, EVERYTHING, Cut, find_cut
from .views import View

Emit = Callable[[int, int, np.ndarray], None]


class Kernel:
    """One merge method's arithmetic, with the buffers of one worker.

    Args:
        rule: the method.
        seed: of random masks.
        allow_non_finite: pass NaN and infinity on instead of failing.
        chunk: elements computed at a time, a multiple of `BLOCK`; never changes the result.

    Raises:
        ArgumentError: compiled kernels are demanded and not there.
    """

    def __init__(
        self, rule: MergeMethod, seed: int = 0, *, allow_non_finite: bool = False, chunk: int | None = None
    ) -> None:
        self.rule, self.seed, self.allow_non_finite = rule, seed, allow_non_finite
        self._eager = Eager(rule, careful=allow_non_finite, chunk=chunk or BLOCK)
        library = kernels()
        self._fused = None if library is None else Fused(library, rule, careful=allow_non_finite, chunk=chunk)

    def prepare(self, part: Part) -> tuple[Ready, ...]:
        """What has to be known of the whole tensor before any of it is written; reads it where that is needed."""
        return tuple(self._ready(part, settings) for settings in part.variants)

    def apply(self, part: Part, ready: tuple[Ready, ...], start: int, stop: int, emit: Emit) -> None:
        """Compute the elements ``start … stop−1`` of every result.

        Args:
            part: the tensor.
            ready: from `prepare`.
            start, stop: a range; start is a multiple of `BLOCK`.
            emit: called with each result's number, the first element's place and stored elements, which are valid
                until it returns.

        Raises:
            CheckpointError: an input is not finite, or the result overflows.
        """
        arithmetic = self._arithmetic(*ready)
        limit = INFINITY[part.kind]
        for begin in range(start, stop, arithmetic.chunk):
            end = min(stop, begin + arithmetic.chunk)
            # What a cut was made of has been looked at; and nothing that is kept whole escapes the last look.
            for number, largest in enumerate(arithmetic.load(part, ready, begin, end)):
                if largest >= INFINITY["F32"] and not self.allow_non_finite:
                    raise self._not_finite(part, begin, end, number)
            for number in range(len(ready)):
                stored, largest = arithmetic.result(number)
                if largest >= limit and not self.allow_non_finite:
                    raise self._not_finite(part, begin, end)
                emit(number, begin, stored)

    def _arithmetic(self, *ready: Ready) -> Arithmetic:
        """The compiled form, but for masks that are drawn by gaps: their logarithms are torch's."""
        gaps = any(isinstance(choice, Mask) and choice.by_gaps for each in ready for choice in each.keep)
        return self._eager if self._fused is None or gaps else self._fused

    def _ready(self, part: Part, settings: Settings) -> Ready:
        factors = np.ones(len(part.sources))
        if settings.rescale == "expectation":
            factors = 1 / np.array(settings.densities)
        keep = tuple(self._choice(part, number, density) for number, density in enumerate(settings.densities))
        draft = Ready(tuple(factors), settings.weights, keep, settings.scale, settings.normalize)
        if settings.rescale == "l1":
            factors = self._norm_ratios(part, draft)
        if self.rule.sphere is not None:
            found = self._on_sphere(part, settings) * settings.scale
        elif self.rule.family == "election":
            found = factors * settings.weights
        else:
            found = factors * settings.weights * settings.scale
        return Ready(tuple(map(float, found)), settings.weights, keep, settings.scale, settings.normalize)

    def _choice(self, part: Part, number: int, density: float) -> Cut | Mask | None:
        if self.rule.sparsify is None or density == 1:
            return None
        if self.rule.sparsify == "random":
            return Mask(mask_key(self.seed, number + 1, part.name), part.numel, density)
        if part.base is None:
            raise TypeError("a cut is made of a task vector")
        if part.numel == 0:
            return EVERYTHING
        magnitudes = self._arithmetic().magnitudes(part.sources[number], part.base)
        cut = find_cut(magnitudes, max(1, int(density * part.numel)))
        if magnitudes.largest >= INFINITY["F32"] and not self.allow_non_finite:
            raise self._not_finite(part, 0, part.numel, number)
        return cut

    def _on_sphere(self, part: Part, settings: Settings) -> np.ndarray:
        gram = self._gram(part)
        if self.rule.sphere == "slerp":
            return coefficients.slerp(gram, settings.t or 0.0)
        if self.rule.sphere == "model_stock":
            return coefficients.model_stock(gram)
        return coefficients.nested_slerp(gram, settings.weights)

    def _gram(self, part: Part) -> np.ndarray:
        count = len(part.sources)
        lanes = np.zeros((count * (count + 1) // 2, LANES))
        arithmetic, release = self._arithmetic(), Releaser(part.views)
        for start in range(0, part.numel, arithmetic.chunk):
            stop = min(part.numel, start + arithmetic.chunk)
            arithmetic.products(part, start, stop, lanes)
            release(start, stop)
        if not np.isfinite(lanes).all():
            if not self.allow_non_finite:
                raise self._not_finite(part, 0, part.numel)
            return np.eye(count)
        gram = np.zeros((count, count))
        gram[np.triu_indices(count)] = [fsum(sums) for sums in lanes]
        return np.triu(gram) + np.triu(gram, 1).T

    def _norm_ratios(self, part: Part, ready: Ready) -> np.ndarray:
        """‖x‖₁/‖F(x)‖₁ of every task vector; 1 where nothing is kept."""
        lanes = np.zeros((len(part.sources), 2, LANES))
        arithmetic, release = self._arithmetic(ready), Releaser(part.views)
        for start in range(0, part.numel, arithmetic.chunk):
            stop = min(part.numel, start + arithmetic.chunk)
            arithmetic.norms(part, ready, start, stop, lanes)
            release(start, stop)
        whole, left = lanes.sum(2).T
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(left > 0, whole / left, 1.0)

    def _not_finite(self, part: Part, start: int, stop: int, number: int | None = None) -> CheckpointError:
        """Which input is to blame; else the result is too large for its dtype."""
        views: list[View] = list(part.views)
        if number is not None:
            views = [part.sources[number], *([part.base] if part.base is not None else [])]
        values = np.empty(min(BLOCK, stop - start), np.float32)
        for view in views:
            for begin in range(start, stop, BLOCK):
                end = min(stop, begin + BLOCK)
                view.fill(begin, end, values[: end - begin])
                if not np.isfinite(values[: end - begin]).all():
                    return CheckpointError(
                        f"{part.name} in {_file_of(view)} holds NaN or infinity: repair the model, or pass "
                        "allow_non_finite (--allow-non-finite) to merge it as it is"
                    )
        return CheckpointError(f"{part.name} overflows {part.kind} when merged: choose dtype bfloat16 or float32")


def _file_of(view: View) -> str:
    info = getattr(view, "info", None)
    if info is not None:
        return str(info.file)
    inner = getattr(view, "stored", None) or getattr(view, "views", [None])[0]
    return "?" if inner is None else _file_of(inner)
