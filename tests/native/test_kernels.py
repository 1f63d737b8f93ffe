"""The compiled kernels give the eager arithmetic's bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune import native
from paretune.errors import ArgumentError
from paretune.merging.arithmetic import LANES, Ready
from paretune.merging.eager import Eager
from paretune.merging.fused import Fused
from paretune.merging.kernels import Kernel
from paretune.merging.methods import METHODS
from paretune.merging.numbers import STORED, narrow, widen
from paretune.merging.plan import Part, Settings
from paretune.merging.selection import BLOCK, find_cut
from paretune.merging.views import Stored

built = pytest.mark.skipif(native._loaded() is None, reason="the kernels are not built: pip install with a C compiler")
KINDS = ("BF16", "F16", "F32")


class Held(Stored):
    """A tensor in memory, where a checkpoint's would be mapped; by default at an odd address."""

    def __init__(self, values: np.ndarray, kind: str, odd: bool = True) -> None:
        self.kind, self.shape, self._address = kind, values.shape, None
        stored = np.empty(values.size, STORED[kind])
        narrow(values.copy(), kind, stored, np.empty(values.size, np.uint32))
        raw = np.zeros(stored.nbytes + 1, np.uint8)
        raw[odd : stored.nbytes + odd] = stored.view(np.uint8)
        self._values = np.frombuffer(raw, STORED[kind], count=values.size, offset=int(odd))

    def release(self, start: int, stop: int) -> None:
        del start, stop


class Computed:
    """A tensor whose values are computed, as an adapter's are."""

    def __init__(self, values: np.ndarray, kind: str) -> None:
        self.kind, self.shape, self._values = kind, values.shape, values

    def fill(self, start: int, stop: int, out: np.ndarray) -> None:
        out[:] = self._values[start:stop]

    def release(self, start: int, stop: int) -> None:
        del start, stop


def values(n: int, seed: int, spread: float = 1.0) -> np.ndarray:
    """Weights with zeros of both signs, subnormal and large numbers among them."""
    rng = np.random.default_rng(seed)
    found = (rng.standard_normal(n) * spread).astype(np.float32)
    strange = np.array([0.0, -0.0, 1e-40, -3e-42, 6e-8, 3e-5, 300.0, -1.5], np.float32)
    place = rng.random(n) < 0.1
    found[place] = rng.choice(strange, int(place.sum()))
    return found


def part(n: int, kinds: tuple[str, ...], kind: str, based: bool, variants: tuple[Settings, ...], seed: int = 0) -> Part:
    base = values(n, seed)
    tuned = [np.where(np.arange(n) % 7 == 0, base, base + values(n, seed + 1 + i, 0.1)) for i in range(len(kinds) - 1)]
    views = [Held(each, k) for each, k in zip([base, *tuned], kinds, strict=True)]
    return Part("layer.weight", (n,), kind, tuple(views[1:]), views[0] if based else None, variants)


def merged(kernel: Kernel, each: Part) -> list[bytes]:
    out = [np.zeros(each.numel, STORED[each.kind]) for _ in each.variants]

    def emit(number: int, start: int, stored: np.ndarray) -> None:
        out[number][start : start + stored.size] = stored

    kernel.apply(each, kernel.prepare(each), 0, each.numel, emit)
    return [result.tobytes() for result in out]


def both(monkeypatch: pytest.MonkeyPatch, method: str, each: Part, **arguments: Any) -> None:
    found = {}
    for choice in ("eager", "native"):
        monkeypatch.setenv(native.VARIABLE, choice)
        found[choice] = merged(Kernel(METHODS[method], 3, **arguments), each)
    assert found["native"] == found["eager"]


def settings_of(method: str, count: int, weights: tuple[float, ...], density: float, **changes: Any) -> Settings:
    rule = METHODS[method]
    found = {
        "weights": weights[:count],
        "densities": (density if rule.sparsify else 1.0,) * count,
        "rescale": rule.defaults.get("rescale", "none"),
        "normalize": rule.normalize,
        "t": 0.3 if rule.sphere == "slerp" else None,
    }
    return Settings(**(found | changes))


