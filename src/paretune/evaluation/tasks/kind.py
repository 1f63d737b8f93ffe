"""What a task of ours is: how a row becomes a prompt, and an answer a score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """A family of tasks whose data have the same layout.

    Args:
        name: as suites call it.
        about: one line for the listing.
        columns: sets of columns, of which a row must have one set whole. A suite may rename columns.
        prompt: the row as the model reads it.
        target: the right answer as a few-shot example shows it.
        score: of (row, answer), in [0, 1]; None for multiple choice, which compares log-likelihoods.
        metric: what the score is called.
        choices: of multiple choice: the row's answers; ``target`` is then the right one's index.
        until: texts at which an answer ends.
        max_tokens: the longest answer.
        cluster: what groups rows, such as their passage; None where each stands alone.
        check: what is wrong with a row beyond its columns, or nothing.
        runs_code: whether scoring runs what the model wrote.
        layout: where the layout was seen.
    """

    name: str
    about: str
    columns: tuple[tuple[str, ...], ...]
    prompt: Callable[[Row], str]
    target: Callable[[Row], Any]
    score: Callable[[Row, str], float] | None
    metric: str
    choices: Callable[[Row], list[str]] | None = None
    until: tuple[str, ...] = ("\n\n",)
    max_tokens: int = 256
    cluster: Callable[[Row], object] | None = None
    check: Callable[[Row], str] | None = None
    runs_code: bool = False
    layout: str = ""

    def missing(self, row: Row) -> tuple[str, ...]:
        """The columns that a row lacks, of the set that it comes nearest to; none where it can be read."""
        absent = [tuple(name for name in names if row.get(name) is None) for names in self.columns]
        return min(absent, key=len)
