"""The dial's choice: the target, the smallest that is as good as the best, and where it stops."""

from __future__ import annotations

from typing import Any

import pytest

import paretune as pt
from paretune.averaging.dial import Agreement, dial


class World:
    """Rewards and agreement as functions of the scale."""

    def __init__(self, rewards: dict[float, list[float]], exact: dict[float, float] | None = None) -> None:
        self.rewards, self.exact, self.scale = rewards, exact or {}, 0.0

    def set(self, scale: float) -> None:
        self.scale = scale

    def reward(self) -> list[float]:
        return self.rewards[self.scale]

    def agreement(self) -> Agreement:
        return Agreement(self.exact.get(self.scale, 1.0), 0.1)

    def dial(self, **options: Any) -> Any:
        return dial(self.set, self.reward, self.agreement, ladder=tuple(self.rewards), **options)


def test_smallest_that_reaches_the_target() -> None:
    world = World({0.5: [0.2] * 20, 1.0: [0.7] * 20, 2.0: [0.9] * 20})
    assert world.dial(target=0.6).chosen == 1.0
    assert world.dial(target=0.95).chosen == 2.0
    assert "no scale reaches 0.95" in world.dial(target=0.95).why


def test_without_target_noise_does_not_choose_the_larger() -> None:
    noisy = [0.0, 1.0] * 20
    world = World({0.5: [0.0] * 40, 1.0: noisy, 2.0: [*noisy[:-2], 1.0, 1.0]})
    found = world.dial()
    assert found.chosen == 1.0
    assert found.rungs[2].reward > found.rungs[1].reward
    clear = World({0.5: [0.0] * 40, 1.0: noisy, 2.0: [1.0] * 40})
    assert clear.dial().chosen == 2.0


def test_it_stops_where_too_much_is_lost() -> None:
    world = World({0.5: [0.2] * 8, 1.0: [0.4] * 8, 2.0: [0.9] * 8}, {2.0: 0.5})
    found = world.dial(target=0.8)
    assert found.chosen == 1.0
    assert [rung.scale for rung in found.rungs] == [0.5, 1.0]
    assert "50%" in found.stopped
    assert world.dial(target=0.8, least_exact=0.4).chosen == 2.0


def test_kl_stops_it_too() -> None:
    world = World({1.0: [0.5] * 4})
    with pytest.raises(pt.DataError, match="begin the ladder lower"):
        world.dial(largest_kl=0.05)


def test_intervals_and_records() -> None:
    found = World({1.0: [0.0, 1.0] * 50}).dial()
    low, high = found.rungs[0].reward_ci
    assert 0.38 < low < 0.45
    assert 0.55 < high < 0.62
    assert found.to_dict()["rungs"][0]["scale"] == 1.0


@pytest.mark.parametrize("ladder", [(), (0.0, 1.0), (1.0, 1.0), (2.0, 1.0)])
def test_wrong_ladders(ladder: tuple[float, ...]) -> None:
    with pytest.raises(pt.ArgumentError, match="ladder="):
        dial(lambda s: None, lambda: [1.0], ladder=ladder)


def test_rewards_of_other_prompts_are_refused() -> None:
    answers = iter([[1.0, 1.0], [1.0]])
    with pytest.raises(pt.DataError, match="one for each prompt"):
        dial(lambda s: None, lambda: next(answers), ladder=(0.5, 1.0))
