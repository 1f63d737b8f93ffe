"""Saving, loading and initialising state: by hand, torch.save, and torch.distributed.checkpoint."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import pytest
import torch
import torch.distributed.checkpoint as dcp
from builders import SHAPES, gradients, pair, parameters, run, tensors
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import paretune as pt
from paretune.errors import StateError

KINDS = ["OnDARE", "OnTIES"]


def through_torch_save(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from tensors_in(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from tensors_in(v)


class Model(nn.Module):
    def __init__(self, values: dict[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layer = nn.ModuleList([nn.Linear(16, 24)])
        self.scale = nn.Parameter(torch.tensor(0.0))
        self.norm = nn.LayerNorm(7, bias=False)
        self.load_state_dict(values)
        self.to(dtype)


def make(
    kind: str,
    values: dict[str, Tensor],
    tau: pt.TaskVector,
    dtype: torch.dtype,
    every: int,
    variant: str,
    lr: float = 1e-3,
) -> tuple[Model, torch.optim.Optimizer]:
    model = Model(values, dtype)
    optimizer = getattr(pt, kind)(
        model.named_parameters(), tau, lr=lr, density=0.3, weight=0.1, every=every, variant=variant, weight_decay=0.01
    )
    return model, optimizer


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    found = [p.detach().clone() for p in model.parameters()]
    return found + [optimizer.state[p][k].clone() for p in model.parameters() for k in sorted(optimizer.state[p])]


@pytest.mark.parametrize("way", ["by hand", "torch.save", "dcp", "dcp flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "every", "variant"),
    [("OnDARE", 1, "paper"), ("OnTIES", 3, "paper"), ("OnDARE", 2, "released"), ("OnTIES", 1, "released")],
)
def test_resume_is_bit_equal(kind: str, every: int, variant: str, dtype: torch.dtype, way: str, tmp_path) -> None:
    reference, _, tau = pair()
    grads = gradients(8)
    model, optimizer = make(kind, reference, tau, dtype, every, variant)
    run(optimizer, dict(model.named_parameters()), grads[:4])
    weights = copy.deepcopy(model.state_dict())
    options = StateDictOptions(flatten_optimizer_state_dict=way == "dcp flat")
    if way.startswith("dcp"):
        dcp.save(get_optimizer_state_dict(model, optimizer, options=options), checkpoint_id=tmp_path)
    else:
        saved = copy.deepcopy(optimizer.state_dict())
    at_four = bits(model, optimizer)
    run(optimizer, dict(model.named_parameters()), grads[4:])
    want = bits(model, optimizer)

    # Another learning rate: what is loaded must win.
    again, resumed = make(kind, reference, tau, dtype, every, variant, lr=0.5)
    again.load_state_dict(weights)
    if way.startswith("dcp"):
        template = get_optimizer_state_dict(again, resumed, options=options)
        dcp.load(template, checkpoint_id=tmp_path)
        set_optimizer_state_dict(again, resumed, template, options=options)
    else:
        resumed.load_state_dict(saved if way == "by hand" else through_torch_save(saved))
    assert resumed.param_groups[0]["calls"] == 4
    assert all(torch.equal(a, b) for a, b in zip(bits(again, resumed), at_four, strict=True))
    run(resumed, dict(again.named_parameters()), grads[4:])
    got = bits(again, resumed)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert [t.dtype for t in got] == [t.dtype for t in want]


@pytest.mark.parametrize("every", [1, 3])
def test_state_dtypes_of_bf16_parameters(every: int) -> None:
    reference, _, tau = pair()
    model, optimizer = make("OnDARE", reference, tau, torch.bfloat16, every, "paper")
    run(optimizer, dict(model.named_parameters()), gradients(2))
    fresh_model, fresh = make("OnDARE", reference, tau, torch.bfloat16, every, "paper")
    fresh.load_state_dict(through_torch_save(optimizer.state_dict()))
    expected = {"step": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32, "master_low": torch.int16}
    if every > 1:
        expected["pending"] = torch.float32
    for owner, opt in ((model, optimizer), (fresh_model, fresh)):
        for p in owner.parameters():
            assert {k: v.dtype for k, v in opt.state[p].items()} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_is_adamws_in_size_and_free_of_tau(kind: str) -> None:
    shapes = {"w": (256, 256), "b": (256,), "e": (500, 128)}
    reference, _, tau = pair(0, shapes)

    def saved_size(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        return buffer.getbuffer().nbytes, sum(t.numel() for t in tensors_in(optimizer.state_dict()))

    ours, theirs = parameters(reference), parameters(reference)
    merging = getattr(pt, kind)(ours.items(), tau, density=0.5, weight=0.1)
    adamw = torch.optim.AdamW(theirs.items())
    run(merging, ours, gradients(2, shapes))
    run(adamw, theirs, gradients(2, shapes))
    (our_bytes, our_numbers), (their_bytes, their_numbers) = saved_size(merging), saved_size(adamw)
    assert our_bytes <= 1.02 * their_bytes
    assert our_numbers <= their_numbers
    assert set(merging.state[ours["w"]]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("kind", KINDS)
def test_tau_of_another_pair_is_refused(kind: str) -> None:
    reference, _, tau = pair(0)
    params = parameters(reference)
    optimizer = getattr(pt, kind)(params.items(), tau, density=0.5, weight=0.1)
    run(optimizer, params, gradients(1))
    saved = through_torch_save(optimizer.state_dict())
    assert any(tau.fingerprint == g["tau_fingerprint"] for g in saved["param_groups"])
    other = getattr(pt, kind)(parameters(reference).items(), pair(1)[2], density=0.5, weight=0.1)
    untouched = copy.deepcopy(other.state_dict())
    with pytest.raises(StateError, match=r"(?i)task vector|tau|τ") as caught:
        other.load_state_dict(saved)
    assert "\n" not in str(caught.value)
    assert str(other.state_dict()) == str(untouched), "a refused load changes nothing"


@pytest.mark.parametrize("change", ["reversed", "swapped", "renamed", "missing", "regrouped"])
def test_other_parameters_are_refused(change: str) -> None:
    """Same shapes throughout: torch would load every one of these without a word."""
    shapes = {"a": (5, 5), "b": (5, 5), "c": (5, 5), "d": (5, 5)}
    reference, _, tau = pair(0, shapes)
    params = parameters(reference)
    optimizer = pt.OnDARE([{"params": list(params.items())[:2]}, {"params": list(params.items())[2:]}], tau)
    run(optimizer, params, gradients(1, shapes))
    saved = through_torch_save(optimizer.state_dict())
    if change == "renamed":
        reference["z"] = reference.pop("d")
        moved = tensors(4, {**{k: (5, 5) for k in "abcz"}})
        tau = pt.TaskVector.between(base=moved, reference=reference)
    names = {"reversed": "dcba", "swapped": "bacd", "renamed": "abcz", "missing": "abc", "regrouped": "abcd"}[change]
    cut = 3 if change == "regrouped" else 2
    fresh = [(k, nn.Parameter(reference[k].clone())) for k in names]
    other = pt.OnDARE([{"params": fresh[:cut]}, {"params": fresh[cut:]}], tau)
    with pytest.raises(StateError) as caught:
        other.load_state_dict(saved)
    assert "\n" not in str(caught.value)


def test_wrapper_prefixes_do_not_count_as_renaming() -> None:
    reference, _, tau = pair()
    params = parameters(reference)
    optimizer = pt.OnDARE(params.items(), tau, lr=1e-3, density=0.5, weight=0.1)
    run(optimizer, params, gradients(2))
    wrapped = parameters(reference)
    other = pt.OnDARE([(f"module._orig_mod.{k}", p) for k, p in wrapped.items()], tau, density=0.5, weight=0.1)
    other.load_state_dict(through_torch_save(optimizer.state_dict()))
    for k in params:
        assert torch.equal(other.state[wrapped[k]]["exp_avg"], optimizer.state[params[k]]["exp_avg"])


@pytest.mark.parametrize("how", ["by hand", "helpers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "every"), [("OnDARE", 1), ("OnDARE", 3), ("OnTIES", 1)])
def test_state_initialising_step_moves_and_counts_nothing(kind: str, every: int, dtype: torch.dtype, how: str) -> None:
    reference, _, tau = pair()
    grads = gradients(4)
    model, optimizer = make(kind, reference, tau, dtype, every, "paper")
    twin, other = make(kind, reference, tau, dtype, every, "paper")
    before = [p.detach().clone() for p in model.parameters()]
    if how == "helpers":
        get_optimizer_state_dict(model, optimizer, options=StateDictOptions())
    else:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        run(optimizer, dict(model.named_parameters()), [{k: torch.zeros(s) for k, s in SHAPES.items()}])
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert optimizer.param_groups[0]["calls"] == 0
    assert all({"step", "exp_avg", "exp_avg_sq"} <= set(optimizer.state[p]) for p in model.parameters())
    run(optimizer, dict(model.named_parameters()), grads)
    run(other, dict(twin.named_parameters()), grads)
    assert all(torch.equal(a, b) for a, b in zip(bits(model, optimizer), bits(twin, other), strict=True))


def test_lr_zero_with_gradients_is_a_step() -> None:
    """Warm-up may start at learning rate 0: moments, counters and τ's part all go on."""
    reference, _, tau = pair()
    params = parameters(reference)
    optimizer = pt.OnDARE(params.items(), tau, lr=0.0, density=1.0, weight=0.5)
    run(optimizer, params, gradients(1))
    assert optimizer.param_groups[0]["calls"] == 1
    state = optimizer.state[params["layer.0.bias"]]
    assert float(state["step"]) == 1
    assert state["exp_avg"].abs().sum() > 0
    assert not torch.equal(params["layer.0.bias"], reference["layer.0.bias"]), "α·F(τ) does not wait for the warm-up"


