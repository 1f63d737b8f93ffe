"""One training run, from a checked request to a directory with the model and everything needed to repeat it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.atomic import write_text
from paretune.errors import ArgumentError
from paretune.training import joint_build, records
from paretune.training.build import Data, check_model, load_data, make_trainer
from paretune.training.loss_space import LOSSES_PICTURE, draw_run
from paretune.training.request import Method, Request
from paretune.training.resume import changed_arguments, find_checkpoint, finished_record, step_of

if TYPE_CHECKING:
    from transformers import Trainer

_logger = logging.getLogger("paretune.training")


@dataclass
class Run:
    """A finished run.

    Args:
        record: what ``training.json`` holds.
        trainer: the trainer, with the final model; None where the run had finished before.
    """

    record: dict[str, Any]
    trainer: Trainer | None


def run(request: Request, method: Method) -> Run:
    """Train, save, record. A run that finished before keeps its record and its model.

    Args:
        request: checked by :func:`paretune.training.arguments.check`.
        method: how to optimize.

    Returns:
        The record and the trainer. ``output_dir`` then holds the model (the average, where one was kept), its
        tokenizer, ``README.md`` and ``training.json``.

    Raises:
        PareTuneError: anything that is wrong with the request, before training starts.
    """
    from transformers import EarlyStoppingCallback

    from paretune.training.callbacks import EMACallback, Trajectory
    from paretune.training.trainer import attach, save_whole_model, total_steps

    own, arguments = request.own, request.training
    output = Path(str(arguments.output_dir))
    checkpoint = find_checkpoint(arguments.resume_from_checkpoint, output)
    _check_early_stopping(request)
    finished = None
    if checkpoint is not None:
        newest = str(arguments.resume_from_checkpoint).lower() == "true"
        finished = finished_record(output, checkpoint, newest=newest)
    if finished is not None and not changed_arguments(finished["given"], request.given):
        _logger.info(
            f"{output}: finished before at step {records.count_steps(finished)}, nothing to do; its record is kept"
        )
        return Run(finished, None)
    check_model(request)
    data: Data | joint_build.JointData
    data = joint_build.load_joint_data(request) if request.trainer == "joint" else load_data(request)
    trajectory = Trajectory(resume_from=checkpoint)
    callbacks: list[Any] = [trajectory]
    if method.average is not None:
        callbacks.append(EMACallback(method.average, evaluate=own.ema_evaluate, resume_from=checkpoint))
    if own.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(own.early_stopping_patience, own.early_stopping_threshold))
        if checkpoint is not None and "restore_callback_states_from_checkpoint" not in request.given:
            arguments.restore_callback_states_from_checkpoint = True  # its patience is part of the run's state
    record = _begin_record(request, method, data, output)
    trainer: Any = _make(request, data, callbacks)
    for notice in request.notices:
        _logger.info(notice)
    if method.factory is not None:
        attach(trainer, method.factory)
    if method.before_training is not None:
        method.before_training(trainer)
    begin = 0
    if checkpoint is not None:
        begin = step_of(checkpoint)
        if finished is not None and begin >= total_steps(trainer):
            other = ", ".join(changed_arguments(finished["given"], request.given))
            raise ArgumentError(
                "resume_from_checkpoint",
                str(arguments.resume_from_checkpoint),
                f"that run finished before at step {records.count_steps(finished)} with another {other}, and no step "
                "is left; raise --max_steps or --num_train_epochs, or start without it in another --output_dir",
            )
        _check_generation_boundary(request, checkpoint)
        record["resumed_from"] = str(checkpoint)
    if request.trainer != "joint":  # there each step has an entry of its own
        record["steps"] = total_steps(trainer)
    _write(record, trainer, output)
    outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    end = trainer.state.global_step
    # The trainer's sums and means are over the steps of this session; over none they would read as a loss of 0.
    metrics = dict(outcome.metrics) if end > begin else {}
    if data.evaluates:
        metrics.update(trainer.evaluate())
    save_whole_model(trainer, str(output))
    record.update(
        status="finished",
        steps=end,
        metrics=metrics,
        metrics_cover_steps=[begin + 1, end] if end > begin else None,
        seconds=round(trajectory.seconds, 3),
        history=trajectory.records,
        last_log=next((entry for entry in reversed(trajectory.records) if "loss" in entry), {}),
        best_checkpoint=trainer.state.best_model_checkpoint,
    )
    record["optimizer"]["statement"] = _statement_of(trainer.optimizer)
    if request.trainer == "joint":
        record.update(joint_build.outcome(trainer))
    _write(record, trainer, output)
    if trainer.is_world_process_zero():
        if request.trainer == "joint":
            draw_run(record, output / LOSSES_PICTURE)
        write_text(output / "README.md", records.model_card(records.jsonable(record)))
    if arguments.push_to_hub:
        name = None if request.trainer == "joint" else request.script.dataset_name
        trainer.push_to_hub(dataset_name=name)
    return Run(records.jsonable(record), trainer)


def _begin_record(request: Request, method: Method, data: Data | joint_build.JointData, output: Path) -> dict[str, Any]:
    tau = None
    if method.tau is not None:
        tau = {
            "fingerprint": method.tau.fingerprint,
            "base": request.own.base_model,
            "reference": request.reference_path,
        }
    return {
        "schema": 1,
        "status": "running",
        "trainer": request.trainer,
        "command": records.without_secrets(request.command),
        "output_dir": str(output),
        "given": {name: value for name, value in request.given.items() if "token" not in name},
        "arguments": {
            "paretune": records.as_plain(request.own),
            "training": records.as_plain(request.training),
            "model": records.as_plain(request.model),
            "script": records.as_plain(request.script),
        },
        "model": {"path": request.model_path, "revision": request.model.model_revision, **_weights(request.model_path)},
        "tau": tau,
        "data": data.record(),
        "optimizer": {"name": method.name, "statement": None},
        "seed": request.training.seed,
        "versions": records.versions(),
        "hardware": records.hardware(),
        "resumed_from": None,
        "steps": [] if request.trainer == "joint" else None,
        "metrics": {},
        "metrics_cover_steps": None,
        "last_log": {},
        "history": [],
    }


def _make(request: Request, data: Any, callbacks: list[Any]) -> Trainer:
    if request.trainer == "joint":
        return joint_build.make_joint_trainer(request, data, callbacks)
    return make_trainer(request, data, callbacks)


def _weights(path: str) -> dict[str, Any]:
    """The fingerprint of the starting point, where its files can be read."""
    from paretune.checkpoint import Checkpoint
    from paretune.errors import CheckpointError
    from paretune.training.digest import checkpoint_fingerprint

    try:
        return {"fingerprint": checkpoint_fingerprint(Checkpoint(path))}
    except CheckpointError:
        return {"fingerprint": None}


def _write(record: dict[str, Any], trainer: Trainer, output: Path) -> None:
    if trainer.is_world_process_zero():
        records.write_json(output / records.TRAINING_RECORD, record)


def _statement_of(optimizer: Any) -> str | None:
    """The statement of the innermost optimizer that makes one, through accelerate's and our wrappers."""
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        seen.add(id(optimizer))
        statement = getattr(optimizer, "statement", None)
        if isinstance(statement, str):
            return statement
        optimizer = getattr(optimizer, "optimizer", None) or getattr(optimizer, "inner", None)
    return None


def _check_early_stopping(request: Request) -> None:
    """What transformers' callback asserts only after everything is loaded."""
    patience, arguments = request.own.early_stopping_patience, request.training
    if patience is None:
        return
    if str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy)) == "no":
        raise ArgumentError("early_stopping_patience", patience, "it needs --eval_strategy steps or epoch")
    if arguments.metric_for_best_model is None:
        raise ArgumentError(
            "early_stopping_patience", patience, "it needs --metric_for_best_model, for example eval_loss"
        )


def _check_generation_boundary(request: Request, checkpoint: Path) -> None:
    """Say so when a grpo checkpoint lies between two generations: its buffered completions are gone."""
    if request.trainer != "grpo":
        return
    arguments: Any = request.training
    batches = step_of(checkpoint) * arguments.gradient_accumulation_steps
    period = (arguments.steps_per_generation or arguments.gradient_accumulation_steps) * arguments.num_iterations
    if batches % period:
        every = period // arguments.gradient_accumulation_steps
        _logger.warning(
            f"{checkpoint}: completions are generated every {every} steps and this checkpoint lies between two; the "
            "resumed run differs from an uninterrupted one (save at multiples of that)"
        )
