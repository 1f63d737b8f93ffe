"""The arithmetic of every method on one range of one tensor: float32, in reused buffers, rounded once.

`paretune.operators` defines what is computed; the tests hold these forms to it. Nothing here depends on where a range
begins or ends beyond its being a multiple of `BLOCK`, so the result is the same for any chunk size and worker count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import CheckpointError
from . import coefficients
from .masks import drop, mask_key
from .methods import MergeMethod
from .numbers import STORED, Bits, Floats, narrow
from .plan import Part, Settings
from .selection import BLOCK, EVERYTHING, Cut, drop_below, find_cut
from .views import View

CHUNK = BLOCK
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_STORED = {kind: str(np.dtype(dtype)) for kind, dtype in STORED.items()}
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
_HAIR = np.float32(1e-37)
_ROW = 4096  # products are summed in float32 within rows of this many elements, and in float64 across rows

Emit = Callable[[int, np.ndarray], None]


class Workspace:
    """One worker's buffers: allocated once, used for every range."""

    def __init__(self, chunk: int = CHUNK) -> None:
        self.chunk = chunk
        self._buffers: dict[tuple[str, int, str], np.ndarray] = {}

    def floats(self, role: str, n: int, number: int = 0) -> Floats:
        return self.get(role, n, "float32", number)

    def bits(self, role: str, n: int, number: int = 0) -> Bits:
        return self.get(role, n, "uint32", number)

    def get(self, role: str, n: int, dtype: str, number: int = 0) -> np.ndarray:
        """The first n elements of the buffer that is used for this role."""
        key = (role, number, dtype)
        found = self._buffers.get(key)
        if found is None or found.size < n:
            found = self._buffers[key] = np.empty(max(self.chunk, BLOCK, n), dtype)
        return found[:n]


@dataclass(frozen=True)
class Ready:
    """What one tensor's arithmetic needs to know: for each model a coefficient, a weight and what is kept."""

    coefficients: tuple[float, ...]
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    cuts: tuple[Cut, ...]
    scale: float
    normalize: bool


