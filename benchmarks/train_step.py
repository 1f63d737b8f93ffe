"""One optimizer step of ``paretune train dpo`` against plain TRL's DPOTrainer with AdamW.

A random Llama of hidden size 256 on the CPU, one thread, float32. The trainers take turns of a few steps each, so
that a busy machine slows all of them; what counts is process CPU time, and the median over all steps.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py [--rounds 6] [--steps 6] [--batch 8] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

VARIANTS = {
    "plain TRL, AdamW": None,
    "adamw": ["--optimizer", "adamw"],
    "ondare 5e-4": ["--optimizer", "ondare", "--density", "5e-4", "--weight", "5e-7"],
    "onties 5e-2": ["--optimizer", "onties", "--density", "5e-2", "--weight", "5e-7"],
    "onties 1e-2": ["--optimizer", "onties", "--density", "1e-2", "--weight", "5e-7"],
    "adamw + ema": ["--optimizer", "adamw", "--ema_decay", "1e-3"],
}
WORDS = [f"w{i}" for i in range(2000)]


class Timer(TrainerCallback):
    """CPU seconds from the end of one step to the end of the next: the data is in it, the first step is not."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._last = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.process_time()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def write_world(directory: Path, hidden: int = 256) -> None:
    """A base and a reference model, their tokenizer, and preference pairs."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<unk>", "<eos>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=128
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3, hidden_size=hidden, intermediate_size=hidden * 43 // 16,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
        pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name in ("base", "reference"):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 1e-3)
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    rows = [{"prompt": words(32), "chosen": " " + words(32), "rejected": " " + words(32)} for _ in range(512)]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(world: Path, output: Path, further: list[str] | None, steps: int, batch: int) -> tuple[Any, Timer]:
    """A trainer as ``paretune train dpo`` builds it, or TRL's own."""
    from paretune.cli.method import build_method
    from paretune.cli.train_arguments import parse
    from paretune.training.build import load_data, make_trainer
    from paretune.training.callbacks import EMACallback, Trajectory
    from paretune.training.trainer import attach

    timer = Timer()
    argv = ["--model_name_or_path", str(world / "reference"), "--base_model", str(world / "base")]
    argv += ["--dataset_name", str(world / "pairs.jsonl"), "--output_dir", str(output), "--save_strategy", "no"]
    argv += ["--max_steps", str(steps), "--per_device_train_batch_size", str(batch), "--disable_tqdm", "true"]
    request = parse("dpo", [*argv, *(further or [])]).request
    data = load_data(request)
    if further is None:
        from trl import DPOTrainer

        plain = DPOTrainer(model=request.model_path, args=request.training, train_dataset=data.train, callbacks=[timer])
        return plain, timer
    method = build_method(request)
    callbacks: list[Any] = [timer, Trajectory()]
    if method.average is not None:
        callbacks.append(EMACallback(method.average))
    trainer = make_trainer(request, data, callbacks)
    if method.factory is not None:
        attach(trainer, method.factory)
    return trainer, timer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8, help="pairs in a step")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        world = Path(folder)
        write_world(world)
        made = {
            name: make(world, world / f"out{index}", further, arguments.steps, arguments.batch)
            for index, (name, further) in enumerate(VARIANTS.items())
        }
        trainers = [trainer for trainer, _ in made.values()]
        for turn in range(arguments.rounds):
            first = turn % len(trainers)  # nobody is always first
            for trainer in trainers[first:] + trainers[:first]:
                trainer.train()
    medians = {name: statistics.median(timer.seconds) for name, (_, timer) in made.items()}
    plain = medians["plain TRL, AdamW"]
    ratios = {name: round(median / plain, 3) for name, median in medians.items()}
    if arguments.json:
        parameters = sum(p.numel() for p in made["adamw"][0].model.parameters())
        print(json.dumps({"parameters": parameters, "seconds": medians, "ratio": ratios, "torch": torch.__version__}))
    else:
        for name, ratio in ratios.items():
            print(f"{name:20} {medians[name] * 1e3:8.1f} ms {ratio:6.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
