"""The trap of self-rehearsal on the tiny world: greedy answers to chat prompts anchor the old style."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paretune.demo import words
from paretune.demo.align import DPOSettings, PairTensors, align
from paretune.demo.measure import measure
from paretune.demo.pretrain import Phase, Recipe, default_cache, load_model, prepare
from paretune.demo.rehearse import distilled
from paretune.demo.world import World
from paretune.training.rehearsal import Leakage, self_answers


@pytest.mark.slow
def test_the_guard_keeps_chat_out() -> None:
    # Chat alone is learnt in a fraction of the base's time.
    recipe = Recipe(World(chat_share=0.8), base=Phase(steps=500, rows=12, lr=2e-3), sft=Phase(200, 20, 1e-3))
    world = recipe.world
    _, path = prepare(recipe, default_cache())
    reference = load_model(path)
    preferences = sorted({pair.prompt for pair in world.preferences})
    exercises = [turns[0]["content"] for turns, _ in zip(world.dialogues("prompts"), range(600), strict=False)]
    prompts = list(dict.fromkeys([*preferences, *exercises]))
    leaks = Leakage(preferences)
    assert all(leaks(prompt) for prompt in preferences)
    rewards = {}
    for name, kept in (("leaking", prompts), ("guarded", [prompt for prompt in prompts if not leaks(prompt)])):
        rows = self_answers(reference, words.build_tokenizer(), kept, max_new_tokens=24, batch_size=256, progress=False)
        beside = distilled(reference, [(r["messages"][0]["content"], r["messages"][1]["content"]) for r in rows], 0)
        model = load_model(path)
        pairs = PairTensors.encode(world.preferences).with_reference(reference)
        for _ in align(model, pairs, replace(DPOSettings(), steps=160), beside=beside):
            pass
        found = measure(model, world)
        rewards[name] = sum(found.rewards) / len(found.rewards)
    assert rewards["guarded"] > rewards["leaking"] + 0.05