class Kernel:
    """One merge method's arithmetic.

    Args:
        rule: the method.
        seed: of random masks.
        allow_non_finite: pass NaN and infinity on instead of failing.
    """

    def __init__(self, rule: MergeMethod, seed: int = 0, *, allow_non_finite: bool = False) -> None:
        self.rule, self.seed, self.allow_non_finite = rule, seed, allow_non_finite

    def prepare(self, part: Part, space: Workspace) -> tuple[Ready, ...]:
        """What has to be known of the whole tensor before any of it is written; reads it where that is needed."""
        return tuple(self._ready(part, settings, space) for settings in part.variants)

    def apply(self, part: Part, ready: tuple[Ready, ...], start: int, stop: int, space: Workspace, emit: Emit) -> None:
        """Compute the elements ``start … stop−1`` of every result.

        Args:
            part: the tensor.
            ready: from `prepare`.
            start, stop: a range of at most the workspace's chunk; start is a multiple of `BLOCK`.
            space: the worker's buffers.
            emit: called with each result's number and its stored elements, which are valid until it returns.
        """
        n = stop - start
        vectors = self._vectors(part, start, stop, space)
        if self.rule.sparsify and not self.allow_non_finite:
            for number, vector in enumerate(vectors):
                # What a cut was made of has been looked at; and nothing that is kept whole escapes the last look.
                dropped = any(each.densities[number] < 1 for each in ready)
                if (
                    self.rule.sparsify == "random"
                    and dropped
                    and _largest(vector.view(np.uint32), space) >= _INFINITY["F32"]
                ):
                    raise self._not_finite(part, start, stop, space, number)
        for number, each in enumerate(ready):
            stored = space.get("stored", n, _STORED[part.kind])
            # A later result needs the vectors as they were.
            values = self._merged(part, each, vectors, start, space, keep=number + 1 < len(ready))
            narrow(values, part.kind, stored, space.bits("rounding", n), careful=self.allow_non_finite)
            if not self.allow_non_finite and not _finite(stored, part.kind, space):
                raise self._not_finite(part, start, stop, space)
            emit(number, stored)

    def _vectors(self, part: Part, start: int, stop: int, space: Workspace) -> list[Floats]:
        """The models' elements, or their task vectors where there is a base."""
        n = stop - start
        vectors = [space.floats("vector", n, i) for i in range(len(part.sources))]
        for view, vector in zip(part.sources, vectors, strict=True):
            view.fill(start, stop, vector)
        if part.base is not None:
            base = space.floats("base", n)
            part.base.fill(start, stop, base)
            with np.errstate(invalid="ignore", over="ignore"):
                for vector in vectors:
                    np.subtract(vector, base, out=vector)
        return vectors

    def _merged(
        self, part: Part, ready: Ready, vectors: list[Floats], start: int, space: Workspace, *, keep: bool
    ) -> Floats:
        n = vectors[0].size
        sparse = self.rule.sparsify is not None
        if keep and sparse:
            copies = [space.floats("copy", n, i) for i in range(len(vectors))]
            for copy, vector in zip(copies, vectors, strict=True):
                np.copyto(copy, vector)
            vectors, keep = copies, False
        if sparse:
            for number, vector in enumerate(vectors):
                self._sparsify(part, ready, number, vector, start, space)
        with np.errstate(invalid="ignore", over="ignore"):
            if self.rule.family == "election":
                total = self._elected(ready, vectors, space)
            else:
                scaled = [space.floats("scaled", n, i) for i in range(2)] if keep else [vectors[0], vectors[-1]]
                if part.kind == "F32":
                    return self._precise(part, ready, vectors, scaled[0], space)
                total = scaled[0]
                _scale(vectors[0], ready.coefficients[0], total)
                for vector, coefficient in zip(vectors[1:], ready.coefficients[1:], strict=True):
                    term = scaled[1] if keep else vector
                    _scale(vector, coefficient, term)
                    np.add(total, term, out=total)
            if part.base is not None:
                np.add(total, space.floats("base", n), out=total)
        return total

    def _precise(self, part: Part, ready: Ready, vectors: list[Floats], out: Floats, space: Workspace) -> Floats:
        """The same sum in float64, for float32 results: the products' own rounding would show there."""
        n = vectors[0].size
        total, product = space.get("total", n, "float64"), space.get("product", n, "float64")
        np.multiply(vectors[0], ready.coefficients[0], out=total, dtype=np.float64)
        for vector, coefficient in zip(vectors[1:], ready.coefficients[1:], strict=True):
            np.multiply(vector, coefficient, out=product, dtype=np.float64)
            np.add(total, product, out=total)
        if part.base is not None:
            np.add(total, space.floats("base", n), out=total)
        np.copyto(out, total, casting="same_kind")
        return out

    def _sparsify(self, part: Part, ready: Ready, number: int, vector: Floats, start: int, space: Workspace) -> None:
        if self.rule.sparsify is None or ready.densities[number] == 1:
            return
        bits, scratch = vector.view(np.uint32), space.bits("kept", vector.size, number)
        if self.rule.sparsify == "magnitude":
            drop_below(bits, ready.cuts[number], start, scratch)
        else:
            key = mask_key(self.seed, number + 1, part.name)
            drop(
                bits,
                key,
                part.numel,
                ready.densities[number],
                start,
                scratch,
                space.bits("shift", min(BLOCK, bits.size)),
            )

    def _elected(self, ready: Ready, vectors: list[Floats], space: Workspace) -> Floats:
        """The sum, or weighted mean, of the entries whose sign is that of the weighted sum of all."""
        n = vectors[0].size
        for vector, coefficient in zip(vectors, ready.coefficients, strict=True):
            _scale(vector, coefficient)
        if len(vectors) == 1 and not ready.normalize:
            _scale(vectors[0], ready.scale)
            return vectors[0]
        total, elected = space.floats("elected", n), space.bits("elected", n)
        if len(vectors) > 1:
            np.add(vectors[0], vectors[1], out=total)
        else:
            np.copyto(total, vectors[0])
        for vector in vectors[2:]:
            np.add(total, vector, out=total)
        sign = total.view(np.uint32)
        _nonzero_mask(sign, elected)  # a sum of zero elects nobody
        np.invert(sign, out=sign)
        weight, divisor = space.bits("weight", n), space.floats("divisor", n)
        for number, vector in enumerate(vectors):
            bits = vector.view(np.uint32)
            np.bitwise_xor(bits, sign, out=weight)  # the sign bit is set where the signs agree
            _spread_sign(weight)
            np.bitwise_and(bits, weight, out=bits)
            if ready.normalize:
                if self.rule.sparsify == "magnitude" and ready.densities[number] < 1:
                    np.bitwise_and(weight, space.bits("kept", n, number), out=weight)  # what is kept is not zero
                else:
                    _nonzero_mask(bits, weight)
                np.bitwise_and(weight, np.float32(ready.weights[number]).view(np.uint32), out=weight)
                # Nothing but a hair where nobody agrees: what is divided by it there is 0.
                np.add(divisor if number else _HAIR, weight.view(np.float32), out=divisor)
        result = vectors[0]
        for vector in vectors[1:]:
            np.add(result, vector, out=result)
        np.bitwise_and(result.view(np.uint32), elected, out=result.view(np.uint32))
        if ready.normalize:
            if min(ready.weights) < 0:  # the weights of those who agree may cancel: the sum stays, as mergekit has it
                np.copyto(divisor, 1, where=np.abs(divisor) < 1e-8)
            np.divide(result, divisor, out=result)
        _scale(result, ready.scale)
        return result

    def _ready(self, part: Part, settings: Settings, space: Workspace) -> Ready:
        count = len(part.sources)
        cuts = tuple(EVERYTHING for _ in range(count))
        densities = settings.densities
        if self.rule.sparsify == "magnitude":
            cuts = tuple(self._cut(part, number, densities[number], space) for number in range(count))
        factors = np.ones(count)
        if settings.rescale == "expectation":
            factors = 1 / np.array(densities)
        draft = Ready(tuple(factors), settings.weights, densities, cuts, settings.scale, settings.normalize)
        if settings.rescale == "l1":
            factors = self._norm_ratios(part, draft, space)
        if self.rule.sphere is not None:
            found = self._on_sphere(part, settings, space) * settings.scale
        elif self.rule.family == "election":
            found = factors * settings.weights
        else:
            found = factors * settings.weights * settings.scale
        return Ready(tuple(map(float, found)), settings.weights, densities, cuts, settings.scale, settings.normalize)

    def _on_sphere(self, part: Part, settings: Settings, space: Workspace) -> np.ndarray:
        gram = self._gram(part, space)
        if self.rule.sphere == "slerp":
            return coefficients.slerp(gram, settings.t or 0.0)
        if self.rule.sphere == "model_stock":
            return coefficients.model_stock(gram)
        return coefficients.nested_slerp(gram, settings.weights)

    def _gram(self, part: Part, space: Workspace) -> np.ndarray:
        count = len(part.sources)
        gram = np.zeros((count, count))
        for start, stop in blocks(part.numel):
            vectors = self._vectors(part, start, stop, space)
            with np.errstate(invalid="ignore", over="ignore"):
                for i in range(count):
                    for j in range(i, count):
                        gram[i, j] += inner(vectors[i], vectors[j])
            self._release(part, start, stop)
        if not np.isfinite(gram).all():
            if not self.allow_non_finite:
                raise self._not_finite(part, 0, part.numel, space)
            gram = np.eye(count)
        return np.triu(gram) + np.triu(gram, 1).T

    def _norm_ratios(self, part: Part, ready: Ready, space: Workspace) -> np.ndarray:
        """‖x‖₁/‖F(x)‖₁ of every task vector; 1 where nothing is kept."""
        whole, left = np.zeros(len(part.sources)), np.zeros(len(part.sources))
        for start, stop in blocks(part.numel):
            magnitude = space.floats("magnitude", stop - start)
            for number, vector in enumerate(self._vectors(part, start, stop, space)):
                whole[number] += np.add.reduce(np.absolute(vector, out=magnitude))
                self._sparsify(part, ready, number, vector, start, space)
                left[number] += np.add.reduce(np.absolute(vector, out=magnitude))
            self._release(part, start, stop)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(left > 0, whole / left, 1.0)

    def _cut(self, part: Part, number: int, density: float, space: Workspace) -> Cut:
        if density == 1 or part.numel == 0:
            return EVERYTHING
        if part.base is None:
            raise TypeError("a cut is made of a task vector")
        source, base = part.sources[number], part.base
        release = _Releaser((source, base))
        largest = 0

        def keys(start: int, stop: int) -> Bits:
            nonlocal largest
            vector, other = space.floats("vector", stop - start), space.floats("base", stop - start)
            source.fill(start, stop, vector)
            base.fill(start, stop, other)
            with np.errstate(invalid="ignore", over="ignore"):
                np.subtract(vector, other, out=vector)
            release(start, stop)
            bits = vector.view(np.uint32)
            np.bitwise_and(bits, _MAGNITUDE, out=bits)
            largest = max(largest, int(bits.max(initial=0)))
            return bits

        cut = find_cut(part.numel, max(1, int(density * part.numel)), keys, space.bits)
        if largest >= _INFINITY["F32"] and not self.allow_non_finite:
            raise self._not_finite(part, 0, part.numel, space, number)
        return cut

    def _release(self, part: Part, start: int, stop: int) -> None:
        if (start and start % _Releaser.STRIDE == 0) or stop == part.numel:
            for view in part.views:
                view.release(max(0, start - _Releaser.STRIDE), stop)

    def _not_finite(
        self, part: Part, start: int, stop: int, space: Workspace, number: int | None = None
    ) -> CheckpointError:
        """Which input is to blame; else the result is too large for its dtype."""
        views: list[View] = list(part.views)
        if number is not None:
            views = [part.sources[number], *([part.base] if part.base is not None else [])]
        for view in views:
            for begin, end in blocks(stop - start):
                values = space.floats("probe", end - begin)
                view.fill(start + begin, start + end, values)
                if not np.isfinite(values).all():
                    where = _file_of(view)
                    return CheckpointError(
                        f"{part.name} in {where} holds NaN or infinity: repair the model, or pass allow_non_finite "
                        "(--allow-non-finite) to merge it as it is"
                    )
        return CheckpointError(f"{part.name} overflows {part.kind} when merged: choose dtype bfloat16 or float32")


