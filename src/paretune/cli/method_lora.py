"""``--use_peft --optimizer ondare``: the task vector beside a LoRA adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from paretune.errors import ArgumentError
from paretune.optim import LoRAMerging
from paretune.optim.lora import lora_statement, lora_weight
from paretune.optim.tau_adapter import adapted_layers
from paretune.task_vector import TaskVector
from paretune.training.arguments import given_options
from paretune.training.plan import empty_model
from paretune.training.request import Method, Request

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import Trainer


def lora_method(request: Request, tau: TaskVector | None, missing: str | None) -> Method:
    """How a LoRA run merges.

    Args:
        request: checked.
        tau: the task vector; None where a part of it is not on this disk, while planning.
        missing: what is not.

    Raises:
        ArgumentError: arguments of the trainer that do not go with it; other than plain LoRA on linear layers.
        MismatchError: an adapted weight has no task vector of its shape.
    """
    own = request.own
    mode = own.lora_merging or "gate"
    _check_trainer(request, mode)
    options: dict[str, Any] = given_options(own, {name: name for name in ("density", "weight", "pull")})
    rank = 16 if own.tau_rank is None else own.tau_rank or None
    held: list[Trainer] = []

    def factory(groups: list[dict[str, Any]], total_steps: int) -> Optimizer:
        model: Any = held[0].model
        seed = int(request.training.seed)
        merging = {**options, "mode": mode, "rank": rank, "seed": seed, "total_steps": total_steps}
        return LoRAMerging(torch.optim.AdamW(groups), model, tau, **merging)  # type: ignore[arg-type]

    method = Method(name=f"ondare ({mode})", factory=factory, tau=tau, before_training=held.append)
    method.state_bytes["moments"] = 2.0 * (4 if request.model.dtype in ("float32", None) else 2)
    if tau is None:
        method.notes.append(str(missing))
        return method
    layers = adapted_layers(empty_model(request), "default")
    shapes = {name: tuple(layer.get_base_layer().weight.shape) for name, layer in layers.items()}
    tau.match(shapes)
    trained = sum(p.numel() for layer in layers.values() for p in layer.parameters() if p.requires_grad)
    if mode == "gate":
        sizes = ((sum(shape), min(shape)) for shape in shapes.values())
        kept = sum(sides * (least if rank is None else min(rank, least)) for sides, least in sizes)
        method.state_bytes["tau"] = round(4.0 * kept / trained, 3)
    elif request.model.dtype not in ("float32", None):
        method.state_bytes["master"] = round(2.0 * sum(a * b for a, b in shapes.values()) / trained, 3)

    def statement(steps: int | None) -> str | None:
        if steps is None and own.pull is not None:
            return None
        density = own.density or 1.0
        weight = lora_weight(own.weight, own.pull, steps, density)
        where = "beside the adapter" if mode == "gate" else "into the weights under the adapter"
        return f"{lora_statement(weight, density, steps, shapes)}; τ goes {where}"

    method.statement = statement
    return method


def _check_trainer(request: Request, mode: str) -> None:
    """What only the trainer's arguments tell."""
    training: Any = request.training
    if getattr(training, "use_vllm", False):
        mend = "the engine gets the adapter without the task vector beside it; drop it"
        raise ArgumentError("use_vllm", True, mend)
    if mode == "gate":
        return
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(request.model, name):
            raise ArgumentError("lora_merging", mode, f"{name}: quantised weights cannot take it in; take gate")
    if request.trainer in ("dpo", "kto") and not getattr(training, "precompute_ref_log_probs", False):
        mend = "it would move the reference, which is read from the same weights; add --precompute_ref_log_probs true"
        raise ArgumentError("lora_merging", mode, mend)
    if request.trainer == "grpo" and getattr(training, "beta", None):
        raise ArgumentError("lora_merging", mode, f"it would move the reference of --beta {training.beta:g}; take gate")
    if getattr(training, "load_best_model_at_end", False):
        raise ArgumentError(
            "lora_merging", mode, "weights that took τ in do not go back to a best checkpoint; take gate"
        )
