"""``examples/real_text`` in its quick form: tokenizer, base, SFT and DPO on real text, through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from paretune import TaskVector

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "real_text" / "run.py"
DATA = Path(os.environ.get("PARETUNE_DATA", ROOT.parent / "shared" / "data"))
MERGED = ("dpo-ondare", "dpo-onties")


def start(*arguments: object, data: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PARETUNE_DATA": str(data)}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished quick run."""
    if not (DATA / "gsm8k_preferences.jsonl.gz").is_file():
        pytest.skip(f"no data set in {DATA}: set PARETUNE_DATA to the folder with gsm8k_*.jsonl.gz")
    directory = tmp_path_factory.mktemp("real_text")
    done = start("--quick", "--controls", "--out", directory, data=DATA)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| dpo-control |" in done.stdout
    return directory


@pytest.fixture(scope="module")
def models(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())["models"]


def test_says_where_the_data_is_missing(tmp_path: Path) -> None:
    done = start("--quick", "--out", tmp_path / "out", data=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "PARETUNE_DATA" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_model_loads(out: Path, models: dict[str, Any]) -> None:
    for name in models:
        model = AutoModelForCausalLM.from_pretrained(out / name)
        assert len(AutoTokenizer.from_pretrained(out / name)) == model.config.vocab_size
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.slow
def test_records(out: Path) -> None:
    """Each run left what repeats it; τ is that of the two models on disk."""
    tau = TaskVector.between(base=out / "base", reference=out / "reference")
    for name in ("reference", "dpo-adamw", "dpo-control", *MERGED):
        record = json.loads((out / name / "training.json").read_text())
        assert record["status"] == "finished"
        assert record["data"]["train"]["digest"]
        if name in MERGED:
            assert record["tau"]["fingerprint"] == tau.fingerprint
            assert record["optimizer"]["statement"].startswith("On")
        elif name != "dpo-control":
            assert record["tau"] is None
        assert record["hardware"]["threads"] == 1


@pytest.mark.slow
def test_nothing_held_out_was_trained_on(out: Path) -> None:
    def questions(name: str) -> set[str]:
        rows = [json.loads(line) for line in (out / "data" / f"{name}.jsonl").read_text().split("\n") if line]
        return {row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0]["content"] for row in rows}

    assert not questions("held_answers") & (questions("pretrain") | questions("sft"))
    assert not questions("held_pairs") & questions("dpo")


@pytest.mark.slow
def test_sft_lowered_answer_perplexity(models: dict[str, Any]) -> None:
    """Against base read as plain text, its own format; the whole interval of the ratio lies above 1."""
    assert models["base"]["perplexity_ratio"][1] > 1


@pytest.mark.slow
def test_dpo_prefers_what_it_was_trained_to_prefer(models: dict[str, Any]) -> None:
    """On its training pairs; at this size held-out pairs promise nothing."""
    assert models["dpo-adamw"]["margin_accuracy_train"] > 0.6


@pytest.mark.slow
def test_merging_changes_the_model_and_its_control_is_adamw(out: Path) -> None:
    plain = load_file(out / "dpo-adamw" / "model.safetensors")
    control = load_file(out / "dpo-control" / "model.safetensors")
    assert plain.keys() == control.keys()
    largest = max(float((plain[name] - control[name]).abs().max()) for name in plain)
    assert largest <= 1e-6  # the trainer's AdamW is the fused one; the foreach one is equal bit for bit
    for name in MERGED:
        merged = load_file(out / name / "model.safetensors")
        assert any(not torch.equal(plain[tensor], merged[tensor]) for tensor in plain)
