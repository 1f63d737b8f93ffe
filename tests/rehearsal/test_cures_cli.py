"""`paretune average fisher`, `paretune average dial` and `paretune rehearse prompts` on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model, make_tokenizer, write_rows

from paretune.averaging.fisher_gate import Gate
from paretune.cli.main import main


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``sft``, ``aligned``, preferences and prompts."""
    folder = tmp_path_factory.mktemp("ends")
    for name, seed in (("sft", 0), ("aligned", 1)):
        make_model(seed=seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    write_rows(folder / "pairs.jsonl", "dpo", 6)
    write_rows(folder / "prompts.jsonl", "grpo", 4)
    (folder / "reward.py").write_text(
        "def words(completions, **_):\n    return [min(1.0, len(str(c)) / 100) for c in completions]\n"
    )
    return folder


def fisher(ends: Path, out: Path, *more: str) -> int:
    return main(
        ["average", "fisher", "--pre", str(ends / "sft"), "--post", str(ends / "aligned"), "-o", str(out), "--quiet",
         "--workers", "1", "--json", *more]
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("mode", ["entries", "tensors"])
def test_gate_is_applied_by_the_merge_engine(
    mode: str, ends: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ["--preferences", str(ends / "pairs.jsonl"), "--samples", "6", "--max-tokens", "8", "--override"]
    assert fisher(ends, tmp_path / "out", *made, "--mode", mode, "--scale", "1.5") == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    gate = Gate.load(tmp_path / "out" / "gate.safetensors")
    assert (said["ratio"], said["mode"]) == (gate.ratio, mode)
    expected = gate.merged(weights(ends / "sft"), weights(ends / "aligned"), 1.5)
    got = weights(tmp_path / "out")
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert torch.allclose(got[name], tensor, atol=1e-7), name
    # a ready gate at another scale
    assert fisher(ends, tmp_path / "half", "--gate", said["gate"], "--scale", "0.5", "--override") == 0
    halved = gate.merged(weights(ends / "sft"), weights(ends / "aligned"), 0.5)
    assert all(torch.allclose(tensor, halved[name], atol=1e-7) for name, tensor in weights(tmp_path / "half").items())


def test_ends_are_bit_exact_through_the_engine(ends: Path, tmp_path: Path) -> None:
    made = ["--preferences", str(ends / "pairs.jsonl"), "--samples", "4", "--max-tokens", "8", "--override"]
    for weight, end in (("0", "aligned"), ("inf", "sft")):
        assert fisher(ends, tmp_path / end, *made, "--weight", weight) == 0
        got = weights(tmp_path / end)
        assert all(torch.equal(got[name], tensor) for name, tensor in weights(ends / end).items())


def test_an_untrusted_gate_is_refused(ends: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factors = {name: torch.tensor(0.5) for name in weights(ends / "sft")}
    Gate(factors, 1.0, 0.9).save(tmp_path / "gate.safetensors")
    assert fisher(ends, tmp_path / "out", "--gate", str(tmp_path / "gate.safetensors")) == 2
    assert "ΣF_s/ΣF_p is 0.90" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_gate_of_another_model_is_refused(ends: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Gate({"w": torch.ones(3)}, 1.0, 9.0).save(tmp_path / "gate.safetensors")
    assert fisher(ends, tmp_path / "out", "--gate", str(tmp_path / "gate.safetensors")) == 2
    assert "no factor of its shape" in capsys.readouterr().err


def test_dial(ends: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "average", "dial", "--pre", str(ends / "sft"), "--post", str(ends / "aligned"), "--prompts",
        str(ends / "prompts.jsonl"), "--reward", f"{ends / 'reward.py'}:words", "--ladder", "0.01,1", "--own", "4",
        "--max-new-tokens", "8", "--quiet", "--least-exact", "0.5", "--largest-kl", "0.3", "-o",
        str(tmp_path / "dial.json"),
    ]  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "dial.json").read_text())
    assert [rung["scale"] for rung in found["rungs"]] == [0.01]
    assert found["rungs"][0]["agreement"]["exact"] > 0.5
    assert abs(found["rungs"][0]["agreement"]["kl"]) < 0.05
    assert "at scale 1" in found["stopped"]  # a model from another seed says something else
    assert "scale 0.01" in said


def test_rehearse_prompts(ends: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "rehearse", "prompts", str(ends / "sft"), "--preferences", str(ends / "pairs.jsonl"), "--count", "12",
        "--max-tokens", "6", "--max-new-tokens", "48", "--temperature", "1", "--quiet", "--json",
    ]  # fmt: skip
    assert main([*command[:-1], "-o", str(tmp_path / "a.jsonl")]) == 0
    assert "answered prompts from raw-fragments" in capsys.readouterr().out
    assert main([*command, "-o", str(tmp_path / "b.jsonl"), "--batch-size", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    assert len(rows) == report["rows"] <= 12
    assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["average", "fisher", "--pre", "x", "--post", "y", "-o", "OUT"], "--preferences"),
        (
            ["average", "dial", "--pre", "x", "--post", "y", "--prompts", "p", "--reward", "r", "--ladder", "a"],
            "ladder",
        ),
        (["rehearse", "prompts", "x", "-o", "OUT", "--source", "guess"], "--source"),
    ],
)
def test_wrong_arguments(arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "out") if text == "OUT" else text for text in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert named in error
    assert "\n" not in error


def test_seeds_are_asked_for(ends: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["rehearse", "prompts", str(ends / "sft"), "--source", "mutate", "-o", str(tmp_path / "a.jsonl")]
    assert main(command) == 2
    assert "--seeds FILE" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()


def test_another_tensor_layout_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert main(["average", "fisher", "--pre", str(tmp_path), "--post", str(tmp_path), "-o", str(tmp_path / "o")]) == 2
