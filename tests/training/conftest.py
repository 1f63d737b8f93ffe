"""One tiny pair of models and one file of data a trainer for all tests of a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``base``, ``reference`` and ``dpo.jsonl``, ``kto.jsonl``, ``sft.jsonl``, ``grpo.jsonl``."""
    directory = tmp_path_factory.mktemp("world")
    tiny_models.save_pair(directory)
    for kind in ("dpo", "kto", "sft", "grpo"):
        tiny_models.write_rows(directory / f"{kind}.jsonl", kind)
    return directory
