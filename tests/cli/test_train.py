"""``paretune train`` end to end on a tiny Llama: every trainer, what it leaves behind, plans, YAML, sweeps."""

from __future__ import annotations

import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import arguments, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from paretune.cli.main import main
from paretune.training.trl_classes import quiet_deprecations


def train(world: Path, trainer: str, output: Path, *more: object) -> dict[str, Any]:
    """Run, and read the record."""
    assert main(arguments(world, trainer, output, *more)) == 0
    return json.loads((output / "training.json").read_text())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


RUNS: dict[str, tuple[str, list[str]]] = {
    "dpo": ("dpo", []),
    "dpo adamw": ("dpo", ["--optimizer", "adamw"]),
    "dpo ondare": ("dpo", ["--optimizer", "ondare", "--density", "0.3", "--pull", "0.05"]),
    "dpo onties": ("dpo", ["--optimizer", "onties", "--density", "0.3", "--weight", "1e-3", "--every", "2"]),
    "dpo released": ("dpo", ["--optimizer", "ondare", "--density", "0.3", "--variant", "released", "--clip", "0.5"]),
    "dpo weight 0": ("dpo", ["--optimizer", "ondare", "--density", "0.3", "--weight", "0"]),
    "ipo ondare": ("dpo", ["--loss_type", "ipo", "--optimizer", "ondare", "--density", "0.3"]),
    "kto onties": ("kto", ["--optimizer", "onties", "--density", "0.3"]),
    "kto pairs": ("kto", ["--dataset_name", "{world}/dpo.jsonl"]),
    "sft ondare": ("sft", ["--optimizer", "ondare", "--density", "0.3"]),
    "grpo ondare": ("grpo", ["--optimizer", "ondare", "--density", "0.3", "--beta", "0.1"]),
    "dpo bf16": ("dpo", ["--dtype", "bfloat16", "--optimizer", "ondare", "--density", "0.3"]),
    "dpo sgd": ("dpo", ["--optim", "sgd"]),
    "dpo child f": ("dpo", ["--child_tuning", "f", "--child_density", "0.3"]),
    "dpo child d": ("dpo", ["--child_tuning", "d", "--child_density", "0.1", "--child_batches", "3"]),
    "kto child d": ("kto", ["--child_tuning", "d", "--child_density", "0.1", "--child_batches", "3"]),
    "sft child d": ("sft", ["--child_tuning", "d", "--child_density", "0.1", "--child_batches", "3"]),
    "dpo l2": ("dpo", ["--l2_to_reference", "20"]),
    "dpo l1 ondare": ("dpo", ["--l1_to_reference", "0.1", "--optimizer", "ondare", "--density", "0.3"]),
    "dpo lora": ("dpo", ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]),
    "dpo other reference": ("dpo", ["--reference_model", "{world}/base"]),
}
# Their parts are in other runs or in tests of the optimizers.
SLOW = {"dpo adamw", "dpo released", "dpo weight 0", "ipo ondare", "kto child d", "sft child d", "dpo l1 ondare"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in RUNS])
def test_runs(name: str, world: Path, tmp_path: Path) -> None:
    trainer, more = RUNS[name]
    if {"ondare", "onties"} & set(more) and "weight 0" not in name:
        more = [*more, "--base_model", "{world}/base"]
    output = tmp_path / "out"
    record = train(world, trainer, output, *(text.format(world=world) for text in more))
    assert (record["status"], record["steps"], record["trainer"]) == ("finished", 4, trainer)
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
    AutoTokenizer.from_pretrained(output)
    assert "training.json" in (output / "README.md").read_text()
    if name == "dpo lora":
        assert (output / "adapter_model.safetensors").is_file()
        return
    AutoModelForCausalLM.from_pretrained(output)
    start = weights(world / "reference")
    moved = distance({k: v.float() for k, v in weights(output).items()}, start)
    # AdamW moves an element by at most lr a step; merging adds at most |tau|.
    assert 0 < moved < 4 * 1e-2 * math.sqrt(sum(v.numel() for v in start.values())) + 2
    if "child d" in name:
        changed = sum(int((weights(output)[k] != v).sum()) for k, v in start.items())
        assert changed <= 0.1 * sum(v.numel() for v in start.values())
    if more[:1] == ["--optimizer"] and "adamw" not in more:
        assert record["optimizer"]["statement"].startswith("On")


