"""Methods at equal reward: what each keeps of its skills where it reaches a given sampled reward.

A method is judged by its whole curve (over learning rates, or over the scale of the dial), each straight between its
points, the reference as the first. The reward is one that AdamW reaches, so that AdamW's own tax at it is the measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from paretune.demo.scores import Scores, best_at, interval

TARGET = 0.85


def equal_reward(
    points: Sequence[dict[str, Any]], scores: Scores, reference: int, curve: Sequence[int], target: float = TARGET
) -> dict[str, Any]:
    """Capability at one reward, by method; and the share of AdamW's tax that each removes.

    Args:
        points: of all methods.
        scores: theirs.
        reference: which point is the reference.
        curve: AdamW's, over learning rates.
        target: the reward; less where AdamW's curve does not reach it: then the most that it reaches.

    Returns:
        ``{"reward", "adamw": {...}, "methods": [{"method", "hyperparameters", "capability", "capability_ci",
        "removed", "removed_ci"}]}``; a capability of None: never reached.
    """
    reach = max(scores.reward[i] for i in curve)
    at = min(target, float(reach))
    control = _at(scores, curve, at)
    methods = []
    for name, members in _ladders(points, curve).items():
        own = _at(scores, [reference, *members], at)
        found: dict[str, Any] = {
            "method": name[0],
            "hyperparameters": dict(name[1]),
            "family": points[members[0]]["family"],
        }
        found |= {"capability": own[0], "capability_ci": None if own[0] is None else interval(own[1])}
        found |= _removed(scores, reference, own, control)
        methods.append(found)
    methods.sort(key=lambda each: 1.0 if each["capability"] is None else -each["capability"])
    adamw = {"capability": control[0], "capability_ci": interval(control[1])}
    return {"reward": at, "wanted": target, "adamw": adamw, "methods": methods}


def _ladders(points: Sequence[dict[str, Any]], curve: Sequence[int]) -> dict[Any, list[int]]:
    """The points of each method that differ in nothing but the scale."""
    found: dict[Any, list[int]] = {}
    for i, point in enumerate(points):
        if "scale" in point["hyperparameters"] and i not in curve:
            rest = tuple((k, v) for k, v in point["hyperparameters"].items() if k not in ("scale", "ratio", "refused"))
            found.setdefault((point["method"], rest), []).append(i)
    return found


def _at(scores: Scores, curve: Sequence[int], reward: float) -> tuple[float | None, numpy.ndarray]:
    """A curve's best capability at a reward, and its draws; where a draw falls short its highest reward counts."""
    draws = []
    for d in range(scores.reward_draws.shape[1]):
        drawn = [(scores.reward_draws[i, d], scores.capability_draws[i, d]) for i in curve]
        reached = best_at(reward, drawn)
        draws.append(max(drawn)[1] if reached is None else reached)
    means = [(float(scores.reward[i]), float(scores.capability[i])) for i in curve]
    return best_at(reward, means), numpy.asarray(draws)


def _removed(
    scores: Scores, reference: int, own: tuple[float | None, numpy.ndarray], control: tuple[float | None, numpy.ndarray]
) -> dict[str, Any]:
    """1 − tax/AdamW's tax, where AdamW pays a measurable one."""
    paid = scores.capability_draws[reference] - control[1]
    if own[0] is None or control[0] is None or interval(paid)[0] <= 0:
        return {"removed": None, "removed_ci": None}
    tax = float(scores.capability[reference]) - own[0]
    whole = float(scores.capability[reference]) - control[0]
    shares = 1 - (scores.capability_draws[reference] - own[1]) / numpy.maximum(paid, 1e-9)
    return {"removed": 1 - tax / whole, "removed_ci": interval(shares)}
