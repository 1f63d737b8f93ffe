"""A grid of runs: one directory and one record a point; finished points are kept."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paretune.atomic import write_text
from paretune.errors import ArgumentError, PareTuneError
from paretune.training import records
from paretune.training.resume import FREE

SWEEP_RECORDS = "sweep.jsonl"

_logger = logging.getLogger("paretune.training")

Point = dict[str, str]


def parse_axes(texts: Sequence[str], known: Iterable[str]) -> dict[str, list[str]]:
    """``["density=1e-3,1e-2", "learning_rate=1e-6"]`` as axes.

    Args:
        texts: one ``name=value,value`` each.
        known: argument names that can be swept.

    Raises:
        ArgumentError: a malformed axis, an unknown name, a name or value given twice.
    """
    axes: dict[str, list[str]] = {}
    names = set(known)
    for text in texts:
        name, separator, rest = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        values = [value.strip() for value in rest.split(",") if value.strip()]
        if not separator or not name or not values:
            raise ArgumentError("sweep", text, "write it as name=value,value, for example density=1e-3,1e-2")
        if name not in names or name in FREE:
            raise ArgumentError("sweep", text, f"{name} is no argument of this command that can be swept")
        if name in axes or len(set(values)) < len(values):
            raise ArgumentError("sweep", text, "this axis or value is there twice; give each once")
        axes[name] = values
    return axes


def points(axes: Mapping[str, Sequence[str]]) -> list[Point]:
    """The grid: every combination, the last axis fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def directory_name(point: Point) -> str:
    """A point's directory: readable, and safe on every file system."""
    return ",".join(f"{name}={re.sub(r'[^A-Za-z0-9.+_-]', '_', value)}" for name, value in point.items())


def settings_digest(given: Mapping[str, Any]) -> str:
    """What must not change between the sessions of a sweep: every argument that can change a number.

    Args:
        given: the arguments that were set, by name.
    """
    kept = {name: records.jsonable(value) for name, value in given.items() if name not in FREE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def run_sweep(
    grid: Sequence[Point],
    output: Path,
    digest: str,
    train: Callable[[Point, Path], Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Train every point that is not finished yet.

    Args:
        grid: from :func:`points`.
        output: holds ``sweep.jsonl`` and one sub-directory a point.
        digest: from :func:`settings_digest`, of the arguments without the sweep's own.
        train: trains one point into a directory and returns its record.

    Returns:
        One record a point of the grid, in its order; also in ``sweep.jsonl``, rewritten whole after each point.

    Raises:
        PareTuneError: ``sweep.jsonl`` is of other arguments.
    """
    file = output / SWEEP_RECORDS
    finished = _read(file)
    other = [record for record in finished if record["settings"] != digest]
    if other:
        raise PareTuneError(
            f"output_dir={str(output)!r}: its {SWEEP_RECORDS} holds points of other arguments; give another directory"
        )
    by_point = {_key(record["point"]): record for record in finished}
    for number, point in enumerate(grid, start=1):
        name = directory_name(point)
        if _key(point) in by_point:
            _logger.info(f"point {number} of {len(grid)}, {name}: finished before")
            continue
        _logger.info(f"point {number} of {len(grid)}, {name}")
        record = train(point, output / name)
        by_point[_key(point)] = {
            "point": point,
            "settings": digest,
            "directory": name,
            "optimizer": record["optimizer"],
            "steps": records.count_steps(record),
            "seconds": record["seconds"],
            "metrics": record["metrics"],
            "last_log": record["last_log"],
            **({"losses": record["losses"]} if "losses" in record else {}),
        }
        # All points that were ever finished stay, also those of an earlier, larger grid.
        lines = [json.dumps(records.jsonable(entry), ensure_ascii=False) for entry in by_point.values()]
        write_text(file, "\n".join(lines) + "\n")
    return [by_point[_key(point)] for point in grid]


def _key(point: Mapping[str, str]) -> str:
    return json.dumps(dict(point), sort_keys=True)


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            record["point"], record["settings"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise PareTuneError(f"{file}: line {number} is no record of a sweep; move the file away") from error
        found.append(record)
    return found
