"""``paretune average fisher``: the Fisher gate, made and applied by the merge engine."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paretune.errors import ArgumentError, MismatchError

if TYPE_CHECKING:
    from torch import Tensor

    from paretune.averaging.fisher_gate import Gate
    from paretune.merging.plan import Part, Plan
    from paretune.merging.views import View

_EXAMPLES = """\
examples:
  paretune average fisher --pre sft --post aligned --preferences preferences.jsonl -o gated
  paretune average fisher --pre sft --post aligned --preferences preferences.jsonl --mode tensors --weight 3 -o gated
  paretune average fisher --pre sft --post aligned --gate gated/gate.safetensors --scale 2 -o stronger
  paretune average fisher --pre sft --preferences preferences.jsonl --as-learning-rates -o rates.safetensors
  paretune train dpo --model_name_or_path sft --learning_rate_factors rates.safetensors …

The reference's own samples stand for what it should keep; no SFT data is needed. Choose the scale by generated reward:
  paretune average dial --pre sft --post gated --prompts held-out.jsonl --reward model:reward-model
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``fisher``."""
    parser = subparsers.add_parser(
        "fisher",
        help="keep the change where preferences need it and the reference's own behaviour does not",
        description="pre + s·(post − pre)·F_p/(F_p + λF_s): F_p from the preferred answers, F_s from own samples.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pre", required=True, metavar="MODEL", help="the reference, before alignment")
    parser.add_argument("--post", metavar="MODEL", help="the policy, after it; may be missing where none is gated")
    parser.add_argument(
        "-o", "--out", required=True, metavar="OUT",
        help="the directory to write, new or empty; with --as-learning-rates the file",
    )  # fmt: skip
    parser.add_argument("--gate", metavar="FILE", help="apply this gate instead of making one")
    parser.add_argument("--preferences", metavar="FILE", help="preference pairs; the chosen answers are used")
    parser.add_argument("--pairs", type=int, default=160, help="of the preferences, at most (160)")
    parser.add_argument("--samples", type=int, default=192, help="of the reference (192)")
    parser.add_argument("--weight", type=float, default=1.0, metavar="λ", help="of the reference's own behaviour (1)")
    parser.add_argument("--mode", choices=("entries", "tensors"), default="entries", help="what one factor is for")
    parser.add_argument("--scale", type=float, default=1.0, metavar="S", help="of the gated change (1)")
    parser.add_argument("--override", action="store_true", help="also where ΣF_s/ΣF_p says that the gate fails")
    parser.add_argument("--gate-only", action="store_true", help="write OUT/gate.safetensors and no model")
    parser.add_argument(
        "--as-learning-rates", action="store_true",
        help="write OUT, factors for paretune train --learning_rate_factors; before any training",
    )  # fmt: skip
    parser.add_argument("--max-length", type=int, default=512, help="tokens kept of a preference (512)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of a sample (64)")
    parser.add_argument("--scratch", metavar="DIR", help="keep sums of squares in files there instead of memory")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (0)")
    parser.add_argument("--batch-size", type=int, default=64, help="samples at once (64)")
    parser.add_argument("--workers", type=int, help="threads that write; never changes the result")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Make the gate and apply it."""
    from paretune.averaging.fisher_gate import Gate
    from paretune.cli.average_apply import carry_out_average

    _check_out(arguments)
    if arguments.gate is not None:
        gate = Gate.load(arguments.gate)
        if not gate.trusted and not arguments.override:
            raise ArgumentError("--gate", arguments.gate, f"ΣF_s/ΣF_p is {gate.ratio:.2f}: add --override to apply it")
    else:
        gate = _made(arguments)
    file = Path(arguments.out) / "gate.safetensors"
    report: dict[str, Any] = {}
    if arguments.as_learning_rates:
        return _write_rates(gate, arguments)
    if not arguments.gate_only:
        plan = plan_gated(arguments.pre, arguments.post, gate, arguments.scale)
        plan.check()
        report = carry_out_average(plan, arguments.out, arguments.workers, arguments.quiet)
    gate.save(file)
    kept = {"ratio": gate.ratio, "weight": gate.weight, "mode": gate.mode, "scale": arguments.scale, "gate": str(file)}
    if arguments.json:
        print(json.dumps(report | kept))
        return 0
    print(f"{_said(gate)}, scale {arguments.scale:g}")
    print(arguments.out if not arguments.gate_only else file)
    return 0


def _check_out(arguments: argparse.Namespace) -> None:
    from paretune.merging.output import checked_directory

    if arguments.as_learning_rates and arguments.gate_only:
        raise ArgumentError("--gate-only", True, "--as-learning-rates writes no model either: drop one of them")
    if arguments.as_learning_rates:
        out = Path(arguments.out)
        if out.is_dir() or out.suffix != ".safetensors":
            raise ArgumentError("--out", arguments.out, "name the file to write, as rates.safetensors")
        return
    if arguments.post is None and not arguments.gate_only:
        raise ArgumentError("--post", None, "give the policy, or --gate-only, or --as-learning-rates to train with")
    checked_directory(arguments.out)


def _said(gate: Gate) -> str:
    from paretune.averaging.fisher_gate import MINIMAL_RATIO

    trust = "" if gate.trusted else f" (below {MINIMAL_RATIO:g}: not to be trusted)"
    return f"ΣF_s/ΣF_p {gate.ratio:.2f}{trust}, λ {gate.weight:g}, factors for {gate.mode}"


