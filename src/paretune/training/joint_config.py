"""The configuration class of joint training; importing it imports TRL."""

# No `from __future__ import annotations`: TRL's argument parser resolves these types at run time.
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

from trl import DPOConfig, ModelConfig  # type: ignore[attr-defined]

# What all of TRL's configurations share: transformers' arguments with TRL's defaults.
_Common: Any = next(kind for kind in DPOConfig.__mro__[1:] if is_dataclass(kind))


def _argument(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class _TrustsRemoteCode(_Common):
    trust_remote_code: bool = _argument("Run code that comes with a model on the hub.", False)


# Early TRL 1.x has that argument with the model's.
_in_model = any(each.name == "trust_remote_code" for each in fields(ModelConfig))
_Base: Any = _Common if _in_model else _TrustsRemoteCode


@dataclass
class JointConfig(_Base):
    """TRL's common arguments, and those of DPO and KTO that joint training reads, under TRL's names."""

    learning_rate: float = _argument("The initial learning rate for AdamW.", 1e-6)
    beta: float = _argument("How strongly the reference holds the policy in the preference loss.", 0.1)
    label_smoothing: float = _argument("Share of pairs taken to be labelled wrongly (sigmoid only).", 0.0)
    desirable_weight: float = _argument("KTO's weight of good answers.", 1.0)
    undesirable_weight: float = _argument("KTO's weight of bad answers.", 1.0)
    max_length: int | None = _argument("Tokens kept of a prompt with its answer.", 1024)
    disable_dropout: bool = _argument("Switch dropout off in the model.", True)
    model_init_kwargs: dict[str, Any] | str | None = _argument(  # noqa: RUF009
        "Keyword arguments of from_pretrained, as JSON."
    )

    # transformers parses the JSON text of these.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*getattr(_Common, "_VALID_DICT_FIELDS", ()), "model_init_kwargs"]
