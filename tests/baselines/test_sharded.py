"""Under FSDP2 on two ranks the baselines give what one process gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import spawn
from small_model import Small, loss, train, trainable, values
from torch import Tensor, nn

from paretune.optim.anchor import Anchor
from paretune.optim.child_tuning import ChildTuning
from paretune.optim.ema import EMA
from paretune.optim.wrapper import OptimizerWrapper

KINDS = ("child_f", "child_d", "anchor_dict", "anchor_none")
STEPS = 3


def wrap(kind: str, model: nn.Module, fisher: dict[str, Tensor], reference: dict[str, Tensor]) -> OptimizerWrapper:
    inner = torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9)
    if kind == "child_f":
        return ChildTuning(inner, "F", density=0.4, seed=1)
    if kind == "child_d":
        return ChildTuning(inner, "D", density=0.4, fisher=fisher)
    return Anchor(inner, None if kind == "anchor_none" else reference, l2=2.0, l1=0.01)


def inputs() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    start = values(Small())
    fisher = {name: torch.rand(v.shape, generator=generator) for name, v in start.items()}
    return fisher, {name: v * 0.9 for name, v in start.items()}


def run(model: nn.Module, kind: str, folder: Path | None) -> tuple[OptimizerWrapper, EMA]:
    optimizer = wrap(kind, model, *inputs())
    ema = EMA(model.named_parameters(), decay=0.3)
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1))
        ema.update()
    if folder is not None:
        ema.save(folder / f"{kind}.safetensors")
    with ema.average():
        pass
    return optimizer, ema


def rank(index: int, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    for kind in KINDS:
        model = Small()
        model.unused.requires_grad_(False)
        fully_shard(model.layer)
        fully_shard(model)
        optimizer, _ = run(model, kind, folder)
        assert isinstance(model.layer.weight, DTensor)
        if index == 0:
            single = Small()
            single.unused.requires_grad_(False)
            _, single_ema = run(single, kind, None)
            loaded = EMA(single.named_parameters())
            loaded.load(folder / f"{kind}.safetensors")
        for name, p in model.named_parameters():
            whole = p.full_tensor()
            if index == 0:
                torch.testing.assert_close(whole, dict(single.named_parameters())[name], rtol=1e-5, atol=1e-6)
        if index == 0:
            for name, value in loaded.state_dict().items():
                torch.testing.assert_close(value, single_ema.state_dict()[name], rtol=1e-5, atol=1e-6)
        saved = get_optimizer_state_dict(model, optimizer)
        again = wrap(kind, model, *inputs()) if kind != "anchor_none" else optimizer
        set_optimizer_state_dict(model, again, saved)
        loss(model, 9).backward()
        again.step()


@pytest.mark.slow
def test_two_ranks_are_as_one(tmp_path: Path) -> None:
    spawn(rank, 2, tmp_path)
