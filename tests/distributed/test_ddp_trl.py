"""A TRL trainer on two processes (accelerate's DDP, gloo) trains what one process trains."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import spawn
from tiny_models import rows

import paretune as pt


def optimize(kind: str, tau: pt.TaskVector) -> Any:
    options: dict[str, Any] = {"density": 0.2, "pull": 0.2, "every": 2 if kind == "step-k" else 1}
    return lambda groups, total_steps: (pt.OnDARE if kind == "OnDARE" else pt.OnTIES)(
        groups, tau, total_steps=total_steps, **options
    )


def train(world: Path, output: Path, kind: str, batch: int) -> dict[str, torch.Tensor]:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    logging.getLogger("paretune").setLevel(logging.WARNING)
    arguments = DPOConfig(
        output_dir=str(output), max_steps=4, per_device_train_batch_size=batch, gradient_accumulation_steps=2,
        learning_rate=1e-3, adam_epsilon=1e-2, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        activation_checkpointing=False, save_strategy="no", max_grad_norm=0.5, logging_strategy="no",
    )  # fmt: skip
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(world / "reference", dtype=torch.float32), args=arguments,
        train_dataset=datasets.Dataset.from_list(rows("dpo", 32)),
        processing_class=AutoTokenizer.from_pretrained(world / "reference"),
    )  # fmt: skip
    tau = pt.TaskVector.between(base=world / "base", reference=world / "reference")
    pt.attach(trainer, optimize(kind, tau))
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}


def rank(index: int, world: Path, folder: Path) -> None:
    for kind in ("OnDARE", "OnTIES", "step-k"):
        torch.save(train(world, folder / f"{kind} {index}", kind, 2), folder / f"{kind} {index}.pt")


@pytest.mark.slow
def test_two_processes_train_what_one_trains(world: Path, tmp_path: Path) -> None:
    spawn(rank, 2, world, tmp_path)
    for kind in ("OnDARE", "OnTIES", "step-k"):
        one = train(world, tmp_path / f"{kind} alone", kind, 4)
        first, second = (torch.load(tmp_path / f"{kind} {index}.pt", weights_only=True) for index in range(2))
        for name, p in one.items():
            assert torch.equal(first[name], second[name]), f"{kind} {name}: the ranks agree to the bit"
            torch.testing.assert_close(first[name], p, rtol=0, atol=2e-6)