def _write_rates(gate: Gate, arguments: argparse.Namespace) -> int:
    gate.save_learning_rates(arguments.out)
    if arguments.json:
        said = {"ratio": gate.ratio, "weight": gate.weight, "mode": gate.mode, "learning_rates": arguments.out}
        print(json.dumps(said))
        return 0
    print(_said(gate))
    print(f"{arguments.out}: for paretune train … --learning_rate_factors {arguments.out}")
    return 0


def plan_gated(pre: str, post: str, gate: Gate, scale: float) -> Plan:
    """The merge engine's plan of pre + s·g·(post − pre).

    Args:
        pre, post: the checkpoints.
        gate: with a factor for every floating-point tensor, or for one that it is tied to.
        scale: s.
    """
    from paretune.merging.plan import make_plan
    from paretune.merging.recipe import Recipe, Slice, Source

    if not np.isfinite(scale):
        raise ArgumentError("--scale", scale, "give a finite number")
    sources = (Source(pre, None, {"weight": 0.0}), Source(post, None, {"weight": 1.0}))
    # The seed is part of a merge's identity: another gate or scale does not continue this one's partial result.
    plan = make_plan([Recipe("linear", (Slice(sources),), seed=_number(gate, scale))], [])
    return replace(plan, parts=tuple(part if part.copied else _gated(part, gate, scale) for part in plan.parts))


def _number(gate: Gate, scale: float) -> int:
    import hashlib

    digest = hashlib.sha256(f"{scale} {gate.weight} {gate.ratio}".encode())
    for name in sorted(gate.factors):
        digest.update(name.encode() + gate.factors[name].cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()[:4], "little")


def _gated(part: Part, gate: Gate, scale: float) -> Part:
    factor = gate.factors.get(part.name)
    if factor is None:
        factor = _twin(part, gate)
    if factor is None or (factor.ndim and tuple(factor.shape) != part.shape):
        raise MismatchError(f"{part.name}: the gate has no factor of its shape: was it made for this model?")
    pre, post = part.sources
    return replace(part, sources=(pre, GatedView(pre, post, factor.numpy().reshape(-1), scale)))


def _twin(part: Part, gate: Gate) -> Tensor | None:
    """The embedding's factor for a head that is stored although it is tied to it, or the other way round."""
    from paretune.layers import part_of

    kinds, sizes = {"head", "embeddings"}, gate.about.get("numel", {})
    if part_of(part.name) not in kinds:
        return None
    return next(
        (
            factor
            for name, factor in gate.factors.items()
            if part_of(name) in kinds - {part_of(part.name)}
            and (tuple(factor.shape) == part.shape or (not factor.ndim and sizes.get(name) == math.prod(part.shape)))
        ),
        None,
    )


class GatedView:
    """pre + s·g·(post − pre), computed where it is read; exact where s·g is 0 or 1.

    Args:
        pre, post: the ends.
        factor: g, [1] or [elements].
        scale: s.
    """

    def __init__(self, pre: View, post: View, factor: np.ndarray, scale: float) -> None:
        self.pre, self.post, self.factor, self.scale = pre, post, factor, scale
        self.kind, self.shape = post.kind, post.shape

    @property
    def info(self) -> Any:
        """Of the stored tensor, for messages."""
        return getattr(self.post, "info", None)

    def fill(self, start: int, stop: int, out: np.ndarray) -> None:
        low = np.empty(stop - start, np.float32)
        self.pre.fill(start, stop, low)
        self.post.fill(start, stop, out)
        share = self.scale * (self.factor[start:stop] if self.factor.size > 1 else self.factor).astype(np.float64)
        change = out.astype(np.float64) - low
        near, far = low + share * change, out - (1 - share) * change
        np.copyto(out, np.where(share < 0.5, near, far), casting="same_kind")

    def release(self, start: int, stop: int) -> None:
        self.pre.release(start, stop)
        self.post.release(start, stop)


def _made(arguments: argparse.Namespace) -> Gate:
    from paretune.averaging.fisher_gate import fisher_gate
    from paretune.averaging.own_samples import own_samples
    from paretune.generation import load

    if arguments.preferences is None:
        raise ArgumentError("--preferences", None, "give the preference pairs, or a ready --gate")
    for name in ("pairs", "samples"):
        if getattr(arguments, name) < 2:
            raise ArgumentError(f"--{name}", getattr(arguments, name), "give at least 2")
    if arguments.quiet or not sys.stderr.isatty():
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load(arguments.pre)
    chosen = chosen_answers(arguments.preferences, tokenizer, arguments.max_length)[: arguments.pairs]
    samples = own_samples(
        model,
        tokenizer,
        arguments.samples,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        progress=not arguments.quiet,
    )
    post = arguments.post
    policy = post if post is not None and os.path.isdir(post) and not _is_adapter(post) else None
    return fisher_gate(
        policy, model, chosen, samples, arguments.weight,
        mode=arguments.mode, scratch=arguments.scratch, override=arguments.override,
    )  # fmt: skip


def chosen_answers(path: str, tokenizer: Any, max_length: int) -> list[Mapping[str, Any]]:
    """The preferred answers of a preference file, tokenised."""
    from paretune.training.sequences import pair_rows, take_rows

    rows = pair_rows(take_rows(path, "dpo", name="--preferences"), tokenizer, max_length, name="--preferences")
    spans = [(int(rows.starts[i]), int(rows.starts[i + 1])) for i in range(0, len(rows), 2)]
    return [
        {"input_ids": rows.ids[a:b].tolist(), "completion_mask": rows.completion[a:b].astype(int).tolist()}
        for a, b in spans
        if rows.completion[a + 1 : b].any()
    ]


def _is_adapter(path: str) -> bool:
    from paretune.merging.adapters import is_adapter

    return is_adapter(Path(path))
