"""``paretune demo``: parsing and printing."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

_EPILOG = """examples:
  paretune demo                          every method, about 8 minutes on 2 cores
  paretune demo --quick --out runs/quick few methods, about 3 minutes
  paretune demo --seeds 0,1,2            three worlds, averaged

The models that the demo trains first are kept in $PARETUNE_CACHE (default: ~/.cache/paretune/demo).
Finished points in the output directory are not made again.
"""


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "demo",
        help="train a tiny world and show the alignment tax and its cures",
        description="Train a tiny language model from nothing, tune it, align it by DPO with every method, and measure "
        "reward and capability: results.json, frontier.png and report.html.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="directory of the results (default: %(default)s)"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--seed", type=int, default=0, help="the world's seed (default: %(default)s)")
    chosen.add_argument("--seeds", help="several seeds, separated by commas")
    parser.add_argument("--quick", action="store_true", help="few methods")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print results.json on stdout instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and print its table and verdict."""
    from paretune.demo.run import Options
    from paretune.demo.run import run as run_demo
    from paretune.errors import ArgumentError

    seeds = (arguments.seed,) if arguments.seeds is None else _seeds(arguments.seeds)
    if arguments.workers < 1:
        raise ArgumentError("--workers", arguments.workers, "give at least 1")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ArgumentError("--out", str(arguments.out), "is a file; give a directory")
    bars = _Bars()
    try:
        results = run_demo(Options(arguments.out, seeds, arguments.quick, arguments.workers), bars)
    finally:
        bars.close()
    print(json.dumps(results) if arguments.json else _table(results))
    names = ", ".join(str(arguments.out / name) for name in ("results.json", "frontier.png", "report.html"))
    print(f"written: {names}", file=sys.stderr)
    return 0


def _seeds(text: str) -> tuple[int, ...]:
    from paretune.errors import ArgumentError

    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ArgumentError("--seeds", text, "give whole numbers separated by commas, such as 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise ArgumentError("--seeds", text, "name each seed once")
    return seeds


class _Bars:
    """Progress bars on stderr, one for each thing reported."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __call__(self, what: str, done: int, of: int) -> None:
        from tqdm import tqdm

        if what not in self._bars:
            self._bars[what] = tqdm(total=of, desc=what, file=sys.stderr)
        self._bars[what].update(done - self._bars[what].n)

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()


def _table(results: dict[str, Any]) -> str:
    from paretune.demo.results import label

    rows: list[tuple[str, ...]] = [("method", "reward", "capability", "tax", "above AdamW at equal reward")]
    for point in (results["base"], results["reference"], *results["points"]):
        above = point.get("capability_above_adamw")
        bounds = point.get("capability_above_adamw_ci")
        shown = "" if above is None else f"{100 * above:+.1f} [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"
        rows.append((
            label(point),
            *(f"{100 * point[key]:5.1f} [{100 * point[f'{key}_ci'][0]:.1f}, {100 * point[f'{key}_ci'][1]:.1f}]"
              for key in ("reward", "capability", "tax")),
            shown,
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    area = results["hypervolume"]
    lines += [
        "",
        f"hypervolume against {tuple(area['reference_point'])}: all {area['all']:.4f}, AdamW alone {area['adamw']:.4f}",
    ]
    return "\n".join([*lines, "", *results["verdict"]])
