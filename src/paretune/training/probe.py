"""A trainer's own batches and loss, outside its training loop: what Fisher information is estimated on."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Trainer

# Where TRL's trainers collect what they log; a probe must leave no trace in it.
_METRICS = ("_metrics", "_stored_metrics", "_total_train_tokens")


def task_batches(trainer: Trainer, count: int, seed: int = 0) -> Iterator[Any]:
    """Batches of randomly chosen training rows, collated and placed as the trainer would.

    The trainer's loaders, its logs and torch's random state are left alone.

    Args:
        trainer: a TRL trainer with a training set of known length.
        count: how many batches of ``per_device_train_batch_size`` rows; fewer where the data has fewer rows.
        seed: of the choice.

    Yields:
        What :func:`task_loss` takes.
    """
    if hasattr(trainer, "task_batches"):  # joint training: the objectives make its batches
        yield from trainer.task_batches(count, seed)
        return
    dataset: Any = trainer._remove_unused_columns(trainer.train_dataset, "training")
    size = trainer.args.per_device_train_batch_size
    rows = random.Random(seed).sample(range(len(dataset)), min(count * size, len(dataset)))
    for start in range(0, len(rows), size):
        batch = trainer.data_collator([dataset[row] for row in rows[start : start + size]])
        yield {name: value.to(trainer.args.device) if hasattr(value, "to") else value for name, value in batch.items()}


def task_loss(trainer: Trainer) -> Callable[[nn.Module, Any], Tensor]:
    """The trainer's loss as a function of model and batch that leaves the trainer's logs as they were.

    Args:
        trainer: the trainer.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        kept = {name: copy.deepcopy(getattr(trainer, name)) for name in _METRICS if hasattr(trainer, name)}
        try:
            with trainer.compute_loss_context_manager():
                value: Any = trainer.compute_loss(model, batch)
                return value
        finally:
            for name, value in kept.items():
                setattr(trainer, name, value)

    return loss
