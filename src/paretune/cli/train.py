"""``paretune train``: TRL's flags and YAML files, ours beside them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.cli import train_joint
from paretune.cli.main import OneLineParser
from paretune.cli.train_arguments import EXAMPLES, TRAINERS, Parsed, parse
from paretune.errors import ArgumentError

if TYPE_CHECKING:
    from paretune.training.request import Request


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``train``; TRL is imported only once one of its trainers is chosen."""
    parser = subparsers.add_parser(
        "train",
        help="align a model: DPO, KTO, SFT, GRPO or SFT and preferences jointly, with any of our optimizers",
        description="Train with TRL. All of TRL's flags and its YAML --config work unchanged, ours beside them.",
        epilog=EXAMPLES.format(name="dpo", data="preferences.jsonl"),
    )
    trainers = parser.add_subparsers(
        title="trainers", dest="trainer", metavar="TRAINER", required=True, parser_class=_Deferred
    )
    for name, help in TRAINERS.items():
        trainers.add_parser(name, help=help, add_help=False)
    return parser


class _Deferred(OneLineParser):
    """Takes the rest of the command line as it is and has TRL's parser read it."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        namespace = argparse.Namespace() if namespace is None else namespace
        trainer = self.prog.rsplit(" ", 1)[-1]
        parsed = parse(trainer, list(args or []))
        namespace.run = lambda _: run_command(parsed)
        return namespace, []


def run_command(parsed: Parsed) -> int:
    """Do what was asked: plan, sweep or train."""
    from paretune.log import get
    from paretune.training.trl_classes import quiet_deprecations

    get("cli")  # lets what the run says reach stderr
    if not sys.stderr.isatty():
        _hide_loading_bars()
    # Trainers print their logs on stdout; it belongs to the result.
    with contextlib.redirect_stdout(sys.stderr), quiet_deprecations():
        result, lines = _dispatch(parsed)
    if os.environ.get("RANK", "0") == "0":  # one process speaks for all
        print(json.dumps(result, ensure_ascii=False) if parsed.json else "\n".join(lines))
    return 0


def _dispatch(parsed: Parsed) -> tuple[Any, list[str]]:
    from paretune.cli.method import build_method

    if parsed.sweep:
        return _sweep(parsed)
    from paretune.training.build import check_model
    from paretune.training.unread import check_read

    request = parsed.request
    check_read([request])
    request.notices += _notices(parsed)
    if not parsed.dry_run or _model_is_local(request):
        check_model(request)
    if parsed.dry_run:
        from paretune.training.plan import make_plan

        plan = make_plan(request, build_method(request, planning=True))
        return plan.to_dict(), plan.lines()
    from paretune.training.runs import run

    if train_joint.wants_ideals(request):
        notices = request.notices
        request = parse("joint", parsed.argv, train_joint.measure_ideals(parsed, parsed.argv)).request
        request.notices = notices
    record = run(request, build_method(request)).record
    return record, _summary(record)


def _sweep(parsed: Parsed) -> tuple[Any, list[str]]:
    from paretune.cli.method import build_method
    from paretune.log import get
    from paretune.training.records import as_plain
    from paretune.training.resume import last_checkpoint
    from paretune.training.runs import run
    from paretune.training.sweep import SWEEP_RECORDS, parse_axes, points, run_sweep, settings_digest
    from paretune.training.unread import check_read

    request = parsed.request
    known = {name for part in (request.script, request.training, request.model, request.own) for name in as_plain(part)}
    known |= train_joint.swept_names(request)
    axes = parse_axes(parsed.sweep, known)
    output = Path(str(request.training.output_dir))
    resume = str(request.training.resume_from_checkpoint or "").lower()
    if resume not in ("", "true", "false", "none"):
        raise ArgumentError(
            "resume_from_checkpoint", resume, "a sweep has one checkpoint a point; write true to resume unfinished ones"
        )

    def parse_point(point: dict[str, str], directory: Path) -> Parsed:
        overrides = [f"--{name}={value}" for name, value in point.items()] + [f"--output_dir={directory}"]
        can_resume = resume == "true" and last_checkpoint(directory) is not None
        overrides.append(f"--resume_from_checkpoint={'true' if can_resume else 'false'}")
        return parse(request.trainer, without_sweep, [*overrides, *ideals])

    def train(point: dict[str, str], directory: Path) -> dict[str, Any]:
        own = parse_point(point, directory)
        here = own.request
        here.notices += [text for text in _notices(own) if text not in said]
        record = run(here, build_method(here)).record
        _release_memory()
        return record

    without_sweep = _without_sweep(parsed.argv)
    ideals: list[str] = []
    grid = points(axes)
    # Every point is parsed before the first is trained: a bad value must not surface after hours.
    parsed_points = [parse_point(point, output / "point") for point in grid]
    check_read([each.request for each in parsed_points])
    for each in parsed_points:
        each.request.notices += _notices(each)
    said = _in_all([each.request.notices for each in parsed_points])  # once for all points
    if parsed.dry_run:
        from paretune.training.plan import make_plan

        plans = [make_plan(each.request, build_method(each.request, planning=True)) for each in parsed_points]
        result = [{"point": point, **plan.to_dict()} for point, plan in zip(grid, plans, strict=True)]
        # What holds at every point is said once.
        shared = [f"note: {note}" for note in _in_all([plan.notes for plan in plans])]
        lines = []
        for point, plan in zip(grid, plans, strict=True):
            lines.append(_point_name(point) + ":")
            lines += [f"  {text}" for text in plan.lines() if text not in shared]
        return result, [*lines, *shared]
    for notice in said:
        get("cli").info(notice)
    digest = settings_digest({name: value for name, value in request.given.items() if name not in axes})
    if train_joint.wants_ideals(request):
        ideals += train_joint.measure_ideals(parsed, without_sweep)
    found = run_sweep(grid, output, digest, train)
    lines = [f"{_point_name(record['point'])}: {_point_line(record)}" for record in found]
    return found, [*lines, *train_joint.draw(found, output), f"{len(found)} points in {output / SWEEP_RECORDS}"]


def _summary(record: dict[str, Any]) -> list[str]:
    from paretune.training.records import count_steps

    lines = [f"{record['trainer']} with {record['optimizer']['name']}: {count_steps(record)} steps"]
    if record["optimizer"]["statement"]:
        lines.append(record["optimizer"]["statement"])
    lines.append(_metrics_line(record["metrics"]))
    lines += train_joint.summary(record)
    covered = record.get("metrics_cover_steps")
    if covered and covered[0] > 1:
        lines.append(f"resumed: the metrics of training cover steps {covered[0]} to {covered[1]}")
    return [*lines, f"saved in {record['output_dir']}"]


def _metrics_line(metrics: dict[str, Any]) -> str:
    shown = [f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float)]
    return ", ".join(shown)


def _point_line(record: dict[str, Any]) -> str:
    """What points are compared by; ``sweep.jsonl`` has all of it."""
    if "losses" in record:
        losses = record["losses"]
        return train_joint.losses_line(losses.get("eval") or losses["train"])
    values = dict(record["metrics"])
    if "eval_reward" not in values and "reward" in record["last_log"]:
        values["last reward"] = record["last_log"]["reward"]
    shown = ("train_loss", "eval_loss", "eval_rewards/accuracies", "eval_reward", "last reward")
    found = {name: values[name] for name in shown if name in values}
    # A number that is not finite is a string in records.
    return ", ".join(
        f"{name} {value}" if isinstance(value, str) else f"{name} {value:.4g}" for name, value in found.items()
    )


def _in_all(lists: list[list[str]]) -> list[str]:
    """The texts of the first list that are in every other too."""
    return [text for text in lists[0] if all(text in others for others in lists)] if lists else []


def _point_name(point: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in point.items())


def _notices(parsed: Parsed) -> list[str]:
    from paretune.training.joint_arguments import idle_settings

    found = list(parsed.overridden)
    if parsed.cpu_defaults:
        settings = ", ".join(f"{name}={str(value).lower()}" for name, value in parsed.cpu_defaults.items())
        found.append(f"training on the CPU, so these unset arguments become {settings}")
    request = parsed.request
    if request.trainer == "joint":
        found += idle_settings(request.script, request.given)
    if request.trainer == "grpo" and not getattr(request.training, "beta", 0):
        found.append("grpo's beta is 0, TRL's default: no KL term holds the policy to the reference (--beta 0.04)")
    return found


def _without_sweep(argv: list[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for text in argv:
        if skip:
            skip = False
        elif text == "--sweep":
            skip = True
        elif not text.startswith("--sweep="):
            kept.append(text)
    return kept


def _model_is_local(request: Request) -> bool:
    from paretune.training.plan import is_at_hand

    return is_at_hand(request.model_path)


def _hide_loading_bars() -> None:
    """Bars of a second that would fill a log file; the training's own stays (``--disable_tqdm`` is TRL's)."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _release_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
