"""Choosing a point on one half of the items and reporting it on the other."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import numpy

from paretune.errors import ArgumentError
from paretune.evaluation.paired import against, measurement
from paretune.evaluation.points import ItemScores, Measurement


def choose_on_half(
    points: Sequence[Measurement],
    reference: Measurement,
    score: Callable[[float, float], float],
    seed: int = 0,
) -> tuple[str, Measurement, Measurement] | None:
    """Choose a point on one half of the items and measure it on the other, so that choosing does not flatter it.

    Args:
        points: the candidates, such as the ratios of one merge, with item-wise scores.
        reference: what they are compared with, on the same items.
        score: of (reward gain, tax) on the choosing half; the highest wins, −inf is never taken.
        seed: of the halves; each half has half of the clusters of every benchmark.

    Returns:
        The chosen name, its point on the choosing half (flattered), and its point on the other half (to be reported);
        None where no point may be taken.

    Raises:
        ArgumentError: where a point has no item-wise scores.

    Example:
        >>> rewards, right = ItemScores.of([0.1] * 8, range(8)), ItemScores.of([1, 0] * 10, range(20))
        >>> sft = measurement("sft", "reference", rewards, {"math": right})
        >>> more = measurement("0.5", "offline", ItemScores.of([0.2] * 8, range(8)), {"math": right})
        >>> chosen = choose_on_half([more], sft, lambda gain, tax: gain if tax <= 0.02 else -math.inf)
        >>> chosen and chosen[0]
        '0.5'
    """
    for point in (reference, *points):
        if point.reward_items is None or not point.capability_items:
            raise ArgumentError("items", point.name, "measure it with item-wise scores; halves cannot be made without")
    halves = []
    for side in (0, 1):
        base = _half(reference, side, seed)
        halves.append({p.name: p for p in against(base, [_half(point, side, seed) for point in points])})
    scores = {name: score(p.reward_gain or 0.0, p.tax or 0.0) for name, p in halves[0].items()}
    best = max(scores, key=lambda name: scores[name], default=None)
    if best is None or scores[best] == -math.inf:
        return None
    return best, halves[0][best], halves[1][best]


def _half(point: Measurement, side: int, seed: int) -> Measurement:
    capability = {name: _half_of(items, side, seed) for name, items in point.capability_items.items()}
    rewards = point.reward_items
    if rewards is None:
        raise ArgumentError("items", point.name, "measure it with item-wise scores")
    kept = {"path": point.path, "label": point.label, "hyperparameters": point.hyperparameters}
    return measurement(point.name, point.family, _half_of(rewards, side, seed), capability, **kept)


def _half_of(items: ItemScores, side: int, seed: int) -> ItemScores:
    """One half of the clusters; which one depends on the items and the seed alone, so all models are split alike."""
    clusters = numpy.asarray(items.clusters if items.clusters is not None else range(len(items.scores)))
    known = numpy.unique(clusters)
    rng = numpy.random.default_rng((seed, zlib.crc32(items.ids.encode())))
    chosen = set(rng.permutation(known)[side::2].tolist())
    rows = [i for i, cluster in enumerate(clusters.tolist()) if cluster in chosen]
    return ItemScores(
        tuple(items.scores[i] for i in rows),
        f"{items.ids}/{side}",
        items.category,
        None if items.clusters is None else tuple(items.clusters[i] for i in rows),
    )
