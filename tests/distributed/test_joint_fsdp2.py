"""Joint training on FSDP2: the losses and parameters of one process, and the same again after an interruption."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from fsdp2_on_cpu import shard_on_the_cpu, whole
from ranks import spawn

import paretune as pt

STEPS = 4
SCHEDULES: dict[str, tuple[str, Any]] = {
    "mix": ("dpo", lambda: pt.Mix({"sft": 0.3, "dpo": 0.7})),
    "alright": ("dpo", lambda: pt.Alright({"sft": 0.5, "dpo": 0.5})),
    "maxright": ("kto", lambda: pt.MaxRight({"sft": 0.3, "kto": 0.7}, refresh_every=2)),
    "sequential": ("dpo", lambda: pt.Sequential(["dpo", "sft"], [0.5, 0.5])),
}


def joint(folder: Path, schedule: str, micro: int, size: int, sharded: bool) -> Any:
    preference, make = SCHEDULES[schedule]
    kind = {"dpo": pt.DPO, "kto": pt.KTO}[preference]
    model = tiny_models.make_model().double()  # in float32 Adam makes whole steps of rounding errors
    base = {name: p.detach() * 0.9 for name, p in model.named_parameters()}
    tau = pt.TaskVector.between(base=base, reference={name: p.detach().clone() for name, p in model.named_parameters()})
    trainer = pt.JointTrainer(
        model,
        transformers.TrainingArguments(
            str(folder), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=STEPS, learning_rate=1e-3,
            logging_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=micro, save_steps=2,
            eval_strategy="steps", eval_steps=2, max_grad_norm=0.5, save_strategy="steps" if sharded else "no",
        ),
        objectives={
            "sft": pt.SFT(tiny_models.rows("sft", 7, 1), eval_dataset=tiny_models.rows("sft", 3)),
            preference: kind(tiny_models.rows(preference, 9, 2)),
        },
        schedule=make(), processing_class=tiny_models.make_tokenizer(),
        optimizer=(lambda groups: pt.OnDARE(groups, tau, density=0.2, weight=0.1)) if schedule == "mix" else None,
    )  # fmt: skip
    return trainer


def rank(index: int, folder: Path, cases: list[tuple[str, int]]) -> None:
    shard_on_the_cpu()
    logging.getLogger("paretune").setLevel(logging.WARNING)
    for schedule, micro in cases:
        trainer = joint(folder / schedule, schedule, micro, 2, True)
        trainer.train()
        found = whole(trainer.model)
        evaluated = [entry["eval_sft_loss"] for entry in trainer.state.log_history if "eval_sft_loss" in entry]
        resumed = joint(folder / f"{schedule} resumed", schedule, micro, 2, True)
        resumed.train(resume_from_checkpoint=str(folder / schedule / "checkpoint-2"))
        assert resumed.steps == trainer.steps
        for name, p in whole(resumed.model).items():
            assert torch.equal(p, found[name]), f"{schedule}, resumed: {name}"
        if index == 0:
            torch.save({"steps": trainer.steps, "weights": found, "eval": evaluated}, folder / f"{schedule}.pt")


def refuses(index: int, folder: Path) -> None:
    shard_on_the_cpu(cpu_ram_efficient_loading=True)  # only the first rank loads weights
    with pytest.raises(pt.ArgumentError, match=r"fsdp_cpu_ram_efficient_loading=True.*set it to false"):
        joint(folder, "mix", 1, 2, True)


CASES = [("mix", 2), ("alright", 1), ("maxright", 2), ("sequential", 1)]


@pytest.mark.slow
def test_two_ranks_train_what_one_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "references"))
    spawn(refuses, 2, tmp_path)
    spawn(rank, 2, tmp_path, CASES)
    for schedule, micro in CASES:
        alone = joint(tmp_path / "alone", schedule, micro, 4, False)
        alone.train()
        together = torch.load(tmp_path / f"{schedule}.pt", weights_only=True)
        for one, other in zip(alone.steps, together["steps"], strict=True):
            assert one["objective"] == other["objective"]
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
            assert one["stale"] == pytest.approx(other["stale"], abs=1e-5)
        evaluated = [entry["eval_sft_loss"] for entry in alone.state.log_history if "eval_sft_loss" in entry]
        assert evaluated == pytest.approx(together["eval"], abs=1e-5)
        for name, p in alone.model.named_parameters():
            torch.testing.assert_close(
                p.detach(), together["weights"][name], rtol=0, atol=1e-5, msg=f"{schedule} {name}"
            )
