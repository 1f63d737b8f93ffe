"""The average is evaluated, saved beside the policy, restored on resume, and what remains at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

from paretune.errors import StateError
from paretune.optim.ema import EMA
from paretune.training.callbacks import EMACallback, Trajectory

DECAY = 0.25


class Config(transformers.PreTrainedConfig):
    model_type = "one-layer"


class OneLayer(transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.layer = torch.nn.Linear(3, 1, bias=False)
        self.post_init()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        predicted = self.layer(x)
        return {"loss": (predicted - labels).square().mean(), "logits": predicted}


class Weights(transformers.TrainerCallback):
    """Notes the policy after each step and what evaluations see."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.evaluated: list[torch.Tensor] = []

    def on_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.steps.append(model.layer.weight.detach().clone())

    def on_prediction_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.evaluated.append(model.layer.weight.detach().clone())


def make(tmp_path: Path, *, evaluate: bool = True, steps: int = 6, **options: Any) -> tuple[Trainer, Weights]:
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=steps,
        per_device_train_batch_size=2, learning_rate=0.1, save_strategy="steps", save_steps=3, logging_steps=1,
        **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    rows = [{"x": torch.randn(3, generator=generator), "labels": torch.ones(1)} for _ in range(8)]
    seen = Weights()
    callback = EMACallback(lambda named: EMA(named, decay=DECAY), evaluate=evaluate)
    trainer = Trainer(OneLayer(Config()), arguments, train_dataset=rows, eval_dataset=rows, callbacks=[seen, callback])
    return trainer, seen


def averages(start: torch.Tensor, policies: list[torch.Tensor]) -> list[torch.Tensor]:
    found, average = [], start
    for policy in policies:
        average = average + DECAY * (policy - average)
        found.append(average)
    return found


def test_the_average_remains_and_lies_in_the_checkpoints(tmp_path: Path) -> None:
    trainer, seen = make(tmp_path)
    start = trainer.model.layer.weight.detach().clone()
    trainer.train()
    expected = averages(start, seen.steps)
    trainer.evaluate()  # leaves it there
    torch.testing.assert_close(trainer.model.layer.weight.detach(), expected[-1])
    for step in (3, 6):
        checkpoint = tmp_path / f"checkpoint-{step}"
        policy = OneLayer.from_pretrained(checkpoint).layer.weight
        average = OneLayer.from_pretrained(checkpoint / "average").layer.weight
        assert torch.equal(policy, seen.steps[step - 1])
        torch.testing.assert_close(average.detach(), expected[step - 1])


@pytest.mark.parametrize("evaluate", [True, False])
def test_evaluation_sees_the_average_when_asked(tmp_path: Path, evaluate: bool) -> None:
    trainer, seen = make(tmp_path, evaluate=evaluate, eval_strategy="steps", eval_steps=2)
    start = trainer.model.layer.weight.detach().clone()
    trainer.train()
    batches = len(seen.evaluated) // 3
    expected = averages(start, seen.steps) if evaluate else seen.steps
    for evaluation, step in enumerate((2, 4, 6)):
        torch.testing.assert_close(seen.evaluated[evaluation * batches], expected[step - 1])
    # ... and training went on from the policy, not from the average.
    plain, reference = make(tmp_path / "plain", evaluate=False)
    plain.train()
    assert torch.equal(seen.steps[-1], reference.steps[-1])


def test_resume_continues_the_average_bit_for_bit(tmp_path: Path) -> None:
    whole, _ = make(tmp_path / "whole")
    whole.train()
    resumed, _ = make(tmp_path / "whole")
    torch.nn.init.zeros_(resumed.model.layer.weight)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(whole.model.layer.weight, resumed.model.layer.weight)


def test_resume_without_an_average_is_refused(tmp_path: Path) -> None:
    whole, _ = make(tmp_path)
    whole.pop_callback(EMACallback)
    whole.train()
    resumed, _ = make(tmp_path)
    with pytest.raises(StateError, match="holds no average"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_best_checkpoints_average_is_loaded(tmp_path: Path) -> None:
    trainer, seen = make(
        tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=True,
    )  # fmt: skip
    start = trainer.model.layer.weight.detach().clone()
    trainer.train()
    # the loss falls, and greater_is_better calls the first evaluation the best
    assert trainer.state.best_global_step == 3
    torch.testing.assert_close(trainer.model.layer.weight.detach(), averages(start, seen.steps)[2])


def test_trajectory_spans_interruptions(tmp_path: Path) -> None:
    first, _ = make(tmp_path)
    first.add_callback(Trajectory())
    first.train()
    saved = json.loads((tmp_path / "checkpoint-3" / "trajectory.json").read_text())
    assert [entry["step"] for entry in saved] == [1, 2, 3]
    second, _ = make(tmp_path)
    trajectory = Trajectory(resume_from=tmp_path / "checkpoint-3")
    second.add_callback(trajectory)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    steps = [entry["step"] for entry in trajectory.records if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5, 6]
    seconds = [entry["seconds"] for entry in trajectory.records]
    assert seconds == sorted(seconds)


def test_a_gradient_that_is_not_finite_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, _ = make(tmp_path)
    with torch.no_grad():
        trainer.model.layer.weight.fill_(float("inf"))
    trainer.add_callback(Trajectory())
    trainer.train()
    messages = [record.message for record in caplog.records if record.name == "paretune.training"]
    assert messages == ["step 1: the gradient is not finite; lower the learning rate"]
