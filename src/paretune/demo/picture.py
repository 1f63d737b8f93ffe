"""The demo's pictures: frontier.png, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.demo.front import write_front
from paretune.demo.results import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito: told apart by colour-blind readers; shapes differ as well.
_LOOKS = {
    "control": ("#555555", "s"),
    "regularisation": ("#E69F00", "^"),
    "online": ("#0072B2", "o"),
    "offline": ("#009E73", "D"),
    "joint": ("#CC79A7", "P"),
    "adaptive": ("#D55E00", "v"),
}


def write_pictures(results: dict[str, Any], out: Path) -> None:
    """frontier.png, report.html and points.jsonl in ``out``."""
    draw(results).savefig(out / "frontier.png", dpi=130)
    write_front(results, out)


def draw(results: dict[str, Any]) -> Figure:
    """Reward on x, capability on y, in points of 100: everything on the left, the good corner with names on the right.

    AdamW over learning rates is a line, intervals are thin crosses, points on the Pareto front are outlined.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.5), layout="constrained")
    whole, corner = figure.subplots(1, 2, width_ratios=(1, 1.05))
    for axis in (whole, corner):
        _points(axis, results)
        axis.set_xlabel("sampled reward (points of 100)")
        axis.grid(alpha=0.25, lw=0.5)
    whole.set_ylabel("capability: skills solved (points of 100)")
    whole.set_title(f"Tiny world, seed {', '.join(map(str, results['seeds']))}", fontsize=11)
    whole.legend(loc="lower left", fontsize=8, framealpha=0.9)
    _enlarge(corner, results)
    corner.set_title("the upper right corner", fontsize=11)
    return figure


def _points(axis: Axes, results: dict[str, Any]) -> None:
    reference = results["reference"]
    adamw = sorted((p for p in results["points"] if p["method"] == "AdamW"), key=lambda p: p["hyperparameters"]["lr"])
    line = [reference, *adamw]
    axis.plot(
        [100 * p["reward"] for p in line], [100 * p["capability"] for p in line], color="#555555", lw=1.2, zorder=2
    )
    front = set(results["pareto"])
    for family, (colour, marker) in _LOOKS.items():
        members = [p for p in results["points"] if p["family"] == family]
        for point in members:
            _cross(axis, point, colour, marker, strong=label(point) in front)
        if members:
            name = f"{family} (line: AdamW over learning rates)" if family == "control" else family
            axis.scatter([], [], color=colour, marker=marker, s=40, label=name)
    x, y = 100 * reference["reward"], 100 * reference["capability"]
    axis.scatter([x], [y], marker="*", s=220, color="black", zorder=5, label="reference (SFT)")


def _cross(axis: Axes, point: dict[str, Any], colour: str, marker: str, strong: bool) -> None:
    x, y = 100 * point["reward"], 100 * point["capability"]
    (xl, xh), (yl, yh) = point["reward_ci"], point["capability_ci"]
    axis.plot([100 * xl, 100 * xh], [y, y], color=colour, lw=0.5, alpha=0.45, zorder=1)
    axis.plot([x, x], [100 * yl, 100 * yh], color=colour, lw=0.5, alpha=0.45, zorder=1)
    axis.scatter([x], [y], color=colour, marker=marker, s=42, alpha=1.0 if strong else 0.5, zorder=4 if strong else 3,
                 edgecolors="black" if strong else "none", linewidths=0.7)  # fmt: skip


def _enlarge(axis: Axes, results: dict[str, Any]) -> None:
    """Limit the axis to where methods compete, and name its points in a column beside it, with a line to each."""
    reference, points = results["reference"], results["points"]
    best = max(point["reward"] for point in points)
    left = best - 0.4 * (best - reference["reward"])
    inside = [p for p in points if p["reward"] >= left and p["tax"] <= 0.2]
    # Of a ladder only what is on the front is named.
    inside = [p for p in inside if "scale" not in p["hyperparameters"] or label(p) in results["pareto"]]
    low = min((p["capability"] for p in inside), default=0.0)
    high = max((p["capability"] for p in inside), default=1.0)
    axis.set_xlim(100 * left - 1, 100 * best + 1)
    axis.set_ylim(100 * low - 1.5, 100 * high + 2)
    step = (high - low + 0.035) * 100 / max(1, len(inside))
    at = 100 * high + 2
    for point in sorted(inside, key=lambda p: (-p["capability"], -p["reward"])):
        at -= step
        axis.annotate(
            label(point),
            (100 * point["reward"], 100 * point["capability"]),
            xytext=(100 * best + 1.6, at),
            annotation_clip=False,
            fontsize=7.5,
            color=_LOOKS[point["family"]][0],
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "lw": 0.4,
                "alpha": 0.5,
                "color": _LOOKS[point["family"]][0],
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )
