"""Tasks for anybody's rows: an exact answer, or a choice among several."""

from __future__ import annotations

import re

from .kind import Kind, Row

_LETTERS = "ABCDEFGHIJ"


def same_words(answer: str, text: str, ignore: frozenset[str] = frozenset()) -> float:
    """1 where the words are equal after the ignored ones are removed, else 0.

    Example:
        >>> same_words("1 2", "gladly , 1 2 . thanks", frozenset([",", ".", "gladly", "thanks"]))
        1.0
    """
    return float([word for word in text.split() if word not in ignore] == answer.split())


def _options(row: Row) -> list[str]:
    return list(row["choices"]) if row.get("choices") is not None else [row[letter] for letter in "ABCD"]


def _question(row: Row) -> str:
    lines = [f"{letter}. {text}" for letter, text in zip(_LETTERS, _options(row), strict=False)]
    return "\n".join([row["question"].strip(), *lines, "Answer:"])


def _index(row: Row) -> int:
    answer = row["answer"]
    if isinstance(answer, int):
        return answer
    match = re.fullmatch(r"\(?([A-J])\)?\.?", answer.strip())
    return _LETTERS.index(match.group(1)) if match else _options(row).index(answer)


EXACT = Kind(
    name="exact",
    about="a prompt and an answer; right where the words are the same, without those of row['ignore']",
    columns=(("prompt", "answer"),),
    prompt=lambda row: row["prompt"],
    target=lambda row: row["answer"],
    score=lambda row, text: same_words(row["answer"], text, frozenset(row.get("ignore") or ())),
    metric="exact",
    until=("\n",),
    max_tokens=32,
    layout="prompt, answer",
)
CHOICE = Kind(
    name="multiple-choice",
    about="a question and choices; right where the right letter is the likeliest",
    columns=(("question", "choices", "answer"), ("question", "A", "B", "C", "D", "answer")),
    prompt=_question,
    target=_index,
    score=None,
    metric="acc",
    choices=lambda row: list(_LETTERS[: len(_options(row))]),
    layout="question, choices or A to D, answer as letter or index",
)
KINDS = (EXACT, CHOICE)
