"""The report: one HTML page that needs nothing else; the figure alone; tables for a pull request and a spreadsheet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from paretune.atomic import write_bytes, write_text
from paretune.errors import ArgumentError
from paretune.evaluation.figure import View, corner, css_name, families, png, printable, scales, svg
from paretune.evaluation.frontier import Frontier
from paretune.evaluation.points import Measurement, write_points
from paretune.evaluation.report_style import LEVELS, STYLE
from paretune.evaluation.tables import csv_text, markdown
from paretune.evaluation.wording import (
    at_equal_length,
    bounds,
    categories,
    control_hypervolume,
    free,
    highest,
    number,
    plain,
    sentences,
    settings,
)

TITLE = "Reward and alignment tax"
FORMS = (".html", ".svg", ".png", ".md", ".csv", ".jsonl")
# Nothing may be loaded or run, whatever a name contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_INTERVALS = (
    "Intervals are of 95%, each for itself. “Within noise” means that this many items cannot tell, "
    "not that models are equal."
)
_TESTS = (
    "Differences are paired with the reference on the same items (BCa bootstrap over items, over whole groups where "
    "items share a passage or a prompt). Marks follow tests of single categories after Holm’s correction over the "
    "categories of a model."
)

Cell = str


@dataclass(frozen=True)
class Table:
    """A table of one's own for the page; its first column names the rows.

    Args:
        title: above it.
        head: of the columns.
        rows: as many cells each.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_report(
    front: Frontier,
    path: str | Path,
    *,
    title: str = TITLE,
    reference_point: Sequence[float] | None = None,
    notes: Sequence[str] = (),
    tables: Sequence[Table] = (),
) -> Path:
    """Write a front in the form that the file's ending names.

    Args:
        front: what to show.
        path: ``.html`` the page, ``.svg`` or ``.png`` the figure, ``.md`` Markdown for a pull request, ``.csv`` a
            table, ``.jsonl`` the points themselves.
        title: of the page.
        reference_point: of the hypervolume.
        notes: sentences of your own, put first on the page and in the Markdown.
        tables: of your own, on the page only.

    Returns:
        The path.

    Raises:
        ArgumentError: for another ending, or a directory that does not exist.
    """
    target = Path(path)
    writers: dict[str, Callable[[], None]] = {
        ".html": lambda: write_text(target, page(front, title, reference_point, notes, tables)),
        ".svg": lambda: write_text(target, svg(front, View())),
        ".png": lambda: write_bytes(target, png(front, View())),
        ".md": lambda: write_text(target, markdown(front, reference_point, notes)),
        ".csv": lambda: write_text(target, csv_text(front)),
        ".jsonl": lambda: write_points(target, front.points),
    }
    check_target(path)
    writers[target.suffix.lower()]()
    return target


def check_target(path: str | Path) -> None:
    """Whether a report can be written there, before any work starts.

    Args:
        path: as for :func:`write_report`.

    Raises:
        ArgumentError: for another ending, or a directory that does not exist.
    """
    target = Path(path)
    if target.suffix.lower() not in FORMS:
        raise ArgumentError("output", str(path), f"name a file ending in {', '.join(FORMS)}")
    if not target.parent.is_dir() or target.is_dir():
        raise ArgumentError("output", str(path), f"name a file in a directory that exists ({target.parent})")


def page(
    front: Frontier,
    title: str = TITLE,
    reference_point: Sequence[float] | None = None,
    notes: Sequence[str] = (),
    tables: Sequence[Table] = (),
) -> str:
    """The report as one HTML page.

    Args:
        front: what to show.
        title: of the page.
        reference_point: of the hypervolume.
        notes: sentences to put first.
        tables: put after the figures.
    """
    shade = {css_name(family, front): look for family, look in families(front.points).items()}
    light = "".join(f"--{name}:{look[0]};" for name, look in shade.items())
    dark = "".join(f"--{name}:{look[1]};" for name, look in shade.items())
    marks = "".join(f"i.{name}{{background:var(--{name})}}" for name in shade)
    said = "".join(f"<li>{escape(printable(s))}</li>" for s in (*notes, *sentences(front)))
    body = [
        f"<h1>{escape(printable(title))}</h1>",
        _tiles(front, reference_point),
        f"<ul>{said}</ul>",
        _figures(front),
        *(_own_table(table) for table in tables),
        _heat_map(front),
        _side_effects(front),
        _everything(front),
        _how(front),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(printable(title))}</title><style>{STYLE}{marks}:root{{{light}}}"
        f"@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}</style></head><body>\n"
        + "\n".join(filter(None, body))
        + "\n</body></html>\n"
    )