def test_loss_of_dpo_is_of_the_named_reference(world: Path, tmp_path: Path) -> None:
    """At the first step the policy is its own reference (loss log 2) unless another is named."""
    own = train(world, "dpo", tmp_path / "own")["history"][0]["loss"]
    other = train(world, "dpo", tmp_path / "other", "--reference_model", world / "base")["history"][0]["loss"]
    assert own == pytest.approx(math.log(2), abs=1e-6)
    assert abs(other - math.log(2)) > 1e-4


def test_record_repeats_the_run(world: Path, tmp_path: Path) -> None:
    """The recorded command alone gives the same model."""
    more = ["--optimizer", "ondare", "--base_model", world / "base", "--density", "0.3", "--seed", 3]
    record = train(world, "dpo", tmp_path / "one", *more)
    command = [text.replace(str(tmp_path / "one"), str(tmp_path / "two")) for text in record["command"]]
    assert main(command) == 0
    again = json.loads((tmp_path / "two" / "training.json").read_text())
    assert distance(weights(tmp_path / "one"), weights(tmp_path / "two")) == 0
    for key in ("data", "model", "tau", "versions", "seed"):
        assert record[key] == again[key]
    assert record["seed"] == 3
    assert record["tau"]["fingerprint"]
    assert record["model"]["fingerprint"]
    assert record["data"]["train"]["digest"]
    assert record["data"]["train"]["rows"] == 16
    assert record["given"]["density"] == 0.3
    assert record["arguments"]["training"]["learning_rate"] == 1e-2
    assert record["last_log"]["loss"] == [e["loss"] for e in record["history"] if "loss" in e][-1]


