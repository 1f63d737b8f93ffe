"""Means, intervals and comparisons of the demo."""

from __future__ import annotations

import numpy as np
import pytest

from paretune.demo.results import label, summarize
from paretune.demo.scores import above_curve, as_point, best_at, score

CATEGORIES = ["a"] * 30 + ["b"] * 10


def flat(value: float, n: int) -> list[float]:
    return [value] * n


def coin(p: float, n: int, seed: int) -> list[bool]:
    return [bool(x) for x in np.random.default_rng(seed).random(n) < p]


def test_capability_is_the_mean_of_categories() -> None:
    solved = [True] * 30 + [False] * 10  # 3 of 4 exercises, but one of two categories
    scores = score([[flat(0.25, 20)]], [[solved]], [CATEGORIES])
    assert scores.capability.tolist() == [0.5]
    assert scores.categories == [{"a": 1.0, "b": 0.0}]
    assert scores.reward.tolist() == [0.25]


def test_draws_are_paired() -> None:
    solved = coin(0.6, 40, 1)
    scores = score([[flat(0.5, 20)] * 2], [[solved, solved]], [CATEGORIES])
    point = as_point(scores, 1, 0, {"method": "twin"})
    assert point["tax"] == 0
    assert point["tax_ci"] == [0, 0]
    assert point["capability_ci"][0] < point["capability"] < point["capability_ci"][1]


@pytest.mark.parametrize("p", [0.3, 0.8])
def test_intervals_cover(p: float) -> None:
    """About 95 of 100 intervals of a fair sample contain the truth."""
    inside = 0
    for seed in range(100):
        scores = score([[coin(p, 200, seed)]], [[coin(p, 40, seed)]], [["a"] * 40], draws=300)
        low, high = as_point(scores, 0, 0, {})["reward_ci"]
        inside += low <= p <= high
    assert 88 <= inside <= 99


def test_several_seeds_widen_the_interval() -> None:
    one = score([[coin(0.5, 200, 0)]], [[coin(0.5, 40, 0)]], [["a"] * 40])
    apart = [[[coin(p, 200, i)] for i, p in enumerate((0.2, 0.5, 0.8))], [[coin(0.5, 40, i)] for i in range(3)]]
    several = score(apart[0], apart[1], [["a"] * 40] * 3)
    assert several.reward_draws.std() > 3 * one.reward_draws.std()


def test_best_at_equal_reward() -> None:
    curve = [(0.4, 0.9), (0.8, 0.8), (0.7, 0.3)]  # reward falls again at the highest learning rate
    assert best_at(0.6, curve) == pytest.approx(0.85)
    assert best_at(0.75, curve) == pytest.approx(0.8125)
    assert best_at(0.9, curve) is None
    assert best_at(0.1, curve) == 0.9  # at least this reward


def records() -> list[list[list[dict[str, object]]]]:
    def point(method: str, family: str, reward: float, right: float, **hyper: object) -> list[dict[str, object]]:
        count = round(40 * right)
        return [
            {
                "method": method, "family": family, "hyperparameters": hyper, "seconds": 1.0,
                "rewards": flat(reward, 50), "solved": [True] * count + [False] * (40 - count),
                "categories": ["a"] * 40,
            }
        ]  # fmt: skip

    return [
        [
            point("reference (SFT)", "control", 0.4, 1.0),
            point("base", "control", 0.1, 0.1),
            point("AdamW", "control", 0.8, 0.5, lr=1e-4),
            point("AdamW", "control", 0.6, 0.9, lr=5e-5),
            point("EMA", "regularisation", 0.7, 1.0, decay=0.02),
            point("KL", "regularisation", 0.7, 0.2, beta=2.0),
            point("TIES", "offline", 0.9, 0.9, weight=0.7),
            point("OnDARE, weight 0", "online", 0.6, 0.9, density=0.5, weight=0.0),
            point("OnDARE", "online", 0.6, 0.9, density=0.5, weight=1e-3),
        ]
    ]


def test_verdict_says_what_the_numbers_say() -> None:
    results = summarize(records(), [0])
    headline, first, *_ = results["verdict"]
    assert headline.startswith("Skills at sampled reward 80.0 (reference 100.0): AdamW at its best learning rate 50.0")
    assert first.startswith("AdamW (lr 0.0001) gains 40.0 [40.0, 40.0]")
    assert "tax of 50.0" in first
    text = "\n".join(results["verdict"])
    assert "above AdamW's curve over learning rates: EMA (decay 0.02) by 30.0" in text
    assert "below AdamW's curve over learning rates: KL (beta 2)" in text
    assert "More reward than AdamW at its best learning rate, by: TIES (weight 0.7) [10.0, 10.0] at tax 10.0" in text
    assert "What τ adds to OnDARE (weight 0.001 against 0)" in text
    assert "reward [0.0, 0.0], capability [0.0, 0.0] points: within noise." in text


def test_results_keep_the_contract() -> None:
    results = summarize(records(), [0])
    assert {"seed", "points", "reference", "base", "hypervolume"} <= results.keys()
    wanted = {"method", "family", "hyperparameters", "reward", "reward_ci", "capability", "capability_ci", "tax"}
    for point in results["points"]:
        assert wanted | {"capability_by_category", "seconds"} <= point.keys()
        assert point["tax"] == pytest.approx(results["reference"]["capability"] - point["capability"])
    assert label(results["points"][0]) == "AdamW (lr 0.0001)"
    assert results["pareto"] == ["EMA (decay 0.02)", "TIES (weight 0.7)"]
    # the reference's column, then what each wider reward adds at lower capability
    assert results["hypervolume"]["adamw"] == pytest.approx(0.4 * 1 + 0.2 * 0.9 + 0.2 * 0.5)


def test_above_curve_needs_a_reward_that_the_curve_reaches() -> None:
    scores = score([[flat(0.4, 20), flat(0.9, 20)]], [[coin(0.5, 40, 0)] * 2], [["a"] * 40])
    assert above_curve(scores, 1, [0]) is None
