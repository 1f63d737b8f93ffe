"""Which objective trains: frequencies, argmax, order, and what schedules refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest

import paretune as pt


def chosen(schedule: Any, steps: int, total: int = 100, values: Any = None) -> list[str]:
    return [next(iter(schedule.choose(step, total, values or {}))) for step in range(steps)]


@pytest.mark.parametrize("weight", [0.01, 0.25, 0.5, 0.99])
def test_alright_draws_with_its_weight(weight: float) -> None:
    schedule, steps = pt.Alright({"dpo": weight, "sft": 1 - weight}), 10_000
    schedule.bind({"sft": 5, "dpo": 5}, seed=3)
    drawn = chosen(schedule, steps)
    assert abs(drawn.count("dpo") - weight * steps) <= 4 * math.sqrt(steps * weight * (1 - weight))
    again = pt.Alright({"sft": 1 - weight, "dpo": weight}, seed=3)
    again.bind({"sft": 9, "dpo": 2}, seed=8)
    assert chosen(again, steps) == drawn
    # each draw is of its own: no step depends on those before it
    assert next(iter(again.choose(777, steps, {}))) == drawn[777]
    again.seed = 4
    assert chosen(again, steps) != drawn


def test_alright_is_not_periodic() -> None:
    schedule = pt.Alright()
    schedule.bind({"a": 1, "b": 1}, seed=0)
    drawn = [name == "a" for name in chosen(schedule, 4000)]
    for lag in (1, 2, 3, 10):
        agree = sum(one == other for one, other in zip(drawn, drawn[lag:], strict=False))
        assert abs(agree - (4000 - lag) / 2) <= 4 * math.sqrt(4000) / 2


@pytest.mark.parametrize("weights", [{"sft": 1.0, "dpo": 0.0}, {"sft": 0.0, "dpo": 1.0}])
def test_alright_never_draws_weight_0(weights: dict[str, float]) -> None:
    schedule = pt.Alright(weights)
    schedule.bind({"sft": 5, "dpo": 5})
    assert set(chosen(schedule, 500)) == {name for name, weight in weights.items() if weight}


def test_maxright_takes_the_largest_weighted_gap() -> None:
    schedule = pt.MaxRight({"sft": 0.25, "dpo": 0.75}, ideal={"sft": 1.0, "dpo": 0.2}, refresh_every=4)
    schedule.bind({"sft": 5, "dpo": 5})
    #          sft: 0.25 (f - 1)   dpo: 0.75 (f - 0.2)
    scripted = [({"sft": 3.0, "dpo": 0.6}, "sft"), ({"sft": 2.0, "dpo": 0.6}, "dpo"), ({"sft": 1.0, "dpo": 0.1}, "sft")]
    scripted += [({"sft": 0.5, "dpo": 0.1}, "dpo"), ({"sft": 2.5, "dpo": 0.7}, "sft")]  # the last two are equal
    assert [next(iter(schedule.choose(0, 9, values))) for values, _ in scripted] == [want for _, want in scripted]
    assert [step for step in range(12) if schedule.measures(step)] == [0, 4, 8]


def test_mix_is_its_weights() -> None:
    schedule = pt.Mix()
    schedule.bind({"sft": 5, "dpo": 5})
    assert schedule.choose(3, 10, {}) == {"sft": 0.5, "dpo": 0.5}
    schedule = pt.Mix({"sft": 1.0, "dpo": 0.0})
    schedule.bind({"sft": 5, "dpo": 5})
    assert schedule.choose(3, 10, {}) == {"sft": 1.0}


@pytest.mark.parametrize(
    ("passes", "shares", "total", "first"),
    [
        ({"sft": 10, "dpo": 30}, None, 40, 10),
        ({"sft": 10, "dpo": 30}, None, 8, 2),
        ({"sft": 1, "dpo": 1000}, None, 6, 1),  # nobody is left out
        ({"sft": 1000, "dpo": 1}, None, 6, 5),
        ({"sft": 1, "dpo": 1000}, [0.5, 0.5], 6, 3),
        ({"sft": 1, "dpo": 1}, [0.0, 1.0], 6, 0),
    ],
)
def test_sequential(passes: dict[str, int], shares: list[float] | None, total: int, first: int) -> None:
    schedule = pt.Sequential(["sft", "dpo"], shares)
    schedule.bind(passes)
    assert chosen(schedule, total, total) == ["sft"] * first + ["dpo"] * (total - first)
    assert schedule.epoch_steps(passes) == sum(passes.values())


def test_three_in_a_row() -> None:
    schedule = pt.Sequential(["c", "a", "b"])
    schedule.bind({"a": 2, "b": 3, "c": 1})
    assert chosen(schedule, 6, 6) == ["c", "a", "a", "b", "b", "b"]
    assert chosen(schedule, 3, 3) == ["c", "a", "b"]


def test_a_schedule_serves_several_runs() -> None:
    """Binding leaves nothing behind."""
    alright, sequential = pt.Alright(), pt.Sequential(["a", "b"])
    alright.bind({"a": 1, "b": 1}, seed=1)
    first = chosen(alright, 50)
    alright.bind({"a": 1, "b": 1}, seed=2)
    assert chosen(alright, 50) != first
    for passes, ends in (({"a": 1, "b": 3}, 1), ({"a": 3, "b": 1}, 3)):
        sequential.bind(passes)
        assert chosen(sequential, 4, 4).count("a") == ends


WRONG: list[tuple[Any, str]] = [
    (lambda: pt.Mix({"sft": 0.5, "dpo": 0.6}), "weights={'sft': 0.5, 'dpo': 0.6}: they add up to 1.1; make that 1"),
    (lambda: pt.Alright({"sft": -0.5, "dpo": 1.5}), "give finite numbers of at least 0"),
    (lambda: pt.MaxRight({"sft": math.nan, "dpo": 1.0}), "give finite numbers of at least 0"),
    (lambda: pt.MaxRight(ideal={"sft": math.inf}), "the value of 'sft' is not finite"),
    (lambda: pt.MaxRight(refresh_every=0), "refresh_every=0: give a number of steps of at least 1"),
    (lambda: pt.Sequential("sft"), "name each objective once"),
    (lambda: pt.Sequential(["sft", "sft"]), "name each objective once"),
    (lambda: pt.Sequential(["sft", "dpo"], [1.0]), "give one share for each of sft, dpo"),
    (lambda: pt.Sequential(["sft", "dpo"], [0.7, 0.7]), "shares={'sft': 0.7, 'dpo': 0.7}: they add up to 1.4"),
    (lambda: pt.Mix({"sft": 0.5, "ipo": 0.5}), "'ipo' is no objective; there are sft, dpo"),
    (lambda: pt.Alright({"sft": 1.0}), "objective 'dpo' is missing"),
    (lambda: pt.MaxRight(ideal={"kto": 1.0}), "ideal={'kto': 1.0}: 'kto' is no objective"),
    (lambda: pt.Sequential(["sft"]), "objective 'dpo' is missing"),
    (lambda: pt.Sequential(["sft", "dpo", "kto"]), "'kto' is no objective"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_refused(case: int) -> None:
    make, says = WRONG[case]
    with pytest.raises(pt.ArgumentError) as error:
        make().bind({"sft": 5, "dpo": 5})
    assert says in str(error.value)
