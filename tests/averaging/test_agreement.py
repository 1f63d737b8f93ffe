"""Agreement with the reference: what is watched equals writing the answers anew, and the samples' log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import make_model, make_tokenizer

import paretune as pt
from paretune.averaging import agreement
from paretune.averaging.agreement import OwnAnswers
from paretune.averaging.fisher import log_probability
from paretune.averaging.own_samples import own_samples
from paretune.generation import Decoding, generate


def moved(model: Any, size: float) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=size)


@pytest.mark.parametrize("size", [0.0, 0.003, 0.02, 0.2])
def test_equals_writing_the_answers_anew(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_LOGITS", 2500)  # a few rows at a time
    model, tokenizer = make_model(seed=1).eval(), make_tokenizer()
    samples = own_samples(model, tokenizer, 40, max_tokens=10, progress=False)
    watched = OwnAnswers(model, tokenizer, samples, max_tokens=8, batch_size=7)

    def answers() -> list[str]:
        prompts = [[i for i, marked in zip(ids, mask, strict=True) if not marked] for ids, mask in watched.answers]
        return [each.text for each in generate(model, prompts, Decoding(8), tokenizer, progress=False)]

    def logps() -> float:
        with torch.no_grad():
            return sum(float(log_probability(model, row)) for row in samples)

    before = answers(), logps()
    moved(model, size)
    found = watched()
    tokens = sum(sum(row["completion_mask"]) for row in samples)
    assert len(watched.answers) >= 10  # the others have a special token within, which text leaves out
    assert found.kl == pytest.approx((before[1] - logps()) / tokens, abs=1e-5)
    assert found.exact == sum(a == b for a, b in zip(answers(), before[0], strict=True)) / len(before[0])
    if size == 0:
        assert (found.exact, found.kl) == (1.0, 0.0)


def test_what_the_tokenizer_cannot_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that is cut another way is not counted against the model; where nothing is left, that is said."""
    model, tokenizer = make_model(seed=1).eval(), make_tokenizer()
    samples = own_samples(model, tokenizer, 40, max_tokens=10, progress=False)
    whole = OwnAnswers(model, tokenizer, samples, max_tokens=6)
    real, asked = type(tokenizer).__call__, []

    def every_other(self: Any, text: str, **options: Any) -> Any:
        asked.append(text)
        return real(self, "good bad good bad" if len(asked) % 2 else text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", every_other)
    some = OwnAnswers(model, tokenizer, samples, max_tokens=6)
    assert 0 < len(some.answers) < len(whole.answers)
    assert some().exact == 1.0
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, _, **more: real(self, "good bad good bad", **more))
    with pytest.raises(pt.DataError, match="read back"):
        OwnAnswers(model, tokenizer, samples, max_tokens=6)
