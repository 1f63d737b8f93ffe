"""Second objectives for the tiny world's alignment: real replay of SFT's dialogues, and self-rehearsal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any

from paretune.demo import words
from paretune.demo.packed import Packed
from paretune.demo.world import World, prompt_document

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import LlamaForCausalLM

PROMPTS = 2000
ROWS = 32  # in a batch of training
BATCH = 512  # in one of sampling: the draws do not depend on it
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

        from paretune.training.distill import full_kl
        from paretune.training.logps import _head_at

        rows = Random(f"{self.seed}/rows {step}").sample(range(len(self.ids)), min(ROWS, len(self.ids)))
        lengths = self.completion.shape[1] - self.completion.flip(1).int().argmax(1)
        packed = Packed.of(rows, (lengths[rows] - 1).tolist())
        predicted = packed.take(self.completion[:, 1:])
        row, place = predicted.nonzero(as_tuple=True)
        # Rows side by side: a third of a padded batch is padding.
        with _head_at(model, row, place, predicted.shape[1]):
            logits = model(
                input_ids=packed.take(self.ids), position_ids=packed.positions, attention_mask=packed.mask,
                use_cache=False,
            ).logits  # fmt: skip
        logps = logits.log_softmax(-1)
        if self.reference is None:
            return F.nll_loss(logps, packed.take(self.ids[:, 1:])[predicted])
        counts = self.completion[:, 1:].sum(1)
        first = counts.cumsum(0) - counts
        kept = torch.cat([torch.arange(int(first[row]), int(first[row] + counts[row])) for row in packed.order])
        return full_kl(self.reference[kept], logps, "forward").mean()


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
    prompts = own_prompts(reference, world, source, seed)
    return distilled(reference, own_answers(reference, prompts, seed, **options), seed)


def own_prompts(reference: LlamaForCausalLM, world: World, source: str, seed: int) -> Sequence[str]:
    """Prompts that the reference makes, none like the preferences'."""
    from paretune.training.rehearsal import NEEDS_SEEDS, self_prompts

    return self_prompts(
        reference, words.build_tokenizer(), source, PROMPTS,  # type: ignore[arg-type]
        seeds=seed_prompts(world) if source in NEEDS_SEEDS else (),
        preferences=sorted({pair.prompt for pair in world.preferences}),
        max_tokens=24, seed=seed, batch_size=BATCH, progress=False,
    ).prompts  # fmt: skip


def own_answers(
    reference: LlamaForCausalLM, prompts: Sequence[str], seed: int, **options: Any
) -> list[tuple[str, str]]:
    """(prompt, answer) pairs by the reference."""
    from paretune.training.rehearsal import self_answers

    settings = {"max_new_tokens": 24, "seed": seed, "batch_size": BATCH, "progress": False} | options
    rows = self_answers(reference, words.build_tokenizer(), prompts, **settings)
    return [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]


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
    counts = completion[:, 1:].sum(1)
    first = counts.cumsum(0) - counts
    lengths = completion.shape[1] - completion.flip(1).int().argmax(1)
    found = torch.empty(int(counts.sum()), len(words.vocabulary()))
    with torch.no_grad():
        # Rows of a length together: otherwise half of the work is padding.
        for rows in lengths.argsort().split(256):
            width = int(lengths[rows].max())
            logps = completion_logps(reference, ids[rows, :width], completion[rows, :width])
            places = [torch.arange(int(first[row]), int(first[row] + counts[row])) for row in rows]
            found[torch.cat(places)] = logps
    return Replay(ids, completion, found, seed)
