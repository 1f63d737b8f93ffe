"""From parsed arguments to a `Method`: the one place that knows both the optimizers and the trainers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from paretune.cli.method_lora import lora_method
from paretune.errors import ArgumentError, CheckpointError, PareTuneError
from paretune.task_vector import TaskVector
from paretune.training.arguments import OURS, given_options
from paretune.training.plan import empty_model, is_at_hand
from paretune.training.request import Method, Request

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import Trainer

    from paretune.optim.learning_rates import LearningRates
    from paretune.training.trainer import OptimizerFactory

_MERGING = {name: name for name in ("density", "weight", "pull", "every", "variant", "rescale", "clip")}


def build_method(request: Request, *, planning: bool = False) -> Method:
    """How the requested run optimizes.

    Args:
        request: checked by :func:`paretune.training.arguments.check`.
        planning: do not download models from the hub; what is not on this disk becomes a note.

    Raises:
        ArgumentError: arguments that do not go together.
        CheckpointError: a model that cannot be read.
        MismatchError: base and reference are not a pair.
    """
    from paretune.optim.memory import moments_of

    own = request.own
    wraps = own.child_tuning is not None or own.l2_to_reference or own.l1_to_reference
    adapts = own.optimizer in OURS and request.model.use_peft
    if request.training.deepspeed and (wraps or adapts or own.optimizer == "onties"):
        mend = "under it only --optimizer ondare works (ZeRO-1 and 2, without LoRA): take that alone, or FSDP2"
        raise ArgumentError("deepspeed", str(request.training.deepspeed), mend)
    rates = _rates(request)
    if own.optimizer is None and not wraps and rates is None:
        method = Method(name=_value(request.training.optim))
        method.state_bytes["moments"] = moments_of(method.name, _itemsize(request))
    elif adapts:
        method = lora_method(request, *_tau_if_at_hand(request, planning))
    elif own.optimizer in OURS:
        method = _online(request, planning, rates)
    else:
        method = _adamw(request, rates)
    if rates is not None:
        method.name += " + learning rates"
    if own.child_tuning is not None:
        _add_child_tuning(method, request)
    if own.l2_to_reference or own.l1_to_reference:
        _add_anchor(method, request, planning)
    if own.ema_decay is not None:
        _add_average(method, own.ema_decay)
    if request.model.use_peft:
        method.name += " + lora"
    return method


def _rates(request: Request) -> LearningRates | None:
    """The factors of the learning rate, checked against what will be trained."""
    from paretune.optim.learning_rates import LearningRates

    path = request.own.learning_rate_factors
    if path is None:
        return None
    _check_readable("learning_rate_factors", path)
    rates = LearningRates(path)
    if is_at_hand(request.model_path):
        rates.match(_shapes(request))
    return rates


def _adamw(request: Request, rates: LearningRates | None) -> Method:
    chosen = _value(request.training.optim)
    if request.own.optimizer is None and "optim" in request.given and not chosen.startswith("adamw_torch"):
        mend = "child tuning, pulls to the reference and factors of the learning rate work with --optimizer only"
        raise ArgumentError("optim", chosen, mend)
    if rates is not None:
        return _rated_adamw(request, rates)
    fused = chosen == "adamw_torch_fused" or None  # None lets torch choose, as transformers does for adamw_torch

    def factory(groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.AdamW(groups, fused=fused)

    return Method(name="adamw", factory=factory, state_bytes={"moments": 2.0 * _itemsize(request)})


def _rated_adamw(request: Request, rates: LearningRates) -> Method:
    """AdamW, which is OnDARE that leaves nothing out and adds nothing, with a learning rate for each entry."""
    from paretune.optim import OnDARE
    from paretune.optim.memory import planned

    def factory(groups: list[dict[str, Any]]) -> Optimizer:
        with _quiet("paretune.optim"):  # it would speak of a task vector
            optimizer = OnDARE(groups, None, density=1.0, weight=0.0, learning_rates=rates)
        optimizer.statement = f"AdamW with learning rates {rates}"
        return optimizer

    held = planned("ondare", torch.float32 if _itemsize(request) == 4 else torch.bfloat16, tau="none")
    kept = {part: size for part, size in held.items() if part not in ("model", "gradients", "tau")}
    return Method(name="adamw", factory=factory, state_bytes=kept, statement=lambda _: f"learning rates {rates}")


def _online(request: Request, planning: bool, rates: LearningRates | None) -> Method:
    from paretune.operators import METHODS
    from paretune.optim import OnDARE, OnTIES
    from paretune.optim.memory import planned

    own = request.own
    kind = OnDARE if own.optimizer == "ondare" else OnTIES
    options = given_options(own, _MERGING) | {"seed": request.training.seed, "learning_rates": rates}
    tau, missing = _tau_if_at_hand(request, planning)

    def factory(groups: list[dict[str, Any]], total_steps: int) -> Optimizer:
        return kind(groups, tau, total_steps=total_steps, **options)

    def statement(steps: int | None) -> str | None:
        return _statement_before(request, lambda named: kind(named, tau, total_steps=steps, **options), options, steps)

    method = Method(name=str(own.optimizer), factory=factory, tau=tau)
    if missing:
        method.notes.append(missing)
    else:
        method.statement = statement
    dtype = torch.float32 if _itemsize(request) == 4 else torch.bfloat16
    density = own.density if own.density is not None else METHODS[str(own.optimizer)].density
    held = planned(str(own.optimizer), dtype, density=density, every=own.every or 1, tau="files" if tau else "none")
    method.state_bytes.update({part: size for part, size in held.items() if part not in ("model", "gradients")})
    return method


def _tau_if_at_hand(request: Request, planning: bool) -> tuple[TaskVector | None, str | None]:
    """The task vector, None without a base; or, while planning, a note of what is not on this disk."""
    own = request.own
    elsewhere = [path for path in (own.base_model, request.reference_path) if path and not os.path.exists(path)]
    if planning and any(not is_at_hand(path) for path in elsewhere):
        return None, f"{' and '.join(elsewhere)} not on this disk: the task vector is checked when training starts"
    return (_task_vector(request) if own.base_model else None), None


def _task_vector(request: Request) -> TaskVector:
    _check_readable("base_model", str(request.own.base_model))
    _check_readable(*_reference(request))
    tau = TaskVector.between(
        base=str(request.own.base_model), reference=request.reference_path, base_vocab=request.own.base_vocab
    )
    if not request.model.use_peft:  # adapted weights are matched where their layers are known
        tau.match(_shapes(request))
    return tau


def _reference(request: Request) -> tuple[str, str]:
    """The reference, and the argument that named it."""
    return ("reference_model" if request.own.reference_model else "model_name_or_path"), request.reference_path


def _check_readable(argument: str, path: str) -> None:
    """Open a checkpoint's headers, so that what is wrong with them is said with the argument's name."""
    from paretune.checkpoint import Checkpoint

    try:
        Checkpoint(path)
    except CheckpointError as error:
        mend = "" if os.path.exists(path) else "; give a model directory or a hub id"
        raise CheckpointError(f"{argument}={path!r}: {str(error).removeprefix(f'{path}: ')}{mend}") from error


def _shapes(request: Request) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that will be trained, without loading them."""
    return {name: tuple(p.shape) for name, p in empty_model(request).named_parameters() if p.requires_grad}


