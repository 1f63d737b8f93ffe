"""Student's t distribution, so that statistics need no scipy."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist


def two_sided_p(t: float, freedom: float) -> float:
    """P(|T| ≥ |t|) = I_{ν/(ν+t²)}(ν/2, ½).

    Args:
        t: the statistic.
        freedom: ν, degrees of freedom, above 0; need not be whole.

    Example:
        >>> round(two_sided_p(12.7062, 1), 4)
        0.05
    """
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


@lru_cache(maxsize=4096)
def quantile(level: float, freedom: float) -> float:
    """The half-width of a two-sided interval in standard errors: t with P(|T| ≤ t) = level.

    Args:
        level: of confidence, 0.95 for a 95% interval.
        freedom: ν, degrees of freedom, above 0.

    Example:
        >>> round(quantile(0.95, 4), 4)
        2.7764
    """
    log_density = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    t = NormalDist().inv_cdf((1 + level) / 2)
    for _ in range(500):  # Newton's steps from the left on a convex function: each ends left of the root
        slope = 2 * math.exp(log_density - (freedom + 1) / 2 * math.log1p(t * t / freedom))
        step = (two_sided_p(t, freedom) - (1 - level)) / slope
        t += step
        if abs(step) <= 1e-13 * t:
            break
    return t


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function by its continued fraction (Lentz's method)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly its mirror image converges fast
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )  # fmt: skip
    tiny = 1e-300
    c, d = 1.0, 1 / _away(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, 400):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away(1 + term * d, tiny)
            c = _away(1 + term / c, tiny)
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value / a


def _away(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
