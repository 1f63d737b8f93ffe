"""Questions about a passage: keyword recall for CoQA and DROP, token F1 for SQuAD."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

from .kind import Kind, Row

_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation and articles.

    Example:
        >>> words_of("The cat's 1,000 lives!")
        ['cats', '1000', 'lives']
    """
    plain = re.sub(r"[-–—/]", " ", text.lower()).translate(_PUNCTUATION)
    return [word for word in plain.split() if word not in _ARTICLES]


def keyword_recall(golds: Iterable[str], text: str) -> float:
    """The share of a gold answer's words that the answer contains, for the gold answer where it is largest.

        max_g |words(g) ∩ words(text)| / |words(g)|, as multisets

    A long answer is not punished for what it says besides, so that chatty models are compared by what they know.

    Example:
        >>> keyword_recall(["in the old house"], "She lived in a house."), keyword_recall(["no", "never"], "Never!")
        (0.6666666666666666, 1.0)
    """
    said = Counter(words_of(text))
    best = 0.0
    for gold in golds:
        wanted = Counter(words_of(gold))
        if wanted:
            best = max(best, (wanted & said).total() / wanted.total())
    return best


def token_f1(golds: Iterable[str], text: str) -> float:
    """The best harmonic mean of precision and recall over words, SQuAD's F1.

    Example:
        >>> token_f1(["Marie Curie"], "It was Marie Curie")
        0.6666666666666666
    """
    said = Counter(words_of(text))
    best = 0.0
    for gold in golds:
        wanted = Counter(words_of(gold))
        common = (wanted & said).total()
        if common:
            best = max(best, 2 * common / (wanted.total() + said.total()))
    return best


def coqa_answers(row: Row) -> list[str]:
    """The answer to the last question, then other annotators' (their column is a mapping by annotator)."""
    answers = [row["answers"]["input_text"][-1]]
    for other in (row.get("additional_answers") or {}).values():
        if other and other.get("input_text"):
            answers.append(other["input_text"][-1])
    return list(dict.fromkeys(answers))


def _coqa_prompt(row: Row) -> str:
    asked, said = row["questions"]["input_text"], row["answers"]["input_text"]
    turns = [f"Q: {question}\nA: {answer}" for question, answer in zip(asked[:-1], said, strict=False)]
    return "\n\n".join([row["story"], *turns, f"Q: {asked[-1]}\nA:"])


def drop_answers(row: Row) -> list[str]:
    """Every valid answer as one text: a number, a date, or all spans together."""
    validated = row.get("validated_answers") or {"number": [], "date": [], "spans": []}
    parts = [row["answer"]]
    parts += [
        {"number": number, "date": date, "spans": spans}
        for number, date, spans in zip(validated["number"], validated["date"], validated["spans"], strict=True)
    ]
    answers = []
    for part in parts:
        date = part["date"]
        text = str(part["number"]) or " ".join(part["spans"]) or f"{date['day']} {date['month']} {date['year']}"
        if text.strip():
            answers.append(text.strip())
    return list(dict.fromkeys(answers))


COQA = Kind(
    name="coqa-recall",
    about="the last question of a dialogue about a story; keyword recall",
    columns=(("story", "questions", "answers"),),
    prompt=_coqa_prompt,
    target=lambda row: coqa_answers(row)[0],
    score=lambda row, text: keyword_recall(coqa_answers(row), text),
    metric="recall",
    until=("\nQ:",),
    max_tokens=64,
    cluster=lambda row: row["story"],
    layout="EleutherAI/coqa, as lm-evaluation-harness reads it",
)
DROP = Kind(
    name="drop-recall",
    about="a question about a passage; keyword recall",
    columns=(("passage", "question", "answer"),),
    prompt=lambda row: f"{row['passage']}\n\nQuestion: {row['question']}\nAnswer:",
    target=lambda row: drop_answers(row)[0],
    score=lambda row, text: keyword_recall(drop_answers(row), text),
    metric="recall",
    until=("\n",),
    max_tokens=64,
    cluster=lambda row: row["passage"],
    layout="EleutherAI/drop, as lm-evaluation-harness reads it",
)
SQUAD = Kind(
    name="squad-f1",
    about="a question about a passage; token F1",
    columns=(("context", "question", "answers"),),
    prompt=lambda row: f"{row['context']}\n\nQuestion: {row['question']}\nAnswer:",
    target=lambda row: row["answers"]["text"][0],
    score=lambda row, text: token_f1(row["answers"]["text"], text),
    metric="f1",
    until=("\n",),
    max_tokens=64,
    cluster=lambda row: row["context"],
    layout="rajpurkar/squad: answers is {text: […], answer_start: […]}",
)
KINDS = (COQA, DROP, SQUAD)
