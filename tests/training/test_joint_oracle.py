"""`pt.JointTrainer` is the hand-written loop: every loss, every choice, every weight, to 3e-7."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import joint_loop
import numpy as np
import pytest
import tiny_models
import torch
import transformers

import paretune as pt
from paretune.training.draws import Draws

SCHEDULES = ("mix", "alright", "maxright", "sft-then-preference", "preference-then-sft")
KINDS = ("dpo", "ipo", "kto")
STEPS, BETA, LR, SEED = 20, 0.3, 3e-3, 5
ROWS = {"sft": 5, "dpo": 7, "ipo": 7, "kto": 9}
TOLERANCE = 3e-7  # Llama normalises in float32 whatever its weights are
SIZES = {"sft": 2, "dpo": 1, "ipo": 1, "kto": 3}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))


def schedule_of(name: str, kind: str, weights: dict[str, float], ideal: dict[str, float]) -> Any:
    key = "kto" if kind == "kto" else "dpo"
    named = {"sft": weights["sft"], key: weights[kind]}
    if name == "maxright":
        return pt.MaxRight(named, {"sft": ideal["sft"], key: ideal[kind]}, refresh_every=3)
    if name in ("mix", "alright"):
        return {"mix": pt.Mix, "alright": pt.Alright}[name](named)
    order = ["sft", key] if name.startswith("sft") else [key, "sft"]
    return pt.Sequential(order, shares=[0.5, 0.5])


def partners(count: int) -> list[int]:
    order = np.random.default_rng(0).permutation(count)
    found = [0] * count
    for place, row in enumerate(order):
        found[row] = int(order[(place + 1) % count])
    return found


CASES = list(itertools.product(SCHEDULES, KINDS, (1, 4)))
QUICK = {("mix", "dpo", 4), ("alright", "ipo", 1), ("maxright", "kto", 4), ("maxright", "dpo", 1)}
QUICK |= {("sft-then-preference", "dpo", 1), ("preference-then-sft", "kto", 1)}


@pytest.mark.parametrize(
    ("schedule", "kind", "micro"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_equals_the_loop(schedule: str, kind: str, micro: int, tmp_path: Path) -> None:
    model, tokenizer = tiny_models.make_model(seed=3, hidden=16, layers=1).double(), tiny_models.make_tokenizer()
    reference, ours = copy.deepcopy(model), copy.deepcopy(model)
    key = "kto" if kind == "kto" else "dpo"
    rows = {"sft": tiny_models.rows("sft", ROWS["sft"], 1), kind: tiny_models.rows(key, ROWS[kind], 2)}
    data = {name: joint_loop.tokenise(tokenizer, rows[name], name if name == "sft" else key) for name in rows}
    if kind == "kto":
        for row, partner in zip(data["kto"], partners(ROWS["kto"]), strict=True):
            answer = data["kto"][partner]
            together = row["ids"][0][: row["start"]] + answer["ids"][0][answer["start"] :]
            row["other"] = {"start": row["start"], "ids": [together]}
    weights, ideal = {"sft": 0.25, kind: 0.75}, {"sft": 2.0, kind: 0.1}
    draws = {name: Draws(key if name == kind else name, ROWS[name], SIZES[name], SEED) for name in rows}
    wanted = joint_loop.train(
        model, reference, data, schedule.replace("preference", kind), weights, order=lambda n, k: draws[n].at(k),
        steps=STEPS, micro=micro, lr=LR, seed=SEED, beta=BETA, ideal=ideal,
    )  # fmt: skip

    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=STEPS, learning_rate=LR, gradient_accumulation_steps=micro, seed=SEED, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    preference: Any = pt.KTO(rows[kind], beta=BETA, batch_size=SIZES[kind]) if kind == "kto" else None
    if preference is None:
        loss_type = "ipo" if kind == "ipo" else "sigmoid"
        preference = pt.DPO(rows[kind], beta=BETA, loss_type=loss_type, batch_size=SIZES[kind])
    trainer = pt.JointTrainer(
        ours, arguments, objectives={"sft": pt.SFT(rows["sft"], batch_size=SIZES["sft"]), key: preference},
        schedule=schedule_of(schedule, kind, weights, ideal), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()

    renamed = [{k: _rename(v, kind, key) for k, v in record.items()} for record in wanted]
    assert [r["objective"] for r in trainer.steps] == [r["objective"] for r in renamed]
    for got, want in zip(trainer.steps, renamed, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=TOLERANCE)
        assert got["stale"] == pytest.approx(want["stale"], rel=TOLERANCE)
    for (name, one), (_, other) in zip(ours.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * TOLERANCE, msg=name)


def _rename(value: Any, kind: str, key: str) -> Any:
    if isinstance(value, dict):
        return {key if name == kind else name: inner for name, inner in value.items()}
    return key if value == kind else value