def _tiles(front: Frontier, reference_point: Sequence[float] | None) -> str:
    x, y = scales(front)
    summary = front.summary(reference_point)
    at = f"({plain(summary['reference_point'])})"
    low, high = summary["hypervolume_ci"]
    control = control_hypervolume(front, summary["reference_point"])
    beside = "" if control is None else f"; controls alone {control:.4g}"
    tiles = [
        (f"{summary['hypervolume']:.4g}", f"hypervolume [{low:.4g}, {high:.4g}] against {at}{beside}"),
        (str(len(summary["pareto"])), f"of {len(front.points)} models on the Pareto front"),
    ]
    best, bargain = highest(front), free(front)
    if best is not None:
        noise = " (within noise)" if best is bargain else ""
        tiles.append((number(best.reward, x), f"highest reward: {printable(best.name, 60)}{_taxed(best, y)}{noise}"))
    if bargain is not None and bargain is not best:
        about = f"highest reward whose tax is within noise: {printable(bargain.name, 60)}{_taxed(bargain, y)}"
        tiles.append((number(bargain.reward, x), about))
    return '<div class="tiles">' + "".join(_tile(*tile) for tile in tiles) + "</div>"


def _tile(value: str, about: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(about)}</span></div>'


def _taxed(point: Measurement, scale: float) -> str:
    return "" if point.tax is None else f", tax {number(point.tax, scale)}"


def _figures(front: Frontier) -> str:
    broad = svg(front, View(themed=True, prefix="broad"))
    narrow = svg(front, View(width=4.4, height=4.6, font=10, names=False, themed=True, prefix="narrow"))
    best = sorted(front.pareto(), key=lambda p: -p.capability)
    listed = "; ".join(f"{i} {escape(printable(p.name, 60))}" for i, p in enumerate(best[:16], 1))
    more = f" and {len(best) - 16} more" if len(best) > 16 else ""
    figures = (
        f'<figure><div class="broad">{broad}</div><div class="narrow">{narrow}</div><figcaption>Both axes: more is '
        "better. Thin crosses are 95% intervals, lines join the ratios or settings of one method, pale points are "
        "dominated, the shaded area is dominated by the front."
        f'<span class="narrow">On the front: {listed}{more}.</span></figcaption></figure>'
    )
    if corner(front):
        closer = svg(front, View(height=5.0, corner=True, themed=True, prefix="closer"))
        tight = svg(front, View(width=4.4, height=4.4, font=10, names=False, corner=True, themed=True, prefix="tight"))
        figures += (
            f'<figure><div class="broad">{closer}</div><div class="narrow">{tight}</div>'
            "<figcaption>The upper right corner, enlarged.</figcaption></figure>"
        )
    return f"<h2>The front</h2>{figures}"


def _own_table(table: Table) -> str:
    rows = ["".join([f"<tr><th scope=row>{_said(first)}", *(f"<td>{_said(cell)}" for cell in rest)])
            for first, *rest in table.rows]  # fmt: skip
    return f"<h2>{_said(table.title)}</h2>{_table(table.head, rows)}"


def _heat_map(front: Frontier) -> str:
    names = categories(front)
    changed = [(p, front.category_changes(p)) for p in front.points if p is not front.reference]
    changed = [(point, changes) for point, changes in changed if changes]
    if not names or not changed:
        return ""
    _, y = scales(front)
    strongest = max((abs(v) for _, changes in changed for v in changes.values()), default=1.0) or 1.0
    rows = []
    for point, changes in changed:
        cells = [_change(-point.tax if point.tax is not None else None, point.tax_verdict, strongest, y)]
        for name in names:
            said = point.by_category.get(name)
            hint = (
                f"{bounds(said.ci, y)}{'' if said.p_adjusted is None else f', p {said.p_adjusted:.2g}'}" if said else ""
            )
            cells.append(_change(changes.get(name), said.verdict if said else "", strongest, y, hint))
        rows.append(_row(front, point, cells))
    base = printable(front.reference.name, 60) if front.reference else "the reference"
    marks = " ▲ and ▼ mark gains and losses beyond noise." if any(p.tax_verdict for p, _ in changed) else ""
    return (
        f"<h2>What was lost where</h2><p class=soft>Capability minus that of {escape(base)}, by category.{marks}</p>"
        + _table(["model", "all", *names], rows, "map")
    )


def _change(value: float | None, verdict: str, strongest: float, scale: float, hint: str = "") -> Cell:
    if value is None:
        return "<td>"
    mark = {"gain": " ▲", "loss": " ▼"}.get(verdict, "")
    strength = round(LEVELS * min(1.0, abs(value) / strongest) ** 0.6)  # small changes are seen beside large
    title = f' title="{escape(hint)}"' if hint else ""
    side = f" class={'g' if value > 0 else 'l'}{strength}" if strength else ""
    return f"<td{side}{title}>{number(value, scale, sign=True)}{mark}"


def _side_effects(front: Frontier) -> str:
    fair = {p.name: said for p in front.points if (said := at_equal_length(p))}
    shown = [p for p in front.points if p.response_length is not None or p.kl is not None or p.name in fair]
    if not shown:
        return ""
    longest = max((p.response_length or 0.0 for p in shown), default=0.0) or 1.0
    farthest = max((p.kl or 0.0 for p in shown), default=0.0) or 1.0
    rows = [
        _row(front, p, [
            _bar(p.response_length, longest, ".1f"),
            _bar(p.kl, farthest, ".3g"),
            *([_text(fair.get(p.name, ("", ""))[0])] if fair else []),
        ])
        for p in shown
    ]  # fmt: skip
    head = ["model", "response length", "KL to the reference", *(["win rate at equal length"] if fair else [])]
    label = f" Win rate at equal length: {escape(next(iter(fair.values()))[1])}." if fair else ""
    return (
        "<h2>How the answers changed</h2><p class=soft>Mean length of the rewarded answers in tokens, and KL to the "
        f"reference per answer in nats. Reward that comes with longer answers may be length alone.{label}</p>"
        + _table(head, rows, "bars", text=(1, 2, 3))
    )


