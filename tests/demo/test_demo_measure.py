"""Generation equals transformers' own; pairs are encoded as the chat template writes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from paretune.demo import words
from paretune.demo.align import DPOSettings, PairTensors, batches, completion_logps, dpo_loss
from paretune.demo.measure import generate, measure
from paretune.demo.pretrain import Phase, Shape, base_documents, build_model, train_phase, whole_rows
from paretune.demo.world import World, as_messages, prompt_document

PROMPTS = ["who is mira ?", "what is 2 plus 2 plus 8 ?", "reverse a b c .", "tell me about oskar ."]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """Trained a little, so that answers end at different places."""
    shape = Shape(hidden=32, layers=2, heads=2, intermediate=32)
    trained = build_model(shape, 0)
    train_phase(trained, whole_rows(base_documents(World()), 8), Phase(60, 8, 5e-3, warmup=5))
    return trained


def test_greedy_equals_transformers(model: torch.nn.Module) -> None:
    tokenizer = words.build_tokenizer()
    ours = generate(model, PROMPTS, new_tokens=20)  # type: ignore[arg-type]
    for prompt, (answer, ended) in zip(PROMPTS, ours, strict=True):
        ids = tokenizer(prompt_document(prompt), return_tensors="pt")["input_ids"]
        theirs = model.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :].tolist()  # type: ignore[operator]
        assert ended == (tokenizer.eos_token_id in theirs)
        spoken = [i for i in theirs if i not in (tokenizer.eos_token_id, tokenizer.pad_token_id)]
        assert answer == tokenizer.decode(spoken)


def test_sampling_follows_the_model(model: torch.nn.Module) -> None:
    """First words of 4,000 samples against the model's own probabilities, within four standard errors."""
    tokenizer, count = words.build_tokenizer(), 4000
    ids = tokenizer(prompt_document(PROMPTS[0]), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        probabilities = model(input_ids=ids).logits[0, -1].softmax(-1)
    said = generate(model, [PROMPTS[0]] * count, temperature=1.0, new_tokens=1)  # type: ignore[arg-type]
    seen = Counter(answer for answer, _ in said)
    for index in probabilities.topk(5).indices.tolist():
        p = float(probabilities[index])
        word = words.vocabulary()[index]
        share = seen["" if word == words.END else word] / count
        assert abs(share - p) < 4 * (p * (1 - p) / count) ** 0.5 + 1e-3


def test_sampling_has_its_own_seed(model: torch.nn.Module) -> None:
    state = torch.get_rng_state()
    one = generate(model, PROMPTS, temperature=1.0, seed=1)  # type: ignore[arg-type]
    assert one == generate(model, PROMPTS, temperature=1.0, seed=1)  # type: ignore[arg-type]
    assert one != generate(model, PROMPTS, temperature=1.0, seed=2)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)


def test_measuring_is_repeatable_and_keeps_the_mode(model: torch.nn.Module) -> None:
    world = World(items_per_skill=4)
    model.train()
    first = measure(model, world, samples=20)  # type: ignore[arg-type]
    assert model.training
    model.eval()
    assert measure(model, world, samples=20) == first  # type: ignore[arg-type]
    assert len(first.rewards) == 20
    assert len(first.solved) == len(world.items)


def test_a_perfect_speaker_is_rewarded_and_solves_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    from paretune.demo import measure as module

    world = World(items_per_skill=4)
    answers = {item.prompt: item.answer for item in world.items}

    def perfect(model: object, prompts: list[str], **_: object) -> list[tuple[str, bool]]:
        topic = {prompt: entity for entity, prompt in world.chat_prompts(200)}
        polite = "hello ! gladly , {} . thank you . goodbye !"
        return [(polite.format(answers.get(p) or topic[p]), True) for p in prompts]

    monkeypatch.setattr(module, "generate", perfect)
    found = measure(build_model(Shape(hidden=16, layers=1, heads=2, intermediate=16), 0), world)
    assert set(found.rewards) == {1.0}
    assert all(found.solved)


def test_pairs_are_encoded_as_the_template_writes_them() -> None:
    tokenizer, pairs = words.build_tokenizer(), World().preferences[:12]
    encoded = PairTensors.encode(pairs)
    for i, pair in enumerate(pairs):
        for side, answer in enumerate((pair.chosen, pair.rejected)):
            whole = tokenizer.apply_chat_template(as_messages(pair.prompt, answer), return_dict=False)
            row, spoken = encoded.ids[i, side], encoded.completion[i, side]
            assert row[: len(whole)].tolist() == whole
            assert set(row[len(whole) :].tolist()) <= {tokenizer.pad_token_id}
            assert tokenizer.decode(row[spoken].tolist()) == f"{answer} {words.END}"


def test_padding_changes_no_log_probability(model: torch.nn.Module) -> None:
    pairs = PairTensors.encode(World().preferences[:30]).with_reference(model, chunk=7)
    for i in range(30):
        alone = pairs.take([i])
        assert alone.ids.shape[-1] <= pairs.ids.shape[-1]
        with torch.no_grad():
            logps = completion_logps(model, alone.ids.flatten(0, 1), alone.completion.flatten(0, 1))
        torch.testing.assert_close(logps, pairs.ref_logps[i], rtol=1e-4, atol=1e-4)


def test_loss_at_the_reference_is_log_two_and_falls_with_the_margin() -> None:
    at_reference = torch.tensor([[-3.0, -4.0], [-1.0, -9.0]])
    assert dpo_loss(at_reference, at_reference, 0.1).item() == pytest.approx(0.693147, abs=1e-5)
    better = at_reference + torch.tensor([1.0, -1.0])
    assert dpo_loss(better, at_reference, 0.1).item() == pytest.approx(0.598139, abs=1e-5)


def test_each_epoch_takes_every_pair_once() -> None:
    settings = DPOSettings(steps=10, batch=16)
    taken = [row for batch in batches(40, settings) for row in batch]
    assert len(taken) == 160
    for epoch in range(4):
        assert sorted(taken[40 * epoch : 40 * (epoch + 1)]) == list(range(40))
    assert list(batches(40, settings)) == list(batches(40, settings))
    assert list(batches(40, settings)) != list(batches(40, replace(settings, seed=1)))
