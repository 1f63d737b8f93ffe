"""What a run would do, without doing it: parameters, memory, steps, pull."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from paretune.errors import CheckpointError, DataError, PareTuneError
from paretune.training.build import load_config, load_data
from paretune.training.request import Method, Request
from paretune.training.trl_classes import trl

if TYPE_CHECKING:
    from torch import nn

_GIB = 2**30


@dataclass
class Plan:
    """The outline of a run. Memory counts what is held for the whole run, not activations.

    Args:
        trainer: dpo, kto, sft or grpo.
        optimizer: the method's name.
        model, base, reference: paths or hub ids; base is None without a task vector.
        data: the training data.
        parameters, trained: how many in all, and how many are trained; None when the model is not at hand.
        bytes_per_parameter: by part, of a trained parameter.
        memory_bytes: the same over the whole model; frozen parts count with all parameters.
        rows: training rows; None for streams and for data that is not at hand.
        batch: rows in an optimizer step (grpo: completions).
        steps: optimizer steps; None when they cannot be known yet.
        tau: fingerprint of the task vector.
        statement: what the task vector will amount to.
        notes: what could not be known, and what is worth knowing.
    """

    trainer: str
    optimizer: str
    model: str
    base: str | None
    reference: str
    data: str
    parameters: int | None = None
    trained: int | None = None
    bytes_per_parameter: dict[str, float] = field(default_factory=dict)
    memory_bytes: int | None = None
    rows: int | None = None
    batch: int = 0
    steps: int | None = None
    tau: str | None = None
    statement: str | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The plan for a person."""
        shown = [f"{self.trainer} with {self.optimizer}: {self.model} on {self.data}"]
        if self.base:
            shown.append(f"task vector: {self.reference} - {self.base} ({self.tau})")
        if self.parameters is not None:
            shown.append(f"parameters: {self.parameters:,}, trained {self.trained:,}")
        parts = ", ".join(f"{name} {size:g}" for name, size in self.bytes_per_parameter.items() if size)
        total = f"; {self.memory_bytes / _GIB:.2f} GiB without activations" if self.memory_bytes is not None else ""
        shown.append(f"bytes per trained parameter: {parts}{total}")
        rows = "unknown" if self.rows is None else f"{self.rows:,}"
        steps = "unknown" if self.steps is None else f"{self.steps:,}"
        shown.append(f"rows: {rows}; batch {self.batch}; optimizer steps: {steps}")
        if self.statement:
            shown.append(self.statement)
        return shown + [f"note: {note}" for note in self.notes]


def make_plan(request: Request, method: Method) -> Plan:
    """Outline a run; models and data that are not at hand (hub ids, offline) become notes, wrong ones errors.

    Args:
        request: checked.
        method: how it optimizes.

    Raises:
        PareTuneError: what would refuse the run itself.
    """
    data_name = str(request.script.dataset_name or "datasets")
    plan = Plan(
        trainer=request.trainer,
        optimizer=method.name,
        model=request.model_path,
        base=request.own.base_model if method.tau is not None else None,
        reference=request.reference_path,
        data=data_name,
        tau=None if method.tau is None else method.tau.fingerprint,
        notes=[*request.notices, *method.notes],
    )
    _count_parameters(plan, request, method)
    _count_steps(plan, request)
    if method.statement is not None and plan.parameters is not None:
        plan.statement = method.statement(plan.steps)
        if plan.statement is None:
            plan.notes.append("the pull is stated when training starts")
    return plan


def empty_model(request: Request) -> nn.Module:
    """The model to train, without weights (on torch's meta device), LoRA included.

    Args:
        request: names the model.

    Raises:
        CheckpointError: no configuration can be had.
    """
    import torch
    import transformers

    config = load_config(request)
    name = (getattr(config, "architectures", None) or [""])[0]
    kind = getattr(transformers, name, None)
    with torch.device("meta"):
        if kind is None or not hasattr(kind, "_from_config"):
            model: Any = transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=request.trust_remote_code
            )
        else:
            model = kind._from_config(config)
        if request.model.use_peft:
            from peft import get_peft_model

            model = get_peft_model(model, trl().get_peft_config(request.model))
    return model


def is_at_hand(path: str) -> bool:
    """Whether a model or data set is a local one, so that its absence is an error and not a note."""
    return os.path.exists(path) or path.startswith((".", "/", "~")) or path.count("/") > 1


