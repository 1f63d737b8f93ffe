"""A TRL trainer under DeepSpeed, run by test_zero.py: ``python zero_trainer.py WORLD FOLDER``.

accelerate takes no DeepSpeed to the CPU: it believes that it is alone. Here it is told how many ranks there are; what
it then does is its own code.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import spawn
from tiny_models import arguments, rows

import paretune as pt


def trained(world: Path, output: Path, batch: int, stage: int = 0, resume: Path | None = None) -> dict[str, Any]:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    logging.getLogger("paretune").setLevel(logging.WARNING)
    zero = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    settings = DPOConfig(
        output_dir=str(output), max_steps=4, per_device_train_batch_size=batch, gradient_accumulation_steps=2,
        learning_rate=1e-3, adam_epsilon=1e-2, report_to=[], use_cpu=not stage, bf16=False, disable_tqdm=True,
        activation_checkpointing=False, save_steps=2, max_grad_norm=0.5, logging_strategy="no",
        deepspeed=zero if stage else None,
    )  # fmt: skip
    if stage:
        state = settings.distributed_state
        state.num_processes, state.process_index = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        state.local_process_index, state.backend = state.process_index, "gloo"
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(world / "reference", dtype=torch.float32), args=settings,
        train_dataset=datasets.Dataset.from_list(rows("dpo", 32)),
        processing_class=AutoTokenizer.from_pretrained(world / "reference"),
    )  # fmt: skip
    tau = pt.TaskVector.between(base=world / "base", reference=world / "reference")
    pt.attach(
        trainer,
        lambda groups, total_steps: pt.OnDARE(groups, tau, total_steps=total_steps, density=0.2, pull=0.2),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert (type(trainer.model_wrapped).__name__ == "DeepSpeedEngine") == bool(stage)
    return {name: p.detach().clone() for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}


def refuse(world: Path, folder: Path) -> None:
    """On the command line before anything is loaded."""
    from paretune.cli.main import main

    (folder / "zero.json").write_text('{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}')
    line = arguments(world, "dpo", folder / "refused", "--deepspeed", folder / "zero.json", "--bf16", "false")
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main([*line, "--use_cpu", "false", "--base_model", str(world / "base"), "--optimizer", "onties"]) == 2
    assert "only --optimizer ondare works" in said.getvalue(), said.getvalue()


def rank(index: int, world: Path, folder: Path) -> None:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    for stage in (1, 2):
        torch.save(trained(world, folder / f"{stage}", 2, stage), folder / f"{stage} {index}.pt")
    refuse(world, folder)
    resumed = trained(world, folder / "resumed", 2, 2, folder / "2" / "checkpoint-2")
    whole = torch.load(folder / f"2 {index}.pt", weights_only=True)
    for name, p in resumed.items():
        assert torch.equal(p, whole[name]), f"resumed: {name}"


if __name__ == "__main__":
    os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")
    given, results = Path(sys.argv[1]), Path(sys.argv[2])
    spawn(rank, 2, given, results)
    one = trained(given, results / "alone", 4)
    for stage in (1, 2):
        first, second = (torch.load(results / f"{stage} {index}.pt", weights_only=True) for index in range(2))
        for name, p in one.items():
            assert torch.equal(first[name], second[name]), f"{stage} {name}: the ranks agree to the bit"
            torch.testing.assert_close(first[name], p, rtol=0, atol=2e-6)
