"""What test_zero.py runs in the python that has DeepSpeed: ``python zero_world.py CASE FOLDER``."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_world import OPTIMIZERS, Awkward, loss, online, task_vector, train
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import spawn

from paretune.errors import ArgumentError


def rates() -> dict[str, Tensor]:
    """Factors of the learning rate, one for each entry."""
    generator = torch.Generator().manual_seed(5)
    return {name: torch.rand(p.shape, generator=generator) for name, p in Awkward().named_parameters()}


KINDS = {
    "sparse": online("OnDARE", density=0.04),
    "dense": online("OnDARE", density=0.3),
    "everything": online("OnDARE", density=1.0),
    "l1": online("OnDARE", density=0.3, rescale="l1"),
    "released": online("OnDARE", density=0.3, variant="released"),
    "step-k": online("OnDARE", density=0.04, every=3),
    "rates": online("OnDARE", density=0.04, learning_rates=rates()),
}
CLIP = 0.2  # below the norm of these gradients: `same_steps`


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Three partitions: one of them of a single element, so that some rank's is padding; frozen parameters as well."""
    pairs = list(model.named_parameters())
    one = ("gate.bias",)
    wide = [(name, p) for name, p in pairs if p.dim() > 1]
    narrow = [(name, p) for name, p in pairs if p.dim() < 2 and name not in one]
    return [
        {"params": wide},
        {"params": narrow, "weight_decay": 0.0},
        {"params": [pair for pair in pairs if pair[0] in one], "weight_decay": 0.0},
    ]


def engine(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int, accumulate: int = 1, **options: Any) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **options.pop("zero", {})},
        **options,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def run(built: Any, steps: range, rank: int, ranks: int, accumulate: int = 1) -> None:
    for step in steps:
        for micro in range(accumulate):
            built.backward(loss(built, step * accumulate + micro, ranks, rank))
            built.step()


def error(model: nn.Module, want: nn.Module) -> float:
    pairs = zip(model.parameters(), want.parameters(), strict=True)
    return max(float((p.float() - q.float()).detach().abs().max()) for p, q in pairs)


def compare(kind: str, rank: int, ranks: int, stage: int, accumulate: int, **options: Any) -> None:
    one, many = Awkward(), Awkward()
    train(one, KINDS[kind](groups(one), task_vector()), range(4), accumulate=accumulate, clip=CLIP)
    optimizer = KINDS[kind](groups(many), task_vector())
    built = engine(many, optimizer, stage, accumulate, **options)
    run(built, range(4), rank, ranks, accumulate)
    held = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    whole = [sum(p.numel() for _, p in group["params"] if p.requires_grad) for group in groups(one)]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1], "not partitions"
    assert all(ranks * size >= n for size, n in zip(held, whole, strict=True))
    assert ranks * held[2] > whole[2], "nothing is padded"
    assert held[0] < whole[0]
    print(f"ZeRO-{stage}, {kind}, {accumulate}, {options}: {error(many, one):.2e}", flush=True)
    assert error(many, one) < 1e-6, f"ZeRO-{stage}, {kind}, {accumulate}, {options}"


def same_steps(rank: int, ranks: int, folder: Path) -> None:
    model = Awkward()
    loss(model, 0).backward()
    assert nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]) > CLIP
    for stage in (1, 2):
        for i, kind in enumerate(KINDS if ranks == 2 else ("sparse", "l1")):
            compare(kind, rank, ranks, stage, accumulate=1 + i % 2)
    compare("sparse", rank, ranks, 2, 2, zero={"contiguous_gradients": False})
    offload = {"offload_optimizer": {"device": "cpu"}}
    compare("dense", rank, ranks, 2, 1, zero=offload, zero_force_ds_cpu_optimizer=False)


def bits(built: Any) -> list[Tensor]:
    inner = built.optimizer.optimizer
    found = [p.detach().clone() for p in built.module.parameters()]
    for group in inner.param_groups:
        for p in group["params"]:
            found += [p.detach().clone(), *(value.clone() for _, value in sorted(inner.state[p].items()))]
        found.append(torch.tensor(group["calls"]))
    return found


