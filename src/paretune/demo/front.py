"""The demo's results as measurements: points.jsonl, and the report that every front gets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paretune.demo.results import label
from paretune.evaluation.frontier import Frontier
from paretune.evaluation.points import Measurement, write_points
from paretune.evaluation.report import Table, write_report
from paretune.evaluation.statistics import interval_verdict
from paretune.evaluation.wording import bounds, number

_MEASURED = {
    "reward": "answers sampled at temperature 1 about entities that no preference pair mentions",
    "capability": "greedy answers to held-out exercises, mean over categories",
    "tax": "the reference's capability minus the model's",
}


def measurements(results: dict[str, Any]) -> list[Measurement]:
    """The points of results.json, the reference first; points that differ in one number are one path.

    Args:
        results: the content of results.json.
    """
    paths = _paths(results["points"])
    reference, base = results["reference"], results["base"]
    made = [_measurement(reference, "reference", results), _measurement(base, "base", results)]
    for path, members in paths.items():
        for value, point in members:
            about = {} if value is None else {"path": path, "label": f"{value:g}"}
            made.append(_measurement(point, point["family"], results, **about))
    return made


def write_front(results: dict[str, Any], out: Path) -> None:
    """points.jsonl and report.html in ``out``.

    Args:
        results: the content of results.json.
        out: a directory.
    """
    points = measurements(results)
    write_points(out / "points.jsonl", points)
    corner = results["hypervolume"]["reference_point"]
    title = "The alignment tax on the tiny world"
    tables = [_equal_table(results)] if "equal_reward" in results else []
    write_report(
        Frontier(points),
        out / "report.html",
        title=title,
        reference_point=corner,
        notes=results["verdict"],
        tables=tables,
    )


def _measurement(point: dict[str, Any], family: str, results: dict[str, Any], **about: Any) -> Measurement:
    low, high = point["tax_ci"]
    compared = {} if family == "reference" else {"tax": point["tax"], "tax_ci": (low, high)}
    return Measurement(
        name=label(point),
        family=family,
        reward=point["reward"],
        reward_ci=tuple(point["reward_ci"]),
        capability=point["capability"],
        capability_ci=tuple(point["capability_ci"]),
        hyperparameters=point["hyperparameters"],
        capability_by_category=point["capability_by_category"],
        tax_verdict="" if family == "reference" else interval_verdict(-high, -low),
        seconds=point["seconds"],
        measured={**_MEASURED, "seeds": results["seeds"]},
        **compared,
        **about,
    )


def _paths(points: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float | None, dict[str, Any]]]]:
    """Points of one method whose settings differ in a single number, by that number; the others by themselves."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        # A ladder over the scale is a curve of its own for each choice of the other settings.
        rest = {k: v for k, v in point["hyperparameters"].items() if k not in ("scale", "ratio", "refused")}
        ladder = "scale" in point["hyperparameters"]
        by_method.setdefault(f"{point['method']} {rest}" if ladder else point["method"], []).append(point)
    found: dict[str, list[tuple[float | None, dict[str, Any]]]] = {}
    for method, members in by_method.items():
        settings = [member["hyperparameters"] for member in members]
        names = {name for each in settings for name in each} - {"ratio", "refused"}
        varied = [name for name in names if len({str(each.get(name)) for each in settings}) > 1]
        values = [each.get(varied[0]) for each in settings] if len(varied) == 1 else []
        if len(members) > 1 and values and all(isinstance(value, int | float) for value in values):
            ordered = sorted(zip(values, members, strict=True), key=lambda pair: pair[0])
            found[method] = [(float(value), member) for value, member in ordered]
        else:
            found[method] = [(None, member) for member in members]
    return found


def _equal_table(results: dict[str, Any]) -> Table:
    """What each method keeps at one reward, and the share of AdamW's tax that it removes."""
    equal = results["equal_reward"]
    rows = [
        ("reference", number(results["reference"]["capability"], 100), ""),
        ("AdamW over learning rates", _with_interval(equal["adamw"], "capability"), "0"),
    ]
    for each in equal["methods"]:
        reached = each["capability"] is not None
        kept = _with_interval(each, "capability") if reached else "not reached"
        rows.append((label(each), kept, "" if each["removed"] is None else _with_interval(each, "removed")))
    head = ("method", "capability", "share of AdamW's tax removed (%)")
    return Table(f"At sampled reward {number(equal['reward'], 100)}", head, rows)


def _with_interval(found: dict[str, Any], name: str) -> str:
    return f"{number(found[name], 100)} {bounds(found[f'{name}_ci'], 100)}"