class _Releaser:
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


def blocks(n: int) -> Iterator[tuple[int, int]]:
    """The ranges of `BLOCK` elements of a tensor of n."""
    for start in range(0, n, BLOCK):
        yield start, min(n, start + BLOCK)


def _scale(vector: Floats, factor: float, out: Floats | None = None) -> None:
    if factor != 1:
        np.multiply(vector, np.float32(factor), out=vector if out is None else out)
    elif out is not None and out is not vector:
        np.copyto(out, vector)


def inner(a: Floats, b: Floats) -> float:
    """⟨a, b⟩, in float32 within rows and float64 across them."""
    whole = a.size // _ROW * _ROW
    rows = np.einsum("ij,ij->i", a[:whole].reshape(-1, _ROW), b[:whole].reshape(-1, _ROW))
    return float(rows.sum(dtype=np.float64)) + float(np.einsum("i,i->", a[whole:], b[whole:]))


def _nonzero_mask(bits: Bits, out: Bits) -> None:
    """All ones where a float32 is not zero, all zeros where it is; without a branch."""
    np.bitwise_and(bits, _MAGNITUDE, out=out)
    signed = out.view(np.int32)
    np.negative(signed, out=signed)
    np.right_shift(signed, 31, out=signed)


def _spread_sign(bits: Bits) -> None:
    signed = bits.view(np.int32)
    np.right_shift(signed, 31, out=signed)


def _largest(bits: Bits, space: Workspace) -> int:
    return int(np.bitwise_and(bits, _MAGNITUDE, out=space.bits("probe", bits.size)).max(initial=0))


def _finite(stored: np.ndarray, kind: str, space: Workspace) -> bool:
    if kind == "F32":
        return _largest(stored.view(np.uint32), space) < _INFINITY["F32"]
    probe = space.get("probe", stored.size, "uint16")
    return int(np.bitwise_and(stored.view(np.uint16), np.uint16(0x7FFF), out=probe).max(initial=0)) < _INFINITY[kind]


def _file_of(view: View) -> str:
    info = getattr(view, "info", None)
    if info is not None:
        return str(info.file)
    inner = getattr(view, "stored", None) or getattr(view, "views", [None])[0]
    return "?" if inner is None else _file_of(inner)
