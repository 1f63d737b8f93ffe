"""Factors of the learning rate: each entry of the update and of weight decay scaled, before anything is merged."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import SHAPES, assert_close, gradients, pair, parameters, run, tensors
from ranks import spawn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import paretune as pt
from paretune import native
from paretune.errors import ArgumentError, CheckpointError, MismatchError, StateError
from paretune.optim.learning_rates import LearningRates
from paretune.optim.wrapper import shard_like

KINDS = ["OnDARE", "OnTIES"]
OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}


def entries(seed: int = 3) -> dict[str, Tensor]:
    """Factors of each entry, some 0."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.rand(shape, generator=generator) * 2 for name, shape in SHAPES.items()}
    return {name: torch.where(f < 0.2, 0.0, f) for name, f in drawn.items()}


def scaled_by_hand(
    start: Mapping[str, Tensor], grads: list[dict[str, Tensor]], factors: Mapping[str, Tensor], **options: Any
) -> dict[str, Tensor]:
    """torch's AdamW in float64, each of whose changes, decay included, is multiplied entry by entry."""
    params = {name: nn.Parameter(value.double().clone()) for name, value in start.items()}
    inner = torch.optim.AdamW(params.values(), foreach=False, **options)
    for step in grads:
        before = {name: p.detach().clone() for name, p in params.items()}
        for name, p in params.items():
            p.grad = step[name].double()
        inner.step()
        for name, p in params.items():
            p.data = before[name] + factors[name].double() * (p.data - before[name])
    return {name: p.detach() for name, p in params.items()}


def plain(params: Mapping[str, nn.Parameter], kind: str = "OnDARE", **more: Any) -> torch.optim.Optimizer:
    return getattr(pt, kind)(params.items(), None, density=1.0, weight=0.0, **OPTIONS, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [1, 3])
def test_entries_equal_torch_scaled_by_hand(kind: str, every: int) -> None:
    start, grads, factors = tensors(0, scale=1.0), gradients(12), entries()
    params = parameters(start)
    run(plain(params, kind, learning_rates=factors, every=every), params, grads)
    want = scaled_by_hand(start, grads, factors, **OPTIONS)
    for name in start:
        assert_close(params[name], want[name], relative=2e-6, what=name)
        still = factors[name] == 0
        assert torch.equal(params[name][still], start[name][still])


def test_one_factor_a_tensor_is_a_group_of_its_own_rate() -> None:
    """Bit for bit torch's AdamW with one parameter group for each tensor."""
    start, grads = tensors(0, scale=1.0), gradients(12)
    factors = {name: torch.tensor(0.25 * (i + 1)) for i, name in enumerate(start)}
    ours, theirs = parameters(start), parameters(start)
    run(plain(ours, learning_rates=factors), ours, grads)
    rates = {name: OPTIONS["lr"] * float(factor) for name, factor in factors.items()}
    groups = [{"params": [p], "lr": rates[name]} for name, p in theirs.items()]
    run(torch.optim.AdamW(groups, foreach=False, **OPTIONS), theirs, grads)
    assert all(torch.equal(ours[name], theirs[name]) for name in start)


