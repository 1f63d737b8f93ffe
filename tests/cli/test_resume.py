"""Interrupted and resumed is bit-equal to uninterrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from paretune.cli.main import main
from paretune.training.callbacks import Trajectory


@pytest.fixture(scope="module")
def dropout_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention dropout makes the random state part of every result (DPO and KTO switch it off)."""
    directory = tmp_path_factory.mktemp("dropout")
    tiny_models.save_pair(directory, dropout=0.2)
    return directory


CASES: dict[str, tuple[str, list[str]]] = {
    **{
        f"{trainer} {optimizer}": (trainer, ["--optimizer", optimizer])
        for trainer in ("sft", "dpo", "kto")
        for optimizer in ("adamw", "ondare", "onties")
    },
    "sft ondare every 2": ("sft", ["--optimizer", "ondare", "--every", "2"]),
    "dpo ondare bf16": ("dpo", ["--optimizer", "ondare", "--dtype", "bfloat16"]),
    "sft ema": ("sft", ["--optimizer", "adamw", "--ema_decay", "0.3"]),
    "sft child f": ("sft", ["--child_tuning", "f", "--child_density", "0.4"]),
    "sft child d": ("sft", ["--child_tuning", "d", "--child_density", "0.4", "--child_batches", "2"]),
    "dpo l2": ("dpo", ["--l2_to_reference", "5", "--optimizer", "ondare"]),
    "dpo lora": ("dpo", ["--use_peft"]),
    "grpo adamw": ("grpo", ["--optimizer", "adamw"]),
    "grpo ondare": ("grpo", ["--optimizer", "ondare", "--beta", "0.1"]),
}
QUICK = ("sft ondare", "dpo adamw", "dpo ondare bf16", "dpo lora", "kto onties", "sft ema", "grpo ondare")


