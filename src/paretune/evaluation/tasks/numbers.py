"""Sums and word problems whose answer is one number: Math401 and Math23K."""

from __future__ import annotations

import re

from .kind import Kind, Row

_PLAIN = r"[-−]?\d+(?:,\d{3})+(?:\.\d+)?(?:[eE][-+]?\d+)?|[-−]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
# "3/4" and Math23K's "(3/4)" and "2(3/4)", then plain numbers, each with or without a percent sign.
_NUMBER = re.compile(
    rf"(?P<whole>\d+)?\(\(?(?P<top>\d+)\)?/\(?(?P<bottom>\d+)\)?\)|(?P<over>[-−]?\d+)/(?P<under>\d+)"
    rf"|(?P<plain>{_PLAIN})(?P<percent>\s*[%％])?"
)
_MARK = re.compile(r"(?:####|answer is|answer:|答案是|答案为|答案:|答案：)", re.IGNORECASE)


def numbers_in(text: str) -> list[float]:
    """The numbers of a text in their order: decimals, thousands, powers of ten, fractions and percentages.

    Example:
        >>> numbers_in("2,000 apples, 3/4 of them red, 20% rotten and 1(1/2) eaten")
        [2000.0, 0.75, 0.2, 1.5]
    """
    found = []
    for match in _NUMBER.finditer(text):
        part = match.groupdict()
        if part["top"]:
            if int(part["bottom"]):
                found.append(float(part["whole"] or 0) + int(part["top"]) / int(part["bottom"]))
        elif part["over"]:
            if int(part["under"]):
                found.append(float(part["over"].replace("−", "-")) / int(part["under"]))
        else:
            value = float(part["plain"].replace("−", "-").replace(",", ""))
            found.append(value / 100 if part["percent"] else value)
    return found


def answer_number(text: str) -> float | None:
    """The number that an answer ends on: the first after the last "answer is", "####" or 答案, else the last of all.

    Example:
        >>> answer_number("2 + 2 = 4, so the answer is 4. Next, 5 + 5"), answer_number("no idea")
        (4.0, None)
    """
    marks = list(_MARK.finditer(text))
    if marks and (after := numbers_in(text[marks[-1].end() :])):
        return after[0]
    every = numbers_in(text)
    return every[-1] if every else None


def same_number(gold: str, text: str, tolerance: float = 1e-3) -> float:
    """1 where the answer's number is within ``tolerance`` of the gold one, else 0."""
    wanted, said = answer_number(gold), answer_number(text)
    return float(wanted is not None and said is not None and abs(wanted - said) < tolerance)


def _math401_prompt(row: Row) -> str:
    return f"Calculate. Give decimals to 4 places.\n{row['query'].strip()}"


def _math23k_prompt(row: Row) -> str:
    return f"问题：{row['original_text'].strip()}\n答案："


MATH401 = Kind(
    name="math401",
    about="an expression; right within 1e-3 of the answer's last number",
    columns=(("query", "response"),),
    prompt=_math401_prompt,
    target=lambda row: str(row["response"]),
    score=lambda row, text: same_number(str(row["response"]), text),
    metric="acc",
    max_tokens=256,
    layout="github.com/GanjinZero/math401-llm",
)
MATH23K = Kind(
    name="math23k",
    about="a Chinese word problem; right within 1e-3 of the answer's last number",
    columns=(("original_text", "ans"),),
    prompt=_math23k_prompt,
    target=lambda row: str(row["ans"]),
    score=lambda row, text: same_number(str(row["ans"]), text),
    metric="acc",
    until=("问题：",),
    max_tokens=512,
    layout="Wang et al. 2017: id, original_text, segmented_text, equation, ans",
)
KINDS = (MATH401, MATH23K)
