"""The trap of self-rehearsal on the tiny world: greedy answers to chat prompts anchor the old style."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

import paretune as pt
from paretune.demo import words
from paretune.demo.measure import measure
from paretune.demo.pretrain import Phase, Recipe, default_cache, load_model, prepare
from paretune.demo.world import World


@pytest.mark.slow
def test_the_guard_keeps_chat_out_and_leaking_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Chat alone is learnt in a fraction of the base's time.
    recipe = Recipe(World(chat_share=0.8), base=Phase(steps=500, rows=12, lr=2e-3), sft=Phase(200, 20, 1e-3))
    world, tokenizer = recipe.world, words.build_tokenizer()
    _, path = prepare(recipe, default_cache())
    reference = load_model(path)
    preferences = sorted({pair.prompt for pair in world.preferences})
    exercises = [turns[0]["content"] for turns, _ in zip(world.dialogues("prompts"), range(600), strict=False)]
    leaks = pt.Leakage(preferences)
    assert all(leaks(prompt) for prompt in preferences)
    guarded = [prompt for prompt in dict.fromkeys([*preferences, *exercises]) if not leaks(prompt)]
    rewards, warned = {}, {}
    for name, prompts in (("leaking", preferences), ("guarded", guarded)):
        rows = pt.self_answers(reference, tokenizer, prompts, max_new_tokens=24, batch_size=256, progress=False)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "paretune.training"):
            model = trained(path, rows, world, tmp_path / name)
        warned[name] = sum("the preferences stall" in record.getMessage() for record in caplog.records)
        found = measure(model, world)
        rewards[name] = sum(found.rewards) / len(found.rewards)
    assert rewards["guarded"] > rewards["leaking"] + 0.05, rewards
    assert warned == {"leaking": 1, "guarded": 0}


def trained(path: Path, rows: Any, world: World, out: Path) -> Any:
    """ALRIGHT at one half, with the demo's settings."""
    said = [
        {
            name: [{"role": "user" if name == "prompt" else "assistant", "content": getattr(pair, name)}]
            for name in ("prompt", "chosen", "rejected")
        }
        for pair in world.preferences
    ]
    preferences = pt.DPO(said, batch_size=16, cache_dir=out)
    arguments = TrainingArguments(
        str(out), max_steps=160, learning_rate=1e-4, lr_scheduler_type="cosine", adam_beta2=0.99, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = pt.JointTrainer(
        load_model(path),
        arguments,
        objectives={"rehearsal": pt.Distill(rows, batch_size=32, cache_dir=out), "dpo": preferences},
        schedule=pt.Alright(),
        processing_class=words.build_tokenizer(),
        callbacks=[pt.StallWarning(preferences)],
    )
    trainer.train()
    return trainer.model.eval()  # type: ignore[union-attr]
