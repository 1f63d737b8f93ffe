"""Samples to learn ratios from: rows of text to tokens, and their negative log-likelihood under a model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DataError

Row = Mapping[str, Any]
Rows = str | os.PathLike[str] | Sequence[Row]


@dataclass(frozen=True)
class Sample:
    """Tokens, of which those from ``start`` on are the completion."""

    ids: tuple[int, ...]
    start: int

    @property
    def learned(self) -> int:
        """How many tokens have a loss: the first token of a text has none."""
        return len(self.ids) - max(1, self.start)


def read_rows(data: Rows) -> Sequence[Row]:
    """Rows of a JSON-lines file, or the rows themselves.

    Raises:
        DataError: the file cannot be read, or there is nothing in it.
    """
    if isinstance(data, str | os.PathLike):
        path = Path(data).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data={str(data)!r}: cannot be read ({error}): name a file of JSON lines") from None
        rows = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise DataError(f"data={str(data)!r}: line {number} is not JSON ({error}): mend it") from None
        data = rows
    if isinstance(data, Mapping) or not hasattr(data, "__getitem__"):
        raise DataError(f"data={type(data).__name__}: give a file of JSON lines, a list of rows, or one split")
    if not len(data):
        raise DataError("data: holds no rows: collect samples first")
    return data


def encode(rows: Sequence[Row], tokenizer: Any, max_length: int = 1024) -> list[Sample]:
    """Tokens of every row.

    Args:
        rows: ``{"prompt", "completion"}`` or ``{"messages"}`` (the last message is the completion), each as text or
            as chat messages; ``{"text"}``; or ``{"input_ids"}``, with a ``completion_mask`` or without. A completion
            whose row says ``"finished": false`` gets no end-of-text token.
        tokenizer: as transformers makes it; not used for rows of tokens.
        max_length: longer rows are cut at the end.

    Raises:
        DataError: a row has none of these forms, or no token of its completion is left.
    """
    found = []
    for number, row in enumerate(rows):
        ids, start = _tokens(row, tokenizer, number)
        sample = Sample(tuple(ids[:max_length]), start)
        if sample.learned < 1:
            raise DataError(
                f"data: row {number} has no completion within max_length={max_length} tokens: raise it or drop the row"
            )
        found.append(sample)
    return found


def _tokens(row: Row, tokenizer: Any, number: int) -> tuple[list[int], int]:
    if "input_ids" in row:
        mask = row.get("completion_mask")
        return list(row["input_ids"]), 0 if mask is None else list(mask).index(1) if 1 in mask else len(mask)
    if tokenizer is None:
        raise DataError("data: rows of text need a tokenizer: pass one, or save it with post")
    prompt, completion = row.get("prompt"), row.get("completion")
    if "messages" in row:
        prompt, completion = row["messages"][:-1], row["messages"][-1:]
    elif "text" in row:
        prompt, completion = "", row["text"]
    if prompt is None or completion is None:
        columns = ", ".join(sorted(map(str, row)))
        raise DataError(
            f"data: row {number} has the columns {columns}: prompt and completion are needed, or messages, or text"
        )
    if isinstance(prompt, str):
        text = completion if isinstance(completion, str) else completion[0]["content"]
        opening = tokenizer(prompt)["input_ids"] if prompt else []
        whole = tokenizer(prompt + text)["input_ids"]
        end = tokenizer.eos_token_id
        if end is not None and row.get("finished", True) and whole[-1:] != [end]:
            whole = [*whole, end]
    else:
        said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        opening = _templated(tokenizer, prompt, ask=True)
        whole = _templated(tokenizer, [*prompt, *said], ask=False)
        if not row.get("finished", True):
            empty = _templated(tokenizer, [*prompt, {"role": "assistant", "content": ""}], ask=False)
            closing = empty[_agreed(opening, empty) :]  # what the template puts after an answer
            if closing and whole[-len(closing) :] == closing:
                whole = whole[: -len(closing)]
    # Where the tokenizer joins the prompt's end with the completion, the joint token is learned.
    return list(whole), _agreed(opening, whole)


def _agreed(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _templated(tokenizer: Any, messages: Sequence[Any], *, ask: bool) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=ask, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def batches(samples: Sequence[Sample], size: int, seed: int) -> Iterator[list[Sample]]:
    """Endless batches: every sample once an epoch, in an order of the seed's."""
    rng = Random(f"{seed}/samples")
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += rng.sample(range(len(samples)), len(samples))
        yield [samples[i] for i in waiting[:size]]
        del waiting[:size]


def collate(samples: Sequence[Sample], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A batch padded on the right: ``input_ids``, ``attention_mask``; ``learned`` is true where a token has a loss."""
    width = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    mask, learned = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        ids[row, :length] = torch.tensor(sample.ids)
        mask[row, :length] = 1
        learned[row, max(1, sample.start) : length] = True
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "learned": learned.to(device)}


def nll(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Summed negative log-likelihood, in nats, of the learned tokens of a batch.

    Args:
        model: a causal language model as transformers makes it.
        batch: of `collate`.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    following = batch["input_ids"].masked_fill(~batch["learned"], -100).roll(-1, 1)  # the first token is never learned
    # Labels are shifted, not logits: these are by far the largest tensor of the pass, and would be copied.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), following.flatten(), ignore_index=-100, reduction="sum")


def mean_nll(model: nn.Module, samples: Sequence[Sample], size: int = 8) -> float:
    """Mean negative log-likelihood, in nats, of a learned token.

    Args:
        model: a causal language model as transformers makes it.
        samples: at least one.
        size: samples at once.
    """
    device = next(model.parameters()).device
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(samples), size):
            total += float(nll(model, collate(samples[start : start + size], device)))
    return total / sum(sample.learned for sample in samples)
