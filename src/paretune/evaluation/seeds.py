"""Several seeds of one method as one point."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from paretune.errors import ArgumentError
from paretune.evaluation.paired import benchmark_weights
from paretune.evaluation.points import Difference, Interval, ItemScores, Measurement
from paretune.evaluation.statistics import LEVEL, Sample, holm, interval_verdict, resample, verdict
from paretune.evaluation.student import quantile


def mean_over_seeds(values: Sequence[float], level: float = LEVEL) -> tuple[Interval, float]:
    """The t interval of the mean of one value a seed, and the two-sided p of a mean of 0.

    x̄ ± t_{S−1} · s / √S. With 2 seeds t is 12.7: two seeds say little.

    Args:
        values: one a seed, at least 2.
        level: of confidence.

    Raises:
        ArgumentError: for fewer than 2 seeds.

    Example:
        >>> (low, high), p = mean_over_seeds([0.1, 0.2, 0.3])
        >>> round(low, 3), round(high, 3), round(p, 3)
        (-0.048, 0.448, 0.074)
    """
    if len(values) < 2:
        raise ArgumentError("seeds", len(values), "give at least 2")
    centre = float(numpy.mean(values))
    return _t_interval(centre, [(float(numpy.var(values, ddof=1)) / len(values), len(values) - 1)], level)


def crossed(blocks: Sequence[Sample], weights: Sequence[float], level: float = LEVEL) -> tuple[Interval, float]:
    """The interval of Σ_b w_b · mean_b over seeds *and* items, where all seeds answered the same items; and its p.

    Seeds and items are both samples: with V_s, V_i and V_e the variance of the mean due to seeds, due to items, and due
    to both together (which is in the first two as well), the half-width is √(t²_{S−1} (V_s − V_e)₊ + t²_ν V_i).

    Args:
        blocks: a benchmark each, with values [items, seeds].
        weights: w_b.
        level: of confidence.

    Raises:
        ArgumentError: for fewer than 2 seeds or items.

    Reference:
        Howe 1974 for the sum of two variances with few degrees of freedom each (Satterthwaite's single t covers 90%
        with 2 seeds).
    """
    seeds = blocks[0].values.shape[1]
    if seeds < 2:
        raise ArgumentError("seeds", seeds, "give at least 2")
    per_seed, by_items, by_both, spread = numpy.zeros(seeds), 0.0, 0.0, 0.0
    for block, weight in zip(blocks, weights, strict=True):
        part = resample(block, draws=1)
        per_seed += weight * part.means
        u, n = weight * part.influences, len(part.influences)
        items = float((u.mean(1) ** 2).sum()) * n / (n - 1)
        by_items += items
        spread += items**2 / (n - 1)
        by_both += float(((u - u.mean(1, keepdims=True)) ** 2).sum()) / (seeds * (seeds - 1)) * n / (n - 1)
    by_seeds = max(0.0, float(per_seed.var(ddof=1)) / seeds - by_both)
    of_items = by_items**2 / spread if spread else 1.0
    return _t_interval(float(per_seed.mean()), [(by_seeds, seeds - 1), (by_items, of_items)], level)


def combine_seeds(runs: Sequence[Sequence[Measurement]], seeds: Sequence[object] | None = None) -> list[Measurement]:
    """One point for each method from the points of several seeds, which bear the same names.

    Where all seeds answered the same items, seeds and items are both taken as samples (:func:`crossed`); otherwise each
    seed gives one number (:func:`mean_over_seeds`). Differences are taken from each seed's own reference first.

    Args:
        runs: for each seed its points.
        seeds: what to call them in ``measured``; 0, 1, … by default.

    Raises:
        ArgumentError: for fewer than 2 runs, or where a run lacks a point or a category that another has.
    """
    if len(runs) < 2:
        raise ArgumentError("seeds", len(runs), "give at least 2 files, one a seed")
    names = [point.name for point in runs[0]]
    by_name = [{point.name: point for point in run} for run in runs]
    for number, found in enumerate(by_name):
        missing = set(names).symmetric_difference(found)
        if missing:
            raise ArgumentError(
                "name", min(missing), f"seed {number} of {len(runs)} does not share this point; all must"
            )
    reference = next((point.name for point in runs[0] if point.family == "reference"), None)
    combined = []
    for name in names:
        points = [found[name] for found in by_name]
        bases = None if reference in (None, name) else [found[str(reference)] for found in by_name]
        combined.append(_combine(points, bases, list(range(len(runs)) if seeds is None else seeds)))
    return combined


def _combine(points: Sequence[Measurement], bases: Sequence[Measurement] | None, seeds: list[object]) -> Measurement:
    categories = set(points[0].capability_by_category)
    if any(set(point.capability_by_category) != categories for point in points):
        raise ArgumentError("capability_by_category", sorted(categories), f"{points[0].name}: differs between seeds")

    def mean(values: Sequence[float | None]) -> float | None:
        return None if any(v is None for v in values) else float(numpy.mean([v for v in values if v is not None]))

    fields: dict[str, Any] = {
        "reward": mean([p.reward for p in points]),
        "reward_ci": _over("reward", points, None)[0],
        "capability": mean([p.capability for p in points]),
        "capability_ci": _over("capability", points, None)[0],
        "capability_by_category": {c: mean([p.capability_by_category[c] for p in points]) for c in sorted(categories)},
        **{n: mean([getattr(p, n) for p in points]) for n in ("response_length", "kl", "seconds")},
        "measured": {**points[0].measured, "seeds": seeds},
        "by_benchmark": {},
        "reward_items": None,
        "capability_items": {},
    }
    if bases is not None:
        gain, capability = _over("reward", points, bases)[0], _over("capability", points, bases)[0]
        fields |= {
            "reward_gain": mean([p.reward - b.reward for p, b in zip(points, bases, strict=True)]),
            "reward_gain_ci": gain,
            "reward_verdict": interval_verdict(*gain),
            "tax": mean([b.capability - p.capability for p, b in zip(points, bases, strict=True)]),
            "tax_ci": (-capability[1], -capability[0]),
            "tax_verdict": interval_verdict(*capability),
            "by_category": _by_category(points, bases, sorted(categories)),
        }
    return dataclasses.replace(points[0], **fields)


def _over(what: str, points: Sequence[Measurement], bases: Sequence[Measurement] | None) -> tuple[Interval, float]:
    """Interval and p of a field's mean over seeds; minus each seed's reference where there is one."""
    items = [_items_of(what, p) for p in (*points, *(bases or ()))]
    first = items[0]
    if first and all(_same_items(first, each) for each in items):
        plain, blocks = benchmark_weights(first), []
        for name, scores in first.items():
            columns = numpy.array([each[name].scores for each in items[: len(points)]])
            if bases:
                columns = columns - numpy.array([each[name].scores for each in items[len(points) :]])
            blocks.append(Sample(columns.T, scores.clusters, scores.ids))
        return crossed(blocks, [plain[name] for name in first])
    values = [_value(what, p) for p in points]
    return mean_over_seeds([v - _value(what, b) for v, b in zip(values, bases, strict=True)] if bases else values)


def _by_category(
    points: Sequence[Measurement], bases: Sequence[Measurement], categories: Sequence[str]
) -> dict[str, Difference]:
    shared = [c for c in categories if all(c in base.capability_by_category for base in bases)]
    found = {}
    for category in shared:
        ci, p = _over(f"category:{category}", points, bases)
        means = [p.capability_by_category[category] - b.capability_by_category[category]
                 for p, b in zip(points, bases, strict=True)]  # fmt: skip
        found[category] = Difference(float(numpy.mean(means)), ci, p, test=f"t over {len(points)} seeds")
    adjusted = holm([each.p or 0.0 for each in found.values()])
    return {
        name: dataclasses.replace(each, p_adjusted=p, verdict=verdict(each.difference, p))
        for (name, each), p in zip(found.items(), adjusted, strict=True)
    }


def _items_of(what: str, point: Measurement) -> Mapping[str, ItemScores]:
    if what == "reward":
        return {"reward": point.reward_items} if point.reward_items else {}
    category = what.removeprefix("category:") if what.startswith("category:") else None
    return {n: i for n, i in point.capability_items.items() if category in (None, i.category or n)}


def _value(what: str, point: Measurement) -> float:
    if what.startswith("category:"):
        return point.capability_by_category[what.removeprefix("category:")]
    return point.reward if what == "reward" else point.capability


def _same_items(a: Mapping[str, ItemScores], b: Mapping[str, ItemScores]) -> bool:
    return set(a) == set(b) and all(a[name].ids == b[name].ids for name in a)


def _t_interval(centre: float, parts: Sequence[tuple[float, float]], level: float) -> tuple[Interval, float]:
    """From (variance, degrees of freedom) of independent parts: interval, and the p at which it would touch 0."""

    def half(level: float) -> float:
        return math.sqrt(sum(quantile(level, round(freedom, 1)) ** 2 * variance for variance, freedom in parts))

    if sum(variance for variance, _ in parts) <= 1e-24 * max(1.0, centre**2):
        return (centre, centre), 0.0 if centre else 1.0
    low, high = 0.0, 1.0
    for _ in range(20):  # to a millionth
        middle = (low + high) / 2
        low, high = (middle, high) if half(1 - middle) > abs(centre) else (low, middle)
    return (centre - half(level), centre + half(level)), (low + high) / 2
