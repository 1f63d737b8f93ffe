"""Online merging around any optimizer: what its step changed is merged with the task vector."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import log
from ..errors import ArgumentError, StateError
from ..operators import Consensus, Random, SignElection, Sparsify, WeightedSum, above
from ..task_vector import TaskVector
from .arguments import in_range, whole
from .memory import MemoryReport, report
from .parts import Part, local, part_of
from .pull import Amount, share_lost, tau_share
from .rule import Agreed, DenseUpdate, Piece, Rule, agree, require_shardable
from .tau import Tau
from .weights import MASTER, At, require_supported, weights_of
from .wrapper import OptimizerWrapper, require_dense

_LOG = log.get("optim")
# Optimizers of torch and torchao that decay weights apart from the gradient; Adam, NAdam and RAdam say it in groups.
_DECOUPLED = frozenset({"AdamW", "Adafactor", "Muon", "AdamW8bit", "AdamW4bit", "AdamWFp8", "GaLoreAdamW"})
_WHOLE_ONLY = frozenset({"Adafactor", "Muon", "GaLoreAdamW"})  # torch's own fail on sharded parameters (2.13)
_REFUSED = {
    "capturable": "a captured CUDA graph would repeat the masks of one step: leave it out",
    "differentiable": "merging is not differentiated: leave it out",
}
_COUPLED = frozenset({"SGD", "ASGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Rprop"}) | {
    "Adam8bit",
    "Adam4bit",
    "AdamFp8",
}


class _Change:
    """δ = after − before, with what is pending: computed where it is asked for."""

    def __init__(self, after: Tensor, before: Tensor, pending: Tensor | None) -> None:
        self.after, self.before, self.pending, self.n = after, before, pending, after.numel()

    def at(self, index: Tensor) -> Tensor:
        return self._of(index)

    def slice(self, start: int, stop: int, step: int = 1) -> Tensor:
        return self._of(slice(start, stop, step))

    def above(self, start: int, stop: int, bound: float) -> Tensor:
        return above(self.slice(start, stop), bound)

    def _of(self, at: At) -> Tensor:
        after = self.after[at]
        wide = torch.float64 if after.dtype == torch.float64 else torch.float32
        delta = after.to(wide) - self.before[at].to(wide)
        return delta if self.pending is None else delta.add_(self.pending[at])


class OnlineMerging(OptimizerWrapper):
    """Any optimizer, each of whose updates is merged with the task vector.

        δ = what the inner optimizer's step changed;   θ ← θ + C(F(δ), F(τ))

    The parameters are copied before the inner step (one more copy of the trained parameters for the time of the
    step). Decoupled weight decay is taken out of the inner optimizer and applied here, before the update, so that it
    is not sparsified; decay that the inner optimizer adds to the gradient (SGD, Adam) is part of δ. For bfloat16
    parameters the inner optimizer's own rounding stays; what merging adds is accumulated in a split float32 master.
    OnTIES is better served by `OnTIES` there: a difference of bfloat16 parameters is a whole number of ulps.
    Where nothing is left out and nothing added (weight 0, density 1) the inner optimizer steps alone, bit for bit.

    Args:
        inner_optimizer: any first-order ``torch.optim.Optimizer`` built from ``model.named_parameters()``.
        tau: τ = reference − base; None only with weight 0.
        sparsify: F, default ``Random(density=5e-4)``.
        consensus: C, default `WeightedSum`.
        weight: α in [0, 1], the weight of τ.
        every: K ≥ 1, merge every K-th step (Step-K).
        seed: keys the random masks.
        decoupled: whether the inner optimizer's weight decay is decoupled; known for torch's own, needed for others
            where weight decay is not 0.

    Raises:
        ArgumentError: an unnamed parameter, a value out of range, an optimizer that needs a closure (LBFGS), sparse
            gradients (SparseAdam), or is ``capturable`` or ``differentiable``.
        MismatchError: a parameter has no tensor of its shape in τ.

    Reference: arXiv 2405.17931, section 4 (its optimizers are AdamW with this step; any other inner one is ours).

    Example:
        >>> import torch, paretune as pt
        >>> model = torch.nn.Linear(4, 2)
        >>> base = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        >>> tau = pt.TaskVector.between(base=base, reference=model)
        >>> inner = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = pt.OnlineMerging(inner, tau, sparsify=pt.Magnitude(density=0.2),
        ...                              consensus=pt.SignElection(), weight=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    own_state: ClassVar[frozenset[str]] = frozenset({MASTER, "pending"})

    def __init__(
        self,
        inner_optimizer: Optimizer,
        tau: TaskVector | None,
        sparsify: Sparsify | None = None,
        consensus: Consensus | None = None,
        weight: float = 5e-7,
        every: int = 1,
        seed: int = 0,
        decoupled: bool | None = None,
    ) -> None:
        super().__init__(inner_optimizer)
        if isinstance(inner_optimizer, torch.optim.SparseAdam):
            raise ArgumentError("inner_optimizer", "SparseAdam", "merging needs dense gradients: take AdamW")
        if any("tau_fingerprint" in group for group in self.param_groups):
            mend = "it merges with a task vector already: use it alone, or pass a plain optimizer"
            raise ArgumentError("inner_optimizer", type(inner_optimizer).__name__, mend)
        in_range("weight", weight, 0, 1)
        whole("every", every, 1)
        whole("seed", seed, None)
        if tau is None and weight > 0:
            raise ArgumentError("tau", None, f"weight {weight} needs it: pass TaskVector.between(base=…, reference=…)")
        if tau is not None and not isinstance(tau, TaskVector):
            raise ArgumentError("tau", tau, "pass TaskVector.between(base=…, reference=…)")
        sparsify = Random(density=5e-4) if sparsify is None else sparsify
        consensus = WeightedSum() if consensus is None else consensus
        if not isinstance(sparsify, Sparsify):
            raise ArgumentError("sparsify", sparsify, "pass Random(density=…), Magnitude(density=…) or alike")
        if not callable(consensus):
            raise ArgumentError("consensus", consensus, "pass WeightedSum(), SignElection() or alike")
        self.weight, self.every = weight, every
        self.rule = Rule(sparsify, consensus, seed)
        self._decoupled = decoupled
        self._vector = tau
        self._bind()
        for group in self.param_groups:
            self._mark(group)
        self.statement: str = str(self.amount())
        _LOG.info(self.statement)

    def _step(self) -> None:
        if self._initialising():
            self.inner.step()
            for _, named in [] if self._changes_nothing() else self.named_groups():
                for _, p in named:
                    self._make_state(p)
            return
        groups = self.named_groups()
        trained = {p: name for _, named in groups for name, p in named if p.grad is not None}
        for p, name in trained.items():
            if p.grad is not None:
                require_dense(name, p.grad)
        if self._changes_nothing():
            self.inner.step()
            for group, _ in groups:
                group["merge_calls"] += 1
            return
        for p in trained:
            self._make_state(p)
        before = {p: local(p.detach()).clone() for p in trained}
        decays = [group.get("weight_decay", 0.0) if self._decays_apart(group) else None for group, _ in groups]
        try:
            for (group, _), decay in zip(groups, decays, strict=True):
                if decay is not None:
                    group["weight_decay"] = 0.0
            self.inner.step()
        finally:
            for (group, _), decay in zip(groups, decays, strict=True):
                if decay is not None:
                    group["weight_decay"] = decay
        agreed = self._agree(groups, before)
        for (group, named), decay in zip(groups, decays, strict=True):
            merging = (group["merge_calls"] + 1) % self.every == 0
            for name, p in named:
                if p in before:
                    factor = 1 - float(group["lr"]) * decay if decay else 1.0
                    self._apply(name, p, before.pop(p), factor, group["merge_calls"], merging, agreed)
            group["merge_calls"] += 1

    def _changes_nothing(self) -> bool:
        """Whether C(F(δ), 0·F(τ)) is δ: the unweighted election alone listens to a τ of weight 0."""
        consensus = self.rule.consensus
        silent = isinstance(consensus, WeightedSum) or (isinstance(consensus, SignElection) and consensus.weighted)
        return self.weight == 0 and self.rule.sparsify.density == 1 and silent

    def _agree(
        self, groups: list[tuple[dict[str, Any], list[tuple[str, Tensor]]]], before: dict[Tensor, Tensor]
    ) -> dict[str, Agreed]:
        """What the ranks must find out together; nothing where no parameter is sharded."""
        merges = []
        for group, named in groups:
            if (group["merge_calls"] + 1) % self.every == 0:
                parts = [(name, p, self._part(name, p)) for name, p in named if p in before]
                pieces = [Piece(name, self._change(p, before[p]), part) for name, p, part in parts if part.sharded]
                merges.append((self.rule, pieces, group["merge_calls"]))
        return agree(merges, self._tau)

    def _change(self, p: Tensor, before: Tensor) -> _Change:
        pending = self.own[p].get("pending")
        flat = None if pending is None else local(pending).view(-1)
        return _Change(local(p.detach()).reshape(-1), before.reshape(-1), flat)

    def _apply(
        self, name: str, p: Tensor, before: Tensor, decay: float, call: int, merging: bool, agreed: dict[str, Agreed]
    ) -> None:
        state = self.own[p]
        pending = local(state["pending"]).view(-1) if "pending" in state else None
        change = self._change(p, before)
        if not merging:
            change.pending = None
        delta = change.slice(0, change.n)
        local(p.detach()).copy_(before)
        weights = weights_of(p, state.get(MASTER))
        if decay != 1:
            weights.scale(decay)
        if not merging:
            weights.add(delta)
            if pending is not None:
                pending.add_(delta)
        else:
            if pending is not None:
                weights.add(pending.neg())
                pending.zero_()
            piece = Piece(name, DenseUpdate(delta), part_of(name, p))
            merged = self.rule.merged([piece], self._tau, self.weight, call, p.device, agreed)
            for _, index, values in merged:
                if index is None:
                    weights.add(values)
                else:
                    weights.add_at(index, values)
        weights.finish()

    def _make_state(self, p: Tensor) -> None:
        state = self.own.setdefault(p, {})
        kinds = {MASTER: torch.int16} if p.dtype == torch.bfloat16 else {}
        if self.every > 1:
            kinds["pending"] = torch.float64 if p.dtype == torch.float64 else torch.float32
        for key, dtype in kinds.items():
            if key not in state:
                state[key] = torch.zeros_like(
                    p, dtype=dtype, memory_format=torch.contiguous_format, requires_grad=False
                )

    def _decays_apart(self, group: dict[str, Any]) -> bool:
        if not group.get("weight_decay"):
            return False
        if self._decoupled is not None:
            return self._decoupled
        kind = type(self.inner).__name__
        if "decoupled_weight_decay" in group:
            return bool(group["decoupled_weight_decay"])
        if kind in _DECOUPLED or kind in _COUPLED:
            return kind in _DECOUPLED
        mend = f"say whether the weight decay of {kind} is decoupled from the gradient (True) or part of it (False)"
        raise ArgumentError("decoupled", None, mend)

    def _bind(self) -> None:
        parameters = self._trainable()
        for name, p in parameters.items():
            require_supported(name, p)
            self._part(name, p)
        for group in self.param_groups:
            for option, mend in _REFUSED.items():
                if group.get(option):
                    raise ArgumentError("inner_optimizer", f"{type(self.inner).__name__}({option}=True)", mend)
            self._decays_apart(group)
        if self._vector is not None:
            self._vector.match({name: tuple(p.shape) for name, p in parameters.items()})
        self._tau = Tau(self._vector)

    def _part(self, name: str, p: Tensor) -> Part:
        part, kind = part_of(name, p), type(self.inner).__name__
        if part.sharded and kind in _WHOLE_ONLY:
            mend = "it does not work on sharded parameters (FSDP2): take AdamW, SGD or Lion there"
            raise ArgumentError("inner_optimizer", kind, mend)
        require_shardable(name, part, self.rule.sparsify)
        return part

    def _trainable(self) -> dict[str, Tensor]:
        return {name: p for _, named in self.named_groups() for name, p in named if p.requires_grad}

    def _mark(self, group: dict[str, Any]) -> None:
        group["merge_calls"] = 0
        group["tau_fingerprint"] = self._tau.fingerprint

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of ``(name, parameter)`` pairs; each needs its tensor in the task vector."""
        super().add_param_group(param_group)
        try:
            self._bind()
        except Exception:
            self.param_groups.pop()
            raise
        self._mark(self.param_groups[-1])

    def amount(self) -> Amount:
        """What τ will amount to over 1,000 steps."""
        sparsify, steps = self.rule.sparsify, 1000
        parameters = self._trainable()
        parts = {name: part_of(name, p) for name, p in parameters.items()}
        share = tau_share(sparsify, self._tau, parts) if self.weight else 0.0
        scale = 1 / sparsify.density if sparsify.rescale == "expectation" else 1.0
        summed = isinstance(self.rule.consensus, WeightedSum)
        known = summed and (isinstance(sparsify, Random) or sparsify.density == 1)
        return Amount(
            method=f"OnlineMerging({type(self.inner).__name__})",
            weight=self.weight,
            density=sparsify.density,
            every=self.every,
            pull=self.weight * share * (steps // self.every),
            steps=steps,
            known_steps=False,
            upper_bound=not summed,
            lost=share_lost(parameters, self._tau, self.weight * scale),
            passed=(sparsify.density if sparsify.rescale == "none" else 1.0) if known else None,
            lr=float(self.param_groups[0].get("lr", 0.0)),
            inner="it",
        )

    def memory_report(self) -> MemoryReport:
        """The bytes that this rank holds now, by part; during a step a copy of the parameters comes on top."""
        trained = list(self._trainable().values())
        states = ({**self.state.get(p, {}), **self.own.get(p, {})} for p in trained)
        return report(trained, states, self._tau.resident_bytes)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, for the same parameters, order and task vector.

        Raises:
            StateError: it was saved without online merging, for other parameters, or with another task vector.
        """
        for group, other in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if "merge_calls" not in other:
                raise StateError("the saved state is of an optimizer without OnlineMerging: resume with the same one")
            if other["tau_fingerprint"] != group["tau_fingerprint"]:
                raise StateError(
                    f"the saved state was made with task vector {other['tau_fingerprint'][:12]}, this one is "
                    f"{group['tau_fingerprint'][:12]}: pass the same base and reference"
                )
        super().load_state_dict(state_dict)