def _bar(value: float | None, largest: float, spec: str) -> Cell:
    if value is None:
        return "<td>"
    width = 5.5 * max(0.0, value) / largest
    return f'<td><span class=n>{value:{spec}}</span><span class=bar style="width:{width:.2f}em"></span>'


def _everything(front: Frontier) -> str:
    x, y = scales(front)
    on_front = {point.name for point in front.pareto()}
    rows = []
    with_settings = any(point.hyperparameters for point in front.points)
    with_cost = any(point.seconds is not None for point in front.points)
    for point in front.points:
        price, worst = front.tax_per_reward(point), front.worst_category(point)
        ratio = y / x
        cells = [
            _text(printable(point.family, 40)),
            _measured(point.reward, point.reward_ci, x),
            _measured(point.reward_gain, point.reward_gain_ci, x, point.reward_verdict),
            _measured(point.capability, point.capability_ci, y),
            _measured(point.tax, point.tax_ci, y, point.tax_verdict),
            "<td>" if price is None else f"<td>{_price(price[0] * ratio)} <small>{_pair(price[1], ratio)}</small>",
            _text(f"{printable(worst.category, 40)} {number(worst.difference, y, sign=True)}" if worst else ""),
        ]
        cells += ["<td>" if point.seconds is None else f"<td>{point.seconds:.1f}"] * with_cost
        cells += [_text(settings(point.hyperparameters))] * with_settings
        rows.append(_row(front, point, cells, point.name in on_front))
    head = ["model", "family", "reward", "gain", "capability", "tax", "tax per reward", "worst category"]
    head += ["seconds"] * with_cost + ["settings"] * with_settings
    return f"<h2>Everything</h2>{_table(head, rows, text=(1, 7, len(head) - 1 if with_settings else 7))}"


def _pair(interval: tuple[float, float] | None, scale: float) -> str:
    return "" if interval is None else f"[{_price(interval[0] * scale)}, {_price(interval[1] * scale)}]"


def _price(value: float) -> str:
    text = f"{value:.2f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def _measured(value: float | None, interval: tuple[float, float] | None, scale: float, verdict: str = "") -> Cell:
    if value is None:
        return "<td>"
    said = (
        f" <span class={verdict}>{verdict}</span>" if verdict in ("gain", "loss") else f" {verdict}" if verdict else ""
    )
    return f"<td>{number(value, scale)} <small>{bounds(interval, scale)}{said}</small>"


def _text(value: str) -> Cell:
    return f"<td class=text>{escape(value)}"


def _how(front: Frontier) -> str:
    told = [p for p in front.points if p.measured]
    shared = {
        key: value
        for key, value in (told[0].measured if told else {}).items()
        if len(told) > 1 and all(key not in p.measured or p.measured[key] == value for p in told)
    }
    listed = "".join(f"<dt>{_said(key)}</dt><dd>{_said(value)}</dd>" for key, value in shared.items())
    own = [(p, {k: v for k, v in p.measured.items() if k not in shared}) for p in told]
    keys = list(dict.fromkeys(key for _, values in own for key in values))
    rows = [_row(front, p, [_text(_cut(values.get(key, ""))) for key in keys]) for p, values in own if values]
    table = _table(["model", *keys], rows, text=range(1, len(keys) + 1)) if rows else ""
    each = f"<details open><summary>Each model</summary>{table}</details>" if rows else ""
    about = f"<dl>{listed}</dl>" if listed else ""
    said = f"{_INTERVALS} {_TESTS}" if any(point.by_category for point in front.points) else _INTERVALS
    return f"<h2>How it was measured</h2>{about}{each}<p class=soft>{said}</p>"


def _cut(value: Any) -> str:
    return printable(plain(value), 300)


def _said(value: Any) -> str:
    return escape(_cut(value))


def _row(front: Frontier, point: Measurement, cells: Iterable[Cell], on_front: bool = False) -> str:
    name = escape(printable(point.name, 160))
    mark = f"<i class={css_name(point.family, front)}></i>"
    said = " <small>on the front</small>" if on_front else ""
    return f"<tr{' class=front' if on_front else ''}><th scope=row>{mark}{name}{said}{''.join(cells)}"


def _table(head: Sequence[str], rows: Sequence[str], kind: str = "", text: Iterable[int] = ()) -> str:
    left = set(text)
    titles = "".join(
        f"<th scope=col{' class=text' if i in left else ''}>{escape(printable(name, 60))}"
        for i, name in enumerate(head)
    )
    classes = f" class={kind}" if kind else ""
    lines = "\n".join(rows)
    return f"<div class=wide tabindex=0><table{classes}><thead><tr>{titles}</thead><tbody>{lines}</tbody></table></div>"
