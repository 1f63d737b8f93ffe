"""``paretune generate``: a model's answers to a file of prompts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.cli.answering import add_answering, open_source
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
    add_answering(parser, answer="reply", max_new_tokens=512, temperature=0.0)
    parser.add_argument("--samples", type=int, default=1, help="answers a prompt (1)")
    parser.add_argument("--name", help="the generator's name in the rows; MODEL by default")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked."""
    from paretune.generation import Decoding, generate
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
    source, tokenizer, chat = open_source(arguments)
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
