"""Every wrong command line of ``paretune train``: exit status 2, exactly one line that says what to mend."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

from paretune.cli.main import main

ONLINE = ["--optimizer", "ondare"]

# name: (trainer, further arguments, what the line says); {world} and {tmp} are filled in.
WRONG: dict[str, tuple[str, list[str], str]] = {
    "unknown": ("dpo", ["--densty", "0.1"], "--densty 0.1: unknown argument, did you mean --density?"),
    "abbreviation": ("dpo", ["--weight_dec", "0.1"], "did you mean --weight_decay?"),
    "no number": ("dpo", ["--density", "many"], "argument --density: invalid float value: 'many'"),
    "no value": ("dpo", ["--base_model"], "argument --base_model/--base-model: expected one argument"),
    "choice": ("dpo", ["--optimizer", "adam"], "argument --optimizer: invalid choice: 'adam'"),
    "density 0": ("dpo", [*ONLINE, "--density", "0"], "density=0.0: give a share in (0, 1]"),
    "density above 1": ("dpo", [*ONLINE, "--density", "1.5"], "density=1.5: give a share in (0, 1]"),
    "negative weight": ("dpo", [*ONLINE, "--weight", "-1"], "weight=-1.0: give a finite number of at least 0"),
    "pull nan": ("dpo", [*ONLINE, "--pull", "nan"], "pull=nan: give a finite number"),
    "every 0": ("dpo", [*ONLINE, "--every", "0"], "every=0: give a whole number of at least 1"),
    "weight and pull": ("dpo", [*ONLINE, "--pull", "0.1", "--weight", "1e-3"], "pull=0.1: --weight 0.001 says"),
    "density for adamw": ("dpo", ["--density", "0.1"], "density=0.1: only --optimizer ondare and onties take it"),
    "no base": ("dpo", ONLINE, "base_model=None: --optimizer ondare needs the model that SFT started from"),
    "lora": ("dpo", ["--optimizer", "onties", "--base_model", "{world}/base", "--use_peft"], "'onties': an election"),
    "both optimizers": ("dpo", ["--optimizer", "adamw", "--optim", "sgd"], "optim='sgd': --optimizer adamw chooses"),
    "ema range": ("dpo", ["--ema_decay", "1"], "ema_decay=1.0: give the policy's share per step in (0, 1)"),
    "child density": ("dpo", ["--child_density", "0.5"], "child_density=0.5: it needs --child_tuning f or d"),
    "child alone": ("dpo", ["--child_tuning", "f"], "child_tuning='f': give --child_density"),
    "child d in grpo": ("grpo", ["--child_tuning", "d", "--child_density", ".5"], "child_tuning='d': its Fisher"),
    "reward in dpo": ("dpo", ["--reward_function", "a.py:f"], "only grpo takes rewards"),
    "reward absent": ("grpo", ["--reward_function", "absent.py:f"], "give an existing Python file and a function"),
    "reward unnamed": ("grpo", ["--reward_function", "{world}/reward.py:absent"], "reward.py has no function absent"),
    "reward unknown": ("grpo", ["--reward_funcs", "absent"], "reward_funcs='absent': TRL has accuracy_reward"),
    "reward import": ("grpo", ["--reward_funcs", "absent.module.f"], "cannot be imported"),
    "no data": ("dpo", ["--dataset_name", "absent.jsonl"], "dataset_name='absent.jsonl': no such file"),
    "wrong data": ("dpo", ["--dataset_name", "{world}/sft.jsonl"], "dpo needs the columns chosen+rejected"),
    "empty data": ("dpo", ["--dataset_name", "{tmp}/empty.jsonl"], "the file is empty"),
    "no split": ("dpo", ["--dataset_train_split", "dev"], "dataset_train_split='dev'"),
    "no test split": ("dpo", ["--eval_strategy", "epoch"], "dataset_test_split='test'"),
    "no model": ("dpo", ["--model_name_or_path", "./absent"], "model_name_or_path='./absent': no such directory"),
    "no config": ("dpo", ["--model_name_or_path", "{tmp}"], "model_name_or_path="),
    "no tokenizer": ("kto", ["--model_name_or_path", "{tmp}/bare"], "tokenizer"),
    "no base there": ("dpo", [*ONLINE, "--base_model", "{tmp}"], "{tmp}"),
    "other base": ("dpo", [*ONLINE, "--base_model", "{tmp}/wide"], "base"),
    "base absent": (
        "dpo", [*ONLINE, "--base_model", "./absent"],
        "base_model='./absent': no such file or directory; give a model directory or a hub id",
    ),
    "base not on the hub": (
        "dpo", [*ONLINE, "--base_model", "nobody/absent"],
        "base_model='nobody/absent': neither a local directory nor a hub model",
    ),
    "reference not on the hub": (
        "sft", [*ONLINE, "--base_model", "{world}/base", "--reference_model", "nobody/absent"],
        "reference_model='nobody/absent': neither a local directory nor a hub model",
    ),
    "pulling reference not on the hub": (
        "sft", ["--l2_to_reference", "1", "--reference_model", "nobody/absent"],
        "reference_model='nobody/absent': neither",
    ),
    "unread base": (
        "dpo", ["--base_model", "{world}/base"],
        "base_model='{world}/base': only online merging reads it; add --optimizer ondare or onties, or drop it",
    ),
    "unread base of adamw": ("dpo", ["--optimizer", "adamw", "--base_model", "{world}/base"], "add --optimizer ondare"),
    "unread base in yaml": ("dpo", ["--config", "{tmp}/base.yaml"], "base_model='b': only online merging reads it"),
    "unread vocab": ("dpo", ["--base_vocab", "pad"], "base_vocab='pad': it needs --base_model"),
    "unread reference": (
        "sft", ["--reference_model", "{world}/base"], "sft reads it with --base_model, --l2_to_reference or",
    ),
    "unread evaluation": (
        "dpo", ["--eval_dataset_name", "absent.jsonl"],
        "eval_dataset_name='absent.jsonl': nothing is evaluated; add --eval_strategy epoch or steps",
    ),
    "unread threshold": (
        "dpo", ["--early_stopping_threshold", "0.1"],
        "early_stopping_threshold=0.1: it needs --early_stopping_patience",
    ),
    "unread batches": ("dpo", ["--child_batches", "32"], "child_batches=32: only --child_tuning d reads it"),
    "unread ema": ("dpo", ["--ema_evaluate", "false"], "ema_evaluate=False: it needs --ema_decay"),
    "unread in a sweep": ("dpo", ["--sweep", "child_batches=3,4"], "child_batches=3: only --child_tuning d reads it"),
    "no reference": ("dpo", ["--reference_model", "./absent"], "reference_model='./absent': no such directory"),
    "pull too large": ("dpo", [*ONLINE, "--base_model", "{world}/base", "--pull", "9"], "pull=9.0: would need"),
    "no checkpoint": ("dpo", ["--resume_from_checkpoint", "true"], "resume_from_checkpoint='true'"),
    "bad checkpoint": ("dpo", ["--resume_from_checkpoint", "{tmp}"], "no trainer_state.json there"),
    "patience without metric": (
        "dpo", ["--early_stopping_patience", "2", "--eval_strategy", "epoch"],
        "it needs --metric_for_best_model",
    ),
    "patience without evaluation": ("dpo", ["--early_stopping_patience", "2"], "it needs --eval_strategy"),
    "no yaml": ("dpo", ["--config", "absent.yaml"], "config='absent.yaml': cannot be read"),
    "broken yaml": ("dpo", ["--config", "{tmp}/broken.yaml"], "is no YAML"),
    "yaml list": ("dpo", ["--config", "{tmp}/list.yaml"], "it must hold a mapping"),
    "yaml name": ("dpo", ["--config", "{tmp}/unknown.yaml"], "--densty: unknown argument, did you mean --density?"),
    "sweep": ("dpo", ["--sweep", "density"], "sweep='density': write it as name=value,value"),
    "sweep unknown": ("dpo", ["--sweep", "depth=1,2"], "depth is no argument"),
    "sweep value": ("dpo", ["--sweep", "learning_rate=1e-3,high"], "invalid float value: 'high'"),
    "trl's own": ("kto", ["--per_device_train_batch_size", "1"], "KTOTrainer refuses this"),
    "trl's config": ("dpo", ["--loss_weights", "1", "2"], "DPOConfig: `loss_weights` must have the same length"),
    "all truncated": ("dpo", ["--max_length", "2"], "raise --max_length"),
}  # fmt: skip


@pytest.fixture(scope="module")
def broken(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("broken")
    (directory / "empty.jsonl").touch()
    (directory / "broken.yaml").write_text("a: [")
    (directory / "list.yaml").write_text("- a")
    (directory / "unknown.yaml").write_text("densty: 0.1")
    (directory / "base.yaml").write_text("base_model: b")
    shutil.copytree(world / "reference", directory / "bare")
    for file in (directory / "bare").iterdir():
        if "token" in file.name or "chat" in file.name:
            file.unlink()
    tiny_models.make_model(hidden=48).save_pretrained(directory / "wide")
    return directory


@pytest.mark.parametrize("name", WRONG)
def test_one_line(name: str, world: Path, broken: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer, further, says = WRONG[name]
    filled = [text.format(world=world, tmp=broken) for text in further]
    argv = tiny_models.arguments(world, trainer, tmp_path / "out", *filled)
    if name.startswith("reward") and trainer == "grpo":
        position = argv.index("--reward_function")
        del argv[position : position + 2]
    assert main(argv) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("paretune: error: ")
    assert err.count("\n") == 1, err
    assert says.format(world=world, tmp=broken) in err
    assert not (tmp_path / "out" / "training.json").exists() or name == "pull too large"


@pytest.mark.slow
def test_nothing_but_the_line(tmp_path: Path, world: Path) -> None:
    """In a process of its own: no warning, no notice, no progress bar around an error of the data."""
    argv = tiny_models.arguments(world, "dpo", tmp_path, "--dataset_name", world / "sft.jsonl")
    done = subprocess.run(
        [sys.executable, "-m", "paretune.cli.main", *argv], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("paretune: error: dataset_name=")
    assert done.stderr.count("\n") == 1, done.stderr


def test_errors_under_json_leave_stdout_empty(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny_models.arguments(world, "dpo", tmp_path, "--json", "--density", "0.1")) == 2
    assert capsys.readouterr().out == ""
    assert main(tiny_models.arguments(world, "dpo", tmp_path, "--json", "--dry-run")) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 4
