"""Which objective trains at each optimizer step: mixed, drawn, the worst off, or one after the other.

A schedule is asked once per optimizer step. It sees the step, the number of steps, and the last known loss of each
objective; it answers with the coefficient of each loss in this step's gradient. Objectives that are not in the
answer cost nothing at this step.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from paretune.errors import ArgumentError

_SUM = 1e-6  # how far from 1 weights may add up to


class Schedule(ABC):
    """The protocol of schedules; only :meth:`choose` must be written.

    Example:
        >>> class RoundRobin(Schedule):
        ...     def choose(self, step, total_steps, values):
        ...         return {self.names[step % len(self.names)]: 1.0}
        >>> schedule = RoundRobin()
        >>> schedule.bind({"sft": 100, "dpo": 30})
        >>> [schedule.choose(step, 4, {}) for step in range(3)]
        [{'sft': 1.0}, {'dpo': 1.0}, {'sft': 1.0}]
    """

    names: tuple[str, ...] = ()
    run_seed: int = 0

    def bind(self, passes: Mapping[str, int], seed: int = 0) -> None:
        """Meet the objectives, before training.

        Args:
            passes: objective to the optimizer steps that one pass over its data takes.
            seed: of the run.

        Raises:
            ArgumentError: the schedule names an objective that is not there, or leaves one out.
        """
        self.names = tuple(passes)
        self.run_seed = seed

    def epoch_steps(self, passes: Mapping[str, int]) -> int:
        """Optimizer steps that count as one epoch: by default one pass over the data set that takes longest."""
        return max(passes.values())

    def measures(self, step: int) -> bool:
        """Whether all losses are measured, without gradient, before the choice of this step."""
        return False

    @abstractmethod
    def choose(self, step: int, total_steps: int, values: Mapping[str, float]) -> dict[str, float]:
        """The objectives of one optimizer step, each with the coefficient of its loss.

        Args:
            step: optimizer steps done so far, from 0.
            total_steps: of the whole run.
            values: objective to its last measured loss; empty before the first.
        """


class Mix(Schedule):
    """Every step descends the weighted sum of all losses; costs one forward and backward pass an objective.

    g = Σ_i w_i · ∇f_i, for two objectives (1 − λ)·∇f_SFT + λ·∇f_DPO.

    Args:
        weights: objective to its share w_i ≥ 0; they add up to 1. Equal shares by default.

    Raises:
        ArgumentError: the weights do not add up to 1; or, once bound, they name no objective.

    Reference: arXiv 2410.15483, section 2 (joint training with a linear mix of the losses).

    Example:
        >>> mix = Mix({"sft": 0.3, "dpo": 0.7})
        >>> mix.bind({"sft": 100, "dpo": 30})
        >>> mix.choose(0, 100, {})
        {'sft': 0.3, 'dpo': 0.7}
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self.weights = _checked(weights)
        self._weights: dict[str, float] = {}

    def bind(self, passes: Mapping[str, int], seed: int = 0) -> None:
        super().bind(passes, seed)
        self._weights = _matched(self.weights, self.names)

    def choose(self, step: int, total_steps: int, values: Mapping[str, float]) -> dict[str, float]:
        # An objective of weight 0 has no part in the gradient, so it is not worth a pass.
        return {name: weight for name, weight in self._weights.items() if weight > 0}


class Alright(Schedule):
    """Every step draws one objective and descends its loss alone: the price of one, in expectation the mix.

    i_t ~ w,  g = ∇f_{i_t}: DPO with probability λ, else SFT. The draw is a hash of (seed, step): the same on every
    rank, and after an interruption.

    Args:
        weights: objective to its probability; they add up to 1. Equal by default.
        seed: of the draws; the run's by default.

    Raises:
        ArgumentError: the weights do not add up to 1; or, once bound, they name no objective.

    Reference: arXiv 2410.15483, Algorithm 1 (ALRIGHT).

    Example:
        >>> alright = Alright({"sft": 0.25, "dpo": 0.75}, seed=1)
        >>> alright.bind({"sft": 100, "dpo": 30})
        >>> drawn = [next(iter(alright.choose(step, 1000, {}))) for step in range(1000)]
        >>> 700 < drawn.count("dpo") < 800
        True
    """

    def __init__(self, weights: Mapping[str, float] | None = None, seed: int | None = None) -> None:
        self.weights = _checked(weights)
        self._weights: dict[str, float] = {}
        self.seed = seed

    def bind(self, passes: Mapping[str, int], seed: int = 0) -> None:
        super().bind(passes, seed)
        self._weights = _matched(self.weights, self.names)

    def choose(self, step: int, total_steps: int, values: Mapping[str, float]) -> dict[str, float]:
        draw, reached = _uniform(self.run_seed if self.seed is None else self.seed, step), 0.0
        for name, weight in self._weights.items():
            reached += weight
            if draw < reached:
                return {name: 1.0}
        # Weights that add up to a rounding error less than 1: the last one that can be drawn at all.
        return {[name for name, weight in self._weights.items() if weight > 0][-1]: 1.0}


