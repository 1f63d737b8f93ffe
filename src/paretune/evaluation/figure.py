"""The front as a picture: reward on x, capability on y."""

from __future__ import annotations

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from paretune.evaluation.frontier import Frontier
from paretune.evaluation.points import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SHADE = "#1c2126", "#eceff1"
# Okabe and Ito's colours, told apart by colour-blind readers; the shapes differ as well. Second: for a dark page.
LOOKS = {
    "reference": (INK, "#e9ecef", "*"),
    "base": ("#6b7075", "#a9b0b7", "X"),
    "control": ("#55595e", "#b4bac0", "s"),
    "regularisation": ("#b87a00", "#e6a93a", "^"),
    "online": ("#0072b2", "#56a8e0", "o"),
    "offline": ("#008a64", "#2fbf94", "D"),
    "joint": ("#b2568b", "#dd8fbc", "P"),
    "adaptive": ("#c44f00", "#f0884a", "v"),
}
_FURTHER = (
    ("#6a51a3", "#a592d6", "p"),
    ("#1b7c8c", "#5bb8c7", "<"),
    ("#8c6d31", "#c4a468", ">"),
    ("#843c39", "#c47b77", "h"),
)
_MOST_NAMES, _MOST_HOVERS = 16, 100


@dataclass(frozen=True)
class View:
    """How a picture is drawn.

    Args:
        width, height: in inches.
        font: size of the axis labels in points of the picture.
        names: names beside the front's points; numbers otherwise.
        corner: only the upper right, see :func:`corner`.
        themed: colours as CSS variables of the page that the SVG stands in.
        prefix: of the ids inside the SVG.
    """

    width: float = 9.6
    height: float = 5.6
    font: float = 10.5
    names: bool = True
    corner: bool = False
    themed: bool = False
    prefix: str = "front"


def families(points: Sequence[Measurement]) -> dict[str, tuple[str, str, str]]:
    """(colour on light, colour on dark, marker) of each family that occurs, ours first."""
    present = dict.fromkeys(point.family for point in points)
    own = [name for name in LOOKS if name in present]
    others = [name for name in present if name not in LOOKS]
    further = {name: _FURTHER[i % len(_FURTHER)] for i, name in enumerate(others)}
    return {**{name: LOOKS[name] for name in own}, **further}


def printable(text: str, limit: int | None = None) -> str:
    """The text on one line without control characters, which XML forbids and which could reverse the line.

    Args:
        text: of anyone.
        limit: its longest length; cut with an ellipsis.

    Example:
        >>> printable("a" + chr(0x202E) + "b\\nc", limit=4)
        'a�b…'
    """
    clean = "".join(
        "�" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") else c for c in " ".join(text.split())
    )
    return clean if limit is None or len(clean) <= limit else clean[: limit - 1] + "…"


def scale_of(values: Sequence[float]) -> float:
    """100 where all values lie within −1 and 1 (shown as points of 100), else 1."""
    return 100.0 if all(-1 <= value <= 1 for value in values) else 1.0


def svg(front: Frontier, view: View) -> str:
    """The picture as an ``<svg>`` element.

    Args:
        front: what to draw.
        view: how.
    """
    stream = io.StringIO()
    _save(front, view, stream, "svg")
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Only tags are touched: between them stand names, in which < and > are escaped and nothing else may change.
    text = re.sub(r"<[^>]*>", lambda tag: _tag(tag.group(), front, view), text)
    text = re.sub(r">\s*\n\s*<", ">\n<", text)
    text = _styles_once(text, view.prefix)
    for i, point in enumerate(front.points):
        mark = f'<g id="{view.prefix}-{i}">'
        text = text.replace(mark, f"{mark}<title>{escape(_hover(front, point))}</title>", 1)
    return text


def _styles_once(text: str, prefix: str) -> str:
    """Marks with a class in place of a style each: half the size of a picture of many points."""
    classes: dict[str, str] = {}

    def short(mark: re.Match[str]) -> str:
        return f'{mark[1]} class="{classes.setdefault(mark[2], f"{prefix}-s{len(classes)}")}"/>'

    text = re.sub(r'(<use [^>]*?) style="([^"]*)"\s*/>', short, text)
    rules = "".join(f".{name}{{{style}}}" for style, name in classes.items())
    return re.sub(r"(<svg [^>]*>)", lambda tag: f"{tag[1]}<style>{rules}</style>", text, count=1)


