"""A front in words and cells: what the page, the Markdown and the CSV say alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from paretune.evaluation.figure import printable, scales
from paretune.evaluation.frontier import Frontier, hypervolume
from paretune.evaluation.points import Interval, Measurement


def number(value: float, scale: float, sign: bool = False) -> str:
    """As points of 100 with one decimal where the scale is 100, else with three digits.

    Example:
        >>> number(0.1234, 100), number(0.1234, 1), number(-0.02, 100, sign=True), number(-1e-9, 100)
        ('12.3', '0.123', '−2.0', '0.0')
    """
    spec = ".1f" if scale == 100 else ".3g"
    text = f"{value * scale:{'+' if sign else ''}{spec}}"
    if float(text) == 0:
        return text.lstrip("+-")  # neither -0.0 nor +0.0
    return text.replace("-", "−")


def bounds(interval: Interval | None, scale: float) -> str:
    """``[low, high]``, or nothing.

    Example:
        >>> bounds((0.1, 0.25), 100)
        '[10.0, 25.0]'
    """
    return "" if interval is None else f"[{number(interval[0], scale)}, {number(interval[1], scale)}]"


def settings(values: Mapping[str, Any], limit: int = 200) -> str:
    """Hyper-parameters on one line.

    Example:
        >>> settings({"lr": 1e-05, "beta": 0.1})
        'lr 1e-05, beta 0.1'
    """
    return printable(", ".join(f"{k} {plain(v)}" for k, v in values.items()), limit)


def plain(value: Any) -> str:
    """Any value of JSON as text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return value if isinstance(value, str) else json.dumps(value, default=str)


def others(front: Frontier) -> list[Measurement]:
    """The points that are neither the reference nor the base."""
    return [p for p in front.points if p is not front.reference and p.family not in ("reference", "base")]


def highest(front: Frontier) -> Measurement | None:
    """The model of the highest reward."""
    return max(others(front), key=lambda p: p.reward, default=None)


def free(front: Frontier) -> Measurement | None:
    """The model of the highest reward among those that gain reward and whose tax is within noise, or negative."""
    found = [p for p in others(front) if p.reward_verdict == "gain" and p.tax_verdict in ("within noise", "gain")]
    return max(found, key=lambda p: p.reward, default=None)


def control_hypervolume(front: Frontier, corner: Sequence[float]) -> float | None:
    """Of the reference and the controls alone; None where there is no control."""
    own = [p for p in front.points if p is front.reference or p.family in ("reference", "control")]
    if not any(p.family == "control" for p in own):
        return None
    return hypervolume([(p.reward, p.capability) for p in own], corner)


def sentences(front: Frontier) -> list[str]:
    """What the intervals allow to be said about the front, without names cut short."""
    x, y = scales(front)
    said = []
    best = highest(front)
    if best is not None:
        said.append(f"Highest reward: {printable(best.name, 120)}{_gain(best, x)}{_tax(best, y)}.")
    bargain = free(front)
    if bargain is not None and bargain is not best:
        name = printable(bargain.name, 120)
        said.append(f"Highest reward whose tax is within noise: {name}{_gain(bargain, x)}{_tax(bargain, y)}.")
    elif bargain is None and any(p.tax_verdict and p.reward_verdict for p in others(front)):
        said.append("No model gains reward with a tax that is within noise.")
    counted = [p.tax_verdict for p in others(front) if p.tax_verdict]
    if counted:
        losses, gains, noise = (counted.count(v) for v in ("loss", "gain", "within noise"))
        said.append(
            f"Capability against {printable(front.reference.name, 80) if front.reference else 'the reference'}, "
            f"of {len(counted)} models: {losses} lost, {gains} gained, {noise} within noise."
        )
    elif front.reference is None:
        said.append("No point is marked as the reference (family “reference”), so there is no tax to report.")
    return said


def at_equal_length(point: Measurement) -> tuple[str, str] | None:
    """A win rate without what length explains, and what it is called; None where `measured` holds none.

    Example:
        >>> rewarded = {"length_controlled": {"rate": 51.25, "error": 3.0, "label": "ours"}}
        >>> at_equal_length(Measurement("a", "x", 0.5, (0, 1), 0.5, (0, 1), measured={"rewarded": rewarded}))
        ('51.2% ± 3.0', 'ours')
    """
    rewarded = point.measured.get("rewarded")
    found = rewarded.get("length_controlled") if isinstance(rewarded, Mapping) else None
    if not isinstance(found, Mapping) or not all(isinstance(found.get(k), int | float) for k in ("rate", "error")):
        return None
    return f"{found['rate']:.1f}% ± {found['error']:.1f}", printable(plain(found.get("label", "")), 200)


def _gain(point: Measurement, scale: float) -> str:
    if point.reward_gain is None:
        return f" with {number(point.reward, scale)}"
    interval = bounds(point.reward_gain_ci, scale)
    verdict = ", within noise" if point.reward_verdict == "within noise" else ""
    return f" gains {number(point.reward_gain, scale)}{' ' + interval if interval else ''}{verdict}"


def _tax(point: Measurement, scale: float) -> str:
    if point.tax is None:
        return ""
    interval = bounds(point.tax_ci, scale)
    verdict = {"loss": "a loss", "gain": "a gain", "within noise": "within noise"}.get(point.tax_verdict, "not tested")
    return f" and pays a tax of {number(point.tax, scale)}{' ' + interval if interval else ''}, {verdict}"


def categories(front: Frontier) -> list[str]:
    """All categories that any point has, in the order of their first occurrence."""
    return list(dict.fromkeys(name for point in front.points for name in point.capability_by_category))
