"""The mid world: valid items of more and longer skills, a model of its size that trains; the tiny world is as ever."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from random import Random

import pytest
import torch

from paretune.demo import chat, words
from paretune.demo.mid import mid_recipe
from paretune.demo.pretrain import Recipe, base_documents, build_model, sft_documents, train_phase, whole_rows
from paretune.demo.skills import RELATIONS, fraction_of
from paretune.demo.world import World, options_of
from paretune.errors import ArgumentError

MANY = 4000
WORLD = mid_recipe(3).world


def _expected(name: str, said: list[str]) -> list[str]:
    """The answer by another way: from the words of the prompt."""
    numbers = [int(word) for word in said if word.isdigit()]
    letters = [word for word in said if word in words.LETTERS]
    after = letters[1:]  # the list, where the letter that is asked about stands before it
    return {
        "sum": lambda: [str(sum(numbers))],
        "reverse": lambda: letters[::-1],
        "sort": lambda: sorted(letters),
        "order": lambda: [str(number) for number in sorted(numbers)],
        "index": lambda: [letters[numbers[0] - 1]],
        "place": lambda: [str(after.index(letters[0]) + 1)],
        "count": lambda: [str(sum(letter == letters[0] for letter in after))],
        "repeat": lambda: letters * numbers[0],
        "say": lambda: [said[1]] * numbers[0],
    }[name]()


@pytest.mark.parametrize("name", ["sum", "reverse", "sort", "order", "index", "place", "count", "repeat", "say"])
def test_answers_of_the_mid_world_are_right(name: str) -> None:
    draw = next(skill.draw for skill in WORLD.skills if skill.name == name)
    rng = Random(0)
    lengths = set()
    for _ in range(300):
        item = draw(rng)
        assert item.category == name
        answer = [word for word in item.answer.split() if word not in ("[", "]", "*")]
        assert answer == _expected(name, item.prompt.split())
        assert item.answer in item.raw
        lengths.add(len(item.prompt.split()))
    assert len(lengths) > 1 or name == "say"


def test_two_facts_in_one_question() -> None:
    draw = next(skill.draw for skill in WORLD.skills if skill.name == "both")
    rng, facts = Random(0), WORLD.facts
    singles = {item.prompt: item.answer for item in facts.all_items()}
    for _ in range(300):
        item = draw(rng)
        first, second = (f"{part.strip()} ?" for part in item.prompt.removesuffix(" ?").split(","))
        assert item.answer.split() == [singles[first], singles[second]]
        assert min(fraction_of(first), fraction_of(second)) >= 0.4  # SFT would teach again what it must not
    assert len(RELATIONS) == 3


def test_mid_items_are_many_distinct_and_never_taught() -> None:
    asked = {item.prompt for item in WORLD.items}
    assert len(asked) == len(WORLD.items) > 320
    assert {item.category for item in WORLD.items} == {skill.name for skill in WORLD.skills} - {"place", "count"}
    assert len(WORLD.skills) == 11
    assert not asked & {turns[0]["content"] for turns in islice(WORLD.dialogues(), MANY)}
    known = set(words.vocabulary())
    documents = [*islice(base_documents(WORLD), MANY), *islice(sft_documents(WORLD), MANY)]
    assert {word for document in documents for word in document.split()} <= known
    assert max(len(document.split()) for document in documents) <= 32


def test_one_reference_for_all_rewards_of_the_mid_world() -> None:
    recipes = [mid_recipe(0), mid_recipe(0, "short"), mid_recipe(0, on_policy=True)]
    assert len({recipe.reference_key for recipe in recipes}) == 1
    assert len({recipe.world.fingerprint for recipe in recipes}) == 3
    assert World(scale="mid", preference="known").styles is chat.STYLES_WITH_POLITE


def test_the_mid_model_is_untied_of_five_million_and_trains() -> None:
    recipe = mid_recipe(0)
    model = build_model(recipe.shape, 0)
    assert 4.5e6 < sum(p.numel() for p in model.parameters()) < 5.5e6
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    before = model.lm_head.weight.detach().clone()
    phase = replace(recipe.base, steps=1, rows=2, warmup=0)
    loss = train_phase(model, whole_rows(base_documents(recipe.world), 2), phase)
    assert 3 < loss < 8  # log of the vocabulary is 5.5
    assert not torch.equal(model.lm_head.weight, before)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"


def test_the_tiny_world_is_as_it_was_before_there_were_scales() -> None:
    assert World(seed=0).fingerprint == "209a593c1bf8887e"
    assert World(seed=3, preference="short").fingerprint == "44e481b58c412408"
    assert "bf16" not in options_of(Recipe().base)
    assert options_of(mid_recipe(0).base)["bf16"]
    with pytest.raises(ArgumentError, match="scale='huge'"):
        World(scale="huge")
