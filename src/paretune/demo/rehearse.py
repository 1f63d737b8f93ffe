"""Second objectives for the tiny world's alignment: real replay of SFT's dialogues, and self-rehearsal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any

from paretune.demo import words
from paretune.demo.world import World, prompt_document

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import LlamaForCausalLM

PROMPTS = 2000
ROWS = 32  # in a batch
SHARE = 0.5  # of all steps


@dataclass(frozen=True)
class Replay:
    """Answers that are trained on at a share of the steps.

    Args:
        ids: [rows, length], padded on the right.
        completion: [rows, length] bool: what counts.
        reference: [tokens, vocabulary] log-probabilities that are distilled by forward KL, row by row; None trains on
            the answers themselves.
        seed: of the steps and the rows.
    """

    ids: Tensor
    completion: Tensor
    reference: Tensor | None = None
    seed: int = 0
    share: float = SHARE

    def takes(self, step: int) -> bool:
        return Random(f"{self.seed}/beside {step}").random() < self.share

    def loss(self, model: nn.Module, step: int) -> Tensor:
        import torch
        from torch.nn import functional as F

        from paretune.training.distill import completion_logps, full_kl

        rows = Random(f"{self.seed}/rows {step}").sample(range(len(self.ids)), min(ROWS, len(self.ids)))
        completion = self.completion[rows]
        width = int(completion.any(0).nonzero().max()) + 1
        ids, completion = self.ids[rows, :width], completion[:, :width]
        logps = completion_logps(model, ids, completion)
        if self.reference is None:
            return F.nll_loss(logps, ids[:, 1:][completion[:, 1:]])
        counts = self.completion[:, 1:].sum(1)
        first = counts.cumsum(0) - counts
        place = torch.cat([torch.arange(int(first[row]), int(first[row] + counts[row])) for row in rows])
        return full_kl(self.reference[place], logps, "forward").mean()


def encode(dialogues: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """(prompt, answer) pairs as ids and completion marks, padded on the right."""
    import torch

    index = {word: i for i, word in enumerate(words.vocabulary())}
    unknown = index[words.UNKNOWN]
    rows, starts = [], []
    for prompt, answer in dialogues:
        before = [index.get(word, unknown) for word in prompt_document(prompt).split()]
        rows.append(before + [index.get(word, unknown) for word in (*answer.split(), words.END)])
        starts.append(len(before))
    width = max(map(len, rows))
    ids = torch.tensor([row + [index[words.PAD]] * (width - len(row)) for row in rows])
    place, lengths = torch.arange(width), torch.tensor([len(row) for row in rows])
    return ids, (place >= torch.tensor(starts)[:, None]) & (place < lengths[:, None])


def real_replay(world: World, seed: int) -> Replay:
    """Dialogues as SFT had them."""
    drawn = islice(world.dialogues("replay"), PROMPTS)
    ids, completion = encode([(turns[0]["content"], turns[1]["content"]) for turns in drawn])
    return Replay(ids, completion, seed=seed)


def self_rehearsal(reference: LlamaForCausalLM, world: World, source: str, seed: int, **options: Any) -> Replay:
    """The reference's own answers to prompts that it makes itself, distilled by forward KL.

    Args:
        reference: the model before alignment.
        world: gives thirty seed prompts, and the preference prompts that are left out.
        source: as in `paretune.self_prompts`.
        seed: of the sampling.
        options: of `paretune.self_answers`, a temperature for instance.
    """
    from paretune.training.rehearsal import NEEDS_SEEDS, self_answers, self_prompts

    tokenizer = words.build_tokenizer()
    made = self_prompts(
        reference, tokenizer, source, PROMPTS,  # type: ignore[arg-type]
        seeds=seed_prompts(world) if source in NEEDS_SEEDS else (),
        preferences=sorted({pair.prompt for pair in world.preferences}),
        max_tokens=24, seed=seed, batch_size=256, progress=False,
    )  # fmt: skip
    settings = {"max_new_tokens": 24, "seed": seed, "batch_size": 256, "progress": False} | options
    rows = self_answers(reference, tokenizer, made.prompts, **settings)
    return distilled(reference, [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows], seed)


def seed_prompts(world: World, count: int = 30) -> list[str]:
    """A few prompts that somebody might write down: exercises that SFT had, no chat."""
    drawn = (turns[0]["content"] for turns in world.dialogues("seed prompts"))
    chat = {prompt for _, prompt in world.chat_prompts(1000)} | {pair.prompt for pair in world.preferences}
    return list(islice((prompt for prompt in drawn if prompt not in chat), count))


def distilled(reference: LlamaForCausalLM, dialogues: Sequence[tuple[str, str]], seed: int) -> Replay:
    """Dialogues with the reference's distributions over their answers."""
    import torch

    from paretune.training.distill import completion_logps

    ids, completion = encode(dialogues)
    with torch.no_grad():
        parts = [completion_logps(reference, i, c) for i, c in zip(ids.split(256), completion.split(256), strict=True)]
    return Replay(ids, completion, torch.cat(parts), seed)
