"""Weight 0 and density 1 is torch's AdamW, to the bit."""

from __future__ import annotations

import pytest
import torch
from builders import SHAPES, gradients, pair, parameters, run, tensors
from torch import Tensor

import paretune as pt

KINDS = {"ondare": pt.OnDARE, "onties": pt.OnTIES}
ODD = {**SHAPES, "empty": (0, 3), "one": (1,), "big": (301, 77)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_tau", [True, False])
def test_bit_equal_over_100_steps(kind: str, with_tau: bool) -> None:
    start, grads = tensors(0, ODD, 1.0), gradients(100, ODD)
    options = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    rates = [3e-3 * (1 - t / 110) for t in range(100)]
    ours, theirs = parameters(start), parameters(start)
    tau = pt.TaskVector.between(base=tensors(5, ODD), reference=start) if with_tau else None
    run(KINDS[kind](ours.items(), tau, density=1.0, weight=0.0, **options), ours, grads, rates)
    run(torch.optim.AdamW(theirs.values(), foreach=False, **options), theirs, grads, rates)
    for name in start:
        assert torch.equal(ours[name], theirs[name]), name
        assert start[name].numel() == 0 or not torch.equal(ours[name], start[name])


def test_default_arguments_equal_torchs() -> None:
    start, grads = tensors(1), gradients(5)
    ours, theirs = parameters(start), parameters(start)
    run(pt.OnDARE(ours.items(), None, density=1.0, weight=0.0), ours, grads)
    run(torch.optim.AdamW(theirs.values(), lr=1e-6, weight_decay=0.0, foreach=False), theirs, grads)
    assert all(torch.equal(ours[k], theirs[k]) for k in start)


def test_fused_torch_is_within_rounding() -> None:
    start, grads = tensors(1, scale=1.0), gradients(100)
    ours, theirs = parameters(start), parameters(start)
    options = {"lr": 1e-3, "weight_decay": 0.1}
    run(pt.OnDARE(ours.items(), None, density=1.0, weight=0.0, **options), ours, grads)
    run(torch.optim.AdamW(theirs.values(), fused=True, **options), theirs, grads)
    for name in start:
        assert (ours[name] - theirs[name]).abs().max() <= 1e-7 * max(1.0, theirs[name].abs().max().item()) * 4


@pytest.mark.parametrize("kind", KINDS)
def test_moments_do_not_depend_on_merging(kind: str) -> None:
    """The sparse path may be fused: its moments are AdamW's to rounding, on every entry, moved or not."""
    reference, _, tau = pair()
    grads = gradients(20)
    ours, theirs = parameters(reference), parameters(reference)
    merging = KINDS[kind](ours.items(), tau, lr=1e-3, density=0.05, weight=0.1)
    plain = torch.optim.AdamW(theirs.values(), lr=1e-3, weight_decay=0.0, foreach=False)
    run(merging, ours, grads)
    run(plain, theirs, grads)
    for name in reference:
        mine, other = merging.state[ours[name]], plain.state[theirs[name]]
        assert float(mine["step"]) == float(other["step"]) == 20
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(mine[moment], other[moment], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("option", ["lr", "betas", "eps", "weight_decay", "density", "weight"])
def test_a_group_overrides(option: str) -> None:
    """Two groups, one with its own value, move as two optimizers do."""
    reference, _, tau = pair()
    common = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1, "density": 0.5, "weight": 0.2}
    other = {"lr": 5e-3, "betas": (0.5, 0.6), "eps": 1e-1, "weight_decay": 0.7, "density": 0.9, "weight": 0.7}
    grads, names = gradients(6), list(reference)
    first, second = names[:2], names[2:]

    def moved(optimizer_of: object, params: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
        run(optimizer_of, params, grads)  # type: ignore[arg-type]
        return {k: v.detach() for k, v in params.items()}

    both = parameters(reference)
    groups = [
        {"params": [(k, both[k]) for k in first]},
        {"params": [(k, both[k]) for k in second], option: other[option]},
    ]
    together = moved(pt.OnDARE(groups, tau, **common), both)
    for chosen, options in ((first, common), (second, {**common, option: other[option]})):
        alone = parameters({k: reference[k] for k in chosen})
        apart = moved(pt.OnDARE(alone.items(), tau, **options), alone)
        for k in chosen:
            assert torch.equal(together[k], apart[k]), k
