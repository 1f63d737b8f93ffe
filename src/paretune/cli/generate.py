"""``paretune generate``: a model's answers to a file of prompts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.errors import ArgumentError

if TYPE_CHECKING:
    from paretune.generation import Generation

_EXAMPLES = """\
examples:
  paretune generate aligned --prompts alpaca_eval.json -o aligned.jsonl
  paretune generate aligned --prompts prompts.jsonl -o samples.jsonl --temperature 0.7 --top-p 0.9 --samples 4
  paretune generate my-model --endpoint http://localhost:8000/v1 --prompts prompts.jsonl -o answers.jsonl
  paretune generate aligned --prompts mt_bench.jsonl -o answers.jsonl     # also writes answers.turn2.jsonl

Prompts are JSON lines or a JSON list (also .gz) with instruction (AlpacaEval), prompt or messages (TRL), or turns
(MT-Bench). The answers have AlpacaEval's fields instruction, output and generator. An interrupted run goes on when the
same command is given again.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``generate``."""
    parser = subparsers.add_parser(
        "generate",
        help="a model's answers to a file of prompts, kept for rewards and judges",
        description="Answer prompts with a model or an OpenAI-compatible server; batched, reproducible, resumable.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a directory, hub id or adapter; with --endpoint its name there")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="the prompts")
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="the JSON lines to write")
    parser.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server, as http://localhost:8000/v1")
    parser.add_argument(
        "--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable with the server's key"
    )
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time (8)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one request (60)")
    parser.add_argument("--retries", type=int, default=5, help="further attempts at a request (5)")
    parser.add_argument("--raw", action="store_true", help="continue text as it stands, without the chat template")
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="the longest answer (512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the smallest set of this probability (1)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest tokens (0: all)")
    parser.add_argument("--samples", type=int, default=1, help="answers a prompt (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; repeat it")
    parser.add_argument("--batch-size", type=int, default=8, help="answers at once; never changes the draws (8)")
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="of the model"
    )
    parser.add_argument("--device", help="where the model runs; the accelerator where there is one")
    parser.add_argument("--name", help="the generator's name in the rows; MODEL by default")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked."""
    import transformers

    from paretune.generation import Decoding, Endpoint, generate, load
    from paretune.generation.prompts import continued, read_questions

    decoding = Decoding(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        samples=arguments.samples,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        stop=tuple(arguments.stop),
    )
    if arguments.limit is not None and arguments.limit < 1:
        raise ArgumentError("limit", arguments.limit, "give at least 1")
    out = Path(arguments.out)
    if out.is_dir() or not out.parent.is_dir():
        raise ArgumentError("out", arguments.out, "name a file in a directory that exists")
    # What can be refused is refused before a model is loaded.
    if read_questions(arguments.prompts, chat=True, limit=arguments.limit).second and decoding.samples > 1:
        raise ArgumentError("samples", decoding.samples, "the prompts have two turns: give 1")
    source: Any
    if arguments.endpoint is None:
        if arguments.quiet or not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        source, tokenizer = load(arguments.model, dtype=arguments.dtype, device=arguments.device)
        chat = not arguments.raw and bool(tokenizer.chat_template)
    else:
        source = Endpoint(
            arguments.endpoint,
            arguments.model,
            api_key_env=arguments.api_key_env,
            concurrency=arguments.concurrency,
            timeout=arguments.timeout,
            retries=arguments.retries,
        )
        tokenizer, chat = None, not arguments.raw
    questions = read_questions(arguments.prompts, chat=chat, limit=arguments.limit)
    common = {"name": arguments.name or arguments.model, "progress": not arguments.quiet}
    answers = generate(source, questions.prompts, decoding, tokenizer, out, **common)
    files, written = [out], list(answers)
    if questions.second:
        files.append(out.with_name(f"{out.stem}.turn2{out.suffix}"))
        written += generate(source, continued(answers, questions.second), decoding, tokenizer, files[1], **common)
    _report(written, files, arguments.json)
    return 0


def _report(answers: list[Generation], files: list[Path], as_json: bool) -> None:
    lengths = [answer.tokens for answer in answers if answer.tokens is not None]
    facts: dict[str, Any] = {
        "files": [str(file) for file in files],
        "answers": len(answers),
        "finished": sum(answer.finished for answer in answers) / len(answers),
        "mean_tokens": sum(lengths) / len(lengths) if lengths else None,
    }
    if as_json:
        print(json.dumps(facts))
        return
    length = f", {facts['mean_tokens']:.1f} tokens on average" if lengths else ""
    print(f"{facts['answers']} answers, {100 * facts['finished']:.0f}% ended by themselves{length}")
    print("\n".join(facts["files"]))