def _tag(tag: str, front: Frontier, view: View) -> str:
    """A tag without what a page does not need, and in the page's colours."""
    tag = re.sub(r' id="[A-Za-z0-9]+_[\w.]*"', "", tag)  # matplotlib's own; two pictures would share them
    tag = re.sub(r"(-?\d+\.\d\d)\d+", r"\1", " ".join(tag.split()))  # finer than any screen
    tag = tag.replace("stroke: #000000; stroke-opacity: 0; stroke-width: 0.8", "stroke: none")
    if not view.themed:
        return tag
    colours = {look[0]: css_name(family, front) for family, look in families(front.points).items()}
    for colour, name in {INK: "ink", SHADE: "shade", **colours}.items():
        tag = tag.replace(colour, f"var(--{name})")
    if tag.startswith("<svg "):
        label = "Reward on x, capability on y; the table holds the same numbers"
        tag = re.sub(r' (width|height)="[^"]*"', "", tag).replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return tag


def css_name(family: str, front: Frontier) -> str:
    """The CSS variable of a family's colour; made from its place, never from its name, which may be anyone's."""
    return f"family-{list(families(front.points)).index(family)}"


def png(front: Frontier, view: View) -> bytes:
    """The picture as PNG.

    Args:
        front: what to draw.
        view: how.
    """
    stream = io.BytesIO()
    _save(front, view, stream, "png")
    return stream.getvalue()


