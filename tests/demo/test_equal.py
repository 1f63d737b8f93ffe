"""Methods at equal reward."""

from __future__ import annotations

import pytest
from test_scores import CATEGORIES, coin, flat

from paretune.demo.equal import equal_reward
from paretune.demo.scores import score


def named(method: str, **hyperparameters: object) -> dict[str, object]:
    return {"method": method, "family": "offline", "hyperparameters": hyperparameters}


def solved(share: float) -> list[bool]:
    return [True] * round(30 * share) + [False] * (30 - round(30 * share)) + [True] * round(10 * share) + [False] * (
        10 - round(10 * share)
    )  # fmt: skip


POINTS = [
    named("reference (SFT)"), named("AdamW", lr=1e-4),
    named("gate", weight=1.0, scale=1.0, ratio=9.0), named("gate", weight=1.0, scale=2.0, ratio=9.0),
    named("weak", scale=1.0), named("not dialled"),
]  # fmt: skip
REWARDS = [0.4, 0.9, 0.6, 1.0, 0.5, 1.0]
SKILLS = [1.0, 0.5, 1.0, 0.8, 1.0, 1.0]


def test_curves_are_read_at_one_reward() -> None:
    scores = score([[flat(r, 20) for r in REWARDS]], [[solved(s) for s in SKILLS]], [CATEGORIES])
    found = equal_reward(POINTS, scores, 0, [0, 1], target=0.8)
    assert found["reward"] == 0.8
    assert found["adamw"]["capability"] == pytest.approx(0.6)
    gate, weak = found["methods"]
    assert (gate["method"], gate["hyperparameters"]) == ("gate", {"weight": 1.0})
    assert gate["capability"] == pytest.approx(0.9)
    assert gate["removed"] == pytest.approx(0.75)
    assert gate["removed_ci"][0] < 0.75 < gate["removed_ci"][1]
    assert (weak["method"], weak["capability"], weak["removed"]) == ("weak", None, None)


def test_the_reward_is_one_that_adamw_reaches() -> None:
    scores = score([[flat(r, 20) for r in REWARDS]], [[solved(s) for s in SKILLS]], [CATEGORIES])
    assert equal_reward(POINTS, scores, 0, [0, 1], target=0.99)["reward"] == pytest.approx(0.9)


def test_no_share_of_a_tax_that_nobody_pays() -> None:
    scores = score([[flat(r, 20) for r in REWARDS]], [[coin(0.9, 40, 1)] * 6], [CATEGORIES])
    assert equal_reward(POINTS, scores, 0, [0, 1], target=0.8)["methods"][0]["removed"] is None
