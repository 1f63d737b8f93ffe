"""Arguments that a run was given and nothing in it would read."""

from __future__ import annotations

from collections.abc import Sequence

from paretune.errors import ArgumentError
from paretune.training.arguments import OURS
from paretune.training.joint_arguments import unread_joint
from paretune.training.request import Request, evaluates


def unread(request: Request) -> list[ArgumentError]:
    """What was given in vain: whoever gives an argument expects it to act.

    Args:
        request: parsed; only arguments that were set, on the command line or in a YAML file, are looked at.

    Returns:
        One error an argument, naming it, its value and the mend.
    """
    own, given = request.own, request.given
    merging = own.optimizer in OURS
    pulling = bool(own.l2_to_reference or own.l1_to_reference)
    joint = request.trainer == "joint"
    rules = {
        "base_model": (merging, "only online merging reads it; add --optimizer ondare or onties, or drop it"),
        "base_vocab": (merging and bool(own.base_model), "it needs --base_model and --optimizer ondare or onties"),
        "reference_model": (
            request.trainer in ("dpo", "kto", "joint") or pulling or (merging and bool(own.base_model)),
            f"{request.trainer} reads it with --base_model, --l2_to_reference or --l1_to_reference only; drop it",
        ),
        "eval_dataset_name": (
            evaluates(request.training) and not joint,
            "joint takes --sft_eval_dataset and --preference_eval_dataset"
            if joint
            else "nothing is evaluated; add --eval_strategy epoch or steps, or drop it",
        ),
        "early_stopping_threshold": (own.early_stopping_patience is not None, "it needs --early_stopping_patience"),
        "child_batches": (own.child_tuning == "d", "only --child_tuning d reads it; add that, or drop it"),
        "ema_evaluate": (own.ema_decay is not None, "it needs --ema_decay"),
    }
    if joint:
        rules |= unread_joint(request.script, request.training)
    return [
        ArgumentError(name, given[name], mend)
        for name, (is_read, mend) in rules.items()
        if given.get(name) is not None and not is_read
    ]


def check_read(requests: Sequence[Request]) -> None:
    """Refuse an argument that no run of a sweep would read; one that some point reads may be there for all.

    Args:
        requests: the points of a sweep, or a single run.

    Raises:
        ArgumentError: the first of :func:`unread` that is so in every request.
    """
    found = [{error.argument: error for error in unread(request)} for request in requests]
    for name, error in (found[0] if found else {}).items():
        if all(name in others for others in found):
            raise error
