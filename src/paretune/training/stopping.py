"""Stop joint training by its evaluation losses: an ideal value is reached, or a known front."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from paretune.errors import ArgumentError, DataError


class StopAtIdeal(TrainerCallback):
    """Stop when an evaluation loss is at most ``within`` above its ideal value.

    Args:
        ideal: objective to its ideal value f*_i.
        within: ε ≥ 0, in nats.

    Attributes:
        reason: why training stopped; None while it did not.

    Raises:
        ArgumentError: no ideal value, or ``within`` out of its range.

    Reference: arXiv 2410.15483: f_i(θ) ≤ f*_i + ε for one of the objectives.

    Example:
        >>> import types
        >>> rule, control = StopAtIdeal({"sft": 1.2}, within=0.05), types.SimpleNamespace(should_training_stop=False)
        >>> rule.on_evaluate(None, None, control, metrics={"eval_sft_loss": 1.24, "eval_dpo_loss": 0.6})
        >>> control.should_training_stop, rule.reason
        (True, 'eval_sft_loss 1.24 is within 0.05 of its ideal value 1.2')
    """

    def __init__(self, ideal: Mapping[str, float], within: float) -> None:
        if not ideal:
            raise ArgumentError("ideal", dict(ideal), "name an objective with its ideal value")
        if not (within >= 0 and math.isfinite(within)):
            raise ArgumentError("within", within, "give a finite number of at least 0")
        self._ideal, self._within = dict(ideal), within
        self.reason: str | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        metrics = given["metrics"]
        for name, ideal in self._ideal.items():
            loss = metrics.get(f"eval_{name}_loss")
            if loss is not None and loss <= ideal + self._within:
                self.reason = f"eval_{name}_loss {loss:.4g} is within {self._within:g} of its ideal value {ideal:g}"
                control.should_training_stop = True
                return


class StopAtFront(TrainerCallback):
    """Stop when all evaluation losses are at most those of one point of a reference front.

    Args:
        points: each an objective to its loss; all of the same objectives.

    Attributes:
        reason: why training stopped; None while it did not.

    Raises:
        ArgumentError: no points, or points of different objectives.

    Reference: arXiv 2410.15483: stop once a point of a reference Pareto front is reached or passed.

    Example:
        >>> import types
        >>> rule, control = StopAtFront([{"sft": 1.2, "dpo": 0.5}]), types.SimpleNamespace(should_training_stop=False)
        >>> rule.on_evaluate(None, None, control, metrics={"eval_sft_loss": 1.1, "eval_dpo_loss": 0.6})
        >>> rule.on_evaluate(None, None, control, metrics={"eval_sft_loss": 1.1, "eval_dpo_loss": 0.5})
        >>> control.should_training_stop
        True
    """

    def __init__(self, points: Sequence[Mapping[str, float]]) -> None:
        if not points or any(set(point) != set(points[0]) or not point for point in points):
            raise ArgumentError("points", list(points), "give at least one, each with a loss for every objective")
        self._points = [dict(point) for point in points]
        self.reason: str | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        metrics = given["metrics"]
        for point in self._points:
            if all(metrics.get(f"eval_{name}_loss", math.inf) <= loss for name, loss in point.items()):
                shown = ", ".join(f"{name} {loss:.4g}" for name, loss in point.items())
                self.reason = f"the evaluation losses reach the point {shown} of the reference front"
                control.should_training_stop = True
                return


def read_front(path: str | Path, objectives: Sequence[str]) -> list[dict[str, float]]:
    """The points of a reference front.

    Args:
        path: a sweep's ``sweep.jsonl``, or JSON lines of ``{objective: loss}``.
        objectives: those that each point must have a loss of.

    Raises:
        DataError: the file cannot be read or a line has no such point.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"stop_at_front={str(path)!r}: cannot be read: {error.strerror}") from error
    points = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            losses = record["losses"]["eval"] if "losses" in record else record
            points.append({name: float(losses[name]) for name in objectives})
        except (ValueError, KeyError, TypeError) as error:
            wanted = ", ".join(f'"{name}": loss' for name in objectives)
            raise DataError(
                f"stop_at_front={str(path)!r}: line {number} has no evaluation losses of {' and '.join(objectives)}; "
                f"write it as {{{wanted}}}"
            ) from error
    if not points:
        raise DataError(f"stop_at_front={str(path)!r}: it holds no points; give at least one")
    return points
