"""Many points on one suite and one reward, in one process: every model asked the same, compared with the reference."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import ArgumentError
from ..generation.fingerprint import model_fingerprint
from .capability import FEWSHOT_SEED, Benchmarks, Capability
from .paired import against, measurement
from .points import ItemScores, Measurement


@dataclass(frozen=True)
class Rewarded:
    """What a reward says of one model.

    Args:
        items: of each answer or pair, the same prompts in the same order for every model.
        response_length: mean length of the answers, in tokens; None where none were written.
        kl: KL(model ‖ reference) per answer in nats, where it was measured.
        about: how this one was measured, beside the reward's record.
    """

    items: ItemScores
    response_length: float | None = None
    kl: float | None = None
    about: dict[str, Any] = field(default_factory=dict)


class RewardSource(Protocol):
    """Anything that rewards models. The first model that it meets is the reference.

    Args:
        record: what is rewarded and how, by content; tells rewards apart when a stopped run goes on.
        relative: whether a reward depends on the reference.
    """

    record: dict[str, Any]
    relative: bool

    def __call__(self, model: Any, tokenizer: Any, name: str) -> Rewarded:
        """The rewards of one model."""

    def prepare(self, model: Any, tokenizer: Any, name: str) -> None:
        """Meet the reference where its rewards are known already."""


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    Args:
        name: unique.
        family: as in `Measurement`.
        open: loads it, or dials a loaded model to it; called when its turn comes.
        source: where it comes from, for the record.
        hyperparameters, path, label: as in `Measurement`.
    """

    name: str
    family: str
    open: Callable[[], tuple[Any, Any]]
    source: str = ""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    label: str = ""


def measure(
    candidates: Sequence[Candidate],
    benchmarks: Benchmarks,
    reward: RewardSource,
    *,
    batch_size: int = 8,
    progress: bool = True,
    known: Iterable[Measurement] = (),
    keep: Callable[[list[Measurement]], None] | None = None,
    samples: Callable[[str, Capability], None] | None = None,
) -> list[Measurement]:
    """Measure models, the reference first, and compare each with it item by item.

    Args:
        candidates: the first one is the reference; one is open at a time.
        benchmarks: the capability side.
        reward: the reward side.
        batch_size: requests at once.
        progress: whether to show bars on stderr.
        known: points of an earlier run; one is taken over where model, suite, data and reward are the same, by content.
        keep: told of all points so far after each, so that a stopped run can go on.
        samples: told of each newly measured model's answers.

    Raises:
        ArgumentError: there is no candidate, or two have the same name.
    """
    names = [candidate.name for candidate in candidates]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not names:
        raise ArgumentError("models", names, "give the reference, and models to compare with it")
    if twice is not None:
        raise ArgumentError("models", twice, "two models have this name: give each its own, as NAME=PATH")
    before = {point.measured.get("key"): point for point in known}
    raw: list[Measurement] = []
    found: list[Measurement] = []
    reference = ""
    for candidate in candidates:
        model, tokenizer = candidate.open()
        fingerprint = model_fingerprint(model)
        reference = reference or fingerprint
        key = _key(benchmarks, reward, fingerprint, _reading(model, tokenizer), reference if reward.relative else "")
        point = _taken_over(before.get(key), candidate, reference)
        if point is not None and not raw:
            reward.prepare(model, tokenizer, candidate.name)
        if point is None:
            started = time.perf_counter()
            benchmarks.check(model, tokenizer)
            # The reward first: what cannot work there (a prompt too long, a judge that is not there) costs less time.
            rewarded = reward(model, tokenizer, candidate.name)
            capability = benchmarks.measure(model, tokenizer, batch_size=batch_size, progress=progress)
            how = _how(benchmarks, reward.record, capability)
            how |= {"rewarded": rewarded.about} if rewarded.about else {}
            how |= {"key": key, "source": candidate.source, "model": fingerprint, "reference": reference}
            how["seconds"] = round(time.perf_counter() - started, 3)
            point = _point(candidate, capability, rewarded, how)
            if samples is not None:
                samples(candidate.name, capability)
        raw.append(point)
        found = [raw[0], *against(raw[0], raw[1:])]
        if keep is not None:
            keep(found)
        del model, tokenizer  # the next one may need its memory
    return found


def _point(candidate: Candidate, capability: Capability, rewarded: Rewarded, how: dict[str, Any]) -> Measurement:
    return measurement(
        candidate.name,
        candidate.family,
        rewarded.items,
        capability.items,
        hyperparameters=candidate.hyperparameters,
        path=candidate.path,
        label=candidate.label,
        response_length=rewarded.response_length,
        kl=rewarded.kl,
        measured=how,
    )


def _taken_over(point: Measurement | None, candidate: Candidate, reference: str) -> Measurement | None:
    """A known point under the candidate's name, without what was compared with another reference."""
    if point is None or point.reward_items is None:
        return None
    return measurement(
        candidate.name,
        candidate.family,
        point.reward_items,
        point.capability_items,
        hyperparameters=candidate.hyperparameters,
        path=candidate.path,
        label=candidate.label,
        response_length=point.response_length,
        kl=point.kl,
        measured={**point.measured, "source": candidate.source, "reference": reference},
    )


def _how(benchmarks: Benchmarks, reward: dict[str, Any], capability: Capability) -> dict[str, Any]:
    from importlib.metadata import version

    suite = benchmarks.suite
    how: dict[str, Any] = {
        "suite": suite.name,
        "suite_fingerprint": suite.fingerprint,
        "data_fingerprint": benchmarks.fingerprint,
        "prompts": capability.prompts,
        "chat_template": suite.chat,
        "decoding": benchmarks.decoding,
        "fewshot_seed": FEWSHOT_SEED,
        "n": {name: len(items.scores) for name, items in capability.items.items()},
        "reward": reward,
        "lm_eval": version("lm_eval"),
    }
    shots = {task.task: task.shots for task in suite.tasks if task.shots}
    if shots:
        how["shots"] = shots
    if capability.corpus:
        how["corpus"] = capability.corpus
    if benchmarks.limit is not None:
        how["limit"] = benchmarks.limit
    return how


def _reading(model: Any, tokenizer: Any) -> str:
    """What lies between text and a model's weights: vocabulary, chat template, end tokens."""
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    about = [vocabulary, str(tokenizer.chat_template), json.dumps(tokenizer.all_special_tokens), str(end)]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()


def _key(benchmarks: Benchmarks, reward: RewardSource, *models: str) -> str:
    """Content alone: a model that was overwritten in its folder is another model."""
    how = json.dumps(reward.record, sort_keys=True)
    parts = [*models, benchmarks.suite.fingerprint, benchmarks.fingerprint, how]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
