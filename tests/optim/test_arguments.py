"""What is refused at construction, in one line that names the argument, and what is derived."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from builders import SHAPES, gradients, pair, parameters, run, tensors
from torch import nn

import paretune as pt
from paretune.errors import ArgumentError, MismatchError, PareTuneError

NAN = float("nan")


def one_line(caught: pytest.ExceptionInfo[BaseException], *words: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("lr", v) for v in (-1e-6, NAN, float("inf"))],
        *[("betas", v) for v in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, NAN), (0.9,))],
        *[("eps", v) for v in (-1e-8, NAN)],
        *[("weight_decay", v) for v in (-0.1, NAN)],
        *[("density", v) for v in (0, -0.1, 1.1, NAN)],
        *[("weight", v) for v in (-1e-9, 1.0001, NAN)],
        *[("every", v) for v in (0, -1, 1.5)],
        ("variant", "Paper"),
        ("rescale", True),
        ("rescale", "mean"),
        *[("clip", v) for v in (0.0, -1.0, NAN)],
        ("seed", 1.5),
    ],
)
@pytest.mark.parametrize("kind", ["OnDARE", "OnTIES"])
def test_argument_ranges(kind: str, argument: str, value: object) -> None:
    reference, _, tau = pair()
    with pytest.raises(ArgumentError) as caught:
        getattr(pt, kind)(parameters(reference).items(), tau, **{argument: value})
    one_line(caught, argument)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("argument", "value"), [("lr", -1.0), ("density", 0.0), ("weight", 2.0), ("betas", (1.0, 1.0))]
)
def test_group_values_are_checked_too(argument: str, value: object) -> None:
    reference, _, tau = pair()
    with pytest.raises(ArgumentError, match=argument):
        pt.OnDARE([{"params": list(parameters(reference).items()), argument: value}], tau)


def test_no_task_vector() -> None:
    reference, _, _ = pair()
    with pytest.raises(ArgumentError, match="tau"):
        pt.OnDARE(parameters(reference).items(), None)
    with pytest.raises(ArgumentError, match="tau"):
        pt.OnTIES(parameters(reference).items(), None, weight=0.0, variant="released")
    with pytest.raises(ArgumentError, match="tau"):
        pt.OnDARE([{"params": list(parameters(reference).items()), "weight": 0.1}], None, weight=0.0)
    pt.OnDARE(parameters(reference).items(), None, weight=0.0)
    with pytest.raises((ArgumentError, TypeError), match="tau"):
        pt.OnDARE(parameters(reference).items(), tensors(0))  # a dict is no TaskVector


def test_unnamed_and_duplicate_parameters() -> None:
    reference, _, tau = pair()
    params = parameters(reference)
    for unnamed in (list(params.values()), [{"params": list(params.values())}]):
        with pytest.raises(ArgumentError, match="named_params") as caught:
            pt.OnDARE(unnamed, tau)
        one_line(caught, "named_parameters")
    twice = [("norm.weight", nn.Parameter(torch.zeros(7))), ("norm.weight", nn.Parameter(torch.zeros(7)))]
    with pytest.raises(ArgumentError, match=r"norm\.weight"):
        pt.OnDARE(twice, tau)
    with pytest.raises(ArgumentError, match=r"norm\.weight"):  # the same name after the prefix is off
        pt.OnDARE([twice[0], ("module.norm.weight", twice[1][1])], tau)
    zeros, ones = ({k: torch.full((7,), v) for k in ("a", "b")} for v in (0.0, 1.0))
    same = pt.TaskVector.between(base=zeros, reference=ones)
    with pytest.raises((ArgumentError, ValueError)):  # one parameter under two names would be stepped twice
        pt.OnDARE([("a", params["norm.weight"]), ("b", params["norm.weight"])], same)
    with pytest.raises((ArgumentError, ValueError)):
        pt.OnDARE([], tau)


def test_unknown_names_and_other_shapes_give_three_examples_and_the_count() -> None:
    reference, _, tau = pair()
    extra = {f"extra.{i}": nn.Parameter(torch.zeros(2)) for i in range(5)}
    with pytest.raises(MismatchError) as caught:
        pt.OnDARE([*parameters(reference).items(), *extra.items()], tau)
    one_line(caught, "extra.0", "extra.1", "extra.2", "5")
    params = parameters(reference)
    params["layer.0.bias"] = nn.Parameter(torch.zeros(25))
    with pytest.raises(MismatchError) as caught:
        pt.OnDARE(params.items(), tau)
    one_line(caught, "layer.0.bias", "25", "24")


def test_a_subset_of_the_vector_is_enough() -> None:
    reference, _, tau = pair()
    params = parameters({"layer.0.bias": reference["layer.0.bias"]})
    run(pt.OnDARE(params.items(), tau, lr=1e-3, density=0.5, weight=0.1), params, gradients(1))
    assert not torch.equal(params["layer.0.bias"], reference["layer.0.bias"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_wrapper_prefixes(prefix: str) -> None:
    reference, _, tau = pair()
    plain, wrapped = parameters(reference), parameters(reference)
    options = {"lr": 1e-3, "density": 0.5, "weight": 0.1}
    run(pt.OnDARE(plain.items(), tau, **options), plain, gradients(2))
    run(pt.OnDARE([(prefix + k, p) for k, p in wrapped.items()], tau, **options), wrapped, gradients(2))
    assert all(torch.equal(plain[k], wrapped[k]) for k in plain)


def test_only_whole_segments_are_stripped() -> None:
    shapes = {"my_module.weight": (4,), "layer._checkpoint_wrapped_module.w": (3,), "submodule.module_x": (2,)}
    base = {k.replace("_checkpoint_wrapped_module.", ""): v for k, v in tensors(0, shapes).items()}
    reference = {k: v + 1 for k, v in base.items()}
    tau = pt.TaskVector.between(base=base, reference=reference)
    params = parameters({k: torch.zeros(s) for k, s in shapes.items()})
    run(pt.OnDARE(params.items(), tau, lr=1e-3, density=1.0, weight=0.5), params, gradients(1, shapes))
    assert all(p.abs().min() > 0.1 for p in params.values())


def test_tied_weights_follow_named_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

    base, policy = Tied(), Tied()
    tau = pt.TaskVector.between(base=base, reference=policy)
    optimizer = pt.OnDARE(policy.named_parameters(), tau, lr=1e-3, density=1.0, weight=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["embed.weight"]
    before = policy.embed.weight.detach().clone()
    policy.head(policy.embed(torch.arange(9))).square().sum().backward()
    optimizer.step()
    assert policy.head.weight is policy.embed.weight
    assert not torch.equal(policy.embed.weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtypes(dtype: torch.dtype) -> None:
    _, _, tau = pair()
    p = nn.Parameter(torch.zeros(24).to(dtype))
    with pytest.raises(ArgumentError, match=r"layer\.0\.bias") as caught:
        pt.OnDARE([("layer.0.bias", p)], tau)
    one_line(caught, str(dtype).removeprefix("torch."))


def test_add_param_group() -> None:
    reference, _, tau = pair()
    params = parameters(reference)
    items, whole = list(params.items()), parameters(reference)
    optimizer = pt.OnDARE(items[:2], tau, lr=1e-3, density=0.5, weight=0.1)
    optimizer.add_param_group({"params": items[2:]})
    run(optimizer, params, gradients(2))
    run(pt.OnDARE(whole.items(), tau, lr=1e-3, density=0.5, weight=0.1), whole, gradients(2))
    assert all(torch.equal(params[k], whole[k]) for k in params)
    for bad in (
        {"params": [nn.Parameter(torch.zeros(3))]},
        {"params": [("norm.weight", nn.Parameter(torch.zeros(7)))]},
    ):
        with pytest.raises((PareTuneError, ValueError)):
            optimizer.add_param_group(bad)
        assert len(optimizer.param_groups) == 2
    with pytest.raises(MismatchError):
        optimizer.add_param_group({"params": [("unknown", nn.Parameter(torch.zeros(3)))]})


def share_of_magnitude(tau: dict[str, torch.Tensor], density: float) -> float:
    kept = sum(
        t.abs().flatten().sort(descending=True).values[: max(1, int(density * t.numel()))].sum() for t in tau.values()
    )
    return float(kept / sum(t.abs().sum() for t in tau.values()))


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("density", [0.5, 0.05])
@pytest.mark.parametrize(
    ("kind", "options", "s"),
    [
        ("OnDARE", {}, "p"),
        ("OnDARE", {"rescale": "expectation"}, 1),
        ("OnDARE", {"rescale": "l1"}, 1),
        ("OnDARE", {"variant": "released"}, 1),
        ("OnTIES", {}, "magnitude"),
        ("OnTIES", {"rescale": "l1"}, 1),
        ("OnTIES", {"variant": "released"}, "released"),
    ],
    ids=str,
)
def test_weight_from_pull(kind: str, options: dict, s: object, density: float, every: int) -> None:
    """ρ = α·⌊T/K⌋·s."""
    shapes = {"w": (40, 30), "b": (500,)}
    reference, dense, tau = pair(0, shapes)
    optimizer = getattr(pt, kind)(
        parameters(reference).items(), tau, pull=0.02, total_steps=103, every=every, density=density, **options
    )
    share = {"p": density, 1: 1.0}.get(s) or share_of_magnitude(dense, density)  # type: ignore[call-overload]
    # l1 over random masks is 1 in expectation only
    assert optimizer.param_groups[0]["weight"] == pytest.approx(0.02 / (103 // every * share), rel=0.02)
    assert 0 < optimizer.param_groups[0]["weight"] < 1


def test_pull_that_needs_more_than_weight_one_names_the_largest() -> None:
    reference, _, tau = pair()
    with pytest.raises(ArgumentError) as caught:
        pt.OnDARE(parameters(reference).items(), tau, pull=0.5, total_steps=1000, density=1e-4)
    one_line(caught, "pull", "0.1")
    pt.OnDARE(parameters(reference).items(), tau, pull=0.0999, total_steps=1000, density=1e-4)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("total_steps", {"pull": 0.1}),
        ("total_steps", {"pull": 0.1, "total_steps": 0}),
        ("pull", {"pull": -0.1, "total_steps": 10}),
        ("pull", {"pull": NAN, "total_steps": 10}),
        ("every", {"pull": 0.1, "total_steps": 3, "every": 4}),
    ],
)
def test_pull_arguments(argument: str, options: dict) -> None:
    reference, _, tau = pair()
    with pytest.raises(ArgumentError, match=argument) as caught:
        pt.OnDARE(parameters(reference).items(), tau, density=1.0, **options)
    one_line(caught)


def test_pull_is_what_arrives() -> None:
    """Zero gradients, T steps at the derived weight: the policy has moved by ρ·τ."""
    reference, dense, tau = pair(0, {"w": (300, 100)})
    params = parameters(reference)
    optimizer = pt.OnDARE(params.items(), tau, lr=1e-12, density=0.25, pull=0.3, total_steps=200)
    run(optimizer, params, [{"w": torch.zeros(300, 100)}] * 200)
    moved = (params["w"].detach() - reference["w"]).double()
    share = (moved * dense["w"]).sum() / (dense["w"].double() ** 2).sum()
    assert share == pytest.approx(0.3, rel=0.01)
    per_entry = (moved / dense["w"])[dense["w"].abs() > 1e-3]
    assert per_entry.std() == pytest.approx(0.3 * math.sqrt(0.75 / (200 * 0.25)), rel=0.1), "spread over all entries"


@pytest.mark.parametrize("kind", ["OnDARE", "OnTIES"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statement(kind: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    reference, _, tau = pair()
    with caplog.at_level(logging.INFO, logger="paretune"):
        optimizer = getattr(pt, kind)(parameters(reference, dtype).items(), tau, total_steps=1000)
    assert "\n" not in optimizer.statement
    assert "weight 5e-07" in optimizer.statement
    assert any(optimizer.statement in record.getMessage() for record in caplog.records)


def test_statement_numbers() -> None:
    """2.5e-7·τ at the published settings over 1000 steps, and the learning rate the bare mask amounts to."""
    reference, _, tau = pair()
    published = pt.OnDARE(parameters(reference).items(), tau, lr=1e-6, total_steps=1000)
    assert "2.5e-07" in published.statement or "2.5e-7" in published.statement
    assert "5e-10" in published.statement, "p·lr"
    assert all(len(s) > 0 for s in SHAPES)


def test_deepspeed_is_refused() -> None:
    reference, _, tau = pair()
    params = parameters(reference)
    optimizer = pt.OnDARE(params.items(), tau)
    flat = torch.nn.Parameter(torch.cat([p.detach().reshape(-1) for p in params.values()]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ArgumentError, match="FSDP2"):
        optimizer.step()
    partitioned = parameters(reference)
    partitioned["norm.weight"].ds_id = 3  # what ZeRO-3 puts on each
    with pytest.raises(ArgumentError, match="ZeRO-3"):
        pt.OnTIES(partitioned.items(), tau)
