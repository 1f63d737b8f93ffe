"""The streamed choice of the k largest is the operators' choice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.merging import selection
from paretune.merging.numbers import narrow, widen
from paretune.merging.selection import BLOCK, Scan, find_cut
from paretune.operators import largest


def choose(values: np.ndarray, k: int) -> np.ndarray:
    """Positions that the streamed form keeps."""
    bits = values.view(np.uint32).copy()
    cut = find_cut(Scan(values.size, lambda start, stop: bits[start:stop] & np.uint32(0x7FFFFFFF)), k)
    for start in range(0, values.size, BLOCK):
        part = bits[start : start + BLOCK]
        cut.drop(part, start, np.empty_like(part), np.empty_like(part))
    return np.flatnonzero(bits.view(np.float32))


def same(values: np.ndarray, k: int) -> None:
    wanted = largest(torch.from_numpy(values), k).numpy()
    assert np.array_equal(choose(values, k), wanted)


@settings(max_examples=200)
@given(st.data())
def test_small_tensors(data: st.DataObject) -> None:
    pool = [0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, 3e38, float("inf"), float("nan")]
    values = np.array(data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=60)), np.float32)
    same(values, data.draw(st.integers(1, values.size)))


@pytest.mark.parametrize("share", [1e-4, 0.05, 0.2, 0.7, 0.999])
@pytest.mark.parametrize("kind", ["smooth", "tied", "heavily tied", "zeros", "sorted", "constant"])
def test_large_tensors(share: float, kind: str) -> None:
    values = np.random.default_rng(0).standard_normal(3 * BLOCK + 1234).astype(np.float32)
    if kind == "tied":
        values = np.round(values, 2)
    elif kind == "heavily tied":
        values = np.round(values * 2)
    elif kind == "zeros":
        values[np.random.default_rng(1).random(values.size) < 0.9] = 0
    elif kind == "sorted":
        values.sort()
    elif kind == "constant":
        values[:] = -0.25
    same(values, max(1, int(share * values.size)))


def test_the_histogram_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many candidates, or a sample that misleads: still exact."""
    monkeypatch.setattr(selection, "ROOM", 10)
    values = np.random.default_rng(0).standard_normal(2 * BLOCK).astype(np.float32)
    same(values, 20_000)
    monkeypatch.setattr(selection, "_bracket", lambda magnitudes, k: (0, 0, 0))
    same(values, 20_000)


def floats(data: st.DataObject) -> np.ndarray:
    words = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
    return np.array(words, np.uint32).view(np.float32)


@settings(max_examples=200)
@given(st.data(), st.sampled_from(["BF16", "F16", "F32"]))
def test_conversions_are_torchs(data: st.DataObject, kind: str) -> None:
    """With torch and without it the same bits: rounding half to even, subnormal numbers, infinities."""
    import sys
    from unittest.mock import patch

    values = floats(data)
    values = values[~np.isnan(values)]
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[kind]
    word = np.uint32 if kind == "F32" else np.uint16
    wanted = torch.from_numpy(values).to(dtype).view(torch.int32 if kind == "F32" else torch.int16).numpy().view(word)
    back = torch.from_numpy(values).to(dtype).float().numpy()
    stored = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[kind]
    for modules in (sys.modules, {name: module for name, module in sys.modules.items() if name != "torch"}):
        with patch.object(sys, "modules", modules):
            out, scratch = np.empty(values.size, stored), np.empty(values.size, np.uint32)
            narrow(values, kind, out, scratch)
            assert np.array_equal(out.view(word), wanted)
            wide = np.empty(values.size, np.float32)
            widen(out, kind, wide)
            assert np.array_equal(wide.view(np.uint32), back.view(np.uint32))
