"""The Fisher gate against brute force: per-sequence gradients, a naive gate, its ends, its file, its refusal."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WORDS
from torch import nn

import paretune as pt
from paretune.averaging.fisher import squared_gradients
from paretune.averaging.fisher_gate import Gate, between

VOCABULARY = len(WORDS) + 5


def llama(tied: bool = False, seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=tied, initializer_range=0.3, attention_dropout=0.1,
        )
    )  # fmt: skip


def lora(seed: int = 0) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(seed=seed), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return model


def sequences(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        n, start = rng.randint(4, 9), rng.randint(1, 3)
        ids = [rng.randrange(VOCABULARY) for _ in range(n)]
        made.append({"input_ids": ids, "completion_mask": [0] * start + [1] * (n - start)})
    return made


def brute_force(model: nn.Module, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Mean squared gradient, one sequence and one autograd call at a time, in float64."""
    model = model.eval().double()
    named = dict(model.named_parameters())
    for p in named.values():
        p.requires_grad_(True)
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        logps = model(ids[None]).logits[0].log_softmax(-1)
        said = sum(logps[t - 1, ids[t]] for t in range(1, len(ids)) if row["completion_mask"][t])
        for name, gradient in zip(named, torch.autograd.grad(said, list(named.values())), strict=True):
            total[name] += gradient.detach() ** 2
    return {name: value / len(rows) for name, value in total.items()}


@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True), lora], ids=["untied", "tied", "lora"])
@pytest.mark.parametrize("entries", [True, False])
def test_fisher_equals_brute_force(make: Any, entries: bool, tmp_path: Path) -> None:
    rows = sequences(5)
    model = make().train()
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    found = squared_gradients(model, rows, "samples", entries=entries, scratch=tmp_path if entries else None)
    assert found.count == 5
    assert list(tmp_path.iterdir()) == []
    expected = brute_force(make(), rows)
    assert set(found.sums) == set(expected)
    for name, value in expected.items():
        want = value if entries else value.sum()
        scale = float(want.abs().max())
        assert torch.allclose(found.sums[name].double(), want, rtol=1e-5, atol=1e-5 * scale), name
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == frozen
    assert all(p.grad is None for p in model.parameters())


