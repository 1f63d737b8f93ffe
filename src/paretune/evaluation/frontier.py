"""The Pareto front of (reward, capability) points and its hypervolume; both axes: more is better."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, float]


def pareto_set(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other point dominates, in their order.

    A point dominates another if it is at least as good on both axes and better on one. Equal points stay together.

    Example:
        >>> pareto_set([(0.1, 0.9), (0.5, 0.5), (0.4, 0.4)])
        [0, 1]
    """

    def dominated(p: Point) -> bool:
        return any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)

    return [i for i, p in enumerate(points) if not dominated(p)]


def hypervolume(points: Sequence[Point], reference_point: Point) -> float:
    """Area that the points dominate, above and to the right of the reference point.

    Example:
        >>> hypervolume([(1.0, 2.0), (2.0, 1.0)], (0.0, 0.0))
        3.0
    """
    area, height = 0.0, reference_point[1]
    for x, y in sorted(points, reverse=True):  # from the right: each point adds what rises above those before
        if x > reference_point[0] and y > height:
            area += (x - reference_point[0]) * (y - height)
            height = y
    return area
