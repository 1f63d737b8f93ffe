"""The warning that rehearsal holds the old style: what it looks at, and when it speaks."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import make_model, make_tokenizer, rows

import paretune as pt


def said(
    caplog: pytest.LogCaptureFixture, margins: Any, accuracy: float = 1.0, steps: int = 160, **options: Any
) -> list[int]:
    """The steps at which it warned; every second step is on preferences."""
    objective = pt.DPO([])
    watch = pt.StallWarning(objective, **options)
    generator = torch.Generator().manual_seed(0)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "paretune.training"):
        for step in range(1, steps + 1):
            if step % 2:
                mean = margins(step / steps)
                batch = mean + 0.3 * torch.randn(16, generator=generator)
                wrong = torch.arange(16) >= round(16 * accuracy)
                assert objective.watch is not None
                objective.watch(torch.where(wrong, -batch.abs(), batch)[:8])  # two micro-batches
                objective.watch(torch.where(wrong, -batch.abs(), batch)[8:])
            watch.on_step_end(None, SimpleNamespace(global_step=step, max_steps=steps), None)  # type: ignore[arg-type]
    return [int(record.getMessage().split()[1].rstrip(":")) for record in caplog.records]


def test_once_and_only_where_a_small_margin_stays_small(caplog: pytest.LogCaptureFixture) -> None:
    assert said(caplog, lambda share: min(0.8, 4 * share)) == [120]
    assert "hold the old style" in caplog.text
    assert said(caplog, lambda share: 3 * min(1.0, 2 * share)) == []
    assert said(caplog, lambda share: 1.3 * share) == [160]  # it rises, but the run ends
    assert said(caplog, lambda share: 2.6 * share) == []
    assert said(caplog, lambda share: 0.8, accuracy=0.75) == []  # noisy preferences
    assert said(caplog, lambda share: 0.8, steps=60) == []  # too few to judge
    assert said(caplog, lambda share: 0.8, probability=0.6) == []


def test_wrong_arguments() -> None:
    for objective in (pt.DPO([], loss_type="ipo"), pt.DPO([], label_smoothing=0.1)):
        with pytest.raises(pt.ArgumentError, match="sigmoid"):
            pt.StallWarning(objective)
    for options in ({"probability": 0.5}, {"accuracy": 0.0}):
        with pytest.raises(pt.ArgumentError, match=next(iter(options))):
            pt.StallWarning(pt.DPO([]), **options)


def test_what_is_trained_on_is_seen_and_nothing_else(tmp_path: Any) -> None:
    from transformers import TrainingArguments

    seen: list[torch.Tensor] = []
    preferences = pt.DPO(rows("dpo", 8), cache_dir=tmp_path, eval_dataset=rows("dpo", 4))
    preferences.watch = seen.append
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = pt.JointTrainer(
        make_model(), arguments, objectives={"dpo": preferences}, processing_class=make_tokenizer()
    )
    trainer.train()
    trainer.evaluate()
    assert [len(margins) for margins in seen] == [4, 4]
    assert seen[0].abs().max() < 1e-5  # the policy begins at the reference
    assert trainer.steps[1]["loss"]["dpo"] == pytest.approx(
        float(-torch.nn.functional.logsigmoid(seen[1]).mean()), rel=1e-5
    )
