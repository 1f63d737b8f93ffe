"""Answers of a model in this process, against a loop without cache, padding or batches."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model, make_tokenizer

import paretune as pt
from paretune.generation import model_fingerprint
from paretune.generation.draws import gumbel

PROMPTS: list[Any] = ["the cat sees", "a", [{"role": "user", "content": "big red bird likes the dog"}], [9, 5, 6]]
SAMPLED = pt.Decoding(10, temperature=0.8, top_k=12, top_p=0.9, samples=3, seed=5)


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any]:
    return make_model().eval(), make_tokenizer()


def texts(made: tuple[Any, Any], prompts: list[Any], decoding: pt.Decoding) -> list[str]:
    return [answer.text for answer in pt.generate(made[0], prompts, decoding, made[1])]


def naive(model: Any, ids: list[int], count: int, end: int = 2) -> list[int]:
    written: list[int] = []
    while len(written) < count:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + written])).logits[0, -1].argmax())
        if token == end:
            break
        written.append(token)
    return written


def test_greedy_equals_a_loop_without_cache_or_padding(made: tuple[Any, Any]) -> None:
    model, tokenizer = made
    chat = tokenizer.apply_chat_template(PROMPTS[2], add_generation_prompt=True, return_dict=False)
    encoded = [tokenizer(PROMPTS[0]).input_ids, tokenizer(PROMPTS[1]).input_ids, chat, PROMPTS[3]]
    answers = pt.generate(model, PROMPTS, pt.Decoding(20, batch_size=4), tokenizer)
    for answer, ids in zip(answers, encoded, strict=True):
        want = naive(model, ids, 20)
        assert answer.text == tokenizer.decode(want, skip_special_tokens=True)
        assert (answer.tokens, answer.finished) == (len(want), len(want) < 20)


@pytest.mark.parametrize("decoding", [pt.Decoding(10), SAMPLED], ids=["greedy", "sampled"])
def test_the_batch_does_not_matter(made: tuple[Any, Any], decoding: pt.Decoding) -> None:
    whole = [pt.generate(made[0], PROMPTS, replace(decoding, batch_size=size), made[1]) for size in (1, 3, 16)]
    assert whole[0] == whole[1] == whole[2]
    reversed_ = pt.generate(made[0], PROMPTS[::-1], decoding, made[1])
    by_prompt = {(str(a.prompt), a.sample): a.text for a in whole[0]}
    assert {(str(a.prompt), a.sample): a.text for a in reversed_} == by_prompt


def test_a_batch_that_does_not_fit_is_halved(made: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from paretune.generation import local

    want, kept, sizes = texts(made, PROMPTS, SAMPLED), local._write, []

    def small(model: Any, tokenizer: Any, prompts: list[Any], *rest: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return kept(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(local, "_write", small)
    assert texts(made, PROMPTS, SAMPLED) == want
    assert max(sizes) == 8


def test_seeds_samples_and_repeated_prompts(made: tuple[Any, Any]) -> None:
    few, many = (
        texts(made, ["the cat"], replace(SAMPLED, samples=2)),
        texts(made, ["the cat"], replace(SAMPLED, samples=4)),
    )
    assert many[:2] == few
    assert len(set(many)) > 1
    assert texts(made, ["the cat"], replace(SAMPLED, samples=4, seed=6)) != many
    twice = texts(made, ["the cat", "the cat"], replace(SAMPLED, samples=2))
    assert twice[:2] == few != twice[2:]


def test_the_global_generator_is_untouched(made: tuple[Any, Any]) -> None:
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    made[0].train()
    texts(made, PROMPTS, SAMPLED)
    assert made[0].training
    made[0].eval()
    assert torch.equal(torch.rand(2), want)


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.6}, {"temperature": 0.5, "top_p": 0.9}])
def test_first_tokens_have_the_law_that_was_asked_for(made: tuple[Any, Any], settings: dict[str, Any]) -> None:
    from scipy.stats import chisquare

    model, tokenizer = made
    decoding = pt.Decoding(1, **{"temperature": 1.0, "samples": 4000, "batch_size": 2000, **settings})
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("the cat").input_ids])).logits[0, -1].double() / decoding.temperature
    law = logits.softmax(0)
    order = law.argsort(descending=True)
    if decoding.top_k:
        law[order[decoding.top_k :]] = 0
    if decoding.top_p < 1:
        law[order[1:][law[order].cumsum(0)[:-1] >= decoding.top_p]] = 0
    law /= law.sum()
    counts = torch.zeros(len(law), dtype=torch.float64)
    for answer in pt.generate(model, ["the cat"], decoding, tokenizer):
        counts[2 if answer.finished else tokenizer.convert_tokens_to_ids(answer.text) if answer.text else 0] += 1
    # special tokens that are skipped in text are indistinguishable from padding
    hidden = [0, 1]
    law[0], counts[0] = law[hidden].sum(), counts[hidden].sum()
    seen = [i for i in range(len(law)) if i != 1]
    assert counts[[i for i in seen if law[i] == 0]].sum() == 0
    kept = [i for i in seen if law[i] > 0]
    assert chisquare(counts[kept], law[kept] / law[kept].sum() * counts.sum()).pvalue > 1e-3


def test_tokens_of_one_answer_are_independent(made: tuple[Any, Any]) -> None:
    model = make_model().eval()
    model.lm_head.weight.data.zero_()  # every token is as likely as any other
    model.generation_config.eos_token_id = None
    decoding = pt.Decoding(40, temperature=1.0, samples=64, batch_size=64)
    words = [answer.text.split() for answer in pt.generate(model, ["the cat"], decoding, made[1])]
    same = [a == b for row in words for a, b in pairwise(row)]
    assert 0.02 < sum(same) / len(same) < 0.07  # 1 in 23 words
    assert len({row[0] for row in words if row}) > 12


def test_noise_is_gumbel_and_rows_are_independent() -> None:
    from scipy.stats import kstest

    noise = gumbel(torch.tensor([0, 1, 2**62]), step=3, vocabulary=20_000)
    assert torch.equal(noise[1:2], gumbel(torch.tensor([1]), 3, 20_000))
    assert all(kstest(row.numpy(), "gumbel_r").pvalue > 1e-3 for row in noise)
    again = gumbel(torch.tensor([0, 1, 2**62]), step=4, vocabulary=20_000)
    table = torch.corrcoef(torch.cat([noise, again]))
    assert (table - torch.eye(6)).abs().max() < 0.04


def test_only_what_is_recorded_is_used(made: tuple[Any, Any]) -> None:
    """A repetition penalty in the model's generation file is off; its end tokens are on."""
    model, tokenizer = make_model().eval(), made[1]
    want = texts(made, PROMPTS, pt.Decoding(10))
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.temperature = 3.0
    assert texts((model, tokenizer), PROMPTS, pt.Decoding(10)) == want
    second = want[0].split()[1]
    model.generation_config.eos_token_id = [2, tokenizer.convert_tokens_to_ids(second)]
    answer = pt.generate(model, PROMPTS[:1], pt.Decoding(10), tokenizer)[0]
    assert (answer.text, answer.finished) == (want[0].split()[0], True)
    assert model.generation_config.repetition_penalty == 5.0


