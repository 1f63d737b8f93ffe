"""Pairs of small checkpoints of several architectures, and rows of tokens to learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 40
COMMON = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}


def build(kind: str) -> Any:
    """A random model of an architecture: llama, llama-tied, qwen2 (biases), gpt2 (tied, biases), mixtral, qwen2-moe."""
    import transformers as t

    small = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.2,
        **COMMON,
    }  # fmt: skip
    if kind in ("llama", "llama-tied"):
        return t.LlamaForCausalLM(t.LlamaConfig(**small, tie_word_embeddings=kind == "llama-tied"))
    if kind == "qwen2":
        return t.Qwen2ForCausalLM(t.Qwen2Config(**small, tie_word_embeddings=True))
    if kind == "gpt2":
        gpt2 = t.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=4, n_head=2, n_positions=64, **COMMON)
        return t.GPT2LMHeadModel(gpt2)
    if kind == "mixtral":
        return t.MixtralForCausalLM(t.MixtralConfig(**small, num_local_experts=3, num_experts_per_tok=3))
    moe = {"num_experts": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    return t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**small, **moe, num_experts_per_tok=2))


def save_ends(directory: Path, kind: str, distance: float = 0.1, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """(pre, post): two checkpoints, the second a step from the first."""
    torch.manual_seed(0)
    model = build(kind).to(dtype)
    for name in ("pre", "post"):
        model.save_pretrained(directory / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(distance * torch.randn_like(parameter))
    return str(directory / "pre"), str(directory / "post")


def token_rows(count: int = 6, seed: int = 3) -> list[dict[str, Any]]:
    """Rows of tokens of unequal length; the completion starts at the third token."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        ids = torch.randint(3, VOCABULARY, (6 + index % 3,), generator=generator).tolist()
        rows.append({"input_ids": ids, "completion_mask": [0, 0] + [1] * (len(ids) - 2)})
    return rows
