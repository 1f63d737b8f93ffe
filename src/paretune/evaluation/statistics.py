"""Paired comparisons on the same items: intervals, tests, corrections for many tests.

Every statistic here is a weighted sum of means, Σ_b w_b · mean_b, one term for each benchmark: so a single benchmark, a
category and a macro-average over categories are the same computation. Items that share a passage are drawn together.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy
from numpy.typing import NDArray

from paretune.errors import ArgumentError
from paretune.evaluation.student import quantile

Array = NDArray[numpy.float64]
DRAWS = 2000
LEVEL = 0.95
_NORMAL = NormalDist()
_BLOCK = 1 << 22  # counts in memory at a time


@dataclass(frozen=True)
class Sample:
    """One benchmark's items.

    Args:
        values: [items] or [items, models]: scores, or paired differences of two models.
        clusters: [items]: which items are drawn together; None where each is drawn alone.
        ids: fingerprint of the items. Samples of the same fingerprint are drawn alike, so differences stay paired.
    """

    values: Array
    clusters: Sequence[int] | None = None
    ids: str = ""


@dataclass(frozen=True)
class Resampled:
    """What intervals of one benchmark's mean, alone or in a weighted sum, are made from.

    Args:
        means: [models].
        draws: [draws, models]: bootstrap draws of the means.
        influences: [clusters, models]: how far each cluster moves the mean; they sum to 0.
    """

    means: Array
    draws: Array
    influences: Array


def resample(sample: Sample, draws: int = DRAWS, seed: int = 0) -> Resampled:
    """Bootstrap one benchmark: clusters are drawn with replacement, a mean is Σ drawn scores / Σ drawn items.

    Args:
        sample: its items.
        draws: how many.
        seed: of the resampling, together with the sample's ``ids``.

    Raises:
        ArgumentError: where there are fewer than 2 items or clusters.
    """
    sums, sizes = _cluster_sums(sample)
    if len(sizes) < 2:
        raise ArgumentError("items", len(sizes), "measure at least 2 items (or clusters of items) of each benchmark")
    rng = numpy.random.default_rng((seed, zlib.crc32(sample.ids.encode()), len(sizes)))
    drawn = numpy.concatenate(
        [(counts @ sums) / (counts @ sizes)[:, None] for counts in _counts(rng, len(sizes), draws)]
    )
    means = sums.sum(0) / sizes.sum()
    return Resampled(means, drawn, (sums - means * sizes[:, None]) / sizes.sum())


def intervals(
    parts: Sequence[Resampled], weights: Sequence[float] | None = None, level: float = LEVEL
) -> list[tuple[float, float]]:
    """The BCa bootstrap interval of Σ_b w_b · mean_b for each model; a cluster bootstrap where samples have clusters.

    With z₀ the normal quantile of the share of draws below the estimate and a = Σ u³ / 6 (Σ u²)^{3/2} over the
    clusters' influences u, the ends are the draws' quantiles at Φ(z₀ + (z₀ ± z) / (1 − a (z₀ ± z))).

    Args:
        parts: the benchmarks, each resampled by itself (strata).
        weights: w_b; equal ones that sum to 1 by default.
        level: of confidence.

    Raises:
        ArgumentError: where there is no benchmark, or the level is not between 0 and 1.

    Reference:
        Efron 1987, "Better bootstrap confidence intervals". Hesterberg 2015, arXiv 1411.5279, 4.4, for few
        items: z is the t quantile times √(n/(n−1)). Ours: influences in place of the jackknife, strata, clusters.
    """
    if not parts:
        raise ArgumentError("parts", parts, "give at least one benchmark")
    if not 0 < level < 1:
        raise ArgumentError("level", level, "give a number between 0 and 1, such as 0.95")
    shares = [1 / len(parts)] * len(parts) if weights is None else list(weights)
    centre = numpy.sum([w * part.means for w, part in zip(shares, parts, strict=True)], 0)
    drawn = numpy.sum([w * part.draws for w, part in zip(shares, parts, strict=True)], 0)
    squares = numpy.array([w**2 * (part.influences**2).sum(0) for w, part in zip(shares, parts, strict=True)])
    cubes = numpy.sum([w**3 * (part.influences**3).sum(0) for w, part in zip(shares, parts, strict=True)], 0)
    found = []
    for m in range(len(centre)):
        variance = float(squares[:, m].sum())
        if variance <= 1e-28 * max(1.0, float(centre[m]) ** 2):  # all items alike: nothing to resample
            found.append((float(centre[m]), float(centre[m])))
            continue
        width = _small_sample(squares[:, m].tolist(), [len(part.influences) for part in parts], level)
        found.append(bca(drawn[:, m], float(centre[m]), float(cubes[m]) / (6 * variance**1.5), width))
    return found


def bootstrap_interval(
    samples: Sequence[Sample],
    weights: Sequence[float] | None = None,
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """:func:`intervals` of one model, from its items.

    Args:
        samples: the benchmarks: scores, or paired differences.
        weights: of the benchmarks; equal by default.
        level: of confidence.
        draws: bootstrap draws; 2000 keep the ends within about 5% of the interval's width.
        seed: of the draws.

    Example:
        >>> low, high = bootstrap_interval([Sample(numpy.arange(100.0))])
        >>> 42 < low < 45 and 54 < high < 57
        True
    """
    return intervals([resample(sample, draws, seed) for sample in samples], weights, level)[0]


def _small_sample(variances: Sequence[float], sizes: Sequence[int], level: float) -> float:
    """The interval's half-width in standard errors of the draws.

    Draws vary by (n − 1)/n too little, and know nothing of the variance's own error: both matter below 100 clusters.
    """
    unbiased = [v * n / (n - 1) for v, n in zip(variances, sizes, strict=True)]
    freedom = sum(unbiased) ** 2 / sum(v * v / (n - 1) for v, n in zip(unbiased, sizes, strict=True))
    return quantile(level, round(freedom, 1)) * math.sqrt(sum(unbiased) / sum(variances))


def bca(drawn: Array, centre: float, acceleration: float = 0.0, width: float = 1.959964) -> tuple[float, float]:
    """The bias-corrected, accelerated interval from bootstrap draws of a statistic.

    Args:
        drawn: [draws].
        centre: the statistic on the data.
        acceleration: Efron's a; 0 corrects the bias alone.
        width: z, the half-width of the interval in standard errors of the draws.
    """
    tolerance = 1e-12 * max(1.0, abs(centre))  # equal draws differ in the last bit
    below = float((drawn < centre - tolerance).mean() + 0.5 * (numpy.abs(drawn - centre) <= tolerance).mean())
    edge = 0.5 / len(drawn)
    bias = _NORMAL.inv_cdf(min(max(below, edge), 1 - edge))
    ends = []
    for z in (bias - width, bias + width):
        ends.append(_NORMAL.cdf(bias + z / max(1 - acceleration * z, 1e-9)))
    low, high = numpy.quantile(drawn, ends)
    return float(low), float(high)


def sign_flip_p(
    samples: Sequence[Sample], weights: Sequence[float] | None = None, flips: int = 9999, seed: int = 0
) -> list[float]:
    """Two-sided p of no difference, a model each: how often random sign flips of clusters reach |Σ_b w_b · mean_b|.

    Exact for any distribution that is symmetric about 0 under the hypothesis. p ≥ 1 / (flips + 1).

    Args:
        samples: paired differences, a sample a benchmark.
        weights: of the benchmarks; equal by default.
        flips: random assignments of signs.
        seed: of the flips.

    Example:
        >>> sign_flip_p([Sample(numpy.array([1.0, 2.0, 3.0, -1.0]))])[0] > 0.1
        True
    """
    given = [1 / len(samples)] * len(samples) if weights is None else weights
    parts = []
    for weight, sample in zip(given, samples, strict=True):
        sums, sizes = _cluster_sums(sample)
        parts.append(weight * sums / sizes.sum())
    shares = numpy.concatenate(parts)
    observed = numpy.abs(shares.sum(0))
    narrow = shares.astype(numpy.float32)
    rng = numpy.random.default_rng(seed)
    reached, step = numpy.zeros(shares.shape[1], dtype=int), max(1, _BLOCK // len(shares))
    for start in range(0, flips, step):
        rows = min(step, flips - start)
        bits = numpy.unpackbits(rng.integers(0, 256, (rows, -(-len(shares) // 8)), dtype=numpy.uint8), axis=1)
        flipped = (2 * bits[:, : len(shares)].astype(numpy.float32) - 1) @ narrow
        # float32 sums differ in the last bits from the float64 estimate that they tie with
        reached += (numpy.abs(flipped) >= observed - 1e-5 * numpy.abs(shares).sum(0)).sum(0)
    return [float(p) for p in (reached + 1) / (flips + 1)]


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p that two models are right equally often: 2 · P(Binomial(n, ½) ≤ min), at most 1.

    Args:
        only_first: items that only the first model got right.
        only_second: items that only the second got right.

    Raises:
        ArgumentError: for a negative count.

    Reference:
        McNemar 1947, in the exact form.

    Example:
        >>> round(mcnemar(2, 10), 4)
        0.0386
    """
    if min(only_first, only_second) < 0:
        raise ArgumentError("only_first, only_second", (only_first, only_second), "give counts of 0 or more")
    n, fewer = only_first + only_second, min(only_first, only_second)
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values after Holm's step-down correction, in the given order.

    Raises:
        ArgumentError: for a value outside 0 to 1.

    Reference:
        Holm 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    bad = next((p for p in p_values if not 0 <= p <= 1), None)
    if bad is not None:
        raise ArgumentError("p_values", bad, "give numbers from 0 to 1")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def verdict(difference: float, p: float, significance: float = 0.05) -> str:
    """``gain``, ``loss`` or ``within noise``, from a difference and its (adjusted) p.

    Example:
        >>> verdict(-0.02, 0.3), verdict(-0.02, 0.003)
        ('within noise', 'loss')
    """
    if p >= significance or difference == 0:
        return "within noise"
    return "gain" if difference > 0 else "loss"


