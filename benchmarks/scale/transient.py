"""Bytes per parameter that one optimizer step needs beyond what it holds: the peak of resident memory (Linux, CPU).

    python benchmarks/scale/transient.py [--millions 200]

Each optimizer runs in a process of its own, on matrices of 2048 × 2048 and, the worst case, on one matrix alone; after
two steps the kernel's high-water mark is reset and a third step is made. τ is read from two checkpoints on disk (its
pages are files', not counted). `PARETUNE_KERNELS` chooses the arithmetic.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import tempfile
from pathlib import Path

import torch

import paretune as pt

CHOICES = {
    "OnDARE, density 5e-4": ("OnDARE", {"density": 5e-4}, torch.float32),
    "OnDARE, density 1e-2": ("OnDARE", {"density": 1e-2}, torch.float32),
    "OnDARE, density 5e-4, bfloat16": ("OnDARE", {"density": 5e-4}, torch.bfloat16),
    "OnTIES, density 1e-2": ("OnTIES", {"density": 1e-2}, torch.float32),
    "OnTIES, density 5e-2": ("OnTIES", {"density": 5e-2}, torch.float32),
}


def resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024


def measure(name: str, layout: str, folder: str, count: int) -> None:
    logging.getLogger("paretune").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    kind, options, dtype = CHOICES[name]
    tau = pt.TaskVector.between(base=f"{folder}/base", reference=f"{folder}/reference")
    params = {key: torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for key, shape in tau.items()}
    optimizer = getattr(pt, kind)(params.items(), tau, lr=1e-6, **options)
    for key in tau:  # so that the files' pages are resident before and after alike
        tau.dense(key)
    for step in range(3):
        for p in params.values():
            p.grad = torch.randn(p.shape, dtype=dtype)
        if step == 2:
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
        optimizer.step()
    print(f"| {name} | {layout} | {(resident('VmHWM') - before) / count:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=200)
    options = parser.parse_args()
    from safetensors.torch import save_file

    rows = max(1, round(options.millions * 1e6 / 2048**2)) * 2048
    layouts = {
        "2048 × 2048 each": {f"layers.{i}.weight": (2048, 2048) for i in range(rows // 2048)},
        "one tensor": {"embed.weight": (rows, 2048)},
    }
    # Freed blocks go back to the kernel at once, so that each step's scratch shows.
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0")
    print(
        f"{rows * 2048 / 1e6:.0f}M parameters\n\n| optimizer | tensors | transient bytes a parameter |\n|---|---|---|"
    )
    for layout, shapes in layouts.items():
        with tempfile.TemporaryDirectory() as folder:
            for side in ("base", "reference"):
                (Path(folder) / side).mkdir()
                tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
                save_file(tensors, f"{folder}/{side}/model.safetensors")
            del tensors
            for name in CHOICES:
                arguments = name, layout, folder, rows * 2048
                process = multiprocessing.get_context("spawn").Process(target=measure, args=arguments)
                process.start()
                process.join()


if __name__ == "__main__":
    main()
