"""What a run leaves beside the model: ``training.json`` to repeat it, and the model card."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from paretune.atomic import write_text

TRAINING_RECORD = "training.json"
_PACKAGES = ("paretune", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "safetensors", "numpy")
_SECRETS = ("--hub_token", "--hub-token", "--push_to_hub_token", "--push-to-hub-token")


def versions() -> dict[str, str]:
    """The versions of Python and of every package that can change a run's numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """What the run ran on."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "accelerator": None if accelerator is None else accelerator.type,
        "devices": names,
        "threads": torch.get_num_threads(),
    }


def as_plain(arguments: Any) -> dict[str, Any]:
    """A dataclass of arguments as JSON-ready values; transformers' own method masks its tokens."""
    if hasattr(arguments, "to_dict"):
        values = arguments.to_dict()
    elif is_dataclass(arguments) and not isinstance(arguments, type):
        values = asdict(arguments)
    else:
        values = dict(arguments)
    return {name: jsonable(value) for name, value in values.items()}


def jsonable(value: Any) -> Any:
    """The value in JSON's types; numbers that are not finite become strings, as JSON has none."""
    if isinstance(value, Mapping):
        return {str(name): jsonable(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [jsonable(inner) for inner in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return jsonable(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def without_secrets(argv: Sequence[str]) -> list[str]:
    """The command line with the values of tokens masked."""
    shown: list[str] = []
    hide_next = False
    for text in argv:
        flag = text.split("=", 1)[0]
        if hide_next:
            shown.append("***")
        elif flag in _SECRETS and "=" in text:
            shown.append(f"{flag}=***")
        else:
            shown.append(text)
        hide_next = text in _SECRETS
    return shown


def count_steps(record: Mapping[str, Any]) -> int:
    """The optimizer steps of a run; a joint run's record has an entry for each instead of their number."""
    steps = record["steps"]
    return len(steps) if isinstance(steps, list) else int(steps or 0)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader sees all of it or nothing of it."""
    write_text(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False) + "\n")


def model_card(record: Mapping[str, Any]) -> str:
    """The README of a trained model.

    Args:
        record: what ``training.json`` holds.

    Returns:
        Markdown with the hub's metadata header.
    """
    own, training = record["arguments"]["paretune"], record["arguments"]["training"]
    front = ["---", "library_name: transformers", "tags:", "- paretune", "- trl", f"- {record['trainer']}"]
    if not os.path.isdir(record["model"]["path"]):
        front.append(f"base_model: {record['model']['path']}")
    lines = [
        *front,
        "---",
        "",
        f"# {Path(record['output_dir']).name}",
        "",
        f"{record['model']['path']} trained with {record['trainer'].upper()} and {record['optimizer']['name']} by "
        f"paretune {record['versions'].get('paretune', '')}.",
        "",
        "| | |",
        "|---|---|",
        f"| policy starts at | `{record['model']['path']}` |",
    ]
    if own.get("base_model"):
        lines.append(f"| base | `{own['base_model']}` |")
    lines += [
        *_data_lines(record["data"]),
        f"| steps | {count_steps(record)} |",
        f"| learning rate | {training['learning_rate']} |",
    ]
    if training.get("beta") is not None:
        lines.append(f"| beta | {training['beta']} |")
    ours = own if record["trainer"] != "joint" else {**own, **record["arguments"]["script"]}
    lines += [f"| {name} | {value} |" for name, value in record["given"].items() if name in ours and value is not None]
    lines += [f"| {name} | {value} |" for name, value in record["metrics"].items() if isinstance(value, float)]
    for split, losses in record.get("losses", {}).items():
        lines += [f"| final {name} loss, {split} rows | {loss} |" for name, loss in losses.items()]
    covered = record.get("metrics_cover_steps")
    if covered and covered[0] > 1:
        lines.append(f"| train metrics cover steps | {covered[0]} to {covered[1]} (resumed) |")
    statement = record["optimizer"].get("statement")
    if statement:
        lines += ["", statement]
    lines += [
        "",
        "To repeat it (all arguments, versions, fingerprints and the trajectory are in `training.json`):",
        "",
        "```bash",
        f"paretune {shlex.join(record['command'])}",
        "```",
        "",
    ]
    return "\n".join(lines)


def _data_lines(data: Mapping[str, Any]) -> list[str]:
    if "train" in data:
        return [f"| data | `{data['train']['name']}`, {data['train']['rows']} rows |"]
    return [f"| {name} data | `{part['train']['name']}`, {part['train']['rows']} rows |" for name, part in data.items()]
