"""Optimizer state through torch's distributed checkpoint, onto as many ranks or another number of them."""

from __future__ import annotations

import copy
import logging
import os
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import spawn
from sharded_world import OPTIMIZERS, Awkward, fully_sharded, named, task_vector, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from paretune.optim import threshold as threshold_module
from paretune.optim.parts import local

KINDS = {
    "dare step-k": torch.bfloat16,
    "dare sparse": torch.float32,
    "ties step-k": torch.float32,
    "around AdamW, magnitude": torch.float32,
}


def build(kind: str, ranks: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    logging.getLogger("paretune").setLevel(logging.WARNING)
    model = Awkward(KINDS[kind]) if ranks == 1 else fully_sharded(KINDS[kind])
    return model, OPTIMIZERS[kind](named(model), task_vector())


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    before = {name: local(p).detach().clone() for name, p in model.named_parameters()}
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    for name, p in model.named_parameters():  # to make empty state, torch has stepped once
        assert torch.equal(local(p), before[name])
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    found = [local(p).detach().clone() for p in model.parameters()]
    for p in model.parameters():
        entry = {**optimizer.state.get(p, {}), **getattr(optimizer, "own", {}).get(p, {})}
        found += [local(entry[key]).clone() for key in sorted(entry)]
    return found


def write(rank: int, ranks: int, folder: Path) -> None:
    """Two steps, saved; two more, kept as what resuming has to give."""
    for kind in KINDS:
        model, optimizer = build(kind, ranks)
        train(model, optimizer, range(2), ranks, rank)
        save(model, optimizer, folder / kind)
        train(model, optimizer, range(2, 4), ranks, rank)
        save(model, optimizer, folder / f"{kind} after")
        torch.save(bits(model, optimizer), folder / f"{kind} {rank} of {ranks}.pt")


def resume(rank: int, ranks: int, folder: Path, exact: bool) -> None:
    for kind, dtype in KINDS.items():
        model, optimizer = build(kind, ranks)
        load(model, optimizer, folder / kind)
        train(model, optimizer, range(2, 4), ranks, rank)
        got = bits(model, optimizer)
        if exact:
            want = torch.load(folder / f"{kind} {rank} of {ranks}.pt", weights_only=True)
        else:
            other = build(kind, ranks)
            load(*other, folder / f"{kind} after")
            want = bits(*other)
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            if exact:
                assert torch.equal(a, b), kind
            elif dtype == torch.float32:  # bfloat16 activations round otherwise on halves of a batch
                torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6, msg=lambda text, kind=kind: f"{kind}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_resume(before: int, after: int, tmp_path: Path) -> None:
    spawn(write, before, before, tmp_path)
    spawn(resume, after, after, tmp_path, before == after)


def die_within_a_step(rank: int, ranks: int) -> None:
    model, optimizer = build("ties step-k", ranks)
    train(model, optimizer, range(2), ranks, rank)
    if rank == 1:
        threshold_module.sums = lambda *_: os._exit(9)  # between two collectives
    train(model, optimizer, range(2, 3), ranks, rank)


@pytest.mark.slow
def test_a_rank_killed_within_a_step_ends_the_run() -> None:
    begin = time.monotonic()
    with pytest.raises(Exception, match=r"exit code 9|Connection closed|terminated"):
        spawn(die_within_a_step, 2, 2)
    assert time.monotonic() - begin < 60


def whole_state(rank: int, ranks: int) -> None:
    """A state dict that is not sharded, of bfloat16 parameters with their split masters: gathered, given out again."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    given_out = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for kind in ("dare step-k", "around AdamW, magnitude"):
        with mock.patch.dict(KINDS, {kind: torch.bfloat16}):
            model, optimizer = build(kind, ranks)
            train(model, optimizer, range(2), ranks, rank)
            weights = get_model_state_dict(model, options=options)
            state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))  # it shares its counters
            train(model, optimizer, range(2, 4), ranks, rank)
            again, resumed = build(kind, ranks)
        set_model_state_dict(again, weights, options=given_out)
        set_optimizer_state_dict(again, resumed, state, options=given_out)
        if rank == 0:
            masters = [entry["master_low"] for entry in state["state"].values()]
            assert masters
            assert all(not hasattr(low, "device_mesh") and low.view(torch.int16).count_nonzero() for low in masters[:2])
        train(again, resumed, range(2, 4), ranks, rank)
        for a, b in zip(bits(model, optimizer), bits(again, resumed), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), kind


def test_a_whole_state_dict_of_bfloat16_parameters() -> None:
    spawn(whole_state, 2, 2)
