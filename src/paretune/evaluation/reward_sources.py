"""The reward side of `measure`: what each model is rewarded for, on the same prompts or pairs."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ArgumentError, DataError
from ..generation import Decoding, Generation, generate
from ..generation.divergence import answer_tokens, divergence
from ..generation.local import encode
from ..generation.prompts import Questions, read_rows
from .dpo_margin import DPOMargin
from .measure import Rewarded
from .points import ItemScores
from .reward import Item, Reward, Scores, score


class AnswersReward:
    """Each model answers the same prompts, and a reward scores its answers.

    A pairwise reward compares with the reference's answers; the reference against itself is ½, without asking.

    Args:
        questions: the prompts.
        reward: what scores the answers.
        decoding: how they are written; the draws of a prompt are the same for every model.
        source: what identifies the reward beyond its record, such as the text of its flag.
        folder: keeps the answers of each model, ``folder/NAME.jsonl``; an interrupted run goes on from them.
        progress: whether to show bars on stderr.
        kl: whether to measure KL(model ‖ reference) along each model's answers. The reference then stays in memory.
    """

    def __init__(
        self,
        questions: Questions,
        reward: Reward,
        decoding: Decoding,
        source: str,
        folder: Path | None = None,
        progress: bool = True,
        kl: bool = True,
    ) -> None:
        if questions.second:
            raise ArgumentError(
                "prompts", len(questions.second), "the prompts have two turns: give prompts of one turn"
            )
        self.prompts, self.reward, self.decoding, self.folder = questions.prompts, reward, decoding, folder
        self._progress = progress
        self._reference: list[Generation] | None = None
        self._kl, self._met = kl, False
        self._kept: tuple[Any, Any] | None = None  # for the KL: the reference and its tokenizer
        self.relative = reward.pairwise or kl
        self.record: dict[str, Any] = {
            "source": source,
            "how": reward.record(),
            "unit": reward.unit,
            "prompts": _digest(self.prompts),
            "decoding": {**decoding.record(), "samples": decoding.samples},
            "kl": kl,
        }

    def __call__(self, model: Any, tokenizer: Any, name: str) -> Rewarded:
        """The reward of each answer."""
        first = not self._met
        self._meet(model, tokenizer)
        if not first and self._kept is not None and model is self._kept[0]:
            mend = "is the reference's own model, changed in place: open the reference apart, or measure without KL"
            raise ArgumentError("model", name, mend)
        answers = self._answers(model, tokenizer, name)
        if first:
            self._reference = answers
        if self.reward.pairwise and first:
            found = Scores(self.reward.name, self.reward.unit, [0.5] * len(answers), {"against": "itself"})
        else:
            found = score(answers, self.reward, self._reference if self.reward.pairwise else None)
        if found.failed:
            counts = json.dumps(found.metadata.get("counts", {}))
            raise DataError(
                f"{found.reward}: {found.failed} of {len(answers)} answers of {name} have no score ({counts}): measure "
                "again, with --answers DIR so that what was scored is kept"
            )
        clusters = [answer.index for answer in answers] if self.decoding.samples > 1 else None
        ids = [f"{answer.index} {answer.sample} {_digest(answer.prompt)}" for answer in answers]
        items = ItemScores.of([value for value in found.values if value is not None], ids, clusters=clusters)
        lengths = [answer.tokens for answer in answers if answer.tokens is not None]
        length = sum(lengths) / len(lengths) if lengths else None
        how = self.record["how"]
        about = {name: value for name, value in found.metadata.items() if how.get(name) != value}
        about |= {"finished": sum(answer.finished for answer in answers) / len(answers)}
        kl, why_not = self._divergence(model, tokenizer, answers)
        return Rewarded(items, length, kl, about | ({"kl": why_not} if why_not else {}))

    def prepare(self, model: Any, tokenizer: Any, name: str) -> None:
        """The reference itself and its answers, where its scores were taken over from an earlier run."""
        if not self._met:
            self._meet(model, tokenizer)
            self._reference = self._answers(model, tokenizer, name) if self.reward.pairwise else None

    def _meet(self, model: Any, tokenizer: Any) -> None:
        if not self._met and self._kl:
            self._kept = model, tokenizer
        self._met = True

    def _divergence(self, model: Any, tokenizer: Any, answers: list[Generation]) -> tuple[float | None, str]:
        """Mean KL of an answer, in nats; or None and why."""
        if self._kept is None:
            return None, ""
        reference, its_tokenizer = self._kept
        if model is reference:
            return 0.0, ""
        if tokenizer.get_vocab() != its_tokenizer.get_vocab():
            return None, "not measured: the reference has another vocabulary"
        rows = answer_tokens(answers, encode(self.prompts, tokenizer, model, self.decoding), tokenizer)
        try:
            each = divergence(model, partial(nullcontext, reference), rows, self.decoding.batch_size)
        except ValueError as error:  # embeddings padded to other sizes
            return None, f"not measured: {error}"
        return sum(each) / len(each), ""

    def _answers(self, model: Any, tokenizer: Any, name: str) -> list[Generation]:
        kept = None if self.folder is None else self.folder / f"{file_name(name)}.jsonl"
        return generate(model, self.prompts, self.decoding, tokenizer, kept, name=name, progress=self._progress)


class PreferencesReward:
    """How much more than the reference a model prefers the chosen answer of each pair: DPO's implicit reward.

    Args:
        pairs: (prompt, chosen, rejected).
        beta: β of the margin.
        accuracy: score 1 where the margin is positive, ½ where it is 0, else 0, in place of the margin.
        batch_size: pairs at once.

    Reference: arXiv 2305.18290, equation 7.
    """

    relative = True

    def __init__(self, pairs: Sequence[Item], beta: float = 0.1, accuracy: bool = False, batch_size: int = 8) -> None:
        if not beta > 0:
            raise ArgumentError("beta", beta, "give a positive number")
        self.pairs, self.beta, self.accuracy, self.batch_size = list(pairs), beta, accuracy, batch_size
        self._margins: DPOMargin | None = None
        content = [(item.prompt, item.answer, item.other) for item in self.pairs]
        self.record: dict[str, Any] = {
            "source": "dpo-accuracy" if accuracy else "dpo-margin",
            "unit": "share of pairs" if accuracy else "nats",
            "beta": beta,
            "pairs": _digest(content),
        }

    def __call__(self, model: Any, tokenizer: Any, name: str) -> Rewarded:
        """The margin, or its sign, of each pair."""
        self.prepare(model, tokenizer, name)
        margins = self._margins
        assert margins is not None  # prepare made it
        margins.policy = model
        found = score(self.pairs, margins)
        margins.policy = nn.Identity()  # else this model would stay in memory beside the next
        values = [value for value in found.values if value is not None]
        if self.accuracy:
            values = [0.5 if value == 0 else float(value > 0) for value in values]
        ids = [f"{number} {_digest(item.prompt)}" for number, item in enumerate(self.pairs)]
        return Rewarded(ItemScores.of(values, ids), about={"accuracy": margins.accuracy})

    def prepare(self, model: Any, tokenizer: Any, name: str) -> None:
        """Take the first model that is seen as the reference: its log-probabilities are computed now and kept."""
        if self._margins is not None:
            return
        # A shallow copy is another object with the same weights.
        self._margins = DPOMargin(copy.copy(model), model, tokenizer, beta=self.beta, batch_size=self.batch_size)
        self._margins(self.pairs)
        self._margins.reference = nn.Identity()  # every log-probability of it is known


def read_pairs(path: str) -> list[Item]:
    """Preference pairs in TRL's columns: prompt (text or messages), chosen, rejected; or whole conversations.

    Args:
        path: JSON lines or a JSON list.

    Raises:
        DataError: a row lacks a column, or its two answers are equal.
    """
    pairs = []
    for number, row in enumerate(read_rows(path, "preferences"), 1):
        where = f"preferences={path!r}: row {number}"
        prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
        if not chosen or not rejected:
            raise DataError(f"{where} has {', '.join(sorted(row))}; give prompt, chosen and rejected")
        if prompt is None and isinstance(chosen, list) and isinstance(rejected, list):
            prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
        if not prompt:
            raise DataError(f"{where} has no prompt; give prompt, chosen and rejected")
        first, second = (each if isinstance(each, str) else each[-1]["content"] for each in (chosen, rejected))
        pairs.append(Item(prompt, first, second))
    return pairs


def file_name(name: str) -> str:
    """A point's name as a file's: other characters than letters, digits and ``._=-`` become ``_``, as do first dots.

    Example:
        >>> file_name("aligned α=0.25/x"), file_name("..")
        ('aligned_α=0.25_x', '__')
    """
    return re.sub(r"[^\w.=-]|^\.+", lambda found: "_" * len(found[0]), name)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
