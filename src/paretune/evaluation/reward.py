"""Rewards of fixed answers, item by item.

How rewards enter a measurement: answers are written once (``paretune generate``, `paretune.generation.generate`) and
kept; ``score(answers, reward, others)`` gives one value an answer, in the order of the answers, and what has to be told
about how it was measured. The answers of two models to the same prompts are then compared item by item, like any other
paired score (`paretune.evaluation.statistics`). A value of None says that this item could not be scored; the metadata
count why, and `Scores.mean` leaves it out. `load_reward` makes a reward of the text of a flag: ``--reward
model:PATH``, ``pairrm:PATH``, ``judge:NAME@URL``, ``rating:NAME@URL``, ``file.py:function`` or ``module:function``. The
rewards with ``pairwise = True`` compare each answer with another one to the same prompt, usually the reference's:
``others`` is needed. `DPOMargin` takes preference pairs, as `Item` (prompt, chosen, rejected).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import ArgumentError, DataError, examples
from ..generation import Endpoint, Generation
from ..generation.decoding import Prompt, instruction
from .length_controlled import length_controlled

WIN_RATE = "win rate"


@dataclass(frozen=True)
class Item:
    """What is scored.

    Args:
        prompt: text, or a conversation.
        answer: the answer whose reward is wanted.
        other: the answer that it is compared with, for pairwise rewards.
    """

    prompt: Prompt
    answer: str
    other: str | None = None


class Reward(Protocol):
    """Gives each item a value; larger is better.

    Args:
        name: short, for tables.
        pairwise: whether items need ``other``.
        unit: what a value is. The metadata of a `WIN_RATE` also hold the length-controlled one.
    """

    name: str
    pairwise: bool
    unit: str

    def __call__(self, items: Sequence[Item]) -> list[float | None]:
        """One value an item; None where it could not be scored."""

    def record(self) -> dict[str, Any]:
        """How it was measured, counts of the last call included."""


@dataclass(frozen=True)
class Scores:
    """Rewards of some answers.

    Args:
        reward: the reward's name.
        unit: what a value is.
        values: one an item, in the items' order; None where it could not be scored.
        metadata: how it was measured.
    """

    reward: str
    unit: str
    values: list[float | None]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Items without a value."""
        return sum(value is None for value in self.values)

    @property
    def mean(self) -> float:
        """Mean of the items that could be scored; NaN where none could."""
        scored = [value for value in self.values if value is not None]
        return sum(scored) / len(scored) if scored else math.nan


def score(answers: Sequence[Generation | Item], reward: Reward, others: Sequence[Generation] | None = None) -> Scores:
    """The reward of each answer.

    Args:
        answers: what was generated, or items made by hand.
        reward: any of ours, or any object that is a `Reward`.
        others: for pairwise rewards: the other model's answers to the same prompts, in any order; the j-th sample meets
            the j-th sample (or the only one).

    Raises:
        ArgumentError: no answers, or a pairwise reward without ``others``.
        DataError: a prompt has no answer in ``others``, or the reward returns something else than finite numbers.

    Example:
        >>> length = Callback(lambda prompts, completions, **_: [float(len(text)) for text in completions], "length")
        >>> score([Item("Say yes.", "yes"), Item("Say no.", "no")], length).mean
        2.5
    """
    if not answers:
        raise ArgumentError("answers", answers, "give at least one")
    items = _items(answers, others)
    if reward.pairwise and any(item.other is None for item in items):
        raise ArgumentError("others", others, f"{reward.name} compares two answers: give the other model's")
    values = list(reward(items))
    if len(values) != len(items):
        raise DataError(f"{reward.name} returned {len(values)} values for {len(items)} answers: return one each")
    for number, value in enumerate(values):
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise DataError(f"{reward.name} returned {value!r} for answer {number}: return a finite number, or None")
    metadata = {**reward.record(), "items": len(items), "failed": sum(value is None for value in values)}
    if reward.unit == WIN_RATE and len(items) - metadata["failed"] > 1:
        metadata["length_controlled"] = asdict(
            length_controlled(
                values,
                [len(item.answer) for item in items],
                [len(item.other or "") for item in items],
                clusters=[_content(item.prompt) for item in items],
            )
        )
    return Scores(reward.name, reward.unit, [None if v is None else float(v) for v in values], metadata)


