"""``paretune average dial``: how far to go along a policy's change, by generated reward and what is lost."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.cli.suites import add_suite, open_suite
from paretune.errors import ArgumentError

if TYPE_CHECKING:
    from paretune.averaging.dial import Dialled, Skills
    from paretune.evaluation.capability import Benchmarks

_EXAMPLES = """\
examples:
  paretune average dial --pre sft --post aligned --prompts held-out.jsonl --reward model:reward-model
  paretune average dial --pre sft --post gated --prompts held-out.jsonl --reward reward.py:function \\
      --ladder 0.5,1,1.5,2,3,4 --target 0.85 -o dial.json
  paretune average dial --pre sft --post sft+adapter --prompts held-out.jsonl --reward model:reward-model \
      --suite alignment-tax --suite-limit 100 --plot dial.svg

--post is any model that belongs to --pre: merged, averaged, gated, an adapter (MODEL+ADAPTER). With a suite, skills are
measured at every scale and shown beside the reference's; the choice never uses them.

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
    suite = parser.add_argument_group("skills")
    add_suite(suite)
    suite.add_argument("--suite-limit", type=int, metavar="N", help="only the first so many items of each task")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="the longest answer (256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the answers that are rewarded (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--batch-size", type=int, default=16, help="answers at once (16)")
    parser.add_argument("-o", "--out", metavar="FILE", help="write the curve as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw the curve (.svg, .png or .pdf)")
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
    if arguments.plot is not None:
        _check_picture(arguments.plot)
    with contextlib.redirect_stdout(sys.stderr):  # benchmarks' own code prints; stdout is for the result
        found = climb(arguments, ladder)
    content = found.to_dict()
    if arguments.out:
        write_text(Path(arguments.out), json.dumps(content, indent=1) + "\n")
    if arguments.plot is not None:
        from paretune.averaging.dial_picture import save_dial_picture

        save_dial_picture(found, arguments.plot)
    print(json.dumps(content) if arguments.json else "\n".join(table(found)))
    return 0


def table(found: Dialled) -> list[str]:
    """The curve for a person: the reference first where its skills were measured."""
    skilled = found.reference is not None
    lines = [_row("scale", "reward", "skills" if skilled else None, "same answers", "KL")]
    for rung in [*([] if found.reference is None else [found.reference]), *found.rungs]:
        skills = None if rung.skills is None else _interval(rung.skills.mean, rung.skills.ci)
        seen = rung.agreement
        watched = ("", "") if seen is None else (f"{seen.exact:.0%}", f"{seen.kl:.3f}")
        mark = "  <" if rung.scale == found.chosen else "  (pre)" if rung.scale == 0 else ""
        lines.append(_row(f"{rung.scale:g}", _interval(rung.reward, rung.reward_ci), skills, *watched) + mark)
    if found.stopped:
        lines.append(f"stopped: {found.stopped}")
    return [*lines, f"scale {found.chosen:g}: {found.why}"]


def _row(scale: str, reward: str, skills: str | None, exact: str, kl: str) -> str:
    middle = "" if skills is None else f"{skills:>20}  "
    return f"{scale:>6}  {reward:>20}  {middle}{exact:>12}  {kl:>6}".rstrip()


def _interval(mean: float, ci: tuple[float, float]) -> str:
    return f"{mean:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]"


def climb(arguments: argparse.Namespace, ladder: tuple[float, ...]) -> Dialled:
    """The dial of the command's models."""
    from paretune.averaging.agreement import OwnAnswers
    from paretune.averaging.dial import dial
    from paretune.averaging.own_samples import own_samples
    from paretune.evaluation.reward import load_reward, score
    from paretune.generation import Decoding, generate, load
    from paretune.generation.prompts import read_questions
    from paretune.merging import LiveMerge

    prompts = read_questions(arguments.prompts, chat=True, limit=arguments.limit).prompts
    benchmarks = _benchmarks(arguments)
    reward = load_reward(arguments.reward)
    if reward.pairwise:
        raise ArgumentError("--reward", arguments.reward, "compares two answers: give one that scores a single one")
    if arguments.quiet or not sys.stderr.isatty():
        import transformers

        transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load(arguments.pre)
    live = LiveMerge(model, pre=arguments.pre, post=arguments.post)
    if benchmarks is not None:
        benchmarks.check(model, tokenizer)
    shared: dict[str, Any] = {"seed": arguments.seed, "batch_size": arguments.batch_size}
    decoding = Decoding(arguments.max_new_tokens, temperature=arguments.temperature, **shared)
    longest = min(64, arguments.max_new_tokens)
    samples = own_samples(model, tokenizer, arguments.own, max_tokens=longest, progress=False, **shared)
    watched = OwnAnswers(model, tokenizer, samples, max_tokens=longest, batch_size=arguments.batch_size)

    def rewards() -> list[float]:
        answers = generate(model, prompts, decoding, tokenizer, progress=False)
        values = score(answers, reward).values
        return [0.0 if value is None else value for value in values]

    def skills() -> Skills:
        return _skills(benchmarks, model, tokenizer, arguments.batch_size)

    bar = _Bar(len(ladder), arguments.quiet)
    try:
        return dial(
            lambda scale: live.set(1 - scale), rewards, watched, None if benchmarks is None else skills, ladder=ladder,
            target=arguments.target, least_exact=arguments.least_exact, largest_kl=arguments.largest_kl,
            seed=arguments.seed, progress=bar,
        )  # fmt: skip
    finally:
        bar.close()


def _benchmarks(arguments: argparse.Namespace) -> Benchmarks | None:
    if arguments.suite is None:
        for name in ("data", "only", "skip", "suite_limit", "chat_template", "allow_code_execution"):
            if getattr(arguments, name) not in (None, False):
                flag = f"--{name.replace('_', '-')}"
                raise ArgumentError(flag, str(getattr(arguments, name)), "is of a suite: give --suite as well")
        return None
    from paretune.evaluation.capability import Benchmarks

    suite = open_suite(arguments)
    return Benchmarks(
        suite, data=arguments.data, limit=arguments.suite_limit, allow_code=arguments.allow_code_execution
    )


def _skills(benchmarks: Any, model: Any, tokenizer: Any, batch_size: int) -> Skills:
    from paretune.averaging.dial import Skills
    from paretune.evaluation.paired import measurement
    from paretune.evaluation.points import ItemScores

    items = benchmarks.measure(model, tokenizer, batch_size=batch_size, progress=False).items
    unrewarded = ItemScores.of([0.0, 0.0], "ab")  # the reward is the dial's own
    found = measurement("dialled", "offline", unrewarded, items)
    return Skills(found.capability, found.capability_ci, found.capability_by_category)


def _check_picture(path: str) -> None:
    from paretune.averaging.picture import FORMATS

    if Path(path).suffix not in FORMATS or not Path(path).absolute().parent.is_dir():
        raise ArgumentError("--plot", path, f"name a file ending in {', '.join(FORMATS)} in a directory that exists")


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
