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
from collections.abc import Sequence

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
    pages = torch.arange(start // PAGE, (stop - 1) // PAGE + 1, dtype=torch.int64, device=device).unsqueeze(1)
    flat = _drawn(_words(key), pages, density)[0]
    return flat[(flat >= start) & (flat < stop)]


def sampled_indices_of(
    keys: Sequence[int],
    sizes: Sequence[int],
    density: float,
    device: torch.device | None = None,
    ranges: Sequence[tuple[int, int]] | None = None,
) -> list[Tensor]:
    """`sampled_indices` of many tensors at once, one result for each: a few large operations instead of many small.

    Args:
        keys: one key for each tensor.
        sizes: the elements of each.
        density: one density for all.
        device: where the results are wanted.
        ranges: (start, stop) that this rank owns of each; None for all of each.
    """
    owned = [(0, n) for n in sizes] if ranges is None else ranges
    if density > SPARSE_LIMIT:
        triples = zip(keys, sizes, owned, strict=True)
        return [sampled_indices(key, n, density, *own, device=device) for key, n, own in triples]
    _check(density, 0, 0, 0)
    first = torch.tensor([start // PAGE for start, _ in owned])
    pages_of = torch.tensor([(stop + PAGE - 1) // PAGE - start // PAGE if stop > start else 0 for start, stop in owned])
    if not int(pages_of.sum()):
        return [torch.empty(0, dtype=torch.int64, device=device) for _ in sizes]
    owner = torch.arange(len(sizes)).repeat_interleave(pages_of)
    pages = torch.arange(owner.numel()) - (pages_of.cumsum(0) - pages_of - first)[owner]
    words = torch.tensor([_words(key) for key in keys], dtype=torch.int32)[owner].to(device)
    limit = torch.tensor([stop for _, stop in owned])[owner].to(device).unsqueeze(1)
    flat, row = _drawn((words[:, :1], words[:, 1:]), pages.to(device).unsqueeze(1), density, limit)
    if any(start % PAGE for start, _ in owned):
        inside = flat >= torch.tensor([start for start, _ in owned])[owner].to(device)[row]
        flat, row = flat[inside], row[inside]
    counts = torch.bincount(owner.to(device)[row], minlength=len(sizes))
    return list(flat.split(counts.tolist()))


def _drawn(
    words: tuple[int, int] | tuple[Tensor, Tensor], pages: Tensor, density: float, limit: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Kept positions of some pages, page after page, and the row of ``pages`` that each belongs to.

    Args:
        words: the key's two halves; numbers, or a column with one for each page.
        pages: a column of page numbers (int64).
        density: at most `SPARSE_LIMIT`.
        limit: a column with the end of each page's tensor; None for no limit but the page's own end.
    """
    mean = PAGE * density
    draws = math.ceil(mean + 6 * math.sqrt(mean) + 8)
    drawn = 0
    at = torch.full_like(pages, -1)
    positions = []
    while drawn == 0 or bool((at < PAGE).any()):  # until every page is full to its end
        counter = pages * PAGE + torch.arange(drawn, drawn + draws, dtype=torch.int64, device=pages.device)
        # 1 + floor(log u / log(1−p)) is the distance to the next kept element.
        gap = _uniform(words, counter).log_().mul_(1 / math.log1p(-density)).floor_().add_(1)
        gap = gap.clamp_(max=PAGE + 1).to(torch.int64)
        position = gap.cumsum(1).add_(at)
        positions.append(position)
        at = position[:, -1:]
        drawn += draws
    position = torch.cat(positions, 1) if len(positions) > 1 else positions[0]
    flat = pages * PAGE + position
    inside = position < PAGE
    if limit is not None:
        inside &= flat < limit
    row, column = inside.nonzero(as_tuple=True)
    return flat[row, column], row


def bernoulli_mask(
    key: int, n: int, density: float, start: int = 0, stop: int | None = None, device: torch.device | None = None
) -> Tensor:
    """The same mask as `sampled_indices`, as booleans over ``start … stop−1``."""
    stop = n if stop is None else stop
    _check(density, n, start, stop)
    mask = torch.zeros(stop - start, dtype=torch.bool, device=device)
    threshold = mask_limit(density)
    if threshold == 2**31:
        return mask.fill_(True)
    if density <= SPARSE_LIMIT:
        mask[sampled_indices(key, n, density, start, stop, device) - start] = True
        return mask
    for begin in range(start, stop, _CHUNK):
        end = min(stop, begin + _CHUNK)
        hashed = _hash(_words(key), torch.arange(begin, end, dtype=torch.int64, device=device))
        torch.lt(hashed, threshold, out=mask[begin - start : end - start])
    return mask


def mask_limit(density: float) -> int:
    """An element is kept if its hash, read as signed, is below this number: above density 1/16."""
    return round(density * 2**32) - 2**31


def _uniform(words: tuple[int, int] | tuple[Tensor, Tensor], counter: Tensor) -> Tensor:
    """Numbers in (0, 1) in float64 with 32 random bits."""
    return _hash(words, counter).to(torch.float64).mul_(2.0**-32).add_(0.5 + _TINY)


def _hash(words: tuple[int, int] | tuple[Tensor, Tensor], counter: Tensor) -> Tensor:
    """32 random bits (as int32) for each 64-bit counter."""
    low, high = words
    x = counter.to(torch.int32)  # the low half: conversion wraps
    x ^= low
    x = _mix(x)
    x += counter.bitwise_right_shift(32).to(torch.int32).mul_(_signed(0x9E3779B9)).add_(high)
    return _mix(x)


def _words(key: int) -> tuple[int, int]:
    return _signed(key & 0xFFFFFFFF), _signed(key >> 32)


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
