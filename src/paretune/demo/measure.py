"""Measures a tiny-world model: sampled reward on held-out entities, greedy skills on held-out exercises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paretune.demo import words
from paretune.demo.skills import solves
from paretune.demo.world import World, prompt_document

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

REWARD_SAMPLES = 200
NEW_TOKENS = 32


@dataclass(frozen=True)
class Measurement:
    """What one model did, item by item; intervals and taxes are computed from these.

    Args:
        rewards: reward of each sampled answer, in [0, 1].
        solved: whether each held-out exercise was solved, in the world's order.
    """

    rewards: list[float]
    solved: list[bool]


def generate(
    model: LlamaForCausalLM,
    prompts: Sequence[str],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    new_tokens: int = NEW_TOKENS,
) -> list[tuple[str, bool]]:
    """(answer, ended) for each prompt, all in one batch with a key-value cache.

    Args:
        model: a model over the world's vocabulary.
        prompts: what the user says; any number.
        temperature: 0 takes the likeliest word, 1 samples from the model.
        seed: of the sampling; a generator of its own, the global one is untouched.
        new_tokens: the longest answer.
    """
    import torch

    vocabulary = words.vocabulary()
    index = {word: i for i, word in enumerate(vocabulary)}
    pad, end = index[words.PAD], index[words.END]
    encoded = [[index.get(w, index[words.UNKNOWN]) for w in prompt_document(p).split()] for p in prompts]
    width = max(map(len, encoded))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    generator = torch.Generator().manual_seed(seed)
    rows = len(prompts)
    ended = torch.zeros(rows, dtype=torch.bool)
    written: list[torch.Tensor] = []
    cache = None
    with torch.inference_mode():
        for _ in range(new_tokens):
            out = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            logits = out.logits[:, -1]
            if temperature > 0:
                # Gumbel's trick: one uniform per word, so equal seeds give models the same luck.
                uniform = torch.rand(logits.shape, generator=generator).clamp_min(1e-12)
                logits = logits / temperature - (-uniform.log()).log()
            token = logits.argmax(-1).masked_fill(ended, pad)
            written.append(token)
            ended |= token == end
            if bool(ended.all()):
                break
            ids = token[:, None]
            mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
            positions = positions[:, -1:] + 1
    answers = []
    for row, done in zip(torch.stack(written, 1).tolist(), ended.tolist(), strict=True):
        said = [token for token in row if token != pad]
        if end in said:
            said = said[: said.index(end)]
        answers.append((" ".join(vocabulary[token] for token in said), done))
    return answers


def measure(model: LlamaForCausalLM, world: World, samples: int = REWARD_SAMPLES) -> Measurement:
    """Sampled reward and greedy skills of one model.

    Args:
        model: a model over the world's vocabulary, in evaluation mode.
        world: gives the prompts and the exercises.
        samples: number of sampled answers (temperature 1) over the held-out entities.

    Example:
        >>> from paretune.demo.pretrain import Shape, build_model
        >>> len(measure(build_model(Shape(), seed=0), World(items_per_skill=2), samples=4).rewards)
        4
    """
    was_training = model.training
    model.eval()
    asked = world.chat_prompts(samples)
    sampled = generate(model, [prompt for _, prompt in asked], temperature=1.0, seed=world.seed)
    rewards = [world.reward(topic, answer, ended) for (topic, _), (answer, ended) in zip(asked, sampled, strict=True)]
    answers = generate(model, [item.prompt for item in world.items])
    solved = [ended and solves(item.answer, answer) for item, (answer, ended) in zip(world.items, answers, strict=True)]
    model.train(was_training)
    return Measurement(rewards, solved)
