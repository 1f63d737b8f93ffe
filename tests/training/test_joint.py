"""The joint trainer around its step: interruptions, ranks, optimizers, evaluation, lengths, refusals."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_models
import torch
import transformers

import paretune as pt
from paretune.training.draws import Draws
from paretune.training.objectives import Objective

STEPS = 6


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path_factory.getbasetemp() / "references"))


def arguments(directory: Path, **more: Any) -> transformers.TrainingArguments:
    fixed: dict[str, Any] = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    fixed |= {"max_steps": STEPS, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "logging_steps": 1}
    return transformers.TrainingArguments(str(directory), **(fixed | more))


def joint(directory: Path, schedule: Any = None, *, model: Any = None, preference: str = "dpo", **more: Any) -> Any:
    options = {name: more.pop(name) for name in ("optimizer", "callbacks") if name in more}
    kind = {"dpo": pt.DPO, "kto": pt.KTO}[preference]
    objectives: dict[str, Any] = {"sft": pt.SFT(tiny_models.rows("sft", 7, 1), batch_size=3)}
    objectives[preference] = kind(tiny_models.rows(preference, 9, 2))
    return pt.JointTrainer(
        tiny_models.make_model(dropout=0.2) if model is None else model, arguments(directory, **more),
        objectives=objectives, schedule=schedule, processing_class=tiny_models.make_tokenizer(), **options,
    )  # fmt: skip


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


SCHEDULES: dict[str, Any] = {
    "mix": lambda: pt.Mix({"sft": 0.3, "dpo": 0.7}),
    "alright": lambda: pt.Alright({"sft": 0.5, "dpo": 0.5}),
    "maxright": lambda: pt.MaxRight({"sft": 0.3, "dpo": 0.7}, {"sft": 2.0}, refresh_every=4),
    "sequential": lambda: pt.Sequential(["dpo", "sft"], [0.5, 0.5]),
}


RESUMED = [("mix", 3), ("alright", 4), ("sequential", 3), ("maxright", 2), ("maxright", 4)]  # 4: a refresh is next
RESUMED_SLOW = [(s, k) for s in SCHEDULES for k in range(1, STEPS) if (s, k) not in RESUMED]


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    ("schedule", "step"), [*RESUMED, *(pytest.param(*case, marks=pytest.mark.slow) for case in RESUMED_SLOW)]
)
def test_resumed_from_any_step_is_bit_equal(
    schedule: str, step: int, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    """Dropout makes the random state part of every result."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    options |= {"lr_scheduler_type": "cosine", "warmup_steps": 2}
    if schedule not in uninterrupted:
        uninterrupted[schedule] = joint(tmp_path, SCHEDULES[schedule](), **options)
        uninterrupted[schedule].train()
    whole = uninterrupted[schedule]
    resumed = joint(tmp_path / "resumed", SCHEDULES[schedule](), **options)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / f"checkpoint-{step}"))
    assert resumed.steps == whole.steps
    wanted = weights(whole)
    assert [name for name, p in weights(resumed).items() if not torch.equal(p, wanted[name])] == []
    assert numbers(resumed) == numbers(whole)


