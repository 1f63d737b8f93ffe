"""``paretune train joint`` end to end: records, ideal values, sweeps, stopping, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from paretune.cli.main import main
from paretune.training.callbacks import Trajectory


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path_factory.getbasetemp() / "references"))


def argv(world: Path, output: Path, *more: object) -> list[str]:
    given: list[object] = [
        "train", "joint", "--model_name_or_path", world / "reference", "--sft_dataset", world / "sft.jsonl",
        "--preference_dataset", world / "dpo.jsonl", "--output_dir", output, "--max_steps", 4, "--learning_rate", 1e-2,
        "--logging_steps", 1, "--per_device_train_batch_size", 2, "--save_strategy", "no", "--disable_tqdm", "true",
    ]  # fmt: skip
    return [str(value) for value in [*given, *more]]


def train(world: Path, output: Path, *more: object) -> dict[str, Any]:
    assert main(argv(world, output, *more)) == 0
    return json.loads((output / "training.json").read_text())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def evaluation(world: Path) -> list[object]:
    return [
        "--eval_strategy", "steps", "--eval_steps", 2, "--sft_eval_dataset", world / "sft.jsonl",
        "--preference_eval_dataset", world / "dpo.jsonl",
    ]  # fmt: skip


RUNS: dict[str, list[str]] = {
    "alright": [],
    "mix ipo ondare": ["--schedule", "mix", "--preference_loss", "ipo", "--optimizer", "ondare", "--pull", "0.05",
                       "--density", "0.3", "--base_model", "{world}/base"],
    "maxright kto onties": ["--schedule", "maxright", "--preference_loss", "kto", "--preference_dataset",
                            "{world}/kto.jsonl", "--optimizer", "onties", "--base_model", "{world}/base",
                            "--density", "0.3", "--ideal_sft", "1.5", "--refresh_every", "2",
                            "--desirable_weight", "2"],
    "sft first, lora": ["--schedule", "sft-then-preference", "--use_peft", "--lora_target_modules", "q_proj", "v_proj",
                        "--sft_batch_size", "3", "--preference_batch_size", "1", "--gradient_accumulation_steps", "2"],
    "preference first, ema": ["--schedule", "preference-then-sft", "--ema_decay", "0.5", "--sft_max_length", "16"],
    "child f, smoothed": ["--child_tuning", "f", "--child_density", "0.5", "--label_smoothing", "0.1"],
    "child d": ["--child_tuning", "d", "--child_density", "0.1", "--child_batches", "3"],
    "another reference": ["--reference_model", "{world}/base"],
    "a soup": ["--reference_soup", "{world}/base", "{world}/reference", "--dtype", "bfloat16"],
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_runs(name: str, world: Path, tmp_path: Path) -> None:
    record = train(world, tmp_path, *(text.format(world=world) for text in RUNS[name]))
    key = "kto" if "kto" in name else "dpo"
    assert (record["status"], record["trainer"]) == ("finished", "joint")
    assert [step["step"] for step in record["steps"]] == [1, 2, 3, 4]
    for step in record["steps"]:
        trained = ["sft", key] if step["objective"] == "mix" else [step["objective"]]
        assert set(trained) <= set(step["loss"]) <= {"sft", key}
        assert all(math.isfinite(loss) for loss in step["loss"].values())
    assert set(record["losses"]["train"]) == {"sft", key} == set(record["data"])
    assert record["losses"]["eval"] == {}
    AutoTokenizer.from_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "training.json" in card
    assert f"final {key} loss, train rows" in card
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    if "lora" in name:
        assert (tmp_path / "adapter_model.safetensors").is_file()
        assert [step["objective"] for step in record["steps"]] == ["sft", "dpo", "dpo", "dpo"]  # 6 and 16 steps a pass
        return
    AutoModelForCausalLM.from_pretrained(tmp_path)
    start, end = weights(world / "reference"), weights(tmp_path)
    changed = sum(int((end[k] != v.to(end[k].dtype)).sum()) for k, v in start.items())
    assert changed > 0
    if name == "child d":
        assert changed <= 0.1 * sum(v.numel() for v in start.values())
    first = [step["loss"]["dpo"] for step in record["steps"] if "dpo" in step["loss"]][:1]
    if name == "another reference":
        assert abs(first[0] - math.log(2)) > 1e-4


def test_maxright_measures_its_ideals_first(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO", "paretune")
    more = ["--schedule", "maxright", "--measure_ideals", "true", "--refresh_every", 2, *evaluation(world)]
    record = train(world, tmp_path, *more)
    ideals = json.loads((tmp_path / "ideals.json").read_text())
    for name, objective in (("sft", "sft"), ("dpo", "preference")):
        alone = json.loads((tmp_path / f"ideal-{name}" / "training.json").read_text())
        assert {step["objective"] for step in alone["steps"]} == {name}
        assert alone["losses"]["train"][name] == ideals[name] == record["given"][f"ideal_{objective}"]
    gaps = [
        (0.5 * (s["stale"]["sft"] - ideals["sft"]), 0.5 * (s["stale"]["dpo"] - ideals["dpo"])) for s in record["steps"]
    ]
    assert [step["objective"] for step in record["steps"]] == ["sft" if sft >= dpo else "dpo" for sft, dpo in gaps]
    assert set(record["losses"]["eval"]) == {"sft", "dpo"}
    assert {"eval_sft_loss", "eval_dpo_loss", "eval_loss"} <= set(record["metrics"])
    out = capsys.readouterr().out
    assert "joint with adamw_torch_fused: 4 steps" in out
    assert "final losses on eval rows: sft" in out
    # again: measured once
    caplog.clear()
    train(world, tmp_path, *more)
    assert "measuring the ideal value" not in caplog.text


def test_sweep_is_a_front(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--sweep", "weights.dpo=0.01,0.5,0.99", *evaluation(world), "--json"]
    assert main(argv(world, tmp_path, *more)) == 0
    found = json.loads(capsys.readouterr().out)
    assert [record["point"] for record in found] == [{"weights.dpo": w} for w in ("0.01", "0.5", "0.99")]
    for record in found:
        training = json.loads((tmp_path / record["directory"] / "training.json").read_text())
        assert training["arguments"]["script"]["weight_preference"] == float(record["point"]["weights.dpo"])
        assert record["losses"] == training["losses"]
        assert record["steps"] == len(training["steps"]) == 4
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "sweep.jsonl").stat().st_mtime_ns
    assert main(argv(world, tmp_path, *more)) == 0
    assert (tmp_path / "sweep.jsonl").stat().st_mtime_ns == before
    capsys.readouterr()
    # a front that was swept stops a later run
    stopped = train(world, tmp_path / "x", *evaluation(world), "--stop_at_front", tmp_path / "sweep.jsonl",
                    "--max_steps", 40, "--schedule", "mix")  # fmt: skip
    assert len(stopped["steps"]) < 40
    assert stopped["stopped"].startswith("the evaluation losses reach the point sft")


def test_a_sweep_shares_its_ideals(world: Path, tmp_path: Path) -> None:
    more = ["--schedule", "maxright", "--measure_ideals", "true", "--max_steps", 2, "--sweep", "weights.dpo=0.3,0.7"]
    assert main(argv(world, tmp_path, *more)) == 0
    ideals = json.loads((tmp_path / "ideals.json").read_text())
    for weight in ("0.3", "0.7"):
        given = json.loads((tmp_path / f"weights.dpo={weight}" / "training.json").read_text())["given"]
        assert (given["ideal_sft"], given["ideal_preference"]) == (ideals["sft"], ideals["dpo"])


def test_stops_within(world: Path, tmp_path: Path) -> None:
    record = train(world, tmp_path, *evaluation(world), "--ideal_preference", 0.6, "--stop_within", 0.05,
                   "--max_steps", 30, "--schedule", "mix")  # fmt: skip
    assert len(record["steps"]) < 30
    assert record["stopped"].startswith("eval_dpo_loss 0.")


def test_interrupted_and_resumed(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more: list[object] = ["--schedule", "maxright", "--refresh_every", 3, "--save_strategy", "steps", "--save_steps", 2]
    more += ["--max_steps", 6]
    whole = train(world, tmp_path / "whole", *more)
    original = Trajectory.on_log

    def on_log(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt
        original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trajectory, "on_log", on_log)
        assert main(argv(world, tmp_path / "parts", *more)) == 130
    parts = train(world, tmp_path / "parts", *more, "--resume_from_checkpoint", "true")
    assert parts["resumed_from"].endswith("checkpoint-4")
    assert parts["steps"] == whole["steps"]
    ours = weights(tmp_path / "parts")
    assert all(torch.equal(ours[name], p) for name, p in weights(tmp_path / "whole").items())
    assert train(world, tmp_path / "parts", *more, "--resume_from_checkpoint", "true") == parts


def test_plan(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--dry-run", "--json", "--max_steps", -1, "--num_train_epochs", 2, "--sft_batch_size", 4]
    assert main(argv(world, tmp_path, *more)) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps"], plan["rows"]) == (16, 32)
    assert "reference" not in plan["bytes_per_parameter"]
    assert main(argv(world, tmp_path, *more, "--schedule", "sft-then-preference")) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2 * (4 + 8)
    assert not (tmp_path / "training.json").exists()


def test_one_command_line_serves_every_schedule(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a schedule does not use is told, not refused."""
    more = ["--weight_preference", 0.3, "--ideal_sft", 1.5, "--ideal_preference", 0, "--refresh_every", 5, "--dry-run"]
    for schedule, idle in (("maxright", 0), ("alright", 3), ("mix", 3), ("sft-then-preference", 4)):
        assert main(argv(world, tmp_path, *more, "--schedule", schedule)) == 0
        assert capsys.readouterr().out.count(f"is not used by --schedule {schedule}") == idle


