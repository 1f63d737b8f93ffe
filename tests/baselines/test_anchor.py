"""Anchor: L2 and L1 pulls against float64 formulas, their fixed points, and where the reference may come from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_model import Small, same_bits, train, trainable, values
from torch import Tensor, nn

from paretune.errors import ArgumentError, CheckpointError, MismatchError, StateError
from paretune.optim.anchor import Anchor, pull


def reference_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {k: (v + 0.1 * torch.randn(v.shape, generator=generator)).to(v.dtype) for k, v in values(model).items()}


def still(p: nn.Parameter, reference: Tensor, lr: float, **pulls: float) -> Anchor:
    """An Anchor whose inner optimizer does nothing."""
    p.grad = torch.zeros_like(p)
    return Anchor(torch.optim.SGD([("p", p)], lr=lr), {"p": reference}, **pulls)


@pytest.mark.parametrize(("l2", "l1"), [(3.0, 0.0), (0.0, 0.5), (3.0, 0.5)])
def test_each_step_is_the_inner_one_then_the_pull(l2: float, l1: float) -> None:
    model, naive = Small(), Small().double()
    reference = reference_of(model)
    optimizer = Anchor(torch.optim.SGD(trainable(model), lr=0.05, momentum=0.9), reference, l2=l2, l1=l1)
    plain = torch.optim.SGD(trainable(naive), lr=0.05, momentum=0.9)
    for step in range(6):
        train(model, optimizer, range(step, step + 1))
        train(naive, plain, range(step, step + 1))
        with torch.no_grad():
            for name, p in trainable(naive):
                if p.grad is not None:
                    r = reference[name].double()
                    p -= 0.05 * l2 * (p - r)
                    d = p - r
                    p.copy_(r + d.sign() * (d.abs() - 0.05 * l1).clamp(min=0))
    for name, p in trainable(naive):
        torch.testing.assert_close(dict(trainable(model))[name].double(), p, rtol=1e-5, atol=1e-6)


def test_l1_lands_on_the_reference_exactly_and_l2_decays_towards_it() -> None:
    reference = torch.tensor([0.1, 0.2, 0.3])
    p = nn.Parameter(reference + torch.tensor([1e-3, -2e-3, 0.5]))
    still(p, reference, lr=0.1, l1=0.1).step()
    assert torch.equal(p[:2], reference[:2])
    assert p[2].item() == pytest.approx(0.79)
    q = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    optimizer = still(q, torch.ones(3, dtype=torch.float64), lr=0.01, l2=10.0)
    for _ in range(10):
        optimizer.step()
    torch.testing.assert_close(q.detach(), torch.full((3,), 1 + 0.9**10, dtype=torch.float64))


def test_a_full_pull_is_the_reference_and_no_distance_is_no_move() -> None:
    reference = torch.tensor([0.1, -7.3, 1e-30, 5e20])
    for shrink, threshold in ((1.0, 0.0), (3.0, 0.0), (0.0, float("inf")), (1.0, 1.0)):
        theta = torch.tensor([1.0, 2.0, 3.0, -4.0])
        assert torch.equal(pull(theta, reference, shrink, threshold), reference)
    assert torch.equal(pull(reference, reference, 0.3, 0.1), reference)
    assert torch.equal(pull(reference + 0.5, reference, 0.0, 0.0), reference + 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_follows_float32_although_each_pull_is_below_its_spacing(dtype: torch.dtype) -> None:
    reference = torch.tensor([1.0, 0.5, -2.0]).to(dtype)
    start = (reference.float() * 1.25).to(dtype)
    low, high = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizers = [still(low, reference, lr=1e-3, l2=1.0), still(high, reference.float(), lr=1e-3, l2=1.0)]
    for _ in range(500):
        for optimizer in optimizers:
            optimizer.step()
    assert (high < 1.16 * reference.float().abs()).all()
    exact = low.detach().float() + optimizers[0].own[low]["anchor_carry"]
    torch.testing.assert_close(exact, high.detach(), rtol=1e-5, atol=0)
    assert torch.equal(low.detach(), exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_of_the_reference_gives_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Small(dtype)
    tensors = reference_of(model)
    other = Small(dtype)
    other.load_state_dict({**other.state_dict(), **tensors, "head.weight": tensors["embedding.weight"]})
    save_file({name: value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    ends, prints = [], set()
    for form in (tensors, other, tmp_path, str(tmp_path / "model.safetensors")):
        policy = Small(dtype)
        optimizer = Anchor(torch.optim.AdamW(trainable(policy), lr=1e-2), form, l2=5.0, l1=0.01)
        train(policy, optimizer, range(3))
        ends.append(values(policy))
        prints.add(optimizer.param_groups[0]["anchor_fingerprint"])
    assert all(same_bits(ends[0], end) for end in ends)
    assert len(prints) == 1


def test_none_and_the_policy_itself_mean_the_policy_as_it_is_now() -> None:
    ends = []
    for form in ("none", "module", "dict", "copy"):
        model = Small()
        forms = {"none": None, "module": model, "dict": dict(model.named_parameters()), "copy": values(model)}
        optimizer = Anchor(torch.optim.SGD(trainable(model), lr=0.5), forms[form], l2=1.0)  # type: ignore[arg-type]
        train(model, optimizer, range(4))
        ends.append(values(model))
    assert all(same_bits(ends[0], end) for end in ends)
    assert not torch.equal(ends[0]["layer.weight"], Small().layer.weight)


def test_chunks_and_strides_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    start, reference = torch.randn(2, 6, 5, generator=generator).unbind()
    for dtype in (torch.float32, torch.bfloat16):
        ends = []
        for chunk, transposed in ((1 << 20, False), (7, False), (7, True)):
            monkeypatch.setattr("paretune.optim.anchor._CHUNK", chunk)
            value = start.to(dtype)
            p = nn.Parameter(value.t().contiguous().t() if transposed else value.clone())
            optimizer = still(p, reference.to(dtype), lr=0.1, l2=0.5, l1=0.3)
            for _ in range(3):
                optimizer.step()
            ends.append(p.detach().contiguous())
        assert torch.equal(ends[0], ends[1])
        assert torch.equal(ends[0], ends[2])


def test_the_pull_follows_the_schedule() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = still(p, torch.tensor([1.0]), lr=0.1, l2=5.0)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert p.item() == 2.0
    optimizer.param_groups[0]["lr"] = 0.02
    optimizer.step()
    assert p.item() == pytest.approx(1.9)
    optimizer.param_groups[0]["lr"] = 1.0  # more than a full pull stops at the reference
    optimizer.step()
    assert p.item() == 1.0


def test_the_reference_stays_out_of_the_state_dict_but_is_checked() -> None:
    model = Small()
    optimizer = Anchor(torch.optim.AdamW(trainable(model)), l2=1.0)
    train(model, optimizer, range(1))
    plain = torch.optim.AdamW(trainable(Small()))
    size = {key for entry in optimizer.state_dict()["state"].values() for key in entry}
    assert size == {"step", "exp_avg", "exp_avg_sq"}
    saved = optimizer.state_dict()
    late = Anchor(torch.optim.AdamW(trainable(model)), l2=1.0)  # the policy has moved since
    with pytest.raises(StateError, match="not None"):
        late.load_state_dict(saved)
    other = Anchor(torch.optim.AdamW(trainable(model)), reference_of(model), l2=1.0)
    with pytest.raises(StateError, match="another reference"):
        other.load_state_dict(saved)
    other.load_state_dict(plain.state_dict())
    assert "anchor_fingerprint" in other.param_groups[0]


def test_arguments_are_refused_in_one_line(tmp_path: Path) -> None:
    model = Small()

    def inner() -> torch.optim.Optimizer:
        return torch.optim.AdamW(trainable(model), lr=0.1)

    for arguments, expected in (
        ({"l2": -1.0}, "l2=-1.0"),
        ({"l1": float("nan")}, "l1=nan"),
        ({"l2": 11.0}, "l2=11.0.*give ≤ 10"),
        ({"reference": 3}, "reference=3"),
    ):
        with pytest.raises(ArgumentError, match=expected) as caught:
            Anchor(inner(), **arguments)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    tensors = values(model)
    with pytest.raises(MismatchError, match=r"lacks.*layer.bias \(1 of 1\)"):
        Anchor(inner(), {name: v for name, v in tensors.items() if name != "layer.bias"})
    with pytest.raises(MismatchError, match=r"unused \(5,\) for \(4,\)"):
        Anchor(inner(), {**tensors, "unused": torch.ones(5)})
    with pytest.raises(CheckpointError):
        Anchor(inner(), tmp_path)
    with torch.device("meta"):
        meta = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match="meta device"):
        Anchor(torch.optim.AdamW(meta.named_parameters()))


def test_a_path_is_read_without_loading_it(tmp_path: Path) -> None:
    size = 1 << 22
    save_file({"p": torch.zeros(size)}, tmp_path / "model.safetensors")
    p = nn.Parameter(torch.ones(size))
    p.grad = torch.zeros(size)
    optimizer = Anchor(torch.optim.SGD([("p", p)], lr=0.1), os.fspath(tmp_path), l2=5.0)
    optimizer.step()
    assert (p == 0.5).all()
    assert not optimizer._tensors
