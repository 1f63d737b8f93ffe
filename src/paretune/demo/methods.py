"""The demo's methods, one row each: how a model comes from the base, the reference and the preference pairs.

A new method is a new `Row`; a new family may bring its own way to make points.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.demo import cures
from paretune.demo.align import DPOSettings, PairTensors, adamw, align
from paretune.demo.joint import joint
from paretune.demo.on_policy import own_pairs
from paretune.demo.pretrain import Recipe, load_model

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from paretune.task_vector import TaskVector

LR = DPOSettings().lr
Made = Iterator[tuple[str, dict[str, Any], "nn.Module"]]  # (method, further hyper-parameters, model)


@dataclass(frozen=True)
class Bench:
    """What every row works with: one seed's models and preference pairs, and how plain AdamW is run on them."""

    recipe: Recipe
    base: Path
    reference: Path
    out: Path
    plain: DPOSettings = field(default_factory=DPOSettings)

    @property
    def seed(self) -> int:
        return self.recipe.world.seed

    def model(self) -> nn.Module:
        """The reference, fresh from disk."""
        return load_model(self.reference)

    @cached_property
    def pairs(self) -> PairTensors:
        world, model = self.recipe.world, self.model()
        pairs = own_pairs(model, world) if world.on_policy else world.preferences  # type: ignore[arg-type]
        return PairTensors.encode(pairs).with_reference(model)

    @cached_property
    def tau(self) -> TaskVector:
        from paretune.task_vector import TaskVector

        return TaskVector.between(base=self.base, reference=self.reference)

    @property
    def settings(self) -> DPOSettings:
        return replace(self.plain, seed=self.seed)

    @property
    def policy_file(self) -> Path:
        """Where `policy` keeps it: a checkpoint of its own."""
        # Worlds that differ in their preferences alone share a reference, and must not share the policy.
        key = hashlib.sha256(f"{self.recipe.world.fingerprint} {self.settings}".encode()).hexdigest()[:12]
        return self.out / f"policy-seed{self.seed}-{self.recipe.reference_key}-{key}.safetensors"

    def policy(self) -> dict[str, Tensor]:
        """The parameters that plain AdamW aligned: what offline merging starts from. Trained once, kept in ``out``."""
        from safetensors.torch import load_file, save_file

        file = self.policy_file
        if not file.exists():
            model = self.model()
            for _ in align(model, self.pairs, self.settings):
                pass
            handle, temporary = tempfile.mkstemp(dir=self.out, suffix=".tmp")
            os.close(handle)
            save_file({name: p.detach().clone() for name, p in model.named_parameters()}, temporary)
            os.replace(temporary, file)
        return load_file(file)


@dataclass(frozen=True)
class Row:
    """One method with its hyper-parameters.

    Args:
        method: its name in tables.
        family: control, regularisation, online or offline (later: joint, adaptive).
        make: yields the models; several where one run passes through them.
        hyperparameters: for the records, and passed to ``make``.
        quick: part of ``--quick``.
    """

    method: str
    family: str
    make: Callable[[Bench, Row], Made]
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    quick: bool = False

    @property
    def key(self) -> str:
        """A file name for the row's record."""
        parts = [self.method, *(f"{k}={v}" for k, v in self.hyperparameters.items())]
        return "".join(c if c.isalnum() or c in "=.,-" else "_" for c in " ".join(parts))


def rows(quick: bool = False) -> list[Row]:
    """Every row of the demo, or those of ``--quick``."""
    return [row for row in _ROWS if row.quick or not quick]


# -- ways to make a model ------------------------------------------------------------------------------------


def _reference(bench: Bench, row: Row) -> Made:
    yield row.method, {}, bench.model()


def _base(bench: Bench, row: Row) -> Made:
    yield row.method, {}, load_model(bench.base)


def _settings(bench: Bench, row: Row) -> DPOSettings:
    return replace(bench.settings, **{k: v for k, v in row.hyperparameters.items() if k in ("lr", "beta", "steps")})


def _adamw(bench: Bench, row: Row) -> Made:
    model = bench.model()
    for _ in align(model, bench.pairs, _settings(bench, row)):
        pass
    yield row.method, {}, model


def _adamw_stopped(bench: Bench, row: Row) -> Made:
    model, stops = bench.model(), row.hyperparameters["stops"]
    for step in align(model, bench.pairs, bench.settings, stops=stops):
        if step in stops:
            yield row.method, {"steps": step}, model


def _average(bench: Bench, row: Row) -> Made:
    from paretune.optim import EMA

    model = bench.model()
    average = EMA(model.named_parameters(), decay=row.hyperparameters["decay"])
    for _ in align(model, bench.pairs, _settings(bench, row), after_step=average.update):
        pass
    with average.average():
        yield row.method, {}, model


