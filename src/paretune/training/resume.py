"""Which checkpoint a run continues from, and whether anything is left to do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paretune.errors import ArgumentError
from paretune.training import records

_FOLDER = re.compile(r"checkpoint-(\d+)$")
_STATE = "trainer_state.json"
# Arguments of no influence on a run's numbers.
FREE = (
    "sweep",
    "output_dir",
    "measure_ideals",
    "resume_from_checkpoint",
    "json",
    "dry_run",
    "config",
    "run_name",
    "logging_dir",
)


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


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return int(json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))["global_step"])


def finished_record(output_dir: Path, checkpoint: Path, *, newest: bool) -> dict[str, Any] | None:
    """The record of the run that is to be resumed, where that run finished; None where there is something to resume.

    Args:
        output_dir: of the run, with its record and its model.
        checkpoint: where it would go on.
        newest: the checkpoint was not named (``--resume_from_checkpoint true``). An earlier one that is named asks
            for the steps after it once more.
    """
    file = output_dir / records.TRAINING_RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("given"), dict)
    if not is_record or record.get("status") != "finished" or not any(output_dir.glob("*.safetensors")):
        return None
    return record if newest or step_of(checkpoint) >= records.count_steps(record) else None


def changed_arguments(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of arguments that were set otherwise, apart from those without influence on numbers.

    Args:
        before: the arguments that were set, from a record.
        now: those of this run.
    """
    names = {name for name in (*before, *now) if name not in FREE and "token" not in name}
    return sorted(name for name in names if records.jsonable(before.get(name)) != records.jsonable(now.get(name)))