@built
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"passthrough"}))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 63, 1000, 3 * BLOCK + 777])
def test_every_method(method: str, kind: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 2 if METHODS[method].sphere == "slerp" else 3
    variant = settings_of(method, count, (0.7, 0.2, 0.45), 0.3)
    based = METHODS[method].base != "no"
    both(monkeypatch, method, part(n, (kind,) * (count + 1), kind, based, (variant,)))


@built
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_merge(data: st.DataObject) -> None:
    """Mixed dtypes, odd sizes, sweeps, weights of any sign, every rescaling."""
    method = data.draw(st.sampled_from(["linear", "task_arithmetic", "dare_linear", "dare_ties", "ties", "nuslerp"]))
    rule = METHODS[method]
    count = data.draw(st.integers(2 if rule.sphere else 1, 4))
    weight = st.sampled_from([0.0, 1.0, 0.5, 0.3, 2.0] if rule.sphere else [0.0, 1.0, 0.5, 0.3, -0.5, -0.3])
    variants = []
    for _ in range(data.draw(st.integers(1, 3))):
        weights = tuple(data.draw(weight) for _ in range(count))
        variants.append(
            settings_of(
                method,
                count,
                (0.5, *weights[1:]) if rule.sphere else weights,
                data.draw(st.sampled_from([0.01, 0.0626, 0.25, 0.5, 0.9, 1.0])),
                rescale=data.draw(st.sampled_from(["none", "expectation", "l1"])) if rule.sparsify else "none",
                normalize=data.draw(st.booleans()),
                scale=data.draw(st.sampled_from([1.0, 0.7])),
            )
        )
    kinds = tuple(data.draw(st.sampled_from(KINDS)) for _ in range(count + 1))
    based = rule.base == "required" or (rule.base == "optional" and data.draw(st.booleans()))
    n = data.draw(st.one_of(st.integers(1, 2000), st.integers(BLOCK - 2, BLOCK + 600)))
    each = part(n, kinds, data.draw(st.sampled_from(KINDS)), based, tuple(variants), data.draw(st.integers(0, 99)))
    with pytest.MonkeyPatch.context() as patch:
        both(patch, method, each)


@built
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear"])
def test_not_finite(method: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passed on alike where that is allowed, refused alike where it is not."""
    from paretune.errors import CheckpointError

    n = 3000
    each = part(n, (kind,) * 3, kind, METHODS[method].base != "no", (settings_of(method, 2, (0.7, 0.2), 0.3),))
    stored = np.array(each.sources[1].values)  # type: ignore[attr-defined]
    wide = np.empty(n, np.float32)
    widen(stored, kind, wide)
    wide[[5, 700, 2999]] = np.inf, -np.inf, np.nan
    broken = Part(each.name, each.shape, kind, (each.sources[0], Held(wide, kind)), each.base, each.variants)
    both(monkeypatch, method, broken, allow_non_finite=True)
    messages = []
    for choice in ("eager", "native"):
        monkeypatch.setenv(native.VARIABLE, choice)
        monkeypatch.setattr("paretune.merging.kernels._file_of", lambda view: "there")
        with pytest.raises(CheckpointError, match="NaN or infinity") as caught:
            merged(Kernel(METHODS[method], 3), broken)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@built
@pytest.mark.parametrize("kind", KINDS)
def test_every_half_and_every_rounding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 65536 stored numbers are read alike; floats of every exponent, and ties between neighbours, round alike."""
    exponent = np.arange(0, 255, dtype=np.uint32)[:, None] << 23
    fraction = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x7FFFFF])
    floats = (exponent | fraction.astype(np.uint32)).reshape(-1)
    floats = np.concatenate([floats, floats | np.uint32(1 << 31)]).view(np.float32)
    variant = (settings_of("linear", 1, (1.0,), 1.0),)
    each = Part("w", floats.shape, kind, (Held(floats, "F32"),), None, variant)
    both(monkeypatch, "linear", each, allow_non_finite=True)
    every = Held(np.zeros(1 << 16, np.float32), kind)
    if kind != "F32":
        every._values = np.arange(1 << 16, dtype=np.uint16).view(STORED[kind])
        both(monkeypatch, "linear", Part("w", (1 << 16,), "F32", (every,), None, variant), allow_non_finite=True)


