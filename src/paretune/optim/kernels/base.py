"""What a group's step asks of kernels. The eager form is always there and is the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..adamw import AdamUpdate
from ..rule import Piece, Rule
from ..tau import Tau
from ..weights import Weights


class Kernels(Protocol):
    """`update_moments` and `Rule.merged` in another form, for what it knows; the rest stays as it was."""

    def knows(self, update: AdamUpdate, gradient: Tensor) -> bool:
        """Whether the moments of a parameter are its to compute."""
        ...

    def merges(self, rule: Rule, piece: Piece, weights: Weights) -> bool:
        """Whether the merge of a parameter that it `knows` is its as well."""
        ...

    def moments(self, updates: Sequence[AdamUpdate], gradients: Sequence[Tensor]) -> None:
        """m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g², in place."""
        ...

    def scale(self, weights: Weights, factor: float) -> None:
        """θ ← factor·θ."""
        ...

    def merge(
        self,
        rule: Rule,
        pieces: Sequence[Piece],
        weights: Sequence[Weights],
        gradients: Sequence[Tensor],
        tau: Tau,
        weight: float,
        call: int,
    ) -> None:
        """The moments, and θ += C(F(δ), F(τ)), of parameters that `knows` and `merges` accepted.

        Args:
            rule: the merge.
            pieces: the parameters' names and updates.
            weights: θ.
            gradients: g, flat.
            tau: the task vector.
            weight: α.
            call: the step, which keys the masks.
        """
        ...
