"""Sampling that does not depend on the batch: every answer has its own counter-based random numbers.

A token is drawn by Gumbel's trick: argmax(logits / t + g) with g = −log(−log u) has the law softmax(logits / t). u is a
hash of (the answer's 63-bit draw, its step, the token), so that the same answer comes out of any batch, after any
interruption, on any device; and models that are asked the same prompt share their luck, which makes paired
comparisons sharper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_PIECE = 1 << 14  # tokens


class Draws:
    """A logits processor: adds the noise of each row's current step.

    Args:
        draws: one 63-bit number a row.
        width: tokens before the first step (the padded prompt).
        temperature: divides the logits first.
        warpers: processors of transformers between the two (top-k, top-p).

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(20_000, 1)
        >>> drawn = Draws(range(20_000), width=0, temperature=1.0)(torch.empty(20_000, 0), logits).argmax(-1)
        >>> (drawn.bincount() / 20_000 - torch.tensor([0.0, 1.0, 2.0]).softmax(0)).abs().max() < 0.01
        tensor(True)
    """

    def __init__(self, draws: Sequence[int], width: int, temperature: float, warpers: Sequence[Any] = ()) -> None:
        self.draws = torch.tensor(list(draws), dtype=torch.int64)
        self.width = width
        self.temperature = temperature
        self.warpers = warpers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float() / self.temperature
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        return scores + gumbel(self.draws.to(scores.device), input_ids.shape[1] - self.width, scores.shape[1])


def gumbel(draws: Tensor, step: int, vocabulary: int) -> Tensor:
    """Standard Gumbel noise of shape (rows, vocabulary), float32.

    Args:
        draws: (rows,) int64; each row's numbers follow from its own alone.
        step: the token's place in the answer, from 0.
        vocabulary: number of tokens.
    """
    keys = mix64(draws + _signed(step * 0x9E3779B97F4A7C15, 64))[:, None]
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)
    noise = torch.empty(len(draws), vocabulary, device=draws.device)
    # On the CPU in pieces that stay in the cache; elsewhere few launches matter more.
    piece = _PIECE if draws.device.type == "cpu" else vocabulary
    for start in range(0, vocabulary, piece):
        stop = min(vocabulary, start + piece)
        bits = torch.arange(start, stop, dtype=torch.int32, device=draws.device) ^ low
        scratch = torch.empty_like(bits)
        bits = _mix32(_mix32(bits, scratch).bitwise_xor_(high), scratch)
        # The smallest exponentials win: u keeps its relative precision towards 0, down to 2e-10.
        u = bits.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_max_(1 - 2.0**-24)
        noise[:, start:stop] = u.neg_().log1p_().neg_().log_().neg_()
    return noise


def mix64(x: Tensor) -> Tensor:
    """A bijective mixer on int64, whose products wrap."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB, 64)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _mix32(x: Tensor, scratch: Tensor) -> Tensor:
    """A bijective mixer on int32, in place."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97), (15, None)):
        torch.bitwise_right_shift(x, shift, out=scratch)
        x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))
        if factor is not None:
            x.mul_(_signed(factor, 32))
    return x


def _signed(number: int, bits: int) -> int:
    return (number + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
