"""The random masks of `paretune.operators.masks`, bit for bit, in numpy and in place: without importing torch.

`paretune.operators.masks.bernoulli_mask` is the definition; a test holds this one to it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from .numbers import Bits

PAGE = 1 << 16  # masks of low density are drawn in pages of this many elements
_SPARSE_LIMIT = 1 / 16
_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_FACTORS = (0x21F0AAAD, 0xD35A2D97)
_COUNTER = np.arange(PAGE, dtype=np.uint32)


def mask_key(seed: int, model: int, name: str) -> int:
    """The key of one model's mask for one tensor; `paretune.operators.mask_key` at step 0.

    Args:
        seed: the merge's seed.
        model: which model, from 1.
        name: the tensor's name in the merged model.
    """
    text = f"{seed}\x1f0\x1fmodel {model}\x1f{name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Mask:
    """Which entries are kept: each independently with probability ``density``.

    Args:
        key: from `mask_key`.
        n: elements of the whole tensor.
        density: in (0, 1].
    """

    key: int
    n: int
    density: float

    @property
    def by_gaps(self) -> bool:
        """Whether it is drawn from kept entry to kept entry, which torch does."""
        return self.density <= _SPARSE_LIMIT

    @property
    def limit(self) -> int:
        """Kept are the elements whose hash, read as a signed word, is below this."""
        return round(self.density * 2**32) - 2**31

    def drop(self, bits: Bits, start: int, scratch: Bits, shift: Bits) -> None:
        """Zero the entries that are dropped, in place.

        Args:
            bits: the elements ``start …`` of the tensor, as 32-bit words.
            start: a multiple of `PAGE`.
            scratch: as many 32-bit words; overwritten.
            shift: as many, or a `PAGE` of them; overwritten.
        """
        if self.by_gaps:
            from ..operators.masks import sampled_indices

            index = sampled_indices(self.key, self.n, self.density, start, start + bits.size).numpy() - start
            kept = bits[index]
            bits[:] = 0
            bits[index] = kept
            return
        limit = self.limit
        if limit > 2**31 - 1:
            return
        for begin in range(0, bits.size, PAGE):
            part = bits[begin : begin + PAGE]
            word, other = scratch[: part.size], shift[: part.size]
            _hash(self.key, start + begin, word, other, whole=bool(limit & 0x1FFFF))
            if limit == 0:  # one half: the sign bit alone decides
                signed = word.view(np.int32)
                np.right_shift(signed, 31, out=signed)
                np.bitwise_and(part, word, out=part)
            else:
                np.copyto(other, word.view(np.int32) < np.int32(limit))
                np.multiply(part, other, out=part)


def _hash(key: int, start: int, x: Bits, shift: Bits, *, whole: bool) -> None:
    """32 random bits for the counters ``start …``, which lie in one page; the upper 15 of them where not ``whole``.

    The counters of a page share their upper halves, so the first steps of the mixer are done on one number for all.
    """
    upper = ((start ^ key) & _WORD) >> 16
    np.bitwise_xor(_COUNTER[: x.size], np.uint32((key & 0xFFFF) ^ upper), out=x)
    np.multiply(x, np.uint32(_FACTORS[0]), out=x)
    np.add(x, np.uint32((upper << 16) * _FACTORS[0] & _WORD), out=x)
    _shift_xor(x, 15, shift)
    np.multiply(x, np.uint32(_FACTORS[1]), out=x)
    _shift_xor(x, 15, shift)
    np.add(x, np.uint32(((start >> 32) * _GOLDEN + (key >> 32)) & _WORD), out=x)
    _shift_xor(x, 16, shift)
    np.multiply(x, np.uint32(_FACTORS[0]), out=x)
    _shift_xor(x, 15, shift)
    np.multiply(x, np.uint32(_FACTORS[1]), out=x)
    if whole:
        _shift_xor(x, 15, shift)


def _shift_xor(x: Bits, by: int, shift: Bits) -> None:
    np.right_shift(x, np.uint32(by), out=shift)
    np.bitwise_xor(x, shift, out=x)
