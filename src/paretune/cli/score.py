"""``paretune score``: rewards of answers that are already written."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.errors import ArgumentError

if TYPE_CHECKING:
    from paretune.evaluation.reward import Scores
    from paretune.generation import Generation

_EXAMPLES = """\
examples:
  paretune score aligned.jsonl --reward model:my-reward-model
  paretune score aligned.jsonl --others sft.jsonl --reward judge:gpt-4o@https://api.openai.com/v1 --cache verdicts.jsonl
  paretune score answers.jsonl answers.turn2.jsonl --reward rating:gpt-4o@https://api.openai.com/v1
  paretune score samples.jsonl --reward reward.py:polite -o scores.jsonl

Answers are what paretune generate wrote, or any JSON lines or JSON list with AlpacaEval's instruction and output.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``score``."""
    parser = subparsers.add_parser(
        "score",
        help="rewards of answers that are already written",
        description="Score kept answers by a reward model, PairRM, a judge or any function, item by item.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("answers", nargs="+", metavar="FILE", help="the answers")
    parser.add_argument(
        "--reward",
        required=True,
        metavar="KIND:WHAT",
        help="model:PATH, pairrm:PATH, judge:NAME@URL, rating:NAME@URL, file.py:function or module:function",
    )
    parser.add_argument("--others", metavar="FILE", help="for pairrm and judge: another model's answers")
    parser.add_argument("--cache", metavar="FILE", help="keep a judge's verdicts here, and ask for no verdict twice")
    parser.add_argument("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable with the judge's key")
    parser.add_argument("--concurrency", type=int, default=8, help="requests to a judge at a time (8)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one request to a judge (60)")
    parser.add_argument("--batch-size", type=int, default=8, help="of models; never changes a score (8)")
    parser.add_argument("-o", "--out", metavar="FILE", help="JSON lines with index, sample, instruction and score")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked."""
    if arguments.out is not None and (Path(arguments.out).is_dir() or not Path(arguments.out).parent.is_dir()):
        raise ArgumentError("out", arguments.out, "name a file in a directory that exists")
    if arguments.quiet:
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    from paretune.evaluation.reward import load_reward, score
    from paretune.generation import read_generations

    answers = [answer for file in arguments.answers for answer in read_generations(file, "answers")]
    others = None if arguments.others is None else read_generations(arguments.others, "others")
    if arguments.quiet or not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
    server = {name: getattr(arguments, name) for name in ("api_key_env", "concurrency", "timeout")}
    reward = load_reward(arguments.reward, cache=arguments.cache, batch_size=arguments.batch_size, **server)
    if others is not None and not reward.pairwise:
        raise ArgumentError("others", arguments.others, f"{arguments.reward} scores each answer alone: leave it out")
    scores = score(answers, reward, others)
    if arguments.out is not None:
        _write(Path(arguments.out), answers, scores)
    facts = {
        "reward": scores.reward,
        "unit": scores.unit,
        "mean": None if scores.failed == len(answers) else scores.mean,
        "interval": _interval(answers, scores),
        **scores.metadata,
    }
    print(json.dumps(facts, ensure_ascii=False) if arguments.json else "\n".join(_lines(facts)))
    return 0


def _write(path: Path, answers: list[Generation], scores: Scores) -> None:
    from paretune.atomic import write_text
    from paretune.generation.decoding import instruction

    rows = (
        {"index": answer.index, "sample": answer.sample, "instruction": instruction(answer.prompt), "score": value}
        for answer, value in zip(answers, scores.values, strict=True)
    )
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _interval(answers: list[Generation], scores: Scores) -> tuple[float, float] | None:
    """95% bootstrap interval of the mean; samples of one prompt are drawn together."""
    import numpy

    from paretune.evaluation.statistics import Sample, bootstrap_interval

    scored = [(answer.index, value) for answer, value in zip(answers, scores.values, strict=True) if value is not None]
    clusters = [index for index, _ in scored]
    if len(set(clusters)) < 2:
        return None
    return bootstrap_interval([Sample(numpy.array([value for _, value in scored]), clusters)])


def _lines(facts: dict[str, Any]) -> list[str]:
    mean, interval, twin = facts["mean"], facts["interval"], facts.get("length_controlled")
    between = f"  [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""
    rows = [
        ("reward", f"{facts['reward']}, {facts['unit']}"),
        ("mean", "none could be scored" if mean is None else f"{mean:.4g}{between}"),
        ("scored", f"{facts['items'] - facts['failed']} of {facts['items']} answers"),
    ]
    if twin:
        rows.append(("at equal length", f"{twin['rate']:.2f}% ± {twin['error']:.2f}, {twin['label']}"))
    rows += [(name, f"{value:.4g}") for name, value in (facts.get("by_turn") or {}).items()]
    counts = {name: count for name, count in facts.get("counts", {}).items() if count}
    if counts:
        rows.append(("counts", ", ".join(f"{name} {count}" for name, count in counts.items())))
    if facts.get("truncated"):
        rows.append(("truncated", str(facts["truncated"])))
    width = max(len(name) for name, _ in rows) + 2
    return [f"{name:<{width}}{text}" for name, text in rows]
