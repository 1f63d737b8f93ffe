"""accelerate's own FSDP2 preparation, which replaces an optimizer's parameters by sharded ones.

accelerate ignores FSDP on the CPU, so its state is told to be in FSDP here; what it then does is its own code.
"""

from __future__ import annotations

import logging
import os

import pytest
from ranks import spawn
from sharded_world import OPTIMIZERS, Awkward, loss, named, task_vector, train


def prepared(rank: int, ranks: int, kind: str) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    logging.getLogger("paretune").setLevel(logging.WARNING)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == ranks
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    accelerator.state.distributed_type = DistributedType.FSDP
    one, many = Awkward(), Awkward()
    train(one, OPTIMIZERS[kind](named(one), task_vector()), range(3))
    model, optimizer = accelerator.prepare(many, OPTIMIZERS[kind](named(many), task_vector()))
    for step in range(3):
        optimizer.zero_grad()
        accelerator.backward(loss(model, step, ranks, rank))
        optimizer.step()
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        difference = (p.full_tensor() - dict(one.named_parameters())[name]).detach().abs().max()
        assert difference < 1e-6, f"{kind}, {name}: {difference:.2e}"


@pytest.mark.slow
def test_prepared_by_accelerate() -> None:
    spawn(prepared, 2, 2, "ties step-k")
