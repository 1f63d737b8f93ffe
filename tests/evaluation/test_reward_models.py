"""Reward models against a forward pass without padding; DPO margins against TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WORDS, make_model, make_tokenizer, rows

import paretune as pt
from paretune.evaluation.dpo_margin import DPOMargin
from paretune.evaluation.reward import Item, load_reward, score
from paretune.evaluation.reward_model import RewardModel

ITEMS = [Item([{"role": "user", "content": " ".join(WORDS[: n + 1])}], " ".join(WORDS[n::3])) for n in range(7)]


def classifier(kind: str, labels: int = 1) -> Any:
    from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(1)
    size = len(WORDS) + 5
    if kind == "llama":
        config: Any = LlamaConfig(vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=2, num_labels=labels, max_position_embeddings=64,
                                  initializer_range=0.2)  # fmt: skip
        return LlamaForSequenceClassification(config).eval()
    config = GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=64, num_labels=labels)
    return GPT2ForSequenceClassification(config).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_do_not_depend_on_batch_or_padding(kind: str, side: str) -> None:
    model, tokenizer = classifier(kind), make_tokenizer()
    tokenizer.padding_side = side
    want = []
    for item in ITEMS:
        turns = [*item.prompt, {"role": "assistant", "content": item.answer}]
        ids = torch.tensor([tokenizer.apply_chat_template(turns, return_dict=False)])
        with torch.no_grad():
            hidden = model.base_model(ids).last_hidden_state
            want.append(float(model.score(hidden)[0, -1, 0]))
    assert torch.tensor(want).std() > 0.01
    for size in (1, 3, 16):
        reward = RewardModel(model, tokenizer, batch_size=size)
        assert score(ITEMS, reward).values == pytest.approx(want, abs=1e-5)
        assert score(ITEMS[::-1], reward).values == pytest.approx(want[::-1], abs=1e-5)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, tokenizer = classifier("llama"), make_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scores = score(ITEMS, load_reward(f"model:{tmp_path}", batch_size=2))
    assert scores.values == pytest.approx(score(ITEMS, RewardModel(model, tokenizer)).values, abs=1e-5)
    assert (scores.metadata["dtype"], scores.metadata["truncated"]) == ("float32", 0)


def test_an_untrained_head_is_refused(tmp_path: Path, world: Path) -> None:
    with pytest.raises(pt.CheckpointError, match=r"lacks score\.weight, which would be random"):
        RewardModel(str(world / "reference"))
    with pytest.raises(pt.CheckpointError, match=r"holds no config\.json: give the directory of a model"):
        RewardModel(str(tmp_path))
    with pytest.raises(pt.CheckpointError, match="has 3 outputs"):
        RewardModel(classifier("llama", 3), make_tokenizer())


def test_padding_that_ends_answers_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<eos>"
    with pytest.raises(pt.ArgumentError, match="pad_token='<eos>'"):
        score(ITEMS, RewardModel(classifier("llama"), tokenizer))
    want = score(ITEMS, RewardModel(classifier("llama"), make_tokenizer())).values
    assert score(ITEMS, RewardModel(classifier("llama"), tokenizer, pad_token="<unk>")).values == pytest.approx(want)
    tokenizer.pad_token = None
    with pytest.raises(pt.ArgumentError, match="pad_token=None"):
        RewardModel(classifier("llama"), tokenizer)
    with pytest.raises(pt.ArgumentError, match="pad_token='<other>'"):
        RewardModel(classifier("llama"), tokenizer, pad_token="<other>")


def test_long_texts() -> None:
    long = Item(ITEMS[0].prompt, " ".join(["cat"] * 80))
    with pytest.raises(pt.DataError, match="answer 1 has 84 tokens"):
        score([ITEMS[0], long], RewardModel(classifier("gpt2"), make_tokenizer()))
    scores = score([ITEMS[0], long], RewardModel(classifier("gpt2"), make_tokenizer(), truncate=True))
    assert (scores.metadata["truncated"], scores.metadata["max_length"], scores.failed) == (1, 64, 0)


def test_encoders_read_pairs() -> None:
    from tokenizers import processors
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(pt.ArgumentError, match="chat template"):
        RewardModel(classifier("llama"), tokenizer)
    tokenizer.cls_token, tokenizer.sep_token = "<user>", "<bot>"
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<user> $A <bot>",
        pair="<user>:0 $A:0 <bot>:0 $B:1 <bot>:1",
        special_tokens=[("<user>", 3), ("<bot>", 4)],
    )
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS) + 5, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                        num_attention_heads=2, num_labels=1, initializer_range=0.3)  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    want = []
    for item in ITEMS:
        row = tokenizer(item.prompt[0]["content"], item.answer, return_tensors="pt", return_token_type_ids=True)
        with torch.no_grad():
            want.append(float(model(**row).logits[0, 0]))
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert score(ITEMS, RewardModel(model, tokenizer, batch_size=3)).values == pytest.approx(want, abs=1e-5)
    with pytest.raises(pt.DataError, match="single turns"):
        score([Item([*ITEMS[0].prompt] * 3, "a")], RewardModel(model, tokenizer))


@pytest.mark.parametrize("chat", [True, False])
def test_margins_equal_trl(tmp_path: Path, chat: bool) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = rows("dpo", 9)
    if not chat:
        # a space before the answer: words of this tokenizer must not grow together
        pairs = [{k: v[0]["content"] if k == "prompt" else f" {v[0]['content']} " for k, v in r.items()} for r in pairs]
    policy, reference, tokenizer = make_model(0).eval(), make_model(1).eval(), make_tokenizer()
    settings = DPOConfig(output_dir=str(tmp_path), beta=0.3, use_cpu=True, bf16=False, report_to=[], max_length=None,
                         per_device_eval_batch_size=9, disable_tqdm=True, gradient_checkpointing=False)  # fmt: skip
    data = Dataset.from_list(pairs)
    trainer = DPOTrainer(policy, reference, args=settings, train_dataset=data, eval_dataset=data,
                         processing_class=tokenizer)  # fmt: skip
    found = trainer.evaluate()
    texts = [{k: v if not chat or k == "prompt" else v[0]["content"] for k, v in row.items()} for row in pairs]
    items = [Item(row["prompt"], row["chosen"], row["rejected"]) for row in texts]
    values = []
    for size in (1, 4):
        reward = DPOMargin(policy, reference, tokenizer, beta=0.3, batch_size=size)
        scores = score(items, reward)
        assert scores.mean == pytest.approx(found["eval_rewards/margins"], abs=1e-5)
        assert scores.metadata["accuracy"] == pytest.approx(found["eval_rewards/accuracies"])
        values.append(scores.values)
    assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_the_reference_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference, tokenizer = make_model(0).eval(), make_model(0).eval(), make_tokenizer()
    item = Item([{"role": "user", "content": "the cat"}], "a dog", "no bird")
    reward = DPOMargin(policy, reference, tokenizer)
    assert score([item], reward).values == [0.0]
    monkeypatch.setattr(reference, "forward", lambda *_, **__: pytest.fail("asked again"))
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)
    assert abs(score([item], reward).mean) > 1e-4
    with pytest.raises(pt.ArgumentError, match="reference"):
        DPOMargin(policy, policy, tokenizer)
    with pytest.raises(pt.ArgumentError, match="beta"):
        DPOMargin(policy, reference, tokenizer, beta=0)
    with pytest.raises(pt.DataError, match="pair 0 has 85 tokens"):
        score([Item(item.prompt, "cat " * 80, "a")], reward)