@built
@pytest.mark.parametrize("k", [1, 500, 20_000, 69_000])
@pytest.mark.parametrize("kind", ["BF16", "F32"])
@pytest.mark.parametrize("computed", [False, True])
def test_the_same_cut(k: int, kind: str, computed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either form, by the sample's bracket or by histograms, of stored and of computed tensors."""
    from paretune.merging import fused, selection

    library = native._loaded()
    assert library is not None
    n = BLOCK + 5000
    each = part(n, (kind, kind), kind, True, ())
    source, base = each.sources[0], each.base
    assert base is not None
    if computed:
        wide = np.empty(n, np.float32)
        source.fill(0, n, wide)
        source = Computed(wide, kind)
    forms = Eager(METHODS["ties"]), Fused(library, METHODS["ties"])
    cuts = [find_cut(form.magnitudes(source, base), k) for form in forms]
    monkeypatch.setattr(selection, "_bracket", lambda magnitudes, k: (0, 0, 0))
    cuts += [find_cut(form.magnitudes(source, base), k) for form in forms]
    monkeypatch.undo()
    monkeypatch.setattr(selection, "ROOM", 600)
    monkeypatch.setattr(fused, "ROOM", 600)
    cuts += [find_cut(form.magnitudes(source, base), k) for form in (forms[0], Fused(library, METHODS["ties"]))]
    for cut in cuts[1:]:
        assert (cut.threshold, cut.tied, cut.wanted) == (cuts[0].threshold, cuts[0].tied, cuts[0].wanted)
        assert np.array_equal(cut.before, cuts[0].before) if cut.before is not None else cuts[0].before is None


@built
def test_sums_have_one_order() -> None:
    library = native._loaded()
    assert library is not None
    n = BLOCK + 1001
    each = part(n, ("BF16", "F32", "F16"), "F32", True, ())
    ready = Ready((1.0, 1.0), (1.0, 1.0), (None, None), 1.0, False)
    found = []
    for form in (Eager(METHODS["dare_linear"]), Fused(library, METHODS["dare_linear"], chunk=BLOCK)):
        lanes, norms = np.zeros((3, LANES)), np.zeros((2, 2, LANES))
        for start in range(0, n, BLOCK):
            form.products(each, start, min(n, start + BLOCK), lanes)
            form.norms(each, ready, start, min(n, start + BLOCK), norms)
        found.append((lanes, norms))
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])
    vector = np.empty((2, n), np.float32)
    for row, view in zip(vector, each.sources, strict=True):
        view.fill(0, n, row)
    base = np.empty(n, np.float32)
    each.base.fill(0, n, base)  # type: ignore[union-attr]
    tau = (vector - base).astype(np.float64)
    assert np.allclose(found[0][0].sum(1), [tau[0] @ tau[0], tau[0] @ tau[1], tau[1] @ tau[1]], rtol=1e-6)
    assert np.allclose(found[0][1].sum(2), np.abs(tau).sum(1)[:, None], rtol=1e-6)


def test_the_variable_is_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import paretune as pt

    monkeypatch.setenv(native.VARIABLE, "fast")
    with pytest.raises(ArgumentError, match="PARETUNE_KERNELS"):
        native.kernels()
    monkeypatch.setenv(native.VARIABLE, "eager")
    assert native.kernels() is None
    monkeypatch.setenv(native.VARIABLE, "native")
    monkeypatch.setattr(native, "_loaded", lambda: None)
    with pytest.raises(ArgumentError, match="C compiler"):
        native.kernels()
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(3)}, tmp_path / "m.safetensors")
    with pytest.raises(ArgumentError, match="C compiler"):
        pt.merge("linear", [str(tmp_path / "m.safetensors")], out=tmp_path / "out")
    assert not (tmp_path / "out.merging").exists()
