"""``paretune merge``: merge checkpoints on disk by a method and models, or by a mergekit recipe."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from paretune.errors import ArgumentError

if TYPE_CHECKING:
    from paretune.merging.plan import Plan

_EXAMPLES = """\
examples:
  paretune merge linear --model sft=0.3 --model aligned=0.7 -o merged
  paretune merge ties --model math=0.5 --model code=0.5 --base base-model --density 0.2 -o merged
  paretune merge linear --model sft --model aligned --sweep weight=0.1:0.9:0.1 -o sweep
  paretune merge linear --model sft --model aligned --pivots 10,20 --ratios 0.4,0.3,0.2 -o merged
  paretune merge recipe.yaml merged --dry-run

An interrupted merge goes on when the same command is given again.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``merge``."""
    parser = subparsers.add_parser(
        "merge",
        help="merge checkpoints: linear, DARE, TIES, SLERP … or a mergekit recipe",
        description="Merge safetensors checkpoints in bounded memory; mergekit's YAML is read as it is.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("method", metavar="METHOD|RECIPE.yaml", help="a merge method, or a mergekit YAML file")
    parser.add_argument("output", nargs="?", metavar="OUT", help="the directory to write; the same as -o")
    parser.add_argument("-o", "--out", help="the directory to write: new or empty")
    parser.add_argument("--model", action="append", metavar="PATH[=WEIGHT]", help="a model and its weight; repeat it")
    parser.add_argument("--base", help="base model of the task vectors")
    parser.add_argument("--density", type=float, help="kept fraction of every task vector, in (0, 1]")
    parser.add_argument("--scale", type=float, help="factor of the merged task vector (mergekit's lambda)")
    parser.add_argument("--t", type=float, help="slerp: where between the two models, in [0, 1]")
    parser.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="divide by the sum of weights")
    parser.add_argument("--rescale", choices=("none", "expectation", "l1"), help="of sparsified task vectors")
    parser.add_argument("--pivots", metavar="N,N…", help="linear: last layer of each block but the last")
    parser.add_argument("--ratios", metavar="R,R…", help="linear: the first model's share of each block")
    for part in ("head", "embeddings", "norms"):
        parser.add_argument(f"--{part}", type=float, help=f"linear: the first model's share of the {part}")
    parser.add_argument(
        "--sweep",
        action="append",
        metavar="NAME=FIRST:LAST:STEP",
        help="vary weight, density, lambda or t: one model a value, all in one read",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random masks (0)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of the result; as stored if unset")
    parser.add_argument("--tokenizer-source", metavar="base|union|MODEL", help="whose vocabulary the result gets")
    parser.add_argument("--vocab", choices=("strict", "pad", "truncate"), default="strict", help="unequal vocabularies")
    parser.add_argument("--allow-non-finite", action="store_true", help="merge NaN and infinity as they are")
    parser.add_argument("--workers", type=int, help="threads; never changes the result")
    parser.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="largest output file, as 500MB or 5GB (5GB)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress, no notes")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked."""
    # Merging brings its own threads, and BLAS has next to nothing to do in it.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from paretune.log import get
    from paretune.merging.api import carry_out
    from paretune.merging.output import checked_directory

    out = _out(arguments)
    checked_directory(out)
    plan = _plan(arguments)
    if arguments.dry_run:
        print(json.dumps(_plan_dict(plan, arguments)) if arguments.json else "\n".join(_plan_lines(plan, arguments)))
        plan.check()
        return 0
    logger = get("merging")
    if arguments.quiet:
        logger.setLevel("WARNING")
    bar = None if arguments.quiet else _Bar()
    try:
        report = carry_out(
            plan, out, workers=arguments.workers, allow_non_finite=arguments.allow_non_finite, progress=bar
        )
    except KeyboardInterrupt:
        print(f"\nparetune: {out} is unfinished: the same command goes on", file=sys.stderr)
        raise
    finally:
        if bar is not None:
            bar.close()
    if arguments.json:
        print(json.dumps(report.to_dict()))
        return 0
    rate = report.bytes_read / max(report.seconds, 1e-9)
    print(f"{report.tensors} tensors in {report.seconds:.1f} s, {_bytes(rate)}/s read")
    for result in report.results:
        print(result)
    return 0


def _out(arguments: argparse.Namespace) -> str:
    given = [each for each in (arguments.out, arguments.output) if each is not None]
    if len(given) != 1:
        raise ArgumentError("out", given or None, "name the output directory once")
    return given[0]


