"""Self-rehearsal: prompts that a model makes itself, and its own answers to them, in place of the data of its SFT.

Trained on beside the preferences (`paretune.Distill`), they hold the policy to what the reference does. Prompts like
the preferences' must stay out: answers to them in the old style would be rehearsed as well (see `Leakage`).
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch

from paretune.atomic import sync
from paretune.errors import ArgumentError, DataError
from paretune.generation import Decoding, generate
from paretune.generation.fingerprint import model_fingerprint
from paretune.generation.template import Template, beginning

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Source: TypeAlias = Literal["user-mark", "prompt-model", "mutate", "raw-fragments"]
NEEDS_SEEDS = ("prompt-model", "mutate")
_ROUNDS = 8  # how often a source is asked again where prompts were invalid or double


@dataclass(frozen=True)
class SelfPrompts:
    """Prompts with what was seen while they were made.

    Args:
        prompts: distinct and valid.
        source: where they are from.
        sampled: how many were made in all.
        valid: the share of those that was usable.
        distinct: the share of the usable ones that was new.
        diversity: distinct pairs of neighbouring words over all such pairs of the prompts.
        left_out: how many were dropped because they are like the preference prompts.
    """

    prompts: tuple[str, ...]
    source: str
    sampled: int
    valid: float
    distinct: float
    diversity: float
    left_out: int = 0

    def __str__(self) -> str:
        return (
            f"{len(self.prompts)} prompts from {self.source}: {self.valid:.0%} of {self.sampled} valid, "
            f"{self.distinct:.0%} of these new, {self.left_out} like the preferences left out, "
            f"diversity {self.diversity:.2f}"
        )


class Leakage:
    """Recognises prompts like those of the preferences, by the words that they share.

    A prompt is alike where at least ``share`` of its pairs of neighbouring words (of its words, where it is one word)
    occur in one preference prompt.

    Args:
        prompts: of the preferences.
        share: in (0, 1].

    Example:
        >>> leakage = Leakage(["tell me about mira ."])
        >>> leakage("tell me about oskar ."), leakage("what is 2 plus 2 ?")
        (True, False)
    """

    def __init__(self, prompts: Sequence[str], share: float = 0.5) -> None:
        if not 0 < share <= 1:
            raise ArgumentError("share", share, "must be in (0, 1]: how much of a prompt must be like a preference's")
        self.share = share
        self._known = [grams for grams in {_pairs(prompt) for prompt in prompts} if grams]
        self._where: dict[Any, list[int]] = {}
        for number, grams in enumerate(self._known):
            for gram in grams:
                self._where.setdefault(gram, []).append(number)

    def __call__(self, prompt: str) -> bool:
        grams = _pairs(prompt)
        shared: dict[int, int] = {}
        for gram in grams:
            for number in self._where.get(gram, ()):
                shared[number] = shared.get(number, 0) + 1
        return bool(grams) and max(shared.values(), default=0) >= self.share * len(grams)


def self_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: Source = "raw-fragments",
    count: int = 2000,
    *,
    seeds: Sequence[str] = (),
    preferences: Sequence[str] = (),
    max_tokens: int = 64,
    steps: int = 60,
    learning_rate: float = 1e-4,
    seed: int = 0,
    batch_size: int = 128,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SelfPrompts:
    """Prompts that the model makes itself, sampled at temperature 1.

    Args:
        model: the reference; unchanged afterwards.
        tokenizer: with a chat template.
        source: ``"user-mark"`` samples what follows the chat template's bare user mark (a model whose SFT masked the
            prompts makes none); ``"prompt-model"`` does so with a copy tuned on ``seeds``; ``"mutate"`` exchanges words
            of the seeds for neighbours in the input embeddings; ``"raw-fragments"`` cuts the model's own plain text.
        count: how many; fewer are returned where the source dries up.
        seeds: a few dozen prompts, for ``"prompt-model"`` and ``"mutate"``.
        preferences: the preferences' prompts: prompts like them are left out.
        max_tokens: the longest prompt.
        steps, learning_rate: of the prompt model's tuning.
        seed: of everything random.
        batch_size: of the sampling; does not change the prompts.
        out: how files begin that keep what is sampled, and the prompt model: the same call goes on where it was
            interrupted.
        progress: show a bar where stderr is a terminal.

    Returns:
        The prompts, with validity, distinctness and diversity.

    Raises:
        ArgumentError: a source that is not known, or without the seeds that it needs.
        DataError: the source made no valid prompt at all.
    """
    if source not in get_args(Source):
        raise ArgumentError("source", source, f"choose one of {', '.join(get_args(Source))}")
    if count < 1:
        raise ArgumentError("count", count, "give a number of prompts of at least 1")
    if source in NEEDS_SEEDS and not seeds:
        raise ArgumentError("seeds", list(seeds), f"{source} starts from a few dozen prompts: give them")
    template = Template.of(tokenizer)
    marks = (str(tokenizer.decode(list(template.before))).strip(), *template.stops)
    gathered = _Gathered(source, count, Leakage(preferences) if preferences else None, marks)
    if source == "mutate":
        rng = random.Random(f"{seed}/mutate")
        near = _neighbours(model, tokenizer, seeds)
        for _ in range(_ROUNDS * count):
            gathered.add(_mutated(rng.choice(list(seeds)), near, rng, tokenizer))
            if gathered.full:
                break
        return gathered.result()
    maker: Any = model
    if source == "prompt-model":
        maker = _prompt_model(model, tokenizer, template, seeds, steps, learning_rate, seed, out)
    start = [beginning(tokenizer)] if source == "raw-fragments" else template.before
    rng = random.Random(f"{seed}/fragments")
    stop = () if source == "raw-fragments" else template.stops
    for turn in range(_ROUNDS):
        wanted = count - len(gathered.prompts)
        wanted += wanted // 4 + 8
        decoding = Decoding(max_tokens, temperature=1.0, seed=_mixed(seed, turn), batch_size=batch_size, stop=stop)
        file = None if out is None else f"{out}.{source}-{turn}"
        made = generate(maker, [list(start)] * wanted, decoding, tokenizer, file, progress=progress)
        for each in made:
            if source == "raw-fragments":
                gathered.add(_fragment(each.text, rng))
            else:
                gathered.add(each.text.strip() if each.finished else None)
            if gathered.full:
                break
        if gathered.full or not gathered.prompts:
            break
    return gathered.result()


def self_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_size: int = 128,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """The reference's answers, as rows that `paretune.SFT` and `paretune.Distill` take: ``{"messages": […]}``.

    Args:
        model: the reference.
        tokenizer: with a chat template.
        prompts: what the user says.
        temperature: 0 for greedy answers.
        max_new_tokens: the longest answer; answers that did not end by then are left out.
        seed: of the sampling.
        batch_size: answers at once.
        out: a file that keeps the answers: the same call goes on where it was interrupted.
        progress: show a bar where stderr is a terminal.

    Raises:
        DataError: no answer ended within ``max_new_tokens``.
    """
    decoding = Decoding(max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size)
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    found = [
        {"messages": [*asked[each.index], {"role": "assistant", "content": each.text.strip()}]}
        for each in generate(model, asked, decoding, tokenizer, out, progress=progress)
        if each.finished and each.text.strip()
    ]
    if not found:
        raise DataError(f"no answer ended within {max_new_tokens} tokens: raise max_new_tokens, or check the model")
    return found


class _Gathered:
    """Collects valid, new prompts and counts the others."""

    def __init__(self, source: str, count: int, leakage: Leakage | None, marks: Sequence[str]) -> None:
        self.source, self.count, self.leakage = source, count, leakage
        self.marks = [mark for mark in marks if mark]  # of turns: no prompt has one inside
        self.prompts: dict[str, None] = {}
        self.sampled = self.valid = self.left_out = self.new = 0

    @property
    def full(self) -> bool:
        return len(self.prompts) >= self.count

    def add(self, prompt: str | None) -> None:
        self.sampled += 1
        prompt = None if prompt is None else " ".join(prompt.split())
        if not prompt or any(mark in prompt for mark in self.marks):
            return
        self.valid += 1
        if prompt in self.prompts:
            return
        self.new += 1
        if self.leakage is not None and self.leakage(prompt):
            self.left_out += 1
            return
        self.prompts[prompt] = None

    def result(self) -> SelfPrompts:
        if not self.prompts:
            why = {
                "user-mark": "the model was tuned with masked prompts and cannot make any: use prompt-model or mutate",
                "raw-fragments": "the model's plain text gave no fragment: use prompt-model or mutate",
            }.get(self.source, "give other seeds")
            if self.left_out:
                why = "all were like the preference prompts: use another source"
            raise DataError(f"{self.source}: none of {self.sampled} prompts can be used: {why}")
        grams = [gram for prompt in self.prompts for gram in _pairs_in_order(prompt)]
        return SelfPrompts(
            tuple(self.prompts),
            self.source,
            self.sampled,
            self.valid / self.sampled,
            self.new / max(1, self.valid),
            len(set(grams)) / max(1, len(grams)),
            self.left_out,
        )


def _pairs_in_order(prompt: str) -> list[Any]:
    words = prompt.split()
    return list(pairwise(words)) if len(words) > 1 else list(words)


def _pairs(prompt: str) -> frozenset[Any]:
    return frozenset(_pairs_in_order(prompt))


def _mixed(seed: int, turn: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {turn}".encode()).digest()[:4], "little")


def _fragment(text: str, rng: random.Random) -> str | None:
    """A run of the text's words: from its beginning or anywhere, of any length from two words on."""
    words = text.split()
    if len(words) < 2:
        return None
    start = 0 if rng.random() < 0.5 else rng.randrange(len(words) - 1)
    return " ".join(words[start : rng.randint(start + 2, len(words))])


