"""Rows of every form become the tokens that they should, and the loss is that of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import make_model, make_tokenizer

import paretune as pt
from paretune.averaging.samples import batches, collate, encode, mean_nll, nll

PROMPT, ANSWER = "the cat sees", "a red bird"
CHAT = [{"role": "user", "content": PROMPT}]
REPLY = [{"role": "assistant", "content": ANSWER}]


@pytest.mark.parametrize(
    ("row", "text", "learned"),
    [
        ({"prompt": PROMPT, "completion": f" {ANSWER}"}, f"{PROMPT} {ANSWER} <eos>", f"{ANSWER} <eos>"),
        ({"prompt": PROMPT, "completion": f" {ANSWER}", "finished": False}, f"{PROMPT} {ANSWER}", ANSWER),
        ({"prompt": CHAT, "completion": REPLY}, f"<user> {PROMPT} <bot> {ANSWER} <eos>", f"{ANSWER} <eos>"),
        ({"prompt": CHAT, "completion": ANSWER}, f"<user> {PROMPT} <bot> {ANSWER} <eos>", f"{ANSWER} <eos>"),
        ({"prompt": CHAT, "completion": REPLY, "finished": False}, f"<user> {PROMPT} <bot> {ANSWER}", ANSWER),
        ({"messages": [*CHAT, *REPLY]}, f"<user> {PROMPT} <bot> {ANSWER} <eos>", f"{ANSWER} <eos>"),
        ({"text": PROMPT}, f"{PROMPT} <eos>", f"{PROMPT} <eos>"),
    ],
)
def test_rows(row: dict[str, Any], text: str, learned: str) -> None:
    tokenizer = make_tokenizer()
    (sample,) = encode([row], tokenizer)
    assert tokenizer.decode(sample.ids) == text
    assert tokenizer.decode(sample.ids[sample.start :]) == learned


def test_loss_equals_that_of_transformers() -> None:
    """Padding, prompts and the first token count for nothing."""
    model, tokenizer = make_model().eval(), make_tokenizer()
    rows = [{"prompt": PROMPT, "completion": f" {ANSWER}"}, {"prompt": "a", "completion": " dog"}, {"text": PROMPT}]
    samples = encode(rows, tokenizer)
    total = 0.0
    for sample in samples:
        ids = torch.tensor([sample.ids])
        labels = ids.clone()
        labels[:, : sample.start] = -100
        total += float(model(input_ids=ids, labels=labels).loss.detach()) * sample.learned
    assert float(nll(model, collate(samples)).detach()) == pytest.approx(total, rel=1e-5)
    assert mean_nll(model, samples, size=2) == pytest.approx(total / sum(s.learned for s in samples), rel=1e-5)


def test_batches_take_every_sample_once_an_epoch() -> None:
    samples = encode([{"text": "the " * (i + 1)} for i in range(10)], make_tokenizer())
    drawn = batches(samples, 4, seed=3)
    taken = [sample for _ in range(5) for sample in next(drawn)]
    assert sorted(len(s.ids) for s in taken[:10]) == sorted(len(s.ids) for s in taken[10:]) == list(range(2, 12))
    again = batches(samples, 4, seed=3)
    assert [next(again) for _ in range(2)] == [taken[:4], taken[4:8]]


def test_too_long_is_cut_and_a_lost_completion_is_an_error() -> None:
    tokenizer = make_tokenizer()
    (sample,) = encode([{"prompt": PROMPT, "completion": f" {ANSWER}"}], tokenizer, max_length=5)
    assert tokenizer.decode(sample.ids) == "the cat sees a red"
    with pytest.raises(pt.DataError, match="max_length=3"):
        encode([{"prompt": PROMPT, "completion": f" {ANSWER}"}], tokenizer, max_length=3)
