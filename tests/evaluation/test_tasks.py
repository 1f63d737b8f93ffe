"""Our tasks on rows in the published layouts: what they ask, what they count as right, what they refuse."""

from __future__ import annotations

import json

import pytest
from published_rows import CALL, OURS, SCHEMA

from paretune.errors import DataError
from paretune.evaluation.tasks import KINDS
from paretune.evaluation.tasks.numbers import answer_number, numbers_in, same_number
from paretune.evaluation.tasks.programs import humaneval_program, mbpp_program, needed_library
from paretune.evaluation.tasks.reading import drop_answers, keyword_recall, token_f1
from paretune.evaluation.tasks.scripts import stays
from paretune.evaluation.tasks.structured import calls_in, first_json, obeys, same_calls

ROWS = [(kind, row) for kind, rows in OURS.items() for row in rows]


@pytest.mark.parametrize(("kind", "row"), ROWS, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(ROWS)])
def test_published_layouts(kind: str, row: dict) -> None:
    """Every row can be asked; its own answer is right, an empty one is wrong."""
    task = KINDS[kind]
    assert task.missing(row) == ()
    assert task.prompt(row)
    if task.score is None:
        assert task.choices is not None
        assert task.choices(row)[task.target(row)] == row["answer"]
        return
    assert task.score(row, "") == 0
    right = {"japanese": "東京は日本の首都です。", "russian": "Москва — столица."}.get(row.get("language", ""))
    assert task.score(row, right or task.target(row)) == 1


def test_every_kind_has_rows() -> None:
    assert set(OURS) == set(KINDS)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_missing_column_is_named(kind: str) -> None:
    row = OURS[kind][0]
    needed = next(names for names in KINDS[kind].columns if all(row.get(name) is not None for name in names))
    short = {name: value for name, value in row.items() if name != needed[-1]}
    assert KINDS[kind].missing(short) == (needed[-1],)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 1,234.5.", 1234.5),
        ("so 3 + 4 = 7", 7),
        ("#### -12", -12),
        ("答案：3/4", 0.75),
        ("about 2.5e-3", 0.0025),
        ("−5", -5),
        ("nothing", None),
        ("The answer is unclear, maybe 7", 7),
        ("1/0", None),
        ("x = 5.", 5),
        ("6%", 0.06),
    ],
)
def test_answer_numbers(text: str, number: float | None) -> None:
    assert answer_number(text) == number


def test_numbers_are_compared_as_numbers() -> None:
    assert same_number("0.3333", "1/3") == 1
    assert same_number("0.3333", "0.33") == 0
    assert same_number("25%", "0.25") == 1
    assert same_number("(3/4)", "0.75") == 1
    assert numbers_in("12-3") == [12, -3]  # a difference is written with spaces or is not one number


def test_reading() -> None:
    assert keyword_recall(["May 1990"], "It was in May, 1990, I think.") == 1
    assert keyword_recall(["Oslo and Riga"], "Oslo") == pytest.approx(1 / 3)
    assert keyword_recall(["the"], "the") == 0  # nothing but an article: no keyword
    assert token_f1(["Oslo"], "Oslo Oslo") == pytest.approx(2 / 3)
    row = {"answer": {"number": "", "spans": ["Oslo", "Riga"], "date": {"day": "", "month": "", "year": ""}}}
    assert drop_answers(row) == ["Oslo Riga"]


def test_function_calls() -> None:
    assert same_calls(CALL, CALL.replace("'", '"')) == 1
    assert same_calls(CALL, CALL.replace("2", "3")) == 0
    assert same_calls(CALL, CALL + CALL) == 0
    both = CALL + CALL.replace("Oslo", "Riga")
    assert same_calls(both, CALL.replace("Oslo", "Riga") + "and" + CALL) == 1
    assert calls_in("<tool_call>{oops</tool_call>") is None
    assert same_calls(CALL, "<tool_call>__import__('os').system('true')</tool_call>") == 0


@pytest.mark.parametrize(
    ("value", "right"),
    [
        ({"name": "Tom", "age": 3}, True),
        ({"name": "Tom", "age": 3.0}, True),
        ({"name": "Tom", "age": -1}, False),
        ({"name": "Tom", "age": True}, False),
        ({"name": "Tom"}, False),
        ({"name": 1, "age": 3}, False),
        ({"name": "Tom", "age": 3, "kind": "dog"}, False),
        (["Tom"], False),
    ],
)
def test_schemas(value: object, right: bool) -> None:
    assert obeys(value, SCHEMA) is right


def test_more_of_schemas() -> None:
    tree = {"$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}
    assert obeys({"next": {"next": {}}}, tree)
    assert not obeys({"next": {"next": 1}}, tree)
    assert not obeys({"a": 1, "b": 2}, {"properties": {"a": {}}, "additionalProperties": False})
    assert obeys(None, {"anyOf": [{"type": "string"}, {"type": "null"}]})
    assert not obeys([1, 1], {"uniqueItems": True})
    with pytest.raises(DataError, match="'unevaluatedItems' is not known"):
        obeys([], {"unevaluatedItems": False})
    assert first_json('Sure:\n```json\n{"a": [1]}\n```') == {"a": [1]}
    assert first_json("no { here") is None
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


def test_scripts() -> None:
    assert stays("東京はJapanの首都で、人口は一千万人を超える大都市です。", "japanese") == 1  # a name in Latin letters
    assert stays("東京は日本의 수도입니다.", "japanese") == 0
    assert stays("The capital is 東京都千代田区です", "english") == 0
    assert stays("The symbol π stands for the ratio of a circle's circumference to its diameter.", "english") == 1
    assert stays("1234 !?", "english") == 0
    with pytest.raises(DataError, match="'klingon': its scripts are not known"):
        stays("x", "klingon")


def test_programs_are_put_together() -> None:
    row = OURS["humaneval"][0]
    assert humaneval_program(row, "    return 2 * x\n").startswith(row["prompt"] + "    return")
    whole = "Here:\n```python\ndef double(x):\n    return x + x\n```\nThat is all."
    assert humaneval_program(row, whole).startswith("def double(x):\n    return x + x\n")
    assert KINDS["humaneval"].score(row, whole) == 1
    assert KINDS["humaneval"].score(row, "    return 3 * x\n") == 0
    assert "assert add(1, 2) == 3" in mbpp_program(OURS["mbpp"][0], "def add(a, b): return a + b")
    ds = OURS["ds1000"][0]
    assert KINDS["ds1000"].score(ds, "result = 0\nfor x in a: result += x") == 0  # its test_string forbids loops
    assert needed_library({"metadata": {"library": "Nowhere"}}).startswith("needs nowhere, which is not installed")
