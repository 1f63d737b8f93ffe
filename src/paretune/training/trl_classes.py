"""TRL's classes by trainer, wherever TRL 1.x keeps them: the one place that knows its versions."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def trl() -> Any:
    """The ``trl`` package; a function because importing it takes seconds."""
    return importlib.import_module("trl")


def trainer_class(trainer: str) -> Any:
    """The trainer of a name.

    Args:
        trainer: dpo, kto, sft or grpo.
    """
    return _stable(f"{trainer.upper()}Trainer")


def argument_classes(trainer: str) -> tuple[Any, Any, Any, Any]:
    """The dataclasses that TRL's own script for this trainer parses.

    Args:
        trainer: dpo, kto, sft, grpo or joint, where the first two are ours.

    Returns:
        Script arguments, the trainer's configuration, the model's, the data mixture's (None for joint).
    """
    if trainer == "joint":
        from paretune.training.joint_arguments import JointArguments
        from paretune.training.joint_config import JointConfig

        return JointArguments, JointConfig, trl().ModelConfig, None
    script = trl().ScriptArguments
    if trainer == "grpo":
        script = importlib.import_module("trl.scripts.grpo").GRPOScriptArguments
    return script, _stable(f"{trainer.upper()}Config"), trl().ModelConfig, trl().DatasetMixtureConfig


@contextmanager
def quiet_deprecations() -> Iterator[None]:
    """Silence what transformers deprecates in TRL's own code: no user can mend it. Every other warning is shown."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _stable(name: str) -> Any:
    """A class of TRL; early 1.x kept KTO's in an experimental package behind a deprecated alias."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = getattr(trl(), name)
        if any(".experimental." in base.__module__ for base in kind.__mro__):
            return getattr(importlib.import_module("trl.experimental.kto"), name)
    return kind
