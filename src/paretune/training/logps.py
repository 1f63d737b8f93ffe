"""Log-probabilities of completions, at the price of the tokens that count.

The output head is the dear part of a small batch with a large vocabulary, and prompts and padding need none of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def token_logps(model: nn.Module, ids: Tensor, completion: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability of every completion token.

    Args:
        model: a causal language model, perhaps wrapped by DDP, FSDP, PEFT or torch.compile.
        ids: [rows, length] int64, padded on the right: nothing attends to what follows it, so no mask is needed.
        completion: [rows, length] bool; its first column is never predicted.

    Returns:
        [tokens] in nats, float32 or the model's own if that is finer, row by row, and [tokens] int64: the row of each.
    """
    row, place = completion[:, 1:].nonzero(as_tuple=True)
    inputs, targets = ids[:, :-1], ids[row, place + 1]
    with _head_at(model, row, place, inputs.shape[1]) as selects:
        logits = model(input_ids=inputs, use_cache=False).logits
    if not selects:
        logits = logits[:, -inputs.shape[1] :][row, place]
    # float32: log-probabilities of 16-bit logits would be rounded to two digits.
    logits = logits.float() if logits.itemsize < 4 else logits
    return -F.cross_entropy(logits, targets, reduction="none"), row


def summed_logps(model: nn.Module, ids: Tensor, completion: Tensor) -> Tensor:
    """The log-probability of every row's completion.

    Args:
        model, ids, completion: as in :func:`token_logps`.

    Returns:
        [rows], in nats.
    """
    logps, row = token_logps(model, ids, completion)
    return logps.new_zeros(len(ids)).index_add(0, row, logps)


@contextmanager
def _head_at(model: nn.Module, row: Tensor, place: Tensor, length: int) -> Iterator[bool]:
    """Let the output head see the chosen positions only; yields whether it will.

    The hook is inside the model's own forward, so wrappers (DDP's gradient reduction among them) notice nothing.
    """
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    compiled = hasattr(model, "_orig_mod") or hasattr(inner, "_orig_mod")  # a new hook would compile it anew
    head = None if compiled or not hasattr(inner, "get_output_embeddings") else inner.get_output_embeddings()
    if head is None:
        yield False
        return

    def select(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]
        # Prompt-learning adapters put virtual tokens in front.
        return (hidden[:, -length:][row, place], *arguments[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield True
    finally:
        handle.remove()