def interval_verdict(low: float, high: float) -> str:
    """The verdict of a single interval: whether it excludes 0.

    Example:
        >>> interval_verdict(-0.02, 0.01), interval_verdict(0.01, 0.02)
        ('within noise', 'gain')
    """
    return "gain" if low > 0 else "loss" if high < 0 else "within noise"


def _cluster_sums(sample: Sample) -> tuple[Array, Array]:
    """Sums [clusters, models] and sizes [clusters]."""
    values = numpy.asarray(sample.values, dtype=float)
    values = values.reshape(len(values), -1)
    if sample.clusters is None:
        return values, numpy.ones(len(values))
    _, number = numpy.unique(numpy.asarray(sample.clusters), return_inverse=True)
    sizes = numpy.bincount(number).astype(float)
    sums = numpy.zeros((len(sizes), values.shape[1]))
    numpy.add.at(sums, number, values)
    return sums, sizes


def _counts(rng: numpy.random.Generator, n: int, draws: int) -> Iterator[Array]:
    """How often each of n clusters occurs in each draw, a block of draws at a time: bounded memory."""
    step = max(1, _BLOCK // n)
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        picks = rng.integers(0, n, (rows, n)) + numpy.arange(rows)[:, None] * n
        yield numpy.bincount(picks.ravel(), minlength=rows * n).reshape(rows, n).astype(float)
