"""A front as Markdown for a pull request and as CSV for a spreadsheet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from paretune.evaluation.figure import printable, scales
from paretune.evaluation.frontier import Frontier
from paretune.evaluation.wording import bounds, categories, number, plain, sentences, settings


def markdown(front: Frontier, reference_point: Sequence[float] | None = None, notes: Sequence[str] = ()) -> str:
    """The front's verdict and a table, in GitHub's Markdown.

    Args:
        front: what to show.
        reference_point: of the hypervolume.
        notes: sentences to put first.
    """
    x, y = scales(front)
    summary = front.summary(reference_point)
    low, high = summary["hypervolume_ci"]
    best = set(summary["pareto"])
    lines = [f"- {_harmless(sentence)}" for sentence in (*notes, *sentences(front))]
    at = plain(summary["reference_point"])
    lines += [
        f"- Hypervolume {summary['hypervolume']:.4g} [{low:.4g}, {high:.4g}] against ({at}).",
        "",
        "| model | family | reward | capability | tax | verdict | worst category |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for point in front.points:
        name = _harmless(printable(point.name, 120))
        worst = front.worst_category(point)
        cells = [
            f"**{name}**" if point.name in best else name,
            _harmless(printable(point.family, 40)),
            f"{number(point.reward, x)} {bounds(point.reward_ci, x)}",
            f"{number(point.capability, y)} {bounds(point.capability_ci, y)}",
            "" if point.tax is None else f"{number(point.tax, y)} {bounds(point.tax_ci, y)}".strip(),
            point.tax_verdict,
            f"{_harmless(printable(worst.category, 60))} {number(worst.difference, y, sign=True)}" if worst else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Bold: on the Pareto front. Intervals are of 95%, paired with the reference on the same items."]
    return "\n".join(lines) + "\n"


def csv_text(front: Frontier) -> str:
    """All points as CSV, a line each; intervals as two columns, categories as ``category:NAME``.

    Args:
        front: what to show.
    """
    names = categories(front)
    best = {point.name for point in front.pareto()}
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    pairs = ("reward", "capability", "tax", "reward_gain")
    head = [column for name in pairs for column in (name, f"{name}_low", f"{name}_high")]
    rest = ("tax_verdict", "reward_verdict", "response_length", "kl", "seconds", "path", "label")
    rows.writerow(
        ["name", "family", "on_front", *head, *rest, "hyperparameters", *(_cell(f"category:{n}") for n in names)]
    )
    for point in front.points:
        values: list[object] = []
        for name in pairs:
            values += [getattr(point, name), *(getattr(point, f"{name}_ci") or (None, None))]
        values += [getattr(point, name) for name in rest]
        values += [settings(point.hyperparameters), *(point.capability_by_category.get(n) for n in names)]
        rows.writerow(map(_cell, [point.name, point.family, int(point.name in best), *values]))
    return stream.getvalue()


def _harmless(text: str) -> str:
    """Text in which Markdown, HTML, mentions and links of GitHub mean nothing."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", text)
    return text.replace("@", "&#64;").replace("://", ":&#8203;//")


def _cell(value: object) -> object:
    """A spreadsheet would run text that begins like a formula."""
    if isinstance(value, str):
        clean = printable(value)
        return f"'{clean}" if clean[:1] in ("=", "+", "-", "@") else clean
    return "" if value is None else value
