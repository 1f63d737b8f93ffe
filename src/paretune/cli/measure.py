"""``paretune measure``: reward and capability of models, compared with the reference item by item."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.cli.measure_text import line, listing, table
from paretune.cli.suites import add_suite, open_suite
from paretune.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    from paretune.evaluation.capability import Capability
    from paretune.evaluation.measure import Candidate, RewardSource
    from paretune.evaluation.points import Measurement

_EXAMPLES = """\
examples:
  paretune measure --list-suites
  paretune measure aligned --reference sft --suite alignment-tax --prompts prompts.jsonl --reward model:rm \\
      -o points.jsonl
  paretune measure aligned --reference sft --suite my-suite.yaml --preferences held_out.jsonl -o points.jsonl
  paretune measure --pre sft --post aligned --ratios 0,0.25,0.5,0.75,1 --reference sft --suite tiny-world \\
      --data world --prompts prompts.jsonl --reward reward.py:polite -o points.jsonl

A ratio is the share of PRE. An interrupted run goes on when the same command is given again: a point is taken over
where its weights, suite, data and reward are the same. paretune frontier draws the points.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``measure``."""
    parser = subparsers.add_parser(
        "measure",
        help="reward and capability of models, compared with the reference item by item",
        description="Measure models on a suite of benchmarks and a reward, in one process, into points.jsonl.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models = parser.add_argument_group("models")
    models.add_argument("models", nargs="*", metavar="[NAME=]MODEL", help="directories, hub ids or adapters")
    models.add_argument(
        "--reference", metavar="[NAME=]MODEL", help="the model that all are compared with, as SFT left it"
    )
    models.add_argument("--base", metavar="[NAME=]MODEL", help="the pre-trained model, as a point of its own")
    models.add_argument("--family", default="control", help="of the models: control, online, offline … (control)")
    models.add_argument("--pre", metavar="MODEL", help="with --ratios: the checkpoint before alignment")
    models.add_argument("--post", metavar="[NAME=]MODEL", help="with --ratios: the checkpoint after it")
    models.add_argument("--ratios", metavar="R,R…", help="dial one loaded model to each ratio of PRE and POST")
    models.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="of weights"
    )
    models.add_argument("--device", help="where models run; the accelerator where there is one")
    suite = parser.add_argument_group("capability")
    suite.add_argument("--list-suites", action="store_true", help="show every suite and its tasks, and do nothing else")
    add_suite(suite)
    suite.add_argument("--limit", type=int, help="only the first so many items of each task")
    reward = parser.add_argument_group("reward")
    reward.add_argument("--prompts", metavar="FILE", help="prompts that every model answers")
    reward.add_argument(
        "--reward",
        metavar="KIND:WHAT",
        help="of the answers: model:PATH, pairrm:PATH, judge:NAME@URL, rating:NAME@URL, file.py:function, "
        "module:function; of preferences: dpo-margin (default), dpo-accuracy",
    )
    reward.add_argument(
        "--raw", action="store_true", help="continue text prompts as they stand, without a chat template"
    )
    reward.add_argument(
        "--answers", metavar="DIR", type=Path, help="keep each model's answers, and judges' verdicts, here"
    )
    reward.add_argument("--max-new-tokens", type=int, default=512, help="the longest answer (512)")
    reward.add_argument("--temperature", type=float, default=0.0, help="of answers; 0 for greedy (default)")
    reward.add_argument("--top-p", type=float, default=1.0, help="of answers (1)")
    reward.add_argument("--samples", type=int, default=1, help="answers a prompt (1)")
    reward.add_argument("--seed", type=int, default=0, help="of answers (0)")
    reward.add_argument(
        "--kl",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the answers' KL to the reference, which then stays in memory beside each model",
    )
    reward.add_argument("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable with the judge's key")
    reward.add_argument("--concurrency", type=int, default=8, help="requests to a judge at a time (8)")
    reward.add_argument("--timeout", type=float, default=60.0, help="seconds for one request to a judge (60)")
    reward.add_argument("--preferences", metavar="FILE", help="pairs instead of prompts: prompt, chosen, rejected")
    reward.add_argument("--beta", type=float, default=0.1, help="of the margin (0.1)")
    parser.add_argument("-o", "--out", metavar="FILE", type=Path, help="points.jsonl to write")
    parser.add_argument(
        "--items", metavar="DIR", type=Path, help="keep each benchmark's prompts, answers and scores here"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="requests at once (8)")
    parser.add_argument("--json", action="store_true", help="print the points, without their items, as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked."""
    if arguments.quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # for bars that cannot be switched off; read when tqdm is imported
    if arguments.list_suites:
        print(listing(arguments.json))
        return 0
    suite = open_suite(arguments)
    specs = _models(arguments)
    out = _out(arguments)
    _check_device(arguments.device)
    from paretune.evaluation.capability import Benchmarks
    from paretune.evaluation.measure import measure
    from paretune.evaluation.points import write_points
    from paretune.evaluation.reward_sources import file_name

    bars = not arguments.quiet and sys.stderr.isatty()
    candidates = _candidates(arguments, specs)
    known = _known(out, [candidate.name for candidate in candidates])
    with contextlib.redirect_stdout(sys.stderr):  # benchmarks' own code prints; stdout is for the result
        reward = _reward(arguments)
        benchmarks = Benchmarks(
            suite, data=arguments.data, limit=arguments.limit, allow_code=arguments.allow_code_execution
        )

        def samples(name: str, capability: Capability) -> None:
            if arguments.items is not None:
                _write_items(arguments.items / file_name(name), capability)

        def keep(points: list[Measurement]) -> None:
            write_points(out, [*points, *_not_yet_met(known, points)])
            if not arguments.quiet:
                print(line(points[-1]), file=sys.stderr)

        points = measure(
            candidates,
            benchmarks,
            reward,
            batch_size=arguments.batch_size,
            progress=bars,
            known=known,
            keep=keep,
            samples=samples,
        )
    if arguments.json:
        print(json.dumps({"points": [_brief(point) for point in points], "out": str(out)}, ensure_ascii=False))
    else:
        print("\n".join(table(points)))
    return 0


