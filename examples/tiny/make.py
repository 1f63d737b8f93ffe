"""A base model of 22 thousand parameters and data for every trainer, as files: what the pages docs/train-*.md run on.

    python examples/tiny/make.py runs/tiny

The model is random and the sentences are noise; only the pairs have a rule: chosen answers end in "please thanks".
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

WORDS = "the a cat dog bird sees likes finds big small red blue green please thanks no yes good bad and".split()
SPECIAL = ["<pad>", "<unk>", "<eos>", "<user>", "<bot>"]
# TRL's SFT trainer masks the prompt of a conversation where the template marks the answer as a generation.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<user> {{ message['content'] }} "
    "{% else %}<bot> {% generation %}{{ message['content'] }} <eos>{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)
REWARD = '''\
"""A reward for grpo: the share of an answer's words that are polite."""


def polite(completions, **_):
    answers = [completion[0]["content"].split() for completion in completions]
    return [sum(word in ("please", "thanks") for word in words) / max(1, len(words)) for words in answers]
'''


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny")
    out.mkdir(parents=True, exist_ok=True)
    save_model(out / "base")
    rng = random.Random(0)
    write(out / "chats.jsonl", [{"messages": question(rng) + answer(rng, "")} for _ in range(64)])
    pairs = [
        {"prompt": question(rng), "chosen": answer(rng, " please thanks"), "rejected": answer(rng, " no")}
        for _ in range(80)
    ]
    write(out / "pairs.jsonl", pairs[:64])
    write(out / "held_pairs.jsonl", pairs[64:])
    labelled = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs[:32]
        for side in ("chosen", "rejected")
    ]
    write(out / "labelled.jsonl", labelled)
    write(out / "prompts.jsonl", [{"prompt": question(rng)} for _ in range(64)])
    (out / "reward.py").write_text(REWARD)
    print(f"written: {out}")


def save_model(path: Path) -> None:
    """A Llama with random weights, its word tokenizer and its chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=64,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def question(rng: random.Random) -> list[dict[str, str]]:
    return [{"role": "user", "content": sentence(rng)}]


def answer(rng: random.Random, ending: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": sentence(rng) + ending}]


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 6)))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
