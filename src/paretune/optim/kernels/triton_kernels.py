# mypy: ignore-errors
"""The optimizer step's kernels in Triton: float32 arithmetic with the roundings of ``native/optimizer.c``.

Many tensors a launch: a table has one row of addresses and sizes for each parameter, and each program finds its row in
``owner``. Loads of whole tiles are not masked, so that they can be wide. Nothing is contracted behind our back (launch
with ``enable_fp_fusion=False``): where torch rounds a multiplication and an addition once, `tl.fma` says so.
"""

from __future__ import annotations

import triton
import triton.language as tl

# columns of the table
THETA, LOW, MEAN, SQUARE, GRADIENT, COUNT, START, PAGES = (tl.constexpr(i) for i in range(8))
KEY_LOW, KEY_HIGH, TAU, TAU_END, TAU_BLOCKS, ROOM, ROOM_END, ROOM_BLOCKS = (tl.constexpr(i) for i in range(8, 16))
COLUMNS = tl.constexpr(16)
PAGE = tl.constexpr(1 << 16)  # as in operators/masks.py: elements that share one sequence of gaps
TILE = tl.constexpr(1 << 11)  # elements handled at a time
BLOCK = tl.constexpr(1 << 12)  # entries of a list handled by one program
BINS = tl.constexpr(1 << 11)
SUM, ELECTION, ELECTION_UNWEIGHTED = (tl.constexpr(i) for i in range(3))


@triton.jit
def _column(table, row, column: tl.constexpr):
    return tl.load(table + row * COLUMNS + column)


@triton.jit
def _address(table, row, column: tl.constexpr, kind: tl.constexpr, aligned: tl.constexpr):
    pointer = _column(table, row, column).to(tl.pointer_type(kind))
    if aligned:  # to 16 bytes: wide loads
        pointer = tl.multiple_of(pointer, 16)
    return pointer


# ---- moments and δ --------------------------------------------------------------------------------------------------


@triton.jit
def _advanced(mean, square, gradient, at, mask, slope, keep, add, near: tl.constexpr, half: tl.constexpr):
    """m + (1−β₁)(g − m) and β₂v + (1−β₂)g²."""
    if half:
        bits = tl.load(gradient + at, mask=mask).to(tl.int32)
        g = (bits << 16).to(tl.float32, bitcast=True)
    else:
        g = tl.load(gradient + at, mask=mask)
    m = tl.load(mean + at, mask=mask)
    v = tl.load(square + at, mask=mask)
    # torch's lerp starts from the nearer end
    m = tl.fma(g - m, slope, m if near else g)
    return m, tl.fma(add * g, g, v * keep)


@triton.jit
def _update(m, v, size, root, eps):
    return tl.div_rn(m * size, tl.div_rn(tl.sqrt_rn(v), root) + eps)


