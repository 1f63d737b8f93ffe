"""Train one model on several objectives: the schedule says which, at every optimizer step."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from paretune.atomic import write_text
from paretune.errors import ArgumentError, StateError
from paretune.training.draws import Draws
from paretune.training.objectives import EVAL, TRAIN, Objective, Setup
from paretune.training.pretrained import load_model, load_tokenizer
from paretune.training.ranks import rank, sum_over_ranks, world_size
from paretune.training.schedules import Mix, Schedule
from paretune.training.step_losses import MIX, Part, StepLosses
from paretune.training.trainer import attach

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from paretune.training.trainer import OptimizerFactory

JOINT_STATE = "joint.json"
# Arguments of transformers whose meaning is in a data loader or a loss that joint training does not use.
_UNUSABLE = {
    "auto_find_batch_size": (False, "give the objectives their batch sizes"),
    "label_smoothing_factor": (0.0, "pt.DPO(label_smoothing=...) smooths labels of pairs"),
    "dataloader_num_workers": (0, "batches are padded from tokenised rows in this process; leave it at 0"),
}


class JointTrainer(Trainer):
    """A ``transformers.Trainer`` on several objectives, each with its own data, batch size and length.

    At every optimizer step the schedule gives each loss its coefficient; a step descends Σ_i c_i·f_i, each f_i the
    mean over all micro-batches and ranks of the step. Data sets of any lengths cycle on their own; no batch is drawn
    and thrown away. Accumulation, clipping, learning-rate schedules, logging, checkpoints, LoRA, DDP and FSDP are the
    trainer's own, and `attach`, `EMACallback` and every optimizer work as with any other. Losses of each objective
    are logged as ``sft_loss``, ``dpo_loss`` …; objectives with evaluation rows report ``eval_sft_loss`` …, and
    ``eval_loss`` is their mean by the schedule's weights (equal ones where it has none).

    Args:
        model: a causal language model, or a path or hub id; with LoRA a ``PeftModel``.
        args: ``transformers.TrainingArguments``. An epoch is one pass over the data set that takes most steps
            (``Sequential``: over all, one after the other).
        objectives: name to objective; preference losses are called ``"dpo"`` whatever their formula, KTO ``"kto"``.
        schedule: which objectives train at a step; `Mix` with equal weights by default.
        optimizer: a factory, as `attach` takes it, or a ready optimizer; the arguments' own by default.
        processing_class: the tokenizer; by default that of the model's directory.
        callbacks: further trainer callbacks.

    Attributes:
        steps: one ``{"step", "objective", "loss", "stale"}`` an optimizer step: what was trained ("mix" for several),
            the losses measured at that step, and the values that the choice was made from.
        stopping_rules: callbacks with a ``reason``, for the record.

    Raises:
        ArgumentError: no objectives, weights that name none of them, or arguments that joint training cannot use.
        DataError: data that cannot be trained on.

    Reference: arXiv 2410.15483.

    Example:
        >>> import tempfile, torch, transformers
        >>> class Towards(Objective):
        ...     def prepare(self, setup): pass
        ...     def rows(self, split): return len(self.datasets.get(split, ()))
        ...     def batch(self, split, rows): return {"x": torch.tensor([self.datasets[split][row] for row in rows])}
        ...     def loss(self, model, batch): return (model(batch["x"][:, None]) - 1).square().mean()
        >>> arguments = transformers.TrainingArguments(
        ...     tempfile.mkdtemp(), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True)
        >>> trainer = JointTrainer(
        ...     torch.nn.Linear(1, 1), arguments, objectives={"a": Towards([0.0, 1.0]), "b": Towards([2.0])},
        ...     callbacks=[])
        >>> trainer.remove_callback(transformers.PrinterCallback)
        >>> trainer.train().global_step, trainer.steps[0]["objective"]
        (2, 'mix')
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        objectives: Mapping[str, Objective],
        schedule: Schedule | None = None,
        optimizer: OptimizerFactory | torch.optim.Optimizer | None = None,
        processing_class: Any = None,
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        self.objectives = dict(objectives)
        self.schedule = schedule if schedule is not None else Mix()
        _check(self.objectives, self.schedule)
        model = load_model(model) if isinstance(model, (str, Path)) else model
        ready = optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
        evaluates = any(EVAL in objective.datasets for objective in self.objectives.values())
        super().__init__(
            model=model,
            args=args,
            train_dataset=[0],  # the objectives hold the data
            eval_dataset=[0] if evaluates else None,
            processing_class=processing_class if processing_class is not None else load_tokenizer(model),
            callbacks=list(callbacks or ()),
            optimizers=(ready, None),
        )
        _check_arguments(self)
        self.steps: list[dict[str, Any]] = []
        self.stopping_rules: list[Any] = []
        self._values: dict[str, float] = {}
        self._logged_steps = 0
        self._rows_taken = 0
        self._prepare()
        if optimizer is not None and ready is None:
            attach(self, cast("OptimizerFactory", optimizer))

    def _prepare(self) -> None:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._draws: dict[str, Draws] = {}
        for name, objective in self.objectives.items():
            model = cast(nn.Module, self.model)
            objective.prepare(Setup(name, model, self.processing_class, self.args, self.accelerator.autocast))
            size = objective.batch_size or self.args.per_device_train_batch_size
            self._draws[name] = Draws(name, objective.rows(TRAIN), size, seed)
        micro = self.args.gradient_accumulation_steps
        self._passes = {name: draws.steps(micro) for name, draws in self._draws.items()}
        self.schedule.bind(self._passes, self.args.seed)

    # -- the steps of a run --------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Counts micro-batches; what they hold is decided once a step begins."""
        length = self.schedule.epoch_steps(self._passes) * self.args.gradient_accumulation_steps
        # A generator of its own: a loader draws a seed from the global one otherwise.
        return DataLoader(range(length), batch_size=1, generator=torch.Generator())  # type: ignore[arg-type]

    def num_examples(self, dataloader: DataLoader) -> int:
        """Rows of all data sets."""
        return sum(draws.rows for draws in self._draws.values())

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Choose what an optimizer step trains on, and take its micro-batches."""
        # Early transformers 5 asks on after a resumed epoch's last batch.
        num_batches = sum(next(epoch_iterator, None) is not None for _ in range(num_batches))
        if num_batches == 0:
            return [], None
        step = self.state.global_step
        taken: dict[str, list[Part]] = {}
        measured: dict[str, float] = {}
        if self.schedule.measures(step):
            taken = {name: self._next_batches(name, num_batches) for name in self.objectives}
            measured = self._measure(taken)
            self._values.update(measured)
        chosen = self.schedule.choose(step, self.state.max_steps, dict(self._values))
        unknown = [name for name in chosen if name not in self.objectives]
        if unknown or not chosen:
            raise ArgumentError("schedule", chosen, f"it must choose among the objectives {', '.join(self.objectives)}")
        stale = dict(self._values)
        parts = {name: taken.get(name) or self._next_batches(name, num_batches) for name in chosen}
        for name, batches in parts.items():
            self._draws[name].taken += num_batches
            self._rows_taken += num_batches * self._draws[name].batch_size * world_size()
            self._scale(batches, chosen[name])
        self._step = StepLosses(chosen, num_batches, stale, measured)
        return [{"parts": [parts[name][index] for name in chosen]} for index in range(num_batches)], None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch, one objective after the other: the memory of the dearest."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # type: ignore[union-attr]
        parts, total = inputs["parts"], torch.zeros((), device=self.args.device)
        for part in parts:
            # Gradients are reduced over ranks once, with the last objective of the last micro-batch.
            with contextlib.nullcontext() if part is parts[-1] else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = self.objectives[part.name].loss(model, self._prepare_inputs(part.batch))
                scaled = loss * part.scale
                self.accelerator.backward(scaled)
            self._step.add(part, loss.detach())
            total = total + scaled.detach()
        if self._step.is_complete:
            trained = self._step.trained()
            self._values.update(trained)
            self.steps.append(self._step.record(self.state.global_step + 1, trained))
        return total

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one micro-batch, as :meth:`training_step` descends it."""
        losses = [
            self.objectives[part.name].loss(model, self._prepare_inputs(part.batch)) * part.scale
            for part in inputs["parts"]
        ]
        loss = torch.stack(losses).sum()
        return (loss, {}) if return_outputs else loss

    def task_batches(self, count: int, seed: int) -> Iterator[dict[str, Any]]:
        """Batches of randomly chosen rows, every objective in each, for :meth:`compute_loss`; none is used up.

        Args:
            count: how many.
            seed: of the choice.
        """
        draws = {
            name: replace(draws, seed=seed, name=f"{name} task", taken=0, _orders={})
            for name, draws in self._draws.items()
        }
        for number in range(count):
            batches = {name: self.objectives[name].batch(TRAIN, draws[name].at(number)) for name in draws}
            yield {"parts": [Part(name, batch, 1, 1 / len(batches)) for name, batch in batches.items()]}

    def _next_batches(self, name: str, count: int) -> list[Part]:
        """The micro-batches that an objective would train on next; they are not used up by this."""
        objective, draws = self.objectives[name], self._draws[name]
        batches = [objective.batch(TRAIN, draws.at(draws.taken + index)) for index in range(count)]
        return [Part(name, batch, objective.count(batch)) for batch in batches]

    def _scale(self, parts: Sequence[Part], coefficient: float) -> None:
        """Weigh micro-batches by what their means are over; DDP and FSDP divide gradients by the ranks again."""
        whole = float(sum_over_ranks(torch.tensor(float(sum(part.count for part in parts)))))
        for part in parts:
            part.scale = coefficient * (part.count * world_size() / whole)

    @torch.no_grad()
    def _measure(self, taken: Mapping[str, Iterable[Part]]) -> dict[str, float]:
        model: Any = self.model_wrapped if self.is_in_train else self.model
        was_training = model.training
        model.eval()
        sums = torch.zeros(len(taken), 2, dtype=torch.float64)
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            for place, (name, parts) in enumerate(taken.items()):
                for part in parts:
                    loss = self.objectives[name].loss(model, self._prepare_inputs(part.batch))
                    sums[place] += torch.tensor([float(loss) * part.count, part.count], dtype=torch.float64)
        model.train(was_training)
        sums = sum_over_ranks(sums)
        return {name: float(total / count) for name, (total, count) in zip(taken, sums, strict=True)}

    # -- evaluation and logs -------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss of every objective on its evaluation rows; log them and tell the callbacks.

        Args:
            eval_dataset, ignore_keys: not used: the objectives have their own rows.
            metric_key_prefix: what metrics begin with.
        """
        if eval_dataset is not None:
            raise ArgumentError("eval_dataset", eval_dataset, "give it to the objective, as pt.SFT(eval_dataset=...)")
        start = time.monotonic()
        losses = self.measure(EVAL)
        weights = getattr(self.schedule, "weights", None) or {}
        shares = {name: weights.get(name, 0.0) if weights else 1.0 for name in losses}
        whole = sum(shares.values())
        metrics = {f"{metric_key_prefix}_{name}_loss": value for name, value in losses.items()}
        if whole > 0:
            metrics[f"{metric_key_prefix}_loss"] = sum(shares[name] * losses[name] for name in losses) / whole
        metrics[f"{metric_key_prefix}_runtime"] = round(time.monotonic() - start, 4)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, split: str = EVAL, rows: int | None = None) -> dict[str, float]:
        """The mean loss of every objective that has rows in a split, without gradient and dropout.

        Args:
            split: "train" or "eval".
            rows: at most this many of each objective, evenly spread; None takes all.
        """
        counts = {name: objective.rows(split) for name, objective in self.objectives.items()}
        return self._measure(
            {name: self._share_of(name, split, min(rows or count, count)) for name, count in counts.items() if count}
        )

    def _share_of(self, name: str, split: str, rows: int) -> Iterator[Part]:
        """This rank's batches; every rank has as many, since losses may reduce over ranks."""
        objective, size = self.objectives[name], self.args.per_device_eval_batch_size
        count = objective.rows(split)
        wanted = [place * count // rows for place in range(rows)]
        for start in range(rank() * size, len(wanted) + rank() * size, size * world_size()):
            own = wanted[start : start + size]
            batch = objective.batch(split, own or wanted[-1:])
            yield Part(name, batch, objective.count(batch) if own else 0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each objective's loss since the last log to what the trainer logs."""
        if "loss" in logs:
            since = self.steps[self._logged_steps :]
            self._logged_steps = len(self.steps)
            for name in self.objectives:
                losses = [step["loss"][name] for step in since if step["objective"] in (name, MIX)]
                if losses:
                    logs[f"{name}_loss"] = math.fsum(losses) / len(losses)
        if logs.get("train_runtime") and "train_samples_per_second" in logs:
            # The trainer counts with one batch size, the objectives have their own.
            logs["train_samples_per_second"] = round(self._rows_taken / logs["train_runtime"], 3)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of the parts that are batches of tokens."""
        return sum(super(JointTrainer, self).floating_point_ops(part.batch) for part in inputs["parts"])

    # -- interruptions -------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; a checkpoint also holds which rows come next and the last known losses.

        Args:
            resume_from_checkpoint: a checkpoint's directory, or True for the newest in ``args.output_dir``.
            trial, ignore_keys_for_eval: as transformers has them.

        Raises:
            StateError: the checkpoint is no joint training's, or of other objectives.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(str(self.args.output_dir))
        if resume_from_checkpoint:
            self._load_joint_state(Path(str(resume_from_checkpoint)))
        else:
            self.steps, self._values = [], {}
            for draws in self._draws.values():
                draws.taken = 0
        self._logged_steps, self._rows_taken = len(self.steps), 0
        return super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save and not self.args.save_only_model:
            # Before the trainer's state, which marks a checkpoint as complete.
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            taken = {name: draws.taken for name, draws in self._draws.items()}
            state = {"taken": taken, "values": self._values, "steps": self.steps}
            write_text(folder / JOINT_STATE, json.dumps(state))
        super()._save_checkpoint(model, trial)

    def _load_joint_state(self, checkpoint: Path) -> None:
        try:
            state = json.loads((checkpoint / JOINT_STATE).read_text(encoding="utf-8"))
            taken, values, steps = state["taken"], state["values"], state["steps"]
        except (OSError, ValueError, KeyError) as error:
            raise StateError(
                f"resume_from_checkpoint={str(checkpoint)!r}: it has no readable {JOINT_STATE}, so it is no joint "
                "training's; give one of this run"
            ) from error
        if set(taken) != set(self.objectives):
            raise StateError(
                f"resume_from_checkpoint={str(checkpoint)!r}: it trained {', '.join(taken)}, this run trains "
                f"{', '.join(self.objectives)}; give one of this run"
            )
        for name, number in taken.items():
            self._draws[name].taken = int(number)
        self._values, self.steps = dict(values), list(steps)


def _check(objectives: Mapping[str, Any], schedule: Any) -> None:
    if not objectives:
        raise ArgumentError("objectives", objectives, 'give at least one, for example {"dpo": pt.DPO(pairs)}')
    for name, objective in objectives.items():
        if not isinstance(objective, Objective):
            raise ArgumentError("objectives", {name: objective}, "give pt.SFT, pt.DPO, pt.KTO or your own Objective")
        if name == MIX:
            raise ArgumentError("objectives", list(objectives), f"steps on several are called {MIX!r}; rename it")
    if not isinstance(schedule, Schedule):
        raise ArgumentError("schedule", schedule, "give pt.Mix(), pt.Alright(), pt.MaxRight() or pt.Sequential()")
    # Wrong names are said before models and data are touched; the passes are not known yet.
    schedule.bind(dict.fromkeys(objectives, 1))


def _check_arguments(trainer: Trainer) -> None:
    for name, (default, mend) in _UNUSABLE.items():
        value = getattr(trainer.args, name)
        if value != default:
            raise ArgumentError(name, value, f"joint training does not use it: {mend}")
    if trainer.args.n_gpu > 1:
        raise ArgumentError(
            "n_gpu", trainer.args.n_gpu, "joint training uses one process a GPU; start it with torchrun or accelerate"
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.cpu_ram_efficient_loading and world_size() > 1:
        mend = "all ranks but the first then hold an empty model where reference log-probabilities are computed"
        raise ArgumentError("fsdp_cpu_ram_efficient_loading", True, f"{mend}: set it to false")
    if trainer.is_deepspeed_enabled:
        raise ArgumentError("deepspeed", trainer.args.deepspeed, "joint training runs on DDP and FSDP; take one")