def _count_parameters(plan: Plan, request: Request, method: Method) -> None:
    itemsize = 4.0 if request.model.dtype in ("float32", None) else 2.0
    plan.bytes_per_parameter = {"model": itemsize, "gradients": itemsize, **method.state_bytes}
    needs_reference = request.trainer in ("dpo", "kto") or (
        request.trainer == "grpo" and bool(getattr(request.training, "beta", 0))
    )
    precomputed = getattr(request.training, "precompute_ref_log_probs", False)
    if needs_reference and not request.model.use_peft and not precomputed:
        plan.bytes_per_parameter["reference"] = itemsize
    if request.model.load_in_4bit or request.model.load_in_8bit:
        plan.notes.append("quantized: the model's own bytes are fewer than stated")
    try:
        model = empty_model(request)
    except CheckpointError:
        if is_at_hand(request.model_path):
            raise
        plan.notes.append(f"{request.model_path} is not at hand: parameters are unknown")
        return
    plan.parameters = sum(p.numel() for p in model.parameters())
    plan.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen_parts = ("model", "reference")
    plan.memory_bytes = math.ceil(
        sum(
            size * (plan.parameters if part in frozen_parts else plan.trained)
            for part, size in plan.bytes_per_parameter.items()
        )
    )


def _count_steps(plan: Plan, request: Request) -> None:
    arguments: Any = request.training
    world = max(int(arguments.world_size), 1)
    plan.batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * world
    if arguments.max_steps > 0:
        plan.steps = int(arguments.max_steps)
    if request.trainer == "joint":
        _count_joint_steps(plan, request, world)
        return
    try:
        data = load_data(request)
    except DataError as error:
        local = request.mixture.datasets or is_at_hand(str(request.script.dataset_name))
        if local or "cannot be read" not in str(error):
            raise
        plan.notes.append(f"{plan.data} is not at hand: its rows and columns are not checked")
        return
    plan.rows = len(data.train) if hasattr(data.train, "__len__") else None
    if plan.steps is None and plan.rows is not None:
        plan.steps = _steps(request, plan.rows, set(data.train.column_names), world)
        plan.notes.append("steps are counted before TRL drops or packs rows")
    elif plan.steps is None:
        raise PareTuneError("max_steps=-1: streamed data has no length; set --max_steps")


def _count_joint_steps(plan: Plan, request: Request, world: int) -> None:
    from paretune.training.joint_build import load_joint_data, make_schedule

    arguments, script = request.training, request.script
    try:
        data = load_joint_data(request)
    except DataError as error:
        local = is_at_hand(script.sft_dataset) and is_at_hand(script.preference_dataset)
        if local or "cannot be read" not in str(error):
            raise
        plan.notes.append(f"{plan.data} is not at hand: its rows and columns are not checked")
        return
    sizes = {"sft": script.sft_batch_size, script.preference_name: script.preference_batch_size}
    passes, shown, plan.rows = {}, [], 0
    for name, part in data.parts.items():
        rows = len(part.train)
        if name == "kto" and "completion" not in part.train.column_names:
            rows *= 2  # a pair becomes one desirable and one undesirable row
        batch = (sizes[name] or arguments.per_device_train_batch_size) * arguments.gradient_accumulation_steps * world
        passes[name] = math.ceil(rows / batch)
        plan.rows += rows
        shown.append(f"{name}: {rows:,} rows, {batch} a step")
    plan.notes.append(f"{'; '.join(shown)}; steps are counted before rows whose prompts are too long are left out")
    if plan.steps is None:
        plan.steps = math.ceil(arguments.num_train_epochs * make_schedule(script).epoch_steps(passes))


def _steps(request: Request, rows: int, columns: set[str], world: int) -> int:
    arguments: Any = request.training
    if request.trainer == "kto" and "completion" not in columns:
        rows *= 2  # a pair becomes one desirable and one undesirable row
    if request.trainer == "grpo":
        # Whole generation batches only; every prompt num_generations times, each completion num_iterations times.
        rows -= rows % max(arguments.generation_batch_size // arguments.num_generations, 1)
        rows *= arguments.num_generations * arguments.num_iterations
    batches = rows / (arguments.per_device_train_batch_size * world)
    batches = math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)
    updates = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    return math.ceil(arguments.num_train_epochs * updates)
