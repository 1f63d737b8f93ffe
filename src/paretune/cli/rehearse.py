"""``paretune rehearse``: prompts and answers that a model makes itself, in place of the data of its SFT."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paretune.errors import ArgumentError

_EXAMPLES = """\
examples:
  paretune rehearse prompts sft-model --preferences preferences.jsonl -o rehearsal.jsonl
  paretune rehearse prompts sft-model --source prompt-model --seeds thirty.jsonl --preferences preferences.jsonl \\
      -o rehearsal.jsonl
  paretune rehearse prompts sft-model --source file --prompts mine.jsonl -o rehearsal.jsonl

Then train on it beside the preferences, or let one command do both:
  paretune train joint --model_name_or_path sft-model --sft_dataset rehearsal.jsonl --preference_dataset …
  paretune train joint --model_name_or_path sft-model --rehearse auto --preference_dataset …

An interrupted run goes on when the same command is given again.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``rehearse`` with its command."""
    parser = subparsers.add_parser(
        "rehearse",
        help="prompts and answers that a model makes itself, to train on beside preferences",
        description="Self-rehearsal: data in place of those of a model's SFT, made by the model itself.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", dest="rehearse_command", metavar="COMMAND", required=True)
    prompts = commands.add_parser(
        "prompts",
        help="make prompts and the model's answers to them",
        description="Make prompts, answer them with the model, and write rows of messages.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prompts.add_argument("model", metavar="MODEL", help="the reference: a directory, hub id or adapter")
    prompts.add_argument("-o", "--out", required=True, metavar="FILE", help="the .jsonl to write")
    prompts.add_argument(
        "--source",
        choices=("auto", "raw-fragments", "prompt-model", "mutate", "user-mark", "file"),
        default="auto",
        help="where prompts come from; auto: prompt-model where there are --seeds, else raw-fragments (auto)",
    )
    prompts.add_argument("--count", type=int, default=2000, help="of prompts (2000)")
    prompts.add_argument("--seeds", metavar="FILE", help="a few dozen prompts, JSON lines, for prompt-model and mutate")
    prompts.add_argument("--prompts", metavar="FILE", help="the prompts of --source file, JSON lines")
    prompts.add_argument(
        "--preferences", metavar="FILE", help="the preference pairs: prompts like theirs must not be rehearsed"
    )
    prompts.add_argument(
        "--alike",
        choices=("leave-out", "sample"),
        default="leave-out",
        help="prompts like the preferences': leave them out, or answer them at temperature 1 (leave-out)",
    )
    prompts.add_argument("--temperature", type=float, default=0.0, help="of the answers (0: the likeliest)")
    prompts.add_argument("--max-tokens", type=int, default=64, help="the longest prompt (64)")
    prompts.add_argument("--max-new-tokens", type=int, default=256, help="the longest answer (256)")
    prompts.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    prompts.add_argument("--batch-size", type=int, default=128, help="rows at once; never changes the prompts (128)")
    prompts.add_argument("--json", action="store_true", help="print the report as JSON")
    prompts.add_argument("--quiet", action="store_true", help="no progress bars")
    prompts.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Make prompts and answers."""
    out = Path(arguments.out)
    if out.exists():
        raise ArgumentError("--out", str(out), "exists already: name a new file")
    if arguments.preferences is None:
        print("paretune: no --preferences: prompts like theirs are not looked for", file=sys.stderr)
    texts = {name: _texts(name, getattr(arguments, name)) for name in ("seeds", "prompts", "preferences")}
    from paretune.generation import load
    from paretune.training.rehearsal_data import make_rehearsal

    model, tokenizer = load(arguments.model)
    report = make_rehearsal(
        model,
        tokenizer,
        out,
        arguments.source,
        arguments.count,
        alike=arguments.alike,
        temperature=arguments.temperature,
        max_tokens=arguments.max_tokens,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        progress=not arguments.quiet,
        **texts,
    )
    print(json.dumps(asdict(report)) if arguments.json else f"{report}\n{out}")
    return 0


def _texts(name: str, file: str | None) -> list[str]:
    if file is None:
        return []
    from paretune.training.data import load_splits, take_split
    from paretune.training.rehearsal_data import prompt_texts

    argument = f"--{name}"
    found = prompt_texts(take_split(load_splits(file, argument=argument), "train", name=file, argument=argument))
    if not found:
        raise ArgumentError(argument, file, "no row has a prompt, messages or text")
    return found
