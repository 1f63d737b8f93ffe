"""With AdamW, ``paretune train dpo`` is TRL's DPOTrainer: every logged number and every bit of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from paretune.cli.main import main

# What a trainer logs about time, not about training.
_TIMES = ("runtime", "per_second", "seconds")


def numbers(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in entry.items() if not any(part in name for part in _TIMES)} for entry in history
    ]


@pytest.mark.parametrize("options", [{}, {"loss_type": ["ipo"], "beta": 0.3}], ids=["dpo", "ipo"])
@pytest.mark.parametrize("optimizer", ["adamw", None])
def test_dpo(optimizer: str | None, options: dict[str, Any], world: Path, tmp_path: Path) -> None:
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    shared = {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "per_device_train_batch_size": 2}
    shared |= {"gradient_accumulation_steps": 2, "warmup_steps": 1, "max_length": 32, "weight_decay": 0.1}
    config = DPOConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True, **shared, **options,
    )  # fmt: skip
    data = load_dataset("json", data_files=str(world / "dpo.jsonl"), split="train")
    plain = DPOTrainer(model=str(world / "reference"), args=config, train_dataset=data)
    plain.train()
    plain.save_model(str(tmp_path / "trl"))

    given = [text for name, value in (shared | options).items() for text in (f"--{name}", value)]
    given = [text[0] if isinstance(text, list) else text for text in given]
    more = ["--optimizer", optimizer] if optimizer else []
    assert main(tiny_models.arguments(world, "dpo", tmp_path / "ours", *given, *more)) == 0
    record = json.loads((tmp_path / "ours" / "training.json").read_text())
    assert numbers(record["history"]) == numbers(plain.state.log_history)
    theirs, ours = (load_file(tmp_path / part / "model.safetensors") for part in ("trl", "ours"))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
