"""One step of one group of parameters of OnDARE or OnTIES: moments and decay, then the merge.

Two halves, because ranks that share parameters agree between them for all groups at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .adamw import AdamUpdate, update_moments
from .kernels import Compiled, compiled
from .parts import local, part_of
from .rule import Agreed, Piece, Rule, require_shardable
from .tau import Tau
from .weights import Weights, weights_of


class GroupStep:
    """A group within a step.

    Args:
        group: the optimizer's group; its ``calls`` counts steps.
        rule: the merge.
        trained: plain names and parameters that have a gradient.
        states: their states, made before.
    """

    def __init__(
        self,
        group: dict[str, Any],
        rule: Rule,
        trained: Sequence[tuple[str, Tensor]],
        states: Sequence[dict[str, Tensor]],
    ) -> None:
        self.group, self.rule = group, rule
        self.due: bool = (group["calls"] + 1) % group["every"] == 0
        self.pieces: list[Piece] = []
        self._weights: list[Weights] = []
        self._pending: list[Tensor | None] = []
        self._gradients = [local(p.grad).reshape(-1) for _, p in trained if p.grad is not None]
        self._decay = 1 - float(group["lr"]) * group["weight_decay"]
        if states:
            torch._foreach_add_([state["step"] for state in states], 1)
        for (name, p), state in zip(trained, states, strict=True):
            self._take(name, p, state)
        self._kernels: Compiled | None = compiled()
        self._by_kernel = self._choose()
        self._advance()

    def _take(self, name: str, p: Tensor, state: dict[str, Tensor]) -> None:
        group = self.group
        part = part_of(name, p)
        require_shardable(name, part, self.rule.sparsify)
        update = AdamUpdate(
            local(state["exp_avg"]).view(-1),
            local(state["exp_avg_sq"]).view(-1),
            state["step"].item(),
            float(group["lr"]),
            group["betas"],
            group["eps"],
            released=self._released,
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
            if self._decay != 1 and not self._released:  # torch decays before the update, the released code after it
                self._scale(weight)
            if self.due and pending is not None:  # Step-K: roll back to the last merge, merge everything since
                update.pending = pending
                weight.add(pending.neg())

    def _scale(self, weight: Weights) -> None:
        if self._kernels is None:
            weight.scale(self._decay)
        else:
            self._kernels.scale(weight, self._decay)

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
        for weight, pending in zip(self._weights, self._pending, strict=True):
            if self.due and pending is not None:
                pending.zero_()
            if self._decay != 1 and self._released:
                self._scale(weight)
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