def _statement_before(request: Request, make: Any, options: dict[str, Any], steps: int | None) -> str | None:
    """The optimizer's statement, made on memory-mapped parameters: nothing is loaded."""
    from paretune.checkpoint import Checkpoint

    if steps is None and "pull" in options:
        return None
    try:
        stored = Checkpoint(request.model_path)
        trained = _shapes(request)
        named = [
            (name, torch.nn.Parameter(stored.flat(name).view(stored[name].shape))) for name in stored if name in trained
        ]
    except CheckpointError:
        return None
    groups = [{"params": named, "lr": request.training.learning_rate}]
    with _quiet("paretune.optim"):
        return str(make(groups).statement)


def _add_child_tuning(method: Method, request: Request) -> None:
    from paretune.optim.child_tuning import ChildTuning
    from paretune.optim.fisher import fisher_information
    from paretune.training.probe import task_batches, task_loss

    own, seed = request.own, request.training.seed
    held: list[Trainer] = []

    def fisher() -> Any:
        trainer: Any = held[0]
        return fisher_information(trainer.model, task_batches(trainer, own.child_batches, seed), task_loss(trainer))

    def wrap(inner: Optimizer) -> Optimizer:
        density = float(own.child_density or 1.0)
        if own.child_tuning == "d":
            return ChildTuning(inner, mode="D", density=density, fisher=fisher)
        return ChildTuning(inner, mode="F", density=density, seed=seed)

    method.name += f" + child_tuning {own.child_tuning}"
    earlier = method.before_training

    def before_training(trainer: Trainer) -> None:
        held.append(trainer)
        if earlier is not None:
            earlier(trainer)

    method.before_training = before_training
    _wrap(method, wrap)
    method.state_bytes["child"] = 1.0 if own.child_tuning == "d" else 0.0


def _add_anchor(method: Method, request: Request, planning: bool) -> None:
    from paretune.optim.anchor import Anchor

    own = request.own
    if not planning or is_at_hand(request.reference_path):
        _check_readable(*_reference(request))

    def wrap(inner: Optimizer) -> Optimizer:
        return Anchor(inner, request.reference_path, l2=own.l2_to_reference or 0.0, l1=own.l1_to_reference or 0.0)

    method.name += " + pull to the reference"
    _wrap(method, wrap)
    if _itemsize(request) == 2:
        method.state_bytes["anchor"] = 4.0


def _add_average(method: Method, decay: float) -> None:
    from paretune.optim.ema import EMA

    method.average = lambda named: EMA(named, decay=decay)
    method.name += " + ema"
    method.state_bytes["average"] = 4.0


def _wrap(method: Method, wrap: Any) -> None:
    inner = method.factory
    if inner is None:
        raise PareTuneError("nothing to wrap: choose --optimizer")
    if method.name.startswith(OURS):
        # The signature tells `attach` whether the factory wants the number of steps.
        def with_steps(groups: list[dict[str, Any]], total_steps: int) -> Optimizer:
            return wrap(inner(groups, total_steps=total_steps))

        method.factory = with_steps
        return
    method.factory = _composed(inner, wrap)


def _composed(inner: OptimizerFactory, wrap: Any) -> OptimizerFactory:
    def factory(groups: list[dict[str, Any]]) -> Optimizer:
        return wrap(inner(groups))

    return factory


def _itemsize(request: Request) -> int:
    """Bytes of a parameter as it will be loaded; ``auto`` is the checkpoint's dtype, mostly a 16-bit one."""
    return 4 if request.model.dtype in ("float32", None) else 2


def _value(option: Any) -> str:
    return str(getattr(option, "value", option))


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