def numbers(trainer: Any) -> list[dict[str, Any]]:
    """What was logged at steps, apart from the time it took."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in entries]


def test_a_second_training_is_like_the_first(tmp_path: Path) -> None:
    trainer = joint(tmp_path, model=tiny_models.make_model())
    begin = weights(trainer)
    trainer.train()
    steps = list(trainer.steps)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            p.copy_(begin[name])
    trainer.optimizer = None
    trainer.train()
    assert trainer.steps == steps


def test_resuming_what_is_no_joint_run(tmp_path: Path) -> None:
    trainer = joint(tmp_path)
    with pytest.raises(pt.StateError, match=r"no readable joint.json, so it is no joint training's"):
        trainer.train(resume_from_checkpoint=str(tmp_path))
    state = {"taken": {"sft": 3, "kto": 3}, "values": {}, "steps": []}
    (tmp_path / "joint.json").write_text(json.dumps(state))
    with pytest.raises(pt.StateError, match="it trained sft, kto, this run trains sft, dpo"):
        trainer.train(resume_from_checkpoint=str(tmp_path))


# -- which rows ----------------------------------------------------------------------------------------------


def test_draws_go_through_the_data_again_and_again() -> None:
    draws = Draws("sft", rows=10, batch_size=4, seed=1)
    rows = [row for number in range(5) for row in draws.at(number)]
    assert Counter(rows[:10]) == Counter(rows[10:]) == Counter(range(10))
    assert rows[:10] != rows[10:]
    assert rows == [row for number in range(5) for row in Draws("sft", 10, 4, 1).at(number)]
    for other in (Draws("dpo", 10, 4, 1), Draws("sft", 10, 4, 2)):
        assert rows != [row for number in range(5) for row in other.at(number)]
    assert (draws.steps(1), draws.steps(2), draws.steps(3)) == (3, 2, 1)
    assert len(Draws("sft", rows=3, batch_size=8, seed=0).at(5)) == 8


class Seen(Objective):
    """Counts what it is asked for; its loss is a scripted number."""

    def __init__(self, rows: int, script: list[float] | None = None) -> None:
        super().__init__(list(range(rows)), eval_dataset=list(range(rows)))
        self.trained: list[list[int]] = []
        self.script = script or [1.0]
        self.calls = 0

    def prepare(self, setup: Any) -> None:
        self.setup = setup

    def rows(self, split: str) -> int:
        return len(self.datasets[split])

    def batch(self, split: str, rows: Any) -> dict[str, torch.Tensor]:
        return {"rows": torch.tensor(rows)}

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        value = self.script[min(self.calls, len(self.script) - 1)]
        self.calls += 1
        if torch.is_grad_enabled():
            self.trained.append(batch["rows"].tolist())
        return model.weight.sum() * 0 + value


def test_no_batch_is_thrown_away(tmp_path: Path) -> None:
    """What MAXRIGHT peeks at is what it trains on next, and each data set is gone through in full."""
    one, other = Seen(6, [3, 3, 1, 1, 3, 3]), Seen(4, [2, 2, 2, 2])
    trainer = pt.JointTrainer(
        torch.nn.Linear(1, 1, bias=False), arguments(tmp_path, max_steps=12, per_device_train_batch_size=2),
        objectives={"one": one, "other": other}, schedule=pt.MaxRight(refresh_every=2),
    )  # fmt: skip
    trainer.train()
    for objective, draws in ((one, Draws("one", 6, 2, 42)), (other, Draws("other", 4, 2, 42))):
        assert objective.trained == [draws.at(number) for number in range(len(objective.trained))]
    assert len(one.trained) + len(other.trained) == 12
    assert one.trained
    assert other.trained


def test_maxright_on_a_script(tmp_path: Path) -> None:
    """Chosen by the argmax of weighted gaps; the others' values stay until a refresh."""
    #  one: measured 3, trained 3, 1.5 | measured 1, trained 1 … ; other: measured 2, trained 2 | measured 2.5 …
    one, other = Seen(9, [3.0, 3.0, 1.5, 1.0, 1.0]), Seen(9, [2.0, 2.0, 2.5, 2.5, 0.5])
    trainer = pt.JointTrainer(
        torch.nn.Linear(1, 1, bias=False), arguments(tmp_path, max_steps=6), objectives={"one": one, "other": other},
        schedule=pt.MaxRight({"one": 0.5, "other": 0.5}, refresh_every=3),
    )  # fmt: skip
    trainer.train()
    seen = [(step["objective"], step["loss"], step["stale"]) for step in trainer.steps]
    assert seen == [
        ("one", {"other": 2.0, "one": 3.0}, {"one": 3.0, "other": 2.0}),
        ("one", {"one": 1.5}, {"one": 3.0, "other": 2.0}),
        ("other", {"other": 2.0}, {"one": 1.5, "other": 2.0}),
        ("other", {"one": 1.0, "other": 2.5}, {"one": 1.0, "other": 2.5}),
        ("other", {"other": 0.5}, {"one": 1.0, "other": 2.5}),
        ("one", {"one": 1.0}, {"one": 1.0, "other": 0.5}),
    ]