def gate(weight: float, mode: str = "entries", **options: Any) -> Gate:
    return pt.fisher_gate(
        None, llama(), sequences(4), sequences(6, seed=1), weight, mode=mode, override=True, **options
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["entries", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends_are_exact(mode: str, dtype: torch.dtype) -> None:
    reference = {name: p.detach().to(dtype) for name, p in llama().named_parameters()}
    policy = {name: p.detach().to(dtype) for name, p in llama(seed=9).named_parameters()}
    for weight, end in ((0.0, policy), (float("inf"), reference)):
        merged = gate(weight, mode).merged(reference, policy)
        assert all(torch.equal(merged[name], tensor) for name, tensor in end.items())
    merged = gate(1.0, mode).merged(reference, policy, scale=0.0)
    assert all(torch.equal(merged[name], tensor) for name, tensor in reference.items())


@pytest.mark.parametrize("weight", [0.3, 3.0])
def test_gate_equals_the_naive_one(weight: float, tmp_path: Path) -> None:
    wanted, kept = brute_force(llama(), sequences(4)), brute_force(llama(), sequences(6, seed=1))
    by_entry, by_tensor = gate(weight, scratch=tmp_path), gate(weight, "tensors")
    assert (by_entry.mode, by_tensor.mode) == ("entries", "tensors")
    total = [sum(float(v.sum()) for v in each.values()) for each in (wanted, kept)]
    assert by_entry.ratio == pytest.approx(total[1] / total[0], rel=1e-5)
    for name in wanted:
        naive = wanted[name] / (wanted[name] + weight * kept[name])
        naive[(wanted[name] == 0) & (kept[name] == 0)] = 1 / (1 + weight)  # rows of tokens that never occur
        assert torch.allclose(by_entry.factors[name].double(), naive, atol=1e-5)
        scalar = wanted[name].sum() / (wanted[name].sum() + weight * kept[name].sum())
        assert float(by_tensor.factors[name]) == pytest.approx(float(scalar), rel=1e-5)
    reference, policy = dict(llama().named_parameters()), dict(llama(seed=9).named_parameters())
    merged = by_entry.merged(reference, policy, scale=2.5)
    for name, factor in by_entry.factors.items():
        change = policy[name].double() - reference[name].double()
        assert torch.allclose(merged[name].double(), reference[name] + 2.5 * factor * change, atol=1e-6)


def test_saved_and_loaded(tmp_path: Path) -> None:
    made = gate(2.0)
    made.save(tmp_path / "gate.safetensors")
    again = pt.Gate.load(tmp_path / "gate.safetensors")
    assert (again.weight, again.ratio, again.about) == (made.weight, made.ratio, made.about)
    assert all(torch.equal(again.factors[name], factor) for name, factor in made.factors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["gate.safetensors"]


def test_another_file_is_no_gate(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(pt.CheckpointError, match="not a gate"):
        pt.Gate.load(tmp_path / "model.safetensors")


def test_learning_rates_have_mean_one() -> None:
    for mode in ("entries", "tensors"):
        made = gate(1.0, mode)
        rates, sizes = made.learning_rates(), made.about["numel"]
        total = sum(float(rate.sum()) * (sizes[name] if rate.ndim == 0 else 1) for name, rate in rates.items())
        assert total / sum(sizes.values()) == pytest.approx(1, rel=1e-4)


def test_a_small_ratio_is_refused() -> None:
    rows = sequences(3)
    with pytest.raises(pt.ArgumentError, match="self-rehearsal"):
        pt.fisher_gate(None, llama(), rows, rows)
    assert pt.fisher_gate(None, llama(), rows, rows, override=True).ratio == pytest.approx(1)
    assert not pt.fisher_gate(None, llama(), rows, rows, override=True).trusted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": -1.0}, "weight=-1.0"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"mode": "rows"}, "mode='rows'"),
        ({"preferences": []}, "preferences is empty"),
        ({"samples": []}, "samples is empty"),
        ({"samples": [{"input_ids": [1, 2], "completion_mask": [1, 0]}]}, "marks no token"),
        ({"samples": [{"input_ids": [1, 2], "completion_mask": [1]}]}, "2 input_ids but 1"),
        ({"policy": {"w": torch.ones(2)}}, "lacks parameters"),
        ({"policy": {"lm_head.weight": torch.ones(2)}}, "differ in shape"),
        ({"policy": 3}, "policy=3"),
        ({"scratch": "/nowhere/at/all"}, "scratch="),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    given = {"policy": None, "preferences": sequences(1), "samples": sequences(1), "weight": 1.0} | change
    with pytest.raises(pt.PareTuneError, match=message):
        pt.fisher_gate(reference=llama(), **given)


def test_non_finite_gradients_are_named() -> None:
    model = llama()
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(pt.DataError, match="not finite"):
        pt.fisher_gate(None, model, sequences(1), sequences(1))


def test_unequal_models_do_not_merge() -> None:
    made = gate(1.0)
    with pytest.raises(pt.MismatchError, match="no tensor of shape"):
        made.merged({"model.norm.weight": torch.ones(3)}, {"model.norm.weight": torch.ones(8)})
    with pytest.raises(pt.MismatchError, match="no factor"):
        made.merged({"w": torch.ones(3)}, {"w": torch.ones(3)})
    with pytest.raises(pt.ArgumentError, match="scale=nan"):
        made.merged({}, {}, scale=float("nan"))


def test_between_is_monotone_near_the_middle() -> None:
    low, high = torch.tensor([1e-3]), torch.tensor([1e3])
    shares = torch.linspace(0, 1, 101)
    values = torch.cat([between(low, high, share) for share in shares])
    assert bool((values[1:] > values[:-1]).all())
