"""Random masks from a counter-based generator: a pure function of (seed, step, stream, parameter, element).

Nothing is drawn from torch's global generator, nothing has to be saved, and every rank that owns a part of a tensor
computes exactly its part of the same mask.

The generator hashes a 64-bit element counter with a 64-bit key (two rounds of a 32-bit bijective mixer, with the key
entering before each). Elements are grouped in pages. A mask of low density is drawn as the gaps between kept elements
(geometric, so that the work is proportional to the kept elements); a mask of high density element by element.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from ..errors import ArgumentError

PAGE = 1 << 16  # elements; the unit in which gaps are drawn
SPARSE_LIMIT = 1 / 16  # up to this density masks are drawn as gaps
_CHUNK = 1 << 18  # elements hashed at a time: the scratch stays in the cache
_TINY = 2.0**-33


def mask_key(seed: int, step: int, stream: str, name: str) -> int:
    """The 64-bit key of one mask.

    Args:
        seed: the run's seed.
        step: the optimizer step, from 0.
        stream: which mask of this step: ``"update"`` or ``"tau"`` or any other word.
        name: the parameter's name.

    Example:
        >>> mask_key(0, 1, "tau", "w") == mask_key(0, 1, "update", "w")
        False
    """
    text = f"{seed}\x1f{step}\x1f{stream}\x1f{name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def sampled_indices(
    key: int, n: int, density: float, start: int = 0, stop: int | None = None, device: torch.device | None = None
) -> Tensor:
    """The kept elements of a Bernoulli(density) mask over ``n`` elements, as ascending flat positions (int64).

    Args:
        key: from `mask_key`.
        n: elements of the whole tensor.
        density: probability with which each element is kept, 0 < density ≤ 1.
        start, stop: the range that this rank owns; positions stay those of the whole tensor.
        device: where the result is wanted.

    Example:
        >>> whole = sampled_indices(7, 100_000, 1e-3)
        >>> parts = [sampled_indices(7, 100_000, 1e-3, 0, 33), sampled_indices(7, 100_000, 1e-3, 33)]
        >>> torch.equal(whole, torch.cat(parts))
        True
    """
    stop = n if stop is None else stop
    _check(density, n, start, stop)
    if density > SPARSE_LIMIT:
        return bernoulli_mask(key, n, density, start, stop, device).nonzero().view(-1).add_(start)
    if start == stop:
        return torch.empty(0, dtype=torch.int64, device=device)
    first, last = start // PAGE, (stop - 1) // PAGE + 1
    page = torch.arange(first, last, dtype=torch.int64, device=device).unsqueeze(1)
    mean = PAGE * density
    draws = math.ceil(mean + 6 * math.sqrt(mean) + 8)
    drawn = 0
    at = torch.full((last - first, 1), -1, dtype=torch.int64, device=device)
    positions = []
    while drawn == 0 or bool((at < PAGE).any()):  # until every page is full to its end
        counter = page * PAGE + torch.arange(drawn, drawn + draws, dtype=torch.int64, device=device)
        # 1 + floor(log u / log(1−p)) is the distance to the next kept element.
        u = _uniform(key, counter)
        gap = u.log_().mul_(1 / math.log1p(-density)).floor_().add_(1).to(torch.int64)
        position = gap.cumsum(1).add_(at)
        positions.append(position)
        at = position[:, -1:]
        drawn += draws
    position = torch.cat(positions, 1) if len(positions) > 1 else positions[0]
    flat = (page * PAGE + position)[position < PAGE]
    return flat[(flat >= start) & (flat < stop)]


def bernoulli_mask(
    key: int, n: int, density: float, start: int = 0, stop: int | None = None, device: torch.device | None = None
) -> Tensor:
    """The same mask as `sampled_indices`, as booleans over ``start … stop−1``."""
    stop = n if stop is None else stop
    _check(density, n, start, stop)
    mask = torch.zeros(stop - start, dtype=torch.bool, device=device)
    if density == 1:
        return mask.fill_(True)
    if density <= SPARSE_LIMIT:
        mask[sampled_indices(key, n, density, start, stop, device) - start] = True
        return mask
    threshold = round(density * 2**32) - 2**31  # on the hash shifted to signed
    for begin in range(start, stop, _CHUNK):
        end = min(stop, begin + _CHUNK)
        hashed = _hash(key, torch.arange(begin, end, dtype=torch.int64, device=device))
        torch.lt(hashed.bitwise_xor_(-(2**31)), threshold, out=mask[begin - start : end - start])
    return mask


def _uniform(key: int, counter: Tensor) -> Tensor:
    """Numbers in (0, 1) in float64 with 32 random bits."""
    return _hash(key, counter).bitwise_xor_(-(2**31)).to(torch.float64).add_(2.0**31).mul_(2.0**-32).add_(_TINY)


def _hash(key: int, counter: Tensor) -> Tensor:
    """32 random bits (as int32) for each 64-bit counter."""
    low, high = key & 0xFFFFFFFF, key >> 32
    x = counter.to(torch.int32)  # the low half: conversion wraps
    x = _mix(x.bitwise_xor_(_signed(low)))
    x += counter.bitwise_right_shift(32).to(torch.int32).mul_(_signed(0x9E3779B9)).add_(_signed(high))
    return _mix(x)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every input bit moves every output bit (Ellis' lowbias32 constants)."""
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(0x21F0AAAD)
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0xD35A2D97)
    x ^= (x >> 15) & 0x1FFFF
    return x


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _check(density: float, n: int, start: int, stop: int) -> None:
    if not 0 < density <= 1:
        raise ArgumentError("density", density, "must be in (0, 1]")
    if not 0 <= start <= stop <= n:
        raise ArgumentError("start, stop", (start, stop), f"must be a range within the {n} elements")