def test_average_is_saved_and_evaluated(world: Path, tmp_path: Path) -> None:
    evaluation = ["--eval_strategy", "steps", "--eval_steps", 4, "--eval_dataset_name", world / "sft.jsonl"]
    evaluation += ["--save_strategy", "steps", "--save_steps", 4]
    record = train(world, "sft", tmp_path, "--ema_decay", 0.5, *evaluation)
    last = tmp_path / "checkpoint-4"
    assert distance(weights(tmp_path), weights(last / "average")) == 0
    assert distance(weights(tmp_path), weights(last)) > 0
    # the evaluation during training and the one at the end both saw the average
    losses = [entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert record["metrics"]["eval_loss"] == losses[1]


def test_early_stopping(world: Path, tmp_path: Path) -> None:
    """A threshold that no improvement reaches stops at the first evaluation after the best."""
    record = train(
        world, "sft", tmp_path, "--max_steps", 8, "--early_stopping_patience", 1, "--early_stopping_threshold", 100,
        "--eval_strategy", "steps", "--eval_steps", 2, "--metric_for_best_model", "eval_loss",
        "--eval_dataset_name", world / "sft.jsonl", "--ema_decay", "0.1",
    )  # fmt: skip
    assert record["steps"] == 4


def test_dry_run(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--optimizer", "onties", "--base_model", world / "base", "--density", 0.1, "--pull", 0.05, "--every", 2]
    more += ["--max_steps", -1, "--num_train_epochs", 3, "--dry-run"]
    argv = arguments(world, "dpo", tmp_path / "out", *more)
    assert main([*argv, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(world / "reference")
    assert plan["parameters"] == plan["trained"] == sum(p.numel() for p in model.parameters())
    assert (plan["rows"], plan["batch"], plan["steps"]) == (16, 4, 12)
    assert plan["bytes_per_parameter"] == pytest.approx(
        {"model": 4, "gradients": 4, "moments": 8, "pending": 4, "tau": 0.6, "reference": 4}
    )
    assert plan["memory_bytes"] == math.ceil(24.6 * plan["parameters"])
    assert plan["statement"].startswith("OnTIES: pull at most 0.05 of τ over 12 steps")
    assert not (tmp_path / "out").exists()
    assert main(argv) == 0
    assert "optimizer steps: 12" in capsys.readouterr().out
    # the run counts the same steps and makes the same statement
    record = train(world, "dpo", tmp_path / "out", *more[:-1])
    assert record["steps"] == 12
    assert record["optimizer"]["statement"] == plan["statement"]


@pytest.mark.parametrize("trainer", ["kto", "sft", "grpo"])
def test_planned_steps_are_trained(
    trainer: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--max_steps", -1, "--num_train_epochs", 1, "--per_device_train_batch_size", 4]
    if trainer == "kto":
        more += ["--dataset_name", world / "dpo.jsonl"]  # pairs become two rows each
    assert main(arguments(world, trainer, tmp_path, *more, "--dry-run", "--json")) == 0
    planned = json.loads(capsys.readouterr().out)["steps"]
    assert train(world, trainer, tmp_path, *more)["steps"] == planned


def test_dry_run_without_the_model_at_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "dpo", "--model_name_or_path", "nobody/sft", "--base_model", "nobody/base", "--dry-run", "--json"]
    argv += ["--dataset_name", "nobody/pairs", "--optimizer", "ondare", "--output_dir", str(tmp_path / "x")]
    assert main(argv) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] is plan["rows"] is None
    assert len([note for note in plan["notes"] if "nobody" in note]) == 3


def test_yaml_as_trl_takes_it(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARETUNE_TEST", raising=False)
    config = tmp_path / "recipe.yaml"
    config.write_text(
        f"model_name_or_path: {world / 'reference'}\ndataset_name: {world / 'dpo.jsonl'}\n"
        f"output_dir: {tmp_path / 'o'}\n"
        "learning_rate: 1e-3\nbeta: 0.5\nloss_type: [ipo]\nmax_steps: 1\nper_device_train_batch_size: 2\n"
        "optim: adamw_torch\noptimizer: ondare\nweight: 0\ndensity: 0.5\nenv:\n  PARETUNE_TEST: 1\n"
    )
    import os

    assert main(["train", "dpo", "--config", str(config), "--beta", "0.2", "--disable_tqdm", "true"]) == 0
    record = json.loads((tmp_path / "o" / "training.json").read_text())
    training = record["arguments"]["training"]
    assert (training["learning_rate"], training["beta"], training["loss_type"]) == (1e-3, 0.2, ["ipo"])
    assert record["optimizer"]["name"] == "ondare"
    assert record["given"]["density"] == 0.5
    assert os.environ["PARETUNE_TEST"] == "1"


def test_yaml_mixture_of_data(world: Path, tmp_path: Path) -> None:
    config = tmp_path / "mix.yaml"
    write_rows(tmp_path / "more.jsonl", "dpo", count=4, seed=9)
    config.write_text(
        "datasets:\n" + "".join(f"  - path: json\n    data_files: {file}\n" for file in
        (world / "dpo.jsonl", tmp_path / "more.jsonl"))
    )  # fmt: skip
    argv = arguments(world, "dpo", tmp_path / "out", "--config", config)
    position = argv.index("--dataset_name")
    del argv[position : position + 2]
    assert main(argv) == 0
    assert json.loads((tmp_path / "out" / "training.json").read_text())["data"]["train"]["rows"] == 20


def test_sweep(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--sweep", "learning_rate=1e-3,1e-2", "--sweep", "beta=0.1,0.5", "--max_steps", 2, "--json"]
    assert main(arguments(world, "dpo", tmp_path, *more)) == 0
    found = json.loads(capsys.readouterr().out)
    assert [list(record["point"].values()) for record in found] == [
        ["1e-3", "0.1"], ["1e-3", "0.5"], ["1e-2", "0.1"], ["1e-2", "0.5"],
    ]  # fmt: skip
    for record in found:
        training = json.loads((tmp_path / record["directory"] / "training.json").read_text())
        assert training["arguments"]["training"]["learning_rate"] == float(record["point"]["learning_rate"])
        assert training["arguments"]["training"]["beta"] == float(record["point"]["beta"])
        assert training["metrics"] == record["metrics"]
    # a point is what a run of its own gives
    train(world, "dpo", tmp_path / "alone", "--max_steps", 2, "--learning_rate", "1e-3", "--beta", "0.5")
    assert distance(weights(tmp_path / "alone"), weights(tmp_path / found[1]["directory"])) == 0
    # repeated, nothing is trained again
    before = (tmp_path / "sweep.jsonl").stat().st_mtime_ns
    assert main(arguments(world, "dpo", tmp_path, *more)) == 0
    assert (tmp_path / "sweep.jsonl").stat().st_mtime_ns == before
    assert main(arguments(world, "dpo", tmp_path, *more, "--seed", 5)) == 2
    assert "holds points of other arguments" in capsys.readouterr().err


def test_a_sweep_is_short_for_people(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--sweep", "beta=0.1,0.5", "--max_steps", 2, "--eval_strategy", "epoch"]
    more += ["--eval_dataset_name", world / "dpo.jsonl"]
    assert main(arguments(world, "dpo", tmp_path, *more)) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    for line, beta in ((first, "0.1"), (second, "0.5")):
        start, _, numbers = line.partition(": ")
        assert start == f"beta {beta}"
        names = [part.rsplit(" ", 1)[0] for part in numbers.split(", ")]
        assert names == ["train_loss", "eval_loss", "eval_rewards/accuracies"]
    assert last.startswith("2 points in ")


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_sweep_says_once_what_it_changes(
    dry_run: bool,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "paretune")
    more = ["--sweep", "beta=0,0.5", "--max_steps", 1, "--use_cpu", "true", *(["--dry-run"] if dry_run else [])]
    assert main(arguments(world, "grpo", tmp_path, *more)) == 0
    said = capsys.readouterr().out if dry_run else "\n".join(record.message for record in caplog.records)
    assert said.count("these unset arguments become bf16=false, gradient_checkpointing=false") == 1
    assert said.count("grpo's beta is 0") == 1  # at one of the points


def test_a_sweep_may_share_what_only_some_points_read(world: Path, tmp_path: Path) -> None:
    more = ["--sweep", "optimizer=adamw,ondare", "--base_model", world / "base", "--dry-run"]
    assert main(arguments(world, "dpo", tmp_path, *more)) == 0
    more = ["--sweep", "child_tuning=f,d", "--child_density", 0.3, "--child_batches", 2, "--dry-run"]
    assert main(arguments(world, "dpo", tmp_path, *more)) == 0


def test_deprecations_within_trl_are_not_shown(world: Path, tmp_path: Path) -> None:
    """They are transformers' with TRL; the filter ends with the run, and other warnings pass it."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        train(world, "dpo", tmp_path, "--max_steps", 1)
        before = list(warnings.filters)
        with quiet_deprecations():
            warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
            warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
        assert warnings.filters == before
    said = [str(warning.message) for warning in shown]
    assert not any("is_gradient_checkpointing" in text for text in said)
    assert "something else is deprecated" in said


def test_says_what_it_changes(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paretune")
    if torch.accelerator.is_available():
        pytest.skip("the defaults change without an accelerator only")
    train(world, "grpo", tmp_path, "--max_steps", 1, "--bf16", "false")
    said = " ".join(record.message for record in caplog.records if record.name.startswith("paretune"))
    assert "these unset arguments become use_cpu=true, gradient_checkpointing=false" in said
    assert "grpo's beta is 0" in said


def test_nothing_is_sent(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    record = train(world, "dpo", tmp_path, "--max_steps", 1)
    assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
    training = record["arguments"]["training"]
    assert training["report_to"] in ([], "none", ["none"])
    assert not training["push_to_hub"]


def test_secrets_stay_out_of_the_record(world: Path, tmp_path: Path) -> None:
    train(world, "dpo", tmp_path, "--max_steps", 1, "--hub_token", "hf_topsecret")
    for file in ("training.json", "README.md"):
        assert "hf_topsecret" not in (tmp_path / file).read_text()
