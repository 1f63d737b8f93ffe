"""`pt.Distill`: the KL, its bound with lumped tokens, the file, and joint training with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_model, make_tokenizer, rows

import paretune as pt
from paretune.training.distill import completion_logps, full_kl, lumped_kl
from paretune.training.objectives import Setup

VOCABULARY = 25


def prepared(tmp_path: Path, model: Any, **options: Any) -> pt.Distill:
    import contextlib

    args = SimpleNamespace(
        device=torch.device("cpu"), per_device_eval_batch_size=3, bf16=False, fp16=False, disable_tqdm=True
    )
    objective = pt.Distill(rows("sft", 7), cache_dir=tmp_path, **options)
    objective.prepare(Setup("rehearsal", model, make_tokenizer(), args, contextlib.nullcontext))  # type: ignore[arg-type]
    return objective


def naive(reference: Any, policy: Any, batch: dict[str, torch.Tensor], direction: str) -> torch.Tensor:
    """The KL from full logits, token by token, in float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    with torch.no_grad():
        p = reference(batch["input_ids"]).logits.double().softmax(-1)
        q = policy(batch["input_ids"]).logits.double().softmax(-1)
    if direction == "reverse":
        p, q = q, p
    for row, marks in enumerate(batch["completion_mask"].tolist()):
        for place in range(1, len(marks)):
            if marks[place]:
                a, b = p[row, place - 1], q[row, place - 1]
                total += (a * (a / b).log()).sum()
                count += 1
    return total / count


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("top_k", [VOCABULARY, 1000, None])
def test_equals_the_full_kl(direction: Any, top_k: int | None, tmp_path: Path) -> None:
    reference, policy = make_model(seed=0).eval(), make_model(seed=1).eval()
    objective = prepared(tmp_path, reference, direction=direction, top_k=top_k)
    batch = objective.batch("train", [4, 0, 6])
    expected = naive(reference, policy, batch, direction)
    assert objective.loss(policy, batch).item() == pytest.approx(expected.item(), rel=1e-4)
    assert objective.loss(reference, batch).item() == pytest.approx(0, abs=1e-6)
    assert objective.count(batch) == int(batch["completion_mask"][:, 1:].sum())


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_fewer_tokens_are_a_lower_bound(direction: Any, tmp_path: Path) -> None:
    reference, policy = make_model(seed=0).eval(), make_model(seed=1).eval()
    losses = []
    for top_k in (1, 4, 12, VOCABULARY):
        objective = prepared(tmp_path, reference, direction=direction, top_k=top_k)
        losses.append(objective.loss(policy, objective.batch("train", [1, 2, 3])).item())
    assert losses[0] > 0
    assert losses == sorted(losses)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.floats(0.1, 5.0), st.sampled_from(["forward", "reverse"]))
def test_the_bound_and_what_it_is_short_of(seed: int, k: int, sharpness: float, direction: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(1, 9, generator=generator).double().mul(sharpness).log_softmax(-1) for _ in range(2))
    kept, tokens = p.topk(k)
    lumped, full = lumped_kl(kept, tokens, q, direction), full_kl(p, q, direction)
    # The difference: the tail's mass under the first distribution times the KL within the tail.
    tail = torch.ones(9, dtype=torch.bool)
    tail[tokens[0]] = False
    first, second = (p, q) if direction == "forward" else (q, p)
    within = full_kl(first[:, tail].log_softmax(-1), second[:, tail].log_softmax(-1), "forward")
    assert torch.allclose(full - lumped, first[:, tail].exp().sum(-1) * within, atol=1e-5)


def test_the_gradient_pulls_towards_the_reference(tmp_path: Path) -> None:
    reference, policy = make_model(seed=0).eval(), make_model(seed=1)
    objective = prepared(tmp_path, reference, top_k=8)
    batch = objective.batch("train", range(7))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    before = objective.loss(policy, batch).item()
    for _ in range(20):
        optimizer.zero_grad()
        objective.loss(policy, batch).backward()
        optimizer.step()
    assert objective.loss(policy, batch).item() < 0.7 * before


def test_the_file_is_made_once_and_made_again_when_broken(tmp_path: Path) -> None:
    reference = make_model(seed=0).eval()
    first = prepared(tmp_path, reference, top_k=4).batch("train", [3])
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    assert prepared(tmp_path, reference, top_k=4).batch("train", [3])["ref_logps"].equal(first["ref_logps"])
    assert file.stat().st_mtime_ns == stamp
    file.write_bytes(file.read_bytes()[:-40])
    assert prepared(tmp_path, reference, top_k=4).batch("train", [3])["ref_logps"].equal(first["ref_logps"])
    prepared(tmp_path, make_model(seed=1).eval(), top_k=4)
    assert len(list(tmp_path.iterdir())) == 2  # another reference has a file of its own


def test_rows_of_like_length_are_asked_together(tmp_path: Path) -> None:
    """What is kept belongs to its row all the same."""
    reference = make_model(seed=0).eval()
    asked: list[tuple[int, ...]] = []
    handle = reference.get_input_embeddings().register_forward_pre_hook(lambda _, given: asked.append(given[0].shape))
    objective = prepared(tmp_path, reference, top_k=VOCABULARY)
    handle.remove()
    assert sum(size for size, _ in asked) == objective.rows("train")
    assert [length for _, length in asked] == sorted((length for _, length in asked), reverse=True)
    for row in range(objective.rows("train")):
        batch = objective.batch("train", [row])
        assert objective.loss(reference, batch).item() == pytest.approx(0, abs=1e-6)


def test_on_the_fly_holds_the_reference_as_it_was(tmp_path: Path) -> None:
    model = make_model(seed=0).eval()
    objective = prepared(tmp_path, model, top_k=None)
    batch = objective.batch("train", [0, 1])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05)
    assert objective.loss(model, batch).item() > 1e-3


def test_logps_are_those_of_the_whole_model() -> None:
    model = make_model().eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    completion = torch.tensor([[False, False, True, True]])
    expected = model(ids).logits.log_softmax(-1)[0, 1:3]
    assert torch.allclose(completion_logps(model, ids, completion), expected, atol=1e-6)


@pytest.mark.parametrize("options", [{"direction": "both"}, {"top_k": 0}, {"top_k": 1.5}, {"max_length": 1}])
def test_wrong_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(pt.ArgumentError, match=f"{next(iter(options))}="):
        pt.Distill([], **options)


@pytest.mark.parametrize("schedule", [pt.Alright(), pt.Mix(), pt.MaxRight(refresh_every=2)])
def test_joint_training_with_it(schedule: Any, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    objectives = {
        "rehearsal": pt.Distill(rows("sft", 7), cache_dir=tmp_path),
        "dpo": pt.DPO(rows("dpo", 6), cache_dir=tmp_path),
    }
    trainer = pt.JointTrainer(
        make_model(), arguments, objectives=objectives, schedule=schedule, processing_class=make_tokenizer()
    )
    trainer.train()
    trained = {step["objective"] for step in trainer.steps}
    if isinstance(schedule, pt.MaxRight):
        assert trained <= {"rehearsal", "dpo"}
        assert set(trainer.steps[0]["stale"]) == {"rehearsal", "dpo"}  # it chose between the two
    else:
        assert trained == ({"mix"} if isinstance(schedule, pt.Mix) else {"rehearsal", "dpo"})
