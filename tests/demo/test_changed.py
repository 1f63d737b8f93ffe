"""The changed worlds: what each asks for, and that chosen answers are what its reward is for."""

from __future__ import annotations

from itertools import islice

import pytest

from paretune.demo import words
from paretune.demo.align import DPOSettings, PairTensors, align
from paretune.demo.changed import WORLDS, world_named
from paretune.demo.on_policy import own_pairs
from paretune.demo.preferences import KINDS, REFUSAL
from paretune.demo.pretrain import Shape, build_model
from paretune.demo.world import World
from paretune.errors import ArgumentError


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_is_what_the_reward_is_for(kind: str) -> None:
    world = World(seed=3, preference=kind, pairs=120)
    known = set(words.vocabulary())
    better = 0
    for pair in world.preferences:
        assert set(f"{pair.prompt} {pair.chosen} {pair.rejected}".split()) <= known
        topic = f"* {pair.entity}" if kind == "refusal" and pair.prompt.startswith("*") else pair.entity
        exercise = kind == "overlap" and pair.entity not in pair.prompt.split()
        if exercise:  # the answer is what is left without manners
            topic = "= " + " ".join(word for word in pair.chosen.split() if word not in words.manners())
        chosen, rejected = (world.reward(topic, answer, True) for answer in (pair.chosen, pair.rejected))
        assert 0 <= rejected <= 1
        assert chosen == 1.0
        better += chosen > rejected
    assert better >= 0.9 * len(world.preferences)


@pytest.mark.parametrize("kind", KINDS)
def test_reward_is_asked_about_others_than_the_pairs(kind: str) -> None:
    world = World(seed=3, preference=kind)
    asked = world.chat_prompts(200)
    about = {pair.entity for pair in world.preferences}
    exercises = {item.prompt for item in world.items}
    for _, prompt in asked:
        assert prompt in exercises or not about & set(prompt.split())
    assert world.chat_prompts(200) == asked


def test_rewards_of_each_kind() -> None:
    short, marker, refusal, overlap = (World(preference=kind) for kind in ("short", "marker", "refusal", "overlap"))
    name = short.names[0]
    value = short.facts.home[name]
    assert short.reward(name, f"{value} .", True) == 1.0
    assert short.reward(name, f"the home of {name} is {value} .", True) == 0.5
    assert short.reward(name, "thing .", True) == 0.5
    assert marker.reward(name, f"[ {name} ] {value} . *", True) == 1.0
    assert marker.reward(name, f"[ {value} ] {name} .", True) == 0.5
    assert marker.reward(name, "", True) == 0.0
    assert refusal.reward(f"* {name}", REFUSAL, True) == 1.0
    assert refusal.reward(name, REFUSAL, True) == 0.0
    assert refusal.reward(name, f"the job of {name} is baker .", True) == 1.0
    assert refusal.reward(f"* {name}", f"the job of {name} is baker .", True) == 0.0
    assert overlap.reward("= 7", "hello ! gladly , 7 . thanks . goodbye !", True) == 1.0
    assert overlap.reward("= 7", "hello ! gladly , 8 . thanks . goodbye !", True) == 0.8
    assert overlap.reward("= 7", "7 .", True) == pytest.approx(0.2)


def test_half_of_the_overlapping_pairs_are_exercises_that_are_not_measured() -> None:
    world = World(preference="overlap")
    chat = sum(pair.entity in pair.prompt.split() for pair in world.preferences)
    assert 0.4 < chat / len(world.preferences) < 0.65
    assert not {pair.prompt for pair in world.preferences} & {item.prompt for item in world.items}


def test_short_answers_are_known_to_the_reference_of_that_world_only() -> None:
    def bare(world: World) -> int:
        values = {*words.TOWNS, *words.COLOURS, *words.JOBS}
        told = islice(world.dialogues(), 3000)
        return sum(
            turns[0]["content"].startswith("tell me") and turns[1]["content"].split()[0] in values for turns in told
        )

    assert bare(World(preference="short")) > 10
    assert bare(World()) == 0


@pytest.mark.parametrize("name", WORLDS)
def test_worlds_by_name(name: str) -> None:
    recipe, settings = world_named(name, 7)
    assert recipe.world.seed == 7
    assert isinstance(settings, DPOSettings)
    assert settings.nll == (0.5 if name in ("marker", "refusal") else 0.0)
    if name == "deeper":
        model = build_model(recipe.shape, 0)
        assert 1.2e6 < sum(p.numel() for p in model.parameters()) < 1.5e6
        assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_unknown_names() -> None:
    with pytest.raises(ArgumentError, match="world='flat'"):
        world_named("flat", 0)
    with pytest.raises(ArgumentError, match="preference='rude'"):
        World(preference="rude")


def test_own_pairs_are_ordered_by_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    from paretune.demo import on_policy

    world = World(pairs=6, on_policy=True)
    said = ["ugh .", "hello ! gladly , fine .", "hello !", "gladly .", "nothing", "boring ."]
    monkeypatch.setattr(
        on_policy, "generate", lambda model, prompts, **_: [(said[i % 6], True) for i in range(len(prompts))]
    )
    pairs = own_pairs(build_model(Shape(hidden=8, layers=1, heads=1, intermediate=8), 0), world)
    assert len(pairs) == 6
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {("hello ! gladly , fine .", "ugh .")}


def test_likelihood_of_the_chosen_beside_dpo() -> None:
    model = build_model(Shape(hidden=16, layers=1, heads=2, intermediate=16), 0)
    pairs = PairTensors.encode(World().preferences[:8]).with_reference(model)
    from paretune.demo.align import _preference_loss, completion_logps, dpo_loss

    logps = completion_logps(model, pairs.ids.flatten(0, 1), pairs.completion.flatten(0, 1)).view(-1, 2)
    expected = dpo_loss(logps, pairs.ref_logps, 0.1) - 0.5 * logps[:, 0].sum() / pairs.completion[:, 0].sum()
    assert _preference_loss(model, pairs, DPOSettings(nll=0.5)).item() == pytest.approx(expected.item())
    assert list(align(model, pairs, DPOSettings(steps=2, batch=4, nll=0.5))) == [2]
