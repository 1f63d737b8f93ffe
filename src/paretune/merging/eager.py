"""The arithmetic of every method in numpy: float32, in reused buffers, rounded once.

`paretune.operators` defines what is computed and the tests hold these forms to it; the compiled form is held to them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arithmetic import LANES, Ready, Releaser, Sums
from .methods import MergeMethod
from .numbers import STORED, Bits, Floats, narrow
from .plan import Part
from .selection import BLOCK, Cut, Scan
from .views import View, numel

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_STORED = {kind: str(np.dtype(dtype)) for kind, dtype in STORED.items()}
_HAIR = np.float32(1e-37)


class Workspace:
    """Buffers, allocated once and used for every range."""

    def __init__(self, chunk: int = BLOCK) -> None:
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
            found = self._buffers[key] = np.empty(max(self.chunk, n), dtype)
        return found[:n]


class Eager:
    """`paretune.merging.arithmetic.Arithmetic` by numpy.

    Args:
        rule: the method.
        careful: NaN may occur.
        chunk: elements of a range at most; the buffers should stay in the cache.
    """

    def __init__(self, rule: MergeMethod, *, careful: bool = False, chunk: int = BLOCK) -> None:
        self.rule, self.careful, self.chunk = rule, careful, chunk
        self._space = Workspace(chunk)
        self._part: Part
        self._ready: tuple[Ready, ...] = ()
        self._start = 0
        self._vectors: list[Floats] = []

    def load(self, part: Part, ready: tuple[Ready, ...], start: int, stop: int) -> list[int]:
        self._part, self._ready, self._start = part, ready, start
        self._vectors = self._read(part, start, stop)
        if self.rule.sparsify != "random" or all(choice is None for each in ready for choice in each.keep):
            return []
        return [self._largest(vector.view(np.uint32)) for vector in self._vectors]

    def result(self, number: int) -> tuple[NDArray[Any], int]:
        part, ready, n = self._part, self._ready[number], self._vectors[0].size
        # A later result needs the vectors as they were.
        values = self._merged(part, ready, keep=number + 1 < len(self._ready))
        stored = self._space.get("stored", n, _STORED[part.kind])
        narrow(values, part.kind, stored, self._space.bits("rounding", n), careful=self.careful)
        if part.kind == "F32":
            return stored, self._largest(stored.view(np.uint32))
        probe = self._space.get("probe", n, "uint16")
        return stored, int(np.bitwise_and(stored.view(np.uint16), np.uint16(0x7FFF), out=probe).max(initial=0))

    def products(self, part: Part, start: int, stop: int, lanes: Sums) -> None:
        vectors = self._read(part, start, stop)
        product = self._space.floats("magnitude", stop - start)
        pairs = [(i, j) for i in range(len(vectors)) for j in range(i, len(vectors))]
        with np.errstate(invalid="ignore", over="ignore"):
            for (i, j), sums in zip(pairs, lanes, strict=True):
                self._add(np.multiply(vectors[i], vectors[j], out=product), sums)

    def norms(self, part: Part, ready: Ready, start: int, stop: int, lanes: Sums) -> None:
        magnitude = self._space.floats("magnitude", stop - start)
        for number, vector in enumerate(self._read(part, start, stop)):
            self._add(np.absolute(vector, out=magnitude), lanes[number, 0])
            self._sparsify(ready, number, vector, start)
            self._add(np.absolute(vector, out=magnitude), lanes[number, 1])

    def magnitudes(self, source: View, base: View) -> Scan:
        release = Releaser((source, base))

        def keys(start: int, stop: int) -> Bits:
            vector, other = (self._space.floats("vector", stop - start, i) for i in range(2))
            source.fill(start, stop, vector)
            base.fill(start, stop, other)
            with np.errstate(invalid="ignore", over="ignore"):
                np.subtract(vector, other, out=vector)
            release(start, stop)
            bits = vector.view(np.uint32)
            return np.bitwise_and(bits, _MAGNITUDE, out=bits)

        return Scan(numel(source.shape), keys)

    def _read(self, part: Part, start: int, stop: int) -> list[Floats]:
        """The models' elements, or their task vectors where there is a base."""
        n = stop - start
        vectors = [self._space.floats("vector", n, i) for i in range(len(part.sources))]
        for view, vector in zip(part.sources, vectors, strict=True):
            view.fill(start, stop, vector)
        if part.base is not None:
            base = self._space.floats("base", n)
            part.base.fill(start, stop, base)
            with np.errstate(invalid="ignore", over="ignore"):
                for vector in vectors:
                    np.subtract(vector, base, out=vector)
        return vectors

    def _merged(self, part: Part, ready: Ready, *, keep: bool) -> Floats:
        vectors, space, start = self._vectors, self._space, self._start
        n = vectors[0].size
        if self.rule.sparsify is not None:
            if keep:
                copies = [space.floats("copy", n, i) for i in range(len(vectors))]
                for copy, vector in zip(copies, vectors, strict=True):
                    np.copyto(copy, vector)
                vectors, keep = copies, False
            for number, vector in enumerate(vectors):
                self._sparsify(ready, number, vector, start)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            if self.rule.family == "election":
                total = self._elected(ready, vectors)
            else:
                if part.base is None and ready.alone is not None:
                    return vectors[ready.alone]  # to the bit: adding 0·x would turn -0 into 0
                scaled = [space.floats("scaled", n, i) for i in range(2)] if keep else [vectors[0], vectors[-1]]
                if part.kind == "F32":
                    return self._precise(part, ready, vectors, scaled[0])
                total = scaled[0]
                _scale(vectors[0], ready.coefficients[0], total)
                for vector, coefficient in zip(vectors[1:], ready.coefficients[1:], strict=True):
                    term = scaled[1] if keep else vector
                    _scale(vector, coefficient, term)
                    np.add(total, term, out=total)
            if part.base is not None:
                np.add(total, space.floats("base", n), out=total)
        return total

    def _precise(self, part: Part, ready: Ready, vectors: list[Floats], out: Floats) -> Floats:
        """The same sum in float64, for float32 results: the products' own rounding would show there."""
        n = vectors[0].size
        total, product = (self._space.get("wide", n, "float64", i) for i in range(2))
        np.multiply(vectors[0], ready.coefficients[0], out=total, dtype=np.float64)
        for vector, coefficient in zip(vectors[1:], ready.coefficients[1:], strict=True):
            np.multiply(vector, coefficient, out=product, dtype=np.float64)
            np.add(total, product, out=total)
        if part.base is not None:
            np.add(total, self._space.floats("base", n), out=total)
        np.copyto(out, total, casting="same_kind")
        return out

    def _sparsify(self, ready: Ready, number: int, vector: Floats, start: int) -> None:
        choice = ready.keep[number]
        if choice is not None:
            kept, shift = self._space.bits("kept", vector.size, number), self._space.bits("shift", vector.size)
            choice.drop(vector.view(np.uint32), start, kept, shift)

    def _elected(self, ready: Ready, vectors: list[Floats]) -> Floats:
        """The sum, or weighted mean, of the entries whose sign is that of the weighted sum of all."""
        n, space = vectors[0].size, self._space
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
                if isinstance(ready.keep[number], Cut):
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

    def _largest(self, bits: Bits) -> int:
        probe = self._space.bits("probe", bits.size)
        return int(np.bitwise_and(bits, _MAGNITUDE, out=probe).max(initial=0))

    def _add(self, values: Floats, sums: Sums) -> None:
        """Add element i to sum i mod LANES, one row of LANES after the other."""
        rows = -(-values.size // LANES)
        table = self._space.get("rows", (rows + 1) * LANES, "float64")
        table[:LANES] = sums
        table[LANES : LANES + values.size] = values
        table[LANES + values.size :] = 0
        # Along the slow axis numpy adds row to row; its pairwise summation is the fast axis's.
        np.add.reduce(table.reshape(-1, LANES), axis=0, out=sums)


def _scale(vector: Floats, factor: float, out: Floats | None = None) -> None:
    if factor != 1:
        np.multiply(vector, np.float32(factor), out=vector if out is None else out)
    elif out is not None and out is not vector:
        np.copyto(out, vector)


def _nonzero_mask(bits: Bits, out: Bits) -> None:
    """All ones where a float32 is not zero, all zeros where it is; without a branch."""
    np.bitwise_and(bits, _MAGNITUDE, out=out)
    signed = out.view(np.int32)
    np.negative(signed, out=signed)
    np.right_shift(signed, 31, out=signed)


def _spread_sign(bits: Bits) -> None:
    signed = bits.view(np.int32)
    np.right_shift(signed, 31, out=signed)