def _optimized(build: Callable[[Bench, Row, Any, DPOSettings], Optimizer]) -> Callable[[Bench, Row], Made]:
    """A way to make a model by DPO with the optimizer that ``build`` makes."""

    def make(bench: Bench, row: Row) -> Made:
        model = bench.model()
        for _ in align(model, bench.pairs, _settings(bench, row), lambda named, s: build(bench, row, named, s)):
            pass
        yield row.method, {}, model

    return make


def _online(bench: Bench, row: Row, named: Any, settings: DPOSettings) -> Optimizer:
    from paretune.optim import OnDARE, OnTIES

    kind = OnDARE if row.method.startswith("OnDARE") else OnTIES
    options = {k: v for k, v in row.hyperparameters.items() if k != "lr"}
    return kind(
        named,
        bench.tau,
        lr=settings.lr,
        betas=settings.betas,
        total_steps=settings.steps,
        seed=settings.seed,
        **options,
    )


def _child(bench: Bench, row: Row, named: Any, settings: DPOSettings) -> Optimizer:
    from paretune.optim import ChildTuning, fisher_information

    mode, density = row.hyperparameters["mode"], row.hyperparameters["density"]
    fisher = None
    if mode == "D":
        count = min(256, len(bench.pairs.ids))
        batches = [list(range(i, min(i + 16, count))) for i in range(0, count, 16)]
        fisher = fisher_information(bench.model(), batches, _dpo(bench))
    return ChildTuning(adamw(named, settings), mode=mode, density=density, seed=settings.seed, fisher=fisher)


def _dpo(bench: Bench) -> Callable[[nn.Module, list[int]], Tensor]:
    from paretune.demo.align import completion_logps, dpo_loss

    def loss(model: nn.Module, at: list[int]) -> Tensor:
        batch = bench.pairs.take(at)
        logps = completion_logps(model, batch.ids.flatten(0, 1), batch.completion.flatten(0, 1))
        return dpo_loss(logps.view(-1, 2), batch.ref_logps, bench.settings.beta)

    return loss


def _anchor(bench: Bench, row: Row, named: Any, settings: DPOSettings) -> Optimizer:
    from paretune.optim import Anchor

    return Anchor(adamw(named, settings), bench.reference, **row.hyperparameters)