def _save(front: Frontier, view: View, stream: Any, form: str) -> None:
    import matplotlib

    settings: dict[Any, Any] = {
        "text.parse_math": False,  # a name may hold dollar signs
        "svg.fonttype": "none",
        "svg.hashsalt": view.prefix,
        "font.family": "sans-serif",
        "font.size": view.font,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has the fonts
        figure = draw(front, view)
        metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
        figure.savefig(stream, format=form, metadata=metadata, dpi=150, transparent=view.themed)


def draw(front: Frontier, view: View) -> Figure:
    """The picture as a matplotlib figure.

    Intervals are thin crosses; points of one path are joined; dominated points are pale; the front is a staircase with
    what it dominates shaded.

    Args:
        front: what to draw.
        view: how.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(view.width, view.height), layout="constrained")
    axis = figure.subplots()
    axis.set_facecolor("none")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.grid(color=INK, alpha=0.12, lw=0.6)
    axis.set_axisbelow(True)
    x_scale, y_scale = scales(front)
    axis.set_xlabel("reward" + (" (points of 100)" if x_scale == 100 else ""))
    axis.set_ylabel("capability" + (" (points of 100)" if y_scale == 100 else ""))
    best = front.pareto()
    _limit(axis, front, (corner(front) if view.corner else None) or front.points)
    _staircase(axis, front, best)
    _paths(axis, front)
    _marks(axis, front, view, best)
    _legend(figure, front, view)
    _write(figure, axis, front, view, best)
    return figure


def scales(front: Frontier) -> tuple[float, float]:
    """What rewards and capabilities are multiplied by to be shown."""
    return scale_of([p.reward for p in front.points]), scale_of([p.capability for p in front.points])


def corner(front: Frontier) -> list[Measurement] | None:
    """The points of the upper right, where they are too crowded in the whole picture to be told apart."""
    lows, wholes = [], []
    for axis in ("reward", "capability"):
        values = sorted(getattr(point, axis) for point in front.points)
        lows.append(min([values[int(0.4 * len(values))], *(getattr(p, axis) for p in front.pareto()[-1:])]))
        wholes.append((values[-1] - lows[-1]) / ((values[-1] - values[0]) or 1.0))
    inside = [p for p in front.points if p.reward >= lows[0] and p.capability >= lows[1]]
    return inside if len(inside) >= 5 and wholes[0] * wholes[1] < 0.35 else None


def _limit(axis: Axes, front: Frontier, shown: Sequence[Measurement]) -> None:
    x_scale, y_scale = scales(front)
    xs, ys = [x_scale * p.reward for p in shown], [y_scale * p.capability for p in shown]
    wide, high = (max(xs) - min(xs)) or 1.0, (max(ys) - min(ys)) or 1.0
    axis.set_xlim(min(xs) - 0.07 * wide, max(xs) + 0.07 * wide)
    axis.set_ylim(min(ys) - 0.1 * high, max(ys) + 0.1 * high)


def _staircase(axis: Axes, front: Frontier, best: Sequence[Measurement]) -> None:
    x_scale, y_scale = scales(front)
    left, bottom = axis.get_xlim()[0], axis.get_ylim()[0]
    corners = sorted((x_scale * p.reward, y_scale * p.capability) for p in best)
    xs, ys = [left, *(x for x, _ in corners)], [*(y for _, y in corners), corners[-1][1]]
    ys = [corners[0][1], *ys[:-1]]
    # At each reward the front's height is that of the next point to the right.
    axis.fill_between(xs, ys, bottom, step="pre", color=SHADE, lw=0, zorder=0.5)
    axis.step(xs, ys, where="pre", color=INK, lw=0.9, alpha=0.55, zorder=1)
    axis.plot([corners[-1][0]] * 2, [corners[-1][1], bottom], color=INK, lw=0.9, alpha=0.55, zorder=1)


def _paths(axis: Axes, front: Frontier) -> None:
    x_scale, y_scale = scales(front)
    looks = families(front.points)
    for path in dict.fromkeys(point.path for point in front.points if point.path):
        own = [point for point in front.points if point.path == path]
        xs, ys = [x_scale * p.reward for p in own], [y_scale * p.capability for p in own]
        axis.plot(xs, ys, color=looks[own[-1].family][0], lw=1.3, alpha=0.75, zorder=2)


def _marks(axis: Axes, front: Frontier, view: View, best: Sequence[Measurement]) -> None:
    """Points and their intervals; what lies outside is left out, so that nothing needs to be clipped."""
    x_scale, y_scale = scales(front)
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    strong = {point.name for point in best} | ({front.reference.name} if front.reference else set())
    groups: dict[tuple[str, bool], list[tuple[int, Measurement]]] = {}
    for i, point in enumerate(front.points):
        if left <= x_scale * point.reward <= right and bottom <= y_scale * point.capability <= top:
            groups.setdefault((point.family, point.name in strong), []).append((i, point))
    for (family, outlined), members in groups.items():
        colour, _, marker = families(front.points)[family]
        crosses: tuple[list[float], list[float]] = ([], [])
        for _, point in members:
            x, y = x_scale * point.reward, y_scale * point.capability
            crosses[0].extend([*(x_scale * end for end in point.reward_ci), math.nan, x, x, math.nan])
            crosses[1].extend([y, y, math.nan, *(y_scale * end for end in point.capability_ci), math.nan])
        axis.plot(*crosses, color=colour, lw=0.8, alpha=0.7 if outlined else 0.28, zorder=2.5)
        look: dict[str, Any] = {
            "marker": marker,
            "ms": {"*": 15.0, "P": 8.5, "X": 8.5}.get(marker, 7.0)
            * (1.0 if len(front.points) < 80 or outlined else 0.7),
            "color": colour,
            "alpha": 1.0 if outlined else 0.4,
            "ls": "none",
            "mec": INK if outlined else "none",
            "mew": 0.8,
            "zorder": 5 if outlined else 3,
            "clip_on": False,
        }
        # A mark of its own can be named when the mouse is over it. Fingers cannot hover, and many points need room.
        named = view.names and (outlined or len(front.points) <= _MOST_HOVERS)
        for some in [[member] for member in members] if named else [members]:
            marks = axis.plot([x_scale * p.reward for _, p in some], [y_scale * p.capability for _, p in some], **look)
            if named:
                marks[0].set_gid(f"{view.prefix}-{some[0][0]}")


def _legend(figure: Figure, front: Frontier, view: View) -> None:
    from matplotlib.lines import Line2D

    looks = families(front.points)
    handles = [
        Line2D([], [], marker=marker, color=colour, ls="none", ms=10 if marker == "*" else 7)
        for colour, _, marker in looks.values()
    ]
    labels = [printable(name, 24) for name in looks]
    handles.append(Line2D([], [], color=INK, lw=0.9, alpha=0.55))
    labels.append("Pareto front")
    columns = max(1, int(view.width / (1.55 if view.names else 1.4)))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False,
                  fontsize=view.font - 1, handletextpad=0.3, columnspacing=1.2)  # fmt: skip


def _write(figure: Figure, axis: Axes, front: Frontier, view: View, best: Sequence[Measurement]) -> None:
    """Ratios beside their points, names (or numbers) beside the front's, each only where there is room for it."""
    x_scale, y_scale = scales(front)
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    ordered = sorted(best, key=lambda p: -p.capability)
    texts = {p.name: str(i) for i, p in enumerate(ordered, 1)}
    if view.names:
        texts = {}
        column = [p for p in ordered if left <= x_scale * p.reward <= right][:_MOST_NAMES]
        heights = [(y_scale * p.capability - bottom) / (top - bottom) for p in column]
        for point, height in zip(column, _apart(heights, 1.75 * (view.font - 2) / 72 / view.height), strict=True):
            colour = families(front.points)[point.family][0]
            axis.annotate(
                printable(point.name, 34), (x_scale * point.reward, y_scale * point.capability),
                xytext=(1.015, height), textcoords="axes fraction",
                annotation_clip=False, fontsize=view.font - 2, color=colour, va="center", parse_math=False,
                arrowprops={"arrowstyle": "-", "lw": 0.5, "alpha": 0.55, "color": colour, "shrinkB": 5, "shrinkA": 1,
                            "relpos": (0, 0.5)},
            )  # fmt: skip
    taken = [_box(axis, x_scale * p.reward, y_scale * p.capability, 0.011, 0.016) for p in front.points]
    for point in sorted(front.points, key=lambda p: p.name not in texts):
        text = texts.get(point.name) or printable(point.label, 12)
        x, y = x_scale * point.reward, y_scale * point.capability
        if text and left <= x <= right and bottom <= y <= top:
            _beside(axis, x, y, text, view, families(front.points)[point.family][0], taken)


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Descending heights moved so that neighbours are at least so far apart, within 0 and 1 where there is room."""
    placed: list[float] = []
    for height in heights:
        placed.append(min(height, placed[-1] - least) if placed else min(height, 0.98))
    if placed and placed[-1] < 0.02:
        placed[-1] = 0.02
        for i in range(len(placed) - 2, -1, -1):
            placed[i] = max(placed[i], placed[i + 1] + least)
    return placed


_Box = tuple[float, float, float, float]


def _box(axis: Axes, x: float, y: float, half_wide: float, half_high: float) -> _Box:
    """Around a point, in fractions of the axes."""
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    u, v = (x - left) / (right - left), (y - bottom) / (top - bottom)
    return u - half_wide, v - half_high, u + half_wide, v + half_high


def _beside(axis: Axes, x: float, y: float, text: str, view: View, colour: str, taken: list[_Box]) -> None:
    wide = 0.6 * (view.font - 2.5) * len(text) / 72 / view.width
    high = 1.1 * (view.font - 2.5) / 72 / view.height
    u0, v0 = _box(axis, x, y, 0, 0)[:2]
    for across, up in ((1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1)):
        u = u0 + across * (wide / 2 + 0.014)
        v = v0 + up * (high / 2 + 0.02)
        box = (u - wide / 2, v - high / 2, u + wide / 2, v + high / 2)
        if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            axis.text(u, v, text, transform=axis.transAxes, fontsize=view.font - 2.5, color=colour, ha="center",
                      va="center", parse_math=False, zorder=6)  # fmt: skip
            taken.append(box)
            return


def _hover(front: Frontier, point: Measurement) -> str:
    x_scale, y_scale = scales(front)
    at = f"reward {x_scale * point.reward:.3g}, capability {y_scale * point.capability:.3g}"
    said = f"{printable(point.name, 200)}: {at}"
    return said if point.tax is None else f"{said}, tax {y_scale * point.tax:.2g}"