def _models(arguments: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(name, path, family) of every model that is loaded for itself, the reference first."""
    if arguments.reference is None:
        raise ArgumentError("reference", None, "give the model that all are compared with")
    live = [name for name in ("pre", "post", "ratios") if getattr(arguments, name) is None]
    if 0 < len(live) < 3:
        raise ArgumentError(live[0], None, "pre, post and ratios belong together: give all three")
    if not arguments.models and live:
        raise ArgumentError("models", [], "give models to compare with the reference, or --pre, --post and --ratios")
    found = [(arguments.reference, "reference")]
    found += [(arguments.base, "base")] if arguments.base else []
    found += [(text, arguments.family) for text in arguments.models]
    return [(*_named(text), family) for text, family in found]


def _named(text: str) -> tuple[str, str]:
    from paretune.generation.local import check_model

    name, equals, path = text.partition("=")
    if not equals or os.path.exists(text):
        name, path = Path(text).name or text, text
    if not os.path.exists(path) and path.count("/") != 1:
        raise CheckpointError(f"{path}: there is no such model: give a directory or a hub id")
    check_model(path)
    return name, path


def _candidates(arguments: argparse.Namespace, specs: Sequence[tuple[str, str, str]]) -> list[Candidate]:
    from paretune.evaluation.measure import Candidate
    from paretune.generation import load

    opened = partial(load, dtype=arguments.dtype, device=arguments.device)
    found = [Candidate(name, family, partial(opened, path), path) for name, path, family in specs]
    if arguments.ratios is None:
        return found
    name, post = _named(arguments.post)
    _, pre = _named(arguments.pre)
    loaded: list[Any] = []

    def dialled(ratio: float) -> tuple[Any, Any]:
        from paretune.merging import LiveMerge

        if not loaded:  # one model for all ratios, loaded when the first one's turn comes
            model, tokenizer = opened(post)
            loaded.extend((model, tokenizer, LiveMerge(model, pre=pre, post=post)))
        loaded[2].set(ratio)
        return loaded[0], loaded[1]

    for ratio in _ratios(arguments.ratios):
        source = f"{ratio:g} · {pre} + {1 - ratio:g} · {post}"
        opens = partial(dialled, ratio)
        found.append(Candidate(f"{name} {ratio:g}", "offline", opens, source, {"ratio": ratio}, name, f"{ratio:g}"))
    return found


def _ratios(text: str) -> list[float]:
    try:
        ratios = [float(each) for each in text.split(",")]
    except ValueError:
        raise ArgumentError("ratios", text, "give numbers, separated by commas") from None
    if len(set(ratios)) < len(ratios) or not all(abs(ratio) < 100 for ratio in ratios):
        raise ArgumentError("ratios", text, "give finite numbers, each once")
    return ratios


def _reward(arguments: argparse.Namespace) -> RewardSource:
    from paretune.evaluation.reward import load_reward
    from paretune.evaluation.reward_sources import AnswersReward, PreferencesReward, read_pairs
    from paretune.generation import Decoding
    from paretune.generation.prompts import read_questions

    kind = arguments.reward
    if arguments.preferences is not None:
        if arguments.prompts is not None:
            raise ArgumentError("prompts", arguments.prompts, "give prompts or preferences, not both")
        if kind not in (None, "dpo-margin", "dpo-accuracy"):
            raise ArgumentError(
                "reward", kind, "preferences are scored by dpo-margin or dpo-accuracy; others want --prompts"
            )
        pairs = read_pairs(arguments.preferences)
        return PreferencesReward(pairs, arguments.beta, kind == "dpo-accuracy", arguments.batch_size)
    if arguments.prompts is None or kind is None:
        missing = "prompts" if arguments.prompts is None else "reward"
        raise ArgumentError(missing, None, "give --prompts FILE and --reward KIND:WHAT, or --preferences FILE")
    decoding = Decoding(
        arguments.max_new_tokens,
        arguments.temperature,
        arguments.top_p,
        samples=arguments.samples,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )
    questions = read_questions(arguments.prompts, chat=not arguments.raw)
    if arguments.answers is not None:
        arguments.answers.mkdir(parents=True, exist_ok=True)
    verdicts = None if arguments.answers is None else arguments.answers / "verdicts.jsonl"
    server = {name: getattr(arguments, name) for name in ("api_key_env", "concurrency", "timeout")}
    score = load_reward(kind, cache=verdicts, batch_size=arguments.batch_size, **server)
    return AnswersReward(
        questions, score, decoding, kind, arguments.answers, progress=not arguments.quiet, kl=arguments.kl
    )


def _check_device(device: str | None) -> None:
    if device is None:
        return
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ArgumentError("device", device, "give cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device", device, "there is no GPU here: leave it out, or give cpu")


def _out(arguments: argparse.Namespace) -> Path:
    if arguments.out is None:
        raise ArgumentError("out", None, "name the file of points to write, as -o points.jsonl")
    if arguments.batch_size < 1:
        raise ArgumentError("batch-size", arguments.batch_size, "give at least 1")
    out: Path = arguments.out
    if out.is_dir() or not out.parent.is_dir():
        raise ArgumentError("out", str(out), "name a file in a directory that exists")
    return out


def _known(out: Path, names: Sequence[str]) -> list[Measurement]:
    from paretune.evaluation.points import read_points

    if not out.exists():
        return []
    known = read_points(out)
    others = [point.name for point in known if point.name not in names]
    if others:
        raise ArgumentError("out", str(out), f"holds other points, such as {others[0]!r}: name another file")
    return known


def _not_yet_met(known: Sequence[Measurement], points: Sequence[Measurement]) -> list[Measurement]:
    """Points of an earlier run whose turn has not come: a run that goes on and is stopped again must not lose them."""
    names, first = {point.name for point in points}, points[0].measured
    same = ("suite_fingerprint", "data_fingerprint", "reward", "reference")
    return [p for p in known if p.name not in names and all(p.measured.get(each) == first.get(each) for each in same)]


def _write_items(folder: Path, capability: Capability) -> None:
    from paretune.atomic import write_text

    for task, rows in capability.samples.items():
        lines = (json.dumps(row, ensure_ascii=False, default=str) for row in rows)
        write_text(folder / f"{task}.jsonl", "".join(f"{line}\n" for line in lines))


def _brief(point: Measurement) -> dict[str, Any]:
    record = point.to_dict()
    return {name: value for name, value in record.items() if name not in ("reward_items", "capability_items")}
