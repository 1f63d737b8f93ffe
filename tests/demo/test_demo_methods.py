"""Every row of the demo makes a model; the short DPO loop equals TRL's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from paretune.demo import cures, rehearse
from paretune.demo.align import DPOSettings, PairTensors, align, completion_logps, dpo_loss
from paretune.demo.methods import Bench, Row, rows
from paretune.demo.picture import write_pictures
from paretune.demo.pretrain import Phase, Recipe, Shape, load_model, prepare
from paretune.demo.results import summarize
from paretune.demo.world import World


class ShortBench(Bench):
    """Three steps of four pairs."""

    @property
    def settings(self) -> DPOSettings:
        return DPOSettings(steps=3, batch=4, seed=self.seed)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    recipe = Recipe(
        World(pairs=24, items_per_skill=3),
        Shape(hidden=16, layers=3, heads=2, intermediate=16),
        Phase(steps=3, rows=2, lr=1e-3),
        Phase(steps=3, rows=2, lr=1e-3),
    )
    base, reference = prepare(recipe, tmp_path_factory.mktemp("cache"))
    return ShortBench(recipe, base, reference, tmp_path_factory.mktemp("out"))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.key)
def test_every_row_makes_a_model(bench: Bench, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    if row.hyperparameters.get("every", 1) > 1:
        row = Row(row.method, row.family, row.make, row.hyperparameters | {"every": 3}, row.quick)
    if "stops" in row.hyperparameters:
        row = Row(row.method, row.family, row.make, {"stops": (1, 2)}, row.quick)
    if row.method == "self-rehearsal":
        monkeypatch.setattr(rehearse, "PROMPTS", 12)
        # A model of three steps never ends an answer.
        said = [{"messages": [{"role": "user", "content": "who ?"}, {"role": "assistant", "content": "mira ."}]}]
        monkeypatch.setattr("paretune.training.rehearsal.self_answers", lambda *_, **__: said * 3)
    monkeypatch.setattr(cures, "FISHER_SAMPLES", 4)
    made = 0
    for method, _, model in row.make(bench, row):
        made += 1
        moved = max(
            float((p - q).detach().abs().max())
            for p, q in zip(model.parameters(), load_model(bench.reference).parameters(), strict=True)
        )
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        assert (moved > 0) == (method != "reference (SFT)")
    rungs = {"EMA": 4, "TIES": 4 if row.hyperparameters.get("density") == 0.7 else 1, "scaled back": 4, "replay": 4}
    rungs |= {"self-rehearsal": 4, "Fisher gate": 5}
    assert made == (2 if "stops" in row.hyperparameters else rungs.get(row.method, 1))


def test_rows_have_records_of_their_own() -> None:
    keys = [row.key for row in rows()]
    assert len(set(keys)) == len(keys)
    assert {row.key for row in rows(quick=True)} < set(keys)


def test_preparing_twice_trains_once(bench: Bench) -> None:
    before = (bench.reference / "model.safetensors").stat().st_mtime_ns
    assert prepare(bench.recipe, bench.base.parent) == (bench.base, bench.reference)
    assert (bench.reference / "model.safetensors").stat().st_mtime_ns == before


def test_loss_equals_trl(bench: Bench, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    pairs = bench.recipe.world.preferences[:8]
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": p.prompt}],
                "chosen": [{"role": "assistant", "content": p.chosen}],
                "rejected": [{"role": "assistant", "content": p.rejected}],
            }
            for p in pairs
        ]
    )
    arguments = DPOConfig(
        str(tmp_path), beta=0.1, per_device_train_batch_size=8, use_cpu=True, bf16=False,
        max_steps=1, learning_rate=0.0,
        gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    policy = load_model(bench.base)  # not the reference, so that the loss is not log 2
    trainer = DPOTrainer(
        policy, load_model(bench.reference), arguments, train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(bench.reference),
    )  # fmt: skip
    trainer.train()
    theirs = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    encoded = PairTensors.encode(pairs).with_reference(load_model(bench.reference))
    logps = completion_logps(load_model(bench.base), encoded.ids.flatten(0, 1), encoded.completion.flatten(0, 1))
    ours = dpo_loss(logps.view(-1, 2), encoded.ref_logps, 0.1).item()
    assert abs(ours - 0.6931) > 1e-4
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_alignment_follows_from_the_seed(bench: Bench) -> None:
    models = []
    for _ in range(2):
        model = bench.model()
        assert list(align(model, bench.pairs, bench.settings, stops=(1,))) == [1, 3]
        models.append(model)
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_pictures_and_hostile_names(tmp_path: Path) -> None:
    from test_scores import records

    seeds = records()
    seeds[0][4][0]["method"] = "<script>alert(1)</script>"
    write_pictures(summarize(seeds, [0]), tmp_path)
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--seeds", "a"], "--seeds"),
        (["--seeds", "1,1"], "--seeds"),
        (["--workers", "0"], "--workers"),
        (["--seed", "1", "--seeds", "2"], "--seeds"),
        (["--outt", "x"], "--outt"),
    ],
)
def test_wrong_arguments(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    from paretune.cli.main import main

    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert named in error
    assert "\n" not in error


def test_json_of_the_results_is_plain() -> None:
    from test_scores import records

    json.loads(json.dumps(summarize(records(), [0])))
