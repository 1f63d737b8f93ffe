"""The dial: how far to go along a policy's change, chosen by generated reward and stopped by what is lost.

    θ(s) = θ_ref + s·(θ_policy − θ_ref)

Reward alone is no safe guide: where a cure suppresses what has to be learnt, larger s buys nothing but damage, and the
reward does not show it. So the reference's own answers are watched beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy

from ..errors import ArgumentError, DataError

LADDER = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
_DRAWS = 2000


@dataclass(frozen=True)
class Agreement:
    """How much a model still says what the reference says.

    Args:
        exact: share of the reference's greedy answers that the model gives word for word, in [0, 1].
        kl: mean of log π_ref − log π over the reference's samples, in nats a token.
    """

    exact: float
    kl: float


@dataclass(frozen=True)
class Skills:
    """What a model can do, on a suite.

    Args:
        mean: of its categories.
        ci: its 95% interval over items.
        by_category: each category's mean.
    """

    mean: float
    ci: tuple[float, float]
    by_category: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rung:
    """One setting of the dial.

    Args:
        scale: s.
        reward: mean.
        reward_ci: its 95% interval over prompts.
        agreement: with the reference; None where it was not watched.
        skills: None where there is no suite.
        rewards: of each prompt.
    """

    scale: float
    reward: float
    reward_ci: tuple[float, float]
    agreement: Agreement | None
    skills: Skills | None
    rewards: tuple[float, ...]


@dataclass(frozen=True)
class Dialled:
    """The curve and what was chosen.

    Args:
        rungs: in the order of the ladder, as far as it was climbed.
        chosen: the scale.
        why: one sentence.
        stopped: what ended the climb; None where all was tried.
        reference: the model at scale 0, which skills are compared with; None without a suite.
    """

    rungs: tuple[Rung, ...]
    chosen: float
    why: str
    stopped: str | None = None
    reference: Rung | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def dial(
    set_scale: Callable[[float], object],
    reward: Callable[[], Sequence[float]],
    agreement: Callable[[], Agreement] | None = None,
    skills: Callable[[], Skills] | None = None,
    *,
    ladder: Sequence[float] = LADDER,
    target: float | None = None,
    least_exact: float = 0.8,
    largest_kl: float = 0.5,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Dialled:
    """Climb a ladder of scales and choose one.

    The choice is the smallest scale that reaches ``target``; without a target, or where none does, the smallest one
    that is not measurably below the best (95%, paired over prompts). The climb ends at the first rung at which the
    model has left the reference too far; that rung is never chosen.

    Args:
        set_scale: dials the model: `paretune.LiveMerge` between reference and policy, by ratio 1 − s.
        reward: rewards of answers to held-out prompts, in the same order at every call.
        agreement: with the reference on its own answers.
        skills: measured at every rung and at scale 0; shown, never used for the choice.
        ladder: scales > 0, ascending.
        target: the reward that is wanted.
        least_exact: stop where fewer of the reference's answers remain word for word.
        largest_kl: stop where the reference's own samples have become less likely than this, in nats a token.
        seed: of the bootstrap.
        progress: told of the rungs done and of all.

    Returns:
        The rungs, the chosen scale and why.

    Raises:
        ArgumentError: the ladder is empty or does not ascend from above 0.
        DataError: the first rung is already too far from the reference.

    Example:
        >>> state = {}
        >>> found = dial(
        ...     lambda s: state.update(s=s), lambda: [min(state["s"], 1.0)] * 4, ladder=(0.5, 1.0, 1.5), target=0.9
        ... )
        >>> found.chosen, found.why
        (1.0, 'the smallest scale that reaches 0.9')
    """
    if not ladder or min(ladder) <= 0 or any(a >= b for a, b in pairwise(ladder)):
        raise ArgumentError("ladder", list(ladder), "give scales above 0, in ascending order")
    rungs: list[Rung] = []
    stopped = reference = None
    if skills is not None:
        set_scale(0.0)
        reference = _rung(0.0, reward, None, skills, seed)
    for done, scale in enumerate(ladder):
        set_scale(scale)
        seen = None if agreement is None else agreement()
        if seen is not None and (seen.exact < least_exact or seen.kl > largest_kl):
            stopped = (
                f"at scale {scale:g} {seen.exact:.0%} of the reference's answers remain (at least {least_exact:.0%}), "
                f"KL {seen.kl:.2f} nats a token (at most {largest_kl:g})"
            )
            break
        rungs.append(_rung(float(scale), reward, seen, skills, seed))
        if (count := len(rungs[-1].rewards)) != len(rungs[0].rewards):
            raise DataError(f"reward: {count} values at scale {scale:g}: give one for each prompt at every rung")
        if progress is not None:
            progress(done + 1, len(ladder))
    if not rungs:
        raise DataError(f"{stopped}: begin the ladder lower, or allow more (least_exact, largest_kl)")
    chosen, why = _choose(rungs, target, seed)
    return Dialled(tuple(rungs), chosen.scale, why, stopped, reference)


def _rung(
    scale: float,
    reward: Callable[[], Sequence[float]],
    seen: Agreement | None,
    skills: Callable[[], Skills] | None,
    seed: int,
) -> Rung:
    rewards = tuple(map(float, reward()))
    if not rewards:
        raise DataError(f"reward: no values at scale {scale:g}: give one for each prompt at every rung")
    suite = None if skills is None else skills()
    return Rung(scale, sum(rewards) / len(rewards), _interval(_means(rewards, seed)), seen, suite, rewards)


def _choose(rungs: Sequence[Rung], target: float | None, seed: int) -> tuple[Rung, str]:
    reached = [] if target is None else [rung for rung in rungs if rung.reward >= target]
    if reached:
        return reached[0], f"the smallest scale that reaches {target:g}"
    best = max(rungs, key=lambda rung: rung.reward)

    def as_good(rung: Rung) -> bool:
        differences = [b - a for a, b in zip(rung.rewards, best.rewards, strict=True)]
        return rung is best or _interval(_means(differences, seed))[0] <= 0

    missed = "" if target is None else f"no scale reaches {target:g}; "
    why = f"{missed}the smallest scale not measurably below the best, {best.scale:g}"
    return next(rung for rung in rungs if as_good(rung)), why


def _means(values: Sequence[float], seed: int) -> numpy.ndarray:
    """Means of bootstrap samples; the same prompts are drawn at every rung."""
    rng = numpy.random.default_rng(seed)
    counts = rng.multinomial(len(values), [1 / len(values)] * len(values), _DRAWS) / len(values)
    return counts @ numpy.asarray(values, dtype=float)


def _interval(draws: numpy.ndarray) -> tuple[float, float]:
    low, high = numpy.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
