"""ChildTuning: the masks' statistics (F), the choice by Fisher information (D), both against naive loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import Small, loss, same_bits, train, trainable, values
from torch import Tensor, nn

from paretune.errors import ArgumentError, DataError, StateError
from paretune.operators import bernoulli_mask, mask_key
from paretune.optim.child_tuning import ChildTuning
from paretune.optim.fisher import child_masks, fisher_information


def sgd_masks(density: float, steps: int, seed: int = 0, n: int = 20_000) -> Tensor:
    """(step, name, element): what reached the parameters of an SGD of lr 1 fed with ones."""
    params = [(name, nn.Parameter(torch.zeros(n))) for name in ("a", "b")]
    optimizer = ChildTuning(torch.optim.SGD(params, lr=1.0), "F", density=density, seed=seed)
    moves = []
    for _ in range(steps):
        for _, p in params:
            p.grad = torch.ones(n)
        before = torch.stack([p.detach().clone() for _, p in params])
        optimizer.step()
        moves.append(before - torch.stack([p.detach() for _, p in params]))
    return torch.stack(moves)


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.9])
def test_f_rate_scale_and_independence(density: float) -> None:
    moves = sgd_masks(density, steps=4)
    masks = (moves.abs() > 0.5).double()
    torch.testing.assert_close(moves[masks > 0], torch.full((int(masks.sum()),), 1 / density), rtol=1e-5, atol=1e-5)
    sigma = math.sqrt(density * (1 - density) / masks[0, 0].numel())
    assert ((masks.mean(-1) - density).abs() < 4 * sigma).all()
    # two steps, two names, neighbouring elements: the joint rate is the product
    flat = masks.flatten(0, 1)
    both = math.sqrt(density**2 * (1 - density**2) / flat.shape[1])
    for i in range(len(flat)):
        for j in range(i):
            assert abs((flat[i] * flat[j]).mean() - density**2) < 4 * both
        assert abs((flat[i, 1:] * flat[i, :-1]).mean() - density**2) < 5 * both


def test_f_depends_on_the_seed_only() -> None:
    assert torch.equal(sgd_masks(0.3, 2, seed=1), sgd_masks(0.3, 2, seed=1))
    assert not torch.equal(sgd_masks(0.3, 2, seed=1), sgd_masks(0.3, 2, seed=2))


def test_f_is_the_inner_optimizer_on_masked_gradients() -> None:
    model, naive = Small(), Small()
    optimizer = ChildTuning(torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1), "F", density=0.3, seed=5)
    plain = torch.optim.AdamW(trainable(naive), lr=1e-2, weight_decay=0.1)
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        plain.zero_grad()
        loss(naive, step).backward()
        for name, p in trainable(naive):
            if p.grad is not None:
                mask = bernoulli_mask(mask_key(5, step, "gradient", name), p.numel(), 0.3)
                p.grad = p.grad * mask.view(p.shape) / 0.3
        plain.step()
    assert same_bits(values(model), values(naive))


@settings(max_examples=60)
@given(
    tensors=st.lists(
        st.lists(st.sampled_from([0.0, -0.0, 1e-45, 1e-9, 0.5, 1.0, 1.0 + 2**-23, 3e38]), max_size=12),
        min_size=1,
        max_size=4,
    ),
    density=st.floats(0.01, 1.0),
)
def test_d_keeps_exactly_the_top_of_all_tensors(tensors: list[list[float]], density: float) -> None:
    fisher = {f"t{i}": torch.tensor(values) for i, values in enumerate(tensors)}
    masks = child_masks(fisher, density)
    everything = torch.cat(list(fisher.values()))
    kept = torch.cat([masks[name] for name in fisher])
    if density == 1:
        assert kept.all()
        return
    nonzero = int((everything > 0).sum())
    assert int(kept.sum()) == min(max(1, int(density * everything.numel())), nonzero)
    if kept.any():
        assert everything[kept].min() > 0
        assert (~kept).sum() == 0 or everything[~kept].max() <= everything[kept].min()


def test_d_spreads_ties_evenly() -> None:
    masks = child_masks({"a": torch.ones(10), "b": torch.tensor([2.0, 0.0]), "c": torch.ones(10)}, 6 / 22)
    kept = torch.cat([masks["a"], masks["c"]]).nonzero().view(-1).tolist()
    assert kept == [i * 20 // 5 for i in range(5)]
    assert masks["b"].tolist() == [True, False]


def test_d_ranks_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paretune.optim.fisher._CHUNK", 16)
    generator = torch.Generator().manual_seed(0)
    fisher = {name: torch.rand(5, 37, generator=generator) ** 8 for name in "abc"}
    masks = child_masks(fisher, 0.2)
    everything = torch.cat([v.flatten() for v in fisher.values()])
    limit = everything.sort(descending=True).values[int(0.2 * everything.numel()) - 1]
    assert all(torch.equal(masks[name], fisher[name] >= limit) for name in fisher)


def test_d_trains_its_child_and_nothing_else() -> None:
    model = Small()
    fisher = fisher_information(model, range(50, 60), loss)
    masks = child_masks({name: fisher[name] for name, _ in trainable(model)}, 0.2)
    optimizer = ChildTuning(torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0), "D", 0.2, fisher=fisher)
    before = values(model)
    train(model, optimizer, range(5))
    for name, p in trainable(model):
        assert torch.equal(p.detach() != before[name], masks[name]), name
        assert optimizer.own[p]["child_mask"].dtype == torch.bool


def test_d_gradients_are_not_divided_by_the_density() -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = ChildTuning(torch.optim.SGD([("p", p)], lr=1.0), "D", 0.5, fisher={"p": torch.tensor([1.0, 4, 3, 2])})
    p.grad = torch.ones(4)
    optimizer.step()
    assert p.tolist() == [0, -1, -1, 0]


def test_d_calls_a_fisher_function_in_the_first_step_only_if_no_mask_was_loaded() -> None:
    model = Small()
    calls = []

    def compute() -> dict[str, Tensor]:
        calls.append(1)
        return fisher_information(model, range(50, 52), loss)

    def make() -> ChildTuning:
        return ChildTuning(torch.optim.SGD(trainable(model), lr=0.1), "D", 0.3, fisher=compute)

    optimizer = make()
    assert not calls
    train(model, optimizer, range(2))
    assert len(calls) == 1
    resumed = make()
    resumed.load_state_dict(optimizer.state_dict())
    train(model, resumed, range(2, 3))
    assert len(calls) == 1


@pytest.mark.parametrize("mode", ["F", "D"])
def test_nan_gradients_show_as_without_the_wrapper(mode: str) -> None:
    p = nn.Parameter(torch.zeros(8))
    fisher = {"p": torch.arange(8.0)} if mode == "D" else None
    optimizer = ChildTuning(torch.optim.SGD([("p", p)], lr=1.0), mode, 0.5, fisher=fisher)  # type: ignore[arg-type]
    p.grad = torch.full((8,), float("nan"))
    optimizer.step()
    assert p.isnan().all()


def test_empty_and_scalar_parameters() -> None:
    params = [("empty", nn.Parameter(torch.zeros(0, 3))), ("scalar", nn.Parameter(torch.tensor(1.0)))]
    for mode, fisher in (("F", None), ("D", {name: torch.ones_like(p) for name, p in params})):
        optimizer = ChildTuning(torch.optim.SGD(params, lr=0.1), mode, 0.5, fisher=fisher)  # type: ignore[arg-type]
        for _, p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()


def test_states_of_other_settings_are_refused_and_plain_ones_taken() -> None:
    model = Small()
    optimizer = ChildTuning(torch.optim.AdamW(trainable(model)), "F", density=0.3)
    train(model, optimizer, range(2))
    for other in (
        ChildTuning(torch.optim.AdamW(trainable(model)), "F", density=0.4),
        ChildTuning(torch.optim.AdamW(trainable(model)), "F", density=0.3, seed=1),
        ChildTuning(torch.optim.AdamW(trainable(model)), "D", 0.3, fisher=dict),
    ):
        with pytest.raises(StateError, match=r"mode=F density=0\.3 seed=0"):
            other.load_state_dict(optimizer.state_dict())
    plain = torch.optim.AdamW(trainable(model))
    train(model, plain, range(1))
    fresh = ChildTuning(torch.optim.AdamW(trainable(model)), "F", density=0.3)
    fresh.load_state_dict(plain.state_dict())
    assert fresh.param_groups[0]["child_calls"] == 0


def test_arguments_are_refused_in_one_line() -> None:
    model = Small()
    fisher = {name: torch.ones_like(p) for name, p in trainable(model)}
    wrong = {**fisher, "unused": torch.ones(5)}
    negative = {**fisher, "unused": -torch.ones(4)}
    for arguments, expected in (
        ({"mode": "G"}, "mode='G'"),
        ({"density": 0.0}, "density=0.0"),
        ({"density": 1.5}, "density=1.5"),
        ({"mode": "D"}, "fisher=None"),
        ({"fisher": fisher}, "fisher='dict'"),
        ({"mode": "D", "fisher": {}}, r"\(3 of 4\)"),
        ({"mode": "D", "fisher": wrong}, r"unused \(5,\) for \(4,\)"),
    ):
        with pytest.raises(ArgumentError, match=expected) as caught:
            ChildTuning(torch.optim.AdamW(trainable(model)), **arguments)
        assert "\n" not in str(caught.value)
    optimizer = ChildTuning(torch.optim.AdamW(trainable(model)), "D", fisher=negative)
    with pytest.raises(ArgumentError, match="negative"):
        train(model, optimizer, range(1))
    with pytest.raises(ArgumentError, match="param_group"):
        optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.ones(1)))]})


def test_fisher_is_the_mean_square_of_the_gradients() -> None:
    model = Small()
    model.train()
    model.layer.weight.grad = torch.full_like(model.layer.weight, 7.0)
    before, kept = values(model), model.layer.weight.grad
    fisher = fisher_information(model, range(3), loss)
    assert model.training
    assert model.layer.weight.grad is kept
    assert same_bits(values(model), before)
    oracle = {name: torch.zeros_like(p) for name, p in trainable(model)}
    for step in range(3):
        model.zero_grad()
        loss(model, step).backward()
        for name, p in trainable(model):
            if p.grad is not None:
                oracle[name] += p.grad**2 / 3
    assert fisher.keys() == oracle.keys()
    for name, value in oracle.items():
        torch.testing.assert_close(fisher[name], value)
    assert (fisher["unused"] == 0).all()


def test_fisher_draws_nothing_and_refuses_nothing_to_measure() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    state = torch.get_rng_state()
    batches = [torch.ones(1, 3)]
    fisher_information(model, batches, lambda model, x: model(x).sum())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(DataError, match="empty"):
        fisher_information(model, [], lambda model, x: model(x).sum())
    with pytest.raises(DataError, match="not finite"):
        fisher_information(model, batches, lambda model, x: model(x).sum() * float("inf"))
