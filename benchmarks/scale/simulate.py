"""What the optimizers would cost on many ranks: estimates from measured work per element and counted messages.

    python benchmarks/scale/simulate.py [--elements 20000000]

Measured here, on one CPU thread: nanoseconds an element of a fused AdamW step, of an OnDARE step, and of an OnTIES step
as a rank makes it under sharding (two histogram passes and one selection). Counted from the code: bytes that each
rank holds, sends and receives. Everything else is an assumption, named in the output. No figure of the tables was
measured on such a machine: they are estimates.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import time
from collections.abc import Callable

import torch

import paretune as pt
from paretune.operators import kept, largest_streamed
from paretune.optim.adamw import AdamUpdate
from paretune.optim.memory import planned
from paretune.optim.parts import whole
from paretune.optim.threshold import Wanted, digit_bits, thresholds

# hidden, intermediate, layers, key-value width, vocabulary: Llama 3.1's published configurations
MODELS = {
    "8B": (4096, 14336, 32, 1024, 128256),
    "70B": (8192, 28672, 80, 1024, 128256),
    "405B": (16384, 53248, 126, 1024, 128256),
}
HBM = 3.35e12  # bytes a second of an H100's memory, as published
REACHED = 0.6  # the share of it that element-wise kernels reach
WIRE = 50e9  # bytes a second and rank between nodes (400 Gb/s), which bounds a ring of many nodes
HOP = 10e-6  # seconds that one step of a ring, or of a tree, waits
# bytes an element that pass through memory: the fused moments; then, kernel by kernel as eager torch runs them, δ with
# its histogram, and each later pass that collects candidates
MOMENTS, FIRST_PASS, LATER_PASS = 20, 64, 32


def sizes(model: str) -> list[int]:
    """Elements of each tensor."""
    hidden, wide, layers, kv, vocabulary = MODELS[model]
    layer = [hidden * hidden] * 2 + [hidden * kv] * 2 + [hidden * wide] * 3 + [hidden] * 2
    return layer * layers + [vocabulary * hidden] * 2 + [hidden]


def measure(elements: int) -> dict[str, float]:
    """Nanoseconds an element of each phase on this CPU, one thread."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(elements) * 0.02)
    base = {"w": p.detach() - 1e-3 * torch.randn(elements)}
    tau = pt.TaskVector.between(base=base, reference={"w": p.detach()})
    dare = pt.OnDARE([("w", p)], tau)
    adamw = torch.optim.AdamW([p], lr=1e-6, fused=True)

    def clock(work: Callable[[], object]) -> float:
        times = []
        for _ in range(7):
            begin = time.process_time()
            work()
            times.append(time.process_time() - begin)
        return statistics.median(times) / elements * 1e9

    for _ in range(8):  # different gradients: after equal ones all updates tie in magnitude
        p.grad = torch.randn(elements) * 1e-3
        dare.step()
    found = {"fused AdamW": clock(adamw.step), "OnDARE, density 5e-4": clock(dare.step)}
    state = dare.state[p]  # its clocked steps had one gradient: some more
    for _ in range(8):
        p.grad = torch.randn(elements) * 1e-3
        dare.step()
    update = AdamUpdate(state["exp_avg"], state["exp_avg_sq"], 8.0, 1e-6, (0.9, 0.999), 1e-8)
    want = Wanted(update, whole(elements), kept(0.05, elements), False)
    threshold = thresholds([want])[0]
    found["OnTIES in one process, selecting"] = clock(lambda: largest_streamed(update, want.k))
    found["OnTIES, finding the threshold"] = clock(lambda: thresholds([want]))
    found["OnTIES, selecting by it"] = clock(lambda: threshold.select(update))
    return found


def collective(size: float, ranks: int, gather: bool = False) -> float:
    """Seconds of one ring all-reduce (or all-gather of ``size`` bytes a rank) over ``ranks``."""
    if gather:
        return HOP * (ranks - 1).bit_length() + size * (ranks - 1) / WIRE
    return HOP * 2 * (ranks - 1).bit_length() + 2 * size * (ranks - 1) / ranks / WIRE


def row(model: str, ranks: int) -> list[str]:
    tensors, count = len(sizes(model)), sum(sizes(model))
    mine = count / ranks
    first = digit_bits(ranks)
    last = 31 - 2 * first
    histogram, counts = tensors * 8 * 2**first, tensors * 8 * (2**last + 1)
    messages = 2 * collective(histogram, ranks) + collective(counts, ranks, gather=True)
    speed = HBM * REACHED
    dare = mine * MOMENTS / speed
    ties = mine * (MOMENTS + FIRST_PASS + 2 * LATER_PASS) / speed
    held = {kind: sum(planned(kind, torch.bfloat16).values()) * mine / 1e9 for kind in ("ondare", "onties")}
    return [
        model, str(ranks), f"{mine / 1e6:.0f}", f"{held['ondare']:.2f}", f"{held['onties']:.2f}",
        f"{histogram / 1e6:.0f} + {histogram / 1e6:.0f} + {counts * ranks / 1e6:.0f}",
        f"{counts * ranks / mine:.2f}", f"{dare * 1e3:.1f}", f"{ties * 1e3:.1f} + {messages * 1e3:.1f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=20_000_000)
    options = parser.parse_args()
    logging.getLogger("paretune").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    print(f"Measured: {platform.machine()}, one thread, {options.elements / 1e6:.0f}M float32 elements\n")
    print("| phase | ns an element |\n|---|---|")
    for name, cost in measure(options.elements).items():
        print(f"| {name} | {cost:.2f} |")
    print(
        f"\nEstimates, assuming {HBM / 1e12:.2f} TB/s of memory of which {REACHED:.0%} is reached, "
        f"{WIRE / 1e9:.0f} GB/s a rank between nodes, {HOP * 1e6:.0f} µs a hop,\n"
        "bfloat16 parameters with a split master, everything sharded over all ranks, OnTIES at density 0.05\n"
    )
    head = [
        "model", "ranks", "M parameters a rank", "OnDARE GB a rank", "OnTIES GB a rank",
        "OnTIES MB exchanged", "the third, bytes a parameter", "OnDARE ms a step",
        "OnTIES ms a step (work + exchange)",
    ]  # fmt: skip
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for model in MODELS:
        for ranks in (8, 64, 256, 1024):
            if sum(sizes(model)) * 14.3 / ranks < 80e9:
                print("| " + " | ".join(row(model, ranks)) + " |")


if __name__ == "__main__":
    main()
