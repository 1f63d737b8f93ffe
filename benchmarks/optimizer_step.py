"""CPU time of one optimizer step, as a ratio to torch's fused AdamW, all in one run.

    python benchmarks/optimizer_step.py [--millions 20] [--hidden 512] [--rounds 15] [--few]

One thread, process CPU time, interleaved, medians; ours with the eager and with the compiled kernels. The model has
Llama's shapes with random weights: `--hidden 2048` are those of a model of 1 to 2 billion parameters, where what the
released code passes over no longer fits the caches; `--few` keeps rows with a target. Four sets of gradients take turns
after a warm-up, because with a constant gradient all of Adam's updates tie in magnitude. τ is read from two checkpoints
on disk (warm page cache). bfloat16: gradients too, and ours keeps float32 moments and master. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from naive_released import NaiveOnDARE, NaiveOnTIES
from safetensors.torch import save_file
from torch import Tensor

import paretune as pt
from paretune import native

WARM_UP = 8


FEW = ("torch AdamW, fused", "OnDARE, density 5e-4 [", "OnTIES, density 1e-2 [", "released")


def shapes(millions: float, hidden: int = 512) -> dict[str, tuple[int, ...]]:
    """Llama's tensors: at hidden 512 about 3.1M parameters a layer and a 1M embedding, at 2048 50M and 4M."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (2048, hidden)}
    mlp = hidden * 43 // 16
    layer = 4 * hidden**2 + 3 * hidden * mlp
    for number in range(max(1, round((millions * 1e6 - 2048 * hidden) / layer))):
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, hidden),
            "self_attn.v_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }.items():  # fmt: skip
            found[f"model.layers.{number}.{name}.weight"] = shape
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=20)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--few", action="store_true")
    options = parser.parse_args()
    logging.getLogger("paretune").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    reference = {name: torch.randn(shape) * 0.02 for name, shape in shapes(options.millions, options.hidden).items()}
    folder = Path(tempfile.mkdtemp())
    for label, noise in (("reference", 0.0), ("base", 1e-3)):
        (folder / label).mkdir()
        tensors = {name: value + noise * torch.randn_like(value) for name, value in reference.items()}
        save_file(tensors, folder / label / "model.safetensors")
    tau = pt.TaskVector.between(base=folder / "base", reference=folder / "reference")
    dense = {name: tau.dense(name).view(value.shape) for name, value in reference.items()}
    gradients = [{name: torch.randn_like(value) * 1e-3 for name, value in reference.items()} for _ in range(4)]
    halves = [{name: value.bfloat16() for name, value in one.items()} for one in gradients]

    def build(
        make: Callable[[dict[str, Tensor]], torch.optim.Optimizer], dtype: torch.dtype = torch.float32
    ) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
        parameters = {name: torch.nn.Parameter(value.to(dtype)) for name, value in reference.items()}
        return parameters, make(parameters)

    half = torch.bfloat16
    adamw = torch.optim.AdamW
    ours: dict[str, tuple[Callable[[dict[str, Tensor]], torch.optim.Optimizer], torch.dtype]] = {
        "OnDARE, density 5e-4": (lambda p: pt.OnDARE(p.items(), tau, density=5e-4), torch.float32),
        "OnDARE, density 1e-2": (lambda p: pt.OnDARE(p.items(), tau, density=1e-2), torch.float32),
        "OnDARE, density 5e-4, weight decay": (
            lambda p: pt.OnDARE(p.items(), tau, density=5e-4, weight_decay=0.01),
            torch.float32,
        ),
        "OnTIES, density 1e-2": (lambda p: pt.OnTIES(p.items(), tau, density=1e-2), torch.float32),
        "OnTIES, density 5e-2": (lambda p: pt.OnTIES(p.items(), tau, density=5e-2), torch.float32),
        "OnDARE, density 5e-4, bfloat16": (lambda p: pt.OnDARE(p.items(), tau, density=5e-4), half),
        "OnTIES, density 1e-2, bfloat16": (lambda p: pt.OnTIES(p.items(), tau, density=1e-2), half),
    }
    choices = ["eager"] if native.kernels() is None else ["eager", "native"]
    full = torch.float32
    makers: dict[str, tuple[Callable[[dict[str, Tensor]], torch.optim.Optimizer], torch.dtype]] = {
        "torch AdamW, fused": (lambda p: adamw(p.values(), lr=1e-6, weight_decay=0.0, fused=True), full),
        "torch AdamW, foreach": (lambda p: adamw(p.values(), lr=1e-6, weight_decay=0.0, foreach=True), full),
        "torch AdamW in bfloat16 throughout, fused": (
            lambda p: adamw(p.values(), lr=1e-6, weight_decay=0.0, fused=True),
            half,
        ),
        **{f"{name} [{choice}]": ours[name] for name in ours for choice in choices},
        "OnlineMerging(fused AdamW), Random 5e-4": (
            lambda p: pt.OnlineMerging(adamw(p.items(), lr=1e-6, weight_decay=0.0, fused=True), tau),
            full,
        ),
        "released OnDARE (naive), density 5e-4": (
            lambda p: NaiveOnDARE(p.items(), dense, lr=1e-6, density=5e-4, weight=5e-7),
            full,
        ),
        "released OnTIES (naive), density 1e-2": (
            lambda p: NaiveOnTIES(p.items(), dense, lr=1e-6, density=1e-2, weight=5e-7),
            full,
        ),
    }
    runs = {name: build(*maker) for name, maker in makers.items() if not options.few or name.startswith(FEW)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(WARM_UP + options.rounds):
        for name, (parameters, optimizer) in runs.items():
            if "naive" in name and not WARM_UP - 2 < step < WARM_UP + 3:  # seconds a step: three are enough
                continue
            for key, value in parameters.items():
                value.grad = (halves if value.dtype == half else gradients)[step % len(gradients)][key]
            os.environ[native.VARIABLE] = "native" if name.endswith("[native]") else "eager"
            begin = time.process_time()
            optimizer.step()
            if step >= WARM_UP:
                times[name].append(time.process_time() - begin)
    medians = {name: statistics.median(values) for name, values in times.items()}
    count = sum(value.numel() for value in reference.values())
    print(
        f"{count / 1e6:.1f}M parameters, torch {torch.__version__}, {platform.machine()}, one thread, "
        f"{options.rounds} rounds"
    )
    print("\n| optimizer | CPU ms a step | ÷ fused AdamW |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median * 1e3:.0f} | {median / medians['torch AdamW, fused']:.2f} |")
    print()
    for choice in choices:
        dare = medians["released OnDARE (naive), density 5e-4"] / medians[f"OnDARE, density 5e-4 [{choice}]"]
        ties = medians["released OnTIES (naive), density 1e-2"] / medians[f"OnTIES, density 1e-2 [{choice}]"]
        print(f"released arithmetic ÷ ours [{choice}]: OnDARE {dare:.0f}, OnTIES {ties:.0f}")
    for name in ("OnDARE, density 5e-4", "OnTIES, density 1e-2"):
        optimizer = runs[f"{name} [eager]"][1]
        print(f"resident τ of {name}: {optimizer._tau.resident_bytes / count:.3f} bytes a parameter")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
