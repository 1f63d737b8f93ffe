"""PairRM against a replica of its published formula, with random tiny weights, in both orders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import WORDS
from torch import nn

import paretune as pt
from paretune.evaluation.pairrm import PairRM
from paretune.evaluation.reward import Item, load_reward, score

MARKS = ["<|source|>", "<|candidate1|>", "<|candidate2|>"]
TRIPLES = [(" ".join(WORDS[n:]), " ".join(WORDS[n : n + 5]), " ".join(WORDS[: n + 1])) for n in range(6)]


class Replica(nn.Module):
    """The published model: scores of both sides by one head on pairs of hidden states at the marks."""

    def __init__(self, config: Any, tasks: int) -> None:
        from transformers import DebertaV2Model

        super().__init__()
        n = config.hidden_size
        self.pretrained_model = DebertaV2Model(config)
        head = [nn.Dropout(0.1), nn.Linear(2 * n, n), nn.Tanh(), nn.Dropout(0.1), nn.Linear(n, tasks)]
        self.head_layer = nn.Sequential(*head)

    def logit(self, ids: list[int], marks: list[int]) -> float:
        with torch.no_grad():
            hidden = self.pretrained_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
            source, first, second = (hidden[ids.index(mark)] for mark in marks)
            left = self.head_layer(torch.cat([source, first]))
            return float((left - self.head_layer(torch.cat([source, second]))).mean())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Replica, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import DebertaV2Config, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("pairrm")
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    marks = tokenizer.convert_tokens_to_ids(MARKS)
    config = DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        relative_attention=True, position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True, type_vocab_size=0,
        pos_att_type=["p2c", "c2p"], position_biased_input=False, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    replica = Replica(config, tasks=3).eval()
    save_file(replica.state_dict(), folder / "model.safetensors")
    names = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")
    extra = {**dict(zip(names, marks, strict=True)), "n_tasks": 3, "drop_out": 0.1}
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **extra}))
    tokenizer.save_pretrained(folder)
    return str(folder), replica, tokenizer


def replica_logit(replica: Replica, tokenizer: Any, source: str, first: str, second: str) -> float:
    pieces = [tokenizer(mark + text).input_ids for mark, text in zip(MARKS, (source, first, second), strict=True)]
    return replica.logit([token for piece in pieces for token in piece], tokenizer.convert_tokens_to_ids(MARKS))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_both_orders_equal_the_published_formula(made: tuple[str, Replica, Any], batch_size: int) -> None:
    folder, replica, tokenizer = made
    reward = PairRM(folder, batch_size=batch_size)
    sources, firsts, seconds = zip(*TRIPLES, strict=True)
    forward = [replica_logit(replica, tokenizer, *triple) for triple in TRIPLES]
    backward = [replica_logit(replica, tokenizer, s, b, a) for s, a, b in TRIPLES]
    assert torch.tensor(forward).std() > 0.01
    assert reward.logits(sources, firsts, seconds) == pytest.approx(forward, abs=1e-5)
    assert reward.logits(sources, seconds, firsts) == pytest.approx(backward, abs=1e-5)
    want = [1 / (1 + 2.718281828459045 ** (-(f - b) / 2)) for f, b in zip(forward, backward, strict=True)]
    scores = score([Item(s, a, b) for s, a, b in TRIPLES], reward)
    assert scores.values == pytest.approx(want, abs=1e-5)
    swapped = score([Item(s, b, a) for s, a, b in TRIPLES], reward)
    assert swapped.values == pytest.approx([1 - value for value in want], abs=1e-5)
    assert score([Item(s, a, a) for s, a, _ in TRIPLES], reward).values == pytest.approx([0.5] * 6)


def test_texts_cannot_forge_marks_and_are_cut_like_the_published_ones(made: tuple[str, Replica, Any]) -> None:
    folder, _, tokenizer = made
    reward = PairRM(folder)
    plain = reward.logits(["the cat"], ["a dog"], ["no"])
    assert reward.logits(["the <|candidate1|> cat"], ["a <|candidate2|> dog"], ["<|source|> no"]) == plain
    for words, limit in ((2000, 1224), (2000, 412)):
        text = "cat " * words
        assert reward._piece(text, limit) == tokenizer(text, max_length=limit, truncation=True).input_ids
    assert reward.truncated == 2
    assert len(reward._tokens("cat " * 3000, "cat " * 3000, "cat " * 3000)) == 2048


def test_conversations(made: tuple[str, Replica, Any]) -> None:
    reward = load_reward(f"pairrm:{made[0]}")
    turn = {"role": "user", "content": "the cat"}
    one = score([Item([turn], "a dog", "no")], reward).values
    assert one == score([Item("the cat", "a dog", "no")], reward).values
    more = [turn, {"role": "assistant", "content": "yes"}, turn]
    assert score([Item(more, "a dog", "no")], reward).values != one
    assert reward.record()["orders"] == 2
    with pytest.raises(pt.DataError, match="token ids"):
        score([Item([3, 4], "a", "b")], reward)


def test_other_layouts_are_refused(made: tuple[str, Replica, Any], tmp_path: Path, world: Path) -> None:
    with pytest.raises(pt.CheckpointError, match="its config lacks"):
        PairRM(str(world / "reference"))
    with pytest.raises(pt.CheckpointError, match=r"no config\.json"):
        PairRM(str(tmp_path))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(made[0]) / name).read_bytes())
    with pytest.raises(pt.CheckpointError, match="no safetensors"):
        PairRM(str(tmp_path))
    weights = load_file(Path(made[0]) / "model.safetensors")
    del weights["head_layer.4.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(pt.CheckpointError, match=r"head_layer\.4\.weight"):
        PairRM(str(tmp_path))
