"""EMA against a float64 loop, and its swaps bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from small_model import Small, same_bits, train, trainable, values
from torch import nn

from paretune.errors import ArgumentError, CheckpointError, MismatchError, StateError
from paretune.optim.ema import EMA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("decay", [1e-3, 0.3, 0.7])
def test_follows_a_float64_loop(dtype: torch.dtype, decay: float) -> None:
    model = Small(dtype)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    ema = EMA(model.named_parameters(), decay)
    oracle = {name: p.detach().to(torch.float64, copy=True) for name, p in trainable(model)}
    for step in range(20):
        train(model, optimizer, range(step, step + 1))
        ema.update()
        oracle = {name: (1 - decay) * oracle[name] + decay * p.detach().double() for name, p in trainable(model)}
    for name, value in ema.state_dict().items():
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(value.double(), oracle[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decay_one_is_the_policy(dtype: torch.dtype) -> None:
    model = Small(dtype)
    ema = EMA(model.named_parameters(), decay=1.0)
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), range(3))
    ema.update()
    policy = values(model)
    with ema.average():
        assert same_bits(values(model), policy)


@settings(max_examples=40)
@given(
    numbers=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=0, max_size=9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    transposed=st.booleans(),
)
def test_swapping_restores_every_bit(numbers: list[float], dtype: torch.dtype, transposed: bool) -> None:
    start = torch.zeros(len(numbers), 2, dtype=dtype)
    p = nn.Parameter(start.t().contiguous().t() if transposed else start)
    ema = EMA([("p", p)], decay=0.5)
    with torch.no_grad():
        p[:, 0] = torch.tensor(numbers).to(dtype)
        p[:, 1] = -0.0
    before = p.detach().clone()
    ema.update()
    with ema.average():
        torch.testing.assert_close(p.detach(), ema.state_dict()["p"].to(dtype), equal_nan=True, rtol=0, atol=0)
    assert torch.equal(p.detach().contiguous().view(torch.int8), before.contiguous().view(torch.int8))


def test_average_is_in_the_same_storage_and_goes_when_an_error_does() -> None:
    model = Small()
    ema = EMA(model.named_parameters(), decay=0.5)
    train(model, torch.optim.SGD(trainable(model), lr=1.0), range(2))
    ema.update()
    policy, place = values(model), model.layer.weight.data_ptr()

    def evaluate() -> None:
        with ema.average():
            assert ema.swapped
            assert model.layer.weight.data_ptr() == place
            assert torch.equal(model.head.weight, ema.state_dict()["embedding.weight"])  # tied
            raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError, match="evaluation failed"):
        evaluate()
    assert not ema.swapped
    assert same_bits(values(model), policy)


def test_swap_twice_is_nothing_and_misuse_is_refused() -> None:
    model = Small()
    ema = EMA(model.named_parameters(), decay=0.5)
    policy = values(model)
    ema.swap()
    with pytest.raises(StateError, match="swap"):
        ema.update()
    with pytest.raises(StateError, match="within"), ema.average():
        pass
    ema.swap()
    assert same_bits(values(model), policy)


def test_frozen_are_skipped_and_tied_counted_once() -> None:
    model = Small()
    ema = EMA(model.named_parameters(remove_duplicate=False))
    assert set(ema.state_dict()) == {"embedding.weight", "layer.weight", "layer.bias", "unused"}


def test_a_float64_average_follows_what_float32_cannot() -> None:
    p = nn.Parameter(torch.ones(1))
    single, double = EMA([("p", p)], 1e-3), EMA([("p", p)], 1e-3, dtype=torch.float64)
    with torch.no_grad():
        p += 1e-5
    for _ in range(100):
        single.update()
        double.update()
    assert single.state_dict()["p"].item() == 1.0
    assert double.state_dict()["p"].item() == pytest.approx(1 + (p.item() - 1) * (1 - 0.999**100), abs=1e-12)


def test_file_round_trip_and_resume(tmp_path: Path) -> None:
    model = Small(torch.bfloat16)
    ema = EMA(model.named_parameters(), decay=0.1)
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    train(model, optimizer, range(2))
    ema.update()
    ema.save(tmp_path / "ema.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["ema.safetensors"]
    with safe_open(tmp_path / "ema.safetensors", "pt") as file:
        assert file.metadata()["ema_decay"] == "0.1"
    again = EMA([(f"module.{name}", p) for name, p in model.named_parameters()], decay=0.1)
    again.load(tmp_path / "ema.safetensors")
    train(model, optimizer, range(2, 4))
    ema.update()
    again.update()
    assert same_bits(ema.state_dict(), again.state_dict())


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    ema = EMA(model.named_parameters())
    ema.save(tmp_path / "ema.safetensors")
    content = (tmp_path / "ema.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        ema.save(tmp_path / "ema.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["ema.safetensors"]
    assert (tmp_path / "ema.safetensors").read_bytes() == content


def test_foreign_averages_are_refused(tmp_path: Path) -> None:
    model = Small()
    ema = EMA(model.named_parameters())
    state = {name: value.clone() for name, value in ema.state_dict().items()}
    before = {name: value.clone() for name, value in state.items()}
    with pytest.raises(MismatchError, match=r"unused \(1 of 1\)"):
        ema.load_state_dict({name: value for name, value in state.items() if name != "unused"})
    with pytest.raises(MismatchError, match=r"unused \(5,\) for \(4,\)"):
        ema.load_state_dict({**{name: value + 1 for name, value in state.items()}, "unused": torch.ones(5)})
    assert same_bits(ema.state_dict(), before)  # refused before anything was written
    with pytest.raises(CheckpointError, match="no such file"):
        ema.load(tmp_path / "missing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError):
        ema.load(tmp_path / "broken.safetensors")


def test_arguments_are_refused_in_one_line() -> None:
    model = Small()
    for arguments, expected in (
        ({"decay": 0.0}, "decay=0.0"),
        ({"decay": 1.5}, "decay=1.5"),
        ({"decay": float("nan")}, "decay=nan"),
        ({"dtype": torch.bfloat16}, "dtype="),
    ):
        with pytest.raises(ArgumentError, match=expected) as caught:
            EMA(model.named_parameters(), **arguments)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(ArgumentError, match="named_params"):
        EMA([("frozen", model.frozen)])
    with pytest.raises(ArgumentError, match="twice"):
        EMA([("a", model.unused), ("module.a", model.layer.bias)])


def test_lower_precision_is_widened_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paretune.optim.ema._BUCKET", 7)
    model = Small(torch.bfloat16)
    ema = EMA(model.named_parameters(), decay=0.25)
    start = {name: p.detach().float() for name, p in trainable(model)}
    train(model, torch.optim.SGD(trainable(model), lr=1.0), range(1))
    ema.update()
    for name, p in trainable(model):
        assert torch.equal(ema.state_dict()[name], torch.lerp(start[name], p.detach().float(), 0.25))