@pytest.mark.parametrize("ones", ["entries", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"density": 1.0, "weight": 0.0},
        {"density": 0.1, "weight": 1e-2},
        {"density": 0.5, "weight": 1e-2, "every": 2},
        {"density": 0.1, "weight": 1e-2, "variant": "released"},
        {"density": 0.4, "weight": 1e-2, "rescale": "l1"},
    ],
    ids=str,
)
def test_factors_of_one_change_no_bit(kind: str, options: dict[str, Any], dtype: torch.dtype, ones: str) -> None:
    reference, _, tau = pair()
    factors = {name: torch.ones(shape if ones == "entries" else ()) for name, shape in SHAPES.items()}
    found = []
    for rates in (None, factors):
        params = parameters(reference, dtype)
        optimizer = getattr(pt, kind)(params.items(), tau, learning_rates=rates, **{**OPTIONS, **options})
        run(optimizer, params, gradients(6))
        found.append([*params.values(), *(v for p in params.values() for v in optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_the_update_is_scaled_before_it_is_trimmed(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of OnTIES from a zero state, written out: δ = −η·f·g/(|g| + ε), then the operators."""
    monkeypatch.setenv(native.VARIABLE, kernels)
    reference, tau, vector = pair()
    grads, factors = gradients(1), entries()
    params = parameters(reference)
    options = {"lr": 1e-2, "eps": 0.5, "betas": (0.9, 0.99), "density": 0.2, "weight": 0.05}
    run(pt.OnTIES(params.items(), vector, learning_rates=factors, **options), params, grads)
    trim, elect = pt.Magnitude(0.2), pt.SignElection(weighted=True)
    for name, g in grads[0].items():
        delta = (-1e-2 * g / (g.abs() + 0.5)) * factors[name]
        want = reference[name] + elect(trim(delta), trim(tau[name]), 0.05)
        assert_close(params[name], want, what=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["entries", "tensors"])
def test_compiled_and_eager_agree(kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, _, tau = pair()
    factors = entries() if mode == "entries" else {name: torch.tensor(0.7) for name in SHAPES}
    found = []
    for choice in ("auto", "eager"):
        monkeypatch.setenv(native.VARIABLE, choice)
        params = parameters(reference)
        options = {**OPTIONS, "density": 0.1, "weight": 1e-2}
        run(getattr(pt, kind)(params.items(), tau, learning_rates=factors, **options), params, gradients(5))
        found.append(params)
    assert all(torch.equal(found[0][name], found[1][name]) for name in SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed(dtype: torch.dtype, tmp_path: Path) -> None:
    """From a file, through torch.save: the same bits as without the break; other factors are refused."""
    reference, _, tau = pair()
    file = tmp_path / "rates.safetensors"
    save_file(entries(), file)
    grads, options = gradients(6), {**OPTIONS, "density": 0.3, "weight": 1e-2, "every": 2}
    whole, broken = parameters(reference, dtype), parameters(reference, dtype)
    run(pt.OnDARE(whole.items(), tau, learning_rates=file, **options), whole, grads)
    first = pt.OnDARE(broken.items(), tau, learning_rates=str(file), **options)
    run(first, broken, grads[:3])
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second = pt.OnDARE(broken.items(), tau, learning_rates=file, **options)
    second.load_state_dict(saved)
    run(second, broken, grads[3:])
    assert all(torch.equal(whole[name], broken[name]) for name in SHAPES)
    for other in (None, entries(seed=4)):
        optimizer = pt.OnDARE(broken.items(), tau, learning_rates=other, **options)
        with pytest.raises(StateError, match="pass the same factors"):
            optimizer.load_state_dict(saved)


def test_a_state_from_before_loads() -> None:
    params = parameters(tensors(0))
    optimizer = plain(params)
    run(optimizer, params, gradients(2))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["learning_rates"]
    again = plain(params)
    again.load_state_dict(saved)
    run(again, params, gradients(1))
    plain(params).load_state_dict(again.state_dict())


class Flat(nn.Module):
    """Parameters without a module each; FSDP2 takes no scalars."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in pair()[0].items():
            if value.dim():
                self.register_parameter(name.replace(".", "_"), nn.Parameter(value.clone()))


def sharded(rank: int, kind: str, folder: Path) -> None:
    """The steps on this rank's rows; its rows of the result as a file."""
    from torch.distributed.fsdp import fully_shard

    model = Flat()
    fully_shard(model)
    two_steps(kind, model)
    rows = {name: p.to_local().detach().clone() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    save_file(rows, folder / f"{rank}.safetensors")


def two_steps(kind: str, model: nn.Module) -> None:
    names = {name.replace(".", "_"): name for name in SHAPES}
    reference, tau, _ = pair()
    ends = [{short: each[name] for short, name in names.items()} for each in (reference, tau)]
    vector = pt.TaskVector.between(base={k: ends[0][k] - ends[1][k] for k in names}, reference=ends[0])
    factors = {name.replace(".", "_"): factor for name, factor in entries().items()}
    options = {**OPTIONS, "eps": 0.05, "density": 0.2, "weight": 1e-2}
    optimizer = getattr(pt, kind)(model.named_parameters(), vector, learning_rates=factors, **options)
    for step in gradients(2):
        for name, p in model.named_parameters():
            p.grad = shard_like(step[names[name]], p)
        optimizer.step()


@pytest.mark.parametrize("kind", [pytest.param("OnDARE", marks=pytest.mark.slow), "OnTIES"])
def test_shards_take_their_rows(kind: str, tmp_path: Path) -> None:
    spawn(sharded, 2, kind, tmp_path)
    model = Flat()
    two_steps(kind, model)
    parts = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for name, p in model.named_parameters():
        assert torch.equal(torch.cat([part[name] for part in parts]), p.detach()), name


def test_names_of_wrappers_and_further_factors() -> None:
    start, factors = tensors(0), entries()
    params = parameters(start)
    named = [(f"module.{name}", p) for name, p in params.items()]
    rates = {f"_orig_mod.{name}": f for name, f in factors.items()} | {"frozen": torch.ones(3)}
    run(pt.OnDARE(named, None, density=1.0, weight=0.0, learning_rates=rates, **OPTIONS), params, gradients(2))
    want = parameters(start)
    run(plain(want, learning_rates=factors), want, gradients(2))
    assert all(torch.equal(params[name], want[name]) for name in start)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scale": None}, MismatchError, "no factors for scale"),
        ({"embed.weight": torch.ones(16, 32)}, MismatchError, r"embed.weight \[16, 32\] for \[32, 16\]"),
        ({"scale": torch.tensor(-0.1)}, ArgumentError, "at least 0"),
        ({"scale": torch.tensor(float("nan"))}, ArgumentError, "must be finite"),
        ({"scale": torch.tensor(float("inf"))}, ArgumentError, "must be finite"),
        ({"scale": torch.tensor(1)}, ArgumentError, "floating-point"),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_refused(change: dict[str, Any], error: type[Exception], message: str, as_file: bool, tmp_path: Path) -> None:
    factors: Any = {name: f for name, f in {**entries(), **change}.items() if f is not None}
    if as_file:
        save_file(factors, tmp_path / "rates.safetensors")
        factors = tmp_path / "rates.safetensors"
    with pytest.raises(error, match=message) as caught:
        plain(parameters(tensors(0)), learning_rates=factors)
    assert "learning_rates" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_sources_are_refused(tmp_path: Path) -> None:
    params = parameters(tensors(0))
    with pytest.raises(ArgumentError, match=r"learning_rates=0\.5"):
        plain(params, learning_rates=0.5)
    with pytest.raises(CheckpointError):
        plain(params, learning_rates=tmp_path / "nowhere.safetensors")
    pt.Gate(entries(), weight=1.0, ratio=9.0).save(tmp_path / "gate.safetensors")
    with pytest.raises(ArgumentError, match="is a gate"):
        plain(params, learning_rates=tmp_path / "gate.safetensors")


def test_an_added_group_needs_factors_too() -> None:
    params = parameters(tensors(0))
    optimizer = plain(params, learning_rates=entries())
    with pytest.raises(MismatchError, match="no factors for late"):
        optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2)))]})
    assert len(optimizer.param_groups) == 1


def test_said_and_counted(tmp_path: Path) -> None:
    params = parameters(tensors(0))
    optimizer = plain(params, learning_rates=entries())
    assert "for 5 tensors, one for all entries or one for each entry" in optimizer.statement
    assert optimizer.memory_report().held["other"] == sum(4 * f.numel() for f in entries().values())
    save_file(entries(), tmp_path / "rates.safetensors")
    mapped = plain(params, learning_rates=LearningRates(tmp_path / "rates.safetensors"))
    assert mapped.memory_report().held["other"] == 0
