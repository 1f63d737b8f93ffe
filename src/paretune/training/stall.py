"""A warning where rehearsal holds the style that the preferences are to change."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from paretune.errors import ArgumentError
from paretune.log import get

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from paretune.training.objectives import DPO

_logger = get("training")
_FEWEST = 8  # preference steps in a quarter


class StallWarning(TrainerCallback):
    """Warn, once, when the policy ranks the pairs right and yet hardly prefers one answer to the other.

    With m = β·h the margin of `DPO`, σ(m) is the probability that the policy's implicit reward gives to the preference.
    Over the last quarter of the preference steps so far: at least ``accuracy`` of the pairs have m > 0, and σ of the
    mean of m is below ``probability``. It is looked at after six, seven and eight eighths of the run; before its end
    the mean must also not have risen over that of the quarter before by more than the standard error.

    That is what answers to prompts like the preferences' do in rehearsal: chosen answers become likelier as ever, but
    the old style no less likely. Generated reward is not looked at: give `TaxProbe` a reward for that. Noisy
    preferences, of which fewer pairs are ranked right, are not warned of.

    Args:
        objective: the trainer's own preference objective, with the sigmoid loss and no label smoothing.
        probability: in (0.5, 1).
        accuracy: in (0, 1].

    Raises:
        ArgumentError: another loss, or a number out of its range.

    Example:
        >>> preferences = pt.DPO(pairs)  # doctest: +SKIP
        >>> objectives = {"rehearsal": pt.Distill(rows), "dpo": preferences}  # doctest: +SKIP
        >>> pt.JointTrainer(..., objectives=objectives, callbacks=[pt.StallWarning(preferences)])  # doctest: +SKIP
    """

    def __init__(self, objective: DPO, *, probability: float = 0.85, accuracy: float = 0.9) -> None:
        if objective.loss_type != "sigmoid" or objective.label_smoothing:
            raise ArgumentError(
                "objective", objective.loss_type, "give pt.DPO(...) with the sigmoid loss, not smoothed"
            )
        if not 0.5 < probability < 1:
            raise ArgumentError("probability", probability, "give a probability in (0.5, 1)")
        if not 0 < accuracy <= 1:
            raise ArgumentError("accuracy", accuracy, "give a share in (0, 1]")
        objective.watch = self._take
        self._probability, self._accuracy, self._warned = probability, accuracy, False
        self._micro: list[Tensor] = []
        self._steps: list[tuple[float, float]] = []  # of each preference step: mean margin, share above 0

    def _take(self, margins: Tensor) -> None:
        self._micro.append(margins)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._micro:
            margins = torch.cat(self._micro).float()
            self._steps.append((float(margins.mean()), float((margins > 0).float().mean())))
            self._micro.clear()
        eighths = 8 * state.global_step // state.max_steps
        if eighths >= 6 and eighths > 8 * (state.global_step - 1) // state.max_steps:
            self._judge(state.global_step, is_last=eighths == 8)

    def _judge(self, step: int, *, is_last: bool) -> None:
        quarter = len(self._steps) // 4
        if self._warned or quarter < _FEWEST:
            return
        margins, right = (torch.tensor(values) for values in zip(*self._steps, strict=True))
        now, before = margins[-quarter:], margins[-2 * quarter : -quarter]
        accuracy, probability = float(right[-quarter:].mean()), float(now.mean().sigmoid())
        noise = math.hypot(float(now.std()), float(before.std())) / math.sqrt(quarter)
        rises = not is_last and float(now.mean() - before.mean()) > noise
        if accuracy < self._accuracy or probability >= self._probability or rises:
            return
        self._warned = True
        _logger.warning(
            f"step {step}: the preferences stall: {accuracy:.0%} of the pairs are ranked right, but with a probability "
            f"of {probability:.2f} only. Rehearsed answers to prompts like the preferences' hold the old style: leave "
            "such prompts out (preferences=, pt.Leakage with a smaller share) or rehearse less; where there are none, "
            "raise the learning rate"
        )
