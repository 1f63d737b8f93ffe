"""Programs that a model wrote, run against tests in the sandbox: HumanEval, MBPP, DS-1000."""

from __future__ import annotations

import importlib.util
import re

from ..sandbox import Limits, run_program
from .kind import Kind, Row

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_MBPP_END = "[DONE]"


def code_in(text: str) -> str:
    """The first fenced block of an answer, or all of it.

    Example:
        >>> code_in("Here it is:\\n```python\\nx = 1\\n```\\nDone.")
        'x = 1\\n'
    """
    match = _FENCE.search(text)
    return match.group(1) if match else text


def humaneval_program(row: Row, text: str) -> str:
    """The prompt continued by the answer (or the answer alone where it defines the function), then its tests."""
    code = code_in(text)
    whole = code if f"def {row['entry_point']}" in code else row["prompt"] + code
    return f"{whole}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"


def mbpp_program(row: Row, text: str) -> str:
    """The answer, then its tests."""
    setup = row.get("test_setup_code") or ""
    return "\n".join([setup, code_in(text.split(_MBPP_END)[0]), *row["test_list"], ""])


def ds1000_program(row: Row, text: str) -> str:
    """The data set's own harness, asked to test the answer."""
    code = code_in(text)
    program = f"{row['code_context']}\n\ntest_execution({code!r})\n"
    if "test_string(" in row["code_context"]:
        program += f"test_string({code!r})\n"
    return program


def needed_library(row: Row) -> str:
    """What to say where a DS-1000 question's library is not installed: its tests could only fail."""
    library = str((row.get("metadata") or {}).get("library", "")).lower()
    module = {"sklearn": "sklearn", "pytorch": "torch"}.get(library, library)
    if not module or importlib.util.find_spec(module):
        return ""
    return f"needs {module}, which is not installed: install it, or leave the question out"


def _mbpp_prompt(row: Row) -> str:
    tests = "\n".join(row["test_list"])
    return f"Write a Python function for this task: {row['text']}\nIt has to pass these tests:\n{tests}\n[BEGIN]\n"


HUMANEVAL = Kind(
    name="humaneval",
    about="a function to complete; right where its tests pass",
    columns=(("prompt", "test", "entry_point"),),
    prompt=lambda row: row["prompt"],
    target=lambda row: row.get("canonical_solution") or "",
    score=lambda row, text: float(run_program(humaneval_program(row, text)).passed),
    metric="pass@1",
    until=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    max_tokens=512,
    runs_code=True,
    layout="openai/openai_humaneval",
)
MBPP = Kind(
    name="mbpp",
    about="a task and its tests; right where they pass",
    columns=(("text", "test_list"),),
    prompt=_mbpp_prompt,
    target=lambda row: f"{row.get('code') or ''}\n{_MBPP_END}",
    score=lambda row, text: float(run_program(mbpp_program(row, text)).passed),
    metric="pass@1",
    until=(_MBPP_END,),
    max_tokens=512,
    runs_code=True,
    layout="google-research-datasets/mbpp",
)
DS1000 = Kind(
    name="ds1000",
    about="a data-science question; right where the data set's own tests pass",
    columns=(("prompt", "code_context"),),
    prompt=lambda row: row["prompt"],
    target=lambda row: row.get("reference_code") or "",
    score=lambda row, text: float(run_program(ds1000_program(row, text), Limits(60.0, 4096, may_write=True)).passed),
    metric="pass@1",
    until=("</code>", "# SOLUTION END", "\nEND SOLUTION"),
    max_tokens=512,
    check=needed_library,
    runs_code=True,
    layout="xlangai/DS-1000, the simplified format",
)
KINDS = (HUMANEVAL, MBPP, DS1000)