def resume(rank: int, ranks: int, folder: Path) -> None:
    for stage, kind in ((1, "step-k"), (2, "sparse")):

        def fresh(stage: int = stage, kind: str = kind) -> Any:
            model = Awkward()
            return engine(model, KINDS[kind](groups(model), task_vector()), stage)

        first = fresh()
        run(first, range(2), rank, ranks)
        first.save_checkpoint(str(folder / kind))
        run(first, range(2, 4), rank, ranks)
        second = fresh()
        second.load_checkpoint(str(folder / kind))
        run(second, range(2, 4), rank, ranks)
        for a, b in zip(bits(first), bits(second), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), kind


def resharded(rank: int, ranks: int, folder: Path) -> None:
    """Of what two ranks saved in `resume`."""
    model = Awkward()
    built = engine(model, KINDS["sparse"](groups(model), task_vector()), 2)
    _refused(lambda: built.load_checkpoint(str(folder / "sparse")), "world size", Exception)


def low_precision(rank: int, ranks: int, folder: Path) -> None:
    """bfloat16 parameters: the partition is their float32 master, in which additions far below an ulp add up."""
    wide_sums = {"data_types": {"grad_accum_dtype": "fp32"}}  # stage 1 then takes another class, BF16_Optimizer
    for stage, options in ((1, {}), (1, wide_sums), (2, {}), (2, wide_sums)):
        model = Awkward(torch.bfloat16)
        tau = task_vector(model)
        make = online("OnDARE", density=1.0, lr=0.0, weight=1e-4, weight_decay=0.0)
        optimizer = make(groups(model), tau)
        start = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        built = engine(model, optimizer, stage, bf16={"enabled": True}, **options)
        print(type(built.optimizer).__name__, flush=True)
        run(built, range(20), rank, ranks)
        for name, p in model.named_parameters():
            if p.requires_grad:
                want = start[name] + 20e-4 * tau.dense(name).view(p.shape)
                assert torch.equal(p, want.bfloat16()), f"ZeRO-{stage}, {name}"
        held = torch.cat([p.detach() for group in optimizer.param_groups for p in group["params"]])
        assert held.dtype == torch.float32
        assert (held - held.bfloat16().float()).count_nonzero() > held.numel() / 2, "the master keeps what bf16 lacks"
        report = optimizer.memory_report()
        assert report.parameters == held.numel()
        assert report.per_parameter["moments"] == 8
        assert optimizer.amount().pull == KINDS["everything"](groups(Awkward()), task_vector()).amount().pull / 2000


def refused(rank: int, ranks: int, folder: Path) -> None:
    def stepped(make: Callable[..., Any], stage: int, **options: Any) -> Callable[[], None]:
        def action() -> None:
            model = Awkward()
            run(engine(model, make(groups(model), task_vector()), stage, **options), range(1), rank, ranks)

        return action

    _refused(stepped(KINDS["sparse"], 3), r"ZeRO-3.*FSDP2")
    _refused(stepped(OPTIMIZERS["ties sparse"], 2), r"OnTIES.*OnDARE.*FSDP2")
    _refused(stepped(OPTIMIZERS["around SGD"], 1), r"DeepSpeed.*FSDP2")
    _refused(stepped(KINDS["sparse"], 1, zero={"round_robin_gradients": True}), "round_robin_gradients")


def _refused(action: Callable[[], object], pattern: str, kind: type[Exception] = ArgumentError) -> None:
    with pytest.raises(kind, match=pattern) as error:
        action()
    print(str(error.value).splitlines()[0], flush=True)


CASES: dict[str, tuple[int, tuple[Callable[..., None], ...]]] = {
    "two ranks": (2, (same_steps, low_precision, refused, resume)),
    "four ranks": (4, (same_steps,)),
    "one rank": (1, (resharded,)),
}


def case(rank: int, ranks: int, functions: tuple[Callable[..., None], ...], folder: Path) -> None:
    logging.getLogger("paretune").setLevel(logging.WARNING)
    for function in functions:
        function(rank, ranks, folder)


if __name__ == "__main__":
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE="1")
    count, functions = CASES[sys.argv[1]]
    spawn(case, count, count, functions, Path(sys.argv[2]))
