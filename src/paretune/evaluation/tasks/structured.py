"""Answers that a program reads: Nous function calls and JSON that obeys a schema."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from ...errors import DataError
from .kind import Kind, Row

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)
# Keywords of JSON Schema that say nothing about validity here.
_NOTES = {"$schema", "$id", "$defs", "definitions", "title", "description", "default", "examples", "format", "$comment"}
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "null": (type(None),),
    "number": (int, float), "integer": (int,),
}  # fmt: skip


def calls_in(text: str) -> list[tuple[str, Any]] | None:
    """(name, arguments) of every ``<tool_call>``; None where one cannot be read.

    The data set writes some calls as Python literals; both forms are read.

    Example:
        >>> calls_in('<tool_call>\\n{"name": "add", "arguments": {"a": 1}}\\n</tool_call>')
        [('add', {'a': 1})]
    """
    calls = []
    for body in _CALL.findall(text):
        value = _literal(body)
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            return None
        arguments = value.get("arguments", {})
        calls.append((value["name"], _literal(arguments) if isinstance(arguments, str) else arguments))
    return calls


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def same_calls(gold: str, text: str) -> float:
    """1 where the answer makes the gold calls, each with equal name and arguments, in any order; else 0."""
    wanted, made = calls_in(gold), calls_in(text)
    if not wanted or made is None or len(wanted) != len(made):
        return 0.0
    left = list(made)
    for call in wanted:
        if call not in left:
            return 0.0
        left.remove(call)
    return 1.0


def first_json(text: str) -> Any:
    """The first JSON object or array of a text, fenced or not; None where there is none."""
    for part in (*_FENCE.findall(text), text):
        starts = [i for i, letter in enumerate(part) if letter in "{["]
        if starts:
            try:
                return json.JSONDecoder().raw_decode(part[starts[0] :])[0]
            except ValueError:
                continue
    return None


def obeys(value: Any, schema: Any, root: Any = None) -> bool:
    """Whether a JSON value obeys a schema, for the keywords that the data set uses.

    Raises:
        DataError: the schema has a keyword that is not known here; to pass over it would call wrong answers right.

    Example:
        >>> obeys({"a": 1}, {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
        True
        >>> obeys({"a": True}, {"properties": {"a": {"type": "integer"}}})
        False
    """
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema
    return all(_check(key, wanted, value, schema, root) for key, wanted in schema.items() if key not in _NOTES)


def _check(key: str, wanted: Any, value: Any, schema: Mapping[str, Any], root: Any) -> bool:
    is_object, is_array, is_text = isinstance(value, dict), isinstance(value, list), isinstance(value, str)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    match key:
        case "type":
            return any(_is(value, name) for name in ([wanted] if isinstance(wanted, str) else wanted))
        case "enum":
            return value in wanted
        case "const":
            return value == wanted
        case "$ref":
            return obeys(value, _resolve(wanted, root), root)
        case "anyOf":
            return any(obeys(value, each, root) for each in wanted)
        case "oneOf":
            return sum(obeys(value, each, root) for each in wanted) == 1
        case "allOf":
            return all(obeys(value, each, root) for each in wanted)
        case "properties":
            return not is_object or all(obeys(value[n], each, root) for n, each in wanted.items() if n in value)
        case "required":
            return not is_object or all(name in value for name in wanted)
        case "additionalProperties":
            others = [n for n in value if n not in schema.get("properties", {})] if is_object else []
            return all(obeys(value[name], wanted, root) for name in others)
        case "items":
            return not is_array or all(obeys(each, wanted, root) for each in value)
        case "minItems" | "maxItems":
            return not is_array or (len(value) >= wanted if key == "minItems" else len(value) <= wanted)
        case "uniqueItems":
            return not (is_array and wanted) or all(a != b for i, a in enumerate(value) for b in value[:i])
        case "minLength" | "maxLength":
            return not is_text or (len(value) >= wanted if key == "minLength" else len(value) <= wanted)
        case "pattern":
            return not is_text or re.search(wanted, value) is not None
        case "minimum" | "maximum":
            return not is_number or (value >= wanted if key == "minimum" else value <= wanted)
        case "exclusiveMinimum" | "exclusiveMaximum":
            return not is_number or (value > wanted if key == "exclusiveMinimum" else value < wanted)
    raise DataError(f"the JSON schema keyword {key!r} is not known here: leave the row out, or score it yourself")


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    whole = isinstance(value, float) and value % 1 == 0  # 1.0 is an integer to JSON Schema
    return isinstance(value, _TYPES.get(name, ())) or (name == "integer" and whole)


def _resolve(reference: str, root: Any) -> Any:
    found = root
    for part in reference.removeprefix("#/").split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    if found is None:
        raise DataError(f"the JSON schema's {reference!r} leads nowhere: leave the row out, or mend its schema")
    return found


def _turns(row: Row) -> tuple[str, str]:
    """(what the model reads, what it should say) of either layout: messages and completion, or a dialogue."""
    if row.get("prompt") is not None:
        said = row["prompt"]
        text = said if isinstance(said, str) else "\n\n".join(turn["content"] for turn in said)
        return text, row["completion"]
    before: list[str] = []
    for turn in row["conversations"]:
        if turn["from"] == "gpt":
            return "\n\n".join(before), turn["value"]
        before.append(turn["value"])
    raise DataError(f"a row of function calls has no answer: {str(row)[:80]}")


def _json_score(row: Row, text: str) -> float:
    schema = row["schema"]
    schema = json.loads(schema) if isinstance(schema, str) else schema
    value = first_json(text)
    return float(value is not None and obeys(value, schema))


_LAYOUT = "NousResearch: prompt and completion (the -eval sets), or conversations (hermes-function-calling-v1)"
FUNCTIONS = Kind(
    name="function-calls",
    about="tools and a wish; right where every call has the gold name and arguments",
    columns=(("prompt", "completion"), ("conversations",)),
    prompt=lambda row: _turns(row)[0],
    target=lambda row: _turns(row)[1],
    score=lambda row, text: same_calls(_turns(row)[1], text),
    metric="acc",
    until=(),
    max_tokens=512,
    layout=_LAYOUT,
)
JSON_MODE = Kind(
    name="json-mode",
    about="a schema and a wish; right where the first JSON value obeys the schema",
    columns=(("prompt", "completion", "schema"), ("conversations", "schema")),
    prompt=lambda row: _turns(row)[0],
    target=lambda row: _turns(row)[1],
    score=_json_score,
    metric="valid",
    until=(),
    max_tokens=1024,
    layout=_LAYOUT,
)
KINDS = (FUNCTIONS, JSON_MODE)
