"""Sparsify: which entries of an update or a task vector are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import ArgumentError
from .masks import bernoulli_mask

RESCALES = ("none", "expectation", "l1")
_SAMPLE = 1 << 12  # elements looked at to guess the k-th magnitude
_CHUNK = 1 << 16  # elements searched at a time: the scratch stays in the cache


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
        """F(x), dense and of x's shape. ``key`` (from `mask_key`) names the mask; needed below density 1."""
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
    """Ascending positions (int64) of the k largest entries in magnitude of the flat tensor x; see `Magnitude`."""
    if k >= x.numel():
        return x.nonzero().view(-1)
    return _exactly(magnitude_keys(x), k)


class Source(Protocol):
    """A flat tensor that is computed where it is asked for."""

    @property
    def n(self) -> int: ...

    def at(self, index: Tensor) -> Tensor:
        """The elements at these positions (int64)."""
        ...

    def slice(self, start: int, stop: int, step: int = 1) -> Tensor:
        """The elements of a range."""
        ...

    def above(self, start: int, stop: int, bound: float) -> Tensor:
        """Ascending positions, counted from ``start``, of a superset of the elements with magnitude ≥ bound > 0."""
        ...


def above(x: Tensor, bound: float) -> Tensor:
    """Positions of the elements with magnitude ≥ bound; NaN counts. `Source.above` for a tensor that is there."""
    return (x.abs() < bound).bitwise_not_().nonzero().view(-1)


def largest_streamed(source: Source, k: int) -> tuple[Tensor, Tensor]:
    """What `largest` returns, with the entries' values, for a tensor that is never held whole.

    A sampled quantile gives a lower bound of the k-th magnitude; one pass collects the candidates above it; the exact
    choice is made among these. A bound that proves too high is lowered and the pass repeated.

    Args:
        source: computes elements where asked.
        k: how many are wanted.
    """
    n = source.n
    if n <= 4 * _SAMPLE or k * 4 >= n:
        return _largest_whole(source, k)
    # An odd stride does not fall into step with the rows of a matrix.
    sample = source.slice(0, n, (n // _SAMPLE) | 1).abs().nan_to_num_(math.inf, math.inf)
    share = sample.numel() * k / n
    rank = int(share + 4 * share**0.5 + 4)
    while rank < sample.numel() and (bound := float(sample.topk(rank + 1, sorted=False).values.min())) > 0:
        found = [source.above(i, min(n, i + _CHUNK), bound).add_(i) for i in range(0, n, _CHUNK)]
        candidates = torch.cat(found)
        values = source.at(candidates)
        keys = magnitude_keys(values)
        certain = keys >= int(magnitude_keys(torch.tensor([bound], dtype=sample.dtype)))
        if int(certain.sum()) >= k:
            chosen = _exactly(keys, k)
            return candidates[chosen], values[chosen]
        rank = 2 * rank + 1
    return _largest_whole(source, k)


def _largest_whole(source: Source, k: int) -> tuple[Tensor, Tensor]:
    values = source.slice(0, source.n)
    index = largest(values, k)
    return index, values[index]


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


def magnitude_keys(x: Tensor) -> Tensor:
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
