"""accelerate's own FSDP2 preparation, which replaces an optimizer's parameters by sharded ones; also under TRL."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from fsdp2_on_cpu import shard_on_the_cpu, whole
from ranks import spawn
from sharded_world import OPTIMIZERS, Awkward, loss, named, task_vector, train

METHODS: dict[str, tuple[Any, ...]] = {
    "ondare": ("--optimizer", "ondare", "--density", 0.2, "--pull", 0.2),
    "onties": ("--optimizer", "onties", "--density", 0.2, "--pull", 0.2, "--every", 2),
    "ema": ("--optimizer", "ondare", "--density", 0.2, "--pull", 0.2, "--ema_decay", 0.3),
}


def prepared(rank: int, ranks: int, kind: str) -> None:
    from accelerate import Accelerator

    logging.getLogger("paretune").setLevel(logging.WARNING)
    shard_on_the_cpu(auto_wrap_policy="no_wrap", transformer_cls_names_to_wrap=None)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == ranks
    one, many = Awkward(), Awkward()
    train(one, OPTIMIZERS[kind](named(one), task_vector()), range(3))
    model, optimizer = accelerator.prepare(many, OPTIMIZERS[kind](named(many), task_vector()))
    for step in range(3):
        optimizer.zero_grad()
        accelerator.backward(loss(model, step, ranks, rank))
        optimizer.step()
    parameters = dict(one.named_parameters())
    for name, p in whole(model).items():
        difference = (p - parameters[name]).detach().abs().max()
        assert difference < 1e-6, f"{kind}, {name}: {difference:.2e}"


@pytest.mark.slow
def test_prepared_by_accelerate() -> None:
    spawn(prepared, 2, 2, "ties step-k")


def command(world: Path, output: Path, method: str, batch: int, *more: object) -> None:
    from paretune.cli.main import main

    line = tiny_models.arguments(
        world, "dpo", output, "--base_model", world / "base", "--per_device_train_batch_size", batch, "--adam_epsilon",
        1e-2, "--save_strategy", "steps", "--save_steps", 2, "--max_grad_norm", 0.5, *METHODS[method], *more,
    )  # fmt: skip
    assert main(line) == 0


def commands(rank: int, ranks: int, world: Path, folder: Path) -> None:
    shard_on_the_cpu()
    for method in METHODS:
        command(world, folder / method, method, 2)
        again = ("--resume_from_checkpoint", folder / method / "checkpoint-2")
        command(world, folder / f"{method} resumed", method, 2, *again)


@pytest.mark.slow
def test_the_command_line_under_fsdp2_trains_and_saves_what_one_process_does(world: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    spawn(commands, 2, 2, world, tmp_path)
    for method in METHODS:
        command(world, tmp_path / f"{method} alone", method, 4)
        alone, sharded, resumed = (
            load_file(tmp_path / f"{method}{way}" / "model.safetensors") for way in (" alone", "", " resumed")
        )
        assert (tmp_path / method / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir(), "checkpoints are sharded"
        if method == "ema":
            average = Path("checkpoint-4") / "average" / "model.safetensors"
            averages = [load_file(tmp_path / f"{method}{way}" / average) for way in (" alone", "", " resumed")]
            assert all(torch.allclose(averages[1][name], p, rtol=0, atol=2e-6) for name, p in averages[0].items())
            assert all(torch.equal(averages[2][name], p) for name, p in averages[1].items())
        for name, p in alone.items():
            torch.testing.assert_close(sharded[name], p, rtol=0, atol=2e-6)
            assert torch.equal(resumed[name], sharded[name]), f"{method}: {name}"
