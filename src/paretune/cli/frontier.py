"""``paretune frontier``: parsing and printing."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.errors import ArgumentError

if TYPE_CHECKING:
    from paretune.evaluation.frontier import Frontier
    from paretune.evaluation.points import Measurement

_EXAMPLES = """\
examples:
  paretune frontier points.jsonl -o report.html
  paretune frontier points.jsonl -o front.svg -o front.png -o pull-request.md -o points.csv
  paretune frontier sweep.jsonl more.jsonl --reference-point 0.3,0.5 --json
  paretune frontier seed0.jsonl seed1.jsonl seed2.jsonl --combine-seeds -o report.html
  paretune frontier points.jsonl --choose-max-tax 0.01

Both axes: more is better. A hypervolume can be compared with another only at the same reference point.
The fields of points.jsonl are in docs/frontier.md.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``frontier``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "frontier",
        help="the Pareto front of measured models: hypervolume, tax, verdicts, one report",
        description="Read measured points, find the Pareto front, and write a report.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # argparse takes "-1,0" for an option; only whole negative numbers are known to it.
    parser._negative_number_matcher = re.compile(r"^-\.?\d")
    parser.add_argument("points", metavar="POINTS", nargs="+", help="files of JSON lines; several are put together")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        action="append",
        default=[],
        help="write .html (the report), .svg or .png (the figure), .md (for a pull request), .csv, .jsonl; repeatable",
    )
    parser.add_argument(
        "--reference-point",
        metavar="R,C",
        help="reward and capability that the hypervolume counts from (default: 0,0, or below the least where negative)",
    )
    parser.add_argument("--title", default=None, help="heading of the report")
    parser.add_argument(
        "--combine-seeds",
        action="store_true",
        help="each file is one seed: average the points of the same name, with intervals over seeds and items",
    )
    parser.add_argument(
        "--choose-max-tax",
        metavar="TAX",
        type=float,
        help="of each path choose the highest reward with at most this tax on one half of the items, and report it on "
        "the other half; needs item-wise scores",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked."""
    from paretune.evaluation.frontier import Frontier
    from paretune.evaluation.points import read_points
    from paretune.evaluation.report import TITLE, check_target, write_report
    from paretune.evaluation.seeds import combine_seeds

    reference_point = _reference_point(arguments.reference_point)
    for output in arguments.output:
        check_target(output)
    if arguments.combine_seeds:
        runs = [_compared(read_points(path)) for path in arguments.points]
        points = combine_seeds(runs, [Path(path).stem for path in arguments.points])
    else:
        points = read_points(*arguments.points)
    front = Frontier(points)
    summary = front.summary(reference_point)
    if arguments.choose_max_tax is not None:
        summary["chosen"] = _chosen(front, arguments.choose_max_tax)
    title = TITLE if arguments.title is None else arguments.title
    for output in arguments.output:
        write_report(front, output, title=title, reference_point=reference_point)
        print(f"written: {output}", file=sys.stderr)
    print(json.dumps(summary) if arguments.json else _text(front, summary))
    return 0


def _reference_point(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        reward, capability = (float(part) for part in text.split(","))
    except ValueError:
        raise ArgumentError("--reference-point", text, "give reward,capability, such as 0.3,0.5") from None
    return reward, capability


def _compared(points: list[Measurement]) -> list[Measurement]:
    from paretune.evaluation.frontier import Frontier

    return Frontier(points).points


def _chosen(front: Frontier, most: float) -> dict[str, Any]:
    """For each path the point chosen on one half, as the other half sees it."""
    import math

    from paretune.evaluation.halves import choose_on_half

    if front.reference is None:
        raise ArgumentError("--choose-max-tax", most, "mark one point as the reference (family reference)")
    paths = list(dict.fromkeys(point.path for point in front.points if point.path))
    if not paths:
        raise ArgumentError("--choose-max-tax", most, "give the points to choose among the same path")
    found: dict[str, Any] = {}
    for path in paths:
        choice = choose_on_half(
            [point for point in front.points if point.path == path],
            front.reference,
            lambda gain, tax: gain if tax <= most else -math.inf,
        )
        if choice is None:
            found[path] = None
            continue
        name, flattered, told = choice
        found[path] = {
            "name": name,
            "reward_gain": told.reward_gain,
            "reward_gain_ci": told.reward_gain_ci,
            "tax": told.tax,
            "tax_ci": told.tax_ci,
            "verdict": told.tax_verdict,
            "on_the_choosing_half": {"reward_gain": flattered.reward_gain, "tax": flattered.tax},
        }
    return found


def _text(front: Frontier, summary: dict[str, Any]) -> str:
    from paretune.evaluation.figure import printable, scales
    from paretune.evaluation.wording import bounds, number, plain, sentences

    x, y = scales(front)
    rows: list[tuple[str, ...]] = [("", "model", "reward", "capability", "tax", "", "worst category")]
    for point in front.points:
        worst = front.worst_category(point)
        rows.append(
            (
                "*" if point.name in summary["pareto"] else "",
                printable(point.name, 48),
                f"{number(point.reward, x)} {bounds(point.reward_ci, x)}",
                f"{number(point.capability, y)} {bounds(point.capability_ci, y)}",
                "" if point.tax is None else f"{number(point.tax, y)} {bounds(point.tax_ci, y)}",
                point.tax_verdict,
                "" if worst is None else f"{printable(worst.category, 24)} {number(worst.difference, y, sign=True)}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    low, high = summary["hypervolume_ci"]
    lines += [
        "",
        f"* on the Pareto front. Hypervolume {summary['hypervolume']:.4g} [{low:.4g}, {high:.4g}] "
        f"against ({plain(summary['reference_point'])}).",
        *sentences(front),
    ]
    for path, chosen in summary.get("chosen", {}).items():
        if chosen is None:
            lines.append(f"Of {printable(path, 40)} no point pays so little on the choosing half of the items.")
            continue
        lines.append(
            f"Chosen of {printable(path, 40)} on one half of the items: {printable(chosen['name'], 60)}. On the other "
            f"half it gains {number(chosen['reward_gain'], x)} {bounds(chosen['reward_gain_ci'], x)} at a tax of "
            f"{number(chosen['tax'], y)} {bounds(chosen['tax_ci'], y)}, {chosen['verdict']}."
        )
    return "\n".join(lines)
