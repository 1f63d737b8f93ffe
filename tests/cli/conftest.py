"""The tiny pair of models and its data, made once a session."""

from __future__ import annotations

import gc
import importlib

import pytest
from tiny_models import world

__all__ = ["world"]


@pytest.fixture(scope="session", autouse=True)
def _imported_modules_are_not_collected() -> None:
    """Trainers run the garbage collector several times a run; TRL's million imported objects need not be walked."""
    importlib.import_module("trl").DPOTrainer  # noqa: B018
    gc.freeze()
