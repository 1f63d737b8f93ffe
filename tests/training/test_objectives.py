"""Losses equal TRL's on the same batches; rows of every format become the tokens that TRL trains on."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from datasets import Dataset

import paretune as pt
from paretune.training.sequences import pair_rows, sft_rows, take_rows, unpaired_rows
from paretune.training.trl_classes import argument_classes, trainer_class

COUNT = 6


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))


def arguments(directory: Path, **more: Any) -> transformers.TrainingArguments:
    fixed = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return transformers.TrainingArguments(str(directory), **fixed, **more)


def pair(seed: int = 0) -> tuple[Any, Any]:
    """A reference, and a policy that has moved away from it."""
    reference = tiny_models.make_model(seed)
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(9)))
    return policy, reference


def same(ours: torch.Tensor, wanted: Any) -> None:
    torch.testing.assert_close(ours, wanted.detach(), rtol=2e-6, atol=0, check_stride=False)


def trl_trainer(kind: str, policy: Any, reference: Any, rows: list[Any], directory: Path, **options: Any) -> Any:
    settings = argument_classes(kind)[1]
    more = {} if kind == "sft" else {"ref_model": reference}
    return trainer_class(kind)(
        model=policy, **more, train_dataset=Dataset.from_list(rows), processing_class=tiny_models.make_tokenizer(),
        args=settings(
            output_dir=str(directory), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", disable_tqdm=True, per_device_train_batch_size=COUNT, max_length=16, **options,
        ),
    )  # fmt: skip


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows as text instead of messages."""
    return [
        {name: value[0]["content"] + " " if isinstance(value, list) else value for name, value in row.items()}
        for row in rows
    ]


@pytest.mark.parametrize("form", ["messages", "text"])
@pytest.mark.parametrize("options", [{}, {"beta": 0.5}, {"loss_type": "ipo", "beta": 0.3}], ids=str)
def test_dpo_is_trls(options: dict[str, Any], form: str, tmp_path: Path) -> None:
    policy, reference = pair()
    rows = tiny_models.rows("dpo", COUNT)
    rows = plain(rows) if form == "text" else rows
    theirs = trl_trainer("dpo", policy, reference, rows, tmp_path, **{"loss_type": ["sigmoid"]} | {
        name: [value] if name == "loss_type" else value for name, value in options.items()})  # fmt: skip
    batch = theirs.data_collator([theirs.train_dataset[row] for row in range(COUNT)])
    wanted = theirs.compute_loss(theirs.model, batch)
    objective = pt.DPO(rows, ref_model=reference, max_length=16, **options)
    trainer = pt.JointTrainer(
        policy, arguments(tmp_path), objectives={"dpo": objective}, processing_class=tiny_models.make_tokenizer()
    )
    ours = objective.batch("train", range(COUNT))
    length = ours["input_ids"].shape[1]
    assert torch.equal(ours["input_ids"], batch["input_ids"][:, :length])
    assert torch.equal(ours["completion_mask"].long(), batch["completion_mask"][:, :length])
    torch.testing.assert_close(
        objective.loss(trainer.model, ours), wanted.detach(), rtol=2e-6, atol=0, check_stride=False
    )


def test_label_smoothing_is_the_mean_over_wrong_labels(tmp_path: Path) -> None:
    """(1 - e) of the loss as labelled and e of the loss with answers exchanged."""
    policy, reference = pair()
    rows = tiny_models.rows("dpo", COUNT)
    exchanged = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]

    def loss(data: list[Any], smoothing: float) -> float:
        objective = pt.DPO(data, ref_model=reference, label_smoothing=smoothing)
        tokenizer = tiny_models.make_tokenizer()
        trainer = pt.JointTrainer(
            policy, arguments(tmp_path), objectives={"dpo": objective}, processing_class=tokenizer
        )
        return trainer.measure("train")["dpo"]

    assert loss(rows, 0.2) == pytest.approx(0.8 * loss(rows, 0) + 0.2 * loss(exchanged, 0), rel=1e-6)


