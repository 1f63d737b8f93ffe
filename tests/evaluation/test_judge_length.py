"""The length-controlled win rate against statsmodels' GLM."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import paretune as pt
from paretune.evaluation.length_controlled import length_controlled


def data(seed: int, n: int = 400, theta: float = 0.4, phi: float = 1.5, bias: float = 300) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    other = rng.integers(200, 2000, n)
    longer = rng.normal(bias, 600, n).astype(int)
    p = 1 / (1 + np.exp(-theta - phi * np.tanh(longer / longer.std())))
    wins = (rng.random((2, n)) < p).mean(0)  # two orders
    return wins, np.maximum(other + longer, 1), other


def oracle(wins: Any, lengths: Any, others: Any, weights: Any = None) -> float:
    import statsmodels.api as sm

    difference = (lengths - others).astype(float)
    design = np.column_stack([np.ones(len(wins)), np.tanh(difference / difference.std())])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = sm.GLM(wins, design, family=sm.families.Binomial(), freq_weights=weights).fit()
    return float(100 / (1 + np.exp(-fit.params[0])))


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_reference_glm(seed: int) -> None:
    n = [20, 60, 400, 805][seed % 4]
    wins, lengths, others = data(seed, n, theta=[0.4, -1.5][seed % 2], phi=[1.5, 0.0, -1.0][seed % 3])
    found = length_controlled(wins.tolist(), lengths.tolist(), others.tolist(), bootstraps=2)
    assert found.rate == pytest.approx(oracle(wins, lengths, others), abs=0.1)
    assert found.raw == pytest.approx(100 * wins.mean())
    assert "not AlpacaEval's official" in found.label


def test_the_bootstrap_is_the_one_of_refitted_models() -> None:
    wins, lengths, others = data(3, 150)
    found = length_controlled(wins.tolist(), lengths.tolist(), others.tolist(), bootstraps=300, seed=5)
    counts = np.random.default_rng(5).multinomial(150, np.full(150, 1 / 150), size=300)
    rates = [oracle(wins, lengths, others, row) for row in counts[:100]]
    assert found.error == pytest.approx(np.std(rates, ddof=1), rel=0.2)
    assert found.interval[0] < found.rate < found.interval[1]
    again = length_controlled(wins.tolist(), lengths.tolist(), others.tolist(), bootstraps=300, seed=5)
    assert again == found


def test_what_was_never_seen_at_equal_length_says_so() -> None:
    """Always longer and always better: length may explain all of it, or nothing."""
    found = length_controlled([1.0] * 9, [20] * 5 + [30] * 4, [10] * 9, bootstraps=10)
    assert found.label.endswith("extrapolated, as every answer is longer than the other")
    assert "extrapolated" not in length_controlled([1.0] * 3, [20, 30, 10], [10, 10, 11], bootstraps=10).label


def test_samples_of_one_prompt_are_drawn_together() -> None:
    """Four copies of each item say no more than one."""
    wins, lengths, others = (values.tolist() for values in data(4, 150))
    once = length_controlled(wins, lengths, others, bootstraps=300)
    prompts = [str(i) for i in range(150)] * 4
    again = length_controlled(wins * 4, lengths * 4, others * 4, clusters=prompts, bootstraps=300)
    assert again.error == pytest.approx(once.error, rel=1e-3)
    assert length_controlled(wins * 4, lengths * 4, others * 4, bootstraps=300).error < 0.6 * once.error


def test_the_interval_covers() -> None:
    truth, hits = 100 / (1 + np.exp(-0.4)), 0
    for seed in range(200):
        wins, lengths, others = data(100 + seed, 200)
        low, high = length_controlled(wins.tolist(), lengths.tolist(), others.tolist(), bootstraps=200).interval
        hits += low <= truth <= high
    assert 0.9 <= hits / 200 <= 0.985


def test_extremes() -> None:
    assert length_controlled([1.0] * 20, range(1, 21), [5] * 20).rate > 99.9
    equal = length_controlled([1, 0, 1, 1], [5] * 4, [5] * 4)
    assert (equal.rate, equal.slope) == (pytest.approx(75, abs=0.01), 0)
    partly = length_controlled([1, None, 0, 1], [5, 9, 6, 7], [6] * 4)
    assert partly.items == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([1, 0], [1], [1, 2]), "lengths=1"),
        (([None, 1], [1, 2], [1, 2]), "at least two items"),
        (([1, 2], [1, 2], [1, 2]), r"wins=2\.0"),
    ],
)
def test_wrong_arguments(arguments: Any, says: str) -> None:
    with pytest.raises(pt.ArgumentError, match=says):
        length_controlled(*arguments)
