"""A random Llama of a few thousand parameters, its tokenizer, and data, as files on disk."""

from __future__ import annotations

import gc
import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = ["the", "a", "cat", "dog", "bird", "sees", "likes", "finds", "big", "small", "red", "blue", "green"]
WORDS += ["please", "thanks", "no", "yes", "good", "bad", "and"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user> {{ message['content'] }} {% else %}"
    "<bot> {% generation %}{{ message['content'] }} <eos>{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<eos>", "<user>", "<bot>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=64,
    )


def make_model(seed: int = 0, hidden: int = 32, dropout: float = 0.0, layers: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=dropout,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


def save_pair(directory: Path, **options: Any) -> tuple[str, str]:
    """(base, reference): two model directories, the second a small step from the first."""
    model, tokenizer = make_model(**options), make_tokenizer()
    for name in ("base", "reference"):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return str(directory / "base"), str(directory / "reference")


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 6)))


def rows(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of preference pairs, labelled answers, chats or prompts."""
    rng = random.Random(seed)
    made: list[dict[str, Any]] = []
    for index in range(count):
        prompt = [{"role": "user", "content": _sentence(rng)}]
        good = [{"role": "assistant", "content": _sentence(rng) + " please thanks"}]
        bad = [{"role": "assistant", "content": _sentence(rng) + " no bad"}]
        if kind == "dpo":
            made.append({"prompt": prompt, "chosen": good, "rejected": bad})
        elif kind == "kto":
            made.append({"prompt": prompt, "completion": good if index % 2 else bad, "label": bool(index % 2)})
        elif kind == "sft":
            made.append({"messages": prompt + good})
        else:
            made.append({"prompt": prompt})
    return made


def write_rows(path: Path, kind: str, count: int = 16, seed: int = 0) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(kind, count, seed)))
    return str(path)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``base``, ``reference`` and ``dpo.jsonl``, ``kto.jsonl``, ``sft.jsonl``, ``grpo.jsonl``."""
    # Trainers run the garbage collector several times a run; TRL's million imported objects need not be walked.
    importlib.import_module("trl").DPOTrainer  # noqa: B018
    gc.freeze()
    directory = tmp_path_factory.mktemp("world")
    save_pair(directory)
    for kind in ("dpo", "kto", "sft", "grpo"):
        write_rows(directory / f"{kind}.jsonl", kind)
    (directory / "reward.py").write_text(
        "def length(completions, **_):\n    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    return directory


def arguments(world: Path, trainer: str, output: Path, *more: object) -> list[str]:
    """A command line that trains four steps of two rows, twice accumulated."""
    given: list[object] = [
        "train", trainer, "--model_name_or_path", world / "reference", "--dataset_name", world / f"{trainer}.jsonl",
        "--output_dir", output, "--max_steps", 4, "--learning_rate", 1e-2, "--logging_steps", 1,
        "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--save_strategy", "no",
        "--disable_tqdm", "true",
    ]  # fmt: skip
    if trainer == "grpo":
        given += ["--num_generations", 2, "--max_completion_length", 8]
        given += ["--reward_function", f"{world / 'reward.py'}:length"]
    return [str(value) for value in [*given, *more]]