@pytest.mark.parametrize("data", ["kto", "dpo"])
def test_kto_is_trls(data: str, tmp_path: Path) -> None:
    policy, reference = pair()
    rows = tiny_models.rows(data, COUNT)
    count = COUNT * (2 if data == "dpo" else 1)
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    theirs = trl_trainer("kto", policy, reference, rows, tmp_path, beta=0.4, **weights)
    batch = theirs.data_collator([theirs.train_dataset[row] for row in range(count)])
    if "input_ids" not in batch:
        pytest.skip("TRL's experimental KTO names its batches otherwise")
    wanted = theirs.compute_loss(theirs.model, dict(batch))
    objective = pt.KTO(rows, ref_model=reference, beta=0.4, max_length=16, **weights)
    tokenizer = tiny_models.make_tokenizer()
    pt.JointTrainer(policy, arguments(tmp_path), objectives={"kto": objective}, processing_class=tokenizer)
    ours = objective.batch("train", range(count))
    length = ours["input_ids"].shape[1]
    assert torch.equal(ours["input_ids"], batch["input_ids"][:, :length])
    assert torch.equal(ours["label"], torch.as_tensor(batch["label"]))
    # the mismatched answers are others in TRL's batch: ours from here on are TRL's
    with torch.no_grad():
        logps, kl_logps = theirs.compute_ref_log_probs(reference, batch)
    torch.testing.assert_close(ours["ref_logps"], logps, rtol=1e-5, atol=1e-5)
    same = {"ref_KL_logps": kl_logps, "KL_input_ids": batch["KL_input_ids"]}
    same["KL_completion_mask"] = batch["KL_completion_mask"].bool()
    torch.testing.assert_close(
        objective.loss(policy, ours | same), wanted.detach(), rtol=2e-6, atol=0, check_stride=False
    )


