"""What ChildTuning and Anchor have from OptimizerWrapper: to everyone else they are one torch optimizer."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_model import Small, loss, same_bits, train, trainable, values
from torch import nn

from paretune.errors import ArgumentError, StateError
from paretune.optim.anchor import Anchor
from paretune.optim.child_tuning import ChildTuning
from paretune.optim.fisher import fisher_information
from paretune.optim.wrapper import OptimizerWrapper, plain_name

Wrap = Callable[[nn.Module, torch.optim.Optimizer], OptimizerWrapper]


def fisher(model: nn.Module) -> dict[str, torch.Tensor]:
    return fisher_information(model, range(50, 54), loss)


WRAPS: dict[str, Wrap] = {
    "child_f": lambda model, inner: ChildTuning(inner, "F", density=0.4, seed=3),
    "child_d": lambda model, inner: ChildTuning(inner, "D", density=0.4, fisher=fisher(model)),
    "anchor": lambda model, inner: Anchor(inner, {k: v * 0.5 for k, v in values(model).items()}, l2=4.0, l1=0.2),
    "nested": lambda model, inner: Anchor(ChildTuning(inner, "F", density=0.5), l2=1.0),
}
NEUTRAL: dict[str, Wrap] = {
    "child_f": lambda model, inner: ChildTuning(inner, "F", density=1.0),
    "child_d": lambda model, inner: ChildTuning(inner, "D", density=1.0, fisher=fisher(model)),
    "anchor": lambda model, inner: Anchor(inner),
    "plain": lambda model, inner: OptimizerWrapper(inner),
}
LATE: dict[str, Wrap] = {
    "child_f": WRAPS["child_f"],
    "nested": lambda model, inner: Anchor(ChildTuning(inner, "F", density=0.5), l1=1e-3),
}
INNERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda named: torch.optim.AdamW(named, lr=1e-2, weight_decay=0.1),
    "fused": lambda named: torch.optim.AdamW(named, lr=1e-2, fused=True),
    "sgd": lambda named: torch.optim.SGD(named, lr=1e-2, momentum=0.9),
    "adafactor": lambda named: torch.optim.Adafactor(named, lr=1e-2),
}


def build(wrap: Wrap, dtype: torch.dtype = torch.float32, inner: str = "adamw") -> tuple[Small, OptimizerWrapper]:
    model = Small(dtype)
    return model, wrap(model, INNERS[inner](trainable(model)))


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_is_the_inner_optimizer_bit_for_bit(name: str, inner: str) -> None:
    model, optimizer = build(NEUTRAL[name], inner=inner)
    plain = Small()
    train(model, optimizer, range(5))
    train(plain, INNERS[inner](trainable(plain)), range(5))
    assert same_bits(values(model), values(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WRAPS)
def test_resume_equals_no_interruption(name: str, dtype: torch.dtype) -> None:
    model, optimizer = build(WRAPS[name], dtype)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(3, 6))

    again, resumed = build(WRAPS[name], dtype)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, range(3, 6))
    assert same_bits(values(again), values(model))
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        one, other = resumed.own.get(p, {}), optimizer.own.get(q, {})
        assert {k: v.dtype for k, v in one.items()} == {k: v.dtype for k, v in other.items()}


@pytest.mark.parametrize("name", WRAPS)
def test_two_runs_agree_and_leave_the_global_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    ends = []
    for _ in range(2):
        model, optimizer = build(WRAPS[name])
        torch.set_rng_state(before)
        train(model, optimizer, range(3))
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(values(model))
    assert same_bits(*ends)


@pytest.mark.parametrize("name", WRAPS)
def test_gradients_are_left_as_they_were(name: str) -> None:
    model, optimizer = build(WRAPS[name])
    loss(model, 0).backward()
    gradients = [p.grad for p in model.parameters()]
    copies = [None if g is None else g.clone() for g in gradients]
    optimizer.step()
    for p, g, c in zip(model.parameters(), gradients, copies, strict=True):
        assert p.grad is g
        assert g is None or torch.equal(g, c)


@pytest.mark.parametrize("name", WRAPS)
def test_unused_and_frozen_parameters_stay(name: str) -> None:
    model, optimizer = build(WRAPS[name])
    train(model, optimizer, range(3))
    assert torch.equal(model.unused, torch.ones(4))
    assert torch.equal(model.frozen, torch.ones(3))


def test_an_interrupted_step_gives_the_gradients_back() -> None:
    model, optimizer = build(WRAPS["child_f"])
    loss(model, 0).backward()
    gradient = model.layer.weight.grad

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    optimizer.inner.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert model.layer.weight.grad is gradient
    assert optimizer.param_groups[0]["child_calls"] == 0


@pytest.mark.parametrize("name", WRAPS)
def test_closure_is_evaluated_once_with_gradients(name: str) -> None:
    model, optimizer = build(WRAPS[name])
    other, plain = build(WRAPS[name])
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        value = loss(model, 0)
        value.backward()
        return value

    value = optimizer.step(closure)
    train(other, plain, range(1))
    assert len(calls) == 1
    assert torch.equal(value, loss(Small(), 0))
    assert same_bits(values(model), values(other))


@pytest.mark.parametrize("on_inner", [False, True])
def test_schedulers_move_the_learning_rate_of_both(on_inner: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer = build(WRAPS["nested"])
        target = optimizer.inner.inner if on_inner else optimizer  # type: ignore[attr-defined]
        scheduler = torch.optim.lr_scheduler.LambdaLR(target, lambda step: 1 / (1 + step))
        for step in range(3):
            train(model, optimizer, range(step, step + 1))
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 4)
    assert optimizer.inner.param_groups is optimizer.param_groups
    assert optimizer.inner.state is optimizer.state


@pytest.mark.parametrize("inner", ["adamw", "fused"])
@pytest.mark.parametrize("name", WRAPS)
def test_grad_scaler_unscales_and_skips(name: str, inner: str) -> None:
    model, optimizer = build(WRAPS[name], inner=inner)
    other, plain = build(WRAPS[name], inner=inner)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in (0, None, 1):
        optimizer.zero_grad()
        scaler.scale(loss(model, step or 0)).backward()
        if step is None:
            model.layer.weight.grad[0, 0] = float("inf")
        before = values(model)
        scaler.step(optimizer)
        scaler.update()
        assert same_bits(values(model), before) == (step is None)
    train(other, plain, range(2))
    assert same_bits(values(model), values(other))  # scales of 4 and 2 are exact
    assert optimizer.param_groups[0].get("child_calls", 2) == 2


@pytest.mark.parametrize("name", WRAPS)
def test_a_state_making_step_moves_and_counts_nothing(name: str) -> None:
    # What torch's distributed checkpoint does to an optimizer without state.
    model, optimizer = build(WRAPS[name])
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for _, p in trainable(model):
        p.grad = torch.zeros_like(p)
    before = values(model)
    optimizer.step()
    assert same_bits(values(model), before)
    assert optimizer.param_groups[0].get("child_calls", 0) == 0
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    keys = {name: set(entry) for name, entry in optimizer.state_dict()["state"].items()}
    train(model, optimizer, range(1))
    assert {name: set(entry) for name, entry in optimizer.state_dict()["state"].items()} == keys


def test_a_warm_up_from_lr_zero_counts() -> None:
    model, optimizer = build(WRAPS["child_f"])
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, range(1))
    assert optimizer.param_groups[0]["child_calls"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WRAPS)
def test_distributed_checkpoint_state_dicts(name: str, dtype: torch.dtype) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, optimizer = build(WRAPS[name], dtype)
    model.unused.requires_grad_(False)  # torch refuses a parameter that was trainable and has no saved state
    train(model, optimizer, range(3))
    saved = copy.deepcopy((values(model), get_optimizer_state_dict(model, optimizer)))
    train(model, optimizer, range(3, 5))
    again, resumed = build(WRAPS[name], dtype)
    again.unused.requires_grad_(False)
    again.load_state_dict({**again.state_dict(), **saved[0]})
    set_optimizer_state_dict(again, resumed, saved[1])
    train(again, resumed, range(3, 5))
    assert same_bits(values(again), values(model))


@pytest.mark.parametrize("name", LATE)
def test_groups_added_later_join_in(name: str) -> None:
    model, optimizer = build(LATE[name])
    train(model, optimizer, range(2))
    extra = nn.Parameter(torch.ones(200))
    optimizer.add_param_group({"params": [("extra", extra)], "weight_decay": 0.0})
    extra.grad = torch.ones(200)
    optimizer.step()
    assert optimizer.param_groups[1]["child_calls"] == 3
    assert 0 < int((extra != 1).sum()) < 200
    with pytest.raises(ArgumentError, match="twice"):
        optimizer.add_param_group({"params": [("module.extra", nn.Parameter(torch.ones(1)))]})
    with pytest.raises(ValueError, match="without names"):  # torch's own refusal
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("name", WRAPS)
def test_pickle_and_deepcopy(name: str) -> None:
    model, optimizer = build(WRAPS[name])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    train(model, optimizer, range(2))
    twin_model, twin = copy.deepcopy((model, optimizer))
    third_model, third = pickle.loads(pickle.dumps((model, optimizer)))
    for m, o in ((model, optimizer), (twin_model, twin), (third_model, third)):
        train(m, o, range(2, 4))
    assert same_bits(values(model), values(twin_model))
    assert same_bits(values(model), values(third_model))


def test_hooks_run() -> None:
    model, optimizer = build(WRAPS["child_f"])
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append("load"))
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    assert saved.pop("extra") == 1
    optimizer.load_state_dict(saved)
    assert seen == ["step", "load"]


def test_modes_reach_a_schedule_free_inner_optimizer() -> None:
    class Modes(torch.optim.SGD):
        mode = ""

        def train(self) -> None:
            self.mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

    inner = Modes(trainable(Small()), lr=0.1)
    optimizer = ChildTuning(inner)
    optimizer.eval()
    assert inner.mode == "eval"
    optimizer.train()
    assert inner.mode == "train"
    build(WRAPS["anchor"])[1].train()  # no modes: nothing happens


def test_reordered_and_foreign_states_are_refused() -> None:
    model, optimizer = build(WRAPS["child_f"])
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    other = Small()
    reordered = ChildTuning(torch.optim.AdamW(trainable(other)[::-1]), "F", density=0.4, seed=3)
    with pytest.raises(StateError, match=r"another order: .*\(3 of 4\)"):
        reordered.load_state_dict(saved)
    fewer = ChildTuning(torch.optim.AdamW(trainable(other)[:2]), "F", density=0.4, seed=3)
    with pytest.raises(StateError, match=r"\[4\].*\[2\]"):
        fewer.load_state_dict(saved)


def test_names_of_wrapped_models_load_into_plain_ones() -> None:
    model, optimizer = build(WRAPS["child_f"])
    wrapped = nn.Module()
    wrapped.module = Small()
    inside = WRAPS["child_f"](wrapped, INNERS["adamw"](trainable(wrapped)))
    train(model, optimizer, range(2))
    for step in range(2):
        inside.zero_grad()
        loss(wrapped.module, step).backward()
        inside.step()
    assert same_bits(values(model), values(wrapped.module))
    optimizer.load_state_dict(inside.state_dict())
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in trainable(model)]


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = ChildTuning(torch.optim.SGD(embedding.named_parameters(), lr=0.1))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ArgumentError, match=r"weight\.grad=.*sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("wrap", [ChildTuning, Anchor])
def test_refusals_are_one_line(wrap: type[OptimizerWrapper]) -> None:
    model = Small()
    for inner, expected in (
        (model, "inner_optimizer="),
        (torch.optim.LBFGS(trainable(model)), "inner_optimizer='LBFGS'"),
        (torch.optim.AdamW(model.parameters()), r"param_groups\[0\]='AdamW'.*named_parameters"),
    ):
        with pytest.raises(ArgumentError, match=expected) as caught:
            wrap(inner)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_plain_names_lose_whole_segments_only() -> None:
    assert plain_name("_fsdp_wrapped_module.a._checkpoint_wrapped_module.module_b.weight") == "a.module_b.weight"
