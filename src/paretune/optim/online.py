"""The online merging optimizers OnDARE and OnTIES: every AdamW step is merged with the task vector.

    δ  = AdamW's update                              what this step would add
    δ' = F(δ),  τ' = F(τ)                            sparsify
    θ ← θ + C(δ', τ')                                consensus, apply

Reference: arXiv 2405.17931 (Online Merging Optimizers for Boosting Rewards and Mitigating Tax in Alignment).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import log
from ..errors import ArgumentError, StateError
from ..operators import METHODS
from ..task_vector import TaskVector, plain_name
from .arguments import check_groups, check_run
from .group_step import GroupStep
from .learning_rates import Factors, LearningRates
from .memory import MemoryReport, report
from .parts import any_nonzero, part_of
from .pull import Amount, share_lost, tau_share, weight_for_pull
from .rule import Rule, agree, require_shardable
from .tau import Tau
from .weights import MASTER, loaded, require_supported, saved
from .wrapper import require_dense, require_same_names, unique_names
from .zero import Partitions

_LOG = log.get("optim")
_STATE = ("step", "exp_avg", "exp_avg_sq", MASTER, "pending")


class _OnlineAdamW(Optimizer):
    """AdamW whose updates are merged with a task vector; OnDARE and OnTIES choose the operators."""

    method: ClassVar[str]

    def __init__(
        self,
        named_params: Iterable[Any],
        tau: TaskVector | None,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        density: float | None = None,
        weight: float | None = None,
        pull: float | None = None,
        total_steps: int | None = None,
        every: int = 1,
        variant: Literal["paper", "released"] = "paper",
        rescale: Literal["none", "expectation", "l1"] | None = None,
        seed: int = 0,
        clip: float = 1.0,
        learning_rates: Factors | None = None,
    ) -> None:
        resolved = check_run(self.method, tau, weight, pull, total_steps, every, variant, rescale, seed, clip)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "density": METHODS[self.method].density if density is None else density,
            "weight": (5e-7 if pull is None else 0.0) if weight is None else weight,
            "every": every,
            "variant": variant,
            "rescale": resolved,
            "seed": seed,
            "clip": clip,
            "method": self.method,
            "calls": 0,
            "tau_fingerprint": "none" if tau is None else tau.fingerprint,
        }
        self._rates = LearningRates.of(learning_rates)
        defaults["learning_rates"] = "none" if self._rates is None else self._rates.fingerprint
        self._vector = tau
        self._total_steps = total_steps
        self._complete = False
        super().__init__(named_params, defaults)
        self._complete = True
        self._bind()
        if pull is not None and total_steps is not None:
            share = self._share()
            for group in self.param_groups:
                group["weight"] = weight_for_pull(pull, share, total_steps, group["every"])
        self.statement: str = str(self.amount()) + ("" if self._rates is None else f"; learning rates {self._rates}")
        _LOG.info(self.statement)
        if total_steps is not None and total_steps % every:
            _LOG.warning(
                "every=%d does not divide total_steps=%d: the last %d steps stay unmerged",
                every, total_steps, total_steps % every,
            )  # fmt: skip

    # -- stepping --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step. ``closure``: evaluated once before it, with gradients enabled; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._initialising():
            for group in self.param_groups:
                self._trained(group)
            return loss
        steps = [self._group_step(group) for group in self.param_groups]
        # δ' and τ' need what other ranks hold: asked for all groups at once
        agreed = agree([(step.rule, step.pieces, step.group["calls"]) for step in steps if step.due], self._tau)
        for step in steps:
            step.apply(self._tau, agreed)
        return loss

    def _group_step(self, group: dict[str, Any]) -> GroupStep:
        if self._partitions.replaced(group):
            trained, states = self._cut(group)
        else:
            trained = self._trained(group)
            states = [self.state[p] for _, p in trained]
        return GroupStep(group, self._rule(group), trained, states, self._rates)

    def _cut(self, group: dict[str, Any]) -> tuple[list[tuple[str, Tensor]], list[dict[str, Tensor]]]:
        """What a partition of DeepSpeed's ZeRO holds of each parameter, with its state."""
        if self.method != "ondare":
            mend = "OnTIES ranks whole tensors, which a partition cuts: take OnDARE, or shard with FSDP2"
            raise ArgumentError("optimizer", "OnTIES under DeepSpeed ZeRO", mend)
        self._partitions.pieces(group)  # refuses before state is made
        partition = group["params"][0]
        if partition.grad is None:
            return [], []
        self._make_state(partition, group["every"])
        found = self._partitions.pieces(group, self.state[partition])
        self.state[partition]["step"] += 1
        return found

    def _trained(self, group: dict[str, Any]) -> list[tuple[str, Tensor]]:
        """The parameters of a group that have a gradient, each with its state."""
        named = [(plain_name(n), p) for n, p in zip(group["param_names"], group["params"], strict=True)]
        trained = [(name, p) for name, p in named if p.grad is not None]
        for name, p in trained:
            require_dense(name, p.grad)
            if name not in self._trainable:  # was frozen when this optimizer was built
                self._require({name: p})
                self._trainable.add(name)
            self._make_state(p, group["every"])
        return trained

    def _rule(self, group: dict[str, Any]) -> Rule:
        method = METHODS[self.method if group["variant"] == "paper" else f"{self.method}-released"]
        return Rule(
            sparsify=method.sparsifier(group["density"], group["rescale"]),
            consensus=method.consensus,
            seed=group["seed"],
            released=group["variant"] == "released",
            clip=group["clip"],
            eps=group["eps"],
        )

    def _make_state(self, p: Tensor, every: int) -> None:
        state = self.state[p]
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        kinds = {"exp_avg": wide, "exp_avg_sq": wide}
        if p.dtype == torch.bfloat16:
            kinds[MASTER] = torch.int16
        if every > 1:
            kinds["pending"] = wide
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
        for key, dtype in kinds.items():
            if key not in state:
                state[key] = torch.zeros_like(
                    p, dtype=dtype, memory_format=torch.contiguous_format, requires_grad=False
                )

    def _initialising(self) -> bool:
        """Whether torch's distributed checkpoint steps only to make the state exist: empty state, lr 0, gradients 0."""
        if self.state or any(float(g["lr"]) != 0 or self._partitions.replaced(g) for g in self.param_groups):
            return False
        return not any_nonzero(p for group in self.param_groups for p in group["params"])

    # -- parameters and task vector --------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of ``(name, parameter)`` pairs; each needs its tensor in the task vector."""
        super().add_param_group(param_group)
        if self._complete:
            try:
                self._bind()
            except Exception:
                self.param_groups.pop()
                raise

    def _bind(self) -> None:
        """Check groups, names and parameters, and match them with the task vector."""
        if any("param_names" not in group for group in self.param_groups):
            raise ArgumentError(
                "named_params", "unnamed", "pass model.named_parameters(), or groups of (name, parameter)"
            )
        check_groups(self.method, self.param_groups, self._vector)
        unique_names((n for group in self.param_groups for n in group["param_names"]), "named_params")
        everything = {
            plain_name(name): p
            for group in self.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
        }
        if len({id(p) for p in everything.values()}) < len(everything):
            raise ArgumentError("named_params", f"{len(everything)} names", "one parameter has two names: pass it once")
        # Names only: accelerate replaces the parameters by sharded ones, and must be able to free the whole ones.
        self._trainable = {name for name, p in everything.items() if p.requires_grad}
        self._partitions = Partitions(everything)
        self._require(self._parameters())
        self._tau = Tau(self._vector)

    def _parameters(self) -> dict[str, Tensor]:
        """The trainable parameters as they are now, by plain name."""
        found: dict[str, Tensor] = {}
        for group in self.param_groups:
            if self._partitions.replaced(group):
                named = self._partitions.pieces(group)[0]
            else:
                named = [(plain_name(n), p) for n, p in zip(group["param_names"], group["params"], strict=True)]
            found.update((name, p) for name, p in named if name in self._trainable)
        return found

    def _require(self, parameters: dict[str, Tensor]) -> None:
        sparsify = self._rule(self.param_groups[-1]).sparsify
        for name, p in parameters.items():
            require_supported(name, p)
            require_shardable(name, part_of(name, p), sparsify)
        for needed in (self._vector, self._rates):
            if needed is not None:
                needed.match({name: tuple(p.shape) for name, p in parameters.items()})

    def _share(self) -> float:
        parts = {name: part_of(name, p) for name, p in self._parameters().items()}
        return tau_share(self._rule(self.param_groups[0]).sparsify, self._tau, parts)

    def amount(self) -> Amount:
        """What τ will amount to over the run (over 1,000 steps where ``total_steps`` is not known)."""
        group = self.param_groups[0]
        sparsify = self._rule(group).sparsify
        steps = self._total_steps or 1000
        weight, share = group["weight"], self._share() if group["weight"] else 0.0
        known = self.method == "ondare" or sparsify.density == 1
        scale = 1 / sparsify.density if sparsify.rescale == "expectation" else 1.0
        return Amount(
            method=type(self).__name__,
            weight=weight,
            density=sparsify.density,
            every=group["every"],
            pull=weight * share * (steps // group["every"]),
            steps=steps,
            known_steps=self._total_steps is not None,
            upper_bound=self.method == "onties",
            lost=share_lost(self._parameters(), self._tau, weight * scale),
            passed=(sparsify.density if sparsify.rescale == "none" else 1.0) if known else None,
            lr=float(group["lr"]),
        )

    def memory_report(self) -> MemoryReport:
        """The bytes that this rank holds now, by part; ``print`` it for bytes per parameter."""
        whole = [p for group in self.param_groups if self._partitions.replaced(group) for p in group["params"]]
        trained = whole or list(self._parameters().values())
        states = [self.state.get(p, {}) for p in trained]
        return report(trained, states + (self._rates.resident if self._rates else []), self._tau.resident_bytes)

    # -- saving and loading ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's; the int16 halves of a split master are in it as bfloat16 of the same bits, which can be gathered."""
        found = super().state_dict()
        return {**found, "state": {index: saved(state) for index, state in found["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, for the same parameters, order and task vector; dtypes are kept as saved.

        Raises:
            StateError: it was saved by another optimizer, for other parameters, or with another task vector or other
                factors of the learning rate.
        """
        groups = state_dict["param_groups"]
        require_same_names(self.param_groups, groups)
        for group, other in zip(self.param_groups, groups, strict=True):
            if other.get("method") != self.method:
                was = other.get("method", "another optimizer")
                raise StateError(
                    f"the saved state is of {was}, this optimizer is {self.method}: resume with the same one"
                )
            if other["tau_fingerprint"] != group["tau_fingerprint"]:
                raise StateError(
                    f"the saved state was made with task vector {other['tau_fingerprint'][:12]}, this one is "
                    f"{group['tau_fingerprint'][:12]}: pass the same base and reference"
                )
            before = other.get("learning_rates", "none")
            if before != group["learning_rates"]:
                raise StateError(
                    f"the saved state was made with learning_rates {before}, this optimizer has "
                    f"{group['learning_rates']}: pass the same factors"
                )
        names = [group["param_names"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, names, strict=True):
            group["param_names"] = own
            group.setdefault("learning_rates", "none")  # saved before there were any
        # torch has cast everything to the parameters' dtype: take the saved tensors
        indices = [index for group in groups for index in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(indices, parameters, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if key in _STATE[1:]:
                    value = loaded(key, value.to(device=p.device, copy=True))
                    self.state[p][key] = value.view(p.shape) if value.shape != p.shape else value


class OnDARE(_OnlineAdamW):
    """AdamW with every update and the task vector randomly sparsified and summed.

        θ ← θ + (1−α)·F(δ) + α·F(τ),   F = Random(density p), fresh masks each step

    ``variant="released"``: τ's mask is drawn once and rescaled by 1/p, then clamped to ±clip; δ is rescaled by 1/p;
    ε is added to the uncorrected √v; weight decay comes after the merge.

    Args:
        named_params: ``model.named_parameters()``, or groups ``{"params": [(name, parameter), …], "lr": …}``.
        tau: τ = reference − base (`TaskVector.between`); None only with weight 0. Never part of the state dict.
        lr: η ≥ 0.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε ≥ 0.
        weight_decay: λ ≥ 0, decoupled, never sparsified.
        density: p in (0, 1], the kept fraction (the paper's reserve rate).
        weight: α in [0, 1], the merging weight; default 5e-7 as published.
        pull: instead of ``weight``: the share of τ to add over the run, ≥ 0; needs ``total_steps``.
        total_steps: T, optimizer steps of the run.
        every: K ≥ 1, merge every K-th step (Step-K); the steps between are plain AdamW.
        variant: ``"paper"`` or ``"released"``.
        rescale: ``"none"`` | ``"expectation"`` | ``"l1"``; None is ``"none"`` for paper, ``"expectation"`` for
            released, which also knows ``"l1"``.
        seed: keys the masks; they do not touch torch's generator and are the same on any number of ranks.
        clip: the released clamp, > 0.
        learning_rates: factors of η by parameter, for a whole tensor or each entry: a file of
            ``paretune average fisher --as-learning-rates``, or ``{name: tensor}``. They scale δ before it is
            sparsified, and weight decay, as a learning rate does; τ's part stays. With weight 0 and density 1 this is
            AdamW with a learning rate for each entry.

    Raises:
        ArgumentError: a value out of range; parameters without names, or of an unsupported dtype.
        MismatchError: a parameter has no tensor of its shape in τ, or no factor of the learning rate.

    Reference: arXiv 2405.17931, Eq. 3 and Algorithms 1, 2 (Algorithm 1 as printed has no bias correction; its code
    and ours have).

    Example:
        >>> import torch, paretune as pt
        >>> model = torch.nn.Linear(4, 2)
        >>> base = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        >>> tau = pt.TaskVector.between(base=base, reference=model)
        >>> optimizer = pt.OnDARE(model.named_parameters(), tau, lr=1e-3, density=0.5, pull=0.05, total_steps=100)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    method = "ondare"


class OnTIES(_OnlineAdamW):
    """AdamW with every update and the task vector trimmed by magnitude, conflicts of sign resolved.

        θ ← θ + C(F(δ), F(τ)),   F = Magnitude(density p) per tensor,   C = SignElection(weighted=True)

    With C weighted and α small, δ decides nearly every conflict. ``variant="released"``: the sign is elected on the
    unweighted vectors, so that τ decides nearly every conflict; ε is added to the uncorrected √v; weight decay comes
    after the merge; tensors with int(p·n) = 0 are not sparsified.

    The arguments are those of `OnDARE` but for these:

    Args:
        density: p in (0, 1]; default 0.05.
        rescale: ``"none"`` (default) | ``"l1"`` | ``"expectation"`` (paper only).
        clip: not used; accepted so that both optimizers have one signature.

    Raises:
        ArgumentError: a value out of range; parameters without names, or of an unsupported dtype.
        MismatchError: a parameter has no tensor of its shape in τ.

    Reference: arXiv 2405.17931, Eq. 4-7 and Algorithm 2; ties in magnitude: see `Magnitude`.

    Example:
        >>> import torch, paretune as pt
        >>> model = torch.nn.Linear(4, 2)
        >>> base = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        >>> tau = pt.TaskVector.between(base=base, reference=model)
        >>> optimizer = pt.OnTIES(model.named_parameters(), tau, lr=1e-3, density=0.2, weight=1e-4)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    method = "onties"
