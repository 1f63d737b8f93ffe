"""On-policy preference pairs: the best and the worst of the reference's own answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paretune.demo.chat import Preference
from paretune.demo.measure import generate
from paretune.demo.world import World

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ANSWERS = 6


def own_pairs(model: LlamaForCausalLM, world: World, answers: int = ANSWERS) -> tuple[Preference, ...]:
    """As many pairs as the world's preferences has, on the same prompts: of several sampled answers the one of most and
    the one of least reward; prompts whose answers are all alike are asked again.

    Args:
        model: the reference.
        world: its preferences give the prompts, its reward the order.
        answers: sampled for each prompt.
    """
    asked = [(pair.entity, pair.prompt) for pair in world.preferences]
    found: list[Preference] = []
    for turn in range(20):
        prompts = [prompt for _, prompt in asked for _ in range(answers)]
        said = generate(model, prompts, temperature=1.0, seed=world.seed * 1000 + turn)
        for number, (topic, prompt) in enumerate(asked):
            own = said[number * answers : (number + 1) * answers]
            ranked = sorted(own, key=lambda each: world.reward(topic, *each))
            best, worst = ranked[-1], ranked[0]
            if best[1] and worst[1] and world.reward(topic, *best) > world.reward(topic, *worst):
                found.append(Preference(topic, prompt, best[0], worst[0]))
        if len(found) >= world.pairs:
            break
    return tuple(found[: world.pairs])