def _lora(bench: Bench, row: Row) -> Made:
    import torch
    from peft import LoraConfig, get_peft_model

    rank = row.hyperparameters["rank"]
    torch.manual_seed(bench.seed)
    model = get_peft_model(
        bench.model(),
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for _ in align(model, bench.pairs, _settings(bench, row)):
        pass
    yield row.method, {}, model.merge_and_unload()


def _adaptive(bench: Bench, row: Row) -> Made:
    from paretune.demo.adaptive import average

    return average(bench, row)


def _offline(bench: Bench, row: Row) -> Made:
    """θ_base + C(F(θ_reference − θ_base), F(θ_policy − θ_base)), the weight on the policy.

    Reference: arXiv 2405.17931, section 3.
    """
    import torch

    from paretune.operators import METHODS, mask_key

    weight = row.hyperparameters["weight"]
    method = METHODS[row.hyperparameters["merge"]]
    sparsify = method.sparsifier(row.hyperparameters.get("density"))
    model, base, policy = bench.model(), dict(load_model(bench.base).named_parameters()), bench.policy()
    with torch.no_grad():
        for name, p in model.named_parameters():
            kept = [
                sparsify(vector, mask_key(bench.seed, 0, stream, name))
                for stream, vector in (("reference", p - base[name]), ("policy", policy[name] - base[name]))
            ]
            p.copy_(base[name] + method.consensus(kept[0], kept[1], weight))
    yield row.method, {}, model


def _laddered(make: Callable[[Bench, Row], Made]) -> Callable[[Bench, Row], Made]:
    """The same method at several scales of the change that it makes, for comparisons at equal reward."""

    def climb(bench: Bench, row: Row) -> Made:
        for _, _, model in make(bench, row):
            policy = {name: p.detach().clone() for name, p in model.named_parameters()}
            yield from cures.climbed(bench, row, policy, cures.LADDER)

    return climb


# -- the table -----------------------------------------------------------------------------------------------

_ROWS: tuple[Row, ...] = (
    Row("reference (SFT)", "control", _reference, quick=True),
    Row("base", "control", _base, quick=True),
    # AdamW is a curve, not a point: over learning rates, and over steps
    *(
        Row("AdamW", "control", _adamw, {"lr": round(factor * LR, 9)}, quick=factor in (0.15, 0.35, 0.7, 1.0))
        for factor in (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 1.4)
    ),
    Row("AdamW, stopped early", "control", _adamw_stopped, {"stops": (20, 40, 60)}),
    Row("KL", "regularisation", _adamw, {"beta": 0.5}),
    Row("KL", "regularisation", _adamw, {"beta": 2.0}),
    Row("EMA", "regularisation", _laddered(_average), {"decay": 0.02}, quick=True),
    Row("ChildTuning-F", "regularisation", _optimized(_child), {"mode": "F", "density": 0.5}),
    Row("ChildTuning-D", "regularisation", _optimized(_child), {"mode": "D", "density": 0.3}),
    Row("L2 to reference", "regularisation", _optimized(_anchor), {"l2": 300.0}),
    Row("L2 to reference", "regularisation", _optimized(_anchor), {"l2": 1000.0}),
    Row("L1 to reference", "regularisation", _optimized(_anchor), {"l1": 0.2}),
    Row("LoRA", "regularisation", _lora, {"rank": 8, "lr": 3e-4}),
    Row("LoRA", "regularisation", _lora, {"rank": 8, "lr": 1e-3}),
    Row("OnDARE, weight 0", "online", _optimized(_online), {"density": 0.5, "weight": 0.0}, quick=True),
    Row("OnDARE", "online", _optimized(_online), {"density": 0.5, "weight": 1e-3}, quick=True),
    Row("OnDARE", "online", _optimized(_online), {"density": 0.5, "weight": 1e-3, "lr": 2 * LR}),
    Row("OnDARE", "online", _optimized(_online), {"density": 0.5, "weight": 1e-3, "rescale": "expectation"}),
    Row("OnDARE", "online", _optimized(_online), {"density": 0.5, "weight": 1e-2, "every": 10}),
    Row("OnTIES", "online", _optimized(_online), {"density": 0.2, "weight": 5e-4}, quick=True),
    Row("OnTIES", "online", _optimized(_online), {"density": 0.05, "weight": 5e-4}),
    Row("OnTIES", "online", _optimized(_online), {"density": 0.2, "weight": 5e-3, "every": 10}),
    Row("linear", "offline", _offline, {"merge": "linear", "weight": 0.7}, quick=True),
    Row("linear", "offline", _offline, {"merge": "linear", "weight": 0.4}),
    Row("DARE", "offline", _offline, {"merge": "dare_linear", "weight": 0.7, "density": 0.7}),
    Row("TIES", "offline", _laddered(_offline), {"merge": "ties", "weight": 0.7, "density": 0.7}, quick=True),
    Row("TIES", "offline", _offline, {"merge": "ties", "weight": 0.7, "density": 0.5}),
    Row("MA", "adaptive", _adaptive, {"mean": 0.2}),
    Row("MA", "adaptive", _adaptive, {"mean": 0.4}, quick=True),
    Row("MA", "adaptive", _adaptive, {"mean": 0.6}),
    Row("part-wise", "adaptive", _adaptive, {"ratios": (0.6, 0.4, 0.2)}),
    Row("part-wise", "adaptive", _adaptive, {"ratios": (0.2, 0.4, 0.6)}),
    Row("AMA", "adaptive", _adaptive, {"mean": 0.2, "parametrization": "projection"}),
    Row("AMA", "adaptive", _adaptive, {"mean": 0.4, "parametrization": "projection"}, quick=True),
    Row("AMA", "adaptive", _adaptive, {"mean": 0.4, "parametrization": "sigmoid"}),
    Row("AMA", "adaptive", _adaptive, {"mean": 0.6, "parametrization": "projection"}),
    Row("sequential", "joint", joint, {"order": "sft then dpo"}),
    Row("sequential", "joint", joint, {"order": "dpo then sft"}, quick=True),
    Row("MIX", "joint", joint, {"weight": 0.5}),
    Row("MIX", "joint", joint, {"weight": 0.9}),
    Row("ALRIGHT", "joint", joint, {"weight": 0.25}),
    Row("ALRIGHT", "joint", joint, {"weight": 0.5}, quick=True),
    Row("ALRIGHT", "joint", joint, {"weight": 0.75}),
    Row("MAXRIGHT", "joint", joint, {"weight": 0.5}),
    Row("MAXRIGHT", "joint", joint, {"weight": 0.25}, quick=True),
    # without any SFT data; replay of real data is what they are measured against
    Row("scaled back", "offline", cures.scaled_back, quick=True),
    Row("Fisher gate", "offline", cures.gated, {"weight": 1.0}, quick=True),
    Row("Fisher gate", "offline", cures.gated, {"weight": 3.0}),
    Row("Fisher gate", "offline", cures.gated, {"weight": 1.0, "mode": "tensors"}),
    Row("self-rehearsal", "joint", cures.rehearsed, {"source": "raw-fragments"}, quick=True),
    Row("self-rehearsal", "joint", cures.rehearsed, {"source": "prompt-model"}),
    Row("replay", "joint", cures.rehearsed, {"source": "real data"}),
)
