"""What is asked for (`Request`) and how it is trained (`Method`): the two things a run is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paretune.training.arguments import RunArguments

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainingArguments

    from paretune.task_vector import TaskVector
    from paretune.training.callbacks import Average
    from paretune.training.trainer import OptimizerFactory

TRAINERS = ("dpo", "kto", "sft", "grpo", "joint")


@dataclass
class Request:
    """One training run as it was asked for.

    Args:
        trainer: one of :data:`TRAINERS`.
        script: TRL's ``ScriptArguments`` (for grpo ``GRPOScriptArguments``); for joint our ``JointArguments``.
        training: TRL's configuration of the trainer.
        model: TRL's ``ModelConfig``.
        mixture: TRL's ``DatasetMixtureConfig``; None for joint.
        own: paretune's arguments.
        given: the arguments that were set, on the command line or in a YAML file.
        command: the command line, for the record.
        notices: what the user should know, said once everything is checked.
    """

    trainer: str
    script: Any
    training: TrainingArguments
    model: Any
    mixture: Any
    own: RunArguments
    given: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def model_path(self) -> str:
        """The model to train; the policy starts there."""
        return str(self.model.model_name_or_path)

    @property
    def reference_path(self) -> str:
        """The reference model: the trained one's starting point unless another is named."""
        return str(self.own.reference_model or self.model_path)

    @property
    def other_reference(self) -> bool:
        """Whether the reference is another model than the one the policy starts at."""
        return self.reference_path != self.model_path

    @property
    def trust_remote_code(self) -> bool:
        """TRL 1.x moved this flag from the model's to the trainer's arguments."""
        for holder in (self.training, self.model):
            if hasattr(holder, "trust_remote_code"):
                return bool(holder.trust_remote_code)
        return False


@dataclass
class Method:
    """How a run optimizes; whoever builds it knows the optimizers, the runner does not.

    Args:
        name: for the record: ``adamw``, ``ondare``, ``adamw + child_tuning f``, or TRL's ``--optim`` value.
        factory: for :func:`paretune.training.trainer.attach`; None keeps the trainer's own optimizer.
        average: makes a running average over named parameters; None for none.
        tau: the task vector in use, None for none.
        before_training: called with the finished trainer, before it trains.
        state_bytes: bytes a trained parameter holds in optimizer state and averages, by part.
        statement: what the task vector will amount to, as far as it is known before training.
        notes: what could not be checked while planning.
    """

    name: str
    factory: OptimizerFactory | None = None
    average: Callable[[Iterable[tuple[str, nn.Parameter]]], Average] | None = None
    tau: TaskVector | None = None
    before_training: Callable[[Trainer], None] | None = None
    state_bytes: dict[str, float] = field(default_factory=dict)
    statement: Callable[[int | None], str | None] | None = None
    notes: list[str] = field(default_factory=list)


def evaluates(training: Any) -> bool:
    """Whether a run evaluates while it trains."""
    return str(getattr(training.eval_strategy, "value", training.eval_strategy)) != "no"
