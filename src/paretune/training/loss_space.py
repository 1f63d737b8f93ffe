"""Pictures in the space of two losses: the way of one run, and the front of several."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.atomic import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOSSES_PICTURE = "losses.png"
FRONT_PICTURE = "front.png"
_SMOOTH = 0.9  # of the running means that the way is drawn from: single batches scatter


def trajectory(steps: Sequence[Mapping[str, Any]], names: Sequence[str], smooth: float = _SMOOTH) -> list[list[float]]:
    """The way of a run: after each step the running mean of every loss, from where all were measured once.

    Args:
        steps: of ``training.json``.
        names: the objectives.
        smooth: what a running mean keeps at each new value, in [0, 1).

    Example:
        >>> steps = [{"loss": {"sft": 2.0}}, {"loss": {"dpo": 0.7}}, {"loss": {"sft": 1.0}}]
        >>> trajectory(steps, ["sft", "dpo"], smooth=0.5)
        [[2.0, 0.7], [1.5, 0.7]]
    """
    means: dict[str, float] = {}
    way = []
    for step in steps:
        for name, loss in step["loss"].items():
            means[name] = smooth * means.get(name, loss) + (1 - smooth) * loss
        if all(name in means for name in names):
            way.append([means[name] for name in names])
    return way


def draw_run(record: Mapping[str, Any], file: Path) -> None:
    """Draw a run's way through the losses, and where it ends.

    Args:
        record: of ``training.json``.
        file: a .png to write.
    """
    names = list(record["losses"]["train"])[:2]
    if len(names) < 2:
        return
    figure, axes = _figure(names)
    steps = record["steps"]
    way = trajectory(steps, names, min(_SMOOTH, 1 - 10 / max(10, len(steps))))  # short runs: less, it lags behind
    if way:
        axes.plot(*zip(*way, strict=True), color="0.6", linewidth=1, label="running mean of training losses")
        axes.plot(*([value] for value in way[0]), "x", color="0.4", label="start")
    for split, marker in (("train", "o"), ("eval", "s")):
        losses = record["losses"].get(split) or {}
        if all(name in losses for name in names):
            axes.plot(*([losses[name]] for name in names), marker, color="C0", label=f"final model, {split} rows")
    evaluated = [[entry[f"eval_{name}_loss"] for name in names] for entry in record["history"] if _has(entry, names)]
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), ".-", color="C1", linewidth=1, label="evaluations")
    axes.legend(frameon=False, fontsize=8)
    _save(figure, file)


def draw_front(points: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the front of a sweep over weights, one for each value of whatever else was swept.

    Args:
        points: records of ``sweep.jsonl`` with ``losses``.
        file: a .png to write.
    """
    split = "eval" if all(point["losses"].get("eval") for point in points) else "train"
    names = list(points[0]["losses"][split])[:2]
    if len(names) < 2:
        return
    figure, axes = _figure(names)
    swept = list(points[0]["point"])
    along = next((axis for axis in swept if axis.startswith("weights.") or axis == "weight_preference"), swept[0])
    axes.set_title(f"{split} rows; lower left is better; beside each point: {along}", fontsize=9)
    axes.margins(0.1)  # room for that
    fronts: dict[str, list[tuple[list[float], str]]] = {}
    for each in points:
        place = [float(each["losses"][split][name]) for name in names]  # what is not finite is text in records
        others = ", ".join(f"{axis} {value}" for axis, value in each["point"].items() if axis != along)
        fronts.setdefault(others, []).append((place, each["point"][along]))
    for number, (others, front) in enumerate(fronts.items()):
        front.sort()
        axes.plot(*zip(*(place for place, _ in front), strict=True), "o-", color=f"C{number}", lw=0.8, label=others)
        for place, value in front:
            axes.annotate(value, (place[0], place[1]), textcoords="offset points", xytext=(5, 4), size=7)
    if swept != [along]:
        axes.legend(frameon=False, fontsize=8)
    _save(figure, file)


def _has(entry: Mapping[str, Any], names: Sequence[str]) -> bool:
    return all(f"eval_{name}_loss" in entry for name in names)


def _figure(names: Sequence[str]) -> tuple[Any, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")  # no pyplot: nothing global, no display
    axes = figure.add_subplot()
    axes.set_xlabel(f"{names[0]} loss")
    axes.set_ylabel(f"{names[1]} loss")
    return figure, axes


def _save(figure: Any, file: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_bytes(file, picture.getvalue())
