"""Damaged and hostile checkpoints: an error in one line, never a crash, never a read outside the directory."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merge_models import CONFIG, family, tensors, write

import paretune as pt
from paretune.errors import CheckpointError, PareTuneError


def attempt(model: Path, out: Path) -> None:
    """A merge with this model either works or fails in one line."""
    message = ""
    try:
        pt.merge("linear", [str(model)], out=out, workers=1)
    except PareTuneError as error:
        message = str(error)
    assert "\n" not in message
    assert bool(message) != out.exists()


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers(data: st.DataObject, tmp_path: Path) -> None:
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    path = Path(write(root / "m", {"a": torch.ones(3, 4), "b": torch.ones(5).bfloat16()})) / "model.safetensors"
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw))
    attempt(path.parent, root / "out")


ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F16", "F64", "I64", "BOOL", "F8_E4M3", "?", 3, None]),
        "shape": st.one_of(st.lists(st.integers(-1, 2**62), max_size=3), st.just("x"), st.none()),
        "data_offsets": st.one_of(st.lists(st.integers(-8, 80), max_size=3), st.just([0, 2**63]), st.none()),
    },
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=8), st.one_of(ENTRY, st.integers(), st.none()), max_size=3))
def test_invented_headers(header: dict[str, Any], tmp_path: Path) -> None:
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    (root / "m").mkdir()
    text = json.dumps(header).encode()
    (root / "m" / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    attempt(root / "m", root / "out")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_links_out_of_the_directory_are_not_followed(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"vocab_size": 1}')
    (model,) = family(tmp_path, 0)
    (Path(model) / name).unlink(missing_ok=True)
    (Path(model) / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="link out of the directory"):
        pt.merge("linear", [model], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "secret\n.safetensors"])
def test_indexes_cannot_leave_the_directory(name: str, tmp_path: Path) -> None:
    model = Path(write(tmp_path / "m", tensors(0), 2))
    (tmp_path / "secret.safetensors").write_bytes((model / "model-00001-of-00002.safetensors").read_bytes())
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = name
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        pt.merge("linear", [str(model)], out=tmp_path / "out")


@pytest.mark.parametrize(
    "config", [[], "x", {"vocab_size": "many"}, {"vocab_size": -1}, {"vocab_size": 2**80}, {"layer_types": 3}]
)
def test_strange_configurations(config: Any, tmp_path: Path) -> None:
    model = Path(write(tmp_path / "m", tensors(0), config=config))
    attempt(model, tmp_path / "out")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model": 3}', '{"model": {"vocab": {"a": "b"}}}', '{"model": {"vocab": [3]}}']
)
def test_broken_tokenizers(text: str, tmp_path: Path) -> None:
    a, b = family(tmp_path, 1)
    (Path(a) / "tokenizer.json").write_text(text)
    (Path(b) / "tokenizer.json").write_text('{"model": {"vocab": {"x": 0}}}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        pt.merge("linear", [a, b], out=tmp_path / "out", tokenizer="union")


@pytest.mark.parametrize("number", [-5, 10**6, 2**70])
def test_tokens_with_absurd_numbers(number: int, tmp_path: Path) -> None:
    a, b = family(tmp_path, 1)
    (Path(a) / "tokenizer.json").write_text('{"model": {"vocab": {"x": 0, "y": 1}}}')
    (Path(b) / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0, "z": number}}}))
    with pytest.raises(PareTuneError):
        pt.merge("linear", [a, b], out=tmp_path / "out", tokenizer="union")


def test_tensor_names_that_look_like_paths(tmp_path: Path) -> None:
    model = write(
        tmp_path / "m", {"../../x": torch.ones(2), "/etc/y": torch.ones(2), "é\n": torch.ones(1)}, config=CONFIG
    )
    pt.merge("linear", [model], out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"m", "out"}