def test_zero_gradients_later_are_steps() -> None:
    reference, _, tau = pair()
    params = parameters(reference)
    optimizer = pt.OnDARE(params.items(), tau, lr=1e-3, density=0.5, weight=0.1)
    run(optimizer, params, gradients(1))
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, params, [{k: torch.zeros(s) for k, s in SHAPES.items()}])
    assert optimizer.param_groups[0]["calls"] == 2


def test_frozen_parameter_through_dcp_helpers(tmp_path) -> None:
    reference, _, tau = pair()
    model = Model(reference, torch.float32)
    model.embed.weight.requires_grad_(False)
    optimizer = pt.OnDARE(model.named_parameters(), tau, lr=1e-3, density=0.5, weight=0.1)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    run(optimizer, trained, gradients(2))
    saved = get_optimizer_state_dict(model, optimizer)
    dcp.save(saved, checkpoint_id=tmp_path)
    assert torch.equal(model.embed.weight, reference["embed.weight"])


def test_deepcopy_and_pickle_of_the_optimizer_state_are_independent() -> None:
    reference, _, tau = pair()
    params = parameters(reference)
    optimizer = pt.OnDARE(params.items(), tau, lr=1e-3, density=0.5, weight=0.1)
    run(optimizer, params, gradients(1))
    saved = copy.deepcopy(optimizer.state_dict())
    frozen = [t.clone() for t in tensors_in(saved)]
    run(optimizer, params, gradients(1))
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(saved), frozen, strict=True))


@pytest.mark.parametrize("other", ["AdamW", "OnTIES", "OnDARE without tau"])
def test_state_of_another_optimizer_is_refused(other: str) -> None:
    reference, _, tau = pair()
    params = parameters(reference)
    saver: torch.optim.Optimizer
    if other == "AdamW":
        saver = torch.optim.AdamW(params.items())
    elif other == "OnTIES":
        saver = pt.OnTIES(params.items(), tau)
    else:
        saver = pt.OnDARE(params.items(), None, weight=0.0)
    run(saver, params, gradients(1))
    with pytest.raises(StateError):
        pt.OnDARE(parameters(reference).items(), tau).load_state_dict(through_torch_save(saver.state_dict()))
