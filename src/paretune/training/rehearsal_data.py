"""A file of self-rehearsal: prompts that a model makes, and its answers, ready for `paretune.Distill`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from paretune.atomic import write_text
from paretune.errors import ArgumentError, DataError
from paretune.log import get
from paretune.training.rehearsal import NEEDS_SEEDS, Leakage, SelfPrompts, Source, self_answers, self_prompts

Alike: TypeAlias = Literal["leave-out", "sample"]
_PROMPT_COLUMNS = ("prompt", "messages", "chosen", "instruction", "text")
_logger = get("training")


@dataclass(frozen=True)
class RehearsalReport:
    """What was made.

    Args:
        rows: prompts with answers.
        source, sampled, valid, distinct, diversity, left_out: as in `SelfPrompts`.
        sampled_answers: answers at temperature 1, to prompts like the preferences'.
        words: mean length of the answers.
    """

    rows: int
    source: str
    sampled: int
    valid: float
    distinct: float
    diversity: float
    left_out: int
    sampled_answers: int
    words: float

    def __str__(self) -> str:
        return (
            f"{self.rows} answered prompts from {self.source}: {self.valid:.0%} of {self.sampled} valid, "
            f"{self.distinct:.0%} of these new, diversity {self.diversity:.2f}; {self.left_out} like the preferences "
            f"left out, {self.sampled_answers} answered at temperature 1; {self.words:.1f} words an answer"
        )


def make_rehearsal(
    model: Any,
    tokenizer: Any,
    out: Path,
    source: Source | Literal["auto", "file"] = "auto",
    count: int = 2000,
    *,
    prompts: Sequence[str] = (),
    seeds: Sequence[str] = (),
    preferences: Sequence[str] = (),
    alike: Alike = "leave-out",
    temperature: float = 0.0,
    max_tokens: int = 64,
    max_new_tokens: int = 256,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = True,
) -> RehearsalReport:
    """Write ``{"messages": […]}`` rows: prompts from a source, answered by the model.

    Args:
        model: the reference; unchanged.
        tokenizer: with a chat template.
        out: the JSON lines to write, whole or not at all; what was sampled until an interruption is kept beside it.
        source: as in `paretune.self_prompts`; ``"file"`` takes ``prompts``; ``"auto"`` tunes a prompt model where there
            are ``seeds``, else cuts the model's own plain text.
        count: of prompts.
        prompts: for ``"file"``.
        seeds: a few dozen prompts for ``"prompt-model"`` and ``"mutate"``.
        preferences: the preferences' prompts.
        alike: what becomes of prompts like those: left out, or answered at temperature 1, so that no single style is
            taught; distilled, such answers still hold the reference's mixture of styles.
        temperature: of the other answers.
        max_tokens, max_new_tokens: of a prompt, of an answer.
        seed, batch_size, progress: of the sampling.

    Raises:
        ArgumentError: an unknown source, or one without what it needs.
        DataError: no valid prompt, or no answer that ends.
    """
    if alike not in get_args(Alike):
        raise ArgumentError("alike", alike, "choose 'leave-out' or 'sample'")
    if source == "auto":
        source = "prompt-model" if seeds else "raw-fragments"
    work = out.parent / f".{out.name}.work"
    work.mkdir(parents=True, exist_ok=True)
    guard = preferences if alike == "leave-out" else ()
    shared: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": progress}
    if source == "file":
        made = _given(prompts, guard)
    else:
        if source in NEEDS_SEEDS and not seeds:
            raise ArgumentError("source", source, "starts from a few dozen prompts: give seeds (--seeds FILE)")
        made = self_prompts(
            model, tokenizer, source, count, seeds=seeds, preferences=guard, max_tokens=max_tokens,
            out=work / "prompts", **shared,
        )  # fmt: skip
    leaks = Leakage(preferences) if preferences and alike == "sample" else None
    near = {prompt: None for prompt in made.prompts if leaks is not None and leaks(prompt)}
    apart = [prompt for prompt in made.prompts if prompt not in near]
    rows: list[dict[str, Any]] = []
    for name, asked, heat in (("answers", apart, temperature), ("sampled", list(near), 1.0)):
        if asked:
            rows += self_answers(
                model, tokenizer, asked, temperature=heat, max_new_tokens=max_new_tokens, out=work / name, **shared
            )
    if len(made.prompts) < count and source != "file":
        _logger.info(f"{source} dried up: {len(made.prompts)} of {count} prompts; fewer than about 1,100 weaken it")
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    shutil.rmtree(work, ignore_errors=True)
    words = [len(row["messages"][1]["content"].split()) for row in rows]
    about = {name: value for name, value in asdict(made).items() if name != "prompts"}
    return RehearsalReport(rows=len(rows), sampled_answers=len(near), words=sum(words) / len(words), **about)


def prompt_texts(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the user says last in each row of preferences or prompts, in any form that TRL takes; each once.

    Example:
        >>> prompt_texts([{"prompt": "Hello"}, {"prompt": [{"role": "user", "content": "Hi"}]}, {"text": "…"}])
        ['Hello', 'Hi', '…']
    """
    found: dict[str, None] = {}
    for row in rows:
        value = next(
            (row[key] for key in ("prompt", "messages", "chosen", "instruction", "text") if row.get(key)), None
        )
        if isinstance(value, str):
            found[value] = None
        elif value:
            said = [turn["content"] for turn in value if turn.get("role") == "user"]
            found.update(dict.fromkeys(said[-1:]))
    return list(found)


def _given(prompts: Sequence[str], preferences: Sequence[str]) -> SelfPrompts:
    if not prompts:
        raise ArgumentError("prompts", list(prompts), "give a file of prompts (--prompts FILE)")
    distinct = list(dict.fromkeys(prompts))
    leaks = Leakage(preferences) if preferences else lambda _: False
    kept = tuple(prompt for prompt in distinct if not leaks(prompt))
    if not kept:
        raise DataError(f"all {len(distinct)} prompts are like the preferences': give others")
    share = len(distinct) / len(prompts)
    return SelfPrompts(kept, "file", len(prompts), 1.0, share, float("nan"), len(distinct) - len(kept))