class Interrupt:
    """Raises Ctrl-C in the middle of the run, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        original = Trajectory.on_log

        def on_log(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt
            original(self, args, state, control, **kwargs)

        monkeypatch.setattr(Trajectory, "on_log", on_log)
        self._undo = lambda: monkeypatch.setattr(Trajectory, "on_log", original)

    def over(self) -> None:
        self._undo()


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_bit_equal(
    name: str, world: Path, dropout_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, more = CASES[name]
    if "ondare" in more or "onties" in more:
        more = [*more, "--base_model", str(dropout_world / "base"), "--density", "0.3", "--weight", "1e-2"]

    def argv(output: Path, *further: str) -> list[str]:
        return tiny_models.arguments(
            world, trainer, output, *more, "--model_name_or_path", dropout_world / "reference", "--max_steps", 6,
            "--save_strategy", "steps", "--save_steps", 3, "--lr_scheduler_type", "cosine", "--warmup_steps", 2,
            *further,
        )  # fmt: skip

    assert main(argv(tmp_path / "whole")) == 0
    # 16 rows in batches of 4: the second epoch begins at step 5, where the interruption comes
    interrupt = Interrupt(monkeypatch, step=5)
    assert main(argv(tmp_path / "parts")) == 130
    interrupt.over()
    assert json.loads((tmp_path / "parts" / "training.json").read_text())["status"] == "running"
    assert main(argv(tmp_path / "parts", "--resume_from_checkpoint", "true")) == 0

    file = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
    whole, parts = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
    assert whole.keys() == parts.keys()
    different = [key for key in whole if not torch.equal(whole[key], parts[key])]
    assert different == []
    records = [json.loads((tmp_path / part / "training.json").read_text()) for part in ("whole", "parts")]
    losses = [[entry["loss"] for entry in record["history"] if "loss" in entry] for record in records]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    assert records[1]["resumed_from"].endswith("checkpoint-3")


def test_a_finished_run_keeps_its_record(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO", "paretune")
    argv = tiny_models.arguments(world, "dpo", tmp_path, "--save_strategy", "steps", "--save_steps", 2)
    record_file, model_file = tmp_path / "training.json", tmp_path / "model.safetensors"
    assert main(argv) == 0
    before = record_file.read_bytes(), model_file.stat().st_mtime_ns
    assert json.loads(before[0])["metrics_cover_steps"] == [1, 4]
    for value in ("true", tmp_path / "checkpoint-4"):
        caplog.clear()
        assert main([*argv, "--resume_from_checkpoint", str(value)]) == 0
        assert (record_file.read_bytes(), model_file.stat().st_mtime_ns) == before
        assert "finished before at step 4, nothing to do" in caplog.text
    # nothing is left for other arguments either
    capsys.readouterr()
    assert main([*argv, "--resume_from_checkpoint", "true", "--beta", "0.7"]) == 2
    assert "finished before at step 4 with another beta, and no step is left" in capsys.readouterr().err
    assert record_file.read_bytes() == before[0]
    # but for more steps there is, and for those after an earlier checkpoint
    assert main([*argv, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2")]) == 0
    assert json.loads(record_file.read_text())["metrics_cover_steps"] == [3, 4]
    assert main([*argv, "--resume_from_checkpoint", "true", "--max_steps", "6"]) == 0
    record = json.loads(record_file.read_text())
    assert (record["steps"], record["metrics_cover_steps"]) == (6, [5, 6])
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert len(losses) == 6
    assert record["metrics"]["train_loss"] == pytest.approx(sum(losses[4:]) / 2, rel=1e-3)
    assert "| train metrics cover steps | 5 to 6 (resumed) |" in (tmp_path / "README.md").read_text()


def test_a_run_that_lacks_its_end_only_claims_no_loss(world: Path, tmp_path: Path) -> None:
    """Stopped after the last step, before the model was saved."""
    argv = tiny_models.arguments(world, "dpo", tmp_path, "--save_strategy", "steps", "--save_steps", 4)
    assert main(argv) == 0
    (tmp_path / "model.safetensors").unlink()
    assert main([*argv, "--resume_from_checkpoint", "true"]) == 0
    record = json.loads((tmp_path / "training.json").read_text())
    assert (record["status"], record["steps"], record["metrics_cover_steps"]) == ("finished", 4, None)
    assert "train_loss" not in record["metrics"]
    assert (tmp_path / "model.safetensors").is_file()


def test_another_task_vector_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more: list[object] = ["--optimizer", "ondare", "--density", 0.3, "--save_strategy", "steps", "--save_steps", 2]
    argv = tiny_models.arguments(world, "dpo", tmp_path, *more, "--base_model", world / "base")
    assert main(argv) == 0
    tiny_models.make_model(seed=5).save_pretrained(tmp_path / "other")
    resumed = ["--base_model", tmp_path / "other", "--resume_from_checkpoint", tmp_path / "checkpoint-2"]
    capsys.readouterr()
    assert main(tiny_models.arguments(world, "dpo", tmp_path, *more, *resumed)) == 2
    assert "task vector" in capsys.readouterr().err


def test_early_stopping_remembers_its_patience(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more: list[object] = [
        "--max_steps", 12, "--early_stopping_patience", 3, "--early_stopping_threshold", 100,
        "--eval_strategy", "steps", "--eval_steps", 1, "--metric_for_best_model", "eval_loss",
        "--eval_dataset_name", world / "sft.jsonl",
        "--save_strategy", "steps", "--save_steps", 1,
    ]  # fmt: skip
    argv = tiny_models.arguments(world, "sft", tmp_path, *more)
    interrupt = Interrupt(monkeypatch, step=3)
    assert main(argv) == 130
    interrupt.over()
    assert main([*argv, "--resume_from_checkpoint", "true"]) == 0
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 4


def test_a_checkpoint_between_generations_is_called_so(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more: list[object] = ["--steps_per_generation", 4, "--save_strategy", "steps", "--save_steps", 1]
    assert main(tiny_models.arguments(world, "grpo", tmp_path, *more)) == 0
    for step, said in ((1, True), (2, False)):
        caplog.clear()
        resumed = ["--resume_from_checkpoint", tmp_path / f"checkpoint-{step}"]
        assert main(tiny_models.arguments(world, "grpo", tmp_path, *more, *resumed)) == 0
        assert any("generated every 2 steps" in record.message for record in caplog.records) == said


def test_a_sweep_resumes_unfinished_points(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more: list[object] = ["--sweep", "beta=0.1,0.5", "--save_strategy", "steps", "--save_steps", 2]
    argv = tiny_models.arguments(world, "dpo", tmp_path, *more)
    interrupt = Interrupt(monkeypatch, step=3)
    assert main(argv) == 130
    interrupt.over()
    assert main([*argv, "--resume_from_checkpoint", "true"]) == 0
    first, second = (json.loads((tmp_path / f"beta={b}" / "training.json").read_text()) for b in ("0.1", "0.5"))
    assert first["resumed_from"].endswith("checkpoint-2")
    assert second["resumed_from"] is None
