"""``paretune average``: averages of a model before alignment and the aligned one; one module a command."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

# Each module has ``add_parser(subparsers)`` and sets ``run`` by ``set_defaults``.
_COMMANDS = (
    "paretune.cli.average_collect",
    "paretune.cli.average_learn",
    "paretune.cli.average_apply",
    "paretune.cli.average_sweep",
    "paretune.cli.average_fisher",
    "paretune.cli.average_dial",
)

_EXAMPLES = """\
examples:
  paretune average collect aligned --prompts prompts.jsonl --reward model:rm --n 8 -o best.jsonl
  paretune average learn --pre sft --post aligned --data best.jsonl --blocks 3 --mean 0.2 -o ratios.json
  paretune average apply --pre sft --post aligned --ratios ratios.json -o averaged
  paretune average apply --pre sft --post aligned --ratios 0.4,0.3,0.2 --pivots 10,20 -o averaged
  paretune average sweep --pre sft --post aligned --data best.jsonl --means 0:1:0.1 -o sweep

A ratio is the weight of --pre, the model before alignment; --post gets the rest.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``average`` with its commands."""
    parser = subparsers.add_parser(
        "average",
        help="average the model before alignment and the aligned one: by hand, or with learned ratios",
        description="Give back part of the model before alignment: collect samples, learn ratios, apply them, sweep.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", dest="average_command", metavar="COMMAND", required=True)
    for module in _COMMANDS:
        importlib.import_module(module).add_parser(commands)
    return parser
