"""One optimizer step on a CUDA card, as a ratio to torch's fused AdamW; first whether the card gives the CPU's bits.

    python benchmarks/scale/gpu.py [--millions 500] [--rounds 20]

Wall time of a step between two waits for the card, medians, after a warm-up: what the host does is counted, for OnDARE
also the drawing and reading of τ's entries. "after a pause": half a second before each step, as a model's forward and
backward pass would take, in which the Triton step reads τ's entries ahead. Llama-like tensors; two sets of gradients
take turns; τ is read from two bfloat16 checkpoints on disk (warm page cache). Transient: the peak of the card's memory
above what is held. Prints Markdown; needs about 24 bytes of the card's memory a parameter.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

import paretune as pt
from paretune import native

WARM_UP = 5
METHODS = {
    "OnDARE, density 5e-4": (pt.OnDARE, {"density": 5e-4}),
    "OnDARE, density 1e-2": (pt.OnDARE, {"density": 1e-2}),
    "OnTIES, density 1e-2": (pt.OnTIES, {"density": 1e-2}),
    "OnTIES, density 5e-2": (pt.OnTIES, {"density": 5e-2}),
}


def shapes(millions: float) -> dict[str, tuple[int, ...]]:
    """Llama's tensors at hidden 2048: about 50M parameters a layer and a 66M embedding."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32_000, 2048)}
    for layer in range(max(1, round((millions - 65.5) / 50.3))):
        for name, shape in {
            "self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (2048, 2048), "self_attn.v_proj": (2048, 2048),
            "self_attn.o_proj": (2048, 2048), "mlp.gate_proj": (5504, 2048), "mlp.up_proj": (5504, 2048),
            "mlp.down_proj": (2048, 5504), "input_layernorm": (2048,), "post_attention_layernorm": (2048,),
        }.items():  # fmt: skip
            found[f"model.layers.{layer}.{name}.weight"] = shape
    return found


def differing(choice: str, method: str, dtype: torch.dtype, device: str) -> str:
    """After five steps on small tensors: the entries whose bits are not those of the eager step on the CPU."""
    kind, options = METHODS[method]
    generator = torch.Generator().manual_seed(0)
    reference = {
        f"w{i}": torch.randn(shape, generator=generator) for i, shape in enumerate([(701, 301), (70_001,), (7,)])
    }
    base = {name: x + torch.randn(x.shape, generator=generator) * 1e-2 for name, x in reference.items()}
    gradients = [{n: torch.randn(x.shape, generator=generator) * 1e-3 for n, x in reference.items()} for _ in range(5)]
    tau = pt.TaskVector.between(base=base, reference=reference)
    results = []
    for where, how in (("cpu", "eager"), (device, choice)):
        os.environ[native.VARIABLE] = how
        params = {name: torch.nn.Parameter(x.to(where, dtype)) for name, x in reference.items()}
        optimizer = kind(params.items(), tau, weight=0.3, lr=1e-3, **options)
        for some in gradients:
            for name, p in params.items():
                p.grad = some[name].to(where, dtype)
            optimizer.step()
        states = [optimizer.state[p] for p in params.values()]
        results.append([p.detach().cpu() for p in params.values()] + [s["exp_avg_sq"].cpu() for s in states])
    wrong = sum(int((a != b).sum()) for a, b in zip(*results, strict=True))
    return f"{wrong} of {sum(a.numel() for a in results[0])}"


def measure(
    make: Callable[[dict[str, Tensor]], torch.optim.Optimizer],
    choice: str,
    dtype: torch.dtype,
    sizes: dict,
    rounds: int,
    pause: float,
) -> tuple[float, float]:
    """Median seconds of a step, and transient bytes a parameter."""
    os.environ[native.VARIABLE] = choice
    params = {name: torch.nn.Parameter(torch.zeros(shape, device="cuda", dtype=dtype)) for name, shape in sizes.items()}
    gradients = [{n: torch.randn(s, device="cuda", dtype=dtype) * 1e-3 for n, s in sizes.items()} for _ in range(2)]
    optimizer = make(params)
    times, transient = [], 0
    for step in range(WARM_UP + rounds):
        for name, p in params.items():
            p.grad = gradients[step % 2][name]
        torch.cuda.synchronize()
        time.sleep(pause)
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize()
        if step >= WARM_UP:
            times.append(time.perf_counter() - begin)
            transient = max(transient, torch.cuda.max_memory_allocated() - held)
    return statistics.median(times), transient / sum(p.numel() for p in params.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=500)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu.py: torch sees no CUDA card here: nothing is measured")
    from safetensors.torch import save_file

    logging.getLogger("paretune").setLevel(logging.WARNING)
    choices = ["eager", *(["triton"] if find_spec("triton") else [])]
    f32, bf16 = torch.float32, torch.bfloat16
    sizes = shapes(options.millions)
    count = sum(torch.Size(shape).numel() for shape in sizes.values())
    version = __import__("triton").__version__ if len(choices) > 1 else "none"
    print(
        f"{torch.cuda.get_device_name()}, {datetime.date.today()}, torch {torch.__version__}, Triton {version}, "
        f"{count / 1e6:.0f}M parameters, {torch.get_num_threads()} threads, {options.rounds} rounds\n"
    )
    print("| step | bits that differ from the CPU's | the same, bfloat16 |\n|---|---|---|")
    for name in METHODS:
        for choice in choices:
            cells = [differing(choice, name, dtype, "cuda") for dtype in (f32, bf16)]
            print(f"| {name} [{choice}] | {' | '.join(cells)} |", flush=True)

    print("\n| optimizer | ms a step | ÷ fused AdamW, float32 | transient bytes a parameter |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        tensors = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in sizes.items()}
        for side in ("base", "reference"):
            (Path(folder) / side).mkdir()
            save_file(tensors, f"{folder}/{side}/model.safetensors")
            tensors = {name: x + torch.randn(x.shape).bfloat16() * 1e-3 for name, x in tensors.items()}
        del tensors
        tau = pt.TaskVector.between(base=f"{folder}/base", reference=f"{folder}/reference")
        for name in tau:
            tau.dense(name)

        def fused(params: dict[str, Tensor]) -> torch.optim.Optimizer:
            return torch.optim.AdamW(params.values(), lr=1e-6, weight_decay=0.0, fused=True)

        unit = 0.0
        for label, dtype in (("", f32), (", bfloat16", bf16)):
            runs = {f"torch AdamW, fused{label}": (fused, "eager", 0.0)}
            for name, (kind, given) in METHODS.items():
                for choice in choices:
                    make = lambda params, kind=kind, given=given: kind(params.items(), tau, **given)  # noqa: E731
                    runs[f"{name}{label} [{choice}]"] = (make, choice, 0.0)
                if kind is pt.OnDARE and "triton" in choices:
                    runs[f"{name}{label} [triton], after a pause"] = (make, "triton", 0.5)
            for name, (make, choice, pause) in runs.items():
                seconds, transient = measure(make, choice, dtype, sizes, options.rounds, pause)
                unit = unit or seconds
                print(f"| {name} | {seconds * 1e3:.2f} | {seconds / unit:.2f} | {transient:.3f} |", flush=True)


if __name__ == "__main__":
    main()
