"""Sharded over ranks the online optimizers make the same steps as in one process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import spawn
from sharded_world import OPTIMIZERS, Awkward, fully_sharded, named, online, task_vector, train
from torch import Tensor, nn

import paretune as pt
from paretune.errors import ArgumentError, MismatchError
from paretune.optim.parts import part_of
from paretune.optim.weights import join

STEPS = range(3)
SHAPES = {"wide": (331, 400), "rows": (7, 5), "one": (1,), "cube": (6, 9, 4)}


def error(model: nn.Module, want: nn.Module) -> float:
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    return max(float((whole[name] - p).detach().abs().max()) for name, p in want.named_parameters())


def trajectories(rank: int, ranks: int) -> None:
    for name, make in OPTIMIZERS.items():
        one, many = Awkward(), fully_sharded()
        train(one, make(named(one), task_vector()), STEPS)
        optimizer = make(named(many), task_vector())
        train(many, optimizer, STEPS, ranks, rank)
        assert error(many, one) < 1e-6, f"{name}: {error(many, one):.2e}"


def some(rank: int, ranks: int, names: tuple[str, ...]) -> None:
    with mock.patch.dict(OPTIMIZERS, {name: OPTIMIZERS[name] for name in names}, clear=True):
        trajectories(rank, ranks)


def test_two_ranks_make_the_steps_of_one() -> None:
    spawn(some, 2, 2, ("dare sparse", "ties sparse"))


def baselines(rank: int, ranks: int) -> None:
    """ChildTuning with masks of each step and of Fisher information, and an average of the policy beside them."""
    generator = torch.Generator().manual_seed(11)
    fisher = {name: torch.rand(p.shape, generator=generator) for name, p in named(Awkward())}
    for variant, more in (("F", {"seed": 3}), ("D", {"fisher": fisher})):
        found = []
        for model, many, index in ((Awkward(), 1, 0), (fully_sharded(), ranks, rank)):
            inner = torch.optim.SGD(named(model), lr=0.1, momentum=0.9)
            optimizer = pt.ChildTuning(inner, variant, density=0.3, **more)
            average = pt.EMA(named(model), decay=0.3)
            for step in STEPS:
                train(model, optimizer, range(step, step + 1), many, index)
                average.update()
            found.append((model, average.state_dict()))
        (one, averaged), (sharded, sharded_average) = found
        assert error(sharded, one) < 1e-6, f"{variant}: {error(sharded, one):.2e}"
        for name, value in averaged.items():
            assert torch.allclose(sharded_average[name].full_tensor(), value, rtol=0, atol=1e-6), f"{variant}, {name}"


def some_and_baselines(rank: int, ranks: int, names: tuple[str, ...]) -> None:
    some(rank, ranks, names)
    baselines(rank, ranks)
    surroundings(rank, ranks)


@pytest.mark.slow
def test_trajectories_are_those_of_one_process() -> None:
    spawn(trajectories, 2, 2)
    spawn(baselines, 2, 2)
    spawn(some_and_baselines, 4, 4, ("dare dense", "dare l1", "ties dense", "ties step-k", "around SGD"))


# -- exact arithmetic: the same gradients on one process and on shards ---------------------------------------


def values(seed: int, scale: float = 0.02) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}


def gradients(step: int, tied: bool) -> dict[str, Tensor]:
    """``tied``: of few different values, so that many updates tie in magnitude at the k-th."""
    found = values(100 + step, 1.0)
    return {name: (g * 1.5).round() for name, g in found.items()} if tied else found


def step_by_step(make: Callable[..., torch.optim.Optimizer], tied: bool, place: Callable[[Tensor], Tensor]) -> Any:
    start = values(0)
    base = {name: value - 0.1 * values(1)[name] for name, value in start.items()}
    tau = pt.TaskVector.between(base=base, reference=start)
    params = {name: nn.Parameter(place(value)) for name, value in start.items()}
    optimizer = make(params.items(), tau)
    for step in range(3):
        for name, g in gradients(step, tied).items():
            params[name].grad = place(g)
        optimizer.step()
    return params


def layouts(ranks: int) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    line = init_device_mesh("cpu", (ranks,))
    yield "rows", line, (Shard(0),)
    yield "replicated", line, (Replicate(),)
    yield "columns", line, (Shard(1),)
    if ranks == 4:
        grid = init_device_mesh("cpu", (2, 2))
        yield "hybrid", grid, (Replicate(), Shard(0))
        yield "rows twice", grid, (Shard(0), Shard(0))
        yield "rows of columns", grid, (Shard(0), Shard(1))
        yield "tensor parallel rows", grid, (_StridedShard(0, split_factor=2), Shard(0))


def exactly(rank: int, ranks: int) -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    makers = {
        "dare sparse": online("OnDARE", density=0.01),
        "dare dense": online("OnDARE", density=0.3),
        "ties": online("OnTIES", density=0.1),
        "ties dense": online("OnTIES", density=0.5, weight=0.5),
    }
    for kind, make in makers.items():
        for tied in (False, True):
            want = step_by_step(make, tied, torch.clone)
            for layout, mesh, placements in layouts(ranks):

                def place(value: Tensor, mesh: Any = mesh, placements: Any = placements) -> Tensor:
                    fitting = [p if getattr(p, "dim", 0) < value.dim() else Shard(0) for p in placements]
                    return distribute_tensor(value.clone(), mesh, fitting, src_data_rank=None)

                if "columns" in layout and kind.startswith("ties"):
                    with pytest.raises(ArgumentError, match="Shard"):
                        step_by_step(make, tied, place)
                    continue
                got = step_by_step(make, tied, place)
                for name, p in got.items():
                    assert isinstance(p, DTensor)
                    # torch's kernels may round the last elements of a tensor otherwise than the others
                    difference = (p.full_tensor() - want[name]).detach().abs().max()
                    assert difference < 1e-8, f"{kind}, {layout}, {name}: {difference:.2e}"


@pytest.mark.slow
def test_any_layout_is_exact_or_refused() -> None:
    spawn(exactly, 4, 4)


# -- how much is sent and read --------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    counts = {"all_reduce": 0, "all_gather": 0}
    with mock.patch.multiple(
        torch.distributed, **{name: _count(counts, name, getattr(torch.distributed, name)) for name in counts}
    ):
        yield counts


def _count(counts: dict[str, int], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        counts[name] += 1
        return function(*args, **options)

    return call


def loads_its_rows(rank: int, folder: str) -> None:
    with torch.device("meta"):
        model = Awkward()
        model.register_buffer("table", torch.arange(3.0, device="cpu"))
    fully_sharded(model=model)
    assert all(p.is_meta for p in model.parameters())
    pt.load_sharded(model, f"{folder}/reference")
    assert error(model, Awkward()) == 0
    assert model.table.tolist() == [0, 1, 2]
    for wrong in (model, nn.Linear(24, 24)):
        with pytest.raises((MismatchError, ArgumentError)):
            pt.load_sharded(nn.ModuleDict({"other": wrong}), f"{folder}/reference")
    with pytest.raises(ArgumentError, match="sharded"):
        pt.TaskVector.between(base=model, reference=model)


def frugal(rank: int, ranks: int, folder: str) -> None:
    loads_its_rows(rank, folder)
    reads: list[tuple[int, int]] = []
    read = pt.TaskVector.dense

    def dense(self: pt.TaskVector, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        reads.append((self.numel(name), (self.numel(name) if stop is None else stop) - start))
        return read(self, name, start, stop)

    for kind, sent in (("ties sparse", 3), ("ties step-k", 3), ("dare sparse", 0), ("dare dense", 0), ("dare l1", 1)):
        model = fully_sharded()
        tau = pt.TaskVector.between(base=f"{folder}/base", reference=f"{folder}/reference")
        optimizer = OPTIMIZERS[kind]([{"params": named(model)[:3]}, {"params": named(model)[3:], "lr": 1e-3}], tau)
        with mock.patch.object(pt.TaskVector, "dense", dense):
            for step in range(3):
                train(model, torch.optim.SGD(model.parameters(), 0.0), range(step, step + 1), ranks, rank)
                with counted() as counts:
                    optimizer.step()
                assert sum(counts.values()) <= sent, f"{kind}: {counts}"
    assert reads
    assert all(count <= -(-whole // ranks) + 64 for whole, count in reads if whole > 64), "only this rank's rows"


@pytest.mark.slow
def test_three_exchanges_a_step_and_only_own_rows_of_tau(tmp_path) -> None:
    from safetensors.torch import save_file

    whole = {name: p.detach() for name, p in Awkward().named_parameters()}
    for side, scale in (("base", 0.9), ("reference", 1.0)):
        (tmp_path / side).mkdir()
        save_file({name: p * scale for name, p in whole.items()}, tmp_path / side / "model.safetensors")
    spawn(frugal, 2, 2, str(tmp_path))


# -- what training does around the step -----------------------------------------------------------------------


def row_vector() -> pt.TaskVector:
    return pt.TaskVector.between(base={"weight": torch.zeros(1, 5)}, reference={"weight": torch.ones(1, 5)})


def surroundings(rank: int, ranks: int) -> None:
    from torch.distributed.fsdp import fully_shard

    for kind in ("dare sparse", "ties sparse"):
        one, many = Awkward(), fully_sharded()
        train(one, OPTIMIZERS[kind](named(one), task_vector()), STEPS, accumulate=3, clip=0.05)
        train(many, OPTIMIZERS[kind](named(many), task_vector()), STEPS, ranks, rank, accumulate=3, clip=0.05)
        assert error(many, one) < 1e-6, f"{kind}: {error(many, one):.2e}"

        # built first and sharded then, its parameters replaced by index, as accelerate does
        late = Awkward()
        optimizer = OPTIMIZERS[kind](named(late), task_vector())
        assert not optimizer._tau._largest, "F(τ) of whole parameters is not held by every rank"
        names = [name for name, p in late.named_parameters() if p.requires_grad]
        fully_sharded(model=late)
        current = dict(late.named_parameters())
        optimizer.param_groups[0]["params"] = [current[name] for name in names]
        train(late, optimizer, STEPS, ranks, rank, accumulate=3, clip=0.05)
        assert error(late, one) < 1e-6, f"{kind} sharded late: {error(late, one):.2e}"

        # warm-up: the first learning rate is 0, and this model's one row is rank 0's
        row = nn.Linear(5, 1, bias=False)
        fully_shard(row)
        optimizer = OPTIMIZERS[kind](row.named_parameters(), row_vector())
        optimizer.param_groups[0]["lr"] = 0.0
        row(torch.ones(1, 5)).sum().backward()
        optimizer.step()
        assert optimizer.param_groups[0]["calls"] == 1, "every rank counts it"

        warm, cold = fully_sharded(), Awkward()
        for model, many_ranks in ((warm, ranks), (cold, 1)):
            optimizer = OPTIMIZERS[kind](named(model), task_vector())
            optimizer.param_groups[0]["lr"] = 0.0
            train(model, optimizer, range(1), many_ranks, rank if many_ranks > 1 else 0)
            assert optimizer.param_groups[0]["calls"] == 1
        assert error(warm, cold) < 1e-6


def half_precision(rank: int, ranks: int) -> None:
    """bfloat16 with its split master: the same gradients, so the same bits."""
    from torch.distributed.tensor import distribute_tensor

    for kind in ("dare sparse", "dare step-k", "ties sparse", "ties whole"):
        one, many = Awkward(torch.bfloat16), fully_sharded(torch.bfloat16)
        optimizers = [OPTIMIZERS[kind](named(model), task_vector(Awkward())) for model in (one, many)]
        for step in range(6):
            for i, (a, b) in enumerate(zip(one.parameters(), many.parameters(), strict=True)):
                if a.requires_grad:
                    generator = torch.Generator().manual_seed(97 * step + i)
                    a.grad = torch.randn(a.shape, generator=generator).bfloat16()
                    b.grad = distribute_tensor(a.grad, b.device_mesh, b.placements, src_data_rank=None)
            for optimizer in optimizers:
                optimizer.step()
        for (name, a), b in zip(one.named_parameters(), many.parameters(), strict=True):
            if a.requires_grad:
                low_a, low_b = (o.state[p]["master_low"] for o, p in zip(optimizers, (a, b), strict=True))
                part = part_of(name, b)  # gloo cannot gather int16
                whole = join(a.detach(), low_a).view(-1)[slice(*part.range)]
                mine = join(b.detach().to_local(), low_b.to_local()).view(-1)
                assert torch.allclose(whole, mine, rtol=0, atol=1e-7), f"{kind}, {name}"


def refused(model: nn.Module) -> None:
    class Own:
        density, rescale = 0.5, "none"

        def __call__(self, x: Tensor, key: int | None = None) -> Tensor:
            return x

    adafactor = torch.optim.Adafactor(named(model))
    with pytest.raises(ArgumentError, match="Adafactor"):
        pt.OnlineMerging(adafactor, task_vector(), weight=0.1)
    with pytest.raises(ArgumentError, match="sparsify"):
        pt.OnlineMerging(torch.optim.SGD(named(model)), task_vector(), Own(), weight=0.1)


def around(rank: int, ranks: int) -> None:
    logging.getLogger("paretune").setLevel(logging.WARNING)
    refused(fully_sharded())
    surroundings(rank, ranks)
    half_precision(rank, ranks)


@pytest.mark.slow
def test_accumulation_clipping_late_sharding_warm_up_and_bfloat16() -> None:
    spawn(around, 2, 2)
