"""From a request to a `JointTrainer`: both data sets, the model, objectives, schedule and stopping rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paretune.errors import CheckpointError, PareTuneError
from paretune.training.build import (
    Data,
    choose_splits,
    first_sentence,
    load_tokenizer,
    model_options,
    peft_config,
)
from paretune.training.data import load_splits
from paretune.training.joint_arguments import JointArguments
from paretune.training.request import Request, evaluates
from paretune.training.schedules import Alright, MaxRight, Mix, Schedule, Sequential

if TYPE_CHECKING:
    from paretune.training.joint import JointTrainer

_MEASURED_ROWS = 512  # of each training set, for the losses that a run ends with


@dataclass
class JointData:
    """The data of every objective, by its name."""

    parts: dict[str, Data]

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on."""
        return all(part.evaluates for part in self.parts.values())

    def record(self) -> dict[str, Any]:
        """What ``training.json`` says of it: ``{"sft": {"train": …, "evaluation": …}, "dpo": …}``."""
        return {name: part.record() for name, part in self.parts.items()}


def load_joint_data(request: Request) -> JointData:
    """Load and check both data sets.

    Args:
        request: of trainer joint.

    Raises:
        DataError: data that cannot be read or trained on.
        ArgumentError: a split is missing.
    """
    script: JointArguments = request.script
    key = script.preference_name
    parts = {}
    for name, prefix in (("sft", "sft"), (key, "preference")):
        if name == "sft" and script.rehearse:
            continue  # made once the preferences are known
        argument, other_argument = f"{prefix}_dataset", f"{prefix}_eval_dataset"
        path, other_path = getattr(script, argument), getattr(script, other_argument)
        other = None
        if evaluates(request.training) and other_path:
            other = other_path, load_splits(other_path, argument=other_argument)
        splits = load_splits(path, argument=argument)
        parts[name] = choose_splits(
            request, splits, name, name=path, argument=argument, other=other, other_argument=other_argument
        )
    if script.rehearse:
        from paretune.training.joint_rehearsal import rehearsal

        parts = {"sft": rehearsal(request, parts[key].train), **parts}
    return JointData(parts)


def make_schedule(script: JointArguments) -> Schedule:
    """The schedule that the arguments ask for."""
    key = script.preference_name
    weights = {"sft": 1 - script.weight_preference, key: script.weight_preference}
    if script.rehearse_nll:
        weights["chosen"] = weights[key] * script.rehearse_nll
        weights[key] -= weights["chosen"]
    if script.schedule == "mix":
        return Mix(weights)
    if script.schedule == "alright":
        return Alright(weights)
    if script.schedule == "maxright":
        return MaxRight(weights, script.ideal, script.refresh_every)
    return Sequential(["sft", key] if script.schedule == "sft-then-preference" else [key, "sft"])


def make_objectives(request: Request, data: JointData) -> dict[str, Any]:
    """The objectives of a request, by name.

    Args:
        request: checked.
        data: from :func:`load_joint_data`.
    """
    from paretune.training.objectives import DPO, KTO, SFT

    script, training = request.script, request.training
    settings: Any = training
    sft, preference = data.parts["sft"], data.parts[script.preference_name]
    reference = script.reference_soup or (request.reference_path if request.other_reference else None)
    shared: dict[str, Any] = {
        "beta": settings.beta,
        "ref_model": reference,
        "eval_dataset": preference.evaluation,
        "batch_size": script.preference_batch_size,
        "max_length": settings.max_length,
    }
    if script.preference_loss == "kto":
        kto_weights = {name: getattr(settings, name) for name in ("desirable_weight", "undesirable_weight")}
        chosen: Any = KTO(preference.train, **shared, **kto_weights)
    else:
        chosen = DPO(
            preference.train, **shared, loss_type=script.preference_loss, label_smoothing=settings.label_smoothing
        )
    if script.rehearse:
        from paretune.training.joint_rehearsal import rehearsal_objectives

        return {**rehearsal_objectives(request, sft.train, preference.train), script.preference_name: chosen}
    max_length = script.sft_max_length or settings.max_length
    demonstrations = SFT(
        sft.train, eval_dataset=sft.evaluation, batch_size=script.sft_batch_size, max_length=max_length
    )
    return {"sft": demonstrations, script.preference_name: chosen}