def test_yaml(world: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("schedule: mix\nweight_preference: 0.25\nbeta: 0.3\n")
    record = train(world, tmp_path, "--config", tmp_path / "recipe.yaml")
    assert record["steps"][0]["objective"] == "mix"
    assert (record["arguments"]["script"]["weight_preference"], record["arguments"]["training"]["beta"]) == (0.25, 0.3)


WRONG: dict[str, tuple[list[str], str]] = {
    "no sft": (["--sft_dataset", ""], "sft_dataset=None: give a hub id"),
    "absent": (["--preference_dataset", "absent.jsonl"], "preference_dataset='absent.jsonl': no such file or folder"),
    "columns": (
        ["--preference_dataset", "{world}/sft.jsonl"],
        "dpo needs the columns chosen+rejected, it has messages",
    ),
    "weight": (["--weight_preference", "1.5"], "weight_preference=1.5: give a weight in [0, 1]"),
    "schedule": (["--schedule", "both"], "argument --schedule: invalid choice: 'both'"),
    "refresh": (["--schedule", "maxright", "--refresh_every", "0"], "refresh_every=0: give a whole number"),
    "ideal": (["--schedule", "maxright", "--ideal_sft", "nan"], "ideal_sft=nan: give a finite loss"),
    "ideal twice": (["--schedule", "maxright", "--ideal_sft", "1", "--measure_ideals"], "drop one of them"),
    "unread smoothing": (
        ["--preference_loss", "ipo", "--label_smoothing", "0.1"],
        "it needs --preference_loss sigmoid",
    ),
    "unread kto": (["--desirable_weight", "2"], "desirable_weight=2.0: it needs --preference_loss kto"),
    "unread evaluation": (["--sft_eval_dataset", "x.jsonl"], "sft_eval_dataset='x.jsonl': nothing is evaluated"),
    "other evaluation": (["--eval_strategy", "epoch", "--eval_dataset_name", "x"], "joint takes --sft_eval_dataset"),
    "no evaluation": (["--eval_strategy", "epoch"], "give --sft_eval_dataset, or set --eval_strategy no"),
    "stop unseen": (["--stop_within", "0.1", "--ideal_sft", "1"], "it looks at evaluations; add --eval_strategy steps"),
    "stop without ideal": (["--stop_within", "0.1", "--eval_strategy", "epoch"], "give --ideal_sft or"),
    "beta": (["--beta", "0"], "beta=0.0: give a finite number above 0"),
    "length": (["--max_length", "2"], "raise max_length"),
    "workers": (["--dataloader_num_workers", "2"], "dataloader_num_workers=2: joint training does not use it"),
    "kto weight swept": (["--sweep", "weights.kto=0.1,0.2"], "weights.kto is no argument of this command"),
    "dataset": (["--dataset_name", "x"], "--dataset_name x: unknown argument"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_line(name: str, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    further, says = WRONG[name]
    assert main(argv(world, tmp_path, *(text.format(world=world) for text in further))) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("paretune: error: ")]
    assert out == ""
    assert len(lines) == 1
    assert says in lines[0]
    assert not (tmp_path / "training.json").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "cannot be read"), ("", "it holds no points"), ('{"sft": 1}', 'write it as {"sft": loss, "dpo": loss}')],
)
def test_reference_fronts(
    text: str | None, says: str, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "front.jsonl").write_text(text)
    more = ["--stop_at_front", tmp_path / "front.jsonl", *evaluation(world)]
    assert main(argv(world, tmp_path, *more)) == 2
    assert says in capfd.readouterr().err