def _plan(arguments: argparse.Namespace) -> Plan:
    from paretune.merging.api import build, swept
    from paretune.merging.plan import make_plan
    from paretune.merging.recipe import load
    from paretune.merging.settings import Partwise

    if arguments.method.endswith((".yaml", ".yml")):
        for name in ("model", "base", "density", "scale", "t", "normalize", "rescale", "pivots", "ratios", "dtype"):
            value = getattr(arguments, name)
            if value is not None:
                raise ArgumentError(name, value, "the recipe says it: change it there")
        recipe = load(arguments.method, seed=arguments.seed, vocab=arguments.vocab)
    else:
        partwise = None
        if arguments.ratios is not None or arguments.pivots is not None:
            ratios = tuple(_numbers("ratios", arguments.ratios or ""))
            pivots = tuple(int(number) for number in _numbers("pivots", arguments.pivots or ""))
            parts = {name: getattr(arguments, name) for name in ("head", "embeddings", "norms")}
            partwise = Partwise(ratios, pivots, **parts)
        common = {name: getattr(arguments, name) for name in ("density", "t", "normalize", "rescale")}
        recipe = build(
            arguments.method,
            dict(_model(text) for text in arguments.model or []),
            arguments.base,
            common | {"lambda": arguments.scale},
            arguments.seed,
            arguments.dtype,
            arguments.tokenizer_source,
            arguments.vocab,
            partwise,
        )
    sweep = dict(_sweep(text) for text in arguments.sweep or [])
    recipes, labels = swept(recipe, sweep)
    return make_plan(recipes, labels, _size(arguments.shard_size))


def _model(text: str) -> tuple[str, Any]:
    path, equals, weight = text.rpartition("=")
    if not equals or os.path.exists(text):
        return text, None
    values = _numbers("model", weight, text)
    return path, values[0] if len(values) == 1 else values


def _numbers(argument: str, text: str, shown: str | None = None) -> list[float]:
    try:
        return [float(each) for each in text.split(",")] if text else []
    except ValueError:
        raise ArgumentError(argument, shown or text, "give numbers, separated by commas") from None


def _sweep(text: str) -> tuple[str, list[float]]:
    name, equals, values = text.partition("=")
    mend = "write NAME=FIRST:LAST:STEP or NAME=VALUE,VALUE…"
    if not equals or not name:
        raise ArgumentError("sweep", text, mend)
    if ":" not in values:
        return name, _numbers("sweep", values, text)
    try:
        first, last, step = (float(each) for each in values.split(":"))
    except ValueError:
        raise ArgumentError("sweep", text, mend) from None
    if not step > 0 or not first <= last < first + 10_000 * step:
        raise ArgumentError("sweep", text, "the step must be positive, and lead from FIRST to LAST")
    count = int((last - first) / step + 1e-6) + 1
    return name, [round(first + i * step, 10) for i in range(count)]


def _size(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1, "": 1}
    number = text.strip().rstrip("BKMGIbkmgi")
    unit = text.strip()[len(number) :].upper()
    try:
        size = float(number) * units[unit]
    except (ValueError, KeyError):
        raise ArgumentError("shard-size", text, "write a size as 500MB or 5GB") from None
    if not 1 <= size < 2**60:
        raise ArgumentError("shard-size", text, "write a size as 500MB or 5GB")
    return int(size)


def _plan_dict(plan: Plan, arguments: argparse.Namespace) -> dict[str, Any]:
    from paretune.merging.stream import default_workers

    workers = arguments.workers or default_workers()
    return {
        "method": plan.recipe.method,
        "models": list(plan.models),
        "results": len(plan.recipes),
        "tensors": len(plan.parts),
        "files": [shard.name for shard in plan.shards],
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "memory": plan.memory(workers),
        "seconds": round(plan.seconds(workers), 1),
        "notes": list(plan.notes),
        "mismatches": list(plan.problems),
    }


def _plan_lines(plan: Plan, arguments: argparse.Namespace) -> list[str]:
    facts = _plan_dict(plan, arguments)
    files = facts["files"]
    rows = [
        ("method", f"{facts['method']} ({plan.rule.paper})"),
        *((("model", f"{name}  {_bytes(model.bytes)}") for name, model in plan.models.items())),
        ("results", f"{facts['results']}: {', '.join(plan.labels)}" if plan.labels else "1"),
        ("tensors", str(facts["tensors"])),
        ("files", files[0] if len(files) == 1 else f"{len(files)}: {files[0]} …"),
        ("to read", _bytes(facts["bytes_read"])),
        ("to write", _bytes(facts["bytes_written"])),
        ("memory", f"at most {facts['memory'] / 1e6:.0f} MB"),
        ("time", f"about {facts['seconds']:.0f} s with the models in the page cache"),
        *(("note", note) for note in plan.notes),
        *(("mismatch", problem) for problem in plan.problems or ["none"]),
    ]
    return [f"{name:<10}{text}" for name, text in rows]


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


class _Bar:
    """Progress on stderr: bytes, rate, time left; a line now and then where stderr is no terminal."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._shown = 0.0
        self._first: int | None = None
        self._lock = threading.Lock()
        self._live = sys.stderr.isatty()

    def __call__(self, read: int, total: int) -> None:
        now = time.monotonic()
        with self._lock:
            if self._first is None:
                self._first = read  # what an interrupted run had done is not this run's rate
            if now - self._shown < (0.2 if self._live else 10) and not (self._live and read == total):
                return
            self._shown = now
            elapsed = max(now - self._started, 1e-9)
            rate = (read - self._first) / elapsed
            left = f"{(total - read) / rate:.0f} s left" if rate > 0 else "…"
            text = f"{_bytes(read)} of {_bytes(total)}, {_bytes(rate)}/s, {left}"
            print(
                f"\r{text:<60}" if self._live else f"paretune: {text}", end="" if self._live else "\n", file=sys.stderr
            )
            sys.stderr.flush()

    def close(self) -> None:
        """End the line."""
        if self._live and self._shown:
            print(file=sys.stderr)