class Callback:
    """Any function, called as TRL calls its reward functions: ``function(prompts=[…], completions=[…])``.

    Completions are texts, or ``[{"role": "assistant", "content": …}]`` where prompts are conversations.

    Args:
        function: returns a number, or None, for each completion.
        name: for tables.
    """

    pairwise = False
    unit = "reward"

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", "function"))
        self.fingerprint = _source(function)

    def __call__(self, items: Sequence[Item]) -> list[float | None]:
        completions = [
            item.answer if isinstance(item.prompt, str) else [{"role": "assistant", "content": item.answer}]
            for item in items
        ]
        found = self.function(prompts=[item.prompt for item in items], completions=completions)
        return [value.item() if hasattr(value, "item") else value for value in found]

    def record(self) -> dict[str, Any]:
        """Its name, and a hash of the file that holds it, so that an edited reward is another one."""
        return {"reward": self.name, "kind": "function", "fingerprint": self.fingerprint}


def load_reward(
    text: str, *, cache: str | os.PathLike[str] | None = None, batch_size: int = 8, **server: Any
) -> Reward:
    """The reward that a flag names.

    Args:
        text: ``model:PATH`` (sequence classification), ``pairrm:PATH``, ``judge:NAME@URL`` (pairwise),
            ``rating:NAME@URL`` (1 to 10), ``file.py:function`` or ``module:function``.
        cache: a file that keeps a judge's verdicts.
        batch_size: of models.
        server: of a judge's server: ``api_key_env``, ``concurrency``, ``timeout``, as in `Endpoint`.

    Raises:
        ArgumentError: the text names no reward.

    Example:
        >>> load_reward("math:fsum").name
        'math:fsum'
    """
    kind, _, rest = text.partition(":")
    if kind == "model" and rest:
        from .reward_model import RewardModel

        return RewardModel(rest, batch_size=batch_size)
    if kind == "pairrm" and rest:
        from .pairrm import PairRM

        return PairRM(rest, batch_size=batch_size)
    if kind in ("judge", "rating") and rest:
        from .judge import PairwiseJudge, RatingJudge

        name, at, url = rest.rpartition("@")
        if not at:
            raise ArgumentError("reward", text, f"write {kind}:NAME@http://host:port/v1")
        return (PairwiseJudge if kind == "judge" else RatingJudge)(Endpoint(url, name, **server), cache=cache)
    return Callback(_function(text), text)


def _function(text: str) -> Callable[..., Any]:
    home, _, name = text.rpartition(":")
    if not home or not name:
        raise ArgumentError(
            "reward", text, "write model:PATH, pairrm:PATH, judge:NAME@URL, rating:NAME@URL or file.py:function"
        )
    if home.endswith(".py") and not Path(home).is_file():
        raise ArgumentError("reward", text, f"there is no file {home}: give the path of one")
    try:
        if home.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"paretune_reward_{Path(home).stem}", home)
            if spec is None or spec.loader is None:
                raise ImportError("it cannot be imported")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(home)
    except Exception as error:  # whatever the user's file raises
        raise ArgumentError("reward", text, f"{home} fails: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ArgumentError("reward", text, f"{home} has no function {name}")
    return function


def _source(function: Callable[..., Any]) -> str | None:
    """Hash of the file that defines a function; None where there is none, as for built-in ones."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function)) or ""
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except (TypeError, OSError):
        return None


def _items(answers: Sequence[Generation | Item], others: Sequence[Generation] | None) -> list[Item]:
    found: dict[str, list[Generation]] = {}
    for other in others or ():
        found.setdefault(_content(other.prompt), []).append(other)
    for same in found.values():
        same.sort(key=lambda other: other.sample)
    items, lost, used = [], [], dict.fromkeys(found, 0)
    for answer in answers:
        if isinstance(answer, Item):
            items.append(answer)
            continue
        content, other_text = _content(answer.prompt), None
        if others is not None:
            same = found.get(content, [])
            place = 0 if len(same) == 1 else used.get(content, 0)
            if place < len(same):
                other_text = same[place].text
                used[content] += 1
            else:
                lost.append(instruction(answer.prompt)[:60])
        items.append(Item(answer.prompt, answer.text, other_text))
    if lost:
        raise DataError(
            f"prompts without the other model's answer: {examples(lost)}: let both models answer the same prompts"
        )
    return items


def _content(prompt: Prompt) -> str:
    # A text and a conversation with this one turn ask the same: files of other tools hold the instruction alone.
    if not isinstance(prompt, str) and len(prompt) == 1 and isinstance(prompt[0], dict):
        return str(prompt[0]["content"])
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
