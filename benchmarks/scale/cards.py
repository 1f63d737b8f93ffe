"""Which card holds the training of 1.5, 7 and 70 billion parameters: the table of docs/scale.md.

    python benchmarks/scale/cards.py

Bytes are those of `paretune.optim.memory`: weights, gradients and optimizer state, without activations, for which a
fifth of the card is left free.
"""

from __future__ import annotations

import torch

from paretune.optim.memory import needed, planned, ranks_needed, smallest_card

SIZES = {"1.5B": 1.5e9, "7B": 7e9, "70B": 70e9}
BF16, FP32 = torch.bfloat16, torch.float32
FULL = {
    "AdamW, float32": planned("adamw", FP32),
    "OnDARE, float32": planned("ondare", FP32),
    "OnTIES (0.05), float32": planned("onties", FP32),
    "AdamW, bfloat16 (loses small updates)": planned("adamw", BF16),
    "OnDARE, bfloat16 + split master": planned("ondare", BF16),
    "OnTIES (0.05), bfloat16 + split master": planned("onties", BF16),
    "OnDARE, the same, Step-K": planned("ondare", BF16, every=8),
}
# LoRA of rank 16 on all linear layers trains about 0.6% of a 7B model's parameters; τ's factors of rank 16 beside them
SHARE = 0.006
ADAPTERS = {"LoRAMerging, bfloat16 weights": 2.0, "LoRAMerging, 4-bit weights": 0.55}


def cell(gigabytes: float) -> str:
    card = smallest_card(gigabytes)
    where = f"one of {card}" if card else f"{ranks_needed(gigabytes)} × 80"
    return f"{gigabytes:.0f} GB: {where}"


def main() -> None:
    print("| what | bytes a parameter | " + " | ".join(SIZES) + " |\n|---|---|" + "---|" * len(SIZES))
    for name, per in FULL.items():
        cells = [cell(needed(count, per)) for count in SIZES.values()]
        print(f"| {name} | {sum(per.values()):g} | {' | '.join(cells)} |")
    for name, size in ADAPTERS.items():
        per = {**planned("adamw", FP32), "tau": 2.0}
        cells = [cell(needed(count * SHARE, per, frozen_bytes=count * size)) for count in SIZES.values()]
        print(f"| {name} | {size + SHARE * sum(per.values()):.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
