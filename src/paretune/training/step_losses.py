"""The parts of an optimizer step, and the losses it measures while its micro-batches come in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paretune.training.objectives import Batch
from paretune.training.ranks import sum_over_ranks

MIX = "mix"  # what a step on several objectives is called


@dataclass
class Part:
    """One objective's share of a micro-batch.

    Args:
        name: the objective's.
        batch: for its loss.
        count: what the loss of this batch is the mean over.
        scale: what that mean is multiplied by in the gradient.
    """

    name: str
    batch: Batch
    count: int
    scale: float = 0.0


class StepLosses:
    """The losses of one optimizer step.

    Args:
        chosen: objective to coefficient.
        micro_batches: of each.
        stale: the values that the choice was made from.
        measured: losses that were measured without gradient before the choice.
    """

    def __init__(
        self, chosen: Mapping[str, float], micro_batches: int, stale: Mapping[str, float], measured: Mapping[str, float]
    ) -> None:
        self._stale, self._measured = dict(stale), dict(measured)
        self._left = micro_batches * len(chosen)
        self._parts: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in chosen}

    def add(self, part: Part, loss: Tensor) -> None:
        """Take in the loss of one part."""
        self._parts[part.name].append((loss, part.count))
        self._left -= 1

    @property
    def is_complete(self) -> bool:
        """Whether every part was taken in."""
        return self._left == 0

    def trained(self) -> dict[str, float]:
        """The mean loss of each trained objective over micro-batches and ranks."""
        sums = torch.tensor(
            [
                [sum(float(loss) * count for loss, count in parts), float(sum(count for _, count in parts))]
                for parts in self._parts.values()
            ],
            dtype=torch.float64,
        )
        means = sum_over_ranks(sums)
        return {name: float(total / count) for name, (total, count) in zip(self._parts, means, strict=True)}

    def record(self, step: int, trained: Mapping[str, float]) -> dict[str, Any]:
        """What ``training.json`` says of the step.

        Args:
            step: from 1.
            trained: from :meth:`trained`.
        """
        return {
            "step": step,
            "objective": next(iter(trained)) if len(trained) == 1 else MIX,
            "loss": {name: value for name, value in self._measured.items() if name not in trained} | dict(trained),
            "stale": self._stale,
        }
