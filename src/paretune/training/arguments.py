"""What ``paretune train`` takes besides TRL's own arguments, and which of them belong together."""

# No `from __future__ import annotations`: TRL's argument parser resolves these types at run time.
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from paretune.errors import ArgumentError

OURS = ("ondare", "onties")
_MERGING = ("density", "weight", "pull", "every", "variant", "rescale", "clip")


def _argument(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class RunArguments:
    """Arguments of a training run; unset ones keep the defaults of the classes they are handed to."""

    _argument_group_name: ClassVar[str] = "paretune"

    optimizer: Literal["adamw", "ondare", "onties"] | None = _argument(
        "Optimizer of paretune; when it is absent, TRL's --optim chooses."
    )
    base_model: str | None = _argument(
        "Pre-trained model: where the reference (SFT) model started. The task vector is reference - base."
    )
    reference_model: str | None = _argument(
        "Reference (SFT) model of the task vector and of the preference loss; --model_name_or_path when absent."
    )
    base_vocab: Literal["strict", "pad"] = _argument(
        "'pad': rows that SFT added to the vocabulary get a task vector of 0; 'strict' refuses them.", "strict"
    )
    density: float | None = _argument("Share of entries kept in update and task vector, 0 < density <= 1.")
    weight: float | None = _argument("Merging weight of the task vector per step (the papers' alpha).")
    pull: float | None = _argument("Share of the task vector to add over the whole run; sets --weight.")
    every: int | None = _argument("Merge at every K-th step (Step-K); 1 merges at each.")
    variant: Literal["paper", "released"] | None = _argument("The paper's arithmetic or its released code's.")
    rescale: Literal["none", "expectation", "l1"] | None = _argument("Rescaling after sparsifying.")
    clip: float | None = _argument("Clamp of the released OnDARE.")
    learning_rate_factors: str | None = _argument(
        "File of factors of the learning rate, by entry or tensor, from paretune average fisher --as-learning-rates."
    )
    lora_merging: Literal["gate", "absorb"] | None = _argument(
        "How --use_peft takes the task vector in: 'gate' (default) beside the adapter, 'absorb' into the weights."
    )
    tau_rank: int | None = _argument(
        "Rank of the task vector beside a LoRA adapter while it trains (default 16, 0 for all of it)."
    )
    ema_decay: float | None = _argument(
        "Average the policy: average <- (1 - ema_decay) * average + ema_decay * policy at each step, for example "
        "1e-3; the average is what is saved and evaluated."
    )
    ema_evaluate: bool = _argument("Evaluate the average during training; false evaluates the raw policy.", True)
    child_tuning: Literal["f", "d"] | None = _argument(
        "ChildTuning: 'f' masks gradients afresh each step, 'd' keeps the entries of largest Fisher information."
    )
    child_density: float | None = _argument("Share of entries that ChildTuning trains, 0 < child_density <= 1.")
    child_batches: int = _argument("Training batches that estimate the Fisher information of ChildTuning-D.", 32)
    l2_to_reference: float | None = _argument("Decoupled L2 pull to the reference, per unit of learning rate.")
    l1_to_reference: float | None = _argument("Decoupled L1 pull to the reference, per unit of learning rate.")
    early_stopping_patience: int | None = _argument(
        "Stop when --metric_for_best_model did not improve at this many evaluations."
    )
    early_stopping_threshold: float = _argument("How much counts as an improvement.", 0.0)
    eval_dataset_name: str | None = _argument("Data set for evaluation, when it is not a split of --dataset_name.")
    reward_function: list[str] | None = _argument(  # noqa: RUF009
        "Reward functions of grpo as path.py:function."
    )


def check(arguments: RunArguments, *, trainer: str, uses_peft: bool, model: str | None) -> None:
    """Refuse arguments that cannot work, or that nothing would read.

    Args:
        arguments: ours, parsed.
        trainer: ``dpo``, ``kto``, ``sft`` or ``grpo``.
        uses_peft: LoRA is on.
        model: the model to train.

    Raises:
        ArgumentError: naming the first offending argument, its value and the mend.
    """
    if not model:
        raise ArgumentError("model_name_or_path", model, "give the model to train: a directory or a hub id")
    merging = arguments.optimizer in OURS
    for name in _MERGING:
        value = getattr(arguments, name)
        if value is not None and not merging:
            raise ArgumentError(name, value, "only --optimizer ondare and onties take it; choose one of them")
    _check_ranges(arguments)
    if merging:
        _check_merging(arguments, uses_peft)
    for name in ("lora_merging", "tau_rank"):
        value = getattr(arguments, name)
        if value is not None and not (merging and uses_peft):
            raise ArgumentError(name, value, "it needs --use_peft and --optimizer ondare")
    if arguments.child_tuning is None and arguments.child_density is not None:
        raise ArgumentError("child_density", arguments.child_density, "it needs --child_tuning f or d")
    if arguments.child_tuning is not None and arguments.child_density is None:
        raise ArgumentError("child_tuning", arguments.child_tuning, "give --child_density, for example 0.3")
    if arguments.child_tuning == "d" and trainer == "grpo":
        raise ArgumentError("child_tuning", "d", "its Fisher information needs answers, grpo has prompts; take f")
    if arguments.reward_function and trainer != "grpo":
        raise ArgumentError("reward_function", arguments.reward_function, "only grpo takes rewards")
    if arguments.learning_rate_factors is not None and uses_peft:
        mend = "its factors are of the whole weights, LoRA trains others; drop --use_peft"
        raise ArgumentError("learning_rate_factors", arguments.learning_rate_factors, mend)
    for name in ("l2_to_reference", "l1_to_reference"):
        if getattr(arguments, name) is not None and uses_peft:
            raise ArgumentError(name, getattr(arguments, name), "with LoRA the reference is frozen already; drop it")


def given_options(arguments: RunArguments, names: Mapping[str, str]) -> dict[str, Any]:
    """The arguments that were given, under the names of the class that takes them.

    Args:
        arguments: ours, parsed.
        names: our name to the keyword of the class.
    """
    options = {keyword: getattr(arguments, name) for name, keyword in names.items()}
    return {keyword: value for keyword, value in options.items() if value is not None}


def _check_ranges(arguments: RunArguments) -> None:
    for name in ("density", "child_density"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= 1:
            raise ArgumentError(name, value, "give a share in (0, 1]")
    for name in ("weight", "pull", "l2_to_reference", "l1_to_reference", "early_stopping_threshold"):
        value = getattr(arguments, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ArgumentError(name, value, "give a finite number of at least 0")
    if arguments.ema_decay is not None and not 0 < arguments.ema_decay < 1:
        raise ArgumentError("ema_decay", arguments.ema_decay, "give the policy's share per step in (0, 1), e.g. 1e-3")
    if arguments.tau_rank is not None and arguments.tau_rank < 0:
        raise ArgumentError("tau_rank", arguments.tau_rank, "give a whole number of at least 0")
    for name in ("every", "child_batches", "early_stopping_patience"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ArgumentError(name, value, "give a whole number of at least 1")


def _check_merging(arguments: RunArguments, uses_peft: bool) -> None:
    optimizer = arguments.optimizer
    if uses_peft:
        _check_lora(arguments)
    if arguments.weight is not None and arguments.pull is not None:
        raise ArgumentError("pull", arguments.pull, f"--weight {arguments.weight} says the same; give one of them")
    # The control of every experiment: weight 0 needs no task vector, except in the released sign election.
    needs_tau = arguments.weight != 0 or (optimizer == "onties" and arguments.variant == "released")
    if needs_tau and not arguments.base_model:
        raise ArgumentError(
            "base_model", None, f"--optimizer {optimizer} needs the model that SFT started from (or --weight 0)"
        )


def _check_lora(arguments: RunArguments) -> None:
    """What LoRA beside a task vector cannot do: it adds c times the vector, and trains the adapter as it is."""
    if arguments.optimizer != "ondare":
        mend = "an election of signs has no low-rank form; with --use_peft take ondare, or drop --use_peft"
        raise ArgumentError("optimizer", arguments.optimizer, mend)
    plain = {"variant": "paper", "rescale": "none", "every": 1, "clip": None, "ema_decay": None}
    for name, usual in plain.items():
        value = getattr(arguments, name)
        if value not in (None, usual):
            raise ArgumentError(name, value, "with --use_peft the adapter's updates are not merged; drop it")
    if not arguments.base_model:
        raise ArgumentError("base_model", None, "--use_peft with ondare needs the model that SFT started from")
    if arguments.reference_model:
        mend = "with --use_peft the reference is the model under the adapter; drop it"
        raise ArgumentError("reference_model", arguments.reference_model, mend)
    if arguments.tau_rank is not None and arguments.lora_merging == "absorb":
        raise ArgumentError("tau_rank", arguments.tau_rank, "absorbed, the task vector keeps its rank; drop it")
