"""Trainer callbacks: average the policy, record the trajectory."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback

from paretune.errors import StateError

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

AVERAGE_DIRECTORY = "average"
_EXACT_NAME = "average_state.safetensors"
_TRAJECTORY_NAME = "trajectory.json"

_logger = logging.getLogger("paretune.training")


class Average(Protocol):
    """A running average of named parameters, such as ``paretune.EMA``."""

    def update(self) -> None:
        """Take the parameters' present values in."""

    def swap(self) -> None:
        """Put the average into the parameters; a second call puts the policy back."""

    def save(self, path: str | Path) -> None:
        """Write the exact average to one file."""

    def load(self, path: str | Path) -> None:
        """Take over what ``save`` wrote."""


class EMACallback(TrainerCallback):
    """Average the policy while it trains; the average is what is evaluated and what remains at the end.

    Checkpoints keep the raw policy where the trainer puts it and the average in ``checkpoint-N/average``, a model
    directory of its own; resuming restores the average bit for bit. When training ends the model holds the average
    (with ``load_best_model_at_end`` that of the best checkpoint), so ``trainer.save_model()`` saves it.

    Args:
        make_average: called with the trainable ``(name, Parameter)`` pairs when training begins.
        evaluate: evaluations during training see the average; False shows them the raw policy.
        resume_from: the checkpoint that training resumes from, when it is not in the output directory.

    Raises:
        StateError: while resuming, from a checkpoint without an average.

    Reference:
        arXiv 2405.17931, the EMA baseline.
    """

    def __init__(
        self,
        make_average: Callable[[Iterable[tuple[str, nn.Parameter]]], Average],
        *,
        evaluate: bool = True,
        resume_from: str | Path | None = None,
    ) -> None:
        self._make_average = make_average
        self._evaluate = evaluate
        self._resume_from = Path(resume_from) if resume_from else None
        self._borrowed = False  # the model holds the average for an evaluation during training
        self.average: Average | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        named = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
        self.average, self._borrowed = self._make_average(named), False
        if state.global_step > 0:
            self._restore(self._find_checkpoint(args, state))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._show_policy()  # an evaluation that failed half-way leaves the average in place

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._required().update()
        self._show_average_for(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._show_average_for(control)

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self._show_policy()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        writes, model = state.is_world_process_zero, kwargs["model"]
        sharded = any(hasattr(p, "device_mesh") for p in model.parameters())
        checkpoint = _checkpoint_of(args, state)
        if not sharded and not (writes and checkpoint.is_dir()):
            return
        unfinished = checkpoint / f"{AVERAGE_DIRECTORY}.tmp"
        if writes:
            shutil.rmtree(unfinished, ignore_errors=True)
        self._save(unfinished, model, kwargs.get("processing_class"), sharded, writes)
        if not writes:
            return
        shutil.rmtree(checkpoint / AVERAGE_DIRECTORY, ignore_errors=True)
        unfinished.rename(checkpoint / AVERAGE_DIRECTORY)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._show_policy()
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._restore(Path(state.best_model_checkpoint))
        self._required().swap()

    def _required(self) -> Average:
        if self.average is None:
            raise StateError("the average does not exist before training begins; call trainer.train() first")
        return self.average

    def _show_average_for(self, control: TrainerControl) -> None:
        average = self._required()
        if self._evaluate and control.should_evaluate and not self._borrowed:
            average.swap()
            self._borrowed = True

    def _show_policy(self) -> None:
        if self._borrowed:  # and not after training, when the model keeps the average
            self._required().swap()
            self._borrowed = False

    def _save(self, directory: Path, model: nn.Module, processing_class: Any, sharded: bool, writes: bool) -> None:
        average = self._required()
        average.swap()
        try:
            weights = _gathered(model) if sharded else None  # by all ranks together, to the first
            if writes:
                model.save_pretrained(directory, state_dict=weights)  # type: ignore[operator]
        finally:
            average.swap()
        if writes and processing_class is not None:
            processing_class.save_pretrained(directory)
        # The model's files are in the model's dtype and under its file names; what resumes the average is exact.
        average.save(directory / _EXACT_NAME)

    def _restore(self, checkpoint: Path) -> None:
        file = checkpoint / AVERAGE_DIRECTORY / _EXACT_NAME
        if not file.is_file():
            raise StateError(
                f"resume_from_checkpoint={str(checkpoint)!r}: it holds no average; "
                "resume without ema_decay or from a checkpoint that was written with it"
            )
        self._required().load(file)

    def _find_checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        given = self._resume_from or args.resume_from_checkpoint
        return Path(given) if given and Path(given).is_dir() else _checkpoint_of(args, state)


def _gathered(model: nn.Module) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


class Trajectory(TrainerCallback):
    """Record what the trainer logs, with the time it took, across interruptions.

    Args:
        resume_from: the checkpoint that training resumes from.

    Attributes:
        records: one ``{"step": int, "epoch": float, "seconds": float, ...logged values}`` a log call.
    """

    def __init__(self, resume_from: str | Path | None = None) -> None:
        self.records: list[dict[str, Any]] = []
        self._resume_from = Path(resume_from) if resume_from else None
        self._seconds_before = 0.0
        self._began = time.monotonic()
        self._warned = False

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training so far, earlier sessions included."""
        return self._seconds_before + time.monotonic() - self._began

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.monotonic()
        file = self._resume_from / _TRAJECTORY_NAME if self._resume_from else None
        if file is not None and file.is_file():
            self.records = json.loads(file.read_text())
            self._seconds_before = max((record["seconds"] for record in self.records), default=0.0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        values = {name: _plain(value) for name, value in (logs or {}).items()}
        self.records.append(
            {**values, "step": state.global_step, "epoch": state.epoch, "seconds": round(self.seconds, 3)}
        )
        norm = values.get("grad_norm")
        # The trainer replaces a loss that is not finite by an average, so the loss alone would hide it.
        if isinstance(norm, float) and not math.isfinite(norm) and not self._warned:
            self._warned = True
            _logger.warning(f"step {state.global_step}: the gradient is not finite; lower the learning rate")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        checkpoint = _checkpoint_of(args, state)
        if state.is_world_process_zero and checkpoint.is_dir():
            (checkpoint / _TRAJECTORY_NAME).write_text(json.dumps(self.records))


def _checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
