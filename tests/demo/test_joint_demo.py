"""The demo's joint loop is `pt.JointTrainer` on the same rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import paretune as pt
from paretune.demo import joint, words
from paretune.demo.align import DPOSettings, PairTensors
from paretune.demo.pretrain import Shape, build_model
from paretune.demo.rehearse import encode
from paretune.demo.world import World, as_messages

SETTINGS = DPOSettings(lr=1e-3, steps=8, batch=4, seed=3)
SCHEDULES: dict[str, Any] = {
    "mix": lambda: pt.Mix({"sft": 0.3, "dpo": 0.7}),
    "alright": lambda: pt.Alright({"sft": 0.5, "dpo": 0.5}),
    "maxright": lambda: pt.MaxRight({"sft": 0.1, "dpo": 0.9}, refresh_every=3),
    "sequential": lambda: pt.Sequential(["dpo", "sft"], [0.5, 0.5]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_the_trainer(name: str, tmp_path: Path) -> None:
    world = World(pairs=10)
    chats = [turns for _, turns in zip(range(9), world.dialogues("joint"), strict=False)]
    model = build_model(Shape(hidden=32, layers=2, heads=2, intermediate=32), seed=0)
    ours = copy.deepcopy(model)
    dialogues = encode([(turns[0]["content"], turns[1]["content"]) for turns in chats])
    pairs = PairTensors.encode(world.preferences).with_reference(model)
    losses = list(joint.train(model, dialogues, pairs, SCHEDULES[name](), SETTINGS))

    rows = [
        {"prompt": turns[:1], "chosen": turns[1:], "rejected": as_messages(pair.prompt, pair.rejected)[1:]}
        for pair in world.preferences
        for turns in [as_messages(pair.prompt, pair.chosen)]
    ]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=SETTINGS.steps, learning_rate=SETTINGS.lr, per_device_train_batch_size=SETTINGS.batch,
        seed=SETTINGS.seed, lr_scheduler_type="cosine", adam_beta2=SETTINGS.betas[1], use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    objectives = {
        "sft": pt.SFT([{"messages": turns} for turns in chats]), "dpo": pt.DPO(rows, cache_dir=tmp_path),
    }  # fmt: skip
    trainer = pt.JointTrainer(
        ours, arguments, objectives=objectives, schedule=SCHEDULES[name](), processing_class=words.build_tokenizer()
    )
    trainer.train()
    for step, wanted in zip(trainer.steps, losses, strict=True):
        assert {key: step["loss"][key] for key in wanted} == pytest.approx(wanted, rel=2e-5)
    for one, other in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
