"""The gate as learning rates: `paretune average fisher --as-learning-rates`, then `paretune train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import arguments

import paretune as pt
from paretune.averaging.fisher_gate import Gate
from paretune.cli.main import main


@pytest.fixture(scope="module")
def rates(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files made of the reference and its preferences alone, by mode."""
    folder = tmp_path_factory.mktemp("rates")
    for mode in ("entries", "tensors"):
        assert made(world, folder / f"{mode}.safetensors", "--mode", mode) == 0
    return {mode: folder / f"{mode}.safetensors" for mode in ("entries", "tensors")}


def made(world: Path, out: Path, *more: str) -> int:
    return main(
        ["average", "fisher", "--pre", str(world / "reference"), "--preferences", str(world / "dpo.jsonl"), "-o",
         str(out), "--as-learning-rates", "--samples", "4", "--max-tokens", "8", "--override", "--quiet", *more]
    )  # fmt: skip


def train(world: Path, output: Path, *more: object) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    assert main(arguments(world, "dpo", output, *more)) == 0
    return json.loads((output / "training.json").read_text()), load_file(output / "model.safetensors")


@pytest.mark.parametrize("mode", ["entries", "tensors"])
def test_the_file(mode: str, world: Path, rates: dict[str, Path]) -> None:
    factors, weights = load_file(rates[mode]), load_file(world / "reference" / "model.safetensors")
    assert factors.keys() == weights.keys()
    sizes = {name: weights[name].numel() for name in factors}
    for name, factor in factors.items():
        assert factor.shape == (weights[name].shape if mode == "entries" else ())
        assert float(factor.min()) >= 0
    total = sum(float(f.sum()) * (sizes[name] if f.ndim == 0 else 1) for name, f in factors.items())
    assert total / sum(sizes.values()) == pytest.approx(1, rel=1e-4)


def test_of_a_ready_gate(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Gate({"w": torch.tensor([0.2, 0.6])}, 1.0, 9.0, {"numel": {"w": 2}}).save(tmp_path / "gate.safetensors")
    out = tmp_path / "rates.safetensors"
    assert made(world, out, "--gate", str(tmp_path / "gate.safetensors"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["learning_rates"] == str(out)
    assert torch.allclose(load_file(out)["w"], torch.tensor([0.5, 1.5]))


def test_training_moves_by_the_factors(world: Path, rates: dict[str, Path], tmp_path: Path) -> None:
    """All factors 1 is AdamW; a tensor of factor 0 stays; the gate's own factors give another model."""
    start = load_file(world / "reference" / "model.safetensors")
    ones = {name: torch.ones(()) for name in start}
    save_file(ones, tmp_path / "ones.safetensors")
    held = "model.layers.0.mlp.up_proj.weight"
    save_file({**ones, held: torch.zeros(())}, tmp_path / "held.safetensors")
    record, one = train(world, tmp_path / "one", "--learning_rate_factors", tmp_path / "ones.safetensors")
    assert record["optimizer"]["name"] == "adamw + learning rates"
    assert record["optimizer"]["statement"].startswith("AdamW with learning rates")
    _, plain = train(world, tmp_path / "plain", "--optimizer", "ondare", "--density", 1, "--weight", 0)
    assert all(torch.equal(one[name], tensor) for name, tensor in plain.items())
    _, still = train(world, tmp_path / "held", "--learning_rate_factors", tmp_path / "held.safetensors")
    assert [name for name in start if torch.equal(still[name], start[name])] == [held]
    _, gated = train(world, tmp_path / "gated", "--learning_rate_factors", rates["entries"], "--optimizer", "adamw")
    assert any(not torch.equal(gated[name], tensor) for name, tensor in plain.items())


def test_an_adapter_alone(world: Path) -> None:
    """A gate of a PEFT model, of which only the adapter is trained: the mean of its own factors is 1."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(world / "reference"), config)
    rows = [{"input_ids": [3, 6, 7, 8, 4, 9, 2], "completion_mask": [0, 0, 0, 0, 0, 1, 1]}]
    gate = pt.fisher_gate(None, model, rows, rows, override=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rates = gate.learning_rates(trained)
    assert rates.keys() == trained.keys()
    mean = sum(float(rate.sum()) for rate in rates.values()) / sum(p.numel() for p in trained.values())
    assert mean == pytest.approx(1, rel=1e-4)
    optimizer = pt.OnDARE(trained.items(), None, lr=1e-2, density=1.0, weight=0.0, learning_rates=rates)
    before = {name: p.detach().clone() for name, p in trained.items()}
    for p in trained.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in trained.items():
        assert torch.allclose(p, before[name] - 1e-2 * rates[name], atol=1e-6)


@pytest.mark.slow
def test_resumed_and_merged(world: Path, rates: dict[str, Path], tmp_path: Path) -> None:
    more = ["--optimizer", "onties", "--base_model", world / "base", "--density", 0.3, "--weight", 1e-3]
    more += ["--learning_rate_factors", rates["entries"], "--save_strategy", "steps", "--save_steps", 2]
    record, whole = train(world, tmp_path / "whole", *more)
    assert record["optimizer"]["name"] == "onties + learning rates"
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    _, resumed = train(world, tmp_path / "again", *more, "--resume_from_checkpoint", checkpoint)
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


def test_planned(world: Path, rates: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--learning_rate_factors", rates["entries"], "--dry-run", "--json"]
    assert main(arguments(world, "dpo", tmp_path / "out", *more)) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["optimizer"] == "adamw + learning rates"
    assert "one for each entry" in plan["statement"]
    assert plan["bytes_per_parameter"]["moments"] == 8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--learning_rate_factors", "{rates}", "--use_peft"], "drop --use_peft"),
        (["--learning_rate_factors", "{rates}", "--optim", "sgd"], "with --optimizer only"),
        (["--learning_rate_factors", "{world}/nowhere.safetensors"], "learning_rate_factors="),
        (["--learning_rate_factors", "{other}"], "no factors for"),
        (["--learning_rate_factors", "{gate}"], "is a gate"),
    ],
)
def test_refused_before_training(
    more: list[str], message: str, world: Path, rates: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    Gate({"w": torch.ones(2)}, 1.0, 9.0).save(tmp_path / "gate.safetensors")
    names = {"rates": rates["entries"], "world": world, "other": tmp_path / "other.safetensors"}
    given = [text.format(**names, gate=tmp_path / "gate.safetensors") for text in more]
    assert main(arguments(world, "dpo", tmp_path / "out", *given)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-o", "rates", "--as-learning-rates"], "--out"),
        (["-o", "rates.safetensors", "--as-learning-rates", "--gate-only"], "--gate-only"),
        (["-o", "gated"], "--post"),
    ],
)
def test_wrong_outputs(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["average", "fisher", "--pre", "x", "--preferences", "y", *arguments]) == 2
    assert f"{named}=" in capsys.readouterr().err


def test_refuses_itself_as_the_gate_does(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Gate({"w": torch.ones(2)}, 1.0, 0.9, {"numel": {"w": 2}}).save(tmp_path / "gate.safetensors")
    command = ["average", "fisher", "--pre", str(world / "reference"), "--as-learning-rates", "-o",
               str(tmp_path / "rates.safetensors"), "--gate", str(tmp_path / "gate.safetensors")]  # fmt: skip
    assert main(command) == 2
    assert "ΣF_s/ΣF_p is 0.90" in capsys.readouterr().err
    assert not (tmp_path / "rates.safetensors").exists()
