"""``paretune diff``: how far models are from each other."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from paretune.errors import ArgumentError

_EXAMPLES = """\
examples:
  paretune diff base sft
  paretune diff base sft aligned --plot diff.svg
  paretune diff base sft aligned --json > diff.json

With tau = REFERENCE - BASE and update = ALIGNED - REFERENCE:
  relative_norm      norm of tau, relative to the base's
  zero_share         entries of tau that are exactly 0
  effective_density  (sum |tau|)^2 / (n sum tau^2): 1 where all entries are equally large
  cosine             between tau and update
  sign_conflict      of the entries where neither is 0, those with opposite signs
"""
_PICTURES = (".svg", ".png", ".pdf")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``diff``."""
    parser = subparsers.add_parser(
        "diff",
        help="how far models are from each other, block by block",
        description="Measure the task vector of two checkpoints, or how a third one's update relates to it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", metavar="BASE", help="directory, file or hub id")
    parser.add_argument("reference", metavar="REFERENCE", help="the model tuned from it")
    parser.add_argument("aligned", metavar="ALIGNED", nargs="?", help="the model tuned from the reference")
    parser.add_argument("--plot", metavar="FILE", help="draw layers x modules as a heat map (.svg, .png or .pdf)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, every tensor included")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from paretune.merging.difference import compare

    if arguments.plot is not None:
        target = Path(arguments.plot)
        if target.suffix not in _PICTURES or not target.parent.is_dir():
            raise ArgumentError(
                "plot", arguments.plot, f"name a file ending in {', '.join(_PICTURES)} that can be made"
            )
    found = compare(arguments.base, arguments.reference, arguments.aligned)
    if arguments.plot is not None:
        found.plot(arguments.plot)
    print(json.dumps(found.to_dict()) if arguments.json else "\n".join(found.table()))
    return 0
