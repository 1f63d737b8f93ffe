"""How far one model's answers are from another model's: the exact KL divergence along them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .decoding import Generation


def answer_tokens(
    answers: Sequence[Generation], prompts: Sequence[list[int]], tokenizer: Any
) -> list[tuple[list[int], int]]:
    """(token ids of prompt and answer, length of the prompt) of each answer; the end token is part of a finished one.

    Args:
        answers: what was written.
        prompts: token ids of each prompt, by the answers' ``index``.
        tokenizer: of the model that wrote them.
    """
    end = tokenizer.eos_token_id
    rows = []
    for answer in answers:
        prompt, ids = prompts[answer.index], tokenizer(answer.text, add_special_tokens=False).input_ids
        rows.append(([*prompt, *ids, *([end] if answer.finished and end is not None else [])], len(prompt)))
    return rows


def divergence(
    policy: Any,
    reference: Callable[[], AbstractContextManager[Any]],
    rows: Sequence[tuple[list[int], int]],
    batch_size: int = 8,
) -> list[float]:
    """KL(policy ‖ reference) of each answer, in nats, exact over the vocabulary.

        KL(x, y) = Σ_t Σ_v π(v | x, y_<t) log (π(v | x, y_<t) / π_ref(v | x, y_<t))

    Its mean over y sampled from π at temperature 1 estimates the KL between the answers' distributions.

    Args:
        policy: a causal language model in evaluation mode.
        reference: opens the other one, in evaluation mode; after the policy's turn with each batch, so that a policy
            without its adapter may serve.
        rows: (token ids of prompt and answer, length of the prompt, ≥ 1); [answers].
        batch_size: answers at once; never changes a value beyond rounding.

    Raises:
        ValueError: the two models' vocabularies differ in size.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    found = [0.0] * len(rows)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(rows[i][0]) for i in batch)
        # Padding on the right is seen by no token of an answer.
        ids = torch.tensor([[*rows[i][0], *[0] * (width - len(rows[i][0]))] for i in batch])
        logits = _logits(policy, ids)
        with reference() as other:
            theirs = _logits(other, ids)
        if logits.shape != theirs.shape:
            raise ValueError(f"vocabularies of {logits.shape[-1]} and {theirs.shape[-1]} tokens")
        for row, place in enumerate(batch):
            span = slice(rows[place][1] - 1, len(rows[place][0]) - 1)
            found[place] = float(_kl(logits[row, span], theirs[row, span].to(logits.device)))
    return found


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits


def _kl(logits: Tensor, other: Tensor) -> Tensor:
    # One answer at a time: float32 copies of a whole batch of logits would be the largest tensors of all.
    log_p, log_q = logits.float().log_softmax(-1), other.float().log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum()  # a forbidden token is -inf on both sides
