"""A picture of a dial: reward, skills and agreement with the reference over the scale."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic import write_bytes
from .dial import Dialled, Rung

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_REWARD, _SKILLS, _KEPT, _KL = "#0072B2", "#D55E00", "#009E73", "#888888"


def draw_dial(found: Dialled) -> Figure:
    """Reward with its interval, skills where a suite was measured, agreement where it was watched.

    Args:
        found: from `paretune.dial`.
    """
    from matplotlib.figure import Figure

    watched = [rung for rung in found.rungs if rung.agreement is not None]
    skilled = [rung for rung in _all(found) if rung.skills is not None]
    panels: list[Callable[[Axes], None]] = [lambda axis: _reward(axis, found)]
    if skilled:
        panels.append(lambda axis: _skills(axis, skilled))
    if watched:
        panels.append(lambda axis: _agreement(axis, watched))
    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axis)
        axis.axvline(found.chosen, color="#444444", lw=1, ls="--")
        axis.set_xlabel("scale s of the change")
        axis.grid(alpha=0.25, lw=0.5)
    figure.suptitle(f"scale {found.chosen:g}: {found.why}", fontsize=9)
    return figure


def save_dial_picture(found: Dialled, path: str | os.PathLike[str]) -> None:
    """Write `draw_dial`'s picture, whole or not at all, in the format that the path ends in: .png, .svg or .pdf."""
    stream = io.BytesIO()
    draw_dial(found).savefig(stream, format=Path(path).suffix[1:], dpi=130)
    write_bytes(Path(path), stream.getvalue())


def _all(found: Dialled) -> list[Rung]:
    return [*([] if found.reference is None else [found.reference]), *found.rungs]


def _reward(axis: Axes, found: Dialled) -> None:
    rungs = _all(found)
    scales = [rung.scale for rung in rungs]
    axis.plot(scales, [rung.reward for rung in rungs], color=_REWARD, marker="o", ms=4)
    low, high = zip(*(rung.reward_ci for rung in rungs), strict=True)
    axis.fill_between(scales, low, high, color=_REWARD, alpha=0.15, lw=0)
    axis.set_title("reward (95% interval)", fontsize=9)


def _skills(axis: Axes, rungs: list[Rung]) -> None:
    means = [(rung.scale, rung.skills) for rung in rungs if rung.skills is not None]
    scales = [scale for scale, _ in means]
    for category in means[0][1].by_category if len(means[0][1].by_category) > 1 else ():
        values = [skills.by_category[category] for _, skills in means]
        axis.plot(scales, values, lw=0.8, alpha=0.6, label=category)
    axis.plot(scales, [skills.mean for _, skills in means], color=_SKILLS, marker="o", ms=4, label="mean")
    axis.fill_between(scales, [s.ci[0] for _, s in means], [s.ci[1] for _, s in means], color=_SKILLS, alpha=0.15, lw=0)
    axis.legend(fontsize=7, framealpha=0.9)
    axis.set_title("skills (95% interval)", fontsize=9)


def _agreement(axis: Axes, rungs: list[Rung]) -> None:
    seen = [(rung.scale, rung.agreement) for rung in rungs if rung.agreement is not None]
    scales = [scale for scale, _ in seen]
    axis.plot(scales, [each.exact for _, each in seen], color=_KEPT, marker="o", ms=4, label="same answers (share)")
    axis.plot(scales, [each.kl for _, each in seen], color=_KL, marker="s", ms=4, label="KL (nats a token)")
    axis.legend(fontsize=7, framealpha=0.9)
    axis.set_title("agreement with the reference", fontsize=9)