def _neighbours(model: Any, tokenizer: Any, seeds: Sequence[str], near: int = 8) -> dict[int, list[int]]:
    """For each token of the seeds those nearest to it by cosine in the input embeddings; special ones apart."""
    table = model.get_input_embeddings().weight.detach().float()
    table = torch.nn.functional.normalize(table, dim=-1)
    table[list(set(tokenizer.all_special_ids))] = 0
    tokens = sorted({token for seed in seeds for token in tokenizer(seed, add_special_tokens=False).input_ids})
    found: dict[int, list[int]] = {}
    for token in tokens:
        likeness = table @ table[token]
        likeness[token] = -1
        found[token] = likeness.topk(min(near, len(likeness) - 1)).indices.tolist()
    return found


def _mutated(seed: str, near: Mapping[int, Sequence[int]], rng: random.Random, tokenizer: Any) -> str:
    """The seed with about half of its tokens exchanged, at least one."""
    tokens = tokenizer(seed, add_special_tokens=False).input_ids
    chosen = {rng.randrange(len(tokens))} | {i for i in range(len(tokens)) if rng.random() < 0.4}
    return str(tokenizer.decode([rng.choice(near[t]) if i in chosen else t for i, t in enumerate(tokens)]))


def _prompt_model(
    model: Any,
    tokenizer: Any,
    template: Template,
    seeds: Sequence[str],
    steps: int,
    lr: float,
    seed: int,
    out: str | os.PathLike[str] | None,
) -> Any:
    """A copy of the model tuned to write prompts after the user mark; kept beside ``out``."""
    from safetensors.torch import load_model, save_model

    tuned = copy.deepcopy(model).train()
    kept = None
    if out is not None:
        # Tuned again on an accelerator it would be another model, whose prompts do not go with those of before.
        recipe = f"{model_fingerprint(model)} {list(seeds)} {steps} {lr} {seed}"
        kept = Path(f"{out}.model-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.safetensors")
        if kept.exists():
            load_model(tuned, kept)
            return tuned.eval()
    rows = [list(template.before) + tokenizer(text, add_special_tokens=False).input_ids + list(template.after)
            for text in seeds]  # fmt: skip
    rng = random.Random(f"{seed}/prompt model")
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr, weight_decay=0.0)
    device, start = next(tuned.parameters()).device, len(template.before)
    for _ in range(steps):
        chosen = rng.sample(rows, min(8, len(rows)))
        width = max(map(len, chosen))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in chosen], device=device)
        labels = ids.clone()
        labels[:, :start] = -100
        for place, row in enumerate(chosen):  # the turn's end is learnt too, its first token
            labels[place, len(row) - len(template.after) + 1 :] = -100
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in chosen], device=device)
        logits = tuned(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(".tmp")
        save_model(tuned, str(temporary))
        sync(temporary)
        temporary.replace(kept)
    return tuned.eval()
