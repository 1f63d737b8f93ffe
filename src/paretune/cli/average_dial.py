"""``paretune average dial``: how far to go along a policy's change, by generated reward and what is lost."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from paretune.errors import ArgumentError

_EXAMPLES = """\
examples:
  paretune average dial --pre sft --post aligned --prompts held-out.jsonl --reward model:reward-model
  paretune average dial --pre sft --post gated --prompts held-out.jsonl --reward reward.py:function \\
      --ladder 0.5,1,1.5,2,3,4 --target 0.85 -o dial.json

Writes no model: one is dialled in memory. Then: paretune merge linear --model sft=1-s --model aligned=s -o chosen
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``dial``."""
    parser = subparsers.add_parser(
        "dial",
        help="scale a policy's change by generated reward, and stop where the reference's answers are lost",
        description="pre + s·(post − pre) along a ladder of s: reward, agreement with pre, and the s to take.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pre", required=True, metavar="MODEL", help="the reference, before alignment")
    parser.add_argument("--post", required=True, metavar="MODEL", help="the policy, gated or not")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="held-out prompts, JSON lines")
    parser.add_argument("--reward", required=True, metavar="REWARD", help="as for paretune measure")
    parser.add_argument("--ladder", default="0.25,0.5,0.75,1,1.5,2,3", metavar="S,S…", help="ascending scales")
    parser.add_argument("--target", type=float, help="the reward that is wanted; the best by default")
    parser.add_argument("--own", type=int, default=64, help="of the reference's own samples that are watched (64)")
    parser.add_argument("--least-exact", type=float, default=0.8, help="stop below this share of kept answers (0.8)")
    parser.add_argument("--largest-kl", type=float, default=0.5, help="stop above this KL, nats a token (0.5)")
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="the longest answer (256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the answers that are rewarded (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--batch-size", type=int, default=16, help="answers at once (16)")
    parser.add_argument("-o", "--out", metavar="FILE", help="write the curve as JSON")
    parser.add_argument("--json", action="store_true", help="print the curve as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Climb the ladder."""
    from paretune.atomic import write_text

    ladder = _ladder(arguments.ladder)
    if arguments.own < 2:
        raise ArgumentError("--own", arguments.own, "give at least 2 samples")
    found = climb(arguments, ladder)
    content = found.to_dict()
    if arguments.out:
        write_text(Path(arguments.out), json.dumps(content, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(content))
        return 0
    print(f"{'scale':>6}  {'reward':>20}  {'same answers':>12}  {'KL':>6}")
    for rung in found.rungs:
        low, high = rung.reward_ci
        seen = rung.agreement
        watched = ("", "") if seen is None else (f"{seen.exact:.0%}", f"{seen.kl:.3f}")
        mark = "  <" if rung.scale == found.chosen else ""
        shown = f"{rung.reward:.3f} [{low:.3f}, {high:.3f}]"
        print(f"{rung.scale:6g}  {shown:>20}  {watched[0]:>12}  {watched[1]:>6}{mark}")
    if found.stopped:
        print(f"stopped: {found.stopped}")
    print(f"scale {found.chosen:g}: {found.why}")
    return 0


def climb(arguments: argparse.Namespace, ladder: tuple[float, ...]) -> Any:
    """The dial of the command's models."""
    from paretune.averaging.dial import dial
    from paretune.evaluation.reward import load_reward, score
    from paretune.generation import Decoding, generate, load
    from paretune.generation.prompts import read_questions
    from paretune.merging import LiveMerge

    prompts = read_questions(arguments.prompts, chat=True, limit=arguments.limit).prompts
    reward = load_reward(arguments.reward)
    if reward.pairwise:
        raise ArgumentError("--reward", arguments.reward, "compares two answers: give one that scores a single one")
    model, tokenizer = load(arguments.pre)
    shared: dict[str, Any] = {"seed": arguments.seed, "batch_size": arguments.batch_size}
    decoding = Decoding(arguments.max_new_tokens, temperature=arguments.temperature, **shared)
    watched = Watched(model, tokenizer, arguments)
    live = LiveMerge(model, pre=arguments.pre, post=arguments.post)

    def rewards() -> list[float]:
        answers = generate(model, prompts, decoding, tokenizer, progress=False)
        values = score(answers, reward).values
        return [0.0 if value is None else value for value in values]

    bar = _Bar(len(ladder), arguments.quiet)
    try:
        return dial(
            lambda scale: live.set(1 - scale), rewards, watched, ladder=ladder, target=arguments.target,
            least_exact=arguments.least_exact, largest_kl=arguments.largest_kl, seed=arguments.seed, progress=bar,
        )  # fmt: skip
    finally:
        bar.close()


class Watched:
    """The reference's own samples: what they were worth to it, and how it answers their prompts."""

    def __init__(self, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
        from paretune.averaging.own_samples import own_samples
        from paretune.generation import Decoding

        self.model, self.tokenizer = model, tokenizer
        self.samples = own_samples(
            model, tokenizer, arguments.own, max_tokens=min(64, arguments.max_new_tokens), seed=arguments.seed,
            batch_size=arguments.batch_size, progress=False,
        )  # fmt: skip
        self.decoding = Decoding(min(64, arguments.max_new_tokens), batch_size=arguments.batch_size)
        # Half of a turn or a text, to be continued as the reference would.
        self.prompts = [row["input_ids"][: max(1, len(row["input_ids"]) // 2)] for row in self.samples]
        self.before, self.answers = self._logps(), self._answers()

    def __call__(self) -> Any:
        from paretune.averaging.dial import Agreement

        now, answers = self._logps(), self._answers()
        tokens = sum(sum(row["completion_mask"]) for row in self.samples)
        same = sum(a == b for a, b in zip(answers, self.answers, strict=True)) / len(answers)
        return Agreement(same, (self.before - now) / tokens)

    def _logps(self) -> float:
        import torch

        from paretune.averaging.fisher import log_probability

        with torch.no_grad():
            return sum(float(log_probability(self.model, row)) for row in self.samples)

    def _answers(self) -> list[str]:
        from paretune.generation import generate

        made = generate(self.model, self.prompts, self.decoding, self.tokenizer, progress=False)
        return [each.text for each in made]


class _Bar:
    def __init__(self, total: int, quiet: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc="dial", file=sys.stderr, disable=True if quiet else None)

    def __call__(self, done: int, of: int) -> None:
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def _ladder(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError:
        raise ArgumentError("--ladder", text, "give numbers separated by commas") from None
