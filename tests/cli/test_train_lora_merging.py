"""``paretune train … --use_peft --optimizer ondare``, resumed, and exported: against weights put together by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from torch import Tensor

from paretune.cli.main import main

pytest.importorskip("peft")
LORA = ["--use_peft", "--lora_target_modules", "q_proj", "down_proj", "--lora_r", "4", "--lora_alpha", "8"]
PULL = 0.4


def line(world: Path, output: Path, trainer: str = "dpo", *more: Any) -> list[str]:
    own = [*LORA, "--optimizer", "ondare", "--base_model", world / "base", "--pull", PULL, *more]
    if trainer != "joint":
        return tiny_models.arguments(world, trainer, output, *own)
    given = ["train", "joint", "--model_name_or_path", world / "reference", "--sft_dataset", world / "sft.jsonl"]
    given += ["--preference_dataset", world / "dpo.jsonl", "--schedule", "mix", "--output_dir", output]
    given += ["--max_steps", 4, "--learning_rate", 1e-2, "--per_device_train_batch_size", 2, "--save_strategy", "no"]
    return [str(value) for value in [*given, "--disable_tqdm", "true", *own]]


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def by_hand(world: Path, adapter: Path, share: float) -> dict[str, Tensor]:
    """W + (alpha/r)·B·A + c·(W − W_base) where there is an adapter, the reference elsewhere."""
    base, policy = weights(world / "base"), {k: v.double() for k, v in weights(world / "reference").items()}
    factors = {
        k.removeprefix("base_model.model."): v.double()
        for k, v in load_file(adapter / "adapter_model.safetensors").items()
    }
    for key in (key for key in factors if key.endswith(".lora_A.weight")):
        name = key.removesuffix(".lora_A.weight")
        tau = policy[f"{name}.weight"] - base[f"{name}.weight"].double()
        update = 2.0 * factors[f"{name}.lora_B.weight"] @ factors[key]
        policy[f"{name}.weight"] = policy[f"{name}.weight"] + update + share * tau
    return policy


def gate_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "tau_gate.json").read_text())


def test_trained_resumed_exported(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--tau_rank", "0", "--save_strategy", "steps", "--save_steps", "2", "--lr_scheduler_type", "constant"]
    assert main(line(world, tmp_path / "whole", "dpo", *more, "--json")) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["optimizer"]["name"] == "ondare (gate) + lora"
    assert "pull 0.4 of τ over 4 steps" in record["optimizer"]["statement"]
    assert gate_of(tmp_path / "whole")["gate"] == pytest.approx(PULL)
    assert gate_of(tmp_path / "whole" / "checkpoint-2")["gate"] == pytest.approx(PULL / 2)

    checkpoint = ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-2")]
    assert main(line(world, tmp_path / "parts", "dpo", *more, *checkpoint)) == 0
    for name in ("adapter_model.safetensors", "tau_gate.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    assert main(["export-adapter", str(tmp_path / "whole"), "-o", str(tmp_path / "out"), "--json"]) == 0
    want = by_hand(world, tmp_path / "whole", PULL)
    for name, tensor in weights(tmp_path / "out").items():
        assert (tensor.double() - want[name]).abs().max() < 1e-6, name
    both = ["--model", f"{world / 'reference'}+{tmp_path / 'whole'}", "-o", str(tmp_path / "merged")]
    capsys.readouterr()
    assert main(["merge", "linear", *both]) == 2  # the adapter alone is another model
    assert "export-adapter" in capsys.readouterr().err
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)


@pytest.mark.parametrize("trainer", ["sft", "kto", "grpo", "joint"])
def test_other_trainers(trainer: str, world: Path, tmp_path: Path) -> None:
    assert main(line(world, tmp_path / "out", trainer)) == 0
    assert gate_of(tmp_path / "out")["gate"] == pytest.approx(PULL)
    assert gate_of(tmp_path / "out")["rank"] == 16


def test_absorbed(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absorb = ["--lora_merging", "absorb"]
    assert main(line(world, tmp_path / "dpo", "dpo", *absorb, "--precompute_ref_log_probs", "true")) == 0
    assert main(["export-adapter", str(tmp_path / "dpo"), "-o", str(tmp_path / "out")]) == 0
    want = by_hand(world, tmp_path / "dpo", PULL)
    for name, tensor in weights(tmp_path / "out").items():
        assert (tensor.double() - want[name]).abs().max() < 1e-6, name
    assert main(line(world, tmp_path / "sft", "sft", *absorb, "--density", "0.5")) == 0
    capsys.readouterr()
    assert main(["export-adapter", str(tmp_path / "sft"), "-o", str(tmp_path / "no")]) == 2
    assert "random parts" in capsys.readouterr().err
    assert main(["export-adapter", str(tmp_path / "sft"), "-o", str(tmp_path / "mean"), "--gate", str(PULL)]) == 0


@pytest.mark.parametrize("mode", ["gate", "absorb"])
def test_dry_run(mode: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = line(world, tmp_path / "out", "sft", "--lora_merging", mode, "--dry-run", "--json", "--dtype", "bfloat16")
    assert main(given) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["optimizer"] == f"ondare ({mode}) + lora"
    assert plan["statement"].startswith("LoRAMerging: pull 0.4 of τ over 4 steps")
    # per layer: q_proj 32 x 32, down_proj 32 x 64; adapters of rank 4, τ of rank 16
    assert plan["trained"] == 2 * 4 * (64 + 96)
    held = plan["bytes_per_parameter"]
    assert held.get("tau", 0) == (16 if mode == "gate" else 0)
    assert held.get("master", 0) == (0 if mode == "gate" else 2 * (32 * 32 + 32 * 64) / (4 * (64 + 96)))
    assert not (tmp_path / "out").exists()


REFUSED = {
    "optimizer='onties'": ["--optimizer", "onties"],
    "every=2": ["--every", "2"],
    "rescale='l1'": ["--rescale", "l1"],
    "ema_decay=0.1": ["--ema_decay", "0.1"],
    "tau_rank=-1": ["--tau_rank", "-1"],
    "tau_rank=4": ["--tau_rank", "4", "--lora_merging", "absorb"],
    "reference_model=": ["--reference_model", "elsewhere"],
    "lora_merging='absorb': it would move": ["--lora_merging", "absorb"],
    "use_dora=True": ["--use_dora"],
    "base_model=None": ["--base_model", ""],
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line(world, tmp_path / "out", "dpo", *REFUSED[message])) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [["--optimizer", "adamw", *LORA], ["--optimizer", "adamw"]])
def test_read_by_nothing(more: list[str], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny_models.arguments(world, "dpo", tmp_path / "out", *more, "--lora_merging", "gate")) == 2
    assert "lora_merging='gate': it needs --use_peft and --optimizer ondare" in capsys.readouterr().err