def make_joint_trainer(request: Request, data: JointData, callbacks: list[Any]) -> JointTrainer:
    """The trainer of a request.

    Args:
        request: checked.
        data: from :func:`load_joint_data`.
        callbacks: added to the trainer's own.

    Raises:
        PareTuneError: arguments, models or data that cannot be trained with.
    """
    from transformers import set_seed

    from paretune.training.joint import JointTrainer

    stopping = make_stopping(request.script)
    schedule = make_schedule(request.script)
    objectives = make_objectives(request, data)
    set_seed(request.training.seed)  # a new adapter's weights are random
    model, tokenizer = _load_model(request), load_tokenizer(request)
    try:
        trainer = JointTrainer(
            model,
            request.training,
            objectives=objectives,
            schedule=schedule,
            processing_class=tokenizer,
            callbacks=[*callbacks, *stopping, *_watching(request.script, objectives)],
        )
    except PareTuneError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise PareTuneError(f"joint training refuses this: {first_sentence(error, 400)}") from error
    trainer.stopping_rules = stopping
    return trainer


def _watching(script: JointArguments, objectives: dict[str, Any]) -> list[Any]:
    """What looks at a run with self-rehearsal while it trains."""
    from paretune.training.objectives import DPO
    from paretune.training.stall import StallWarning

    preference = objectives[script.preference_name]
    watchable = isinstance(preference, DPO) and preference.loss_type == "sigmoid" and not preference.label_smoothing
    return [StallWarning(preference)] if script.rehearse and watchable else []


def make_stopping(script: JointArguments) -> list[Any]:
    """The stopping rules that the arguments ask for."""
    from paretune.training.stopping import StopAtFront, StopAtIdeal, read_front

    rules: list[Any] = []
    if script.stop_within is not None:
        rules.append(StopAtIdeal(script.ideal, script.stop_within))
    if script.stop_at_front is not None:
        rules.append(StopAtFront(read_front(script.stop_at_front, ["sft", script.preference_name])))
    return rules


def outcome(trainer: JointTrainer) -> dict[str, Any]:
    """What ``training.json`` says of a joint run beyond any other's.

    ``losses`` has the final model's mean loss of each objective on up to 512 evenly spread training rows, and on the
    evaluation rows; ``stopped`` is the stopping rule's reason.
    """
    losses = {"train": trainer.measure("train", _MEASURED_ROWS), "eval": trainer.measure("eval")}
    reasons = [rule.reason for rule in trainer.stopping_rules if rule.reason]
    return {"steps": trainer.steps, "losses": losses, "stopped": reasons[0] if reasons else None}


def _load_model(request: Request) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    options = model_options(request)
    if isinstance(options.get("dtype"), str) and options["dtype"] != "auto":
        options["dtype"] = getattr(torch, options["dtype"])
    try:
        model = AutoModelForCausalLM.from_pretrained(request.model_path, **options)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"model_name_or_path={request.model_path!r}: {first_sentence(error)}") from error
    training: Any = request.training
    if training.disable_dropout:
        _disable_dropout(model)
    adapter = peft_config(request)
    if adapter is None:
        return model
    from peft import get_peft_model, prepare_model_for_kbit_training

    if request.model.load_in_4bit or request.model.load_in_8bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=training.gradient_checkpointing)
    elif training.gradient_checkpointing:
        model.enable_input_require_grads()  # else nothing before the first adapter is recomputed
    return get_peft_model(model, adapter)


def _disable_dropout(model: Any) -> None:
    """In layers and in the attention's own argument: the reference has none either."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
