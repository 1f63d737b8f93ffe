"""Files of prompts: AlpacaEval's, MT-Bench's, TRL's."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .decoding import Generation, Prompt, prompt_kind

_FIELDS = "instruction, prompt, messages or turns"


@dataclass(frozen=True)
class Questions:
    """What a file asks.

    Args:
        prompts: the first (or only) turn of each row.
        second: the user's second turn of each row; empty unless the file has ``turns``.
    """

    prompts: list[Prompt]
    second: list[str]


def read_rows(path: str | os.PathLike[str], argument: str) -> list[dict[str, Any]]:
    """Rows of JSON lines or of one JSON list, ``.gz`` or not.

    Args:
        path: the file.
        argument: what the user calls it, for messages.

    Raises:
        DataError: it cannot be read, is empty, or a row is no object.
    """
    where = f"{argument}={str(path)!r}"
    try:
        raw = Path(path).read_bytes()
        text = (gzip.decompress(raw) if str(path).endswith(".gz") else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: cannot be read: {error}") from error
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except ValueError as error:
        raise DataError(f"{where}: neither JSON lines nor a JSON list: {error}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{where}: row {number} is no JSON object: give one object a row")
    if not rows:
        raise DataError(f"{where}: holds no rows; give a file that is not empty")
    return rows


def read_questions(path: str | os.PathLike[str], *, chat: bool, limit: int | None = None) -> Questions:
    """The prompts of a file.

    Args:
        path: rows with ``instruction`` (AlpacaEval) or ``prompt`` (TRL; text or messages) or ``messages`` (without
            the assistant's last turn, if it ends with one) or ``turns`` (MT-Bench: one or two user turns).
        chat: make text the first user turn of a conversation; otherwise it is continued as it stands.
        limit: the first so many rows.

    Raises:
        DataError: the file or a row cannot be used.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "prompts.jsonl"
        >>> _ = path.write_text('{"instruction": "Say yes."}')
        >>> read_questions(path, chat=True).prompts
        [[{'role': 'user', 'content': 'Say yes.'}]]
    """
    prompts: list[Prompt] = []
    second: list[str] = []
    rows = read_rows(path, "prompts")[:limit]
    for number, row in enumerate(rows, 1):
        where = f"prompts={str(path)!r}: row {number}"
        turns = row.get("turns")
        found = turns[0] if isinstance(turns, list) and turns else turns
        for field in ("instruction", "prompt", "messages"):
            found = row.get(field) if found is None else found
        if isinstance(found, list) and found and isinstance(found[-1], dict) and found[-1].get("role") == "assistant":
            found = found[:-1]
        if found is None or prompt_kind(found) not in ("text", "chat"):
            raise DataError(f"{where} has no text or conversation in {_FIELDS}; rename a column")
        prompts.append([{"role": "user", "content": found}] if chat and isinstance(found, str) else found)
        if isinstance(turns, list) and len(turns) > 1:
            second.append(str(turns[1]))
    if second and (len(second) != len(rows) or not chat):
        raise DataError(f"prompts={str(path)!r}: rows of one and of two turns, or raw text: split the file")
    return Questions(prompts, second)


def continued(generations: Sequence[Generation], second: Sequence[str]) -> list[Prompt]:
    """The conversations after the first answers, each with the user's second turn."""
    return [
        [*_turns(answer.prompt), {"role": "assistant", "content": answer.text}, {"role": "user", "content": turn}]
        for answer, turn in zip(generations, second, strict=True)
    ]


def _turns(prompt: Prompt) -> list[Any]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
