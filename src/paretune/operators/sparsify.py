"""Sparsify: which entries of an update or a task vector are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import ArgumentError
from .masks import bernoulli_mask

RESCALES = ("none", "expectation", "l1")
_SAMPLE = 1 << 14  # elements looked at to guess the k-th magnitude
_CHUNK = 1 << 18


@runtime_checkable
class Sparsify(Protocol):
    """What a sparsifier must offer: a density in (0, 1] and a call that zeroes the entries it drops."""

    @property
    def density(self) -> float: ...

    @property
    def rescale(self) -> str: ...

    def __call__(self, x: Tensor, key: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Random:
    """Keep each entry independently with probability p (DARE's drop).

        F(x)_i = s · x_i · Bernoulli(p)

    Args:
        density: p, the kept fraction, in (0, 1]; 1 is the identity.
        rescale: s: ``"none"`` 1 | ``"expectation"`` 1/p | ``"l1"`` ‖x‖₁/‖F(x)‖₁.

    Raises:
        ArgumentError: density or rescale out of range.

    Reference: arXiv 2405.17931, Eq. 2 and 3 (its reserve rate is p); arXiv 2311.03099 rescales by 1/p.

    Example:
        >>> import torch, paretune as pt
        >>> x = torch.ones(4)
        >>> torch.equal(pt.Random(density=1.0)(x), x)
        True
    """

    density: float
    rescale: str = "none"

    def __post_init__(self) -> None:
        _check(self.density, self.rescale)

    def __call__(self, x: Tensor, key: int | None = None) -> Tensor:
        """F(x), dense and of x's shape. ``key`` (`paretune.operators.mask_key`) names the mask; needed below density 1."""
        if self.density == 1:
            return x.clone()
        if key is None:
            raise ArgumentError("key", key, "pass mask_key(seed, step, stream, name): a random mask needs one")
        mask = bernoulli_mask(key, x.numel(), self.density, device=x.device).view(x.shape)
        # where, not multiplication: a dropped NaN is dropped, and no entry becomes -0
        return _rescaled(x, torch.where(mask, x, 0.0), self.density, self.rescale)


@dataclass(frozen=True)
class Magnitude:
    """Keep the k = max(1, int(p·n)) entries of a tensor that are largest in magnitude (TIES' trim).

        F(x)_i = s · x_i if |x_i| is among the k largest, else 0

    Of c entries that tie at the k-th magnitude and r that are still wanted, those with rank ⌊i·c/r⌋ (i = 0 … r−1, in
    index order) are kept: evenly spread and the same everywhere. Zeros never count as kept. NaN ranks above infinity.

    Args:
        density: p, the kept fraction per tensor, in (0, 1]; 1 is the identity.
        rescale: s: ``"none"`` 1 | ``"expectation"`` 1/p | ``"l1"`` ‖x‖₁/‖F(x)‖₁.

    Raises:
        ArgumentError: density or rescale out of range.

    Reference: arXiv 2405.17931, Eq. 4; arXiv 2306.01708 (trim). The released code of 2405.17931 keeps every entry
    where int(p·n) = 0; we keep one (OnTIES' ``variant="released"`` follows the released code).

    Example:
        >>> import torch, paretune as pt
        >>> pt.Magnitude(density=0.5)(torch.tensor([1.0, -4.0, 3.0, 0.0]))
        tensor([ 0., -4.,  3.,  0.])
    """

    density: float
    rescale: str = "none"

    def __post_init__(self) -> None:
        _check(self.density, self.rescale)

    def k(self, n: int) -> int:
        """How many of n entries are kept."""
        return kept(self.density, n)

    def __call__(self, x: Tensor, key: int | None = None) -> Tensor:
        """F(x), dense and of x's shape. ``key`` is not used: the choice depends on x alone."""
        if self.density == 1 or x.numel() == 0:
            return x.clone()
        flat = x.reshape(-1)
        index = largest(flat, self.k(x.numel()))
        out = torch.zeros_like(flat)
        out[index] = flat[index]
        return _rescaled(x, out.view(x.shape), self.density, self.rescale)


def kept(density: float, n: int) -> int:
    """k = max(1, int(p·n)): how many of n entries Magnitude keeps (0 of 0)."""
    return min(n, max(1, int(density * n)))


def largest(x: Tensor, k: int) -> Tensor:
    """Ascending positions (int64) of the k entries of the flat tensor x that are largest in magnitude; see `Magnitude`."""
    if k >= x.numel():
        return x.nonzero().view(-1)
    keys = _magnitude_keys(x)
    chosen = _exactly(keys, k)
    return chosen


def largest_streamed(read: Callable[[int, int], Tensor], sample: Callable[[Tensor], Tensor], n: int, k: int) -> Tensor:
    """What `largest` returns, for a tensor that is computed in chunks and never held whole.

    A sampled quantile gives a lower bound of the k-th magnitude; one pass collects the candidates above it; the exact
    choice is made among these. A bound that proves too high is lowered and the pass repeated.

    Args:
        read: ``read(start, stop)`` computes these elements.
        sample: computes the elements at given positions (int64).
        n: how many elements there are.
        k: how many are wanted.
    """
    if n <= 4 * _SAMPLE or k * 4 >= n:
        return largest(torch.cat([read(i, min(n, i + _CHUNK)) for i in range(0, n, _CHUNK)]) if n else read(0, 0), k)
    places = (torch.arange(_SAMPLE, dtype=torch.float64) * (n / _SAMPLE)).long()
    ranked = _magnitude_keys(sample(places)).sort(descending=True).values
    share = _SAMPLE * k / n
    rank = int(share + 4 * share**0.5 + 4)
    while True:
        bound = int(ranked[rank]) if rank < _SAMPLE else 0
        indices, keys = [], []
        for start in range(0, n, _CHUNK):
            key = _magnitude_keys(read(start, min(n, start + _CHUNK)))
            index = (key > bound if bound == 0 else key >= bound).nonzero().view(-1)
            keys.append(key[index])
            indices.append(index.add_(start))
        candidates = torch.cat(indices)
        if candidates.numel() >= k or bound == 0:
            return candidates if candidates.numel() <= k else candidates[_exactly(torch.cat(keys), k)]
        rank = 2 * rank + 1


def _exactly(keys: Tensor, k: int) -> Tensor:
    """Positions of the k largest keys, ties spread evenly, zeros never."""
    n = keys.numel()
    if keys.device.type == "cpu":
        # numpy's introselect on integers is several times faster than torch.kthvalue
        import numpy

        threshold = int(numpy.partition(keys.numpy(), n - k)[n - k])
    else:
        threshold = int(keys.kthvalue(n - k + 1).values)
    if threshold == 0:
        return (keys > 0).nonzero().view(-1)
    at_least = (keys >= threshold).nonzero().view(-1)
    surplus = at_least.numel() - k
    if surplus == 0:
        return at_least
    tied = keys[at_least] == threshold
    ties = tied.nonzero().view(-1)
    wanted = ties.numel() - surplus
    rank = torch.arange(wanted, device=keys.device) * ties.numel() // wanted
    take = ~tied
    take[ties[rank]] = True
    return at_least[take]


def _magnitude_keys(x: Tensor) -> Tensor:
    """|x| as integers of the same order: exact, cheap to compare, and NaN ranks above infinity."""
    if x.dtype == torch.float64:
        return x.view(torch.int64) & (2**63 - 1)
    return x.float().view(torch.int32) & (2**31 - 1)


def _rescaled(x: Tensor, kept: Tensor, density: float, rescale: str) -> Tensor:
    if rescale == "none":
        return kept
    if rescale == "expectation":
        return kept.div_(density)
    norm = kept.abs().sum()
    if norm == 0:
        return kept  # nothing was kept: nothing to scale
    return kept.mul_(x.abs().sum() / norm)


def _check(density: float, rescale: str) -> None:
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ArgumentError("density", density, "must be a number in (0, 1]: the fraction of entries that is kept")
    if rescale not in RESCALES:
        raise ArgumentError("rescale", rescale, f"choose one of {', '.join(RESCALES)}")
