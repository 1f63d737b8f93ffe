"""What ``paretune train joint`` takes besides the arguments of every run."""

# No `from __future__ import annotations`: TRL's argument parser resolves these types at run time.
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from paretune.errors import ArgumentError
from paretune.training.request import evaluates

SCHEDULES = ("mix", "alright", "maxright", "sft-then-preference", "preference-then-sft")


def _argument(help: str, default: Any = None, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass
class JointArguments:
    """Data, losses and schedule of joint training."""

    _argument_group_name: ClassVar[str] = "joint training"

    sft_dataset: str | None = _argument("Demonstrations: a hub id, a .json/.jsonl/.parquet file or a folder.")
    preference_dataset: str | None = _argument(
        "Preference pairs, or for --preference_loss kto also labelled answers; likewise."
    )
    rehearse: Literal["auto", "raw-fragments", "prompt-model", "mutate", "user-mark"] | None = _argument(
        "In place of --sft_dataset: prompts that the model makes itself, answered by it and distilled by forward KL. "
        "'auto' tunes a prompt model on --rehearse_seeds where given, else cuts the model's own plain text."
    )
    rehearse_seeds: str | None = _argument("A few dozen prompts that rehearsal starts from, as --sft_dataset.")
    rehearse_count: int = _argument("Prompts to make.", 2000)
    rehearse_max_new_tokens: int = _argument("Longest answer that is rehearsed.", 256)
    rehearse_nll: float = _argument(
        "Share in [0, 1) of the preferences' weight that goes to the chosen answers' own likelihood: for preferences "
        "that ask for new behaviour.",
        0.0,
    )
    sft_eval_dataset: str | None = _argument("Demonstrations to evaluate on; a split of --sft_dataset when absent.")
    preference_eval_dataset: str | None = _argument(
        "Preferences to evaluate on; a split of --preference_dataset when absent."
    )
    dataset_train_split: str = _argument("Split to train on, in both data sets.", "train")
    dataset_test_split: str = _argument("Split to evaluate on, in both data sets.", "test")
    preference_loss: Literal["sigmoid", "ipo", "kto"] = _argument(
        "The preference objective: DPO's sigmoid, IPO, or KTO.", "sigmoid"
    )
    schedule: Literal["mix", "alright", "maxright", "sft-then-preference", "preference-then-sft"] = _argument(
        "Which objective trains at a step: 'mix' both, weighted; 'alright' one, drawn by weight; 'maxright' the one "
        "furthest from its ideal value; or one after the other.",
        "alright",
    )
    weight_preference: float = _argument(
        "Weight of the preference objective in [0, 1]; SFT has the rest. In sweeps also weights.dpo or weights.kto.",
        0.5,
        aliases=["--weights.dpo", "--weights.kto"],
    )
    ideal_sft: float | None = _argument("Ideal SFT loss of maxright and --stop_within; 0 when absent.")
    ideal_preference: float | None = _argument("Ideal preference loss of maxright and --stop_within; 0 when absent.")
    measure_ideals: bool = _argument(
        "First train on each objective alone, with the same arguments, and take the losses reached as ideal values.",
        False,
    )
    refresh_every: int = _argument("maxright: steps between two measurements of both losses.", 10)
    sft_batch_size: int | None = _argument("Demonstrations a micro-batch; --per_device_train_batch_size when absent.")
    preference_batch_size: int | None = _argument("Pairs (kto: answers) a micro-batch; likewise.")
    sft_max_length: int | None = _argument("Tokens kept of a demonstration; --max_length when absent.")
    reference_soup: list[str] | None = _argument(  # noqa: RUF009
        "Models the mean of whose weights is the reference of the preference loss."
    )
    stop_within: float | None = _argument("Stop when an evaluation loss is at most this far above its ideal value.")
    stop_at_front: str | None = _argument(
        "Stop when both evaluation losses are at most those of a point of this front: a sweep.jsonl or JSON lines "
        'of {"sft": loss, "dpo": loss}.'
    )

    @property
    def preference_name(self) -> str:
        """The preference objective in weights and records."""
        return "kto" if self.preference_loss == "kto" else "dpo"

    @property
    def ideal(self) -> dict[str, float]:
        """The ideal values that were given, by objective."""
        given = {"sft": self.ideal_sft, self.preference_name: self.ideal_preference}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def dataset_name(self) -> str:
        """Both data sets, for plans and model cards."""
        return f"{self.sft_dataset or f'self-rehearsal ({self.rehearse})'} + {self.preference_dataset}"


def check_joint(joint: JointArguments, training: Any) -> None:
    """Refuse arguments of joint training that cannot work.

    Args:
        joint: parsed.
        training: the run's configuration.

    Raises:
        ArgumentError: naming the first offending argument, its value and the mend.
    """
    check_rehearsal(joint)
    for name in ("sft_dataset", "preference_dataset"):
        if name == "sft_dataset" and joint.rehearse:
            continue
        if not getattr(joint, name):
            raise ArgumentError(name, None, "give a hub id, a .json/.jsonl/.parquet file or a folder")
    if not 0 <= joint.weight_preference <= 1:
        raise ArgumentError("weight_preference", joint.weight_preference, "give a weight in [0, 1]; SFT has the rest")
    for name in ("ideal_sft", "ideal_preference"):
        value = getattr(joint, name)
        if value is not None and not math.isfinite(value):
            raise ArgumentError(name, value, "give a finite loss")
        if value is not None and joint.measure_ideals:
            raise ArgumentError(name, value, "--measure_ideals measures it; drop one of them")
    if joint.stop_within is not None and not (joint.stop_within >= 0 and math.isfinite(joint.stop_within)):
        raise ArgumentError("stop_within", joint.stop_within, "give a finite number of at least 0")
    for name in ("refresh_every", "sft_batch_size", "preference_batch_size"):
        value = getattr(joint, name)
        if value is not None and value < 1:
            raise ArgumentError(name, value, "give a whole number of at least 1")
    for name in ("stop_within", "stop_at_front"):
        if getattr(joint, name) is not None and not evaluates(training):
            raise ArgumentError(name, getattr(joint, name), "it looks at evaluations; add --eval_strategy steps")
    if joint.stop_within is not None and not joint.ideal and not joint.measure_ideals:
        raise ArgumentError(
            "stop_within", joint.stop_within, "give --ideal_sft or --ideal_preference, or add --measure_ideals"
        )


def check_rehearsal(joint: JointArguments) -> None:
    """Refuse arguments of self-rehearsal that cannot work."""
    if joint.rehearse and joint.sft_dataset:
        raise ArgumentError("rehearse", joint.rehearse, "it stands in --sft_dataset's place; drop one of them")
    if joint.rehearse and joint.sft_eval_dataset:
        raise ArgumentError("sft_eval_dataset", joint.sft_eval_dataset, "self-rehearsal has none; drop it")
    if joint.rehearse and joint.schedule not in ("mix", "alright", "maxright"):
        raise ArgumentError("rehearse", joint.rehearse, "it goes with --schedule alright, mix or maxright")
    if joint.rehearse in ("prompt-model", "mutate") and not joint.rehearse_seeds:
        raise ArgumentError("rehearse", joint.rehearse, "it starts from prompts: give --rehearse_seeds")
    for name in ("rehearse_count", "rehearse_max_new_tokens"):
        if getattr(joint, name) < 1:
            raise ArgumentError(name, getattr(joint, name), "give a whole number of at least 1")
    if not 0 <= joint.rehearse_nll < 1:
        raise ArgumentError("rehearse_nll", joint.rehearse_nll, "give a share in [0, 1)")


def idle_settings(joint: JointArguments, given: Mapping[str, Any]) -> list[str]:
    """Settings of other schedules than the run's, as notices: one command line may serve every schedule.

    Args:
        joint: parsed.
        given: the arguments that were set.
    """
    maxright = joint.schedule == "maxright"
    ideals = maxright or joint.stop_within is not None
    rules = {
        "weight_preference": (joint.schedule in SCHEDULES[:3], "mix, alright and maxright"),
        "refresh_every": (maxright, "maxright"),
        "ideal_sft": (ideals, "maxright and --stop_within"),
        "ideal_preference": (ideals, "maxright and --stop_within"),
    }
    return [
        f"{name}={given[name]} is not used by --schedule {joint.schedule}, but by {users}"
        for name, (is_used, users) in rules.items()
        if given.get(name) is not None and not is_used
    ]


def unread_joint(joint: JointArguments, training: Any) -> dict[str, tuple[bool, str]]:
    """Arguments of joint training: whether this run reads each, and what to do where it does not.

    Args:
        joint: parsed.
        training: the run's configuration.
    """
    kto = joint.preference_loss == "kto"
    evaluation = "nothing is evaluated; add --eval_strategy epoch or steps, or drop it"
    return {
        **{
            name: (joint.rehearse is not None, "it needs --rehearse")
            for name in ("rehearse_seeds", "rehearse_count", "rehearse_max_new_tokens", "rehearse_nll")
        },
        "sft_eval_dataset": (evaluates(training), evaluation),
        "preference_eval_dataset": (evaluates(training), evaluation),
        "label_smoothing": (joint.preference_loss == "sigmoid", "it needs --preference_loss sigmoid"),
        "desirable_weight": (kto, "it needs --preference_loss kto"),
        "undesirable_weight": (kto, "it needs --preference_loss kto"),
    }
