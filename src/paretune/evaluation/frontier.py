"""The Pareto front of measured models and its hypervolume; on every axis more is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from paretune.errors import ArgumentError
from paretune.evaluation.paired import against, benchmark_weights
from paretune.evaluation.points import Interval, ItemScores, Measurement
from paretune.evaluation.statistics import Array, Sample, resample

DRAWS = 1000
_Z = 1.959964


def pareto_set(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other point dominates, in their order.

    A point dominates another if it is at least as good on every axis and better on one. Equal points stay together.

    Args:
        points: [points, axes], any number of axes.

    Example:
        >>> pareto_set([(0.1, 0.9), (0.5, 0.5), (0.4, 0.4)])
        [0, 1]
    """
    if not len(points):
        return []
    values = numpy.asarray(points, dtype=float)
    return [i for i, p in enumerate(values) if not bool(((values >= p).all(1) & (values > p).any(1)).any())]


def hypervolume(points: Sequence[Sequence[float]], reference_point: Sequence[float]) -> float:
    """Volume that the points dominate beyond the reference point.

    Slabs along the last axis, each with the hypervolume of the points that reach it on the others.

    Args:
        points: [points, axes], 2 to 4 axes.
        reference_point: [axes]; points that are not beyond it on every axis add nothing.

    Raises:
        ArgumentError: where the number of axes differs or is not 2 to 4.

    Example:
        >>> hypervolume([(1.0, 2.0), (2.0, 1.0)], (0.0, 0.0))
        3.0
    """
    axes = len(reference_point)
    if not 2 <= axes <= 4 or any(len(point) != axes for point in points):
        raise ArgumentError("reference_point", tuple(reference_point), "give 2 to 4 numbers, one for each axis")
    beyond = numpy.asarray(points, dtype=float).reshape(-1, axes) - numpy.asarray(reference_point, dtype=float)
    return _volume(beyond[(beyond > 0).all(1)])


def hypervolumes(x: Array, y: Array) -> Array:
    """Areas of many fronts at once, beyond (0, 0).

    Args:
        x, y: [fronts, points].

    Example:
        >>> hypervolumes(numpy.array([[1.0, 2.0]]), numpy.array([[2.0, 1.0]])).tolist()
        [3.0]
    """
    order = numpy.argsort(-x, axis=1)  # from the right: each point adds what rises above those before
    x = numpy.maximum(numpy.take_along_axis(x, order, 1), 0)
    y = numpy.maximum(numpy.take_along_axis(y, order, 1), 0) * (x > 0)
    top = numpy.maximum.accumulate(y, axis=1)
    rise = numpy.diff(top, axis=1, prepend=0.0)
    return numpy.asarray((x * rise).sum(1))


def _volume(beyond: Array) -> float:
    """Of points that are beyond the origin on every axis."""
    if not len(beyond):
        return 0.0
    if beyond.shape[1] == 2:
        return float(hypervolumes(beyond[None, :, 0], beyond[None, :, 1])[0])
    ordered = beyond[numpy.argsort(-beyond[:, -1])]
    heights = ordered[:, -1] - numpy.append(ordered[1:, -1], 0.0)
    total, front = 0.0, ordered[:0, :-1]
    for point, height in zip(ordered[:, :-1], heights, strict=True):
        if not bool((front >= point).all(1).any()):
            front = numpy.vstack([front[(front > point).any(1)], point])
        if height > 0:
            total += float(height) * _volume(front)
    return total


@dataclass(frozen=True)
class WorstCategory:
    """The category that lost most against the reference."""

    category: str
    difference: float
    verdict: str


