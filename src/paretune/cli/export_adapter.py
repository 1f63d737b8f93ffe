"""``paretune export-adapter``: one model out of a LoRA adapter, the model under it and the task vector."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from paretune.errors import ArgumentError, CheckpointError, MismatchError

_EXAMPLES = """\
examples:
  paretune export-adapter runs/dpo-lora -o aligned
  paretune export-adapter runs/dpo-lora -o aligned --base base-model --reference sft-model --dtype bfloat16
  paretune export-adapter runs/dpo-lora -o without-tau --gate 0

W = W_reference + s*B*A + c*(W_reference - W_base) in float32, rounded once, where LoRAMerging added tau; all else is
the reference's. In training tau had a low rank; here all of it is added.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``export-adapter``."""
    parser = subparsers.add_parser(
        "export-adapter",
        help="one model from a LoRA adapter and the task vector it was trained beside",
        description="Merge a LoRA adapter into its model and add the task vector by the gate that training reached.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="directory with adapter_config.json and tau_gate.json")
    parser.add_argument("-o", "--out", metavar="OUT", required=True, help="directory to write; must not exist")
    parser.add_argument("--base", metavar="MODEL", help="the pre-trained model; as recorded by default")
    parser.add_argument("--reference", metavar="MODEL", help="the model under the adapter; as recorded by default")
    parser.add_argument("--gate", type=float, help="the share of tau to add instead of the recorded one")
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked."""
    from paretune.merging.adapters import CONFIG, is_adapter
    from paretune.merging.api import build, carry_out
    from paretune.merging.plan import make_plan
    from paretune.merging.settings import PerTensor
    from paretune.optim.tau_adapter import Gate
    from paretune.task_vector import TaskVector

    directory = Path(arguments.adapter)
    if not is_adapter(directory):
        raise ArgumentError("adapter", arguments.adapter, f"name a directory with {CONFIG}")
    gate = Gate.read(directory)
    share = _share(arguments, gate)
    reference = arguments.reference or (gate.reference if gate else None) or _recorded_model(directory / CONFIG)
    if reference is None:
        raise ArgumentError("reference", None, "the adapter does not say which model it belongs to: name it")
    models: dict[str, Any] = {f"{reference}+{directory}": 1.0}
    if share and gate is not None:
        base = arguments.base or gate.base
        if base is None:
            raise ArgumentError(
                "base", None, "τ's base was in memory when the adapter was trained: name its checkpoint"
            )
        tau = TaskVector.between(base=base, reference=reference, base_vocab="pad")
        if tau.fingerprint != gate.fingerprint:
            raise MismatchError(
                f"{base} and {reference} give task vector {tau.fingerprint[:12]}, the adapter was trained beside "
                f"{gate.fingerprint[:12]}: name the same base and reference"
            )
        if unknown := sorted(set(gate.tensors) - set(tau)):
            raise CheckpointError(f"{directory}: the gate names {unknown[0]}, which the task vector lacks")
        names = dict.fromkeys(_names(reference, base), 0.0)
        models[reference] = {"weight": PerTensor({**names, **dict.fromkeys(gate.tensors, share)})}
        models[base] = {"weight": PerTensor({**names, **dict.fromkeys(gate.tensors, -share)})}
    recipe = build("linear", models, None, {"normalize": False}, dtype=arguments.dtype)
    report = carry_out(make_plan([replace(recipe, adds_tau=True)]), arguments.out)
    if arguments.json:
        print(json.dumps(report.to_dict() | {"gate": share}))
    else:
        print(f"{report.out}: {report.tensors} tensors, {share:.6g} of the task vector added")
    return 0


def _share(arguments: argparse.Namespace, gate: Any) -> float:
    if arguments.gate is None and gate is not None and gate.masked:
        mend = (
            f"random parts of the task vector were absorbed, whose mean is {gate.gate:.6g} times it: give that number"
        )
        raise ArgumentError("gate", None, mend)
    if arguments.gate is None:
        return 0.0 if gate is None else float(gate.gate)
    if gate is None and arguments.gate:
        raise ArgumentError(
            "gate", arguments.gate, f"{arguments.adapter} was trained without a task vector: leave it out"
        )
    return float(arguments.gate)


def _recorded_model(config: Path) -> str | None:
    try:
        name = json.loads(config.read_bytes()).get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{config}: not readable JSON ({error})") from None
    return name if isinstance(name, str) and name else None


def _names(*models: str | os.PathLike[str]) -> list[str]:
    from paretune.checkpoint import Checkpoint

    return [name for model in models for name in Checkpoint(model)]
