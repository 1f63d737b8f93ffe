"""The base model: a small Llama that reads questions and answers as plain text."""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from prepare import Sizes, read_rows

_BLOCK, _LR = 256, 3e-3


def pretrain(out: Path, sizes: Sizes, seed: int) -> float:
    """Train on ``data/pretrain.jsonl`` in packed blocks and save ``base/``.

    Args:
        out: of the run, prepared.
        sizes: of the model.
        seed: of initial weights and order.

    Returns:
        The mean loss over the last tenth, in nats a token.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    rows = read_rows(out / "data" / "pretrain.jsonl")
    # Question and answer are encoded apart, as they are when answers are measured.
    texts = [
        [*tokenizer.encode(row["prompt"] + "\n"), *tokenizer.encode(row["completion"]), tokenizer.eos_token_id]
        for row in rows
    ]
    rng, stream = random.Random(seed), []
    for _ in range(sizes.epochs):
        rng.shuffle(texts)
        stream += [token for text in texts for token in text]
    taken = _BLOCK * sizes.blocks
    steps = len(stream) // taken
    batches = torch.tensor(stream[: steps * taken]).view(steps, sizes.blocks, _BLOCK)

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.hidden,
            intermediate_size=sizes.hidden * 8 // 3 // 32 * 32,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.hidden // 32,
            num_key_value_heads=sizes.hidden // 32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.1, betas=(0.9, 0.98), fused=True)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / steps)))),
    )
    losses = []
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=sizes.bf16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)
