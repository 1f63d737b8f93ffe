"""Records are whole or absent, JSON everywhere, and hold no secret."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from paretune.training import records
from paretune.training.resume import find_checkpoint, last_checkpoint


def test_values_become_json() -> None:
    value = {"a": math.nan, "b": (1, torch.tensor(2.0)), 3: Path("x"), "c": [math.inf, True, None]}
    assert records.jsonable(value) == {"a": "nan", "b": [1, 2.0], "3": "x", "c": ["inf", True, None]}
    json.dumps(records.jsonable(value), allow_nan=False)


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "training.json"
    records.write_json(path, {"one": 1})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        records.write_json(path, {"two": 2})
    assert json.loads(path.read_text()) == {"one": 1}
    assert [file.name for file in path.parent.iterdir()] == ["training.json"]


def test_tokens_are_masked() -> None:
    argv = ["train", "--hub_token", "hf_secret", "--hub-token=hf_secret", "--seed", "1"]
    assert records.without_secrets(argv) == ["train", "--hub_token", "***", "--hub-token=***", "--seed", "1"]


def test_versions() -> None:
    found = records.versions()
    assert {"python", "torch", "transformers", "trl", "datasets"} <= set(found)


def test_only_complete_checkpoints_are_resumed(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "absent") is None
    for step, complete in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert find_checkpoint("true", tmp_path) == tmp_path / "checkpoint-10"
    assert find_checkpoint(str(tmp_path / "checkpoint-2"), tmp_path) == tmp_path / "checkpoint-2"
    assert find_checkpoint(None, tmp_path) is find_checkpoint("false", tmp_path) is None
    for wrong in (str(tmp_path / "checkpoint-12"), str(tmp_path / "absent")):
        with pytest.raises(ValueError, match="give a complete checkpoint-N directory or true"):
            find_checkpoint(wrong, tmp_path)
    with pytest.raises(ValueError, match="holds no complete checkpoint-N"):
        find_checkpoint("true", tmp_path / "absent")
