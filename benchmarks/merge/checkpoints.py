"""Llama-style checkpoints with random weights: a base and models a small step away from it, as bf16 safetensors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = {  # hidden, intermediate, layers, vocabulary
    "tiny": (64, 176, 2, 512),
    "0.35B": (1024, 2816, 24, 32000),
    "1B": (2048, 5504, 20, 32000),
}


def config(size: str) -> dict[str, object]:
    """A Llama ``config.json``."""
    hidden, intermediate, layers, vocabulary = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama model's tensors, in the order in which transformers saves them."""
    hidden, intermediate, layers, vocabulary = SIZES[size]
    found: dict[str, tuple[int, ...]] = {"lm_head.weight": (vocabulary, hidden)}
    found["model.embed_tokens.weight"] = (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.input_layernorm.weight"] = (hidden,)
        found[f"{prefix}.mlp.down_proj.weight"] = (hidden, intermediate)
        found[f"{prefix}.mlp.gate_proj.weight"] = (intermediate, hidden)
        found[f"{prefix}.mlp.up_proj.weight"] = (intermediate, hidden)
        found[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name in "kqvo":
            found[f"{prefix}.self_attn.{name}_proj.weight"] = (hidden, hidden)
    found["model.norm.weight"] = (hidden,)
    return found


def write(directory: Path, size: str, seed: int, step: float) -> None:
    """One checkpoint: the base weights (seed 0) plus a random step of the given relative size.

    Args:
        directory: where to.
        size: a key of `SIZES`.
        seed: which step; 0 is the base itself.
        step: standard deviation of the step relative to that of the weights; small steps tie heavily in bf16.
    """
    directory.mkdir(parents=True, exist_ok=True)
    base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(size).items():
        weight = torch.randn(shape, generator=base) * 0.02
        if seed:
            weight += torch.randn(shape, generator=own) * 0.02 * step
        tensors[name] = (weight + 1 if len(shape) == 1 else weight).bfloat16()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config(size), indent=2))


def make(root: Path, size: str, models: int, step: float = 0.05) -> list[Path]:
    """``base``, ``model1``, ``model2`` … under ``root/size``; what is there already is kept."""
    found = []
    for seed in range(models + 1):
        directory = root / size / (f"model{seed}" if seed else "base")
        if not (directory / "config.json").is_file():
            write(directory, size, seed, step)
        found.append(directory)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--size", default="0.35B", choices=SIZES)
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--step", type=float, default=0.05)
    arguments = parser.parse_args()
    for directory in make(arguments.root, arguments.size, arguments.models, arguments.step):
        print(directory)


if __name__ == "__main__":
    main()
