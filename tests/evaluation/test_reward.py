"""How answers, rewards and other models' answers come together; any function as a reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import paretune as pt
from paretune.evaluation.reward import Callback, Item, load_reward, score


def answer(prompt: Any, text: str, sample: int = 0, index: int = 0) -> pt.Generation:
    return pt.Generation(index, sample, prompt, text, True, 1)


class Margin:
    """Longer wins."""

    name, pairwise, unit = "margin", True, "characters"

    def __call__(self, items: list[Item]) -> list[float]:
        return [float(len(item.answer) - len(item.other or "")) for item in items]

    def record(self) -> dict[str, Any]:
        return {"kind": "test"}


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_others_are_found_by_prompt_and_sample() -> None:
    answers = [answer(p, p * n, n) for p in ("a", "b") for n in (1, 2)]
    others = [answer(chat("b"), "", 0), answer("a", "aaaa", 1), answer("a", "a", 0)]  # one for b serves both samples
    scores = score(answers, Margin(), others)
    assert scores.values == [0.0, -2.0, 1.0, 2.0]
    assert (scores.unit, scores.metadata) == ("characters", {"kind": "test", "items": 4, "failed": 0})
    with pytest.raises(pt.DataError, match=r"without the other model's answer: b"):
        score(answers, Margin(), others[1:])
    with pytest.raises(pt.DataError, match="without"):
        score([*answers, answer("a", "x", 2)], Margin(), others)
    with pytest.raises(pt.ArgumentError, match="compares two answers"):
        score(answers, Margin())
    with pytest.raises(pt.ArgumentError, match="at least one"):
        score([], Margin())


def test_items_without_a_value_are_counted() -> None:
    scores = score([Item("a", "b"), Item("a", "ccc")], Callback(lambda completions, **_: [None, 3]))
    assert (scores.values, scores.mean, scores.failed, scores.metadata["failed"]) == ([None, 3.0], 3.0, 1, 1)


@pytest.mark.parametrize(
    ("returned", "says"), [([1.0], "1 values for 2"), ([1.0, float("nan")], "nan for answer 1"), (["x", 1], "'x' for")]
)
def test_functions_that_return_something_else(returned: list[Any], says: str) -> None:
    with pytest.raises(pt.DataError, match=says):
        score([Item("a", "b"), Item("a", "c")], Callback(lambda **_: returned))


def test_functions_see_what_trl_shows_them(world: Path) -> None:
    """The file that ``paretune train grpo --reward_function`` takes."""
    reward = load_reward(f"{world / 'reward.py'}:length")
    assert score([Item(chat("hi"), "four")], reward).values == [4.0]
    seen: dict[str, Any] = {}
    score([Item("hi", "four")], Callback(lambda prompts, completions: seen.update(p=prompts, c=completions) or [1]))
    assert seen == {"p": ["hi"], "c": ["four"]}


def test_torch_numbers_are_numbers() -> None:
    import torch

    assert score([Item("a", "b")], Callback(lambda **_: torch.tensor([0.5]))).values == [0.5]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("length", "write model:PATH"),
        ("nowhere.py:f", "there is no file nowhere.py: give the path"),
        ("no_such_module:f", "no_such_module fails"),
        ("math:nothing", "math has no function nothing"),
        ("judge:gpt", "write judge:NAME@http"),
        ("judge:gpt@host:80", "url='host:80'"),
    ],
)
def test_texts_that_name_no_reward(text: str, says: str) -> None:
    with pytest.raises(pt.ArgumentError, match=says):
        load_reward(text)


def test_texts_that_name_a_judge(tmp_path: Path) -> None:
    judge = load_reward("judge:org/model@http://h:1/v1", cache=tmp_path / "c.jsonl")
    assert (judge.name, judge.record()["model"], judge.pairwise) == ("judge", "org/model", True)
    assert load_reward("rating:m@http://h/v1").name == "rating"
