"""The papers' recipes under ``examples/papers``: each plans a run, offline, with the numbers that it states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_pair, write_rows

from paretune.cli.main import main
from paretune.cli.train_arguments import parse

PAPERS = Path(__file__).parents[2] / "examples" / "papers"
RECIPES = sorted(path.name for path in PAPERS.glob("*.yaml"))
# beta, learning rate, batch, epochs, longest row
ULTRAFEEDBACK = (0.1, 1e-6, 8, 2, 2048)
NUMBERS: dict[str, tuple[float, ...]] = {
    "2309.06256-hh-rlhf-open-llama-3b.yaml": (0.1, 1e-6, 128, 1, 1024),
    "2405.17931-released-script.yaml": ULTRAFEEDBACK,
    "2405.17931-ultrafeedback-llama-3-8b.yaml": ULTRAFEEDBACK,
    "2405.17931-ultrafeedback-qwen1.5-7b.yaml": ULTRAFEEDBACK,
}
# optimizer, density, weight, variant
MERGING: dict[str, tuple[float, float, str]] = {
    "2405.17931-released-script.yaml": (1e-2, 1e-7, "released"),
    "2405.17931-ultrafeedback-llama-3-8b.yaml": (5e-4, 5e-7, "paper"),
    "2405.17931-ultrafeedback-qwen1.5-7b.yaml": (5e-4, 5e-7, "paper"),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    save_pair(directory)
    write_rows(directory / "pairs.jsonl", "dpo", count=64)
    return directory


def plan(name: str, capsys: pytest.CaptureFixture[str], *more: object) -> dict[str, Any]:
    argv = ["train", "dpo", "--config", PAPERS / name, *more, "--dry-run", "--json"]
    assert main([str(text) for text in argv]) == 0
    return json.loads(capsys.readouterr().out)


def given_model(name: str) -> list[str]:
    """The file of 2309.06256 leaves the SFT model to its user."""
    return ["--model_name_or_path", "nobody/open-llama-3b-sft"] if name.startswith("2309") else []


def test_every_recipe_is_listed() -> None:
    assert sorted(NUMBERS) == RECIPES
    listed = (PAPERS / "README.md").read_text()
    assert all(f"`{name}`" in listed for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_arguments(name: str) -> None:
    request = parse("dpo", ["--config", str(PAPERS / name), *given_model(name)]).request
    training: Any = request.training
    beta, rate, _, epochs, longest = NUMBERS[name]
    assert (training.beta, training.learning_rate, training.num_train_epochs) == (beta, rate, epochs)
    assert (training.max_length, training.loss_type, request.model.dtype) == (longest, ["sigmoid"], "bfloat16")
    assert (training.lr_scheduler_type.value, training.warmup_steps) == ("cosine", 100)
    assert request.own.reference_model is None
    if name in MERGING:
        assert (request.own.density, request.own.weight, request.own.variant) == MERGING[name]
        assert request.reference_path == request.model_path
        assert str(request.own.base_model).partition("-Chat")[0] in request.model_path


@pytest.mark.parametrize("name", RECIPES)
def test_plan_offline(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Hub ids that are not on this disk become notes."""
    found = plan(name, capsys, *given_model(name))
    assert found["batch"] == NUMBERS[name][2]
    assert found["optimizer"].startswith("ondare" if name in MERGING else "adamw")
    assert found["parameters"] is None
    assert any(found["model"] in note for note in found["notes"])


@pytest.mark.parametrize("name", RECIPES)
def test_plan_on_models_at_hand(name: str, pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With tiny models in the place of the real ones the whole plan is made, the statement of τ included."""
    more = ["--model_name_or_path", pair / "reference", "--dataset_name", pair / "pairs.jsonl"]
    if name in MERGING:
        more += ["--base_model", pair / "base"]
    found = plan(name, capsys, *more)
    batch, epochs = int(NUMBERS[name][2]), int(NUMBERS[name][3])
    assert (found["rows"], found["batch"], found["steps"]) == (64, batch, epochs * max(1, 64 // batch))
    assert found["parameters"] > 0
    if name in MERGING:
        density, weight, _ = MERGING[name]
        assert f"weight {weight:.3g}, density {density:.3g}" in found["statement"]
        assert found["tau"]
        assert found["bytes_per_parameter"]["master"] == 2
    else:
        assert found["statement"] is None
