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

from paretune.cli.main import OneLineParser
from paretune.cli.train_arguments import EXAMPLES, TRAINERS, Parsed, parse
from paretune.errors import ArgumentError

if TYPE_CHECKING:
    from paretune.training.request import Request


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``train``; TRL is imported only once one of its trainers is chosen."""
    parser = subparsers.add_parser(
        "train",
        help="align a model: DPO, KTO, SFT or GRPO with any of our optimizers",
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

    get("cli")  # lets what the run says reach stderr
    parsed.request.notices += _notices(parsed)
    if not sys.stderr.isatty():
        _hide_loading_bars()
    # Trainers print their logs on stdout; it belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        result, lines = _dispatch(parsed)
    if os.environ.get("RANK", "0") == "0":  # one process speaks for all
        print(json.dumps(result, ensure_ascii=False) if parsed.json else "\n".join(lines))
    return 0


def _dispatch(parsed: Parsed) -> tuple[Any, list[str]]:
    from paretune.cli.method import build_method

    if parsed.sweep:
        return _sweep(parsed)
    from paretune.training.build import check_model

    request = parsed.request
    if not parsed.dry_run or _model_is_local(request):
        check_model(request)
    if parsed.dry_run:
        from paretune.training.plan import make_plan

        plan = make_plan(request, build_method(request, planning=True))
        return plan.to_dict(), plan.lines()
    from paretune.training.runs import run

    record = run(request, build_method(request)).record
    return record, _summary(record)


def _sweep(parsed: Parsed) -> tuple[Any, list[str]]:
    from paretune.cli.method import build_method
    from paretune.training.records import as_plain
    from paretune.training.resume import last_checkpoint
    from paretune.training.runs import run
    from paretune.training.sweep import SWEEP_RECORDS, parse_axes, points, run_sweep, settings_digest

    request = parsed.request
    known = {name for part in (request.script, request.training, request.model, request.own) for name in as_plain(part)}
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
        return parse(request.trainer, _without_sweep(parsed.argv), overrides)

    def train(point: dict[str, str], directory: Path) -> dict[str, Any]:
        here = parse_point(point, directory).request
        record = run(here, build_method(here)).record
        _release_memory()
        return record

    grid = points(axes)
    # Every point is parsed before the first is trained: a bad value must not surface after hours.
    parsed_points = [parse_point(point, output / "point") for point in grid]
    if parsed.dry_run:
        from paretune.training.plan import make_plan

        plans = [make_plan(each.request, build_method(each.request, planning=True)) for each in parsed_points]
        result = [{"point": point, **plan.to_dict()} for point, plan in zip(grid, plans, strict=True)]
        lines = [
            line
            for point, plan in zip(grid, plans, strict=True)
            for line in (_point_name(point) + ":", *(f"  {text}" for text in plan.lines()))
        ]
        return result, lines
    digest = settings_digest({name: value for name, value in request.given.items() if name not in axes})
    found = run_sweep(grid, output, digest, train)
    lines = [f"{_point_name(record['point'])}: {_metrics_line(record['metrics'])}" for record in found]
    return found, [*lines, f"{len(found)} points in {output / SWEEP_RECORDS}"]


def _summary(record: dict[str, Any]) -> list[str]:
    lines = [f"{record['trainer']} with {record['optimizer']['name']}: {record['steps']} steps"]
    if record["optimizer"]["statement"]:
        lines.append(record["optimizer"]["statement"])
    return [*lines, _metrics_line(record["metrics"]), f"saved in {record['output_dir']}"]


def _metrics_line(metrics: dict[str, Any]) -> str:
    shown = [f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float)]
    return ", ".join(shown)


def _point_name(point: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in point.items())


def _notices(parsed: Parsed) -> list[str]:
    found = list(parsed.overridden)
    if parsed.cpu_defaults:
        settings = ", ".join(f"{name}={str(value).lower()}" for name, value in parsed.cpu_defaults.items())
        found.append(f"training on the CPU, so these unset arguments become {settings}")
    request = parsed.request
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
