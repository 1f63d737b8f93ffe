"""The checks that every online merging optimizer makes before anything is built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import ArgumentError
from ..operators import METHODS
from ..task_vector import TaskVector

_RELEASED_RESCALES = {"ondare": ("expectation", "l1"), "onties": ("none", "l1")}


def check_run(
    method: str,
    tau: object,
    weight: float | None,
    pull: float | None,
    total_steps: int | None,
    every: int,
    variant: str,
    rescale: str | None,
    seed: int,
    clip: float,
) -> str:
    """Check what holds for the whole run; returns the rescale that None stands for."""
    if tau is not None and not isinstance(tau, TaskVector):
        raise ArgumentError("tau", tau, "pass TaskVector.between(base=…, reference=…)")
    if variant not in ("paper", "released"):
        raise ArgumentError("variant", variant, "choose 'paper' or 'released'")
    if rescale is None:
        rescale = METHODS[method if variant == "paper" else f"{method}-released"].rescale
    allowed = ("none", "expectation", "l1") if variant == "paper" else _RELEASED_RESCALES[method]
    if rescale not in allowed:
        raise ArgumentError("rescale", rescale, f"{method} as in the {variant} variant knows {', '.join(allowed)}")
    if pull is not None:
        if weight is not None:
            raise ArgumentError("pull", pull, "give pull or weight, not both")
        if total_steps is None:
            raise ArgumentError("pull", pull, "needs total_steps, the optimizer steps of the run")
        in_range("pull", pull, 0, math.inf)
        if tau is None and pull > 0:
            raise ArgumentError("tau", None, "needed to pull towards it: pass TaskVector.between(base=…, reference=…)")
    if total_steps is not None:
        whole("total_steps", total_steps, 1)
    whole("every", every, 1)
    whole("seed", seed, None)
    if not number(clip, "clip") > 0:
        raise ArgumentError("clip", clip, "must be above 0")
    return rescale


def check_groups(method: str, groups: Sequence[dict[str, Any]], tau: TaskVector | None) -> None:
    """Check what may differ from group to group."""
    for group in groups:
        in_range("lr", group["lr"], 0, math.inf)
        in_range("eps", group["eps"], 0, math.inf)
        in_range("weight_decay", group["weight_decay"], 0, math.inf)
        in_range("weight", group["weight"], 0, 1)
        whole("every", group["every"], 1)
        betas = group["betas"]
        if len(betas) != 2 or not all(0 <= number(beta, "betas") < 1 for beta in betas):
            raise ArgumentError("betas", betas, "must be two numbers in [0, 1)")
        if not 0 < number(group["density"], "density") <= 1:
            mend = "must be in (0, 1]: the fraction of entries that is kept"
            raise ArgumentError("density", group["density"], mend)
        election = method == "onties" and group["variant"] == "released"
        if tau is None and (group["weight"] > 0 or election):
            why = "the released sign election needs it" if election else f"weight {group['weight']} needs it"
            raise ArgumentError("tau", None, f"{why}: pass TaskVector.between(base=…, reference=…)")


def in_range(argument: str, value: Any, low: float, high: float) -> None:
    """Refuse a value outside [low, high] or not finite."""
    if not low <= number(value, argument) <= high or not math.isfinite(number(value, argument)):
        limits = f"in [{low}, {high}]" if math.isfinite(high) else f"finite and at least {low}"
        raise ArgumentError(argument, value, f"must be {limits}")


def whole(argument: str, value: Any, low: int | None) -> None:
    """Refuse what is not a whole number, or below ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or (low is not None and value < low):
        raise ArgumentError(argument, value, "must be a whole number" + ("" if low is None else f" of at least {low}"))


def number(value: Any, argument: str) -> float:
    """A value as float; refuses what is not a number."""
    try:
        if isinstance(value, bool | str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ArgumentError(argument, value, "must be a number") from None
