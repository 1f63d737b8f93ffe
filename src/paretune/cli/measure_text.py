"""What ``paretune measure`` prints: points as a table, suites as a listing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paretune.evaluation.points import Measurement


def line(point: Measurement) -> str:
    """One point, as soon as it is measured."""
    from paretune.evaluation.figure import printable

    tax = "" if point.tax_ci is None else f", tax {point.tax:.3f} ({point.tax_verdict})"
    reward = round(point.reward, 3) + 0.0  # -0.0 is 0
    return f"paretune: {printable(point.name, 120)}: reward {reward:.3f}, capability {point.capability:.3f}{tax}"


def table(points: Sequence[Measurement]) -> list[str]:
    """All points, one line each, and what is to be said of their answers."""
    from paretune.evaluation.figure import printable

    def with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
        if value is None or interval is None:
            return "—"
        value, low, high = (round(each, 3) + 0.0 for each in (value, *interval))  # -0.0 is 0
        return f"{value:.3f} [{low:.3f}, {high:.3f}]"

    rows = [("model", "reward", "capability", "tax", "capability is a", "lost")]
    for point in points:
        lost = [name for name, each in point.by_category.items() if each.verdict == "loss"]
        rows.append((
            printable(point.name, 48),
            with_interval(point.reward, point.reward_ci),
            with_interval(point.capability, point.capability_ci),
            with_interval(point.tax, point.tax_ci),
            point.tax_verdict or "reference",
            ", ".join(lost),
        ))  # fmt: skip
    lines = _aligned(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:], *_notes(points)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _notes(points: Sequence[Measurement]) -> list[str]:
    """What the answers' length and their distance from the reference say about the reward."""
    from paretune.evaluation.figure import printable
    from paretune.evaluation.wording import at_equal_length

    notes = []
    for point in points:
        fair = at_equal_length(point)
        said = [
            "" if point.response_length is None else f"{point.response_length:.1f} tokens an answer",
            "" if point.kl is None else f"KL to the reference {point.kl:.3g} nats",
            "" if fair is None else f"win rate at equal length {fair[0]}, {fair[1]}",
        ]
        notes += [f"{printable(point.name, 48)}: {', '.join(filter(None, said))}"] if any(said) else []
    return ["", *notes] if notes else []


def listing(as_json: bool) -> str:
    """Every suite and its tasks, and the kinds for a suite of one's own."""
    from paretune.evaluation.suite import built_in
    from paretune.evaluation.tasks import KINDS

    suites = built_in()
    rows = {name: [_facts(task) for task in suite.tasks] for name, suite in suites.items()}
    if as_json:
        kinds = {
            name: {"about": kind.about, "columns": kind.columns, "layout": kind.layout} for name, kind in KINDS.items()
        }
        return json.dumps({"suites": rows, "kinds": kinds}, ensure_ascii=False)
    lines = []
    for name, suite in suites.items():
        lines.append(f"{name}: {suite.about}" + (f" ({suite.paper})" if suite.paper else ""))
        cells = [("", "task", "category", "by", "shots", "decoding", "real data"), *(
            ("", *(str(task[key]) for key in ("task", "category", "by", "shots", "decoding", "real_data")))
            for task in rows[name]
        )]  # fmt: skip
        lines += _aligned(cells)
        lines += [f"    {task['task']}: {task['note']}" for task in rows[name] if task["note"]]
        lines.append("")
    lines.append("kinds for your own suite (kind: NAME):")
    for name, kind in KINDS.items():
        lines.append(f"  {name}: {kind.about}; columns {' or '.join(', '.join(names) for names in kind.columns)}")
    return "\n".join(lines)


def _facts(task: Any) -> dict[str, Any]:
    kind = task.ours
    if kind is not None and kind.score is None:
        decoding = "log-likelihood"
    elif kind is not None:
        decoding = f"greedy, {task.max_tokens or kind.max_tokens} tokens"
    else:
        decoding = "the harness's" + (f", {task.max_tokens} tokens" if task.max_tokens else "")
    if task.temperature:
        decoding = decoding.replace("greedy", f"T={task.temperature:g}")
    return {
        "task": task.task,
        "category": task.category,
        "by": f"ours ({task.kind})" if task.kind else "lm-evaluation-harness",
        "data": task.file or task.hub or "the harness's",
        "shots": task.shots,
        "decoding": decoding,
        "runs_code": task.runs_code,
        "real_data": ("met" if task.real_data else "never met") if task.kind else "the harness's",
        "note": task.note,
    }
