"""``paretune average collect``: best-of-n samples of the aligned model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from paretune.cli.answering import add_answering, open_source
from paretune.errors import ArgumentError

_EXAMPLES = """\
examples:
  paretune average collect aligned --prompts prompts.jsonl --reward model:reward-model --n 8 -o best.jsonl
  paretune average collect aligned --prompts prompts.jsonl --reward reward.py:function --threshold 0.5 -o best.jsonl
  paretune average collect my-model --endpoint http://localhost:8000/v1 --prompts prompts.jsonl \\
      --reward model:reward-model -o best.jsonl
  paretune average collect aligned --prompts prompts.jsonl --scores scored.jsonl -o best.jsonl

Rewards are named as for paretune measure. --scores takes JSON lines with score, index and sample: best.samples.jsonl
with a column more. An interrupted run goes on when the same command is given again.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``collect``."""
    parser = subparsers.add_parser(
        "collect",
        help="sample the aligned model and keep the best by reward",
        description="Sample n completions of each prompt, score them and keep the best, as rows that TRL reads.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a directory, hub id or adapter; with --endpoint its name there")
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help="JSON lines with prompt, messages or instruction"
    )
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="the .jsonl to write")
    scored = parser.add_mutually_exclusive_group(required=True)
    scored.add_argument(
        "--reward", metavar="REWARD", help="model:PATH, rating:NAME@URL, file.py:function, module:function"
    )
    scored.add_argument("--scores", metavar="FILE", help="scores of all samples, made elsewhere")
    parser.add_argument("--n", type=int, default=8, help="samples a prompt (8)")
    parser.add_argument("--keep", type=int, default=1, help="of each prompt's samples, at most (1)")
    parser.add_argument("--threshold", type=float, help="keep no sample that scores less")
    parser.add_argument("--top-share", type=float, default=1.0, help="of all kept, the share that scores best (1)")
    parser.add_argument(
        "--deduplicate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="count equal completions of a prompt once",
    )
    parser.add_argument("--finished-only", action="store_true", help="leave out samples cut at --max-new-tokens")
    add_answering(parser, answer="completion", max_new_tokens=256, temperature=1.0)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked."""
    from paretune.averaging import collect_best_of_n
    from paretune.evaluation.reward import load_reward
    from paretune.generation.prompts import read_questions

    # What can be refused is refused before a model is loaded.
    if read_questions(arguments.prompts, chat=True, limit=arguments.limit).second:
        raise ArgumentError("prompts", arguments.prompts, "the prompts have two turns: give prompts of one")
    if arguments.limit is not None and arguments.limit < 1:
        raise ArgumentError("limit", arguments.limit, "give at least 1")
    reward = load_reward(arguments.reward) if arguments.scores is None else arguments.scores
    source, tokenizer, chat = open_source(arguments)
    same = ("n", "keep", "threshold", "top_share", "deduplicate", "finished_only", "max_new_tokens", "temperature")
    options = {
        name: getattr(arguments, name) for name in (*same, "top_p", "top_k", "stop", "seed", "batch_size", "out")
    }
    rows = collect_best_of_n(
        source,
        read_questions(arguments.prompts, chat=chat, limit=arguments.limit).prompts,
        reward,
        tokenizer=tokenizer,
        progress=not arguments.quiet,
        **options,
    )
    scores = rows["score"][:]
    mean = sum(scores) / len(scores)
    if arguments.json:
        print(json.dumps({"out": arguments.out, "rows": len(rows), "prompts": len(set(rows["index"])), "score": mean}))
        return 0
    print(f"{len(rows)} samples of {len(set(rows['index']))} prompts kept, mean score {mean:.4g}")
    print(arguments.out)
    return 0
