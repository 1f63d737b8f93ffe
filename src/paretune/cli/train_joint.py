"""What ``paretune train joint`` does beyond one run: ideal values by runs of their own, fronts as pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.cli.train_arguments import Parsed, parse

if TYPE_CHECKING:
    from paretune.training.request import Request

IDEALS = "ideals.json"


def swept_names(request: Request) -> set[str]:
    """Names that a sweep may use beside those of arguments."""
    return {f"weights.{request.script.preference_name}"} if request.trainer == "joint" else set()


def wants_ideals(request: Request) -> bool:
    """Whether ideal values must be measured before the run."""
    return request.trainer == "joint" and request.script.measure_ideals


def measure_ideals(parsed: Parsed, argv: list[str]) -> list[str]:
    """Train on each objective alone and keep what is reached; a run that finished before is not repeated.

    Args:
        parsed: the run or sweep that needs ideal values.
        argv: its command line, without a sweep.

    Returns:
        Arguments that hand the values on.
    """
    from paretune.cli.method import build_method
    from paretune.log import get
    from paretune.training.records import TRAINING_RECORD, write_json
    from paretune.training.resume import changed_arguments
    from paretune.training.runs import run

    output = Path(str(parsed.request.training.output_dir))
    found: dict[str, float] = {}
    for name, weight in (("sft", 0), (parsed.request.script.preference_name, 1)):
        folder = output / f"ideal-{name}"
        overrides = ["--schedule=mix", f"--weight_preference={weight}", f"--output_dir={folder}"]
        overrides.append("--resume_from_checkpoint=false")
        request = parse("joint", argv, overrides).request
        request.script.stop_within = request.script.stop_at_front = None
        record = _finished(folder / TRAINING_RECORD)
        if record is None or changed_arguments(record["given"], request.given):
            get("cli").info(f"measuring the ideal value of {name} in {folder}")
            record = run(request, build_method(request)).record
        found[name] = record["losses"]["train"][name]
    write_json(output / IDEALS, found)
    values = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    get("cli").info(f"ideal values: {values} ({output / IDEALS})")
    sft, preference = found.values()
    return ["--measure_ideals=false", f"--ideal_sft={sft!r}", f"--ideal_preference={preference!r}"]


def summary(record: dict[str, Any]) -> list[str]:
    """A joint run's own lines."""
    if "losses" not in record:
        return []
    lines = [
        f"final losses on {split} rows: {losses_line(losses)}" for split, losses in record["losses"].items() if losses
    ]
    return lines + ([f"stopped: {record['stopped']}"] if record.get("stopped") else [])


def losses_line(losses: dict[str, Any]) -> str:
    """Losses for a person; a number that is not finite is a string in records."""
    return ", ".join(
        f"{name} {loss}" if isinstance(loss, str) else f"{name} {loss:.4g}" for name, loss in losses.items()
    )


def draw(found: list[dict[str, Any]], output: Path) -> list[str]:
    """Draw the front of a sweep's points; says where it is."""
    from paretune.training.loss_space import FRONT_PICTURE, draw_front

    if not found or any("losses" not in record for record in found):
        return []
    draw_front(found, output / FRONT_PICTURE)
    return [f"front drawn in {output / FRONT_PICTURE}"]


def _finished(file: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("status") == "finished" else None