class Frontier:
    """Measured models as points of (reward, capability).

    Args:
        measurements: :class:`Measurement` objects, or objects with the same fields as points.jsonl has.

    Attributes:
        points: the measurements; where they have item-wise scores but no tax interval, compared with the reference.
        reference: the point of the family ``reference``, else the one of that name, else None.

    Raises:
        ArgumentError: where there is no point, a name occurs twice, or more than one point is the reference.

    Example:
        >>> sft = Measurement("sft", "reference", 0.4, (0.3, 0.5), 0.9, (0.8, 1.0))
        >>> dpo = Measurement("dpo", "control", 0.8, (0.7, 0.9), 0.6, (0.5, 0.7))
        >>> front = Frontier([sft, dpo])
        >>> [point.name for point in front.pareto()], round(front.hypervolume(reference_point=(0, 0)), 3)
        (['sft', 'dpo'], 0.6)
    """

    def __init__(self, measurements: Iterable[Measurement | Mapping[str, Any]]) -> None:
        points = [m if isinstance(m, Measurement) else Measurement.from_dict(m) for m in measurements]
        if not points:
            raise ArgumentError("measurements", points, "give at least one")
        names = [point.name for point in points]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ArgumentError("name", twice, f"occurs {names.count(twice)} times; give each point its own")
        marked = [p for p in points if p.family == "reference"] or [p for p in points if p.name.lower() == "reference"]
        if len(marked) > 1:
            names = [point.name for point in marked]
            raise ArgumentError("family", "reference", f"one point can be the reference, not {', '.join(names[:3])}")
        self.reference = marked[0] if marked else None
        self.points = points if self.reference is None else _compared(self.reference, points)

    def pareto(self) -> list[Measurement]:
        """The points that no other point dominates, in their order; both axes: more is better."""
        return [self.points[i] for i in pareto_set(self._values())]

    def default_reference_point(self) -> tuple[float, float]:
        """(0, 0) where no value is negative; else the least values, rounded down to two digits.

        Hypervolumes of different files can be compared only at the same reference point.
        """
        return _floor([p.reward for p in self.points]), _floor([p.capability for p in self.points])

    def hypervolume(self, reference_point: Sequence[float] | None = None) -> float:
        """Area that the points dominate, above and to the right of the reference point.

        Args:
            reference_point: (reward, capability); :meth:`default_reference_point` where it is left out.

        Raises:
            ArgumentError: where it is not two numbers.
        """
        return hypervolume(self._values(), self._corner(reference_point))

    def hypervolume_interval(
        self, reference_point: Sequence[float] | None = None, draws: int = DRAWS, seed: int = 0
    ) -> Interval:
        """The 95% bootstrap interval of the hypervolume: (2 V − V*_{97.5%}, 2 V − V*_{2.5%}).

        Where every point has item-wise scores of the same items, items are resampled for all points together;
        otherwise each point is drawn from its own intervals. A front picks the luckiest of noisy points, so it is
        too large, and each draw of it more so: the basic interval takes that off, and may end below the estimate.

        Args:
            reference_point: as for :meth:`hypervolume`.
            draws: bootstrap draws.
            seed: of the draws.
        """
        corner = self._corner(reference_point)
        reward, capability = self._draws(draws, seed)
        drawn = hypervolumes(reward - corner[0], capability - corner[1])
        low, high = numpy.quantile(drawn, [0.025, 0.975])
        area = self.hypervolume(corner)
        return max(0.0, float(2 * area - high)), max(0.0, float(2 * area - low))

    @property
    def paired(self) -> bool:
        """Whether all points have item-wise scores of the same items."""
        first = self.points[0]
        return all(
            _ids(point.reward_items) == _ids(first.reward_items) is not None
            and point.capability_items.keys() == first.capability_items.keys() != set()
            and all(items.ids == first.capability_items[n].ids for n, items in point.capability_items.items())
            for point in self.points
        )

    def tax_per_reward(self, point: Measurement) -> tuple[float, Interval | None] | None:
        """Tax for each unit of reward gained, with its 95% interval by Fieller's method.

        None where there is no reference or no gain; no interval where the tax has none or the gain is within noise.

        Args:
            point: one of the points.
        """
        if self.reference is None or point.tax is None or point.reward_gain is None or point.reward_gain <= 0:
            return None
        tax, gain = point.tax, point.reward_gain
        if point.tax_ci is None or point.reward_gain_ci is None:
            return tax / gain, None
        s_tax, s_gain = ((high - low) / 2 for low, high in (point.tax_ci, point.reward_gain_ci))  # z · standard error
        a, b, c = gain**2 - s_gain**2, tax * gain, tax**2 - s_tax**2
        if a <= 0 or b * b < a * c:
            return tax / gain, None
        root = math.sqrt(b * b - a * c)
        return tax / gain, ((b - root) / a, (b + root) / a)

    def worst_category(self, point: Measurement) -> WorstCategory | None:
        """The category that fell most against the reference; None where nothing fell.

        Args:
            point: one of the points.
        """
        changes = self.category_changes(point)
        if not changes or min(changes.values()) >= 0:
            return None
        worst = min(changes, key=lambda name: changes[name])
        said = point.by_category.get(worst)
        return WorstCategory(worst, changes[worst], said.verdict if said else "")

    def category_changes(self, point: Measurement) -> dict[str, float]:
        """Each category's score minus the reference's.

        Args:
            point: one of the points.
        """
        if point.by_category:
            return {name: each.difference for name, each in point.by_category.items()}
        if self.reference is None or point.name == self.reference.name:
            return {}
        base = self.reference.capability_by_category
        return {name: score - base[name] for name, score in point.capability_by_category.items() if name in base}

    def report(self, path: str | Path, **options: Any) -> Path:
        """Write the front as one self-contained HTML page; .svg and .png give the figure, .md and .csv the table.

        Args:
            path: the file; its ending chooses the form.
            options: of :func:`paretune.evaluation.report.write_report`, such as ``reference_point`` and ``title``.

        Returns:
            The path.
        """
        from paretune.evaluation.report import write_report

        return write_report(self, path, **options)

    def summary(self, reference_point: Sequence[float] | None = None) -> dict[str, Any]:
        """What ``paretune frontier --json`` prints.

        Args:
            reference_point: as for :meth:`hypervolume`.
        """
        corner = self._corner(reference_point)
        return {
            "pareto": [point.name for point in self.pareto()],
            "hypervolume": self.hypervolume(corner),
            "hypervolume_ci": list(self.hypervolume_interval(corner)),
            "hypervolume_ci_from": "items" if self.paired else "intervals of each point",
            "reference_point": list(corner),
            "reference": None if self.reference is None else self.reference.name,
            "points": [self._summary_of(point) for point in self.points],
        }

    def _summary_of(self, point: Measurement) -> dict[str, Any]:
        price, worst = self.tax_per_reward(point), self.worst_category(point)
        return {
            "name": point.name,
            "family": point.family,
            "reward": point.reward,
            "capability": point.capability,
            "tax": point.tax,
            "tax_ci": point.tax_ci,
            "verdict": point.tax_verdict or None,
            "reward_gain": point.reward_gain,
            "reward_gain_ci": point.reward_gain_ci,
            "reward_verdict": point.reward_verdict or None,
            "tax_per_reward": price and price[0],
            "tax_per_reward_ci": price and price[1],
            "worst_category": worst and vars(worst),
        }

    def _values(self) -> list[tuple[float, float]]:
        return [(point.reward, point.capability) for point in self.points]

    def _corner(self, reference_point: Sequence[float] | None) -> tuple[float, float]:
        if reference_point is None:
            return self.default_reference_point()
        try:
            reward, capability = map(float, reference_point)
        except (TypeError, ValueError):
            raise ArgumentError("reference_point", reference_point, "give two numbers: reward, capability") from None
        if not math.isfinite(reward + capability):
            raise ArgumentError("reference_point", reference_point, "give two finite numbers")
        return reward, capability

    def _draws(self, draws: int, seed: int) -> tuple[Array, Array]:
        """Bootstrap draws of all points' rewards and capabilities, [draws, points] each."""
        if not self.paired:
            rng = numpy.random.default_rng(seed)
            means = numpy.array(self._values())
            widths = numpy.array([[high - low for low, high in (p.reward_ci, p.capability_ci)] for p in self.points])
            drawn = means + rng.standard_normal((draws, *means.shape)) * widths / (2 * _Z)
            return drawn[..., 0], drawn[..., 1]
        reward = _drawn([p.reward_items for p in self.points if p.reward_items], draws, seed)
        weights = benchmark_weights(self.points[0].capability_items)
        capability = numpy.sum(
            [w * _drawn([p.capability_items[n] for p in self.points], draws, seed) for n, w in weights.items()], 0
        )
        return reward, capability


def _compared(reference: Measurement, points: list[Measurement]) -> list[Measurement]:
    wanting = [p for p in points if p.name != reference.name and (p.tax_ci is None or not p.by_category)]
    found = {point.name: point for point in against(reference, wanting)}
    return [found.get(point.name, point) for point in points]


def _drawn(items: Sequence[ItemScores], draws: int, seed: int) -> Array:
    values = numpy.array([each.scores for each in items]).T
    return resample(Sample(values, items[0].clusters, items[0].ids), draws, seed).draws


def _ids(items: ItemScores | None) -> str | None:
    return None if items is None else items.ids


def _floor(values: Sequence[float]) -> float:
    least = min(values)
    if least >= 0:
        return 0.0
    unit = 10 ** (math.floor(math.log10(-least)) - 1)
    return round(math.floor(least / unit) * unit, 12)