@pytest.mark.parametrize("form", ["prompt and completion", "text", "plain prompt and completion"])
def test_sft_is_trls(form: str, tmp_path: Path) -> None:
    policy, _ = pair()
    made = [
        {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in tiny_models.rows("sft", COUNT)
    ]
    rows = {"prompt and completion": made, "plain prompt and completion": plain(made)}.get(
        form, [{"text": row["prompt"]} for row in plain(made)]
    )
    theirs = trl_trainer("sft", policy, None, rows, tmp_path)
    batch = theirs.data_collator([theirs.train_dataset[row] for row in range(COUNT)])
    wanted = theirs.compute_loss(theirs.model, batch)
    objective = pt.SFT(rows, max_length=16)
    tokenizer = tiny_models.make_tokenizer()
    trainer = pt.JointTrainer(policy, arguments(tmp_path), objectives={"sft": objective}, processing_class=tokenizer)
    loss = objective.loss(trainer.model, objective.batch("train", range(COUNT)))
    same(loss, wanted)


def test_dpo_alone_trains_as_trl_does(tmp_path: Path) -> None:
    """Whole data set a batch, so that the order of rows is no matter: the same losses for eight steps."""
    rows = tiny_models.rows("dpo", COUNT)
    shared = {"max_steps": 8, "learning_rate": 1e-2, "logging_steps": 1}
    theirs = trl_trainer("dpo", pair()[1], pair()[1], rows, tmp_path / "trl", **shared)
    theirs.train()
    trainer = pt.JointTrainer(
        pair()[1], arguments(tmp_path, per_device_train_batch_size=COUNT, **shared),
        objectives={"dpo": pt.DPO(rows, max_length=16)}, processing_class=tiny_models.make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    wanted = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    assert [step["loss"]["dpo"] for step in trainer.steps] == pytest.approx(wanted, rel=1e-4)
    assert trainer.steps[0]["loss"]["dpo"] == pytest.approx(math.log(2), abs=1e-6)


# -- rows ----------------------------------------------------------------------------------------------------


def marked(sequences: Any, row: int, tokenizer: Any) -> list[str]:
    ids, completion = sequences.pad([row], 0)
    return tokenizer.convert_ids_to_tokens(ids[0][completion[0]].tolist())


CHAT = [
    {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "likes the dog"},
    {"role": "user", "content": "no"}, {"role": "assistant", "content": "yes please"},
]  # fmt: skip


@pytest.mark.parametrize("template", ["generation marks", "none"])
def test_every_assistant_turn_counts(template: str) -> None:
    tokenizer = tiny_models.make_tokenizer()
    if template == "none":
        tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace(
            "{% endgeneration %}", ""
        )
    sequences = sft_rows(Dataset.from_list([{"messages": CHAT}]), tokenizer, None, name="chats")
    assert marked(sequences, 0, tokenizer) == ["likes", "the", "dog", "<eos>", "yes", "please", "<eos>"]


def test_a_row_of_one_token_has_nothing_to_predict() -> None:
    sequences = sft_rows(Dataset.from_list([{"input_ids": [5]}, {"input_ids": [5, 6]}]), None, None, name="chats")
    assert sequences.lengths.tolist() == [2]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = tiny_models.make_tokenizer()
    plain_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer.chat_template = plain_template.replace(
        "{{ message['content'] }} <eos>", "{{ message['content'] }} {% if loop.last %}thanks {% endif %}<eos>"
    )
    with pytest.raises(pt.DataError, match="earlier turns otherwise than the last"):
        sft_rows(Dataset.from_list([{"messages": CHAT}]), tokenizer, None, name="chats")


def test_other_formats() -> None:
    tokenizer = tiny_models.make_tokenizer()
    old = [{"from": message["role"], "value": message["content"]} for message in CHAT]
    sequences = sft_rows(Dataset.from_list([{"conversations": old}]), tokenizer, None, name="chats")
    assert len(marked(sequences, 0, tokenizer)) == 7
    given = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    assert sft_rows(Dataset.from_list([given]), tokenizer, None, name="x").completion.tolist() == [
        False,
        False,
        True,
        True,
    ]
    given = {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 0]}
    assert sft_rows(Dataset.from_list([given]), tokenizer, None, name="x").completion.tolist() == [
        False,
        True,
        True,
        False,
    ]
    # pairs that share their prompt, as chats
    row = tiny_models.rows("dpo", 1)[0]
    implicit = {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
    both = [pair_rows(Dataset.from_list([r]), tokenizer, None, name="x") for r in (row, implicit)]
    assert both[0].digest() == both[1].digest()


def test_truncation_and_left_out_rows(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_models.make_tokenizer()
    long = [{"role": "user", "content": "the " * 30}]
    short = tiny_models.rows("dpo", 1)[0]
    with caplog.at_level("INFO", "paretune"):
        sequences = pair_rows(Dataset.from_list([short, {**short, "prompt": long}]), tokenizer, 12, name="pairs")
    assert len(sequences) == 2
    assert sequences.lengths.max() <= 12
    assert "pairs: 1 of 2 rows are left out, their prompts fill max_length=12" in caplog.text
    with pytest.raises(pt.DataError, match="the prompts alone fill max_length=12 in every row; raise max_length"):
        pair_rows(Dataset.from_list([{**short, "prompt": long}]), tokenizer, 12, name="pairs")
    with pytest.raises(pt.DataError, match="the prompts alone fill max_length=3"):
        sft_rows(Dataset.from_list([{"messages": long + CHAT[1:2]}]), tokenizer, 3, name="chats")
    with pytest.raises(pt.DataError, match="at least 2 rows"):
        unpaired_rows(Dataset.from_list(tiny_models.rows("kto", 1)), tokenizer, None, name="answers")


def test_mismatched_answers_are_of_other_rows() -> None:
    tokenizer = tiny_models.make_tokenizer()
    rows = tiny_models.rows("kto", 9)
    answers, mismatched, labels = unpaired_rows(Dataset.from_list(rows), tokenizer, None, name="x")
    texts = [" ".join(marked(answers, row, tokenizer)) for row in range(9)]
    others = [" ".join(marked(mismatched, row, tokenizer)) for row in range(9)]
    assert sorted(texts) == sorted(others)
    assert all(one != other for one, other in zip(texts, others, strict=True))
    assert labels.tolist() == [row["label"] for row in rows]
    for row in range(9):
        starts = [int((~s.pad([row], 0)[1][0]).sum()) for s in (answers, mismatched)]
        assert answers.pad([row], 0)[0][0, : starts[0]].tolist() == mismatched.pad([row], 0)[0][0, : starts[0]].tolist()


def test_data_is_taken_as_it_comes(world: Path) -> None:
    file = take_rows(str(world / "dpo.jsonl"), "dpo", name="x")
    assert len(file) == len(take_rows(tiny_models.rows("dpo", 16), "dpo", name="x")) == 16
    assert len(take_rows(file, "dpo", name="x")) == 16


WRONG: dict[str, tuple[Any, str]] = {
    "empty": (lambda: pt.DPO([]), r"objectives\['dpo'\]: it holds no rows"),
    "columns": (lambda: pt.DPO(tiny_models.rows("sft", 2)), "dpo needs the columns chosen.rejected, it has messages"),
    "missing": (
        lambda: pt.DPO([{"prompt": "a", "chosen": "b", "rejected": other} for other in (None, "c")]),
        "column rejected is empty in 1 of 2 rows",
    ),
    "stream": (lambda: pt.DPO(Dataset.from_list(tiny_models.rows("dpo", 2)).to_iterable_dataset()), "not a stream"),
    "file": (lambda: pt.DPO("absent.jsonl"), r"objectives\['dpo'\]='absent.jsonl': no such file or folder"),
    "length": (lambda: pt.DPO(tiny_models.rows("dpo", 2), max_length=2), "raise max_length"),
    "evaluation": (
        lambda: pt.DPO(tiny_models.rows("dpo", 2), eval_dataset=[]),
        r"objectives\['dpo'\].eval_dataset: it holds no rows",
    ),
    "reference": (
        lambda: pt.DPO(tiny_models.rows("dpo", 2), ref_model="./absent"),
        "ref_model='./absent': no such file or directory",
    ),
    "references": (lambda: pt.DPO(tiny_models.rows("dpo", 2), ref_model=[]), "name at least one model"),
    "beta": (lambda: pt.DPO([], beta=0), "beta=0: give a finite number above 0"),
    "kto beta": (lambda: pt.KTO([], beta=math.inf), "beta=inf: give a finite number above 0"),
    "loss": (lambda: pt.DPO([], loss_type="kto"), "choose sigmoid or ipo; pt.KTO is an objective of its own"),
    "smoothing": (lambda: pt.DPO([], label_smoothing=0.5), "label_smoothing=0.5"),
    "smoothing of ipo": (lambda: pt.DPO([], loss_type="ipo", label_smoothing=0.1), "label_smoothing=0.1"),
    "weight": (lambda: pt.KTO([], desirable_weight=-1), "desirable_weight=-1: give a finite number of at least 0"),
    "batch": (lambda: pt.SFT([], batch_size=0), "batch_size=0: give a number of rows of at least 1"),
    "short": (lambda: pt.SFT([], max_length=1), "max_length=1: give at least 2 tokens, or None"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_refused_before_training(case: str, tmp_path: Path) -> None:
    make, says = WRONG[case]
    with pytest.raises(pt.PareTuneError, match=says):
        pt.JointTrainer(
            tiny_models.make_model(), arguments(tmp_path), objectives={"dpo": make()},
            processing_class=tiny_models.make_tokenizer(),
        )  # fmt: skip