@pytest.mark.parametrize(
    "schedule", ["alright", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mix", "maxright", "sequential"))]
)
def test_unequal_lengths(schedule: str, tmp_path: Path) -> None:
    trainer = pt.JointTrainer(
        tiny_models.make_model(), arguments(tmp_path, max_steps=8, per_device_train_batch_size=4),
        objectives={"sft": pt.SFT(tiny_models.rows("sft", 3)), "dpo": pt.DPO(tiny_models.rows("dpo", 100) * 10)},
        schedule=SCHEDULES[schedule](), processing_class=tiny_models.make_tokenizer(),
    )  # fmt: skip
    assert trainer.train().global_step == 8
    assert {"mix"} == {step["objective"] for step in trainer.steps} or len(
        {step["objective"] for step in trainer.steps}
    ) == 2


def test_epochs(tmp_path: Path) -> None:
    """One pass over the data set of most steps: 9 pairs by 2 are 5 steps, 7 chats by 3 are 3."""
    for schedule, steps in (("mix", 5), ("sequential", 8)):
        trainer = joint(tmp_path, SCHEDULES[schedule](), max_steps=-1, num_train_epochs=2)
        assert trainer.train().global_step == 2 * steps
    trainer = joint(tmp_path, max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=2)
    assert trainer.train().global_step == 3


# -- logs and evaluation -------------------------------------------------------------------------------------


def test_logs(tmp_path: Path) -> None:
    trainer = joint(tmp_path, pt.Alright({"sft": 0.5, "dpo": 0.5}), logging_steps=3, max_steps=9)
    metrics = trainer.train().metrics
    assert trainer.state.total_flos > 0
    for entry in trainer.state.log_history[:-1]:
        part = trainer.steps[entry["step"] - 3 : entry["step"]]
        for name in ("sft", "dpo"):
            losses = [step["loss"][name] for step in part if step["objective"] == name]
            assert (f"{name}_loss" in entry) == bool(losses)
            if losses:
                assert entry[f"{name}_loss"] == pytest.approx(sum(losses) / len(losses))
        assert entry["loss"] == pytest.approx(sum(step["loss"][step["objective"]] for step in part) / 3, rel=1e-5)
    rows = sum({"sft": 3, "dpo": 2}[step["objective"]] for step in trainer.steps)
    assert metrics["train_samples_per_second"] == pytest.approx(rows / metrics["train_runtime"], rel=1e-2)


def test_evaluation(tmp_path: Path) -> None:
    pairs, chats = tiny_models.rows("dpo", 5, 8), tiny_models.rows("sft", 7, 9)
    objectives = {
        "sft": pt.SFT(tiny_models.rows("sft", 4), eval_dataset=chats),
        "dpo": pt.DPO(tiny_models.rows("dpo", 4), eval_dataset=pairs),
    }
    trainer = pt.JointTrainer(
        tiny_models.make_model(dropout=0.5),
        arguments(tmp_path, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2),
        objectives=objectives, schedule=pt.Mix({"sft": 0.25, "dpo": 0.75}),
        processing_class=tiny_models.make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    last = entries[-1]
    trainer.model.eval()
    for name, rows in (("sft", 7), ("dpo", 5)):
        with torch.no_grad():
            whole = objectives[name].loss(trainer.model, objectives[name].batch("eval", range(rows)))
        assert last[f"eval_{name}_loss"] == pytest.approx(float(whole), rel=1e-5)
    assert last["eval_loss"] == pytest.approx(0.25 * last["eval_sft_loss"] + 0.75 * last["eval_dpo_loss"])
    assert set(trainer.measure("train", rows=2)) == {"sft", "dpo"}
    with pytest.raises(pt.ArgumentError, match="give it to the objective"):
        trainer.evaluate(eval_dataset=[1])


def test_best_model_and_early_stopping_see_the_losses(tmp_path: Path) -> None:
    one, other = Seen(4, [1.0] * 2 + [0.5, 0.7] * 20), Seen(4)
    trainer = pt.JointTrainer(
        torch.nn.Linear(1, 1, bias=False),
        arguments(
            tmp_path, max_steps=20, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
            metric_for_best_model="eval_one_loss", load_best_model_at_end=True,
        ),
        objectives={"one": one, "other": other}, schedule=pt.Sequential(["other", "one"], [1.0, 0.0]),
        callbacks=[transformers.EarlyStoppingCallback(3)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step < 20
    assert trainer.state.best_metric == 0.5


# -- optimizers and adapters ---------------------------------------------------------------------------------


def moved(trainer: Any, begin: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((p - begin[name]).square().sum()) for name, p in weights(trainer).items()))


@pytest.mark.parametrize("kind", [pt.OnDARE, pt.OnTIES])
def test_online_merging(kind: Any, world: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tau = pt.TaskVector.between(base=str(world / "base"), reference=str(world / "reference"))
    model = AutoModelForCausalLM.from_pretrained(world / "reference")
    trainer = joint(
        tmp_path, SCHEDULES["alright"](), model=model,
        optimizer=lambda groups, total_steps: kind(groups, tau, density=0.5, pull=0.1, total_steps=total_steps),
    )  # fmt: skip
    begin = weights(trainer)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, kind)
    assert moved(trainer, begin) > 0


def test_ready_optimizer_and_average(tmp_path: Path) -> None:
    model = tiny_models.make_model()
    callback = pt.EMACallback(lambda named: pt.EMA(named, decay=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = joint(tmp_path, model=model, optimizer=optimizer, callbacks=[callback], learning_rate=0.1)
    begin = weights(trainer)
    trainer.train()
    assert moved(trainer, begin) > 0
    trainer.model.load_state_dict(begin, strict=False)


def test_lora_and_its_implicit_reference(tmp_path: Path) -> None:
    """The reference is the model under a fresh adapter, so its file serves every adapter and seed."""
    peft = pytest.importorskip("peft")
    tokenizer, pairs = tiny_models.make_tokenizer(), tiny_models.rows("dpo", 4)
    cache = tmp_path / "cache"

    def trainer(seed: int, *, spoil: bool = False) -> Any:
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(tiny_models.make_model(), config)
        if spoil:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "lora_B" in name:
                        p.fill_(0.1)
        return pt.JointTrainer(
            model, arguments(tmp_path), objectives={"dpo": pt.DPO(pairs, cache_dir=cache)}, processing_class=tokenizer
        )

    first = trainer(0)
    plain = pt.DPO(pairs, cache_dir=tmp_path / "other")
    pt.JointTrainer(
        tiny_models.make_model(), arguments(tmp_path), objectives={"dpo": plain}, processing_class=tokenizer
    )
    ours, theirs = (o.batch("train", range(4))["ref_logps"] for o in (first.objectives["dpo"], plain))
    torch.testing.assert_close(ours, theirs)
    trainer(1)
    assert len(list(cache.iterdir())) == 1
    trained = trainer(1, spoil=True)  # an adapter that says something is part of the reference
    assert len(list(cache.iterdir())) == 2
    assert trained.measure("train")["dpo"] == pytest.approx(math.log(2), abs=1e-6)
    first.train()
    begin = dict(tiny_models.make_model().named_parameters())
    for name, p in first.model.named_parameters():
        if "lora" not in name:
            assert torch.equal(p, begin[name.replace("base_model.model.", "").replace("base_layer.", "")])


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [("auto_find_batch_size", True), ("label_smoothing_factor", 0.1), ("dataloader_num_workers", 2)],
)
def test_arguments_that_would_not_be_used(argument: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(pt.ArgumentError, match=f"{argument}={value}: joint training does not use it"):
        joint(tmp_path, **{argument: value})


def test_wrong_objectives_and_schedules(tmp_path: Path) -> None:
    model, given = tiny_models.make_model(), arguments(tmp_path)

    def make(objectives: Any, schedule: Any = None) -> Any:
        return pt.JointTrainer(model, given, objectives=objectives, schedule=schedule)

    sft = pt.SFT(tiny_models.rows("sft", 2))
    with pytest.raises(pt.ArgumentError, match="give at least one"):
        make({})
    with pytest.raises(pt.ArgumentError, match="your own Objective"):
        make({"sft": tiny_models.rows("sft", 2)})
    with pytest.raises(pt.ArgumentError, match="rename it"):
        make({"mix": sft})
    with pytest.raises(pt.ArgumentError, match=r"give pt.Mix\(\)"):
        make({"sft": sft}, "mix")
    with pytest.raises(pt.ArgumentError, match="'dpo' is no objective; there are sft"):
        make({"sft": sft}, pt.Mix({"sft": 0.5, "dpo": 0.5}))
    with pytest.raises(pt.ArgumentError, match="processing_class=None: sft needs a tokenizer with a padding token"):
        make({"sft": sft})
    with pytest.raises(pt.CheckpointError, match=r"model='./absent'"):
        pt.JointTrainer("./absent", given, objectives={"sft": sft})


def test_a_schedule_that_chooses_nobody(tmp_path: Path) -> None:
    class Nobody(pt.Schedule):
        def choose(self, step: int, total_steps: int, values: Any) -> dict[str, float]:
            return {"absent": 1.0}

    with pytest.raises(pt.ArgumentError, match="it must choose among the objectives sft, dpo"):
        joint(tmp_path, Nobody()).train()


# -- ranks ---------------------------------------------------------------------------------------------------


def _on_rank(rank: int, directory: str) -> None:
    for name, preference, micro in CASES:
        trainer = _ranked(Path(directory), name, preference, micro, size=2)
        trainer.train()
        if rank == 0:
            torch.save({"steps": trainer.steps, "weights": weights(trainer)}, Path(directory) / f"{name}-{micro}.pt")


CASES = [("mix", "dpo", 2), ("alright", "dpo", 1), ("maxright", "kto", 2), ("sequential", "dpo", 1)]


def _ranked(directory: Path, name: str, preference: str, micro: int, size: int) -> Any:
    objectives: dict[str, Any] = {"sft": pt.SFT(tiny_models.rows("sft", 7, 1), eval_dataset=tiny_models.rows("sft", 3))}
    kind = pt.KTO if preference == "kto" else pt.DPO
    objectives[preference] = kind(tiny_models.rows(preference, 9, 2))
    schedule = SCHEDULES[name]() if preference == "dpo" else pt.MaxRight({"sft": 0.3, "kto": 0.7}, refresh_every=2)
    return pt.JointTrainer(
        tiny_models.make_model().double(),  # in float32 Adam makes whole steps of gradients that are rounding errors
        arguments(
            directory, per_device_train_batch_size=size, gradient_accumulation_steps=micro, eval_strategy="steps",
            eval_steps=3, learning_rate=1e-3,
        ),
        objectives=objectives, schedule=schedule, processing_class=tiny_models.make_tokenizer(),
    )  # fmt: skip


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path) -> None:
    ranks.spawn(_on_rank, 2, str(tmp_path))
    for name, preference, micro in CASES:
        alone = _ranked(tmp_path, name, preference, micro, size=4)
        alone.train()
        together = torch.load(tmp_path / f"{name}-{micro}.pt", weights_only=True)
        for one, other in zip(alone.steps, together["steps"], strict=True):
            assert one["objective"] == other["objective"]
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
            assert one["stale"] == pytest.approx(other["stale"], abs=1e-5)
        for key, p in weights(alone).items():
            torch.testing.assert_close(p, together["weights"][key], rtol=0, atol=1e-5, msg=f"{name} {key}")
