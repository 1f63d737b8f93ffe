"""A picture of how ratios were learned: each block's ratio and the loss, over the steps."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic import write_bytes
from ..errors import ArgumentError
from .ratios import Block, Ratios

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_NAMED = 12  # blocks in the legend; more are told by the colour bar


def draw(ratios: Ratios) -> Figure:
    """Ratios over steps on the left, the loss of each step's samples with a running mean on the right.

    Args:
        ratios: with the history that `learn_ratios` keeps.

    Raises:
        ArgumentError: there is no history.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if not ratios.history:
        raise ArgumentError("ratios", ratios.settings.get("method"), "were not learned: there is nothing to draw")
    steps = [record["step"] for record in ratios.history]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    count = len(ratios.blocks)
    for k, block in enumerate(ratios.blocks):
        values = [record["ratios"][k] for record in ratios.history] + [block.ratio]
        colour = colormaps["viridis"](k / max(1, count - 1) * 0.9)
        left.plot(
            [*steps, steps[-1] + 1], values, color=colour, lw=1.5, label=label(block) if count <= _NAMED else None
        )
    left.axhline(ratios.mean, color="#888888", lw=0.8, ls="--")
    left.set_ylabel("ratio (weight of pre)")
    if count <= _NAMED:
        left.legend(fontsize=8, framealpha=0.9)
    else:
        left.set_title(f"{count} blocks, first dark, last light", fontsize=9)
    losses = [record["loss"] for record in ratios.history]
    right.plot(steps, losses, color="#0072B2", lw=0.6, alpha=0.5)
    right.plot(steps, _running(losses), color="#0072B2", lw=1.6)
    right.set_ylabel("loss (nats a token) of the step's samples")
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.grid(alpha=0.25, lw=0.5)
    return figure


def save_picture(ratios: Ratios, path: str | os.PathLike[str]) -> None:
    """Write `draw`'s picture, whole or not at all, in the format that the path ends in: .png, .svg or .pdf."""
    suffix = Path(path).suffix
    if suffix not in FORMATS:
        raise ArgumentError("plot", str(path), f"name a file ending in {', '.join(FORMATS)}")
    stream = io.BytesIO()
    draw(ratios).savefig(stream, format=suffix[1:], dpi=130)
    write_bytes(Path(path), stream.getvalue())


def label(block: Block) -> str:
    """What a block is called in pictures and tables.

    Example:
        >>> label(Block((0, 1, 2), 0.5)), label(Block((4,), 0.5)), label(Block((0, 1), 0.5, "mlp.up_proj"))
        ('layers 0-2', 'layer 4', 'mlp.up_proj')
    """
    if block.kind is not None:
        return block.kind
    first, last = block.layers[0], block.layers[-1]
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def _running(values: list[float], width: int = 10) -> list[float]:
    found = []
    for i in range(len(values)):
        near = values[max(0, i - width + 1) : i + 1]
        found.append(sum(near) / len(near))
    return found
