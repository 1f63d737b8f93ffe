"""How much of everything, and the hyper-parameters of every method, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from prepare import Sizes


@dataclass(frozen=True)
class Setting:
    """One size of the experiment.

    Args:
        sizes: of data, tokenizer and base; ``dpo_steps`` of 8 pairs.
        sft_steps, sft_lr: 8 demonstrations a step.
        lr: of DPO, for all methods but AdamW's curve; β of DPO.
        factors: of ``lr``: AdamW's curve.
        prompts: that rehearsal makes; ``temperature`` of its answers.
        seeds: questions of SFT data that rehearsal may start from.
        questions: that are answered for the judge, half of demonstrations and half of pairs.
        max_tokens: the longest answer; a longer one has not ended.
        batch: answers at once.
        pairs, samples: of the Fisher gate.
    """

    sizes: Sizes
    sft_steps: int = 112
    sft_lr: float = 1e-3
    lr: float = 4e-4
    beta: float = 0.1
    factors: tuple[float, ...] = (1.0, 0.5, 0.25, 2.0)
    prompts: int = 400
    temperature: float = 0.0
    seeds: int = 30
    questions: int = 120
    max_tokens: int = 200
    batch: int = 120
    pairs: int = 120
    samples: int = 120


STANDARD = Setting(
    Sizes(
        vocabulary=2048, hidden=256, layers=6, pretrain=2150, sft=900, dpo_steps=48, held_answers=260, held_pairs=160,
        longest=700, longest_pair=500, epochs=6, blocks=8, bf16=True,
    )
)  # fmt: skip
QUICK = Setting(
    Sizes(
        vocabulary=320, hidden=32, layers=1, pretrain=20, sft=20, dpo_steps=2, held_answers=6, held_pairs=6,
        epochs=2, blocks=1,
    ),
    sft_steps=2, factors=(1.0,), prompts=40, seeds=5, questions=4, max_tokens=200, temperature=1.0, pairs=4, samples=4,
)  # fmt: skip
