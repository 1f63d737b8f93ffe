"""A model and its tokenizer, by path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paretune.errors import ArgumentError, CheckpointError


def load_model(path: str | Path) -> Any:
    """A causal language model.

    Raises:
        CheckpointError: it cannot be read.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model={str(path)!r}: {' '.join(str(error).split())}") from error


def load_tokenizer(model: Any) -> Any:
    """The tokenizer of a model's directory, with a padding token; None for a model that names none.

    Raises:
        ArgumentError: the directory has no tokenizer.
    """
    from transformers import AutoTokenizer

    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not path:
        return None  # objectives without text need none; the others say so
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ArgumentError("processing_class", None, f"{path!r} has no tokenizer, give one: {text}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
