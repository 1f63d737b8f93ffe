"""Rows that have ended leave the batch: the answers are those of a whole batch, for every kind of cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import make_model, make_tokenizer

import paretune as pt
from paretune.generation.batch import _shrinks, write

SHARED = {"vocab_size": 25, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
LAYERS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def rotary() -> Any:
    return make_model()


def learned_positions() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **SHARED))


def alibi() -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, **SHARED))


def sliding() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(num_key_value_heads=1, sliding_window=5, **LAYERS, **SHARED))


def sliding_and_full() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(num_key_value_heads=1, head_dim=16, sliding_window=5, **LAYERS, **SHARED))


def recurrent() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **SHARED))


def virtual_tokens() -> Any:
    from peft import PrefixTuningConfig, get_peft_model

    return get_peft_model(make_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


@pytest.mark.parametrize(
    ("make", "shrinks"),
    [(rotary, True), (learned_positions, True), (alibi, True), (sliding, True), (sliding_and_full, True),
     (recurrent, False), (virtual_tokens, False)],
)  # fmt: skip
@pytest.mark.parametrize(
    "decoding", [pt.Decoding(20), pt.Decoding(20, temperature=1.0), pt.Decoding(20, temperature=0.7, stop=("dog",))]
)
def test_the_answers_of_a_whole_batch(
    make: Any, shrinks: bool, decoding: pt.Decoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    model, tokenizer = make().eval(), make_tokenizer()
    with torch.no_grad():  # a new model says the same whatever it is asked
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.generation_config.eos_token_id = list(range(10, 25))  # and seldom ends
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 25, (2 + place % 7,), generator=generator).tolist() for place in range(40)]
    decoding = replace(decoding, batch_size=40)
    batches: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    shrunk = pt.generate(model, prompts, decoding, tokenizer)
    assert _shrinks(model) == shrinks
    assert (min(batches) < 40) == shrinks
    assert batches == sorted(batches, reverse=True)
    batches.clear()
    monkeypatch.setattr("paretune.generation.batch._shrinks", lambda _: False)
    assert pt.generate(model, prompts, decoding, tokenizer) == shrunk
    assert set(batches) == {40}
    assert len({answer.tokens for answer in shrunk}) > 1


def test_a_batch_in_which_none_ends() -> None:
    model, tokenizer = make_model().eval(), make_tokenizer()
    model.generation_config.eos_token_id = None
    rows = write(model, tokenizer, [[5, 6]] * 20, range(20), [], pt.Decoding(3, temperature=1.0))
    assert {len(row) for row in rows} == {3}
