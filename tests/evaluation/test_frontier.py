"""Pareto set and hypervolume against brute force."""

from __future__ import annotations

import random

import pytest

from paretune.evaluation.frontier import hypervolume, pareto_set


@pytest.mark.parametrize("seed", range(40))
def test_against_a_grid(seed: int) -> None:
    """On integer coordinates the dominated area is a number of unit squares."""
    rng = random.Random(seed)
    points = [(rng.randint(-1, 8), rng.randint(-1, 8)) for _ in range(rng.randint(1, 9))]
    squares = sum(any(x >= i + 1 and y >= j + 1 for x, y in points) for i in range(8) for j in range(8))
    assert hypervolume([(float(x), float(y)) for x, y in points], (0.0, 0.0)) == squares
    front = [p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)]
    assert [points[i] for i in pareto_set(points)] == front


def test_nothing_beyond_the_reference_point() -> None:
    assert hypervolume([(0.5, 0.5)], (0.6, 0.0)) == 0
    assert hypervolume([], (0.0, 0.0)) == 0
