"""Base and reference: batches, schedule, keys of the cache, whole writes."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch

from paretune.demo import pretrain, words
from paretune.demo.pretrain import (
    ROW_TOKENS,
    Phase,
    Recipe,
    Shape,
    base_documents,
    build_model,
    default_cache,
    learning_rate,
    prepare,
    save_model,
    sft_documents,
    train_phase,
    whole_rows,
)
from paretune.demo.world import World

TINY = Shape(hidden=16, layers=1, heads=2, intermediate=16)


def test_rows_hold_whole_documents_in_order() -> None:
    documents = list(islice(sft_documents(World()), 400))
    vocabulary = words.vocabulary()
    text = []
    for batch in whole_rows(iter(documents), rows=4):
        assert batch.shape == (4, ROW_TOKENS)
        for row in batch.tolist():
            said = " ".join(vocabulary[i] for i in row if vocabulary[i] != words.PAD)
            assert said.endswith(words.END)
            assert said.startswith((words.START, words.USER))
            text.append(said)
    together = " ".join(documents)
    assert together.startswith(" ".join(text))
    assert len(" ".join(text)) > 0.9 * len(together)


def test_sft_replays_raw_text() -> None:
    documents = list(islice(sft_documents(World()), 2000))
    raw = sum(document.startswith(words.START) for document in documents)
    assert 0.12 < raw / 2000 < 0.18


def test_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    phase = Phase(steps=100, rows=1, lr=1.0, warmup=10)
    rates = [learning_rate(phase, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_training_learns_and_follows_from_the_seed() -> None:
    world, phase = World(), Phase(steps=20, rows=4, lr=1e-2, warmup=2)
    first, second = build_model(TINY, 0), build_model(TINY, 0)
    before = train_phase(build_model(TINY, 0), whole_rows(base_documents(world), 4), replace(phase, steps=1))
    told: list[tuple[int, int]] = []
    after = train_phase(first, whole_rows(base_documents(world), 4), phase, lambda done, of: told.append((done, of)))
    assert after < before - 0.5
    assert told[-1] == (20, 20)
    assert after == train_phase(second, whole_rows(base_documents(world), 4), phase)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_model(TINY, 1)
    assert torch.equal(torch.rand(3), expected)


def test_size_and_tying_of_the_default_model() -> None:
    model = build_model(Shape(), 0)
    assert 300_000 < sum(p.numel() for p in model.parameters()) < 400_000
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.eos_token_id == words.vocabulary().index(words.END)


def test_keys_change_with_what_decides_the_models() -> None:
    recipe = Recipe()
    assert Recipe().base_key == recipe.base_key
    assert Recipe().reference_key == recipe.reference_key
    assert Recipe(World(seed=1)).base_key != recipe.base_key
    assert Recipe(shape=TINY).base_key != recipe.base_key
    longer = Recipe(sft=replace(recipe.sft, steps=5))
    assert longer.base_key == recipe.base_key
    assert longer.reference_key != recipe.reference_key
    # what is only read after SFT shares both models
    changed = Recipe(World(pairs=7, items_per_skill=3))
    assert (changed.base_key, changed.reference_key) == (recipe.base_key, recipe.reference_key)
    less_chat = Recipe(World(chat_share=0.1))
    assert less_chat.base_key == recipe.base_key
    assert less_chat.reference_key != recipe.reference_key


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("disk full")

    monkeypatch.setattr(words, "build_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(build_model(TINY, 0), tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_may_finish_first(tmp_path: Path) -> None:
    save_model(build_model(TINY, 0), tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    save_model(build_model(TINY, 1), tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_interrupted_sft_keeps_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(World(), TINY, Phase(2, 2, 1e-3), Phase(2, 2, 1e-3))
    real, calls = pretrain.train_phase, []

    def once(*arguments: object) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pretrain, "train_phase", once)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe, tmp_path)
    base, reference = prepare(recipe, tmp_path)
    assert len(calls) == 3  # base, interrupted SFT, SFT
    assert {path.name for path in tmp_path.iterdir()} == {base.name, reference.name}


def test_models_are_ordinary_checkpoints(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = Recipe(World(), TINY, Phase(2, 2, 1e-3), Phase(2, 2, 1e-3))
    for path in prepare(recipe, tmp_path):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        assert model.config.vocab_size == len(tokenizer)
        assert "generation" in tokenizer.chat_template
        assert tokenizer.decode(tokenizer("who is mira ?")["input_ids"]) == "who is mira ?"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETUNE_CACHE", "/somewhere")
    assert default_cache() == Path("/somewhere")
    monkeypatch.delenv("PARETUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache() == Path("/caches/paretune/demo")