def test_stop_texts(made: tuple[Any, Any]) -> None:
    plain = texts(made, PROMPTS[:1], pt.Decoding(10))[0]
    words = plain.split()
    stop = " ".join(words[2:4])
    for batch in (PROMPTS[:1], PROMPTS):
        answer = pt.generate(made[0], batch, pt.Decoding(10, stop=(stop, "never said")), made[1])[0]
        assert answer.finished
        assert answer.text == plain[: plain.index(stop)]


def test_fingerprint_sees_one_entry_and_survives_the_disk(tmp_path: Any, made: tuple[Any, Any]) -> None:
    model, tokenizer = make_model(), made[1]
    first = model_fingerprint(model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = pt.generation.load(str(tmp_path))
    assert model_fingerprint(loaded) == first
    assert pt.generate(str(tmp_path), PROMPTS, SAMPLED) == pt.generate(model, PROMPTS, SAMPLED, tokenizer)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    assert model_fingerprint(model) != first
    assert model_fingerprint(model.to(torch.bfloat16)) != first


def test_fingerprint_of_any_layout() -> None:
    class Odd(torch.nn.Module):
        def __init__(self, tensor: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("tensor", tensor)

    base = torch.arange(301, dtype=torch.bfloat16)
    prints = [
        model_fingerprint(Odd(tensor))
        for tensor in (base, base.flip(0), base[:300], base[1:], base.view(7, 43), base.view(7, 43).T, base.float())
    ]
    assert len(set(prints)) == 7
    assert model_fingerprint(Odd(base[1:].clone())) == prints[3]
    assert model_fingerprint(Odd(base.view(7, 43).T.contiguous())) == prints[5]
    for empty in (torch.empty(0), torch.tensor(3.0)):
        assert len(model_fingerprint(Odd(empty))) == 32


def test_adapters(world: Any, tmp_path: Any) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(world / "reference")
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(plain, settings).eval()
    adapted.save_pretrained(tmp_path)
    answers = pt.generate(str(tmp_path), PROMPTS, pt.Decoding(8))  # the tokenizer is the reference's
    assert answers == pt.generate(adapted, PROMPTS, pt.Decoding(8), make_tokenizer())
    assert adapted.get_base_model().generation_config.eos_token_id == 2
    assert answers != pt.generate(str(world / "reference"), PROMPTS, pt.Decoding(8))
    first = model_fingerprint(adapted)
    with adapted.disable_adapter():
        assert model_fingerprint(adapted) != first
    assert model_fingerprint(adapted) == first
    adapted.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    assert model_fingerprint(adapted) != first


def test_tokenizers_that_end_every_text(made: tuple[Any, Any]) -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 2)]
    )
    assert tokenizer("the cat").input_ids[-1] == 2
    assert texts((made[0], tokenizer), PROMPTS[:2], pt.Decoding(8)) == texts(made, PROMPTS[:2], pt.Decoding(8))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": "the cat"}, "list of at least one prompt"),
        ({"prompts": ["a", ""]}, r"prompts\[1\]=''"),
        ({"prompts": [[{"role": "user"}]]}, "content"),
        ({"prompts": ["the cat"], "decoding": pt.Decoding(63)}, "room for 64"),
        ({"prompts": ["the cat"], "tokenizer": None}, "tokenizer"),
    ],
)
def test_wrong_arguments(made: tuple[Any, Any], arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(pt.ArgumentError, match=says):
        pt.generate(**{"source": made[0], "decoding": pt.Decoding(4), "tokenizer": made[1], **arguments})


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"samples": 2},
     {"batch_size": 0}, {"stop": "x"}, {"top_k": -1}],
)  # fmt: skip
def test_wrong_decoding(settings: dict[str, Any]) -> None:
    with pytest.raises(pt.ArgumentError, match=next(iter(settings))):
        pt.Decoding(**{"max_new_tokens": 4, **settings})


def test_an_adapter_beside_a_task_vector_is_refused(tmp_path: Path) -> None:
    """Alone it is another model than the one that was trained."""
    from paretune.generation.local import check_model

    (tmp_path / "adapter_config.json").write_text("{}")
    check_model(str(tmp_path))
    (tmp_path / "tau_gate.json").write_text('{"gate": 0.0}')
    check_model(str(tmp_path))
    (tmp_path / "tau_gate.json").write_text('{"gate": 0.25}')
    with pytest.raises(pt.CheckpointError, match=r"0\.25 of the task vector.*export-adapter"):
        check_model(str(tmp_path))
