"""One step of one group of parameters of OnDARE or OnTIES: moments and decay, then the merge.

Two halves, because ranks that share parameters agree between them for all groups at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .adamw import AdamUpdate, update_moments
from .kernels import Kernels, compiled
from .learning_rates import LearningRates
from .parts import local, part_of
from .rule import Agreed, Piece, Rule, require_shardable
from .tau import Tau
from .weights import CHUNK, Weights, weights_of


class GroupStep:
    """A group within a step.

    Args:
        group: the optimizer's group; its ``calls`` counts steps.
        rule: the merge.
        trained: plain names and parameters that have a gradient.
        states: their states, made before.
        rates: factors of the learning rate; None for none.
    """

    def __init__(
        self,
        group: dict[str, Any],
        rule: Rule,
        trained: Sequence[tuple[str, Tensor]],
        states: Sequence[dict[str, Tensor]],
        rates: LearningRates | None = None,
    ) -> None:
        self.group, self.rule, self._rates = group, rule, rates
        self.due: bool = (group["calls"] + 1) % group["every"] == 0
        self.pieces: list[Piece] = []
        self._weights: list[Weights] = []
        self._pending: list[Tensor | None] = []
        self._gradients = [local(p.grad).reshape(-1) for _, p in trained if p.grad is not None]
        if states:
            torch._foreach_add_([state["step"] for state in states], 1)
        for (name, p), state in zip(trained, states, strict=True):
            self._take(name, p, state)
        self._kernels: Kernels | None = compiled()
        self._by_kernel = self._choose()
        self._advance()

    def _take(self, name: str, p: Tensor, state: dict[str, Tensor]) -> None:
        group = self.group
        part = part_of(name, p)
        require_shardable(name, part, self.rule.sparsify)
        mean, lr = local(state["exp_avg"]).view(-1), float(group["lr"])
        factor = None
        if self._rates is not None:
            one = self._rates.of_tensor(name)  # a learning rate like any other: all kernels take it
            factor = self._rates.of_entries(name, part, mean) if one is None else None
            lr *= 1.0 if one is None else one
        update = AdamUpdate(
            mean,
            local(state["exp_avg_sq"]).view(-1),
            state["step"].item(),
            lr,
            group["betas"],
            group["eps"],
            released=self._released,
            factor=factor,
            rounded=not self._exact,
        )
        self.pieces.append(Piece(name, update, part))
        self._weights.append(weights_of(p, state.get("master_low")))
        self._pending.append(local(state["pending"]).view(-1) if "pending" in state else None)

    @property
    def _released(self) -> bool:
        return self.group["variant"] == "released"

    @property
    def _exact(self) -> bool:
        """Whether the steps must have the bits of ``AdamW(foreach=False)``."""
        return self.group["density"] == 1 or self.group["every"] > 1

    def _updates(self) -> list[AdamUpdate]:
        return [piece.update for piece in self.pieces if isinstance(piece.update, AdamUpdate)]

    def _choose(self) -> list[int]:
        """Which parameters the compiled kernels merge."""
        kernels = self._kernels
        if kernels is None or not self.due:
            return []
        return [
            i
            for i, (piece, update) in enumerate(zip(self.pieces, self._updates(), strict=True))
            if self._pending[i] is None
            and update.factor is None
            and kernels.knows(update, self._gradients[i])
            and kernels.merges(self.rule, piece, self._weights[i])
        ]

    def _advance(self) -> None:
        """Moments and weight decay."""
        group, updates, gradients = self.group, self._updates(), self._gradients
        left = set(range(len(updates)))
        if self._kernels is not None:
            left.difference_update(self._by_kernel)  # one pass for moments and merge: `apply`
            known = [i for i in sorted(left) if self._kernels.knows(updates[i], gradients[i])]
            self._kernels.moments([updates[i] for i in known], [gradients[i] for i in known])
            left.difference_update(known)
        rest = sorted(left)
        update_moments(
            [updates[i].mean for i in rest],
            [updates[i].square for i in rest],
            [gradients[i] for i in rest],
            group["betas"],
            exact=self._exact,
        )
        for weight, update, pending in zip(self._weights, updates, self._pending, strict=True):
            if not self._released:  # torch decays before the update, the released code after it
                self._shrink(weight, update)
            if self.due and pending is not None:  # Step-K: roll back to the last merge, merge everything since
                update.pending = pending
                weight.add(pending.neg())

    def _shrink(self, weight: Weights, update: AdamUpdate) -> None:
        """θ ← (1 − f·ηλ)·θ."""
        shrink = update.lr * self.group["weight_decay"]
        if shrink == 0:
            return
        if update.factor is not None:
            for start in range(0, weight.n, CHUNK):
                at = slice(start, min(weight.n, start + CHUNK))
                values = weight.get(at)
                weight.put(at, values * (1 - update.factor[at].double() * shrink).to(values.dtype))
        elif self._kernels is None:
            weight.scale(1 - shrink)
        else:
            self._kernels.scale(weight, 1 - shrink)

    def apply(self, tau: Tau, agreed: Mapping[str, Agreed]) -> None:
        """The merge where it is due, the plain update where it is not. ``agreed``: from `agree`."""
        if self.due:
            self._merge(tau, agreed)
        else:
            for weight, piece, pending in zip(self._weights, self.pieces, self._pending, strict=True):
                delta = piece.update.slice(0, piece.update.n)
                weight.add(delta)
                if pending is not None:
                    pending.add_(delta)
        for weight, update, pending in zip(self._weights, self._updates(), self._pending, strict=True):
            if self.due and pending is not None:
                pending.zero_()
            if self._released:
                self._shrink(weight, update)
            weight.finish()
        self.group["calls"] += 1

    def _merge(self, tau: Tau, agreed: Mapping[str, Agreed]) -> None:
        group, pieces, weights, mine = self.group, self.pieces, self._weights, self._by_kernel
        if self._kernels is not None and mine:
            self._kernels.merge(
                self.rule,
                [pieces[i] for i in mine],
                [weights[i] for i in mine],
                [self._gradients[i] for i in mine],
                tau,
                group["weight"],
                group["calls"],
            )
        left = sorted(set(range(len(pieces))).difference(mine))
        for device in {weights[i].flat.device for i in left}:
            here = [i for i in left if weights[i].flat.device == device]
            merged = self.rule.merged([pieces[i] for i in here], tau, group["weight"], group["calls"], device, agreed)
            for i, index, values in merged:
                if index is None:
                    weights[here[i]].add(values)
                else:
                    weights[here[i]].add_at(index, values)
