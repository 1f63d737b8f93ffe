"""The probe measures what it says, leaves training alone, and warns when the tax outruns the reward."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model, make_tokenizer, rows

import paretune as pt
from paretune.errors import ArgumentError
from paretune.generation import Decoding, Generation
from paretune.generation.divergence import answer_tokens
from paretune.training.tax_probe import Reading, TaxProbe

PROMPTS = [row["prompt"] for row in rows("grpo", 6, seed=5)]


def make_trainer(folder: Path, model: Any = None, *, steps: int = 4, lr: float = 1e-2, **options: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(0)
    arguments = DPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=steps,
        per_device_train_batch_size=2, learning_rate=lr, save_strategy="no", logging_steps=1, seed=0,
    )  # fmt: skip
    return DPOTrainer(
        model=make_model() if model is None else model,
        ref_model=options.pop("ref_model", make_model()),
        args=arguments,
        train_dataset=Dataset.from_list(rows("dpo", 8)),
        processing_class=make_tokenizer(),
        **options,
    )


def politeness(prompts: Any, texts: Any) -> list[float]:
    return [float(text.split().count("please")) for text in texts]


def probe_of(trainer: Any, **options: Any) -> TaxProbe:
    given = {"sft": rows("sft", 5, seed=9), "reward": politeness, "every": 2, **options}
    return pt.TaxProbe(trainer, PROMPTS, decoding=Decoding(max_new_tokens=6, temperature=1.0, batch_size=4), **given)


def test_readings_are_logged_and_training_is_untouched(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "a", make_model(dropout=0.2))
    plain.train()
    trainer = make_trainer(tmp_path / "b", make_model(dropout=0.2))
    probe = probe_of(trainer)
    trainer.add_callback(probe)
    trainer.train()
    for (name, a), (_, b) in zip(plain.model.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert [reading.step for reading in probe.readings] == [0, 2, 4]
    logged = [log for log in trainer.state.log_history if "probe/kl" in log]
    assert [log["step"] for log in logged] == [0, 2, 4]
    assert set(logged[0]) >= {"probe/kl", "probe/sft_loss", "probe/tax", "probe/reward", "probe/reward_error"}
    first, *_, last = probe.readings
    assert first.kl == pytest.approx(0, abs=1e-6)
    assert first.tax == pytest.approx(0, abs=1e-6)
    assert last.kl > 0.01
    assert last.tax != 0


def test_against_plain_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL and loss equal the definitions, computed a row at a time without padding."""
    policy, reference = make_model(1), make_model(2)
    trainer = make_trainer(tmp_path, policy, ref_model=reference)
    probe = probe_of(trainer, reward=lambda prompts, texts: [float(i) for i in range(len(texts))])
    written: list[Generation] = []
    monkeypatch.setattr(
        "paretune.training.tax_probe.answer_tokens",
        lambda answers, *given: (written.extend(answers), answer_tokens(answers, *given))[1],
    )
    reading = probe.measure(3)
    tokenizer, policy = make_tokenizer(), trainer.model.eval()
    losses = []
    for row in rows("sft", 5, seed=9):
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        start = len(tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False))
        labels = torch.tensor([[-100] * start + ids[start:]])
        with torch.no_grad():
            losses.append(float(policy(input_ids=torch.tensor([ids]), labels=labels).loss))
    assert reading.sft_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)

    kl = []
    for one in written:
        start = tokenizer.apply_chat_template(PROMPTS[one.index], add_generation_prompt=True, return_dict=False)
        answer = tokenizer(one.text).input_ids
        answer += [tokenizer.eos_token_id] if one.finished else []
        ids = torch.tensor([start + answer])
        with torch.no_grad():
            p, q = (torch.log_softmax(m.eval()(input_ids=ids).logits[0].double(), -1) for m in (policy, reference))
        kl.append(float((p.exp() * (p - q)).sum(-1)[len(start) - 1 : -1].sum()))
    assert reading.kl == pytest.approx(sum(kl) / len(kl), rel=1e-5)
    assert len({len(one.text.split()) for one in written}) > 1  # so padding was at work
    assert (reading.step, reading.reward) == (3, 2.5)
    assert reading.reward_error == pytest.approx(torch.arange(6.0).std().item() / 6**0.5)


def test_an_adapter_is_its_own_reference(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trainer = make_trainer(
        tmp_path, ref_model=None, peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), steps=2
    )
    probe = probe_of(trainer)
    trainer.add_callback(probe)
    trainer.train()
    assert probe.readings[0].kl == pytest.approx(0, abs=1e-6)
    assert probe.readings[-1].kl > 0


def test_other_trainers(tmp_path: Path) -> None:
    """SFT keeps no reference model: it has to be given."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1,
                          disable_tqdm=True, save_strategy="no")  # fmt: skip
    trainer = SFTTrainer(make_model(), arguments, train_dataset=Dataset.from_list(rows("sft", 4)),
                         processing_class=make_tokenizer())  # fmt: skip
    with pytest.raises(ArgumentError, match="reference=None: give the model that training starts from"):
        probe_of(trainer)
    probe = probe_of(trainer, reference=make_model(), every=1)
    trainer.add_callback(probe)
    trainer.train()
    assert [reading.step for reading in probe.readings] == [0, 1]


def feed(trainer: Any, readings: list[Reading], patience: int = 2) -> TaxProbe:
    probe = probe_of(trainer, patience=patience)
    for reading in readings:
        probe.readings.append(reading)
        probe._judge(reading)
    return probe


def at(step: int, reward: float, tax: float) -> Reading:
    return Reading(step, kl=1.0, sft_loss=1.0 + tax, tax=tax, tax_error=0.01, reward=reward, reward_error=0.05)


@pytest.mark.parametrize(
    ("course", "warned"),
    [
        ([(0.2, 0.0), (0.5, 0.1), (0.6, 0.2), (0.7, 0.3)], None),  # reward still rises
        ([(0.2, 0.0), (0.7, 0.1), (0.6, 0.1), (0.6, 0.11)], None),  # the tax rises within noise
        ([(0.2, 0.0), (0.7, 0.1), (0.6, 0.3)], None),  # not twice in a row
        ([(0.2, 0.0), (0.7, 0.1), (0.6, 0.3), (0.8, 0.35), (0.7, 0.36)], None),  # a new best in between
        ([(0.2, 0.0), (0.7, 0.1), (0.6, 0.3), (0.7, 0.4), (0.6, 0.5)], "step 30: the tax outruns the reward"),
    ],
)  # fmt: skip
def test_warning(
    tmp_path: Path, course: list[tuple[float, float]], warned: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path)
    with caplog.at_level(logging.WARNING, logger="paretune"):
        feed(trainer, [at(10 * i, *values) for i, values in enumerate(course)])
    said = [record.getMessage() for record in caplog.records if record.name.startswith("paretune")]
    assert len(said) == (0 if warned is None else 1)
    assert warned is None or said[0].startswith(warned)


def test_wrong_arguments(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    for options, named in (({"every": 0}, "every=0"), ({"patience": True}, "patience=True")):
        with pytest.raises(ArgumentError, match=named):
            probe_of(trainer, **options)
    with pytest.raises(ArgumentError, match="prompts"):
        TaxProbe(trainer, [])
    with pytest.raises(ArgumentError, match="reward=1: return one number for each of 6 answers"):
        probe_of(trainer, reward=lambda prompts, texts: [1.0]).measure(0)
