"""``paretune average collect``: best-of-n samples of the aligned model."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

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
    parser.add_argument("--raw", action="store_true", help="continue text as it stands, without the chat template")
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="the longest completion (256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling (1)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the smallest set of this probability (1)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest tokens (0: all)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a completion; repeat it")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--batch-size", type=int, default=8, help="completions at once; never changes the draws (8)")
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="of the model"
    )
    parser.add_argument("--device", help="where the model runs; the accelerator where there is one")
    parser.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server, as http://localhost:8000/v1")
    parser.add_argument(
        "--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable with the server's key"
    )
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time (8)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one request (60)")
    parser.add_argument("--retries", type=int, default=5, help="further attempts at a request (5)")
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
    source, tokenizer, chat = _source(arguments)
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


def _source(arguments: argparse.Namespace) -> tuple[Any, Any, bool]:
    """What answers, its tokenizer, and whether prompts are made conversations."""
    from paretune.generation import Endpoint, load

    if arguments.endpoint is not None:
        endpoint = Endpoint(
            arguments.endpoint,
            arguments.model,
            api_key_env=arguments.api_key_env,
            concurrency=arguments.concurrency,
            timeout=arguments.timeout,
            retries=arguments.retries,
        )
        return endpoint, None, not arguments.raw
    if arguments.quiet or not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
    model, tokenizer = load(arguments.model, dtype=arguments.dtype, device=arguments.device)
    return model, tokenizer, not arguments.raw and bool(tokenizer.chat_template)
