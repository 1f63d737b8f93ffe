"""Which card holds the training of 1.5, 7 and 70 billion parameters: the table of docs/scale.md.

    python benchmarks/scale/cards.py

Bytes are those of `paretune.optim.memory`: weights, gradients and optimizer state, without activations, for which a
fifth of the card is left free. GaLore's are those of the shapes of Qwen2.5 1.5B and 7B and Llama-3 70B.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from paretune.optim.memory import needed, planned, projected, ranks_needed, smallest_card

# parameters; hidden, MLP, keys and values, layers, vocabulary, whether the head is the embedding
SIZES = {
    "1.5B": (1.5e9, (1536, 8960, 256, 28, 151_936, True)),
    "7B": (7e9, (3584, 18_944, 512, 28, 152_064, False)),
    "70B": (70e9, (8192, 28_672, 1024, 80, 128_256, False)),
}
BF16, FP32 = torch.bfloat16, torch.float32
FULL: dict[str, dict[str, float]] = {
    "AdamW, float32": planned("adamw", FP32),
    "OnDARE, float32": planned("ondare", FP32),
    "OnTIES (0.05), float32": planned("onties", FP32),
    "AdamW, bfloat16 (loses small updates)": planned("adamw", BF16),
    "OnDARE, bfloat16 + split master": planned("ondare", BF16),
    "OnTIES (0.05), bfloat16 + split master": planned("onties", BF16),
    "OnDARE, bfloat16 + split master, Step-K": planned("ondare", BF16, every=8),
    "OnlineMerging(torchao AdamW8bit), Random, bfloat16 + split master": planned("ondare", BF16, moments="8bit"),
    "OnlineMerging(torchao AdamW4bit), Random, bfloat16 + split master": planned("ondare", BF16, moments="4bit"),
    "OnlineMerging(torchao AdamW4bit), Magnitude (0.05), bfloat16 + split master": planned(
        "onties", BF16, moments="4bit"
    ),
}
RANKS = (128, 512)
# LoRA of rank 16 on all linear layers trains about 0.6% of a 7B model's parameters; τ's factors of rank 16 beside them
SHARE = 0.006
ADAPTERS = {"LoRAMerging, bfloat16 weights": 2.0, "LoRAMerging, 4-bit weights": 0.55}


def shapes(hidden: int, mlp: int, keys: int, layers: int, vocabulary: int, tied: bool) -> list[tuple[int, ...]]:
    """Of a Llama-like model's tensors."""
    layer = [(hidden, hidden)] * 2 + [(keys, hidden)] * 2 + [(mlp, hidden)] * 2 + [(hidden, mlp), (hidden,), (hidden,)]
    return layer * layers + [(vocabulary, hidden)] * (1 if tied else 2) + [(hidden,)]


def cell(gigabytes: float) -> str:
    card = smallest_card(gigabytes)
    where = f"one of {card}" if card else f"{ranks_needed(gigabytes)} × 80"
    return f"{gigabytes:.0f} GB: {where}"


def row(name: str, each: Mapping[str, Mapping[str, float]]) -> None:
    totals = {size: sum(per.values()) for size, per in each.items()}
    low, high = min(totals.values()), max(totals.values())
    held = f"{low:.4g}" if high - low < 0.005 else f"{low:.3g}–{high:.3g}"
    cells = [cell(needed(count, each[size])) for size, (count, _) in SIZES.items()]
    print(f"| {name} | {held} | {' | '.join(cells)} |")


def main() -> None:
    print("| what | bytes a parameter | " + " | ".join(SIZES) + " |\n|---|---|" + "---|" * len(SIZES))
    for name, per in FULL.items():
        row(name, dict.fromkeys(SIZES, per))
    for rank in RANKS:
        held = {size: projected(shapes(*model), rank) for size, (_, model) in SIZES.items()}
        name = f"OnlineMerging(GaLoreAdamW, rank {rank}), Random, bfloat16 + split master"
        row(name, {size: planned("ondare", BF16, moments=moments) for size, moments in held.items()})
    for name, size in ADAPTERS.items():
        per = {**planned("adamw", FP32), "tau": 2.0}
        cells = [cell(needed(count * SHARE, per, frozen_bytes=count * size)) for count, _ in SIZES.values()]
        print(f"| {name} | {size + SHARE * sum(per.values()):.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
