"""Which checkpoint a run continues from."""

from __future__ import annotations

import re
from pathlib import Path

from paretune.errors import ArgumentError

_FOLDER = re.compile(r"checkpoint-(\d+)$")
_STATE = "trainer_state.json"


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None.

    Args:
        output_dir: where the run saves. A checkpoint is complete when its trainer state, written last, is there.
    """
    directory = Path(output_dir)
    if not directory.is_dir():
        return None
    steps = {int(match[1]): path for path in directory.iterdir() if (match := _FOLDER.search(path.name))}
    complete = [step for step, path in steps.items() if (path / _STATE).is_file()]
    return steps[max(complete)] if complete else None


def find_checkpoint(value: str | bool | None, output_dir: str | Path) -> Path | None:
    """What ``--resume_from_checkpoint`` means.

    Args:
        value: None or ``false`` starts afresh, ``true`` takes the newest complete checkpoint of ``output_dir``,
            anything else is a checkpoint's directory.
        output_dir: of the run.

    Raises:
        ArgumentError: there is no such checkpoint, or it is incomplete.
    """
    if value is None or str(value).lower() in ("false", "none", ""):
        return None
    if str(value).lower() == "true":
        found = last_checkpoint(output_dir)
        if found is None:
            raise ArgumentError(
                "resume_from_checkpoint", value, f"{str(output_dir)!r} holds no complete checkpoint-N; start without it"
            )
        return found
    path = Path(str(value)).expanduser()
    if not (path / _STATE).is_file():
        raise ArgumentError(
            "resume_from_checkpoint", str(value), f"no {_STATE} there; give a complete checkpoint-N directory or true"
        )
    return path
