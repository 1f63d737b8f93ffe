"""Small checkpoints on disk, and plain readings of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.mlp.up_proj.weight": (48, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.1.mlp.up_proj.weight": (48, 16),
    "model.layers.1.input_layernorm.weight": (16,),
    "model.norm.weight": (16,),
    "lm_head.weight": (40, 16),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "tie_word_embeddings": False,
}


def tensors(seed: int, dtype: torch.dtype = torch.bfloat16, shapes: Mapping[str, Any] = SHAPES) -> dict[str, Tensor]:
    """Random weights; those of other seeds are a small step from seed 0's."""
    base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=base)
        if seed:
            value = value + 0.1 * torch.randn(shape, generator=own)
        found[name] = value.to(dtype)
    return found


def write(directory: Path, values: Mapping[str, Tensor], shards: int = 1, config: Any = None) -> str:
    """Save a checkpoint in so many shards; its path."""
    directory.mkdir(parents=True, exist_ok=True)
    names = list(values)
    if shards == 1:
        save_file(
            {n: values[n].contiguous() for n in names}, directory / "model.safetensors", metadata={"format": "pt"}
        )
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {n: values[n].contiguous() for n in names[i::shards]}
            save_file(part, directory / file)
            weight_map |= dict.fromkeys(part, file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return str(directory)


def family(
    root: Path, count: int, dtype: torch.dtype = torch.bfloat16, shapes: Mapping[str, Any] = SHAPES
) -> list[str]:
    """A base and ``count`` models tuned from it."""
    return [write(root / f"m{seed}", tensors(seed, dtype, shapes)) for seed in range(count + 1)]


def read(directory: Path | str) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    found: dict[str, Tensor] = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        found |= load_file(file)
    return found


def content(directory: Path | str) -> dict[str, bytes]:
    """Every file of a directory."""
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(Path(directory).rglob("*")) if f.is_file()}


def ulps(found: Tensor, exact: Tensor) -> float:
    """The largest distance from an exact (float64) result, in units in the last place of the found dtype."""
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[found.dtype]
    tiny = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}[found.dtype]
    exponent = torch.frexp(exact)[1].double()
    unit = torch.clamp(torch.exp2(exponent - bits), min=tiny)
    return float(((found.double() - exact).abs() / unit).max()) if found.numel() else 0.0