class MaxRight(Schedule):
    """Every step descends the loss that is furthest from its ideal value, by weight.

    i_t = argmax_i w_i · (f_i − f*_i),  g = ∇f_{i_t}. A step measures the loss that it trains; the others keep their
    last value. Every ``refresh_every`` steps, the first included, all are measured without gradient (dropout off) on
    the rows that they would train on next, which stay theirs to train on. Of equals, the objective named first wins.

    Args:
        weights: objective to its weight w_i ≥ 0; they add up to 1. Equal by default.
        ideal: objective to its ideal value f*_i, usually what training on it alone reaches; 0 where absent.
        refresh_every: steps between two measurements of all losses.

    Raises:
        ArgumentError: the weights do not add up to 1, a value is not finite, or ``refresh_every`` is below 1; or,
            once bound, a name is no objective's.

    Reference: arXiv 2410.15483, Algorithm 2 (MAXRIGHT).

    Example:
        >>> maxright = MaxRight({"sft": 0.5, "dpo": 0.5}, ideal={"sft": 1.0}, refresh_every=10)
        >>> maxright.bind({"sft": 100, "dpo": 30})
        >>> maxright.choose(3, 100, {"sft": 1.4, "dpo": 0.5})
        {'dpo': 1.0}
        >>> maxright.measures(10), maxright.measures(11)
        (True, False)
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        ideal: Mapping[str, float] | None = None,
        refresh_every: int = 10,
    ) -> None:
        self.weights = _checked(weights)
        self._weights: dict[str, float] = {}
        self.ideal = dict(ideal or {})
        for name, value in self.ideal.items():
            if not math.isfinite(value):
                raise ArgumentError("ideal", self.ideal, f"the value of {name!r} is not finite")
        if refresh_every < 1:
            raise ArgumentError("refresh_every", refresh_every, "give a number of steps of at least 1")
        self.refresh_every = refresh_every

    def bind(self, passes: Mapping[str, int], seed: int = 0) -> None:
        super().bind(passes, seed)
        self._weights = _matched(self.weights, self.names)
        _check_names("ideal", self.ideal, self.names)

    def measures(self, step: int) -> bool:
        return step % self.refresh_every == 0

    def choose(self, step: int, total_steps: int, values: Mapping[str, float]) -> dict[str, float]:
        gaps = {name: w * (values[name] - self.ideal.get(name, 0.0)) for name, w in self._weights.items()}
        return {max(gaps, key=gaps.__getitem__): 1.0}


class Sequential(Schedule):
    """One objective after the other, in the given order, with one optimizer and one learning-rate schedule.

    Args:
        order: every objective once, first to last.
        shares: the part of all steps that each objective gets, in the order's; they add up to 1. By default in
            proportion to the steps that one pass over its data takes, and at least one step each: then
            ``num_train_epochs`` counts passes over every data set.

    Raises:
        ArgumentError: an objective twice, or shares that do not add up to 1; or, once bound, an objective that is
            not there or is left out.

    Reference: arXiv 2410.15483, section 3 (what joint training is compared with).

    Example:
        >>> sequential = Sequential(["sft", "dpo"])
        >>> sequential.bind({"dpo": 30, "sft": 90})
        >>> sequential.choose(74, 100, {}), sequential.choose(75, 100, {})
        ({'sft': 1.0}, {'dpo': 1.0})
    """

    def __init__(self, order: Sequence[str], shares: Sequence[float] | None = None) -> None:
        self.order = tuple(order)
        if isinstance(order, str) or not self.order or len(set(self.order)) < len(self.order):
            raise ArgumentError("order", order, 'name each objective once, for example ["sft", "dpo"]')
        if shares is not None and len(shares) != len(self.order):
            raise ArgumentError("shares", list(shares), f"give one share for each of {', '.join(self.order)}")
        self.shares = None
        if shares is not None:
            self.shares = tuple(_checked(dict(zip(self.order, shares, strict=True)), "shares").values())
        self._shares: tuple[float, ...] = ()

    def bind(self, passes: Mapping[str, int], seed: int = 0) -> None:
        super().bind(passes, seed)
        _check_names("order", self.order, self.names)
        _check_complete("order", self.order, self.names)
        whole = sum(passes.values())
        self._shares = self.shares or tuple(passes[name] / whole for name in self.order)

    def epoch_steps(self, passes: Mapping[str, int]) -> int:
        return sum(passes.values())

    def choose(self, step: int, total_steps: int, values: Mapping[str, float]) -> dict[str, float]:
        return {self.order[sum(step >= end for end in self._ends(total_steps))]: 1.0}

    def _ends(self, total_steps: int) -> list[int]:
        """The step before which each objective but the last one ends."""
        ends: list[int] = []
        reached = 0.0
        left = len(self.order)
        for share in self._shares[:-1]:
            reached += share
            left -= 1
            earliest = (ends[-1] if ends else 0) + (1 if share > 0 else 0)
            ends.append(max(earliest, min(round(reached * total_steps), total_steps - left)))
        return ends


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _checked(weights: Mapping[str, float] | None, argument: str = "weights") -> dict[str, float]:
    if weights is None:
        return {}
    values = dict(weights)
    if not all(math.isfinite(value) and value >= 0 for value in values.values()):
        raise ArgumentError(argument, values, "give finite numbers of at least 0")
    if abs(sum(values.values()) - 1) > _SUM:
        raise ArgumentError(argument, values, f"they add up to {sum(values.values()):g}; make that 1")
    return values


def _matched(weights: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    """The weights in the objectives' order; equal ones where none were given."""
    if not weights:
        return {name: 1 / len(names) for name in names}
    _check_names("weights", weights, names)
    _check_complete("weights", weights, names)
    return {name: weights[name] for name in names}


def _check_names(argument: str, given: Mapping[str, float] | Sequence[str], names: Sequence[str]) -> None:
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ArgumentError(argument, given, f"{unknown[0]!r} is no objective; there are {', '.join(names)}")


def _check_complete(argument: str, given: Mapping[str, float] | Sequence[str], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in given]
    if missing:
        raise ArgumentError(argument, given, f"objective {missing[0]!r} is missing; name each of {', '.join(names)}")