@triton.jit
def _magnitude(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


# ---- consensus and θ ------------------------------------------------------------------------------------------------


@triton.jit
def _consensus(a, b, own, weight, kind: tl.constexpr):
    if kind == ELECTION_UNWEIGHTED:
        positive = a + b >= 0
        x = tl.where((positive == (a >= 0)) | (a == 0) | (a != a), a, 0.0)
        y = tl.where((positive == (b >= 0)) | (b == 0) | (b != b), b, 0.0)
        return own * x + weight * y
    a = own * a
    b = weight * b
    if kind == SUM:
        return a + b
    conflict = ((a > 0) & (b < 0)) | ((a < 0) & (b > 0))
    larger = tl.where(tl.abs(a) > tl.abs(b), a, tl.where(tl.abs(b) > tl.abs(a), b, 0.0))
    return tl.where(conflict, larger, a + b)


@triton.jit
def _split(x):
    """The halves of a float32: bfloat16 (rounded to nearest, halves away from zero) and the rest, both as int32."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x != x, 0x7FC00000, bits)  # a NaN with a full payload would round over into -0
    high = (bits + 0x8000) >> 16
    return high, bits - (high << 16)


@triton.jit
def _add(theta, low, at, value, mask, split: tl.constexpr):
    if split:
        high = tl.load(theta + at, mask=mask).to(tl.int32)
        rest = tl.load(low + at, mask=mask).to(tl.int32)
        high, rest = _split(((high << 16) + rest).to(tl.float32, bitcast=True) + value)
        tl.store(theta + at, high.to(tl.int16), mask=mask)
        tl.store(low + at, rest.to(tl.int16), mask=mask)
    else:
        tl.store(theta + at, tl.load(theta + at, mask=mask) + value, mask=mask)


@triton.jit
def _rescaled(x, density, clip):
    x = tl.div_rn(x, density)
    return tl.where(x < -clip, -clip, tl.where(x > clip, clip, x))


@triton.jit
def _add_own(
    theta, low, at, delta, mask, places, values, taken, first, last, own, weight, density, clip,
    kind: tl.constexpr, split: tl.constexpr,
):  # fmt: skip
    """θ += C(δ, τ) at some of δ's positions; τ's entries that are there are marked as taken."""
    # the last entry of τ at or before each position
    entry = tl.zeros_like(at) + first
    left = last - first
    while left > 1:
        half = left // 2
        place = tl.load(places + entry + half, mask=mask, other=0)
        entry = tl.where(place <= at, entry + half, entry)
        left -= half
    hit = mask & (entry < last)
    hit = hit & (tl.load(places + entry, mask=hit, other=-1) == at)
    tau = _rescaled(tl.load(values + entry, mask=hit, other=0.0), density, clip)
    tl.store(taken + entry, tl.full(at.shape, 1, tl.int8), mask=hit)
    tau = tl.where(hit, tau, 0.0)
    _add(theta, low, at, _consensus(tl.div_rn(delta, density), tau, own, weight, kind), mask, split)


@triton.jit
def add_rest(table, owner, places, values, taken, own, weight, density, clip, KIND: tl.constexpr, SPLIT: tl.constexpr):
    """θ += C(0, τ) at τ's positions that δ lacks."""
    row = tl.load(owner + tl.program_id(0))
    theta = _address(table, row, THETA, tl.int16 if SPLIT else tl.float32, False)
    low = _address(table, row, LOW, tl.int16, False)
    block = tl.program_id(0) - _column(table, row, TAU_BLOCKS)
    entry = _column(table, row, TAU) + block * BLOCK + tl.arange(0, BLOCK)
    mask = entry < _column(table, row, TAU_END)
    mask = mask & (tl.load(taken + entry, mask=mask, other=1) == 0)
    at = tl.load(places + entry, mask=mask, other=0)
    tau = _rescaled(tl.load(values + entry, mask=mask, other=0.0), density, clip)
    _add(theta, low, at, _consensus(tl.zeros_like(tau), tau, own, weight, KIND), mask, SPLIT)


@triton.jit
def scale_split(theta, low, n, factor):
    """θ ← factor·θ of a bfloat16 parameter with its low halves."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < n
    high = tl.load(theta + at, mask=mask).to(tl.int32)
    rest = tl.load(low + at, mask=mask).to(tl.int32)
    high, rest = _split(((high << 16) + rest).to(tl.float32, bitcast=True) * factor)
    tl.store(theta + at, high.to(tl.int16), mask=mask)
    tl.store(low + at, rest.to(tl.int16), mask=mask)


# ---- OnDARE: moments, and δ at random positions ---------------------------------------------------------------------


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def _gaps(counter, key_low, key_high, scale):
    """Distances between kept elements: what `paretune.operators.masks` draws for these counters."""
    x = _mix(counter.to(tl.uint32) ^ key_low)
    x = _mix(x + (counter >> 32).to(tl.uint32) * 0x9E3779B9 + key_high)
    # exact in float64; in two additions because 0.5 + 2⁻³³ is no float32, which constants may become
    u = x.to(tl.int32, bitcast=True).to(tl.float64) * 2.0**-32 + 0.5 + 2.0**-33
    gap = tl.floor(tl.log(u) * scale) + 1
    return tl.minimum(gap, PAGE + 1).to(tl.int32)


@triton.jit
def advance(
    table, owner, numbers, scale, places, values, taken,
    slope, keep, add, eps, own, weight, density, clip,
    NEAR: tl.constexpr, HALF: tl.constexpr, SPLIT: tl.constexpr, ALIGNED: tl.constexpr,
    DRAWS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One page: the moments of all elements; then, if DRAWS, θ += C(δ, τ) at the positions drawn for δ.

    DRAWS: how many positions are drawn at a time.
    """
    row = tl.load(owner + tl.program_id(0))
    n = _column(table, row, COUNT)
    mean = _address(table, row, MEAN, tl.float32, ALIGNED)
    square = _address(table, row, SQUARE, tl.float32, ALIGNED)
    gradient = _address(table, row, GRADIENT, tl.int16 if HALF else tl.float32, ALIGNED)
    page = tl.program_id(0) - _column(table, row, PAGES)
    begin = page * PAGE - _column(table, row, START)  # where the page begins in what this rank holds; may be below 0
    for tile in range(0, PAGE, TILE):
        first = begin + tile
        if ALIGNED:
            first = tl.multiple_of(first, 16)
        at = first + tl.arange(0, TILE)
        if (first >= 0) & (first + TILE <= n):
            m, v = _advanced(mean, square, gradient, at, None, slope, keep, add, NEAR, HALF)
            tl.store(mean + at, m)
            tl.store(square + at, v)
        elif (first + TILE > 0) & (first < n):
            mask = (at >= 0) & (at < n)
            m, v = _advanced(mean, square, gradient, at, mask, slope, keep, add, NEAR, HALF)
            tl.store(mean + at, m, mask=mask)
            tl.store(square + at, v, mask=mask)
    if DRAWS:
        tl.debug_barrier()  # other threads of this program wrote what is read now
        theta = _address(table, row, THETA, tl.int16 if SPLIT else tl.float32, False)
        low = _address(table, row, LOW, tl.int16, False)
        key_low = _column(table, row, KEY_LOW).to(tl.uint32)
        key_high = _column(table, row, KEY_HIGH).to(tl.uint32)
        size = tl.load(numbers + 2 * row)
        root = tl.load(numbers + 2 * row + 1)
        shrink = tl.load(scale)
        counter = page * PAGE + tl.arange(0, DRAWS)
        before = -1
        while before < PAGE:
            position = before + tl.cumsum(_gaps(counter, key_low, key_high, shrink), 0)
            at = begin + position
            mask = (position < PAGE) & (at >= 0) & (at < n)
            m = tl.load(mean + at, mask=mask, other=0.0)
            v = tl.load(square + at, mask=mask, other=0.0)
            _add_own(
                theta, low, at, _update(m, v, size, root, eps), mask, places, values, taken,
                _column(table, row, TAU), _column(table, row, TAU_END), own, weight, density, clip, KIND, SPLIT,
            )  # fmt: skip
            before = tl.max(position, 0)
            counter += DRAWS


# ---- OnTIES: moments and candidates, the k-th magnitude, δ where it is kept -----------------------------------------


@triton.jit
def sample(table, numbers, out, slope, keep, add, eps, NEAR: tl.constexpr, HALF: tl.constexpr, SAMPLES: tl.constexpr):
    """Magnitudes (bits) that δ will have after this step, at SAMPLES places spread over each parameter."""
    row = tl.program_id(0)
    mean = _address(table, row, MEAN, tl.float32, False)
    square = _address(table, row, SQUARE, tl.float32, False)
    gradient = _address(table, row, GRADIENT, tl.int16 if HALF else tl.float32, False)
    stride = _column(table, row, COUNT) // SAMPLES
    line = tl.program_id(1) * TILE + tl.arange(0, TILE)
    # a varying place within each stride does not fall into step with the rows of a matrix
    shift = (line.to(tl.uint32) * 2654435761 >> 8).to(tl.int64) % tl.maximum(stride, 1)
    m, v = _advanced(mean, square, gradient, line * stride + shift, None, slope, keep, add, NEAR, HALF)
    delta = _update(m, v, tl.load(numbers + 2 * row), tl.load(numbers + 2 * row + 1), eps)
    tl.store(out + row * SAMPLES + line, _magnitude(delta))


@triton.jit
def _collect(delta, at, mask, bound, found, index, values, room, room_end, row):
    """Appends the elements with |δ| ≥ bound (bits) to the row's list, in any order; counts those without room too."""
    flag = (_magnitude(delta) >= bound) & mask
    count = flag.to(tl.int32)
    total = tl.sum(count, 0)
    if total > 0:
        slot = room + tl.atomic_add(found + row, total) + tl.cumsum(count, 0) - 1
        flag = flag & (slot < room_end)
        tl.store(index + slot, at.to(tl.int32), mask=flag)
        tl.store(values + slot, delta, mask=flag)


@triton.jit
def advance_and_collect(
    table, owner, numbers, bounds, found, index, values, slope, keep, add, eps,
    NEAR: tl.constexpr, HALF: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One page: the moments of all elements, and the candidates among them for the k largest |δ|."""
    row = tl.load(owner + tl.program_id(0))
    n = _column(table, row, COUNT)
    mean = _address(table, row, MEAN, tl.float32, ALIGNED)
    square = _address(table, row, SQUARE, tl.float32, ALIGNED)
    gradient = _address(table, row, GRADIENT, tl.int16 if HALF else tl.float32, ALIGNED)
    size = tl.load(numbers + 2 * row)
    root = tl.load(numbers + 2 * row + 1)
    bound = tl.load(bounds + row)
    room = _column(table, row, ROOM)
    end = _column(table, row, ROOM_END)
    begin = (tl.program_id(0) - _column(table, row, PAGES)) * PAGE
    for tile in range(0, PAGE, TILE):
        first = begin + tile
        at = first + tl.arange(0, TILE)
        if first + TILE <= n:
            m, v = _advanced(mean, square, gradient, at, None, slope, keep, add, NEAR, HALF)
            tl.store(mean + at, m)
            tl.store(square + at, v)
            _collect(_update(m, v, size, root, eps), at, at >= 0, bound, found, index, values, room, end, row)
        elif first < n:
            mask = at < n
            m, v = _advanced(mean, square, gradient, at, mask, slope, keep, add, NEAR, HALF)
            tl.store(mean + at, m, mask=mask)
            tl.store(square + at, v, mask=mask)
            _collect(_update(m, v, size, root, eps), at, mask, bound, found, index, values, room, end, row)


@triton.jit
def tally(table, owner, found, values, prefixes, counts, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """How many candidates have the prefix and then each value of the next BITS bits, for each row."""
    row = tl.load(owner + tl.program_id(0))
    room = _column(table, row, ROOM)
    block = tl.program_id(0) - _column(table, row, ROOM_BLOCKS)
    slot = room + block * BLOCK + tl.arange(0, BLOCK)
    end = tl.minimum(_column(table, row, ROOM_END), room + tl.load(found + row))
    if room + block * BLOCK < end:
        mask = slot < end
        key = _magnitude(tl.load(values + slot, mask=mask, other=0.0))
        mask = mask & ((key >> (SHIFT + BITS)) == tl.load(prefixes + row))
        # counted in the program first: most candidates have one of few exponents
        digit = tl.where(mask, (key >> SHIFT) & ((1 << BITS) - 1), 0)
        bins = tl.arange(0, BINS)
        others = BLOCK - tl.sum(mask.to(tl.int32), 0)
        counted = tl.histogram(digit, BINS) - tl.where(bins == 0, others, 0)
        tl.atomic_add(counts + row * BINS + bins, counted, mask=counted > 0)


@triton.jit
def add_chosen(
    table, owner, found, thresholds, index, chosen, places, values, taken, own, weight, density, clip,
    KIND: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """θ += C(δ, τ) at the candidates of magnitude ≥ threshold (bits) ≥ 1."""
    row = tl.load(owner + tl.program_id(0))
    theta = _address(table, row, THETA, tl.int16 if SPLIT else tl.float32, False)
    low = _address(table, row, LOW, tl.int16, False)
    room = _column(table, row, ROOM)
    block = tl.program_id(0) - _column(table, row, ROOM_BLOCKS)
    slot = room + block * BLOCK + tl.arange(0, BLOCK)
    end = tl.minimum(_column(table, row, ROOM_END), room + tl.load(found + row))
    if room + block * BLOCK < end:
        mask = slot < end
        delta = tl.load(chosen + slot, mask=mask, other=0.0)
        mask = mask & (_magnitude(delta) >= tl.load(thresholds + row))
        at = tl.load(index + slot, mask=mask, other=0)
        _add_own(
            theta, low, at, delta, mask, places, values, taken,
            _column(table, row, TAU), _column(table, row, TAU_END), own, weight, density, clip, KIND, SPLIT,
        )  # fmt: skip
