"""OnDARE under DeepSpeed's ZeRO-1 and 2, run by a python that has DeepSpeed: PARETUNE_DEEPSPEED_PYTHON.

``tests/distributed/deepspeed_env.sh DIRECTORY`` makes such an environment and prints its python.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

import paretune as pt
from paretune.errors import ArgumentError

PYTHON = os.environ.get("PARETUNE_DEEPSPEED_PYTHON", "")
HERE = Path(__file__).parent
needs_deepspeed = pytest.mark.skipif(
    not PYTHON, reason="PARETUNE_DEEPSPEED_PYTHON does not name a python with DeepSpeed"
)


def run(*command: str | Path) -> str:
    done = subprocess.run([PYTHON, *command], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


@needs_deepspeed
@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one_process(tmp_path: Path) -> None:
    said = run("zero_world.py", "two ranks", tmp_path)
    assert said.count("ZeRO-1") >= 6
    assert said.count("ZeRO-2") >= 6
    assert "BF16_Optimizer" in said
    # DeepSpeed itself refuses what another number of ranks saved
    assert "world size of 2" in run("zero_world.py", "one rank", tmp_path)


@needs_deepspeed
@pytest.mark.slow
def test_four_ranks_make_the_steps_of_one_process(tmp_path: Path) -> None:
    run("zero_world.py", "four ranks", tmp_path)


@needs_deepspeed
@pytest.mark.slow
def test_a_trl_trainer_under_deepspeed_trains_what_one_process_trains(world: Path, tmp_path: Path) -> None:
    run("zero_trainer.py", world, tmp_path)


def test_flattened_parameters_without_a_map_are_refused() -> None:
    model = torch.nn.Linear(3, 2)
    base = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    optimizer = pt.OnDARE(model.named_parameters(), pt.TaskVector.between(base=base, reference=model), weight=0.1)
    flat = torch.nn.Parameter(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ArgumentError, match=r"1 replaced parameters.*weight.*FSDP2"):
        optimizer.step()
    wrapped = pt.OnlineMerging(torch.optim.SGD(model.named_parameters(), lr=0.1), None, weight=0)
    wrapped.param_groups[0]["params"] = [flat]
    with pytest.raises(ArgumentError, match=r"2 parameters were replaced by 1 .*FSDP2"):
        wrapped.step()
