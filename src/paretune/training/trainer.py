"""Give any transformers or TRL trainer another optimizer, keeping everything else that the trainer decides."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from paretune.errors import ArgumentError, PareTuneError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import Trainer

    AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)
else:
    AnyTrainer = TypeVar("AnyTrainer")

OptimizerFactory = Callable[..., "torch.optim.Optimizer"]


def attach(trainer: AnyTrainer, optimizer_factory: OptimizerFactory) -> AnyTrainer:
    """Make a trainer train with ``optimizer_factory(named groups)``.

    The factory receives the groups that the trainer itself would have built (weight decay off for biases and
    norms), each parameter with its name, and ``lr``, ``betas``, ``eps`` of ``trainer.args`` in every group: the
    trainer's flags rule. A factory that has a parameter ``total_steps`` also receives the exact number of optimizer
    steps of the run. Schedules, clipping, checkpoints, DDP and FSDP stay the trainer's business; its
    ``create_optimizer`` is what changes, so the hand-over works where ``optimizers=(optimizer, None)`` is refused.

    Args:
        trainer: any ``transformers.Trainer`` (so any TRL trainer), not yet trained.
        optimizer_factory: ``factory(groups)`` or ``factory(groups, total_steps=int)`` returning an optimizer;
            ``groups`` is a list of ``{"params": [(name, Parameter), ...], "weight_decay": float, "lr": float,
            "betas": (float, float), "eps": float}``.

    Returns:
        The same trainer.

    Raises:
        ArgumentError: the trainer has an optimizer already; or, once training starts, the factory's learning rate
            contradicts ``trainer.args.learning_rate``.

    Example:
        >>> import torch, transformers
        >>> arguments = transformers.TrainingArguments(output_dir="out", use_cpu=True, report_to="none")
        >>> trainer = transformers.Trainer(torch.nn.Linear(2, 2), arguments)
        >>> attach(trainer, torch.optim.AdamW).create_optimizer().param_groups[0]["param_names"]
        ['weight']
    """
    if getattr(trainer, "optimizer", None) is not None:
        raise ArgumentError(
            "trainer", type(trainer).__name__, "it has an optimizer already; attach before training, once"
        )
    wants_steps = _accepts(optimizer_factory, "total_steps")
    if wants_steps:
        _remember_total_steps(trainer)

    def create_optimizer(model: nn.Module | None = None) -> torch.optim.Optimizer:
        if trainer.optimizer is None:
            groups = named_groups(trainer, model)
            extra = {"total_steps": total_steps(trainer)} if wants_steps else {}
            optimizer = optimizer_factory(groups, **extra)
            _check_learning_rate(optimizer, trainer.args.learning_rate)
            trainer.optimizer = optimizer
        return trainer.optimizer

    trainer.create_optimizer = create_optimizer  # type: ignore[method-assign]
    return trainer


def named_groups(trainer: Trainer, model: nn.Module | None = None) -> list[dict[str, Any]]:
    """The trainer's parameter groups with names, and its learning rate, betas and eps in each.

    Args:
        trainer: where ``args`` and the choice of decayed parameters come from.
        model: the module to optimize; the trainer's own by default (FSDP1 hands over the wrapped one).

    Returns:
        One group with weight decay and one without; empty groups are left out.
    """
    module: Any = trainer.model if model is None else model
    decayed = set(trainer.get_decay_parameter_names(module))
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    arguments = trainer.args
    shared = {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
    }
    parts = [
        ([pair for pair in named if pair[0] in decayed], arguments.weight_decay),
        ([pair for pair in named if pair[0] not in decayed], 0.0),
    ]
    return [{"params": pairs, "weight_decay": decay, **shared} for pairs, decay in parts if pairs]


def total_steps(trainer: Trainer) -> int:
    """The number of optimizer steps that ``trainer.train()`` will count to.

    Args:
        trainer: with its data and arguments; ``args.max_steps`` rules where it is positive.

    Raises:
        PareTuneError: the training data has no length and ``max_steps`` is not set.
    """
    arguments = trainer.args
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    remembered = getattr(trainer, "_paretune_total_steps", None)
    if remembered is not None:
        return int(remembered)
    try:
        batches = len(trainer.get_train_dataloader())
    except TypeError as error:
        raise PareTuneError(
            "max_steps=-1: the training data has no length, so the number of steps is unknown; set max_steps"
        ) from error
    updates = max(-(-batches // arguments.gradient_accumulation_steps), 1)
    return math.ceil(arguments.num_train_epochs * updates)


def save_whole_model(trainer: Trainer, directory: str) -> None:
    """``trainer.save_model``, which writes no weights at all where checkpoints are sharded (FSDP's usual setting)."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None) if trainer.is_fsdp_enabled else None
    if plugin is None:
        trainer.save_model(directory)
        return
    checkpoints = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        trainer.save_model(directory)
    finally:
        plugin.set_state_dict_type(checkpoints)


def _remember_total_steps(trainer: Trainer) -> None:
    """Note the trainer's own step count where it computes it: just before it creates the optimizer."""
    original = trainer.set_initial_training_values

    def set_initial_training_values(*args: Any, **kwargs: Any) -> Any:
        values = original(*args, **kwargs)
        # The last of the returned values is max_steps in every transformers 5.
        trainer._paretune_total_steps = values[-1]  # type: ignore[attr-defined]
        return values

    trainer.set_initial_training_values = set_initial_training_values  # type: ignore[method-assign]


def _accepts(factory: OptimizerFactory, keyword: str) -> bool:
    try:
        parameters: Iterable[inspect.Parameter] = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    return any(
        parameter.name == keyword
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        for parameter in parameters
    )


def _check_learning_rate(optimizer: torch.optim.Optimizer, expected: float) -> None:
    """Refuse an optimizer whose own lr is not the trainer's.

    The groups carry the trainer's lr, so a factory's ``lr=`` would be ignored without a word. A default of the
    optimizer's class is no choice of the user's; several different rates are one (per-layer rates).
    """
    rates = {float(group["lr"]) for group in optimizer.param_groups if "lr" in group}
    given = optimizer.defaults.get("lr")
    innermost: Any = optimizer
    while "lr" not in inspect.signature(type(innermost)).parameters and hasattr(innermost, "inner"):
        innermost = innermost.inner  # a wrapper's defaults are those of the optimizer in it
    parameter = inspect.signature(type(innermost)).parameters.get("lr")
    is_class_default = parameter is not None and given == parameter.default
    contradicts = given is not None and not is_class_default and float(given) != expected
    if contradicts or (len(rates) == 1 and rates != {float(expected)}):
        value = given if contradicts else rates.pop()
        raise ArgumentError(
            "lr", value, f"the optimizer factory contradicts the trainer's learning_rate={expected}; give it there only"
        )
