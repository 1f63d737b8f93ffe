"""A win rate without the part that length explains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError

Array = NDArray[np.float64]

_STEPS = 60
# On the slope only, in units of observations: holds it where length separates wins from losses completely, and moves
# the rate by less than 0.01 points elsewhere.
_RIDGE = 0.01
_EXTRAPOLATED = "; extrapolated, as every answer is {} than the other"
LABEL = "length-controlled (paretune's two-parameter fit, not AlpacaEval's official one)"


@dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate.

    Args:
        rate: in percent.
        error: its bootstrap standard error, in percent.
        interval: its 95% percentile interval, in percent.
        raw: the plain win rate, in percent.
        slope: φ; positive where longer answers win.
        items: how many were used; those without a value are left out.
        label: what it is, to be printed beside it.
    """

    rate: float
    error: float
    interval: tuple[float, float]
    raw: float
    slope: float
    items: int
    label: str = LABEL


def length_controlled(
    wins: Sequence[float | None],
    lengths: Sequence[int],
    other_lengths: Sequence[int],
    *,
    clusters: Sequence[object] | None = None,
    bootstraps: int = 1000,
    seed: int = 0,
) -> LengthControlled:
    """The win rate that a logistic model predicts at equal lengths.

        logit P(win_i) = θ + φ·tanh((l_i − m_i) / s),    rate = 100·σ(θ)

    l and m are the lengths of the answer and the other one, s the standard deviation of their difference. Wins may be
    fractions (ties, means of two orders): the likelihood is the Bernoulli quasi-likelihood.

    Args:
        wins: in [0, 1]; None for items that were not scored.
        lengths, other_lengths: in characters, as AlpacaEval's.
        clusters: what each item is drawn with, such as its prompt; every item alone by default.
        bootstraps: resamples of items (or clusters) for the error, ≥ 2.
        seed: of the resamples.

    Raises:
        ArgumentError: unequal lengths, fewer than two scored items, or a win outside [0, 1].

    Reference: the regression of arXiv 2404.04475, without its per-instruction difficulty, which is fitted over many
    models: so this is not the official LC win rate, and says so.

    Example:
        >>> fair = length_controlled([1, 1, 0, 0] * 25, [9, 8, 5, 5] * 25, [5, 5, 8, 9] * 25, bootstraps=10)
        >>> round(fair.rate), fair.slope > 1  # the longer answer always wins: at equal length, a toss-up
        (50, True)
    """
    if not len(wins) == len(lengths) == len(other_lengths):
        raise ArgumentError("lengths", len(lengths), f"give one for each of the {len(wins)} wins")
    if bootstraps < 2:
        raise ArgumentError("bootstraps", bootstraps, "give at least 2")
    scored = [i for i, win in enumerate(wins) if win is not None]
    if len(scored) < 2:
        raise ArgumentError("wins", len(scored), "at least two items must be scored")
    y = np.array([wins[i] for i in scored], dtype=np.float64)
    if not ((y >= 0) & (y <= 1)).all():
        raise ArgumentError("wins", float(y[(y < 0) | (y > 1)][0]), "give values in [0, 1]")
    longer = np.array([lengths[i] - other_lengths[i] for i in scored], dtype=np.float64)
    spread = longer.std()
    z = np.tanh(longer / spread) if spread > 0 else np.zeros_like(longer)
    groups = np.arange(len(y)) if clusters is None else _numbered([clusters[i] for i in scored])
    n = int(groups.max()) + 1
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=bootstraps)[:, groups]
    one_sided = bool((z > 0).all() or (z < 0).all())  # then nothing was seen at equal lengths
    theta, phi = _fit(y, z, np.ones((1, len(y))))
    rates = 100 * _sigmoid(_fit(y, z, counts.astype(np.float64))[0])
    low, high = np.percentile(rates, [2.5, 97.5])
    return LengthControlled(
        rate=float(100 * _sigmoid(theta)[0]),
        error=float(rates.std(ddof=1)),
        interval=(float(low), float(high)),
        raw=float(100 * y.mean()),
        slope=float(phi[0]),
        items=len(y),
        label=LABEL + (_EXTRAPOLATED.format("longer" if z[0] > 0 else "shorter") if one_sided else ""),
    )


def _numbered(clusters: Sequence[object]) -> NDArray[np.intp]:
    number: dict[object, int] = {}
    return np.array([number.setdefault(cluster, len(number)) for cluster in clusters])


def _fit(y: Array, z: Array, weights: Array) -> tuple[Array, Array]:
    """(θ, φ) for each row of item weights, by Newton's method."""
    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(_STEPS):
        p = _sigmoid(theta[:, None] + phi[:, None] * z)
        slack, curve = weights * (y - p), weights * p * (1 - p)
        g0, g1 = slack.sum(1), slack @ z - _RIDGE * phi
        # The tiny ridge on the diagonal keeps the matrix regular where all wins are equal.
        h00, h01, h11 = curve.sum(1) + 1e-9, curve @ z, curve @ (z * z) + _RIDGE
        determinant = h00 * h11 - h01**2
        step0, step1 = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
        # Far steps overshoot where wins are nearly separated.
        shrink = 1 / np.maximum(1, np.maximum(abs(step0), abs(step1)) / 2)
        theta, phi = np.clip(theta + shrink * step0, -40, 40), phi + shrink * step1
        if max(abs(step0).max(), abs(step1).max()) < 1e-10:
            break
    return theta, phi


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))
