"""Files from the two data sets: the splits that each stage reads, and a tokenizer trained on the first of them."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEMONSTRATIONS = "gsm8k_demonstrations.jsonl.gz"
PREFERENCES = "gsm8k_preferences.jsonl.gz"
PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Args:
        vocabulary, hidden, layers: of tokenizer and model.
        pretrain, sft: demonstrations, disjoint.
        dpo_steps: optimizer steps of 8 pairs; so many pairs are taken from the training prompts.
        held_answers, held_pairs: rows measured that no stage trains on.
        train_pairs: training pairs measured.
        longest: characters of question and answer: attention and padding stay cheap on a processor; ``longest_pair``
            of question and either answer.
        epochs, blocks: passes over the pre-training text, and blocks of 256 tokens a step.
        bf16: pre-train under bfloat16 autocast, 2.5 times as fast where the processor has AMX.
    """

    vocabulary: int = 2048
    hidden: int = 192
    layers: int = 4
    pretrain: int = 1400
    sft: int = 900
    dpo_steps: int = 40
    held_answers: int = 300
    held_pairs: int = 300
    train_pairs: int = 150
    longest: int = 600
    longest_pair: int = 600
    epochs: int = 1
    blocks: int = 2
    bf16: bool = False


QUICK = Sizes(
    vocabulary=1024, hidden=96, layers=2, pretrain=400, sft=300, dpo_steps=10, held_answers=100, held_pairs=150,
    train_pairs=80,
)  # fmt: skip


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, gzipped or not."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def prepare(source: Path, out: Path, sizes: Sizes, seed: int) -> None:
    """Write ``data/*.jsonl`` and ``tokenizer/``.

    Pairs are split by question, so that no held-out question was seen; several pairs may share one.

    Args:
        source: the folder with both data sets.
        out: of the run.
        sizes: how many rows.
        seed: of the shuffles.
    """
    rng = random.Random(seed)
    demonstrations = [row for row in read_rows(source / DEMONSTRATIONS) if _length(row, "completion") <= sizes.longest]
    pairs = [
        row for row in read_rows(source / PREFERENCES) if max(_length(row, k) for k in _SIDES) <= sizes.longest_pair
    ]
    rng.shuffle(demonstrations)
    counts = (sizes.held_answers, sizes.pretrain, sizes.sft)
    if sum(counts) > len(demonstrations):
        raise SystemExit(f"{DEMONSTRATIONS}: {len(demonstrations)} short rows, {sum(counts)} are needed")
    cuts = [0, *itertools.accumulate(counts)]
    held, raw, tuning = (demonstrations[start:end] for start, end in itertools.pairwise(cuts))
    questions = sorted({row["prompt"] for row in pairs})
    rng.shuffle(questions)
    held_questions = set(questions[: len(questions) // 3])
    rng.shuffle(pairs)
    training = [row for row in pairs if row["prompt"] not in held_questions][: 8 * sizes.dpo_steps]
    testing = [row for row in pairs if row["prompt"] in held_questions][: sizes.held_pairs]

    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    _write(data / "pretrain.jsonl", ({"prompt": row["prompt"], "completion": row["completion"]} for row in raw))
    _write(data / "sft.jsonl", (_conversation(row, ("completion",)) for row in tuning))
    _write(data / "held_answers.jsonl", (_conversation(row, ("completion",)) for row in held))
    _write(data / "dpo.jsonl", (_conversation(row, _SIDES) for row in training))
    _write(data / "held_pairs.jsonl", (_conversation(row, _SIDES) for row in testing))
    _train_tokenizer(
        [f"{row['prompt']}\n{row['completion']}" for row in raw + tuning], sizes.vocabulary
    ).save_pretrained(out / "tokenizer")


_SIDES = ("chosen", "rejected")


def _length(row: dict[str, Any], answer: str) -> int:
    return len(row["prompt"]) + len(row[answer])


def _conversation(row: dict[str, Any], answers: Iterable[str]) -> dict[str, Any]:
    """TRL's conversational form, to which it applies the tokenizer's chat template."""
    made: dict[str, Any] = {"prompt": [{"role": "user", "content": row["prompt"]}]}
    made.update({name: [{"role": "assistant", "content": row[name]}] for name in answers})
    return made


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE with single digits and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, chat_template=CHAT_TEMPLATE, model_max_length=512
    )
