"""What is asked of a generator and what it returns."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import ArgumentError

# Text that is continued as it stands, a conversation that the model answers, or token ids.
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]


@dataclass(frozen=True)
class Decoding:
    """How answers are written.

    Args:
        max_new_tokens: the longest answer, ≥ 1.
        temperature: 0 takes the likeliest token; t > 0 samples from softmax(logits / t).
        top_p: samples from the smallest set of tokens with this probability, in (0, 1].
        top_k: samples from the k likeliest tokens; 0 for all.
        samples: answers a prompt, ≥ 1.
        seed: of the sampling. The draws of one answer depend on it, on the prompt and on the sample's number alone.
        batch_size: answers written at once; moves memory and time, never the draws.
        stop: texts that end an answer and are not part of it; the model's end tokens always do.

    Raises:
        ArgumentError: a value is out of its range.

    Example:
        >>> Decoding(max_new_tokens=64, temperature=0.7, samples=4).greedy
        False
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    samples: int = 1
    seed: int = 0
    batch_size: int = 8
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("samples", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ArgumentError(name, value, f"give a whole number of at least {least}")
        if not 0 <= self.temperature < math.inf:
            raise ArgumentError("temperature", self.temperature, "give 0 for greedy decoding, or a positive number")
        if not 0 < self.top_p <= 1:
            raise ArgumentError("top_p", self.top_p, "give a probability in (0, 1]")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ArgumentError("stop", self.stop, "give a tuple of texts")
        object.__setattr__(self, "stop", tuple(self.stop))
        if self.greedy and self.samples > 1:
            raise ArgumentError("samples", self.samples, "greedy samples are equal: give a temperature or samples=1")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def record(self) -> dict[str, Any]:
        """What decides one answer, for files: neither the batch size nor the number of samples does."""
        record = asdict(self) | {"stop": list(self.stop)}
        del record["batch_size"], record["samples"]
        if self.greedy:
            for name in ("top_p", "top_k", "seed"):
                del record[name]
        return record

    def with_seed(self, seed: int) -> Decoding:
        """The same with another seed."""
        return replace(self, seed=seed)


@dataclass(frozen=True)
class Generation:
    """One answer.

    Args:
        index: the prompt's place in what was asked, from 0.
        sample: the sample's number, from 0.
        prompt: as it was given.
        text: the answer, without end tokens.
        finished: whether it ended by itself rather than at ``max_new_tokens``.
        tokens: its length in tokens, without the end; None where a server does not say.
    """

    index: int
    sample: int
    prompt: Prompt
    text: str
    finished: bool
    tokens: int | None


@dataclass(frozen=True)
class Request:
    """One answer that is wanted: its place, its key in files, and what seeds its draws."""

    index: int
    sample: int
    prompt: Prompt
    key: str
    draw: int  # 63 bits


def requests(prompts: Sequence[Prompt], contents: Sequence[Any], decoding: Decoding, model: str) -> list[Request]:
    """Every wanted answer, prompt by prompt.

    Args:
        prompts: as given.
        contents: what the model reads for each prompt, as JSON: token ids, text or messages.
        decoding: its ``samples`` and ``record`` are used.
        model: the fingerprint of what answers.

    A prompt that occurs twice gets other draws the second time. The draws do not depend on the model, so that models
    are compared on the same luck.

    Example:
        >>> asked = requests(["a", "a"], [[1], [1]], Decoding(8, temperature=1.0), "m")
        >>> asked[0].draw == asked[1].draw
        False
    """
    settings = json.dumps(decoding.record(), sort_keys=True)
    seen: dict[str, int] = {}
    wanted = []
    for index, (prompt, content) in enumerate(zip(prompts, contents, strict=True)):
        text = json.dumps(content, sort_keys=True)
        occurrence = seen[text] = seen.get(text, -1) + 1
        for sample in range(decoding.samples):
            place = f"{occurrence} {sample} {text}"
            draw = int.from_bytes(_digest(f"{decoding.seed} {place}")[:8], "little") >> 1
            key = _digest(f"{model} {settings} {place}").hex()[:32]
            wanted.append(Request(index, sample, prompt, key, draw))
    return wanted


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Refuse what is no prompt.

    Raises:
        ArgumentError: a prompt is empty or of another kind than text, messages or token ids.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise ArgumentError("prompts", prompts, "give a list of at least one prompt")
    for index, prompt in enumerate(prompts):
        kind = prompt_kind(prompt)
        if kind is None:
            raise ArgumentError(
                f"prompts[{index}]", prompt, "give text, a list of {'role': …, 'content': …}, or token ids"
            )


def prompt_kind(prompt: Prompt) -> str | None:
    """``text``, ``chat`` or ``ids``; None for anything else."""
    if isinstance(prompt, str):
        return "text" if prompt else None
    if not isinstance(prompt, Sequence) or not prompt:
        return None
    if all(isinstance(token, int) for token in prompt):
        return "ids"
    if all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in prompt):
        return "chat"
    return None


def instruction(prompt: Prompt) -> str:
    """What the user said last: the text itself, or the content of the last user turn.

    Example:
        >>> instruction([{"role": "user", "content": "Hello"}])
        'Hello'
    """
    if isinstance(prompt, str):
        return prompt
    turns = [turn["content"] for turn in prompt if isinstance(turn, Mapping) and turn["role"] == "user"]
    return turns[-1] if turns else ""


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
