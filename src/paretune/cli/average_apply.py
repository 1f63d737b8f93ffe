"""``paretune average apply``: write the averaged model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.cli.average_learn import Bar, add_ends, add_parts, head_of, statement, whole_numbers
from paretune.errors import ArgumentError
from paretune.log import get

if TYPE_CHECKING:
    from paretune.averaging import Ratios
    from paretune.merging.plan import Plan

_EXAMPLES = """\
examples:
  paretune average apply --pre sft --post aligned --ratios ratios.json -o averaged
  paretune average apply --pre sft --post aligned --ratios 0.2 -o averaged                      # one for everything
  paretune average apply --pre sft --post aligned --ratios 0.4,0.3,0.2 --pivots 10,20 -o averaged    # 0-10, 11-20, 21-
  paretune average apply --pre sft --post aligned --ratios 0.4,0.2 --head 0 --embeddings 1 --dry-run --json -o x

The ratio of every tensor is in OUT/ratios.json; --dry-run --json prints it and writes nothing.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``apply``."""
    parser = subparsers.add_parser(
        "apply",
        help="write the averaged model, with ratios that were learned or by hand",
        description="Average two checkpoints, tensor by tensor, in bounded memory.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_ends(parser)
    parser.add_argument(
        "--ratios", required=True, metavar="FILE|R,R…", help="a ratios.json, or one ratio a block of layers"
    )
    parser.add_argument("--pivots", metavar="N,N…", help="last layer of each block but the last (equal blocks)")
    add_parts(parser)
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="the directory to write: new or empty")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of the result; as stored if unset")
    parser.add_argument("--workers", type=int, help="threads; never changes the result")
    parser.add_argument("--dry-run", action="store_true", help="state the ratios and write nothing")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked."""
    from paretune.merging.output import checked_directory

    checked_directory(arguments.out)
    ratios = _ratios(arguments)
    plan = plan_average(arguments.pre, arguments.post, [ratios], [], arguments.dtype)
    plan.check()
    if ratios.extrapolates:
        get("cli").warning("a ratio lies outside [0, 1]: there the model is extrapolated")
    if arguments.dry_run:
        print(json.dumps(ratios.to_dict()) if arguments.json else "\n".join(statement(ratios)))
        return 0
    report = carry_out_average(plan, arguments.out, arguments.workers, arguments.quiet)
    ratios.save(Path(arguments.out) / "ratios.json")
    if arguments.json:
        print(json.dumps(report | {"ratios": ratios.to_dict()}))
        return 0
    print("\n".join(statement(ratios)))
    print(arguments.out)
    return 0


def _ratios(arguments: argparse.Namespace) -> Ratios:
    from paretune.averaging import Ratios
    from paretune.averaging.ends import Ends

    ends = Ends(arguments.pre, arguments.post)
    given = {"head": head_of(arguments.head), "embeddings": arguments.embeddings, "norms": arguments.norms}
    numbers = _numbers(arguments.ratios)
    if numbers is not None:
        pivots = whole_numbers("pivots", arguments.pivots)
        return Ratios.by_hand(ends.shapes, ratios=numbers, pivots=pivots, tied=ends.tied, **given)
    for name, value in (given | {"pivots": arguments.pivots}).items():
        if value is not None:
            raise ArgumentError(name, value, f"{arguments.ratios} says it: learn again, or give ratios by hand")
    return Ratios.load(arguments.ratios)


def _numbers(text: str) -> list[float] | None:
    """Ratios given by hand; None for the name of a file."""
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        return None


def plan_average(
    pre: str, post: str, points: Sequence[Ratios], labels: Sequence[str], dtype: str | None = None
) -> Plan:
    """The merge engine's plan of one average, or of several in one read.

    Args:
        pre, post: the checkpoints.
        points: the ratios of each result.
        labels: a directory's name for each; none for a single result.
        dtype: of the results.
    """
    from paretune.merging.plan import make_plan
    from paretune.merging.recipe import Recipe, Slice, Source, kind_of
    from paretune.merging.settings import PerTensor

    def weighed(model: str, ratios: Mapping[str, float], rest: bool) -> Source:
        return Source(model, None, {"weight": PerTensor(ratios, rest)})

    recipes = [
        Recipe(
            "linear",
            (Slice((weighed(pre, point.tensors, False), weighed(post, point.tensors, True))),),
            dtype=kind_of(dtype),
        )
        for point in points
    ]
    return make_plan(recipes, labels)


def carry_out_average(plan: Plan, out: str, workers: int | None, quiet: bool) -> dict[str, Any]:
    """Write what `plan_average` planned; the engine's report as plain values."""
    from paretune.merging.api import carry_out

    bar = Bar(quiet, "average")
    try:
        return carry_out(plan, out, workers=workers, progress=bar).to_dict()
    finally:
        bar.close()
