"""From item-wise results to reward, capability, tax and their intervals, and to comparisons with AdamW's curve.

All methods are measured on the same prompts and exercises, so every bootstrap draw uses the same items for all of them:
differences are paired. With several seeds a draw also resamples the seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy
from numpy.typing import NDArray

Array = NDArray[numpy.float64]
DRAWS = 1000


@dataclass(frozen=True)
class Scores:
    """Means and bootstrap draws of every point.

    Args:
        reward, capability: [points].
        categories: [points] of {category: mean}.
        reward_draws, capability_draws: [points, draws].
    """

    reward: Array
    capability: Array
    categories: list[dict[str, float]]
    reward_draws: Array
    capability_draws: Array


def score(
    rewards: Sequence[Sequence[Sequence[float]]],
    solved: Sequence[Sequence[Sequence[bool]]],
    categories: Sequence[Sequence[str]],
    draws: int = DRAWS,
) -> Scores:
    """Mean reward and macro-averaged capability of each point, over seeds, with bootstrap draws.

    Args:
        rewards: [seed][point][sample], each in [0, 1].
        solved: [seed][point][exercise].
        categories: [seed][exercise]: what each exercise belongs to; capability is the mean over categories.
    """
    rng = numpy.random.default_rng(0)
    names = sorted({name for seed in categories for name in seed})
    points = len(rewards[0])
    mean_reward, mean_category = [], []
    draw_reward, draw_capability = [], []
    for r, s, labels in zip(rewards, solved, categories, strict=True):
        per_sample = numpy.asarray(r, dtype=float)
        right = numpy.asarray(s, dtype=float)
        mean_reward.append(per_sample.mean(1))
        draw_reward.append(per_sample @ _counts(rng, per_sample.shape[1], draws))
        by_category, by_draw = [], []
        for name in names:
            own = right[:, [i for i, label in enumerate(labels) if label == name]]
            by_category.append(own.mean(1))
            by_draw.append(own @ _counts(rng, own.shape[1], draws))
        mean_category.append(numpy.stack(by_category, 1))
        draw_capability.append(numpy.mean(by_draw, 0))
    seeds = len(rewards)
    pick = numpy.eye(1) if seeds == 1 else rng.multinomial(seeds, [1 / seeds] * seeds, draws).T / seeds
    weights = pick if seeds > 1 else numpy.ones((1, draws))
    category = numpy.mean(mean_category, 0)
    return Scores(
        reward=numpy.mean(mean_reward, 0),
        capability=category.mean(1),
        categories=[dict(zip(names, map(float, category[i]), strict=True)) for i in range(points)],
        reward_draws=numpy.einsum("spd,sd->pd", numpy.stack(draw_reward), weights),
        capability_draws=numpy.einsum("spd,sd->pd", numpy.stack(draw_capability), weights),
    )


def interval(draws: Array) -> list[float]:
    """The middle 95% of bootstrap draws: [low, high]."""
    low, high = numpy.quantile(draws, [0.025, 0.975])
    return [float(low), float(high)]


def best_at(reward: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """The best capability at which a curve reaches at least this reward; None where it never does.

    Args:
        reward: what has to be reached.
        curve: (reward, capability) along the curve; straight lines between neighbours.

    Example:
        >>> best_at(0.5, [(0.25, 1.0), (0.75, 0.5), (1.0, 0.25)])
        0.75
    """
    reached = [c for r, c in curve if r >= reward]
    for (r0, c0), (r1, c1) in pairwise(curve):
        if min(r0, r1) <= reward <= max(r0, r1) and r0 != r1:
            reached.append(c0 + (c1 - c0) * (reward - r0) / (r1 - r0))
    return max(reached) if reached else None


def above_curve(scores: Scores, point: int, curve: Sequence[int]) -> tuple[float, list[float]] | None:
    """Capability of a point minus the curve's at equal reward, with its 95% interval; None beyond the curve's rewards.

    Args:
        scores: of all points.
        point: which one.
        curve: the points of the curve, in order.
    """
    at = best_at(scores.reward[point], [(scores.reward[i], scores.capability[i]) for i in curve])
    if at is None:
        return None
    differences = []
    for d in range(scores.reward_draws.shape[1]):
        drawn = [(scores.reward_draws[i, d], scores.capability_draws[i, d]) for i in curve]
        control = best_at(scores.reward_draws[point, d], drawn)
        if control is None:  # in this draw the curve ends short of the point: take its end
            control = max(drawn)[1]
        differences.append(scores.capability_draws[point, d] - control)
    return float(scores.capability[point] - at), interval(numpy.asarray(differences))


def _counts(rng: numpy.random.Generator, n: int, draws: int) -> Array:
    """How often each of n items occurs in each draw, as fractions: [n, draws]."""
    return rng.multinomial(n, [1 / n] * n, draws).T / n


def as_point(scores: Scores, i: int, reference: int, record: dict[str, Any]) -> dict[str, Any]:
    """One point of results.json, as fractions of 1; the tax is the reference's capability minus the point's."""
    tax = scores.capability[reference] - scores.capability[i]
    return {
        **record,
        "reward": float(scores.reward[i]),
        "reward_ci": interval(scores.reward_draws[i]),
        "capability": float(scores.capability[i]),
        "capability_ci": interval(scores.capability_draws[i]),
        "capability_by_category": scores.categories[i],
        "tax": float(tax),
        "tax_ci": interval(scores.capability_draws[reference] - scores.capability_draws[i]),
    }
