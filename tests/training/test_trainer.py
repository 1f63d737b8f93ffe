"""attach: the trainer's groups, names and flags reach the factory, on any transformers trainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import paretune as pt
from paretune.errors import ArgumentError, PareTuneError
from paretune.training.trainer import attach, named_groups, total_steps


class Regression(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.last = torch.nn.Linear(4, 1, bias=False)
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        predicted = self.last(self.norm(self.first(x)))
        return {"loss": (predicted - labels).square().mean(), "logits": predicted}


def make(tmp_path: Path, rows: int = 10, **options: Any) -> Trainer:
    torch.manual_seed(0)
    values = {"learning_rate": 3e-3, "weight_decay": 0.1, "adam_beta2": 0.98, "adam_epsilon": 1e-6} | options
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=2, **values,
    )  # fmt: skip
    data = [{"x": torch.randn(3), "labels": torch.randn(1)} for _ in range(rows)]
    return Trainer(Regression(), arguments, train_dataset=data)


def test_groups_are_the_trainers_with_names(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    decayed, plain = named_groups(trainer)
    assert [name for name, _ in decayed["params"]] == ["first.weight", "last.weight"]
    assert [name for name, _ in plain["params"]] == ["first.bias", "norm.weight", "norm.bias"]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    for group in (decayed, plain):
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.9, 0.98), 1e-6)
    trainer.create_optimizer()
    theirs = [[id(p) for p in group["params"]] for group in trainer.optimizer.param_groups]
    assert theirs == [[id(p) for _, p in group["params"]] for group in (decayed, plain)]


def test_same_training_as_the_trainers_own(tmp_path: Path) -> None:
    """With the same optimizer, attaching changes no bit."""
    own = make(tmp_path, optim="adamw_torch")
    own.train()
    attached = attach(make(tmp_path), torch.optim.AdamW)
    attached.train()
    for a, b in zip(own.model.parameters(), attached.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert attached.optimizer.param_groups[0]["param_names"] == ["first.weight", "last.weight"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": 7}, 7),
        ({"num_train_epochs": 2}, 10),
        ({"num_train_epochs": 3, "gradient_accumulation_steps": 2}, 9),
        ({"num_train_epochs": 1.5}, 8),
    ],
)
def test_total_steps_are_those_that_are_trained(tmp_path: Path, options: dict[str, Any], expected: int) -> None:
    seen: list[int] = []

    def factory(groups: Any, total_steps: int) -> torch.optim.Optimizer:
        seen.append(total_steps)
        return torch.optim.AdamW(groups)

    trainer = make(tmp_path, **options)
    before = total_steps(trainer)
    attach(trainer, factory).train()
    assert seen == [trainer.state.global_step] == [expected] == [before]


def test_total_steps_without_a_length(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter([])

    trainer = make(tmp_path, max_steps=5)
    trainer.train_dataset = Stream()
    assert total_steps(trainer) == 5
    trainer.args.max_steps = -1
    with pytest.raises(PareTuneError, match=r"^max_steps=-1: .*set max_steps$"):
        total_steps(trainer)


def test_online_merging_knows_its_steps(tmp_path: Path) -> None:
    trainer = make(tmp_path, num_train_epochs=2)
    reference = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    base = {name: value - 0.1 for name, value in reference.items()}
    tau = pt.TaskVector.between(base=base, reference=reference)
    attach(trainer, partial(pt.OnDARE, tau=tau, density=0.5, pull=0.5))
    trainer.train()
    # weight = pull / (steps * density)
    assert {group["weight"] for group in trainer.optimizer.optimizer.param_groups} == {0.5 / (10 * 0.5)}


@pytest.mark.parametrize(
    "factory",
    [
        lambda groups: torch.optim.AdamW(groups, lr=1e-5),
        lambda groups: torch.optim.AdamW([p for g in groups for _, p in g["params"]], lr=1e-5),
        partial(torch.optim.SGD, lr=1e-5),
    ],
)
def test_a_contradicting_learning_rate_is_refused(tmp_path: Path, factory: Any) -> None:
    trainer = attach(make(tmp_path), factory)
    with pytest.raises(ArgumentError, match=r"^lr=1e-05: .*learning_rate=0.003") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)


def test_equal_and_per_layer_learning_rates_are_fine(tmp_path: Path) -> None:
    attach(make(tmp_path), partial(torch.optim.SGD, lr=3e-3)).create_optimizer()

    def by_layer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        for position, group in enumerate(groups):
            group["lr"] *= 0.5**position
        return torch.optim.SGD(groups)

    optimizer = attach(make(tmp_path), by_layer).create_optimizer()
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3, 1.5e-3]


def test_schedules_still_rule(tmp_path: Path) -> None:
    trainer = attach(make(tmp_path, lr_scheduler_type="linear", max_steps=4, logging_steps=1), torch.optim.AdamW)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([3e-3, 2.25e-3, 1.5e-3, 0.75e-3])


def test_a_trainer_with_an_optimizer_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.create_optimizer()
    with pytest.raises(ArgumentError, match="attach before training"):
        attach(trainer, torch.optim.AdamW)
