"""Online merging around optimizers of sharded parameters: the steps of one process, or refused by name."""

from __future__ import annotations

import functools

import pytest
import torch
from inner_optimizers import INNER, WHOLE_ONLY, settings
from ranks import spawn
from sharded_world import Awkward, fully_sharded, named, task_vector, train

import paretune as pt
from paretune.errors import ArgumentError

SHARDED = [name for name in INNER if name not in WHOLE_ONLY]
OPERATORS = ((pt.Random(0.3), pt.WeightedSum()), (pt.Magnitude(0.2), pt.SignElection()))


def trajectories(rank: int, names: list[str]) -> None:
    for name in names:
        for sparsify, consensus in OPERATORS:
            merging = functools.partial(pt.OnlineMerging, weight=0.2, every=2, **settings(name))
            one, many = Awkward(), fully_sharded()
            train(one, merging(INNER[name](named(one)), task_vector(one), sparsify, consensus), range(3))
            optimizer = merging(INNER[name](named(many)), task_vector(), sparsify, consensus)
            train(many, optimizer, range(3), 2, rank)
            whole = {key: p.full_tensor() for key, p in many.named_parameters()}
            error = max(float((whole[key] - p).detach().abs().max()) for key, p in one.named_parameters())
            # A sign (Lion) jumps where the sum of gradients rounds otherwise.
            assert error < (2.1e-4 if name == "Lion" else 1e-6), f"{name}, {sparsify}: {error:.2e}"


def refused(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(torch.nn.Linear(4, 4, bias=False))
    base = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    tau = pt.TaskVector.between(base=base, reference={name: value + 1 for name, value in base.items()})
    for name in WHOLE_ONLY:
        if name in INNER:
            with pytest.raises(ArgumentError, match=f"{name}.*sharded"):
                pt.OnlineMerging(INNER[name](named(model)), tau, weight=0.1)


def everything(rank: int) -> None:
    refused(rank)
    trajectories(rank, SHARDED)


@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one() -> None:
    spawn(everything, 2)
